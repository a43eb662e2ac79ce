# Needs Python 3.11 or newer and make. Everything else is set up in .venv on first use.
PYTHON ?= python3
BIN := .venv/bin
READY := .venv/.ready

.PHONY: demo serve test lint bench clean

demo: $(READY)  ## embed and segment real images here, and draw what came out
	$(BIN)/cellray demo

serve: $(READY)  ## the same app, kept up until Ctrl-C
	$(BIN)/cellray serve

test: $(READY)
	$(BIN)/pytest -n 2 --no-loadscope-reorder

lint: $(READY)
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

bench: $(READY)  ## ratios against peers; each prints a table and one line of JSON
	$(BIN)/python -m tests.benchmarks.pipeline
	$(BIN)/python -m tests.benchmarks.storage
	$(BIN)/python -m tests.benchmarks.scale --only listing bombs index cluster
	$(BIN)/python -m tests.benchmarks.faults
	$(BIN)/python -m tests.benchmarks.nodes
	$(BIN)/python -m tests.benchmarks.autoscaling
	$(BIN)/python -m tests.benchmarks.encoder
	$(BIN)/python -m tests.benchmarks.decoder
	$(BIN)/python -m tests.benchmarks.serving
	$(BIN)/python -m tests.benchmarks.nano
	$(BIN)/python -m tests.benchmarks.finetune
	$(BIN)/python -m tests.benchmarks.cellsam

clean:
	rm -rf .venv demo build dist *.egg-info

$(READY): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "needs Python 3.11 or newer: make PYTHON=…"; exit 1; }
	@echo "setting up .venv: about 7 GB, most of it PyTorch with CUDA; a few minutes …"
	@$(PYTHON) -m venv .venv
	@PYTHONWARNINGS=ignore $(BIN)/pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	@touch $(READY)
	@echo "ready: $$(du -sh .venv | cut -f1) in .venv"
