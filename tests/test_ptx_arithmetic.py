"""Integer and logic instructions of the PTX machine, held against the manual (PTX ISA 9.0)."""

import itertools

import numpy as np
import pytest
from ptx.program import Program
from ptx.small import evaluate, kernel, run
from ptx.text import PtxError

BITS = {np.int16: 16, np.uint16: 16, np.int32: 32, np.uint32: 32, np.int64: 64, np.uint64: 64}
UNSIGNED = {16: np.uint16, 32: np.uint32, 64: np.uint64}
SIGNED = {16: np.int16, 32: np.int32, 64: np.int64}


def edges(kind: type) -> list[int]:
    """Values where integers go wrong."""
    ends = np.iinfo(kind)
    middle = [-3, -1, 0, 1, 2, 7, 31, 32, 255, 0x5555, 12345]
    return [int(ends.min), int(ends.min) + 1, *(v for v in middle if v >= ends.min), int(ends.max) - 1, int(ends.max)]


def pairs(kind: type) -> tuple[list[int], list[int]]:
    a, b = zip(*itertools.product(edges(kind), repeat=2), strict=True)
    return list(a), list(b)


def wrapped(values: list[int], kind: type) -> np.ndarray:
    """Integers as they wrap around in `kind`."""
    bits = BITS[kind]
    return np.array([v & (1 << bits) - 1 for v in values], UNSIGNED[bits]).view(kind)


def quotient(a: int, b: int) -> int:
    """Rounded toward zero."""
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


BINARY = {
    "add": lambda a, b, bits: a + b,
    "sub": lambda a, b, bits: a - b,
    "mul.lo": lambda a, b, bits: a * b,
    "mul.hi": lambda a, b, bits: a * b >> bits,
    "min": lambda a, b, bits: min(a, b),
    "max": lambda a, b, bits: max(a, b),
    "min.relu": lambda a, b, bits: max(min(a, b), 0),
    "max.relu": lambda a, b, bits: max(a, b, 0),
    "div": lambda a, b, bits: quotient(a, b),
    "rem": lambda a, b, bits: a - quotient(a, b) * b,
}


TWO_OPERANDS = """add.s16 add.u16 add.s32 add.u32 add.s64 add.u64 sub.s16 sub.s32 sub.u32 sub.s64
    mul.lo.s16 mul.lo.s32 mul.lo.u32 mul.lo.s64 mul.hi.s32 mul.hi.u32 mul.hi.u64
    min.s32 min.u32 min.s64 min.u64 min.u16 max.s32 max.u32 max.s64 max.u64 max.u16 min.relu.s32 max.relu.s32
    div.s32 div.u32 div.s64 div.u64 rem.s32 rem.u32 rem.s64 rem.u64"""


@pytest.mark.parametrize("opcode", TWO_OPERANDS.split())
def test_integers_of_two_operands(opcode):
    """9.7.1 "Integer Arithmetic Instructions": add, sub, mul, div, rem, min, max. Results wrap around.

    The manual leaves division by zero, and the quotient that overflows, without a value.
    """
    name, kind_name = opcode.rsplit(".", 1)
    bits = int(kind_name[1:])
    kind = (SIGNED if kind_name[0] == "s" else UNSIGNED)[bits]
    a, b = pairs(kind)
    if name in ("div", "rem"):
        lowest = np.iinfo(kind).min
        kept = [(x, y) for x, y in zip(a, b, strict=True) if y and not (x == lowest and y == -1)]
        a, b = (list(column) for column in zip(*kept, strict=True))
    found = evaluate(f"{opcode} {{d}}, {{a}}, {{b}};", kind, wrapped(a, kind), wrapped(b, kind), target="sm_90")
    expected = wrapped([BINARY[name](x, y, bits) for x, y in zip(a, b, strict=True)], kind)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize("letter", ["s", "u"])
def test_wide_products(letter, bits):
    """9.7.1.3 mul.wide and 9.7.1.4 mad.wide: the product has twice the bits."""
    narrow, wide = ((SIGNED if letter == "s" else UNSIGNED)[n] for n in (bits, 2 * bits))
    a, b = pairs(narrow)
    x, y = wrapped(a, narrow), wrapped(b, narrow)
    found = evaluate(f"mul.wide.{letter}{bits} {{d}}, {{a}}, {{b}};", wide, x, y)
    np.testing.assert_array_equal(found, wrapped([p * q for p, q in zip(a, b, strict=True)], wide))
    c = wrapped([p - 5 * q for p, q in zip(a, b, strict=True)], wide)
    found = evaluate(f"mad.wide.{letter}{bits} {{d}}, {{a}}, {{b}}, {{c}};", wide, x, y, c)
    expected = [p * q + int(r) for p, q, r in zip(a, b, c, strict=True)]
    np.testing.assert_array_equal(found, wrapped(expected, wide))


