"""CUDA C++ kernels (csrc/cuda), compiled on the user's machine by the NVRTC that torch brings: every NVIDIA GPU from
compute capability 7.0 on, every dtype, and no compiler needed. The fallback where Triton's kernels cannot run."""

from __future__ import annotations

import math
from functools import cache, lru_cache
from struct import Struct
from typing import NamedTuple

import torch
from torch import Tensor

from pyattn.backends import Backend, KernelError, Proof, cuda_config, kind_of, nvrtc, sink_gradient
from pyattn.backends.cuda_config import DECODE_ROWS, DROPOUT, RICH, Row
from pyattn.spec import AttentionSpec, Grads, Inputs, Results, empty_gradients, empty_results, unit_stride

_LOG2_E = math.log2(math.e)
_MOST_CHUNKS = 64
_MOST_ROWS = 2**29  # positions add up to thrice the queries and the keys, and are numbers of 32 bits
_MOST_BLOCKS = 2**31 - 1  # of one launch
_SUM_BATCH, _SUM_HEAD, _SUM_QUERY, _SUM_KEY = 1, 2, 4, 8  # BiasSums of csrc/cuda/backward_bias.cuh

# The struct Args of csrc/cuda/args.cuh, in two parts.
_TENSORS = Struct("<" + 8 * "Q3q" + 3 * "Q4q" + 17 * "Q")
_NUMBERS = Struct("<6dq21iI")
_NO_BACKWARD = 16 * (0,)  # the matrices d_out, d_q, d_k, d_v
_NO_SCORES = 5 * (0,)


class Gpu(NamedTuple):
    """What of a GPU decides which kernels run, and how a call is split."""

    device: int
    capability: int  # 86 for 8.6
    processors: int


class Backward(NamedTuple):
    """The tensors of a backward beside those of its forward."""

    grads: Grads
    d_out: Tensor
    d_lse: Tensor | None
    delta: Tensor  # scratch [b, h, m]


class Parts(NamedTuple):
    """What decoding leaves of each chunk of the keys, for the kernel that joins them."""

    scratch: Tensor  # results [chunks, b, h, m, dv], behind them the rows' maxima and sums, [chunks, b, h, m] each
    chunks: int

    def addresses(self, spec: AttentionSpec) -> tuple[int, int, int]:
        at, rows = self.scratch.data_ptr(), self.chunks * spec.b * spec.h * spec.m * spec.accumulator.itemsize
        return at, at + rows * spec.dv, at + rows * (spec.dv + 1)


