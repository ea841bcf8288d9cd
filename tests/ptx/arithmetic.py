"""Integer, floating-point, comparison, selection, logic and shift instructions (PTX ISA 9.7.1 to 9.7.8).

Registers of 16 bits lie in words whose upper half is always zero, so what is closed on such words (and, or, the
unsigned minimum) is the core's instruction of 32 bits.
"""

from __future__ import annotations

from ptx.assembler import Instruction, instruction, rule

_FLUSHES, _PROPAGATES_NAN = 1, 2  # what the core is told of .ftz and .NaN


def _integers() -> None:
    """9.7.1 "Integer Arithmetic Instructions"."""
    for bits in (16, 32, 64):
        three = f"={bits} {bits} {bits}"
        rule(f"add.(s|u){bits}", f"ADD{bits}", three)
        rule(f"sub.(s|u){bits}", f"SUB{bits}", three)
        rule(f"mul.lo.(s|u){bits}", f"MULLO{bits}", three)
    rule("mul.hi.s32", "MULHI_S32", "=32 32 32")
    rule("mul.hi.u32", "MULHI_U32", "=32 32 32")
    rule("mul.hi.u64", "MULHI_U64", "=64 64 64")
    rule("mad.lo.(s|u)32", "MADLO32", "=32 32 32 32")
    rule("mad.lo.(s|u)64", "MADLO64", "=64 64 64 64")
    for kind in ("S", "U"):
        lower = kind.lower()
        rule(f"mul.wide.{lower}16", f"MULWIDE_{kind}16", "=32 16 16")
        rule(f"mul.wide.{lower}32", f"MULWIDE_{kind}32", "=64 32 32")
        rule(f"mad.wide.{lower}16", f"MADWIDE_{kind}16", "=32 16 16 32")
        rule(f"mad.wide.{lower}32", f"MADWIDE_{kind}32", "=64 32 32 64")
        rule(f"bfe.{lower}32", f"BFE_{kind}32", "=32 32 32 32")
        rule(f"bfe.{lower}64", f"BFE_{kind}64", "=64 64 32 32")
        for op in ("div", "rem", "min", "max"):
            rule(f"{op}.{lower}32", f"{op.upper()}_{kind}32", "=32 32 32")
            rule(f"{op}.{lower}64", f"{op.upper()}_{kind}64", "=64 64 64")
    for op in ("min", "max"):
        rule(f"{op}.u16", f"{op.upper()}_U32", "=16 16 16")
        rule(f"{op}.relu.s32", f"{op.upper()}RELU_S32", "=32 32 32")
    rule("abs.s32", "ABS32", "=32 32")
    rule("neg.s32", "NEG32", "=32 32")
    rule("neg.s64", "NEG64", "=64 64")
    rule("popc.b32", "POPC32", "=32 32")
    rule("clz.b32", "CLZ32", "=32 32")
    rule("bfi.b32", "BFI32", "=32 32 32 32 32")


def _floats() -> None:
    """9.7.3 "Floating-Point Instructions"; what names no rounding is rounded to the nearest, too."""
    for ftz, sub in (("", 0), (".ftz", _FLUSHES)):
        for op in ("add", "sub", "mul"):
            rule(f"{op}[.rn]{ftz}.f32", f"{op.upper()}F", "=f32 f32 f32", sub)
        rule(f"(fma|mad).rn{ftz}.f32", "FMAF", "=f32 f32 f32 f32", sub)
        rule(f"rcp.(approx|rn){ftz}.f32", "RCP", "=f32 f32", sub)
        rule(f"sqrt.(approx|rn){ftz}.f32", "SQRT", "=f32 f32", sub)
        for op in ("rsqrt", "ex2", "lg2"):
            rule(f"{op}.approx{ftz}.f32", op.upper(), "=f32 f32", sub)
    rule("tanh.approx.f32", "TANH", "=f32 f32")
    rule("div.(full|approx|rn).f32", "DIVF", "=f32 f32 f32")
    rule("neg.f32", "NEGF", "=f32 f32")
    rule("abs.f32", "ABSF", "=f32 f32")
    for op in ("add", "sub", "mul"):
        rule(f"{op}[.rn].f64", f"{op.upper()}D", "=f64 f64 f64")
    rule("fma.rn.f64", "FMAD", "=f64 f64 f64 f64")
    rule("div.rn.f64", "DIVD", "=f64 f64 f64")
    rule("rcp.approx.ftz.f64", "RCPD", "=f64 f64")
    for op in ("neg", "abs"):
        rule(f"{op}.f64", f"{op.upper()}D", "=f64 f64")
    for op in ("min", "max"):
        rule(f"{op}.f64", f"{op.upper()}D", "=f64 f64 f64")
    rule("copysign.f32", "COPYSIGNF", "=f32 f32 f32")
    rule("copysign.f64", "COPYSIGND", "=f64 f64 f64")
    # Two floats in a register of 64 bits.
    for op in ("add", "sub", "mul"):
        rule(f"{op}[.rn].f32x2", f"{op.upper()}F2", "=64 64 64")
    rule("fma.rn.f32x2", "FMAF2", "=64 64 64 64")


