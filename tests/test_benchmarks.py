"""The benchmark: it times only what is right, counts what it says it counts, and leaves its files."""

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

import pyattn
from pyattn.benchmarks import chart, cpu, decode, gate, gpu, limit, memory, report, suite, window
from pyattn.benchmarks.cases import CPU_CASES, DIRECTIONS, GPU_CASES, Case, make_inputs
from pyattn.benchmarks.gate import Gate
from pyattn.benchmarks.peers import CPU_PEERS, Copy, Peer, Pyattn, Sdpa
from pyattn.benchmarks.subject import Subject
from pyattn.benchmarks.timing import interleaved

TINY = Case(2, 3, 40, 40, 16, torch.float32, True)
# A call for each thing a case may have beyond its shape.
FEATURES = {
    "gqa": Case(2, 6, 1, 50, 16, torch.float32, False, group=3),
    "dv": Case(1, 2, 30, 30, 16, torch.float32, False, value_dim=24),
    "window": Case(1, 3, 60, 60, 16, torch.float32, True, left=9),
    "row windows": Case(2, 3, 60, 50, 16, torch.float32, False, row_window=7),
    "dropout": Case(1, 2, 40, 40, 16, torch.float32, False, dropout_p=0.3),
    "bias": Case(1, 2, 40, 50, 16, torch.float32, False, bias="bh1n"),
    "bias of all": Case(3, 2, 40, 40, 16, torch.float32, False, bias="1hmn"),
    "mask": Case(3, 2, 40, 40, 16, torch.float32, False, mask=True),
    "documents": Case(3, 2, 57, 57, 16, torch.float32, True, documents=(30, 7, 20)),
    "packed": Case(1, 2, 57, 57, 16, torch.float32, True, lengths=(30, 7, 20)),
}
TINY_GROUPS = {
    "fallback": ((FEATURES["dropout"],), (FEATURES["dv"],), (FEATURES["bias"],)),
    "decode": ((FEATURES["gqa"],),),
    "small call": ((Case(1, 2, 8, 8, 8, torch.float32, False),),),
    "window": (
        (
            replace(FEATURES["window"], causal=False, left=None),
            FEATURES["window"],
            replace(FEATURES["window"], causal=False, left=None, row_window=5),
        ),
    ),
    "threads": ((TINY,), (FEATURES["packed"],)),
}
FIELDS = {
    "chapter", "case", "b", "h", "hk", "m", "n", "d", "dv", "dtype", "causal", "left", "row_window", "dropout_p",
    "bias", "mask", "lengths", "documents", "direction", "peer", "status", "reason", "p20_ms", "p50_ms", "p80_ms",
    "rounds", "gflops", "limit_gflops", "peak_bytes", "speedup", "device", "device_type", "threads", "versions",
    "commit", "platform",
}  # fmt: skip


class Altered(Peer):
    """torch's attention with its result changed: a kernel that is wrong."""

    def __init__(self, change: Callable[[torch.Tensor], torch.Tensor], name: str = "altered") -> None:
        super().__init__(name)
        self.change = change

    def prepare(self, case, x):
        right = CPU_PEERS[2].prepare(case, x)
        return lambda q, k, v: self.change(right(q, k, v))


def tiny_subjects(monkeypatch: pytest.MonkeyPatch, peers: tuple[Peer, ...] = ()) -> tuple[Subject, ...]:
    """Those of the CPU run on tiny cases with next to no time on the clock; `peers` take the place of their first.

    The whole run has time enough on any machine, however busy.
    """
    monkeypatch.setattr(cpu, "QUICK_SECONDS", 60.0)
    hurried = {"clock_seconds": 0.0, "min_rounds": 3}
    subjects = tuple(
        replace(
            subject,
            quick_groups=TINY_GROUPS[subject.name],
            quick_seconds=60.0,
            peers=(*peers, *subject.peers[len(peers) :]),
            effort=replace(subject.effort, **hurried, repeats=min(subject.effort.repeats, 2)),
        )
        for subject in cpu.SUBJECTS
    )
    monkeypatch.setattr(cpu, "_EFFORT", replace(cpu._EFFORT, **hurried))
    monkeypatch.setattr(cpu, "SUBJECTS", subjects)
    return subjects


class Wrong(Pyattn):
    """Ours, wrong by a thousandth, and so are its gradients."""

    def prepare(self, case, x):
        right = super().prepare(case, x)
        return lambda *leaves: right(*leaves) * 1.001


def first_head_only(out: torch.Tensor) -> torch.Tensor:
    rest = out.new_full(out.shape, torch.nan)
    rest[0, 0], rest[-1, -1] = out[0, 0], out[-1, -1]
    return rest


