"""Files that are either the old ones or the new ones, whatever happens in between."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from pyattn.check import PyattnError


class WriteError(PyattnError, OSError):
    """A file cannot be written: the disk is full, or the folder is not ours. What it held before, it still holds."""


def append_line(path: Path, line: str) -> None:
    """Adds a line to a file.

    Raises:
        WriteError: the system refused to write; part of the line may be there, without its end.
    """
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to; on success it takes the place of `path` in one step, else it goes.

    Raises:
        WriteError: the system refused to write.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield temporary
            with open(temporary, "rb+") as file:
                os.fsync(file.fileno())  # a rename may reach the disk before the bytes do
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        # By name: safetensors is an optional library, and its writer's failure is no OSError.
        if type(error).__name__ != "SafetensorError":
            raise
        raise WriteError(f"cannot write {path}: {error}") from error
