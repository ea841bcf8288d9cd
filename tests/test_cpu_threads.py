"""The compiled CPU kernels and threads: the same bits on any number, calls from several at once, forks, the GIL."""

from __future__ import annotations

import multiprocessing
import subprocess
import sys
import threading
import time

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import pyattn
from pyattn import core, testing
from pyattn.testing import Case

# Each has at least 3 million operations, so that 3 threads are worth waking.
CASES = (
    Case("many", b=2, h=4, hk=2, m=130, n=150, d=40, dv=24, window=(90, 20), segments=2, mask="b1mn", bias="1hmn",
         softcap=3.0, sinks=True, dropout_p=0.2),
    Case("two-passes", b=1, h=1, hk=1, m=200, n=200, causal=True),
    Case("one-pass", b=2, h=6, hk=6, m=200, n=200, causal=True),
    Case("split-keys", b=1, h=2, hk=1, m=1, n=5000, d=128, dv=128),
    Case("split-keys-few-queries", b=1, h=2, hk=1, m=40, n=2000, key_lengths=(1900,), sinks=True, dropout_p=0.1),
    Case("packed", packed=((150, 170), (1, 300), (0, 5), (90, 20)), h=4, hk=2, causal=True, sinks=True, layout="bmhd"),
    Case("additive-two-passes", additive=True, b=1, h=1, hk=1, m=200, n=200, d=40, causal=True),
    Case("additive-one-pass", additive=True, b=2, h=6, hk=3, m=200, n=200, causal=True),
    Case("additive-packed", additive=True, packed=((150, 170), (1, 300), (0, 5), (90, 20)), h=4, hk=2, sinks=True),
    Case("packed-split-keys", packed=((1, 3000), (1, 1500)), h=4, hk=1, d=64, dv=64, causal=True, layout="bmhd"),
)  # fmt: skip
SECONDS = 60  # after which a child that has not answered hangs; it takes well under one

needs_fork = pytest.mark.skipif(
    "fork" not in multiprocessing.get_all_start_methods(), reason="this system does not fork"
)


@pytest.fixture
def threads():
    """Sets the number of threads; the old one comes back afterwards."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture
def qkv(threads) -> tuple[Tensor, Tensor, Tensor]:
    """A call of 2 million operations per head and more, after OpenMP has started a team of two for it."""
    threads(2)
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 8, 128, 64, generator=generator) for _ in range(3))
    pyattn.attention(q, k, v, backend="cpu")
    return q, k, v


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.id)
def test_results_are_the_same_bits_on_any_number_of_threads(case, dtype, threads):
    call = testing.make_inputs(case, dtype)
    threads(1)
    expected = testing.evaluate_backend(call, "cpu")
    for count in (2, 3, 2):
        threads(count)
        _assert_same_bits(testing.evaluate_backend(call, "cpu"), expected)


@pytest.mark.parametrize("case", [CASES[0], CASES[3], CASES[5]], ids=lambda case: case.id)
def test_calls_from_several_python_threads_do_not_disturb_each_other(case):
    calls = [testing.make_inputs(case, torch.float32, seed=seed) for seed in range(4)]
    expected = [testing.evaluate_backend(call, "cpu") for call in calls]
    found: list = [None] * len(calls)

    def work(place: int) -> None:
        # Not evaluate_backend: it switches a setting of the whole process.
        torch.set_num_threads(2)
        found[place] = [
            testing.evaluate(calls[place], lambda **arguments: core.attend(**arguments, backend="cpu"))
            for _ in range(3)
        ]

    workers = [threading.Thread(target=work, args=(place,)) for place in range(len(calls))]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for repeats, reference in zip(found, expected, strict=True):
        for result in repeats:
            _assert_same_bits(result, reference)


@needs_fork
def test_forked_child_of_a_parent_that_used_openmp_gets_the_same_bits(qkv):
    context = multiprocessing.get_context("fork")
    mine, theirs = context.Pipe()
    child = context.Process(target=_attend_and_answer, args=(qkv, theirs), daemon=True)
    child.start()
    answered = mine.poll(SECONDS)
    answer = mine.recv_bytes() if answered else b""
    if not answered:
        child.kill()
    child.join()
    assert answered, f"the child has not answered in {SECONDS} s"
    assert child.exitcode == 0
    assert answer == pyattn.attention(*qkv, backend="cpu").numpy().tobytes()


def _attend_and_answer(qkv: tuple[Tensor, Tensor, Tensor], answers) -> None:
    # Nothing else here may be parallel: torch's own operators hang in a child of a parent that used OpenMP.
    assert torch.get_num_threads() == 2
    answers.send_bytes(pyattn.attention(*qkv, backend="cpu").numpy().tobytes())


class Attended(Dataset):
    """Items that take an attention call to make."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        self.q, self.k, self.v = q, k, v

    def __len__(self) -> int:
        return 6

    def __getitem__(self, place: int) -> Tensor:
        # One column, because torch copies what a worker returns on several threads when it is large, and hangs there.
        return pyattn.attention(self.q[:, place:], self.k[:, place:], self.v[:, place:], backend="cpu")[..., 0].clone()


