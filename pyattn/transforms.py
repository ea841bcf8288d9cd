"""torch.func's transforms: grad, vmap and what is made of them, over the operators.

The operators' registered gradient is not one that torch.func can call, and without a batching rule vmap would call them
once per sample. So under a transform attention is an autograd.Function over the operators, and vmap folds its dimension
into the batch. So does the older vmap in which torch.autograd.grad(..., is_grads_batched=True) runs a backward.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch._C import _dispatch_key_parse, _dispatch_keys
from torch._C._functorch import peek_interpreter_stack

from pyattn import autograd
from pyattn.spec import Inputs, Results, unit_stride

_N_TENSORS = len(Inputs._fields)
_BEFORE = 3 + len(Results._fields)  # arguments of the backward operator before those of `Inputs`
# Dropout's mask depends on the number of the batch element, the others have no dimension of the batch.
_UNFOLDED = ("sinks", "seed", "cu_seqlens_q", "cu_seqlens_k", "block_table", "weight", "relative_k")
OLDER_VMAP = "Batched"  # torch's dispatch key of the tensors in it


def active() -> bool:
    """Whether a transform of torch.func is."""
    return peek_interpreter_stack() is not None


class Attention(torch.autograd.Function):
    """`pyattn::attention`, of the same arguments."""

    generate_vmap_rule = True
    setup_context = staticmethod(autograd.setup_context)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return torch.ops.pyattn.attention(*args)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        return autograd.backward(ctx, *gradients, operator=_AttentionBackward.apply)


class _AttentionBackward(torch.autograd.Function):
    generate_vmap_rule = True
    backward = staticmethod(autograd.refuse_second_backward)

    @staticmethod
    def forward(*args: Any) -> tuple[Tensor, ...]:
        return tuple(torch.ops.pyattn.attention_backward(*args))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        pass


def forward_rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """vmap's rule for `pyattn::attention`."""
    x = Inputs(*args[:_N_TENSORS])
    if _needs_turns(x):
        return _in_turn(torch.ops.pyattn.attention, info.batch_size, in_dims, args)
    folded, b = _fold(x, in_dims, info.batch_size, shared=True)
    results = torch.ops.pyattn.attention(*folded, *args[_N_TENSORS:])
    return tuple(t.unflatten(0, (info.batch_size, b)) for t in results), (0,) * len(results)


def backward_rule(info: Any, in_dims: tuple, *args: Any) -> tuple[Any, Any]:
    """vmap's rule for `pyattn::attention_backward`."""
    size, end = info.batch_size, _BEFORE + _N_TENSORS
    x, x_dims = Inputs(*args[_BEFORE:end]), in_dims[_BEFORE:end]
    if _needs_turns(x):
        return _in_turn(torch.ops.pyattn.attention_backward, size, in_dims, args)
    folded, b = _fold(x, x_dims, size, shared=False)  # every sample's bias has a gradient of its own
    *rows, bias_gradient = args[:_BEFORE]
    rows = [t if t is None else _samples(t, dim, size).flatten(0, 1) for t, dim in zip(rows, in_dims, strict=False)]
    found = torch.ops.pyattn.attention_backward(*rows, bias_gradient, *folded, *args[end:])
    grads = [t.unflatten(0, (size, b)) for t in found]
    if x.bias is not None and bias_gradient and _samples(x.bias, x_dims[4], size).shape[1] != b:
        grads[3] = grads[3].sum(1, keepdim=True)
    return grads, [0] * len(grads)


def older_backward_rule(*args: Any) -> list[Tensor]:
    """The older vmap's rule for `pyattn::attention_backward`: it gives no dimensions, but tensors that hide one.

    It is taken to be the only one: torch has no rules for what this does with the tensors of one inside another.
    """
    key = _dispatch_key_parse(OLDER_VMAP)
    in_dims = tuple(0 if isinstance(t, Tensor) and _dispatch_keys(t).has(key) else None for t in args)
    shown = tuple(
        t if dim is None else torch._remove_batch_dim(t, 1, 0, 0) for t, dim in zip(args, in_dims, strict=True)
    )
    size = next(len(t) for t, dim in zip(shown, in_dims, strict=True) if dim == 0)
    grads, _ = backward_rule(SimpleNamespace(batch_size=size), in_dims, *shown)
    return [torch._add_batch_dim(t, 0, 1) for t in grads]


def _needs_turns(x: Inputs) -> bool:
    return any(getattr(x, name) is not None for name in _UNFOLDED)


def _fold(x: Inputs, in_dims: tuple, size: int, shared: bool) -> tuple[Inputs, int]:
    """x with the samples in its batch, and the batch size of one sample.

    shared: a mask or bias that has no dimension of the batch, nor of the samples, stays so.
    """
    b = _samples(x.q, in_dims[0], size).shape[1]

    def fold(t: Tensor | None, dim: int | None) -> Tensor | None:
        if t is None or (shared and dim is None and t.dim() == 4 and t.shape[0] == 1 != b):
            return t
        samples = _samples(t, dim, size)
        return samples.expand(size, b, *samples.shape[2:]).flatten(0, 1)

    folded = Inputs._make(map(fold, x, in_dims))
    return folded._replace(q=unit_stride(folded.q), k=unit_stride(folded.k), v=unit_stride(folded.v)), b


def _samples(t: Tensor, dim: int | None, size: int) -> Tensor:
    """t with the dimension of the samples in front."""
    return t.expand(size, *t.shape) if dim is None else t.movedim(dim, 0)


def _in_turn(operator: Any, size: int, in_dims: tuple, args: tuple) -> tuple[Any, Any]:
    """One call per sample."""
    calls = [
        operator(*(t if dim is None else t.select(dim, i) for t, dim in zip(args, in_dims, strict=True)))
        for i in range(size)
    ]
    results = [torch.stack(of_one) for of_one in zip(*calls, strict=True)]
    return (tuple(results), (0,) * len(results)) if isinstance(calls[0], tuple) else (results, [0] * len(results))