@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_low_product_and_sum(kind):
    """9.7.1.4 mad.lo"""
    a, b = pairs(kind)
    c = b[::-1]
    found = evaluate(f"mad.lo.s{BITS[kind]} {{d}}, {{a}}, {{b}}, {{c}};", kind, *(wrapped(x, kind) for x in (a, b, c)))
    np.testing.assert_array_equal(found, wrapped([x * y + z for x, y, z in zip(a, b, c, strict=True)], kind))


def test_integers_of_one_operand():
    """9.7.1.10 abs, 9.7.1.11 neg, 9.7.1.14 popc, 9.7.1.15 clz, 9.7.8 "Logic and Shift Instructions": not"""
    a = edges(np.int32)
    x = wrapped(a, np.int32)
    for opcode, of in {
        "abs.s32": lambda v: abs(v),
        "neg.s32": lambda v: -v,
        "not.b32": lambda v: ~v,
        "popc.b32": lambda v: bin(v & 0xFFFFFFFF).count("1"),
        "clz.b32": lambda v: 32 - (v & 0xFFFFFFFF).bit_length(),
    }.items():
        found = evaluate(f"{opcode} {{d}}, {{a}};", np.int32, x)
        np.testing.assert_array_equal(found, wrapped([of(v) for v in a], np.int32), opcode)
    a = edges(np.int64)
    for opcode, of in {"neg.s64": lambda v: -v, "not.b64": lambda v: ~v}.items():
        found = evaluate(f"{opcode} {{d}}, {{a}};", np.int64, wrapped(a, np.int64))
        np.testing.assert_array_equal(found, wrapped([of(v) for v in a], np.int64), opcode)
    a = edges(np.uint16)
    found = evaluate("not.b16 {d}, {a};", np.uint16, wrapped(a, np.uint16))
    np.testing.assert_array_equal(found, wrapped([~v for v in a], np.uint16))


def fields(bits: int = 32) -> list[tuple[int, int, int]]:
    """(value, first bit, length), to beyond the end of a word; only the low 8 bits of the latter two count."""
    values = [0, 1, 1 << bits - 1, (1 << bits) - 1, 0x12345678, 0xDEADBEEF << bits - 32]
    places = [0, 1, 7, 15, 30, 31, 32, 33, 62, 63, 64, 255, 256]
    return list(itertools.product(values, places, [0, 1, 5, 16, 31, 32, 33, 64, 255, 257]))


def extracted(a: int, first: int, length: int, signed: bool, msb: int) -> int:
    """The manual's own loop."""
    first, length = first & 255, length & 255
    sign = 0 if not signed or length == 0 else a >> min(first + length - 1, msb) & 1
    bits = [a >> first + i & 1 if i < length and first + i <= msb else sign for i in range(msb + 1)]
    return sum(bit << i for i, bit in enumerate(bits))


@pytest.mark.parametrize(("bits", "word"), [(32, np.uint32), (64, np.uint64)])
@pytest.mark.parametrize("letter", ["s", "u"])
def test_bit_field_extract(letter, bits, word):
    """9.7.1.19 bfe"""
    a, b, c = zip(*fields(bits), strict=True)
    given = np.array(a, word), np.array(b, np.uint32), np.array(c, np.uint32)
    found = evaluate(f"bfe.{letter}{bits} {{d}}, {{a}}, {{b}}, {{c}};", word, *given)
    expected = [extracted(*field, signed=letter == "s", msb=bits - 1) for field in fields(bits)]
    np.testing.assert_array_equal(found, np.array(expected, word))


def test_bit_field_insert():
    """9.7.1.20 bfi: f = b, with the bits of a from `first` on, as far as the word goes."""
    given = fields()
    a, first, length = (np.array(column, np.uint32) for column in zip(*given, strict=True))
    b = np.full(len(given), 0xA5A5F00F, np.uint32)

    def inserted(a: int, first: int, length: int) -> int:
        result, first, length = 0xA5A5F00F, first & 255, length & 255
        for i in range(length):
            if first + i <= 31:
                result = result & ~(1 << first + i) | (a >> i & 1) << first + i
        return result

    found = evaluate("bfi.b32 {d}, {a}, {b}, {c}, {e};", np.uint32, a, b, first, length)
    np.testing.assert_array_equal(found, np.array([inserted(*g) for g in given], np.uint32))


