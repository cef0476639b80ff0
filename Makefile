# Everything that is done to this repository has a target here; CI calls the same ones.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
KERNELS := .venv-kernels
SOURCES := $(wildcard csrc/*.* csrc/kernels/*)
MODEL ?=

.PHONY: setup demo serve test sanitize foreign check format oracle kernels gpu train bench clients size docs clean help

help:  ## List the targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'

setup: $(VENV)/.ready  ## Make the virtual environment, build the native module, install

$(VENV)/.ready: pyproject.toml constraints.txt CMakeLists.txt $(SOURCES)
	@echo "Setting up $(VENV) (a minute or two, once) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@$(BIN)/python -c "from duetto.backends.cpu.native import why_unavailable; why = why_unavailable(); why and print(why)"
	@touch $@

# Never `torch` without its version: the newest build brings gigabytes of CUDA packages.
$(VENV)/.oracle: $(VENV)/.ready
	@echo "Installing the oracle: torch and transformers (test only) ..."
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check torch==2.13.0
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[oracle]'
	@touch $@

demo: setup  ## Set up, serve the small reader, stream two answers about documents, stop
	@$(BIN)/python examples/demo.py

serve: setup  ## Serve MODEL (default: the small reader that ships) on 127.0.0.1:8000
	@$(BIN)/duetto serve $(MODEL)

test: setup  ## All tests that need neither torch nor a GPU, on two cores
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m "not oracle and not gpu"

sanitize:  ## The native code's own tests, with sanitizers for memory, arithmetic and threads
	@tools/sanitize.sh

foreign:  ## The kernels' own tests for instruction sets that this machine lacks, emulated
	@tools/foreign.sh

check: setup  ## Lint, formatting, types, of Python and C++
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/mypy
	@CLANG_FORMAT=$(BIN)/clang-format tools/lint_cpp.sh

format: setup  ## Format Python and C++
	@$(BIN)/ruff format .
	@$(BIN)/clang-format -i csrc/*.h csrc/*.cpp csrc/*/*.h csrc/*/*.cpp

oracle: $(VENV)/.oracle  ## Compare live with transformers, and walk a million steps
	@$(BIN)/python -m pytest -n 2 --dist worksteal -m oracle

$(KERNELS)/.ready: constraints-kernels.txt $(VENV)/.oracle
	@echo "Setting up $(KERNELS): $(VENV), behind Triton and the numpy that it takes (test only) ..."
	@tools/kernels_venv.sh $(VENV) $(KERNELS)
	@touch $@

kernels: $(KERNELS)/.ready  ## The GPU's kernels in Triton's interpreter, and compiled without a GPU
	@TRITON_INTERPRET=1 $(KERNELS)/bin/python -m pytest -n 2 --dist worksteal tests/kernels
	@$(KERNELS)/bin/python tools/kernel_table.py --check

# Where the figures come to; runs are gone on with. GPU_PYTHON has torch and triton for the GPU.
OUT ?= .gpu
GPU_PYTHON ?= $(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON))

gpu:  ## All that a GPU is needed for, in 8 minutes; writes docs/benchmarks/gpu.md
	@PYTHONPATH=src $(GPU_PYTHON) benchmarks/gpu/run.py --out $(OUT); status=$$?; \
		test -e $(OUT)/gpu.json || exit $$status; \
		$(GPU_PYTHON) benchmarks/gpu/page.py $(OUT)/gpu.json && exit $$status

$(VENV)/.train: $(VENV)/.oracle
	@$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[train]'
	@touch $@

train: $(VENV)/.train  ## Climb towards the demo models; hours on a CPU, goes on where it stopped
	@$(BIN)/python -m training.train reader --work .demo/training --out .demo/duetto-demo \
		--curve docs/benchmarks/training-reader.png
	@$(BIN)/python -m training.distill .demo/duetto-demo --out .demo/duetto-demo-draft
	@$(BIN)/python -m training.measure .demo/duetto-demo --draft .demo/duetto-demo-draft

bench: setup  ## Compare scheduling policies; writes docs/benchmarks/scheduling.md
	@$(BIN)/python benchmarks/scheduling.py

clients: setup  ## Other people's clients against the APIs, each in an environment of its own
	@tests/clients/run.sh

size: setup  ## What is longer than the house allows
	@$(BIN)/python tools/size.py

docs: setup  ## Regenerate the command-line reference
	@$(BIN)/python tools/cli_reference.py

clean:  ## Remove what the targets above made
	rm -rf $(VENV) $(KERNELS) build dist .demo .gpu
