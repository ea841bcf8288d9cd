"""Compiled kernels on the disk: whole or absent, of what they were made from, and removed when asked to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from pyattn.backends import kernel_cache


def test_cache_is_where_the_user_keeps_caches(home: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert kernel_cache.folder() == home
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert kernel_cache.folder() == home
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    assert kernel_cache.folder() == tmp_path / "caches" / "pyattn" / "kernels"


def test_cache_keeps_a_kernel(home: Path) -> None:
    assert kernel_cache.load("a") is None
    kernel_cache.store("a", b"code")
    kernel_cache.store("b", b"other")
    assert (kernel_cache.load("a"), kernel_cache.load("b")) == (b"code", b"other")
    kernel_cache.store("a", b"newer")
    assert kernel_cache.load("a") == b"newer"
    assert sorted(path.name for path in home.iterdir()) == ["a.cubin", "b.cubin"]


def _damages(data: bytes) -> Iterator[bytes]:
    yield from (data[:end] for end in (0, 1, 31, 32, 33, len(data) // 2, len(data) - 1))
    yield from (data + b"\0", bytes(len(data)))
    yield from (data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :] for place in (0, 100, len(data) - 1))


def test_cache_gives_no_damaged_kernel(home: Path) -> None:
    kernel_cache.store("a", bytes(range(200)))
    whole = (home / "a.cubin").read_bytes()
    for damaged in _damages(whole):
        (home / "a.cubin").write_bytes(damaged)
        assert kernel_cache.load("a") is None


def test_cache_key_depends_on_every_part() -> None:
    parts: dict[str, object] = {"source": "a", "headers": {"b": "c"}, "options": ["d"], "version": (13, 0)}
    others = [{"source": "b"}, {"headers": {"bc": ""}}, {"headers": {"b": "c", "e": ""}}, {"options": ["d", "e"]}]
    keys = {kernel_cache.key(parts | other) for other in [{}, *others, {"version": (12, 8)}]}
    assert len(keys) == 6
    assert all(len(key) == 64 for key in keys)


@pytest.mark.parametrize(
    ("system", "folder"),
    [
        ("linux", ".cache/pyattn/kernels"),
        ("win32", "AppData/Local/pyattn/kernels"),
        ("darwin", "Library/Caches/pyattn/kernels"),
    ],
)
def test_folder_is_the_platforms_own(
    system: str, folder: str, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_cache.sys, "platform", system)
    assert kernel_cache.folder() == tmp_path / folder


def test_cleared_cache_is_empty_and_leaves_what_is_not_its_own(home: Path) -> None:
    assert str(kernel_cache.size()) == "0 kernels, 0.0 MiB"
    for name in "abc":
        kernel_cache.store(name, bytes(2**19 - 32))
    (home / ".d.0123.partial").write_bytes(bytes(2**19))
    (home / "notes.txt").write_text("the user's")
    assert kernel_cache.size() == (3, 2**21)
    assert str(kernel_cache.clear()) == "3 kernels, 2.0 MiB"
    assert [path.name for path in home.iterdir()] == ["notes.txt"]
    assert kernel_cache.size() == (0, 0)
