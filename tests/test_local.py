"""Local attention held against loops over the paper's equations in float64, gradients through its centres included."""

import math
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

import pyattn
from pyattn import RangeError, registry
from pyattn.nn import (
    AdditiveScore,
    DotScore,
    GeneralScore,
    LearnedValue,
    LocalMonotonic,
    LocalPredictive,
    LocalRenormalized,
)
from pyattn.nn.local import LocalScore

B, M, N, QUERY, MEMORY, D = 2, 4, 9, 4, 6, 2
LENGTHS = torch.tensor([N, 6])
FLOAT64 = {"dtype": torch.float64}
FUSED = ["cpu"] if "additive" in registry.BACKENDS["cpu"].features else []
SCORES = {
    "general": lambda: GeneralScore(QUERY, MEMORY, **FLOAT64),
    "additive": lambda: AdditiveScore(QUERY, MEMORY, 5, **FLOAT64),
    "two heads": lambda: GeneralScore(QUERY, MEMORY, heads=2, **FLOAT64),
}
KINDS: dict[str, Callable[..., LocalScore]] = {
    "monotonic": lambda score: LocalMonotonic(score, D),
    "predictive": lambda score: LocalPredictive(score, QUERY, D, **FLOAT64),
    "renormalized": lambda score: LocalRenormalized(score, QUERY, D, **FLOAT64),
}


