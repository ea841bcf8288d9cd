"""Linear layers by the fastest product there is: on the CPU pyattn's for few rows, oneDNN's for many on some."""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from pyattn import processor
from pyattn.backends import cpu
from pyattn.ops import is_eager, is_recorded

# Where pyattn's product is the faster one (AMD EPYC Zen 4, against MKL and oneDNN): up to so many rows, by dtype,
# and for weights so many that they have to come from memory.
FEW = {torch.float32: 32, torch.bfloat16: 8}
MANY = 1 << 19
# Where oneDNN's is (AMD EPYC Zen 5, one thread, against MKL): from so many rows on, and so many multiply-adds.
LEAST_ROWS, WORK = 4, 1 << 20
_ZEN_5 = 26  # its family, as AMD numbers them


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x weight^T + bias.

    On the CPU `FEW` rows that need no gradient times `MANY` weights are computed by a kernel that reads the weights as
    fast as memory gives them, and for which a row's numbers do not depend on the rows beside it. Other products of
    float32, gradients included, are oneDNN's where that is the faster one (`onednn_is_faster`). Where torch watches
    (autocast, a trace, of the kernel also a profiler), its own product runs.

    Args:
        x: [..., in]; weight: [out, in]; bias: [out] or None.
    Returns:
        [..., out]
    Raises:
        RuntimeError: torch's, for tensors that do not fit together.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if is_eager(tensors) and _are_linear(tensors):
        if _are_few_rows(tensors) and not is_recorded(tensors):
            return cpu.linear(x, weight, bias)
        if _are_much_work(tensors):
            out = _OneDNN.apply(x.reshape(-1, x.shape[-1]), weight, bias)
            return out.view(*x.shape[:-1], len(weight))
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear`, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


@cache
def onednn_is_faster() -> bool:
    """Whether float32 matrices are to be multiplied by oneDNN, which torch has beside MKL.

    MKL uses vectors of 256 bits on AMD's processors, oneDNN of 512 where the processor has them. From Zen 5 on its
    units are as wide, so that oneDNN is twice as fast; before that and on Intel's both are alike.
    """
    fields = processor.fields()
    return (
        fields.get("vendor_id") == "AuthenticAMD"
        and int(fields.get("cpu family", 0)) >= _ZEN_5
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


class _OneDNN(torch.autograd.Function):
    """x weight^T + bias of x [rows, in], whose gradients are such products, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")

    @staticmethod
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        return (
            linear(d_out, weight.T) if needs_x else None,
            linear(d_out.T, x.T) if needs_weight else None,
            d_out.sum(0) if needs_bias else None,
        )


def _are_linear(tensors: tuple[Tensor, ...]) -> bool:
    """Whether they are CPU tensors of one dtype that fit together, and neither autocast nor derivatives forward."""
    x, weight, *bias = tensors
    return (
        not torch._C._is_any_autocast_enabled()
        and forward_ad._current_level < 0
        and all(not t.is_nested and t.layout is torch.strided for t in tensors)
        and all(t.device.type == "cpu" and t.dtype is x.dtype for t in tensors)
        and x.ndim > 0
        and weight.ndim == 2
        and weight.shape[1] == x.shape[-1]
        and all(t.shape == weight.shape[:1] for t in bias)
    )


def _are_few_rows(tensors: tuple[Tensor, ...]) -> bool:
    x, weight, *_ = tensors
    return (
        0 < x.numel() <= FEW.get(x.dtype, 0) * x.shape[-1]
        and weight.stride(1) == 1
        and weight.numel() >= MANY
        and cpu.is_built()
    )


def _are_much_work(tensors: tuple[Tensor, ...]) -> bool:
    """Enough for oneDNN to be worth its call, of weights in memory as a matrix or its transpose."""
    x, weight, *_ = tensors
    (outputs, inputs), (step_out, step_in) = weight.shape, weight.stride()
    return (
        x.dtype is torch.float32
        and x.numel() >= LEAST_ROWS * inputs
        and x.numel() * outputs >= WORK
        and ((step_in == 1 and step_out >= inputs) or (step_out == 1 and step_in >= outputs))
        and onednn_is_faster()
    )
