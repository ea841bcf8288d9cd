"""pyattn's CUDA C++ kernels, as text: NVRTC compiles them on the user's machine (`pyattn.backends.nvrtc`)."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def sources() -> dict[str, str]:
    """Every file that the kernels consist of, by the name it is included by; `kernels.cuh` includes the others."""
    files = [file for file in Path(__file__).parent.iterdir() if file.suffix in (".cuh", ".h")]
    return {file.name: file.read_text("utf-8") for file in sorted(files)}
