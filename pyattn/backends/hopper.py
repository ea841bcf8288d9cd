"""The Gluon kernels for NVIDIA Hopper GPUs (compute capability 9.0), in half precision."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from pyattn.backends import Backend, Proof
from pyattn.backends.triton import TritonBackend, call_of, release_shortcoming
from pyattn.spec import AttentionSpec, Grads, Inputs, Results, empty_gradients, empty_results, unit_stride

# The releases whose machine code was looked at (tests/test_hopper_compile.py). Gluon moves between them.
TESTED = ("3.6", "3.7", "3.8")
_MOST_PACKED = 128  # columns; beside more of them, the numbers that say where a sequence lies would spill
_SCALES = (1e-30, 1e30)  # products times it stay in float32's range


class HopperBackend(TritonBackend):
    """Head sizes above 128 have Triton's backward: the two agree about the results of a forward."""

    name = "hopper"
    devices = frozenset({"cuda"})
    dtypes = frozenset({torch.float16, torch.bfloat16})
    features = frozenset({"causal", "window", "key_lengths", "gqa", "dv", "packed"})
    max_head_dim = 256
    proof = Proof(source="no", compiled="sm_90a", hardware="not yet")

    @property
    def head_sizes(self) -> str:
        return f"multiples of 8 to {self.max_head_dim}"

    def unavailable(self) -> str | None:
        return _shortcoming() or super().unavailable()

    def refusal(self, spec: AttentionSpec) -> str | None:
        return Backend.refusal(self, spec) or _undescribable(spec) or self.failure(spec)

    def forward(self, spec: AttentionSpec, x: Inputs) -> Results:
        from pyattn.triton_kernels.hopper_fwd import hopper_fwd

        y = empty_results(x.q, spec.dv)
        if 0 in (spec.b, spec.m, spec.n):
            return Results(y.out.zero_(), y.lse.fill_(-torch.inf), y.row_max.zero_(), y.row_sum.fill_(torch.inf))
        with self.compiling(spec):
            hopper_fwd(_rows(x.q), _rows(x.k), _rows(x.v), *y, call_of(spec, x))
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
        from pyattn.triton_kernels.hopper_bwd import MAX_HEAD_DIM, hopper_bwd

        if max(spec.d, spec.dv) > MAX_HEAD_DIM:
            return super().backward(spec, x, y, d_out, d_lse, bias_gradient)
        grads = empty_gradients(x, False)
        gradients = (grads.q, grads.k, grads.v)
        if 0 in (spec.b, spec.m, spec.n):
            for gradient in gradients:
                gradient.zero_()
            return grads
        d_lse = None if d_lse is None else d_lse.float().contiguous()
        q, k, v, out, d_out = (_rows(t) for t in (x.q, x.k, x.v, y.out, unit_stride(d_out)))
        d_q, d_k, d_v = written = [_rows(gradient) for gradient in gradients]
        row_max, log_sum = y.row_max.contiguous(), y.row_sum.contiguous()
        with self.compiling(spec):
            hopper_bwd(q, k, v, out, row_max, log_sum, d_out, d_lse, d_q, d_k, d_v, call_of(spec, x))
        for gradient, result in zip(gradients, written, strict=True):
            if result is not gradient:
                gradient.copy_(result)
        return grads

    def workspace_bytes(self, spec: AttentionSpec) -> tuple[int, int]:
        # Two float32 per query, and d_out once more where it comes with strides the kernels do not take. An input whose
        # rows do not lie as TMA's descriptors can say is copied, too; its spec does not know.
        return 0, spec.b * spec.h * spec.m * (8 + spec.dv * spec.dtype.itemsize)


def _rows(t: Tensor) -> Tensor:
    """t, or a copy of it whose rows lie where a TMA descriptor can say."""
    from pyattn.triton_kernels.hopper import fits

    return t if fits(t) else t.clone(memory_format=torch.contiguous_format)


def _undescribable(spec: AttentionSpec) -> str | None:
    """What the kernels, or TMA's descriptors, cannot say of a call whose features they have."""
    from pyattn.triton_kernels.hopper import MOST_ROWS

    if spec.d % 8 or spec.dv % 8:
        return f"head sizes are multiples of 8, got d={spec.d}, dv={spec.dv}"
    if spec.sequences is not None and max(spec.d, spec.dv) > _MOST_PACKED:
        return f"packed sequences have head sizes to {_MOST_PACKED}, got d={spec.d}, dv={spec.dv}"
    if not _SCALES[0] <= spec.scale <= _SCALES[1]:
        return f"scale is positive, from {_SCALES[0]} to {_SCALES[1]}, got {spec.scale}"
    if spec.b * spec.h * max(spec.m, spec.n) >= MOST_ROWS:
        return f"b * h * m and b * h * n are below 2^30, got b={spec.b}, h={spec.h}, m={spec.m}, n={spec.n}"
    return None


@cache
def _shortcoming() -> str | None:
    """Why this machine cannot run the kernels, beyond what Triton's says."""
    if reason := release_shortcoming(TESTED):
        return reason
    import triton

    if triton.knobs.runtime.interpret:
        return "Triton's interpreter does not run Gluon"
    if not torch.cuda.is_available():
        return "no CUDA device"
    capability = torch.cuda.get_device_capability()
    if torch.version.hip is not None or capability != (9, 0):
        return f"needs an NVIDIA GPU of compute capability 9.0 (Hopper), this is {torch.cuda.get_device_name()}"
    return None
