"""Real pip and a real compiler: what is installed, from where, and what a second time builds."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NO_COMPILER = "/there/is/no/compiler"

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for the compiler is a shell script")


class Environment:
    """A virtual environment of its own, which borrows torch from the one that runs the tests."""

    def __init__(self, folder: Path) -> None:
        venv.create(folder, symlinks=True)
        self.folder, self.python = folder, folder / "bin" / "python"

    def pip(self, *arguments: str | Path, **variables: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pip", "--python", self.python, *arguments]
        return _run(command, PIP_CONSTRAINT=ROOT / "constraints.txt", **variables)

    def install(self, *what: str | Path, **variables: str | Path) -> None:
        done = self.pip("install", "--no-deps", *what, **variables)
        assert done.returncode == 0, done.stdout

    def run(self, *arguments: str | Path, folder: Path) -> str:
        done = _run([self.python, *arguments], folder, PYTHONPATH=sysconfig.get_path("purelib"))
        assert done.returncode == 0, done.stdout
        return done.stdout.strip()

    def cpu_backend(self) -> str:
        code = "import pyattn; print(pyattn.list_backends()['cpu'])"
        return self.run("-c", code, folder=self.folder)


class Compiler:
    """The machine's C++ compiler without optimisation, which takes a tenth of the time, and what it has compiled."""

    def __init__(self, folder: Path) -> None:
        self.path, self.log = folder / "compiler", folder / "compiler.log"
        real = os.environ.get("CXX") or shutil.which("c++")
        self.path.write_text(f'#!/bin/sh\necho "$@" >> {self.log}\nexec {real} "$@" -O0\n')
        self.path.chmod(0o755)

    def compiled(self) -> set[str]:
        """The files of csrc/ since the last call."""
        log = self.log.read_text()
        self.log.unlink()
        return set(re.findall(r"/csrc/(\S+\.cpp)", log))


def _run(command: list[str | Path], folder: Path | None = None, **variables: str | Path) -> subprocess.CompletedProcess:
    environment = os.environ | {name: str(value) for name, value in variables.items()}
    return subprocess.run(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """This checkout as a fresh clone would be, in a folder that is named like the package."""
    built = shutil.ignore_patterns(".*", "build", "dist", "runs", "*.egg-info", "_C*", "__pycache__")
    return Path(shutil.copytree(ROOT, tmp_path / "pyattn", symlinks=True, ignore=built))


@pytest.fixture
def environment(tmp_path: Path) -> Environment:
    return Environment(tmp_path / "environment")


@pytest.fixture
def compiler(tmp_path: Path) -> Compiler:
    return Compiler(tmp_path)


def test_install_twice_builds_each_time_and_forgets_what_left_the_source(checkout, environment, compiler):
    module = checkout / "pyattn" / "short_lived.py"
    module.touch()
    for present in (True, False):
        environment.install(checkout, CXX=compiler.path)
        assert environment.cpu_backend() == "ready"
        assert "bindings.cpp" in compiler.compiled()
        find = "import importlib.util as u, pyattn; print(u.find_spec('pyattn.short_lived') is not None)"
        assert environment.run("-c", find, folder=environment.folder) == str(present)
        module.unlink(missing_ok=True)


def test_install_without_compiler_and_again_with_one_builds(checkout, environment, compiler):
    environment.install(checkout, CXX=NO_COMPILER)
    assert environment.cpu_backend().startswith("not built: no C++17 compiler was found")
    environment.install(checkout, CXX=compiler.path)
    assert environment.cpu_backend() == "ready"


def test_install_fails_where_a_compiler_is_and_the_build_fails(checkout, environment, compiler):
    source = checkout / "csrc" / "bindings.cpp"
    source.write_text("#error this cannot be compiled\n" + source.read_text())
    failed = environment.pip("install", "--no-deps", checkout, CXX=compiler.path)
    assert failed.returncode != 0
    assert "#error this cannot be compiled" in failed.stdout
    assert "PYATTN_BUILD_CPU=0 installs without it" in failed.stdout


def test_install_fails_without_compiler_where_the_kernels_are_demanded(checkout, environment):
    failed = environment.pip("install", "--no-deps", checkout, CXX=NO_COMPILER, PYATTN_BUILD_CPU="1")
    assert failed.returncode != 0
    assert "not built: no C++17 compiler was found" in failed.stdout


def test_sdist_makes_a_wheel_that_holds_in_an_empty_environment(checkout, environment, compiler, tmp_path):
    made = _run([sys.executable, "setup.py", "--quiet", "sdist", "--dist-dir", tmp_path], checkout)
    assert made.returncode == 0, made.stdout
    shutil.rmtree(checkout)
    (sdist,) = tmp_path.glob("pyattn-*.tar.gz")
    environment.pip("wheel", "--no-deps", "--wheel-dir", tmp_path, sdist, CXX=compiler.path)
    (wheel,) = tmp_path.glob("pyattn-*.whl")
    environment.install(wheel)
    assert "the wheel holds" in environment.run(ROOT / "tests" / "wheel_check.py", folder=tmp_path)


def test_editable_install_again_compiles_what_changed_and_all_after_a_move(checkout, environment, compiler):
    environment.install("--editable", checkout, CXX=NO_COMPILER)
    assert environment.cpu_backend().startswith("not built: no C++17 compiler was found")
    environment.install("--editable", checkout, CXX=compiler.path)
    assert environment.cpu_backend() == "ready"
    assert {"bindings.cpp", "cpu/plan.cpp", "cpu/generic.cpp"} < compiler.compiled()
    (checkout / "csrc" / "cpu" / "plan.cpp").touch()
    environment.install("--editable", checkout, CXX=compiler.path)
    assert compiler.compiled() == {"cpu/plan.cpp"}
    checkout = checkout.rename(checkout.with_name("moved"))
    environment.install("--editable", checkout, CXX=compiler.path)
    assert environment.cpu_backend() == "ready"


def test_editable_install_is_the_package_beside_its_clone_and_for_type_checkers(checkout, environment, tmp_path):
    environment.install("--editable", checkout, PYATTN_BUILD_CPU="0")
    (checkout / "triton_kernels" / "written_later.py").touch()
    code = "import pyattn.triton_kernels.written_later, pyattn.benchmarks; print(pyattn.attention.__module__)"
    assert environment.run("-c", code, folder=checkout.parent) == "pyattn.api"

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    user = elsewhere / "user.py"
    user.write_text("import pyattn\nimport pyattn.triton_kernels.config\nreveal_type(pyattn.explain)\n")
    mypy = _run([sys.executable, "-m", "mypy", "--python-executable", environment.python, user], elsewhere)
    pyright = _run([sys.executable, "-m", "pyright", "--pythonpath", environment.python, user], elsewhere)
    for checker in (mypy, pyright):
        assert checker.returncode == 0, checker.stdout
        assert re.search(r"backend: (builtins\.)?str", checker.stdout), checker.stdout
