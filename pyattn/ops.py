"""The torch operators `pyattn::attention` and `pyattn::attention_backward`.

As operators with fake implementations they are seen through by torch.compile, torch.export and FakeTensor.
Tensors come as `check.check_inputs` returns them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pyattn import autograd, registry
from pyattn.check import check_values
from pyattn.spec import AttentionSpec, Grads, Inputs, Numbers, empty_output

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? key_lengths, Tensor? q_segments, "
    "Tensor? k_segments, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed"
)
_NUMBERS = "float scale, SymInt offset, SymInt? left, SymInt? right, float? softcap, float dropout_p, str backend"
_N_TENSORS = 11  # fields of Inputs, in its order

_library = torch.library.Library("pyattn", "DEF")
_library.define(f"attention({_TENSORS}, {_NUMBERS}) -> (Tensor, Tensor)")
_library.define(
    f"attention_backward(Tensor d_out, Tensor? d_lse, Tensor out, Tensor lse, {_TENSORS}, {_NUMBERS}) -> Tensor[]"
)


def attention(x: Inputs, numbers: Numbers, backend: str) -> tuple[Tensor, Tensor]:
    """Runs the operator on the backend of that name, or on the one that "auto" finds. Returns (out, lse)."""
    return torch.ops.pyattn.attention(
        x.q, x.k, x.v, x.mask, x.bias, x.key_lengths, x.q_segments, x.k_segments, x.alibi_slopes, x.sinks, x.seed,
        *numbers, backend,
    )  # fmt: skip


def _attention(*args) -> tuple[Tensor, Tensor]:
    x, spec, backend = _unpack(args)
    check_values(x)
    return registry.choose(spec, backend).forward(spec, x)


def _attention_backward(d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, *args) -> list[Tensor]:
    x, spec, backend = _unpack(args)
    grads = registry.choose(spec, backend).backward(spec, x, out, lse, d_out, d_lse)
    return [g for g in grads if g is not None]


def _attention_fake(*args) -> tuple[Tensor, Tensor]:
    x = Inputs(*args[:_N_TENSORS])
    out = empty_output(x.q, x.v.shape[-1])
    accumulator = torch.float64 if x.q.dtype is torch.float64 else torch.float32
    return out, x.q.new_empty(x.q.shape[:3], dtype=accumulator)


def _attention_backward_fake(d_out: Tensor, d_lse: Tensor | None, out: Tensor, lse: Tensor, *args) -> list[Tensor]:
    x = Inputs(*args[:_N_TENSORS])
    present = (getattr(x, name) for name in Grads._fields)
    return [torch.empty_like(t) for t in present if t is not None]


def _unpack(args: tuple) -> tuple[Inputs, AttentionSpec, str]:
    x = Inputs(*args[:_N_TENSORS])
    *numbers, backend = args[_N_TENSORS:]
    return x, AttentionSpec.of(x, Numbers(*numbers)), backend


_library.impl("attention", _attention, "CompositeExplicitAutograd")
_library.impl("attention_backward", _attention_backward, "CompositeExplicitAutograd")
torch.library.register_fake("pyattn::attention", _attention_fake, lib=_library)
torch.library.register_fake("pyattn::attention_backward", _attention_backward_fake, lib=_library)
torch.library.register_autograd(
    "pyattn::attention", autograd.backward, setup_context=autograd.setup_context, lib=_library
)
torch.library.register_autograd("pyattn::attention_backward", autograd.refuse_second_backward, lib=_library)
