"""The Triton kernels in Triton's interpreter. Run by test_triton_interpreter.py, in a process of its own."""

from unittest import mock

import numpy as np
import pytest
import torch
from ptx.cases import DECODING, STEPS
from test_kvcache import OPTIONS, cache, held_against_definition
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pyattn import core, relative_attention, testing
from pyattn.backends.reference import definition, dropout_keep
from pyattn.registry import BACKENDS
from pyattn.spec import AttentionSpec, Inputs
from pyattn.testing import CASES, Case
from pyattn.triton_kernels import decode
from pyattn.triton_kernels.launch import Call

BACKEND = BACKENDS["triton"]


def _exact_dot(builder, a, b, d, input_precision, max_num_imprecise_acc):
    """Products summed in float64 and rounded once, as nearly any order of summation would have them.

    numpy's float32 product sums in an order that depends on the machine and on which side is transposed: scores of the
    forward and of dk/dv would differ in their last digits, which huge scores show. A GPU sums both in one order.
    """
    exact = np.matmul(a.data, b.data, dtype=np.float64) + d.data
    return TensorHandle(exact.astype(d.data.dtype), d.dtype.scalar)


InterpreterBuilder.create_dot = _exact_dot
# A case per feature, and what is empty. The PTX machine runs what the compiler makes of the kernels (tests/ptx).
SMOKE = """plain cross odd-head-sizes scale-negative causal window key-lengths mask-full gqa dropout-gqa-causal segments
    bias-per-head softcap-causal-bias alibi-causal sinks packed-gqa-window packed-dropout-alibi-sinks everything
    additive additive-saturated additive-packed relative relative-one-query relative-learned-bias relative-memory
    relative-scale-negative relative-window relative-ranks-everything ranks ranks-causal row-windows
    row-windows-additive"""
EMPTY = """no-queries no-keys no-batch no-head-size no-value-size scores-huge relative-no-keys relative-no-queries
    relative-large"""
RUNS = [(c, torch.float32) for c in CASES if c.id in (SMOKE + " " + EMPTY).split()]
RUNS += [(c, torch.float16) for c in CASES if c.id in SMOKE.split()]


def _id(value: object) -> str:
    return value.id if isinstance(value, Case) else str(value).removeprefix("torch.")


@pytest.mark.parametrize(("case", "dtype"), RUNS, ids=_id)
def test_case_is_as_accurate_as_plain_pytorch_or_refused_as_declared(case, dtype):
    reason = testing.refusal("triton", case, dtype)
    call = testing.make_inputs(case, dtype)
    undeclared = AttentionSpec.of(*core.prepare(**call.tensors, **call.options)).features - BACKEND.features
    assert (reason is not None) == bool(undeclared), reason
    if reason is None:
        results = testing.check_case("triton", case, dtype)
        assert [r for r in results if not r.excess <= 1] == []


@pytest.mark.parametrize(
    ("case", "dtype"),
    [
        *((case, dtype) for case in DECODING for dtype in (torch.float32, torch.float16)),
        *((case, torch.float32) for case in STEPS),
        (STEPS[-1], torch.float16),
    ],
    ids=_id,
)
def test_decoding_is_as_accurate_as_plain_pytorch(case, dtype):
    called = []
    with mock.patch.object(decode, "decode", lambda *given, real=decode.decode: called.append(real(*given))):
        results = testing.check_case("triton", case, dtype)
    assert len(called) == 1
    assert [r for r in results if not r.excess <= 1] == []


_FEW = {"additive": True, "b": 1, "m": 40, "n": 70}
ADDITIVE = [
    Case("additive-many-columns", **_FEW | {"m": 5, "n": 40, "h": 1, "hk": 1}, d=301, dv=8),
    Case("additive-scale-negative", **_FEW, d=17, scale=-0.3, bias="bhmn", unseen_nan=True, mask="b11n"),
    Case("additive-scale-zero", **_FEW, d=4, scale=0.0, bias="1111"),
    Case("additive-some-rows-large", **_FEW | {"m": 130, "h": 4}, d=8, powers=(-2, 2), causal=True, unseen_nan=True),
    Case("additive-segments", **_FEW | {"m": 150, "n": 140}, d=6, segments=3),
    Case("additive-top-left", **_FEW, d=6, causal=True, top_left=True, unseen_nan=True, bias="11m1"),
]  # fmt: skip


# Values that are taken in parts.
WIDE = {"b": 1, "m": 20, "n": 30, "d": 8, "dv": 300}
WIDE_VALUES = [
    Case("wide-values", **WIDE, causal=True, bias="1hmn", sinks=True),
    Case("wide-values-relative", **WIDE, relative=5, ranks=7),
    Case("wide-values-additive", **WIDE, additive=True, bias="bhmn"),
    Case("wide-values-additive-step", **WIDE | {"m": 2}, additive=True, key_lengths=(23,)),
]  # fmt: skip


