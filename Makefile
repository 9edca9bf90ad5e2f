# The two commands: `make repro` runs the main job, `make test` the tests. Each sets up .venv by itself.
PYTHON ?= python3
BIN := $(if $(filter Windows_NT,$(OS)),.venv/Scripts,.venv/bin)
RUN := PATH="$(CURDIR)/$(BIN):$$PATH"

.PHONY: repro test clean

repro: .venv/installed
	$(RUN) dvc repro

test: .venv/installed-test
	$(RUN) ruff check .
	$(RUN) python -m pytest -n auto --dist worksteal

.venv/installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	@touch $@

.venv/installed-test: .venv/installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

clean:
	rm -rf out .stacklm
