"""What must hold of an installed wheel, checked by the Python of the environment that it was installed into.

`make wheel` and tests/test_packaging.py run it there: `python -I tests/wheel_check.py`.
"""

from __future__ import annotations

import platform
import sys
from importlib import import_module
from pathlib import Path

import torch

import pyattn
from pyattn import verification

ISAS = ("amx", "avx512_bf16", "avx512", "avx2", "generic")


def check_place() -> None:
    assert Path(sys.prefix) in Path(pyattn.__file__).parents, f"{pyattn.__file__} is not of {sys.prefix}"
    for name in ("triton_kernels", "benchmarks", "cli"):
        assert Path(pyattn.__file__).with_name(name).joinpath("__init__.py").exists(), name


def check_kernels() -> None:
    """Those of every instruction set are there, whichever of them this machine can run, and they compute attention."""
    assert pyattn.list_backends()["cpu"] == "ready", pyattn.list_backends()
    module = Path(import_module("pyattn._C").__file__).read_bytes()
    missing = [isa for isa in ISAS if b"\0" + isa.encode() + b"\0" not in module]
    assert not missing or platform.machine() != "x86_64", f"compiled without {missing}"
    for case in pyattn.testing.CASES:
        verdict = verification.verify("cpu", case, torch.float32)
        assert not verdict.failures, (case.id, verdict.failures)


def check_threads() -> None:
    """The kernels run on torch's threads: a second OpenMP runtime would have threads of its own on the same cores."""
    maps = Path("/proc/self/maps")
    if maps.exists():
        runtimes = {line.split()[-1] for line in maps.read_text().splitlines() if "omp" in line.rpartition("/")[2]}
        assert len(runtimes) == 1 and Path(torch.__file__).parent in Path(runtimes.pop()).parents, runtimes


if __name__ == "__main__":
    check_place()
    check_kernels()
    check_threads()
    print(
        f"pyattn {pyattn.__version__}, Python {platform.python_version()}, torch {torch.__version__}: the wheel holds"
    )