@pytest.fixture(params=["reference", *FUSED], autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[None]:
    with pyattn.use_backend(request.param):
        yield


def made(kind: str, score: str = "general") -> tuple[LocalScore, Tensor, Tensor]:
    """Local attention with its query [B, M, QUERY] and memory [B, N, MEMORY]. Its centres are all over the source."""
    torch.manual_seed(4)
    local = KINDS[kind](SCORES[score]())
    query, memory = torch.randn(B, M, QUERY, **FLOAT64), torch.randn(B, N, MEMORY, **FLOAT64)
    if isinstance(local, LocalPredictive):
        torch.nn.init.normal_(local.center_weight, std=3.0)
    return local, query.requires_grad_(), memory.requires_grad_()


def loop(kind: str, local: LocalScore, query: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
    """Contexts [B, M, MEMORY] and weights [B, heads, M, N] as the paper's section 3.2 has them, one after the other."""
    heads = local.heads
    scores = local.score.scores(query, local.keys(memory).states)
    context, weights = torch.zeros(B, M, MEMORY, **FLOAT64), torch.zeros(B, heads, M, N, **FLOAT64)
    for b in range(B):
        length = int(LENGTHS[b])
        for t in range(M):
            p: Tensor | int = t
            if kind != "monotonic":
                hidden = torch.tanh(local.center_projection.weight @ query[b, t])
                p = length * torch.sigmoid(local.center_weight @ hidden)
            middle = round(float(torch.as_tensor(p).detach()))
            window = [j for j in range(length) if middle - D <= j <= middle + D]
            gaussian = torch.stack([torch.as_tensor((j - p) ** 2 / (2 * (D / 2) ** 2), **FLOAT64) for j in window])
            for head in range(heads):
                s = scores[b, head, t, window]
                if kind == "predictive":
                    a = s.softmax(0) * torch.exp(-gaussian)
                else:
                    a = (s - gaussian if kind == "renormalized" else s).softmax(0)
                weights[b, head, t, window] = a
                columns = slice(head * MEMORY // heads, (head + 1) * MEMORY // heads)
                context[b, t, columns] = sum(a[i] * memory[b, j, columns] for i, j in enumerate(window))
    return context, weights


def gradients(local: LocalScore, results: tuple[Tensor, Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    loss = sum((t * torch.randn_like(t)).sum() for t in results)
    return torch.autograd.grad(loss, [*inputs, *local.parameters()])


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("kind", KINDS)
def test_local_attention_is_the_papers(kind: str, score: str) -> None:
    local, query, memory = made(kind, score)
    expected = loop(kind, local, query, memory)
    wanted = gradients(local, expected, query, memory)
    for attend in (local.attend, local.attend_unfused):
        context, weights = attend(query, local.keys(memory), memory, LENGTHS, return_weights=True)
        found = context, weights.view(B, -1, M, N)
        assert_close(found, expected, rtol=0, atol=1e-6)
        assert_close(gradients(local, found, query, memory), wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["predictive", "renormalized"])
def test_predicted_centres_have_the_gradient_of_finite_differences(kind: str) -> None:
    local, query, memory = made(kind)
    keys, values = local.keys(memory.detach()).states.detach(), memory.detach()
    centers = local.centers(query, LENGTHS[:, None], torch.zeros(B, M))
    assert ((centers % 1 - 0.5).abs() > 1e-3).all()  # no window changes within the differences

    def context(projection: Tensor, weight: Tensor) -> Tensor:
        parameters = {"center_projection.weight": projection, "center_weight": weight}
        arguments = query.detach(), keys, values, LENGTHS
        return torch.func.functional_call(_Attend(local), {f"local.{k}": v for k, v in parameters.items()}, arguments)

    given = [t.detach().requires_grad_() for t in (local.center_projection.weight, local.center_weight)]
    assert torch.autograd.gradcheck(context, given)


class _Attend(torch.nn.Module):
    """Attention as the forward of a module, for `functional_call`."""

    def __init__(self, local: LocalScore) -> None:
        super().__init__()
        self.local = local

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.local.attend(*arguments)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_a_row_of_all(kind: str) -> None:
    local, query, memory = made(kind)
    keys = local.keys(memory)
    context, weights = local.attend(query, keys, memory, LENGTHS, return_weights=True)
    for t in range(M):
        for positions in (t, torch.tensor(t), torch.full((B,), t)):
            step = local.attend(query[:, t], keys, memory, LENGTHS, positions=positions, return_weights=True)
            assert_close(step, (context[:, t], weights[:, t]))
    order = torch.tensor([2, 0, 3, 1])
    assert_close(local.attend(query[:, order], keys, memory, LENGTHS, positions=order), context[:, order])


def test_gaussian_behind_the_softmax_leaves_weights_that_sum_to_less() -> None:
    sums = {}
    for kind in ("predictive", "renormalized"):
        local, query, memory = made(kind)
        sums[kind] = local.attend(query, local.keys(memory), memory, LENGTHS, return_weights=True)[1].sum(-1)
    assert (sums["predictive"] < 1).all() and (sums["predictive"] > 0.1).all()
    assert_close(sums["renormalized"], torch.ones(B, M, **FLOAT64))


@pytest.mark.parametrize("kind", KINDS)
def test_a_window_without_keys_gives_zeros_and_finite_gradients(kind: str) -> None:
    local, query, memory = made(kind)
    for attend in (local.attend, local.attend_unfused):
        context = attend(query, local.keys(memory), memory, torch.tensor([N, 0]), positions=torch.arange(M) + N - 1)
        assert not context[1].any() and context[0, 0].all()
        if kind == "monotonic":  # the last key that the source has is D before the query that still sees one
            assert context[0, D].all() and not context[0, D + 1].any()
        found = torch.autograd.grad(context.sum(), [query, memory, *local.parameters()])
        assert all(g.isfinite().all() for g in found)
    assert not local.attend(query, local.keys(memory[:, :0]), memory[:, :0]).any()
    assert local.attend(query[:0], local.keys(memory[:0]), memory[:0]).shape == (0, M, MEMORY)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_centres_are_not_rounded_to_16_bits(dtype: torch.dtype) -> None:
    local, query, memory = made("predictive")
    local, query, memory = local.float(), query.float(), memory.float()
    lengths = torch.full((B, 1), 500)
    expected = local.centers(query, lengths, torch.zeros(B, M))
    with torch.autocast("cpu", dtype=dtype):
        assert_close(local.centers(query, lengths, torch.zeros(B, M)), expected)
        context = local.attend(query, local.keys(memory), memory, LENGTHS)
    assert context.dtype is dtype
    assert_close(context.float(), local.attend(query, local.keys(memory), memory, LENGTHS), rtol=0.05, atol=0.05)


def test_a_window_is_around_all_the_rest() -> None:
    for wrap in (lambda score: LearnedValue(score, MEMORY, 4), lambda score: LocalMonotonic(score, 3)):
        with pytest.raises(RangeError, match="score: expected a window around all the rest, got LocalMonotonic inside"):
            wrap(LocalMonotonic(DotScore(), D))


def test_places_and_widths_beyond_32_bits_are_what_they_say() -> None:
    query, memory = torch.randn(1, 2, 3, **FLOAT64), torch.randn(1, N, 3, **FLOAT64)
    near, far = torch.tensor([[3, 4]]), torch.tensor([[3, 2**32 + 3]])
    local = LocalMonotonic(DotScore(), D)
    found = local(query, memory, positions=far)
    assert_close(found[:, 0], local(query, memory, positions=near)[:, 0])
    assert not found[:, 1].any()
    wide = LocalMonotonic(DotScore(), 2**31)
    assert_close(wide(query, memory), DotScore()(query, memory))


def test_other_options_and_learned_values_go_through() -> None:
    local, query, memory = made("predictive")
    context, weights = local.attend(
        query, local.keys(memory), memory, LENGTHS, dropout_p=0.5, softcap=1.5, return_weights=True
    )
    assert_close(weights @ memory, context)
    plain = local.attend(query, local.keys(memory), memory, LENGTHS, softcap=1.5, return_weights=True)[1]
    kept = weights > 0
    assert_close(weights[kept], 2 * plain[kept])
    assert 0 < kept.sum() < (plain > 0).sum()
    learned = LocalMonotonic(LearnedValue(DotScore(), MEMORY, 3, **FLOAT64), D)
    values = learned.values(memory)
    assert values.shape == (B, N, 3)
    assert_close(learned.attend(memory, learned.keys(memory), values), learned(memory, memory))


def test_local_attention_shows_its_settings_and_compiles() -> None:
    local, query, memory = made("predictive")
    assert "half_width=2" in repr(local)
    assert math.isclose(LocalMonotonic(DotScore()).half_width, 10)
    torch._dynamo.reset()
    compiled = torch.compile(local.attend, fullgraph=True, backend="eager")
    assert_close(compiled(query, local.keys(memory), memory), local.attend(query, local.keys(memory), memory))


def _local(**options: object) -> LocalScore:
    return LocalMonotonic(DotScore(), 1, **options)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: LocalMonotonic(DotScore(), 0), pyattn.RangeError, "half_width: expected a positive number, got 0"),
        (lambda x: LocalPredictive(DotScore(), 0), pyattn.RangeError, "query_size: expected a positive number"),
        (lambda x: _local().attend(x, x, x, row_windows=(x, x)), TypeError, "attend: expected no argument row_windows"),
        (lambda x: _local().attend(x, x, x, bias=torch.ones(3, 3)), TypeError, "attend: expected no argument bias"),
        (lambda x: _local().attend(x, x, x, positions=torch.arange(4)), pyattn.ShapeError,
         r"positions: expected \[2, 3\], or what broadcasts to it, got \[4\]"),
        (lambda x: _local().attend(x, x, x, positions=x[0, :, 0]), pyattn.DtypeError, "positions: expected integers"),
        (lambda x: _local().attend(x[0, 0], x, x), pyattn.ShapeError, r"query: expected \[b, m, size\] or \[b, size\]"),
        (lambda x: LocalPredictive(DotScore(), 5).attend(x, x, x), pyattn.ShapeError, r"query: expected \[b, m, 5\]"),
        (lambda x: _local().attend(x, x, x[0]), pyattn.ShapeError, r"values: expected \[b, n, dv\]"),
        (lambda x: _local().attend_unfused(x, x, x, bias=torch.ones(3, 3)), TypeError, "attend_unfused: expected no"),
        (lambda x: _local().attend(x, x, x, [3, 3]), pyattn.DtypeError, "key_lengths: expected a torch.Tensor"),
        (lambda x: _local().attend(x, x, x, torch.ones(3).int()), pyattn.ShapeError, "key_lengths: expected shape"),
        (lambda x: _local().attend(x, None, x), pyattn.DtypeError, "keys: expected a torch.Tensor"),
    ],
)  # fmt: skip
def test_bad_input_names_the_argument(call, error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        call(torch.zeros(2, 3, 4))
