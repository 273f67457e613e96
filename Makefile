# Two commands set everything up on a fresh machine: `make quickstart` and `make test`.
# Each target creates .venv itself, with the versions of constraints.txt.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check install --quiet -c constraints.txt

# Idle threads sleep; see fedloom/common/environment.py, which sets what else there is.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: quickstart demo-distributed lint types test coverage test-slow test-faults test-gguf test-quantised check bench docs wheel containers wheelhouse clean

quickstart: $(VENV)/.run  ## a real model, real federated fine-tuning, a report
	$(BIN)/fedloom run quickstart --out runs/quickstart --overwrite

demo-distributed: $(VENV)/.demo  ## a server and three sites on this machine, mutual TLS, and the simulator's adapter
	$(BIN)/python benchmarks/demo_distributed.py

# What `make test` leaves out is counted at its end (tests/helpers/skips.py), each with its target.
FAST := -m "not slow and not faults and not gguf and not quantised" -n 2 --dist loadgroup

test: $(VENV)/.dev  ## all tests but those that take minutes
	$(BIN)/python -m pytest -q $(FAST) tests

coverage: $(VENV)/.dev  ## the same tests, and which lines of the package they run
	rm -f .coverage .coverage.*
	$(BIN)/python -m pytest -q $(FAST) --cov --cov-report=term tests

test-slow: $(VENV)/.dev  ## real models for minutes: learning, resume at random moments
	$(BIN)/python -m pytest -q -m slow -s tests

test-faults: $(VENV)/.dev  ## whatever can be killed, full, torn or foreign, and what becomes of the run
	$(BIN)/python -m pytest -q tests/faults

test-gguf: $(VENV)/.gguf  ## exported files in llama.cpp itself: the same tokens, the same answers; a minute
	$(BIN)/python -m pytest -q -m gguf tests/llama_cpp

test-quantised: $(VENV)/.quantised  ## 4-bit and 8-bit bases against bitsandbytes' own numbers (a wheel of 43 MB)
	$(BIN)/python -m pytest -q -m quantised tests/models

lint: $(VENV)/.dev  ## format and lint
	$(BIN)/ruff format --check fedloom tests containers benchmarks
	$(BIN)/ruff check fedloom tests containers benchmarks

types: $(VENV)/.dev  ## mypy in strict mode
	$(BIN)/mypy

check: lint types test  ## what a change must pass

bench: $(VENV)/.dev  ## the short benchmarks (benchmarks/README.md), under ten minutes
	$(BIN)/python benchmarks/overhead.py --pairs 0
	$(BIN)/python benchmarks/profile.py
	$(BIN)/python benchmarks/padding.py --sequences 128
	$(BIN)/python benchmarks/operators.py
	$(BIN)/python benchmarks/exactness.py
	$(BIN)/python benchmarks/low_traffic.py
	$(BIN)/python benchmarks/privacy.py

docs: $(VENV)/.dev  ## write the generated pages again
	$(BIN)/python docs/generate.py

wheel: $(VENV)/.dev  ## dist/fedloom-*.whl
	$(BIN)/python -m build --quiet --wheel

containers: $(VENV)/.dev  ## build the images with Docker, or with buildah, and run each of them
	containers/build.sh
	$(BIN)/python containers/check.py

wheelhouse:  ## dist/wheelhouse: all that a site without internet installs from; looks that it can
	rm -rf dist/wheelhouse
	PYTHON=$(PYTHON) containers/wheelhouse.sh --check dist/wheelhouse

clean:  ## everything that these targets made, runs excepted
	rm -rf $(VENV) dist build .pytest_cache .mypy_cache .ruff_cache .hypothesis .coverage .coverage.*

$(VENV)/.run: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[skills]"
	touch $@

$(VENV)/.demo: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[skills,distributed]"
	touch $@ $(VENV)/.run

$(VENV)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) -e ".[dev]"
	touch $@ $(VENV)/.run $(VENV)/.demo

$(VENV)/.gguf: $(VENV)/.dev
	$(PIP) -e ".[dev,llama-cpp]"
	touch $@

$(VENV)/.quantised: $(VENV)/.dev
	$(PIP) -e ".[dev,quantised]"
	touch $@
