# make demo         segment the images of examples/ with the small model that ships, and score it on Scenes
# make test         run the tests
# make benchmark    time and memory of the network and the read-out, beside the frozen backbone (an hour on two cores)
# make check        lint, formatting and types
# make app          the web page, with the small model that ships
# make docs         the documentation as a site, in outputs/site
# make test-hub     a checkpoint in an environment without this repository, on three versions of transformers (5 GB)
# make test-slow    the kill tests, the page under load, and whatever else takes minutes
# Each sets up .venv by itself, or uses the one that is there. PYTHON names the interpreter that makes it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
DEMO_OUTPUT ?= outputs/demo
DEMO_LIMIT ?= 60
BENCHMARK_OUTPUT ?= outputs/speed
TEST_PROCESSES ?= 2

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false

.PHONY: demo test benchmark check app docs test-hub test-slow setup

setup: $(STAMP)

$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check --quiet -e '.[train,eval,prepare,demo,app,video,integrations,export,lora,docs,test]'
	touch $(STAMP)

demo: $(STAMP)
	@$(BIN)/python run_predict.py --model models/ita-tiny --images examples --output $(DEMO_OUTPUT)/overlays
	@$(BIN)/python run_eval.py --model models/ita-tiny --benchmarks scenes --limit $(DEMO_LIMIT) --output $(DEMO_OUTPUT)/scores
	@echo "Overlays: $(DEMO_OUTPUT)/overlays    Scores: $(DEMO_OUTPUT)/scores/results.md"

test: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs --durations=15 -n $(TEST_PROCESSES) --dist loadfile

benchmark: $(STAMP)
	$(BIN)/python benchmarks/speed.py --output $(BENCHMARK_OUTPUT)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .

app: $(STAMP)
	$(BIN)/python run_app.py --model models/ita-tiny

docs: $(STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

test-hub: $(STAMP)
	$(BIN)/python -m pytest -q -rA -m hub

test-slow: $(STAMP)
	ITA_SLOW_TESTS=1 $(BIN)/python -m pytest -q -rA -s tests/test_training_kills.py tests/test_app_load.py
