# Two commands: `make quickstart` runs the main job, `make test` the tests. Both install what they need into .venv first.
PYTHON ?= python3
STAMP := .venv/.installed

.PHONY: help install quickstart test lint clean

help:
	@echo "make quickstart   install, then train a small model with RLHF and report (configs/quickstart.yaml)"
	@echo "make test         install, then run the tests"
	@echo "make install      only install, into .venv (PYTHON=python3.12 chooses the interpreter)"
	@echo "make lint         check style"
	@echo "make clean        remove .venv and runs"

install: $(STAMP)

$(STAMP): requirements/cpu.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(0 if (3, 11) <= sys.version_info[:2] <= (3, 12) else "rlhf-ray needs Python 3.11 or 3.12, this is %d.%d: make PYTHON=python3.12" % sys.version_info[:2])'
	$(PYTHON) -m venv --clear .venv
	.venv/bin/python -m pip install -q --disable-pip-version-check "torch==2.13.0"
	.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps -r requirements/cpu.txt
	.venv/bin/python -m pip install -q --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $(STAMP)

quickstart: install
	.venv/bin/rlhf-ray run configs/quickstart.yaml --fresh

test: install
	.venv/bin/python -m pytest

lint: install
	.venv/bin/ruff check . && .venv/bin/ruff format --check .

clean:
	rm -rf .venv runs
