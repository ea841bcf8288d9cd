"""The Triton kernels: NVIDIA GPUs from compute capability 8.0, AMD GPUs, and Triton's interpreter on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyattn.backends import Backend, KernelError, Proof, kind_of, sink_gradient
from pyattn.spec import (
    AttentionSpec,
    Grads,
    Inputs,
    Results,
    band_distances,
    empty_gradients,
    empty_results,
    unit_stride,
)

if TYPE_CHECKING:
    from pyattn.triton_kernels.launch import Call
    from pyattn.triton_kernels.relative import Relative

# The releases that compile every kernel, and the first torch that brings each. Triton's language moves between them.
TORCH = {"3.6": "2.10", "3.7": "2.12", "3.8": "2.14", "3.9": "2.15"}
_LONGEST_REASON = 300  # characters
# Positions add up to twice the queries and the keys, and a group's queries are rounded up to whole blocks for each of
# its heads; all of them must fit 32 bits.
_MOST_ROWS = 2**30
_LARGEST_BLOCK = 128


class TritonBackend(Backend):
    name = "triton"
    devices = frozenset({"cuda"})
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32})
    features = frozenset({
        "causal", "window", "key_lengths", "segment_ids", "mask", "bias", "softcap", "alibi", "sinks", "dropout", "gqa",
        "dv", "packed", "cached", "paged", "additive", "relative", "ranks", "row_windows",
    })  # fmt: skip
    max_head_dim = 256
    max_value_dim = 1 << 30  # what does not fit a tile is taken in parts
    proof = Proof(source="a case per feature", compiled="sm_80, sm_90, sm_100", hardware="not yet")

    def __init__(self) -> None:
        self._failures: dict[tuple[object, ...], str] = {}  # by kind of call

    @property
    def head_sizes(self) -> str:
        return f"{super().head_sizes}, values and additive scores of any"

    def unavailable(self) -> str | None:
        return _shortcoming()

    def refusal(self, spec: AttentionSpec) -> str | None:
        if _interpreted():
            if spec.dtype is torch.bfloat16:
                return "Triton's interpreter computes bfloat16 wrongly and without an error"
            spec = spec._replace(device="cuda")  # the interpreter takes CPU tensors in a GPU's place
        declared = spec._replace(d=1) if spec.additive else spec  # the columns of additive scores are walked over
        return super().refusal(declared) or _uncountable(spec) or self.failure(spec)

    def failure(self, spec: AttentionSpec) -> str | None:
        """What went wrong when a kernel for a call of this kind was to be compiled."""
        return self._failures.get(kind_of(spec)) if self._failures else None

    @contextmanager
    def compiling(self, spec: AttentionSpec) -> Iterator[None]:
        """Remembers what cannot be compiled. A device's own errors, and memory that runs out, are not of this kind."""
        try:
            yield
        except Exception as error:
            said = f"{type(error).__name__}: {' '.join(str(error).split())}"
            if isinstance(error, RuntimeError) and ("CUDA" in said or "HIP" in said):
                raise
            reason = f"its kernel cannot be compiled here: {said[:_LONGEST_REASON]}"
            self._failures[kind_of(spec)] = reason
            raise KernelError(reason) from error

    def forward(self, spec: AttentionSpec, x: Inputs) -> Results:
        y, call = empty_results(x.q, spec.dv), call_of(spec, x)
        with self.compiling(spec):
            for part in _value_parts(spec.dv):  # each gives the same statistics
                _forward(x if part is None else x._replace(v=x.v[..., part]), _of_part(y, part), call)
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
        grads, call = empty_gradients(x, bias_gradient), call_of(spec, x)
        d_out = unit_stride(d_out)
        d_lse = None if d_lse is None else d_lse.float().contiguous()
        y = y._replace(row_max=y.row_max.contiguous(), row_sum=y.row_sum.contiguous())
        with self.compiling(spec):
            parts = _value_parts(spec.dv)
            if parts == [None]:
                delta = _backward(x, y, d_out, d_lse, grads, call)
            else:
                delta = _backward_of_parts(parts, x, y, d_out, d_lse, grads, call)
        return grads if x.sinks is None else grads._replace(sinks=sink_gradient(x.sinks, y.lse, delta, d_lse))

    def workspace_bytes(self, spec: AttentionSpec) -> tuple[int, int]:
        from pyattn.triton_kernels import config, decode

        # Forward: the chunks of a decoding step. Backward: delta, one float32 per query; and d_out once more where it
        # comes with strides the kernels do not take.
        rows, dv = spec.b * spec.h * spec.m, min(spec.dv, self.max_head_dim)
        of_group = spec.h // spec.hk * spec.m
        few = of_group <= (decode.MOST_ADDITIVE_ROWS if spec.additive else decode.MOST_ROWS)
        spread = rows + decode.MOST_ROWS * 2 * config.processors(torch.device(spec.device))
        of_chunks = min(decode.MOST_CHUNKS * rows, spread) * 4
        forward = of_chunks * (dv + 1) if few or spec.offset is None else 0
        backward = rows * (4 + spec.dv * spec.dtype.itemsize)
        if spec.additive and few:
            backward += 2 * of_chunks * spec.d + (rows * spec.n * 4 if spec.bias else 0)
        elif spec.additive:
            forward, sums = _parts_bytes(spec)
            backward += forward + sums
        if spec.relative is not None:  # its operands as the kernels take them, and their gradients
            distances, e = spec.relative
            operands = (rows + spec.b * spec.h * distances) * (e + -e % 8) * spec.dtype.itemsize
            forward, backward = forward + operands, backward + 2 * operands
        if spec.dv > dv:  # sums over parts of the values
            backward += 8 * (rows * spec.d + spec.b * spec.hk * spec.n * spec.d)
        return forward, backward