CACHES = [(0, 16, torch.float32), (1, None, torch.float32), (5, 7, torch.float32), (5, 64, torch.float16),
          (24, 16, torch.float32)]  # fmt: skip


@pytest.mark.parametrize("case", WIDE_VALUES, ids=_id)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=_id)
def test_values_wider_than_a_tile_are_as_accurate_as_plain_pytorch(case, dtype):
    assert [r for r in testing.check_case("triton", case, dtype) if not r.excess <= 1] == []


@pytest.mark.parametrize("case", ADDITIVE, ids=_id)
def test_additive_scores_are_as_accurate_as_plain_pytorch(case):
    assert [r for r in testing.check_case("triton", case, torch.float32) if not r.excess <= 1] == []


@pytest.mark.parametrize(("a", "b"), [(80.0, -80.0), (30.0, -30.0), (44.0, 44.0), (-50.0, 0.5), (1e30, -1e30)])
def test_additive_scores_of_any_magnitude_are_those_of_their_sums(a, b):
    # Every column of a query or a key alike; tanh takes only the sum, which is exact.
    call = testing.make_inputs(Case("magnitude", b=1, h=1, hk=1, m=3, n=5, d=4, dv=2, additive=True), torch.float32)
    call.tensors["q"].fill_(a)
    call.tensors["k"].fill_(b)
    call.tensors["k"][:, :, 1:] += torch.tensor([0.0, 0.25, -3.0, 12.0])[:, None]
    results = testing.reference(call).compare(testing.evaluate_backend(call, "triton"))
    assert [r for r in results if not r.excess <= 1] == []


@pytest.mark.parametrize(("m", "page_size", "dtype"), CACHES, ids=_id)
def test_cache_is_as_accurate_as_plain_pytorch(m, page_size, dtype):
    for name, options in OPTIONS.items():
        x, numbers = core.prepare(**cache(m, page_size, dtype), **options, cached=True)
        assert [r for r in held_against_definition(BACKEND, x, numbers) if not r.excess <= 1] == [], name


def test_page_out_of_range_is_not_read_on_a_device_whose_values_are_not_checked():
    x, numbers = core.prepare(**cache(1, 16, torch.float32), cached=True)
    wild = x._replace(block_table=torch.where(x.block_table < 0, x.block_table, x.block_table + 2**30))
    BACKEND.forward(AttentionSpec.of(wild, numbers), wild)


@pytest.mark.parametrize(("left", "right", "expected"), [(None, None, 8), (None, 0, 8), (95, 0, 3), (0, 0, 1)])
def test_keys_are_split_where_the_band_lets_them_be_seen(left, right, expected):
    call = Call(scale=1.0, offset=999, left=left, right=right)
    assert decode.split(2, 1, 1000, call, 32, 8) == expected


def test_bfloat16_in_the_interpreter_is_refused_by_name():
    assert "bfloat16" in testing.refusal("triton", CASES[0], torch.bfloat16)


def test_float64_is_refused():
    assert "float64" in testing.refusal("triton", CASES[0], torch.float64)


def _spec_and_inputs(b=1, h=1, m=40, n=70, d=16, **options) -> tuple[AttentionSpec, Inputs]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(b, h, rows, d, generator=generator) for rows in (m, n, n))
    return _with_spec(q, k, v, **options)


def _with_spec(q, k, v, **options) -> tuple[AttentionSpec, Inputs]:
    x, numbers = core.prepare(q=q, k=k, v=v, **options)
    return AttentionSpec.of(x, numbers), x


def _close_to_definition(spec: AttentionSpec, x: Inputs) -> None:
    out, lse, *_ = BACKEND.forward(spec, x)
    expected_out, expected_lse = definition(spec, x)
    torch.testing.assert_close(out, expected_out)
    torch.testing.assert_close(lse, expected_lse)


def test_dropout_drops_exactly_the_weights_of_the_contract_and_of_the_cpu():
    # With equal scores and one-hot values each output shows one weight.
    b, h, m, n = 2, 3, 40, 70
    q, k = torch.zeros(b, h, m, 1), torch.zeros(b, h, n, 1)
    v = torch.eye(n).expand(b, h, n, n).contiguous()
    spec, x = _with_spec(q, k, v, dropout_p=0.75, seed=-3)
    out = BACKEND.forward(spec, x).out
    assert torch.equal(out > 0, dropout_keep(spec, x))
    on_cpu = BACKENDS["cpu"].forward(spec, x).out
    assert torch.equal(out > 0, on_cpu > 0)


