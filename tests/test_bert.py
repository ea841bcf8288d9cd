"""BERT held against transformers' BERT: numbers, gradients, files."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pyattn
from pyattn.models.bert import (
    PUBLISHED,
    Bert,
    BertConfig,
    BertForMaskedLM,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
)
from pyattn.models.gpt import GPT
from pyattn.models.pretrained import PretrainedError

transformers = pytest.importorskip("transformers")

SIZES = {"vocab": 97, "context": 24, "layers": 2, "heads": 4, "width": 32, "hidden": 48, "labels": 3}
MODELS = {"BertModel": Bert} | {
    model.__name__: model
    for model in (
        BertForPreTraining,
        BertForMaskedLM,
        BertForSequenceClassification,
        BertForQuestionAnswering,
        BertForTokenClassification,
    )
}
B, M = 3, 20
LENGTHS = torch.tensor([M, 7, 13])
REAL = torch.arange(M) < LENGTHS[:, None]  # [B, M]: no padding


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


def _perturbed(model: nn.Module) -> Any:
    """With larger numbers than at the start, so that every part shows in the outputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _peer(kind: str, **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=97, max_position_embeddings=24, num_hidden_layers=2, num_attention_heads=4, hidden_size=32,
        intermediate_size=48, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, attn_implementation="eager",
        num_labels=2 if kind == "BertForQuestionAnswering" else 3, **options,
    )  # fmt: skip
    return _perturbed(getattr(transformers, kind)(config))


