//! A host with systemd boots, and its views are there: one by the unit, before the container engines; one by a line in fstab. The host is a
//! container, but its systemd is a real one, in the order in which it would start on a machine.
//!
//! Needs mmdebstrap and the network, as installing anything does.

mod common;

use std::path::Path;
use std::process::Command;

use common::view::{ViewRig, must, suite, with_cgroups};
use pagefold_testfs::rig::RigFs;

/// Where the host has the file system with roots, store and views.
const FARM: &str = "/srv";

/// Before the reboot: all is sealed, one view is mounted and written.
const BEFORE: &str = "cd /srv && mkdir -p roots/one views/one views/two && cp -a /etc/. roots/one && cp -a --reflink=always roots/one roots/two \
    && pagefold seal roots/one roots/two && pagefold mount roots/one views/one && echo kept > views/one/written";

/// What a container engine's unit stands for: it starts when the views are there, or it shows that they are not.
const ENGINE: &str = "[Unit]\nDescription=Container engine\n\n[Service]\nType=oneshot\n\
    ExecStart=/bin/sh -c 'cat /srv/views/one/written > /srv/engine-saw'\n\n[Install]\nWantedBy=multi-user.target\n";

/// Ends the boot and tells about it.
const REPORT: &str = "[Unit]\nAfter=docker.service srv-views-two.mount\nSuccessAction=poweroff-force\nFailureAction=poweroff-force\n\n\
    [Service]\nType=oneshot\n\
    ExecStart=/bin/sh -c '(grep /srv/views/ /proc/self/mountinfo; systemctl is-failed \"pagefold@*\" srv-views-two.mount; \
    cmp /srv/roots/two/hostname /srv/views/two/hostname && echo same) > /srv/report 2>&1; sync'\n";

fn nspawn(host: &Path, farm: &Path, arguments: &str) -> String {
    with_cgroups(&format!(
        "exec timeout 600 systemd-nspawn --quiet --register=no --keep-unit --private-users=no --capability=all -D {} --bind={}:{FARM} \
         --bind-ro={}:/usr/bin/pagefold {arguments}",
        host.display(),
        farm.display(),
        env!("CARGO_BIN_EXE_pagefold"),
    ))
}

fn write(host: &Path, name: &str, text: &str) {
    std::fs::write(host.join(name), text).unwrap_or_else(|e| panic!("{name}: {e}"));
}

#[test]
fn privileged_views_are_there_when_a_host_has_booted() {
    let rig = ViewRig::new(RigFs::Xfs);
    let (host, farm) = (rig.make_dir("host"), rig.make_dir("farm"));
    let tar = rig.path("host.tar");
    let debian = ["--quiet", "--variant=minbase", "--include=systemd-sysv", &suite()];
    must(Command::new("mmdebstrap").args(debian).arg(&tar));
    must(Command::new("tar").args(["--exclude=./dev/*", "-C"]).arg(&host).arg("-xf").arg(&tar));
    std::fs::remove_file(&tar).expect("there");
    nspawn(&host, &farm, &format!("--as-pid2 /bin/sh -c '{BEFORE}'"));
    assert!(!farm.join("views/one/written").exists(), "the view should have gone with the container");

    let unit = Path::new(env!("CARGO_MANIFEST_DIR")).join("../dist/pagefold@.service");
    std::fs::copy(unit, host.join("usr/lib/systemd/system/pagefold@.service")).expect("room on the rig");
    write(&host, "etc/systemd/system/docker.service", ENGINE);
    write(&host, "etc/systemd/system/report.service", REPORT);
    write(&host, "etc/fstab", "/srv/roots/two /srv/views/two pagefold defaults,store=/srv/.pagefold 0 0\n");
    let enable = "ln -sf /usr/bin/pagefold /sbin/mount.pagefold; systemctl enable docker.service \
                  $(systemd-escape --path --template=pagefold@.service /srv/.pagefold); systemctl add-wants multi-user.target report.service";
    nspawn(&host, &farm, &format!("--as-pid2 /bin/sh -c '{enable}'"));
    let console = nspawn(&host, &farm, "--boot");

    let read = |name: &str| std::fs::read_to_string(farm.join(name)).unwrap_or_default();
    let report = read("report");
    for view in ["/srv/views/one", "/srv/views/two"] {
        assert!(report.contains(view), "{view} is not mounted:\n{report}\n{console}");
    }
    assert!(report.contains("same") && !report.contains("failed"), "{report}\n{console}");
    assert_eq!(read("engine-saw"), "kept\n", "the engine was started before the views\n{report}\n{console}");
}
