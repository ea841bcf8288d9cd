"""Lists the packages and builds pyattn._C with CMake and Ninja; everything else is in pyproject.toml.

A machine without a C++17 compiler still gets an installable package: the failure is a warning, and its reason is left
beside the package for the `cpu` backend to show.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
REASON_FILE = "_C.not_built.txt"  # read by pyattn/backends/cpu.py
SHOWN_LINES = 12  # of a failed build's output, in the warning
# Top-level folders that are installed inside the package.
MAPPED = {"pyattn.triton_kernels": "triton_kernels", "pyattn.benchmarks": "benchmarks"}


class BuildWithCMake(build_ext):
    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        reason_file = target.with_name(REASON_FILE)
        if output := compile_extension(Path(self.build_temp).resolve(), target, bool(self.debug)):
            target.unlink(missing_ok=True)
            reason_file.write_text(failure_reason(output) + "\n", encoding="utf-8")
            last_lines = "\n".join(output.strip().splitlines()[-SHOWN_LINES:])
            message = f"pyattn is installed without its cpu backend: {failure_reason(output)}\n{last_lines}"
            warnings.warn(message, stacklevel=1)
        else:
            reason_file.unlink(missing_ok=True)

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
        return "pybind11 is not installed"
    build_dir.mkdir(parents=True, exist_ok=True)
    configure = [
        *("cmake", "-G", "Ninja", "-S", str(ROOT / "csrc"), "-B", str(build_dir)),
        f"-DCMAKE_BUILD_TYPE={'Debug' if debug else 'Release'}",
        f"-DPython_EXECUTABLE={sys.executable}",
        f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
    ]
    try:
        for command in (configure, ["cmake", "--build", str(build_dir)]):
            run = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
            if run.returncode != 0:
                return run.stdout or f"{' '.join(command[:2])} ended with status {run.returncode}"
    except OSError as error:
        return f"{error.filename or 'cmake'} could not be started: {error.strerror}"
    built = next(build_dir.glob("_C*.so"), None) or next(build_dir.glob("_C*.pyd"), None)
    if built is None:
        return f"the build left no _C module in {build_dir.name}"
    replace_file(target, built)
    return ""


def replace_file(target: Path, source: Path) -> None:
    """Copies in one step: a process that has the old module open keeps it."""
    fresh = target.with_name(target.name + ".new")
    fresh.write_bytes(source.read_bytes())
    fresh.replace(target)


def failure_reason(output: str) -> str:
    """One sentence for the user of the `cpu` backend, out of what the build tools printed."""
    if "CMAKE_CXX_COMPILER could be found" in output or "not a full path to an existing compiler" in output:
        return "not built: no C++17 compiler was found when pyattn was installed; install one and run pip install again"
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    first = next((number for number, line in enumerate(lines) if "error" in line.lower()), 0)
    cause = " ".join(lines[first : first + 2])  # CMake says where in one line and what in the next
    return f"not built: the build failed when pyattn was installed ({cause}); mend it and run pip install again"


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["pyattn", "pyattn.*"]), *MAPPED],
        package_dir=MAPPED,
        ext_modules=[Extension("pyattn._C", sources=[])],
        cmdclass={"build_ext": BuildWithCMake},
    )