def _ours(kind: str = "BertForPreTraining", **options: Any) -> Any:
    torch.manual_seed(1)
    return _perturbed(MODELS[kind](BertConfig(**SIZES | {"attention": "torch", "dropout": 0.0} | options)))


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(1, SIZES["vocab"], (B, M), generator=generator) * REAL
    tokens[0, 5] = 0  # a padding token that is read
    segments = (torch.arange(M) >= LENGTHS[:, None] // 2).long() * REAL
    return tokens, segments, LENGTHS


def _outputs(model: nn.Module) -> list[Tensor]:
    """What an own model or one of transformers says of `_inputs`, without what stands at padding."""
    tokens, segments, lengths = _inputs()
    if type(model).__module__.startswith("pyattn"):
        results = model(tokens, segments, lengths)
        results = results if isinstance(results, tuple) else (results,)
    else:
        results = model(tokens, token_type_ids=segments, attention_mask=REAL.long()).to_tuple()
    return [result[REAL] if result.shape[:2] == (B, M) else result for result in results]


def _assert_equal(model: nn.Module, peer: nn.Module, atol: float = 2e-5) -> None:
    for result, expected in zip(_outputs(model), _outputs(peer), strict=True):
        torch.testing.assert_close(result, expected, atol=atol, rtol=0)


def _edit(folder: Path, change: Any) -> None:
    """Saves the folder's tensors as `change` makes them."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


# --- numbers


def test_bert_outputs_and_gradients_equal_transformers(kind: str, attention: str, tmp_path: Path) -> None:
    peer = _peer(kind)
    peer.save_pretrained(tmp_path)
    model = MODELS[kind].from_pretrained(tmp_path, attention=attention)
    results, wanted = _outputs(model), _outputs(peer)
    generator = torch.Generator().manual_seed(2)
    for result, expected in zip(results, wanted, strict=True):
        torch.testing.assert_close(result, expected, atol=2e-5, rtol=0)
    weights = [torch.randn(result.shape, generator=generator) for result in results]
    for outputs in (results, wanted):
        sum((output * weight).sum() for output, weight in zip(outputs, weights, strict=True)).backward()
    # The gradients under the names of files, by a model that holds them as its parameters.
    grads = MODELS[kind](model.config)
    with torch.no_grad():
        for place, parameter in zip(grads.parameters(), model.parameters(), strict=True):
            place.copy_(parameter.grad)
    stored, seen = grads.stored(), set()
    for name, parameter in peer.named_parameters():
        name = model.current_name(name)
        if parameter.grad is None or name.startswith("cls.predictions.decoder."):
            continue
        seen.add(name)
        if name.endswith("key.bias"):  # softmax does not see it: zero but for rounding
            assert max(stored[name].abs().max(), parameter.grad.abs().max()) < 1e-4, name
            continue
        difference = (stored[name] - parameter.grad).norm() / parameter.grad.norm()
        assert difference < 1e-4, (name, difference)
    assert seen == set(stored)


def test_bert_text_without_segments_and_lengths_equals_transformers(attention: str, tmp_path: Path) -> None:
    peer, (tokens, _, _) = _peer("BertModel"), _inputs()
    peer.save_pretrained(tmp_path)
    hidden, pooled = Bert.from_pretrained(tmp_path, attention=attention)(tokens)
    expected = peer(tokens)
    torch.testing.assert_close(hidden, expected.last_hidden_state, atol=2e-5, rtol=0)
    torch.testing.assert_close(pooled, expected.pooler_output, atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["BertForPreTraining", "BertForMaskedLM"])
def test_bert_logits_at_positions_are_rows_of_all(kind: str) -> None:
    model, inputs = _ours(kind), _inputs()
    positions = torch.tensor([59, 3, 24, 25])

    def masked(*arguments: Tensor) -> Tensor:
        result = model(*inputs, *arguments)
        return result[0] if kind == "BertForPreTraining" else result

    whole = masked()
    assert whole.shape == (B, M, 97)
    some = masked(positions)
    torch.testing.assert_close(some, whole.flatten(0, 1)[positions], atol=1e-6, rtol=0)
    gradients = [
        torch.autograd.grad(logits.square().sum(), model.parameters(), allow_unused=True)
        for logits in (some, whole.flatten(0, 1)[positions])
    ]
    for ours, expected in zip(*gradients, strict=True):
        assert (ours is None) == (expected is None)
        if ours is not None:
            torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-4)


def test_bert_padding_changes_nothing(kind: str, attention: str) -> None:
    model = _ours(kind, attention=attention)
    (tokens, segments, lengths), before = _inputs(), _outputs(model)
    other = torch.where(REAL, tokens, 11), torch.where(REAL, segments, 1)
    results = model(*other, lengths)
    for result, expected in zip(results if isinstance(results, tuple) else (results,), before, strict=True):
        torch.testing.assert_close(result[REAL] if result.shape[:2] == (B, M) else result, expected, atol=0, rtol=0)
    # Nor does the width of the batch that a text lies in.
    short = model(tokens[1:2, :7], segments[1:2, :7])
    full = model(tokens, segments, lengths)
    for one, all_ in zip(*(r if isinstance(r, tuple) else (r,) for r in (short, full)), strict=True):
        torch.testing.assert_close(one[0], all_[1, :7] if all_.shape[:2] == (B, M) else all_[1], atol=1e-5, rtol=0)


def test_bert_dropout_acts_in_training_only() -> None:
    for kind in MODELS:
        model = _ours(kind, dropout=0.3)
        first, again = _outputs(model), _outputs(model)
        assert all(map(torch.equal, first, again)), kind
        model.train()
        assert not any(map(torch.equal, _outputs(model), _outputs(model))), kind


def test_bert_dropout_is_where_transformers_has_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[float, bool]] = []

    def dropout(x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
        calls.append((p, training))
        return x

    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    model, peer = _ours(kind, dropout=0.3).train(), _peer(kind).train()
    first = _outputs(model)
    ours = calls.copy()
    assert set(ours) == {(0.3, True)}
    calls.clear()
    _outputs(peer)
    attention_calls = 2  # eager attention drops its weights by the same function, ours by its own
    assert len(ours) == len(calls) - attention_calls
    assert not any(map(torch.equal, first, _outputs(model)))  # by that of the attention weights


def test_bert_new_model_is_initialized_as_published() -> None:
    torch.manual_seed(0)
    model = BertForPreTraining(BertConfig(vocab=500, context=64, layers=2, heads=4, width=128, hidden=512))
    for name, p in model.named_parameters():
        if p.ndim == 2 and p.numel() > 1000:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        elif "norm" in name and name.endswith("weight"):
            assert p.eq(1).all(), name
        elif p.ndim == 1:
            assert p.eq(0).all(), name


@pytest.mark.parametrize(("name", "millions", "exact"), [("bert-base", 110, 110106428), ("bert-large", 340, 336226108)])
def test_bert_published_sizes_are_the_papers(name: str, millions: int, exact: int) -> None:
    with torch.device("meta"):
        count = sum(p.numel() for p in BertForPreTraining(PUBLISHED[name]).parameters())
    assert count == exact
    assert count / 1e6 == pytest.approx(millions, rel=0.015)


def test_bert_is_compiled_without_a_break() -> None:
    model, inputs = _ours(attention="pyattn"), _inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for result, expected in zip(compiled(*inputs), model(*inputs), strict=True):
        torch.testing.assert_close(result, expected, atol=1e-5, rtol=0)


# --- files


def test_bert_transformers_reads_what_we_save(kind: str, tmp_path: Path) -> None:
    model = _ours(kind)
    model.save_pretrained(tmp_path)
    peer, report = getattr(transformers, kind).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert peer.config.num_labels == model.config.labels
    assert peer.config.hidden_dropout_prob == peer.config.attention_probs_dropout_prob == model.config.dropout
    _assert_equal(model, peer.eval())


def test_bert_folder_of_transformers_survives_a_round_trip(kind: str, tmp_path: Path) -> None:
    peer = _peer(kind)
    peer.save_pretrained(tmp_path / "theirs")
    model = MODELS[kind].from_pretrained(tmp_path / "theirs")
    model.save_pretrained(tmp_path / "ours")
    current = {model.current_name(n): t for n, t in load_file(tmp_path / "theirs" / "model.safetensors").items()}
    ours = load_file(tmp_path / "ours" / "model.safetensors")
    assert current.keys() == ours.keys()
    assert all(torch.equal(current[name], ours[name]) for name in ours)
    assert MODELS[kind].from_pretrained(tmp_path / "ours").config == model.config
    assert not model.training
    theirs, own = (json.loads((tmp_path / f / "config.json").read_text("utf-8")) for f in ("theirs", "ours"))
    missing = {"id2label", "label2id"} if kind == "BertForQuestionAnswering" else set()  # two are the default
    assert {name: theirs.get(name) for name in own.keys() - missing} == {
        name: own[name] for name in own.keys() - missing
    }


def test_bert_config_is_read_from_the_folder(tmp_path: Path) -> None:
    _peer("BertForTokenClassification", pad_token_id=5).save_pretrained(tmp_path)
    config = BertForTokenClassification.from_pretrained(tmp_path).config
    assert config == BertConfig(**SIZES, dropout=0.0, pad=5, pooler=False)
    config = BertForTokenClassification.from_pretrained(tmp_path, dropout=0.2, attention="torch").config
    assert config == BertConfig(**SIZES, dropout=0.2, pad=5, pooler=False, attention="torch")


@pytest.mark.parametrize("head", ["BertForSequenceClassification", "BertForTokenClassification"])
def test_bert_names_of_labels_survive_a_round_trip(head: str, tmp_path: Path) -> None:
    names = {0: "bad", 1: "fair", 2: "good"}
    _peer(head, id2label=names, label2id={name: i for i, name in names.items()}).save_pretrained(tmp_path / "theirs")
    model = MODELS[head].from_pretrained(tmp_path / "theirs")
    assert model.config.label_names == tuple(names.values())
    model.save_pretrained(tmp_path / "ours")
    again = transformers.AutoConfig.from_pretrained(tmp_path / "ours")
    assert (again.id2label, again.label2id) == (names, {"bad": 0, "fair": 1, "good": 2})
    new = MODELS[head].with_new_head(tmp_path / "ours", labels=5)
    assert new.config.label_names is None, "the old head's names"


def test_bert_reads_the_names_of_old_files(tmp_path: Path) -> None:
    """Such as the hub's bert-base-uncased: TensorFlow's names of LayerNorm, buffers, the decoder beside its twin."""
    peer = _peer("BertForPreTraining")
    peer.save_pretrained(tmp_path)

    def age(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        names = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
        old = {}
        for name, tensor in tensors.items():
            end = ".".join(name.split(".")[-2:])
            old[name.replace(end, names.get(end, end))] = tensor
        old["bert.embeddings.position_ids"] = torch.arange(24)[None]
        old["cls.predictions.decoder.weight"] = tensors["bert.embeddings.word_embeddings.weight"].clone()
        old["cls.predictions.decoder.bias"] = tensors["cls.predictions.bias"].clone()
        return old

    _edit(tmp_path, age)
    _assert_equal(BertForPreTraining.from_pretrained(tmp_path), peer)
    assert any("gamma" in name for name in load_file(tmp_path / "model.safetensors"))


def test_bert_body_is_read_from_the_folder_of_any_head(kind: str, tmp_path: Path) -> None:
    peer = _peer(kind)
    peer.save_pretrained(tmp_path)
    body = getattr(peer, "bert", peer)
    pooler = body.pooler is not None
    if not pooler:
        with pytest.raises(PretrainedError, match=r"missing: bert\.pooler\.dense\.weight, bert\.pooler\.dense\.bias$"):
            Bert.from_pretrained(tmp_path)
    for wanted in {pooler, False}:
        model = Bert.from_pretrained(tmp_path, pooler=wanted)
        tokens, segments, lengths = _inputs()
        hidden, pooled = model(tokens, segments, lengths)
        expected = body(tokens, token_type_ids=segments, attention_mask=REAL.long())
        torch.testing.assert_close(hidden[REAL], expected.last_hidden_state[REAL], atol=2e-5, rtol=0)
        assert (pooled is None) == (not wanted)
        if pooled is not None:
            torch.testing.assert_close(pooled, expected.pooler_output, atol=2e-5, rtol=0)


def test_bert_masked_lm_is_read_from_the_folder_of_pretraining(tmp_path: Path) -> None:
    peer = _peer("BertForPreTraining")
    peer.save_pretrained(tmp_path)
    [logits] = _outputs(BertForMaskedLM.from_pretrained(tmp_path))
    torch.testing.assert_close(logits, _outputs(peer)[0], atol=2e-5, rtol=0)


NEW_HEADS = {
    "BertForSequenceClassification": "classifier",
    "BertForQuestionAnswering": "qa_outputs",
    "BertForTokenClassification": "classifier",
}


@pytest.mark.parametrize("head", NEW_HEADS)
@pytest.mark.parametrize("source", ["BertModel", "BertForPreTraining"])
def test_bert_new_head_stands_on_a_body_that_was_read(head: str, source: str, tmp_path: Path) -> None:
    peer = _peer(source)
    peer.save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match=rf"missing: {NEW_HEADS[head]}\.weight, {NEW_HEADS[head]}\.bias$"):
        MODELS[head].from_pretrained(tmp_path)
    labels = 2 if head == "BertForQuestionAnswering" else 5
    model = MODELS[head].with_new_head(tmp_path, labels=labels, dropout=0.2, attention="torch")
    assert not model.training
    assert model.config == replace(BertConfig(**SIZES), labels=labels, dropout=0.2, attention="torch",
                                   pooler=head == "BertForSequenceClassification")  # fmt: skip
    assert model.bert.config == model.config
    assert model.bert.layers[0].dropout == 0.2
    expected = {model.current_name(name): t for name, t in load_file(tmp_path / "model.safetensors").items()}
    own = set()
    for name, tensor in model.stored().items():
        if name.startswith("bert."):
            assert torch.equal(tensor, expected[name]), name
        else:
            own.add(name)
            if name.endswith("weight"):
                assert 0.01 < tensor.std() < 0.03
                assert len(tensor) == labels
    assert own == {f"{NEW_HEADS[head]}.weight", f"{NEW_HEADS[head]}.bias"}
    model.save_pretrained(tmp_path / "tuned")  # and now it is whole
    for result, expected_result in zip(
        _outputs(MODELS[head].from_pretrained(tmp_path / "tuned")), _outputs(model), strict=True
    ):
        assert torch.allclose(result, expected_result, atol=1e-6)


def test_bert_new_head_asks_before_it_starts_the_pooler_anew(tmp_path: Path) -> None:
    _peer("BertForMaskedLM").save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match=r"missing: bert\.pooler\.dense\.weight"):
        BertForSequenceClassification.with_new_head(tmp_path)
    model = BertForSequenceClassification.with_new_head(tmp_path, new_pooler=True)
    expected = load_file(tmp_path / "model.safetensors")
    stored = model.stored()
    for name, tensor in expected.items():
        assert name.startswith("cls.") or torch.equal(stored[name], tensor), name
    assert 0.01 < stored["bert.pooler.dense.weight"].std() < 0.03


# --- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.ones(B, 25).long()}, "tokens: expected at most context=24, got 25"),
        ({"tokens": torch.ones(B, 0).long()}, r"tokens: expected \[b, m\] with m >= 1, got \[3, 0\]"),
        ({"tokens": torch.ones(M).long()}, r"tokens: expected \[b, m\] with m >= 1, got \[20\]"),
        ({"tokens": torch.full((B, M), 97)}, r"tokens: expected values in \[0, 97\), got 97 to 97"),
        ({"tokens": torch.full((B, M), -1)}, r"tokens: expected values in \[0, 97\), got -1 to -1"),
        ({"tokens": torch.ones(B, M)}, "tokens: expected int64 or int32, got float32"),
        ({"segments": torch.full((B, M), 2)}, r"segments: expected values in \[0, 2\), got 2 to 2"),
        ({"segments": torch.zeros(M).long()}, r"segments: expected \[b=3, m=20\], as tokens, got \[20\]"),
        ({"lengths": REAL.long()}, r"lengths: expected \[b=3\], got \[3, 20\] \(of an attention_mask .*\.sum\(1\)\)"),
        ({"lengths": torch.tensor([20, 5])}, r"lengths: expected \[b=3\], got \[2\]$"),
        ({"lengths": torch.tensor([20, 5, 21])}, r"lengths: expected values in \[1, m=20\], got 5 to 21"),
        ({"lengths": torch.tensor([20, 5, 0])}, r"lengths: expected values in \[1, m=20\], got 0 to 20"),
        ({"positions": torch.tensor([60])}, r"positions: expected values in \[0, 60\), got 60 to 60"),
        ({"positions": torch.tensor([[1]])}, r"positions: expected \[p\], places in tokens.flatten\(\), got \[1, 1\]"),
        ({"positions": REAL.flatten()}, "positions: expected int64 or int32, got bool"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("attention_name", ["torch", "pyattn"])
def test_bert_bad_argument_is_named(change: dict[str, Tensor], message: str, attention_name: str) -> None:
    arguments = dict(zip(("tokens", "segments", "lengths"), _inputs(), strict=True)) | change
    if "tokens" in change:
        del arguments["segments"]
    with pytest.raises(pyattn.PyattnError, match=f"^{message}"):
        _ours(attention=attention_name)(**arguments)


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0}, {"heads": 5}, {"dropout": 1.0}, {"dropout": -0.1}, {"attention": "flash"}, {"context": -1},
        {"hidden": 0}, {"labels": 0}, {"label_names": ("a", "b")}, {"pad": 97}, {"pad": -1}, {"vocab": 0}, {"width": 0},
    ],
)  # fmt: skip
def test_bert_config_bad_value_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(pyattn.RangeError, match=f"^{next(iter(change))}"):
        BertConfig(**(SIZES | change))


@pytest.mark.parametrize(
    "field",
    [
        {"hidden_act": "relu"}, {"layer_norm_eps": 1e-5}, {"type_vocab_size": 4}, {"is_decoder": True},
        {"position_embedding_type": "relative_key"}, {"tie_word_embeddings": False}, {"model_type": "roberta"},
    ],
)  # fmt: skip
def test_bert_refuses_another_architecture_by_its_field(field: dict[str, Any], tmp_path: Path) -> None:
    _ours().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8")) | field
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(PretrainedError, match=f"expected {next(iter(field))} .* in .*config.json"):
        BertForPreTraining.from_pretrained(tmp_path)


def test_bert_refuses_the_folder_of_a_gpt(tmp_path: Path) -> None:
    transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2)).save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match="expected model_type 'bert'"):
        Bert.from_pretrained(tmp_path)
    _ours().save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match="expected model_type 'gpt2'"):
        GPT.from_pretrained(tmp_path)


def test_bert_tensors_that_do_not_fit_are_named(tmp_path: Path) -> None:
    _ours().save_pretrained(tmp_path)
    query, key = (f"bert.encoder.layer.1.attention.self.{name}" for name in ("query.weight", "key.bias"))

    def damage(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        del tensors[key]
        tensors[query] = tensors[query][:, :-1].contiguous()
        return tensors | {"bert.encoder.layer.2.output.dense.bias": torch.zeros(32)}

    _edit(tmp_path, damage)
    with pytest.raises(PretrainedError) as error:
        BertForPreTraining.from_pretrained(tmp_path)
    for part in (
        f"missing: {key};",
        "unknown: bert.encoder.layer.2.output.dense.bias;",
        f"of another shape: {query} [32, 31] for [32, 32]",
    ):
        assert part in str(error.value)
