"""Gradients of the operator `pyattn::attention`: what its forward saves and how its backward is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pyattn.check import UnsupportedError
from pyattn.spec import Grads, Inputs, Results

_N_TENSORS = len(Inputs._fields)
_BIAS = Inputs._fields.index("bias")
_DIFFERENTIABLE = tuple(map(Inputs._fields.index, Grads._fields))  # positions in the operator's schema


def setup_context(ctx, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:_N_TENSORS], *output)
    ctx.options = inputs[_N_TENSORS:]


def backward(
    ctx, *d_results: Tensor | None, operator: Callable[..., Sequence[Tensor]] | None = None
) -> tuple[Tensor | None, ...]:
    """operator: in place of `pyattn::attention_backward`."""
    operator = operator or torch.ops.pyattn.attention_backward
    d_out, d_lse, *_ = d_results  # the other results never leave the operators
    saved = ctx.saved_tensors  # once: a checkpoint computes them again for it
    tensors, results = saved[:_N_TENSORS], Results(*saved[_N_TENSORS:])
    if d_out is None:
        d_out = torch.zeros_like(results.out)
    bias_gradient = ctx.needs_input_grad[_BIAS]
    found = iter(operator(d_out, d_lse, *results, bias_gradient, *tensors, *ctx.options))
    grads: list[Tensor | None] = [None] * (_N_TENSORS + len(ctx.options))
    for place in _DIFFERENTIABLE:
        if tensors[place] is not None and (bias_gradient or place != _BIAS):
            grads[place] = next(found)
    return tuple(grads)


def refuse_second_backward(ctx, *grads: Tensor) -> None:
    raise UnsupportedError(
        "attention has no second derivative on the fused backends; "
        'backend="reference" is differentiable any number of times, in O(m * n) memory'
    )
