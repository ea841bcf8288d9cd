"""XLNet held against transformers' XLNet and a loop in float64: numbers, gradients, memory, decoding, files."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import pyattn
from pyattn.decoding.beam import beam_search
from pyattn.models.pretrained import PretrainedError
from pyattn.models.xlnet import PUBLISHED, XLNet, XLNetConfig, XLNetLMHead
from pyattn.models.xlnet_heads import (
    XLNetForMultipleChoice,
    XLNetForQuestionAnswering,
    XLNetForQuestionAnsweringSimple,
    XLNetForSequenceClassification,
    XLNetForTokenClassification,
)

transformers = pytest.importorskip("transformers")

SIZES: dict[str, Any] = {"vocab": 97, "layers": 2, "heads": 4, "width": 32, "hidden": 48, "labels": 3}
HEADS = (
    XLNetForSequenceClassification,
    XLNetForTokenClassification,
    XLNetForMultipleChoice,
    XLNetForQuestionAnsweringSimple,
    XLNetForQuestionAnswering,
)
MODELS: dict[str, Any] = {"XLNetModel": XLNet, "XLNetLMHeadModel": XLNetLMHead} | {m.__name__: m for m in HEADS}
B, M = 4, 12
LENGTHS = torch.tensor([M, 9, 10, 8])
REAL = torch.arange(M) >= M - LENGTHS[:, None]  # [B, M]: padding is in front
# Parameters that add one number to all logits of a softmax, which does not see it: gradients of zero but for rounding.
UNSEEN = ("start_logits.dense.bias", "end_logits.LayerNorm.bias", "end_logits.dense_1.bias")
STARTS = torch.tensor([3, 8, 11, 6])

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(params=MODELS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(params=["reference", "cpu"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    with pyattn.use_backend(request.param):
        yield request.param


def _perturbed(model: nn.Module) -> Any:
    """With larger numbers than at the start, so that every part shows in the outputs."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def _peer(kind: str = "XLNetLMHeadModel", **options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.XLNetConfig(
        vocab_size=97, n_layer=2, n_head=4, d_model=32, d_inner=48, num_labels=2 if kind.endswith("Simple") else 3,
        **{"dropout": 0.0, "summary_last_dropout": 0.0, "mem_len": None} | options,
    )  # fmt: skip
    return _perturbed(getattr(transformers, kind)(config))


def _ours(kind: str = "XLNetLMHeadModel", **options: Any) -> Any:
    torch.manual_seed(1)
    return _perturbed(MODELS[kind](XLNetConfig(**SIZES | {"dropout": 0.0} | options)))


def _tokens(*shape: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 97, shape, generator=torch.Generator().manual_seed(seed))


def _permuted() -> tuple[Tensor, Tensor, Tensor]:
    """order [B, M], masked [B, M] and targets [B, 4]: of the last 8 tokens, which all texts have, 7 have places."""
    generator = torch.Generator().manual_seed(3)
    order, masked = torch.full((B, M), -1), torch.zeros(B, M, dtype=torch.bool)
    targets = torch.empty(B, 4, dtype=torch.int64)
    for row in range(B):
        order[row, M - 8 : M - 1] = torch.randperm(7, generator=generator)
        targets[row] = M - 8 + torch.randperm(7, generator=generator)[:4]
        masked[row, targets[row]] = True
    return order, masked, targets


