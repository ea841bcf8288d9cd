"""Several processes that train one model together, started by torchrun. Without it there is one, and nothing to do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

_TIMEOUT = timedelta(minutes=30)  # the first process may read and tokenize for a while


@contextmanager
def group(device: str) -> Iterator[str]:
    """Joins the processes that torchrun started, if it did, for the time of the block. Yields this process's device."""
    if not distributed.is_torchelastic_launched():
        yield device
        return
    if device == "cuda":
        torch.cuda.set_device(distributed.get_node_local_rank())
    distributed.init_process_group("nccl" if device == "cuda" else "gloo", timeout=_TIMEOUT)
    try:
        yield device
    finally:
        distributed.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return distributed.get_rank() if distributed.is_initialized() else 0


def world() -> int:
    """How many processes there are."""
    return distributed.get_world_size() if distributed.is_initialized() else 1


@contextmanager
def first_process_first() -> Iterator[None]:
    """The block runs in the first process and then in the others, which find there what it has stored. Where it fails,
    torchrun ends the others."""
    if rank() > 0:
        distributed.barrier()
    yield
    if world() > 1 and rank() == 0:
        distributed.barrier()


def summed(values: Tensor) -> Tensor:
    """The sum of every process's tensor, the same bits in all of them."""
    if world() > 1:
        distributed.all_reduce(values)
    return values


def gathered(values: Tensor) -> list[Tensor]:
    """Every process's tensor, by rank."""
    if world() == 1:
        return [values]
    values = values.contiguous()
    found = [torch.empty_like(values) for _ in range(world())]
    distributed.all_gather(found, values)
    return found


def anywhere(flag: bool, device: str) -> bool:
    """Whether any process says so: all of them then do the same."""
    return flag if world() == 1 else bool(summed(torch.tensor(int(flag), device=device)))


def replicated(model: nn.Module) -> nn.Module:
    """The model whose backward averages the gradients over the processes."""
    return DistributedDataParallel(model) if world() > 1 else model


def original(model: nn.Module) -> Any:
    """The model that `replicated` got."""
    return model.module if isinstance(model, DistributedDataParallel) else model


def unsynced(model: nn.Module) -> AbstractContextManager[None]:
    """Inside it, gradients only add up here: for all batches of a step but the last."""
    return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()
