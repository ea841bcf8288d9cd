"""The contract on the Gluon kernels for sm_90a and the Triton kernels for sm_100, in the PTX machine."""

from pathlib import Path

import pytest
from ptx.branches import Entered
from ptx.cases import Row, chosen
from ptx.contract import excesses, jit_kernels

import pyattn.triton_kernels

FOLDER = Path(pyattn.triton_kernels.__path__[0])
ROWS = chosen("sm_90a")
MERGED = ("return masked * 0, masked",)  # what the compiler computes elsewhere


@pytest.fixture(scope="module")
def entered() -> Entered:
    return Entered()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_case_is_as_accurate_as_plain_pytorch_on_sm_90a(row: Row, entered: Entered) -> None:
    assert excesses(row, entered) == []


def test_every_gluon_kernel_ran(entered: Entered) -> None:
    if entered.calls == len(ROWS):  # not of a part of the tests
        assert entered.kernels >= jit_kernels(gluon=True)


def test_every_branch_of_the_gluon_kernels_was_entered(entered: Entered) -> None:
    if entered.calls == len(ROWS):
        files = sorted(path.name for path in FOLDER.glob("hopper*.py"))
        left = [branch for branch in entered.left_out(FOLDER, files) if not branch.text.startswith(MERGED)]
        assert [str(branch) for branch in left] == []


@pytest.mark.parametrize("row", chosen("sm_100"), ids=lambda row: row.id)
def test_case_is_as_accurate_as_plain_pytorch_on_sm_100(row: Row) -> None:
    assert excesses(row) == []
