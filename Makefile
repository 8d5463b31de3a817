# make setup        the virtual environment .venv with everything below
# make demo         segment photographs and images of Scenes with the models that ship, and score one on Scenes
# make test         the tests, without those that take minutes
# make check        lint, formatting, types, layers of imports
# make benchmark    time and memory of the network and post-processing, beside the frozen backbone (an hour on two cores)
# make app          the web page, with the model for photographs that ships
# make docs         the documentation as a site, in outputs/site
# make test-slow    kill tests, load tests and whatever else takes minutes
# make test-perf    assertions on ratios of times; run it alone on the machine
# make test-hub     a checkpoint in environments without this repository, on three versions of transformers (5 GB)
# make fuzz         mutated configurations and images, for minutes
# make soak         clients against page and endpoint, for minutes
# PYTHON names the interpreter that makes .venv.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.installed-demo
ALL := $(VENV)/.installed
DEMO_OUTPUT ?= outputs/demo
DEMO_LIMIT ?= 60
BENCHMARK_OUTPUT ?= outputs/speed
TEST_PROCESSES ?= 2
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs

export HF_HUB_OFFLINE := 1
export TOKENIZERS_PARALLELISM := false
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo test benchmark check app docs test-hub test-slow test-perf fuzz soak train-smoke setup

setup: $(ALL)

$(ALL): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[all]'
	touch $(ALL) $(DEMO)

$(DEMO): pyproject.toml
	@echo "Installing into $(VENV): torch and what the demo needs, about 6 GB with CUDA's libraries, some minutes."
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet -e '.[demo]'
	touch $(DEMO)

demo: $(DEMO)
	@$(BIN)/ita predict --model models/ita-photo --images models/ita-photo/examples --output $(DEMO_OUTPUT)/photographs
	@$(BIN)/ita predict --model models/ita-tiny --images examples --output $(DEMO_OUTPUT)/overlays
	@$(BIN)/ita eval --model models/ita-tiny --benchmarks scenes --limit $(DEMO_LIMIT) --output $(DEMO_OUTPUT)/scores
	@echo "Overlays: $(DEMO_OUTPUT)/photographs and $(DEMO_OUTPUT)/overlays    Scores: $(DEMO_OUTPUT)/scores/results.md"

test: $(ALL)
	$(PYTEST) --durations=15 -n $(TEST_PROCESSES) --dist loadfile

check: $(ALL)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy .
	$(BIN)/lint-imports

benchmark: $(ALL)
	$(BIN)/python benchmarks/speed.py --output $(BENCHMARK_OUTPUT)

app: $(ALL)
	$(BIN)/ita app --model models/ita-photo

docs: $(ALL)
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

train-smoke: $(ALL)
	$(BIN)/ita train --model models/ita-tiny --dataset scenes --max_steps 3 --per_device_train_batch_size 2 \
	    --eval_strategy no --output_dir outputs/train-smoke

test-slow: $(ALL)
	$(PYTEST) -rA -s -m "slow and not perf and not hub"

test-perf: $(ALL)
	$(BIN)/python -m pytest -q -rA -m perf

test-hub: $(ALL)
	$(PYTEST) -rA -m hub

fuzz: $(ALL)
	$(PYTEST) -rA -m slow -k fuzz

soak: $(ALL)
	$(PYTEST) -rA -s -m slow -k soak
