"""The compiled CPU kernels beyond the contract suite: every instruction set, ragged sizes, memory."""

from __future__ import annotations

from dataclasses import replace
from statistics import median

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pyattn import core, registry, testing
from pyattn.backends import cpu
from pyattn.spec import AttentionSpec, Inputs, Numbers, Results
from pyattn.testing import Case

ISAS = cpu.isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MANY_FEATURES = Case(
    "many", b=2, h=4, hk=2, m=130, n=150, d=40, dv=24, window=(90, 20), segments=2, mask="b1mn", bias="1hmn",
    softcap=3.0, sinks=True, dropout_p=0.2,
)  # fmt: skip
TWO_PASSES = Case("two-passes", b=1, h=1, hk=1, m=200, n=200, d=32, dv=32, causal=True)
ONE_PASS = replace(TWO_PASSES, id="one-pass", b=2, h=6, hk=6)


@pytest.fixture
def isa(request, monkeypatch):
    monkeypatch.setitem(registry.BACKENDS, "cpu", cpu.CpuBackend(request.param))


def _assert_agrees(case: Case, dtype: torch.dtype) -> None:
    for result in testing.check_case("cpu", case, dtype):
        assert result.excess <= 1, (case, result)


def test_isas_list_ends_with_the_one_every_machine_has():
    assert ISAS and ISAS[-1] == "generic"


