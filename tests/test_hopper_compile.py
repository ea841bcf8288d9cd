"""Every Hopper kernel compiles for sm_90a as it was meant to: nothing spilled, and exponentials beside the products."""

from __future__ import annotations

import multiprocessing
import re
import subprocess
import tempfile
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass
from functools import partial
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

import triton
from triton.compiler import make_backend
from triton.experimental.gluon._runtime import GluonASTSource
from triton_aot import CHIPS, Launch, record

from pyattn.backends.hopper import TESTED
from pyattn.backends.triton import release_shortcoming
from pyattn.triton_kernels import hopper_bwd
from pyattn.triton_kernels.hopper_bwd import hopper_bwd as backward
from pyattn.triton_kernels.hopper_fwd import hopper_fwd as forward
from pyattn.triton_kernels.launch import Call

if untested := release_shortcoming(TESTED):
    pytest.skip(f"the hopper backend {untested}", allow_module_level=True)

TARGET = CHIPS["sm_90"].target
REGISTERS = 64 * 1024  # of a multiprocessor

FULL: dict[str, Any] = {}
CAUSAL = {"right": 0}
WINDOW = {"left": 100, "right": 100, "lengths": True, "hk": 1}
PACKED = {"packed": 5, "right": 0, "left": 7}
CASES = {
    f"{dtype}-{d}-{name}".removeprefix("torch."): {"dtype": dtype, "d": d} | options
    for d in (64, 128, 256)
    for name, options in (("full", FULL), ("causal", CAUSAL), ("window", WINDOW), ("packed", PACKED))
    for dtype in (torch.bfloat16, torch.float16)
    if (dtype is torch.bfloat16 or (name == "causal" and d == 128)) and (name != "packed" or d < 256)
}


@dataclass(frozen=True)
class Code:
    """What the compiler made of a kernel."""

    kernel: str
    spilled: int  # bytes of stack and local memory per thread
    shared: int  # bytes
    warps: int
    registers: tuple[int, ...]  # per thread, that partitions ask for
    said: str  # by ptxas
    events: str  # products H, waits for them W0, W1, ..., and exponentials E, in the order of the code


def launches(
    d: int,
    dtype: torch.dtype = torch.bfloat16,
    b: int = 2,
    hk: int = 4,
    m: int = 1024,
    n: int = 1024,
    lengths: bool = False,
    packed: int = 0,
    **options: Any,
) -> list[Launch]:
    """Those of a forward and backward with 4 heads, on the meta device."""
    empty = partial(torch.empty, device="meta")
    b, h = 1 if packed else b, 4
    q, k = (empty(b, rows, heads, d, dtype=dtype).transpose(1, 2) for rows, heads in ((m, h), (n, hk)))
    lse = empty(b, h, m)
    if lengths:
        options["key_lengths"] = empty(b, dtype=torch.int32)
    if packed:
        options |= {name: empty(packed + 1, dtype=torch.int32) for name in ("cu_seqlens_q", "cu_seqlens_k")}
    call = Call(scale=0.1, offset=n - m, **options)

    def run() -> None:
        forward(q, k, k, q, lse, lse, lse, call)
        if d <= hopper_bwd.MAX_HEAD_DIM:
            backward(q, k, k, q, lse, lse, q, lse, q, k, k, call)

    return record(run, "hopper")


def compile_all(options: dict[str, Any], cache: str) -> list[Code]:
    triton.knobs.cache.dir = cache
    triton.knobs.compilation.always_compile = True  # ptxas says nothing about what is in the cache
    triton.knobs.nvidia.dump_ptxas_log = True
    return [compile_one(launch) for launch in launches(**options)]


def compile_one(launch: Launch) -> Code:
    bound, specialization, options = launch.bind(TARGET)
    options, signature, constants, attributes = launch.kernel._pack_args(
        make_backend(TARGET), launch.kwargs, bound, specialization, options
    )
    source = GluonASTSource(launch.kernel, signature, constants, attributes)
    with redirect_stdout(StringIO()) as said:
        compiled = triton.compile(source, target=TARGET, options=options.__dict__)
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage, sass = (
            subprocess.run([tools / tool, option, file.name], capture_output=True, text=True, check=True).stdout
            for tool, option in (("cuobjdump", "--dump-resource-usage"), ("nvdisasm", "-c"))
        )
    local = sum(int(re.search(rf"{word}:(\d+)", usage)[1]) for word in ("STACK", "LOCAL"))
    asked = re.findall(r"setmaxnreg\.(?:inc|dec)\.sync\.aligned\.u32\s+(\d+)", compiled.asm["ptx"])
    return Code(
        launch.kernel.__name__, local, compiled.metadata.shared, compiled.metadata.num_warps,
        tuple(map(int, asked)), said.getvalue(), _events(sass),
    )  # fmt: skip


def _events(sass: str) -> str:
    found = []
    for line in sass.splitlines():
        if "HGMMA" in line:
            found.append("H")
        elif wait := re.search(r"WARPGROUP\.DEPBAR\S* gsb0, 0x(\d)", line):
            found.append(f"W{wait[1]}")
        elif "MUFU.EX2" in line:
            found.append("E")
    return " ".join(found)


@pytest.fixture(scope="module")
def compiled(request: pytest.FixtureRequest) -> Any:
    cache = str(request.config.cache.mkdir("gluon"))
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        yield {name: pool.submit(compile_all, options, cache) for name, options in CASES.items()}


@pytest.mark.parametrize("case", CASES)
def test_nothing_is_spilled_and_everything_fits_the_chip(case: str, compiled: Any) -> None:
    for code in compiled[case].result():
        assert code.spilled == 0, code
        assert code.shared <= CHIPS["sm_90"].shared, code
        # Two computing warpgroups and a loading one, whatever the number of its warps.
        computing, loading = max(r for r in code.registers if r < 256), min(code.registers)
        assert 128 * (2 * computing + loading) <= REGISTERS, code
        assert not re.search(r"C75\d\d|warning|serialized", code.said), code.said


@pytest.mark.parametrize("case", CASES)
def test_exponentials_run_beside_products(case: str, compiled: Any) -> None:
    """Of every block after the first, all exponentials stand between the products' issue and the wait for the last."""
    for code in compiled[case].result():
        fine = {
            "_hopper_fwd_kernel": r"(?:H )+W1 (?:E )+W0",
            "_hopper_bwd_dq_kernel": r"(?:H )+W2 (?:E )+W1",
            "_hopper_bwd_dkdv_kernel": r"(?:H )+W1 (?:E )+(?:H )+W1",
        }[code.kernel]
        steps = len(re.findall(fine, code.events))
        per_step = max(len(run.split()) for run in re.findall(r"(?:E ?)+", code.events))
        # A step with a mask and one without, for each of two warpgroups; without a band the forward and dq have one.
        assert steps >= 2, code.events
        others = re.sub(fine, "", code.events).count("E")
        firsts = 0 if code.kernel == "_hopper_bwd_dkdv_kernel" else 2
        assert others <= firsts * per_step, code.events


@pytest.mark.parametrize("case", ["bfloat16-128-causal", "bfloat16-64-window", "bfloat16-64-packed"])
def test_new_lengths_and_batch_sizes_do_not_recompile(case: str) -> None:
    shapes = [(2, 1024, 1024), (1, 1, 1), (3, 16, 513), (2, 100, 37), (1, 1000, 70000)]
    keys = [{x.key(TARGET) for x in launches(**CASES[case] | {"b": b, "m": m, "n": n})} for b, m, n in shapes]
    assert len(keys[0]) == 3
    assert all(key == keys[0] for key in keys)
