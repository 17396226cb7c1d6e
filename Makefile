# `make` alone says what there is. Every target sets up what it needs, in .venv.

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-all hostile ledger kills lateness bench fuzz check broker shop clean

VENV := .venv
BENCH := .venv-bench
BIN := $(VENV)/bin
# Installed as pinned, the build backend too. No prompt: CI has nobody to answer it.
INSTALL := $(BIN)/python -m pip install --quiet --no-input --disable-pip-version-check --constraint constraints.txt
PACKAGE := $(INSTALL) --build-constraint constraints.txt --editable .

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | awk -F'\t' '{ printf "  make %-8s %s\n", $$1, $$2 }'

setup: $(VENV)/.dev  ## .venv with everything, once and again when pyproject.toml or constraints.txt change

demo: $(VENV)/.shop  ## the shop at work; URL=amqp://... on that broker, KEEP=1 leaves it up, SABOTAGE=lose|twice
	@$(BIN)/eventbus demo $(if $(URL),--url '$(URL)') $(if $(KEEP),--keep) $(if $(SABOTAGE),--sabotage $(SABOTAGE))

# In processes that each have brokers of their own; whoever is free takes over tests that wait for another.
# WORKERS=0: in this process, as `pytest PATH` does, for a debugger or to see what tests print.
WORKERS := 3
PYTEST := $(BIN)/python -m pytest --numprocesses $(WORKERS) --dist worksteal

test: $(VENV)/.dev  ## all tests, against real RabbitMQs that they get themselves; ARGS=... for pytest, WORKERS=3
	@$(PYTEST) $(ARGS)

test-all: $(VENV)/.dev  ## the same on every broker line that this machine has: 3.10 native, 4.0 and 4.3 in containers
	@$(PYTEST) --all-lines $(ARGS)

ledger: $(VENV)/.dev  ## break everything and count every event: LEDGER.md; CELL=... BROKER=3.10|4.0|4.3|4.3-cluster EVENTS=...; MISSING=1 goes on
	@$(BIN)/python -m tests.faults.ledger $(if $(CELL),--cell $(CELL)) $(if $(BROKER),--broker $(BROKER)) \
		$(if $(EVENTS),--events $(EVENTS)) $(if $(MISSING),--missing)

kills: $(VENV)/.dev  ## the shop's services killed at every step, and every order counted; ORDERS=1000 KILLS=50 STORE=sqlite|postgresql OUTAGE=60
	@$(BIN)/python -m tests.faults.kills $(if $(ORDERS),--orders $(ORDERS)) $(if $(KILLS),--kills $(KILLS)) \
		$(if $(STORE),--store $(STORE)) $(if $(BROKER),--broker $(BROKER)) $(if $(OUTAGE),--outage $(OUTAGE)) $(if $(SEED),--seed $(SEED))

lateness: $(VENV)/.dev  ## is anything early that the delay tree brings, and how late: LEDGER.md; BROKER=... COUNTS=100,1000
	@$(BIN)/python -m tests.faults.lateness $(if $(BROKER),--broker $(BROKER)) $(if $(COUNTS),--counts $(COUNTS))

hostile: $(VENV)/.dev  ## 100,000 hostile messages through a live worker, each counted; MESSAGES=... BROKER=... SEED=... BACKLOG=1000000
	@$(BIN)/python -m tests.faults.hostile $(if $(MESSAGES),--messages $(MESSAGES)) $(if $(BROKER),--broker $(BROKER)) \
		$(if $(SEED),--seed $(SEED)) $(if $(BACKLOG),--backlog $(BACKLOG))

bench: $(BENCH)/.bench  ## measure ours and its peers: PERFORMANCE.md; QUICK=1 ONLY=publish,handle,... ROUNDS=3 EVENTS=20000
	@$(BENCH)/bin/python -m benchmarks $(if $(QUICK),--quick) $(if $(ONLY),--only '$(ONLY)') \
		$(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(EVENTS),--events $(EVENTS)) $(if $(BROKER),--broker $(BROKER))

fuzz: $(VENV)/.dev  ## random frames against the client's own codec; SECONDS=600 SEED=...
	@$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),60) $(if $(SEED),--seed $(SEED))

check: $(VENV)/.dev  ## format, lint, types, the direction of imports
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/lint-imports

broker: $(VENV)/.dev  ## a RabbitMQ of your own until Ctrl-C; LINE=3.10|4.0|4.3
	@$(BIN)/python -m tests.servers $(if $(LINE),--line $(LINE))

shop: $(VENV)/.dev  ## every service of the shop as a process of its own, until Ctrl-C; URL=amqp://... on that broker
	@$(if $(URL),EVENTBUS_URL='$(URL)',$(BIN)/python -m tests.servers --) $(BIN)/python -m services.shop

clean:  ## remove .venv, .venv-bench and what tools left
	rm -rf $(VENV) $(BENCH) build dist .eventbus .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -prune -exec rm -rf {} +

# ── the environment ───────────────────────────────────────────────────────────────────────────────────────────────────

$(VENV)/.dev: $(VENV)/.shop
	@echo 'installing what tests and checks need'
	@$(PACKAGE) --group dev
	@touch $@

$(VENV)/.shop: $(VENV)/.python pyproject.toml constraints.txt
	@echo 'installing eventbus and what the shop needs'
	@$(PACKAGE) --group shop
	@touch $@

$(VENV)/.python:
	@python=$$(.ci/python) && echo "creating $(VENV) with $$python" && $$python -m venv $(VENV)
	@$(INSTALL) --upgrade pip
	@touch $@

# Of its own, so that no peer's package is where the tests run.
$(BENCH)/.bench: pyproject.toml constraints.txt benchmarks/constraints.txt
	@python=$$(.ci/python fastest) && echo "creating $(BENCH) with $$python" && $$python -m venv $(BENCH)
	@echo 'installing eventbus and what it is measured against'
	@$(BENCH)/bin/python -m pip install --quiet --no-input --disable-pip-version-check --constraint constraints.txt \
		--upgrade pip
	@$(BENCH)/bin/python -m pip install --quiet --no-input --disable-pip-version-check --constraint constraints.txt \
		--constraint benchmarks/constraints.txt --build-constraint constraints.txt --editable . --group bench
	@touch $@
