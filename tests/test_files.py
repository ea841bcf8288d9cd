"""Files and folders that are replaced whole, who may write them, and JSON that is not what it should be."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from pyattn import files
from pyattn.files import HeldError, WriteError, held, json_object, replacing, replacing_folder, sweep

HOLD = """
import sys, time
from pathlib import Path
from pyattn.files import held
with held(Path(sys.argv[1])):
    print(1, flush=True)
    time.sleep(60)
"""


def _written(folder: Path, text: str) -> None:
    with replacing_folder(folder) as new:
        (new / "weights").write_text(text)
        (new / "names").write_text(text)


def _texts(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize("at_once", [True, False])
def test_folder_is_replaced_with_all_that_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at_once: bool
) -> None:
    if not at_once:
        monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    _written(tmp_path / "deep" / "model", "first")
    (tmp_path / "deep" / "model" / "other").write_text("first")
    _written(tmp_path / "deep" / "model", "second")
    assert _texts(tmp_path) == {"deep/model/names": "second", "deep/model/weights": "second"}
    assert os.listdir(tmp_path / "deep") == ["model"]


def test_folder_whose_replacement_fails_stays(tmp_path: Path) -> None:
    _written(tmp_path / "model", "first")
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "model") as new:
        (new / "weights").write_text("second")
        raise KeyboardInterrupt
    assert _texts(tmp_path) == {"model/names": "first", "model/weights": "first"}


def test_folder_that_was_lost_between_two_renames_comes_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)
    _written(tmp_path / "model", "first")
    (tmp_path / "model").rename(tmp_path / "model.before")  # as a process leaves it that is killed there
    with pytest.raises(KeyboardInterrupt), replacing_folder(tmp_path / "model"):
        raise KeyboardInterrupt
    assert _texts(tmp_path) == {"model/names": "first", "model/weights": "first"}


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no umask")
def test_file_has_the_mode_that_the_user_asked_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with replacing(tmp_path / "file") as path:
            path.unlink()
            os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o600))  # as a library's own temporary file has it
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_folder_has_one_process_and_the_next_one_after_its_end(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", HOLD, tmp_path / "run"], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "1\n"
        with (
            pytest.raises(HeldError, match=rf"{tmp_path}/run is in use by process {other.pid} on "),
            held(tmp_path / "run"),
        ):
            raise AssertionError
        other.send_signal(signal.SIGKILL)
        other.wait()
    with held(tmp_path / "run"):
        (tmp_path / "run" / "file").write_text("mine")
    assert _texts(tmp_path) == {"run/file": "mine"}


def test_folder_that_nobody_wrote_in_is_gone(tmp_path: Path) -> None:
    with pytest.raises(ValueError), held(tmp_path / "run"):
        raise ValueError
    assert not (tmp_path / "run").exists()


def test_folder_that_cannot_be_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match=r"cannot write .*file/run"), held(tmp_path / "file" / "run"):
        raise AssertionError


def test_what_killed_processes_left_is_swept(tmp_path: Path) -> None:
    left = tmp_path / ".checkpoint.0123.partial"
    left.write_text("half")
    (tmp_path / ".model.4567.partial").mkdir()
    (tmp_path / ".model.4567.partial" / "weights").write_text("half")
    (tmp_path / "mine.partial").write_text("not ours")
    sweep(tmp_path, seconds=60)
    assert left.exists()
    os.utime(left, (time.time() - 100,) * 2)
    sweep(tmp_path, seconds=60)
    assert not left.exists()
    with held(tmp_path):
        pass
    assert _texts(tmp_path) == {"mine.partial": "not ours"}


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 200_000, "[1]", "{", "1" * 5000, '{"a": NaN'])
def test_json_that_is_no_object_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError):
        json_object(text)
