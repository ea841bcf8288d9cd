"""Runs triton_cases.py: the kernels' arithmetic on the CPU, without a GPU.

Triton decides at a kernel's decoration whether it is interpreted, so this needs a process of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton")
numpy = pytest.importorskip("numpy")

# Triton 3.6's interpreter converts one-element arrays to int, which numpy 2.4 no longer does.
_BROKEN_PAIR = triton.__version__.startswith("3.6.") and tuple(map(int, numpy.__version__.split(".")[:2])) >= (2, 4)


@pytest.mark.skipif(_BROKEN_PAIR, reason="Triton 3.6's interpreter does not work with numpy 2.4 or newer")
def test_kernels_in_the_interpreter_agree_with_the_definition():
    cases = Path(__file__).with_name("triton_cases.py")
    command = [sys.executable, "-m", "pytest", str(cases), "-q", "--tb=short", "-p", "no:cacheprovider", "-n", "2"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-2000:]
