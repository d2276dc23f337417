//! Medians, the table, the JSON.

use std::collections::BTreeMap;
use std::fs;
use std::io::ErrorKind;
use std::path::Path;

use anyhow::Result;

/// What was measured, by key.
#[derive(Default)]
pub(crate) struct Report {
    values: BTreeMap<String, f64>,
    /// Key, least and greatest of the runs: how far the median is to be trusted.
    spread: BTreeMap<String, (f64, f64)>,
    ratios: Vec<(String, String)>,
}

impl Report {
    /// Takes down one number.
    pub(crate) fn number(&mut self, key: &str, value: f64) {
        self.values.insert(key.to_owned(), value);
    }

    /// Takes down the median of several runs, and returns it; nothing without any.
    pub(crate) fn median(&mut self, key: &str, mut samples: Vec<f64>) -> f64 {
        samples.sort_by(f64::total_cmp);
        let (Some(least), Some(greatest)) = (samples.first(), samples.last()) else { return f64::NAN };
        self.spread.insert(key.to_owned(), (*least, *greatest));
        let middle = samples.len() / 2;
        let median = if samples.len() % 2 == 1 {
            samples[middle]
        } else {
            (samples[middle - 1] + samples[middle]) / 2.0
        };
        self.number(key, median);
        median
    }

    /// Asks for the ratio of two keys in the table.
    pub(crate) fn ratio(&mut self, key: &str, to: &str) {
        self.ratios.push((key.to_owned(), to.to_owned()));
    }

    /// Prints the table on standard output.
    #[allow(clippy::print_stdout)]
    pub(crate) fn print(&self) {
        println!("{:<32} {:>14}   least .. greatest", "", "median");
        for (key, value) in &self.values {
            let spread = self
                .spread
                .get(key)
                .map_or(String::new(), |(least, greatest)| format!("   {least:.2} .. {greatest:.2}"));
            let value = if value.fract() == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") };
            println!("{key:<32} {value:>14}{spread}");
        }
        println!();
        for (key, to) in &self.ratios {
            if let (Some(value), Some(base)) = (self.values.get(key), self.values.get(to)) {
                println!("{key} / {to} = {:.2}", value / base);
            }
        }
    }

    /// Adds the numbers to those in a file, one flat JSON object, which need not be there.
    pub(crate) fn write(&self, path: &Path) -> Result<()> {
        let mut all: BTreeMap<String, f64> = match fs::read(path) {
            Ok(before) => serde_json::from_slice(&before)?,
            Err(e) if e.kind() == ErrorKind::NotFound => BTreeMap::new(),
            Err(e) => return Err(e.into()),
        };
        all.extend(self.values.iter().map(|(key, value)| (key.clone(), (value * 1000.0).round() / 1000.0)));
        Ok(fs::write(path, serde_json::to_string_pretty(&all)? + "\n")?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn median_is_the_middle_or_between_the_two_middles() {
        let mut report = Report::default();
        report.median("odd", vec![3.0, 1.0, 2.0]);
        report.median("even", vec![4.0, 1.0, 2.0, 3.0]);
        assert_eq!((report.values["odd"], report.values["even"]), (2.0, 2.5));
    }
}
