//! `pagefold scan`: arguments as typed, and the configuration they resolve to.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use clap::{ArgAction, Args};
use globset::{GlobBuilder, GlobSet, GlobSetBuilder};
use pagefold_fsadapters::scan::{DOMAINS_MAX, RootSpec, ScanConfig};
use pagefold_fsadapters::source::ReadOptions;

use crate::format::Format;

/// Requests in flight per reader thread.
const QUEUE_DEPTH: u32 = 32;
/// The most threads worth starting.
const THREADS_MAX: usize = 1024;
/// Name of the domain of roots that were given none.
const DEFAULT_DOMAIN: &str = "default";

/// Arguments of `pagefold scan`.
#[derive(Debug, Args)]
#[command(
    // Not `long_about`: the doc comment of the subcommand would silently replace it.
    after_long_help = "By default only extent maps and cache state are read: no data, a few microseconds a file. Nothing is modified.\n\n\
        Exit status: 0 done; 1 partial (interrupted, or the report lists errors); 2 wrong usage or no root could be \
        scanned; 3 this host can't."
)]
pub struct ScanArgs {
    /// Directory trees, typically container roots. An inode found twice is counted once.
    #[arg(value_name = "ROOT", required_unless_present = "domain")]
    roots: Vec<PathBuf>,
    /// Also read and hash what extents can't decide, and find equal files and pages that are not reflinked.
    #[arg(long)]
    content: bool,
    /// How to write the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,
    /// Threads for walking and reading [default: the number of processors this process may use].
    #[arg(long, value_name = "N", value_parser = parse_threads)]
    threads: Option<usize>,
    /// Leave out what matches, a directory with all below it. Without a slash the pattern is matched with names, with
    /// one with the path below the root (`*` stops at slashes, `**` does not). May be given several times.
    #[arg(long, value_name = "GLOB")]
    exclude: Vec<String>,
    /// Stay on the file system of each root (btrfs subvolumes are on it). This is the default.
    #[arg(long, overrides_with = "no_one_file_system", action = ArgAction::SetTrue)]
    one_file_system: bool,
    /// Also enter other file systems mounted below a root.
    #[arg(long, overrides_with = "one_file_system", action = ArgAction::SetTrue)]
    no_one_file_system: bool,
    /// Roots of different domains never share. NAME sets the domain of all roots that are given none; NAME=ROOT that
    /// of one root, and adds it if it is not among the ROOTs. May be given several times.
    #[arg(long, value_name = "NAME[=ROOT]")]
    domain: Vec<OsString>,
    /// How many top files and directories to list.
    #[arg(long, value_name = "N", default_value_t = 10)]
    top: usize,
    /// Also tell for each pair of roots how many page bytes they have in common.
    #[arg(long)]
    matrix: bool,
}

fn parse_threads(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(n @ 1..=THREADS_MAX) => Ok(n),
        _ => Err(format!("a whole number from 1 to {THREADS_MAX}")),
    }
}

impl ScanArgs {
    /// What to do, with every default filled in.
    pub fn resolve(&self) -> anyhow::Result<ScanConfig> {
        let threads =
            self.threads.unwrap_or_else(|| std::thread::available_parallelism().map_or(1, usize::from));
        Ok(ScanConfig {
            roots: resolve_roots(&self.roots, &self.domain)?,
            content: self.content,
            threads,
            read: ReadOptions { threads, queue_depth: QUEUE_DEPTH },
            exclude: resolve_excludes(&self.exclude)?,
            one_file_system: !self.no_one_file_system,
            top: self.top,
            matrix: self.matrix,
            top_directories: self.format == Format::Table,
        })
    }
}

