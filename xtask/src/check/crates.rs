//! Which crate may depend on which: the arrows of `ARCHITECTURE.md`, asked from cargo.

use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail};
use serde_json::Value;

use super::Violation;

/// A crate of ours, and those of ours that its library or binary may depend on.
struct Rule {
    name: &'static str,
    may: &'static [&'static str],
    /// Further ones for its tests.
    tests_may: &'static [&'static str],
}

const fn rule(name: &'static str, may: &'static [&'static str], tests_may: &'static [&'static str]) -> Rule {
    Rule { name, may, tests_may }
}

const ENGINE: &str = "pagefold-engine";
const SYS: &str = "pagefold-sys";
const FSADAPTERS: &str = "pagefold-fsadapters";
const ANON: &str = "pagefold-anon";
const TESTFS: &str = "pagefold-testfs";

/// A crate that is not listed here is a violation: a new one must take its place in the order.
const RULES: [Rule; 8] = [
    // Not even its tests: testfs depends on the engine, and would be built against another copy of it.
    rule(ENGINE, &[], &[]),
    rule(SYS, &[], &[]),
    rule(FSADAPTERS, &[ENGINE, SYS], &[]),
    rule(ANON, &[ENGINE, SYS], &[]),
    rule(TESTFS, &[ENGINE, SYS, FSADAPTERS, ANON], &[]),
    rule("pagefold", &[ENGINE, FSADAPTERS, ANON, TESTFS], &[SYS]),
    rule("pagefold-benches", &[ENGINE, SYS, FSADAPTERS, ANON, TESTFS], &[]),
    rule("xtask", &[TESTFS], &[]),
];

/// One dependency of a crate of ours on another.
pub(super) struct Arrow {
    pub manifest: PathBuf,
    pub from: String,
    pub to: String,
    /// Only for tests, benches and examples.
    pub dev: bool,
}

/// The crates of the workspace with their manifests, and the arrows between them.
pub(super) struct Graph {
    pub crates: Vec<(String, PathBuf)>,
    pub arrows: Vec<Arrow>,
}

/// Asks cargo.
pub(super) fn graph(root: &Path) -> anyhow::Result<Graph> {
    let output = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
        .args(["metadata", "--no-deps", "--format-version", "1"])
        .current_dir(root)
        .output()
        .context("run cargo metadata")?;
    if !output.status.success() {
        bail!("cargo metadata: {}", String::from_utf8_lossy(&output.stderr));
    }
    let metadata: Value = serde_json::from_slice(&output.stdout).context("cargo metadata")?;
    let mut graph = Graph { crates: Vec::new(), arrows: Vec::new() };
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let name = package["name"].as_str().context("a package has a name")?.to_owned();
        let manifest = Path::new(package["manifest_path"].as_str().context("a package has a manifest")?);
        let manifest = manifest.strip_prefix(root).unwrap_or(manifest).to_owned();
        for dependency in package["dependencies"].as_array().into_iter().flatten() {
            // By path: that is what makes it one of ours, whatever it is renamed to.
            if dependency["path"].is_string() {
                graph.arrows.push(Arrow {
                    manifest: manifest.clone(),
                    from: name.clone(),
                    to: dependency["name"].as_str().unwrap_or_default().to_owned(),
                    dev: dependency["kind"] == "dev",
                });
            }
        }
        graph.crates.push((name, manifest));
    }
    Ok(graph)
}

/// Every arrow that no rule allows, every crate without a rule.
pub(super) fn check(graph: &Graph) -> Vec<Violation> {
    let rule_of = |name: &str| RULES.iter().find(|r| r.name == name);
    let unknown = graph.crates.iter().filter(|(name, _)| rule_of(name).is_none()).map(|(name, manifest)| {
        Violation::new(manifest, 0, format!("crate {name} has no place among the layers (xtask/src/check)"))
    });
    let forbidden = graph.arrows.iter().filter(|arrow| {
        rule_of(&arrow.from).is_some_and(|rule| {
            let to = arrow.to.as_str();
            !(rule.may.contains(&to) || arrow.dev && rule.tests_may.contains(&to))
        })
    });
    let forbidden = forbidden.map(|arrow| {
        Violation::new(&arrow.manifest, 0, format!("{} must not depend on {}", arrow.from, arrow.to))
    });
    unknown.chain(forbidden).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn broken(from: &str, to: &str, dev: bool) -> usize {
        let arrow = Arrow { manifest: "Cargo.toml".into(), from: from.into(), to: to.into(), dev };
        check(&Graph { crates: Vec::new(), arrows: vec![arrow] }).len()
    }

    #[test]
    fn forbidden_arrows_are_found_and_allowed_ones_are_not() {
        assert_eq!(broken(ENGINE, SYS, false), 1);
        assert_eq!(broken(ENGINE, TESTFS, true), 1);
        assert_eq!(broken(FSADAPTERS, ANON, false), 1);
        assert_eq!(broken(ANON, FSADAPTERS, false), 1);
        assert_eq!(broken(FSADAPTERS, TESTFS, true), 1);
        assert_eq!(broken("pagefold", SYS, false), 1);
        assert_eq!(broken("pagefold", SYS, true), 0);
        assert_eq!(broken(FSADAPTERS, ENGINE, false), 0);
    }

    #[test]
    fn a_crate_without_a_place_is_found() {
        let graph = Graph { crates: vec![("pagefold-new".into(), "new/Cargo.toml".into())], arrows: vec![] };
        assert_eq!(check(&graph).len(), 1);
    }
}
