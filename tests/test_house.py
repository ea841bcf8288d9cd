"""The rules of the house: which way imports point, how long a file may be, who reads the environment, a true README."""

import ast
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from pyattn import core, registry, testing
from pyattn.backends import triton
from pyattn.spec import FEATURES, AttentionSpec

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    p for folder in ("pyattn", "triton_kernels", "benchmarks", "tests") for p in (ROOT / folder).rglob("*.py")
)
MAX_LINES = 600

# A module may import those of its own level and of the levels after it.
LEVELS = (
    ("pyattn.cli",),
    ("benchmarks", "pyattn.compat"),
    ("pyattn.models", "pyattn.decoding", "pyattn.training"),
    ("pyattn.nn",),
    ("pyattn.verification", "pyattn.machine"),
    ("pyattn.testing", "pyattn.rounding"),
    ("pyattn.api",),
    ("pyattn.core",),
    ("pyattn.registry", "pyattn.autograd", "pyattn.transforms", "pyattn.ops"),
    ("pyattn.check", "pyattn.files", "pyattn.tokens"),
    ("pyattn.backends",),
    ("triton_kernels", "pyattn.triton_kernels", "pyattn.cuda_kernels", "pyattn._C"),
    ("pyattn.spec", "pyattn.dropout", "pyattn.flops", "pyattn.face", "pyattn.interrupt", "pyattn.processor"),
)


def _module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def _level(module: str) -> int | None:
    for level, names in enumerate(LEVELS):
        if any(module == name or module.startswith(name + ".") for name in names):
            return level
    return None


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", [p for p in SOURCES if "tests" not in p.parts], ids=_module)
def test_house_imports_point_one_way(path):
    level = _level(_module(path))
    if level is None:
        assert _module(path) == "pyattn", f"{_module(path)} has no level in this test"
        return
    for name in _imports(path):
        target = _level(name)
        assert target is None or target >= level, f"{_module(path)} imports {name} against the arrows"


@pytest.mark.parametrize("path", SOURCES, ids=_module)
def test_house_file_is_short(path):
    assert len(path.read_text("utf-8").splitlines()) <= MAX_LINES, (
        f"{path.name}: one subject per file, {MAX_LINES} lines at most"
    )


@pytest.mark.parametrize("path", [p for p in SOURCES if p.is_relative_to(ROOT / "pyattn")], ids=_module)
def test_house_no_other_name_hides_a_module(path):
    package, _, name = _module(path).rpartition(".")
    found = getattr(importlib.import_module(package), name, None) if package else None
    assert found is None or isinstance(found, ModuleType), f"{package}.{name} is {found}"


def test_house_kernels_import_torch_and_triton_only():
    for path in (ROOT / "triton_kernels").glob("*.py"):
        names = {name.split(".")[0] for name in _imports(path)}
        foreign = names - sys.stdlib_module_names - {"torch", "triton"}
        assert not foreign, f"{path.name} imports {foreign}"


def test_house_backends_do_not_import_the_oracle():
    for path in (ROOT / "pyattn" / "backends").glob("*.py"):
        assert not any(name.startswith("pyattn.backends.reference") for name in _imports(path)), path.name


def test_house_settings_come_from_the_environment_in_two_places():
    """Which backend is taken, and where compiled kernels are kept."""
    for path in SOURCES:
        if path.name not in ("registry.py", "kernel_cache.py") and "tests" not in path.parts:
            assert not re.search(r"os\.environ|os\.getenv|from os import .*environ", path.read_text("utf-8")), path


def test_house_top_level_is_as_agreed():
    folders = {p.name for p in ROOT.iterdir() if p.is_dir() and not p.name.startswith(".")}
    made = {"build", "dist", "runs"} | {name for name in folders if name.endswith(".egg-info") or name == "__pycache__"}
    assert folders - made == {"csrc", "triton_kernels", "pyattn", "benchmarks", "tests"}


def test_house_readme_table_is_the_backends_own_declaration():
    assert registry.feature_table() in (ROOT / "README.md").read_text("utf-8")


@pytest.mark.parametrize("document", ["README.md", "CONTRIBUTING.md", "DECISIONS.md"])
def test_house_document_names_what_exists(document):
    text = (ROOT / document).read_text("utf-8")
    for name in re.findall(r"`((?:csrc|triton_kernels|pyattn|benchmarks|tests)/[\w./-]*)`", text):
        assert (ROOT / name).exists(), f"{document} names {name}"
    for name in re.findall(r"\]\(([\w./-]+)\)", text):
        assert (ROOT / name).exists(), f"{document} links {name}"
    for module, name in re.findall(r"`(\w+)\.(\w+)`", text):
        if (ROOT / "pyattn" / f"{module}.py").exists():
            assert hasattr(importlib.import_module(f"pyattn.{module}"), name), f"{document} names {module}.{name}"


def test_house_promises_the_torch_and_the_triton_that_are_tested():
    oldest, *_, newest = triton.TORCH.values()
    pyproject, makefile = ((ROOT / name).read_text("utf-8") for name in ("pyproject.toml", "Makefile"))
    assert f'"torch>={oldest}"' in pyproject
    for name, expected in (("TORCHES", [oldest, newest]), ("TRITONS", list(triton.TORCH))):
        versions = re.search(rf"^{name} := (.*)", makefile, re.M)[1].split()
        assert [version.rpartition(".")[0] for version in versions] == expected


def test_house_every_feature_has_a_case():
    used = {"cached", "paged"}  # without gradients, so with cases of their own, in test_kvcache.py
    for case in testing.CASES:
        call = testing.make_inputs(case, testing.torch.float32)
        used |= AttentionSpec.of(*core.prepare(**call.tensors, **call.options)).features
    assert used == set(FEATURES)
