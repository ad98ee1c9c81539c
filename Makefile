# Everything is set up by the targets themselves, on a plain Debian or Ubuntu as root.
#
#   make demo      the main job on real programs, narrated, in under a minute after set-up
#   make test      the whole test suite, real programs included
#   make torture   kill the supervisor and cut the power many more times than `make test` does (TORTURE=number),
#                  grow random process trees and record for much longer (SECONDS=number), run all pairs of verbs at once,
#                  fail a disk at every write, make up exports
#   make bench     measure podtree on this machine, see docs/bench.md (BENCH="--case NAME --rounds N --json FILE")
#   make check     lint and types
#   make install   only what it takes for .venv/bin/podtree to work

VENV := .venv
PYTEST := $(VENV)/bin/python3 -m pytest
TESTS ?=
TORTURE ?= 1000
SECONDS ?= 3600
.DEFAULT_GOAL := install
.PHONY: install test-setup demo test torture bench check clean

$(VENV)/.run: pyproject.toml constraints.txt scripts/venv.sh
	@scripts/venv.sh run
	@touch $@

$(VENV)/.test: $(VENV)/.run
	@scripts/venv.sh test
	@touch $@

$(VENV)/.bench: $(VENV)/.run
	@scripts/venv.sh bench
	@touch $@

install: $(VENV)/.run
	@scripts/packages.sh run

test-setup: $(VENV)/.test
	@scripts/packages.sh test

demo: install
	@scripts/packages.sh demo
	@$(VENV)/bin/python3 demo/demo.py

test: test-setup
	@$(PYTEST) $(TESTS)

torture: test-setup
	@PODTREE_TORTURE=$(TORTURE) PODTREE_RANDOM_SECONDS=$(SECONDS) PODTREE_RECORD_SECONDS=$(SECONDS) \
		PODTREE_CUTS=$(TORTURE) PODTREE_FAILURES=100 PODTREE_FUZZ=10000 PODTREE_PAIRS=1000 \
		$(PYTEST) tests/torture tests/test_random_trees.py tests/test_transfer_fuzz.py --timeout 0 -o session_timeout=0

bench: $(VENV)/.bench
	@scripts/packages.sh bench
	@$(VENV)/bin/python3 -m bench $(BENCH)

check: $(VENV)/.test
	@$(VENV)/bin/ruff check .
	@$(VENV)/bin/ruff format --check --quiet tests demo || echo "ruff format would change files in tests or demo"
	@$(VENV)/bin/mypy

clean:
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache .hypothesis
