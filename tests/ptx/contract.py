"""Calls of pyattn's contract in the machine, and what the rule of `pyattn.testing` says of their results."""

from __future__ import annotations

import importlib
import pkgutil
import zlib

import torch
from test_kvcache import OPTIONS, cache, held_against_definition
from triton.runtime.jit import JITFunction

import pyattn.triton_kernels
from ptx.branches import Entered
from ptx.cases import Row
from ptx.launch import Device, pyattn_on
from ptx.program import Schedule
from pyattn import core, testing
from pyattn.registry import BACKENDS


def excesses(row: Row, entered: Entered | None = None, schedule: Schedule | None = None) -> list[testing.Result]:
    """The results of a row that are further off than allowed; entered: what is told which lines ran.

    Each row has a schedule of its own, the same in every run, unless one is given.
    """
    schedule = schedule or Schedule(seed=zlib.crc32(row.id.encode()), count=entered is not None)
    with pyattn_on(row.chip, schedule=schedule) as device:
        if reason := testing.refusal(row.backend, row.case, row.dtype):
            raise ValueError(f"{row.id} is refused: {reason}")
        results = testing.check_case(row.backend, row.case, row.dtype)
    _tell(entered, device)
    return [result for result in results if not result.excess <= 1]


def paged_excesses(
    chip: str,
    m: int,
    page_size: int | None,
    options: str,
    dtype: torch.dtype = torch.bfloat16,
    entered: Entered | None = None,
) -> list[testing.Result]:
    """`excesses` of a decoding step over a cache of keys and values, in pages or not."""
    with pyattn_on(chip, schedule=Schedule(seed=m, count=entered is not None)) as device:
        x, numbers = core.prepare(**cache(m, page_size, dtype), **OPTIONS[options], cached=True)
        results = held_against_definition(BACKENDS["triton"], x, numbers)
    _tell(entered, device)
    return [result for result in results if not result.excess <= 1]


def _tell(entered: Entered | None, device: Device) -> None:
    if entered is not None:
        entered.add(device.launches)


def jit_kernels(gluon: bool) -> set[str]:
    """The names of the package's kernels, Gluon's or Triton's."""
    package = pyattn.triton_kernels
    modules = [importlib.import_module(f"{package.__name__}.{m.name}") for m in pkgutil.iter_modules(package.__path__)]
    functions = [f for module in modules for f in vars(module).values() if isinstance(f, JITFunction)]
    return {f.__name__ for f in functions if f.is_gluon() == gluon and f.__name__.endswith("_kernel")}
