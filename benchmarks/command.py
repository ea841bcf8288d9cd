"""What the commands for a GPU share: they look for one, and install pyattn for the moment where it is not."""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch


def parser(name: str, description: str, seconds: float) -> argparse.ArgumentParser:
    """The options that they have in common: --checkout and --seconds."""
    made = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    made.add_argument("--checkout", type=Path, default=Path(__file__).resolve().parents[1],
                      help="the checkout of pyattn (default: %(default)s)")  # fmt: skip
    made.add_argument("--seconds", type=float, default=seconds, help="time for all of it (default: %(default)s)")
    return made


def lacks_gpu(name: str) -> bool:
    """Whether there is none, which it then says."""
    if torch.cuda.is_available():
        return False
    print(f"benchmarks.{name}: torch {torch.__version__} finds no GPU, so nothing was run", file=sys.stderr)
    return True


def is_installed() -> bool:
    """Whether the Triton kernels can be imported; in a bare checkout they are not inside the package."""
    return importlib.util.find_spec("pyattn.triton_kernels") is not None


def run_installed(name: str, checkout: Path, end: float, options: Sequence[str] = ()) -> int:
    """The command again, out of a throw-away install of the checkout; its exit code.

    Args:
        end: by time.monotonic(); what is left until then is its --seconds.
        options: those that it was given; a later one counts.
    """
    if __package__ != "benchmarks":
        print(f"benchmarks.{name}: this install of pyattn has no triton_kernels: install it anew", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="pyattn-") as site:
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-index"]
        install = subprocess.run(
            [*pip, "--no-build-isolation", "--no-deps", "--target", site, str(checkout)], check=False
        )
        if install.returncode != 0:
            print(f"benchmarks.{name}: pyattn could not be installed from the checkout (above)", file=sys.stderr)
            return 1
        again = [sys.executable, "-m", f"pyattn.benchmarks.{name}", *options, "--checkout", str(checkout)]
        again += ["--seconds", f"{end - time.monotonic():.0f}"]
        # Elsewhere than in the checkout, whose own folder pyattn/ would be imported in place of the installed one.
        return subprocess.run(again, cwd=site, check=False).returncode
