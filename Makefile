# make demo: pretrain a small BERT on the text that Python ships, about three minutes with the installation.
# make demo-translation: train a Transformer to say in German what numbers are called in English, likewise.
# make test: all tests. Both make .venv first; PYTHON chooses the interpreter (3.11 or newer).
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo demo-translation test parity check clean

demo: .venv/ready
	$(BIN)/bert-flax pretrain bert_demo --workdir runs/demo
	$(BIN)/bert-flax evaluate --workdir runs/demo
	$(BIN)/bert-flax fill-mask --workdir runs/demo --top 3 \
	  "If the expression is true, the [MASK] clause is executed." \
	  "A function definition defines a user-defined function [MASK]." \
	  "Changed in version [MASK].8"

demo-translation: .venv/ready
	$(BIN)/seq2seq-flax train --workdir runs/numbers
	printf '%s\n' "seven" "ninety-nine thousand, nine hundred and ninety-nine" > runs/numbers/asked.en
	$(BIN)/seq2seq-flax translate --workdir runs/numbers --input runs/numbers/asked.en

test: .venv/ready-dev
	$(BIN)/python -m pytest --numprocesses 2 --dist loadfile --max-worker-restart 0 tests

# With these two installed, make test also compares with transformers' BERT.
parity: .venv/ready-dev
	$(BIN)/pip install -q --disable-pip-version-check "torch==2.13.0" "transformers>=5"

check: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python
	$(BIN)/lint-imports

.venv/ready: pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/pip install -q --disable-pip-version-check -e .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/pip install -q --disable-pip-version-check -e .[dev,tensorboard,gcs,beam]
	touch $@

clean:
	rm -rf .venv runs
