"""Compiled kernels on disk, so that only the first process that needs one waits for the compiler.

One file holds one kernel: its machine code, and behind that the code's sha256. A file is written under another name and
then renamed, so under its own name it is complete or absent, however many processes write it; and what a broken disk or
a lost connection left of it is no kernel, because its digest is wrong.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import sys
import warnings
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

_FOLDERS = {"win32": "AppData/Local", "darwin": "Library/Caches"}  # of a user's home, by platform
_SUFFIX, _PARTIAL = ".cubin", ".partial"
_DIGEST_BYTES = hashlib.sha256().digest_size


class Size(NamedTuple):
    kernels: int
    bytes: int

    def __str__(self) -> str:
        return f"{self.kernels} kernel{'' if self.kernels == 1 else 's'}, {self.bytes / 2**20:.1f} MiB"


def folder() -> Path | None:
    """Where this user's kernels are kept; None where the system knows no home for him.

    On Linux that is where XDG_CACHE_HOME says, as in the XDG Base Directory Specification.
    """
    given = os.environ.get("XDG_CACHE_HOME", "")
    if sys.platform not in _FOLDERS and os.path.isabs(given):  # the specification has relative ones ignored
        return Path(given, "pyattn", "kernels")
    try:
        return Path.home() / _FOLDERS.get(sys.platform, ".cache") / "pyattn" / "kernels"
    except RuntimeError:
        return None


def key(parts: Mapping[str, object]) -> str:
    """A name for what is compiled out of `parts`: all of them, for a kernel must not outlive what it was made from."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def load(name: str) -> bytes | None:
    """The kernel of this name; None where there is none, or none that is whole."""
    if (place := folder()) is None:
        return None
    try:
        data = (place / (name + _SUFFIX)).read_bytes()
    except OSError:
        return None
    code, digest = data[:-_DIGEST_BYTES], data[-_DIGEST_BYTES:]
    return code if hashlib.sha256(code).digest() == digest else None


def store(name: str, code: bytes) -> None:
    """Keeps a kernel. Where that is not possible it warns, because the call at hand can go on without."""
    if (place := folder()) is None:
        _warn("the user's home folder is not known")
        return
    path = place / (name + _SUFFIX)
    temporary = place / f".{name}.{secrets.token_hex(8)}{_PARTIAL}"
    try:
        place.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(code + hashlib.sha256(code).digest())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        # Windows replaces no file that another process reads, which is then the same kernel.
        if load(name) is None:
            _warn(f"{place} cannot be written ({error.strerror or error})")


def size() -> Size:
    """What the folder holds, also of other versions of pyattn."""
    kernels, total = 0, 0
    for path in _files():
        with suppress(FileNotFoundError):  # another process has removed it meanwhile
            total += path.stat().st_size
            kernels += path.suffix == _SUFFIX
    return Size(kernels, total)


def clear() -> Size:
    """Removes every kernel, and what killed processes left half written. Returns what there was.

    Raises:
        OSError: the system refused to.
    """
    before = size()
    for path in _files():
        path.unlink(missing_ok=True)
    return before


def _files() -> Iterator[Path]:
    if (place := folder()) is not None and place.is_dir():
        yield from (path for path in place.iterdir() if path.suffix in (_SUFFIX, _PARTIAL))


def _warn(why: str) -> None:
    """The text is the same for every kernel, so that Python shows it once."""
    warnings.warn(f"{why}: every process will compile its CUDA kernels anew", RuntimeWarning, stacklevel=2)
