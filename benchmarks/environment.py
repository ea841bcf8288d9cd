"""What a figure was measured on and with."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import pyattn


def device_name(device: str) -> str:
    """The GPU's name, or the CPU's."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    if info.exists() and (match := re.search(r"^model name\s*:\s*(.+)$", info.read_text(), re.MULTILINE)):
        return match[1].strip()
    return platform.processor() or platform.machine()


def slug(name: str) -> str:
    """A device's name as a folder: NVIDIA H200 is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    found = {"pyattn": pyattn.__version__, "python": platform.python_version(), "torch": torch.__version__}
    with suppress(metadata.PackageNotFoundError):  # not every torch comes with it
        found["triton"] = metadata.version("triton")
    return found


def commit(folder: Path) -> str | None:
    """The commit that `folder` is at, with "+changes" when files differ from it; None outside git."""
    git = shutil.which("git")
    if git is None:
        return None

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([git, "-C", str(folder), *arguments], capture_output=True, text=True, check=False)

    head = run("rev-parse", "--short=12", "HEAD")
    if head.returncode != 0:
        return None
    return head.stdout.strip() + ("+changes" if run("status", "--porcelain").stdout.strip() else "")


def describe(device: str, folder: Path) -> dict[str, Any]:
    """The fields that every line of results carries."""
    return {
        "device": device_name(device),
        "device_type": device,
        "threads": torch.get_num_threads(),
        "versions": versions(),
        "commit": commit(folder),
        "platform": sys.platform,
    }


def title(about: dict[str, Any], subject: str = "Attention") -> str:
    """`describe`'s fields as two lines above a picture of `subject`."""
    threads = f", {about['threads']} threads" if about["device_type"] == "cpu" else ""
    return f"{subject} on {about['device']}{threads}\n" + ", ".join(f"{k} {v}" for k, v in about["versions"].items())
