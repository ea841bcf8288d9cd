"""Runs Gluon kernels for Hopper on the CPU, to test their logic where there is no such GPU.

`launch(kernel, grid, *args, seed=0, **kwargs)` runs the Python function under a @gluon.jit kernel, with every operation
in it emulated on torch's CPU tensors. Arguments are tensors (pointers), numbers, None, TensorDescriptors, and tuples of
these. What is wrong raises a GluonError (a Deadlock if everybody waits) or gives NaN or wrong numbers, for some seeds.

This is the language; gluon_machine.py has what happens at the same time, and says what of it is modelled. Modelled
here: integers of 32 and 64 bits, dividing toward zero; the result of a wgmma, and what it adds to, unusable before the
wait; pointers and masks, which may not leave a tensor's storage; the distinction of constexprs and run-time values.

Not modelled: what the compiler checks or inserts (layouts, registers, barriers between the warps of one partition, the
fence after mbarrier.init), and speed. A _reinterpret is right for row-major memory and SharedLinearLayout; other
layouts only share their bytes.
"""

from __future__ import annotations

import itertools
import math
import operator
import random
import re
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType, SimpleNamespace
from typing import Any

import gluon_machine as machine
import torch
from gluon_machine import MARK, Deadlock, GluonError, Product, Program, TensorMap, View, error, running, undefined
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.core import dtype as Dtype
from triton.runtime.jit import ConstexprFunction, JITFunction

__all__ = ["Deadlock", "GluonError", "launch"]

TORCH = {
    gl.int1: torch.bool, gl.int8: torch.int8, gl.int16: torch.int16, gl.int32: torch.int32, gl.int64: torch.int64,
    gl.uint8: torch.uint8, gl.uint16: torch.uint16, gl.uint32: torch.uint32, gl.uint64: torch.uint64,
    gl.float16: torch.float16, gl.bfloat16: torch.bfloat16, gl.float32: torch.float32,
}  # fmt: skip
GLUON = {theirs: ours for ours, theirs in TORCH.items()}
LAUNCH_OPTIONS = ("num_stages", "num_ctas", "maxnreg")  # without meaning here


# --- values


class _Arithmetic:
    """What run-time values have in common. `_compute` defines the other operators."""

    def to(self, dtype: Dtype, bitcast: bool = False) -> Any:
        data = _tensor_of(self)
        return _value(data.view(TORCH[dtype]) if bitcast else data.to(TORCH[dtype]), _layout_of(self))

    def __neg__(self) -> Any:
        return 0 - self

    def __invert__(self) -> Any:
        return self ^ (True if self.dtype == gl.int1 else -1)


class Scalar(_Arithmetic, int):
    """A run-time integer. Of numbers known at compile time, which are Python's own, it differs in its division."""

    dtype: Dtype
    shape: tuple[int, ...] = ()

    def __new__(cls, value: Any, dtype: Dtype = gl.int32) -> Scalar:
        bits = dtype.primitive_bitwidth
        if bits == 1 or not dtype.is_int_signed():
            value = int(value) % (1 << bits)
        elif not -(1 << (bits - 1)) <= value < 1 << (bits - 1):
            raise error(f"{int(value)} overflows {dtype}")
        self = super().__new__(cls, value)
        self.dtype = dtype
        return self


class Tensor(_Arithmetic):
    """A tensor in registers."""

    def __init__(self, data: torch.Tensor, layout: Any = None, product: Product | None = None):
        self._data, self.layout = data, layout
        self.product = product  # whose result this is: what a wait returns in its place may be used
        self.claim: Product | None = None  # that adds to these registers, which until it is done are not ours

    @property
    def data(self) -> torch.Tensor:
        owner = self.product or self.claim
        if owner is not None and (owner is self.product or owner.value is None):
            raise error(f"{owner.name} has not been waited for, but its registers are used")
        return self._data

    @property
    def shape(self) -> list[int]:
        return list(self._data.shape)

    @property
    def dtype(self) -> Dtype:
        return GLUON[self._data.dtype]

    @property
    def type(self) -> SimpleNamespace:
        return SimpleNamespace(layout=self.layout, shape=self.shape, element_ty=self.dtype, scalar=self.dtype)

    def reshape(self, shape: list[int], can_reorder: bool = False) -> Tensor:
        return Tensor(self.data.reshape(shape))

    def permute(self, order: list[int]) -> Tensor:
        return Tensor(self.data.permute(order))

    def __getitem__(self, index: Any) -> Tensor:
        return Tensor(self.data[index])

    def __bool__(self) -> bool:
        return bool(self.data)


