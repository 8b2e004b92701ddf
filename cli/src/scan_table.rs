//! The scan report as a table for people.

use comfy_table::presets::UTF8_FULL_CONDENSED;
use comfy_table::{CellAlignment, Table};
use pagefold_fsadapters::scan::{ScanReport, Sizes};

use crate::human::{self, bytes, count, percent, seconds};

/// Notes of one kind shown before "and N more".
const NOTES_SHOWN: usize = 10;

/// The whole report.
pub fn render(report: &ScanReport) -> String {
    let mut out = String::new();
    let mut push = |part: String| {
        if !part.is_empty() {
            out.push_str(&part);
            out.push('\n');
        }
    };
    push(headline(report));
    push(roots_table(report));
    push(top_files(report));
    push(top_directories(report));
    push(matrix(report));
    let skipped: Vec<_> = report.skipped.iter().map(|s| (human::path(&s.path), s.reason.as_str())).collect();
    push(notes("Skipped", &skipped));
    let errors: Vec<_> = report.errors.iter().map(|e| (human::path(&e.path), e.error.as_str())).collect();
    push(notes("Errors (not in the figures)", &errors));
    push(footnotes(report));
    out
}

fn headline(report: &ScanReport) -> String {
    let t = &report.totals;
    let mut out = String::new();
    if report.partial {
        out.push_str("PARTIAL: the scan was interrupted; the figures cover only what was reached.\n\n");
    }
    let how = if report.content { "extents and content" } else { "extents only, no data read" };
    out.push_str(&format!(
        "{} files in {} roots, scanned in {} ({how})\n\n",
        count(t.files),
        report.roots.len(),
        seconds(report.elapsed_s),
    ));
    let line = |label: &str, n: u64, note: String| format!("  {label:<34}{:>11}   {note}\n", bytes(n));
    out.push_str(&line("page cache if everything is read", t.cache_bytes, String::new()));
    out.push_str(&line(
        "  could go by merging equal files",
        t.mergeable_file_bytes,
        percent(t.mergeable_file_bytes, t.cache_bytes),
    ));
    out.push_str(&line(
        "  could go by merging equal pages",
        t.mergeable_page_bytes,
        percent(t.mergeable_page_bytes, t.cache_bytes),
    ));
    if t.undecided_bytes > 0 {
        let hint = if report.content { "" } else { ", --content reads it" };
        let note = format!("{}{hint}", percent(t.undecided_bytes, t.cache_bytes));
        out.push_str(&line("  not decided by extents", t.undecided_bytes, note));
    }
    out.push_str(&line("in page cache now", t.resident_bytes, String::new()));
    out.push_str(&line(
        "  of it duplicates",
        t.resident_duplicate_bytes,
        percent(t.resident_duplicate_bytes, t.resident_bytes),
    ));
    out
}

fn table(header: &[&str], rows: Vec<Vec<String>>, left: usize) -> String {
    let mut table = Table::new();
    table.load_style(UTF8_FULL_CONDENSED).set_header(header.to_vec());
    table.add_rows(rows);
    for (at, column) in table.column_iter_mut().enumerate() {
        column.set_cell_alignment(if at < left { CellAlignment::Left } else { CellAlignment::Right });
    }
    format!("{table}\n")
}

fn roots_table(report: &ScanReport) -> String {
    let several = report.domains.len() > 1;
    let row = |name: String, domain: &str, s: &Sizes, shared: Option<u64>| {
        let mut cells = vec![name];
        if several {
            cells.push(domain.to_owned());
        }
        cells.extend([
            count(s.files),
            bytes(s.logical_bytes),
            bytes(s.cache_bytes),
            bytes(s.mergeable_file_bytes),
            bytes(s.mergeable_page_bytes),
            shared.map_or_else(String::new, bytes),
            bytes(s.resident_bytes),
            bytes(s.resident_duplicate_bytes),
        ]);
        cells
    };
    let mut rows: Vec<_> = report
        .roots
        .iter()
        .map(|r| row(human::path(&r.path), &r.domain, &r.sizes, Some(r.shared_with_others_bytes)))
        .collect();
    rows.push(row("total".to_owned(), "", &report.totals, None));
    let mut header = vec!["root"];
    if several {
        header.push("domain");
    }
    header.extend([
        "files",
        "bytes",
        "page cache if read",
        "mergeable: files",
        "mergeable: pages",
        "shared with others",
        "cached now",
        "duplicates cached",
    ]);
    table(&header, rows, 1 + usize::from(several))
}

fn top_files(report: &ScanReport) -> String {
    if report.top_files.is_empty() {
        return String::new();
    }
    let row = |f: &pagefold_fsadapters::scan::TopFile| {
        vec![
            human::path(&f.path),
            count(f.copies),
            bytes(f.cache_bytes_each),
            bytes(f.cache_bytes_each * (f.copies - 1)),
            bytes(f.resident_duplicate_bytes),
        ]
    };
    let rows = report.top_files.iter().map(row).collect();
    table(&["top files", "copies", "page cache each", "mergeable", "duplicates cached"], rows, 1)
}

fn top_directories(report: &ScanReport) -> String {
    if report.top_directories.is_empty() {
        return String::new();
    }
    let row = |d: &pagefold_fsadapters::scan::TopDirectory| {
        vec![human::path(&d.path), bytes(d.mergeable_file_bytes)]
    };
    let rows = report.top_directories.iter().map(row).collect();
    table(&["top directories (below the roots)", "mergeable: files"], rows, 1)
}

fn matrix(report: &ScanReport) -> String {
    let Some(matrix) = &report.matrix else { return String::new() };
    let mut header = vec!["in common".to_owned()];
    header.extend((0..matrix.len()).map(|at| format!("#{at}")));
    let rows = matrix.iter().enumerate().map(|(at, row)| {
        let mut cells = vec![format!("#{at} {}", human::path(&report.roots[at].path))];
        cells.extend(row.iter().map(|n| bytes(*n)));
        cells
    });
    let header: Vec<&str> = header.iter().map(String::as_str).collect();
    table(&header, rows.collect(), 1)
}

fn notes(title: &str, notes: &[(String, &str)]) -> String {
    if notes.is_empty() {
        return String::new();
    }
    let mut out = format!("{title}:\n");
    for (path, text) in notes.iter().take(NOTES_SHOWN) {
        out.push_str(&format!("  {path}: {text}\n"));
    }
    if notes.len() > NOTES_SHOWN {
        out.push_str(&format!("  ... and {} more (all with --format json)\n", notes.len() - NOTES_SHOWN));
    }
    out
}

fn footnotes(report: &ScanReport) -> String {
    let mut out = String::new();
    if report.resident_unknown_files > 0 {
        out.push_str(&format!(
            "The cache state of {} files may only be read by their owner or root: they count as not cached and undecided.\n",
            count(report.resident_unknown_files)
        ));
    }
    out.push_str("\"mergeable\" is what could be saved, measured by extents or content; nothing was saved or changed.\n");
    out
}
