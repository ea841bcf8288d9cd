"""Compiled CPU kernels (csrc/cpu): tiled, vectorised, parallel; the best instruction set is chosen at run time."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch  # before pyattn._C, so that both share torch's OpenMP runtime
from torch import Tensor

from pyattn.backends import Backend, Proof
from pyattn.spec import FEATURES, AttentionSpec, Grads, Inputs, Results, empty_gradients, empty_results, unit_stride

_DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
_REASON_FILE = "_C.not_built.txt"  # written by setup.py when the build fails
_TILE = 64  # queries and keys per tile, as in csrc/cpu/tile.h
_TOGETHER = 4  # tiles of queries that a backward task works on, as in csrc/cpu/backward.h
_LANES = 16  # the widest vector's elements, to which rows are padded
# Calls of few tiles and at least this many keys split them into parts, as csrc/cpu/plan.cpp does.
_SPLIT_FROM, _MOST_PARTS = 1024, 128
# Tensors that the kernels read as one contiguous piece. So they do segment ids, which must be int32, too.
_WHOLE = (
    "key_lengths", "alibi_slopes", "sinks", "cu_seqlens_q", "cu_seqlens_k", "block_table", "q_ranks", "k_ranks",
    "row_first", "row_stop",
)  # fmt: skip


class CpuBackend(Backend):
    name = "cpu"
    devices = frozenset({"cpu"})
    dtypes = frozenset(_DTYPE_NAMES)
    features = frozenset(FEATURES)
    max_head_dim = 4096  # as in csrc/attention_args.h
    proof = Proof("is compiled", "is no PTX", "AVX2 2026-11-30, AVX-512 2026-11-21, AMX not yet")

    def __init__(self, isa: str | None = None) -> None:
        """isa: one of `isas()`; None is the best of them."""
        self._isa = isa

    def unavailable(self) -> str | None:
        extension = _extension()
        return extension if isinstance(extension, str) else None

    def forward(self, spec: AttentionSpec, x: Inputs) -> Results:
        y = empty_results(x.q, spec.dv)
        self._run("forward", spec, x, **y._asdict())
        return y

    def backward(
        self,
        spec: AttentionSpec,
        x: Inputs,
        y: Results,
        d_out: Tensor,
        d_lse: Tensor | None,
        bias_gradient: bool,
    ) -> Grads:
        grads = empty_gradients(x, bias_gradient)
        d_weight = None if grads.weight is None else grads.weight.new_empty(spec.h, spec.d, dtype=spec.accumulator)
        self._run(
            "backward", spec, x,
            out=y.out, **{name: t.contiguous() for name, t in y._asdict().items() if name != "out"},
            d_out=unit_stride(d_out),
            d_lse=None if d_lse is None else d_lse.to(spec.accumulator).contiguous(),
            delta=torch.empty_like(y.lse, memory_format=torch.contiguous_format),
            d_q=grads.q, d_k=grads.k, d_v=grads.v, d_bias=grads.bias, d_sinks=grads.sinks,
            d_weight=d_weight, d_relative_q=grads.relative_q, d_relative_k=grads.relative_k,
        )  # fmt: skip
        return grads if x.weight is None or d_weight is None else grads._replace(weight=d_weight.to(x.weight.dtype))

    def _run(self, direction: str, spec: AttentionSpec, x: Inputs, **results: Tensor | None) -> None:
        whole = {name: t.contiguous() for name in _WHOLE if (t := getattr(x, name)) is not None}
        if x.q_segments is not None and x.k_segments is not None:
            whole["q_segments"], whole["k_segments"] = _ids_of_32_bits(x.q_segments, x.k_segments)
        if x.weight is not None:
            whole["weight"] = x.weight.to(spec.accumulator).contiguous()
        names = "q", "k", "v", "mask", "bias", "exp_keys", "relative_q", "relative_k"
        given = {name: getattr(x, name) for name in names} | whole | results
        aligned = {name: _aligned(t) for name, t in given.items() if t is not None}
        dtype = _DTYPE_NAMES[spec.dtype]
        sequences = spec.b if spec.sequences is None else spec.sequences
        seed = None if x.seed is None else int(x.seed)
        getattr(_module(), direction)(
            self._isa or _best_isa(),
            dtype,
            dtype if x.bias is None else _DTYPE_NAMES[x.bias.dtype],
            (*spec[:7], sequences),
            (spec.scale, spec.offset, spec.left, spec.right, spec.softcap, spec.dropout_p, seed),
            None if spec.relative is None else (spec.first, *spec.relative),
            {name: _described(t) for name, t in aligned.items()},
            torch.get_num_threads(),
        )

    def workspace_bytes(self, spec: AttentionSpec) -> tuple[int, int]:
        item, threads = spec.accumulator.itemsize, torch.get_num_threads()
        columns = sum(-(-size // _LANES) * _LANES for size in (spec.d, spec.dv))
        distances, e = spec.relative or (0, 0)
        tiles = _TILE * (3 * columns + 6 * _TILE + (8 * spec.d if spec.additive else 0) + 10 * (e + _LANES) * (e > 0))
        parts = _MOST_PARTS * _TILE * (columns + 2) if spec.n >= _SPLIT_FROM else 0
        forward = (threads * tiles + parts) * item
        rows = 3 * spec.b * spec.h * spec.m  # delta, as it should be, and its excess
        # The weight's gradient, of every tile of queries.
        weights = spec.b * spec.h * (spec.m // _TILE + (spec.sequences or 0) + 1) * spec.d if spec.additive else 0
        weights += spec.b * spec.h * distances * -(-e // _LANES) * _LANES
        return forward, (threads * (_TOGETHER * 2 * tiles + spec.n * columns) + rows + weights) * item


def _ids_of_32_bits(q_ids: Tensor, k_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Contiguous int32 ids that are equal where the given ones are: other numbers, where those are larger."""
    if q_ids.dtype is torch.int64 or k_ids.dtype is torch.int64:
        ids = torch.cat((q_ids, k_ids), 1)
        if not torch.equal(ids, ids.to(torch.int32)):
            ids = ids.unique(return_inverse=True)[1]
        q_ids, k_ids = ids.to(torch.int32).split((q_ids.shape[1], k_ids.shape[1]), 1)
    return q_ids.contiguous(), k_ids.contiguous()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, isa: str | None = None) -> Tensor:
    """x weight^T + bias, for few rows of x.

    Args:
        x: [..., in]; weight: [out, in], whose last stride is 1; bias: [out] or None. On the CPU and of one dtype.
        isa: one of `isas()`; None is the best of them.
    Returns:
        [..., out]
    """
    # Copies are held until the kernel is done, which knows their addresses alone.
    rows, weight = _aligned(unit_stride(x.reshape(-1, x.shape[-1]))), _aligned(weight)
    bias = None if bias is None else _aligned(bias.contiguous())
    out = x.new_empty((len(rows), len(weight)))
    _module().linear(
        isa or _best_isa(),
        _DTYPE_NAMES[x.dtype],
        _described(rows),
        _described(weight),
        None if bias is None else _described(bias),
        _described(out),
        torch.get_num_threads(),
    )
    return out.view(*x.shape[:-1], len(weight))


def _aligned(t: Tensor) -> Tensor:
    """t, or a copy where its elements lie askew, as they may in a buffer or a file that is mapped into memory."""
    return t if t.data_ptr() % t.itemsize == 0 else t.clone(memory_format=torch.contiguous_format)


def _described(t: Tensor) -> tuple[int, tuple[int, ...], tuple[int, ...], int, int]:
    """A tensor as it crosses into C++, with its storage's bounds, which are checked there."""
    storage = t.untyped_storage()
    return t.data_ptr(), t.shape, t.stride(), storage.data_ptr(), storage.nbytes()


def isas() -> list[str]:
    """The instruction sets this build can use on this machine, best first; empty when it is not built."""
    extension = _extension()
    return [] if isinstance(extension, str) else extension.isas()


def is_built() -> bool:
    """Whether the compiled kernels can be had."""
    return not isinstance(_extension(), str)


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
        if (package.parent / "setup.py").exists():  # the checkout, which Python takes first where it is started in it
            return f"not built: this pyattn is the source in {package.parent}; run pip install --editable . there"
        return "not built: pyattn._C is missing from the installed package; run pip install again"
    return f"built, but cannot be loaded: {error}"
