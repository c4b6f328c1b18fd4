# `make serve` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
MODEL  ?= demo
PORT   ?= 8000
PACKAGES := engine finetune kernels loaders quantizers server

.PHONY: install serve test test-clients fuzz lint gpu clean

install: $(VENV)/.installed

# Constraints pin every dependency; torch is named first so that pip settles which build of it is
# used before anything else asks for one. TORCH_INDEX_URL may name PyTorch's index of CPU builds,
# which spares a Linux machine without a GPU several gigabytes.
TORCH_INDEX_URL ?=
$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --progress-bar on -c constraints.txt \
		$(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch
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

# OpenAI's client, LangChain, LlamaIndex, LiteLLM and lm-evaluation-harness against a live server:
# make test-clients, or only one: make test-clients CLIENTS=tests/clients/test_litellm.py
CLIENTS ?= tests/clients
build/clients/.installed: tests/clients/requirements.txt
	$(PYTHON) -m venv build/clients
	build/clients/bin/pip install --progress-bar on -r $<
	touch $@
test-clients: install build/clients/.installed
	build/clients/bin/pytest -q -c /dev/null --rootdir=. --confcutdir=tests/clients \
		--import-mode=importlib -p no:cacheprovider -W ignore $(CLIENTS)

# atheris over request bodies, checkpoints and adapters, FUZZ_SECONDS each (five minutes in all);
# the same targets run for a moment in the tests. Its corpus stays in build/fuzz.
FUZZ_SECONDS ?= 100
FUZZ := request_body checkpoint adapter
build/fuzz/.installed: tests/fuzz/requirements.txt | install
	$(PYTHON) -m venv build/fuzz/venv
	build/fuzz/venv/bin/pip install --progress-bar on -r $<
	touch $@
fuzz: build/fuzz/.installed
	packages=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])'); \
	for target in $(FUZZ); do \
		mkdir -p build/fuzz/corpus/$$target && PYTHONPATH=$(VENV)/src:$$packages \
		build/fuzz/venv/bin/python tests/fuzz/fuzz.py $$target build/fuzz/corpus/$$target \
			-max_total_time=$(FUZZ_SECONDS) -max_len=64 -artifact_prefix=build/fuzz/ -print_final_stats=1 || exit 1; \
	done

# On a machine with a GPU and a torch of its own: checks first, then the tables, each script in its
# own time budget (--minutes).
GPU_PYTHON ?= python3
GPU_ARGS ?=
GPU_ENV := PYTHONUNBUFFERED=1 PYTHONPATH=build/gpu
gpu:
	mkdir -p build/gpu/nybble
	for package in $(PACKAGES); do ln -sfn ../../../$$package build/gpu/nybble/$$package; done
	$(GPU_ENV) $(GPU_PYTHON) kernels/bench/gpu_matmul.py $(GPU_ARGS)
	if [ -f kernels/bench/gpu_step.py ]; then \
		$(GPU_ENV) $(GPU_PYTHON) kernels/bench/gpu_step.py $(GPU_ARGS); \
	fi

clean:
	rm -rf $(VENV) build dist *.egg-info
