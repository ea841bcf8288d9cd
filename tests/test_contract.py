"""Every ready backend over every case of the contract, held against float64; on a GPU too when there is one."""

import pytest
import torch

from pyattn import core, registry, testing
from pyattn.spec import AttentionSpec, dtype_name

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _backends() -> list[tuple[str, str]]:
    return [
        (name, device)
        for name, backend in registry.BACKENDS.items()
        for device in DEVICES
        if backend.unavailable() is None and device in backend.devices
    ]


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("case", testing.CASES, ids=lambda case: case.id)
@pytest.mark.parametrize(("backend", "device"), _backends())
def test_contract_case_agrees_with_definition(backend: str, device: str, case: testing.Case, dtype: torch.dtype):
    reason = testing.refusal(backend, case, dtype, device)
    if reason is not None:
        declared = ("does not do", "accepts", "head size is at most")
        assert reason.startswith(declared), f"refused for a reason the backend does not declare: {reason}"
        return
    for result in testing.check_case(backend, case, dtype, device):
        assert result.excess <= 1, result


def test_contract_machine_with_compiler_runs_cpu_backend():
    """The suite above would pass with no backend but the reference; this would not."""
    assert "cpu" in [name for name, device in _backends() if device == "cpu"]


@pytest.mark.parametrize(("backend", "device"), _backends())
def test_contract_repeated_call_gives_same_bits(backend: str, device: str):
    case = next(case for case in testing.CASES if case.id == "dropout-gqa-causal")
    call = testing.make_inputs(case, torch.float32, device)
    first, second = (testing.evaluate_backend(call, backend) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize(("backend", "device"), _backends())
def test_contract_segment_ids_are_told_apart_by_their_upper_bits_too(backend: str, device: str):
    case = next(case for case in testing.CASES if case.id == "segments-causal")
    if testing.refusal(backend, case, torch.float32, device) is not None:
        return
    small, wide = (testing.make_inputs(case, torch.float32, device) for _ in range(2))
    wide.options["segment_ids"] = tuple((ids.long() - 1) * 2**32 + 7 for ids in small.options["segment_ids"])
    expected, actual = (testing.evaluate_backend(call, backend) for call in (small, wide))
    for name, value in expected.items():
        assert torch.equal(value, actual[name]), name


@pytest.mark.parametrize(("backend", "device"), _backends())
def test_contract_dropped_weights_are_the_definitions_bit_for_bit(backend: str, device: str):
    """With v the identity, out holds the weights themselves: a dropped one is exactly 0."""
    case = testing.Case("probe", b=2, h=3, hk=3, m=37, n=64, d=16, dv=64, dropout_p=0.4)
    call = testing.make_inputs(case, torch.float32, device)
    call.tensors["v"] = torch.eye(64, device=device).expand(2, 3, 64, 64)
    actual = testing.evaluate_backend(call, backend)["out"]
    expected = testing.evaluate_backend(call, "reference")["out"]
    assert torch.equal(actual == 0, expected == 0)
    assert 0.35 < (actual == 0).float().mean() < 0.45


@pytest.mark.parametrize(("backend", "device"), _backends())
def test_contract_nan_that_is_seen_shows(backend: str, device: str):
    call = testing.make_inputs(testing.Case("nan", m=20, n=70), torch.float32, device)
    call.tensors["v"][0, 0, 3, 1] = torch.nan
    out = testing.evaluate_backend(call, backend)["out"]
    assert out[0, 0, :, 1].isnan().all()
    assert out[1].isfinite().all()


@pytest.mark.parametrize(("backend", "device"), _backends())
@pytest.mark.parametrize("bias", ["bhmn", "1h1n"])
def test_contract_constant_bias_costs_no_gradient_and_changes_none(backend: str, device: str, bias: str):
    call = testing.make_inputs(testing.Case("bias", m=20, n=70, bias=bias), torch.float32, device)
    if testing.refusal(backend, call.case, torch.float32, device):
        return
    x, numbers = core.prepare(**call.tensors, **call.options)
    runs, spec = registry.BACKENDS[backend], AttentionSpec.of(x, numbers)
    forward = runs.forward(spec, x)
    constant, learned = (runs.backward(spec, x, forward, call.d_out, call.d_lse, wanted) for wanted in (False, True))
    assert constant.bias is None
    assert all(map(torch.equal, constant[:3], learned[:3]))


@pytest.mark.parametrize(("backend", "device"), _backends())
def test_contract_bias_of_minus_infinity_hides_keys(backend: str, device: str):
    case = testing.Case("bias", m=20, n=70, bias="b1mn")
    if testing.refusal(backend, case, torch.float32, device):
        return
    call = testing.make_inputs(case, torch.float32, device)
    call.tensors["bias"][:, :, 3] = -torch.inf
    call.tensors["bias"][:, :, 4, 5:] = -torch.inf
    actual = testing.evaluate_backend(call, backend)
    assert (actual["out"][:, :, 3] == 0).all()
    assert (actual["lse"][:, :, 3] == -torch.inf).all()
    for result in testing.reference(call).compare(actual):
        assert result.excess <= 1, result
