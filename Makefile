# Every target works from a bare checkout: the environment is made when it is needed,
# and made again when pyproject.toml changes. `PYTHON=python3.12 make book` picks the
# interpreter.

PYTHON ?= python3
UV := $(shell uv --version >/dev/null 2>&1 && echo uv)
STAMP := .venv/.stamp
ifdef UV
INSTALL := uv pip install --quiet --python .venv/bin/python
else
INSTALL := .venv/bin/python -m pip install --quiet
endif

.DEFAULT_GOAL := help
.PHONY: help book test lint check-results lab data bench clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-14s %s\n", $$1, $$2}' Makefile

book: $(STAMP) ## Run the chapters and build the book: _build/html/index.html
	.venv/bin/python book/build.py

test: $(STAMP) ## Run the tests, every chapter at its smoke setting included
	.venv/bin/python -m pytest --numprocesses auto --dist worksteal

lint: $(STAMP) ## Check style and formatting, notebooks included
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

check-results: $(STAMP) ## Look for records that cannot be trusted
	.venv/bin/python -m lrnde.records check book/results

lab: $(STAMP) ## Open the chapters in JupyterLab
	.venv/bin/jupyter lab notebooks

data: $(STAMP) ## Fetch the data sets, or check those that LRNDE_DATA names
	.venv/bin/python -m lrnde.data mnist
	.venv/bin/python -m lrnde.data physionet2012
	.venv/bin/python -m lrnde.data cifar10

bench: $(STAMP) ## Time solves and gradients: writes book/benchmarks/<platform>.json
	$(INSTALL) -e '.[bench]'
	.venv/bin/python -m benchmarks

clean: ## Remove the built book, its notebook cache and the environment
	rm -rf _build .venv

# The stamp is written last, so a half-made environment is never taken for a whole one.
$(STAMP): pyproject.toml
	@rm -f $(STAMP)
ifdef UV
	uv venv --quiet --allow-existing --python '$(if $(filter file,$(origin PYTHON)),>=3.11,$(PYTHON))' .venv
else
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'lrnde needs Python 3.11 or later: PYTHON=python3.12 make ...' >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv || \
	  { echo 'No virtual environment. On Debian or Ubuntu: apt install python3-venv' >&2; exit 1; }
endif
	$(INSTALL) -e '.[book,test]'
	@touch $(STAMP)
