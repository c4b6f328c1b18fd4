# `make serve` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  ?= demo
PORT   ?= 8000
PACKAGES := engine kernels loaders quantizers server

.PHONY: install serve test lint clean

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

# Anything else for the server: make serve MODEL=org/name ARGS="--max-num-seqs 8"
serve: install
	$(BIN)/serve --model $(MODEL) --port $(PORT) $(ARGS)

lint: install
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy $(addprefix -p nybble.,$(PACKAGES))
	$(BIN)/mypy load_tests/*.py

test: lint
	$(BIN)/pytest

clean:
	rm -rf $(VENV) build dist *.egg-info