class CudaBackend(Backend):
    name = "cuda"
    devices = frozenset({"cuda"})
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
    features = frozenset({
        "causal", "window", "key_lengths", "segment_ids", "mask", "bias", "softcap", "alibi", "sinks", "dropout", "gqa",
        "dv", "packed", "cached", "paged",
    })  # fmt: skip
    max_head_dim = 512
    proof = Proof(source="every case", compiled="sm_75, sm_80", hardware="not yet")

    def __init__(self) -> None:
        self._failures: dict[tuple[object, ...], dict[int, str]] = {}  # by kind of call and compute capability

    def unavailable(self) -> str | None:
        return nvrtc.unavailable()

    def refusal(self, spec: AttentionSpec) -> str | None:
        return super().refusal(spec) or _unsayable(spec) or self._failure(spec)

    def forward(self, spec: AttentionSpec, x: Inputs) -> Results:
        y = empty_results(x.q, spec.dv)
        if spec.b * spec.h * spec.m == 0:
            return y
        x, gpu = _contiguous(x), self.gpu_of(x.q)
        if _decodes(spec, gpu):
            self._decode(spec, x, y, gpu)
        else:
            arguments = pack(spec, x, y)
            for row in _rows("forward", spec, gpu):
                self._launch(spec, gpu, row, _blocks_of_queries(spec, row, spec.dv), arguments)
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
        grads, gpu, x = empty_gradients(x, bias_gradient), self.gpu_of(x.q), _contiguous(x)
        d_lse = None if d_lse is None else d_lse.to(spec.accumulator).contiguous()
        y = y._replace(row_max=y.row_max.contiguous(), row_sum=y.row_sum.contiguous())
        given = Backward(grads, unit_stride(d_out), d_lse, torch.empty_like(y.row_sum))
        whole_bias = grads.bias is not None and grads.bias.shape == (spec.b, spec.h, spec.m, spec.n)
        if grads.bias is not None:
            grads.bias.zero_()
        arguments = pack(spec, x, y, given, d_bias=grads.bias if whole_bias else None)
        if spec.b * spec.h * spec.m > 0:
            for row in _rows("backward_q", spec, gpu):
                self._launch(spec, gpu, row, _blocks_of_queries(spec, row, spec.d), arguments)
        if spec.b * spec.hk * spec.n > 0:
            for row in _rows("backward_kv", spec, gpu):
                self._launch(spec, gpu, row, _blocks_of_keys(spec, row), arguments)
        if grads.bias is not None and not whole_bias and spec.b * spec.h * spec.m * spec.n > 0:
            sums = _bias_sums(grads.bias)
            arguments = pack(spec, x, y, given, d_bias=grads.bias, bias_sums=sums)
            for row in _rows("backward_bias", spec, gpu):
                self._launch(spec, gpu, row, _blocks_of_bias(spec, row, sums), arguments)
        return grads if x.sinks is None else grads._replace(sinks=sink_gradient(x.sinks, y.lse, given.delta, d_lse))

    def workspace_bytes(self, spec: AttentionSpec) -> tuple[int, int]:
        # Forward: the chunks of a decoding step. Backward: delta, one accumulator per query; and d_out once more where
        # it comes with strides the kernels do not take.
        rows = spec.b * spec.h * spec.m
        may_decode = spec.offset is None or spec.h // spec.hk * spec.m <= DECODE_ROWS
        chunks = min(_MOST_CHUNKS, _parts(spec.n, DECODE_ROWS)) if may_decode else 0
        forward = chunks * rows * (spec.dv + 2) * spec.accumulator.itemsize
        return forward, rows * (spec.accumulator.itemsize + spec.dv * spec.dtype.itemsize)

    def gpu_of(self, q: Tensor) -> Gpu:
        return _gpu(q.get_device())

    def launch(self, gpu: Gpu, row: Row, blocks: int, arguments: bytes) -> None:
        """Queues one kernel on the GPU's current stream."""
        if gpu.device != torch.cuda.current_device():
            with torch.cuda.device(gpu.device):
                return self.launch(gpu, row, blocks, arguments)
        kernel = nvrtc.kernel(gpu.device, row.instantiation, row.shared_bytes)
        kernel.launch(blocks, row.threads, arguments, torch._C._cuda_getCurrentRawStream(gpu.device))

    def _launch(self, spec: AttentionSpec, gpu: Gpu, row: Row, blocks: int, arguments: bytes) -> None:
        if self._failures and (reason := self._failures.get(kind_of(spec), {}).get(gpu.capability)):
            raise KernelError(reason)
        try:
            self.launch(gpu, row, blocks, arguments)
        except KernelError as error:
            self._failures.setdefault(kind_of(spec), {})[gpu.capability] = str(error)
            raise

    def _failure(self, spec: AttentionSpec) -> str | None:
        """Why no GPU here can have the kernels of a call, once each has been tried."""
        if not self._failures or (failed := self._failures.get(kind_of(spec))) is None:
            return None
        others = (_gpu(index).capability for index in range(torch.cuda.device_count()))
        return next(iter(failed.values())) if all(other in failed for other in others) else None

    def _decode(self, spec: AttentionSpec, x: Inputs, y: Results, gpu: Gpu) -> None:
        plan = _plan_of_decoding(spec, gpu)
        parts = Parts(y.lse.new_empty(plan.scratch), plan.chunks)
        arguments = pack(spec, x, y, parts=parts)
        self._launch(spec, gpu, plan.row, plan.blocks, arguments)
        self._launch(spec, gpu, cuda_config.join_row(spec.dtype), spec.b * spec.h * spec.m, arguments)


def pack(
    spec: AttentionSpec,
    x: Inputs,
    y: Results,
    backward: Backward | None = None,
    parts: Parts | None = None,
    d_bias: Tensor | None = None,
    bias_sums: int = 0,
) -> bytes:
    """One call as the struct Args. x is what `_contiguous` gives.

    What follows from the spec alone is packed once: a call's tensors are all that is left to be looked at.
    """
    read = [x.q, x.k, x.v, y.out]
    written: tuple[int, ...] = _NO_BACKWARD
    d_lse = delta = None
    if backward is not None:
        grads, d_out, d_lse, delta = backward
        read.append(d_out)
        written = _matrix(grads.q) + _matrix(grads.k) + _matrix(grads.v)
    matrices: list[int] = []
    places, strides = 0, spec.d | spec.dv
    for t in read:
        at, batch, head, row = matrix = _matrix(t)
        matrices += matrix
        places |= at
        strides |= batch | head | row
    # Whether all rows begin at multiples of 16 bytes and consist of such.
    aligned = (places | strides * spec.dtype.itemsize) % 16 == 0
    mask = None if x.mask is None else x.mask.expand(spec.b, spec.h, spec.m, spec.n)
    bias = None if x.bias is None else x.bias.expand(spec.b, spec.h, spec.m, spec.n)
    vectors = y.lse, y.row_max, y.row_sum, delta, d_lse, *x[5:14]  # from key_lengths to block_table
    tensors = _TENSORS.pack(
        *matrices, *written, *_scores(mask), *_scores(bias), *_scores(d_bias),
        *[0 if t is None else t.data_ptr() for t in vectors],
        *((0, 0, 0) if parts is None else parts.addresses(spec)),
    )  # fmt: skip
    slope_stride = 0 if x.alibi_slopes is None else x.alibi_slopes.stride(0)
    bias_is_float = bias is not None and bias.dtype is torch.float32
    wide_ids = _is_wide(x.q_segments), _is_wide(x.k_segments)
    pages = 0 if x.block_table is None else x.k.shape[0]
    chunks = 0 if parts is None else parts.chunks
    return tensors + _numbers(spec, pages, slope_stride, aligned, bias_is_float, wide_ids, bias_sums, chunks)


