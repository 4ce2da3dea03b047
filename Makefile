# Two commands: `make demo` and `make test`. Both set up .venv from requirements.lock first, once.
PYTHON ?= python3
BIN := .venv/bin

.PHONY: demo test test-services torture bench bench-gpu lint format lock docs

demo: .venv/ready
	$(BIN)/flawmask demo --run

# Two files at a time, each on one thread: as fast on two cores as it gets, and no faster to fail on a large machine.
# In their own order: otherwise files with few tests, which take long, come last.
test: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not services"

# Those that read images, or train, with processes of their own.
SPAWNING := $(addprefix tests/,training/test_loader.py training/test_cache.py training/test_run_folder.py comparison/test_yardsticks.py test_faults.py::test_a_reading_process_that_dies_is_told_in_a_line)

# What needs a browser (the report's tests need chromium, and are skipped where there is none), a run with
# the default network at its full size, and processes that read images, started as on macOS and Windows.
test-services: .venv/ready
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile -m services
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile --start_method spawn $(SPAWNING)

# What docs/reliability.md tells: processes killed and files damaged by the thousand; 40 minutes or so on two cores.
torture: .venv/ready
	TORTURE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --timeout 0 -rP --durations 0 --hypothesis-show-statistics tests/test_faults.py tests/test_fuzz.py

# Writes docs/benchmarks.md anew: close to two hours on two cores, which should have nothing else to do.
bench: .venv/ready
	$(BIN)/python benchmarks

# On a machine with an NVIDIA GPU: at most 7 minutes. PARTS="steps losses" runs some of it.
bench-gpu: .venv/ready
	$(BIN)/python benchmarks/gpu.py --output bench-gpu.md $(if $(PARTS),--part $(PARTS))

lint: .venv/ready
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: .venv/ready
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

.venv/ready: requirements.lock pyproject.toml
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --no-deps --require-hashes -r requirements.lock
	$(BIN)/python -m pip install --no-deps --no-build-isolation -e .
	touch $@

# Writes docs/api.md anew, from the docstrings of what people import.
API := api inference.predictor prediction training.callbacks errors
docs: .venv/ready
	for one in $(API); do $(BIN)/griffe2md flawmask.$$one; done > docs/api.md

# Renews the exact, hashed set of packages. Needs uv.
lock:
	uv pip compile --universal --generate-hashes --no-emit-index-url --no-header --extra dev pyproject.toml -o requirements.lock