def explode(out: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no kernel\nfor this")


WRONG = {
    "zeros": torch.zeros_like,
    "slightly scaled": lambda out: out * 1.001,
    "rolled over the queries": lambda out: out.roll(1, 2),
    "NaN between the checked heads": first_head_only,
}


def test_flops_of_full_forward_are_two_matrix_products():
    case = Case(2, 3, 5, 7, 11, torch.float32, False)
    assert case.flops("forward") == 2 * (2 * 3) * 2 * (5 * 7 * 11)
    assert case.flops("backward") == 2.5 * case.flops("forward")


def test_flops_of_causal_are_half():
    full, causal = (Case(1, 1, 8, 8, 4, torch.float32, causal) for causal in (False, True))
    assert causal.flops("forward") == full.flops("forward") / 2


def test_flops_count_visible_pairs_and_both_head_sizes():
    case = FEATURES["window"]
    assert case.flops("forward") == 2 * 3 * 32 * sum(min(i + 1, 10) for i in range(60))
    assert FEATURES["row windows"].flops("forward") == 2 * 2 * 3 * 32 * 60 * 7
    assert FEATURES["packed"].flops("forward") == 2 * 2 * 32 * (30**2 + 7**2 + 20**2) / 2
    assert FEATURES["documents"].flops("forward") == 3 * FEATURES["packed"].flops("forward")
    assert FEATURES["dv"].flops("forward + backward") == 3.5 * 2 * 2 * (16 + 24) * 30**2


@pytest.mark.parametrize("cases", [CPU_CASES, GPU_CASES], ids=["cpu", "gpu"])
def test_cases_that_are_causal_mean_the_same_to_every_peer(cases):
    assert all(case.m == case.n for case in cases if case.causal)
    assert len({case.id for case in cases}) == len(cases)


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG.keys())
def test_wrong_kernel_is_reported_and_not_timed(change):
    with pyattn.use_backend("reference"):
        rows = suite.measure_group([TINY], [Pyattn(), Altered(change)], "cpu", seconds=0)
    forward = {row.peer: row for row in rows if row.direction == "forward"}
    assert forward["altered"].status == "failed"
    assert "out" in forward["altered"].reason
    assert forward["altered"].timing is None and forward["altered"].gflops is None
    assert forward["pyattn"].status == "ok" and forward["pyattn"].timing.rounds >= 3


@pytest.mark.parametrize("case", FEATURES.values(), ids=FEATURES.keys())
def test_every_feature_passes_when_right_and_fails_when_wrong(case):
    effort = suite.Effort((*DIRECTIONS, "forward + backward"))
    with pyattn.use_backend("reference"):
        rows = suite.measure_group([case], [Pyattn(), Wrong("wrong")], "cpu", 0, effort)
    assert [row.status for row in rows] == ["ok", "failed"] * 3
    assert [row.reason.split()[0] for row in rows[1::2]] == ["out", "d_q", "out"]


@pytest.mark.parametrize("name", ["gqa", "dv", "window", "row windows", "bias", "bias of all", "mask", "documents"])
def test_sdpa_is_held_against_the_same_definition(name: str):
    rows = suite.measure_group([FEATURES[name]], [Sdpa("SDPA")], "cpu", seconds=0)
    assert [row.status for row in rows] == ["ok", "ok"]


def test_forward_alone_is_judged_on_the_last_queries(monkeypatch):
    monkeypatch.setattr(gate, "LAST_QUERIES", 8)
    seen, sample = [], gate._Sample
    monkeypatch.setattr(gate, "_Sample", lambda cut, call: seen.append(call) or sample(cut, call))
    with pyattn.use_backend("reference"):
        rows = suite.measure_group(
            [FEATURES["window"]], [Pyattn(), Wrong("wrong")], "cpu", 0, suite.Effort(("forward",))
        )
    assert [row.status for row in rows] == ["ok", "failed"]
    assert [call.tensors["q"].shape[2] for call in seen] == [8]


def test_very_long_sequence_is_judged_on_out_and_d_q_of_the_last_queries(monkeypatch):
    monkeypatch.setattr(gate, "LAST_QUERIES", 8)
    monkeypatch.setattr(gate, "ALL_QUERIES_UNTIL", 39)
    x = make_inputs(TINY, "cpu")
    out, *grads = right = suite.bound(CPU_PEERS[2], TINY, "forward + backward", x)()
    gate_of_case = Gate(TINY, x, ("forward + backward",))
    assert gate_of_case.problem("forward + backward", right) is None
    assert "d_q is wrong" in gate_of_case.problem("forward + backward", (out, grads[0] * 1.001, *grads[1:]))
    assert "d_v has values" in gate_of_case.problem("forward + backward", (out, *grads[:2], grads[2] * torch.nan))


