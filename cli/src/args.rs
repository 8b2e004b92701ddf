//! Arguments as typed. What they mean is resolved elsewhere (`*_args`).

use clap::{Parser, Subcommand};

use crate::cmd_commit::CommitArgs;
use crate::cmd_demo::DemoArgs;
use crate::cmd_doctor::DoctorArgs;
use crate::cmd_explain::ExplainArgs;
use crate::cmd_export::ExportArgs;
use crate::cmd_farm::FarmArgs;
use crate::cmd_gc::GcArgs;
use crate::cmd_mount::{MountArgs, UmountArgs};
use crate::cmd_prefault::PrefaultArgs;
use crate::cmd_seal::SealArgs;
use crate::cmd_shell::{CompletionsArgs, ManArgs};
use crate::cmd_status::StatusArgs;
use crate::cmd_unseal::{UninstallArgs, UnsealArgs};
use crate::cmd_verify::VerifyArgs;
use crate::scan_args::ScanArgs;

/// Find page-cache pages that are the same and make them one again.
#[derive(Debug, Parser)]
#[command(name = "pagefold", version, propagate_version = true, arg_required_else_help = true)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Tell how much page cache directory trees waste on equal pages, and what merging would give back.
    Scan(ScanArgs),
    /// Make sharing possible: anchors and an image for each container root.
    Seal(SealArgs),
    /// Remove from a store what no root and no view needs.
    Gc(GcArgs),
    /// Compare a store with its index, and cached pages of anchors with the disk.
    Verify(VerifyArgs),
    /// Mount views of sealed roots: equal files of all views are in the page cache once.
    Mount(MountArgs),
    /// Unmount views; what was written in them is kept, committed or discarded.
    Umount(UmountArgs),
    /// Bring what views wrote back into their raw roots.
    Commit(CommitArgs),
    /// Make a directory (or btrfs subvolume) of what a view shows now.
    Export(ExportArgs),
    /// Undo sealing: the raw roots stay, nothing else.
    Unseal(UnsealArgs),
    /// Tell whether anything on this host still depends on pagefold.
    Uninstall(UninstallArgs),
    /// Make, remove and measure container farms: roots from one image with known differences.
    Farm(FarmArgs),
    /// Tell what is sealed, what that can save, what is shared and what is saved now.
    Status(StatusArgs),
    /// Read shared files beforehand, charged to pagefold's own memory group and to no container.
    Prefault(PrefaultArgs),
    /// Tell why a file is or isn't shared, with whom, and what a write will do.
    Explain(ExplainArgs),
    /// Tell what this kernel, user and file system can do.
    Doctor(DoctorArgs),
    /// Make a small farm on a file system of its own, scan it, print the report, remove everything again.
    Demo(DemoArgs),
    /// Write the shell's completions for this command to standard output.
    Completions(CompletionsArgs),
    /// Write man pages.
    Man(ManArgs),
}
