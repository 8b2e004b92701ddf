//! Rules about documents: links lead somewhere, and a promise that names its test names one that exists.
//!
//! A test is cited as `` `path/to/file.rs::name` ``. What is not checked: whether the test proves the promise.

use std::path::{Component, Path, PathBuf};

use super::{TextFile, Violation, has_extension};

/// Documents in which every promise must name a test: at least one citation, or the check has lost its grip.
const PROMISES: [&str; 1] = ["docs/src/semantics.md"];

/// All violations in the documents among `files`.
pub(super) fn check(files: &[TextFile]) -> Vec<Violation> {
    let mut found = Vec::new();
    for file in files.iter().filter(|f| has_extension(&f.path, "md")) {
        for (at, line) in file.text.lines().enumerate() {
            let line_number = at + 1;
            for target in links(line).filter(|t| !leads_somewhere(files, &file.path, t)) {
                found.push(Violation::new(
                    &file.path,
                    line_number,
                    format!("a link to {target}, which is not there"),
                ));
            }
            for (path, name) in cited_tests(line).filter(|(path, name)| !has_test(files, path, name)) {
                let what = format!("cites the test {name} in {path}, where there is none");
                found.push(Violation::new(&file.path, line_number, what));
            }
        }
    }
    for promise in PROMISES {
        let cites = files
            .iter()
            .filter(|f| f.path == Path::new(promise))
            .any(|f| f.text.lines().any(|l| cited_tests(l).next().is_some()));
        if !cites {
            found.push(Violation::new(Path::new(promise), 0, "promises without a single test"));
        }
    }
    found
}

/// Targets of `[text](target)` that lie in the repository, without the part after `#`.
fn links(line: &str) -> impl Iterator<Item = &str> {
    line.split("](").skip(1).filter_map(|rest| {
        let target = rest.split(')').next()?.split('#').next()?;
        (!target.is_empty() && !target.contains("://")).then_some(target)
    })
}

fn leads_somewhere(files: &[TextFile], from: &Path, target: &str) -> bool {
    let path = normal(&from.parent().unwrap_or(Path::new("")).join(target));
    let known = |f: &TextFile| f.path == path || f.path.starts_with(&path);
    // Licences, scripts and the like are not read; cargo runs xtask in the workspace.
    files.iter().any(known) || path.exists()
}

/// `a/b/../c` as `a/c`, without asking the disk.
fn normal(path: &Path) -> PathBuf {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::ParentDir => drop(out.pop()),
            Component::CurDir => {}
            part => out.push(part),
        }
    }
    out
}

/// (file, test) for each `` `file.rs::test` `` in `line`.
fn cited_tests(line: &str) -> impl Iterator<Item = (&str, &str)> {
    line.split('`').skip(1).step_by(2).filter_map(|code| {
        let (path, name) = code.split_once(".rs::")?;
        Some((code.get(..path.len() + 3)?, name))
    })
}

fn has_test(files: &[TextFile], path: &str, name: &str) -> bool {
    // A conformance case is generic over the rig.
    let wanted = [format!("fn {name}("), format!("fn {name}<")];
    files.iter().any(|f| f.path == Path::new(path) && wanted.iter().any(|w| f.text.contains(w)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(path: &str, text: &str) -> TextFile {
        TextFile { path: path.into(), text: text.to_owned() }
    }

    fn found(text: &str) -> Vec<String> {
        let files = [
            file("docs/src/semantics.md", text),
            file("docs/src/other.md", "text"),
            file("engine/tests/a.rs", "#[test]\nfn proves_it() {}\n"),
        ];
        check(&files).into_iter().map(|v| v.what).collect()
    }

    #[test]
    fn good_links_and_citations_pass() {
        let text = "[a](other.md#x) [b](../../engine/tests/a.rs) [c](https://example.org/x) [d](#here)\n\
                    `engine/tests/a.rs::proves_it` and `a::b`\n";
        assert_eq!(found(text), Vec::<String>::new());
    }

    #[test]
    fn dead_links_and_missing_tests_are_found() {
        assert!(found("[a](gone.md) `engine/tests/a.rs::proves_it`")[0].contains("gone.md"));
        assert!(
            found("`engine/tests/a.rs::proves_it` `engine/tests/a.rs::proves`")[0]
                .contains("the test proves in")
        );
        assert!(found("no test at all")[0].contains("without a single test"));
    }
}
