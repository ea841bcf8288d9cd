"""The search for launch sizes: what is tried and what is kept, by a fake GPU's times, and rows that can be pasted."""

import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_benchmarks import FEATURES, Wrong

from pyattn.benchmarks import command, environment, search, trial, tune
from pyattn.benchmarks.cases import make_inputs
from pyattn.benchmarks.peers import Pyattn
from pyattn.benchmarks.search import Cell, Found
from pyattn.triton_kernels import config
from pyattn.triton_kernels.config import Config

CELL = Cell("forward", "hopper", 16, 128, "light")
CELLS = [
    cell
    for bits in (16, 32)
    for cell in search.cells("hopper", bits, tuple(search.KERNELS), search.HEAD_DIMS)
]  # fmt: skip


class FakeTrial:
    """As fast as `milliseconds` says, 9 ms elsewhere; slow to compile and wrong where it is told to be."""

    def __init__(self, milliseconds: dict[Config, float], slow: Sequence[Config] = (), wrong: Sequence[Config] = ()):
        self.milliseconds, self.slow, self.wrong = milliseconds, slow, wrong
        self.tried: list[Config] = []

    def compile(self, chunk):
        self.tried += chunk
        return [sizes not in self.slow for sizes in chunk]

    def problem(self, sizes):
        return "wrong" if sizes in self.wrong else None

    def time(self, chunk, rounds):
        return {sizes: self.milliseconds.get(sizes, 9.0) for sizes in chunk}


def found_by(fake: FakeTrial, seconds: float = 60.0) -> Found:
    counted: list[int] = []
    found = search.search(CELL, fake, time.monotonic() + seconds, 5, counted.append)
    assert sum(counted) == len(search.candidates(CELL))
    return found


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_calls_of_a_cell_take_its_row(cell: Cell, monkeypatch):
    """By the launcher's own rule, not by this test's."""
    pytest.importorskip("triton")
    from pyattn.backends.triton import call_of
    from pyattn.spec import AttentionSpec
    from pyattn.triton_kernels import decode, launch

    seen = []

    def stop(x, numbers, backend):
        seen.append((x, call_of(AttentionSpec.of(x, numbers), x)))
        raise InterruptedError

    monkeypatch.setattr("pyattn.ops.attention", stop)
    for case in cell.cases(small=True):
        x = make_inputs(case, "cpu")
        with pytest.raises(InterruptedError):
            Pyattn().prepare(case, x)(*x.leaves.values())
    assert seen
    for x, call in seen:
        assert decode.suits(x.q, x.k, call) == (cell.kernel == "decode")
        assert cell.bits == 32 or launch._load(x.q, x.k, x.v, call) == cell.load
        assert launch.padded_head_dim(x.q.shape[3]) == cell.head_dim


@pytest.mark.parametrize("cell", CELLS, ids=str)
def test_candidates_begin_with_the_present_row_and_are_found_under_the_key(cell: Cell, monkeypatch):
    found = search.candidates(cell)
    assert found[0] == cell.present and len(set(found)) == len(found) > 20
    monkeypatch.setitem(config.TABLE, cell.key, {256: Config(1, 2, 3, 4)})
    assert cell.present == Config(1, 2, 3, 4)


def test_fastest_that_is_right_and_compiles_is_found():
    first, second, third, *_ = others = search.candidates(CELL)[1:]
    fake = FakeTrial({CELL.present: 2.0, first: 0.5, second: 0.6, third: 1.0}, slow=[first], wrong=[second, others[-1]])
    found = found_by(fake)
    assert found.best == third and found.dropped == {"slow to compile": 1, "wrong": 2}
    assert found.remark == f"1.000 ms, 2.00 times as fast as {tuple(CELL.present)}"
    assert "; 2 wrong" in str(found)


def test_present_row_stays_unless_it_is_beaten_by_more_than_noise():
    other = search.candidates(CELL)[-1]
    assert found_by(FakeTrial({CELL.present: 1.0, other: 0.995})).best == CELL.present
    assert found_by(FakeTrial({CELL.present: 1.0, other: 0.98})).best == other
    assert found_by(FakeTrial({other: 1.0}, wrong=[CELL.present])).best == other


def test_without_time_the_nearest_are_tried_and_the_rest_counted():
    fake = FakeTrial({})
    found = found_by(fake, seconds=-1.0)
    assert fake.tried == search.candidates(CELL)[:5] and found.dropped["not tried"] == len(search.candidates(CELL)) - 5


def test_nothing_that_runs_leaves_the_present_row():
    found = found_by(FakeTrial({}, wrong=search.candidates(CELL)))
    assert found.best == CELL.present and "none could be measured" in found.remark


def test_rows_are_python_and_take_the_place_of_the_present_ones(monkeypatch):
    found = [
        Found(cell, {Config(64, 32, 8, place % 4 + 1): 0.5, cell.present: 1.0}, Counter())
        for place, cell in enumerate(CELLS)
        if cell.head_dim != 256
    ]
    rows = eval(f"{{{search.rows_text(found, 'NVIDIA H200, 2026-11-20')}\n}}", {"Config": Config})
    kept = {cell: cell.present for cell in CELLS if cell.head_dim == 256}
    monkeypatch.setattr(config, "TABLE", config.TABLE | rows)
    assert all(one.cell.present == one.best for one in found)
    assert all(cell.present == sizes for cell, sizes in kept.items())