def _value_parts(dv: int) -> list[slice | None]:
    """The columns of values that a call's passes take, for each of which scores are computed again; None is all."""
    if dv <= TritonBackend.max_head_dim:
        return [None]
    width = -(-dv // -(-dv // TritonBackend.max_head_dim))
    width += -width % 8  # which keeps rows aligned for wide loads
    return [slice(first, min(first + width, dv)) for first in range(0, dv, width)]


def _of_part(y: Results, part: slice | None) -> Results:
    return y if part is None else y._replace(out=y.out[..., part])


def _forward(x: Inputs, y: Results, call: Call) -> None:
    from pyattn.triton_kernels.additive_fwd import additive_fwd
    from pyattn.triton_kernels.decode import decode, suits
    from pyattn.triton_kernels.flash_fwd import flash_fwd

    if suits(x.q, x.k, call, x.weight is not None):
        decode(x.q, x.k, x.v, *y, call, x.weight)
    elif x.weight is not None:
        additive_fwd(x.q, x.k, x.v, x.weight, *y, call)
    else:
        flash_fwd(x.q, x.k, x.v, *y, call)


def _backward(x: Inputs, y: Results, d_out: Tensor, d_lse: Tensor | None, grads: Grads, call: Call) -> Tensor:
    """Writes `grads`, but for those of sinks; returns delta [b, h, m]."""
    from pyattn.triton_kernels.additive_bwd import additive_bwd
    from pyattn.triton_kernels.additive_step import additive_step_bwd
    from pyattn.triton_kernels.decode import suits
    from pyattn.triton_kernels.flash_bwd import flash_bwd

    if grads.bias is not None:
        grads.bias.zero_()
    given = (y.out, y.row_max, y.row_sum, d_out, d_lse, grads.q, grads.k, grads.v)
    if x.weight is None or grads.weight is None:
        if call.relative is None or grads.relative_q is None or grads.relative_k is None:
            return flash_bwd(x.q, x.k, x.v, *given, grads.bias, None, call)
        of_operands = call.relative.like(grads.relative_q)
        delta = flash_bwd(x.q, x.k, x.v, *given, grads.bias, of_operands, call)
        of_operands.store(grads.relative_q, grads.relative_k)
        return delta
    backward = additive_step_bwd if suits(x.q, x.k, call, True) else additive_bwd  # as the forward chose
    return backward(x.q, x.k, x.v, x.weight, *given, grads.weight, grads.bias, call)


def _backward_of_parts(
    parts: Sequence[slice | None], x: Inputs, y: Results, d_out: Tensor, d_lse: Tensor | None, grads: Grads, call: Call
) -> Tensor:
    """`_backward` for values that are taken in parts: gradients are linear in d_out, so those of parts add up."""
    shared = {
        name: g
        for name in ("q", "k", "bias", "weight", "relative_q", "relative_k")
        if (g := getattr(grads, name)) is not None
    }
    sums = {name: torch.zeros_like(g, dtype=torch.float32) for name, g in shared.items()}
    deltas: list[Tensor] = []
    for part in parts:
        own = Grads(v=grads.v[..., part], **{name: torch.empty_like(total) for name, total in sums.items()})
        of_part = x._replace(v=x.v[..., part]), _of_part(y, part), d_out[..., part]
        deltas.append(_backward(*of_part, None if deltas else d_lse, own, call))
        for name, total in sums.items():
            total += getattr(own, name)
    for name, g in shared.items():
        g.copy_(sums[name])
    return torch.stack(deltas).sum(0)


def call_of(spec: AttentionSpec, x: Inputs) -> Call:
    from pyattn.triton_kernels.launch import Call

    return Call(
        spec.scale, spec.offset, spec.left, spec.right, spec.softcap, spec.dropout_p,
        x.mask, x.bias, x.key_lengths, x.q_segments, x.k_segments, x.q_ranks, x.k_ranks, x.row_first, x.row_stop,
        relative_of(spec, x), x.alibi_slopes, x.sinks, x.seed, x.cu_seqlens_q, x.cu_seqlens_k, x.block_table,
    )  # fmt: skip


def relative_of(spec: AttentionSpec, x: Inputs) -> Relative | None:
    from pyattn.triton_kernels.relative import Relative

    if x.relative_q is None or x.relative_k is None or spec.first is None or spec.offset is None:
        return None
    band = band_distances(spec.m, spec.n, spec.offset, spec.left, spec.right)
    return Relative.of(x.relative_q, x.relative_k, spec.first, *band)


def _parts_bytes(spec: AttentionSpec) -> tuple[int, int]:
    """What additive scores take beside: float32 forms of q and k, and what making one takes; the sums of gradients."""
    columns = max(2, spec.d + spec.d % 2)
    q, k = (spec.b * heads * -(-rows // 64) * 64 * columns * 4 for heads, rows in ((spec.h, spec.m), (spec.hk, spec.n)))
    return 4 * (q + k) + 5 * max(q, k), q + k


def _uncountable(spec: AttentionSpec) -> str | None:
    """Whether the kernels' row numbers would overflow."""
    rows = spec.h // spec.hk * (spec.m + _LARGEST_BLOCK) + spec.n
    if rows <= _MOST_ROWS:
        return None
    return f"counts the queries of a group of heads and their keys to 2^30, got {rows:,} in whole blocks"


@cache
def _shortcoming() -> str | None:
    """Why this machine cannot run the kernels."""
    if reason := release_shortcoming(tuple(TORCH)):
        return reason
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is None and major < 8:
        return f"needs compute capability 8.0 or newer, {torch.cuda.get_device_name()} has {major}.{minor}"
    return None


def release_shortcoming(tested: Sequence[str]) -> str | None:
    """Why kernels that were tested with these releases of Triton do not run with what is installed."""
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if ".".join(triton.__version__.split(".")[:2]) in tested:
        return None
    oldest, newest = tested[0], tested[-1]
    return (
        f"needs Triton {oldest} to {newest}, which torch {TORCH[oldest]} to {TORCH[newest]} bring; "
        f"Triton {triton.__version__} and torch {torch.__version__} are installed"
    )


@cache
def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which is settled when they are imported."""
    try:
        import triton
    except ImportError:
        return False
    return triton.knobs.runtime.interpret
