"""Attention of states to those before them, against the loop that defines it."""

import pytest
import torch
from torch.testing import assert_close

from pyattn.nn.earlier import attend_earlier


@pytest.mark.parametrize("implementation", ["pyattn", "torch"])
@pytest.mark.parametrize(("before", "m"), [(0, 1), (0, 5), (3, 1), (3, 5)])
def test_each_state_attends_to_those_before_it_and_not_to_itself(implementation, before, m):
    states = torch.randn(2, before + m, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, m, 4, dtype=torch.float64)
    for row, i in ((row, i) for row in range(2) for i in range(m) if before + i > 0):
        earlier, asks = states[row, : before + i], states[row, before + i]
        expected[row, i] = (earlier @ asks / 2).softmax(0) @ earlier  # 2 is the root of the size
    assert_close(attend_earlier(implementation, states[:, before:], states[:, :before]), expected)
