"""Compiled CPU kernels (csrc/cpu): tiled, vectorised, parallel; AVX-512, AVX2 or the baseline, chosen at run time."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch  # before pyattn._C, so that both share torch's OpenMP runtime
from torch import Tensor

from pyattn.backends import Backend
from pyattn.spec import FEATURES, AttentionSpec, Grads, Inputs, empty_output, unit_stride

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
_REASON_FILE = "_C.not_built.txt"  # written by setup.py when the build fails
_TILE = 64  # queries and keys per tile, as in csrc/cpu/tile.h
_LANES = 16  # the widest vector's elements, to which rows are padded


class CpuBackend(Backend):
    name = "cpu"
    devices = frozenset({"cpu"})
    dtypes = frozenset(_DTYPE_NAMES)
    features = frozenset(FEATURES)
    max_head_dim = 512

    def __init__(self, isa: str | None = None) -> None:
        """isa: one of `isas()`; None is the best of them."""
        self._isa = isa

    def unavailable(self) -> str | None:
        extension = _extension()
        return extension if isinstance(extension, str) else None

    def forward(self, spec: AttentionSpec, x: Inputs) -> tuple[Tensor, Tensor]:
        out = empty_output(x.q, spec.dv)
        lse = x.q.new_empty((spec.b, spec.h, spec.m), dtype=spec.accumulator)
        call = _Call(spec, x, out, lse)
        _module().forward(self._isa or _best_isa(), **call.arguments)
        return out, lse

    def backward(
        self, spec: AttentionSpec, x: Inputs, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
    ) -> Grads:
        d_q, d_k, d_v = torch.empty_like(x.q), torch.empty_like(x.k), torch.empty_like(x.v)
        d_bias = None if x.bias is None else torch.empty_like(x.bias)
        d_sinks = None if x.sinks is None else torch.empty_like(x.sinks)
        call = _Call(spec, x, out, lse.contiguous())
        call.add_tensors(d_out=unit_stride(d_out), d_q=d_q, d_k=d_k, d_v=d_v, d_bias=d_bias)
        d_lse = None if d_lse is None else d_lse.to(spec.accumulator)
        call.add_pointers(d_lse=d_lse, d_sinks=d_sinks, delta=torch.empty_like(lse))
        _module().backward(self._isa or _best_isa(), **call.arguments)
        return Grads(d_q, d_k, d_v, d_bias, d_sinks)

    def workspace_bytes(self, spec: AttentionSpec) -> tuple[int, int]:
        item, threads = spec.accumulator.itemsize, torch.get_num_threads()
        columns = sum(-(-size // _LANES) * _LANES for size in (spec.d, spec.dv))
        tiles = _TILE * (3 * columns + 6 * _TILE)
        forward = threads * tiles * item
        delta = spec.b * spec.h * spec.m
        return forward, (threads * (2 * tiles + spec.n * columns) + delta) * item


class _Call:
    """The keyword arguments of one call into pyattn._C. It keeps the tensors whose pointers it hands over alive."""

    def __init__(self, spec: AttentionSpec, x: Inputs, out: Tensor, lse: Tensor) -> None:
        self._alive: list[Tensor] = []
        self.arguments: dict[str, Any] = {
            "sizes": (spec.b, spec.h, spec.hk, spec.m, spec.n, spec.d, spec.dv),
            "dtype": _DTYPE_NAMES[spec.dtype],
            "bias_dtype": None if x.bias is None else _DTYPE_NAMES[x.bias.dtype],
            "scale": spec.scale,
            "offset": spec.offset,
            "left": spec.left,
            "right": spec.right,
            "softcap": spec.softcap,
            "dropout_p": spec.dropout_p,
            "seed": None if x.seed is None else int(x.seed),
            "threads": torch.get_num_threads(),
        }
        self.add_tensors(q=x.q, k=x.k, v=x.v, out=out, mask=x.mask, bias=x.bias)
        self.add_pointers(
            lse=lse, key_lengths=x.key_lengths, q_segments=x.q_segments, k_segments=x.k_segments,
            alibi_slopes=x.alibi_slopes, sinks=x.sinks,
        )  # fmt: skip

    def add_tensors(self, **tensors: Tensor | None) -> None:
        for name, t in tensors.items():
            if t is not None:
                self._alive.append(t)
                self.arguments[name] = (t.data_ptr(), t.shape, t.stride())

    def add_pointers(self, **tensors: Tensor | None) -> None:
        """Of tensors that the kernels read as one contiguous piece."""
        for name, t in tensors.items():
            if t is not None:
                whole = t.contiguous()
                self._alive.append(whole)
                self.arguments[name] = whole.data_ptr()


def isas() -> list[str]:
    """The instruction sets this build can use on this machine, best first; empty when it is not built."""
    extension = _extension()
    return [] if isinstance(extension, str) else extension.isas()


def _module() -> ModuleType:
    extension = _extension()
    if isinstance(extension, str):
        raise ImportError(extension)
    return extension


@cache
def _best_isa() -> str:
    return isas()[0]


@cache
def _extension() -> ModuleType | str:
    """pyattn._C, or why there is none."""
    try:
        return import_module("pyattn._C")
    except ImportError as error:
        return not_built_reason(Path(__file__).parents[1], error)


def not_built_reason(package: Path, error: ImportError) -> str:
    """Why pyattn._C cannot be imported: what setup.py wrote down when the build failed, else the import's own words."""
    written = package / _REASON_FILE
    if written.exists():
        return written.read_text(encoding="utf-8").strip()
    if not any(package.glob("_C*.so")) and not any(package.glob("_C*.pyd")):
        return "not built: pyattn._C is missing from the installed package; run pip install again"
    return f"built, but cannot be loaded: {error}"
