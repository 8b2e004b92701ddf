//! `cargo xtask check`: the architecture invariants of `ARCHITECTURE.md`, looked for in the tree as it is.
//!
//! Invariant: reads only, and names every violation with its file before it fails, so that one run shows all of them.
//! What it deliberately does not do: what rustc, clippy or rustfmt already do. These are rules about what must be
//! *absent*, which a compiler of single crates does not see.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context, bail};

mod crates;
mod documents;
mod source;

/// One rule broken in one place.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Violation {
    /// Below the root of the repository.
    pub file: PathBuf,
    /// From 1; 0 for the file as a whole.
    pub line: usize,
    /// What is wrong, and the rule.
    pub what: String,
}

impl Violation {
    fn new(file: &Path, line: usize, what: impl Into<String>) -> Violation {
        Violation { file: file.to_owned(), line, what: what.into() }
    }
}

/// A text file of the repository.
pub(crate) struct TextFile {
    /// Below the root of the repository.
    pub path: PathBuf,
    /// All of it.
    pub text: String,
}

/// [`run`] for a `main`: an error is printed and 2.
pub(crate) fn exit() -> ExitCode {
    run().unwrap_or_else(|error| {
        eprintln!("xtask check: {error:#}");
        ExitCode::from(2)
    })
}

/// Runs all checks over the repository that cargo was started in and prints what they find.
///
/// # Errors
/// The tree or cargo's metadata can't be read; nothing was found to check.
fn run() -> anyhow::Result<ExitCode> {
    let root = repository()?;
    let mut files = Vec::new();
    collect(&root, Path::new(""), &mut files)?;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let sources = files.iter().filter(|f| has_extension(&f.path, "rs")).count();
    if sources == 0 {
        bail!("no source file below {}: a check of nothing proves nothing", root.display());
    }
    let mut found = crates::check(&crates::graph(&root)?);
    for file in &files {
        found.extend(source::check(file));
    }
    found.extend(documents::check(&files));
    found.sort();
    for violation in &found {
        println!("{}:{}: {}", violation.file.display(), violation.line, violation.what);
    }
    if found.is_empty() {
        println!("xtask check: {sources} source files and {} others keep the rules", files.len() - sources);
        return Ok(ExitCode::SUCCESS);
    }
    println!("xtask check: {} violations (the rules are in ARCHITECTURE.md)", found.len());
    Ok(ExitCode::FAILURE)
}

/// The root of the workspace, as cargo says.
fn repository() -> anyhow::Result<PathBuf> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["locate-project", "--workspace", "--message-format", "plain"])
        .output()
        .context("run cargo locate-project")?;
    let manifest = String::from_utf8(output.stdout).context("path of the workspace")?;
    let manifest = Path::new(manifest.trim_end());
    Ok(manifest.parent().context("cargo found no workspace; start this inside the repository")?.to_owned())
}

/// Text files below `dir`: what is built, hidden or not text is left out.
fn collect(root: &Path, below: &Path, files: &mut Vec<TextFile>) -> anyhow::Result<()> {
    let dir = root.join(below);
    for entry in std::fs::read_dir(&dir).with_context(|| format!("list {}", dir.display()))? {
        let entry = entry?;
        let name = entry.file_name();
        let path = below.join(&name);
        let hidden = name.as_encoded_bytes().starts_with(b".");
        let built = below.as_os_str().is_empty() && name == "target" || path == Path::new("docs/book");
        if hidden || built {
            continue;
        }
        let kind = entry.file_type()?;
        if kind.is_dir() {
            collect(root, &path, files)?;
        } else if kind.is_file() && (has_extension(&path, "rs") || has_extension(&path, "md")) {
            let text =
                std::fs::read_to_string(entry.path()).with_context(|| format!("read {}", path.display()))?;
            files.push(TextFile { path, text });
        }
    }
    Ok(())
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e == extension)
}
