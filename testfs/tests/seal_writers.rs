//! `seal` and a write that is under way: the kernel has set the file's change time, holds its lock, and has not yet taken a byte.
//!
//! Such a write shows nowhere: no page is dirty, and no time moves when it ends. Whoever takes the file's bytes without waiting for it
//! shows old bytes under a change time that says they are new. The write is held there by `userfaultfd`: its bytes come from
//! memory that isn't there until we say so. Needs root, loop devices and perl; fails with instructions without.

mod seal_support;

use seal_support::*;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use pagefold_fsadapters::sealed::seal::SealConfig;
use pagefold_fsadapters::sealed::tree::EntryId;

/// More than are asked for their place before small files are read at once.
const SMALL: usize = 80;

/// `perl -e PERL userfaultfd mmap pwrite FILE LENGTH`: the parent writes; its child has the descriptor of the missing memory.
const PERL: &str = r#"
my ($uffd, $mmap, $pwrite, $file, $length) = @ARGV;
my $room = ($length + 65535) & ~65535;
my $fd = syscall($uffd + 0, 02000000);
open(my $faults, '+<&=', $fd) or die "userfaultfd: $!";
my $api = pack('QQQ', 0xaa, 0, 0);
ioctl($faults, 0xc018aa3f, $api) or die "UFFDIO_API: $!";
my $at = syscall($mmap + 0, 0, $room, 3, 0x22, -1, 0);
my $range = pack('QQQQ', $at, $room, 1, 0);
ioctl($faults, 0xc020aa00, $range) or die "UFFDIO_REGISTER: $!";
if (fork == 0) {
    sysread($faults, my $event, 32) == 32 or die "no fault: $!";
    $| = 1;
    print "held\n";
    <STDIN>;
    my $from = unpack('Q', pack('p', my $bytes = 'N' x (2 * $room)));
    # Whole pages, from the next one on.
    $from = ($from + 65535) & ~65535;
    my $copy = pack('QQQQq', $at, $from, $room, 0, 0);
    ioctl($faults, 0xc028aa03, $copy) or die "UFFDIO_COPY: $!";
    exit 0;
}
open(my $to, '+<', $file) or die "$file: $!";
syscall($pwrite + 0, fileno($to), $at, $length + 0, 0) == $length or die "pwrite: $!";
wait;
exit($? ? 1 : 0);
"#;

/// A write of `length` bytes to `path` that has begun.
fn held_write(path: &Path, length: u64) -> Child {
    let numbers = if cfg!(target_arch = "x86_64") { ["323", "9", "18"] } else { ["282", "222", "68"] };
    let mut perl = Command::new("perl");
    perl.args(["-e", PERL]).args(numbers).arg(path).arg(length.to_string());
    let spawned = perl.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn();
    let mut writer = spawned.expect("this test needs perl (package perl-base)");
    let mut said = String::new();
    BufReader::new(writer.stdout.take().expect("piped")).read_line(&mut said).expect("it says something");
    assert_eq!(said, "held\n", "this test needs userfaultfd for root");
    writer
}

fn let_go(mut writer: Child) {
    writer.stdin.take().expect("piped").write_all(b"\n").expect("it listens");
    assert!(writer.wait().expect("it ends").success());
}

#[test]
fn privileged_a_write_under_way_is_waited_for_or_shows_as_a_change() {
    for fs in BOTH {
        for (name, clones) in [("small", 1), ("large", 1), ("small", 2)] {
            let rig = rig(fs);
            let store = open(&rig);
            let names: Vec<String> = (0..SMALL).map(|n| format!("s{n:03}")).collect();
            let (small, large) = (vec![b'o'; 1000], pages(9, 1));
            let mut files: Vec<(&str, &[u8])> =
                names.iter().map(|name| (name.as_str(), &b"few"[..])).collect();
            files.extend([("small", &small[..]), ("large", &large[..])]);
            let root = make_root(&rig, "root", &files);
            seal_all(&store, std::slice::from_ref(&root));
            let clones: Vec<_> = (0..clones)
                .map(|number| {
                    let clone = make_root(&rig, &format!("clone{number}"), &[]);
                    files.iter().for_each(|(name, _)| reflink(&root.join(name), &clone.join(name)));
                    clone
                })
                .collect();
            rustix::fs::sync();
            let path = clones[0].join(name);
            let writer = held_write(&path, path.metadata().expect("there").size());
            // One thread, so that the many small files come first.
            let config = SealConfig { threads: 1, ..SealConfig::new(clones.clone()) };
            std::thread::scope(|scope| {
                let sealing = scope.spawn(|| seal_with(&store, &config));
                // Long enough to be at the file, whether it waits there or not; too short only hides a mistake.
                std::thread::sleep(Duration::from_millis(700));
                let_go(writer);
                assert!(sealing.join().expect("no panic").is_complete());
            });
            rustix::fs::sync();
            let (_, tree) = tree_of(&store, &clones[0]);
            let entry = (0..tree.entries.len() as u32).find(|e| path_in(&tree, &clones[0], *e) == path);
            let sealed = tree.inode(EntryId(entry.expect("sealed"))).raw.ctime;
            let now = path.metadata().expect("there");
            if sealed == (now.ctime(), now.ctime_nsec() as u32) {
                assert_sealed(&store, &clones[0]);
            }
        }
    }
}
