//! Figures, targets, table.

use std::fmt::Write;

use comfy_table::Table;
use serde::Serialize;

use crate::machine::Provenance;

/// One figure beside its target.
#[derive(Debug, Serialize)]
pub struct Row {
    /// File system.
    pub fs: &'static str,
    /// What was measured.
    pub what: String,
    /// The figure.
    pub value: f64,
    /// `s`, `MiB`, `x` (a ratio), `us`, `ms`.
    pub unit: &'static str,
    /// At most (or, with `at_least`, at least) this; `None`: for comparison only.
    pub target: Option<f64>,
    /// Whether more is better.
    pub at_least: bool,
    /// The single measurements behind it, or what it was made from.
    pub raw: Vec<f64>,
}

/// All of them.
#[derive(Debug, Serialize)]
pub struct Report {
    schema: &'static str,
    provenance: Provenance,
    rows: Vec<Row>,
}

impl Report {
    /// Nothing measured yet.
    pub fn new(provenance: Provenance) -> Report {
        Report { schema: "pagefold.view-costs/1", provenance, rows: Vec::new() }
    }

    /// Adds a figure that must be at most `target`.
    pub fn at_most(
        &mut self,
        fs: &'static str,
        what: &str,
        value: (f64, &'static str),
        target: f64,
        raw: Vec<f64>,
    ) {
        self.push(fs, what, value, Some((target, false)), raw);
    }

    /// Adds a figure that must be at least `target`.
    pub fn at_least(
        &mut self,
        fs: &'static str,
        what: &str,
        value: (f64, &'static str),
        target: f64,
        raw: Vec<f64>,
    ) {
        self.push(fs, what, value, Some((target, true)), raw);
    }

    /// Adds a figure for comparison.
    pub fn note(&mut self, fs: &'static str, what: &str, value: (f64, &'static str), raw: Vec<f64>) {
        self.push(fs, what, value, None, raw);
    }

    /// `target`: and whether it is the least that will do.
    fn push(
        &mut self,
        fs: &'static str,
        what: &str,
        (value, unit): (f64, &'static str),
        target: Option<(f64, bool)>,
        raw: Vec<f64>,
    ) {
        super::say(format_args!("{fs} {what}: {value:.4} {unit}"));
        let at_least = target.is_some_and(|(_, least)| least);
        let target = target.map(|(target, _)| target);
        self.rows.push(Row { fs, what: what.into(), value, unit, target, at_least, raw });
    }

    /// For people.
    pub fn table(&self) -> String {
        let mut table = Table::new();
        table.set_header(["fs", "what", "measured", "target", ""]);
        for row in &self.rows {
            let target = row.target.map_or(String::new(), |t| {
                format!("{} {t} {}", if row.at_least { "at least" } else { "at most" }, row.unit)
            });
            let met = row.target.map_or("", |t| {
                if (row.value <= t) != row.at_least || row.value == t { "met" } else { "MISSED" }
            });
            let mut value = String::new();
            let _ = write!(value, "{:.3} {}", row.value, row.unit);
            table.add_row([row.fs, &row.what, &value, &target, met]);
        }
        format!("{table}\n")
    }
}
