# `make demo` and `make test` do everything on a fresh machine, in an environment of their own (.venv).

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
# Modules are compiled when they are imported, which most never are. With this and a new pip, environment and lint take
# 2:00 minutes on two cores; the environment alone took 3:01.
PIP := PIP_NO_COMPILE=1 $(BIN)/python -m pip --disable-pip-version-check --quiet

TORCH := 2.13.0
# The client that robots run, to test the server with. Without its dependencies: it asks for numpy 1 and runs on numpy 2.
OPENPI_CLIENT := 0.1.2
# Where torch is built without CUDA: a download of 0.2 GB instead of several.
TORCH_CPU_INDEX := https://download.pytorch.org/whl/cpu

# The lerobot that the adapter is tested with, in an environment of its own: it needs Python 3.12 and an older torch.
# ``dataset`` is what lerobot-eval needs.
LEROBOT := lerobot[pi,dataset]==0.6.1
LEROBOT_VENV := .venv-lerobot
PYTHON312 ?= python3.12
LEROBOT_PIP := $(LEROBOT_VENV)/bin/python -m pip --disable-pip-version-check --quiet
LEROBOT_PLUGIN := python/lerobot_policy_pi0_engine

# Code that ruff reads. mypy reads the package alone (see typecheck).
CODE := setup.py python kernels engine benchmarks tests

# What `make gpu` writes, and the seconds that it may take.
OUTPUT := build/gpu
BUDGET := 480

# What `make demo` asks for: one of the trained instructions.
PROMPT := open the drawer

# Processes that `make test` runs in, each on one core, and each with all tests of a file.
# nproc would otherwise answer with OMP_NUM_THREADS where that is set.
JOBS := $(shell n=$$(env -u OMP_NUM_THREADS nproc); echo $$((n < 8 ? n : 8)))
PARALLEL := -n $(JOBS) --dist loadfile --no-loadscope-reorder
# Settings that `make test-portable` tries, with commas between: all of them where none is named.
SETTINGS :=

# What `make fuzz` sends.
MESSAGES := 100000
SEED := 0

.PHONY: help demo test test-portable test-full test-lerobot fuzz gpu lint format typecheck clean

help:  ## say what there is to make
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

demo: $(VENV)/.demo  ## a small trained π0 drives a simulated robot: a film, a plot, timings, parity (PROMPT=)
	$(BIN)/pi0-engine demo --prompt "$(PROMPT)"

test: lint  ## lint, then all tests (JOBS=)
	OMP_NUM_THREADS=1 $(BIN)/pytest $(PARALLEL)

test-portable: $(VENV)/.dev  ## numeric tests as other processors round, with other threads, orders and loads (SETTINGS=)
	$(BIN)/python -m tests.support.portable $(if $(SETTINGS),--settings "$(SETTINGS)")

test-full: $(VENV)/.dev  ## published model sizes, up to 15 GB of memory and some minutes each; all GPU generations
	$(BIN)/pytest -m full_size -s

test-lerobot: $(LEROBOT_VENV)/.ready  ## the adapter against the real lerobot: 6 GB of it are installed first (PYTHON312=)
	$(LEROBOT_VENV)/bin/pytest tests/lerobot

fuzz: $(VENV)/.dev  ## hostile clients against the policy server, a long run (MESSAGES= SEED=)
	$(BIN)/python -m tests.support.fuzz_server --messages $(MESSAGES) --seed $(SEED)

# Not in .venv: the Python given brings torch, Triton and pytest, and nothing is installed into it.
gpu:  ## on a machine with an NVIDIA GPU: build, GPU tests, benchmarks, one table last (PYTHON= OUTPUT= BUDGET=)
	$(PYTHON) benchmarks/gpu_check.py --output "$(OUTPUT)" --budget $(BUDGET)

lint: $(VENV)/.dev typecheck  ## style, types, and where the documents lead
	$(BIN)/ruff check $(CODE)
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/python -m tests.support.links

format: $(VENV)/.dev  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix $(CODE)
	$(BIN)/ruff format $(CODE)

