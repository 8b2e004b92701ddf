//! Programs that are hard on a file system live in a view: apt-get installs, git clones and make builds, redis is killed and comes
//! back from its append-only file, sqlite writes ahead. Then everything is committed, and the raw root is as good as the view was.
//!
//! Needs mmdebstrap and the network, as installing anything does.

mod common;

use std::path::Path;
use std::process::Command;

use common::view::{ViewRig, done, must, suite};
use pagefold_testfs::rig::RigFs;

/// Runs `script` in `root` as in a container: namespaces of its own, /dev and /proc.
fn in_root(root: &Path, script: &str) -> String {
    let outside = "set -e; mount --make-rprivate /; mount --rbind /dev \"$1/dev\"; mount -t proc proc \"$1/proc\"; \
                   exec chroot \"$1\" /usr/bin/env -i PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C \
                   DEBIAN_FRONTEND=noninteractive sh -euc \"$2\"";
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "sh", "-c", outside, "sh"]).arg(root).arg(script);
    must(&mut command)
}

const INSTALL: &str = "apt-get -q update && apt-get -qy install --no-install-recommends gcc libc6-dev make git sqlite3 redis-server \
                       && dpkg --audit && sync";

const BUILD: &str = "mkdir -p /srv && cd /srv && git init -q made && cd made \
    && printf '#include <stdio.h>\\nint main(void) { puts(\"built\"); return 0; }\\n' > a.c \
    && printf 'a: a.c\\n\\tgcc -O2 -o a a.c\\n' > Makefile && git add . \
    && git -c user.name=a -c user.email=a@b commit -qm one && cd .. && git clone -q made cloned && cd cloned && make -s && ./a \
    && git fsck --strict";

const REDIS: &str = "mkdir -p /srv/redis && cd /srv/redis; \
    start() { redis-server --dir /srv/redis --appendonly yes --appendfsync always --port 0 --unixsocket /srv/redis/s \
              --daemonize yes --pidfile /srv/redis/pid >/dev/null; \
              i=0; until redis-cli -s s ping 2>/dev/null | grep -q PONG; do i=$((i+1)); [ $i -lt 600 ]; sleep 0.1; done; }; \
    start; seq 1 2000 | sed 's/.*/SET key& value&/' | redis-cli -s s --pipe >/dev/null; \
    p=$(cat pid); kill -9 $p; i=0; while kill -0 $p 2>/dev/null && [ $i -lt 50 ]; do i=$((i+1)); sleep 0.1; done; rm -f s pid; start; redis-cli -s s dbsize; redis-cli -s s shutdown nosave; rm -f s pid";

const SQLITE: &str = "cd /srv && sqlite3 db 'PRAGMA journal_mode=WAL; CREATE TABLE t(a); \
    WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x+1 FROM n WHERE x<5000) INSERT INTO t SELECT x FROM n; \
    PRAGMA wal_checkpoint(TRUNCATE); INSERT INTO t VALUES(0); SELECT count(*) FROM t; PRAGMA integrity_check'";

/// The same questions to what is there.
const CHECK: &str = "dpkg --audit; /srv/cloned/a; cd /srv/cloned && git fsck --strict && git status --porcelain; \
    sqlite3 /srv/db 'SELECT count(*) FROM t; PRAGMA integrity_check'; redis-check-aof /srv/redis/appendonlydir/*.manifest | tail -1; \
    dpkg --verify git sqlite3 redis-server make";

#[test]
fn privileged_apt_git_redis_and_sqlite_live_in_a_view() {
    let rig = ViewRig::new(RigFs::Xfs);
    let root = rig.path("debian");
    // By way of a tar: the rig is mounted without devices, which mmdebstrap wants where it works.
    let tar = rig.path("debian.tar");
    must(Command::new("mmdebstrap").args(["--quiet", "--variant=minbase", &suite()]).arg(&tar));
    std::fs::create_dir(&root).expect("room on the rig");
    must(Command::new("tar").args(["--exclude=./dev/*", "--xattrs", "-C"]).arg(&root).arg("-xf").arg(&tar));
    std::fs::remove_file(&tar).expect("there");
    must(Command::new("cp").args(["-a", "--reflink=always"]).arg(&root).arg(rig.path("clone")));
    let views = rig.views(&["debian", "clone"]);
    in_root(&views[0], INSTALL);
    assert!(in_root(&views[0], BUILD).starts_with("built"));
    assert!(in_root(&views[0], REDIS).contains("2000"));
    let told = in_root(&views[0], SQLITE);
    assert!(told.contains("5001") && told.contains("ok"), "{told}");
    let in_view = in_root(&views[0], CHECK);
    assert!(in_view.contains("built") && in_view.contains("5001"), "{in_view}");
    assert!(!views[1].join("usr/bin/git").exists() && !root.join("usr/bin/git").exists());
    done(&["umount".as_ref(), views[0].as_os_str(), "--commit".as_ref()]);
    assert_eq!(in_root(&root, CHECK), in_view, "the committed root answers otherwise than its view did");
    must(
        Command::new("diff")
            .args(["-r", "--no-dereference"])
            .arg(rig.path("clone/etc"))
            .arg(views[1].join("etc")),
    );
}
