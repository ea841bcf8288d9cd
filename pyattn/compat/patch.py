"""pyattn in place of torch's own attention, in all models of the process or in one, without a change to their code."""

from __future__ import annotations

import copyreg
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from functools import cache
from types import FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor

from pyattn import registry
from pyattn.check import DtypeError, PyattnError, UnsupportedError, autocast_dtype
from pyattn.compat.torch import _is_causal_bias, scaled_dot_product_attention
from pyattn.face import showing
from pyattn.nn.multihead_attention import MultiheadAttention
from pyattn.spec import AttentionSpec

__all__ = ["Patch", "patch"]

__dir__ = showing(__all__)

_TORCH_SDPA = torch._C._nn.scaled_dot_product_attention
_TORCH_MHA = nn.MultiheadAttention.forward
_TORCH_LAYER = nn.TransformerEncoderLayer.forward

_PLAIN_TYPES = (Tensor, nn.Parameter, FakeTensor, FunctionalTensor)  # the last two stand for the first in a trace
_LIBRARIES = tuple(os.path.dirname(path) + os.sep for path in (torch.__file__, registry.__file__))

_lock = threading.RLock()
_process: list[Patch] = []  # the patches of the process, the last one rules
_models: weakref.WeakKeyDictionary[nn.Module, list[Patch]] = weakref.WeakKeyDictionary()  # those of each module
# The ruling patch's strict, None without one. A plain global, because torch.compile guards those.
_strict: bool | None = None
_warned: set[tuple[str, int, str]] = set()


def patch(model: nn.Module | None = None, *, strict: bool = False) -> Patch:
    """Routes torch's attention through pyattn until `restore()`, or to the end of a `with` block.

    Without a model, for all models and threads of the process:

    * torch.nn.functional.scaled_dot_product_attention, under whatever name an imported module holds it. One that a
      closure, an object or a default argument keeps is out of reach. (A TorchFunctionMode would see those calls; it
      lengthens every torch call of its thread by 1 us, where finding the names takes 10 ms once, and knows one thread.)
    * torch.nn.MultiheadAttention, hence torch.nn.Transformer and all of its parts. torch.nn.TransformerEncoderLayer
      does without its inference kernel, which holds an attention of its own.

    With a model, in its torch.nn.MultiheadAttention and torch.nn.TransformerEncoderLayer modules alone, of any depth.
    Copies and pickles of it are not patched.

    A call that no fused backend can serve, or that pyattn refuses, runs torch's own attention and warns, once for each
    reason and place in the user's code. Results are those of `pyattn.scaled_dot_product_attention` and
    `pyattn.MultiheadAttention`: dropout draws other numbers than torch's, a query that may see no key gets no NaN, and
    torch.nn.attention.sdpa_kernel chooses among torch's kernels only. Second derivatives raise, as in torch's fused
    kernels, also where torch would have chosen one that has them. torch.jit.script cannot read what is patched. Under
    torch.compile, whether a call can be served is settled when it is traced.

    Args:
        model: patched in place; None is the process.
        strict: raise where torch's own would run.

    Returns:
        What was patched and what was not, to be printed, and to be restored. Patches may overlap, the last one's
        `strict` rules, and the last one to end restores.

    Raises:
        DtypeError: model is not a module.
        UnsupportedError: with strict, from calls that no fused backend can serve; lists every backend's reason.
    """
    if not (model is None or isinstance(model, nn.Module)):
        raise DtypeError(f"model: expected a torch.nn.Module, or None for the process, got {type(model).__name__}")
    return Patch(model, strict)


class Patch:
    """A patch: `patched` names what it reached, `skipped` what it did not, and why."""

    patched: list[str]
    skipped: dict[str, str]

    def __init__(self, model: nn.Module | None, strict: bool) -> None:
        self.strict = strict
        self._modules: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        with _lock:
            if model is None:
                _process.append(self)
                _apply_to_process()
                self.patched, self.skipped = _process_report()
            else:
                self.patched, self.skipped = [], {}
                for name, module in model.named_modules():
                    self._patch_module(name or "(model)", module)
                if not self.patched:
                    self.skipped.setdefault("(model)", "no module of torch's; pyattn.patch() reaches torch's function")

    def _patch_module(self, name: str, module: nn.Module) -> None:
        reason = _reason_to_skip(module)
        if reason:
            self.skipped[name] = reason
        elif isinstance(module, tuple(_FORWARDS)):
            self.patched.append(name)
        if isinstance(module, nn.TransformerEncoderLayer) or name in self.patched:
            self._modules.add(module)
            _models.setdefault(module, []).append(self)
            _apply_to_module(module)

    def restore(self) -> None:
        """Ends the patch; a second time does nothing."""
        with _lock:
            if self in _process:
                _process.remove(self)
                _apply_to_process()
            for module in self._modules:
                _models[module].remove(self)
                _apply_to_module(module)
            self._modules.clear()

    def __enter__(self) -> Patch:
        return self

    def __exit__(self, *exception: object) -> None:
        self.restore()

    def __str__(self) -> str:
        lines = [f"patched {name}" for name in self.patched]
        return "\n".join(lines + [f"skipped {name}: {reason}" for name, reason in self.skipped.items()])