def test_isa_unknown_here_is_refused():
    call = testing.make_inputs(Case("plain"), torch.float32)
    backend = cpu.CpuBackend("mmx")
    x, numbers = core.prepare(**call.tensors, **call.options)
    with pytest.raises(ValueError, match="isa: mmx is not usable here"):
        backend.forward(testing.AttentionSpec.of(x, numbers), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_every_isa_agrees_with_definition(isa, dtype):
    for case in (MANY_FEATURES, TWO_PASSES, ONE_PASS, replace(MANY_FEATURES, additive=True)):
        _assert_agrees(case, dtype)


def _exp(x: np.ndarray, isa: str) -> np.ndarray:
    """The kernels' exponential of every x: the gradient of v where q, d_out and the sum are 1, k = x, the maximum 0."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.from_numpy(x).dtype)
    zero, k = torch.zeros_like(one), torch.from_numpy(x).view(1, 1, -1, 1)
    results = Results(zero, zero[..., 0], zero[..., 0], one[..., 0])
    inputs = Inputs(one, k, torch.zeros_like(k))
    spec = AttentionSpec.of(inputs, Numbers(1.0, len(x) - 1, None, None, None, 0.0))
    return cpu.CpuBackend(isa).backward(spec, inputs, results, one, None, False).v.view(-1).numpy()


@pytest.mark.parametrize(("dtype", "wider"), [(np.float32, np.float64), (np.float64, np.longdouble)])
@pytest.mark.parametrize("isa", ISAS)
def test_exponential_is_within_2_ulp(isa, dtype, wider):
    if np.finfo(wider).eps > np.finfo(dtype).eps / 256:
        pytest.skip("numpy has no type here that is wide enough to tell")
    lowest = dtype(np.log(np.finfo(dtype).tiny))  # below it, results are subnormal at best
    near_zero = -np.logspace(-12, 0, 1 << 10)
    halves_of_ln2 = -np.log(2.0) / 2 * np.arange(1, 250)  # where the exponent changes
    x = np.concatenate([np.linspace(0.999 * lowest, 0, 1 << 16), near_zero, halves_of_ln2, [0.999 * lowest, -0.0]])
    x = x[x > lowest].astype(dtype)
    x = np.concatenate([x, np.nextafter(x, dtype(-1000)), np.nextafter(x, dtype(0))])
    expected = np.exp(x.astype(wider))
    ulps = np.abs(_exp(x, isa).astype(wider) - expected) / np.spacing(expected.astype(dtype))
    assert ulps.max() <= 2, f"{ulps.max():.3f} ulp at {x[ulps.argmax()]!r}"


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("isa", ISAS)
def test_exponential_at_the_ends_is_exact(isa, dtype):
    lowest = dtype(np.log(np.finfo(dtype).tiny))
    found = _exp(np.array([0, -0.0, 1.01 * lowest, -1e30, -np.inf, np.nan], dtype), isa)
    np.testing.assert_array_equal(found, np.array([1, 1, 0, 0, 0, np.nan], dtype))


def _in_torchs_terms(case: Case) -> bool:
    """Whether torch's own attention computes the case, and has a result to be wrong in."""
    beyond = (case.window, case.key_lengths, case.segments, case.softcap, case.alibi, case.sinks, case.dropout_p)
    aligned = not case.causal or (not (case.mask or case.bias) and (case.m == case.n or case.top_left))
    negative = case.scale is not None and case.scale < 0  # NaN in torch 2.13 under a causal mask
    shaped = case.packed is None and case.b * case.m * case.n * case.d * case.dv > 0
    other = case.additive or case.relative or case.ranks or case.row_windows is not None
    return aligned and shaped and not (any(beyond) or case.unseen_nan or negative or other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_error_is_at_most_that_of_torchs_attention_in_the_median_of_all_cases(isa, dtype):
    ratios = []
    for case in filter(_in_torchs_terms, testing.CASES):
        call = testing.make_inputs(case, dtype)
        call = call._replace(d_lse=torch.zeros_like(call.d_lse))  # torch has no lse
        mask = call.options.get("mask", call.tensors.get("bias"))
        leaves = {name: t.detach().requires_grad_() for name, t in call.tensors.items()}
        out = F.scaled_dot_product_attention(
            leaves["q"], leaves["k"], leaves["v"], attn_mask=leaves.get("bias", mask), is_causal=case.causal,
            scale=case.scale, enable_gqa=case.h != case.hk,
        )  # fmt: skip
        gradients = torch.autograd.grad(out, list(leaves.values()), call.d_out)
        torchs = {"out": out, **{f"d_{name}": g for name, g in zip(leaves, gradients, strict=True)}}
        expected, ours = testing.reference(call).expected, testing.evaluate_backend(call, "cpu")
        for name, found in torchs.items():
            mine, theirs = ((t.detach().double() - expected[name]).abs().max().item() for t in (ours[name], found))
            # What both have exactly, an empty result or the gradient of a lone key, is no measure of either.
            if mine > 0 or theirs > 0:
                ratios.append(mine / theirs if theirs > 0 else float("inf"))
    assert len(ratios) > 60
    assert median(ratios) <= 1


@pytest.mark.parametrize("size", [1, 3, 5, 17, 33, 64, 65, 96, 128, 192, 256, 500, 512])
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_head_size_of_any_remainder_agrees_with_definition(isa, size):
    for d, dv in ((size, 20), (20, size)):
        _assert_agrees(Case("ragged", b=1, h=2, hk=1, m=70, n=67, d=d, dv=dv, causal=True), torch.float32)
    _assert_agrees(Case("ragged", b=1, h=1, hk=1, m=9, n=21, d=size, dv=size), torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)  # float64's own definition is less exact than the kernels there
@pytest.mark.parametrize(("d", "dv"), [(513, 40), (24, 700), (1000, 2000), (4096, 4096)])
def test_heads_as_wide_as_states_of_recurrent_networks_agree_with_definition(d, dv, dtype):
    for m in (1, 70):
        _assert_agrees(Case("wide", b=2, h=1, hk=1, m=m, n=70, d=d, dv=dv, key_lengths=(70, 50)), dtype)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_large_scores_of_wide_heads_agree_with_definition(isa):
    """Random inputs whose scores, summed in parts of 128 products, left results up to 1.9 times what is allowed."""
    few = Case("wide", m=33, n=2, d=300, dv=16, scale=0.3, sinks=True, bias="bhmn", window=(3, 2), layout="bmhd",
               relative=257, relative_shared=True)  # fmt: skip
    for case, seed in ((few, 559), (Case("wide", m=9, n=5, d=257, dv=257, scale=0.3, bias="b11n", relative=257), 444)):
        call = testing.make_inputs(case, torch.float32, seed=seed)
        for result in testing.reference(call).compare(testing.evaluate_backend(call, "cpu")):
            assert result.excess <= 1, (case, result)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("m", [1, 3, 9, 40])
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_keys_that_are_split_agree_with_definition(isa, m, dtype):
    """Few tiles of queries and 1024 keys or more: parts of the keys are computed apart and joined."""
    whole = Case("split", b=2, h=4, hk=2, m=m, n=1500, d=40, dv=24, key_lengths=(1500, 700), sinks=True)
    _assert_agrees(whole, dtype)
    _assert_agrees(replace(whole, causal=True, window=(900, None), alibi=True, dropout_p=0.2), dtype)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_lengths_around_the_tile_size_agree_with_definition(isa):
    for m in (1, 15, 17, 64, 65, 129):
        for n in (1, 63, 64, 66):
            _assert_agrees(Case("lengths", b=1, h=1, hk=1, m=m, n=n, d=24, dv=24), torch.float32)


def test_value_of_nan_shows_only_in_rows_that_may_see_it():
    q, k, v = (torch.randn(1, 1, 80, 16) for _ in range(3))
    v[0, 0, 70, 3] = torch.nan
    out = core.attend(q, k, v, causal=True, backend="cpu")[0]
    assert out[0, 0, 70:, 3].isnan().all(), "a NaN that is seen must show"
    assert not out[0, 0, :64].isnan().any()
    k[0, 0, 5] = torch.nan
    out = core.attend(q, k, v, causal=True, backend="cpu")[0]
    assert out[0, 0, 5:].isnan().all()
    assert not out[0, 0, :5].isnan().any()


def test_bias_of_minus_infinity_hides_like_a_mask():
    call = testing.make_inputs(Case("bias", m=70, n=70), torch.float32)
    see = torch.rand(70, 70, generator=torch.Generator().manual_seed(1)) < 0.5
    see[7] = False
    hidden = torch.where(see, 0.0, -torch.inf).expand(1, 1, 70, 70)
    by_bias = testing.evaluate_backend(call._replace(tensors=call.tensors | {"bias": hidden}), "cpu")
    by_mask = testing.evaluate_backend(call._replace(options=call.options | {"mask": see.expand(1, 1, 70, 70)}), "cpu")
    assert (by_bias["lse"][:, :, 7] == -torch.inf).all()
    for name in by_mask:
        torch.testing.assert_close(by_bias[name], by_mask[name], rtol=1e-5, atol=1e-6, msg=name)
    assert (by_bias["d_bias"][..., ~see] == 0).all()


@pytest.mark.parametrize("bias", ["bhmn", "11mn", "b1m1"])  # a by-product of other gradients, or a pass of its own
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_gradients_of_float32_carry_no_rounding_of_products_in_bfloat16(isa, bias):
    """Of rows with a heavy key, which are corrected by the sum of what the products took."""
    call = testing.make_inputs(Case("wide", window=(0, 0), sinks=True, bias=bias, wide_bias=True), torch.bfloat16)
    call = call._replace(d_out=torch.zeros_like(call.d_out))  # whose own rounding would show
    actual, expected = testing.evaluate_backend(call, "cpu"), testing.reference(call).expected
    for name in ("d_bias", "d_sinks"):
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-5, atol=1e-5, msg=name)


def test_gradient_that_is_expanded_or_transposed_is_read_by_its_strides():
    q, k, v = (torch.randn(2, 3, 40, 8, requires_grad=True) for _ in range(3))
    out, _ = core.attend(q, k, v, backend="cpu")
    for d_out in (torch.ones(()).expand(2, 3, 40, 8), torch.randn(2, 3, 8, 40).transpose(2, 3)):
        found = torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)
        expected = torch.autograd.grad(out, (q, k, v), d_out.contiguous(), retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("b", [0, 2])
def test_ids_of_any_strides_are_taken_also_of_an_empty_batch(b):
    q, ids = torch.randn(b, 2, 5, 4), torch.arange(10, dtype=torch.int32).expand(b, 10)[:, ::2]
    x, numbers = core.prepare(q, q, q, segment_ids=(ids, ids), ranks=(ids, ids - 1))
    out, _ = core.run(x, numbers, "cpu")
    assert torch.equal(out, q)  # every query sees itself alone


@pytest.mark.filterwarnings("ignore:The given buffer is not writable")
def test_elements_that_lie_askew_in_memory_are_read_as_a_copy():
    def askew(t: torch.Tensor) -> torch.Tensor:
        found = torch.frombuffer(b" " + t.numpy().tobytes(), dtype=t.dtype, offset=1).view(t.shape)
        assert found.data_ptr() % t.itemsize
        return found

    q, k, v, d_out = (torch.randn(2, 3, 40, 8) for _ in range(4))
    bias, lengths = torch.randn(1, 3, 40, 40), torch.tensor([40, 7], dtype=torch.int32)
    results = []
    for given in (lambda t: t), askew:
        leaves = [given(t).detach().requires_grad_() for t in (q, k, v)]
        out, _ = core.attend(*leaves, bias=given(bias), key_lengths=given(lengths), backend="cpu")
        results.append((out, *torch.autograd.grad(out, leaves, given(d_out))))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert torch.equal(
        cpu.linear(askew(q), askew(k[0, 0]), askew(v[0, 0, :, 0])), cpu.linear(q, k[0, 0], v[0, 0, :, 0])
    )


def test_memory_of_a_long_sequence_stays_far_below_its_score_matrix():
    resource = pytest.importorskip("resource")
    length = 8192  # its score matrix takes 256 MB in float32
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    core.attend(q, k, v, causal=True, window=(64, 0), backend="cpu")[0].sum().backward()
    grown_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kilobytes < 64 * 1024


def test_gradient_of_overlapping_rows_is_that_of_a_copy():
    q = torch.randn(200).unfold(0, 64, 1)[:5][None, None]
    expected = [t.clone().requires_grad_() for t in (q, q, q)]
    found = [t.detach().requires_grad_() for t in (q, q, q)]
    for leaves in (expected, found):
        core.attend(*leaves, backend="cpu")[0].sum().backward()
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a.grad, b.grad)
