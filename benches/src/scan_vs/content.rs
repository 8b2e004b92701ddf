//! With content, on a cold tree: against fio, BLAKE3, and programs that look for duplicates.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::Context;
use pagefold_fsadapters::os::Os;
use pagefold_fsadapters::scan::{Phase, Progress, RootSpec, ScanConfig, scan};
use pagefold_fsadapters::source::ReadOptions;
use pagefold_testfs::farm::SyntheticSpec;
use pagefold_testfs::rig::LoopRig;

use super::extents::Farm;
use super::report::{Content, PeerRuns, Report};
use super::{Bench, Fs, TreeKind, say};
use crate::fio::FioJob;
use crate::peers::Peer;
use crate::stats::Series;
use crate::tree::{self, Shape, TreeFile};
use crate::{cached, hashing};

/// As the command line of pagefold.
const QUEUE_DEPTH: u32 = 32;
/// For the tree of few large files.
const LARGE_FILES: u64 = 8;
/// Roots of the tree of reflinked roots.
const FARM_ROOTS: u32 = 8;
/// Before each measurement.
const REST: Duration = Duration::from_millis(500);
const HASHING: Duration = Duration::from_secs(1);

pub(super) fn measure(bench: &Bench<'_>, fs: Fs, report: &mut Report) -> anyhow::Result<()> {
    let args = bench.args;
    let large = Shape::Large { files: LARGE_FILES, bytes: (args.large_mib << 20) / LARGE_FILES };
    for kind in &args.tree {
        match kind {
            TreeKind::Realistic => {
                let mut tree = Tree::write(bench, fs, Shape::Realistic { files: u64::from(args.files) })?;
                one_tree(bench, fs, "realistic", &mut tree, true, report)?;
            }
            TreeKind::Large => {
                let mut tree = Tree::write(bench, fs, large)?;
                one_tree(bench, fs, "few large", &mut tree, true, report)?;
            }
            TreeKind::Roots => {
                let image = SyntheticSpec { files: args.files / 4, max_bytes: 4 << 20 };
                let mut tree = Tree::of_farm(Farm::of(bench, fs, image, FARM_ROOTS, 5.0)?);
                // No fio: it would read every root, where each distinct page needs reading once.
                one_tree(bench, fs, "reflinked roots", &mut tree, false, report)?;
            }
        }
    }
    Ok(())
}

/// A tree and how to make it cold.
struct Tree {
    root: PathBuf,
    roots: Vec<PathBuf>,
    place: Place,
}

enum Place {
    Rig(LoopRig),
    Farm(Farm),
    /// The user's directory: the tree is removed.
    Dir(PathBuf),
}

impl Tree {
    fn write(bench: &Bench<'_>, fs: Fs, shape: Shape) -> anyhow::Result<Tree> {
        say(format!("{}: writing {shape:?}", fs.name()));
        let (root, place) = match &bench.args.dir {
            Some(dir) => {
                let root = dir.join(format!("scan-vs-tree-{}", std::process::id()));
                (root.clone(), Place::Dir(root))
            }
            None => {
                let rig = LoopRig::with_size(fs.rig(), 16 << 30)?;
                (rig.path().join("tree"), Place::Rig(rig))
            }
        };
        let tree = Tree { roots: vec![root.clone()], root, place };
        tree::write(&tree.root, shape, 1, bench.runner.cancel())?;
        Ok(tree)
    }

    fn of_farm(farm: Farm) -> Tree {
        let root = farm.roots[0].parent().map_or_else(PathBuf::new, Path::to_owned);
        Tree { root, roots: farm.roots.clone(), place: Place::Farm(farm) }
    }

    /// Nothing of it in any cache of this kernel.
    fn cool(&mut self) -> anyhow::Result<()> {
        match &mut self.place {
            Place::Rig(rig) | Place::Farm(Farm { rig: Some(rig), .. }) => remount(rig),
            _ => {
                rustix::fs::sync();
                std::fs::write("/proc/sys/vm/drop_caches", "3").context("drop caches (as root)")
            }
        }
    }
}

/// A ring of io_uring lets go of its files some time after its process has ended: until then the mount is busy.
fn remount(rig: &mut LoopRig) -> anyhow::Result<()> {
    const PATIENCE: Duration = Duration::from_secs(10);
    let start = Instant::now();
    while let Err(error) = rig.remount() {
        if start.elapsed() > PATIENCE {
            return Err(error.into());
        }
        std::thread::sleep(Duration::from_millis(20));
    }
    Ok(())
}

impl Drop for Tree {
    fn drop(&mut self) {
        if let Place::Dir(root) = &self.place {
            let _ = std::fs::remove_dir_all(root);
        }
    }
}

