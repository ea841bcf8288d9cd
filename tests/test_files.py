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


def test_folder_whose_file_cannot_be_written_is_called_by_its_name(tmp_path: Path) -> None:
    with (
        pytest.raises(WriteError, match=rf"^cannot write {tmp_path}/model/weights: No space left on device$"),
        replacing_folder(tmp_path / "model") as new,
        replacing(new / "weights"),
    ):
        raise OSError(28, "No space left on device")


def test_folder_takes_the_place_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("in the way")
    (tmp_path / "model.before").write_text("left")
    _written(tmp_path / "model", "first")
    assert _texts(tmp_path) == {"model/names": "first", "model/weights": "first"}


def test_what_a_writer_left_beside_its_file_goes_with_it(tmp_path: Path) -> None:
    """safetensors writes into a file of its own, which stays when the process is killed."""
    with replacing(tmp_path / "file") as path:
        (path.parent / ".tmp1234").write_text("half")
        path.write_text("whole")
    assert _texts(tmp_path) == {"file": "whole"}
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "file") as path:
        (path.parent / ".tmp1234").write_text("half")
        raise KeyboardInterrupt
    assert _texts(tmp_path) == {"file": "whole"}


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


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no /dev/full")
def test_lock_that_cannot_be_signed_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(WriteError, match=r"cannot write .*\.lock: No space left"), held(tmp_path):
        raise AssertionError
    assert _texts(tmp_path) == {}


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
