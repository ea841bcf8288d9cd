"""Random calls over the whole contract, every instruction set, held against the definition by the tolerance rule.

`make test` draws the same few hundred every time; `pytest tests/test_fuzz.py --hypothesis-profile=long` draws 20,000.

Random calls find what no case in `testing.CASES` has: rows whose exact gradient cancels to nothing, in plain PyTorch
too, as that of an only key does under dropout or beside a sink. `fuller_rounding` adds to the rule's floor the
roundings that remain there; without them about one call in a hundred is beyond what is allowed.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import event, given, note
from hypothesis import strategies as st
from torch import Tensor

from pyattn import registry, testing
from pyattn.backends import cpu, reference
from pyattn.spec import AttentionSpec, Inputs, dtype_name
from pyattn.testing import Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Empty, one, and the places where a vector or a tile of 64 ends.
LENGTHS = st.one_of(st.integers(0, 9), st.sampled_from((15, 16, 17, 31, 33, 63, 64, 65, 66, 129)))
HEAD_SIZES = st.one_of(st.integers(1, 9), st.sampled_from((15, 16, 17, 31, 32, 33, 40, 64, 65)))
WINDOW_SIDES = st.one_of(st.none(), st.integers(0, 5), st.sampled_from((40, 64, 200)))

SCALES = st.one_of(st.floats(-2, -(2**-6), width=32), st.floats(2**-6, 2, width=32))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Threads would wait for one another longer than these calls take; test_cpu_threads.py is about them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def patterns() -> st.SearchStrategy[str]:
    """A shape that broadcasts to [b, h, m, n], as `Case` writes it."""
    return st.tuples(*(st.sampled_from(("1", name)) for name in "bhmn")).map("".join)


@st.composite
def cases(draw: st.DrawFn, dtype: torch.dtype) -> Case:
    # In float64, whose floor is all that is allowed: equal weights round alike, and the floor counts independent ones.
    zero = () if dtype is torch.float64 else (0.0,)
    hk = draw(st.integers(1, 3))
    options: dict[str, Any] = {
        "h": hk * draw(st.sampled_from((1, 1, 2, 3))),
        "hk": hk,
        "d": draw(HEAD_SIZES),
        "dv": draw(HEAD_SIZES),
        "causal": draw(st.booleans()),
        "window": draw(st.one_of(st.none(), st.tuples(WINDOW_SIDES, WINDOW_SIDES))),
        "scale": draw(st.one_of(st.none(), st.sampled_from((*zero, 1.0)), SCALES)),
        "softcap": draw(st.one_of(st.none(), st.floats(0.25, 30, width=32))),
        "alibi": draw(st.booleans()),
        "sinks": draw(st.booleans()),
        "dropout_p": draw(st.one_of(st.just(0.0), st.floats(0.05, 0.9))),
        "layout": draw(st.sampled_from(("bhmd", "bmhd", "expanded"))),
        "unseen_nan": draw(st.booleans()),
        "additive": draw(st.integers(0, 4)) == 0,
    }
    if draw(st.integers(0, 3)) == 0:
        return Case("fuzz", packed=tuple(draw(st.lists(st.tuples(LENGTHS, LENGTHS), max_size=4))), **options)
    b, n = draw(st.integers(0, 3)), draw(LENGTHS)
    return Case(
        "fuzz", b=b, m=draw(LENGTHS), n=n,
        top_left=draw(st.booleans()),
        key_lengths=draw(st.one_of(st.none(), st.tuples(*[st.integers(0, n)] * b))),
        segments=draw(st.integers(0, 3)),
        mask=draw(st.one_of(st.none(), patterns())),
        bias=draw(st.one_of(st.none(), patterns())),
        **options,
    )  # fmt: skip


def fuller_rounding(spec: AttentionSpec, x: Inputs, d_out: Tensor, d_lse: Tensor) -> dict[str, Tensor]:
    """`reference.rounding` and what it leaves out, to first order, in units of the accumulator's eps.

    The products that a score sums: the backward computes scores again, and where the only key has a weight of exactly 1
    in plain PyTorch, it has exp(s - lse). `out`, which the backward has in q's dtype: delta is d_out . out. The two
    parts of lse, which may cancel. And what has gathered in a running sum, about sqrt(k) t after k terms t, which each
    addition rounds: in products, and in the gradients of bias, sinks and weight, which sum over up to b * h * m * n.
    """
    see = reference.visible(spec, x)
    k, v = (torch.where(see.any(2)[..., None], t.repeat_interleave(spec.h // spec.hk, 1), 0.0) for t in (x.k, x.v))
    s = reference.scores(spec, x, k).masked_fill(~see, -torch.inf)  # [b, h, m, n]
    p, lse = reference.weights(spec, x, s)
    keep = reference.dropout_keep(spec, x) / (1 - spec.dropout_p) if spec.dropout_p > 0 else torch.ones_like(p)
    out = (p * keep) @ v
    delta = (d_out * out).sum(-1, keepdim=True) - d_lse[..., None]  # [b, h, m, 1]
    if x.weight is None:
        product, terms2 = x.q @ k.transpose(-1, -2), x.q.square() @ k.square().transpose(-1, -2)
    else:  # tanh itself is rounded, by a unit in the last place of 1
        hidden, weight = reference.hidden(x, k), x.weight[:, None, None]
        product, terms2 = (hidden * weight).sum(-1), ((hidden.square() + 1) * weight.square()).sum(-1)
    of_s2 = (1 + spec.d / 2) * spec.scale**2 * terms2
    of_lse2 = (p.square() * of_s2).sum(-1, keepdim=True)
    of_p2 = p.square() * (of_s2 + of_lse2)
    of_out = torch.finfo(spec.dtype).eps / torch.finfo(spec.accumulator).eps
    of_delta2 = (of_out**2 + spec.dv / 2) * (d_out * out).square().sum(-1, keepdim=True)
    d_s = p * (d_out @ v.transpose(-1, -2) * keep - delta)
    of_dp2 = spec.dv / 2 * d_out.square() @ v.square().transpose(-1, -2) * keep.square()
    of_ds2 = (of_s2 + of_lse2) * d_s.square() + p.square() * (of_dp2 + of_delta2)
    of_product2, d_product = of_ds2, d_s
    if spec.softcap is not None:
        t = torch.tanh(spec.scale / spec.softcap * product)
        slope = 1 - t.square()  # where it is steep, a rounded score has another slope
        of_slope2 = 1 + (2 / spec.softcap * t * slope).square() * of_s2
        of_product2, d_product = slope.square() * of_ds2 + of_slope2 * d_s.square(), slope * d_s
    of_dq2, of_dk2 = of_product2 @ k.square(), of_product2.transpose(-1, -2) @ x.q.square()
    if x.weight is not None:
        slopes2 = (1 - hidden.square()).square()
        of_terms2 = (of_product2[..., None] * slopes2 + d_product.square()[..., None]) * weight.square()
        of_dq2, of_dk2 = of_terms2.sum(3), of_terms2.sum(2)
    of_dv2 = (of_p2 * keep.square()).transpose(-1, -2) @ d_out.square()
    sink = s.new_full((spec.h,), -torch.inf) if x.sinks is None else x.sinks
    # lse is the largest score and this:
    log_sum = lse - torch.cat([s, sink.view(-1, 1, 1).expand(*s.shape[:3], 1)], -1).amax(-1)
    more = {
        "out": (of_p2 * keep.square()) @ v.square(),
        "lse": of_lse2.squeeze(-1) + torch.where(lse == -torch.inf, 0.0, log_sum.square() + (lse - log_sum).square()),
        "d_q": spec.scale**2 * of_dq2,
        "d_k": spec.scale**2 * of_dk2.unflatten(1, (spec.hk, -1)).sum(2),
        "d_v": of_dv2.unflatten(1, (spec.hk, -1)).sum(2),
    }
    if x.bias is not None:
        terms = p.numel() / max(x.bias.numel(), 1)
        more["d_bias"] = (of_ds2 + terms / 2 * d_s.square()).sum_to_size(x.bias.shape)
    if x.weight is not None:
        of_weight2 = of_product2[..., None] * hidden.square() + d_product.square()[..., None]
        terms = (d_product[..., None] * hidden).transpose(0, 1).flatten(1, 3)  # [h, b * m * n, d]
        more["d_weight"] = spec.scale**2 * (of_weight2.sum((0, 2, 3)) + terms.cumsum(1).square().sum(1))
    if x.sinks is not None:
        p_sink = (x.sinks[:, None] - lse).exp()[..., None]
        sums = (p_sink * delta).transpose(0, 1).flatten(1).cumsum(1)  # [h, b * m]
        of_terms2 = p_sink.square() * (of_delta2 + of_lse2 * delta.square())
        more["d_sinks"] = of_terms2.sum((0, 2, 3)) + sums.square().sum(1)
    return {name: t.hypot(more[name].sqrt()) for name, t in reference.rounding(spec, x, d_out, d_lse).items()}


@given(st.sampled_from(DTYPES).flatmap(lambda dtype: st.tuples(st.just(dtype), cases(dtype))),
       st.sampled_from(cpu.isas()), st.integers(0, 2**31))  # fmt: skip
def test_fuzz_any_call_agrees_with_definition(call_of: tuple[torch.dtype, Case], isa: str, seed: int):
    dtype, case = call_of
    event(f"{isa} {dtype_name(dtype)}")
    event("packed" if case.packed is not None else "batch")
    call = testing.make_inputs(case, dtype, seed=seed)
    with mock.patch.dict(registry.BACKENDS, cpu=cpu.CpuBackend(isa)):
        actual = testing.evaluate_backend(call, "cpu")
    with mock.patch.object(testing, "rounding", fuller_rounding):
        oracle = testing.reference(call)
    for result in oracle.compare(actual):
        note(str(result))
        assert result.excess <= 1, result
