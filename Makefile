# The first target that is called makes the virtual environment .venv; after that no network is needed.
PYTHON ?= python3
VENV := .venv
RUN := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed

export HF_HUB_OFFLINE ?= 1
export WANDB_MODE ?= offline
export TOKENIZERS_PARALLELISM ?= false

.DEFAULT_GOAL := help
.PHONY: help setup demo check test test-all docs format clean

help: ## list the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## /\1\t/' | expand -t 10

setup: $(INSTALLED) ## make the virtual environment .venv with MIFO in it

MODEL ?= miniature
demo: $(INSTALLED) ## learn three look-alikes from one image, put them into boxes, score the pictures
	@echo 'Learns three look-alike cars from one drawn image, puts each into its box of new pictures and scores them:'
	@echo 'learning, synthesis and evaluation, which say how long they took, two to four minutes in all on two cores.'
	@$(RUN) -m mifo run experiment=$(MODEL:miniature%=demo%)

check: $(INSTALLED) ## check format, style, types and floors
	$(RUN) -m ruff format --check .
	$(RUN) -m ruff check .
	$(RUN) -m mypy
	$(RUN) -m pytest tests/test_floors.py

test: check ## check, then run the fast tests
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto

test-all: check ## check, then run all tests, with real processes and launchers
	OMP_NUM_THREADS=1 $(RUN) -m pytest -n auto -m ''

docs: $(INSTALLED) ## build the site of docs/ into build/docs
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --config-file scripts/mkdocs.yml
	@echo 'Open build/docs/index.html; its search needs a server: $(RUN) -m mkdocs serve --config-file scripts/mkdocs.yml'

format: $(INSTALLED) ## put the code into the house's format
	$(RUN) -m ruff check --fix .
	$(RUN) -m ruff format .

clean: ## remove the environment, caches and builds; outputs stay
	rm -rf $(VENV) build dist .pytest_cache .ruff_cache .mypy_cache *.egg-info

# torch first: pip then keeps the build that fits this machine
$(INSTALLED): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo 'mifo needs Python 3.11 or newer; name one: make PYTHON=python3.12 $(MAKECMDGOALS)'; exit 1; }
	@$(RUN) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV) || \
		{ echo 'no virtual environment could be made; on Debian: apt install python3-venv'; exit 1; }
	$(RUN) -m pip install --quiet torch torchvision
	$(RUN) -m pip install --quiet --editable '.[dev]'
	@touch $@