def _sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch.nn.functional.scaled_dot_product_attention, patched."""
    options: dict[str, Any] = {"scale": scale, "enable_gqa": enable_gqa}
    if _strict is None:  # kept by someone while a patch was on
        return _TORCH_SDPA(query, key, value, attn_mask, dropout_p, is_causal, **options)
    try:
        _check_plain(query, key, value)
        if torch.compiler.is_compiling():
            _check_served(query, query.shape[-1], value.shape[-1])
        return scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    except PyattnError as error:
        if _strict:
            raise
        _warn_once("torch.nn.functional.scaled_dot_product_attention", error.args[0])
    if _is_causal_bias(attn_mask):  # torch's kind of mask compares the function's identity, which is not torch's now
        attn_mask = attn_mask._materialize(query.device)
    return _TORCH_SDPA(query, key, value, attn_mask, dropout_p, is_causal, **options)


def _mha(
    self: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """torch.nn.MultiheadAttention.forward, patched."""
    arguments = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
    strict = _strictness(self)
    if strict is None:
        return _TORCH_MHA(self, query, key, value, *arguments)
    try:
        _check_plain(query, key, value)
        if torch.compiler.is_compiling():
            _check_served(query, self.head_dim, self.head_dim)
        return MultiheadAttention.forward(self, query, key, value, *arguments)
    except PyattnError as error:
        if strict:
            raise
        _warn_once("torch.nn.MultiheadAttention", error.args[0])
    return _TORCH_MHA(self, query, key, value, *arguments)


def _encoder_layer(
    self: Any,
    src: Tensor,
    src_mask: Tensor | None = None,
    src_key_padding_mask: Tensor | None = None,
    is_causal: bool = False,
) -> Tensor:
    """torch.nn.TransformerEncoderLayer.forward, patched: without the kernel that has an attention of its own."""
    if _strictness(self) is None:
        return _TORCH_LAYER(self, src, src_mask, src_key_padding_mask, is_causal)
    if self.norm_first:
        x = src + self._sa_block(self.norm1(src), src_mask, src_key_padding_mask, is_causal=is_causal)
        return x + self._ff_block(self.norm2(x))
    x = self.norm1(src + self._sa_block(src, src_mask, src_key_padding_mask, is_causal=is_causal))
    return self.norm2(x + self._ff_block(x))


# Each class with its forward and the one that takes its place.
_FORWARDS: dict[Any, tuple[Callable, Callable]] = {
    nn.MultiheadAttention: (_TORCH_MHA, _mha),
    nn.TransformerEncoderLayer: (_TORCH_LAYER, _encoder_layer),
}


def _strictness(module: nn.Module) -> bool | None:
    """`strict` of the patch that rules a module: its own, else the process's, None without one."""
    return getattr(type(module), "_pyattn_strict", _strict)


def _check_plain(*tensors: Tensor) -> None:
    for t in tensors:
        if type(t) not in _PLAIN_TYPES and isinstance(t, Tensor) and not t.is_nested:
            raise UnsupportedError(
                f"expected plain tensors, got {type(t).__name__}: it may have an attention of its own"
            )


def _check_served(query: Tensor, d: int, dv: int) -> None:
    """Asks the backends while a call is traced: when the graph runs and one refuses, it is too late to fall back."""
    largest, of_values, reason = _largest_head(registry.requested("auto"), query.device.type, autocast_dtype(query))
    if d > largest or dv > of_values:
        raise UnsupportedError(reason)


def _constant(function: Callable) -> Callable:
    """torch.compiler.assume_constant_result, called while tracing, without its import of torch._dynamo for a second."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


@_constant
def _largest_head(backend: str, device: str, dtype: torch.dtype) -> tuple[int, int, str]:
    """The largest head sizes that are served, of queries and of values, and what the backends say to one more.

    Sizes may be symbols; these not.
    """

    def spec(d: int) -> AttentionSpec:
        return AttentionSpec(1, 1, 1, 1, 1, d, d, dtype, device, 1.0, 0, None, None, None, 0.0)

    candidates = [registry.BACKENDS[name] for name in (registry.AUTOMATIC if backend == "auto" else (backend,))]
    able = [b for b in candidates if b.refusal(spec(1)) is None]
    largest = max((b.max_head_dim for b in able), default=0)
    of_values = max((b.max_value_dim or b.max_head_dim for b in able), default=0)
    reason = ""
    try:
        registry.choose(spec(largest + 1), backend)
    except UnsupportedError as error:
        reason = str(error)
    return largest, of_values, reason


@_constant
def _warn_once(call: str, reason: str) -> None:
    """Warns at the innermost line that is neither torch's nor ours, unless it was warned there of the same."""
    frame = sys._getframe(1)
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARIES):
        frame = frame.f_back
    key = (frame.f_code.co_filename, frame.f_lineno, reason)
    if key not in _warned:
        _warned.add(key)
        warnings.warn_explicit(f"{call} runs torch's own and not pyattn's: {reason}", UserWarning, *key[:2])


