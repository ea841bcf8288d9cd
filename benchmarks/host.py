"""What a call costs Python before a GPU has anything to do, without a GPU: `python -m benchmarks.host`.

Tensors lie on the CPU in a GPU's place. `triton` is timed up to its kernels' `run`, which is Triton's own; `cuda` up to
and with the driver, which is a stub (tests/stub_driver.cpp) that does nothing. Times are of the process, not of the
clock on the wall, and the best of many rounds that take turns: what the code takes, whatever else the machine does.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from rich.console import Console
from rich.table import Table
from triton.runtime.jit import JITFunction

from pyattn import core
from pyattn.backends import Backend, nvrtc
from pyattn.backends.cuda import CudaBackend, Gpu
from pyattn.backends.cuda_driver import Driver
from pyattn.backends.triton import TritonBackend
from pyattn.spec import AttentionSpec, Inputs

STUB = Path(__file__).parents[1] / "tests" / "stub_driver.cpp"
_ROUNDS, _CALLS = 30, 300
_LENGTHS = torch.tensor([100, 128], dtype=torch.int32)
# Options of a call, by what the table calls it. b 2, h 8, d 64, float16.
CALLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"causal": True},
    "a step of decoding, 2 key/value heads": {"m": 1, "n": 512, "hk": 2},
    "lengths, ALiBi": {"key_lengths": _LENGTHS, "alibi_slopes": torch.ones(8)},
    "sinks": {"sinks": torch.ones(8)},
    "mask, bias summed over the batch": {
        "mask": torch.ones(2, 1, 128, 128, dtype=torch.bool),
        "bias": torch.zeros(1, 8, 128, 128, dtype=torch.float16),
    },
}


class _Stubbed(CudaBackend):
    def gpu_of(self, q: torch.Tensor) -> Gpu:
        return Gpu(0, 80, 108)


@contextmanager
def backends() -> Iterator[dict[str, Backend]]:
    """Both, with nothing behind them."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        stub = Path(folder, "libcuda_stub.so")
        subprocess.run(["g++", "-std=c++17", "-O2", "-shared", "-fPIC", STUB, "-o", stub], check=True)
        driver = Driver(str(stub))
        driver.library.stub_reset()
        driver.library.stub_be_idle()
        put = stack.enter_context
        put(mock.patch.object(nvrtc, "driver", lambda: driver))
        put(mock.patch.object(nvrtc, "machine_code", lambda *_: b"\x7fELF"))
        put(mock.patch.object(nvrtc, "_loaded", {}))
        put(mock.patch.object(torch.cuda, "get_device_capability", lambda _: (8, 0)))
        put(mock.patch.object(torch.cuda, "current_device", lambda: 0))
        put(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True))
        put(mock.patch.object(JITFunction, "run", lambda *_, **__: None))
        yield {"triton": TritonBackend(), "cuda": _Stubbed()}


def calls(name: str, backend: Backend) -> dict[str, Callable[[], object]]:
    """The forward and the backward of one of CALLS."""
    options = dict(CALLS[name])
    m, n, hk = options.pop("m", 128), options.pop("n", 128), options.pop("hk", 8)
    q, k, v = (torch.randn(2, heads, rows, 64).half() for heads, rows in ((8, m), (hk, n), (hk, n)))
    x, numbers = core.prepare(q, k, v, **options)
    spec = AttentionSpec.of(x, numbers)
    y = backend.forward(spec, x)
    return {
        "forward": partial(backend.forward, spec, x),
        "backward": partial(backend.backward, spec, x, y, torch.randn(y.out.shape).half(), None, _has_bias(x)),
    }


def _has_bias(x: Inputs) -> bool:
    return x.bias is not None


def microseconds(timed: dict[Any, Callable[[], object]]) -> dict[Any, float]:
    """The best of many rounds, which the calls take in turns."""
    best = dict.fromkeys(timed, float("inf"))
    for _ in range(_ROUNDS):
        for name, call in timed.items():
            start = time.process_time()
            for _ in range(_CALLS):
                call()
            best[name] = min(best[name], 1e6 * (time.process_time() - start) / _CALLS)
    return best


def main() -> None:
    torch.set_num_threads(1)
    table = Table("call", title=f"microseconds of Python, {torch.__version__}, best of {_ROUNDS} rounds")
    with backends() as found:
        columns = [(name, direction) for direction in ("forward", "backward") for name in found]
        for name, direction in columns:
            table.add_column(f"{name}, {direction}", justify="right")
        for call in CALLS:
            timed = {(name, d): run for name, backend in found.items() for d, run in calls(call, backend).items()}
            best = microseconds(timed)
            table.add_row(call, *(f"{best[column]:.1f}" for column in columns))
    Console(width=None if sys.stdout.isatty() else 120).print(table)


if __name__ == "__main__":
    main()
