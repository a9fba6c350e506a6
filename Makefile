# `make demo` and `make test` need only Python 3.11+, pip and make: they set up .venv themselves.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin

.PHONY: demo test lint bench clean

demo: $(VENV)/.demo
	$(BIN)/jaxclus demo

# Files in their own order, not those of many tests first: what runs last is short.
test: $(VENV)/.test
	$(BIN)/python -m pytest -q -n auto --dist loadfile --no-loadscope-reorder

lint: $(VENV)/.dev
	$(BIN)/ruff format --check
	$(BIN)/ruff check
	$(BIN)/pyright --pythonpath $(BIN)/python

# Measures against PyTorch, k-means against scikit-learn, the regularisers and ClusTR against training without; see the head of each file. Results go to benchmarks/results/.
# AutoAttack's peers are to be installed or named: make bench AUTOATTACK="--networks DIR --reference PATH"
AUTOATTACK ?= --resnet18 --num-images 256 --steps 5
bench: $(VENV)/.bench
	$(BIN)/python -m benchmarks.pgd
	$(BIN)/python -m benchmarks.linearize
	$(BIN)/python -m benchmarks.regularisers
	$(BIN)/python -m benchmarks.clustr
	$(BIN)/python -m benchmarks.kmeans
	$(BIN)/python -m benchmarks.autoattack $(AUTOATTACK)

clean:
	rm -rf $(VENV)

# pip is what a half-made environment lacks (Debian without python3-venv).
$(BIN)/pip:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "jaxclus needs Python 3.11 or newer: make PYTHON=python3.12 ...")'
	$(PYTHON) -m venv --clear $(VENV)

# One stamp for each set of extras, renewed when pyproject.toml changes.
$(VENV)/.demo: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -q -e .
	touch $@

$(VENV)/.%: pyproject.toml | $(BIN)/pip
	$(BIN)/python -m pip install -q -e ".[$*]"
	touch $@
