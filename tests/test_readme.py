"""The README's Python runs as it stands there."""

import re
from pathlib import Path

import pyattn.compat.flash_attn

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")


def test_readme_code_runs_in_order(capsys):
    blocks = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(blocks) >= 2
    names: dict[str, object] = {}
    try:
        for block in blocks:
            exec(compile(block, "README.md", "exec"), names)
    finally:
        pyattn.compat.flash_attn.uninstall()
    assert "-> cpu" in capsys.readouterr().out
