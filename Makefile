# make run: everything a new user wants to see.  make test: everything that must hold.
# Both set themselves up in .venv inside this folder and touch nothing outside it.

PYTHON ?= python3
BIN := .venv/bin
PIP := PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --disable-pip-version-check
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/* csrc/*/*)

.PHONY: run test clean

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

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10) and "pyattn needs Python 3.10 or newer; choose one with make PYTHON=...")'
	$(PYTHON) -m venv .venv

.venv/tools: .venv/bin/python $(SOURCES)
	$(PIP) --editable '.[tools]'
	@touch $@

.venv/test: .venv/tools
	$(PIP) --editable '.[tools,test]'
	@touch $@

clean:
	rm -rf .venv build runs *.egg-info pyattn/_C*
