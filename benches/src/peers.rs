//! Programs that others made, found on `PATH`; none is a dependency of the build.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

/// A peer and how to get it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Peer {
    /// Flexible I/O tester.
    Fio,
    /// Duplicate file finder.
    Fclones,
    /// Duplicate extent finder.
    Duperemove,
}

impl Peer {
    /// The program's name.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Peer::Fio => "fio",
            Peer::Fclones => "fclones",
            Peer::Duperemove => "duperemove",
        }
    }

    /// How to install it.
    #[must_use]
    pub const fn advice(self) -> &'static str {
        match self {
            Peer::Fio => "apt-get install fio",
            Peer::Fclones => "cargo install fclones",
            Peer::Duperemove => "apt-get install duperemove",
        }
    }

    /// Where it is.
    #[must_use]
    pub fn find(self) -> Option<PathBuf> {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|dir| dir.join(self.name())).find(|p| p.is_file())
    }

    /// Arguments to look for duplicates in `tree`, only reporting.
    #[must_use]
    pub fn search_args(self, tree: &Path, threads: usize) -> Vec<OsString> {
        let args: Vec<String> = match self {
            // Every file counts, as it does for us, and no state is kept from run to run.
            Peer::Fclones => vec!["group".into(), "--min".into(), "1".into(), format!("--threads={threads}")],
            Peer::Duperemove => {
                vec![
                    "-r".into(),
                    "-q".into(),
                    format!("--io-threads={threads}"),
                    format!("--cpu-threads={threads}"),
                ]
            }
            Peer::Fio => vec![],
        };
        args.into_iter().map(OsString::from).chain([tree.into()]).collect()
    }
}
