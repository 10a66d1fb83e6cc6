# From a bare clone: `make demo`, `make test`. Both set up .venv first; a second time that installs nothing.

# The first Python 3.11 to 3.13 that runs and can make an environment: a name on the PATH may be a shim that does not.
PYTHON ?= $(shell for python in python3.11 python3.12 python3.13 python3 python; do $$python -c \
	'import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
	2>/dev/null && echo $$python && break; done)
STAMP := .venv/.setup-$(shell cat requirements.lock pyproject.toml tests/install.py | cksum | cut -d ' ' -f 1)

# A process a core; one that has nothing left takes tests from another.
SPREAD := -n $(shell nproc 2>/dev/null || getconf _NPROCESSORS_ONLN) --dist worksteal

.PHONY: setup demo test test-slow test-versions coverage types bench gpu gpu-cpu gpu-wheels soak lint format reference notebooks docs lock clean

setup: $(STAMP)

# pip skips what is there, so a set-up that was interrupted goes on where it was. PYTORCH_INDEX=URL: another build of torch.
export PYTORCH_INDEX
$(STAMP):
	$(if $(PYTHON),,$(error no Python 3.11 to 3.13 with venv and ensurepip was found: name one with PYTHON=...))
	$(PYTHON) -m venv .venv
	.venv/bin/python tests/install.py
	rm -f .venv/.setup-* && touch $@

demo: setup
	.venv/bin/pmod demo

# The everyday suite, a process a core.
test: setup
	.venv/bin/python -m pytest $(SPREAD) -m "not slow and not soak and not timing"

# What takes too long for every day and is not cut short either; then, alone on the machine, the tests that hold a command
# to a time. CI runs both after `test`.
test-slow: setup
	.venv/bin/python -m pytest $(SPREAD) -m "slow and not soak"
	.venv/bin/python -m pytest -m "timing and not soak"

# The model under the oldest transformers that is admitted; `test` runs it under the locked one, the newest. What all
# of them declare is alike, so a folder with the other release in front is enough.
VERSIONS ?= 5.20
test-versions: setup
	for version in $(VERSIONS); do \
		.venv/bin/python -m pip install --quiet --no-deps --upgrade --target .venv/transformers-$$version \
			"transformers~=$$version.0" && PYTHONPATH=.venv/transformers-$$version \
			.venv/bin/python -m pytest $(SPREAD) -m "not slow and not soak and not timing" tests/model || exit 1; done

# Both tiers, with the share of lines and branches that they reach. Processes that tests start are counted too.
coverage: setup
	.venv/bin/python -m pytest $(SPREAD) -m "not soak and not timing" --cov --cov-report=term:skip-covered

# Speed and memory against the stock model on the same weights: prints the ratios, fails past a bound. Not part of `test`.
bench: setup
	.venv/bin/python -m tests.bench

# Everything that a GPU is needed for, in one run of minutes: docs/gpu.md. OUT is the folder of its results.
gpu: setup
	.venv/bin/python -m tests.gpu

# The same at toy size on a CPU, so that it works on the day when there is a GPU.
gpu-cpu: setup
	.venv/bin/python -m tests.gpu --cpu -o $(or $(OUT),runs/gpu-cpu)

# Wheels for a machine with a GPU and without a package index.
gpu-wheels: setup
	.venv/bin/python -m tests.gpu.wheels

# The kill, fuzz and scale tests at full count, and a tenth of the tables of docs/results.md.
soak: setup
	.venv/bin/python -m pytest -m soak

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Types of the whole package.
types: setup
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# The page of all commands and options.
reference: setup
	.venv/bin/python -m tests.reference > docs/commands.md.new
	mv docs/commands.md.new docs/commands.md

# The notebooks of docs/, with what their cells print and draw.
notebooks: setup
	.venv/bin/python -m tests.notebooks

# The documentation as a site in site/. A link that leads nowhere, or a page that is in no menu, is an error.
docs: setup
	NO_MKDOCS_2_WARNING=1 .venv/bin/python -m mkdocs build --strict

# After installing other versions into .venv by hand: write down what is there.
lock:
	.venv/bin/python tests/install.py lock

clean:
	rm -rf .venv demo site
