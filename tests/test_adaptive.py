"""The adaptive vocabulary: held against a loop over its definition, and against torch's adaptive softmax."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import pyattn
from pyattn.nn.adaptive import AdaptiveVocabulary, check_cutoffs

VOCAB, WIDTH = 14, 8
KINDS: list[dict[str, Any]] = [
    {"cutoffs": (3, 5, 9), "div_val": 2}, {"cutoffs": (3, 5, 9), "div_val": 2, "tie_projections": False},
    {"cutoffs": (1, 13), "div_val": 1}, {"cutoffs": (6,), "div_val": 8},
]  # fmt: skip

pytestmark = pytest.mark.usefixtures("one_thread")


def _vocabulary(**options: Any) -> AdaptiveVocabulary:
    torch.manual_seed(0)
    vocabulary = AdaptiveVocabulary(VOCAB, WIDTH, **options).double()
    with torch.no_grad():
        for parameter in vocabulary.parameters():
            parameter.normal_()
    return vocabulary


def _x(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, WIDTH, generator=generator, dtype=torch.float64)


def _place(v: AdaptiveVocabulary, token: int) -> tuple[int, int]:
    """The part that a token is in, and its number there."""
    starts = (0, *v.cutoffs)
    part = max(i for i, start in enumerate(starts) if token >= start)
    return part, token - starts[part]


def _row(v: AdaptiveVocabulary, token: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """A token's vector and its bias, and what projects from its vector, and from x to vectors of its part."""
    part, number = _place(v, token)
    if v.div_val == 1:
        alike = torch.eye(WIDTH, dtype=torch.float64)
        return v.tables[0][token], v.biases[0][token], alike, alike
    tied = 0 < part >= len(v.out_projections)
    out = v.projections[part] if tied else v.out_projections[part]
    return v.tables[part][number], v.biases[part][number], v.projections[part], out


