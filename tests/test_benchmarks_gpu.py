"""The GPU benchmark, run on the CPU as far as that goes: its cases, its floors and its files."""

import json
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console
from test_benchmarks import FEATURES, TINY

import pyattn
from pyattn.benchmarks import command, environment, floors, gpu, growth, memory, suite
from pyattn.benchmarks.cases import DIRECTIONS, Case
from pyattn.benchmarks.peers import CPU_PEERS, Flex

TINY_GROUPS = {
    "decode": ((FEATURES["gqa"],), (replace(FEATURES["gqa"], b=1),)),
    "growth": tuple((replace(TINY, m=m, n=m),) for m in (20, 40)),
    "hopper": ((TINY,),),
    "features": tuple((FEATURES[name],) for name in ("window", "documents", "bias of all", "mask", "bias")),
}


@pytest.fixture
def uncompiled(monkeypatch) -> None:
    """FlexAttention as plain torch, which is a forward only."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    monkeypatch.setattr("torch.nn.attention.flex_attention._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)


def timed(case: Case, direction, peer: str, ms: float | None, peak_bytes: int | None = None) -> suite.Row:
    timing = None if ms is None else suite.Timing(ms, ms, ms, 3)
    return suite.Row(case, direction, peer, "ok" if timing else "not run", "", timing, peak_bytes)


def test_gpu_without_gpu_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main([]) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1 and "no GPU" in printed.err


def test_gpu_without_installed_kernels_installs_offline_and_runs_itself_elsewhere(tmp_path: Path, monkeypatch):
    (tmp_path / "tests").mkdir()
    for tests in gpu.CONTRACT:
        (tmp_path / tests).touch()
    runs: list[tuple[list[str], dict]] = []

    def run(command, **options):
        runs.append((command, options))
        return subprocess.CompletedProcess(command, 0 if "pip" in command else 7)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(command.subprocess, "run", run)
    monkeypatch.setattr(command, "__package__", "benchmarks")
    assert gpu.main(["--checkout", str(tmp_path), "--seconds", "100"]) == 7
    (pip, _), (again, options) = runs
    assert {"--no-index", "--no-build-isolation", "--no-deps", str(tmp_path)} <= set(pip)
    assert pip[pip.index("--target") + 1] == options["cwd"] != str(tmp_path)
    assert again[1:3] == ["-m", "pyattn.benchmarks.gpu"] and again[again.index("--checkout") + 1] == str(tmp_path)


@pytest.mark.parametrize(
    ("body", "seconds", "passes"),
    [("pass", 60, True), ("assert False", 60, False), ("import time; time.sleep(60)", 3, False)],
    ids=["passing", "failing", "unfinished"],
)
def test_gpu_contract_passes_only_when_suite_does_in_time(tmp_path: Path, body: str, seconds: float, passes: bool):
    (tmp_path / "tests").mkdir()
    for tests in gpu.CONTRACT:
        (tmp_path / tests).write_text(f"def test_case():\n    {body}\n")
    start = time.monotonic()
    assert gpu.run_contract(tmp_path, seconds) is passes
    assert time.monotonic() - start < seconds + 5


def test_gpu_benchmark_leaves_files_in_folder_of_device(tmp_path: Path, monkeypatch, capsys, uncompiled):
    """The whole GPU path but the GPU: its cases, its clock and uncompiled FlexAttention are the CPU's."""
    hurried = suite.Effort(clock_seconds=0.0, min_rounds=3)
    subjects = [
        replace(
            subject,
            groups=TINY_GROUPS[subject.name],
            effort=replace(subject.effort, clock_seconds=0.0, min_rounds=3),
        )
        for subject in gpu.SUBJECTS
    ]
    monkeypatch.setattr(gpu, "_EFFORT", hurried)
    monkeypatch.setattr(gpu, "SUBJECTS", subjects)
    monkeypatch.setattr(gpu, "GPU_CASES", (TINY, Case(1, 2, 64, 64, 16, torch.bfloat16, False)))
    monkeypatch.setattr(gpu, "GPU_PEERS", CPU_PEERS[:3])
    monkeypatch.setattr(gpu, "BASELINES", ("SDPA fused", "SDPA math"))
    monkeypatch.setattr(memory, "weighed", lambda call, device: (call(), 1 << 20))  # the CPU's takes a moment each time
    monkeypatch.setattr(environment, "device_name", lambda device: "NVIDIA H200")
    with pyattn.use_backend("reference"):
        rows = gpu.run_benchmark(tmp_path, "cpu", time.monotonic() + 400)
    assert gpu.is_well(rows)
    folder = tmp_path / "benchmarks" / "results" / "nvidia-h200"
    lines = [json.loads(line) for line in (folder / "gpu.jsonl").read_text().splitlines()]
    assert len(lines) == len(rows) == 12 + 6 + 4 + 6 + 30
    assert list(dict.fromkeys(line["chapter"] for line in lines)) == ["attention", *TINY_GROUPS]
    reasons = {line["reason"] for line in lines if not line["peer"].startswith("pyattn ")}
    assert reasons - {"", "has no backward on the CPU"} <= {
        line["reason"] for line in lines if line["chapter"] == "hopper"
    }
    assert set(lines[0]["speedup"]) == {"SDPA fused", "SDPA math"}
    assert all((folder / name).stat().st_size > 10_000 for name in ("gpu.png", "gpu-more.png"))
    printed = capsys.readouterr().out
    for words in ("NVIDIA H200", "ratio to", "of copy", "growth", "documents 3", "x FlexAttention", "floors"):
        assert words in printed


