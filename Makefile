# `make test` uses python3 and .venv; `PYTHON=python3.12 make test` uses that interpreter and .venv-3.12.
ifdef PYTHON
  SUFFIX = -$(VERSION)
else
  PYTHON := python3
endif

VERSION := $(shell $(PYTHON) -c 'import sys; print(*sys.version_info[:2], sep=".") if sys.version_info >= (3, 11) else exit(1)' 2>/dev/null)
ifeq ($(VERSION),)
  $(error flaxbn needs Python 3.11 or newer: $(PYTHON) is $(or $(shell $(PYTHON) --version 2>/dev/null),no Python that runs). \
    Name another one: make PYTHON=python3.11 $(MAKECMDGOALS))
endif

VENV := .venv$(SUFFIX)
BIN := $(VENV)/bin
# The stamp names the version, so that a new python3 does not inherit the old one's environment.
INSTALLED := $(VENV)/.installed-$(VERSION)
CLIENTS_INSTALLED := $(VENV)-clients/.installed-$(VERSION)
PIP_INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt

.PHONY: train domains test mutation fuzz flax-suite clients readme docs notebooks lint bench dist clean
.DEFAULT_GOAL := test

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv --clear $(VENV)
	$(PIP_INSTALL) --editable '.[scripts,test]'
	touch $@

$(INSTALLED)-lint: $(INSTALLED)
	$(PIP_INSTALL) --editable '.[lint]'
	touch $@

$(INSTALLED)-notebooks: $(INSTALLED)
	$(PIP_INSTALL) --editable '.[notebooks]'
	touch $@

$(INSTALLED)-docs: $(INSTALLED)
	$(PIP_INSTALL) --editable '.[docs]'
	touch $@

$(INSTALLED)-dist: $(INSTALLED)
	$(PIP_INSTALL) --editable '.[dist]'
	touch $@

# Of SBX the critics alone are run, which need nothing but Flax.
$(CLIENTS_INSTALLED): pyproject.toml constraints.txt tests/clients/requirements.txt
	$(PYTHON) -m venv --clear $(VENV)-clients
	$(VENV)-clients/bin/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt \
	  --editable '.[export]' --requirement tests/clients/requirements.txt
	$(VENV)-clients/bin/python -m pip install --quiet --disable-pip-version-check --no-deps sbx-rl==0.28.0
	touch $@

train: $(INSTALLED)
	$(BIN)/python scripts/train_mnist.py --out runs/digits --overwrite $(ARGS)

domains: $(INSTALLED)
	$(BIN)/python scripts/train_domains.py --out runs/domains --overwrite $(ARGS)

test: $(INSTALLED)
	$(BIN)/python tests/run.py $(ARGS)

mutation: $(INSTALLED)
	$(BIN)/python tests/mutation.py $(ARGS)

fuzz: $(INSTALLED)
	$(BIN)/python tests/random_models.py $(ARGS)

flax-suite: $(INSTALLED)
	$(BIN)/python tests/flax_suite/run.py

clients: $(CLIENTS_INSTALLED)
	JAX_DISABLE_MOST_OPTIMIZATIONS=1 $(VENV)-clients/bin/python tests/clients/run.py $(ARGS)

readme: $(INSTALLED)
	$(BIN)/python -m pytest --markdown-docs README.md docs

# DATA_DIR holds the folders mnist, usps, cifar10 and heart; without FULL the notebooks need no files, and are left as
# they are.
ifdef DATA_DIR
  override DATA_DIR := $(abspath $(DATA_DIR))
endif

notebooks: $(INSTALLED)-notebooks
	$(if $(filter-out 0,$(FULL)),$(BIN)/jupytext --quiet --to ipynb --update notebooks/[0-9]_*.py)
	JUPYTER_PREFER_ENV_PATH=1 $(BIN)/python -m pytest notebooks --nbmake --nbmake-timeout=3600 $(if $(filter-out 0,$(FULL)),--overwrite) $(ARGS)

docs: $(INSTALLED)-docs
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

lint: $(INSTALLED)-lint
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench: $(INSTALLED)
	$(BIN)/python benchmarks/layers.py
	$(BIN)/python benchmarks/temporaries.py
	$(BIN)/python benchmarks/domains.py
	$(BIN)/python benchmarks/population.py
	$(BIN)/python benchmarks/exact.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/first_calls.py
	$(BIN)/python benchmarks/imports.py

dist: $(INSTALLED)-dist
	$(BIN)/python tests/make_dist.py $(ARGS)

clean:
	rm -rf .venv* .cache .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache build dist site
