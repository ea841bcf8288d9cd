"""Transformer-XL: held against float64 loops, segments against the whole text, and reading step by step."""

from __future__ import annotations

import itertools
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from torch.testing import assert_close

import pyattn
from pyattn.decoding.beam import beam_search
from pyattn.decoding.sampling import Sampling, generate
from pyattn.models.pretrained import PretrainedError
from pyattn.models.transformer_xl import SelfAttention, TransformerXL, TransformerXLConfig
from pyattn.nn.embedding import sinusoids

SIZES: dict[str, Any] = {
    "vocab": 13, "layers": 2, "heads": 2, "width": 6, "head_size": 5, "hidden": 7, "memory": 4,
}  # fmt: skip
OPTIONS: list[dict[str, Any]] = [
    {}, {"norm": "pre"}, {"same_length": True}, {"clamp": 3}, {"tie_biases": True}, {"memory": 0},
    {"norm": "pre", "same_length": True, "clamp": 2, "tie_biases": True}, {"cutoffs": (4, 6, 9)},
    {"cutoffs": (4, 9), "div_val": 2}, {"cutoffs": (7,), "div_val": 3, "tie_projections": False},
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def _tokens(b: int, m: int, seed: int = 0) -> Tensor:
    return torch.randint(0, SIZES["vocab"], (b, m), generator=torch.Generator().manual_seed(seed))


def _model(**options: Any) -> TransformerXL:
    torch.manual_seed(0)
    model = TransformerXL(TransformerXLConfig(**(SIZES | options)))
    with torch.no_grad():
        for parameter in model.parameters():  # larger than at the start, so that every part shows in the logits
            parameter.add_(torch.randn_like(parameter) * 0.4)
    return model.double().eval()


def _memory(model: TransformerXL, b: int, length: int) -> Tensor:
    generator = torch.Generator().manual_seed(5)
    c = model.config
    return torch.randn(c.layers, b, length, c.width, generator=generator, dtype=torch.float64)


def _normed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean()
    return centred / (centred.square().mean() + 1e-5).sqrt() * weight + bias


def _direction(distance: int, width: int) -> Tensor:
    """R_D, by the formula of Vaswani et al. 2017 with sines first."""
    angles = [distance / 10000 ** (2 * c / width) for c in range(width // 2)]
    return torch.tensor([*map(math.sin, angles), *map(math.cos, angles)], dtype=torch.float64)


def _attended(attn: SelfAttention, seen: list[Tensor], i: int) -> Tensor:
    """What position i of `seen` gets, head by head and key by key."""
    c, heads = attn.config, []
    for head in range(c.heads):
        w_q, w_k, w_v = attn.qkv.weight.view(3, c.heads, c.head_size, c.width)[:, head]
        w_r = attn.r.weight.view(c.heads, c.head_size, c.width)[head]
        u, w = attn.biases.u[head], attn.biases.w[head]
        q, scores, values = w_q @ seen[i], [], []
        for j in range(i + 1):
            distance = i - j
            if c.same_length and distance >= c.memory:
                continue
            told = distance if c.clamp is None else min(distance, c.clamp)
            r = w_r @ _direction(told, c.width)
            scores.append(((q + u) @ (w_k @ seen[j]) + (q + w) @ r) / math.sqrt(c.head_size))
            values.append(w_v @ seen[j])
        weights = torch.stack(scores).softmax(0)
        heads.append(sum(weight * value for weight, value in zip(weights, values, strict=True)))
    return attn.out.weight @ torch.cat(heads)


def _embedded(model: TransformerXL, token: int) -> Tensor:
    return model.embedding.weight[token] if model.adaptive is None else model.adaptive.embed(torch.tensor(token))


def _told(model: TransformerXL, h: Tensor) -> Tensor:
    return model.embedding.weight @ h + model.bias if model.adaptive is None else model.adaptive.log_probs(h)


def _loop(model: TransformerXL, tokens: list[int], memory: Tensor) -> tuple[Tensor, Tensor]:
    """Logits [m, vocab] of one text behind memory [layers, M, width], and the layers' inputs [layers, m, width]."""
    c = model.config
    x = [_embedded(model, token) * math.sqrt(c.width) for token in tokens]
    inputs = []
    for block, before in zip(model.layers, memory, strict=True):
        inputs.append(torch.stack(x))
        norms = [(norm.weight, norm.bias) for norm in (block.norm_1, block.norm_2)]
        seen = [*before, *x]
        if c.norm == "pre":
            seen = [_normed(position, *norms[0]) for position in seen]
        for i, position in enumerate(x):
            h = position + _attended(block.attn, seen, len(before) + i)
            h = h if c.norm == "pre" else _normed(h, *norms[0])
            read = _normed(h, *norms[1]) if c.norm == "pre" else h
            up, down = block.mlp.up, block.mlp.down
            h = h + down.weight @ (up.weight @ read + up.bias).clamp(min=0) + down.bias
            x[i] = h if c.norm == "pre" else _normed(h, *norms[1])
    return torch.stack([_told(model, h) for h in x]), torch.stack(inputs)


@pytest.mark.parametrize("length", [0, 2, 4])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_xl_logits_gradients_and_memory_equal_a_loop(options: dict, length: int, attention: str) -> None:
    model, tokens = _model(attention=attention, **options), _tokens(2, 5)
    memory = _memory(model, 2, min(length, model.config.memory))
    logits, after = model(tokens, memory)
    rows = [_loop(model, row, memory[:, i]) for i, row in enumerate(tokens.tolist())]
    expected = torch.stack([row[0] for row in rows])
    assert_close(logits, expected, atol=1e-12, rtol=0)
    together = torch.cat([memory, torch.stack([row[1] for row in rows], 1)], 2)
    kept = min(together.shape[2], model.config.memory)
    assert_close(after, together[:, :, together.shape[2] - kept :].detach(), atol=1e-12, rtol=0)
    assert not after.requires_grad
    targets = _tokens(2, 5, seed=1).flatten()
    found, wanted = (
        torch.autograd.grad(F.cross_entropy(result.flatten(0, 1), targets), list(model.parameters()))
        for result in (logits, expected)
    )
    assert_close(found, wanted, atol=1e-12, rtol=0)
    assert all(gradient.abs().max() > 1e-4 for gradient in found), "a part of the model makes no difference"


@pytest.mark.parametrize("options", [{}, *OPTIONS[-3:]], ids=str)
def test_xl_losses_and_their_gradients_are_those_of_logits(options: dict, attention: str) -> None:
    model, tokens, targets = _model(attention=attention, **options), _tokens(2, 5), _tokens(2, 5, seed=1)
    memory = _memory(model, 2, 3)
    losses, after = model(tokens, memory, targets=targets)
    logits, expected_after = model(tokens, memory)
    expected = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view(2, 5)
    assert_close(losses, expected, atol=1e-12, rtol=0)
    assert torch.equal(after, expected_after)
    weights = torch.rand(2, 5, dtype=torch.float64)
    found, wanted = (torch.autograd.grad((weights * e).sum(), list(model.parameters())) for e in (losses, expected))
    assert_close(found, wanted, atol=1e-12, rtol=0)


def test_xl_options_make_a_difference() -> None:
    tokens = _tokens(1, 9)
    plain = _model()
    for options in ({"norm": "pre"}, {"same_length": True}, {"clamp": 3}):
        other = _model(**options)
        assert all(map(torch.equal, other.parameters(), plain.parameters()))
        assert not torch.allclose(other(tokens)[0], plain(tokens)[0], atol=1e-3), options


def test_xl_memory_of_zeros_is_seen_and_none_is_not() -> None:
    """transformers' TransfoXL and XLNet begin with zeros, the authors' code with nothing."""
    model, tokens = _model(), _tokens(2, 5)
    empty, zeros = model.initial(2), torch.zeros(2, 2, 4, 6, dtype=torch.float64)
    assert torch.equal(model(tokens)[0], model(tokens, empty)[0])
    assert not torch.allclose(model(tokens)[0], model(tokens, zeros)[0], atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("clamp", [None, 4])
def test_xl_attention_equals_plain_attention_by_the_addition_theorem(clamp: int | None) -> None:
    """sin and cos of p - j are products of what belongs to p and to j: plain attention of head size d + width.

    So without clamp; with one that no distance reaches it stays true, and with one that they reach it does not.
    """
    n, m, width = 40, 25, 8
    config = TransformerXLConfig(**(SIZES | {"width": width, "head_size": 4, "clamp": clamp}))
    torch.manual_seed(0)
    attn = TransformerXL(config).double().layers[0].attn
    for parameter in attn.parameters():
        parameter.normal_(std=0.5)
    seen = torch.randn(2, n, width, dtype=torch.float64)
    q, k, v = (attn.qkv(seen).view(2, n, 3, 2, 4)[:, :, part].transpose(1, 2) for part in range(3))
    q = q[:, :, n - m :]
    weight = attn.r.weight.view(2, 4, width)
    a, b = ((q + attn.biases.w[:, None]) @ weight).chunk(2, -1)  # [b, h, m, width / 2]
    angles = torch.arange(n)[:, None] * 10000.0 ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    sin, cos = angles.sin(), angles.cos()
    sin_p, cos_p = sin[n - m :], cos[n - m :]
    query = torch.cat([q + attn.biases.u[:, None], a * sin_p + b * cos_p, b * sin_p - a * cos_p], -1)
    key = torch.cat([k, torch.cat([cos, sin], 1).expand(2, 2, n, width)], -1)
    out = pyattn.attention(query, key, v, causal=True, scale=0.5)
    expected = out.transpose(1, 2).flatten(2) @ attn.out.weight.T
    distance = torch.arange(n).double().clamp(max=math.inf if clamp is None else clamp)
    found = attn(seen, m, sinusoids(distance, width).to(seen.dtype))
    difference = (found - expected).abs().max().item()
    assert difference < 1e-13 if clamp is None else difference > 1e-3


def test_xl_no_gradient_goes_through_memory() -> None:
    model = _model()
    memory = _memory(model, 1, 3).requires_grad_()
    logits, after = model(_tokens(1, 4), memory)
    assert torch.autograd.grad(logits.sum(), memory, allow_unused=True) == (None,)
    assert not after.requires_grad


def test_xl_later_token_changes_nothing_before(attention: str) -> None:
    model, tokens = _model(attention=attention), _tokens(1, 8)
    changed = tokens.clone()
    changed[0, 5] = (tokens[0, 5] + 1) % SIZES["vocab"]
    memory = _memory(model, 1, 3)
    before, after = model(tokens, memory)[0], model(changed, memory)[0]
    assert torch.equal(before[:, :5], after[:, :5])
    assert all(not torch.equal(before[:, i], after[:, i]) for i in (5, 6, 7))


def _by_segments(model: TransformerXL, tokens: Tensor, lengths: list[int]) -> Tensor:
    memory, logits = None, []
    for segment in tokens.split(lengths, 1):
        found, memory = model(segment, memory)
        logits.append(found)
    return torch.cat(logits, 1)


SEGMENTS = [[6, 6], [1] * 12, [3, 1, 8], [11, 1], [0, 12], [5, 0, 7]]


@torch.no_grad()
@pytest.mark.parametrize("lengths", SEGMENTS, ids=str)
@pytest.mark.parametrize("options", [{"memory": 11}, {"memory": 11, "norm": "pre", "clamp": 5}], ids=str)
def test_xl_segments_equal_the_whole_while_all_is_remembered(options: dict, lengths: list[int], attention: str) -> None:
    model, tokens = _model(attention=attention, **options), _tokens(2, 12)
    assert_close(_by_segments(model, tokens, lengths), model(tokens)[0], atol=1e-12, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("lengths", SEGMENTS, ids=str)
@pytest.mark.parametrize("memory", [1, 2, 4, 40])
def test_xl_same_length_segments_equal_the_whole_however_little_is_remembered(memory: int, lengths: list[int]) -> None:
    model, tokens = _model(memory=memory, same_length=True), _tokens(2, 12)
    assert_close(_by_segments(model, tokens, lengths), model(tokens)[0], atol=1e-12, rtol=0)
    plain = _model(memory=memory)
    same = torch.allclose(_by_segments(plain, tokens, lengths), plain(tokens)[0], atol=1e-4)
    assert same == (memory >= sum(lengths[:-1]))


@torch.no_grad()
def test_xl_sees_as_far_back_as_its_memories_reach() -> None:
    """A token sees `memory` positions before its segment, whose inputs in the layer before saw as many: section 3.2."""
    model, tokens = _model(memory=2, layers=3), _tokens(1, 12)
    changed = tokens.clone()
    for first in range(10):
        changed[0, first] = (tokens[0, first] + 1) % SIZES["vocab"]
        ours, theirs = (_by_segments(model, text, [1] * 12)[0, -1] for text in (tokens, changed))
        assert torch.equal(ours, theirs) == (first + 3 * 2 < 11), first


def _read_so_far(model: TransformerXL, text: list[int], prompt: int) -> Tensor:
    """The logits behind a text of which the first tokens were read at once and the others one by one."""
    lengths = [prompt] + [1] * (len(text) - prompt)
    return _by_segments(model, torch.tensor([text]), lengths)[0, -1]


ORDERS = {0: [0, 0, 1, 1, 1, 2], 4: [5, 3, 3, 0, 1, 0], 5: [1, 0, 2, 4, 3, 5], 9: [0, 2, 5]}


@torch.no_grad()
@pytest.mark.parametrize("memory", [1, 4, 8, 30])
@pytest.mark.parametrize("options", [*OPTIONS[:5], *OPTIONS[6:]], ids=str)
def test_xl_step_by_step_equals_segments_of_one_token(options: dict, memory: int) -> None:
    """Unequal prompts, one of a single token, then rows that multiply, change places and go."""
    model = _model(**(options | {"memory": memory}))
    tokens, lengths = _tokens(3, 10), torch.tensor([4, 9, 1])  # and one column of padding alone
    logits, state = model.prefill(tokens, lengths, count=12)
    texts = [row[:length].tolist() for row, length in zip(tokens, lengths, strict=True)]
    prompts = lengths.tolist()
    assert state.read == texts
    for step in range(12):
        for row, text in enumerate(texts):
            assert_close(logits[row], _read_so_far(model, text, prompts[row]), atol=1e-12, rtol=0)
            if model.config.same_length or len(text) <= memory + 1:
                assert_close(logits[row], model(torch.tensor([text]))[0][0, -1], atol=1e-12, rtol=0)
        if step in ORDERS:
            state.reorder(ORDERS[step])
            texts = [list(texts[row]) for row in ORDERS[step]]
            prompts = [prompts[row] for row in ORDERS[step]]
        new = _tokens(1, len(texts), seed=step)[0]
        for text, token in zip(texts, new.tolist(), strict=True):
            text.append(token)
        logits = model.step(new, state)


@torch.no_grad()
@pytest.mark.parametrize("memory", [0, 3, 20])
@pytest.mark.parametrize("lengths", [[1, 1], [6, 6], [1, 6]])
def test_xl_steps_equal_segments_on_every_attention(attention: str, lengths: list[int], memory: int) -> None:
    model, tokens = _model(attention=attention, memory=memory), _tokens(2, 6)
    logits, state = model.prefill(tokens, torch.tensor(lengths), count=[8, 8], page=2)
    texts = [row[:length] for row, length in zip(tokens.tolist(), lengths, strict=True)]
    for step in range(9):
        for row, text in enumerate(texts):
            assert_close(logits[row], _read_so_far(model, text, lengths[row]), atol=1e-12, rtol=0)
        if step < 8:
            texts = [[*text, step] for text in texts]
            logits = model.step(torch.tensor([step, step]), state)


@torch.no_grad()
def test_xl_keeps_as_many_positions_as_a_token_sees_and_no_more() -> None:
    for same_length, prompt, count, slots in (
        (False, 3, 100, 5),
        (True, 3, 100, 4),
        (False, 9, 2, 5),
        (False, 2, 2, 4),
    ):
        model = _model(same_length=same_length)
        _, state = model.prefill(_tokens(2, prompt), count=count)
        assert state.layers[0].k.shape == (2, 2, slots, 5)
    for _ in range(2):
        model.step(_tokens(1, 2)[0], state)
    with pytest.raises(pyattn.RangeError, match="tokens: expected at most 4 with those that were read, got 5"):
        model.step(_tokens(1, 2)[0], state)


@torch.no_grad()
@pytest.mark.parametrize("options", [{}, {"cutoffs": (4, 9), "div_val": 2}], ids=str)
def test_xl_one_beam_is_greedy_and_best_of_many_is_probable(options: dict) -> None:
    model, prompt, lengths = _model(memory=30, **options), _tokens(3, 5), torch.tensor([3, 5, 1])
    greedy = generate(model, prompt, 7, lengths=lengths)
    assert [found[0].tokens for found in beam_search(model, prompt, 7, beams=1, lengths=lengths)] == greedy
    for row, found in enumerate(beam_search(model, prompt, 7, beams=4, lengths=lengths)):
        start = prompt[row, : lengths[row]].tolist()
        for hypothesis in found:
            text = torch.tensor([start + hypothesis.tokens])
            log_probs = model(text)[0].log_softmax(-1)[0, len(start) - 1 : -1]
            expected = log_probs.gather(1, text[0, len(start) :, None]).sum()
            assert hypothesis.log_prob == pytest.approx(expected.item(), abs=1e-6)


@torch.no_grad()
def test_xl_generates_what_the_whole_says_far_beyond_its_memory() -> None:
    model, text = _model(same_length=True), _tokens(1, 3)
    ours, theirs = (torch.Generator().manual_seed(1) for _ in range(2))
    (added,) = generate(model, text, 25, sampling=Sampling(), generator=ours)
    for _ in range(25):
        drawn = Sampling().draw(model(text)[0][:, -1].float(), theirs)
        text = torch.cat([text, drawn[:, None]], 1)
    assert added == text[0, 3:].tolist() and len({*added}) > 2


@pytest.mark.parametrize("options", [{}, {"same_length": True, "norm": "pre", "tie_biases": True}], ids=str)
def test_xl_learns_what_only_its_memory_tells(options: dict) -> None:
    """Copies of random words: behind its middle the first half of a segment is in memory alone."""
    torch.manual_seed(0)
    sizes = {"width": 32, "heads": 4, "head_size": 8, "hidden": 32, "memory": 8}
    model = TransformerXL(TransformerXLConfig(**(SIZES | sizes | options)))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    losses = []
    for _ in range(250):
        word = torch.randint(SIZES["vocab"], (16, 4))
        _, memory = model(word)
        logits, _ = model(word[:, :-1], memory)
        losses.append(F.cross_entropy(logits.flatten(0, 1), word[:, 1:].flatten()))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.1 < 2 < losses[0]
    logits, _ = model(word[:, :-1])
    assert F.cross_entropy(logits.flatten(0, 1), word[:, 1:].flatten()) > 1


def test_xl_dropout_acts_in_training_only_and_where_it_says(attention: str) -> None:
    tokens = _tokens(2, 100)
    model, seen = _model(dropout=0.4, attention=attention), {}
    model.layers[0].register_forward_pre_hook(lambda _, given: seen.update(embedded=given[0], table=given[2]))
    model.layers[0].attn.register_forward_hook(lambda *given: seen.update(attended=given[-1]))
    model.layers[0].mlp.down.register_forward_pre_hook(lambda _, given: seen.update(between=given[0]))
    model.layers[0].mlp.register_forward_hook(lambda *given: seen.update(added=given[-1]))
    assert torch.equal(model(tokens)[0], model(tokens)[0])
    zeros = {name: tensor.eq(0).double().mean().item() for name, tensor in seen.items()}
    model.train()
    assert not torch.equal(model(tokens)[0], model(tokens)[0])
    for name, tensor in seen.items():
        expected = 1 - (1 - zeros[name]) * 0.6
        assert tensor.eq(0).double().mean().item() == pytest.approx(expected, abs=0.06), name
    attending = _model(attention_dropout=0.4, attention=attention)
    assert torch.equal(attending(tokens)[0], attending(tokens)[0])
    attending.train()
    assert not torch.equal(attending(tokens)[0], attending(tokens)[0])


def test_xl_last_vectors_are_dropped_in_training() -> None:
    model = _model(dropout=0.4, layers=1).train()
    with torch.no_grad():
        model.layers[0].norm_2.weight.zero_()
        model.layers[0].norm_2.bias.fill_(1.0)  # so that the last vectors are ones
        model.embedding.weight.copy_(torch.eye(13, 6))
    logits = model(_tokens(2, 500))[0][..., :6] - model.bias[:6]
    assert logits.eq(0).double().mean().item() == pytest.approx(0.4, abs=0.03)
    assert_close(logits.max().item(), 1 / 0.6)


def test_xl_biases_are_shared_where_they_are_tied() -> None:
    for tied in (False, True):
        model = _model(tie_biases=tied)
        first, second = (layer.attn.biases for layer in model.layers)
        assert (first is second) == tied
        assert ("layers.1.attn.biases.u" in model.stored()) != tied


@pytest.mark.parametrize("options", [{}, {"cutoffs": (20, 100), "div_val": 2}], ids=str)
def test_xl_new_model_starts_as_documented(options: dict) -> None:
    torch.manual_seed(0)
    sizes = {"vocab": 500, "layers": 2, "heads": 8, "width": 96, "head_size": 32, "hidden": 128}
    model = TransformerXL(TransformerXLConfig(**sizes, **options))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            expected = 0.01 if "projections" in name else 0.02
            assert parameter.std().item() == pytest.approx(expected, rel=0.15), name
        else:
            assert parameter.eq(float(name.endswith("weight"))).all(), name


@pytest.mark.parametrize("options", [*OPTIONS, {"end": 0, "dropout": 0.25, "attention_dropout": 0.125}], ids=str)
def test_xl_folder_round_trip(tmp_path: Path, options: dict) -> None:
    model = _model(**options).float()
    model.save_pretrained(tmp_path, max_shard_size="1KB")
    again = TransformerXL.from_pretrained(tmp_path, attention="torch")
    assert again.config == replace(model.config, attention="torch") and not again.training
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    assert_close(again(_tokens(2, 5))[0], model(_tokens(2, 5))[0], atol=1e-5, rtol=0)


def test_xl_folder_is_read_with_a_longer_memory(tmp_path: Path) -> None:
    """As the authors evaluate: Table 8."""
    _model().float().save_pretrained(tmp_path)
    model = TransformerXL.from_pretrained(tmp_path, memory=9)
    assert model(_tokens(2, 12))[1].shape == (2, 2, 9, 6)


BAD_FIELDS = [
    ({"hidden_size": 8}, r"of another shape: embedding.weight \[13, 6\] for \[13, 8\]"),
    ({"hidden_size": 7}, "width: expected an even number"),
    ({"head_size": 4}, r"layers.0.attn.qkv.weight \[30, 6\] for \[24, 6\]"),
    ({"num_hidden_layers": 1}, "unknown: .*layers.1"),
    ({"num_hidden_layers": 10**9}, "asks for 1,000,000,000 layers"),
    ({"vocab_size": 10**12}, "asks for what no memory holds|of another shape"),
    ({"tie_biases": True}, "unknown: layers.1.attn.biases.u"),
    ({"tie_biases": 1}, "expected true or false for tie_biases"),
    ({"same_length": None}, "expected true or false for same_length"),
    ({"memory": -1}, "memory: expected at least 0, got -1"),
    ({"clamp": 0}, "clamp: expected at least 1, got 0"),
    ({"clamp": "none"}, "expected a whole number or null for clamp"),
    ({"norm": "both"}, "norm: expected post or pre, got both"),
    ({"dropout": 1.5}, r"dropout: expected a probability in \[0, 1\)"),
    ({"eos_token_id": 13}, r"end: expected a token in \[0, vocab=13\)"),
    (
        {"cutoffs": [3], "div_val": 1, "tie_projections": True},
        "missing: adaptive.cluster_weight, ",
    ),
    ({"cutoffs": [3], "div_val": 1}, "has no tie_projections"),
    ({"cutoffs": 3}, "expected a list of whole numbers for cutoffs"),
    ({"architectures": ["TransfoXLModel"]}, "expected architectures .*TransformerXL"),
    ({"model_type": "gpt2"}, "expected model_type 'pyattn-transformer-xl'"),
]


@pytest.mark.parametrize(("change", "message"), BAD_FIELDS, ids=[str(change) for change, _ in BAD_FIELDS])
def test_xl_folder_that_says_something_else_is_an_error(tmp_path: Path, change: dict, message: str) -> None:
    _model().save_pretrained(tmp_path)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(PretrainedError, match=message):
        TransformerXL.from_pretrained(tmp_path)


def test_xl_file_holds_parameters_by_their_names(tmp_path: Path) -> None:
    model = _model().float()
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert stored.keys() == dict(model.named_parameters()).keys()
    assert torch.equal(stored["layers.1.attn.r.weight"], model.layers[1].attn.r.weight)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            ({size: 0}, f"{size}: expected at least 1, got 0")
            for size in ("vocab", "layers", "heads", "width", "head_size", "hidden", "clamp")
        ),
        ({"width": 5}, "width: expected an even number, for sines and cosines, got 5"),
        ({"memory": -1}, "memory: expected at least 0, got -1"),
        ({"memory": 0, "same_length": True}, "memory: expected at least 1 with same_length"),
        ({"cutoffs": (5, 4)}, r"cutoffs: expected increasing numbers in \(0, vocab=13\), got \[5, 4\]"),
        ({"cutoffs": (4, 13)}, r"cutoffs: expected increasing numbers in \(0, vocab=13\), got \[4, 13\]"),
        ({"cutoffs": (4,), "div_val": 0}, "div_val: expected at least 1, got 0"),
        ({"cutoffs": (4, 5), "div_val": 3}, "div_val: expected at most width=6 as a power of 2, .* got 3"),
        ({"div_val": 2}, "div_val: expected 1 without cutoffs, got 2"),
        ({"norm": "none"}, "norm: expected post or pre, got none"),
        ({"dropout": 1.0}, r"^dropout: expected a probability in \[0, 1\), got 1.0"),
        ({"attention_dropout": -0.1}, r"attention_dropout: expected a probability in \[0, 1\), got -0.1"),
        ({"attention": "flash"}, "attention: expected one of pyattn, torch, got flash"),
        ({"end": 13}, r"end: expected a token in \[0, vocab=13\), got 13"),
    ],
    ids=str,
)
def test_xl_bad_configuration_is_named(change: dict, message: str) -> None:
    with pytest.raises(pyattn.RangeError, match=message):
        TransformerXLConfig(**(SIZES | change))


@pytest.mark.parametrize("shape", [(2, 3, 4, 6), (2, 2, 4, 5), (3, 2, 4, 6), (2, 2, 5, 6), (2, 2, 4), (2, 2, 4, 6, 1)])
def test_xl_memory_of_another_shape_is_named(shape: tuple[int, ...]) -> None:
    expected = r"memory: expected \[layers=2, b=2, at most memory=4, width=6\], got \["
    with pytest.raises(pyattn.ShapeError, match=expected + ", ".join(map(str, shape))):
        _model()(_tokens(2, 3), torch.zeros(shape, dtype=torch.float64))


def test_xl_bad_tokens_and_memory_dtype_are_named() -> None:
    model = _model()
    with pytest.raises(pyattn.DtypeError, match="memory: expected float64, got float32"):
        model(_tokens(2, 3), torch.zeros(2, 2, 4, 6))
    with pytest.raises(pyattn.RangeError, match=r"tokens: expected values in \[0, 13\), got 3 to 13"):
        model(torch.tensor([[3, 13]]))
    with pytest.raises(pyattn.RangeError, match=r"tokens: expected values in \[0, 13\), got -1 to 3"):
        model(torch.tensor([[3, -1]]))
    with pytest.raises(pyattn.DtypeError, match="tokens: expected int64 or int32, got float32"):
        model(torch.zeros(1, 2))
    with pytest.raises(pyattn.ShapeError, match=r"targets: expected \[2, 3\], as tokens, got \[2, 2\]"):
        model(_tokens(2, 3), targets=_tokens(2, 2))
    with pytest.raises(pyattn.RangeError, match=r"targets: expected values in \[0, 13\), got -100 to 3"):
        model(torch.tensor([[3, 4]]), targets=torch.tensor([[3, -100]]))
    with pytest.raises(pyattn.ShapeError, match=r"tokens: expected \[b, m\], got \[3\]"):
        model(torch.zeros(3, dtype=torch.long))
    for lengths in ([0, 1], [1, 4]):
        with pytest.raises(pyattn.RangeError, match="lengths: expected 1 to 3"):
            model.prefill(_tokens(2, 3), torch.tensor(lengths), count=1)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_xl_of_nothing(options: dict, attention: str) -> None:
    model = _model(attention=attention, **options)
    for b, m in itertools.product((0, 2), (0, 3)):
        for memory in (None, _memory(model, b, min(2, model.config.memory))):
            logits, after = model(_tokens(b, m), memory)
            assert logits.shape == (b, m, SIZES["vocab"])
            assert after.shape[2] == min(model.config.memory, m + (0 if memory is None else memory.shape[2]))
    _, state = model.prefill(_tokens(0, 3), count=4)
    assert model.step(_tokens(1, 0)[0], state).shape == (0, SIZES["vocab"])
    with pytest.raises(pyattn.RangeError, match=r"prompt: expected \[b, m\] with m >= 1"):
        generate(model, _tokens(2, 0), 3)
    assert model.config.context == sys.maxsize


@pytest.mark.parametrize("options", [{}, {"cutoffs": (4, 9), "div_val": 2}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_xl_runs_in_half_precision(attention: str, dtype: torch.dtype, options: dict) -> None:
    """As a whole, and as autocast: segments, steps, and gradients."""
    if attention == "torch" and dtype is torch.float16:
        pytest.skip("torch's attention has no float16 on every CPU")
    model, tokens = _model(attention=attention, **options).float(), _tokens(2, 8)
    with torch.no_grad():
        expected = _by_segments(model, tokens, [4, 4])
        lowered = _by_segments(model.to(dtype), tokens, [4, 4])
    assert lowered.dtype is dtype
    assert_close(lowered.float(), expected, atol=0.3, rtol=0)
    model = model.float()
    with torch.autocast("cpu", dtype):
        _, memory = model(tokens[:, :4])
        logits, _ = model(tokens[:, 4:], memory)
        assert memory.dtype is torch.float32
        assert beam_search(model, tokens[:, :3], 4, beams=3)
    assert_close(logits.float(), expected[:, 4:], atol=0.3, rtol=0)
    logits.float().logsumexp(-1).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