@pytest.mark.parametrize("key_lengths", [False, True], ids=["all-keys", "key-lengths"])
def test_window_wider_than_a_block_is_right_in_full_blocks_too(key_lengths):
    # Narrower windows, as in CASES, have no block that every query of a tile sees whole.
    sizes = {"b": 2, "h": 2, "hk": 1, "m": 150, "n": 230, "window": (90, 40)}
    case = Case("wide-window", key_lengths=(230, 170) if key_lengths else None, **sizes)
    results = testing.check_case("triton", case, torch.float32)
    assert [r for r in results if not r.excess <= 1] == []


@pytest.mark.parametrize("ids", ["sorted", "any-order"])
def test_segments_longer_than_a_block_are_right_in_full_and_skipped_blocks(ids):
    call = testing.make_inputs(Case("long-segments", m=230, n=260, h=2, hk=1, segments=3), torch.float32)
    if ids == "any-order":
        # Blocks of one id that do not lie in a row, so that there is no run of full blocks.
        block = torch.arange(260).expand(2, 260) // 32 % 2
        call.options["segment_ids"] = (block[:, :230], block)
    results = testing.reference(call).compare(testing.evaluate_backend(call, "triton"))
    assert [r for r in results if not r.excess <= 1] == []


@pytest.mark.parametrize("order", ["rising", "falling", "of-blocks", "permuted"])
def test_ranks_of_whole_blocks_are_right_in_full_and_skipped_blocks(order):
    call = testing.make_inputs(Case("long-ranks", m=230, n=260, h=2, hk=1, ranks=1), torch.float32)
    keys = {
        "rising": torch.arange(260),
        "falling": torch.arange(260).flip(0),
        "of-blocks": torch.arange(260) // 32,  # a block of queries has the rank of a whole block of keys
        "permuted": torch.randperm(260, generator=torch.Generator().manual_seed(0)),
    }[order].expand(2, 260)
    call.options["ranks"] = (keys[:, 30:], keys)
    results = testing.reference(call).compare(testing.evaluate_backend(call, "triton"))
    assert [r for r in results if not r.excess <= 1] == []


@pytest.mark.parametrize("additive", [False, True], ids=["products", "additive"])
@pytest.mark.parametrize("places", ["along", "against", "anywhere"])
def test_row_windows_wider_than_a_block_are_right_in_full_and_skipped_blocks(places, additive):
    case = Case("long-windows", m=230, n=260, h=2, hk=1, row_windows=1, additive=additive, d=8, dv=8)
    call = testing.make_inputs(case, torch.float32)
    first = {
        "along": torch.arange(230) - 107,  # the first window of a block of queries stops before the last key of one
        "against": torch.arange(230).flip(0) - 100,
        "anywhere": torch.randint(-100, 230, (230,), generator=torch.Generator().manual_seed(0)),
    }[places].expand(2, 230)
    call.options["row_windows"] = (first, first + 170)
    results = testing.reference(call).compare(testing.evaluate_backend(call, "triton"))
    assert [r for r in results if not r.excess <= 1] == []


def test_rows_of_distances_that_no_pair_has_are_not_read():
    case = Case("rows", b=1, h=2, hk=1, m=40, n=70, relative=20, window=(50, 9))
    plain, call = testing.make_inputs(case, torch.float32), testing.make_inputs(case, torch.float32)
    beyond = torch.full((1, 2, 33, 20), torch.nan)
    call.tensors["relative_k"] = torch.cat([beyond, call.tensors["relative_k"], beyond], 2)
    call.options["first"] -= 33
    expected, found = (testing.evaluate_backend(c, "triton") for c in (plain, call))
    d_rows = found.pop("d_relative_k")
    assert torch.equal(d_rows[:, :, 33:-33], expected.pop("d_relative_k"))
    assert not d_rows[:, :, :33].any() and not d_rows[:, :, -33:].any()
    assert all(torch.equal(found[name], t) for name, t in expected.items())


@pytest.mark.parametrize("causal", [False, True])
def test_distances_may_be_forbidden(causal):
    m, n = 40, 64  # the last block of queries is not whole
    q, k, v = (t.requires_grad_() for t in torch.randn(3, 1, 1, n, 8).unbind())
    relative_k = torch.zeros(1, 1, m + n - 1, 1)
    relative_k[:, :, ::7] = -torch.inf
    found = []
    for backend in ("reference", "triton"):
        out = relative_attention(
            q[:, :, :m], k, v, torch.ones(1, 1, m, 1), relative_k, 1 - m, causal=causal, backend=backend
        )
        found.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    torch.testing.assert_close(*found)


