# What a person runs. Everything happens in .venv; nothing outside this folder is changed, except caches in the home directory.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin

SHELL := bash

# Images often set it. Every process that starts by itself would then compile the toolkit again, half a second each time.
unexport PYTHONDONTWRITEBYTECODE
# pip would compile every module of every package, as long as copying them takes; most are never imported.
PIP := $(BIN)/python -m pip install --quiet --no-compile
IMPORTED := deepspeed.runtime.zero.stage3, peft, ray.train.torch, ray.tune, torch._dynamo, transformers.models.qwen3.modeling_qwen3

.PHONY: drill-io quickstart test test-fast test-fast-one test-fast-other test-slow test-cluster test-ranks lint check bench-step bench-start bench-data bench-memory bench-loading bench-checkpoint bench-tune bench-scale drill gpu-smoke cluster format install requirements structure docs site experiment clean

quickstart: $(VENV)/.installed  ## install, train a small model on this machine, export it, let it write
	@$(BIN)/ltt train configs/quickstart.yaml

test: $(VENV)/.installed-dev  ## every test
	$(MAKE) test-fast
	$(MAKE) test-slow

FAST := -m "not slow and not cluster and not ranks"
HALF := tests/e2e tests/unit/cli tests/unit/commands tests/unit/config tests/unit/data tests/unit/evaluation tests/unit/export tests/unit/families tests/unit/launch tests/unit/monitoring tests/unit/scripts tests/unit/serving

test-fast: $(VENV)/.installed-dev  ## the tests of `make check`
	$(MAKE) --jobs=2 test-fast-one test-fast-other

# Halves of about the same time (.pytest_durations.json).
test-fast-one:
	set -o pipefail; $(BIN)/python -m pytest $(FAST) $(HALF) 2>&1 | sed --unbuffered ''

test-fast-other:
	set -o pipefail; $(BIN)/python -m pytest $(FAST) $(HALF:%=--ignore=%) --ignore=tests/cluster --ignore=tests/ranks 2>&1 | sed --unbuffered ''

# Two lanes: tests on Ray clusters mostly wait, and the others have the processors meanwhile. sed keeps lines whole.
test-slow: $(VENV)/.installed-dev  ## the tests that `make check` leaves out
	$(MAKE) --jobs=2 test-cluster test-ranks

test-cluster:
	set -o pipefail; $(BIN)/python -m pytest tests/cluster 2>&1 | sed --unbuffered ''

test-ranks:
	set -o pipefail; $(BIN)/python -m pytest -m "slow or ranks" --ignore=tests/cluster 2>&1 | sed --unbuffered ''

check: $(VENV)/.installed-dev  ## format, lint, types, import contract, fast tests (3 to 6 minutes)
	$(MAKE) --jobs=2 lint test-fast-one test-fast-other

lint: $(VENV)/.installed-dev  ## format, lint, types, import contract
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/lint-imports

bench-step: $(VENV)/.installed  ## tokens per second of this loop beside three others, two sizes (half an hour, a quiet machine)
	$(BIN)/python benchmarks/bench_step.py

bench-start: $(VENV)/.installed  ## seconds from command to first step beside an empty TorchTrainer (a quiet machine)
	$(BIN)/python benchmarks/bench_start.py

bench-memory: $(VENV)/.installed  ## memory of the loss in chunks beside whole logits, at Qwen's vocabulary (two minutes)
	$(BIN)/python benchmarks/bench_memory.py

bench-loading: $(VENV)/.installed  ## memory of a rank while weights are loaded, at ZeRO 2 and 3 (a minute)
	$(BIN)/python benchmarks/bench_loading.py

bench-checkpoint: $(VENV)/.installed  ## wall time with checkpoints beside without, on local and slow storage, beside two others (an hour, a quiet machine)
	$(BIN)/python benchmarks/bench_checkpoint.py

bench-tune: $(VENV)/.installed  ## sixteen trials with ASHA beside the full grid, three seeds (half an hour)
	$(BIN)/python benchmarks/bench_tune.py

bench-scale: $(VENV)/.installed  ## control plane for 64, 512 and 4,096 ranks, without the ranks (ten seconds)
	$(BIN)/python benchmarks/bench_scale.py

bench-data: $(VENV)/.installed-bench  ## rendering, packing and resuming beside tokenizers, TRL and HF Trainer (ten minutes, a quiet machine)
	$(BIN)/python benchmarks/bench_data.py

drill: $(VENV)/.installed-dev  ## 20 failures by chance in one run, 50 kills while saving in another: table and picture (half an hour)
	$(BIN)/python experiments/drill/run.py

drill-io: $(VENV)/.installed-dev  ## two faults at every call of a short run that changes the disk: table (an hour)
	$(BIN)/python experiments/drill_io/run.py

EXPERIMENTS := experiments
FAMILY := qwen

experiment:  ## a new experiment from a template: NAME=my-question FAMILY=qwen|starcoder
	@[[ "$(NAME)" =~ ^[A-Za-z0-9][A-Za-z0-9_-]*$$ ]] || { echo "give NAME=my-question, of letters, digits, - and _" >&2; exit 2; }
	@[ -d "experiments/templates/$(FAMILY)" ] || { echo "FAMILY=$(FAMILY): give qwen or starcoder" >&2; exit 2; }
	@mkdir "$(EXPERIMENTS)/$(NAME)"  # fails if it is there
	@cp experiments/templates/$(FAMILY)/* experiments/templates/run.py "$(EXPERIMENTS)/$(NAME)"
	@echo "$(EXPERIMENTS)/$(NAME): edit README.md, config.yaml and experiment.yaml, then $(BIN)/python $(EXPERIMENTS)/$(NAME)/run.py"

cluster: $(VENV)/.installed  ## a Ray cluster of this machine alone, with a token, until Ctrl-C (cluster/local.yaml)
	@$(BIN)/python cluster/start.py

gpu-smoke: $(VENV)/.installed  ## whether it works on this machine's GPU, in five minutes; without one it says so
	@$(BIN)/python scripts/gpu_smoke.py

format: $(VENV)/.installed-dev  ## write the format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

structure:  ## every file of the package with what it does; FIGURES=--figures: figures of its layout
	@$(PYTHON) scripts/structure.py $(FIGURES)

site: $(VENV)/.installed-dev  ## the documentation as a site, in site/ (strict: a broken link fails)
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

docs: $(VENV)/.installed  ## write docs/configuration.md from the schema
	$(BIN)/python -m llm_training_toolkit.config.reference docs/configuration.md

install: $(VENV)/.installed-dev  ## the environment for development

requirements: $(VENV)/.installed-dev  ## write requirements*.txt from pyproject.toml
	$(BIN)/python scripts/requirements.py

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The pinned requirements first, then the package itself without asking for anything more.
$(VENV)/.installed: $(VENV)/bin/python requirements.txt pyproject.toml
	@echo "installing into $(VENV) (some minutes at the first time)"
	@$(PIP) --requirement requirements.txt
	@$(PIP) --no-deps --editable .
	@$(BIN)/python -c "import $(IMPORTED)" >/dev/null 2>&1 || true  # only compiles; a command tells what is broken
	@touch $@

$(VENV)/.installed-dev: $(VENV)/.installed requirements-dev.txt
	@$(PIP) --requirement requirements-dev.txt
	@touch $@

$(VENV)/.installed-bench: $(VENV)/.installed requirements-bench.txt
	@$(PIP) --requirement requirements-bench.txt
	@touch $@

clean:  ## remove what was built and every run
	rm -rf $(VENV) build dist runs .mypy_cache .ruff_cache .pytest_cache .pytest_durations.json .hypothesis
