"""Moves, packing and conversions (PTX ISA 9.7.9 "Data Movement and Conversion Instructions": mov, prmt, cvta, cvt)."""

from __future__ import annotations

from ptx.assembler import Argument, Instruction, instruction, rule
from ptx.text import Name, PtxError, Vector

rule("mov.pred", "MOVP", "=p p")
rule("prmt.b32", "PRMT", "=32 32 32 32")
rule("cvta[.to].global.u64", "MOV64", "=64 64")  # the generic addresses of global memory are its own
rule("cvta[.to].shared.u64", "MOV64", "=64 64")  # and back: no load or store here takes those of shared memory
rule("cvta.param.u64", "MOV64", "=64 64")  # of what a mov gave, which is the generic address already


@instruction("mov.(b|u|s)16", "mov.(b|u|s|f)32", "mov.(b|u|s|f)64")
def _move(x: Instruction) -> None:
    bits = int(x.modifiers[0][1:])
    to, source = x.take(2)
    if isinstance(source, Vector):
        _pack(x, bits)
    elif isinstance(to, Vector):
        _unpack(x, bits)
    elif bits == 64 and isinstance(source, Name) and source.name in x.assembler.kernel.parameters:
        x.emit("MOV64", [x.destination(to, 64), _parameter_address(x, source)])
    else:
        x.emit("MOV64" if bits == 64 else "MOV32", [x.destination(to, bits), x.source(source, bits)])


def _pack(x: Instruction, bits: int) -> None:
    """The first element is the low half."""
    to, source = x.operands
    low, high = (x.source(half, _half(bits)) for half in x.vector(source, 2))
    x.emit("PACK32" if bits == 64 else "PACK16", [x.destination(to, bits), low, high])


def _unpack(x: Instruction, bits: int) -> None:
    to, source = x.operands
    low, high = (x.destination(half, _half(bits)) for half in x.vector(to, 2))
    x.emit("UNPACK32" if bits == 64 else "UNPACK16", [low, high, x.source(source, bits)])


def _half(bits: int) -> int:
    if bits == 16:
        raise PtxError("halves of 16 bits")
    return bits // 2


def _parameter_address(x: Instruction, parameter: Name) -> Argument:
    offset = x.assembler.kernel.parameters[parameter.name].offset + parameter.offset
    return Argument(x.assembler.parameter_address(offset))


rule("cvt.f32.bf16", "CVT_F32_BF16", "=f32 16")
rule("cvt.f32.f16", "CVT_F32_F16", "=f32 16")
rule("cvt.rn.bf16.f32", "CVT_BF16_F32", "=16 f32")
rule("cvt.rn.f16.f32", "CVT_F16_F32", "=16 f32")
rule("cvt.rn.bf16x2.f32", "CVT_BF16X2_F32", "=32 f32 f32")  # the first source is the high half
rule("cvt.rn.f16x2.f32", "CVT_F16X2_F32", "=32 f32 f32")
rule("cvt.rn.f32.s32", "CVT_F32_S32", "=f32 32")
rule("cvt.rn.f32.u32", "CVT_F32_U32", "=f32 32")
rule("cvt.rzi.s32.f32", "CVT_S32_F32_RZ", "=32 f32")
rule("cvt.rni.f32.f32", "RINTF", "=f32 f32")  # to a whole number
rule("cvt.rn.f32.f64", "CVT_F32_F64", "=f32 f64")
rule("cvt.f64.f32", "CVT_F64_F32", "=f64 f32")
rule("cvt.rn.f64.s32", "CVT_F64_S32", "=f64 32")
rule("cvt.u32.u64", "CVT_U32_U64", "=32 64")
rule("cvt.u16.u32", "CVT_U16_U32", "=16 32")
rule("cvt.u64.u16", "CVT_U64_U32", "=64 16")


@instruction("cvt.s64.s32", "cvt.u64.u32")
def _widen(x: Instruction) -> None:
    """Of a word, or of the lower one of two: 9.4.1 "Operand Size Exceeding Instruction-Type Size"."""
    to, source = x.take(2)
    signed = "s64" in x.modifiers
    if x.bits_of(source) == 64:
        x.emit("SEXT64" if signed else "ZEXT64", [x.destination(to, 64), x.source(source, 64)])
    else:
        x.emit("CVT_S64_S32" if signed else "CVT_U64_U32", [x.destination(to, 64), x.source(source, 32)])


@instruction("cvt.u32.u16", "cvt.s32.s16", "cvt.s32.s8")
def _widen_parts(x: Instruction) -> None:
    """Of the low bits of a register of 16 or 32."""
    op = {"u16": "CVT_U16_U32", "s16": "CVT_S32_S16", "s8": "CVT_S32_S8"}[x.modifiers[1]]
    to, source = x.take(2)
    x.emit(op, [x.destination(to, 32), x.source(source, x.bits_of(source) or 16)])