AMOUNTS = [0, 1, 15, 16, 17, 31, 32, 33, 63, 64, 65, 0x80000000, 0xFFFFFFFF]
SHIFTS = "shl.b16 shl.b32 shl.b64 shr.u16 shr.b32 shr.u32 shr.s32 shr.u64 shr.s64"


@pytest.mark.parametrize("opcode", SHIFTS.split())
def test_shifts_beyond_the_width_are_clamped(opcode):
    """9.7.8 "Logic and Shift Instructions": shl, shr. Amounts are unsigned, and clamped to the width."""
    kind_name = opcode[4:]
    bits = int(kind_name[1:])
    kind = (SIGNED if kind_name[0] == "s" else UNSIGNED)[bits]
    a, amounts = (list(column) for column in zip(*itertools.product(edges(kind), AMOUNTS), strict=True))
    found = evaluate(f"{opcode} {{d}}, {{a}}, {{b}};", kind, wrapped(a, kind), np.array(amounts, np.uint32))
    expected = [x << min(n, bits) if opcode[2] == "l" else x >> min(n, bits) for x, n in zip(a, amounts, strict=True)]
    np.testing.assert_array_equal(found, wrapped(expected, kind))


@pytest.mark.parametrize("mode", ["clamp", "wrap"])
@pytest.mark.parametrize("side", ["l", "r"])
def test_funnel_shift(side, mode):
    """9.7.8 shf: the high word of b:a shifted left, or the low one of b:a shifted right."""
    values = [0, 1, 0x80000001, 0xFFFFFFFF, 0x12345678]
    given = list(itertools.product(values, values, AMOUNTS))
    a, b, c = (np.array(column, np.uint32) for column in zip(*given, strict=True))
    found = evaluate(f"shf.{side}.{mode}.b32 {{d}}, {{a}}, {{b}}, {{c}};", np.uint32, a, b, c)
    expected = []
    for low, high, amount in given:
        n = min(amount, 32) if mode == "clamp" else amount & 31
        pair = high << 32 | low
        expected.append(pair << n >> 32 & 0xFFFFFFFF if side == "l" else pair >> n & 0xFFFFFFFF)
    np.testing.assert_array_equal(found, np.array(expected, np.uint32))


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_logic(bits):
    """9.7.8 and, or, xor"""
    kind = UNSIGNED[bits]
    a, b = pairs(kind)
    for opcode, of in {"and": int.__and__, "or": int.__or__, "xor": int.__xor__}.items():
        found = evaluate(f"{opcode}.b{bits} {{d}}, {{a}}, {{b}};", kind, wrapped(a, kind), wrapped(b, kind))
        np.testing.assert_array_equal(found, wrapped([of(x, y) for x, y in zip(a, b, strict=True)], kind))


def test_logic_of_predicates():
    """9.7.8 and, or, xor, not of .pred, and mov.pred (9.7.9)"""
    a, b = np.array([False, False, True, True]), np.array([False, True, False, True])
    for opcode, of in {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}.items():
        np.testing.assert_array_equal(evaluate(f"{opcode}.pred {{d}}, {{a}}, {{b}};", bool, a, b), of(a, b))
    np.testing.assert_array_equal(evaluate("not.pred {d}, {a};", bool, a), ~a)
    np.testing.assert_array_equal(evaluate("mov.pred {d}, {a};", bool, a), a)


def test_logic_by_truth_table():
    """9.7.8 lop3: bit 4a + 2b + c of the table is the result of the bits a, b, c. All tables."""
    a, b, c = (np.full(32, value, np.uint32) for value in (0xF0, 0xCC, 0xAA))
    lines = "\n".join(
        f"lop3.b32 %r1, 0xF0, 0xCC, 0xAA, {table}; and.b32 %r1, %r1, 255; st.global.u8 [%a0+{table}], %r1;"
        for table in range(256)
    )
    out = np.zeros(256, np.uint8)
    run(lines, out)
    np.testing.assert_array_equal(out, np.arange(256, dtype=np.uint8))
    mixed = evaluate("lop3.b32 {d}, {a}, {b}, {c}, 0xE8;", np.uint32, a, ~b, c)
    np.testing.assert_array_equal(mixed, (a & ~b) | (a & c) | (~b & c))


def test_byte_permutation():
    """9.7.9 prmt: a selector's low 3 bits name a byte of b:a, its fourth bit spreads that byte's sign."""
    selectors = [0x3210, 0x7654, 0x0000, 0x8888, 0xFEDC, 0x0F1E, 0x3340, 0x5410, 0x7632, 0x9ABC, 0xFFFF1234]
    a, b = 0x80C17F01, 0xFE820390
    x, y = (np.full(len(selectors), value, np.uint32) for value in (a, b))
    found = evaluate("prmt.b32 {d}, {a}, {b}, {c};", np.uint32, x, y, np.array(selectors, np.uint32))
    source = (b << 32 | a).to_bytes(8, "little")
    expected = []
    for selector in selectors:
        result = 0
        for k in range(4):
            nibble = selector >> 4 * k & 15
            byte = source[nibble & 7]
            result |= (0xFF * (byte >> 7) if nibble & 8 else byte) << 8 * k
        expected.append(result)
    np.testing.assert_array_equal(found, np.array(expected, np.uint32))


