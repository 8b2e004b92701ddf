//! Loopback rigs: each kind comes up as asked and leaves nothing behind, however its owner ends.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use pagefold_testfs::rig::{KnownFs, LoopRig, RigFs, fs_kind, make_image, mount_image, sweep};

const ROLE: &str = "PAGEFOLD_TEST_RIG_ROLE";

fn rig(fs: RigFs) -> LoopRig {
    LoopRig::with_size(fs, 512 << 20).unwrap_or_else(|e| panic!("this test needs root and loop devices: {e}"))
}

fn home(rig: &LoopRig) -> PathBuf {
    rig.path().parent().expect("a mount point has a parent").to_owned()
}

/// What would betray a leftover: the directory, a mount below it, a loop device on its image.
fn traces(home: &Path) -> Vec<String> {
    let needle = home.to_str().expect("rig paths are text");
    let mut found = Vec::new();
    if home.exists() {
        found.push(format!("{needle} exists"));
    }
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    found.extend(mounts.lines().filter(|l| l.contains(&format!("{needle}/"))).map(str::to_owned));
    for device in std::fs::read_dir("/sys/block").expect("sysfs").flatten() {
        let backing = std::fs::read_to_string(device.path().join("loop/backing_file")).unwrap_or_default();
        if backing.starts_with(&format!("{needle}/")) {
            found.push(format!("{} is on {backing}", device.path().display()));
        }
    }
    found
}

/// Soon: an unmount writes back, and who starts a mount namespace has a copy of the mount for a moment.
fn assert_gone(home: &Path) {
    let started = Instant::now();
    while !traces(home).is_empty() {
        assert!(started.elapsed() < Duration::from_secs(60), "left behind: {:#?}", traces(home));
        std::thread::sleep(Duration::from_millis(50));
    }
}

#[test]
fn privileged_every_kind_of_rig_mounts_what_it_says_and_vanishes() {
    for (fs, kind) in [
        (RigFs::Xfs, Some(KnownFs::Xfs)),
        (RigFs::XfsSmallBlocks, Some(KnownFs::Xfs)),
        (RigFs::Btrfs, Some(KnownFs::Btrfs)),
        (RigFs::BtrfsZstd, Some(KnownFs::Btrfs)),
        (RigFs::Ext4, None),
    ] {
        let rig = rig(fs);
        let found = fs_kind(rig.path()).expect("statfs");
        match kind {
            Some(kind) => assert_eq!(found, kind, "{fs:?}"),
            None => assert!(matches!(found, KnownFs::Other(0xef53)), "{fs:?}: {found:?}"),
        }
        std::fs::write(rig.path().join("a"), b"bytes").expect("writable");
        let home = home(&rig);
        assert!(traces(&home).len() >= 3, "a live rig has a directory, a mount and a loop device");
        drop(rig);
        assert_gone(&home);
    }
}

#[test]
fn privileged_a_remount_keeps_files_and_a_busy_rig_still_goes() {
    let mut rig = rig(RigFs::Xfs);
    std::fs::write(rig.path().join("a"), b"bytes").expect("writable");
    rig.remount().expect("nothing is open");
    assert_eq!(std::fs::read(rig.path().join("a")).expect("still there"), b"bytes");
    let open = std::fs::File::open(rig.path().join("a")).expect("readable");
    assert!(rig.remount().is_err(), "an open file keeps the mount busy");
    let home = home(&rig);
    drop(rig);
    drop(open);
    assert_gone(&home);
}

#[test]
fn privileged_a_panic_leaves_no_rig() {
    let mut left = None;
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
        let rig = rig(RigFs::Btrfs);
        left = Some(home(&rig));
        panic!("planned");
    }));
    assert!(panicked.is_err());
    assert_gone(&left.expect("the rig came up"));
}

