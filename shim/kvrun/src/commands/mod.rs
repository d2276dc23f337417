//! The commands that look at a container or ask its monitor for something, one file each.

pub(crate) mod config;
pub(crate) mod delete;
pub(crate) mod events;
pub(crate) mod kill;
pub(crate) mod list;
pub(crate) mod observe;
pub(crate) mod ps;
pub(crate) mod spec;
pub(crate) mod start;
pub(crate) mod state;
pub(crate) mod update;

use std::io::{self, Write};

use serde::Serialize;

use crate::error::{Error, host};

/// Prints a value as JSON, for people too.
pub(crate) fn print_json(value: &impl Serialize) -> Result<(), Error> {
    let text = serde_json::to_string_pretty(value).map_err(host("write JSON"))?;
    print(&text)
}

/// Prints lines.
fn print(text: &str) -> Result<(), Error> {
    writeln!(io::stdout().lock(), "{text}").map_err(host("write to standard output"))
}

/// Lays a table out: columns as wide as their widest cell, the last as it is.
fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width =
        |column: usize| rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..columns).map(|column| width(column).unwrap_or(0)).collect();
    let line = |row: &Vec<String>| {
        let cells = row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    rows.iter().map(line).collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_aligned() {
        let rows = [["ID", "PID"], ["abc", "1"]].map(|row| row.map(str::to_owned).to_vec());
        assert_eq!(table(&rows), "ID   PID\nabc  1");
        assert_eq!(table(&[]), "");
    }
}