def test_gate_computes_the_allowance_for_rounding_only_where_it_is_needed():
    case = Case(1, 1, 20, 30, 8, torch.float32, False)
    gate_of_case = Gate(case, make_inputs(case, "cpu"))
    sample = gate_of_case._samples[0]
    plain = sample._baseline["out"]
    assert gate_of_case.problem("forward", (plain,)) is None and "_oracle" not in vars(sample)
    sample._baseline = sample._expected  # as if plain PyTorch made no error
    with torch.no_grad():
        assert gate_of_case.problem("forward", (plain,)) is None and "_oracle" in vars(sample)
        assert "out is wrong" in gate_of_case.problem("forward", (plain * 1.0001,))


def test_dropout_mask_of_its_own_is_only_looked_over_for_nan():
    class Broken(Sdpa):
        def prepare(self, case, x):
            right = super().prepare(case, x)
            return lambda q, k, v: right(q, k, v) * torch.nan

    rows = suite.measure_group([FEATURES["dropout"]], [Sdpa("SDPA"), Broken("broken")], "cpu", seconds=0)
    assert [row.status for row in rows] == ["ok", "failed"] * 2
    assert "not finite" in rows[1].reason


def test_peer_that_takes_no_such_case_says_so():
    rows = suite.measure_group([TINY], [Sdpa("SDPA", takes=lambda case: False)], "cpu", seconds=0)
    assert {row.reason for row in rows} == {"left out of this case to save time"}


def test_threads_of_peer_are_its_own_and_given_back():
    during, before = [], torch.get_num_threads()

    class Spying(Pyattn):
        def prepare(self, case, x):
            right = super().prepare(case, x)
            return lambda *leaves: (during.append(torch.get_num_threads()), right(*leaves))[1]

    with pyattn.use_backend("reference"):
        rows = suite.measure_group([TINY], [Spying(threads=before + 1)], "cpu", 0, suite.Effort(("forward",)))
    assert set(during) == {before + 1} and torch.get_num_threads() == before
    assert [row.threads for row in rows] == [before + 1]
    exploding = Altered(explode, "exploding")
    exploding.threads = before + 1
    suite.measure_group([TINY], [exploding], "cpu", seconds=0)
    assert torch.get_num_threads() == before


def test_wrong_gradient_is_reported_though_forward_is_right():
    class Halved(torch.autograd.Function):
        @staticmethod
        def forward(ctx, out):
            return out.clone()

        @staticmethod
        def backward(ctx, d_out):
            return d_out * 0.999

    rows = suite.measure_group([TINY], [Altered(Halved.apply)], "cpu", seconds=0)
    assert [row.status for row in rows] == ["ok", "failed"]
    assert "d_q" in rows[1].reason


def test_error_of_peer_is_its_reason_and_of_ours_a_failure():
    peer, ours = Altered(explode, "peer"), Altered(explode, "ours")
    ours.ours = True
    rows = suite.measure_group([TINY], [peer, ours], "cpu", seconds=0)
    assert [row.status for row in rows] == ["not run", "failed"] * 2
    assert rows[0].reason == "RuntimeError: no kernel for this"


def test_call_that_no_backend_takes_is_not_run_with_every_reason(monkeypatch):
    for name in ("cpu", "triton"):
        monkeypatch.setattr(type(pyattn.registry.BACKENDS[name]), "unavailable", lambda self: "not built here")
    row = suite.measure_group([TINY], [Pyattn()], "cpu", seconds=0)[0]
    assert row.status == "not run" and "not built here" in row.reason


def test_gate_of_one_head_still_finds_wrong_result():
    case = Case(1, 1, 20, 30, 8, torch.bfloat16, False)
    x = make_inputs(case, "cpu")
    right = torch.nn.functional.scaled_dot_product_attention(*x[:3])
    assert Gate(case, x).problem("forward", (right,)) is None
    assert "out is wrong" in Gate(case, x).problem("forward", (right * 1.1,))


def test_error_that_spoils_everything_is_the_reason_of_every_row_after_it(monkeypatch):
    def broken(case: Case, device: str) -> None:
        raise RuntimeError("CUDA error")

    monkeypatch.setattr(suite, "make_inputs", broken)
    rows = next(suite.measure([(TINY,)], CPU_PEERS, "cpu", seconds=5))
    assert {(row.status, row.reason) for row in rows} == {("not run", "RuntimeError: CUDA error")}


