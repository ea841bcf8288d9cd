"""What a type checker makes of the README's Python, and of `return_lse`."""

import inspect
import re
from pathlib import Path
from textwrap import indent

import pytest
from mypy import api as mypy

import pyattn

ROOT = Path(__file__).parent.parent


def _assert_typed(path: Path, code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    path.write_text(code, "utf-8")
    monkeypatch.chdir(ROOT)  # its cache knows torch already, where mypy was run before
    found, errors, status = mypy.run(["--config-file", "pyproject.toml", str(path)])
    assert status == 0, found + errors


def test_typing_readme_passes(tmp_path, monkeypatch):
    start, first, *others = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text("utf-8"), re.DOTALL)
    blocks = [f"def block_{i}() -> None:\n{indent(block, '    ')}" for i, block in enumerate(others)]
    # What `install` makes of the name at run time.
    (tmp_path / "flash_attn.pyi").write_text("from pyattn.compat.flash_attn import *\n")
    _assert_typed(tmp_path / "readme.py", "\n".join((start, first, *blocks)), monkeypatch)


def test_typing_faces_are_known_and_nothing_else_is(tmp_path, monkeypatch):
    names = "models.GPT", "nn.MultiheadAttention", "decoding.beam_search", "compat.flash_attn.install"
    unknown = "nothing", "compat.nothing", "models.nothing"
    lines = [f"pyattn.{name}" for name in names] + [f"pyattn.{name}  # type: ignore[attr-defined]" for name in unknown]
    _assert_typed(tmp_path / "names.py", "\n".join(("import pyattn", *lines)), monkeypatch)


@pytest.mark.parametrize("function", [pyattn.attention, pyattn.attention_varlen, pyattn.attention_kvcache])
def test_typing_return_lse_says_what_is_returned(function, tmp_path, monkeypatch):
    parameters = inspect.signature(function).parameters.values()
    given = ["x" for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    given += [f"{p.name}=x" for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "return_lse"]
    call = f"pyattn.{function.__name__}({', '.join(given)}"
    returned = "Tensor", "tuple[Tensor, Tensor]", "Tensor | tuple[Tensor, Tensor]"
    lines = [
        "from typing import Any",
        "import pyattn",
        "from torch import Tensor",
        "from typing_extensions import assert_type",
        "def check(x: Any, some: bool) -> None:",
        f"    assert_type({call}), {returned[0]})",
        f"    assert_type({call}, return_lse=False), {returned[0]})",
        f"    assert_type({call}, return_lse=True), {returned[1]})",
        f"    assert_type({call}, return_lse=some), {returned[2]})",
    ]
    _assert_typed(tmp_path / "calls.py", "\n".join(lines), monkeypatch)
