# The lab: tests under other kernels, in an emulated machine. tools/lab/README.md says more.

# Packaging does not depend on the kernel, and compiling is slow in there.
LAB_TESTS ?= tests --ignore=tests/test_packaging.py
LAB_SHORT ?= tests/lab
LAB_SECONDS ?= 7200
LAB_RUN := tools/lab/run -e GMEMD_LAB=1 -e HYPOTHESIS_STORAGE_DIRECTORY=/tmp/hypothesis
# What hangs out there for 2 minutes may only be slow in here.
LAB_PYTEST := $(BIN)/python -m pytest -p no:cacheprovider -o faulthandler_timeout=900 -q --tb=short

# $(call in_lab,SECONDS,TESTS). Collecting on the host leaves the bytecode that the emulated CPU then need not make.
in_lab = $(BIN)/python -m pytest --collect-only -q $(2) >/dev/null && $(LAB_RUN) -t $(1) -- $(LAB_PYTEST) $(2)

.PHONY: lab-kernel
lab-kernel: ## the lab kernel, build/lab/bzImage, from Debian's source (11 minutes)
	@tools/lab/build

.PHONY: lab-test
lab-test: $(INSTALLED) ## the tests under the lab kernel (ARGS=)
	@tools/lab/need
	@$(call in_lab,$(LAB_SECONDS),$(LAB_TESTS) $(ARGS))

# 69: there is no QEMU or no kernel here, and it was said.
.PHONY: lab-short
lab-short: $(INSTALLED)
	@status=0; tools/lab/need && { $(call in_lab,180,$(LAB_SHORT)); } || status=$$?; \
	[ $$status = 69 ] && echo 'skipped: see above' || exit $$status

.PHONY: lab-matrix
lab-matrix: $(INSTALLED) ## the tests and the doctor under four kernels, and docs/kernels.md from it
	@tools/lab/need
	@$(BIN)/python -m tools.lab.matrix -- $(LAB_TESTS) $(ARGS)
	@$(BIN)/python -m tools.lab.table build/lab/matrix/*.json >docs/kernels.md
