"""Linear layers that are fast for few rows, too, as when texts are decoded token by token."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

from pyattn.backends import cpu
from pyattn.ops import concerns_the_backend_alone

# Where pyattn's product is the faster one (AMD EPYC Zen 4, against MKL and oneDNN): up to so many rows, by dtype,
# and for weights so many that they have to come from memory.
FEW = {torch.float32: 32, torch.bfloat16: 8}
MANY = 1 << 19


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`torch.nn.functional.linear`: x weight^T + bias.

    On the CPU `FEW` rows that need no gradient times `MANY` weights are computed by a kernel that reads the weights as
    fast as memory gives them, and for which a row's numbers do not depend on the rows beside it. Where torch watches
    (autocast, a trace, a profiler), its own product runs.

    Args:
        x: [..., in]; weight: [out, in]; bias: [out] or None.
    Returns:
        [..., out]
    Raises:
        RuntimeError: torch's, for tensors that do not fit together.
    """
    tensors = (x, weight) if bias is None else (x, weight, bias)
    if not _are_observed(tensors) and _are_few_rows(tensors):
        return cpu.linear(x, weight, bias)
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """`torch.nn.Linear`, by `linear`."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def _are_observed(tensors: tuple[Tensor, ...]) -> bool:
    """Whether torch does more with them than the product: derivatives, autocast, traces."""
    return (
        not concerns_the_backend_alone(tensors)
        or torch._C._is_any_autocast_enabled()
        or forward_ad._current_level >= 0
        or any(t.is_nested or t.layout is not torch.strided for t in tensors)
    )


def _are_few_rows(tensors: tuple[Tensor, ...]) -> bool:
    x, weight, *bias = tensors
    return (
        x.ndim > 0
        and 0 < x.numel() <= FEW.get(x.dtype, 0) * x.shape[-1]
        and all(t.device.type == "cpu" and t.dtype is x.dtype for t in tensors)
        and weight.ndim == 2
        and weight.stride(1) == 1
        and weight.shape[1] == x.shape[-1]
        and weight.numel() >= MANY
        and all(t.shape == weight.shape[:1] for t in bias)
        and cpu.is_built()
    )
