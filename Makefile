# `make help` lists the targets.

PYTHON ?= python3
BIN := .venv/bin
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: help run install test test-long test-postgresql coverage check bench soak
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' Makefile | expand -t 26

run: .venv/installed ## start Lanyard in local mode on http://localhost:8080
	@LANYARD_LOCAL=1 exec $(BIN)/gunicorn wsgi:app

install: .venv/installed ## install Lanyard's dependencies into .venv

test: .venv/installed-dev tests/node/node_modules ## run the tests, but for those that take long
	@$(BIN)/pytest -m "not long"

test-long: .venv/installed-dev tests/node/node_modules ## run the others, and generate many more examples
	@$(BIN)/pytest -m long
	@HYPOTHESIS_PROFILE=long $(BIN)/pytest tests/test_properties.py tests/test_fuzz.py tests/test_round_trips.py tests/test_openapi.py

test-postgresql: .venv/installed-dev tests/node/node_modules ## run the tests on a PostgreSQL started for them
	@$(BIN)/python tests/support/postgresql.py

coverage: .venv/installed-dev tests/node/node_modules ## run the tests and show the lines that none reaches
	@$(BIN)/pytest --cov --cov-report=term-missing:skip-covered

check: .venv/installed-dev ## lint, check format and types, and look for known vulnerabilities
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy
	@audit=$$($(BIN)/pip-audit --progress-spinner off -r requirements.txt 2>&1); \
	case "$$?:$$audit" in \
	*Found*vulnerabilit*) echo "$$audit"; exit 1 ;; \
	0:*"could not be audited"* | [1-9]*) echo "pip-audit could not look up every dependency here." ;; \
	*) echo "No dependency has a known vulnerability." ;; \
	esac

bench: .venv/installed-dev ## measure beside an empty Flask route (about half an hour)
	@$(BIN)/python bench/bench.py

soak: .venv/installed-dev ## inject faults under load, and check that nothing acknowledged is lost (five minutes)
	@$(BIN)/python tests/soak/soak.py

# The tests of JavaScript clients are skipped without npm.
tests/node/node_modules: tests/node/package-lock.json
	@if command -v npm > /dev/null; then npm ci --prefix tests/node --silent && touch $@; fi

.venv/installed: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Lanyard needs Python 3.11 or newer: make PYTHON=/path/to/python3.11 ...")'
	@$(PYTHON) -m venv .venv
	@$(BIN)/pip install --quiet --requirement requirements.txt
	@touch $@

.venv/installed-dev: requirements-dev.txt .venv/installed
	@$(BIN)/pip install --quiet --requirement requirements-dev.txt
	@touch $@
