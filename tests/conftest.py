"""Shared by all tests."""

import os

import torch


def pytest_configure() -> None:
    # Under pytest-xdist the workers share the cores; two threads in each would wait for one another most of the time.
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(1)
