//! Rules about single source files: what a file must open with, how long it may be, which words it may not hold.
//!
//! Comments are cut off before words are looked for, text in quotes is emptied. That is no parser: a block comment or a
//! raw string with a forbidden word in it would be reported, which has to be worded differently then.

use std::path::Path;

use super::{TextFile, Violation, has_extension};

/// Lines of a file, past which there is no reason good enough.
const FILE_LINES_MAX: usize = 600;
/// Lines of a function.
const FUNCTION_LINES_MAX: usize = 70;

/// What the engine may not use: it is handed everything it knows (no I/O, clock, thread, environment, entropy).
const NOT_IN_ENGINE: [&str; 10] = [
    "std::fs",
    "std::io",
    "std::net",
    "std::time",
    "std::process",
    "std::env",
    "thread::spawn",
    "thread_local!",
    "println!",
    "RandomState",
];

/// What would make a simulated run more than its seed.
const NOT_IN_SIMULATION: [&str; 4] = ["std::time", "thread::spawn", "std::env", "RandomState"];

/// The ground truth may not ask what it judges.
const NOT_IN_TRUTH: [&str; 3] = ["pagefold_engine", "fiemap", "scan::"];

/// Unfinished or left over.
const NOWHERE: [&str; 4] =
    [concat!("todo", "!("), concat!("unimplemented", "!("), concat!("dbg", "!("), "#[ignore"];

/// All violations in `file`; none when it is no source file.
pub(super) fn check(file: &TextFile) -> Vec<Violation> {
    if !has_extension(&file.path, "rs") {
        return Vec::new();
    }
    let mut found = shape(file);
    found.extend(long_functions(file));
    for (at, line) in file.text.lines().enumerate() {
        let code = code_of(line);
        for what in words(&file.path, &code) {
            found.push(Violation::new(&file.path, at + 1, what));
        }
    }
    found
}

fn shape(file: &TextFile) -> Vec<Violation> {
    let mut found = Vec::new();
    if !file.text.starts_with("//!") {
        found.push(Violation::new(
            &file.path,
            1,
            "a source file opens with //!: purpose, invariant, what it does not do",
        ));
    }
    let lines = file.text.lines().count();
    if lines > FILE_LINES_MAX {
        found.push(Violation::new(&file.path, 0, format!("{lines} lines; at most {FILE_LINES_MAX}")));
    }
    let above = file.path.parent().map(Path::to_path_buf).unwrap_or_default();
    let crate_root =
        file.path.ends_with("src/lib.rs") || file.path.ends_with("src/main.rs") || above.ends_with("src/bin");
    if crate_root && !file.path.starts_with("sys") && !file.text.contains("#![forbid(unsafe_code)]") {
        found.push(Violation::new(
            &file.path,
            0,
            "only sys may hold unsafe code: #![forbid(unsafe_code)] is missing",
        ));
    }
    found
}

/// What is wrong with one line of code in the file at `path`.
fn words(path: &Path, code: &str) -> Vec<String> {
    let mut found = Vec::new();
    if !path.starts_with("sys") && has_word(code, "unsafe") {
        found.push("unsafe outside sys".to_owned());
    }
    let mut absent = |here: bool, list: &[&str], why: &str| {
        let used = list.iter().filter(|w| here && code.contains(**w));
        found.extend(used.map(|w| format!("{w} {why}")));
    };
    let simulation =
        ["sim", "model", "check", "run"].iter().any(|d| path.starts_with(Path::new("testfs/src").join(d)));
    let truth = path.starts_with("testfs/src/truth") || path == Path::new("testfs/src/truth.rs");
    absent(
        path.starts_with("engine/src"),
        &NOT_IN_ENGINE,
        "in the engine, which does no I/O and has no clock",
    );
    absent(simulation, &NOT_IN_SIMULATION, "in the simulation, where a run is its seed");
    absent(truth, &NOT_IN_TRUTH, "in the ground truth, which is independent of what it judges");
    found.extend(NOWHERE.iter().filter(|w| code.contains(**w)).map(|w| format!("{w} left in the tree")));
    let fixture_command = ["cmd_farm.rs", "cmd_farm_bench.rs", "cmd_demo.rs"]
        .iter()
        .any(|f| path == Path::new("cli/src").join(f));
    let product = path.starts_with("cli/src") && !fixture_command;
    if product && code.contains("pagefold_testfs") {
        found.push("testfs outside tests, benches and the farm and demo commands".to_owned());
    }
    found
}

