# Every target does its own set-up: `make test` and `make demo` are all that a fresh Debian machine needs.

PYTHON ?= python3
# What a target hands on, as in: make demo ARGS='--memory 2G --json'
ARGS ?=

BIN := .venv/bin
INSTALLED := .venv/installed
TIMES := build/times
NATIVE := $(wildcard gmemd/native/*.[ch] gmemd/native/_build.py tools/vmm/*.[ch])

SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:

# $(call stage,NAME,COMMAND): runs it under a heading and notes the seconds that it took.
define stage
@printf '\n=== %s\n' '$(1)'; begin=$$SECONDS; $(2); printf '%5d s  %s\n' $$((SECONDS - begin)) '$(1)' >>$(TIMES)
endef

.PHONY: help
help: ## this list
	@awk -F ':.*## ' '/^[a-z][a-z -]*:.*## / { printf "make %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

.PHONY: venv
venv: $(INSTALLED) ## the virtual environment .venv, with everything built and installed

# Python files are used where they lie; only what is compiled or declared needs another installation.
$(INSTALLED): pyproject.toml setup.py tools/setup $(filter-out %/_native.c,$(NATIVE))
	@tools/setup $(PYTHON) .venv
	@touch $@

.PHONY: test
test: ## everything that must hold: lint, types, tests from the lowest layer up, a short run in the lab
	@mkdir -p build; rm -f $(TIMES)
	$(call stage,set-up and build,$(MAKE) --no-print-directory venv)
	$(call stage,lint and types,$(MAKE) --no-print-directory lint)
	$(call stage,pytest,$(BIN)/pytest -rs $(ARGS))
	$(call stage,lab,$(MAKE) --no-print-directory lab-short)
	@printf '\n=== time\n'; cat $(TIMES)

.PHONY: lint
lint: $(INSTALLED) ## ruff and mypy; the C compiler's warnings are errors in any build
	$(BIN)/ruff check
	mkdir -p build/types && ln -sfn ../../tools build/types/gmemd_tools
	MYPYPATH=build/types $(BIN)/mypy -p gmemd -p gmemd_tools
	for tests in $(wildcard tests tests/*/); do \
	  ls $$tests/*.py >/dev/null 2>&1 || continue; \
	  MYPYPATH=build/types:tests:$$tests $(BIN)/mypy $$tests/*.py || exit; \
	done

.PHONY: test-sanitize test-asan test-tsan
test-sanitize: test-asan test-tsan ## the native tests under the address, undefined-behaviour and thread sanitizers

# Python has no sanitizer in it, so the run-time library must be loaded before all else, and the thread sanitizer of
# gcc 12 wants addresses where it expects them. What Python leaves unfreed at its end would hide what we leak.
# PYTHONMALLOC lets the address sanitizer see Python's buffers, too.
test-asan: FLAGS := -fsanitize=address,undefined -fno-sanitize-recover=all -fno-omit-frame-pointer
test-asan: export ASAN_OPTIONS := detect_leaks=0:abort_on_error=1
test-asan: export PYTHONMALLOC := malloc
test-tsan: FLAGS := -fsanitize=thread
test-tsan: export TSAN_OPTIONS := halt_on_error=1:suppressions=$(CURDIR)/tests/native/tsan.supp
test-asan test-tsan: test-%: $(INSTALLED)
	GMEMD_CFLAGS='$(FLAGS)' GMEMD_LDFLAGS='$(FLAGS)' \
		$(BIN)/python setup.py --quiet build --build-base build/$* --build-lib build/$*/lib
	setarch --addr-no-randomize env LD_PRELOAD=$$(gcc -print-file-name=lib$*.so) \
		PYTHONPATH=build/$*/lib PYTHONSAFEPATH=1 $(BIN)/pytest --layer native $(ARGS)

# Fuzzing needs a compiler with libFuzzer in it, and the same for Python.
.PHONY: fuzz
fuzz: $(INSTALLED) ## every reader of foreign bytes, driven by coverage (ARGS=SECONDS)
	@tools/lab/need clang libclang-rt-dev
	@$(BIN)/python -c 'import atheris' 2>/dev/null || $(BIN)/pip install -qq atheris
	@PYTHONPATH=tests $(BIN)/python -m fuzz $(ARGS)

.PHONY: fuzz-daemon
fuzz-daemon: $(INSTALLED) ## a live daemon among peers that send what is nearly right (ARGS='SESSIONS SEED')
	@PYTHONPATH=tests $(BIN)/python -m fuzz.sessions $(ARGS)

.PHONY: syscalls
syscalls: $(INSTALLED) ## finds the system calls that the daemon needs, for its unit
	@tools/lab/need strace
	@$(BIN)/python tools/syscalls.py

.PHONY: demo
demo: $(INSTALLED) ## a running KVM guest moves to another daemon, every page checked (ARGS=)
	@$(BIN)/gmemd demo $(ARGS)

.PHONY: soak
soak: $(INSTALLED) ## small migrations with a fault at a random byte each (ARGS='--runs 200' of each kind)
	@$(BIN)/python -m gmemd_tools.soak $(ARGS)

.PHONY: browser
browser: ## Debian's chromium, with which the tests look at a report
	apt-get -qq update
	DEBIAN_FRONTEND=noninteractive apt-get -qq install -y --no-install-recommends chromium >/dev/null

.PHONY: bench
bench: $(INSTALLED) ## measurements beside the floor and the peers (ARGS=--quick)
	@$(BIN)/python tools/bench $(ARGS)

.PHONY: dist
dist: $(INSTALLED) ## sdist and wheel in dist/
	$(BIN)/python -m build --no-isolation

.PHONY: test-replay
test-replay: $(INSTALLED) ## a recorded run replayed ten times: the same faults of each thread, every page right
	GMEMD_REPLAYS=10 $(BIN)/pytest -k replay_of_a_recording tests/test_replay.py $(ARGS)

.PHONY: test-timing
test-timing: $(INSTALLED) ## what compares rates, and so needs a host with nothing else to do
	GMEMD_TIMING=1 $(BIN)/pytest -rP tests/test_demand_paging.py tests/test_recovery_many.py $(ARGS)

DEB_TOOLS := debhelper dh-python libssl-dev python3-dev python3-venv

.PHONY: deb
deb: $(INSTALLED) ## the Debian package, in build/deb
	tools/lab/need $(DEB_TOOLS)
	tools/package/build $(BIN)/python build/deb

.PHONY: test-package
test-package: deb ## lintian, and the package's life under systemd: installed, used, upgraded half-way, removed
	tools/lab/need systemd-container mmdebstrap lintian
	lintian --allow-root --display-info --pedantic --fail-on error,warning,info,pedantic build/deb/gmemd_*_amd64.deb
	$(BIN)/python -m gmemd_tools.package build/deb/gmemd_*_amd64.deb build/package/debian.tar

.PHONY: test-metrics
test-metrics: $(INSTALLED) ## the scrape by a real Prometheus, which is installed for it
	tools/lab/need prometheus
	$(BIN)/pytest tests/test_metrics.py $(ARGS)

.PHONY: clean
clean: ## removes all that was made here
	rm -rf .venv build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis bench.json
	rm -f gmemd/native/_native.c gmemd/native/*.so gmemd/native/*.o tools/vmm/gmemd-vmm
	find gmemd tools tests -name __pycache__ -exec rm -rf {} +

-include tools/lab/lab.mk
