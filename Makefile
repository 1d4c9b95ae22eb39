# Thin: every recipe is a line that can be run by hand in .venv. TORCH names the build to install,
# e.g. `make setup TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"`.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
TORCH ?= torch==2.13.0
PY := .venv/bin/python
SOURCES := setup.py pyproject.toml $(shell find kernels/csrc -type f)

.PHONY: setup assets demo test test-with bench lint mutants wheel aot clean

setup: .venv/.stamp

.venv/bin/python:
	$(PYTHON) -m venv .venv

# torch comes first and alone: a resolver that may choose would fetch gigabytes of CUDA packages.
# Then the extension is compiled while the other packages come; should that fail, setup tells.
.venv/.deps: requirements-dev.txt | .venv/bin/python
	$(PY) -m pip install -q $(TORCH)
	$(PY) -m pip install -q -c requirements-dev.txt ninja numpy setuptools wheel
	$(PY) setup.py -q build_ext --inplace > /dev/null 2>&1 & \
	$(PY) -m pip install -q -r requirements-dev.txt; code=$$?; wait; exit $$code
	@touch $@

# Builds the extension in place; Python sources are used from the checkout and need no rebuild.
.venv/.stamp: .venv/.deps $(SOURCES)
	$(PY) -m pip install -q --no-build-isolation --no-deps -e .
	@touch $@

# Model weights and text for the demo and the tests, verified by sha256; fetched once.
assets: .cache/assets/.stamp

.cache/assets/.stamp: bench/assets.py | .venv/.deps
	$(PY) -m bench.assets
	@touch $@

demo: setup assets
	$(PY) -m bench.demo

test: setup assets
	$(PY) -m pytest -n 2 --dist worksteal

# All tests of what is committed with other versions, in a clone with an environment and a build of
# its own: `make test-with WITH="torch==2.15.0 transformers==5.24.0"`. torch may come with CUDA.
WITH ?= torch==2.11.0 triton==3.6.0 transformers==5.17.0 numpy==2.3.5  # for that Triton's interpreter
OTHER = .cache/with

test-with: assets
	rm -rf $(OTHER)
	git clone -q . $(OTHER)
	mkdir $(OTHER)/.cache && ln -s $(CURDIR)/.cache/assets $(OTHER)/.cache/assets
	$(PYTHON) -m venv $(OTHER)/.venv
	cd $(OTHER) && .venv/bin/python -m pip install -q $(WITH) ninja numpy "setuptools>=77" wheel
	cd $(OTHER) && .venv/bin/python -m pip install -q --no-build-isolation -e ".[dev]" $(WITH)
	cd $(OTHER) && .venv/bin/python -m pytest -n 2 --dist worksteal

# Everything that can be timed here, against the peers that are installed: `make bench ARGS=--quick`.
bench: setup assets
	$(PY) -m bench.run $(ARGS)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy

mutants: setup
	$(PY) -m tests.plant

wheel: setup
	$(PY) -m pip wheel -q --no-build-isolation --no-deps -w dist .

aot: setup
	$(PY) -m bert_fast.aot

clean:
	rm -rf build dist *.egg-info bert_fast/*.so .pytest_cache .mypy_cache .ruff_cache
	rm -f .venv/.stamp
