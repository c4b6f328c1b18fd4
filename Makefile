# `make serve` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PACKAGES := engine finetune kernels loaders quantizers server

.PHONY: install test lint clean

install: $(VENV)/.installed

# Constraints pin every dependency; torch is named first so that pip settles
# which build of it is used before anything else asks for one.
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar on -c constraints.txt torch
	$(BIN)/pip install --progress-bar on -c constraints.txt -e '.[dev]'
	mkdir -p $(VENV)/src/nybble
	for package in $(PACKAGES); do ln -sfn ../../../$$package $(VENV)/src/nybble/$$package; done
	$(BIN)/python -m nybble.kernels.cpu.build
	touch $@

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(addprefix -p nybble.,$(PACKAGES))

test: lint
	$(BIN)/pytest

clean:
	rm -rf $(VENV) build dist *.egg-info