def _apply_to_process() -> None:
    """Brings torch's names into the state that `_process` asks for."""
    global _strict
    _strict = _process[-1].strict if _process else None
    for module, name in _names(_TORCH_SDPA if _process else _sdpa):
        setattr(module, name, _sdpa if _process else _TORCH_SDPA)
    for cls, (theirs, ours) in _FORWARDS.items():
        if cls.forward is (theirs if _process else ours):  # it may have been replaced by others
            cls.forward = ours if _process else theirs


def _names(function: Callable) -> list[tuple[ModuleType, str]]:
    """Every name of `function` in a module, but for those of torch's C extension and of this one."""
    return [
        (module, name)
        for key, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and key != __name__ and not key.startswith("torch._C")
        for name, value in list(vars(module).items())
        if value is function
    ]


def _process_report() -> tuple[list[str], dict[str, str]]:
    patched = list(dict.fromkeys(f"{module.__name__}.{name}" for module, name in _names(_sdpa)))
    skipped = {"torch.nn.functional.multi_head_attention_forward": "with need_weights it computes attention by itself"}
    if torch.nn.functional.scaled_dot_product_attention is not _sdpa:
        skipped["torch.nn.functional.scaled_dot_product_attention"] = "other code has replaced it"
    for cls, (_, ours) in _FORWARDS.items():
        if cls.forward is ours:
            patched.append(f"torch.nn.{cls.__name__}.forward")
        else:
            skipped[f"torch.nn.{cls.__name__}.forward"] = "other code has replaced it"
        for subclass in _subclasses(cls):
            if subclass.forward is not cls.forward and not hasattr(subclass, "_pyattn_strict"):
                skipped[f"{subclass.__module__}.{subclass.__qualname__}.forward"] = "a subclass's own"
    return patched, skipped


def _subclasses(cls: Any) -> Iterator[Any]:
    for subclass in cls.__subclasses__():
        yield subclass
        yield from _subclasses(subclass)


def _apply_to_module(module: nn.Module) -> None:
    """Gives a module the class that its patches ask for."""
    cls: Any = type(module)
    ours = next((base for base in cls.__mro__ if "_pyattn_strict" in vars(base)), None)
    plain = cls if ours is None else ours.__base__
    patches = _models[module]
    wanted = _patched_class(plain, patches[-1].strict) if patches else plain
    if ours in (None, cls):
        module.__class__ = wanted
    for base in cls.__mro__:  # others, as parametrizations do, may have made a class out of ours in the meantime
        if ours in base.__bases__:
            base.__bases__ = tuple(wanted if parent is ours else parent for parent in base.__bases__)


@cache
def _patched_class(cls: type[nn.Module], strict: bool) -> type[nn.Module]:
    """cls with the forward of its patch. Instances are copied and pickled as those of cls, which need no pyattn.

    A layer with a forward of its own keeps it; what it may call of torch's then does without the inference kernel.
    """

    def reduce_ex(self: nn.Module, protocol: int) -> tuple:
        state = cls.__reduce_ex__(self, max(2, protocol))[2:]
        return copyreg._reconstructor, (cls, object, None), *state  # type: ignore[attr-defined]

    body: dict[str, Any] = {name: getattr(cls, name) for name in ("__module__", "__qualname__")}
    body |= {"_pyattn_strict": strict, "__reduce_ex__": reduce_ex}
    forwards = next(forwards for base, forwards in _FORWARDS.items() if issubclass(cls, base))
    if cls.forward in forwards:
        body["forward"] = forwards[1]
    else:
        body["activation_relu_or_gelu"] = property(lambda self: 0)  # what that kernel asks for
    return type(cls.__name__, (cls,), body)


def _reason_to_skip(module: nn.Module) -> str | None:
    """Why a module with attention in its own code is not patched; None otherwise."""
    cls = type(module)
    for base, forwards in _FORWARDS.items():
        if isinstance(module, base):
            own = cls.forward not in forwards or "forward" in vars(module)
            return f"{cls.__name__} has a forward of its own" if own else None
    if isinstance(module, torch.jit.ScriptModule):
        return "its code is fixed in TorchScript"
    if _calls_sdpa(cls):
        return f"{cls.__name__} calls scaled_dot_product_attention: pyattn.patch() without a model reaches that"
    return None


def _calls_sdpa(cls: type) -> bool:
    """Whether a class that is not torch's or ours names the function in its methods."""
    bases = (base for base in cls.__mro__ if base.__module__.split(".")[0] not in ("torch", "pyattn"))
    methods = (f for base in bases for f in vars(base).values() if isinstance(f, FunctionType))
    return any("scaled_dot_product_attention" in f.__code__.co_names for f in methods)
