"""Instructions of the PTX machine that NVRTC emits and Triton does not, most of them on 64-bit floats (PTX ISA 9.0)."""

import itertools
from fractions import Fraction

import numpy as np
import pytest
from ptx.program import Buffer, Fault, Program
from ptx.small import evaluate
from test_ptx_floats import COMPARISONS, same
from test_ptx_floats import A as FLOATS
from test_ptx_floats import B as OTHER_FLOATS

EDGES = np.array(
    [0.0, -0.0, 1.0, -1.5, 0.1, 1e-310, -1e-310, 1.7e308, -1.7e308, np.inf, -np.inf, np.nan, 2.0**53 + 2, 5e-324]
)
A, B = (np.array(column) for column in zip(*itertools.product(EDGES, EDGES), strict=True))


@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "add.rn", "div.rn"])
def test_arithmetic(opcode):
    """9.7.3.3 add, 9.7.3.4 sub, 9.7.3.5 mul, 9.7.3.8 div: to the nearest even; .f64 keeps subnormal numbers."""
    operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply, "div": np.divide}[opcode[:3]]
    with np.errstate(all="ignore"):
        same(evaluate(f"{opcode}.f64 {{d}}, {{a}}, {{b}};", np.float64, A, B), operation(A, B))


def test_multiplication_with_addition_rounds_once():
    """9.7.3.6 fma"""
    x, y, z = np.array([1 + 2.0**-30, 0.1, -3.0]), np.array([1 + 2.0**-30, 0.1, 7.0]), np.array([-1.0, -0.01, 21.0])
    exact = [float(Fraction(a) * Fraction(b) + Fraction(c)) for a, b, c in zip(x, y, z, strict=True)]
    same(evaluate("fma.rn.f64 {d}, {a}, {b}, {c};", np.float64, x, y, z), np.array(exact))


def test_sign():
    """9.7.3.9 abs, 9.7.3.10 neg; 9.7.3.2 copysign: the sign of the first operand, and the value of the second"""
    same(evaluate("abs.f64 {d}, {a};", np.float64, EDGES), np.abs(EDGES))
    same(evaluate("neg.f64 {d}, {a};", np.float64, EDGES), -EDGES)
    same(evaluate("copysign.f64 {d}, {a}, {b};", np.float64, A, B), np.copysign(B, A))
    found = evaluate("copysign.f32 {d}, {a}, {b};", np.float32, FLOATS, OTHER_FLOATS)
    same(found, np.copysign(OTHER_FLOATS, FLOATS))


def test_extremes():
    """9.7.3.11 min, 9.7.3.12 max: of a NaN and a number the number; +0 is more than -0"""
    with np.errstate(invalid="ignore"):
        least = np.where((A < B) | ((A == B) & np.signbit(A)), A, B)
        most = np.where((A > B) | ((A == B) & ~np.signbit(A)), A, B)
    for opcode, result in (("min", least), ("max", most)):
        expected = np.where(np.isnan(A), B, np.where(np.isnan(B), A, result))
        same(evaluate(f"{opcode}.f64 {{d}}, {{a}}, {{b}};", np.float64, A, B), expected)


def test_gross_reciprocal():
    """9.7.3.14 rcp.approx.ftz.f64: of the upper 32 bits, to 20 bits of mantissa; subnormal numbers are zeros"""
    x = np.array([1.0, -2.0, 3.0, 1e300, np.inf, -np.inf, 0.0, -0.0, 5e-324, -1e-310])
    found = evaluate("rcp.approx.ftz.f64 {d}, {a};", np.float64, x)
    assert not np.any(found.view(np.uint64) & 0xFFFFFFFF)
    with np.errstate(divide="ignore"):
        expected = 1 / np.where(np.abs(x) < 2.0**-1022, np.copysign(0, x), x)
    np.testing.assert_allclose(found, expected, rtol=2.0**-19)
    assert np.array_equal(np.signbit(found), np.signbit(x))


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison(name):
    """9.7.6.2 setp"""
    with np.errstate(invalid="ignore"):
        expected = COMPARISONS[name](A, B)
    np.testing.assert_array_equal(evaluate(f"setp.{name}.f64 {{d}}, {{a}}, {{b}};", bool, A, B), expected)


def test_conversion():
    """9.7.9 cvt: between sizes of floats, from integers, and .rni to a whole number, of two as near the even one"""
    with np.errstate(over="ignore"):
        same(evaluate("cvt.rn.f32.f64 {d}, {a};", np.float32, EDGES), EDGES.astype(np.float32))
    same(evaluate("cvt.f64.f32 {d}, {a};", np.float64, FLOATS), FLOATS.astype(np.float64))
    words = np.array([0, 1, -1, 2**31 - 1, -(2**31)], np.int32)
    same(evaluate("cvt.rn.f64.s32 {d}, {a};", np.float64, words), words.astype(np.float64))
    x = np.array([0.5, 1.5, -0.5, -2.5, 0.49, 1e30, -np.inf], np.float32)
    same(evaluate("cvt.rni.f32.f32 {d}, {a};", np.float32, x), np.rint(x))


STRUCT = """.version 8.7
.target sm_80
.address_size 64
.visible .entry k(.param .align 8 .b8 k_0[24])
.reqntid 32
{{
.reg .b32 %r<4>;
.reg .b64 %d<4>;
ld.param.u64 %d1, [k_0];
mov.b64 %d2, k_0;
add.s64 %d2, %d2, 16;
ld.param.u32 %r0, [%d2+{offset}];
ld.param.s32 %d3, [%d2+4];
st.global.b64 [%d1], %d3;
st.global.b32 [%d1+8], %r0;
ret;
}}
"""


def test_struct_is_read_by_an_address_in_a_register():
    """9.7.9 ld, with the address that mov gives of a parameter; a value is extended by its sign (9.4.1)"""
    out = np.zeros(2, np.int64)
    begin = out.ctypes.data
    given = np.array([begin, 11, 22 | -7 << 32], np.int64).tobytes()
    buffers = [Buffer(begin, begin + out.nbytes)]
    program = Program(STRUCT.format(offset=-8))
    program.run((1, 1, 1), program.pack([given]), buffers)
    assert out.tolist() == [-7, 11]
    for offset in (8, -20):
        with pytest.raises(Fault, match="parameter out of bounds"):
            Program(STRUCT.format(offset=offset)).run((1, 1, 1), program.pack([given]), buffers)
