# The lab: tests under other kernels, in an emulated machine. tools/lab/README.md says more.

# What asks the kernel for something, the longest first. The rest (wire, state, configuration, traces, texts, packages)
# asks it for nothing, and would only take 15 times as long; what measures times and costs says nothing in there.
LAB_PROCESS := guest_memfd vmm doctor handoff_userfault vmm_userfault vmm_damage handoff_wrong destination \
	daemon daemon_connections daemon_life daemon_sessions daemon_status hardening
LAB_NATIVE := shapes remove pager install lane source stress ahead tls tls_lanes precedence
# Where kernels differ; so much of it is run under each of the matrix.
LAB_MATRIX ?= $(patsubst %,tests/native/test_native_%.py,uffd vcpus memfile no_direct_map) \
	$(patsubst %,tests/lab/test_lab_%.py,migration memfd kernel)
LAB_TESTS ?= $(LAB_PROCESS:%=tests/test_%.py) $(LAB_NATIVE:%=tests/native/test_native_%.py) $(LAB_MATRIX) \
	tests/lab/test_lab_ktls.py tests/lab/test_lab_netem.py
LAB_SHORT ?= tests/lab/test_lab_migration.py tests/lab/test_lab_kernel.py
# How many machines at a time; each keeps one CPU of this host busy.
LAB_MACHINES ?= $(shell nproc)

# Bytecode that an emulated CPU then need not make; that of tests, with their assertions rewritten, is pytest's.
define bytecode
@$(BIN)/python -m compileall -q gmemd tools
@PYTHONDONTWRITEBYTECODE= $(BIN)/python -m pytest --collect-only -q $(LAB_TESTS) >/dev/null
endef

.PHONY: lab-kernel
lab-kernel: ## the lab kernel, build/lab/bzImage, from Debian's source (11 minutes)
	@tools/lab/build

.PHONY: lab-test
lab-test: $(INSTALLED) ## the tests under the lab kernel (ARGS= for pytest, LAB_TESTS= for other files)
	@tools/lab/need
	$(bytecode)
	@$(BIN)/python -m tools.lab.suite -j $(LAB_MACHINES) $(LAB_TESTS) -- $(ARGS)

# 69: there is no QEMU or no kernel here, and it was said.
.PHONY: lab-short
lab-short: $(INSTALLED)
	$(bytecode)
	@status=0; tools/lab/need && $(BIN)/python -m tools.lab.suite -j 2 $(LAB_SHORT) || status=$$?; \
	[ $$status = 69 ] && echo 'skipped: see above' || exit $$status

.PHONY: lab-matrix
lab-matrix: $(INSTALLED) ## the tests and the doctor under four kernels, and docs/kernels.md from it
	@tools/lab/need
	$(bytecode)
	@$(BIN)/python -m tools.lab.matrix -j $(LAB_MACHINES) $(LAB_MATRIX)
	@$(BIN)/python -m tools.lab.table build/lab/matrix/*.json >docs/kernels.md
