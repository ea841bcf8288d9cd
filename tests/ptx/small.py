"""Small kernels, written by hand, for tests of single instructions.

One instruction over arrays, a lane an element, and a kernel on the memory of arrays:

    result = evaluate("add.s32 {d}, {a}, {b};", np.int32, x, y)
    run("st.global.u32 [%a0], 7;", out)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ptx.program import Buffer, Program, Schedule

_HEADER = """.version 8.7
.target {target}
.address_size 64
.extern .shared .align 128 .b8 dynamic[];
.visible .entry small({parameters})
.reqntid {threads}
{{
.reg .pred %p<16>;
.reg .b16 %h<16>;
.reg .b32 %r<256>, %t;
.reg .b64 %d<64>, %a<16>, %m<4>;
mov.u32 %t, %tid.x;
{loads}
{body}
ret;
}}
"""
_MOST_THREADS = 1024


def kernel(body: str, arrays: int, threads: int = 32, target: str = "sm_80", maps: int = 0) -> str:
    """The text of a kernel whose registers %a0, %a1, ... point at its arrays.

    It has predicates %p0 to %p15, registers of 16 bits %h0 to %h15, of 32 %r0 to %r255 and of 64 %d0 to %d63, its
    thread's number in %t, and the memory `dynamic`; behind the arrays are tensor maps, at the addresses %m0, %m1, ...
    """
    parameters = [f".param .u64 small_{k}" for k in range(arrays)]
    parameters += [f".param .align 64 .b8 map_{k}[128]" for k in range(maps)]
    loads = [f"ld.param.u64 %a{k}, [small_{k}];" for k in range(arrays)]
    loads += [f"mov.b64 %m{k}, map_{k};" for k in range(maps)]
    given = {"parameters": ", ".join(parameters), "loads": "\n".join(loads), "body": body}
    return _HEADER.format(target=target, threads=threads, **given)


def buffer(array: np.ndarray) -> Buffer:
    """All elements of an array."""
    begin = array.ctypes.data
    return Buffer(begin, begin + array.nbytes, begin, array.shape, array.strides, array.itemsize)


def run(
    body: str,
    *arrays: np.ndarray,
    threads: int = 32,
    target: str = "sm_80",
    shared: int = 0,
    grid: tuple[int, int, int] = (1, 1, 1),
    schedule: Schedule | None = None,
    maps: Sequence[bytes] = (),
) -> None:
    """Runs `kernel` on the memory of `arrays`."""
    program = Program(kernel(body, len(arrays), threads, target, len(maps)))
    given = program.pack([*(array.ctypes.data for array in arrays), *maps])
    program.run(grid, given, [buffer(array) for array in arrays if array.size], shared, schedule=schedule)


def evaluate(instruction: str, result: type, *operands: np.ndarray, target: str = "sm_80") -> np.ndarray:
    """`instruction` over arrays of one length: {d} is its result of type `result`, {a}, {b}, ... are its operands.

    A bool is a predicate; floats of 16 bits of either kind are what their bits say, as float16 or uint16.
    """
    count = len(operands[0])
    threads = min(-(-count // 32) * 32, _MOST_THREADS)
    blocks = -(-count // threads)
    padded = [np.concatenate([x, np.repeat(x[:1], blocks * threads - count)]) for x in operands]
    out: np.ndarray = np.zeros(blocks * threads, result)
    names = {name: _register(x.dtype, k) for k, (name, x) in enumerate(zip("abce", padded, strict=False), 1)}
    names["d"] = _register(out.dtype, 0)
    lines = ["mov.u32 %r20, %ctaid.x;", f"mad.lo.s32 %r20, %r20, {threads}, %t;"]
    lines += [_load(names[name], x.dtype, k) for k, (name, x) in enumerate(zip("abce", padded, strict=False), 1)]
    lines += [instruction.format(**names), _store(names["d"], out.dtype)]
    run("\n".join(lines), out, *padded, threads=threads, target=target, grid=(blocks, 1, 1))
    return out[:count]


def _register(kind: np.dtype, number: int) -> str:
    letter = "p" if kind.kind == "b" else {2: "h", 4: "r", 8: "d"}[kind.itemsize]
    return f"%{letter}{number}"


def _load(register: str, kind: np.dtype, array: int) -> str:
    place = f"mad.wide.s32 %d20, %r20, {kind.itemsize}, %a{array};"
    if kind.kind == "b":
        return f"{place} ld.global.u8 %h15, [%d20]; setp.ne.u16 {register}, %h15, 0;"
    return f"{place} ld.global.b{8 * kind.itemsize} {register}, [%d20];"


def _store(register: str, kind: np.dtype) -> str:
    place = f"mad.wide.s32 %d20, %r20, {kind.itemsize}, %a0;"
    if kind.kind == "b":
        return f"{place} selp.u16 %h15, 1, 0, {register}; st.global.u8 [%d20], %h15;"
    return f"{place} st.global.b{8 * kind.itemsize} [%d20], {register};"
