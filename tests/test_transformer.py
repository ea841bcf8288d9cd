"""The Transformer held against transformers' Marian and torch.nn.Transformer, its steps against the whole."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

import pyattn
from pyattn.decoding.beam import beam_search
from pyattn.decoding.rules import Rules
from pyattn.decoding.sampling import generate
from pyattn.models.pretrained import PretrainedError
from pyattn.models.transformer import PUBLISHED, Transformer, TransformerConfig
from pyattn.nn.attend import Attention

SIZES: dict[str, Any] = {
    "vocab": 97, "context": 40, "layers": 2, "decoder_layers": 3, "heads": 4, "width": 32, "hidden": 48,
}  # fmt: skip
LENGTHS = torch.tensor([13, 4, 9])  # of the three sources of `_source`
PRE_NORM, LEARNED = {"norm": "pre"}, {"positions": "learned"}


pytestmark = pytest.mark.usefixtures("one_thread")


def _tokens(b: int, m: int, seed: int = 0) -> Tensor:
    return torch.randint(3, SIZES["vocab"], (b, m), generator=torch.Generator().manual_seed(seed))


def _source() -> Tensor:
    """[3, 13], padded with 0."""
    return _tokens(3, 13, seed=2) * (torch.arange(13) < LENGTHS[:, None])


def _target(b: int = 3, m: int = 11, seed: int = 1) -> Tensor:
    target = _tokens(b, m, seed)
    target[:, 0] = 1
    return target


def _model(attention: str = "torch", **options: Any) -> Transformer:
    torch.manual_seed(0)
    model = Transformer(TransformerConfig(**(SIZES | options), attention=attention))
    with torch.no_grad():
        model.final_logits_bias.normal_()
        for parameter in model.parameters():  # away from the zeros and ones that biases and norms start with
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _transformers() -> Any:
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(("activation", "scale"), [("relu", True), ("silu", False), ("gelu", True)])
def test_transformer_logits_and_gradients_equal_transformers(
    tmp_path: Path, attention: str, activation: str, scale: bool
) -> None:
    model = _model(attention, activation=activation, scale_embedding=scale)
    model.save_pretrained(tmp_path)
    peer = _transformers().MarianMTModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    source, target, labels = _source(), _target(), _tokens(3, 11, seed=3)
    mask = (torch.arange(13) < LENGTHS[:, None]).long()
    logits = model(source, target, LENGTHS)
    expected = peer(input_ids=source, attention_mask=mask, decoder_input_ids=target).logits
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)
    for result in (logits, expected):
        F.cross_entropy(result.flatten(0, 1), labels.flatten()).backward()
    for parameter in model.parameters():
        parameter.data = parameter.grad  # so that `stored` gives the gradients by their names in the file
    theirs = dict(peer.named_parameters())
    for name, grad in model.stored().items():
        if name == "final_logits_bias":
            continue
        # The softmax takes the bias of keys out of the scores, so that all of its gradient is rounding.
        least = 1e-6 if name.endswith("k_proj.bias") else 0.0
        assert (grad - theirs[name].grad).norm() < 1e-4 * theirs[name].grad.norm() + least, name


@pytest.mark.parametrize("shards", ["5GB", "20KB"])
def test_transformer_from_the_folder_of_transformers(tmp_path: Path, shards: str) -> None:
    model = _model(activation="silu", start=0)
    model.save_pretrained(tmp_path / "ours", max_shard_size=shards)
    peer = _transformers().MarianMTModel.from_pretrained(tmp_path / "ours").eval()
    peer.save_pretrained(tmp_path / "theirs", max_shard_size=shards)
    for folder in ("ours", "theirs"):
        assert (tmp_path / folder / "model.safetensors.index.json").exists() == (shards == "20KB")
    again = Transformer.from_pretrained(tmp_path / "theirs", attention="pyattn")
    assert again.config == replace(model.config, attention="pyattn")
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


def test_transformer_of_transformers_own_making(tmp_path: Path) -> None:
    """A model that was never ours, with the spelling of the released ones: swish, the pad token as start."""
    torch.manual_seed(0)
    config = _transformers().MarianConfig(
        vocab_size=97, max_position_embeddings=40, encoder_layers=2, decoder_layers=2, d_model=32, encoder_ffn_dim=48,
        decoder_ffn_dim=48, encoder_attention_heads=2, decoder_attention_heads=2, activation_function="swish",
        scale_embedding=True, pad_token_id=96, decoder_start_token_id=96, eos_token_id=0, bad_words_ids=[[96]],
    )  # fmt: skip
    peer = _transformers().MarianMTModel(config).eval()
    with torch.no_grad():
        peer.final_logits_bias.normal_()
        for name, parameter in peer.named_parameters():
            parameter.add_(0.0 if "embed_positions" in name else torch.randn_like(parameter) * 0.2)
    peer.save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path)
    assert (model.config.pad, model.config.start, model.config.end) == (96, 96, 0)
    assert model.config.decoder_layers is None
    source, target = _tokens(2, 9), _target(2)
    expected = peer(input_ids=source, attention_mask=torch.ones_like(source), decoder_input_ids=target).logits
    torch.testing.assert_close(model(source, target), expected, atol=2e-5, rtol=0)


def test_transformer_reads_files_with_copies_of_the_embedding(tmp_path: Path) -> None:
    """As transformers once saved Marian models."""
    model = _model()
    model.save_pretrained(tmp_path)
    stored = {name: t.detach().clone() for name, t in model.stored().items()}
    for name in ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"):
        stored[name] = stored["model.shared.weight"].clone()
    for stack in ("encoder", "decoder"):
        stored[f"model.{stack}.embed_positions.weight"] = model.encoder.embed_positions.table.clone()
    save_file(stored, tmp_path / "model.safetensors")
    again = Transformer.from_pretrained(tmp_path, attention="torch")
    assert torch.equal(again(_source(), _target(), LENGTHS), model(_source(), _target(), LENGTHS))


@pytest.mark.filterwarnings("ignore:enable_nested_tensor")
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_transformer_equals_torch_nn_transformer(attention: str, norm: str) -> None:
    """The only peer that has pre-LN. Of post-LN models it has one norm more, which is taken away."""
    model = _model(attention, norm=norm, positions="learned", activation="gelu")
    peer = nn.Transformer(32, 4, 2, 3, 48, 0.0, "gelu", batch_first=True, norm_first=norm == "pre").eval()
    if norm == "post":
        peer.encoder.norm = peer.decoder.norm = None
    names = {
        ".self_attn.qkv_proj.": ".self_attn.in_proj_", ".encoder_attn.out_proj.": ".multihead_attn.out_proj.",
        ".fc1.": ".linear1.", ".fc2.": ".linear2.", ".self_attn_layer_norm.": ".norm1.",
        ".encoder_attn_layer_norm.": ".norm2.", "coder.layer_norm.": "coder.norm.",
    }  # fmt: skip
    weights = {}
    for name, tensor in model.state_dict().items():
        if ".q_proj." in name:
            fused = torch.cat([tensor, model.state_dict()[name.replace("q_proj", "kv_proj")]])
            weights[name.replace("encoder_attn.q_proj.", "multihead_attn.in_proj_")] = fused
        elif name.startswith(("encoder.l", "decoder.l")) and "kv_proj" not in name.replace("qkv_proj", ""):
            for ours, theirs in names.items():
                name = name.replace(ours, theirs)
            last = ".norm2." if name.startswith("encoder") else ".norm3."
            weights[name.replace(".final_layer_norm.", last)] = tensor
    peer.load_state_dict(weights)
    source, target = _source(), _target()
    embedded = [
        math.sqrt(32) * model.shared(tokens) + stack.embed_positions.weight[: tokens.shape[1]]
        for tokens, stack in ((source, model.encoder), (target, model.decoder))
    ]
    hidden = torch.arange(13) >= LENGTHS[:, None]
    causal = torch.ones(11, 11, dtype=torch.bool).triu(1)
    out = peer(*embedded, tgt_mask=causal, src_key_padding_mask=hidden, memory_key_padding_mask=hidden)
    expected = out @ model.shared.weight.T + model.final_logits_bias
    torch.testing.assert_close(model(source, target, LENGTHS), expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("options", [PRE_NORM, LEARNED, PRE_NORM | LEARNED])
def test_transformer_beyond_marian_learns_and_keeps_to_itself(tmp_path: Path, options: dict) -> None:
    model = _model("pyattn", dropout=0.1, **options).train()
    source, target = _source(), _target()
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(source, target[:, :-1], LENGTHS).flatten(0, 1), target[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2
    model.save_pretrained(tmp_path)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(source, target, LENGTHS), model.eval()(source, target, LENGTHS))
    transformers = _transformers()
    with pytest.raises((ValueError, KeyError), match="pyattn-transformer"):
        transformers.AutoModelForSeq2SeqLM.from_pretrained(tmp_path)


def test_transformer_sinusoids_are_the_papers_in_another_order() -> None:
    table = _model().encoder.embed_positions.table
    for position in (0, 1, 7, 39):
        for i in range(16):
            angle = position / 10000 ** (2 * i / 32)  # section 3.5
            assert table[position, i].item() == pytest.approx(math.sin(angle), abs=1e-7)
            assert table[position, 16 + i].item() == pytest.approx(math.cos(angle), abs=1e-7)


@pytest.mark.parametrize(("name", "exact", "paper"), [("base", 63_082_496, 65e6), ("big", 214_245_376, 213e6)])
def test_transformer_published_sizes(name: str, exact: int, paper: float) -> None:
    """Table 3 has 65 and 213 million, with about 37000 tokens: 3.0 % less and 0.6 % more."""
    c = PUBLISHED[name]
    with torch.device("meta"):
        model = Transformer(c)
    attention, feed_forward = 4 * (c.width**2 + c.width), 2 * c.width * c.hidden + c.hidden + c.width
    encoder, decoder = attention + feed_forward + 4 * c.width, 2 * attention + feed_forward + 6 * c.width
    assert c.vocab * c.width + c.layers * (encoder + decoder) == exact
    assert sum(p.numel() for p in model.parameters()) == exact
    assert exact == pytest.approx(paper, rel=0.03)


def test_transformer_new_model_follows_tensor2tensors_initialization() -> None:
    torch.manual_seed(0)
    sizes = {"vocab": 500, "context": 300, "layers": 2, "heads": 4, "width": 128, "hidden": 512}
    model = Transformer(TransformerConfig(**sizes, positions="learned"))
    for name, tensor in model.stored().items():
        if "shared" in name or "embed_positions" in name:
            assert tensor.std().item() == pytest.approx(128**-0.5, rel=0.03), name
        elif tensor.ndim == 2 and name != "final_logits_bias":
            bound = math.sqrt(6 / sum(tensor.shape))  # Glorot and Bengio 2010, equation 16
            assert 0.99 * bound < tensor.abs().max().item() <= bound, name
            assert tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.03), name
        else:
            assert tensor.eq(float("norm.weight" in name)).all(), name


def test_transformer_attentions_share_weights_from_one_seed() -> None:
    ours, torchs = _model("pyattn").state_dict(), _model("torch").state_dict()
    assert all(torch.equal(ours[name], torchs[name]) for name in torchs)


def test_transformer_dropout_acts_everywhere_in_training_only(monkeypatch: pytest.MonkeyPatch) -> None:
    model, arguments = _model("pyattn", dropout=0.3), (_source(), _target(), LENGTHS)
    assert torch.equal(model(*arguments), model(*arguments))
    model.train()
    assert not torch.equal(model(*arguments), model(*arguments))
    seen: list[float] = []
    plain = F.dropout

    def dropout(x: Tensor, p: float, training: bool) -> Tensor:
        seen.append(p * training)
        return plain(x, p, training)

    def full(*arguments: Any) -> Tensor:
        seen.append(arguments[-1])
        return kept.full(*arguments)

    kept = model.encoder.layers[0].self_attn.attention
    for layer in (*model.encoder.layers, *model.decoder.layers):
        for part in {"self_attn", "encoder_attn"} & dict(layer.named_children()).keys():
            getattr(layer, part).attention = Attention(full, kept.cached)
    monkeypatch.setattr(F, "dropout", dropout)
    model(*arguments)
    # Both embeddings; in 2 layers of the encoder 2 parts, one of them attention, in 3 of the decoder 3 and 2.
    assert seen == [0.3] * (2 + 2 * (2 + 1) + 3 * (3 + 2))


@pytest.mark.parametrize("options", [{}, PRE_NORM | LEARNED])
def test_transformer_padding_changes_nothing(attention: str, options: dict) -> None:
    model, source, target = _model(attention, **options), _source(), _target()
    logits = model(source, target, LENGTHS)
    for row, length in enumerate(LENGTHS.tolist()):
        alone = model(source[row : row + 1, :length], target[row : row + 1, :7])
        torch.testing.assert_close(logits[row, :7], alone[0], atol=2e-5, rtol=0)
    other = torch.where(torch.arange(13) < LENGTHS[:, None], source, 50)
    assert torch.equal(model(other, target, LENGTHS), logits)


@torch.no_grad()
def test_transformer_several_targets_per_source(attention: str) -> None:
    model, source, target = _model(attention), _source(), _target(6)
    logits = model(source, target, LENGTHS)
    expected = model(source.repeat_interleave(2, 0), target, LENGTHS.repeat_interleave(2))
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, PRE_NORM | LEARNED])
@pytest.mark.parametrize("page", [None, 4, 7])
def test_transformer_step_by_step_equals_the_whole(attention: str, page: int | None, options: dict) -> None:
    """Rows that multiply into beams, change places unevenly, and go, and with them their sources."""
    model = _model(attention, **options)
    orders = {0: [0, 0, 1, 1, 2, 2], 2: [1, 0, 3, 2, 4, 4], 4: [5, 3, 0, 1], 6: [1, 0, 3, 1], 9: [2, 2, 0], 12: [2]}
    texts = {i: [1] for i in range(3)}
    reads = list(range(3))  # the source of each row
    logits, state = model.prefill(_source(), LENGTHS, count=15, page=page)
    assert state.read == [[1], [1], [1]]
    for step in range(15):
        for row, (text, found) in enumerate(zip(texts.values(), logits, strict=True)):
            source = _source()[reads[row], : LENGTHS[reads[row]]]
            expected = model(source[None], torch.tensor([text]))[0, -1]
            torch.testing.assert_close(found, expected, atol=2e-5, rtol=0, msg=lambda m: f"step {step}: {m}")  # noqa: B023
        if step in orders:
            state.reorder(orders[step])
            texts = {i: list(texts[row]) for i, row in enumerate(orders[step])}
            reads = [reads[row] for row in orders[step]]
            assert len(state.memory.layers[0][0]) == len(set(reads)), step
        new = _tokens(1, len(texts), seed=step)[0]
        for text, token in zip(texts.values(), new.tolist(), strict=True):
            text.append(token)
        logits = model.step(new, state)
    with pytest.raises(pyattn.RangeError, match="at most 16"):
        model.step(new, state)


@torch.no_grad()
@pytest.mark.parametrize("rows", [[0, 0, 0, 1, 1, 1, 2, 2, 2], [2, 0, 1, 1, 0]])
def test_transformer_beams_share_the_memory_of_their_source(attention: str, rows: list[int]) -> None:
    model = _model(attention)
    _, state = model.prefill(_source(), LENGTHS, count=5)
    before = [tensor.data_ptr() for layer in state.memory.layers for tensor in layer]
    state.reorder(rows)
    assert [tensor.data_ptr() for layer in state.memory.layers for tensor in layer] == before
    seen = []

    def full(q: Tensor, k: Tensor, v: Tensor, *others: Any) -> Tensor:
        seen.extend([k.data_ptr(), v.data_ptr()])
        assert q.shape == (3, 4, -(-len(rows) // 3) if rows[0] == 0 else 2, 8)  # beams are queries of their source
        return kept.full(q, k, v, *others)

    for layer in model.decoder.layers:
        kept = layer.encoder_attn.attention
        layer.encoder_attn.attention = Attention(full, kept.cached)
    model.step(_tokens(1, len(rows))[0], state)
    assert seen == before


@torch.no_grad()
def test_transformer_dropped_sources_leave_the_memory() -> None:
    model = _model("pyattn")
    _, state = model.prefill(_source(), LENGTHS, count=5)
    k = state.memory.layers[1][0].clone()
    state.reorder([2, 0, 0])
    assert torch.equal(state.memory.layers[1][0], k[[0, 2]])
    assert state.memory.lengths.tolist() == [13, 9]
    assert state.memory.sources == [1, 0, 0]


@pytest.mark.parametrize("beams", [1, 4])
def test_transformer_translates_as_transformers(tmp_path: Path, beams: int) -> None:
    """Unequal sources in one batch. No token comes twice, since the texts of a random model are one token otherwise."""
    model, rules = _model("pyattn", start=0), Rules(forbidden=(0,), no_repeat_ngram=1)
    with torch.no_grad():
        model.final_logits_bias.zero_()
        model.final_logits_bias[0, :3] = torch.tensor([2.0, 0.0, 1.0])  # pad would come, and the end does
    model.save_pretrained(tmp_path)
    peer = _transformers().MarianMTModel.from_pretrained(tmp_path).eval()
    assert peer.generation_config.forced_eos_token_id is None  # it ends no text by force, as we do not
    out = peer.generate(
        input_ids=_source(), attention_mask=(torch.arange(13) < LENGTHS[:, None]).long(), num_beams=beams,
        do_sample=False, max_new_tokens=20, bad_words_ids=[[0]], no_repeat_ngram_size=1,
        early_stopping="never" if beams > 1 else False,
    )  # fmt: skip
    expected = [[token for token in row if token not in (0, 2)] for row in out.tolist()]
    if beams == 1:
        found = generate(model, _source(), 20, lengths=LENGTHS, rules=rules, end=2)
    else:
        best = beam_search(model, _source(), 20, beams=beams, lengths=LENGTHS, rules=rules, end=2)
        found = [hypotheses[0].tokens for hypotheses in best]
    assert found == expected
    assert len(set(map(tuple, expected))) == len(set(map(len, expected))) == 3


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0}, {"decoder_layers": 0}, {"heads": 5}, {"dropout": 1.0}, {"attention": "flash"}, {"context": -1},
        {"hidden": 0}, {"norm": "no"}, {"positions": "none"}, {"activation": "tanh"}, {"pad": 97}, {"start": -1},
        {"end": 97},
    ],
)  # fmt: skip
def test_transformer_config_bad_value_is_named(change: dict) -> None:
    with pytest.raises(pyattn.RangeError, match=f"^{next(iter(change))}: "):
        TransformerConfig(**(SIZES | change))


def test_transformer_bad_input_is_named() -> None:
    model = _model()
    with pytest.raises(pyattn.RangeError, match=r"^source: expected at most context=40, got 41"):
        model(_tokens(1, 41), _target(1))
    with pytest.raises(pyattn.RangeError, match=r"^target: expected at most context=40, got 41"):
        model(_tokens(1, 4), _target(1, 41))
    with pytest.raises(pyattn.ShapeError, match=r"^target: .* 3 sources, got 4"):
        model(_source(), _target(4), LENGTHS)
    with pytest.raises(pyattn.ShapeError, match=r"^lengths: expected \[3\], .* got \[2\]"):
        model(_source(), _target(), LENGTHS[:2])
    with pytest.raises(pyattn.RangeError, match=r"^prompt: expected at most context=40, got 41"):
        model.prefill(_tokens(1, 41), count=1)
    with pytest.raises(pyattn.RangeError, match=r"^count: expected at most 39, .* got 40"):
        model.prefill(_source(), LENGTHS, count=40)


@pytest.mark.parametrize(
    "change",
    [
        {"share_encoder_decoder_embeddings": False}, {"tie_word_embeddings": False}, {"decoder_vocab_size": 98},
        {"decoder_attention_heads": 2}, {"decoder_ffn_dim": 47}, {"activation_function": "tanh"},
        {"normalize_before": True}, {"normalize_embedding": True}, {"static_position_embeddings": False},
        {"add_final_layer_norm": True}, {"model_type": "bart"},
    ],
)  # fmt: skip
def test_transformer_refuses_what_it_does_not_compute(tmp_path: Path, change: dict) -> None:
    _model().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(
        PretrainedError, match=f"model: expected {next(iter(change))} .* got {next(iter(change.values()))!r}"
    ):
        Transformer.from_pretrained(tmp_path)


def test_transformer_token_outside_the_vocabulary_is_named() -> None:
    model, vocab = _model(), SIZES["vocab"]
    wrong = {"source": (torch.tensor([[3, vocab]]), _target(1)), "target": (_source()[:1], torch.tensor([[-1]]))}
    for name, tokens in wrong.items():
        with pytest.raises(pyattn.RangeError, match=rf"{name}: expected values in \[0, {vocab}\)"):
            model(*tokens)
