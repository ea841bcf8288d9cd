"""The `pyattn` command: what it prints, what it leaves behind, and how it says no."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from typer.testing import CliRunner, Result

import pyattn
from pyattn import testing, verification
from pyattn.backends import kernel_cache, nvrtc
from pyattn.cli import app
from pyattn.training import checkpoint, metrics

pytestmark = pytest.mark.usefixtures("one_thread")
TEXT = argparse.__file__
TINY = [
    *("train", "gpt", "--text", TEXT, "--attention", "torch", "--device", "cpu", "--layers", "1", "--heads", "2"),
    *("--width", "32", "--context", "32", "--batch", "4", "--vocab", "300", "--sample-tokens", "10"),
]


def _run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def _assert_refused(result: Result, message: str) -> None:
    assert result.exit_code == 2, result.output
    assert re.search(message, result.stderr), result.stderr
    assert result.stderr.startswith("pyattn: ")
    assert "Traceback" not in result.output
    assert len(result.stderr.strip().splitlines()) == 1


def _bytes(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_help_shows_every_command_and_an_example() -> None:
    text = _run("--help").output
    for word in ("info", "verify", "bench", "train", "compare", "tag", "caption", "A whole example"):
        assert word in text
    for model, own in (
        ("gpt", "--tokens"),
        ("transformer", "--validation-source"),
        ("bert", "--cased"),
        ("rnn", "--tagged"),
        ("transformer-xl", "--memory"),
        ("xlnet", "--predict"),
        ("seq2seq", "--score"),
        ("caption", "--coverage"),
    ):
        text = _run("train", model, "--help").output
        assert f"pyattn train {model} " in text
        for word in ("A whole example", own, "--attention", "--config", "--label-smoothing", "--patience"):
            assert word in text


def test_info_lists_versions_and_every_backend() -> None:
    result = _run("info")
    assert result.exit_code == 0
    assert torch.__version__ in result.output
    assert pyattn.__version__ in result.output
    for name in pyattn.list_backends():
        assert name in result.output


def test_version_is_one_line_with_torchs_and_tritons() -> None:
    result = _run("--version")
    assert result.exit_code == 0
    assert re.fullmatch(
        rf"pyattn {pyattn.__version__}, torch {re.escape(torch.__version__)}, Triton .+\n", result.output
    )


def test_verify_without_a_terminal_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "CASES", testing.CASES[:2])
    lines = _run("verify", "--backend", "reference").output.splitlines()
    assert lines[:4] == [
        "reference float16: done, 2 of 8 cases",
        "reference bfloat16: done, 4 of 8 cases",
        "reference float32: done, 6 of 8 cases",
        "reference float64: done, 8 of 8 cases",
    ]


def test_verify_all_right_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification, "CASES", [case for case in testing.CASES if case.id in ("plain", "gqa", "sinks")])
    result = _run("verify", "--backend", "reference")
    assert result.exit_code == 0, result.output
    assert "12 cases passed, 0 failed" in result.output
    for word in ("reference", "causal", "grouped", "sinks", "float16", "bfloat16", "float32", "float64"):
        assert word in result.output


@pytest.mark.parametrize("wrong", ["result", "exception"])
def test_verify_wrong_kernel_fails_and_is_named(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def check_case(name: str, case: testing.Case, dtype: torch.dtype, device: str) -> list[testing.Result]:
        if wrong == "exception":
            raise RuntimeError("launch failed")
        return [testing.Result("d_q", error=0.5, baseline=0.1, excess=2.5)]

    monkeypatch.setattr(verification, "CASES", testing.CASES[:2])
    monkeypatch.setattr(verification, "check_case", check_case)
    result = _run("verify", "--backend", "reference")
    assert result.exit_code == 1
    assert "8 failed" in result.output
    assert "FAILED" in result.output
    assert "reference plain float32 " + ("d_q: error 0.5" if wrong == "result" else "RuntimeError: launch failed") in (
        result.output
    )


def test_verify_unknown_backend_is_refused() -> None:
    _assert_refused(_run("verify", "--backend", "flash"), "backend: expected auto, .*got 'flash'")


def test_verify_backend_that_is_not_ready_is_refused_with_its_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verification.registry, "list_backends", lambda: {"reference": "has a cold"})
    _assert_refused(_run("verify", "--backend", "reference"), "reference is not ready: has a cold")


@pytest.mark.parametrize(("status", "code"), [("ok", 0), ("failed", 1)])
def test_bench_exit_code_says_whether_a_result_was_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, status: str, code: int
) -> None:
    from pyattn.benchmarks import cpu

    asked = {}

    def run(out_dir: Path, **options: object) -> list[SimpleNamespace]:
        asked.update(options, out_dir=out_dir)
        return [SimpleNamespace(status="ok"), SimpleNamespace(status=status)]

    monkeypatch.setattr(cpu, "run", run)
    assert _run("bench", "--quick", "--out", tmp_path).exit_code == code
    assert (asked["out_dir"], asked["quick"]) == (tmp_path, True)


def test_train_then_resume_then_compare(tmp_path: Path) -> None:
    for name in ("a", "b"):
        result = _run(*TINY, "--out", tmp_path / name, "--steps", 4)
        assert result.exit_code == 0, result.output
        assert "step     4/4  validation" in result.output
        assert "tokens/s" in result.output
        assert (tmp_path / name / "sample.txt").exists()
    result = _run("train", "gpt", "--out", tmp_path / "a", "--resume", "--steps", 6, "--sample-tokens", 0)
    assert result.exit_code == 0, result.output
    assert [line["step"] for line in metrics.read(tmp_path / "a")] == [1, 2, 3, 4, 5, 6]
    result = _run("compare", tmp_path / "a", tmp_path / "b", "--out", tmp_path / "both.png")
    assert result.exit_code == 0, result.output
    assert (tmp_path / "both.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "is empty"),
        (b"\xff\xfe\x00", "expected UTF-8"),
        (b"a few words", "one batch of 4 x 32"),
    ],
)
def test_train_bad_text_is_refused_and_nothing_written(tmp_path: Path, content: bytes | None, message: str) -> None:
    source = tmp_path / "text.txt"
    if content is not None:
        source.write_bytes(content)
    _assert_refused(_run(*TINY, "--text", source, "--out", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--attention", "flash"], "attention: expected one of pyattn, torch, got flash"),
        (["--heads", "3"], "heads: expected a divisor of width=32, got 3"),
        (["--device", "tpu"], "device: expected cpu or cuda, got tpu"),
        (["--dtype", "int8"], "dtype: expected one of float32, bfloat16, got int8"),
        (["--resume"], "checkpoint: .* does not exist"),
    ],
)
def test_train_bad_option_is_refused(tmp_path: Path, options: list[str], message: str) -> None:
    _assert_refused(_run(*TINY, "--out", tmp_path / "run", *options), message)
    assert not (tmp_path / "run").exists()


def test_train_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    _assert_refused(_run(*TINY, "--out", tmp_path / "file" / "run", "--steps", 2), "file")


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other model", "there already"])
def test_train_unusable_checkpoint_is_refused_and_nothing_overwritten(tmp_path: Path, damage: str) -> None:
    from safetensors.torch import save_file

    out = tmp_path / "run"
    assert _run(*TINY, "--out", out, "--steps", 2).exit_code == 0
    path, options = out / "checkpoint.safetensors", ["--resume"]
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif damage == "foreign":
        save_file({"weight": torch.zeros(2)}, path)
    elif damage == "other model":
        options += ["--layers", "2"]
    else:
        options = []
    before = _bytes(tmp_path)
    _assert_refused(_run(*TINY, "--out", out, *options), "checkpoint: ")
    assert _bytes(tmp_path) == before


def test_train_transformer_then_resume(tmp_path: Path) -> None:
    source, target = tmp_path / "train.de", tmp_path / "train.en"
    source.write_text("".join(f"das Haus {i} ist alt\n" for i in range(60)))
    target.write_text("".join(f"house {i} is old\n" for i in range(60)))
    out = tmp_path / "run"
    options = [
        "--layers",
        1,
        "--heads",
        2,
        "--width",
        32,
        "--hidden",
        32,
        "--vocab",
        300,
        "--device",
        "cpu",
        "--out",
        out,
    ]
    files = ["--source", source, "--target", target]
    result = _run("train", "transformer", *files, *options, "--steps", 2, "--max-tokens", 200)
    assert result.exit_code == 0, result.output
    assert "57 pairs of sentences and 3 for validation" in result.output
    assert f"best model, validation loss {metrics.read(out)[-1]['val_loss']:.3f}: {out / 'model'}" in result.output
    result = _run("train", "transformer", "--out", out, "--resume", "--steps", 3)
    assert result.exit_code == 0, result.output
    target.write_text("one line\n")
    _assert_refused(_run("train", "transformer", *files, "--out", tmp_path / "new"), r"got 1 for 60")
    _assert_refused(_run("train", "transformer", "--out", tmp_path / "new"), "give --source and --target")
    _assert_refused(_run("train", "bert", "--out", out, "--resume"), "is not of a bert")
    assert not (tmp_path / "new").exists()


def test_train_bert_shows_its_losses_and_what_they_must_beat(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("".join(f"part {i} begins .\nit goes on .\nit ends .\n\n" for i in range(50)))
    options = ["--layers", 1, "--heads", 2, "--width", 32, "--hidden", 32, "--vocab", 300, "--device", "cpu"]
    result = _run("train", "bert", "--text", text, *options, "--steps", 2, "--context", 32, "--out", tmp_path / "run")
    assert result.exit_code == 0, result.output
    assert re.search(
        r"step +2/2  validation [\d.]+  masked [\d.]+ \(of [\d.]+\)  next [\d.]+ \(of 0.693\)", result.output
    )


def test_train_stops_when_nothing_gets_better(tmp_path: Path) -> None:
    options = ["--steps", 50, "--evaluate-every", 1, "--patience", 2, "--lr", 1e-12, "--validation-tokens", 64]
    result = _run(*TINY, "--out", tmp_path / "run", *options)
    assert result.exit_code == 0, result.output
    assert "no better validation loss in 2 evaluations" in result.output
    assert len(metrics.read(tmp_path / "run")) < 50


def test_config_sets_defaults_that_the_command_line_overrides(tmp_path: Path) -> None:
    config = tmp_path / "tiny.toml"
    config.write_text(
        f'text = "{TEXT}"\nattention = "torch"\nlayers = 1\nheads = 2\nwidth = 32\ncontext = 32\nbatch = 4\n'
        'vocab = 300\nsteps = 2\nlr = 1\nsample-tokens = 0\nmin_lr_rate = 0.5\ncompile = false\ndevice = "cpu"\n'
    )
    out = tmp_path / "run"
    result = _run("train", "gpt", "--config", config, "--steps", 3, "--out", out)
    assert result.exit_code == 0, result.output
    settings = checkpoint.load(out / "checkpoint.safetensors").meta["settings"]
    assert (settings["steps"], settings["lr"], settings["min_lr_rate"], settings["text"]) == (3, 1.0, 0.5, TEXT)
    assert settings["clip"] == 1.0  # named nowhere
    assert not (out / "sample.txt").exists()
    result = _run("train", "gpt", "--out", out, "--resume", "--config", config, "--steps", 4)
    assert result.exit_code == 0, result.output
    config.write_text(config.read_text() + "seed = 1\n")
    _assert_refused(
        _run("train", "gpt", "--out", out, "--resume", "--config", config, "--steps", 5), "seed is 0 there and 1 here"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"layer = 2\n", r"bad\.toml has the key layer, which is no option of this command"),
        (b"[model]\nlayers = 2\n", r"bad\.toml has the key model"),
        (b"layers = 2.5\n", r"bad\.toml: expected a whole number for layers, got 2\.5"),
        (b"layers = true\n", r"bad\.toml: expected a whole number for layers, got True"),
        (b'lr = "high"\n', r"bad\.toml: expected a number for lr, got 'high'"),
        (b"compile = 1\n", r"bad\.toml: expected true or false for compile, got 1"),
        (b"attention = [1]\n", r"bad\.toml: expected a string for attention, got \[1\]"),
        (b"layers = \n", r"bad\.toml is no TOML \(.*line 1"),
        (b"layers = 2\nlayers = 3\n", r"bad\.toml is no TOML"),
        (b"\xff", r"bad\.toml is no TOML"),
        (b"dropout = 2\n", r"dropout: expected a number in \[0, 1\), got 2"),
        (b"a = " + b"[" * 100_000, r"bad\.toml is nested too deeply"),
        (b"layers = " + b"1" * 5000, r"bad\.toml is no TOML"),
        (None, r"bad\.toml: No such file"),
    ],
)
def test_config_that_is_wrong_is_refused_by_file_and_key(tmp_path: Path, content: bytes | None, message: str) -> None:
    config = tmp_path / "bad.toml"
    if content is not None:
        config.write_bytes(content)
    _assert_refused(_run("train", "gpt", "--config", config, "--out", tmp_path / "run"), message)
    assert not (tmp_path / "run").exists()


def test_config_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    config = tmp_path / "marked.toml"
    config.write_bytes(b"\xef\xbb\xbflayers = 0\n")
    _assert_refused(_run("train", "gpt", "--config", config), "layers: expected a number from 1 to 4096, got 0")


def test_config_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    _assert_refused(_run("train", "gpt", "--config", tmp_path), f"config: cannot read {tmp_path}: Is a directory")


@pytest.mark.parametrize(
    "options", [["--layers", 10**9], ["--width", 2**40], ["--batch", 10**12], ["--context", 10**9]], ids=lambda o: o[0]
)
def test_train_of_impossible_size_is_refused(tmp_path: Path, options: list) -> None:
    name = options[0].removeprefix("--")
    _assert_refused(_run(*TINY, *options, "--out", tmp_path / "run"), f"{name}: expected a number from 1 to ")
    assert not (tmp_path / "run").exists()


def test_train_on_an_empty_path_is_refused(tmp_path: Path) -> None:
    result = _run("train", "gpt", "--text", "", "--out", tmp_path / "run")
    assert result.exit_code == 2
    assert "expected a path, got nothing" in result.stderr


def test_compare_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    _assert_refused(_run("compare", tmp_path, "--out", tmp_path / "x.png"), r"has no metrics\.jsonl")
    assert not (tmp_path / "x.png").exists()


def _heed_signals() -> None:
    """Before a command: a shell ignores some for what it runs in the background, and so would the command."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP"):
        signal.signal(getattr(signal, name), signal.SIG_DFL)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_train_interrupted_leaves_a_checkpoint_that_resumes(tmp_path: Path, name: str) -> None:
    out = tmp_path / "run"
    main = [sys.executable, "-c", "from pyattn.cli import main; main()"]
    command = [*main, *TINY, "--out", str(out), "--steps", "100000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, preexec_fn=_heed_signals)
    try:
        deadline = time.monotonic() + 120
        while not (out / "metrics.jsonl").exists() or (out / "metrics.jsonl").read_text("utf-8").count("\n") < 3:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        for option in ("--overwrite", "--resume"):
            _assert_refused(_run(*TINY, "--out", out, option), rf"{out} is in use by process {process.pid} on ")
        process.send_signal(getattr(signal, name))
        printed, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 128 + getattr(signal, name)
    assert f"go on with: pyattn train gpt --out {out} --resume" in printed
    step = checkpoint.load(out / "checkpoint.safetensors").step
    assert [line["step"] for line in metrics.read(out)] == list(range(1, step + 1))
    resumed = _run("train", "gpt", "--out", out, "--resume", "--steps", step + 2, "--sample-tokens", 0)
    assert resumed.exit_code == 0, resumed.output
    assert metrics.read(out)[-1]["step"] == step + 2


def test_train_goes_on_where_a_hangup_is_ignored(tmp_path: Path) -> None:
    """As under nohup, which ignores the signal before the command begins."""
    ignore = "import os, signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); os.execv(sys.argv[1], sys.argv[1:])"
    kill = "from pyattn.cli import train; import os; watched = train._watched\n"
    kill += "train._watched = lambda run: (os.kill(os.getpid(), 1) or step for step in watched(run))\n"
    code = kill + "from pyattn.cli import main; main()"
    command = [sys.executable, "-c", ignore, sys.executable, "-c", code, *TINY, "--out", tmp_path / "run", "--steps", 3]
    process = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert metrics.read(tmp_path / "run")[-1]["step"] == 3


PYATTN = f"{sys.executable} -c 'from pyattn.cli import main; main()'"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_error_that_cannot_be_said_is_an_exit_status(tmp_path: Path) -> None:
    command = f"{PYATTN} train gpt --resume --out {tmp_path / 'none'} 2>/dev/full"
    assert subprocess.run(command, shell=True, check=False, capture_output=True).returncode == 2


def test_generate_takes_a_closed_input_for_an_empty_one_and_shows_text_in_ascii(tmp_path: Path) -> None:
    assert _run(*TINY, "--out", tmp_path, "--steps", 1).exit_code == 0
    command = f"{PYATTN} generate --model {tmp_path / 'model'} --tokens 3"
    for ending, environment in ((" <&-", {}), (" --prompt Übung", {"PYTHONIOENCODING": "ascii"})):
        found = subprocess.run(
            command + ending, shell=True, check=False, capture_output=True, text=True, env=os.environ | environment
        )
        assert (found.returncode, found.stderr) == (0, ""), ending
    assert "bung" in found.stdout


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
@pytest.mark.parametrize("output", ["full", "closed"])
def test_train_goes_on_where_nothing_can_be_printed(tmp_path: Path, output: str) -> None:
    command = f"from pyattn.cli import main; main()' {' '.join(TINY)} --out {tmp_path / 'run'} --steps 3"
    redirection = {"full": ">/dev/full", "closed": ">&-"}[output]
    process = subprocess.run(
        ["sh", "-c", f"{sys.executable} -c '{command} {redirection}"], stderr=subprocess.PIPE, text=True, check=False
    )
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    assert metrics.read(tmp_path / "run")[-1]["step"] == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full here")
def test_command_whose_output_cannot_be_written_says_so() -> None:
    command = f"{sys.executable} -c 'from pyattn.cli import main; main()' info >/dev/full"
    process = subprocess.run(["sh", "-c", command], stderr=subprocess.PIPE, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == "pyattn: cannot write the output: No space left on device\n"


def test_command_without_its_libraries_says_what_to_install() -> None:
    code = "import sys; sys.modules['typer'] = None; import pyattn.cli"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode != 0
    assert process.stderr.strip() == "pyattn: the command needs typer: pip install 'pyattn[tools]'"


def test_import_pyattn_brings_none_of_the_command_s_libraries() -> None:
    code = "import sys, pyattn; print({'typer', 'rich', 'matplotlib', 'tokenizers', 'safetensors'} & set(sys.modules))"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert process.stdout.strip() == "set()"


def test_ctrl_c_while_torch_is_imported_prints_no_traceback(tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text("import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n")
    script = tmp_path / "pyattn"
    script.write_text("from pyattn.cli import main\nmain()\n")
    found = subprocess.run(
        [sys.executable, script], capture_output=True, text=True, timeout=60, check=False, preexec_fn=_heed_signals
    )
    assert found.returncode == -signal.SIGINT
    assert (found.stdout, found.stderr) == ("", "Aborted.\n")


def test_info_shows_the_compiled_kernels_on_the_disk_and_removes_them(home: Path) -> None:
    kernel_cache.store("a", bytes(2**20))
    assert f"CUDA kernels  1 kernel, 1.0 MiB in {home}\n" in _run("info").output
    removed = _run("info", "--clear-cache")
    assert removed.output == f"removed 1 kernel, 1.0 MiB from {home}\n"
    assert list(home.iterdir()) == []
    assert "CUDA kernels  0 kernels, 0.0 MiB in" in _run("info").output


def test_info_names_the_compiler_of_cuda_kernels_or_why_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    nvrtc.compiler.cache_clear()
    assert re.search(r"NVRTC +torch \S+ is built without CUDA", _run("info").output)
    found = SimpleNamespace(version=(12, 8), path=Path("/opt/libnvrtc.so.12"), capabilities="7.0, 7.5")
    monkeypatch.setattr(nvrtc, "compiler", lambda: found)
    assert re.search(r"NVRTC +12\.8 at /opt/libnvrtc\.so\.12, for compute capabilities 7\.0, 7\.5", _run("info").output)


@pytest.mark.usefixtures("home")
def test_info_clears_no_cache_that_the_system_forbids_to(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", "/home/other/a.cubin")

    kernel_cache.store("a", b"code")
    monkeypatch.setattr(Path, "unlink", forbidden)
    _assert_refused(_run("info", "--clear-cache"), "/home/other/a.cubin: Permission denied")
