# The two commands: `make repro` runs the main job, `make test` the tests. Each sets up .venv by itself.
# `make test-all` adds the slow tests; `make test-numerics` runs the numerical ones as on other processors; `make types` checks
# types; `make docs` builds the documentation into site/.
PYTHON ?= python3
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: repro test test-all test-numerics types docs clean mutate

repro: .venv/installed
	$(RUN) stacklm run-flow pretrain

test: .venv/installed-test
	$(RUN) ruff check .
	$(RUN) python -m pytest -n auto --dist worksteal -m "not slow"

test-all: .venv/installed-test
	$(RUN) ruff check .
	$(RUN) python -m pytest -n auto --dist worksteal

test-numerics: .venv/installed-test
	$(RUN) python tests/numerics.py

types: .venv/installed-test
	$(RUN) pyright

docs: .venv/installed-docs
	$(RUN) NO_MKDOCS_2_WARNING=1 mkdocs build --strict

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

.venv/installed-docs: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[docs]'
	@touch $@

mutate: .venv/installed-test
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[mutate]'
	$(RUN) OMP_NUM_THREADS=1 python benchmarks/mutation.py

clean:
	rm -rf out .stacklm
