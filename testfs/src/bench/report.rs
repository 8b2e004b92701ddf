//! The figures of a run, as they are written: `pagefold.farm-bench/1`. Bytes, milliseconds, microseconds.
//!
//! Invariant: every figure was measured in this run.

use serde::Serialize;

use super::container::Program;
use pagefold_fsadapters::memcg::Version;

/// The schema's name.
pub const SCHEMA: &str = "pagefold.farm-bench/1";

/// From what containers are started.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Arm {
    /// Reflinked roots as they are.
    #[default]
    Raw,
    /// Sealed views of them.
    View,
    /// One overlay each, all with one shared lower: as good as it can be, for who can keep one image.
    Overlay,
}

impl Arm {
    /// Its name in tables.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Arm::Raw => "raw roots",
            Arm::View => "sealed views",
            Arm::Overlay => "one overlay lower",
        }
    }
}

/// Everything a run found.
#[derive(Clone, Debug, Serialize)]
pub struct BenchReport {
    /// [`SCHEMA`].
    pub schema: &'static str,
    /// Kernel release.
    pub kernel: String,
    /// Processors.
    pub cpus: usize,
    /// File system the roots are on.
    pub file_system: String,
    /// Which memory groups counted.
    pub memory_groups: Version,
    /// Containers of each arm.
    pub containers: u32,
    /// What they run, in turn.
    pub programs: [Program; 4],
    /// Percent of each root's files that were changed.
    pub drift_percent: f64,
    /// Regular files of a root.
    pub root_files: u64,
    /// Sum of their sizes.
    pub root_bytes: u64,
    /// Sealing all roots and mounting all views; absent without that arm.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub views: Option<ViewCosts>,
    /// One an arm.
    pub arms: Vec<ArmReport>,
    /// Reading everything; empty unless asked for.
    pub walks: Vec<WalkReport>,
    /// Wall clock of the whole run.
    pub elapsed_s: f64,
}

/// What it costs to have views.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct ViewCosts {
    /// Roots sealed.
    pub roots: u32,
    /// Sealing all of them, in one call.
    pub seal_ms: f64,
    /// Mounting all of them.
    pub mount_ms: f64,
    /// Disk that the store takes (what the file system's free space fell by).
    pub store_disk_bytes: u64,
}

/// One arm. Zeros where no containers ran.
#[derive(Clone, Debug, Default, Serialize)]
pub struct ArmReport {
    /// Which.
    pub arm: Arm,
    /// While all containers ran, after a start from an empty cache.
    pub memory: Figures,
    /// From an empty cache, one container after the other, until its program answered.
    pub cold_start: Times,
    /// The same again with what was then in the cache: each container's best of three.
    pub warm_start: Times,
    /// open(2) and close(2) of a cached file in one root: median of the rounds' means, microseconds.
    pub open_close_us: f64,
}

/// Memory of all containers of an arm together, bytes.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Figures {
    /// Page cache that their memory groups are charged for, without tmpfs.
    pub page_cache_bytes: u64,
    /// `Pss_File` of `smaps_rollup`, summed over the processes.
    pub pss_file_bytes: u64,
    /// Anonymous memory that their groups are charged for.
    pub anon_bytes: u64,
    /// Kernel memory that their groups are charged for.
    pub kernel_bytes: u64,
    /// By how much the whole host's slab grew meanwhile.
    pub slab_delta_bytes: i64,
}

/// Times of all containers of an arm, milliseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Times {
    /// The first container.
    pub first_ms: f64,
    /// Mean: containers run different programs, so a median would be one program's.
    pub mean_ms: f64,
    /// The slowest.
    pub max_ms: f64,
    /// All of them.
    pub total_ms: f64,
}

/// Reading every file of every root once, from an empty cache.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct WalkReport {
    /// Which arm.
    pub arm: Arm,
    /// Roots read. Fewer than asked for where memory could not have held them.
    pub roots: u32,
    /// Bytes read from all of them.
    pub read_bytes: u64,
    /// Page cache if equal files of these roots had one copy, from the manifest of how they were made.
    pub ideal_cache_bytes: u64,
    /// Page cache charged after the first root.
    pub one_root_cache_bytes: u64,
    /// Page cache charged after all of them.
    pub cache_bytes: u64,
    /// Kernel memory charged after the first root.
    pub one_root_kernel_bytes: u64,
    /// Kernel memory charged after all of them.
    pub kernel_bytes: u64,
}
