"""The machine under gluon_emulator.py: what a Hopper multiprocessor does at the same time, and who waits for whom.

It knows torch's tensors and Python's numbers; the language is on top. Functions that the language has, too, take the
same arguments here.

Modelled: partitions as threads, of which one runs at a time, taking turns where they synchronise as the seed has it;
mbarriers with phases and bytes; named barriers; TMA, whose copies take effect at some later time, of any rank, out of
bounds and with addresses that wrap around at 64 bits; wgmma, which reads shared memory at issue or when waited for; the
fence between ordinary stores and what TMA and wgmma read; stores to what TMA and wgmma may still be reading.

Not modelled: barriers between the warps of one partition, swizzling, clusters, and programs that run at once. Overlap
in shared memory is judged by first and last byte.
"""

from __future__ import annotations

import itertools
import linecache
import math
import random
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

MAX_TRANSACTION_BYTES = 2**20 - 1  # of one phase of an mbarrier
MARK = "__gluon_emulated__"  # among the globals of a kernel that runs here


class GluonError(RuntimeError):
    """What hardware would not survive, or would give undefined results for."""


class Deadlock(GluonError):
    pass


class _Stopped(BaseException):
    """Ends the other partitions' threads once one has failed."""


def _kernel_frames() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if MARK in frame.f_globals:
            yield frame
        frame = frame.f_back


def where() -> str:
    """The kernel's lines that run now, innermost first."""
    frames = itertools.islice(_kernel_frames(), 3)
    return " < ".join(f"{frame.f_code.co_name}:{frame.f_lineno}" for frame in frames) or "the host"


def error(message: str) -> GluonError:
    return GluonError(f"{message}, at {where()}")


# --- partitions, of which one runs at a time


class Partition:
    def __init__(self, name: str, warps: int, weight: float):
        self.name, self.warps, self.weight = name, warps, weight
        self.token = threading.Semaphore(0)
        self.condition: Callable[[], bool] | None = None  # what it waits for, if it waits
        self.waits = ""
        self.done = False
        self.products: list[Product] = []  # not yet waited for, oldest first
        self.stores: list[Copy] = []

    def unfinished(self) -> list[Any]:
        return [*self.products, *self.stores]


