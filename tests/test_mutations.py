"""Files that something damaged: every command goes on, or says what is wrong in one sentence.

Bytes are flipped, lost, doubled and moved; in JSON, also in the headers of safetensors files, values are replaced by
what stands nowhere in a file of ours.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pyattn.cli import app

pytestmark = pytest.mark.usefixtures("one_thread")

MUTANTS = 30  # of each file
TRAIN = (
    *("train", "gpt", "--text", argparse.__file__, "--attention", "torch", "--device", "cpu", "--layers", "1"),
    *("--heads", "2", "--width", "16", "--context", "16", "--batch", "2", "--vocab", "300", "--sample-tokens", "0"),
)
STEPS = ("--steps", "2", "--evaluate-every", "1")
OPTIONS = {"layers": "1", "heads": "2", "width": "16", "lr": "0.001"}
# file: the command that reads it, in a folder that holds `run` and options.toml
READ: dict[str, tuple[str, ...]] = {
    "run/checkpoint.safetensors": (*TRAIN, *STEPS, "--resume", "--out", "run"),
    "run/metrics.jsonl": ("compare", "run", "--out", "compared.png"),
    "run/model/config.json": ("generate", "--model", "run/model", "--prompt", "def", "--tokens", "2"),
    "run/model/model.safetensors": ("generate", "--model", "run/model", "--prompt", "def", "--tokens", "2"),
    "run/model/tokenizer.json": ("generate", "--model", "run/model", "--prompt", "def", "--tokens", "2"),
    ".pyattn-cache": (*TRAIN, "--steps", "1", "--out", "other", "--overwrite"),
    "options.toml": (*TRAIN, *STEPS, "--out", "other", "--overwrite", "--config", "options.toml"),
}
STRANGE: tuple[Any, ...] = (
    None, True, 0, -1, 1, 2**31, 2**40, 2**63, 10**30, 0.5, 1e308, float("nan"), float("inf"), "", "9", "x" * 10_000,
    [], {}, [[]], [0, -1], {"a": 1},
)  # fmt: skip


def damaged(data: bytes, r: random.Random) -> bytes:
    """`data` with one to three accidents."""
    for _ in range(r.randint(1, 3)):
        at = r.randrange(len(data) + 1)
        part = data[at : at + r.choice((1, 8, 100))]
        start, rest = data[:at], data[at + len(part) :]
        data = r.choice((
            start + bytes(byte ^ 1 << r.randrange(8) for byte in part[:1]) + part[1:] + rest,
            start + bytes(len(part)) + rest,
            start + r.randbytes(len(part)) + rest,
            start + rest,
            start + part + part + rest,
            rest + start,
            start,
            b"",
        ))  # fmt: skip
    return data


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every (container, key or index) inside."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def with_a_strange_value(text: str, r: random.Random) -> str:
    """The JSON with one value replaced, lost, or under a key of its own."""
    value = json.loads(text)
    container, key = r.choice(list(places(value)))
    change = r.randrange(5)
    if change == 0:
        del container[key]
    elif change == 1 and isinstance(container, dict):
        container[f"{key}x"] = container[key]
    elif isinstance(container[key], str) and container[key].startswith("{"):  # JSON in a header of JSON
        container[key] = with_a_strange_value(container[key], r)
    else:
        container[key] = r.choice(STRANGE)
    return json.dumps(value)


def mutated(path: Path, r: random.Random) -> bytes:
    data = path.read_bytes()
    if r.random() < 0.3:
        return damaged(data, r)
    if path.suffix == ".json":
        return with_a_strange_value(data.decode(), r).encode()
    if path.suffix == ".jsonl":
        lines = data.decode().splitlines(keepends=True)
        at = r.randrange(len(lines))
        return "".join((*lines[:at], with_a_strange_value(lines[at], r), "\n", *lines[at + 1 :])).encode()
    if path.suffix == ".safetensors":
        size = int.from_bytes(data[:8], "little")
        header = with_a_strange_value(data[8 : 8 + size].decode(), r).encode()
        return len(header).to_bytes(8, "little") + header + data[8 + size :]
    value = r.choice(("true", "-1", "1e400", "nan", '"x"', "[]", "{}", "10" * 100, "[" * 2000, "1979-05-27"))
    return _toml(OPTIONS | {r.choice(list(OPTIONS)): value})


def _toml(options: dict[str, str]) -> bytes:
    return "".join(f"{name} = {value}\n" for name, value in options.items()).encode()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    (folder / "options.toml").write_bytes(_toml(OPTIONS))
    done = CliRunner().invoke(app, [*TRAIN, *STEPS, "--out", str(folder / "run")])
    assert done.exit_code == 0, done.output
    return folder


@pytest.mark.parametrize("file", READ)
def test_damaged_file_is_read_or_refused_in_a_sentence(
    file: str, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    refused = 0
    for seed in range(MUTANTS):
        for name in tmp_path.iterdir():
            shutil.rmtree(name) if name.is_dir() else name.unlink()
        shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
        path = tmp_path / file
        path = next(path.iterdir()) if path.is_dir() else path
        path.write_bytes(mutated(path, random.Random(seed)))
        result = CliRunner().invoke(app, list(READ[file]))
        about = f"mutant {seed} of {file}: {result.output}"
        assert result.exception is None or isinstance(result.exception, SystemExit), about
        assert result.exit_code in (0, 2), about
        if result.exit_code == 2:
            assert result.stderr.startswith("pyattn: ") and result.stderr.count("\n") == 1, about
            refused += 1
    assert refused > 0 or file == ".pyattn-cache"  # which is made again
