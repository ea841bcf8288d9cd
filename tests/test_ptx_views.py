"""Which bytes of a storage a kernel may touch in the PTX machine: the elements of the views that it was given."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.lib.stride_tricks import as_strided
from ptx.program import Buffer, Fault, Program
from ptx.small import buffer, kernel

WORDS = {4: ("b32", "%r1"), 8: ("v2.b32", "{%r1, %r2}"), 16: ("v4.b32", "{%r1, %r2, %r3, %r4}")}


def of_heads(data: np.ndarray) -> np.ndarray:
    """Some heads, rows and columns of a tensor [batch, row, head, column], as [batch, head, row, column]."""
    return data.reshape(2, 8, 4, 16)[:, :6, 1:3, :8].transpose(0, 2, 1, 3)


# name: (views of 1024 words, first word that is read, bytes, whether it may be read)
READS: dict[str, tuple[Callable[[np.ndarray], list[np.ndarray]], int, int, bool]] = {
    "columns, first": (lambda d: [d.reshape(32, 32)[:, 8:16]], 8, 4, True),
    "columns, before": (lambda d: [d.reshape(32, 32)[:, 8:16]], 7, 4, False),
    "columns, last": (lambda d: [d.reshape(32, 32)[:, 8:16]], 3 * 32 + 15, 4, True),
    "columns, after": (lambda d: [d.reshape(32, 32)[:, 8:16]], 3 * 32 + 16, 4, False),
    "columns, four inside": (lambda d: [d.reshape(32, 32)[:, 8:16]], 3 * 32 + 12, 16, True),
    "columns, two of four outside": (lambda d: [d.reshape(32, 32)[:, 8:14]], 3 * 32 + 12, 16, False),
    "every other row, between": (lambda d: [d.reshape(32, 32)[1::2]], 2 * 32, 4, False),
    "every other row": (lambda d: [d.reshape(32, 32)[1::2]], 3 * 32, 4, True),
    "permuted": (lambda d: [d.reshape(2, 8, 4, 16).transpose(0, 2, 1, 3)], 1023, 4, True),
    "heads, last element": (lambda d: [of_heads(d)], 512 + 5 * 64 + 2 * 16 + 7, 4, True),
    "heads, another row": (lambda d: [of_heads(d)], 512 + 6 * 64 + 2 * 16, 4, False),
    "heads, another head": (lambda d: [of_heads(d)], 512 + 5 * 64 + 3 * 16, 4, False),
    "two views, the second": (lambda d: [d[:8], d[100:108]], 104, 4, True),
    "two views, between": (lambda d: [d[:8], d[100:108]], 50, 4, False),
    "two views that touch": (lambda d: [d[:10], d[10:20]], 8, 16, True),
    "overlapping windows": (lambda d: [as_strided(d, (10, 6), (12, 4))], 32, 4, True),
    "overlapping windows, past the last": (lambda d: [as_strided(d, (10, 6), (12, 4))], 33, 4, False),
    "without elements": (lambda d: [d[:4], d.reshape(32, 32)[:0]], 40, 4, False),
    "expanded": (lambda d: [np.broadcast_to(d[4:8], (5, 4))], 7, 4, True),
    "expanded, past the end": (lambda d: [np.broadcast_to(d[4:8], (5, 4))], 8, 4, False),
}


def read(buffers: list[Buffer], data: np.ndarray, word: int, size: int) -> None:
    kind, registers = WORDS[size]
    text = kernel(f"setp.eq.u32 %p1, %t, 0; @%p1 ld.global.{kind} {registers}, [%a0+{4 * word}];", 1)
    program = Program(text)
    program.run((1, 1, 1), program.pack([data.ctypes.data]), buffers)


@pytest.mark.parametrize("name", READS)
def test_only_elements_of_views_may_be_touched(name: str) -> None:
    views, word, size, allowed = READS[name]
    data = np.zeros(1024, np.int32)
    whole = buffer(data)
    buffers = [
        Buffer(whole.begin, whole.end, view.ctypes.data, view.shape, view.strides, view.itemsize)
        for view in views(data)
    ]
    if allowed:
        read(buffers, data, word, size)
    else:
        with pytest.raises(Fault, match="no tensor's element"):
            read(buffers, data, word, size)


def test_buffer_without_sizes_is_all_of_its_storage() -> None:
    data = np.zeros(1024, np.int32)
    begin = data.ctypes.data
    read([Buffer(begin, begin + data.nbytes)], data, 1023, 4)
    with pytest.raises(Fault, match="past the end"):
        read([Buffer(begin, begin + data.nbytes)], data, 1024, 4)