COMPARISONS = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
OF_UNSIGNED = {"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}


@pytest.mark.parametrize("kind_name", ["b16", "s16", "u16", "b32", "s32", "u32", "b64", "s64", "u64"])
def test_integer_comparison(kind_name):
    """9.7.6 "Comparison and Selection Instructions": setp, of integers, with and without .and and .or; 9.3.1.1."""
    letter, bits = kind_name[0], int(kind_name[1:])
    kind = (SIGNED if letter == "s" else UNSIGNED)[bits]
    a, b = pairs(kind)
    x, y = wrapped(a, kind), wrapped(b, kind)
    names = {name: name for name in COMPARISONS if letter != "b" or name in ("eq", "ne")}
    names |= OF_UNSIGNED if letter == "u" else {}
    for name, meaning in names.items():
        expected = np.array([COMPARISONS[meaning](p, q) for p, q in zip(a, b, strict=True)])
        found = evaluate(f"setp.{name}.{kind_name} {{d}}, {{a}}, {{b}};", bool, x, y)
        np.testing.assert_array_equal(found, expected, name)
        if bits > 16:
            other = np.arange(len(a)) % 3 == 0
            for combination, of in (("and", np.logical_and), ("or", np.logical_or)):
                text = f"setp.{name}.{combination}.{kind_name} {{d}}, {{a}}, {{b}}, {{c}};"
                np.testing.assert_array_equal(evaluate(text, bool, x, y, other), of(expected, other), text)


@pytest.mark.parametrize("bits", [16, 32, 64])
def test_selection(bits):
    """9.7.6 selp"""
    kind = UNSIGNED[bits]
    a, b = pairs(kind)
    chosen = np.arange(len(a)) % 2 == 0
    found = evaluate(f"selp.b{bits} {{d}}, {{a}}, {{b}}, {{c}};", kind, wrapped(a, kind), wrapped(b, kind), chosen)
    np.testing.assert_array_equal(found, np.where(chosen, wrapped(a, kind), wrapped(b, kind)))


def test_constants_wrap_around_to_their_type():
    """4.5 "Constants": -1 in a register of 16 bits is 0xFFFF, whatever is done with it then."""
    x = np.zeros(1, np.uint32)
    found = evaluate("mov.b16 %h1, -1; shr.u16 %h1, %h1, 4; cvt.u32.u16 {d}, %h1;", np.uint32, x)
    assert found.tolist() == [0xFFF]


@pytest.mark.parametrize(
    "statement",
    [
        "add.s32 %r1, %r2;",
        "add.s32 %r1, %r2, %r3, %r4;",
        "add.s32 %r1, %r2, %d3;",
        "add.s32 %h1, %r2, %r3;",
        "add.sat.s32 %r1, %r2, %r3;",
        "add.s32.sat %r1, %r2, %r3;",
        "add.s8 %r1, %r2, %r3;",
        "add.s32 %r1, %r2, 0f3F800000x;",
        "add.s32 %r1, %r2, %r999;",
        "add.s32 7, %r2, %r3;",
        "add.s32 %tid.x, %r2, %r3;",
        "add.f32 %r1, %r2, 1;",
        "setp.lt.and.s16 %p1, %h1, %h2, %p2;",
        "setp.lt.b32 %p1, %r1, %r2;",
        "setp.lt.s32 %r1, %r1, %r2;",
        "setp.lt.s32 %p1|%p2, %r1, %r2;",
        "shl.b32 %r1, %r2, %d3;",
        "selp.b32 %r1, %r2, %r3, %r4;",
        "lop3.b32 %r1, %r2, %r3, %r4, %r5;",
        "prmt.b32.f4e %r1, %r2, %r3, %r4;",
        "mul.s32 %r1, %r2, %r3;",
        "frobnicate.b32 %r1;",
        "@%r1 mov.u32 %r2, 0;",
        "mov.u32 %r1, nothing;",
        ".weird %r1;",
    ],
)
def test_what_is_not_known_is_an_error(statement):
    """An opcode, a modifier, a number, a kind or a type of operands that the machine lacks is never ignored."""
    with pytest.raises(PtxError, match="line 14"):
        Program(kernel(statement, arrays=1))
