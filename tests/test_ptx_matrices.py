"""Matrices of one warp in the PTX machine: mma.sync, ldmatrix, stmatrix, by the manual's layouts (PTX ISA 9.0, 9.7.14).

A fragment's layout is a function from (lane, number of the element in the lane) to (row, column), as the manual writes
it; the groupID of a lane is lane / 4, its threadID_in_group lane % 4.
"""

import numpy as np
import pytest
import torch
from ptx.program import Fault, Program, Schedule
from ptx.small import kernel, run
from ptx.text import PtxError

LANES = range(32)
KINDS = {"bf16": torch.bfloat16, "f16": torch.float16}


def a_place(lane: int, i: int) -> tuple[int, int]:
    """9.7.14.5.8 "Matrix Fragments for mma.m16n8k16 with floating point type": A, 16 x 16."""
    row = lane // 4 if i in (0, 1, 4, 5) else lane // 4 + 8
    return row, lane % 4 * 2 + (i & 1) + (8 if i >= 4 else 0)


def b_place(lane: int, i: int) -> tuple[int, int]:
    """B, 16 x 8."""
    return lane % 4 * 2 + (i & 1) + (8 if i >= 2 else 0), lane // 4


def c_place(lane: int, i: int) -> tuple[int, int]:
    """C and D, 16 x 8."""
    return lane // 4 + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)


def a_place_tf32(lane: int, i: int) -> tuple[int, int]:
    """9.7.14.5.7 "Matrix Fragments for mma.m16n8k8": A of .tf32, 16 x 8."""
    return lane // 4 + (8 if i in (1, 3) else 0), lane % 4 + (4 if i >= 2 else 0)


def b_place_tf32(lane: int, i: int) -> tuple[int, int]:
    """B of .tf32, 8 x 8."""
    return lane % 4 + 4 * i, lane // 4


def fragments(matrix: np.ndarray, place, number: int) -> np.ndarray:
    """[lane, element] of a matrix."""
    return np.array([[matrix[place(lane, i)] for i in range(number)] for lane in LANES], matrix.dtype)


MULTIPLY = """
    mad.wide.u32 %d0, %t, 16, %a0;  ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d0];
    mad.wide.u32 %d0, %t, 8, %a1;   ld.global.v2.b32 {{%r8, %r9}}, [%d0];
    mad.wide.u32 %d0, %t, 16, %a2;  ld.global.v4.b32 {{%r10, %r11, %r12, %r13}}, [%d0];
    {opcode} {{%r0, %r1, %r2, %r3}}, {{%r4, %r5, %r6, %r7}}, {{%r8, %r9}}, {{%r10, %r11, %r12, %r13}};
    mad.wide.u32 %d0, %t, 16, %a3;  st.global.v4.b32 [%d0], {{%r0, %r1, %r2, %r3}};
"""


def integers(*shape: int, seed: int) -> np.ndarray:
    """Small ones, whose sums of products are exact in every type here."""
    return np.random.default_rng(seed).integers(-8, 9, shape).astype(np.float32)


@pytest.mark.parametrize("name", KINDS)
def test_product_of_half_precision(name):
    """9.7.14.5.14 mma.sync.m16n8k16: D = A · B + C"""
    a, b, c = integers(16, 16, seed=0), integers(16, 8, seed=1), integers(16, 8, seed=2)

    def halves(matrix: np.ndarray, place, number: int) -> np.ndarray:
        t = torch.from_numpy(fragments(matrix, place, number)).to(KINDS[name])
        return t.view(torch.int16).numpy().view(np.uint32).copy()

    out = np.zeros((32, 4), np.float32)
    opcode = f"mma.sync.aligned.m16n8k16.row.col.f32.{name}.{name}.f32"
    run(MULTIPLY.format(opcode=opcode), halves(a, a_place, 8), halves(b, b_place, 4), fragments(c, c_place, 4), out)
    np.testing.assert_array_equal(out, fragments(a @ b + c, c_place, 4))