/// Functions longer than allowed, found by indentation: rustfmt puts the closing brace under the first word.
fn long_functions(file: &TextFile) -> Vec<Violation> {
    let lines: Vec<&str> = file.text.lines().collect();
    let mut found = Vec::new();
    for (at, line) in lines.iter().enumerate() {
        let indent = line.len() - line.trim_start().len();
        if !is_function(&code_of(line)) {
            continue;
        }
        let closing = format!("{}}}", &line[..indent]);
        let length = lines[at..].iter().position(|l| *l == closing).map_or(0, |n| n + 1);
        // A declaration in a trait has no body: its semicolon comes before any brace.
        let declared = lines[at..].iter().position(|l| l.trim_end().ends_with(';')).unwrap_or(usize::MAX);
        let opened = lines[at..].iter().position(|l| l.trim_end().ends_with('{')).unwrap_or(usize::MAX);
        if opened < declared && length > FUNCTION_LINES_MAX {
            let what = format!("a function of {length} lines; at most {FUNCTION_LINES_MAX}");
            found.push(Violation::new(&file.path, at + 1, what));
        }
    }
    found
}

fn is_function(code: &str) -> bool {
    let mut words = code.split_whitespace().map(|w| w.split('(').next().unwrap_or(w));
    words.find(|w| !matches!(*w, "pub" | "const" | "async" | "unsafe" | "extern" | "crate)" | "super)"))
        == Some("fn")
}

/// `line` without its comment and with quoted text emptied.
fn code_of(line: &str) -> String {
    let mut code = String::with_capacity(line.len());
    let mut chars = line.chars().peekable();
    let mut quoted = false;
    while let Some(c) = chars.next() {
        match c {
            '\\' if quoted => drop(chars.next()),
            '"' => {
                quoted = !quoted;
                code.push(c);
            }
            // '"' as a character would turn the rest of the line inside out.
            '\'' if !quoted && chars.peek() == Some(&'"') => drop(chars.next()),
            '/' if !quoted && chars.peek() == Some(&'/') => break,
            _ if quoted => {}
            _ => code.push(c),
        }
    }
    code
}

fn has_word(code: &str, word: &str) -> bool {
    let part = |c: char| c.is_alphanumeric() || c == '_';
    code.match_indices(word)
        .any(|(at, _)| !code[..at].ends_with(part) && !code[at + word.len()..].starts_with(part))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(path: &str, text: &str) -> Vec<String> {
        let file = TextFile { path: path.into(), text: text.to_owned() };
        check(&file).into_iter().map(|v| v.what).collect()
    }

    #[test]
    fn each_rule_sees_its_violation() {
        let cases = [
            ("engine/src/a.rs", "fn a() {}\n", "opens with //!"),
            ("engine/src/lib.rs", "//! a\n", "forbid(unsafe_code)"),
            ("cli/src/a.rs", "//! a\nfn a() { unsafe { b() } }\n", "unsafe outside sys"),
            ("engine/src/a.rs", "//! a\nuse std::time::Instant;\n", "in the engine"),
            ("testfs/src/sim/a.rs", "//! a\nuse std::time::Instant;\n", "a run is its seed"),
            ("testfs/src/truth.rs", "//! a\nuse pagefold_engine::layout;\n", "ground truth"),
            ("cli/src/scan_args.rs", "//! a\nuse pagefold_testfs::rig;\n", "testfs outside"),
            ("sys/src/a.rs", concat!("//! a\nfn a() { todo", "!() }\n"), "left in the tree"),
            ("sys/tests/a.rs", "//! a\n#[ignore]\n", "left in the tree"),
        ];
        for (path, text, wanted) in cases {
            let found = found(path, text);
            assert!(found.len() == 1 && found[0].contains(wanted), "{path}: {found:?}, wanted {wanted}");
        }
    }

    #[test]
    fn what_is_allowed_is_not_reported() {
        for (path, text) in [
            ("sys/src/a.rs", "//! a\nfn a() { unsafe { b() } }\n"),
            ("cli/src/a.rs", "//! a unsafe\n// unsafe\nfn a() -> &'static str { \"unsafe // todo\" }\n"),
            ("cli/src/cmd_farm.rs", "//! a\nuse pagefold_testfs::rig;\n"),
            ("engine/tests/a.rs", "//! a\nuse std::time::Instant;\n"),
            ("docs/a.md", "unsafe\n"),
        ] {
            assert_eq!(found(path, text), Vec::<String>::new(), "{path}");
        }
    }

    #[test]
    fn lengths_are_counted() {
        let body = "    b();\n".repeat(69);
        let long = format!("//! a\npub(crate) fn a(\n    x: u8,\n) {{\n{body}}}\n");
        assert!(found("sys/src/a.rs", &long)[0].contains("a function of 73 lines"));
        let body = "    b();\n".repeat(68);
        assert!(found("sys/src/a.rs", &format!("//! a\nfn a() {{\n{body}}}\n")).is_empty());
        assert!(found("sys/src/a.rs", &format!("//! a\n{}", "// b\n".repeat(600)))[0].contains("601 lines"));
        assert!(
            found(
                "sys/src/a.rs",
                &format!("//! a\ntrait T {{\n    fn a();\n{}    fn b() {{\n    }}\n}}\n", "\n".repeat(90))
            )
            .is_empty()
        );
    }
}