def test_budget_that_is_used_up_leaves_cases_unrun_and_says_so():
    steps = list(suite.measure([(TINY,)], CPU_PEERS, "cpu", seconds=0))
    assert {(row.status, row.timing) for row in steps[0]} == {("not run", None)}
    assert all("budget of 0 s" in row.reason for row in steps[0])
    assert len(steps[0]) == len(CPU_PEERS) * len(DIRECTIONS)


def test_slow_peer_is_left_out_when_its_preparation_does_not_fit():
    slow, quick = Altered(lambda out: out, "slow"), Altered(lambda out: out, "quick")
    slow.setup_seconds = {"cpu": 60.0}
    rows = next(suite.measure([(TINY,)], [slow, quick], "cpu", seconds=5))
    assert {row.peer: row.status for row in rows} == {"slow": "not run", "quick": "ok"}


def test_interleaved_calls_take_turns_in_rotating_order():
    order: list[str] = []
    found = interleaved({name: lambda name=name: order.append(name) for name in "abc"}, "cpu", 0, min_rounds=3)
    assert "".join(order) == "abcbcacab"
    assert {timing.rounds for timing in found.values()} == {3}
    assert all(0 <= t.p20_ms <= t.p50_ms <= t.p80_ms for t in found.values())


def test_interleaved_repeats_make_one_sample():
    calls: list[str] = []
    found = interleaved({"slept": lambda: (calls.append("a"), time.sleep(1e-3))}, "cpu", 0, repeats=4, min_rounds=3)
    assert len(calls) == 12 and found["slept"].rounds == 3
    assert 1 <= found["slept"].p50_ms < 4


@pytest.mark.skipif(
    memory.weighed(lambda: None, "cpu")[1] is None, reason="the resident set's peak is read on Linux only"
)
def test_memory_of_unfused_attention_holds_scores_and_of_fused_does_not():
    case = Case(1, 8, 768, 768, 32, torch.float32, False)
    rows = suite.measure_group([case], CPU_PEERS[1:3], "cpu", seconds=0)
    used = {row.peer: row.peak_bytes for row in rows if row.direction == "forward"}
    scores, output = 8 * 768 * 768 * 4, 8 * 768 * 32 * 4
    assert used["SDPA math"] >= 0.9 * scores
    assert 0.5 * output <= used["SDPA fused"] < 0.5 * scores


@pytest.mark.skipif(
    memory.weighed(lambda: None, "cpu")[1] is None, reason="the resident set's peak is read on Linux only"
)
@pytest.mark.parametrize("megabytes", [1, 20, 200])
def test_memory_of_known_allocation_is_its_size(megabytes: int):
    def call() -> None:
        # One block: whether a second one takes a freed one's place is malloc's choice, and truly changes the peak.
        torch.ones(megabytes << 18)

    for _ in range(3):
        call()
    assert memory.weighed(call, "cpu")[1] == pytest.approx(megabytes << 20, rel=0.1, abs=1 << 18)


def test_cpu_run_leaves_json_lines_charts_and_tables(tmp_path: Path, monkeypatch, capsys):
    cases = (TINY, Case(1, 2, 16, 24, 8, torch.bfloat16, False))
    monkeypatch.setattr(cpu, "CPU_QUICK_CASES", cases)
    tiny_subjects(monkeypatch)
    with pyattn.use_backend("reference"):
        rows = cpu.run(tmp_path / "new", quick=True, console=Console(width=160))
    every = [json.loads(line) for line in (tmp_path / "new" / "cpu.jsonl").read_text().splitlines()]
    assert all(set(line) == FIELDS for line in every)
    assert len(rows) == len(every)
    assert list(dict.fromkeys(line["chapter"] for line in every)) == ["attention", *TINY_GROUPS]
    assert all(line["status"] == "ok" and 0 < line["p20_ms"] <= line["p50_ms"] <= line["p80_ms"] for line in every)
    lines = [line for line in every if line["chapter"] == "attention"]
    assert [(line["case"], line["direction"], line["peer"]) for line in lines] == [
        (case.id, direction, peer.name) for case in cases for direction in DIRECTIONS for peer in CPU_PEERS[:3]
    ]
    assert all(line["speedup"] == {line["peer"]: 1} for line in lines if line["peer"] in cpu.BASELINES)
    for name in ("cpu.png", "cpu-more.png"):
        png = (tmp_path / "new" / name).read_bytes()
        assert png.startswith(b"\x89PNG") and len(png) > 10_000
    printed = capsys.readouterr().out
    for words in ("backward, bfloat16", "ratio", TINY.label, "of limit", "machine limit: float32 ", "cannot fuse",
                  "decode", "small call", "/ full", "speed-up"):  # fmt: skip
        assert words in printed


