# The two commands of the README are `make demo` and `make test`; all else is for developers.
CARGO ?= cargo
# CI passes --locked.
CARGO_FLAGS ?=

PREFIX ?= /usr
DESTDIR ?=

.PHONY: help demo test test-unprivileged lint doc install uninstall

help:
	@echo 'make demo               a farm of reflinked roots on a loopback XFS, scanned (without root: simulated)'
	@echo 'make test               all tests; needs root for loopback file systems'
	@echo 'make test-unprivileged  all tests but those named privileged_*'
	@echo 'make lint               formatting, clippy, architecture invariants'
	@echo 'make install            to $$(DESTDIR)$$(PREFIX): binary, mount helper, unit, man pages, completions (build first)'
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

# After `cargo build --release -p pagefold`. The mount helper is where mount(8) looks for it.
BUILT ?= $(or $(CARGO_TARGET_DIR),target)/release/pagefold
install:
	install -D -m 0755 $(BUILT) $(DESTDIR)$(PREFIX)/bin/pagefold
	install -d $(DESTDIR)/sbin $(DESTDIR)$(PREFIX)/share/man/man1
	ln -sf $(PREFIX)/bin/pagefold $(DESTDIR)/sbin/mount.pagefold
	install -D -m 0644 dist/pagefold@.service $(DESTDIR)$(PREFIX)/lib/systemd/system/pagefold@.service
	$(BUILT) man $(DESTDIR)$(PREFIX)/share/man/man1
	install -d $(DESTDIR)$(PREFIX)/share/bash-completion/completions $(DESTDIR)$(PREFIX)/share/zsh/site-functions \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d
	$(BUILT) completions bash > $(DESTDIR)$(PREFIX)/share/bash-completion/completions/pagefold
	$(BUILT) completions zsh > $(DESTDIR)$(PREFIX)/share/zsh/site-functions/_pagefold
	$(BUILT) completions fish > $(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/pagefold.fish

# Files only; `pagefold uninstall --check` first tells whether anything still depends on them.
uninstall:
	rm -f $(DESTDIR)$(PREFIX)/bin/pagefold $(DESTDIR)/sbin/mount.pagefold \
		$(DESTDIR)$(PREFIX)/lib/systemd/system/pagefold@.service \
		$(DESTDIR)$(PREFIX)/share/bash-completion/completions/pagefold \
		$(DESTDIR)$(PREFIX)/share/zsh/site-functions/_pagefold \
		$(DESTDIR)$(PREFIX)/share/fish/vendor_completions.d/pagefold.fish
	rm -f $(DESTDIR)$(PREFIX)/share/man/man1/pagefold.1 $(DESTDIR)$(PREFIX)/share/man/man1/pagefold-*.1
