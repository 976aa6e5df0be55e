# seggate: install, demo, test. `make` alone lists the targets.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
# onnxruntime-gpu where an NVIDIA driver answers, onnxruntime elsewhere; both provide the same import name.
RUNTIME ?= $(shell nvidia-smi -L >/dev/null 2>&1 && echo gpu || echo cpu)
EXTRAS ?=
comma = ,
ALL_EXTRAS = $(RUNTIME)$(if $(EXTRAS),$(comma)$(EXTRAS))
STAMP = $(VENV)/.installed-$(subst $(comma),-,$(ALL_EXTRAS))

.DEFAULT_GOAL := help
.PHONY: help install demo test lint requirements node-peers nnunet-peer clean

help: ## list the targets
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 16

install: $(STAMP) ## make .venv with the gateway and the benchmarks' needs (EXTRAS=train,test adds)

$(STAMP): pyproject.toml constraints.txt
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing seggate[$(ALL_EXTRAS)] into $(VENV)"
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[$(ALL_EXTRAS)]"
	@touch $@

demo: install ## start everything on this machine, send a study, show what happened (DEMO_ARGS=--keep leaves it running)
	@$(BIN)/seggate demo $(DEMO_ARGS)

test: ## all tests; those that need an absent peer are skipped with the reason (TEST_ARGS for pytest)
	@$(MAKE) --no-print-directory install EXTRAS=train,test
	@$(MAKE) --no-print-directory node-peers
	@# At the end of the PATH: pynetdicom brings commands with the names of DCMTK's.
	@PATH="$$PATH:$(CURDIR)/$(BIN)" TCP_NODELAY=1 $(BIN)/python -m pytest $(TEST_ARGS)

lint: ## ruff, mypy and import-linter alone (they are part of the tests)
	@$(MAKE) --no-print-directory install EXTRAS=train,test
	@$(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy && PYTHONPATH=.:fhir $(BIN)/lint-imports

requirements: ## requirement id -> tests that prove it
	@$(MAKE) --no-print-directory install EXTRAS=train,test
	@$(BIN)/python -m tests.requirements

node-peers: ## the FHIR validators for the tests (only where npm is)
	@if command -v npm >/dev/null 2>&1; then \
	  cd tests/support/node && { test -d node_modules || npm ci --no-audit --no-fund --loglevel=error; }; \
	else echo "npm is not here: the FHIR validator tests will be skipped"; fi

nnunet-peer: ## nnU-Net in .venv-nnunet, for the tests and benchmarks beside it
	@test -e .venv-nnunet/.installed || { echo "Installing nnU-Net into .venv-nnunet" \
	  && $(PYTHON) -m venv .venv-nnunet \
	  && .venv-nnunet/bin/python -m pip install --quiet --disable-pip-version-check -r tests/support/nnunet/requirements.txt \
	  && .venv-nnunet/bin/python -m pip install --quiet --disable-pip-version-check --no-deps -r tests/support/nnunet/nnunet.txt \
	  && touch .venv-nnunet/.installed; }

clean: ## remove what the demo and the tests left behind
	rm -rf demo-state .pytest_cache .mypy_cache .ruff_cache .hypothesis