fn nothing_measured(fs: Fs, tree: &'static str, files: &[TreeFile]) -> Content {
    Content {
        fs: fs.name(),
        tree,
        files: files.len() as u64,
        bytes: files.iter().map(|f| f.size).sum(),
        bytes_read: 0,
        scans: vec![],
        walk_s: Series::default(),
        reading_s: Series::default(),
        cached_growth_bytes: Series::default(),
        cached_of_tree_bytes: Series::default(),
        fio: vec![],
        blake3_bytes_per_s: Series::default(),
        peers: vec![],
    }
}

fn one_tree(
    bench: &Bench<'_>,
    fs: Fs,
    name: &'static str,
    tree: &mut Tree,
    with_fio: bool,
    report: &mut Report,
) -> anyhow::Result<()> {
    let (threads, runner) = (bench.args.threads, bench.runner);
    let mut files: Vec<TreeFile> = Vec::new();
    for root in &tree.roots {
        files.extend(tree::in_physical_order(root)?);
    }
    let mut row = nothing_measured(fs, name, &files);
    let mut find = |peer: Peer| {
        let found = peer.find();
        if found.is_none() {
            let note = format!("{}: not found; get it with `{}`", peer.name(), peer.advice());
            if !report.missing.contains(&note) {
                report.missing.push(note);
            }
        }
        found
    };
    let fio = match find(Peer::Fio).filter(|_| with_fio) {
        Some(program) => Some(FioJob::prepare(&program, runner.scratch(), &files, threads, QUEUE_DEPTH)?),
        None => None,
    };
    let mut peers = Vec::new();
    for peer in [Peer::Fclones, Peer::Duperemove] {
        if let Some(program) = find(peer) {
            let args = peer.search_args(&tree.root, threads);
            row.peers.push(PeerRuns {
                name: peer.name(),
                args: args.iter().map(|a| a.to_string_lossy().into_owned()).collect(),
                runs: vec![],
            });
            peers.push((program, args));
        }
    }
    for run in 0..bench.args.runs {
        say(format!("{}: content, {name}, run {} of {}", fs.name(), run + 1, bench.args.runs));
        row.blake3_bytes_per_s.push(hashing::page_hash_rate(threads, HASHING));
        // Each in turn is first: disks of virtual machines are fast until their credit is used up.
        let contestants = 3 + peers.len();
        for turn in 0..contestants {
            let who = (turn + run as usize) % contestants;
            if who == 1 && fio.is_none() {
                continue;
            }
            std::thread::sleep(REST);
            tree.cool()?;
            match (who, &fio) {
                (0, _) => row.scans.push(bench.pagefold.scan(runner, &tree.roots, threads, true)?.cost),
                (1, Some(fio)) => row.fio.push(fio.run(runner)?),
                (1 | 2, _) => phases(bench, tree, &files, &mut row)?,
                (peer, _) => {
                    let (program, args) = &peers[peer - 3];
                    row.peers[peer - 3].runs.push(runner.run(program, args, &[0])?.cost);
                }
            }
        }
    }
    report.content.push(row);
    Ok(())
}

/// A scan in this process, whose phases can be told apart, and what it leaves in the cache.
fn phases(bench: &Bench<'_>, tree: &Tree, files: &[TreeFile], row: &mut Content) -> anyhow::Result<()> {
    let config = ScanConfig {
        roots: tree.roots.iter().map(|r| RootSpec { path: r.clone(), domain: "default".into() }).collect(),
        content: true,
        threads: bench.args.threads,
        read: ReadOptions { threads: bench.args.threads, queue_depth: QUEUE_DEPTH },
        exclude: None,
        one_file_system: true,
        top: 10,
        matrix: false,
        top_directories: false,
    };
    let progress = Progress::default();
    let over = AtomicBool::new(false);
    let start = Instant::now();
    let (scanned, (reading, cached_before), (figures, cached_after)) = std::thread::scope(|scope| {
        let watch = scope.spawn(|| {
            let wait_for_end_of = |phase: Phase| {
                while progress.phase() == phase && !over.load(Ordering::Relaxed) {
                    if bench.runner.cancel().load(Ordering::Relaxed) {
                        progress.cancel();
                    }
                    std::thread::sleep(Duration::from_micros(500));
                }
                (start.elapsed().as_secs_f64(), cached::meminfo_kib("Cached").unwrap_or(0))
            };
            (wait_for_end_of(Phase::Walk), wait_for_end_of(Phase::Content))
        });
        let scanned = scan(&Os::new(), &config, &progress);
        over.store(true, Ordering::Relaxed);
        let (walk, content) = watch.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
        (scanned, walk, content)
    });
    bench.runner.check()?;
    anyhow::ensure!(scanned.errors.is_empty(), "the scan has errors");
    row.bytes_read = progress.pages().0 * rustix::param::page_size() as u64;
    row.walk_s.push(reading);
    row.reading_s.push(figures - reading);
    row.cached_growth_bytes.push((cached_after as f64 - cached_before as f64) * 1024.0);
    let in_cache = cached::of_files(files.iter().map(|f| f.path.as_path()))?;
    row.cached_of_tree_bytes.push(in_cache as f64);
    Ok(())
}
