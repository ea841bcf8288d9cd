"""Linear layers that are fast for few rows, too, as when texts are decoded token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from pyattn.backends import cpu
from pyattn.ops import concerns_the_backend_alone

FEW = 32  # rows up to which pyattn's product is the faster one: 1.0 to 4 times MKL and oneDNN on AMD EPYC (Zen 4)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x weight^T + bias.

    On the CPU at most `FEW` rows that need no gradient are computed by a kernel that reads the weights as fast as
    memory gives them, and for which a row's numbers do not depend on the rows beside it. Where torch watches (autocast,
    a trace, a profiler), its own product runs.

    Args:
        x: [..., in]; weight: [out, in]; bias: [out] or None.
    Returns:
        [..., out]
    Raises:
        RuntimeError: torch's, for tensors that do not fit together.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not torch.compiler.is_compiling() and _are_few_rows(tensors) and not _is_observed(tensors):
        return cpu.linear(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear`, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def _are_few_rows(tensors: tuple[Tensor, ...]) -> bool:
    x, weight, *bias = tensors
    return (
        x.ndim > 0
        and 0 < x.numel() <= FEW * x.shape[-1]
        and x.dtype in cpu.CpuBackend.dtypes
        and all(t.device.type == "cpu" and t.layout is torch.strided and t.dtype is x.dtype for t in tensors)
        and weight.ndim == 2
        and weight.stride(1) == 1
        and weight.shape[1] == x.shape[-1]
        and all(t.shape == weight.shape[:1] for t in bias)
        and cpu.is_built()
    )


def _is_observed(tensors: tuple[Tensor, ...]) -> bool:
    """Whether torch does more with them than the product: autocast, derivatives, traces."""
    return (
        torch._C._is_any_autocast_enabled() or forward_ad._current_level >= 0 or not concerns_the_backend_alone(tensors)
    )