@needs_fork
def test_data_loader_with_forked_workers_gets_the_same_bits(qkv):
    dataset = Attended(*qkv)
    # DataLoader gives its workers one thread each, where no team could hang.
    loader = DataLoader(
        dataset, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=SECONDS,
        worker_init_fn=_use_two_threads,
    )  # fmt: skip
    found = list(loader)
    assert len(found) == len(dataset)
    for place, item in enumerate(found):
        assert torch.equal(item, dataset[place])


def _use_two_threads(worker: int) -> None:
    torch.set_num_threads(2)


def test_python_threads_run_during_a_long_call():
    q = torch.randn(1, 1, 1024, 64)
    start = end = 0.0
    ticks: list[float] = []
    while end - start < 0.2:
        q = q.repeat(1, 2, 1, 1)
        start, end, ticks = _ticks_during(q)
    # The outer fifths are not counted: there the call may not have begun, or be over.
    margin = (end - start) / 5
    assert any(start + margin < tick < end - margin for tick in ticks), "the call kept the GIL"


def _ticks_during(q: Tensor) -> tuple[float, float, list[float]]:
    """When a call began and ended, and when another thread ran Python code meanwhile; all in seconds."""
    ticks: list[float] = []
    over = threading.Event()

    def tick() -> None:
        while not over.is_set():
            ticks.append(time.perf_counter())
            time.sleep(0.002)

    other = threading.Thread(target=tick)
    other.start()
    start = time.perf_counter()
    pyattn.attention(q, q, q, backend="cpu")
    end = time.perf_counter()
    over.set()
    other.join()
    return start, end, ticks


def _assert_same_bits(actual: dict, expected: dict) -> None:
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


CHANGES = """
import sys, threading, time, torch, pyattn
kind, end = sys.argv[1], time.monotonic() + 1.5
q, k, v = (torch.randn(700, 2, 16) for _ in range(3))
cache = torch.randn(64, 2, 16, 16)
numbers = {
    "cu_seqlens": [torch.tensor([0, 100, 700], dtype=torch.int32), [0, 0, 700], [0, 700, 700], [0, 350, 700]],
    "key_lengths": [torch.tensor([900, 10], dtype=torch.int32), [0, 1024], [1024, 0], [5, 600]],
    "block_table": [torch.arange(64, dtype=torch.int32).view(2, 32), [63] * 64, [0] * 64, list(range(63, -1, -1))],
}[kind]
given, values = numbers[0], [torch.tensor(value, dtype=torch.int32).view_as(numbers[0]) for value in numbers[1:]]

def change():
    while time.monotonic() < end:
        for value in values:
            given.copy_(value)

def call():
    if kind == "cu_seqlens":
        return pyattn.attention_varlen(q, k, v, given, given, backend="cpu")
    lengths = given if kind == "key_lengths" else torch.tensor([500, 512], dtype=torch.int32)
    if kind == "key_lengths":
        return pyattn.attention(q[None, :10].transpose(1, 2).expand(2, 2, 10, 16), cache[:2].repeat(1, 1, 64, 1),
                                cache[:2].repeat(1, 1, 64, 1), key_lengths=lengths, backend="cpu")
    return pyattn.attention_kvcache(torch.randn(2, 1, 2, 16).transpose(1, 2), cache, cache, lengths,
                                    block_table=given, backend="cpu")

thread = threading.Thread(target=change)
thread.start()
calls = 0
while time.monotonic() < end:
    assert call().isfinite().all()
    calls += 1
thread.join()
print(calls)
"""


@pytest.mark.parametrize("kind", ["cu_seqlens", "key_lengths", "block_table"])
def test_lengths_that_change_during_a_call_read_nothing_astray(kind):
    """A scheduler prepares the next step in place while this one runs. Every value that it writes is a sound one."""
    process = subprocess.run([sys.executable, "-c", CHANGES, kind], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert int(process.stdout) > 0
