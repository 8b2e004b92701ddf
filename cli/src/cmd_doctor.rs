//! `pagefold doctor`: what this host, this user and the file systems named can do.
//!
//! What it deliberately does not hold: how anything is tried (see `pagefold_fsadapters::doctor`).

use std::path::PathBuf;

use anyhow::Context;
use clap::Args;
use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{ContentArrangement, Table};
use pagefold_fsadapters::doctor::{Check, Report, State, examine};

use crate::exit::Exit;
use crate::format::Format;
use crate::human;

/// Arguments of `pagefold doctor`.
#[derive(Debug, Args)]
#[command(
    // Not `long_about`: the doc comment of the subcommand would silently replace it.
    after_long_help = "Everything is tried, not read off a version number; nothing is left behind.\n\n\
        Exit status: 0 `pagefold scan` can do its main job at every PATH; 2 wrong usage; 3 it can't."
)]
pub struct DoctorArgs {
    /// Directories whose file systems to try.
    #[arg(value_name = "PATH", default_value = ".")]
    paths: Vec<PathBuf>,
    /// How to write the report.
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

/// Runs `pagefold doctor`.
pub fn run(args: &DoctorArgs) -> anyhow::Result<Exit> {
    // A path that is not there says nothing of the host.
    for path in &args.paths {
        std::fs::metadata(path).with_context(|| format!("doctor: {}", human::path(path)))?;
    }
    let report = examine(&args.paths);
    args.format.write(|| &report, || render(&report))?;
    Ok(if report.can_scan { Exit::Done } else { Exit::Refused })
}

fn render(report: &Report) -> String {
    let mut out = format!("Linux {}, user id {}\n{}\n", report.kernel, report.uid, table(&report.host));
    for path in &report.paths {
        let kind = if path.file_system.is_empty() { "not readable" } else { &path.file_system };
        out.push_str(&format!("\n{} ({kind})\n{}\n", human::path(&path.path), table(&path.checks)));
    }
    out.push_str(&missing(report));
    out.push_str(if report.can_scan {
        "\npagefold scan can run here.\n"
    } else {
        "\npagefold scan can't do its main job here.\n"
    });
    out
}

/// What pagefold does without what is not there; each capability once, though several paths lack it.
fn missing(report: &Report) -> String {
    let all = report.host.iter().chain(report.paths.iter().flat_map(|p| &p.checks));
    let mut told = std::collections::BTreeSet::new();
    let lines: Vec<String> = all
        .filter(|c| c.state != State::Yes)
        .map(|c| c.capability)
        .filter(|c| told.insert(c.name))
        .map(|c| format!("  {}: {}\n", c.name, c.without))
        .collect();
    if lines.is_empty() { String::new() } else { format!("\nWithout what is missing:\n{}", lines.concat()) }
}

fn table(checks: &[Check]) -> Table {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_content_arrangement(ContentArrangement::Dynamic);
    table.set_header(["capability", "", "since", "needed for", "seen"]);
    for check in checks {
        let c = check.capability;
        table.add_row([c.name, check.state.word(), c.since, c.needed_for, &check.detail]);
    }
    table
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_capability_is_explained_once_in_the_table_and_named_in_the_json() {
        let report = examine(&["/proc", "/proc"]);
        let text = render(&report);
        assert!(text.contains("can't do its main job"), "{text}");
        assert_eq!(text.matches("physical-identity: ").count(), 1, "{text}");
        let json = serde_json::to_value(&report).unwrap();
        assert_eq!(json["schema"], "pagefold.doctor/1");
        assert_eq!(json["can_scan"], false);
        assert_eq!(json["paths"][0]["path"], "/proc");
        let check = &json["paths"][0]["checks"][1];
        assert_eq!(
            (check["name"].as_str(), check["state"].as_str()),
            (Some("physical-identity"), Some("no"))
        );
        assert!(
            check["since"].is_string() && check["needed_for"].is_string() && check["without"].is_string()
        );
    }
}
