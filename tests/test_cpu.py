"""The compiled CPU kernels beyond the contract suite: every instruction set, ragged sizes, threads, memory."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from pyattn import registry, testing
from pyattn.backends import cpu
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
def threads():
    """Sets the number of threads; the old one comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


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
    x, numbers = testing.api._prepare(**call.tensors, **call.options)
    with pytest.raises(ValueError, match="isa: mmx is not usable here"):
        backend.forward(testing.AttentionSpec.of(x, numbers), x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_every_isa_agrees_with_definition(isa, dtype):
    for case in (MANY_FEATURES, TWO_PASSES, ONE_PASS):
        _assert_agrees(case, dtype)


@pytest.mark.parametrize("size", [1, 3, 5, 17, 33, 64, 65, 96, 128, 192, 256, 500, 512])
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_head_size_of_any_remainder_agrees_with_definition(isa, size):
    for d, dv in ((size, 20), (20, size)):
        _assert_agrees(Case("ragged", b=1, h=2, hk=1, m=70, n=67, d=d, dv=dv, causal=True), torch.float32)
    _assert_agrees(Case("ragged", b=1, h=1, hk=1, m=9, n=21, d=size, dv=size), torch.bfloat16)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_lengths_around_the_tile_size_agree_with_definition(isa):
    for m in (1, 15, 17, 64, 65, 129):
        for n in (1, 63, 64, 66):
            _assert_agrees(Case("lengths", b=1, h=1, hk=1, m=m, n=n, d=24, dv=24), torch.float32)


@pytest.mark.parametrize("case", [MANY_FEATURES, TWO_PASSES, ONE_PASS], ids=lambda case: case.id)
def test_results_are_the_same_bits_on_any_number_of_threads(case, threads):
    call = testing.make_inputs(case, torch.float32)
    threads(1)
    expected = testing.evaluate_backend(call, "cpu")
    for count in (2, 3, 2):
        threads(count)
        _assert_same_bits(testing.evaluate_backend(call, "cpu"), expected)


def test_calls_from_several_python_threads_do_not_disturb_each_other():
    calls = [testing.make_inputs(MANY_FEATURES, torch.float32, seed=seed) for seed in range(4)]
    expected = [testing.evaluate_backend(call, "cpu") for call in calls]
    found: list = [None] * len(calls)

    def work(place: int) -> None:
        # Not evaluate_backend: it switches a setting of the whole process.
        found[place] = [
            testing.evaluate(calls[place], lambda **arguments: testing.api._attention(**arguments, backend="cpu"))
            for _ in range(3)
        ]

    workers = [threading.Thread(target=work, args=(place,)) for place in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for repeats, reference in zip(found, expected, strict=True):
        for result in repeats:
            _assert_same_bits(result, reference)


def test_value_of_nan_shows_only_in_rows_that_may_see_it():
    q, k, v = (torch.randn(1, 1, 80, 16) for _ in range(3))
    v[0, 0, 70, 3] = torch.nan
    out = testing.api._attention(q, k, v, causal=True, backend="cpu")[0]
    assert out[0, 0, 70:, 3].isnan().all(), "a NaN that is seen must show"
    assert not out[0, 0, :64].isnan().any()
    k[0, 0, 5] = torch.nan
    out = testing.api._attention(q, k, v, causal=True, backend="cpu")[0]
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


def test_gradient_that_is_expanded_or_transposed_is_read_by_its_strides():
    q, k, v = (torch.randn(2, 3, 40, 8, requires_grad=True) for _ in range(3))
    out, _ = testing.api._attention(q, k, v, backend="cpu")
    for d_out in (torch.ones(()).expand(2, 3, 40, 8), torch.randn(2, 3, 8, 40).transpose(2, 3)):
        found = torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)
        expected = torch.autograd.grad(out, (q, k, v), d_out.contiguous(), retain_graph=True)
        for a, b in zip(found, expected, strict=True):
            assert torch.equal(a, b)


def test_memory_of_a_long_sequence_stays_far_below_its_score_matrix():
    resource = pytest.importorskip("resource")
    length = 8192  # its score matrix takes 256 MB in float32
    q, k, v = (torch.randn(1, 1, length, 8, requires_grad=True) for _ in range(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    testing.api._attention(q, k, v, causal=True, window=(64, 0), backend="cpu")[0].sum().backward()
    grown_kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kilobytes < 64 * 1024


def _assert_same_bits(actual: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name