@instruction("(min|max)[.NaN].f32")
def _extremum(x: Instruction) -> None:
    """Of two numbers, or of three on sm_100."""
    result, *numbers = x.take(3, 4)
    op = "MINF" if x.statement.opcode.startswith("min") else "MAXF"
    arguments = [x.resolve(result, "=f32"), *(x.resolve(number, "f32") for number in numbers)]
    x.emit(op, arguments, _PROPAGATES_NAN if "NaN" in x.modifiers else 0)


def _halves() -> None:
    """9.7.4 "Half Precision Floating-Point Instructions" and 9.7.5 "Mixed Precision Floating Point Instructions"."""
    operations = ("add", "sub", "mul", "fma", "neg", "min", "max", "abs")  # in the order of the core's numbers
    numbers = {"fma": 3, "neg": 1, "abs": 1}
    for kind, is_f16 in (("bf16", 0), ("f16", 1)):
        for number, op in enumerate(operations):
            rounding = ".rn" if op == "fma" else "" if op in ("neg", "abs", "min", "max") else "[.rn]"
            operands = 1 + numbers.get(op, 2)
            for two, bits in (("", "16"), ("x2", "32")):
                signature = " ".join(["=" + bits] + [bits] * (operands - 1))
                rule(f"{op}{rounding}.{kind}{two}", "HALF", signature, number | is_f16 << 4 | bool(two) << 5)
        rule(f"add[.rn].f32.{kind}", "ADDMIX", "=f32 16 f32", is_f16)
        rule(f"fma.rn.f32.{kind}", "FMAMIX", "=f32 16 16 f32", is_f16)


def _comparisons() -> None:
    """9.7.6 "Comparison and Selection Instructions"."""
    equal = {"eq": 0, "ne": 1}
    signed = equal | {"lt": 2, "le": 3, "gt": 4, "ge": 5}
    unsigned = signed | {"lo": 2, "ls": 3, "hi": 4, "hs": 5}
    # An ordered ne is false of NaN; the names that end in u are true of it.
    floats = signed | {"ne": 13, "neu": 6, "ltu": 7, "leu": 8, "gtu": 9, "geu": 10, "nan": 11, "num": 12}
    for bits in (16, 32, 64):
        _setp(f"b{bits}", f"SETP_U{bits}", bits, equal)
        _setp(f"s{bits}", f"SETP_S{bits}", bits, signed)
        _setp(f"u{bits}", f"SETP_U{bits}", bits, unsigned)
        rule(f"selp.(b|s|u){bits}", f"SELP{max(bits, 32)}", f"={bits} {bits} {bits} p")
    _setp("f32", "SETP_F32", "f32", floats)
    _setp("f64", "SETP_F64", "f64", floats)
    rule("selp.f32", "SELP32", "=f32 f32 f32 p")
    rule("selp.f64", "SELP64", "=f64 f64 f64 p")


def _setp(kind: str, op: str, operand: int | str, codes: dict[str, int]) -> None:
    for name, code in codes.items():
        rule(f"setp.{name}.{kind}", op, f"=p {operand} {operand}", code)
        if "16" not in kind:  # the result, and or or another predicate
            rule(f"setp.{name}.and.{kind}", op, f"=p {operand} {operand} p", code | 16)
            rule(f"setp.{name}.or.{kind}", op, f"=p {operand} {operand} p", code | 32)


def _logic() -> None:
    """9.7.8 "Logic and Shift Instructions". An amount of shift is always a word."""
    for op in ("and", "or", "xor"):
        for bits in (16, 32, 64):
            rule(f"{op}.b{bits}", f"{op.upper()}{max(bits, 32)}", f"={bits} {bits} {bits}")
        rule(f"{op}.pred", f"{op.upper()}P", "=p p p")
    rule("not.pred", "NOTP", "=p p")
    for bits in (16, 32, 64):
        rule(f"not.b{bits}", f"NOT{bits}", f"={bits} {bits}")
        rule(f"shl.b{bits}", f"SHL{bits}", f"={bits} {bits} 32")
        rule(f"shr.(b|u){bits}", f"SHR_U{max(bits, 32)}", f"={bits} {bits} 32")
    rule("shr.s32", "SHR_S32", "=32 32 32")
    rule("shr.s64", "SHR_S64", "=64 64 32")
    rule("shf.l.wrap.b32", "SHF_L", "=32 32 32 32")
    rule("shf.r.wrap.b32", "SHF_R", "=32 32 32 32")
    rule("shf.l.clamp.b32", "SHF_L", "=32 32 32 32", sub=1)
    rule("shf.r.clamp.b32", "SHF_R", "=32 32 32 32", sub=1)


@instruction("lop3.b32")
def _lop3(x: Instruction) -> None:
    result, a, b, c, table = x.take(5)
    x.emit("LOP3", [x.destination(result, 32), *(x.source(y, 32) for y in (a, b, c))], x.immediate(table))


_integers()
_floats()
_halves()
_comparisons()
_logic()
