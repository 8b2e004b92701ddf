//! What was measured: raw for the file, condensed for the table.

use comfy_table::{Table, presets};
use serde::Serialize;

use crate::fio::FioRun;
use crate::machine::Provenance;
use crate::measured::Measured;
use crate::stats::Series;

/// Everything of one run.
#[derive(Debug, Serialize)]
pub struct Report {
    schema: &'static str,
    provenance: Provenance,
    threads: usize,
    /// Extents only, warm.
    pub extents: Vec<Extents>,
    /// By number of roots.
    pub linear: Vec<Linear>,
    /// With content, cold.
    pub content: Vec<Content>,
    /// Peers that were not found, and how to get them.
    pub missing: Vec<String>,
}

/// All roots, extents only, warm, alternating with the bare calls.
#[derive(Debug, Serialize)]
pub struct Extents {
    /// File system.
    pub fs: &'static str,
    /// Roots.
    pub roots: u32,
    /// Inodes.
    pub files: u64,
    /// Runs of the program.
    pub scans: Vec<Measured>,
    /// Names that the bare calls go through.
    pub bare_names: u64,
    /// open+FIEMAP+close.
    pub bare_s: Series,
    /// Its processor time.
    pub bare_cpu_s: Series,
}

impl Extents {
    fn rate(&self) -> f64 {
        self.files as f64 / self.scans.iter().map(|m| m.wall_s).collect::<Series>().median()
    }

    fn bare_rate(&self) -> f64 {
        self.bare_names as f64 / self.bare_s.median()
    }

    fn bytes_per_file(&self) -> f64 {
        self.scans.iter().map(|m| m.maxrss_bytes as f64).collect::<Series>().median() / self.files as f64
    }
}

/// One number of roots.
#[derive(Debug, Serialize)]
pub struct Linear {
    /// File system.
    pub fs: &'static str,
    /// Roots.
    pub roots: u32,
    /// Inodes.
    pub files: u64,
    /// Start to end of the program.
    pub wall_s: Series,
    /// By the program's own clock.
    pub elapsed_s: Series,
    /// Processor time.
    pub cpu_s: Series,
}

impl Linear {
    fn us_per_file(&self, series: &Series) -> f64 {
        series.median() * 1e6 / self.files as f64
    }
}

/// One tree, cold.
#[derive(Debug, Serialize)]
pub struct Content {
    /// File system.
    pub fs: &'static str,
    /// Which tree.
    pub tree: &'static str,
    /// Files in it.
    pub files: u64,
    /// Bytes in them.
    pub bytes: u64,
    /// Bytes that a scan reads: each distinct page once.
    pub bytes_read: u64,
    /// Runs of the program.
    pub scans: Vec<Measured>,
    /// Of the scan in this process: walk, extent maps.
    pub walk_s: Series,
    /// Of the same: reading and hashing.
    pub reading_s: Series,
    /// Growth of `Cached` in `/proc/meminfo` from before to after the reading, in bytes.
    pub cached_growth_bytes: Series,
    /// Bytes of the tree's own files in cache after it.
    pub cached_of_tree_bytes: Series,
    /// The same files.
    pub fio: Vec<FioRun>,
    /// BLAKE3 alone, bytes a second.
    pub blake3_bytes_per_s: Series,
    /// Other programs on the same tree.
    pub peers: Vec<PeerRuns>,
}

/// A peer's runs.
#[derive(Debug, Serialize)]
pub struct PeerRuns {
    /// Its name.
    pub name: &'static str,
    /// Its arguments.
    pub args: Vec<String>,
    /// Its runs.
    pub runs: Vec<Measured>,
}

fn wall(runs: &[Measured]) -> Series {
    runs.iter().map(|m| m.wall_s).collect()
}

impl Report {
    /// An empty one.
    #[must_use]
    pub fn new(provenance: Provenance, threads: usize) -> Report {
        Report {
            schema: "pagefold.bench.scan_vs/1",
            provenance,
            threads,
            extents: vec![],
            linear: vec![],
            content: vec![],
            missing: vec![],
        }
    }

    /// For people. Every row: what, figure, target where there is one, whether it is met, spread of the runs.
    #[must_use]
    pub fn table(&self) -> String {
        let p = &self.provenance;
        let mut table = Table::new();
        table.load_style(presets::UTF8_FULL_CONDENSED);
        table.set_header(["what", "figure", "target", "", "runs", "spread"]);
        self.extents.iter().for_each(|e| e.rows(&mut table));
        self.linear_rows(&mut table);
        self.content.iter().for_each(|c| c.rows(&mut table));
        let mut text = format!(
            "\n{} x {}, {} GiB, Linux {}, load {:.2}, commit {}, {} threads\n{table}\n",
            p.cpus,
            p.cpu,
            p.memory_bytes >> 30,
            p.kernel,
            p.load_1m,
            p.commit.as_deref().unwrap_or("unknown"),
            self.threads,
        );
        for missing in &self.missing {
            text += &format!("not measured: {missing}\n");
        }
        text
    }

