"""Faults planted in pyattn's compiled kernels, one instruction each, of which the PTX machine sees every one."""

import re

import pytest
from ptx.cases import ALL, DTYPES, Row
from ptx.launch import pyattn_on
from ptx.program import Fault, Schedule

from pyattn import testing

ROWS = {
    "sm_80": Row("sm_80", "triton", ALL["causal"], DTYPES["bf16"]),
    "sm_90a": Row("sm_90a", "hopper", ALL["d64"], DTYPES["bf16"]),
    "sm_100": Row("sm_100", "triton", ALL["d64"], DTYPES["bf16"]),
}
# (chip, kernel, pattern of the instruction, what stands in its place, which of the places; -1 the last)
PLANTED = {
    "copy not waited for": ("sm_80", "_flash_fwd_kernel", r"cp\.async\.wait_group\s+0;", "", 0),
    "barrier left out": ("sm_80", "_flash_bwd_dkdv_kernel", r"bar\.sync\s+0;", "", 1),
    "copy unmasked": ("sm_80", "_flash_fwd_kernel", r"(cp\.async\.c[ag]\S* [^;]*, (0x10|16)), %r\d+;", r"\1;", -1),
    "store unmasked": ("sm_80", "_flash_fwd_kernel", r"@%p\d+ (st\.global\S* )", r"\1", -1),
    "matrix transposed": ("sm_80", "_flash_fwd_kernel", r"(ldmatrix\S*)\.trans", r"\1", 0),
    "comparison off by one": ("sm_80", "_flash_fwd_kernel", r"setp\.le\.s32", "setp.lt.s32", 0),
    "no proxy fence": ("sm_90a", "_hopper_bwd_dkdv_kernel", r"fence\.proxy\.async\.shared::cta;", "", -1),
    "product not waited for": ("sm_90a", "_hopper_fwd_kernel", r"wgmma\.wait_group\.sync\.aligned 0;", "", 0),
    "no wgmma.fence": ("sm_90a", "_hopper_fwd_kernel", r"wgmma\.fence\.sync\.aligned;", "", 0),
    "bytes too many": ("sm_90a", "_hopper_fwd_kernel", r"(expect_tx\S* \S+ \[[^\]]*\]), \d+;", r"\1, 64;", 0),
    "arrival left out": ("sm_90a", "_hopper_fwd_kernel", r"@%p\d+ mbarrier\.arrive\.shared::cta\.b64 [^;]*;", "", 0),
    "barrier of two": ("sm_90a", "_hopper_bwd_dq_kernel", r"(mbarrier\.init\S* \[[^\]]*\]), 1;", r"\1, 2;", 0),
    "store not waited for": ("sm_90a", "_hopper_fwd_kernel", r"cp\.async\.bulk\.wait_group\.read\s+0;", "", -1),
    "tensor memory read early": ("sm_100", "_flash_fwd_kernel", r"tcgen05\.wait::ld\.sync\.aligned;", "", 0),
    "product not committed": ("sm_100", "_flash_fwd_kernel", r"@%p\d+ tcgen05\.commit[^;]*;", "", 0),
}


@pytest.mark.parametrize("name", PLANTED)
def test_planted_fault_is_seen(name: str) -> None:
    chip, kernel, pattern, replacement, which = PLANTED[name]
    row = ROWS[chip]
    call = testing.make_inputs(row.case, row.dtype)

    def change(name: str, text: str) -> str:
        if name != kernel:
            return text
        match = list(re.finditer(pattern, text))[which]
        return text[: match.start()] + match.expand(replacement) + text[match.end() :]

    def wrong(seed: int) -> bool:
        with pyattn_on(chip, schedule=Schedule(seed=seed), change=change):
            try:
                results = testing.reference(call).compare(testing.evaluate_backend(call, row.backend))
            except Fault:
                return True
        return any(not result.excess <= 1 for result in results)

    assert any(wrong(seed) for seed in range(3))
