"""Floating-point instructions and conversions of the PTX machine, held against the manual (PTX ISA 9.0)."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from ptx.small import evaluate

TINY = np.float32(1e-40)  # subnormal
EDGES = np.array(
    [0.0, -0.0, 1.0, -1.5, 3.0, 1e-38, TINY, -TINY, 3e38, -3e38, np.inf, -np.inf, np.nan, 0.1, 16777217.0, 2.0**-149],
    np.float32,
)
A, B = (np.array(column, np.float32) for column in zip(*itertools.product(EDGES, EDGES), strict=True))


def flushed(x: np.ndarray) -> np.ndarray:
    """Subnormal numbers become zeros of their sign, as .ftz says."""
    return np.where(np.abs(x) < np.finfo(np.float32).tiny, np.copysign(np.float32(0), x), x)


def same(found: np.ndarray, expected: np.ndarray) -> None:
    """Equal in all bits; of NaN, the manual leaves the payload open."""
    assert found.dtype == expected.dtype
    nan = np.isnan(expected)
    np.testing.assert_array_equal(np.isnan(found), nan)
    integer = np.dtype(f"u{found.itemsize}")
    np.testing.assert_array_equal(found.view(integer)[~nan], expected.view(integer)[~nan])


@pytest.mark.parametrize("ftz", ["", ".ftz"])
@pytest.mark.parametrize("opcode", ["add", "sub", "mul", "add.rn", "sub.rn", "mul.rn"])
def test_sums_and_products(opcode, ftz):
    """9.7.3.3 add, 9.7.3.4 sub, 9.7.3.5 mul: to the nearest even; .ftz flushes what goes in and what comes out."""
    operation = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[opcode[:3]]
    found = evaluate(f"{opcode}{ftz}.f32 {{d}}, {{a}}, {{b}};", np.float32, A, B)
    with np.errstate(all="ignore"):
        same(found, flushed(operation(flushed(A), flushed(B))) if ftz else operation(A, B))


@pytest.mark.parametrize("ftz", ["", ".ftz"])
def test_multiplication_with_addition_rounds_once(ftz):
    """9.7.3.6 fma: as with infinite precision in between."""
    a = np.array([1 + 2.0**-12, 0.1, -3.0, 1e-30, 1e-30, 2.0**-80], np.float32)
    b = np.array([1 + 2.0**-12, 0.1, 7.0, 1e-10, 1e-9, 2.0**-60], np.float32)
    c = np.array([-1.0, -0.01, 21.0, 1e-39, -1e-39, 2.0**-130], np.float32)

    def exact(x: np.float32, y: np.float32, z: np.float32) -> np.float32:
        value = Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z))
        below = np.float32(float(value))  # at most one unit off: the nearest of its neighbours is the answer
        near = [np.nextafter(below, np.float32(-np.inf)), below, np.nextafter(below, np.float32(np.inf))]
        return min(near, key=lambda n: (abs(Fraction(float(n)) - value), n.view(np.uint32) & 1))

    given = [(flushed(x) if ftz else x) for x in (a, b, c)]
    expected = np.array([exact(*numbers) for numbers in zip(*given, strict=True)], np.float32)
    found = evaluate(f"fma.rn{ftz}.f32 {{d}}, {{a}}, {{b}}, {{c}};", np.float32, a, b, c)
    same(found, flushed(expected) if ftz else expected)


def test_extremes_of_nan_and_zeros():
    """9.7.3.11 min, 9.7.3.12 max: of a NaN and a number the number, with .NaN the NaN; +0 is more than -0."""
    with np.errstate(invalid="ignore"):
        least = np.where((A < B) | ((A == B) & np.signbit(A)), A, B)
        most = np.where((A > B) | ((A == B) & ~np.signbit(A)), A, B)
    for opcode, result in (("min", least), ("max", most)):
        one_nan = np.where(np.isnan(A), B, np.where(np.isnan(B), A, result))
        same(evaluate(f"{opcode}.f32 {{d}}, {{a}}, {{b}};", np.float32, A, B), one_nan)
        any_nan = np.where(np.isnan(A) | np.isnan(B), np.float32(np.nan), result)
        same(evaluate(f"{opcode}.NaN.f32 {{d}}, {{a}}, {{b}};", np.float32, A, B), any_nan)
    c = np.roll(B, 7)
    found = evaluate("max.f32 {d}, {a}, {b}, {c};", np.float32, A, B, c, target="sm_100")
    np.testing.assert_array_equal(found, np.fmax(np.fmax(A, B), c))


def test_sign():
    """9.7.3.9 abs, 9.7.3.10 neg"""
    same(evaluate("abs.f32 {d}, {a};", np.float32, EDGES), np.abs(EDGES))
    same(evaluate("neg.f32 {d}, {a};", np.float32, EDGES), -EDGES)


POINTS = np.array(
    [0.0, -0.0, 1.0, 0.3, -0.7, 2.0, 10.5, -20.25, 1e-3, 120.0, -130.0, np.inf, -np.inf, np.nan], np.float32
)
MANUAL_ERRORS = {  # (of exact values, largest relative error, largest absolute error) that the manual promises
    "ex2.approx.ftz.f32": (np.exp2, 2.0**-22, 0.0),
    "ex2.approx.f32": (np.exp2, 2.0**-22, 0.0),
    "lg2.approx.f32": (np.log2, 2.0**-22, 2.0**-22),
    "rcp.approx.ftz.f32": (lambda x: 1 / x, 2.0**-23, 0.0),
    "sqrt.approx.f32": (np.sqrt, 2.0**-23, 0.0),
    "rsqrt.approx.f32": (lambda x: 1 / np.sqrt(x), 2.0**-22.9, 0.0),
    "tanh.approx.f32": (np.tanh, 2.0**-11, 0.0),
}


@pytest.mark.parametrize("opcode", MANUAL_ERRORS)
def test_approximations_err_no_more_than_the_manual_allows(opcode):
    """9.7.3.13 rcp, 9.7.3.15 sqrt, 9.7.3.16 rsqrt, 9.7.3.20 lg2, 9.7.3.21 ex2, 9.7.3.22 tanh"""
    function, relative, absolute = MANUAL_ERRORS[opcode]
    found = evaluate(f"{opcode} {{d}}, {{a}};", np.float32, POINTS)
    with np.errstate(all="ignore"):
        exact = function(POINTS.astype(np.float64))
    np.testing.assert_allclose(found, np.where(np.abs(exact) < 2.0**-126, found, exact), rtol=relative, atol=absolute)


def test_approximations_flush_where_they_say_so():
    """9.7.3.21 ex2: with .ftz a subnormal argument is 0 and a subnormal result is 0; without it both stay."""
    x = np.array([-126.0, -127.0, -140.0, -149.0, -200.0, TINY], np.float32)
    exact = np.exp2(x.astype(np.float64)).astype(np.float32)
    same(evaluate("ex2.approx.f32 {d}, {a};", np.float32, x), exact)
    same(evaluate("ex2.approx.ftz.f32 {d}, {a};", np.float32, x), flushed(exact))
    found = evaluate("rcp.approx.ftz.f32 {d}, {a};", np.float32, np.array([TINY, -TINY, 3e38], np.float32))
    same(found, np.array([np.inf, -np.inf, 0], np.float32))


@pytest.mark.parametrize("kind", ["full", "approx", "rn"])
def test_division(kind):
    """9.7.3.8 div. The machine divides exactly; .full and .approx may be 2 units off on a GPU."""
    with np.errstate(all="ignore"):
        same(evaluate(f"div.{kind}.f32 {{d}}, {{a}}, {{b}};", np.float32, A, B), A / B)


def test_two_floats_in_one_register():
    """9.7.3 add, sub, mul, fma of .f32x2"""
    x, y = (np.stack([v, np.roll(v, 3)], 1).copy().view(np.uint64)[:, 0] for v in (A, B))
    with np.errstate(all="ignore"):
        for opcode, operation in {"add": np.add, "sub": np.subtract, "mul": np.multiply}.items():
            found = evaluate(f"{opcode}.f32x2 {{d}}, {{a}}, {{b}};", np.uint64, x, y, target="sm_100")
            same(found.view(np.float32), operation(x.view(np.float32), y.view(np.float32)))
    found = evaluate(
        "fma.rn.f32x2 {d}, {a}, {b}, {c};", np.uint64, *[np.full(2, v, np.float32).view(np.uint64) for v in (3, 5, 7)]
    )
    assert found.view(np.float32).tolist() == [22, 22]


# Half precision. Expected values are torch's, which rounds each operation once.

HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}


def bits_of(x: torch.Tensor) -> np.ndarray:
    return x.view(torch.int16).numpy().view(np.uint16).copy()


def same_halves(found: np.ndarray, expected: torch.Tensor) -> None:
    actual = torch.from_numpy(found.view(np.int16).copy()).view(expected.dtype)
    nan = expected.isnan()
    assert torch.equal(actual.isnan(), nan)
    assert torch.equal(actual.view(torch.int16)[~nan], expected.view(torch.int16)[~nan])


def half_pairs(kind: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    ends = torch.finfo(kind)
    values = [
        0.0,
        -0.0,
        1.0,
        -1.5,
        0.1,
        3.0,
        ends.tiny,
        ends.tiny / 4,
        -ends.tiny / 8,
        ends.max,
        -ends.max,
        math.inf,
        math.nan,
    ]
    a, b = zip(*itertools.product(values, values), strict=True)
    return torch.tensor(a).to(kind), torch.tensor(b).to(kind)


@pytest.mark.parametrize("name", HALVES)
def test_half_precision(name):
    """9.7.4 "Half Precision Floating-Point Instructions": add, sub, mul, neg, abs, alone and in pairs."""
    a, b = half_pairs(HALVES[name])
    x, y = bits_of(a), bits_of(b)
    for opcode, expected in {"add.rn": a + b, "sub.rn": a - b, "mul.rn": a * b, "add": a + b}.items():
        same_halves(evaluate(f"{opcode}.{name} {{d}}, {{a}}, {{b}};", np.uint16, x, y), expected)
        two = [np.concatenate([v, v[:1]])[: len(v) // 2 * 2].view(np.uint32) for v in (x, y)]
        found = evaluate(f"{opcode}.{name}x2 {{d}}, {{a}}, {{b}};", np.uint32, *two)
        same_halves(found.view(np.uint16), expected[: len(x) // 2 * 2])
    for opcode, expected in {"neg": -a, "abs": a.abs()}.items():
        same_halves(evaluate(f"{opcode}.{name} {{d}}, {{a}};", np.uint16, x), expected)


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_extremes(name):
    """9.7.4.7 min, 9.7.4.8 max: of a NaN and a number the number; +0 is more than -0."""
    a, b = half_pairs(HALVES[name])
    negative = torch.signbit(a)
    least = torch.where((a < b) | ((a == b) & negative), a, b)
    most = torch.where((a > b) | ((a == b) & ~negative), a, b)
    for opcode, result in (("min", least), ("max", most)):
        expected = torch.where(a.isnan(), b, torch.where(b.isnan(), a, result))
        same_halves(evaluate(f"{opcode}.{name} {{d}}, {{a}}, {{b}};", np.uint16, bits_of(a), bits_of(b)), expected)


@pytest.mark.parametrize("name", HALVES)
def test_half_precision_fma_rounds_once(name):
    """9.7.4.4 fma"""
    kind = HALVES[name]
    one = 1 + torch.finfo(kind).eps
    a, b, c = (torch.tensor(v).to(kind) for v in ([one, 3.0, 0.1], [one, 0.1, 0.1], [-1.0, -0.3, -0.01]))
    expected = (a.double() * b.double() + c.double()).to(kind)
    found = evaluate(f"fma.rn.{name} {{d}}, {{a}}, {{b}}, {{c}};", np.uint16, *map(bits_of, (a, b, c)))
    same_halves(found, expected)


@pytest.mark.parametrize("name", HALVES)
def test_mixed_precision(name):
    """9.7.5 "Mixed Precision Floating Point Instructions": add, fma"""
    a, b = half_pairs(HALVES[name])
    c = torch.linspace(-3, 5, len(a))
    finite = a.isfinite() & b.isfinite()
    a, b, c = a[finite], b[finite], c[finite]
    found = evaluate(f"add.f32.{name} {{d}}, {{a}}, {{b}};", np.float32, bits_of(a), c.numpy(), target="sm_100")
    same(found, (a.float() + c).numpy())
    text = f"fma.rn.f32.{name} {{d}}, {{a}}, {{b}}, {{c}};"
    found = evaluate(text, np.float32, bits_of(a), bits_of(b), c.numpy(), target="sm_100")
    same(found, (a.double() * b.double() + c.double()).float().numpy())


# Conversions


@pytest.mark.parametrize("name", HALVES)
def test_conversion_to_and_from_half_precision(name):
    """9.7.9 cvt: .rn is to the nearest even, infinity beyond the largest number; NaN stays NaN; subnormals stay."""
    kind = HALVES[name]
    ends = torch.finfo(kind)
    halfway = torch.tensor([1 + ends.eps / 2, 1 + 3 * ends.eps / 2, 1 + ends.eps * 0.51, -(1 + ends.eps / 2)])
    x = torch.cat(
        [torch.from_numpy(EDGES), halfway, torch.tensor([ends.max, ends.max * 1.002, ends.tiny / 2, ends.tiny / 3])]
    )
    found = evaluate(f"cvt.rn.{name}.f32 {{d}}, {{a}};", np.uint16, x.numpy())
    same_halves(found, x.to(kind))
    found = evaluate(f"cvt.rn.{name}x2.f32 {{d}}, {{a}}, {{b}};", np.uint32, x.numpy(), x.flip(0).numpy())
    same_halves((found >> 16).astype(np.uint16), x.to(kind))  # the first source is the upper half
    same_halves((found & 0xFFFF).astype(np.uint16), x.flip(0).to(kind))
    halves = x.to(kind)
    same(evaluate(f"cvt.f32.{name} {{d}}, {{a}};", np.float32, bits_of(halves)), halves.float().numpy())


def test_conversion_of_integers():
    """9.7.9 cvt between integers, and 9.4.1 on registers wider than the type."""
    words = np.array([0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF], np.uint32)
    doubles = np.concatenate([words.astype(np.uint64), words.astype(np.uint64) << 32 | 0x89ABCDEF])
    shorts = words.astype(np.uint16)
    for text, result, given, expected in (
        ("cvt.s64.s32", np.int64, words, words.view(np.int32).astype(np.int64)),
        ("cvt.u64.u32", np.uint64, words, words.astype(np.uint64)),
        ("cvt.s64.s32", np.int64, doubles, doubles.astype(np.uint32).view(np.int32).astype(np.int64)),
        ("cvt.u64.u32", np.uint64, doubles, doubles & 0xFFFFFFFF),
        ("cvt.u32.u64", np.uint32, doubles, doubles.astype(np.uint32)),
        ("cvt.u16.u32", np.uint16, words, shorts),
        ("cvt.u32.u16", np.uint32, shorts, shorts.astype(np.uint32)),
        ("cvt.u64.u16", np.uint64, shorts, shorts.astype(np.uint64)),
        ("cvt.s32.s16", np.int32, shorts, shorts.view(np.int16).astype(np.int32)),
        ("cvt.s32.s8", np.int32, shorts, shorts.astype(np.uint8).view(np.int8).astype(np.int32)),
        ("cvt.s32.s8", np.int32, words, words.astype(np.uint8).view(np.int8).astype(np.int32)),
    ):
        np.testing.assert_array_equal(evaluate(f"{text} {{d}}, {{a}};", result, given), expected, text)


def test_conversion_between_integers_and_floats():
    """9.7.9 cvt: .rn of what a float cannot hold; .rzi saturates, and NaN becomes 0 (cvt's notes on saturation)."""
    words = np.array([0, 1, -1, 16777217, 16777219, -16777217, 2**31 - 1, -(2**31), 33554435], np.int32)
    same(evaluate("cvt.rn.f32.s32 {d}, {a};", np.float32, words), words.astype(np.float32))
    unsigned = words.view(np.uint32)
    same(evaluate("cvt.rn.f32.u32 {d}, {a};", np.float32, unsigned), unsigned.astype(np.float32))
    x = np.array([0.9, -0.9, 1.5, -2.5, 3e9, -3e9, 2147483520, -2147483648, np.inf, -np.inf, np.nan, TINY], np.float32)
    expected = [0, 0, 1, -2, 2**31 - 1, -(2**31), 2147483520, -(2**31), 2**31 - 1, -(2**31), 0, 0]
    np.testing.assert_array_equal(evaluate("cvt.rzi.s32.f32 {d}, {a};", np.int32, x), np.array(expected, np.int32))


def test_packing():
    """9.7.9 mov of vectors: the first element is the least significant part."""
    x, y = np.array([0x1234, 0xFFFF], np.uint16), np.array([0xABCD, 0x8000], np.uint16)
    joined = x.astype(np.uint32) | y.astype(np.uint32) << 16
    np.testing.assert_array_equal(evaluate("mov.b32 {d}, {{{a}, {b}}};", np.uint32, x, y), joined)
    np.testing.assert_array_equal(evaluate("mov.b32 {{{d}, %h5}}, {a};", np.uint16, joined), x)
    np.testing.assert_array_equal(evaluate("mov.b32 {{_, {d}}}, {a};", np.uint16, joined), y)
    u, v = np.array([1, 0xFFFFFFFF], np.uint32), np.array([0x80000000, 7], np.uint32)
    wide = u.astype(np.uint64) | v.astype(np.uint64) << 32
    np.testing.assert_array_equal(evaluate("mov.b64 {d}, {{{a}, {b}}};", np.uint64, u, v), wide)
    np.testing.assert_array_equal(evaluate("mov.b64 {{%r5, {d}}}, {a};", np.uint32, wide), v)


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: (a < b) | (a > b),
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "neu": lambda a, b: ~(a == b),
    "ltu": lambda a, b: ~(a >= b),
    "leu": lambda a, b: ~(a > b),
    "gtu": lambda a, b: ~(a <= b),
    "geu": lambda a, b: ~(a < b),
    "num": lambda a, b: ~np.isnan(a) & ~np.isnan(b),
    "nan": lambda a, b: np.isnan(a) | np.isnan(b),
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_comparison_of_floats(name):
    """9.7.6.2 setp and 9.3.1.2 "Floating Point Comparisons": of NaN all but those ending in u, and nan, are false."""
    found = evaluate(f"setp.{name}.f32 {{d}}, {{a}}, {{b}};", bool, A, B)
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(found, COMPARISONS[name](A, B))