def test_product_of_half_depth():
    """9.7.14.5.7 "Matrix Fragments for mma.m16n8k8", of .f16: two registers of A, one of B"""
    a, b, c = integers(16, 8, seed=0), integers(8, 8, seed=1), integers(16, 8, seed=2)

    def halves(matrix: np.ndarray, place, number: int) -> np.ndarray:
        return fragments(matrix, place, number).astype(np.float16).view(np.uint32)

    body = MULTIPLY.replace("{{%r4, %r5, %r6, %r7}}, {{%r8, %r9}}, {{%r10", "{{%r4, %r5}}, {{%r8}}, {{%r10")
    body = body.replace("16, %a0;  ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}", "8, %a0;  ld.global.v2.b32 {{%r4, %r5}}")
    body = body.replace("8, %a1;   ld.global.v2.b32 {{%r8, %r9}}", "4, %a1;  ld.global.b32 %r8")
    out = np.zeros((32, 4), np.float32)
    opcode = "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32"
    given = halves(a, a_place, 4), halves(b, b_place, 2), fragments(c, c_place, 4)
    run(body.format(opcode=opcode), *given, out)
    np.testing.assert_array_equal(out, fragments(a @ b + c, c_place, 4))


def test_product_of_tf32_ignores_the_low_bits():
    """9.7.14.5.7 and 5.2.3: .tf32 has 10 bits of mantissa; those below are not looked at."""
    a, b, c = integers(16, 8, seed=0), integers(8, 8, seed=1), integers(16, 8, seed=2)
    noise = [
        (fragments(m, place, n).view(np.uint32) | 0x1FFF)
        for m, place, n in ((a, a_place_tf32, 4), (b, b_place_tf32, 2))
    ]
    out = np.zeros((32, 4), np.float32)
    opcode = "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"
    run(MULTIPLY.format(opcode=opcode), *noise, fragments(c, c_place, 4), out)
    np.testing.assert_array_equal(out, fragments(a @ b + c, c_place, 4))


def test_sums_are_rounded_once_or_truncated():
    """The manual leaves the order and rounding of sums open; the machine sums exactly and then rounds as it is told."""
    a, b, c = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32), np.full((16, 8), 1.0, np.float32)
    a[:, :3], b[0], b[1], b[2] = 1.0, 2.0**-24, 2.0**-26, 2.0**-26
    c[:8] = -1.0
    halves = [torch.from_numpy(fragments(m, p, n)).bfloat16().view(torch.int16).numpy().view(np.uint32).copy()
              for m, p, n in ((a, a_place, 8), (b, b_place, 4))]  # fmt: skip
    opcode = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"
    exact = c.astype(np.float64) + 2.0**-24 + 2.0**-25
    for truncate in (False, True):
        out = np.zeros((32, 4), np.float32)
        run(
            MULTIPLY.format(opcode=opcode), *halves, fragments(c, c_place, 4), out, schedule=Schedule(truncate=truncate)
        )
        expected = exact.astype(np.float32)
        if truncate:
            toward_zero = np.nextafter(expected, np.float32(0))
            expected = np.where(np.abs(expected) > np.abs(exact), toward_zero, expected)
        np.testing.assert_array_equal(out, fragments(expected, c_place, 4))


