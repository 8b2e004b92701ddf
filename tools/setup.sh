#!/bin/bash
# What a demo or a test run needs besides Rust: checks, and as root installs with apt what is missing.
#
#   tools/setup.sh demo                what `make demo` needs; without root it only says what is missing
#   tools/setup.sh test                what `make test` needs; fails, saying what to do, where it can't be had
#   tools/setup.sh test-unprivileged   the same without programs that only root can use
set -euo pipefail

# Some systems keep mkfs out of a user's PATH.
PATH="$PATH:/usr/sbin:/sbin"

# program:Debian package
# pkg-config and OpenSSL's headers: for the crate that writes images.
compiler="cc:gcc pkg-config:pkg-config"
demo="$compiler mkfs.xfs:xfsprogs mount:mount losetup:mount"
# fincore is the independent count of cached pages that the exactness tests compare with.
test="$demo mkfs.btrfs:btrfs-progs btrfs:btrfs-progs mkfs.ext4:e2fsprogs fincore:util-linux-extra setpriv:util-linux"
# What views are root file systems for, and what runs in them.
test="$test busybox:busybox-static runc:runc crun:crun podman:podman systemd-nspawn:systemd-container"
test="$test perl:perl-base mmdebstrap:mmdebstrap setfacl:acl setfattr:attr setcap:libcap2-bin chroot:coreutils unshare:util-linux"
# program:version of crates that are programs: test suites
crates="pjdfstest:0.2.2 fsx:0.3.2"

case "${1:-}" in
    demo) wanted=$demo ;;
    test) wanted=$test ;;
    test-unprivileged) wanted=$compiler ;;
    *) echo "usage: $0 demo|test|test-unprivileged" >&2; exit 2 ;;
esac

is_root() { [ "$(id -u)" -eq 0 ]; }

missing_packages() {
    local pair
    for pair in $wanted; do
        command -v "${pair%%:*}" >/dev/null || echo "${pair##*:}"
    done | sort -u
    pkg-config --exists openssl 2>/dev/null || echo libssl-dev
}

if ! command -v cargo >/dev/null; then
    echo "setup: cargo is not installed: see https://rustup.rs (pagefold needs Rust 1.90 or newer)" >&2
    exit 1
fi

missing=$(missing_packages | tr '\n' ' ')
if [ -n "$missing" ] && is_root && command -v apt-get >/dev/null; then
    echo "setup: installing $missing"
    export DEBIAN_FRONTEND=noninteractive
    apt-get update -qq </dev/null
    # shellcheck disable=SC2086  # a list of package names
    if ! apt-get install -y -qq --no-install-recommends $missing </dev/null; then
        # Before Debian 12 fincore was part of util-linux itself.
        echo "setup: apt-get could not install all of: $missing" >&2
    fi
    missing=$(missing_packages | tr '\n' ' ')
fi

if [ -n "$missing" ]; then
    echo "setup: missing packages: $missing(as root: apt-get install $missing)" >&2
    [ "$1" = demo ] || exit 1
fi

if [ "$1" = test ] && ! is_root; then
    cat >&2 <<'NOTE'
setup: not root. Tests named privileged_* make loopback file systems and fail without root.
       All tests:                 sudo make test
       All that need no root:     make test-unprivileged
NOTE
    exit 1
fi

# Built once into the build directory: cargo leaves what is there alone.
if [ "$1" = test ]; then
    tools="${CARGO_TARGET_DIR:-target}/tools"
    for pair in $crates; do
        [ -x "$tools/bin/${pair%%:*}" ] && continue
        echo "setup: building ${pair%%:*} ${pair##*:}"
        cargo install --quiet --locked --root "$tools" --version "${pair##*:}" "${pair%%:*}"
    done
fi
