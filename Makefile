# Every target does all of its own set-up: the system's packages when run as root
# (otherwise it names them), then .venv with pinned tools.
.DEFAULT_GOAL := help
.PHONY: help venv build-tools test-tools demo test check crash soak bench clean

PYTHON_VENV := .venv/bin/python
# How many crash states, or model operations, the long runs go through.
COUNT ?=
PYTEST_ARGS ?=
BENCH_ARGS ?=

help:
	@echo 'make venv            .venv/bin/qcowfs, ready for use'
	@echo 'make demo            create, mount, partition, snapshot: the whole tour'
	@echo 'make test            all tests (PYTEST_ARGS=...)'
	@echo 'make check           ruff and mypy --strict'
	@echo 'make crash COUNT=N   crash replay over N states (2000)'
	@echo 'make soak COUNT=N    model and file operations, N each (20000), and kills under load'
	@echo 'make bench           paired runs against peers (BENCH_ARGS=...)'
	@echo 'make clean           removes what the others made'

build-tools:
	@.ci/setup build

test-tools:
	@.ci/setup test

.venv/stamp: pyproject.toml .ci/constraints.txt .ci/venv | build-tools
	@.ci/venv

venv: .venv/stamp

demo: test-tools venv
	@$(PYTHON_VENV) -m qcowfs.cli.demo

# The status file tells .ci/run a run with failed tests from one that broke off.
test: test-tools venv
	@mkdir -p .pytest_cache && rm -f .pytest_cache/status
	@status=0; $(PYTHON_VENV) -m pytest $(PYTEST_ARGS) || status=$$?; \
	 mkdir -p .pytest_cache; echo $$status > .pytest_cache/status; exit $$status

check: venv
	@$(PYTHON_VENV) -m ruff check .
	@$(PYTHON_VENV) -m mypy

crash: test-tools venv
	@QCOWFS_CRASH_STATES=$(or $(COUNT),2000) \
	 $(PYTHON_VENV) -m pytest --timeout=0 tests/crash $(PYTEST_ARGS)

soak: test-tools venv
	@QCOWFS_MODEL_OPERATIONS=$(or $(COUNT),20000) QCOWFS_FILE_OPERATIONS=$(or $(COUNT),20000) \
	 QCOWFS_KILL_ROUNDS=20 \
	 $(PYTHON_VENV) -m pytest --timeout=0 tests/driver tests/interop $(PYTEST_ARGS)

bench: test-tools venv
	@$(PYTHON_VENV) -m benchmarks $(BENCH_ARGS)

clean:
	rm -rf .venv build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find qcowfs tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
