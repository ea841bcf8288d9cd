"""What happens when the extension cannot be built or loaded: an installable package and a reason in words."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from setuptools import Distribution, Extension

from pyattn.backends import cpu

ROOT = Path(__file__).parents[1]
NO_COMPILER = """-- Configuring incomplete, errors occurred!
CMake Error at CMakeLists.txt:2 (project):
  No CMAKE_CXX_COMPILER could be found.
"""


@pytest.fixture(scope="module")
def setup_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("pyattn_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_failure_reason_without_compiler_names_cause_and_remedy(setup_module):
    reason = setup_module.failure_reason(NO_COMPILER)
    assert reason.startswith("not built: no C++17 compiler was found")
    assert "pip install again" in reason


def test_failure_reason_of_failed_compile_quotes_first_error(setup_module):
    output = "[1/7] Building CXX\nvec.h:12:3: error: no vector types\nvec.h:13:1: error: more\nninja: build stopped\n"
    assert "vec.h:12:3: error: no vector types" in setup_module.failure_reason(output)


def test_build_that_fails_warns_and_leaves_the_reason_for_the_backend(setup_module, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_module, "compile_extension", lambda *_: NO_COMPILER)
    command = _build_command(setup_module, tmp_path)
    with pytest.warns(UserWarning, match="No CMAKE_CXX_COMPILER could be found"):
        command.run()
    reason = cpu.not_built_reason(tmp_path / "lib" / "pyattn", ImportError("no module"))
    assert reason == setup_module.failure_reason(NO_COMPILER)


def test_build_that_succeeds_removes_an_earlier_reason(setup_module, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_module, "compile_extension", lambda *_: "")
    package = tmp_path / "lib" / "pyattn"
    package.mkdir(parents=True)
    (package / setup_module.REASON_FILE).write_text("not built: an earlier reason\n")
    _build_command(setup_module, tmp_path).run()
    assert not (package / setup_module.REASON_FILE).exists()


def test_editable_build_that_fails_leaves_the_reason_and_no_old_module_in_the_source(
    setup_module, monkeypatch, tmp_path
):
    package = tmp_path / "pyattn"
    package.mkdir()
    (package / "__init__.py").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(setup_module, "compile_extension", lambda *_: NO_COMPILER)
    command = _build_command(setup_module, tmp_path, inplace=True)
    old = package / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    old.touch()
    with pytest.warns(UserWarning):
        command.run()
    assert not old.exists()
    assert (package / setup_module.REASON_FILE).read_text().startswith("not built: no C++17 compiler")


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for cmake is a shell script")
def test_compile_extension_returns_what_a_failing_tool_printed(setup_module, monkeypatch, tmp_path):
    tool = tmp_path / "cmake"
    tool.write_text("#!/bin/sh\necho the tool says no >&2\nexit 3\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_cmake_dir=lambda: "nowhere"))
    assert "the tool says no" in setup_module.compile_extension(tmp_path / "build", tmp_path / "_C.so", False)


def test_compile_extension_without_cmake_says_so(setup_module, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pybind11", SimpleNamespace(get_cmake_dir=lambda: "nowhere"))
    assert "cmake could not be started" in setup_module.compile_extension(tmp_path / "b", tmp_path / "_C.so", False)


def test_not_built_reason_of_a_module_that_cannot_be_loaded_quotes_the_loader(tmp_path):
    (tmp_path / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    reason = cpu.not_built_reason(tmp_path, ImportError("libgomp.so.1: cannot open shared object file"))
    assert reason == "built, but cannot be loaded: libgomp.so.1: cannot open shared object file"


def test_backend_without_extension_is_unavailable_with_its_reason(monkeypatch):
    monkeypatch.setattr(cpu, "_extension", lambda: "not built: no compiler")
    assert cpu.CpuBackend().unavailable() == "not built: no compiler"
    assert cpu.isas() == []


def _build_command(setup_module: ModuleType, folder: Path, inplace: bool = False):
    extension = Extension("pyattn._C", sources=[])
    command = setup_module.BuildWithCMake(
        Distribution({"name": "pyattn", "packages": ["pyattn"], "ext_modules": [extension]})
    )
    command.inplace = inplace
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    return command
