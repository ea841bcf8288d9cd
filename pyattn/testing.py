"""How attention is held against its definition: cases, inputs, the float64 oracle and the one tolerance rule.

For users' own kernels too:

    call = make_inputs(CASES[0], torch.float32)
    for result in reference(call).compare(evaluate(call, my_attention)):
        assert result.excess <= 1, result

The tolerance is derived, not set: the error against float64 may be at most twice that of plain PyTorch in the same
dtype on the same inputs, and one rounding of the result; for the largest error and for the root mean square. What
plain PyTorch shows is one draw, which is lucky where few terms are summed, or all of them cancel. So it is joined, by
squares, with the error that `pyattn.rounding` expects.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyattn import core, registry
from pyattn.backends.reference import cast, definition, in_band, visible
from pyattn.face import showing
from pyattn.rounding import expected_errors
from pyattn.spec import AttentionSpec, as_batch, as_packed

__all__ = [
    "CASES",
    "Call",
    "Case",
    "Oracle",
    "Result",
    "assert_as_accurate",
    "check_case",
    "compare",
    "evaluate",
    "evaluate_backend",
    "make_inputs",
    "reference",
    "refusal",
]

__dir__ = showing(__all__)


@dataclass(frozen=True)
class Case:
    """One call of the contract. `mask` and `bias` name their dimensions, "1" where they broadcast: "b1mn".

    `packed` sequences are one batch element of all their rows: b, m and n then mean nothing.
    """

    id: str
    b: int = 2
    h: int = 2
    hk: int = 2
    m: int = 67
    n: int = 67
    d: int = 32
    dv: int = 32
    causal: bool = False
    window: tuple[int | None, int | None] | None = None
    top_left: bool = False
    key_lengths: tuple[int, ...] | None = None  # one per batch element
    segments: int = 0  # how many segments share the sequence
    mask: str | None = None
    bias: str | None = None
    scale: float | None = None
    softcap: float | None = None
    alibi: bool = False
    sinks: bool = False
    dropout_p: float = 0.0
    layout: str = "bhmd"  # or "bmhd": heads inside the sequence, as a projection gives them; or "expanded": stride 0
    powers: tuple[int, int] = (0, 0)  # of ten that queries are multiplied by, from the first one's to the last one's
    k_power: int = 0  # of ten that keys are multiplied by
    wide_bias: bool = False  # of float32 beside q, k and v of 16 bits
    bias_level: float = 0.0  # added to the bias of every other query; what a dtype cannot hold becomes its extreme
    unseen_nan: bool = False  # keys and values that nobody sees, and rows of no pair's distance, hold NaN and infinity
    packed: tuple[tuple[int, int], ...] | None = None  # (queries, keys) of each sequence
    additive: bool = False  # scores by a weight and the tanh of sums
    relative: int = 0  # columns of a relative term
    relative_shared: bool = False  # by the batch
    ranks: int = 0  # how many ranks there are
    row_windows: int | None = None  # the longest; a query's own has a random place


CASES: tuple[Case, ...] = (
    Case("plain"),
    Case("one-query", m=1, n=131),
    Case("one-key", m=5, n=1),
    Case("single", b=1, h=1, hk=1, m=1, n=1, d=1, dv=1),
    Case("cross", m=37, n=149, dv=48),
    Case("long", b=1, h=1, hk=1, m=260, n=300, d=64, dv=64),
    Case("no-queries", m=0),
    Case("no-keys", n=0),
    Case("no-batch", b=0),
    Case("no-head-size", d=0, dv=5, causal=True, alibi=True, sinks=True),
    Case("no-value-size", dv=0, bias="1hmn"),
    Case("odd-head-sizes", d=17, dv=5),
    Case("large-head-size", b=1, m=33, n=70, d=192, dv=192),
    Case("layout-bmhd", layout="bmhd", d=64, dv=64),
    Case("layout-expanded", layout="expanded"),
    Case("scale", scale=0.7),
    Case("scale-negative", scale=-0.3, causal=True),
    Case("scale-zero", scale=0.0),
    Case("scores-tiny", powers=(-20, -20)),
    Case("scores-large", powers=(3, 3), causal=True, m=130, n=130),
    Case("scores-huge", powers=(12, 12), m=70, n=140, d=64, dv=64),
    Case("scores-huge-one-query", powers=(10, 10), h=4, hk=2, m=1, n=150),
    Case("scores-mixed", powers=(-12, 12), h=4, hk=2, m=140, n=130, layout="bmhd"),
    Case("scores-mixed-sinks-alibi", powers=(-3, 6), m=80, n=90, causal=True, sinks=True, alibi=True),
    Case("causal", causal=True, m=130, n=130),
    Case("causal-more-keys", causal=True, m=40, n=150),
    Case("causal-more-queries", causal=True, m=150, n=40),
    Case("causal-top-left", causal=True, top_left=True, m=40, n=150),
    Case("causal-top-left-more-queries", causal=True, top_left=True, m=150, n=40),
    Case("window", window=(9, 4), m=140, n=140),
    Case("window-causal", window=(20, None), causal=True, m=140, n=170),
    Case("window-left-only", window=(5, None), m=70, n=60),
    Case("window-right-only", window=(None, 3), m=60, n=70),
    Case("window-zero", window=(0, 0), m=80, n=80),
    Case("key-lengths", b=4, key_lengths=(67, 0, 1, 40)),
    Case("key-lengths-causal", b=3, key_lengths=(130, 64, 20), causal=True, m=100, n=130, unseen_nan=True),
    Case("segments", segments=3, m=90, n=90),
    Case("segments-causal", segments=4, causal=True, m=150, n=150),
    Case("mask-full", mask="bhmn"),
    Case("mask-per-key", mask="b11n", unseen_nan=True),
    Case("mask-per-query", mask="11m1"),
    Case("mask-per-head", mask="1hmn", h=4, hk=2, m=33, n=40),
    Case("mask-causal", mask="b1mn", causal=True, m=140, n=140),
    Case("bias-full", bias="bhmn"),
    Case("bias-shared", bias="11mn", causal=True, m=70, n=90),
    Case("bias-per-head", bias="1hmn"),
    Case("bias-per-key", bias="b11n"),
    Case("bias-per-query", bias="1hm1", n=50),
    Case("bias-scalar", bias="1111"),
    Case("bias-wide", bias="11mn", wide_bias=True),
    Case("bias-wide-one-key", bias="bhmn", wide_bias=True, window=(0, 0)),
    Case("bias-large", bias="b1mn", bias_level=-1e4),
    Case("bias-lowest", bias="bhmn", bias_level=-1e39, m=70, n=90),
    Case("bias-lowest-sinks", bias="1h1n", bias_level=-1e39, sinks=True),
    Case("softcap", softcap=2.0, scale=1.0),
    Case("softcap-causal-bias", softcap=5.0, causal=True, bias="1hmn"),
    Case("alibi", alibi=True, m=70, n=90),
    Case("alibi-causal", alibi=True, causal=True, h=4, hk=4),
    Case("sinks", sinks=True),
    Case("sinks-empty-rows", sinks=True, causal=True, m=80, n=50),
    Case("gqa", h=6, hk=2, causal=True, m=50, n=80),
    Case("mqa", h=5, hk=1, m=40, n=70),
    Case("dropout", dropout_p=0.3, m=70, n=70),
    Case("dropout-gqa-causal", dropout_p=0.1, h=4, hk=2, causal=True, m=70, n=130),
    Case("packed", packed=((70, 30), (1, 129), (64, 64)), layout="bmhd"),
    Case("packed-causal", packed=((100, 130), (1, 1), (90, 20), (65, 65)), causal=True),
    Case("packed-gqa-window", packed=((90, 90), (33, 160), (70, 70)), h=6, hk=2, window=(20, 5), dv=48, layout="bmhd"),
    Case("packed-empty", packed=((3, 0), (0, 0), (40, 50), (0, 70), (80, 0), (5, 90)), layout="bmhd", unseen_nan=True),
    Case("packed-no-keys", packed=((3, 0), (70, 0)), layout="bmhd"),
    Case("packed-no-sequences", packed=(), layout="bmhd"),
    Case("packed-dropout-alibi-sinks", packed=((70, 90), (66, 40), (1, 5)), causal=True, h=4, hk=2, softcap=3.0,
         alibi=True, sinks=True, dropout_p=0.2, layout="bmhd"),
    Case("packed-one-query", packed=((1, 7), (1, 150), (1, 64), (1, 1)), causal=True, h=4, hk=1, layout="bmhd"),
    Case("everything", b=2, h=4, hk=2, m=100, n=140, d=40, dv=24, window=(70, 20), key_lengths=(140, 77), segments=2,
         mask="b1mn", bias="1hmn", softcap=3.0, alibi=True, sinks=True, dropout_p=0.2, layout="bmhd"),
    Case("additive", additive=True, d=40, dv=24),
    Case("additive-one-query", additive=True, m=1, n=131, d=70),
    Case("additive-no-head-size", additive=True, d=0, dv=5, n=9),
    Case("additive-no-keys", additive=True, n=0),
    Case("additive-small", additive=True, powers=(-3, -3), k_power=-3, m=70, n=70),
    Case("additive-wide", additive=True, powers=(-3, 1), k_power=1, m=70, n=70),
    Case("additive-saturated", additive=True, powers=(2, 2), k_power=2, m=70, n=70),
    Case("additive-causal-gqa", additive=True, h=4, hk=2, m=100, n=130, d=18, causal=True, layout="bmhd"),
    Case("additive-packed", additive=True, packed=((70, 90), (1, 40), (66, 3)), d=17, causal=True, dropout_p=0.2,
         sinks=True),
    Case("additive-everything", additive=True, b=2, h=4, hk=2, m=70, n=90, d=20, dv=24, window=(70, 20),
         key_lengths=(90, 77), segments=2, mask="b1mn", bias="1hmn", softcap=3.0, alibi=True, sinks=True, dropout_p=0.2,
         layout="bmhd", unseen_nan=True),
    Case("relative", relative=32),
    Case("relative-one-query", relative=24, m=1, n=131, h=4, hk=2),
    Case("relative-learned-bias", relative=1, relative_shared=True, m=140, n=130),
    Case("relative-memory", relative=32, relative_shared=True, causal=True, m=70, n=200, layout="bmhd"),
    Case("relative-window", relative=17, window=(9, 4), m=140, n=140),
    Case("relative-scale-negative", relative=20, m=40, n=70, scale=-0.3, bias="11mn"),
    Case("relative-no-keys", relative=8, n=0),
    Case("relative-no-queries", relative=8, m=0),
    Case("relative-large", relative=32, powers=(3, 3), m=70, n=70),
    Case("ranks", ranks=5, m=90, n=130),
    Case("row-windows", row_windows=30, m=90, n=130, unseen_nan=True),
    Case("row-windows-additive", row_windows=20, additive=True, m=70, n=90, unseen_nan=True),
    Case("ranks-causal", ranks=3, causal=True, m=150, n=150, unseen_nan=True),
    Case("relative-ranks-everything", relative=40, ranks=6, row_windows=90, b=2, h=4, hk=2, m=100, n=140, d=40, dv=24,
         window=(70, 20), key_lengths=(140, 77), segments=2, mask="b1mn", bias="1hmn", softcap=3.0, alibi=True,
         sinks=True, dropout_p=0.2, layout="bmhd", unseen_nan=True),
)  # fmt: skip


class Call(NamedTuple):
    """The arguments of one `attention` or `attention_varlen` call and the gradients that come back to it."""

    case: Case
    tensors: dict[str, Any]  # those that take a gradient: q, k, v and where used bias, sinks, weight, relative_q and _k
    options: dict[str, Any]  # every other keyword argument
    d_out: Tensor
    d_lse: Tensor


class Result(NamedTuple):
    """One tensor of one case held against float64: its errors as multiples of what is allowed, and as numbers."""

    name: str
    error: float  # largest absolute error
    baseline: float  # that of plain PyTorch in the same dtype
    excess: float  # error / allowed error, the worse of maximum and root mean square; passes up to 1
    size: float = 0.0  # the largest finite number that there should be

    @property
    def relative(self) -> float:
        """The error over the size of what there should be."""
        return self.error / self.size if self.size > 0 else self.error


class Oracle(NamedTuple):
    """What a call should give, tensor by tensor: out, lse, d_q, d_k, ..."""

    expected: dict[str, Tensor]  # float64
    baseline: dict[str, Tensor]  # plain PyTorch in the call's own dtype
    rounding: dict[str, Tensor]  # what `pyattn.rounding` expects

    def compare(self, actual: dict[str, Tensor]) -> list[Result]:
        """Holds every tensor against float64."""
        return [
            compare(name, actual[name], expected, self.baseline[name], self.rounding[name])
            for name, expected in self.expected.items()
        ]


# Windows of some rows of `row_windows`, as far away as int32 says: of nothing, of nothing and of everything.
_FAR_WINDOWS = ((2**31 - 1, 2**31 - 1), (2**31 - 1, -(2**31)), (-(2**31), 2**31 - 1))


def make_inputs(case: Case, dtype: torch.dtype, device: str | torch.device = "cpu", seed: int = 0) -> Call:
    """Random tensors for `case`, as `attention` or `attention_varlen` takes them; the same numbers on every device."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    accumulator = torch.float64 if dtype is torch.float64 else torch.float32

    def rounded(t: Tensor, dtype: torch.dtype = dtype) -> Tensor:
        ends = torch.finfo(dtype)
        return t.clamp(ends.min, ends.max).to(device, dtype)

    c = case
    if c.packed is not None:
        c = replace(c, b=1, m=sum(m for m, _ in c.packed), n=sum(n for _, n in c.packed))
    sizes = {"b": c.b, "h": c.h, "m": c.m, "n": c.n, "1": 1}
    powers = 10.0 ** torch.linspace(*c.powers, c.m, dtype=torch.float64)[:, None]
    tensors: dict[str, Any] = {
        "q": _laid_out(rounded(normal(c.b, c.h, c.m, c.d) * powers), c.layout),
        "k": _laid_out(rounded(normal(c.b, c.hk, c.n, c.d) * 10.0**c.k_power), c.layout),
        "v": _laid_out(normal(c.b, c.hk, c.n, c.dv).to(device, dtype), c.layout),
    }
    options: dict[str, Any] = {
        "causal": c.causal, "window": c.window, "top_left": c.top_left, "scale": c.scale, "softcap": c.softcap,
        "dropout_p": c.dropout_p, "seed": 1234567890123 + seed if c.dropout_p > 0 else None,
    }  # fmt: skip
    if c.key_lengths is not None:
        options["key_lengths"] = torch.tensor(c.key_lengths, dtype=torch.int64, device=device)
    if c.segments:
        options["segment_ids"] = tuple(
            torch.randint(0, c.segments, (c.b, length), generator=generator).sort(-1).values.to(device)
            for length in (c.m, c.n)
        )
    if c.mask is not None:
        options["mask"] = (torch.rand([sizes[s] for s in c.mask], generator=generator) < 0.6).to(device)
    if c.alibi:
        rows = () if c.packed is None else (len(c.packed),)
        options["alibi_slopes"] = torch.linspace(0.5, 0.05, math.prod(rows) * c.h).view(*rows, c.h).to(device)
    if c.bias is not None:
        bias = normal(*(sizes[s] for s in c.bias))
        bias[:, :, ::2] += c.bias_level
        tensors["bias"] = rounded(bias, accumulator if c.wide_bias else dtype)
    if c.sinks:
        tensors["sinks"] = normal(c.h).to(device, accumulator)
    if c.additive:
        tensors["weight"] = rounded(normal(c.h, c.d))
    if c.relative:
        distances = c.m + c.n + 5  # of all pairs, and some beyond
        tensors["relative_q"] = _laid_out(rounded(normal(c.b, c.h, c.m, c.relative) * powers), c.layout)
        tensors["relative_k"] = rounded(normal(1 if c.relative_shared else c.b, c.h, distances, c.relative))
        options["first"] = -(c.n if c.top_left else c.m) - 2
    if c.ranks:
        options["ranks"] = tuple(
            torch.randint(-1, c.ranks - 1, (c.b, length), generator=generator).to(device) for length in (c.m, c.n)
        )
    if c.row_windows is not None:
        first = torch.randint(-2, c.n + 2, (c.b, c.m), generator=generator)
        stop = first + torch.randint(-1, c.row_windows + 1, (c.b, c.m), generator=generator)
        far = torch.tensor(_FAR_WINDOWS)[: max(0, c.m - 5)]
        first[:, 5 : 5 + len(far)], stop[:, 5 : 5 + len(far)] = far.T
        options["row_windows"] = (first.to(device), stop.to(device))
    d_out = normal(c.b, c.h, c.m, c.dv).to(device, dtype)
    d_lse = normal(c.b, c.h, c.m).to(device, accumulator)
    if c.packed is not None:
        options["cu_seqlens_q"] = torch.tensor([0, *accumulate(m for m, _ in c.packed)], device=device)
        options["cu_seqlens_k"] = torch.tensor([0, *accumulate(n for _, n in c.packed)], device=device)
        tensors |= {name: as_packed(tensors[name]) for name in ("q", "k", "v")}
        d_out, d_lse = as_packed(d_out), d_lse.squeeze(0)
    if c.unseen_nan:
        _spoil_unseen(tensors, options)
    return Call(c, tensors, options, d_out, d_lse)


