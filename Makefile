# make demo         segment the pictures of examples/ with the small model that ships, and score it on Scenes
# make test         run the tests
# make benchmark    time and memory of the network and the read-out, beside the frozen backbone (an hour on two cores)
# make check        lint, formatting and types
# Each sets up .venv by itself, or uses the one that is there. PYTHON names the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUTPUT ?= outputs/demo
DEMO_LIMIT ?= 60
BENCHMARK_OUTPUT ?= outputs/speed

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test benchmark check setup

setup: $(STAMP)

$(STAMP): setup.py
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[train,demo,test]'
	touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/python run_predict.py --model models/ita-tiny --images examples --output $(DEMO_OUTPUT)/overlays
	@$(BIN)/python run_eval.py --model models/ita-tiny --benchmarks scenes --limit $(DEMO_LIMIT) --output $(DEMO_OUTPUT)/scores
	@echo "Overlays: $(DEMO_OUTPUT)/overlays    Scores: $(DEMO_OUTPUT)/scores/results.md"

test: $(STAMP)
	$(BIN)/python -m pytest -q -rs --durations=15

benchmark: $(STAMP)
	$(BIN)/python benchmarks/speed.py --output $(BENCHMARK_OUTPUT)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