class Program:
    """One program of the grid."""

    def __init__(self, index: tuple[int, ...], grid: tuple[int, ...], warps: int, generator: random.Random):
        self.index, self.grid, self.generator = index, grid, generator
        self.copy_weight = self._draw_weight()
        self.current = Partition("default partition", warps, self._draw_weight())
        self.partitions = [self.current]
        self.copies: list[Copy] = []  # that have yet to happen
        self.failure: BaseException | None = None
        self.barriers: dict[tuple[Allocation, int], Barrier] = {}
        self.named_barriers: dict[int, NamedBarrier] = {}
        self.dirty: list[tuple[View, Partition]] = []  # stores that no fence has followed

    def run(self, function: Callable, arguments: dict[str, Any]) -> None:
        """All of it. What it leaves behind that somebody should have waited for is an error."""
        global _program
        _program = self
        function(**arguments)
        left = [f"a wait for {user.name}" for p in self.partitions for user in p.unfinished()]
        left += [f"a wait for {copy.name}" for barrier in self.barriers.values() for copy in barrier.unseen]
        left += [f"balance of {barrier}" for barrier in self.named_barriers.values() if barrier.arrived]
        if left:
            raise GluonError(f"program {self.index} ends without {left[0]}")

    def _draw_weight(self) -> float:
        """How likely something is to happen next: very unlike, so that seeds differ in who is ahead of whom."""
        return 10 ** self.generator.uniform(-2, 0)

    def switch(self, condition: Callable[[], bool] | None = None, waits: str = "") -> None:
        """Lets others run, at least until `condition` holds. Everything that synchronises passes here."""
        me = self.current
        me.condition = condition
        me.waits = f"{waits}, at {where()}" if condition else ""
        chosen = self._choose()
        if chosen is not me:
            chosen.token.release()
            if me.done:
                return
            me.token.acquire()
            if self.failure is not None:
                raise _Stopped
        self.current = me
        me.condition = None

    def _choose(self) -> Partition:
        while True:
            ready = [p for p in self.partitions if not p.done and (p.condition is None or p.condition())]
            if not ready and not self.copies:
                waiting = "".join(f"\n  {p.name}: {p.waits}" for p in self.partitions if not p.done)
                raise Deadlock(f"everybody waits in program {self.index}:{waiting}")
            weights = [p.weight for p in ready] + [self.copy_weight] * len(self.copies)
            choices: list[Partition | Copy] = [*ready, *self.copies]
            chosen = self.generator.choices(choices, weights)[0]
            if isinstance(chosen, Partition):
                return chosen
            chosen.happen()

    def specialize(
        self, functions_and_args: list[tuple], worker_num_warps: list[int], worker_num_regs: Any = None
    ) -> Any:
        main, ((default, default_args), *workers) = self.current, functions_and_args
        main.name = f"partition 0 ({default.__name__})"
        if len(self.partitions) > 1:
            raise error("a second warp_specialize")
        threads = []
        for number, ((function, args), count) in enumerate(zip(workers, worker_num_warps, strict=True), 1):
            partition = Partition(f"partition {number} ({function.__name__})", count, self._draw_weight())
            self.partitions.append(partition)
            threads.append(threading.Thread(target=self._work, args=(partition, function, args), daemon=True))
        for thread in threads:
            thread.start()
        try:
            self.switch()
            result = default(*default_args)
            self.switch(lambda: all(p.done for p in self.partitions if p is not main), "waits for the workers to end")
            return result
        except BaseException as failure:
            self._stop(failure)
            raise self.failure or failure from None
        finally:
            for thread in threads:
                thread.join()

    @torch.no_grad()  # a thread does not inherit it, and an operator of torch may be running
    def _work(self, partition: Partition, function: Callable, args: tuple) -> None:
        partition.token.acquire()
        if self.failure is not None:
            return
        self.current = partition
        try:
            function(*args)
            partition.done = True
            self.switch()
        except BaseException as failure:
            self._stop(failure)

    def _stop(self, failure: BaseException) -> None:
        if self.failure is None:
            self.failure = failure
            for partition in self.partitions:
                partition.token.release()

    def require_clean(self, view: View) -> None:
        """TMA and wgmma see what ordinary stores wrote only after the writer's fence."""
        for stored, writer in self.dirty:
            if view.overlaps(stored):
                raise error(f"{view}, stored to by {writer.name} without a fence since, is used")

    def require_free(self, view: View) -> None:
        """Nobody may write where a copy writes, or where a copy or a wgmma not yet waited for reads."""
        for user in itertools.chain(self.copies, *(p.unfinished() for p in self.partitions)):
            if any(view.overlaps(used) for used in user.uses):
                raise error(f"{view} is written to while in use by {user.name}")


_program: Program


def running() -> Program:
    return _program


# --- memory