@lru_cache(maxsize=4096)
def _numbers(
    spec: AttentionSpec,
    pages: int,
    slope_stride: int,
    aligned: bool,
    bias_is_float: bool,
    wide_ids: tuple[bool, bool],
    bias_sums: int,
    chunks: int,
) -> bytes:
    """What of the struct is no tensor."""
    reach = spec.m + spec.n  # a window wider than this hides nothing
    return _NUMBERS.pack(
        *_scaling(spec.scale, spec.softcap, spec.bias or spec.alibi, spec.accumulator), 1 / (1 - spec.dropout_p),
        slope_stride, spec.b, spec.h, spec.hk, spec.m, spec.n, spec.d, spec.dv, spec.sequences or 0, pages,
        spec.page_size or 0, spec.offset or 0, reach if spec.left is None else min(spec.left, reach),
        reach if spec.right is None else min(spec.right, reach), spec.offset is None,
        (spec.scale > 0) - (spec.scale < 0), aligned, bias_is_float, *wide_ids, bias_sums, chunks,
        int(spec.dropout_p * 2**32),
    )  # fmt: skip


def _scaling(
    scale: float, softcap: float | None, adds: bool, accumulator: torch.dtype
) -> tuple[float, float, float, float, float]:
    """scale, magnitude, factor, unit and softcap of the struct.

    The kernels scale by a positive number and carry the sign in q, or in k: with it a row's maximum can be taken before
    scaling. For scale 0 the scores are 0 because q is made 0. All are finite and not 0 in the accumulator's type:
    infinity times a difference of 0 would be NaN, and 0 times one of -infinity.
    """
    ends = torch.finfo(accumulator)

    def finite(x: float) -> float:
        return min(max(x, ends.tiny), ends.max)

    magnitude = finite((abs(scale) or 1.0) / (softcap or 1.0))
    factor = 1.0 if adds or softcap is not None else magnitude
    return scale, magnitude, factor, finite(factor * _LOG2_E), softcap or 0.0


def _contiguous(x: Inputs) -> Inputs:
    """x, with those tensors contiguous whose strides the kernels are not told."""
    lengths, q_ids, k_ids, slopes, sinks = x[5:10]
    if lengths is None and q_ids is None and slopes is None and sinks is None:
        return x
    slopes = None if slopes is None else unit_stride(slopes)
    lengths, q_ids, k_ids, sinks = (None if t is None else t.contiguous() for t in (lengths, q_ids, k_ids, sinks))
    return Inputs(*x[:5], lengths, q_ids, k_ids, slopes, sinks, *x[10:])


def _is_wide(ids: Tensor | None) -> bool:
    return ids is not None and ids.dtype is torch.int64


def _matrix(t: Tensor) -> tuple[int, int, int, int]:
    batch, head, row, _ = t.stride()
    return t.data_ptr(), batch, head, row


def _scores(t: Tensor | None) -> tuple[int, ...]:
    return _NO_SCORES if t is None else (t.data_ptr(), *t.stride())


@lru_cache(maxsize=4096)
def _rows(kernel: str, spec: AttentionSpec, gpu: Gpu) -> list[Row]:
    is_rich = spec.mask or spec.bias or spec.segment_ids or spec.alibi or spec.softcap is not None
    flags = (RICH if is_rich else 0) | (DROPOUT if spec.dropout_p > 0 else 0)
    return cuda_config.rows(kernel, gpu.capability, spec.dtype, spec.d, spec.dv, flags)


