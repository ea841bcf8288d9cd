# make run: everything a new user wants to see.  make test: everything that must hold.
# make test-compile: the Triton kernels compiled by Triton 3.6, 3.7 and 3.8.
# make sanitize: the CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer; needs GCC.
# All set themselves up in .venv inside this folder and touch nothing outside it.

PYTHON ?= python3
BIN := .venv/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/* csrc/*/*)

.PHONY: run test test-compile sanitize clean

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
SANITIZE := $(CURDIR)/build/sanitize
SANITIZED := cd $(SANITIZE) && PYTHONPATH=package ASAN_OPTIONS=detect_leaks=0:log_path=report \
  UBSAN_OPTIONS=print_stacktrace=1:log_path=report \
  LD_PRELOAD="$(foreach name,asan ubsan stdc++,$$($(CXX) -print-file-name=lib$(name).so))" $(CURDIR)/$(BIN)/python
SANITIZED_TESTS := $(foreach name,cpu_border cpu_threads cpu linear contract fuzz,$(CURDIR)/tests/test_$(name).py)

sanitize: .venv/sanitize
	rm -rf $(SANITIZE)/package $(SANITIZE)/report.*
	$(BIN)/python setup.py --quiet build_py --build-lib $(SANITIZE)/package
	PATH="$(CURDIR)/$(BIN):$$PATH" CXX=$(CXX) cmake -G Ninja -S csrc -B $(SANITIZE)/cmake -DPYATTN_SANITIZE=ON \
	  -DPython_EXECUTABLE=$(CURDIR)/$(BIN)/python \
	  -Dpybind11_DIR="$$($(BIN)/python -m pybind11 --cmakedir)"
	PATH="$(CURDIR)/$(BIN):$$PATH" cmake --build $(SANITIZE)/cmake
	cp $(SANITIZE)/cmake/_C*.so $(SANITIZE)/package/pyattn/
	$(SANITIZED) -c 'import torch, pyattn._C as c; assert "/sanitize/" in c.__file__, c.__file__; print(c.isas())'
	$(SANITIZED) -m pytest $(SANITIZED_TESTS) -k 'not reference and not memory and not median' --numprocesses 2 \
	  || { cat $(SANITIZE)/report.*; exit 1; }

# Each in a folder of its own. Triton 3.9 compiles everything it was shown, but lets d_k and d_v of head size 128 spill.
TRITONS := 3.6.0 3.7.0 3.8.0

test-compile: $(TRITONS:%=test-compile-%)

test-compile-%: .venv/test
	test -d build/triton-$*/triton || $(BIN)/python -m pip install --quiet --no-deps --target build/triton-$* triton==$*
	PYTHONPATH=build/triton-$* $(BIN)/python -c 'import triton; assert triton.__version__ == "$*", triton.__version__'
	PYTHONPATH=build/triton-$* $(BIN)/python -m pytest tests/test_triton_compile.py tests/test_hopper_compile.py -o cache_dir=build/triton-$*/cache

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pyattn needs Python 3.10 or newer; choose one with make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/tools: .venv/bin/python $(SOURCES)
	$(PIP) --editable '.[tools]'
	@touch $@

.venv/test: .venv/tools
	$(PIP) --editable '.[tools,test]'
	@touch $@

.venv/sanitize: .venv/test
	$(PIP) cmake ninja 'pybind11>=2.13'
	@touch $@

clean:
	rm -rf .venv build runs *.egg-info pyattn/_C*
