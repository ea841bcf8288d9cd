"""Bounds by counted instructions: what a small call asks of each unit is what its shapes say."""

from __future__ import annotations

import pytest

from benchmarks import model
from pyattn.testing import Case


@pytest.mark.parametrize("chip", model.CHIPS, ids=lambda chip: chip.target)
def test_bounds_count_the_products_of_every_kernel(chip: model.Chip) -> None:
    case = Case("small", b=1, h=1, hk=1, m=128, n=128, d=64, dv=64, layout="bmhd")
    found = {bound.kernel: bound for bound in model.bounds(chip, case)}
    assert found.keys() == {"fwd", "dq", "dkdv"}
    for name, products in {"fwd": 2, "dq": 3, "dkdv": 4}.items():
        # Whole tiles: the tensor cores do what is of use and no more.
        assert found[name].cycles["tensor cores"] * chip.tensor == products * 128 * 128 * 64
        assert found[name].spent == 1
        assert 0 < found[name].busy <= 1
    speeds = model.speeds(list(found.values()))
    peak = 2e-3 * chip.tensor * chip.multiprocessors * chip.ghz
    assert all(0 < value < peak for value in speeds.values())
