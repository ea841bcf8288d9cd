"""The tolerance rule must be able to fail: each mutant is a mistake somebody could make in a kernel."""

import pytest
import torch

from pyattn import core, testing
from pyattn.backends import reference
from pyattn.spec import AttentionSpec

CASE = testing.Case("mutants", b=1, h=4, hk=2, m=60, n=80, d=32, dv=32, causal=True, bias="1hmn")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def _scale_dropped(spec, x):
    return reference.definition(spec._replace(scale=1.0), x)


def _causal_off_by_one(spec, x):
    return reference.definition(spec._replace(right=1), x)


def _bias_ignored(spec, x):
    out, lse = reference.definition(spec._replace(bias=False), x._replace(bias=x.bias * 0))
    return out, lse


def _no_rescale(spec, x):
    """Online softmax that forgets to rescale what it summed before the maximum rose."""
    first, second = (
        reference.definition(
            spec._replace(n=n, offset=spec.offset - start, bias=True),
            x._replace(
                k=x.k[:, :, start : start + n], v=x.v[:, :, start : start + n], bias=x.bias[..., start : start + n]
            ),
        )
        for start, n in ((0, 40), (40, 40))
    )
    lse = torch.logaddexp(first[1], second[1])
    return (first[0] + second[0]) / 2, lse


def _wrong_kv_head(spec, x):
    return reference.definition(spec, x._replace(k=x.k.flip(1)))


def _value_gradient_zeroed(spec, x):
    return reference.definition(spec, x._replace(v=x.v.detach() + 0 * x.v))


def _lse_in_base_two(spec, x):
    out, lse = reference.definition(spec, x)
    return out, lse * 1.4426950408889634


MUTANTS = (
    _scale_dropped,
    _causal_off_by_one,
    _bias_ignored,
    _no_rescale,
    _wrong_kv_head,
    _value_gradient_zeroed,
    _lse_in_base_two,
)


def _verdicts(definition, dtype):
    call = testing.make_inputs(CASE, dtype)

    def attention(**arguments):
        x, numbers = core.prepare(**arguments)
        out, lse = definition(AttentionSpec.of(x, numbers), reference.cast(x, torch.float64))
        return out.to(dtype), lse.to(call.d_lse.dtype)

    return [result.excess <= 1 for result in testing.reference(call).compare(testing.evaluate(call, attention))]


@pytest.mark.parametrize("dtype", DTYPES)
def test_tolerance_rounded_definition_passes(dtype):
    assert all(_verdicts(reference.definition, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__[1:])
def test_tolerance_mutant_fails(mutant, dtype):
    assert not all(_verdicts(mutant, dtype))


def test_tolerance_nan_and_wrong_infinity_fail():
    expected = torch.tensor([1.0, -torch.inf], dtype=torch.float64)
    for wrong in ([torch.nan, -torch.inf], [1.0, 0.0], [1.0, torch.inf], [torch.inf, -torch.inf]):
        with pytest.raises(AssertionError, match="times what is allowed"):
            testing.assert_as_accurate(torch.tensor(wrong), expected, expected.float())
    testing.assert_as_accurate(expected.float(), expected, expected.float())


def test_tolerance_small_error_everywhere_fails_by_root_mean_square():
    """An error within twice the baseline's worst, but in every element instead of one."""
    expected = torch.ones(1000, dtype=torch.float64)
    baseline = torch.ones(1000)
    baseline[0] += 1e-4
    with pytest.raises(AssertionError):
        testing.assert_as_accurate(torch.full((1000,), 1.0 + 1e-4), expected, baseline)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1000.0])
@pytest.mark.parametrize("baseline", [torch.nan, torch.inf])
@pytest.mark.parametrize("rounding", [0.0, torch.nan, torch.inf])
def test_tolerance_without_a_measure_allows_nothing(wrong, baseline, rounding):
    """Plain PyTorch may overflow in half precision, and the expected error in its squares."""
    expected = torch.ones(4, dtype=torch.float64)
    given = expected, torch.full((4,), baseline), torch.full((4,), rounding, dtype=torch.float64)
    assert not testing.compare("out", torch.full((4,), wrong), *given).excess <= 1
    assert testing.compare("out", expected.float(), *given).excess <= 1