def _arguments(parts: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """The same inputs for an own model and for transformers', by words."""
    ours, theirs = {}, {}
    if "segments" in parts:
        ours["segments"] = theirs["token_type_ids"] = (torch.arange(M) > 6).long() + (torch.arange(M) == M - 1) + REAL
    if "lengths" in parts:
        ours["lengths"], theirs["attention_mask"] = LENGTHS, REAL.float()
    order, masked, targets = _permuted()
    if "order" in parts:
        ours["order"] = order
        hides = masked if "masked" in parts else order >= 0
        if "masked" in parts:
            ours["masked"] = masked
        theirs["perm_mask"] = ((order[:, :, None] <= order[:, None]) & hides[:, None]).float()
    if "targets" in parts:
        ours["targets"], theirs["target_mapping"] = targets, nn.functional.one_hot(targets, M).float()
    return ours, theirs


def _outputs(model: nn.Module, tokens: Tensor | None = None) -> list[Tensor]:
    """What any model says of padded texts with segments, without what stands at padding."""
    ours, theirs = _arguments("segments lengths")
    is_ours, name = type(model).__module__.startswith("pyattn"), type(model).__name__
    tokens = _tokens(B, M) if tokens is None else tokens
    arguments = ours if is_ours else theirs
    if name == "XLNetForMultipleChoice":  # two texts with two choices each
        pairs = {name: t.unflatten(0, (2, 2)) for name, t in arguments.items()}
        result = model(tokens.unflatten(0, (2, 2)), **pairs)
    elif name != "XLNetForQuestionAnswering":
        result = model(tokens, **arguments)
    elif is_ours:
        found = model.search(tokens, **ours)
        result = (found.start_probabilities, found.end_probabilities.mT.flatten(1), found.impossible)
    else:
        found = model(tokens, **theirs, p_mask=(~REAL).float())
        result = (found.start_top_log_probs, found.end_top_log_probs, found.cls_logits)
    if not isinstance(result, (tuple, Tensor)):
        result = tuple(t for name, t in result.items() if name != "mems")
    results = [t for t in (result if isinstance(result, tuple) else (result,)) if t is not None]
    return [t[REAL] if t.shape[:2] == (B, M) else t for t in results]


def _assert_equal(results: list[Tensor], expected: list[Tensor]) -> None:
    for result, other in zip(results, expected, strict=True):
        torch.testing.assert_close(result, other, atol=2e-5, rtol=0)


def _assert_same_gradients(model: Any, peer: Any) -> None:
    stored, seen = model.stored(), set()
    for name, parameter in peer.named_parameters():
        name = model.current_name(name)
        ours = stored[name].grad
        assert (ours is None) == (parameter.grad is None), name
        if ours is not None:
            seen.add(name)
            if name in UNSEEN:
                assert max(ours.abs().max(), parameter.grad.abs().max()) < 1e-6, name
                continue
            difference = (ours - parameter.grad).norm() / parameter.grad.norm()
            assert difference < 1e-4, (name, difference)
    assert {name for name, t in stored.items() if t.grad is not None} == seen


# --- numbers

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "bidirectional": ("", {}),
    "padded": ("lengths", {}),
    "segments": ("segments", {}),
    "permuted": ("order targets", {}),
    "permuted-content": ("order", {}),
    "separators": ("order masked targets", {}),
    "targets-without-order": ("targets", {}),
    "memory": ("memory", {}),
    "memory-segments": ("memory segments", {}),
    "all": ("memory segments lengths order masked targets", {}),
    "clamp": ("memory order targets", {"clamp_len": 3}),
    "two-ways": ("memory segments order targets", {"bi_data": True}),
    "two-ways-clamp": ("lengths", {"bi_data": True, "clamp_len": 4}),
    "causal": ("", {"attn_type": "uni"}),
    "causal-all": ("memory segments lengths order targets", {"attn_type": "uni"}),
    "causal-two-ways": ("memory targets", {"attn_type": "uni", "bi_data": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_xlnet_logits_gradients_and_memory_equal_transformers(case: str, backend: str, tmp_path: Path) -> None:
    parts, options = CASES[case]
    peer = _peer(**options)
    peer.save_pretrained(tmp_path)
    model = XLNetLMHead.from_pretrained(tmp_path)
    ours, theirs = _arguments(parts)
    if "memory" in parts:
        before = _tokens(B, 7, seed=1)
        _, ours["memory"] = model(before, remember=True)
        theirs["mems"] = peer(before).mems
    tokens = _tokens(B, M)
    logits, memory = model(tokens, **ours, remember=True)
    expected, mems = _one_by_one(peer, tokens, theirs) if case == "causal-all" else peer(tokens, **theirs).to_tuple()
    rows = REAL if "lengths" in parts and "targets" not in parts else slice(None)
    torch.testing.assert_close(logits[rows], expected[rows], atol=2e-5, rtol=0)
    weight = torch.randn(expected[rows].shape, generator=torch.Generator().manual_seed(2))
    for result in (logits, expected):
        (result[rows] * weight).sum().backward()
    _assert_same_gradients(model, peer)
    assert not any(x.requires_grad for x in memory)
    if "lengths" not in parts:
        _assert_equal(list(memory), [x.transpose(0, 1) for x in mems])


def _one_by_one(peer: Any, tokens: Tensor, arguments: dict[str, Any]) -> tuple[Tensor, None]:
    """transformers' causal models fail for several texts with masks, to which it adds the causal one in place."""
    mems, texts = arguments.pop("mems"), []
    for row in range(len(tokens)):
        own = {name: t[[row]] for name, t in arguments.items()} | {"mems": [x[:, [row]] for x in mems]}
        texts.append(peer(tokens[[row]], **own).logits)
    return torch.cat(texts), None


@pytest.mark.parametrize(
    "limits", [{}, {"mem_len": 5}, {"mem_len": 15}, {"reuse_len": 4}, {"mem_len": 6, "reuse_len": 4}, {"mem_len": 0}]
)
def test_xlnet_memory_is_cut_as_transformers_does(limits: dict[str, int], tmp_path: Path) -> None:
    peer = _peer("XLNetModel", **limits)
    peer.save_pretrained(tmp_path)
    model, memory, mems = XLNet.from_pretrained(tmp_path), None, None
    for part in range(3):
        tokens = _tokens(2, M, seed=part)
        hidden, memory = model(tokens, memory=memory, remember=True)
        wanted = peer(tokens, mems=mems)
        mems = wanted.mems
        torch.testing.assert_close(hidden, wanted.last_hidden_state, atol=2e-5, rtol=0)
        _assert_equal(list(memory), [x.transpose(0, 1) for x in mems])
    assert model(tokens)[1] is None


def _layer_loop(layer: Any, x: Tensor, h: Tensor, at: list[int], sees: Any, segments: list[int]) -> Tensor:
    """One layer of one text, from the paper's appendix A.2 and nothing else: x [rows, width] at positions, over h."""
    a, width = layer.rel_attn, x.shape[-1]
    scale = 1 / math.sqrt(width // a.heads)
    rows = []
    for i, row in zip(at, x, strict=True):
        out = torch.zeros(width, dtype=x.dtype)
        for head in range(a.heads):
            q, scores, values = row @ a.q[:, head], [], []
            for j in range(len(h)):
                if not sees(i, j):
                    continue
                angles = torch.tensor([(i - j) / 10000 ** (2 * f / width) for f in range(width // 2)], dtype=x.dtype)
                r = torch.cat([angles.sin(), angles.cos()]) @ a.r[:, head]
                differ = int(segments[i] != segments[j])
                scores.append(
                    (q + a.r_w_bias[head]) @ (h[j] @ a.k[:, head])
                    + (q + a.r_r_bias[head]) @ r
                    + (q + a.r_s_bias[head]) @ a.seg_embed[differ, head]
                )
                values.append(h[j] @ a.v[:, head])
            if scores:
                p = (torch.stack(scores) * scale).softmax(0)
                out = out + a.o[:, head] @ (p @ torch.stack(values))
        rows.append(out)
    return layer.ff(a.layer_norm(x + torch.stack(rows)))


@torch.no_grad()
def test_xlnet_equals_a_loop_over_queries_and_keys_in_float64(backend: str) -> None:
    """Every token has a place here, so that one target sees nothing: transformers gives it the mean of all values."""
    model = _ours("XLNetModel", width=8, heads=2, hidden=12).double()
    tokens, segments = _tokens(1, 5), [0, 2, 1, 1, 0]
    order, targets = [3, 0, 4, 1, 2], [4, 1, 2]
    h, g = model.word_embedding(tokens[0]), model.mask_emb[0].expand(3, -1)
    for layer in model.layer:
        g_next = _layer_loop(layer, g, h, targets, lambda i, j: order[i] > order[j], segments)
        h = _layer_loop(layer, h, h, list(range(5)), lambda i, j: order[i] >= order[j], segments)
        g = g_next
    ids = torch.tensor([segments])
    hidden, _ = model(tokens, ids, order=torch.tensor([order]), targets=torch.tensor([targets]))
    torch.testing.assert_close(hidden[0], g, atol=1e-11, rtol=0)
    hidden, _ = model(tokens, ids, order=torch.tensor([order]))
    torch.testing.assert_close(hidden[0], h, atol=1e-11, rtol=0)
    changed, _ = model((tokens + 1) % 97, ids, order=torch.tensor([order]), targets=torch.tensor([[1]]))
    assert torch.equal(changed, model(tokens, ids, order=torch.tensor([order]), targets=torch.tensor([[1]]))[0])


def test_xlnet_target_sees_those_of_lower_places_alone() -> None:
    """The gradient of a target's logits by the embeddings is where the order says, and not at the target itself."""
    model, (order, _, targets) = _ours(layers=3), _permuted()
    for row in range(B):
        for place, target in enumerate(targets[row].tolist()):
            embedded = model.transformer.word_embedding.weight.detach()[_tokens(B, M)[row]].requires_grad_()
            model.transformer.embed = lambda _, x=embedded: x[None]
            logits, _ = model(_tokens(B, M)[row][None], order=order[row][None], targets=targets[row][None])
            (gradient,) = torch.autograd.grad(logits[0, place].sum(), embedded)
            assert torch.equal(gradient.abs().sum(-1) > 0, order[row] < order[row, target])


def test_xlnet_repeated_target_is_computed_alike() -> None:
    model, (order, _, targets) = _ours(), _permuted()
    logits, _ = model(_tokens(B, M), order=order, targets=targets[:, [0, 1, 1, 0]])
    once, _ = model(_tokens(B, M), order=order, targets=targets[:, :2].int())
    torch.testing.assert_close(logits, once[:, [0, 1, 1, 0]], atol=1e-6, rtol=0)


def test_xlnet_padding_changes_nothing(kind: str) -> None:
    model = _ours(kind)
    assert all(map(torch.equal, _outputs(model), _outputs(model, torch.where(REAL, _tokens(B, M), 11))))


def test_xlnet_text_alone_is_as_in_a_wider_batch() -> None:
    model, (ours, _) = _ours(), _arguments("segments lengths")
    logits, _ = model(_tokens(B, M), **ours)
    alone, _ = model(_tokens(B, M)[3:, -8:], ours["segments"][3:, -8:])
    torch.testing.assert_close(alone[0], logits[3, -8:], atol=1e-5, rtol=0)


def test_xlnet_bfloat16_is_near_float32() -> None:
    model, (ours, _) = _ours(), _arguments("segments lengths order targets")
    exact, _ = model(_tokens(B, M), **ours)
    rough, _ = model.bfloat16()(_tokens(B, M), **ours)
    assert rough.dtype is torch.bfloat16
    assert 1e-5 < (rough.float() - exact).norm() / exact.norm() < 0.05


def test_xlnet_is_compiled_without_a_break() -> None:
    model, (ours, _) = _ours(), _arguments("segments lengths order masked targets")
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(_tokens(B, M), **ours)[0], model(_tokens(B, M), **ours)[0], atol=1e-5, rtol=0)


def test_xlnet_dropout_is_where_transformers_has_it(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[float, bool]] = []

    def dropout(x: Tensor, p: float, training: bool = True, inplace: bool = False) -> Tensor:
        calls.append((p, training))
        return x

    model, peer = _ours(kind, dropout=0.3), _peer(kind).train()
    assert all(map(torch.equal, _outputs(model), _outputs(model)))
    monkeypatch.setattr(torch.nn.functional, "dropout", dropout)
    first = _outputs(model.train())
    ours = calls.copy()
    assert set(ours) == {(0.3, True)}
    calls.clear()
    _outputs(peer)
    summary = "summary" in " ".join(dict(model.named_modules()))  # an Identity, where its probability is 0
    attention_calls = 2  # transformers drops attention's weights by the same function, ours by its own
    assert len(ours) == len(calls) - attention_calls + summary
    assert not any(map(torch.equal, first, _outputs(model)))  # by that of the attention weights


def test_xlnet_new_model_is_initialized_as_published() -> None:
    torch.manual_seed(0)
    model = XLNetForSequenceClassification(XLNetConfig(vocab=500, layers=1, heads=4, width=128, hidden=512))
    for name, p in model.named_parameters():
        if p.ndim > 1 and p.numel() > 1000:
            assert p.std().item() == pytest.approx(0.02, rel=0.05), name
        elif "layer_norm.weight" in name:
            assert p.eq(1).all(), name
        elif p.ndim == 1:
            assert p.eq(0).all(), name


@pytest.mark.parametrize(("name", "exact"), [("xlnet-base-cased", 116718336), ("xlnet-large-cased", 360268800)])
def test_xlnet_published_sizes(name: str, exact: int) -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in XLNet(PUBLISHED[name]).parameters()) == exact


# --- decoding


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"clamp": 5}, {"causal": True}], ids=str)
def test_xlnet_step_by_step_equals_the_whole(options: dict[str, Any], backend: str) -> None:
    """Unequal prompts, then rows that multiply, change places and go."""
    model, orders = _ours(**options), {0: [0, 0, 1, 1, 1, 2], 4: [5, 3, 3, 0, 1, 0], 6: [0, 2, 5]}
    tokens, lengths = _tokens(3, 14), torch.tensor([7, 14, 10])
    logits, state = model.prefill(tokens, lengths, count=8)
    texts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    assert state.read == texts
    for step in range(8):
        for text, found in zip(texts, logits, strict=True):
            m = len(text)
            whole, _ = model(torch.tensor([[*text, 0]]), order=torch.arange(m + 1)[None], targets=torch.tensor([[m]]))
            torch.testing.assert_close(found, whole[0, 0], atol=2e-5, rtol=0)
        if step in orders:
            state.reorder(orders[step])
            texts = [list(texts[row]) for row in orders[step]]
        new = _tokens(1, len(texts), seed=step)[0]
        for text, token in zip(texts, new.tolist(), strict=True):
            text.append(token)
        logits = model.step(new, state)
    with pytest.raises(pyattn.RangeError, match="at most 22"):
        model.step(_tokens(1, 3)[0], state)


def test_xlnet_beams_continue_prompts() -> None:
    model, prompts, lengths = _ours(), _tokens(2, 5), torch.tensor([5, 3])
    together = beam_search(model, prompts, 4, beams=3, lengths=lengths)
    alone = beam_search(model, prompts[1:, :3], 4, beams=3)
    assert [beam.tokens for beam in together[1]] == [beam.tokens for beam in alone[0]]


# --- files


def test_xlnet_transformers_reads_what_we_save(kind: str, tmp_path: Path) -> None:
    model = _ours(kind, clamp=3, memory=9, reuse=4, dropout=0.2, pad=7, end=8, starts=3, ends=4)
    model.save_pretrained(tmp_path)
    peer, report = getattr(transformers, kind).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    c = peer.config
    assert (c.num_labels, c.dropout, c.summary_last_dropout) == (model.config.labels, 0.2, 0.2)
    assert (c.clamp_len, c.mem_len, c.reuse_len, c.pad_token_id, c.eos_token_id) == (3, 9, 4, 7, 8)
    _assert_equal(_outputs(model), _outputs(peer.eval()))


def test_xlnet_folder_of_transformers_survives_a_round_trip(kind: str, tmp_path: Path) -> None:
    names = {} if kind.endswith("Simple") else {"id2label": {0: "a", 1: "b", 2: "c"}}
    peer = _peer(kind, clamp_len=4, mem_len=30, start_n_top=2, **names)
    peer.save_pretrained(tmp_path / "theirs")
    model = MODELS[kind].from_pretrained(tmp_path / "theirs")
    assert not model.training
    _assert_equal(_outputs(model), _outputs(peer))
    model.save_pretrained(tmp_path / "ours")
    theirs, ours = (load_file(tmp_path / f / "model.safetensors") for f in ("theirs", "ours"))
    theirs = {model.current_name(name): tensor for name, tensor in theirs.items()}
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)
    again = MODELS[kind].from_pretrained(tmp_path / "ours")
    assert again.config == model.config
    assert all(map(torch.equal, _outputs(again), _outputs(model)))
    peer_again = getattr(transformers, kind).from_pretrained(tmp_path / "ours").eval()
    assert peer_again.config.id2label == peer.config.id2label
    _assert_equal(_outputs(peer_again), _outputs(peer))


def test_xlnet_config_is_read_from_the_folder(tmp_path: Path) -> None:
    _peer(clamp_len=7, bi_data=True, attn_type="uni", mem_len=9, reuse_len=3, pad_token_id=4).save_pretrained(tmp_path)
    expected = XLNetConfig(**SIZES, dropout=0.0, clamp=7, two_ways=True, causal=True, memory=9, reuse=3, pad=4)
    assert XLNetLMHead.from_pretrained(tmp_path).config == expected
    assert XLNetLMHead.from_pretrained(tmp_path, clamp=2).config.clamp == 2


@pytest.mark.parametrize("head", HEADS, ids=lambda head: head.__name__)
def test_xlnet_new_head_stands_on_a_body_that_was_read(head: Any, tmp_path: Path) -> None:
    peer = _peer("XLNetLMHeadModel")
    peer.save_pretrained(tmp_path)
    with pytest.raises(PretrainedError, match="missing: "):
        head.from_pretrained(tmp_path)
    model = head.with_new_head(tmp_path, labels=2, dropout=0.2)
    assert (model.config.labels, model.config.dropout, model.training) == (2, 0.2, False)
    assert model.transformer.layer[0].ff.dropout == 0.2
    expected = load_file(tmp_path / "model.safetensors")
    for name, tensor in model.stored().items():
        if name.startswith("transformer."):
            assert torch.equal(tensor, expected[name]), name
        elif tensor.numel() > 50:
            assert 0.01 < tensor.std() < 0.03, name


@pytest.mark.parametrize("head", ["XLNetLMHeadModel", "XLNetForQuestionAnswering"])
def test_xlnet_body_is_read_from_the_folder_of_any_head(head: str, tmp_path: Path) -> None:
    peer = _peer(head)
    peer.save_pretrained(tmp_path)
    _assert_equal(_outputs(XLNet.from_pretrained(tmp_path)), _outputs(peer.transformer))


def test_xlnet_question_answering_in_training_equals_transformers(tmp_path: Path) -> None:
    """transformers returns the loss alone: cross entropies of start and end, halved, and half the answer's."""
    peer = _peer("XLNetForQuestionAnswering")
    peer.save_pretrained(tmp_path)
    model = XLNetForQuestionAnswering.from_pretrained(tmp_path)
    ours, theirs = _arguments("segments lengths")
    ends, none, cls = torch.tensor([5, 9, 11, 10]), torch.tensor([0.0, 1.0, 1.0, 0.0]), torch.tensor([11, 10, 9, 8])
    barred = torch.zeros(B, M, dtype=torch.bool)
    barred[:, 7] = True
    expected = peer(
        _tokens(B, M), **theirs, start_positions=STARTS, end_positions=ends, is_impossible=none, cls_index=cls,
        p_mask=(barred | ~REAL).float(),
    ).loss  # fmt: skip
    start, end, impossible = model(_tokens(B, M), **ours, starts=STARTS, barred=barred, cls=cls)
    both = nn.functional.cross_entropy(start, STARTS) + nn.functional.cross_entropy(end, ends)
    loss = (both + nn.functional.binary_cross_entropy_with_logits(impossible, none)) / 2
    torch.testing.assert_close(loss, expected, atol=2e-5, rtol=0)
    loss.backward()
    expected.backward()
    _assert_same_gradients(model, peer)


def test_xlnet_question_answering_finds_the_spans_that_transformers_does(tmp_path: Path) -> None:
    peer = _peer("XLNetForQuestionAnswering", start_n_top=3, end_n_top=4)
    peer.save_pretrained(tmp_path)
    ours, theirs = _arguments("lengths")
    found = XLNetForQuestionAnswering.from_pretrained(tmp_path).search(_tokens(B, M), **ours)
    expected = peer(_tokens(B, M), **theirs, p_mask=(~REAL).float())
    assert found.starts.tolist() == expected.start_top_index.tolist()
    assert found.ends.mT.flatten(1).tolist() == expected.end_top_index.tolist()


# --- errors


def _memory(*shape: int, layers: int = 2) -> list[Tensor]:
    return [torch.zeros(shape) for _ in range(layers)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": torch.ones(B, 0).long()}, r"tokens: expected \[b, m\] with m >= 1, got \[4, 0\]"),
        ({"tokens": torch.full((B, M), 97)}, r"tokens: expected values in \[0, 97\), got 97 to 97"),
        ({"segments": torch.zeros(M).long()}, r"segments: expected \[b=4, m=12\], as tokens, got \[12\]"),
        ({"segments": torch.full((B, M), 8)}, r"segments: expected values in \[0, 8\), got 8 to 8"),
        ({"lengths": REAL.long()}, r"lengths: expected \[b=4\], got \[4, 12\] \(of an attention_mask .*\.sum\(1\)\)"),
        ({"lengths": torch.tensor([12, 5, 13, 1])}, r"lengths: expected values in \[1, 12\], got 1 to 13"),
        ({"lengths": torch.tensor([12, 5, 0, 1])}, r"lengths: expected values in \[1, 12\], got 0 to 12"),
        ({"lengths": torch.tensor([12.0, 5, 2, 1])}, "lengths: expected int64 or int32, got float32"),
        ({"order": torch.arange(1, M + 1).expand(B, M)}, r"order: expected values in \[-1, 11\], got 1 to 12"),
        ({"order": torch.full((B, M), -2)}, r"order: expected values in \[-1, 11\], got -2 to -2"),
        ({"order": torch.arange(M)}, r"order: expected \[b=4, m=12\], as tokens, got \[12\]"),
        ({"order": torch.rand(B, M)}, "order: expected int64 or int32, got float32"),
        ({"masked": REAL}, "masked: expected a place in the order for each masked token"),
        ({"masked": REAL, "order": torch.full((B, M), -1)}, "masked: expected a place in the order for each masked"),
        ({"masked": REAL.long(), "order": torch.full((B, M), -1)}, "masked: expected bool, got int64"),
        ({"targets": torch.tensor([3])}, r"targets: expected \[b=4, p\] with p >= 1, got \[1\]"),
        ({"targets": torch.zeros(B, 0).long()}, r"targets: expected \[b=4, p\] with p >= 1, got \[4, 0\]"),
        ({"targets": torch.full((B, 1), M)}, r"targets: expected values in \[0, 11\], got 12 to 12"),
        ({"targets": torch.full((B, 1), -1)}, r"targets: expected values in \[0, 11\], got -1 to -1"),
        ({"memory": _memory(B, 3, 32, layers=3)}, "memory: expected layers=2 tensors, got 3"),
        ({"memory": _memory(3, 3, 32)}, r"memory: expected \[b=4, 3, width=32\] each, got \[3, 3, 32\]"),
        ({"memory": _memory(B, 3, 16)}, r"memory: expected \[b=4, 3, width=32\] each, got \[4, 3, 16\]"),
        ({"memory": _memory(B, 32)}, r"memory: expected \[b=4, any, width=32\] each, got \[4, 32\]"),
        ({"memory": [*_memory(B, 3, 32, layers=1), *_memory(B, 4, 32, layers=1)]}, r"memory: .* got \[4, 4, 32\]"),
        ({"memory": [x.double() for x in _memory(B, 3, 32)]}, "memory: expected float32, got float64"),
        ({"memory": [x.long() for x in _memory(B, 3, 32)]}, "memory: expected float32, got int64"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_xlnet_bad_argument_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(pyattn.PyattnError, match=f"^{message}"):
        _ours()(**{"tokens": _tokens(B, M)} | change)


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        ("XLNetForMultipleChoice", {}, r"tokens: expected \[b, choices, m\], got \[4, 12\]"),
        ("XLNetForQuestionAnswering", {"starts": STARTS[:2]}, r"starts: expected \[b=4\], got \[2\]"),
        ("XLNetForQuestionAnswering", {"starts": STARTS + 1}, r"starts: expected values in \[0, 11\], got 4 to 12"),
        ("XLNetForQuestionAnswering", {"starts": STARTS, "cls": STARTS - 4}, r"cls: expected values in \[0, 11\], got"),
        ("XLNetForQuestionAnswering", {"starts": STARTS, "barred": REAL.long()}, r"barred: expected bool \[4, 12\]"),
    ],
)
def test_xlnet_bad_argument_of_a_head_is_named(kind: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(pyattn.PyattnError, match=f"^{message}"):
        _ours(kind)(_tokens(B, M), **arguments)


def test_xlnet_two_ways_need_two_halves() -> None:
    with pytest.raises(pyattn.ShapeError, match=r"^tokens: expected an even number of texts, .* got 3$"):
        _ours(two_ways=True)(_tokens(3, M))


@pytest.mark.parametrize(
    "change",
    [
        {"layers": 0}, {"heads": 5}, {"width": 33, "heads": 3}, {"dropout": 1.0}, {"attention": "torch"}, {"clamp": 0},
        {"memory": 0}, {"reuse": -1}, {"hidden": 0}, {"labels": 0}, {"label_names": ("a", "b")}, {"pad": 97},
        {"end": -1}, {"vocab": 0}, {"starts": 0}, {"ends": 0},
    ],
)  # fmt: skip
def test_xlnet_config_bad_value_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(pyattn.RangeError, match=f"^{next(iter(change))}"):
        XLNetConfig(**(SIZES | change))


@pytest.mark.parametrize(
    "field",
    [
        {"ff_activation": "relu"}, {"layer_norm_eps": 1e-5}, {"attn_type": "two"}, {"same_length": True},
        {"d_head": 16}, {"untie_r": False}, {"tie_word_embeddings": False}, {"model_type": "bert"},
        {"summary_type": "first"}, {"summary_use_proj": False}, {"summary_activation": "relu"},
    ],
)  # fmt: skip
def test_xlnet_refuses_another_architecture_by_its_field(field: dict[str, Any], tmp_path: Path) -> None:
    _ours("XLNetForSequenceClassification").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8")) | field
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(PretrainedError, match=f"expected {next(iter(field))} .* in .*config.json"):
        XLNetForSequenceClassification.from_pretrained(tmp_path)


@pytest.mark.parametrize("field", [{"d_model": 64, "d_head": 16}, {"n_layer": 3}, {"d_inner": 50}, {"vocab_size": 96}])
def test_xlnet_refuses_a_configuration_of_other_sizes(field: dict[str, int], tmp_path: Path) -> None:
    _ours().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text("utf-8")) | field
    (tmp_path / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(PretrainedError, match=r"do not fit XLNetLMHead; (missing|of another shape): "):
        XLNetLMHead.from_pretrained(tmp_path)