@lru_cache(maxsize=4096)
def _decodes(spec: AttentionSpec, gpu: Gpu) -> bool:
    """Whether the decoding kernels take the call: alone they do, or they are likely to be faster than the forward's.

    They are where a group shares a tile, or where one block per head would leave processors idle.
    """
    if spec.page_size is not None:
        return True
    if spec.sequences is not None or spec.segment_ids or spec.dropout_p > 0 or _group_rows(spec) > DECODE_ROWS:
        return False
    return spec.n >= 8 * spec.m and (spec.h > spec.hk or spec.b * spec.h < gpu.processors)


class PlanOfDecoding(NamedTuple):
    """A decoding step's first launch."""

    row: Row
    chunks: int
    blocks: int
    scratch: int  # numbers that `Parts` takes


@lru_cache(maxsize=4096)
def _plan_of_decoding(spec: AttentionSpec, gpu: Gpu) -> PlanOfDecoding:
    (row,) = _rows("decode", spec, gpu)
    blocks = spec.b * spec.hk * _parts(_group_rows(spec), DECODE_ROWS) * _parts(spec.dv, row.slice)
    # So that every processor gets two blocks.
    chunks = min(_parts(2 * gpu.processors, blocks), max(_parts(_band(spec), row.streamed), 1), _MOST_CHUNKS)
    return PlanOfDecoding(row, chunks, blocks * chunks, chunks * spec.b * spec.h * spec.m * (spec.dv + 2))


def _blocks_of_queries(spec: AttentionSpec, row: Row, columns: int) -> int:
    return spec.b * spec.h * _blocks(spec.m, spec.sequences, row.owned) * _parts(columns, row.slice)


def _blocks_of_keys(spec: AttentionSpec, row: Row) -> int:
    return spec.b * spec.hk * _blocks(spec.n, spec.sequences, row.owned) * _parts(max(spec.d, spec.dv), row.slice)


def _blocks(rows: int, sequences: int | None, each: int) -> int:
    """As `locate` of csrc/cuda/sequence.cuh counts them."""
    return _parts(rows, each) if sequences is None else rows // each + sequences


def _bias_sums(d_bias: Tensor) -> int:
    """Over which dimensions a gradient is summed, in bits."""
    bits = (_SUM_BATCH, _SUM_HEAD, _SUM_QUERY, _SUM_KEY)
    return sum(bit for bit, size in zip(bits, d_bias.shape, strict=True) if size == 1)


def _blocks_of_bias(spec: AttentionSpec, row: Row, sums: int) -> int:
    blocks = 1 if sums & _SUM_KEY else _parts(spec.n, row.streamed)
    blocks *= 1 if sums & _SUM_QUERY else _parts(spec.m, row.owned)
    return blocks * (1 if sums & _SUM_HEAD else spec.h) * (1 if sums & _SUM_BATCH else spec.b)


def _band(spec: AttentionSpec) -> int:
    """How many keys the queries of a head can see at most."""
    return spec.n if spec.left is None or spec.right is None else min(spec.n, spec.left + spec.right + spec.m)


def _parts(rows: int, size: int) -> int:
    """How many parts of at most `size` make up `rows`."""
    return -(-rows // size)


def _group_rows(spec: AttentionSpec) -> int:
    """Of the query heads that share a key/value head."""
    return spec.h // spec.hk * spec.m


@lru_cache(maxsize=4096)
def _unsayable(spec: AttentionSpec) -> str | None:
    """What the kernels have no words for, though they have the features: pages with dropout, numbers that overflow."""
    if spec.page_size is not None and spec.dropout_p > 0:
        return "has no dropout over a paged cache"
    if spec.m + spec.n + abs(spec.offset or 0) > _MOST_ROWS or _group_rows(spec) > _MOST_ROWS:
        return f"counts queries, or those of a group of heads, and keys to 2^29, got m={spec.m:,}, n={spec.n:,}"
    each, slices = 16, _parts(max(spec.d, spec.dv), 64)  # the least of any kernel
    blocks = spec.b * spec.h * (_blocks(max(spec.m, spec.n), spec.sequences, each) + 1) * slices
    if spec.page_size is not None:
        blocks = max(blocks, spec.b * spec.h * spec.m)
    if spec.bias:
        blocks = max(blocks, spec.b * spec.h * _parts(spec.m, each) * _parts(spec.n, each))
    if blocks > _MOST_BLOCKS:
        return f"launches at most {_MOST_BLOCKS:,} blocks, got b={spec.b}, h={spec.h}, m={spec.m}, n={spec.n}"
    return None


@cache
def _gpu(index: int) -> Gpu:
    properties = torch.cuda.get_device_properties(index)
    return Gpu(index, 10 * properties.major + properties.minor, properties.multi_processor_count)