#[test]
fn privileged_a_sweep_takes_leftovers_of_the_dead_and_spares_the_living() {
    let base = tempfile::tempdir().expect("temporary directory");
    let living = rig(RigFs::Xfs);
    // As an owner and its watcher leave it when both are killed: mounted, the lock free.
    let dead = base.path().join("pagefold-rig-1-0");
    std::fs::create_dir_all(dead.join("mnt")).expect("writable");
    std::fs::write(dead.join("owner.lock"), b"").expect("writable");
    make_image(RigFs::Btrfs, &dead.join("backing.img"), 256 << 20).expect("mkfs");
    mount_image(RigFs::Btrfs, &dead.join("backing.img"), &dead.join("mnt")).expect("mount");
    std::fs::write(dead.join("mnt/a"), b"bytes").expect("writable");
    let bystander = base.path().join("other");
    std::fs::create_dir(&bystander).expect("writable");

    sweep(base.path()).expect("the sweep runs");
    sweep(home(&living).parent().expect("the rigs' base")).expect("the sweep runs");

    assert_gone(&dead);
    assert!(bystander.exists());
    std::fs::write(living.path().join("a"), b"bytes").expect("a living rig is spared");
}

/// Not a test of its own: the owner that the tests below kill. Does nothing unless told to.
#[test]
fn helper_holds_a_rig_until_killed() {
    if std::env::var_os(ROLE).is_none() {
        return;
    }
    let rig = rig(RigFs::Xfs);
    println!("\nhome={}", home(&rig).display());
    std::thread::sleep(Duration::from_secs(120));
}

fn kill_an_owner_with(signal: &str) {
    // A base of its own, so that the watcher must do it: nobody else's sweep comes by here.
    let base = tempfile::tempdir().expect("temporary directory");
    // Who is started in the background of a script ignores SIGINT, and so do those whom it starts.
    let mut owner = Command::new("env")
        .args(["--default-signal=INT".as_ref(), std::env::current_exe().expect("own path").as_os_str()])
        .args(["--exact", "helper_holds_a_rig_until_killed", "--nocapture"])
        .env(ROLE, "owner")
        .env("PAGEFOLD_TMPDIR", base.path())
        .stdout(Stdio::piped())
        .spawn()
        .expect("the test binary starts itself");
    let lines = BufReader::new(owner.stdout.take().expect("piped")).lines();
    let home = lines
        .map_while(Result::ok)
        .find_map(|l| l.strip_prefix("home=").map(PathBuf::from))
        .expect("the owner made a rig");
    assert!(!traces(&home).is_empty());
    let killed = Command::new("kill").args([signal, &owner.id().to_string()]).status().expect("kill runs");
    assert!(killed.success());
    owner.wait().expect("it ends");
    let gone = std::panic::catch_unwind(|| assert_gone(&home));
    // Should the watcher have failed, the sweep cleans up after this test.
    sweep(base.path()).expect("the sweep runs");
    gone.unwrap_or_else(|failed| std::panic::resume_unwind(failed));
}

#[test]
fn privileged_a_killed_owner_leaves_no_rig() {
    kill_an_owner_with("-KILL");
}

#[test]
fn privileged_an_interrupted_owner_leaves_no_rig() {
    kill_an_owner_with("-INT");
}

#[test]
fn privileged_a_power_cut_keeps_what_was_synced_and_only_that() {
    for fs in [RigFs::Xfs, RigFs::Ext4, RigFs::Btrfs] {
        let mut rig = rig(fs);
        let (kept, lost) = (rig.path().join("kept"), rig.path().join("lost"));
        std::fs::write(&kept, b"synced").expect("writable");
        rustix::fs::syncfs(std::fs::File::open(rig.path()).expect("there")).expect("syncfs");
        // File systems write of their own accord, every half a minute or oftener: then there was nothing to lose.
        let lost_it = (0..5).any(|_| {
            std::fs::write(&lost, b"never synced").expect("writable");
            rig.cut_power().unwrap_or_else(|e| panic!("{fs:?}: {e}"));
            assert_eq!(std::fs::read(&kept).expect("kept"), b"synced", "{fs:?}");
            !std::fs::exists(&lost).expect("readable")
        });
        assert!(lost_it, "{fs:?} lost nothing: that was no power cut");
        std::fs::write(&lost, b"usable again").expect("writable");
    }
}
