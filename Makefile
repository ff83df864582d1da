# Every target sets up what it needs in .venv; once that is done, nothing goes to the network.
#   make demo   ARGS="--quick --json demo.json --output-dir demo_output"
#   make test   ARGS="-m 'not slow'"
#   make lint
PYTHON ?= python3
ARGS ?=
VENV_PYTHON := .venv/bin/python
# Paths are relative to the checkout, so that it may lie in a folder with spaces.
STAMP := .venv/.setup-done

# Waiting OpenMP threads soon sleep instead of spinning on: no slower on a quiet machine, and up to
# four times as fast where another program keeps a core busy (GNU OpenMP, so Linux).
export GOMP_SPINCOUNT ?= 3000

.PHONY: setup demo test lint

setup: $(STAMP)

$(STAMP): pyproject.toml
	@"$(PYTHON)" -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
		|| { echo "Python 3.11 or later is needed: make setup PYTHON=python3.12" >&2; exit 1; }
	@$(VENV_PYTHON) -m pip --version >/dev/null 2>&1 || "$(PYTHON)" -m venv .venv
	$(VENV_PYTHON) -m pip install --disable-pip-version-check "torch==2.13.0"
	$(VENV_PYTHON) -m pip install --disable-pip-version-check --editable ".[dev,notebook,peers]"
	@# Without its dependencies, of which torchvision has no build for this torch on a CPU.
	$(VENV_PYTHON) -m pip install --disable-pip-version-check --no-deps "torch-fidelity==0.4.0"
	touch $(STAMP)

demo: $(STAMP)
	$(VENV_PYTHON) -m morse demo $(ARGS)

# Two processes with a thread each: tiny models leave a second thread with nothing to do.
test: $(STAMP)
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(VENV_PYTHON) -m pytest -n 2 --dist loadfile $(ARGS)

lint: $(STAMP)
	$(VENV_PYTHON) -m ruff check .
	$(VENV_PYTHON) -m ruff format --check .
