"""The Triton kernels: NVIDIA GPUs from compute capability 8.0, AMD GPUs, and Triton's interpreter on the CPU."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pyattn.backends import Backend
from pyattn.spec import AttentionSpec, Grads, Inputs, empty_output, unit_stride

if TYPE_CHECKING:
    from pyattn.triton_kernels.launch import Call


class TritonBackend(Backend):
    name = "triton"
    devices = frozenset({"cuda"})
    dtypes = frozenset({torch.float16, torch.bfloat16, torch.float32})
    features = frozenset({"causal", "window", "key_lengths", "mask", "dropout", "gqa", "dv"})
    max_head_dim = 256

    def unavailable(self) -> str | None:
        return _shortcoming()

    def refusal(self, spec: AttentionSpec) -> str | None:
        if reason := self.unavailable():
            return reason
        if _interpreted():
            if spec.dtype is torch.bfloat16:
                return "Triton's interpreter computes bfloat16 wrongly and without an error"
            spec = spec._replace(device="cuda")  # the interpreter takes CPU tensors in a GPU's place
        return super().refusal(spec)

    def forward(self, spec: AttentionSpec, x: Inputs) -> tuple[Tensor, Tensor]:
        from pyattn.triton_kernels.flash_fwd import flash_fwd

        out = empty_output(x.q, spec.dv)
        lse = x.q.new_empty(spec.b, spec.h, spec.m, dtype=torch.float32)
        flash_fwd(x.q, x.k, x.v, out, lse, _call(spec, x))
        return out, lse

    def backward(
        self, spec: AttentionSpec, x: Inputs, out: Tensor, lse: Tensor, d_out: Tensor, d_lse: Tensor | None
    ) -> Grads:
        from pyattn.triton_kernels.flash_bwd import flash_bwd

        grads = Grads(torch.empty_like(x.q), torch.empty_like(x.k), torch.empty_like(x.v))
        d_out = unit_stride(d_out)
        d_lse = None if d_lse is None else d_lse.float().contiguous()
        flash_bwd(
            x.q, x.k, x.v, out, lse.contiguous(), d_out, d_lse, grads.q, grads.k, grads.v, _call(spec, x)
        )  # fmt: skip
        return grads

    def workspace_bytes(self, spec: AttentionSpec) -> tuple[int, int]:
        # delta, one float32 per query; and d_out once more where it comes with strides the kernels do not take.
        rows = spec.b * spec.h * spec.m
        return 0, rows * (4 + spec.dv * spec.dtype.itemsize)


def _call(spec: AttentionSpec, x: Inputs) -> Call:
    from pyattn.triton_kernels.launch import Call

    return Call(
        spec.scale, spec.offset, spec.left, spec.right, x.mask, x.key_lengths, spec.dropout_p, x.seed
    )  # fmt: skip


@cache
def _shortcoming() -> str | None:
    """Why this machine cannot run the kernels."""
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if _interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA device"
    major, minor = torch.cuda.get_device_capability()
    if torch.version.hip is None and major < 8:
        return f"needs compute capability 8.0 or newer, {torch.cuda.get_device_name()} has {major}.{minor}"
    return None


@cache
def _interpreted() -> bool:
    """Whether the kernels run in Triton's interpreter, which is settled when they are imported."""
    import triton

    return triton.knobs.runtime.interpret
