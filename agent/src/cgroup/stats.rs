//! What the files of a cgroup say, as numbers by name (Linux 6.12 Documentation/admin-guide/cgroup-v2.rst, "Core Interface Files" and each
//! controller's).

use std::collections::HashMap;
use std::fs;
use std::path::Path;

/// Files of one number, or `max`.
const SINGLE: [&str; 8] = [
    "memory.current",
    "memory.max",
    "memory.peak",
    "memory.swap.current",
    "memory.swap.max",
    "memory.swap.peak",
    "pids.current",
    "pids.max",
];
/// Files of lines of a key and a number.
const FLAT: [&str; 6] =
    ["cpu.stat", "memory.stat", "memory.events", "memory.swap.events", "pids.events", "cgroup.events"];
/// Files of lines of a key and `name=number` pairs.
const NESTED: [&str; 4] = ["io.stat", "cpu.pressure", "memory.pressure", "io.pressure"];

/// Reads them; a file that is not there has nothing to say.
#[must_use]
pub fn read(dir: &Path) -> HashMap<String, u64> {
    let mut counters = HashMap::new();
    let text = |file: &str| fs::read_to_string(dir.join(file)).unwrap_or_default();
    for file in SINGLE {
        counters.extend(number(text(file).trim()).map(|value| (file.to_owned(), value)));
    }
    for file in FLAT {
        flat(file, &text(file), &mut counters);
    }
    for file in NESTED {
        nested(file, &text(file), &mut counters);
    }
    counters
}

fn flat(file: &str, text: &str, counters: &mut HashMap<String, u64>) {
    for (key, value) in text.lines().filter_map(|line| line.split_once(' ')) {
        counters.extend(number(value).map(|value| (format!("{file}/{key}"), value)));
    }
}

fn nested(file: &str, text: &str, counters: &mut HashMap<String, u64>) {
    for line in text.lines() {
        let mut words = line.split(' ');
        let key = words.next().unwrap_or_default();
        for (name, value) in words.filter_map(|word| word.split_once('=')) {
            counters.extend(number(value).map(|value| (format!("{file}/{key}/{name}"), value)));
        }
    }
}

/// A number, `max`, or an average with two decimals, which is counted in hundredths.
fn number(text: &str) -> Option<u64> {
    match text.split_once('.') {
        None if text == "max" => Some(u64::MAX),
        None => text.parse().ok(),
        Some((whole, hundredths)) if hundredths.len() == 2 => {
            whole.parse::<u64>().ok()?.checked_mul(100)?.checked_add(hundredths.parse().ok()?)
        }
        Some(_) => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_file_is_read() {
        let mut counters = HashMap::new();
        flat("cpu.stat", "usage_usec 5\nuser_usec x\n", &mut counters);
        nested("io.stat", "254:0 rbytes=7 wbytes=8\n", &mut counters);
        nested("cpu.pressure", "some avg10=1.25 total=9\nfull avg10=0.00 total=0\n", &mut counters);
        let expected = [
            ("cpu.stat/usage_usec", 5),
            ("io.stat/254:0/rbytes", 7),
            ("io.stat/254:0/wbytes", 8),
            ("cpu.pressure/some/avg10", 125),
            ("cpu.pressure/some/total", 9),
            ("cpu.pressure/full/avg10", 0),
            ("cpu.pressure/full/total", 0),
        ];
        assert_eq!(counters, expected.map(|(name, value)| (name.to_owned(), value)).into());
        assert_eq!((number("max"), number("1.5"), number("")), (Some(u64::MAX), None, None));
    }

    #[test]
    fn cgroup_that_is_not_there_counts_nothing() {
        assert!(read(Path::new("/no/such/cgroup")).is_empty());
    }
}
