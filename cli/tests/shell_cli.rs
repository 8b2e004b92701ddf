//! Completions and man pages tell of the commands there are.

use std::process::{Command, Output};

fn pagefold(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pagefold")).args(args).output().expect("pagefold starts")
}

/// The commands, as the help lists them.
fn commands() -> Vec<String> {
    let help = String::from_utf8(pagefold(&["--help"]).stdout).expect("text");
    let list =
        help.split("Commands:\n").nth(1).expect("there are commands").split("\n\n").next().expect("a list");
    list.lines()
        .filter(|l| l.starts_with("  ") && !l.starts_with("   "))
        .filter_map(|l| l.split_whitespace().next())
        .filter(|name| *name != "help")
        .map(str::to_owned)
        .collect()
}

#[test]
fn completions_know_every_command() {
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let output = pagefold(&["completions", shell]);
        assert!(output.status.success(), "{shell}");
        let text = String::from_utf8(output.stdout).expect("text");
        for command in commands() {
            assert!(text.contains(&command), "{shell} does not know {command}");
        }
    }
    let checked =
        Command::new("bash").arg("-n").arg("/dev/stdin").stdin(std::process::Stdio::piped()).spawn();
    let mut checked = checked.expect("bash starts");
    let script = pagefold(&["completions", "bash"]).stdout;
    std::io::Write::write_all(&mut checked.stdin.take().expect("piped"), &script).expect("bash reads");
    assert!(checked.wait().expect("bash ends").success(), "bash can't read its completions");
}

#[test]
fn every_command_has_a_man_page() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let output = pagefold(&["man", dir.path().to_str().expect("text")]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let commands = commands();
    assert!(commands.len() > 4, "{commands:?}");
    for command in commands {
        let page = dir.path().join(format!("pagefold-{command}.1"));
        let text = std::fs::read_to_string(&page).unwrap_or_else(|e| panic!("{}: {e}", page.display()));
        assert!(text.contains(".TH") && text.contains(&command), "{command}");
    }
    let whole = pagefold(&["man"]);
    assert!(whole.status.success() && whole.stdout.windows(3).any(|w| w == b".TH"));
}