def test_cpu_run_fails_on_wrong_result_of_any_subject(tmp_path: Path, monkeypatch, capsys):
    wrong = tiny_subjects(monkeypatch, (Wrong(),))
    monkeypatch.setattr(cpu, "CPU_QUICK_CASES", (TINY,))
    with pyattn.use_backend("reference"):
        rows = cpu.run(tmp_path, quick=True, console=Console(width=160))
    failed = [row for row in rows if row.status == "failed"]
    expected = sum(len(s.effort.directions) * len(group) for s in wrong for group in s.quick_groups)
    assert len(failed) == expected and all(row.timing is None for row in failed)
    printed = capsys.readouterr().out
    assert printed.count("FAILED") == expected and "out is wrong" in printed


@pytest.mark.parametrize("subject", [*(s.quick() for s in cpu.SUBJECTS), *gpu.SUBJECTS], ids=lambda s: s.name)
def test_subject_without_time_still_has_table_and_panels_and_says_why(subject, tmp_path: Path, capsys):
    rows = [row for found in replace(subject, seconds=0).measure("cpu") for row in found]
    subject.print(rows, Console(width=160))
    assert "(1) the time budget of 0 s was used up" in capsys.readouterr().out
    chart.draw_panels(tmp_path / "empty.png", subject.panels(rows), "nothing")


def test_window_over_its_aim_shows_red(capsys):
    cases = TINY_GROUPS["window"][0]

    def colours(*milliseconds: float) -> list[str]:
        times = zip(cases, (8.0, *milliseconds), strict=True)
        rows = [suite.Row(c, "forward", "pyattn", "ok", timing=suite.Timing(ms, ms, ms, 3)) for c, ms in times]
        return [str(cell) for cell in window.SUBJECT.table(rows, report.Notes()).columns[-1].cells]

    assert colours(1.1, 0.5) == ["[bold]1.0000[/bold]", "[red]0.1375[/red]", "[red]0.0625[/red]"]
    assert colours(0.9, 0.4) == ["[bold]1.0000[/bold]", "[bold]0.1125[/bold]", "[bold]0.0500[/bold]"]


def test_decode_counts_bytes_of_keys_and_values_and_of_copy_twice():
    case = Case(2, 6, 1, 100, 16, torch.bfloat16, False, group=3)
    read = 2 * 2 * 100 * (16 + 16) * 2
    for peer, moved in (("pyattn", read), ("copy", 2 * read)):
        row = suite.Row(case, "forward", peer, "ok", timing=suite.Timing(2.0, 2.0, 2.0, 3))
        assert decode.gigabytes_per_second(row) == pytest.approx(moved / 2e-3 / 1e9)
    q, k, v, *_ = x = make_inputs(case, "cpu")
    assert Copy().prepare(case, x)(q, k, v).nbytes == k.nbytes + v.nbytes == read


def test_limit_keeps_the_best_try_of_a_run(monkeypatch):
    tries = iter([100.0, 130.0, 120.0])
    monkeypatch.setattr(limit, "multiply_add_gflops", lambda dtype: next(tries))
    found = limit.Limit(["float32"])
    found.measure()
    found.measure()
    assert found.gflops == {"float32": 130.0} and "float32 130 GFLOP/s" in str(found)


def test_limit_without_extension_is_absent_and_says_so(monkeypatch):
    monkeypatch.setattr(limit.cpu, "isas", list)
    found = limit.Limit(["float32"])
    assert found.gflops == {} and "not measured" in str(found)


def test_limit_is_the_share_in_the_table(capsys):
    row = suite.Row(TINY, "forward", "pyattn", "ok", timing=suite.Timing(1.0, 1.0, 1.0, 3))
    report.print_tables([row], (), Console(width=160), {"float32": 4 * row.gflops})
    assert "25%" in capsys.readouterr().out
    assert report.record(row, {"threads": 2}, (), "attention", {"float32": 7.0})["limit_gflops"] == 7.0


def test_speedup_is_baselines_time_over_ones_own():
    slow, fast = (
        suite.Row(TINY, "forward", name, "ok", timing=suite.Timing(ms, ms, ms, 3)) for name, ms in (("s", 8), ("f", 2))
    )
    assert report.speedup(fast, slow) == 4
    assert report.record(fast, {"threads": 2}, (slow, fast), "attention", {})["speedup"] == {"s": 4, "f": 1}
    assert fast.gflops == pytest.approx(TINY.flops("forward") / 2e-3 / 1e9)
