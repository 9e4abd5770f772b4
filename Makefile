# `make run` and `make test` are all that a newcomer needs; each sets itself up.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
CHECKS := $(VENV)/.checks
BENCH  := $(VENV)/.bench

.PHONY: run test peers check conformance bench install

install: $(READY)

$(READY): setup.cfg pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed: make PYTHON=python3.11") if sys.version_info < (3, 11) else 0'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=23.1' 'setuptools>=68' wheel
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[test]'
	@touch $@

$(CHECKS): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[test,dev]'
	@touch $@

# make run                    two communities, a PACS and real images on this machine
# make run CONFIG=node.toml   a node with your configuration
run: $(READY)
ifdef CONFIG
	$(BIN)/xca-imaging serve --config $(CONFIG)
else
	$(BIN)/xca-imaging demo
endif

test: $(READY)
	$(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile -m "not slow"

check: $(CHECKS)
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

conformance: $(READY)
	$(BIN)/python -m conformance $(CONFORMANCE)

$(BENCH): $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation --editable '.[test,bench]'
	@touch $@

bench: $(BENCH)
	$(BIN)/python -m tests.bench

PEERS := orthanc orthanc-dicomweb dcmtk gsoap xmlsec1 postgresql
peers:
	apt-get update -qq
	DEBIAN_FRONTEND=noninteractive apt-get install -y -qq $(PEERS)
