"""The torch operators `pyattn::attention` and `pyattn::attention_backward`.

As operators with fake implementations they are seen through by torch.compile, torch.export and FakeTensor.
Tensors come as `check.check_inputs` returns them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._C import (
    DispatchKey,
    DispatchKeySet,
    _dispatch_tls_local_include_set,
    _is_torch_function_mode_enabled,
)
from torch._C._autograd import _profiler_enabled

from pyattn import autograd, flops, registry, transforms
from pyattn.check import check_dtypes, check_values
from pyattn.spec import AttentionSpec, Inputs, Numbers, Results, empty_gradients, empty_results

_TENSORS = (
    "Tensor q, Tensor k, Tensor v, Tensor? mask, Tensor? bias, Tensor? key_lengths, Tensor? q_segments, "
    "Tensor? k_segments, Tensor? alibi_slopes, Tensor? sinks, Tensor? seed, Tensor? cu_seqlens_q, "
    "Tensor? cu_seqlens_k, Tensor? block_table, Tensor? weight, Tensor? exp_keys, Tensor? relative_q, "
    "Tensor? relative_k, Tensor? q_ranks, Tensor? k_ranks, Tensor? row_first, Tensor? row_stop"
)
_NUMBERS = (
    "float scale, SymInt? offset, SymInt? left, SymInt? right, float? softcap, float dropout_p, SymInt? first, "
    "str backend"
)
_N_TENSORS, _N_RESULTS = len(Inputs._fields), len(Results._fields)

_PLAIN_TYPES = (Tensor, torch.nn.Parameter)
_NO_MODE = DispatchKeySet(DispatchKey.BackendSelect).add(DispatchKey.ADInplaceOrView).raw_repr()

_library = torch.library.Library("pyattn", "DEF")
_RESULTS = "Tensor out, Tensor lse, Tensor row_max, Tensor row_sum"
_library.define(f"attention({_TENSORS}, {_NUMBERS}) -> ({_RESULTS})")
_library.define(
    f"attention_backward(Tensor d_out, Tensor? d_lse, {_RESULTS}, bool bias_gradient, {_TENSORS}, {_NUMBERS}) "
    "-> Tensor[]"
)


def attention(x: Inputs, numbers: Numbers, backend: str) -> tuple[Tensor, Tensor]:
    """Runs the operator on the backend of that name, or on the one that "auto" finds. Returns (out, lse)."""
    if concerns_the_backend_alone(x):
        return _forward(x, AttentionSpec.of(x, numbers), backend)[:2]
    if not torch.compiler.is_compiling() and transforms.active():
        return transforms.Attention.apply(*x, *numbers, backend)[:2]
    return torch.ops.pyattn.attention(*x, *numbers, backend)[:2]


def concerns_the_backend_alone(tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch's dispatcher would do nothing but call the backend.

    A call takes 17 us by the dispatcher and 5 us past it, without the backend's own time (torch 2.13, AMD EPYC).

    It does more for what is not eager, and to record a gradient or a profile.
    """
    return is_eager(tensors) and not is_recorded(tensors)


def is_recorded(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a gradient or a profile of a call is to be kept."""
    return _profiler_enabled() or (torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors))


def is_eager(tensors: Sequence[Tensor | None]) -> bool:
    """Whether a call computes numbers at once, of plain tensors, and at most has its gradient recorded.

    It does not under torch.compile, a mode, a function transform or a trace (the last three show as keys that the
    thread includes), and for tensors of a subclass, without data, or stored negated.
    """
    if torch.compiler.is_compiling() or _is_torch_function_mode_enabled():
        return False
    if _dispatch_tls_local_include_set().raw_repr() & ~_NO_MODE:
        return False
    for t in tensors:
        if t is not None and (type(t) not in _PLAIN_TYPES or t.is_meta or t.is_neg() or t._is_zerotensor()):
            return False
    return True


def _attention(*args) -> Results:
    x, spec, backend = _unpack(args)
    check_dtypes(x)
    return _forward(x, spec, backend)


def _forward(x: Inputs, spec: AttentionSpec, backend: str) -> Results:
    check_values(x)
    return registry.run(spec, backend, lambda chosen: chosen.forward(spec, x))


def _attention_backward(d_out: Tensor, d_lse: Tensor | None, *args) -> list[Tensor]:
    y, bias_gradient = Results(*args[:_N_RESULTS]), args[_N_RESULTS]
    x, spec, backend = _unpack(args[_N_RESULTS + 1 :])
    check_dtypes(x)
    grads = registry.run(spec, backend, lambda chosen: chosen.backward(spec, x, y, d_out, d_lse, bias_gradient))
    return [g for g in grads if g is not None]


def _attention_fake(*args) -> Results:
    x = Inputs(*args[:_N_TENSORS])
    return empty_results(x.q, x.v.shape[-1])


def _attention_backward_fake(d_out: Tensor, d_lse: Tensor | None, *args) -> list[Tensor]:
    bias_gradient, *of_call = args[_N_RESULTS:]
    grads = empty_gradients(Inputs(*of_call[:_N_TENSORS]), bias_gradient)
    return [g for g in grads if g is not None]


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
torch.library.register_vmap("pyattn::attention", transforms.forward_rule, lib=_library)
torch.library.register_vmap("pyattn::attention_backward", transforms.backward_rule, lib=_library)
_library.impl("attention_backward", transforms.older_backward_rule, transforms.OLDER_VMAP)
flops.register()