def evaluate(call: Call, attention: Callable[..., tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """out, lse and the gradients d_q, d_k, ... of `attention(q, k, v, **options) -> (out, lse)` on `call`."""
    leaves = {name: t.detach().requires_grad_() for name, t in call.tensors.items()}
    out, lse = attention(**leaves, **call.options)
    return _with_gradients(leaves, out, lse, call)


def evaluate_backend(call: Call, backend: str) -> dict[str, Tensor]:
    """`evaluate` for one of pyattn's backends, with every result tensor poisoned with NaN before its kernel runs."""
    with _poisoned():
        return evaluate(call, lambda **arguments: core.attend(**arguments, backend=backend))


def reference(call: Call) -> Oracle:
    """What `evaluate` should give for this call, and how far from it a sound implementation may be.

    For float64 calls the baseline is float32's, brought down by the ratio of the two units in the last place: there
    is no wider dtype to measure float64's own error against. The definition then rounds as much as what is held
    against it, and independently of it.
    """
    dtype = call.tensors["q"].dtype
    expected = _evaluate_definition(call, torch.float64)
    eps = torch.finfo(torch.float64 if dtype is torch.float64 else torch.float32).eps
    rounding = {name: eps * t.detach() for name, t in _expected_errors(call).items()}
    if dtype is not torch.float64:
        return Oracle(expected, _evaluate_definition(call, dtype), rounding)
    rounding = {name: math.sqrt(2) * t for name, t in rounding.items()}
    single = _evaluate_definition(call, torch.float32)
    shrink = eps / torch.finfo(torch.float32).eps
    baseline = {
        name: torch.where(t.isfinite(), t + (single[name].double() - t) * shrink, t) for name, t in expected.items()
    }
    return Oracle(expected, baseline, rounding)


def compare(name: str, actual: Tensor, expected: Tensor, baseline: Tensor, rounding: Tensor | float = 0.0) -> Result:
    """Holds one tensor against float64 by the rule of this module. Arguments as for `assert_as_accurate`."""
    if actual.shape != expected.shape:
        raise AssertionError(f"{name}: expected shape {list(expected.shape)}, got {list(actual.shape)}")
    eps = torch.finfo(actual.dtype).eps
    actual, expected, baseline = (t.detach().double() for t in (actual, expected, baseline))
    if actual.numel() == 0:
        return Result(name, 0.0, 0.0, 0.0)
    error, shown = _distance(actual, expected), _distance(baseline, expected).nan_to_num(posinf=0.0)
    finite = torch.where(expected.isfinite(), expected, 0.0).abs()
    last = eps * finite
    # What overflows is no measure.
    rounding = torch.as_tensor(rounding, dtype=torch.float64).nan_to_num(nan=0.0, posinf=0.0)
    excesses = []
    for norm in (_max, _rms):
        allowed = 2 * math.hypot(float(norm(shown)), float(norm(rounding))) + float(norm(last))
        excesses.append(float(norm(error)) / (allowed + torch.finfo(torch.float64).tiny))
    excess = float(torch.tensor(excesses).amax())  # NaN where one of them is
    return Result(name, float(error.amax()), float(shown.amax()), excess, float(finite.amax()))


def assert_as_accurate(
    actual: Tensor, expected: Tensor, baseline: Tensor, rounding: Tensor | float = 0.0, what: str = "result"
) -> None:
    """Raises AssertionError unless `actual` is as accurate as the tolerance rule of this module asks.

    Args:
        actual: what is judged, in any floating dtype.
        expected: the float64 oracle's result.
        baseline: plain PyTorch's result in actual's dtype.
        rounding: the error that is expected of each element, beyond rounding the result to its dtype.
        what: its name in the error.
    """
    result = compare(what, actual, expected, baseline, rounding)
    if not result.excess <= 1:
        raise AssertionError(
            f"{what}: largest error {result.error:.3g} against float64, plain PyTorch's is {result.baseline:.3g}: "
            f"{result.excess:.3g} times what is allowed"
        )


def check_case(backend: str, case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> list[Result]:
    """Every result of one backend on one case, out, lse and gradients, held against float64."""
    call = make_inputs(case, dtype, device)
    return reference(call).compare(evaluate_backend(call, backend))


def refusal(backend: str, case: Case, dtype: torch.dtype, device: str | torch.device = "cpu") -> str | None:
    """Why `backend` does not run `case`, by its own declaration; None when it does."""
    call = make_inputs(case, dtype, device)
    return registry.BACKENDS[backend].refusal(AttentionSpec.of(*core.prepare(**call.tensors, **call.options)))


def _evaluate_definition(call: Call, dtype: torch.dtype) -> dict[str, Tensor]:
    """`evaluate` for the definition, each operation in `dtype`, beside a wider bias where that is the call's own."""
    tensors = {name: t.to(dtype) for name, t in call.tensors.items()}
    if "bias" in tensors and dtype is call.tensors["q"].dtype:
        tensors["bias"] = call.tensors["bias"]

    def attention(**arguments: Any) -> tuple[Tensor, Tensor]:
        x, numbers = core.prepare(**arguments)
        out, lse = definition(AttentionSpec.of(x, numbers), cast(x, dtype)._replace(bias=x.bias))
        return (out, lse) if call.case.packed is None else (as_packed(out), lse.squeeze(0))

    return evaluate(call._replace(tensors=tensors), attention)


def _expected_errors(call: Call) -> dict[str, Tensor]:
    """`expected_errors` in the shapes of the call."""
    x, numbers = core.prepare(**call.tensors, **call.options)
    spec, x = AttentionSpec.of(x, numbers), cast(x, torch.float64)
    d_out, d_lse = call.d_out.double(), call.d_lse.double()
    if spec.sequences is None:
        return expected_errors(spec, x, d_out, d_lse)
    errors = expected_errors(spec, x, as_batch(d_out), d_lse[None])
    errors["lse"] = errors["lse"].squeeze(0)
    return {name: as_packed(t) if t.dim() == 4 else t for name, t in errors.items()}


def _with_gradients(leaves: dict[str, Tensor], out: Tensor, lse: Tensor, call: Call) -> dict[str, Tensor]:
    loss = (out * call.d_out.to(out.dtype)).sum()
    loss = loss + (torch.where(lse == -torch.inf, 0.0, lse) * call.d_lse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)
    return {"out": out.detach(), "lse": lse.detach()} | {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}


def _max(t: Tensor) -> Tensor:
    return t.amax()


def _rms(t: Tensor) -> Tensor:
    return t.square().mean().sqrt()


def _distance(actual: Tensor, expected: Tensor) -> Tensor:
    """|actual - expected|, where infinity and NaN agree with themselves alone and are infinitely far from the rest."""
    same = (actual == expected) | (actual.isnan() & expected.isnan())
    difference = (actual - expected).abs()
    return torch.where(same, 0.0, torch.where(difference.isnan(), torch.inf, difference))


def _laid_out(t: Tensor, layout: str) -> Tensor:
    if layout == "bmhd":
        return t.transpose(1, 2).contiguous().transpose(1, 2)
    return t[:1, :1].expand(t.shape) if layout == "expanded" else t


def _spoil_unseen(tensors: dict[str, Any], options: dict[str, Any]) -> None:
    """NaN and infinity in every key and value that no query sees, and in rows for distances outside the band."""
    x, numbers = core.prepare(**tensors, **options)
    spec = AttentionSpec.of(x, numbers)
    seen = visible(spec, x).unflatten(1, (spec.hk, spec.h // spec.hk)).any((2, 3))[..., None]
    seen = seen if spec.sequences is None else as_packed(seen)
    tensors["k"] = torch.where(seen, tensors["k"], torch.nan)
    tensors["v"] = torch.where(seen, tensors["v"], torch.inf)
    if spec.relative is not None:
        tensors["relative_k"] = torch.where(in_band(spec, x), tensors["relative_k"], torch.nan)


@contextmanager
def _poisoned() -> Iterator[None]:
    """torch.empty gives NaN, so that an element no kernel wrote shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
