"""Files and folders that are the old ones or the new ones, whatever happens in between; and who may write them."""

from __future__ import annotations

import ctypes
import errno
import json
import os
import secrets
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import NoneType
from typing import Any

from pyattn.check import PyattnError

if sys.platform != "win32":
    import fcntl

# What a value out of a file may be, by the type that is wanted, and how an error calls that.
KINDS: dict[type, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a string"),
    dict: ((dict,), "an object"),
    NoneType: ((NoneType,), "null"),
}
_PARTIAL = ".partial"  # ends the name of what is being written
_LOCK = ".lock"
_WITHOUT_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS}
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of Linux's renameat2


class WriteError(PyattnError, OSError):
    """A file cannot be written: the disk is full, or the folder is not ours. What it held before, it still holds."""


class HeldError(PyattnError, RuntimeError):
    """Another process writes in the folder."""


def is_kind(value: Any, kind: type) -> bool:
    """Whether a value may stand where `kind` is wanted, a key of KINDS.

    True is no number, though Python thinks so; and a whole number beyond the largest float is none where one is wanted.
    """
    if not isinstance(value, KINDS[kind][0]) or (isinstance(value, bool) and kind is not bool):
        return False
    return kind is not float or not isinstance(value, int) or abs(value) <= sys.float_info.max


def json_object(text: str) -> dict[str, Any]:
    """The object that a JSON text is. Raises ValueError for any other text, also for one that Python's reader gives up.

    Text from a file may be nested a million deep, which ends that reader's stack and not its patience.
    """
    try:
        value = json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file.

    Raises:
        WriteError: the system refused to write; part of the line may be there, without its end.
    """
    with _writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(line + "\n")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success it takes the place of `path` in one step, else it goes.

    Raises:
        WriteError: the system refused to write.
    """
    folder = _beside(path)  # of its own, because a writer may put files of its own beside the one it is given
    temporary = folder / path.name
    with _writing(path):
        try:
            folder.mkdir(parents=True)
            temporary.touch()
            mode = temporary.stat().st_mode  # by the user's umask; safetensors' own files only their owner can read
            yield temporary
            temporary.chmod(mode)
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
            os.replace(temporary, path)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def replacing_folder(folder: Path) -> Iterator[Path]:
    """`replacing`, for a folder of files that belong together. What else the old one held is gone.

    On Linux the two change places in one step. Where the file system cannot do that (NFS), a process that is killed
    between two steps leaves the old one as "<folder>.before", and the next call puts it back.
    """
    temporary, before = _beside(folder), folder.with_name(folder.name + ".before")
    with _writing(folder):
        if before.exists() and not folder.exists():
            before.rename(folder)
        try:
            temporary.mkdir(parents=True)
            try:
                yield temporary
            except WriteError as error:
                raise WriteError(str(error).replace(str(temporary), str(folder))) from error
            if not _exchanged(temporary, folder):
                if folder.exists():
                    folder.rename(before)
                temporary.rename(folder)
        finally:
            remove(temporary)  # which now is the old one
        remove(before)


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Keeps other processes out of `folder` for the time of the block; the system ends it with the process.

    It holds for all containers of a machine, and over a network file system as far as that has locks; where there are
    none, nobody is kept out. What killed processes left half written in the folder goes. A folder that did not exist,
    and in which the block wrote nothing, goes too.

    Raises:
        HeldError: another process is in the folder, which the message names.
        WriteError: the system refused to write.
    """
    lock = folder / _LOCK
    with _writing(lock):
        folder.mkdir(parents=True, exist_ok=True)
        file = _locked(lock)
    try:
        sweep(folder)
        yield
    finally:
        with suppress(OSError):
            lock.unlink()  # before others may have it: who opened it meanwhile sees that it is gone
        os.close(file)
        with suppress(OSError):
            folder.rmdir()  # if it is empty


def sweep(folder: Path, seconds: float = 0.0) -> None:
    """Removes what killed processes left half written in `folder`, if nobody has touched it for so long."""
    for path in folder.glob(f".*{_PARTIAL}"):
        with suppress(OSError):
            if time.time() - path.stat().st_mtime >= seconds:
                remove(path)


def remove(path: Path) -> None:
    """Removes a file, or a folder and what is in it, as far as the system lets it."""
    with suppress(OSError):
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()


def _beside(path: Path) -> Path:
    """A name in the same folder that no other process takes, whatever container it is in."""
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}{_PARTIAL}")


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turns the system's refusals into WriteError."""
    try:
        yield
    except PyattnError:
        raise
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        # By name: safetensors is an optional library, and its writer's failure is no OSError.
        if type(error).__name__ != "SafetensorError":
            raise
        raise WriteError(f"cannot write {path}: {error}") from error


def _locked(lock: Path) -> int:
    """The descriptor of the lock's file, which this process alone holds until it closes it."""
    while True:
        file = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if sys.platform != "win32":
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(file, 500).decode("utf-8", "replace") or "another process"
            os.close(file)
            raise HeldError(f"{lock.parent} is in use by {holder}: expected one process to write there") from None
        except OSError as error:
            if error.errno not in _WITHOUT_LOCKS:
                os.close(file)
                raise
        # Whoever held it before removed the file: this lock is then of a file that nobody else will find.
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file), lock.stat()):
                _sign(file, lock)
                return file
        os.close(file)


def _sign(file: int, lock: Path) -> None:
    """Writes into the lock's file who holds it."""
    try:
        os.truncate(file, 0)
        os.write(file, f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError:
        remove(lock)
        os.close(file)
        raise


def _exchanged(one: Path, other: Path) -> bool:
    """Whether the system has let two paths change places."""
    if sys.platform != "linux":
        return False
    exchange = getattr(ctypes.CDLL(None), "renameat2", None)
    paths = os.fsencode(one), os.fsencode(other)
    return exchange is not None and exchange(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0
