"""The time of Python before a GPU's kernels start: every call is timed on both backends, with nothing behind them."""

from __future__ import annotations

import platform
import shutil

import pytest

pytest.importorskip("triton")

from benchmarks import host

pytestmark = pytest.mark.skipif(
    platform.system() != "Linux" or shutil.which("g++") is None, reason="the driver's stub needs Linux and g++"
)


def test_host_benchmark_prints_the_time_of_every_call(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(host, "_ROUNDS", 1)
    monkeypatch.setattr(host, "_CALLS", 1)
    host.main()
    printed = capsys.readouterr().out
    assert all(call in printed for call in host.CALLS)
    assert "cuda, backward" in printed
