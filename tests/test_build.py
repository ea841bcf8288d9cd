"""What happens when the extension cannot be built or loaded: an installable package and a reason in words."""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from setuptools import Distribution, Extension
from setuptools.errors import CompileError

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


def test_build_without_compiler_warns_and_leaves_the_reason_for_the_backend(setup_module, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_module, "compile_extension", lambda *_: NO_COMPILER)
    command = _build_command(setup_module, tmp_path)
    with pytest.warns(UserWarning, match=r"without its cpu backend: not built: no C\+\+17 compiler"):
        command.run()
    reason = cpu.not_built_reason(tmp_path / "lib" / "pyattn", ImportError("no module"))
    assert reason == setup_module.failure_reason(NO_COMPILER)


@pytest.mark.parametrize(("output", "switch"), [("vec.h:12:3: error: no vector types", ""), (NO_COMPILER, "1")])
def test_build_that_fails_with_a_compiler_or_without_one_that_is_demanded_raises(
    setup_module, monkeypatch, tmp_path, output, switch
):
    monkeypatch.setenv(setup_module.SWITCH, switch)
    monkeypatch.setattr(setup_module, "compile_extension", lambda *_: output)
    with pytest.raises(CompileError, match=r"(?s)rror.*PYATTN_BUILD_CPU=0 installs without it"):
        _build_command(setup_module, tmp_path).run()


def test_build_switch_is_0_or_1(setup_module, monkeypatch, tmp_path):
    monkeypatch.setenv(setup_module.SWITCH, "yes")
    with pytest.raises(CompileError, match="PYATTN_BUILD_CPU: expected 0, 1 or nothing, got 'yes'"):
        _build_command(setup_module, tmp_path).run()


def test_build_that_is_switched_off_says_so(setup_module, monkeypatch, tmp_path):
    monkeypatch.setenv(setup_module.SWITCH, "0")
    with pytest.warns(UserWarning, match="PYATTN_BUILD_CPU was 0"):
        _build_command(setup_module, tmp_path).run()
    reason = cpu.not_built_reason(tmp_path / "lib" / "pyattn", ImportError("no module"))
    assert reason.startswith("not built: PYATTN_BUILD_CPU was 0")


def test_build_that_succeeds_removes_an_earlier_reason(setup_module, monkeypatch, tmp_path):
    monkeypatch.setattr(setup_module, "compile_extension", lambda *_: "")
    package = tmp_path / "lib" / "pyattn"
    package.mkdir(parents=True)
    (package / setup_module.REASON_FILE).write_text("not built: an earlier reason\n")
    _build_command(setup_module, tmp_path).run()
    assert not (package / setup_module.REASON_FILE).exists()


def test_editable_build_without_compiler_leaves_the_reason_and_no_old_module_in_the_source(
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
    monkeypatch.setitem(sys.modules, "pybind11", _empty_pybind11(tmp_path))
    assert "the tool says no" in setup_module.compile_extension(tmp_path / "build", tmp_path / "_C.so", False)


def test_compile_extension_without_cmake_says_so(setup_module, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(sys.modules, "pybind11", _empty_pybind11(tmp_path))
    assert "cmake could not be started" in setup_module.compile_extension(tmp_path / "b", tmp_path / "_C.so", False)


def test_not_built_reason_of_a_module_that_cannot_be_loaded_quotes_the_loader(tmp_path):
    (tmp_path / "_C.cpython-311-x86_64-linux-gnu.so").touch()
    reason = cpu.not_built_reason(tmp_path, ImportError("libgomp.so.1: cannot open shared object file"))
    assert reason == "built, but cannot be loaded: libgomp.so.1: cannot open shared object file"


def test_not_built_reason_of_a_source_folder_says_that_it_is_one(tmp_path):
    assert "run pip install again" in cpu.not_built_reason(tmp_path / "pyattn", ImportError("no module"))
    (tmp_path / "setup.py").touch()
    reason = cpu.not_built_reason(tmp_path / "pyattn", ImportError("no module"))
    assert reason == f"not built: this pyattn is the source in {tmp_path}; run pip install --editable . there"


def test_backend_without_extension_is_unavailable_with_its_reason(monkeypatch):
    monkeypatch.setattr(cpu, "_extension", lambda: "not built: no compiler")
    assert cpu.CpuBackend().unavailable() == "not built: no compiler"
    assert cpu.isas() == []


def _empty_pybind11(folder: Path) -> SimpleNamespace:
    package = folder / "pybind11"
    package.mkdir()
    return SimpleNamespace(__version__="3", __file__=str(package / "__init__.py"))


def _build_command(setup_module: ModuleType, folder: Path, inplace: bool = False):
    extension = Extension("pyattn._C", sources=[])
    command = setup_module.BuildWithCMake(
        Distribution({"name": "pyattn", "packages": ["pyattn"], "ext_modules": [extension]})
    )
    command.inplace = inplace
    command.build_lib, command.build_temp = str(folder / "lib"), str(folder / "temp")
    command.ensure_finalized()
    return command