def _probability(v: AdaptiveVocabulary, x: Tensor, token: int) -> Tensor:
    """Of one token behind one x [width], by the definition."""

    def weight(other: int) -> Tensor:
        vector, bias, _, out = _row(v, other)
        return (vector @ (out.T @ x) + bias).exp()

    part, _ = _place(v, token)
    head_out = _row(v, 0)[3]
    shares = (v.cluster_weight @ (head_out.T @ x) + v.cluster_bias).exp()
    head = sum(weight(t) for t in range(v.cutoffs[0])) + shares.sum()
    if part == 0:
        return weight(token) / head
    start, end = list(itertools.pairwise((0, *v.cutoffs, VOCAB)))[part]
    return shares[part - 1] / head * weight(token) / sum(weight(t) for t in range(start, end))


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_adaptive_probabilities_and_gradients_equal_a_loop(options: dict) -> None:
    v, x = _vocabulary(**options), _x(4)
    found = v.log_probs(x)
    expected = torch.stack([torch.stack([_probability(v, row, token) for token in range(VOCAB)]) for row in x]).log()
    assert_close(found, expected, atol=1e-12, rtol=0)
    assert_close(found.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    weights = torch.rand(4, VOCAB, dtype=torch.float64)
    used = [parameter for name, parameter in v.named_parameters() if not name.startswith("projections.0")]
    ours, theirs = (torch.autograd.grad((weights * r).sum(), used, allow_unused=True) for r in (found, expected))
    for name, gradient, other in zip(dict(v.named_parameters()), ours, theirs, strict=False):
        assert (gradient is None) == (other is None), name
    assert_close([g for g in ours if g is not None], [g for g in theirs if g is not None], atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_adaptive_embeddings_and_gradients_equal_a_loop(options: dict) -> None:
    v = _vocabulary(**options)
    tokens = torch.tensor([[0, 13, 5, 5, 2], [4, 9, 3, 8, 12]])
    found = v.embed(tokens)
    rows = [(_row(v, token)[2] @ _row(v, token)[0]) for token in tokens.flatten().tolist()]
    expected = torch.stack(rows).view(2, 5, WIDTH)
    assert_close(found, expected, atol=1e-12, rtol=0)
    weights, used = torch.rand(2, 5, WIDTH, dtype=torch.float64), [*v.tables, *v.projections]
    ours, theirs = (torch.autograd.grad((weights * result).sum(), used) for result in (found, expected))
    assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("targets", [list(range(VOCAB)), [0, 0, 0], [13], [], [8, 2, 8]], ids=str)
@pytest.mark.parametrize("options", KINDS, ids=str)
def test_adaptive_losses_and_gradients_are_those_of_log_probs(options: dict, targets: list[int]) -> None:
    v, chosen = _vocabulary(**options), torch.tensor(targets, dtype=torch.long)
    x = _x(len(targets)).requires_grad_()
    losses = v.losses(x, chosen)
    expected = -v.log_probs(x).gather(1, chosen[:, None])[:, 0]
    assert_close(losses, expected, atol=1e-12, rtol=0)
    assert torch.equal(v.losses(x.view(1, -1, WIDTH), chosen[None].int())[0], losses)
    given = [x, *v.tables, *v.biases, v.cluster_weight, v.cluster_bias, *v.out_projections]
    ours, theirs = (torch.autograd.grad(result.sum(), given) for result in (losses, expected))
    assert_close(ours, theirs, atol=1e-12, rtol=0)


@pytest.mark.parametrize("div_val", [1, 2])
def test_adaptive_equals_torchs_where_parts_have_no_biases(div_val: int) -> None:
    """torch's has one matrix where the head is projected and multiplied here, and div_val 1 projects there alone."""
    v = _vocabulary(cutoffs=(3, 5, 9), div_val=div_val)
    theirs = torch.nn.AdaptiveLogSoftmaxWithLoss(WIDTH, VOCAB, [3, 5, 9], div_val, head_bias=True).double()
    alike = torch.eye(WIDTH, dtype=torch.float64)
    with torch.no_grad():
        biases = v.biases[0] if div_val == 1 else torch.cat(list(v.biases))
        for bias in v.biases[1:] if div_val > 1 else [v.biases[0][3:]]:
            bias.zero_()
        head_out, *outs = [alike] * 4 if div_val == 1 else [v.out_projections[0], *list(v.projections)[1:]]
        tables = v.tables[0].split(v.sizes) if div_val == 1 else list(v.tables)
        theirs.head.weight.copy_(torch.cat([tables[0], v.cluster_weight]) @ head_out.T)
        theirs.head.bias.copy_(torch.cat([biases[:3], v.cluster_bias]))
        for (project, logits), out, table in zip(theirs.tail, outs, tables[1:], strict=True):
            project.weight.copy_(out.T)
            logits.weight.copy_(table)
    ours, others = _x(VOCAB).requires_grad_(), _x(VOCAB).requires_grad_()
    targets = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(2))
    losses, expected = v.losses(ours, targets), -theirs(others, targets).output
    assert_close(losses, expected, atol=1e-12, rtol=0)
    assert_close(v.log_probs(ours), theirs.log_prob(others), atol=1e-12, rtol=0)
    losses.sum().backward()
    expected.sum().backward()
    assert_close(ours.grad, others.grad, atol=1e-12, rtol=0)
    assert_close(tables[0].grad if div_val > 1 else v.tables[0].grad[:3], theirs.head.weight.grad[:3] @ head_out)


class _Softmaxes(TorchDispatchMode):
    """Notes the shapes of all logarithms of softmaxes."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._log_softmax.default:
            self.shapes.append(tuple(result.shape))
        return result


@pytest.mark.parametrize("div_val", [1, 2])
def test_adaptive_losses_compute_a_part_for_its_targets_alone(div_val: int) -> None:
    v = AdaptiveVocabulary(1000, 16, (10, 30), div_val)
    for parameter in v.parameters():
        torch.nn.init.normal_(parameter)
    for targets, rows in (([3, 29, 10, 0], [2, 0]), ([3, 999, 10, 30], [1, 2]), ([9, 9, 9, 9], [0, 0])):
        with _Softmaxes() as seen:
            v.losses(torch.randn(4, 16), torch.tensor(targets)).sum().backward()
        assert seen.shapes == [(4, 12), (rows[0], 20), (rows[1], 970)]
        unused = [name for name, parameter in v.named_parameters() if parameter.grad is None]
        assert unused == [name for name in ("projections.0",) if div_val > 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_adaptive_runs_in_half_precision(dtype: torch.dtype) -> None:
    v, tokens = _vocabulary(cutoffs=(3, 5, 9), div_val=2).float(), torch.arange(VOCAB)
    x = _x(VOCAB).float()
    expected = v.embed(tokens), v.log_probs(x), v.losses(x, tokens)
    with torch.autocast("cpu", dtype):
        assert v.embed(tokens).dtype is torch.float32
        autocast = v.embed(tokens), v.log_probs(x), v.losses(x, tokens)
    lowered = v.to(dtype)
    low = lowered.embed(tokens), lowered.log_probs(x.to(dtype)), lowered.losses(x.to(dtype), tokens)
    assert low[0].dtype is low[1].dtype is dtype and low[2].dtype is torch.float32
    for found in (autocast, low):
        for result, wanted in zip(found, expected, strict=True):
            assert_close(result.float(), wanted, atol=0.3, rtol=0)


BAD = [
    ((5, 3), 1, r"cutoffs: expected increasing numbers in \(0, vocab=14\), got \[5, 3\]"),
    ((3, 3), 1, r"cutoffs: expected increasing .*got \[3, 3\]"),
    ((0, 3), 1, r"cutoffs: expected increasing .*got \[0, 3\]"),
    ((-1, 3), 1, r"cutoffs: expected increasing .*got \[-1, 3\]"),
    ((3, 14), 1, r"cutoffs: expected increasing .*got \[3, 14\]"),
    ((3, 15), 1, r"cutoffs: expected increasing .*got \[3, 15\]"),
    ((3,), 0, "div_val: expected at least 1, got 0"),
    ((), 2, "div_val: expected 1 without cutoffs, got 2"),
    ((3, 5, 9), 3, "div_val: expected at most width=8 as a power of 3, one for each of the cutoffs, got 3"),
    (tuple(range(1, 14)), 10**9, "div_val: expected at most"),
]


@pytest.mark.parametrize(("cutoffs", "div_val", "message"), BAD, ids=str)
def test_adaptive_bad_cutoffs_are_named(cutoffs: tuple[int, ...], div_val: int, message: str) -> None:
    with pytest.raises(pyattn.RangeError, match=message):
        check_cutoffs(VOCAB, WIDTH, cutoffs, div_val)
    with pytest.raises(pyattn.RangeError, match=message):
        AdaptiveVocabulary(VOCAB, WIDTH, cutoffs, div_val)


@pytest.mark.parametrize("div_val", [1, 2])
def test_adaptive_bad_tokens_and_targets_are_named(div_val: int) -> None:
    v = _vocabulary(cutoffs=(3, 5, 9), div_val=div_val)
    for bad in (-1, VOCAB):
        low, high = sorted((3, bad))
        with pytest.raises(pyattn.RangeError, match=rf"tokens: expected values in \[0, 14\), got {low} to {high}"):
            v.embed(torch.tensor([3, bad]))
        with pytest.raises(pyattn.RangeError, match=rf"targets: expected values in \[0, 14\), got {low} to {high}"):
            v.losses(_x(2), torch.tensor([3, bad]))
    with pytest.raises(pyattn.DtypeError, match="tokens: expected int64 or int32, got float32"):
        v.embed(torch.zeros(2))
    with pytest.raises(pyattn.DtypeError, match="targets: expected int64 or int32, got float32"):
        v.losses(_x(2), torch.zeros(2))
    with pytest.raises(pyattn.ShapeError, match=r"targets: expected \[2\], got \[3\]"):
        v.losses(_x(2), torch.tensor([1, 2, 3]))
