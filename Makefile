# The two commands of the README are `make demo` and `make test`; all else is for developers.
CARGO ?= cargo
# CI passes --locked.
CARGO_FLAGS ?=

.PHONY: help demo test test-unprivileged lint doc

help:
	@echo 'make demo               a farm of reflinked roots on a loopback XFS, scanned (without root: simulated)'
	@echo 'make test               all tests; needs root for loopback file systems'
	@echo 'make test-unprivileged  all tests but those named privileged_*'
	@echo 'make lint               formatting, clippy, architecture invariants'
	@echo 'make doc                API documentation, warnings are errors'

demo:
	tools/setup.sh demo
	$(CARGO) build $(CARGO_FLAGS) --release -p pagefold
	$(CARGO) run $(CARGO_FLAGS) --release --quiet -p pagefold -- demo

test:
	tools/setup.sh test
	$(CARGO) test $(CARGO_FLAGS) --workspace --no-fail-fast

test-unprivileged:
	tools/setup.sh test-unprivileged
	@echo 'NOT RUN: tests named privileged_* (exactness on real file systems, rigs, farms). `sudo make test` runs all.'
	$(CARGO) test $(CARGO_FLAGS) --workspace --no-fail-fast -- --skip privileged_

lint:
	$(CARGO) fmt --all --check
	$(CARGO) clippy $(CARGO_FLAGS) --workspace --all-targets -- -D warnings
	$(CARGO) xtask check

doc:
	RUSTDOCFLAGS='-D warnings' $(CARGO) doc $(CARGO_FLAGS) --no-deps --workspace
