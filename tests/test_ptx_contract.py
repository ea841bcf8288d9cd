"""The contract on the compiled Triton kernels for sm_80 and sm_90, in the PTX machine. Which cases: `ptx.cases`."""

from pathlib import Path

import pytest
from ptx.branches import Entered
from ptx.cases import Row, chosen
from ptx.contract import excesses, jit_kernels, paged_excesses

import pyattn.triton_kernels

FOLDER = Path(pyattn.triton_kernels.__path__[0])
ROWS = chosen("sm_80")
PAGED = [(1, 16, "causal"), (24, 7, "alibi-softcap-sinks")]  # (queries, rows of a page, options of test_kvcache.py)
# Beginnings of branches that only compute an address, a factor or zeros, which the compiler may take from elsewhere.
MERGED = (
    "start = head_start(",
    "return start, start, start, stop",
    "s = s * magnitude",
    "drq = tl.zeros(",
    "rk_tile = rk_tile * SCALE_SIGN",
)


@pytest.fixture(scope="module")
def entered() -> Entered:
    return Entered()


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.id)
def test_case_is_as_accurate_as_plain_pytorch_on_sm_80(row: Row, entered: Entered) -> None:
    assert excesses(row, entered) == []


@pytest.mark.parametrize(("m", "page_size", "options"), PAGED)
def test_paged_cache_is_as_accurate_as_plain_pytorch_on_sm_80(
    m: int, page_size: int, options: str, entered: Entered
) -> None:
    assert paged_excesses("sm_80", m, page_size, options, entered=entered) == []


def test_every_kernel_ran(entered: Entered) -> None:
    wanted = jit_kernels(gluon=False)
    if entered.calls == len(ROWS) + len(PAGED):  # not of a part of the tests
        assert entered.kernels == wanted


def test_every_branch_of_the_kernels_was_entered(entered: Entered) -> None:
    if entered.calls == len(ROWS) + len(PAGED):
        files = sorted(path.name for path in FOLDER.glob("*.py") if not path.name.startswith("hopper"))
        left = [branch for branch in entered.left_out(FOLDER, files) if not branch.text.startswith(MERGED)]
        assert [str(branch) for branch in left] == []


@pytest.mark.parametrize("row", chosen("sm_90"), ids=lambda row: row.id)
def test_case_is_as_accurate_as_plain_pytorch_on_sm_90(row: Row) -> None:
    assert excesses(row) == []