def test_segment_ids_are_told_apart_by_their_upper_bits_too():
    # Several blocks, the last of each side not whole.
    ids = torch.arange(150)[None] // 60
    options = {"m": 100, "n": 150, "causal": True}
    small_spec, small = _spec_and_inputs(**options, segment_ids=(ids[:, 50:].int(), ids.int()))
    wide_spec, wide = _spec_and_inputs(**options, segment_ids=((ids[:, 50:] - 1) * 2**32 + 7, (ids - 1) * 2**32 + 7))
    expected, actual = BACKEND.forward(small_spec, small), BACKEND.forward(wide_spec, wide)
    d_out = torch.ones_like(expected.out)
    expected_grads, actual_grads = (
        BACKEND.backward(spec, x, y, d_out, None, False)
        for spec, x, y in ((small_spec, small, expected), (wide_spec, wide, actual))
    )
    for a, b in zip((*expected[:2], *expected_grads[:3]), (*actual[:2], *actual_grads[:3]), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "sinks", [torch.arange(8.0)[::2], torch.tensor([0.5]).expand(4)], ids=["every-other", "expanded"]
)
def test_sinks_of_any_stride(sinks):
    spec, x = _spec_and_inputs(h=4, sinks=sinks)
    _close_to_definition(spec, x)


def test_gradient_of_overlapping_rows_is_that_of_a_copy():
    storage = torch.randn(1, 1, 60, generator=torch.Generator().manual_seed(0))
    rows = storage.unfold(2, 33, 1)  # last stride 1, which torch.empty_like does not keep
    spec, x = _with_spec(rows[:, :, :8], rows, rows)
    y = BACKEND.forward(spec, x)
    d_out = torch.randn(y.out.shape, generator=torch.Generator().manual_seed(1))
    copies = x._replace(q=x.q.contiguous(), k=x.k.contiguous(), v=x.v.contiguous())
    found, expected = (BACKEND.backward(spec, given, y, d_out, None, False) for given in (x, copies))
    for name, a, b in zip("qkv", found, expected, strict=False):
        torch.testing.assert_close(a, b, msg=name)


def test_softcap_far_below_the_scale_leaves_padded_rows_out():
    call = testing.make_inputs(Case("steep", m=33, n=40, scale=1e10, softcap=1e-30), torch.float32)
    found = testing.evaluate_backend(call, "triton")
    assert all(t.isfinite().all() for t in found.values())


def test_mask_of_any_strides_is_read_in_place():
    spec, x = _spec_and_inputs(mask=torch.rand(70, 40, generator=torch.Generator().manual_seed(1)).T < 0.5)
    assert x.mask.stride(-1) != 1
    _close_to_definition(spec, x)


def test_stride_beyond_32_bits_within_a_tile_is_followed():
    # The last row of the one tile is more than 2**31 elements from the first. Memory between them is never touched.
    rows, distance = 32, 70_000_000
    storage = torch.empty((rows - 1) * distance + 16, dtype=torch.float16)
    k = storage.as_strided((1, 1, rows, 16), (0, 0, distance, 1))
    k.copy_(torch.randn(1, 1, rows, 16, generator=torch.Generator().manual_seed(0)))
    q = torch.randn(1, 1, 5, 16, generator=torch.Generator().manual_seed(1)).half()
    far = BACKEND.forward(*_with_spec(q, k, k))
    near = BACKEND.forward(*_with_spec(q, k.contiguous(), k.contiguous()))
    assert torch.equal(far.out, near.out)


def test_nan_that_is_seen_shows():
    spec, x = _spec_and_inputs(causal=True)
    x.k[0, 0, 50] = torch.nan  # seen by queries from 50 - 30 on
    out, lse, *_ = BACKEND.forward(spec, x)
    assert not out[0, 0, :20].isnan().any()
    assert out[0, 0, 20:].isnan().all()
    assert lse[0, 0].isnan().tolist() == [False] * 20 + [True] * 20


@pytest.mark.parametrize("lse_matters", [False, True], ids=["out", "out-and-lse"])
def test_gradient_of_broadcast_output_needs_no_strides(lse_matters):
    spec, x = _spec_and_inputs()
    y = BACKEND.forward(spec, x)
    d_lse = torch.ones(1).expand(y.lse.shape) if lse_matters else None
    expanded = BACKEND.backward(spec, x, y, torch.ones(()).expand(y.out.shape), d_lse, False)
    dense = BACKEND.backward(spec, x, y, torch.ones(y.out.shape), d_lse, False)
    assert all(torch.equal(a, b) for a, b in zip(expanded[:3], dense[:3], strict=True))
