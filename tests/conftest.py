"""Shared by all tests."""

import os
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings

import pyattn

# The same examples in every run, so that a red test is a change of the code. "long" is for `--hypothesis-profile`.
settings.register_profile("default", derandomize=True, max_examples=500, deadline=None)
settings.register_profile(
    "long", settings.get_profile("default"), max_examples=20_000, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("default")


def pytest_configure() -> None:
    # Under pytest-xdist the workers share the cores; two threads in each would wait for one another most of the time.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For small models, which are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch", "pyattn-reference", "pyattn-cpu"])
def attention(request: pytest.FixtureRequest) -> Iterator[str]:
    """A value for the attention of a model's configuration, with pyattn's backend chosen around the test."""
    name, _, backend = request.param.partition("-")
    with pyattn.use_backend(backend) if backend else nullcontext():
        yield name


@pytest.fixture
def home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty home folder; returns where compiled kernels are kept in it."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    return tmp_path / ".cache" / "pyattn" / "kernels"
