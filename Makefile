# From a bare clone: `make demo`, `make test`. Both set up .venv first; a second time that installs nothing.

PYTHON ?= $(firstword $(foreach version,3.11 3.12 3.13,$(shell command -v python$(version))) python3)
STAMP := .venv/.setup-$(shell cat requirements.lock pyproject.toml | sha256sum | cut -c 1-16)

# A process a core; one that has nothing left takes tests from another.
SPREAD := -n $(shell nproc) --dist worksteal

.PHONY: setup demo test test-slow coverage types bench gpu gpu-cpu gpu-wheels soak lint format reference lock clean

setup: $(STAMP)

# pip skips what is there, so a set-up that was interrupted goes on where it was.
$(STAMP):
	$(PYTHON) -m venv .venv
	.venv/bin/python -m pip install --quiet --no-deps --requirement requirements.lock
	.venv/bin/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	rm -f .venv/.setup-* && touch $@

demo: setup
	.venv/bin/pmod demo

# The everyday suite, a process a core; then, alone on the machine, the tests that hold a command to a time.
test: setup
	.venv/bin/python -m pytest $(SPREAD) -m "not slow and not soak and not timing"
	.venv/bin/python -m pytest -m "timing and not soak"

# What takes too long for every day and is not cut short either; CI runs it after `test`.
test-slow: setup
	.venv/bin/python -m pytest $(SPREAD) -m "slow and not soak"

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

# The kill, fuzz and scale tests at full count.
soak: setup
	.venv/bin/python -m pytest -m soak

lint: setup
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

# Types, where they are held: see [tool.mypy] in pyproject.toml.
types: setup
	.venv/bin/mypy

format: setup
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

# The page of all commands and options.
reference: setup
	.venv/bin/python -m tests.reference > docs/commands.md.new
	mv docs/commands.md.new docs/commands.md

# After installing other versions into .venv by hand: write down what is there.
lock:
	{ sed -n '/^#/p' requirements.lock; .venv/bin/python -m pip freeze --all --exclude pip --exclude pmod-cli \
		| sed 's/+cpu$$//' | sort -f; } > requirements.lock.new
	mv requirements.lock.new requirements.lock

clean:
	rm -rf .venv demo