def matrix_place(lane: int, i: int) -> tuple[int, int]:
    """9.7.14.5.15 ldmatrix: element i of a lane's register, of an 8 x 8 matrix."""
    return lane // 4, lane % 4 * 2 + i


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_matrices_are_loaded_and_stored(number, transposed):
    """9.7.14.5.15 ldmatrix, 9.7.14.5.16 stmatrix: lanes 8k to 8k+7 give the rows' addresses of matrix k."""
    matrices = np.arange(number * 64, dtype=np.uint16).reshape(number, 8, 8)
    trans = ".trans" if transposed else ""
    registers = ", ".join(f"%r{k}" for k in range(number))
    each = [matrix.T if transposed else matrix for matrix in matrices]
    held = np.stack([fragments(m, matrix_place, 2).view(np.uint32)[:, 0] for m in each], 1)  # [lane, matrix]
    # Row r of all matrices lies at 80 r bytes, so that rows are no neighbours.
    places = "mov.u32 %r9, dynamic; shl.b32 %r10, %t, 4; mul.lo.u32 %r11, %t, 80; add.u32 %r9, %r9, %r11;"
    store = "".join(f"st.global.b32 [%d0+{4 * k}], %r{k};" for k in range(number))
    load = "".join(f"ld.global.b32 %r{k}, [%d0+{4 * k}];" for k in range(number))

    out = np.zeros((32, number), np.uint32)
    fill = f"""
        {places}
        setp.lt.u32 %p1, %t, {8 * number};
        mad.wide.u32 %d1, %t, 16, %a0;
        @%p1 ld.global.v4.b32 {{%r4, %r5, %r6, %r7}}, [%d1];
        @%p1 st.shared.v4.b32 [%r9], {{%r4, %r5, %r6, %r7}};
        bar.sync 0;
        ldmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 {{{registers}}}, [%r9];
        mad.wide.u32 %d0, %t, {4 * number}, %a1;
        {store}
    """
    run(fill, matrices, out, shared=32 * 80)
    np.testing.assert_array_equal(out, held)

    back = np.zeros_like(matrices)
    empty = f"""
        {places}
        mad.wide.u32 %d0, %t, {4 * number}, %a0;
        {load}
        stmatrix.sync.aligned.m8n8.x{number}{trans}.shared.b16 [%r9], {{{registers}}};
        bar.sync 0;
        setp.lt.u32 %p1, %t, {8 * number};
        mad.wide.u32 %d1, %t, 16, %a1;
        @%p1 ld.shared.v4.b32 {{%r4, %r5, %r6, %r7}}, [%r9];
        @%p1 st.global.v4.b32 [%d1], {{%r4, %r5, %r6, %r7}};
    """
    run(empty, held, back, shared=32 * 80, target="sm_90")
    np.testing.assert_array_equal(back, matrices)


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [dynamic+8];", "misaligned"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [dynamic+64];", "out of bounds"),
        ("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [dynamic];", "never written"),
        ("setp.lt.u32 %p1, %t, 8; @%p1 ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%r1}, [dynamic];", "not converged"),
        (
            "setp.lt.u32 %p1, %t, 8; @%p1 mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r0, %r1, %r2, %r3}, "
            "{%r4, %r5, %r6, %r7}, {%r8, %r9}, {%r0, %r1, %r2, %r3};",
            "not converged",
        ),
    ],
)
def test_matrices_used_wrongly_are_faults(body, fault):
    with pytest.raises(Fault, match=fault):
        run(body, shared=64)


@pytest.mark.parametrize(
    "wrong",
    [
        "mma.sync.aligned.m16n8k16.row.row.f32.f16.f16.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5, %r6, %r7}, {%r8, %r9}, "
        "{%r0, %r1, %r2, %r3};",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.bf16.f32 {%r0, %r1, %r2, %r3}, {%r4, %r5, %r6, %r7}, {%r8, %r9}, "
        "{%r0, %r1, %r2, %r3};",
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%r0, %r1, %r2}, {%r4, %r5, %r6, %r7}, {%r8, %r9}, "
        "{%r0, %r1, %r2, %r3};",
        "ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%r1}, [dynamic];",
        "ldmatrix.sync.aligned.m8n16.x1.shared.b8 {%r1}, [dynamic];",
        "stmatrix.sync.aligned.m8n8.x1.b16 [dynamic], {%r1};",
    ],
)
def test_what_is_not_known_is_an_error(wrong):
    with pytest.raises(PtxError, match="line 14"):
        Program(kernel(wrong, 1))