    /// Per file system: the time per file at each number of roots against that of all roots.
    fn linear_rows(&self, table: &mut Table) {
        let mut all: Option<&Linear> = None;
        for row in self.linear.iter().rev() {
            let whole = *all.get_or_insert(row);
            let whole = if whole.fs == row.fs { whole } else { row };
            all = Some(whole);
            let (own, wall) = (row.us_per_file(&row.elapsed_s), row.us_per_file(&row.wall_s));
            let off = (own / whole.us_per_file(&whole.elapsed_s) - 1.0) * 100.0;
            add(
                table,
                &format!("{} linear: {} roots", row.fs, row.roots),
                format!(
                    "{own:.2} us/file ({off:+.1} %); start to end {wall:.2}; processor time {:.2}",
                    row.us_per_file(&row.cpu_s)
                ),
                Some(("within 15 %".into(), off.abs() <= 15.0)),
                &row.elapsed_s,
            );
        }
    }
}

fn add(table: &mut Table, what: &str, figure: String, target: Option<(String, bool)>, runs: &Series) {
    let (target, met) = match target {
        Some((text, met)) => (text, if met { "met" } else { "MISSED" }),
        None => (String::new(), ""),
    };
    let spread = format!("{:.0} %", runs.spread_percent());
    table.add_row([what.to_owned(), figure, target, met.to_owned(), runs.len().to_string(), spread]);
}

impl Extents {
    fn rows(&self, table: &mut Table) {
        let what = format!("{} extents, {} roots, {} files", self.fs, self.roots, self.files);
        let target = if self.fs == "btrfs" { 100_000.0 } else { 150_000.0 };
        let walls = wall(&self.scans);
        let (rate, bare) = (self.rate(), self.bare_rate());
        add(
            table,
            &format!("{what}: pagefold scan"),
            format!("{rate:.0} files/s"),
            Some((format!(">= {target:.0}"), rate >= target)),
            &walls,
        );
        add(table, "  open+FIEMAP+close", format!("{bare:.0} files/s"), None, &self.bare_s);
        add(table, "  pagefold's rate by the bare calls' rate", format!("{:.2}", rate / bare), None, &walls);
        let cpu: Series = self.scans.iter().map(|m| m.user_s + m.system_s).collect();
        let per_file = cpu.median() * 1e6 / self.files as f64;
        let floor = self.bare_cpu_s.median() * 1e6 / self.bare_names as f64;
        // Less disturbed by what else runs than the rates are.
        let text =
            format!("{per_file:.2} us/file; the bare calls' {floor:.2}; ratio {:.2}", floor / per_file);
        add(table, "  processor time", text, None, &cpu);
        let memory = self.bytes_per_file();
        let rss: Series = self.scans.iter().map(|m| m.maxrss_bytes as f64).collect();
        add(
            table,
            "  peak memory",
            format!("{memory:.0} bytes/file"),
            Some(("<= 300".into(), memory <= 300.0)),
            &rss,
        );
    }
}

impl Content {
    fn rows(&self, table: &mut Table) {
        let mb = |bytes: f64| format!("{:.0} MB/s", bytes / 1e6);
        let what = format!(
            "{} content, {}: {} files, {} MB",
            self.fs,
            self.tree,
            self.files,
            self.bytes / 1_000_000
        );
        let walls = wall(&self.scans);
        let read = self.bytes_read as f64;
        let (whole, reading) = (read / walls.median(), read / self.reading_s.median());
        add(
            table,
            &format!("{what}: pagefold scan"),
            format!("{:.3} s, {}", walls.median(), mb(whole)),
            None,
            &walls,
        );
        let blake3 = self.blake3_bytes_per_s.median();
        let mut goal = blake3;
        if !self.fio.is_empty() {
            let series = |f: fn(&FioRun) -> f64| self.fio.iter().map(f).collect::<Series>();
            let own = series(|f| f.counted_bytes as f64 / f.reading_s);
            let wall = series(|f| f.wall_s);
            goal = goal.min(own.median());
            add(table, "  fio, its own clock", mb(own.median()), None, &own);
            add(table, "  fio, start to end", mb(self.bytes as f64 / wall.median()), None, &wall);
        }
        add(table, "  BLAKE3 of pages, no reading", mb(blake3), None, &self.blake3_bytes_per_s);
        let ratio = reading / goal;
        let target = (!self.fio.is_empty()).then(|| (">= 0.90 of fio or BLAKE3".into(), ratio >= 0.9));
        add(
            table,
            "  pagefold's reading alone",
            format!("{}, {ratio:.2} of the lower", mb(reading)),
            target,
            &self.reading_s,
        );
        add(table, "  pagefold's walk alone", format!("{:.3} s", self.walk_s.median()), None, &self.walk_s);
        for peer in &self.peers {
            let theirs = wall(&peer.runs);
            let times = theirs.median() / walls.median();
            add(
                table,
                &format!("  {}", peer.name),
                format!("{:.3} s, {times:.2} times ours", theirs.median()),
                Some(("> 1".into(), times > 1.0)),
                &theirs,
            );
        }
        for (what, series) in [
            ("  growth of Cached", &self.cached_growth_bytes),
            ("  the tree in cache after", &self.cached_of_tree_bytes),
        ] {
            let percent = series.median() / read * 100.0;
            let target = Some(("< 2 % of what was read".into(), percent < 2.0));
            add(table, what, format!("{percent:.2} %"), target, series);
        }
    }
}
