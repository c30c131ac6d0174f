# Two commands: `make quickstart` runs the main job, `make test` the tests. Both install what they need into .venv first.
PYTHON ?= python3
STAMP := .venv/.installed
PIP := .venv/bin/python -m pip install -q --disable-pip-version-check

.PHONY: help install quickstart test test-fast check format docs wheel clean

help:
	@echo "make quickstart   install, then train a small model with RLHF and report (configs/quickstart.yaml)"
	@echo "make test         install, then run all tests"
	@echo "make test-fast    install, then run the tests that start neither Ray nor vLLM (under a minute)"
	@echo "make check        install, then check style, format and types"
	@echo "make docs         install, then build the documentation site into build/site"
	@echo "make wheel        install, then build a wheel with the recipes into dist"
	@echo "make format       install, then format the code"
	@echo "make install      only install, into .venv (PYTHON=python3.12 chooses the interpreter)"
	@echo "make clean        remove .venv, build, dist and runs"

install: $(STAMP)

$(STAMP): requirements/cpu.txt requirements/dev.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else "rlhf-ray needs Python 3.11 or 3.12, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv --clear .venv
	$(PIP) "torch==2.13.0"
	$(PIP) --no-deps -r requirements/cpu.txt -r requirements/dev.txt
	$(PIP) --no-deps --no-build-isolation -e .
	@touch $(STAMP)

quickstart: install
	.venv/bin/rlhf-ray run configs/quickstart.yaml --fresh

test: install
	.venv/bin/python -m pytest

test-fast: install
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -m "not engine" -n 2

check: install
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

format: install
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

docs: install
	.venv/bin/python -m mkdocs build --strict

wheel: install
	.venv/bin/python -m pip wheel -q --disable-pip-version-check --no-deps --no-build-isolation -w dist .

clean:
	rm -rf .venv build dist runs
