# The front door: make run, make test, make check, make bench, make docs.
UV_VERSION := 0.13.9
TOOLS := .tools
# A uv on the PATH is used as it is; without one, a pinned uv goes into .tools (nothing else is touched).
UV := $(shell command -v uv 2>/dev/null || echo $(TOOLS)/bin/uv)
RUN := $(UV) run --frozen --no-sync
ARGS ?=
# Plants often sit behind a proxy that inspects TLS: its certificate is the system's, not one that uv brings along.
export UV_SYSTEM_CERTS ?= $(if $(wildcard /etc/ssl/certs/ca-certificates.crt /etc/pki/tls/certs/ca-bundle.crt),true,false)
# The tests start hundreds of processes: where Python keeps no bytecode, each would compile the package again.
test test-slow: export PYTHONDONTWRITEBYTECODE =

.DEFAULT_GOAL := help
.PHONY: help env run test test-slow check bench docs clean

help:  ## show this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 12

$(TOOLS)/bin/uv:
	python3 -m venv $(TOOLS)
	$(TOOLS)/bin/python -m pip install --quiet --disable-pip-version-check uv==$(UV_VERSION)

# The environment is rebuilt when the lock or the project file changes.
.venv/.stamp: pyproject.toml uv.lock | $(filter $(TOOLS)/bin/uv,$(UV))
	$(UV) sync --frozen --compile-bytecode
	@touch $@

env: .venv/.stamp  ## create the environment from the lock file

run: env  ## the main job: train, evaluate beside the ladder, leave a report (ARGS="--seeds 3")
	$(RUN) gmel run $(ARGS)

test: env  ## the quick tests
	$(RUN) pytest -n auto --dist worksteal $(ARGS)

test-slow: env  ## the slow tests as well, with programs compiled as users have them
	XLA_FLAGS= $(RUN) pytest -n auto --dist worksteal -m "slow or not slow" $(ARGS)

check: env  ## lint, format and types
	$(RUN) ruff check .
	$(RUN) ruff format --check .
	$(RUN) pyright

bench: env  ## benchmarks with ratios, as a table and as JSON
	$(RUN) python -m benchmarks $(ARGS)

docs: env  ## the tables of the docs, measured again
	$(RUN) python -m benchmarks.ladder $(ARGS)

clean:  ## remove the environment and caches
	rm -rf .venv $(TOOLS) .pytest_cache .ruff_cache