def _value(data: torch.Tensor, layout: Any = None) -> Any:
    """Run-time integers are Scalars, whatever they come from."""
    if data.dim() == 0 and not data.is_floating_point():
        return Scalar(data.item(), GLUON[data.dtype])
    return Tensor(data, layout)


def _integer_dtype(value: int) -> Dtype:
    """Python's own numbers take part as the narrowest that holds them."""
    if isinstance(value, (bool, Scalar)):
        return getattr(value, "dtype", gl.int1)
    return gl.int32 if -(2**31) <= value < 2**31 else gl.int64


def _tensor_of(value: Any) -> torch.Tensor:
    if isinstance(value, Tensor):
        return value.data
    if isinstance(value, int):
        return torch.tensor(int(value), dtype=TORCH[_integer_dtype(value)])
    if isinstance(value, float):
        return torch.tensor(value, dtype=torch.float32)
    raise error(f"a tensor or a number is wanted, not {value!r}")


def _promoted(a: Any, b: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Both of one type. Python's own numbers adapt to the other, as torch's of no dimension do."""
    x, y = _tensor_of(a), _tensor_of(b)
    if isinstance(a, (Tensor, Scalar)) and isinstance(b, (Tensor, Scalar)):
        common = torch.promote_types(x.dtype, y.dtype)
        return x.to(common), y.to(common)
    return x, y


def _layout_of(*values: Any) -> Any:
    return next((v.layout for v in values if isinstance(v, Tensor) and v.layout is not None), None)


def _quotient(a: int, b: int) -> int:
    return abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)


COMPARISONS = ("eq", "ne", "lt", "le", "gt", "ge")
BITWISE = ("and", "or", "xor")
ON_INTEGERS: dict[str, Callable] = {
    "floordiv": _quotient, "mod": lambda a, b: a - b * _quotient(a, b), "minimum": min, "maximum": max
}  # fmt: skip
ON_TENSORS: dict[str, Callable] = {
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="trunc"), "mod": torch.fmod,
    "minimum": torch.fmin, "maximum": torch.fmax,  # of a number and a NaN the number, as the hardware has it
}  # fmt: skip


def _compute(name: str, a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int) and name != "truediv":
        dtype = max(_integer_dtype(a), _integer_dtype(b), key=lambda dtype: dtype.primitive_bitwidth)
        if name in COMPARISONS:
            dtype = gl.int1
        elif dtype == gl.int1 and name not in BITWISE:
            dtype = gl.int32
        function = ON_INTEGERS.get(name) or getattr(operator, f"__{name}__")
        return Scalar(function(int(a), int(b)), dtype)
    function = ON_TENSORS.get(name) or getattr(operator, f"__{name}__")
    return _value(function(*_promoted(a, b)), _layout_of(a, b))


def _method(name: str, reverse: bool) -> Callable:
    def method(self: Any, other: Any) -> Any:
        if not isinstance(other, (int, float, Tensor)):
            return NotImplemented
        return _compute(name, other, self) if reverse else _compute(name, self, other)

    return method


for _name in (*COMPARISONS, *BITWISE, "add", "sub", "mul", "truediv", "floordiv", "mod", "lshift", "rshift"):
    setattr(_Arithmetic, f"__{_name}__", _method(_name, False))
    if _name not in COMPARISONS:
        setattr(_Arithmetic, f"__r{_name}__", _method(_name, True))


# --- memory


class Pointer:
    """To elements of `flat`, at `offset`, which may be a tensor."""

    def __init__(self, flat: torch.Tensor, offset: torch.Tensor):
        self.flat, self.offset = flat, offset
        self.dtype = gl.pointer_type(GLUON[flat.dtype])

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.flat, self.offset + _tensor_of(offset))

    __radd__ = __add__

    def _inside(self, mask: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Offsets, and which of them the mask allows, all of which must exist."""
        allowed = _tensor_of(True if mask is None else mask).bool()
        offset, allowed = torch.broadcast_tensors(self.offset, allowed)
        bad = offset[allowed & ((offset < 0) | (offset >= self.flat.numel()))]
        if bad.numel():
            raise error(f"element {int(bad[0])} of a tensor of {self.flat.numel()} is accessed")
        return offset, allowed

    def load(self, mask: Any = None, other: Any = None, **options: Any) -> Any:
        offset, allowed = self._inside(mask)
        found = undefined(self.flat.dtype).repeat(offset.shape)
        if other is not None:
            found.copy_(_tensor_of(other))
        found[allowed] = self.flat[offset[allowed]]
        return _value(found)

    def store(self, value: Any, mask: Any = None, **options: Any) -> None:
        offset, allowed = self._inside(mask)
        value = _tensor_of(value).to(self.flat.dtype).broadcast_to(offset.shape)
        self.flat[offset[allowed]] = value[allowed]

    def atomic_add(self, value: Any, mask: Any = None, **options: Any) -> Any:
        before = self.load(mask)
        self.store(before + value, mask)
        running().switch()
        return before


class Descriptor(TensorMap):
    """What a kernel sees of a TensorDescriptor."""

    def __init__(self, host: TensorDescriptor):
        padding = math.nan if host.padding == "nan" else 0
        super().__init__(host.base, list(host.shape), list(host.strides), list(host.block_shape), padding)
        self.layout, self.dtype, self.nbytes_per_cta = host.layout, GLUON[host.base.dtype], self.nbytes
        self.block_type = SimpleNamespace(shape=self.block_shape, nbytes=self.nbytes, element_ty=self.dtype)
        self.shape = tuple(Scalar(extent, gl.int64) for extent in host.shape)
        self.strides = tuple(Scalar(stride, gl.int64) for stride in host.strides)


class Shared(View):
    """What a kernel sees of a view of shared memory."""

    def __init__(self, allocation: machine.Allocation, offsets: torch.Tensor, dtype: Dtype, layout: Any):
        super().__init__(allocation, offsets, TORCH[dtype])
        self.dtype, self.layout = dtype, layout
        self.type = SimpleNamespace(shape=self.shape, layout=layout, element_ty=dtype)

    @classmethod
    def allocate(cls, dtype: Dtype, shape: list[int], layout: Any, value: Tensor | None = None) -> Shared:
        nbytes = math.prod(shape) * dtype.primitive_bitwidth // 8
        shared = cls(machine.Allocation(nbytes), _offsets(shape, layout), dtype, layout)
        shared.flat[:] = undefined(shared.flat.dtype)
        if value is not None:
            shared.store(value)
        return shared

    def _view(self, offsets: torch.Tensor) -> Shared:
        return Shared(self.allocation, offsets, self.dtype, self.layout)

    def index(self, index: int) -> Shared:
        if not 0 <= index < self.shape[0]:
            raise error(f"index {int(index)} of {self.shape[0]} places")
        return self._view(self.offsets[int(index)])

    def slice(self, start: int, length: int, dim: int = 0) -> Shared:
        return self._view(self.offsets.narrow(int(dim), int(start), int(length)))

    def reshape(self, shape: list[int]) -> Shared:
        return self._view(self.offsets.reshape(shape))

    def permute(self, order: list[int]) -> Shared:
        return self._view(self.offsets.permute(order))

    def _reinterpret(self, dtype: Dtype, shape: list[int], layout: Any) -> Shared:
        (first, stop), size = self.span(), dtype.primitive_bitwidth // 8
        pieces = self.offsets.numel() * self.flat.element_size() == stop - first
        if not pieces or first % size or math.prod(shape) * size > stop - first:
            raise error(f"{self} is not one piece of memory for {dtype} {shape}")
        return Shared(self.allocation, first // size + _offsets(shape, layout), dtype, layout)

    def load(self, layout: Any = None) -> Tensor:
        running().switch()
        return Tensor(self.read(), layout)

    def store(self, value: Tensor) -> None:
        if value.shape != self.shape or value.dtype != self.dtype:
            raise error(f"{value.dtype} {value.shape} into {self.dtype} {self.shape}")
        self.write(value.data)


def _offsets(shape: list[int], layout: Any) -> torch.Tensor:
    """Where the elements of a layout lie in its memory."""
    offset = torch.arange(math.prod(shape))
    if not isinstance(layout, gl.SharedLinearLayout):
        return offset.reshape(shape)
    position = [torch.zeros_like(offset) for _ in shape]
    for bit, basis in enumerate(layout.offset_bases):
        position = [p ^ (offset >> bit & 1) * step for p, step in zip(position, basis, strict=True)]
    offsets = torch.full(shape, -1)
    offsets[tuple(position)] = offset
    if (offsets < 0).any():
        raise error(f"{layout} does not cover {shape}")
    return offsets


# --- the rest of the language


def _warpgroup_mma(
    a: Tensor | Shared, b: Shared, acc: Tensor, *, use_acc: Any = True, is_async: bool = False, **options: Any
) -> Tensor:
    warps = running().current.warps
    shapes = [a.shape[0], b.shape[1]] == acc.shape and a.shape[1] == b.shape[0]
    if not shapes or a.dtype != b.dtype or warps % 4:
        raise error(f"wgmma by {warps} warps of {a.dtype} {a.shape}, {b.dtype} {b.shape}, {acc.shape}")
    # What an earlier product has not yet given may be added to all the same: the hardware keeps their order.
    addend = acc.data if acc.product is None else acc.product
    product = Product(a.data if isinstance(a, Tensor) else a, b, addend if use_acc else None)
    if use_acc and acc.product is None:
        acc.claim = product
    running().switch()
    result = Tensor(torch.empty(acc.shape), acc.layout, product)
    return result if is_async else _warpgroup_mma_wait(0, (result,))


def _warpgroup_mma_wait(num_outstanding: int = 0, deps: tuple = ()) -> Any:
    """The usable dependencies: one value for one, else a tuple."""
    machine.wgmma_wait(num_outstanding)
    values = [None if dep.product is None else dep.product.value for dep in deps]
    ready = [dep if value is None else Tensor(value, dep.layout) for dep, value in zip(deps, values, strict=True)]
    return ready[0] if len(ready) == 1 else tuple(ready)


def _inline_asm(asm: str, constraints: str, args: list, dtype: Dtype, is_pure: bool, pack: int) -> Any:
    result: Any = None
    for statement in filter(None, map(str.strip, asm.split(";"))):
        if match := re.fullmatch(r"bar\.(sync|arrive) (\d+), (\d+)", statement):
            machine.bar(int(match[2]), int(match[3]), wait=match[1] == "sync")
        elif re.fullmatch(r"mov\.[bu]32 \$0, 0", statement):
            result = Scalar(0, dtype)
        elif re.fullmatch(r"mov\.b32 \$0, \$1", statement):
            result = args[0]
        else:
            raise error(f"inline assembly that is not emulated: {statement!r}")
    return result


def _range(*bounds: int, **options: Any) -> Iterator[Scalar]:
    return (Scalar(i, _integer_dtype(i)) for i in range(*(int(bound) for bound in bounds)))


def _extreme(name: str) -> Callable:
    def function(a: Any, b: Any, **options: Any) -> Any:
        if isinstance(a, _Arithmetic) or isinstance(b, _Arithmetic):
            return _compute(name, a, b)
        return ON_INTEGERS[name](a, b)

    return function


def _elementwise(function: Callable) -> Callable:
    return lambda x, **options: _value(function(_tensor_of(x)), _layout_of(x))


def _reduction(function: Callable) -> Callable:
    def reduce(x: Tensor, axis: int | None = None, keep_dims: bool = False, **options: Any) -> Any:
        data = x.data.int() if x.dtype in (gl.int1, gl.int8, gl.int16) else x.data
        axes = list(range(data.dim())) if axis is None else [axis]
        layout = None if axis is None or keep_dims or x.layout is None else gl.SliceLayout(axis, x.layout)
        return _value(function(data, axes, keep_dims).to(data.dtype), layout)

    return reduce


def _dropping_nan(function: Callable, nothing: float) -> Callable:
    # What is all NaN remains so, as in the hardware.
    def reduce(data: torch.Tensor, axes: list[int], keep_dims: bool) -> torch.Tensor:
        if not data.is_floating_point():
            return function(data, axes, keep_dims)
        missing = data.isnan()
        numbers = function(data.where(~missing, nothing), axes, keep_dims)
        return numbers.where(~missing.all(axes, keep_dims), math.nan)

    return reduce


def _select(condition: Any, x: Any, y: Any) -> Any:
    return _value(torch.where(_tensor_of(condition).bool(), *_promoted(x, y)), _layout_of(x, y, condition))


def _full(shape: list[int], value: Any, dtype: Dtype, layout: Any = None) -> Tensor:
    return Tensor(_tensor_of(value).to(TORCH[dtype]).repeat(tuple(shape)), layout)


def _expand_dims(x: Tensor, axis: int) -> Tensor:
    layout = x.layout.parent if isinstance(x.layout, gl.SliceLayout) and x.layout.dim == axis else None
    return Tensor(x.data.unsqueeze(axis), layout)


def _assert(condition: Any, message: str = "", **options: Any) -> None:
    if not _tensor_of(condition).all():
        raise error(f"assertion failed: {message}")


def _itself(x: Any, *claims: Any, **options: Any) -> Any:
    return x


# By name, with the module where the name alone would not do.
OPERATIONS: dict[str, Any] = {
    "mbarrier.init": machine.mbarrier_init, "mbarrier.wait": machine.mbarrier_wait,
    "mbarrier.arrive": machine.mbarrier_arrive, "mbarrier.expect": machine.mbarrier_arrive,
    "tma.async_copy_global_to_shared": machine.tma_load, "tma.async_copy_shared_to_global": machine.tma_store,
    "tma.store_wait": machine.store_wait,
    "tma_reduce_add": lambda desc, coord, src: machine.tma_store(desc, coord, src, add=True),
    "warpgroup_mma": _warpgroup_mma, "warpgroup_mma_wait": _warpgroup_mma_wait, "warpgroup_mma_init": _itself,
    "fence_async_shared": machine.fence_async_shared,
    "allocate_shared_memory": Shared.allocate, "inline_asm_elementwise": _inline_asm,
    "warp_specialize": lambda *args, **options: running().specialize(*args, **options),
    "barrier": lambda **options: running().switch(),
    "num_warps": lambda: running().current.warps, "num_ctas": lambda: 1,
    "program_id": lambda axis: Scalar(running().index[axis]), "num_programs": lambda axis: Scalar(running().grid[axis]),
    "range": _range, "static_range": range, "constexpr": _itself,
    "load": Pointer.load, "store": Pointer.store, "atomic_add": Pointer.atomic_add,
    "assume": _assert, "static_assert": _assert, "device_assert": _assert,
    "multiple_of": _itself, "max_contiguous": _itself, "max_constancy": _itself,
    "cdiv": lambda x, div: (x + div - 1) // div, "fma": lambda x, y, z: x * y + z,
    "minimum": _extreme("minimum"), "maximum": _extreme("maximum"), "where": _select,
    "arange": lambda start, end, layout=None: Tensor(torch.arange(start, end, dtype=torch.int32), layout),
    "full": _full, "zeros": lambda shape, dtype, layout=None: _full(shape, 0, dtype, layout),
    "zeros_like": lambda x: _full(x.shape, 0, x.dtype, x.layout), "expand_dims": _expand_dims,
    "convert_layout": lambda x, layout, assert_trivial=False: Tensor(x.data, layout),
    "cast": lambda x, dtype, bitcast=False: x.to(dtype, bitcast),
    "reshape": Tensor.reshape, "permute": Tensor.permute,
    "max": _reduction(_dropping_nan(torch.amax, -math.inf)), "min": _reduction(_dropping_nan(torch.amin, math.inf)),
    "sum": _reduction(torch.sum),
}  # fmt: skip
for _name in ("abs", "ceil", "cos", "erf", "exp", "exp2", "floor", "log", "log2", "rsqrt", "sin", "sqrt"):
    OPERATIONS[_name] = _elementwise(getattr(torch, _name))


# --- kernels


class _Namespace:
    """A module as a kernel sees it."""

    def __init__(self, module: ModuleType, translation: Translation):
        self._module, self._translation = module, translation

    def __getattr__(self, name: str) -> Any:
        value = self._translation.of(getattr(self._module, name))
        if value is NotImplemented:
            raise error(f"{self._module.__name__}.{name} is not emulated")
        setattr(self, name, value)
        return value


class Translation:
    """From what kernels refer to, to its emulation."""

    def __init__(self) -> None:
        self.functions: dict[int, Callable] = {}

    def of(self, value: Any) -> Any:
        home, name = getattr(value, "__module__", None) or "", getattr(value, "__name__", "")
        if home.startswith("triton.") or hasattr(value, "__triton_builtin__"):
            known = OPERATIONS.get(f"{home.split('.')[-1]}.{name}") or OPERATIONS.get(name)
            if known is not None:
                return known
        if isinstance(value, ModuleType):
            return _Namespace(value, self)
        if isinstance(value, gl.constexpr):
            return value.value
        if isinstance(value, JITFunction):
            return self.function(value)
        return value if isinstance(value, (ConstexprFunction, Dtype, type)) else NotImplemented

    def function(self, jit: JITFunction) -> Callable:
        """The Python function of a kernel, over a copy of its globals that means the emulation."""
        if id(jit) in self.functions:
            return self.functions[id(jit)]
        function = jit.fn
        # Python's own, for which the compiler has its own meaning
        names = {MARK: True, "range": _range, "min": OPERATIONS["minimum"], "max": OPERATIONS["maximum"]}
        for name in _global_names(function.__code__) & function.__globals__.keys():
            value = self.of(function.__globals__[name])
            if value is not NotImplemented:  # else Python says that the name is not defined, where it is used
                names[name] = value
        closure = tuple(CellType(self.of(cell.cell_contents)) for cell in function.__closure__ or ())
        defaults = tuple(_plain(value) for value in function.__defaults__ or ())
        copy = FunctionType(function.__code__, names, function.__name__, defaults, closure)
        constexprs = {parameter.name for parameter in jit.params if parameter.is_constexpr}

        def call(*args: Any, **kwargs: Any) -> Any:
            for name, value in [*zip(jit.arg_names, args, strict=False), *kwargs.items()]:
                if name in constexprs and isinstance(value, (_Arithmetic, Pointer)):
                    raise error(f"{name} of {function.__name__} is a constexpr, not {value!r}")
            return copy(*args, **kwargs)

        call.__name__ = function.__name__
        self.functions[id(jit)] = call
        return call


def _global_names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*(_global_names(constant) for constant in inner))


def _plain(value: Any) -> Any:
    return value.value if isinstance(value, gl.constexpr) else value


def _argument(value: Any) -> Any:
    """What a kernel sees of a run-time argument."""
    if isinstance(value, torch.Tensor):
        return Pointer(machine.storage(value), torch.tensor(value.storage_offset()))
    if isinstance(value, TensorDescriptor):
        return Descriptor(value)
    if isinstance(value, (tuple, list)):
        return tuple(_argument(item) for item in value)
    if isinstance(value, int):
        return Scalar(value, _integer_dtype(value))
    return Tensor(_tensor_of(value)) if isinstance(value, float) else value


def launch(kernel: JITFunction, grid: Any, *args: Any, seed: int = 0, num_warps: int = 4, **kwargs: Any) -> None:
    """kernel[grid](*args, **kwargs) on the CPU, one program after another. The seed decides who runs when."""
    given = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    given = {name: value for name, value in given.items() if name not in LAUNCH_OPTIONS}
    grid = grid(given) if callable(grid) else grid
    sizes = (*grid, 1, 1)[:3]
    constexprs = {parameter.name for parameter in kernel.params if parameter.is_constexpr}
    given = {name: _plain(value) if name in constexprs else _argument(value) for name, value in given.items()}
    function = Translation().function(kernel)
    generator = random.Random(seed)
    for z, y, x in itertools.product(*map(range, reversed(sizes))):
        Program((x, y, z), sizes, num_warps, generator).run(function, given)