def storage(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's storage."""
    return tensor.as_strided((tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def undefined(dtype: torch.dtype) -> torch.Tensor:
    """What is read where nothing has been written."""
    return torch.tensor(math.nan if dtype.is_floating_point else 0x5A, dtype=dtype)


class Allocation:
    """Of shared memory."""

    def __init__(self, nbytes: int):
        frame = next(_kernel_frames())
        line = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        self.name = line.split("=")[0].strip()  # of the variable that it is assigned to
        self.bytes = torch.zeros(nbytes, dtype=torch.uint8)


class View:
    """Of an allocation: `offsets` says where in it each element lies, in elements."""

    def __init__(self, allocation: Allocation, offsets: torch.Tensor, dtype: torch.dtype):
        self.allocation, self.offsets = allocation, offsets
        self.flat = allocation.bytes.view(dtype)
        self.shape, self.rank = list(offsets.shape), offsets.dim()

    def __str__(self) -> str:
        first, stop = (x // self.flat.element_size() for x in self.span())
        return f"{self.allocation.name}[{first}:{stop}]"

    def span(self) -> tuple[int, int]:
        """First byte, and last plus one."""
        size = self.flat.element_size()
        return int(self.offsets.min()) * size, (int(self.offsets.max()) + 1) * size

    def overlaps(self, other: View) -> bool:
        if self.allocation is not other.allocation:
            return False
        (first, stop), (other_first, other_stop) = self.span(), other.span()
        return first < other_stop and other_first < stop

    def read(self) -> torch.Tensor:
        return self.flat[self.offsets]

    def write(self, data: torch.Tensor) -> None:
        """An ordinary store."""
        running().require_free(self)
        self.flat[self.offsets] = data
        running().dirty.append((self, running().current))
        running().switch()


def fence_async_shared(cluster: bool = False) -> None:
    program = running()
    program.dirty = [store for store in program.dirty if store[1] is not program.current]
    program.switch()


# --- barriers


@dataclass
class Barrier:
    """An mbarrier. A phase ends once `count` arrivals and all expected bytes have come."""

    name: str
    count: int
    missing: int
    phase: int = 0  # phases completed
    bytes: int = 0
    unseen: list[Copy] = field(default_factory=list)  # that signal it, without a wait since

    def __str__(self) -> str:
        return f"{self.name} (phase {self.phase}; {self.missing} of {self.count} arrivals, {self.bytes} bytes to come)"

    def arrive(self, count: int, nbytes: int = 0) -> None:
        """`count` arrive, and `nbytes` more are to come; fewer, if some have."""
        if count > self.missing or not 0 <= self.bytes + nbytes <= MAX_TRANSACTION_BYTES:
            raise error(f"{count} arrivals and {nbytes} bytes are too many for {self}")
        self.missing -= count
        self.bytes += nbytes
        if self.missing == 0 and self.bytes == 0:
            self.phase += 1
            self.missing = self.count


def _barrier(view: View) -> Barrier:
    barrier = running().barriers.get((view.allocation, int(view.offsets)))
    if barrier is None:
        raise error(f"{view} is used before mbarrier.init")
    return barrier


def mbarrier_init(barrier: View, count: int) -> None:
    place = int(barrier.offsets)
    if (barrier.allocation, place) in running().barriers:
        raise error(f"{barrier} is initialised again")
    name = f"{barrier.allocation.name}[{place}]"
    running().barriers[barrier.allocation, place] = Barrier(name, int(count), int(count))


def mbarrier_arrive(barrier: View, bytes_per_cta: int = 0, *, count: int = 1, pred: Any = True) -> None:
    """Or expect: the hardware's instruction for that arrives, too."""
    if pred:
        _barrier(barrier).arrive(int(count), int(bytes_per_cta))
    running().switch()


def mbarrier_wait(barrier: View, phase: int, pred: Any = True, deps: tuple = ()) -> None:
    found, parity = _barrier(barrier), int(phase)
    if parity not in (0, 1):
        raise error(f"a phase is 0 or 1, not {parity}")
    if pred:
        running().switch(lambda: found.phase % 2 != parity, f"waits for phase {parity} of {found}")
        found.unseen = [load for load in found.unseen if load in running().copies]


@dataclass
class NamedBarrier:
    number: int
    threads: int
    arrived: int = 0
    rounds: int = 0

    def __str__(self) -> str:
        return f"named barrier {self.number} ({self.arrived} of {self.threads} threads arrived)"


def bar(number: int, threads: int, wait: bool) -> None:
    """PTX's bar.sync, or bar.arrive without a wait."""
    barrier = running().named_barriers.setdefault(number, NamedBarrier(number, threads))
    rounds, warps = barrier.rounds, running().current.warps
    barrier.arrived += 32 * warps
    if not 0 < number < 16 or threads != barrier.threads or barrier.arrived > threads:
        raise error(f"{warps} warps cannot come to {barrier} as one of {threads}")
    if barrier.arrived == threads:
        barrier.arrived = 0
        barrier.rounds += 1
    running().switch((lambda: barrier.rounds > rounds) if wait else None, f"waits at {barrier}")


# --- TMA


class TensorMap:
    """Where the blocks of a tensor lie in its storage. Strides count elements."""

    def __init__(
        self, base: torch.Tensor, extents: list[int], strides: list[int], block_shape: list[int], padding: float
    ):
        self.flat, self.first, self.size = storage(base), base.storage_offset(), base.element_size()
        self.extents, self.steps = extents, [stride * self.size for stride in strides]
        self.block_shape, self.padding = block_shape, padding
        self.nbytes = math.prod(block_shape) * self.size
        steps_fit = all(0 < step < 2**40 and step % 16 == 0 for step in self.steps[:-1])
        if not steps_fit or base.data_ptr() % 16 or not all(0 < extent <= 2**32 for extent in extents):
            raise error(
                f"no descriptor has strides of {self.steps} bytes, extents {extents} and base {base.data_ptr():#x}"
            )

    def box(self, coordinates: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where a block's elements lie in the storage, and which of them are in bounds."""
        at = [int(start) for start in coordinates]
        element = torch.zeros((), dtype=torch.int64)
        inside = torch.ones((), dtype=torch.bool)
        for start, length, extent, step in zip(at, self.block_shape, self.extents, self.steps, strict=True):
            index = torch.arange(start, start + length)
            inside = inside[..., None] & (index >= 0) & (index < extent)
            # in bytes, because torch's integers wrap around at 2**64, as addresses do
            element = element[..., None] + index * step
        element = element.div(self.size, rounding_mode="floor") + self.first
        bad = element[inside & ((element < 0) | (element >= self.flat.numel()))]
        if bad.numel():
            raise error(f"TMA at {at} touches element {int(bad[0])} of a tensor of {self.flat.numel()}")
        return element, inside


class Copy:
    """Between shared and global memory; into shared if there is a barrier to tell."""

    def __init__(self, tensor: TensorMap, coord: list[int], view: View, barrier: Barrier | None, add: bool = False):
        if view.shape != tensor.block_shape or view.flat.dtype != tensor.flat.dtype:
            raise error(f"{view}, {view.shape} of {view.flat.dtype}, is no {tensor.block_shape} of {tensor.flat.dtype}")
        running().require_clean(view)
        self.tensor, self.view, self.barrier, self.add = tensor, view, barrier, add
        self.uses = [view]
        self.element, self.inside = tensor.box(coord)
        self.name = f"the {'store from' if barrier is None else 'load of'} {view} at {where()}"
        running().copies.append(self)

    def happen(self) -> None:
        running().copies.remove(self)
        flat, view = self.tensor.flat, self.view
        if self.barrier is None:
            flat.index_put_((self.element[self.inside],), view.read()[self.inside], accumulate=self.add)
            return
        found = flat[self.element.where(self.inside, 0)]
        view.flat[view.offsets] = found.where(self.inside, torch.tensor(self.tensor.padding, dtype=flat.dtype))
        self.barrier.arrive(0, -self.tensor.nbytes)


def tma_load(tensor: TensorMap, coord: list[int], barrier: View, result: View, pred: Any = True) -> None:
    if pred:
        running().require_free(result)
        announced = _barrier(barrier)
        announced.unseen.append(Copy(tensor, coord, result, announced))
        result.flat[result.offsets] = undefined(result.flat.dtype)
    running().switch()


def tma_store(tensor: TensorMap, coord: list[int], src: View, add: bool = False) -> None:
    running().current.stores.append(Copy(tensor, coord, src, None, add))
    running().switch()


def store_wait(pendings: int) -> None:
    stores = running().current.stores
    while len(stores) > pendings:
        store = stores.pop(0)
        if store in running().copies:
            store.happen()
    running().switch()


# --- wgmma


class Product:
    """A wgmma in flight. It adds to a tensor, or to an earlier product of the same partition, or to nothing."""

    def __init__(self, a: torch.Tensor | View, b: View, addend: torch.Tensor | Product | None):
        self.operands, self.addend, self.name = [a, b], addend, f"the wgmma at {where()}"
        self.uses = [operand for operand in self.operands if isinstance(operand, View)]
        self.value: torch.Tensor | None = None  # once finished
        program = running()
        for view in self.uses:
            program.require_clean(view)
        program.current.products.append(self)
        if program.generator.random() < 0.5:
            self._read()

    def _read(self) -> None:
        self.operands = [x.read() if isinstance(x, View) else x for x in self.operands]

    def finish(self) -> None:
        self._read()
        a, b = (operand.float() for operand in self.operands)
        # Products finish in order, so an earlier one has its value.
        addend = self.addend.value if isinstance(self.addend, Product) else self.addend
        self.value = a @ b if addend is None else a @ b + addend


def wgmma_wait(pending: int) -> None:
    """Until no more than `pending` products of this partition are in flight."""
    products = running().current.products
    while len(products) > pending:
        products.pop(0).finish()
    running().switch()
