"""Builds pyattn._C with CMake and Ninja; everything else is in pyproject.toml.

A machine without a C++17 compiler still gets an installable package, with a reason beside it for the `cpu` backend to
show. Where there is a compiler and the build fails, the installation fails. With PYATTN_BUILD_CPU=1 it fails in either
case; with PYATTN_BUILD_CPU=0 the kernels are not built at all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build import build
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

ROOT = Path(__file__).parent.resolve()
SWITCH = "PYATTN_BUILD_CPU"
REASON_FILE = "_C.not_built.txt"  # read by pyattn/backends/cpu.py
SHOWN_LINES = 12  # of a failed build's output
NO_COMPILER = re.compile("No CMAKE_CXX_COMPILER could be found|Could not find (?:the )?compiler")  # CMake's words


class BuildAfresh(build):
    """In an empty folder: what has left the source, or was found on another machine, must not end up in a wheel."""

    def initialize_options(self) -> None:
        super().initialize_options()
        self.folder = tempfile.TemporaryDirectory(prefix="pyattn-build-")
        self.build_base = self.folder.name


class BuildWithCMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        reason_file = target.with_name(REASON_FILE)
        if reason := self.not_built_reason(target):
            target.unlink(missing_ok=True)
            reason_file.write_text(reason + "\n", encoding="utf-8")
            warnings.warn(f"pyattn is installed without its cpu backend: {reason}", stacklevel=1)
        else:
            reason_file.unlink(missing_ok=True)

    def not_built_reason(self, target: Path) -> str:
        """Builds `target`. Returns "", or why the package goes without it; raises where it must not."""
        switch = os.environ.get(SWITCH, "")
        if switch not in ("", "0", "1"):
            raise CompileError(f"{SWITCH}: expected 0, 1 or nothing, got {switch!r}")
        if switch == "0":
            return f"not built: {SWITCH} was 0 when pyattn was installed; install it again without"
        output = compile_extension(self.build_folder(), target, bool(self.debug))
        if not output:
            return ""
        reason = failure_reason(output)
        if switch == "1" or not NO_COMPILER.search(output):
            last_lines = "\n".join(output.strip().splitlines()[-SHOWN_LINES:])
            raise CompileError(f"{last_lines}\npyattn's cpu backend is {reason}; {SWITCH}=0 installs without it")
        return reason

    def build_folder(self) -> Path:
        """One that is kept for the next editable installation, so that it compiles what has changed."""
        kept = ROOT / "build" / str(sys.implementation.cache_tag)
        return kept if self.editable_mode else Path(self.build_temp).resolve()

    def copy_extensions_to_source(self) -> None:
        """After an editable build: the module, or the reason that there is none, and not the other one's remains."""
        package = Path(self.get_finalized_command("build_py").get_package_dir("pyattn"))
        for ext in self.extensions:
            built = Path(self.build_lib, self.get_ext_filename(ext.name))
            for file in (built, built.with_name(REASON_FILE)):
                if file.exists():
                    replace_file(package / file.name, file)
                else:
                    (package / file.name).unlink(missing_ok=True)


def compile_extension(build_dir: Path, target: Path, debug: bool) -> str:
    """Builds `target`. Returns "" on success, otherwise what the tools printed."""
    try:
        import pybind11
    except ImportError:
        return "error: pybind11 is not installed"
    forget_tools(build_dir)
    # pip's isolated builds have pybind11 in another place every time, which would be another command for every object.
    headers = build_dir / f"pybind11-{pybind11.__version__}"
    if not headers.exists():
        shutil.copytree(Path(pybind11.__file__).parent, headers)
    configure = [
        *("cmake", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(build_dir)),
        f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={headers / 'share/cmake/pybind11'}",
    ]
    try:
        for command in (configure, ["cmake", "--build", str(build_dir)]):
            run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if run.returncode != 0:
                return run.stdout or f"{' '.join(command[:2])} ended with status {run.returncode}"
    except OSError as error:
        return f"error: {error.filename or 'cmake'} could not be started: {error.strerror}"
    built = next(build_dir.glob("_C*.so"), None) or next(build_dir.glob("_C*.pyd"), None)
    if built is None:
        return f"error: the build left no _C module in {build_dir.name}"
    replace_file(target, built)
    return ""


def forget_tools(build_dir: Path) -> None:
    """Lets CMake look for its tools anew: those of an earlier build may have moved or gone. Objects stay."""
    (build_dir / "CMakeCache.txt").unlink(missing_ok=True)
    for found in build_dir.glob("CMakeFiles/[0-9]*"):
        shutil.rmtree(found)


def replace_file(target: Path, source: Path) -> None:
    """Copies in one step: a process that has the old module open keeps it."""
    fresh = target.with_name(target.name + ".new")
    fresh.write_bytes(source.read_bytes())
    fresh.replace(target)


def failure_reason(output: str) -> str:
    """One sentence for the user of the `cpu` backend, out of what the build tools printed."""
    if NO_COMPILER.search(output):
        return "not built: no C++17 compiler was found when pyattn was installed; install one and run pip install again"
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    first = next((number for number, line in enumerate(lines) if "error" in line.lower()), 0)
    cause = " ".join(lines[first : first + 2])  # CMake says where in one line and what in the next
    return f"not built: the build failed ({cause})"


if __name__ == "__main__":
    commands = {"build": BuildAfresh, "build_ext": BuildWithCMake}
    setup(ext_modules=[Extension("pyattn._C", sources=[])], cmdclass=commands)