# mypy does not know setup.py's mapping of three folders to one package: links show it one.
typecheck: $(VENV)/.dev  ## types alone
	@rm -rf build/types && mkdir -p build/types/pi0_engine
	@ln -s "$(CURDIR)"/python/pi0_engine/* "$(CURDIR)"/kernels "$(CURDIR)"/engine build/types/pi0_engine/
	@ln -s "$(CURDIR)"/$(LEROBOT_PLUGIN)/lerobot_policy_pi0_engine build/types/
	MYPYPATH=build/types $(BIN)/mypy --num-workers $(JOBS) -p pi0_engine -p lerobot_policy_pi0_engine

clean:  ## remove everything that was built, .venv and .venv-lerobot too
	rm -rf $(VENV) $(LEROBOT_VENV) $(LEROBOT_PLUGIN)/build $(LEROBOT_PLUGIN)/*.egg-info build dist *.egg-info demo.gif demo.png .mypy_cache .pytest_cache .ruff_cache .hypothesis .benchmarks
	find python kernels engine tests benchmarks -name __pycache__ -prune -exec rm -rf {} +
	rm -f python/pi0_engine/_C*.so

# --- the environment; each file stands for a step that is done ---

# Its own pip may be old: that of Python 3.10, 23.0, searched for a set of these packages for six minutes without an end.
$(VENV)/.python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || { \
	  echo "$(PYTHON) is $$($(PYTHON) --version 2>&1): Python 3.10 or newer is needed (make PYTHON=python3.12 ...)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	@$(PIP) install --upgrade pip
	@touch $@

# With an NVIDIA GPU the ordinary build of torch, otherwise the small one where its index can be reached. torch's own
# dependencies come with the package's.
$(VENV)/.torch: $(VENV)/.python
	@if nvidia-smi -L >/dev/null 2>&1; then \
	  echo "installing torch $(TORCH) with CUDA"; \
	  $(PIP) install torch==$(TORCH); \
	else \
	  echo "installing torch $(TORCH) for the CPU"; \
	  $(PIP) --quiet install --retries 2 --no-deps --index-url $(TORCH_CPU_INDEX) torch==$(TORCH) || { \
	    echo "there is no CPU build for this system, or its index cannot be reached: installing the ordinary build"; \
	    $(PIP) install torch==$(TORCH); }; \
	fi
	@touch $@

$(VENV)/.demo: EXTRAS := sim
$(VENV)/.dev: EXTRAS := dev

# The package in editable mode with extras. Done again when the extension changes.
$(VENV)/.demo $(VENV)/.dev: $(VENV)/.%: $(VENV)/.torch setup.py pyproject.toml $(wildcard csrc/*)
	@echo "installing pi0-engine [$(EXTRAS)]"
	@$(PIP) install -e '.[$(EXTRAS)]'
	@if [ $* = dev ]; then $(PIP) install --no-deps openpi-client==$(OPENPI_CLIENT); fi
	@touch $@

$(LEROBOT_VENV)/.python:
	@$(PYTHON312) -c 'import sys; sys.exit(sys.version_info < (3, 12))' || { \
	  echo "lerobot needs Python 3.12 or newer: make test-lerobot PYTHON312=/path/to/python3.12"; exit 1; }
	$(PYTHON312) -m venv $(LEROBOT_VENV)
	@touch $@

# lerobot decides which torch it is; ours then finds everything that it needs installed.
$(LEROBOT_VENV)/.lerobot: $(LEROBOT_VENV)/.python
	@echo "installing $(LEROBOT) into $(LEROBOT_VENV), once: its torch with CUDA and all else take 6 GB on disk"
	@$(LEROBOT_PIP) install '$(LEROBOT)' 'pytest>=8.2'
	@touch $@

$(LEROBOT_VENV)/.ready: $(LEROBOT_VENV)/.lerobot setup.py pyproject.toml $(LEROBOT_PLUGIN)/pyproject.toml $(wildcard csrc/*)
	@echo "installing pi0-engine and $(LEROBOT_PLUGIN) beside it"
	@$(LEROBOT_PIP) install -e . -e $(LEROBOT_PLUGIN)
	@touch $@
