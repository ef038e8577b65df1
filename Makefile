# make demo and make test do everything, set-up included, on a fresh machine.

PYTHON ?= python3
BIN := .venv/bin
export HF_HUB_OFFLINE = 1
export TOKENIZERS_PARALLELISM = false

.PHONY: setup demo gemma test lint bench fuzz miniature clean

setup: .venv/ready

.venv/ready: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install --quiet -c constraints.txt --config-settings editable_mode=compat -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/bakeout demo --out runs/demo
	$(BIN)/python -m pytest -n 0 -q tests/bakeout/demo_rows.py

gemma: setup  # GEMMA_AUDIT=1: attacked too, which takes long
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[gemma]' --config-settings editable_mode=compat
	$(BIN)/bakeout demo --gemma --out runs/gemma

test: setup .venv/serving/ready
	$(BIN)/python -m pytest -n 2 --dist worksteal

.venv/serving/ready: tests/serving/engines.txt .venv/ready
	$(BIN)/python -m pip install --quiet --no-deps --only-binary=:all: --upgrade --target .venv/serving \
		-r tests/serving/engines.txt || echo 'no wheels of vLLM and SGLang here: their tests are skipped'
	mkdir -p .venv/serving && touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: setup
	for b in benchmarks/*.py; do echo "== $$b"; $(BIN)/python $$b || exit 1; done

fuzz: setup  # FUZZ_SECONDS=600, FUZZ_SEED=the time
	$(BIN)/python -W ignore -m tests.fuzz

miniature: setup
	$(BIN)/python -m bakeout.miniature.making.build

clean:
	rm -rf .venv runs *.egg-info