fn resolve_roots(roots: &[PathBuf], domains: &[OsString]) -> anyhow::Result<Vec<RootSpec>> {
    let mut default = DEFAULT_DOMAIN.to_owned();
    let mut of_root: Vec<(String, PathBuf)> = Vec::new();
    for given in domains {
        let (name, root) = split_domain(given);
        let name = name.to_str().filter(|n| !n.is_empty());
        let Some(name) = name else {
            bail!("--domain {}: a domain needs a name, as NAME or NAME=ROOT", given.display());
        };
        match root {
            None => default = name.to_owned(),
            Some(root) if root.as_os_str().is_empty() => {
                bail!("--domain {}: no root after the '='", given.display());
            }
            Some(root) => {
                if let Some((other, _)) = of_root.iter().find(|(n, r)| n != name && same_path(r, &root)) {
                    bail!("--domain: {} can't be in both {other} and {name}", root.display());
                }
                of_root.push((name.to_owned(), root));
            }
        }
    }
    let mut specs: Vec<RootSpec> =
        roots.iter().map(|path| RootSpec { path: path.clone(), domain: default.clone() }).collect();
    for (name, root) in of_root {
        let mut found = false;
        for spec in specs.iter_mut().filter(|s| same_path(&s.path, &root)) {
            spec.domain.clone_from(&name);
            found = true;
        }
        if !found {
            specs.push(RootSpec { path: root, domain: name });
        }
    }
    let names: BTreeSet<&str> = specs.iter().map(|s| s.domain.as_str()).collect();
    if names.len() > DOMAINS_MAX {
        bail!("{} domains: at most {DOMAINS_MAX} in one scan", names.len());
    }
    if specs.is_empty() {
        bail!("no root to scan: name at least one directory");
    }
    Ok(specs)
}

fn split_domain(given: &OsStr) -> (&OsStr, Option<PathBuf>) {
    let bytes = given.as_bytes();
    match bytes.iter().position(|b| *b == b'=') {
        None => (given, None),
        Some(at) => {
            (OsStr::from_bytes(&bytes[..at]), Some(OsString::from_vec(bytes[at + 1..].to_vec()).into()))
        }
    }
}

/// `a/b`, `a/b/` and `a/./b` are one path; links are not resolved (the scan sees by inode that roots are one).
fn same_path(a: &Path, b: &Path) -> bool {
    a.components().eq(b.components())
}

fn resolve_excludes(globs: &[String]) -> anyhow::Result<Option<GlobSet>> {
    if globs.is_empty() {
        return Ok(None);
    }
    let mut set = GlobSetBuilder::new();
    for glob in globs {
        let trimmed = glob.trim_end_matches('/');
        if trimmed.is_empty() {
            // An unset variable in a script would leave out everything.
            bail!("--exclude '{glob}': an empty pattern");
        }
        let pattern = match trimmed.strip_prefix('/') {
            Some(below_root) => below_root.to_owned(),
            None if trimmed.contains('/') => trimmed.to_owned(),
            None => format!("**/{trimmed}"),
        };
        let built = GlobBuilder::new(&pattern).literal_separator(true).build();
        set.add(built.with_context(|| format!("--exclude {glob}: not a glob pattern"))?);
    }
    Ok(Some(set.build().context("--exclude")?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn specs(roots: &[&str], domains: &[&str]) -> Vec<(String, String)> {
        let roots: Vec<PathBuf> = roots.iter().map(PathBuf::from).collect();
        let domains: Vec<OsString> = domains.iter().map(OsString::from).collect();
        let specs = resolve_roots(&roots, &domains).expect("resolves");
        specs.into_iter().map(|s| (s.path.display().to_string(), s.domain)).collect()
    }

    #[test]
    fn domains_by_name_and_by_root() {
        let both = specs(&["/a", "/b"], &["x", "y=/b/", "z=/c"]);
        let want = [("/a", "x"), ("/b", "y"), ("/c", "z")];
        assert_eq!(both, want.map(|(p, d)| (p.to_owned(), d.to_owned())));
        assert_eq!(specs(&["/a"], &[])[0].1, "default");
    }

    #[test]
    fn a_domain_needs_a_name_and_a_scan_a_root() {
        assert!(resolve_roots(&[], &["=x".into()]).is_err());
        assert!(resolve_roots(&["/a".into()], &["n=".into()]).is_err());
        assert!(resolve_roots(&[], &["n".into()]).is_err());
    }

    #[test]
    fn excludes_match_names_or_paths() {
        let set =
            resolve_excludes(&["*.pyc".into(), "var/cache".into(), "/tmp".into(), "lost+found/".into()])
                .expect("globs")
                .expect("some");
        for hit in ["a.pyc", "usr/lib/b.pyc", "var/cache", "tmp", "x/lost+found"] {
            assert!(set.is_match(hit), "{hit}");
        }
        for miss in ["a.py", "usr/var/cache", "x/tmp", "var/cachex"] {
            assert!(!set.is_match(miss), "{miss}");
        }
        assert!(resolve_excludes(&["a[".into()]).is_err());
    }
}
