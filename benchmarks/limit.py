"""The machine's own limit: the multiply-add rate that the compiled kernels' instructions reach in registers."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from pyattn.backends import cpu

# What NVIDIA's data sheets state of dense products of bfloat16, by what a device's name holds; the first that fits.
_TENSOR_CORES = {"H200": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "A100": 312e12}


class Limit:
    """GFLOP/s by dtype. A try takes 20 ms, and a busy machine lowers it: it is repeated over a run, the best counts."""

    def __init__(self, dtypes: Iterable[str]) -> None:
        """dtypes: names of those to measure, such as "float32"; without a compiled extension there is no limit."""
        self.gflops: dict[str, float] = dict.fromkeys(dtypes, 0.0) if cpu.isas() else {}
        self.measure()

    def measure(self) -> None:
        """One more try for each dtype."""
        for dtype, best in self.gflops.items():
            self.gflops[dtype] = max(best, multiply_add_gflops(dtype))

    def __str__(self) -> str:
        if not self.gflops:
            return "machine limit: not measured, as pyattn's compiled extension is missing"
        rates = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in self.gflops.items())
        return f"machine limit: {rates}, multiply-adds measured in registers in this run"


def multiply_add_gflops(dtype: str) -> float:
    """10**9 operations per second of a loop of multiply-adds on all of torch's threads, best of five short tries."""
    return cpu._module().multiply_add_rate(cpu.isas()[0], dtype, torch.get_num_threads()) / 1e9


def peak(device: str, dtype: str) -> float | None:
    """Operations per second that the device can reach at most: as measured on a CPU, as stated of a GPU; or None."""
    if device == "cpu":
        return multiply_add_gflops(dtype) * 1e9 if cpu.isas() else None
    name = torch.cuda.get_device_name()
    return next((rate for part, rate in _TENSOR_CORES.items() if part in name and dtype == "bfloat16"), None)