def test_gpu_time_is_shared_by_need_and_all_of_it_given():
    end = time.monotonic() + 100
    assert gpu._share(end, 30, gpu.SUBJECTS[:1]) == pytest.approx(100 * 30 / (30 + gpu.SUBJECTS[0].seconds), rel=0.01)
    assert gpu._share(end, 30, ()) == pytest.approx(100, rel=0.01)


def test_floors_are_held_against_the_worst_figure(capsys):
    short, long = (Case(1, 16, m, m, 128, torch.bfloat16, True) for m in (1024, 4096))
    window = replace(long, left=9)
    cache = Case(1, 32, 1, 4096, 128, torch.bfloat16, False, group=4)
    found = floors.floors({
        "attention": [
            timed(case, direction, peer, ms)
            for case, flash in ((short, 1.2), (long, 1.5))
            for direction in DIRECTIONS
            for peer, ms in (("pyattn", 1.0), ("SDPA flash", flash), ("SDPA cuDNN", 0.5 if case is short else None))
        ],
        "hopper": [timed(long, "forward", peer, ms) for peer, ms in (("pyattn hopper", 1.0), ("SDPA cuDNN", 0.9))],
        "features": [timed(window, "forward", "pyattn", 1.0), timed(window, "forward", "FlexAttention", None)],
        "decode": [timed(cache, "forward", peer, ms) for peer, ms in (("pyattn", 1.0), ("copy", 1.8))],
        "growth": [timed(case, "forward + backward", "pyattn", 1.0, n) for case, n in ((short, 100), (long, 220))],
    })  # fmt: skip
    assert [(floor.verdict, floor.worst and floor.worst[1]) for floor in found] == [
        ("met", 1.2), ("not met", 0.5), ("met", 1.2), ("not met", 0.9), *[("not measured", None)] * 5,
        ("met", pytest.approx(0.9)), ("not met", 2.2),
    ]  # fmt: skip
    Console(width=150).print(floors.floor_table(found))
    printed = capsys.readouterr().out
    assert "b1 h16 1024 d128 causal forward" in printed and "1 of 2" in printed and "0 of 1" in printed


@pytest.mark.parametrize("subject", gpu.SUBJECTS, ids=lambda subject: subject.name)
def test_gpu_cases_are_told_apart_and_fit_their_features(subject):
    cases = [case for group in subject.groups for case in group]
    assert len({case.id for case in cases}) == len(cases)
    assert all(sum(case.documents) == case.m == case.n for case in cases if case.documents)


def test_growth_is_the_ratio_to_the_length_before():
    cases = [replace(TINY, m=m, n=m) for m in (10, 20, 40)]
    rows = [
        timed(case, "forward + backward", "pyattn", 1.0, n) for case, n in zip(cases, (100, 200, None), strict=True)
    ]
    assert growth.growths(rows) == [2.0, None]


@pytest.mark.parametrize("name", ["window", "documents", "mask", "bias", "bias of all"])
def test_flex_attention_is_asked_for_the_same(name: str, uncompiled):
    rows = suite.measure_group([FEATURES[name]], [Flex()], "cpu", 0, suite.Effort(("forward",), min_rounds=1))
    assert [(row.status, row.reason) for row in rows] == [("ok", "")]


def test_gpu_run_is_well_when_pyattn_ran_and_was_right():
    never, wrong = (suite.Row(TINY, "forward", "pyattn", status) for status in ("not run", "failed"))
    right, peer = timed(TINY, "forward", "pyattn", 1.0), suite.Row(TINY, "forward", "FlexAttention", "failed")
    assert [gpu.is_well(rows) for rows in ([never], [right, wrong], [right, peer])] == [False, False, True]