def test_substituted_sizes_are_those_of_one_kernel_and_end_with_the_block():
    arguments, sizes = ("hopper", 16, 64, "light"), Config(16, 16, 1, 1)
    before = config.choose("dkdv", *arguments)
    with pytest.raises(ZeroDivisionError), trial.substituted("dq", sizes):
        assert config.choose("dq", *arguments) == sizes and config.choose("dkdv", *arguments) == before
        raise ZeroDivisionError
    assert config.choose("dq", *arguments) != sizes


@pytest.fixture
def on_cpu(monkeypatch) -> None:
    """The trial with the reference and small calls; its processes are this one."""
    monkeypatch.setattr(trial, "_DEVICE", "cpu")
    monkeypatch.setattr(trial, "_BACKEND", "reference")
    monkeypatch.setattr(trial, "_TIMING_SECONDS", 0.0)
    monkeypatch.setattr(Cell, "cases", lambda self, small=False: [FEATURES["window"], FEATURES["documents"]])


class FakePool:
    def apply_async(self, function, arguments):
        assert function(*arguments) is None
        return SimpleNamespace(wait=lambda seconds: None, ready=lambda: True)


@pytest.mark.parametrize("kernel", ["forward", "dkdv"])
def test_trial_runs_holds_and_times_each_candidate(kernel: str, monkeypatch, on_cpu):
    used = []

    class Asking(Pyattn):
        def prepare(self, case, x):
            right = super().prepare(case, x)
            return lambda *leaves: (used.append(config.choose(kernel, "hopper", 16, 64, "light")), right(*leaves))[1]

    monkeypatch.setattr(trial, "Pyattn", Asking)
    one, sizes = trial.GpuTrial(CELL._replace(kernel=kernel), FakePool()), Config(1, 2, 3, 4)
    assert sizes not in used
    assert one.compile([sizes]) == [True] and one.problem(sizes) is None
    assert set(one.time([sizes], 3)) == {sizes} and sizes in used


def test_trial_drops_what_raises_and_what_is_wrong(monkeypatch, on_cpu):
    class Failing(Pyattn):
        def prepare(self, case, x):
            def attention(*leaves):
                raise MemoryError

            return attention

    for peer, problem in ((Wrong, "wrong"), (Failing, "MemoryError")):
        monkeypatch.setattr(trial, "Pyattn", peer)
        assert trial.GpuTrial(CELL, FakePool()).problem(CELL.present) == problem


def test_tune_prints_a_line_as_each_row_is_found_and_all_rows_at_the_end(monkeypatch, capsys):
    def fake_trial(cell, pool):
        if cell.head_dim == 64:
            raise RuntimeError("no launch sizes fit")
        return FakeTrial({search.candidates(cell)[3]: 0.25, cell.present: 0.5})

    monkeypatch.setattr(trial, "GpuTrial", fake_trial)
    monkeypatch.setattr(tune, "get_context", lambda method: SimpleNamespace(Pool=nullcontext))
    monkeypatch.setattr(config, "architecture_of", lambda device: "hopper")
    monkeypatch.setattr(environment, "device_name", lambda device: "NVIDIA H200")
    assert tune.tune(16, ["dq"], [128, 64], time.monotonic() + 100) == 1
    printed = capsys.readouterr().out
    assert "dq, 16 bits, d 64, light: RuntimeError: no launch sizes fit" in printed
    assert "dq, 16 bits, d 128, heavy: (" in printed and '    ("dq", "hopper heavy", 16): {' in printed
    assert "# NVIDIA H200, 2" in printed and "0.250 ms, 2.00 times as fast as (" in printed
    assert tune.tune(16, ["dq"], [128], time.monotonic()) == 1
    assert capsys.readouterr().out.count("no time was left") == 3


def test_tune_without_gpu_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert tune.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "benchmarks.tune: " in printed.err


def test_tune_without_installed_kernels_runs_again_with_its_options_and_the_time_that_is_left(tmp_path, monkeypatch):
    runs: list[list[str]] = []

    def run(line, **options):
        runs.append(line)
        return subprocess.CompletedProcess(line, 0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command, "__package__", "benchmarks")
    assert tune.main(["--kernel", "dq", "--seconds", "100", "--checkout", str(tmp_path)]) == 0
    asked = {"bits": None}
    monkeypatch.setattr(command, "is_installed", lambda: True)
    monkeypatch.setattr(
        tune, "tune", lambda bits, kernels, dims, end: asked.update(bits=bits, kernels=kernels, end=end)
    )
    start = time.monotonic()
    tune.main(runs[1][3:])
    assert asked["bits"] == 16 and asked["kernels"] == ["dq"] and 90 < asked["end"] - start < 101
