//! The text in which metrics are exposed: Prometheus' exposition format, version 0.0.4.
//!
//! A family is a metric with its help and its type, in two lines, and after them its samples, one for each set of labels. Values of labels may say anything: quotes,
//! backslashes and line breaks are escaped, as the format has it, and other control characters with them, for people read this too.

use std::fmt::{Display, Write};

use super::latency::{BOUNDS, Histogram};

/// What a first line of a family begins with.
const HELP: &str = "# HELP ";

/// How the values of a metric are to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Kind {
    /// It only grows.
    Counter,
    /// It is what it is.
    Gauge,
    /// How many values were how large.
    Histogram,
}

/// A text to which families are added, one after another.
#[derive(Debug)]
pub(super) struct Exposition {
    text: String,
    /// The labels of every sample, with a comma behind each.
    common: String,
    family: &'static str,
}

impl Exposition {
    /// An empty one, whose samples all get these labels.
    pub(super) fn new(labels: &[(&str, &str)]) -> Self {
        let mut common = String::new();
        add_labels(&mut common, labels);
        Self { text: String::new(), common, family: "" }
    }

    /// Begins a family.
    pub(super) fn family(&mut self, name: &'static str, kind: Kind, help: &str) {
        let kind = match kind {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        };
        self.family = name;
        // Writing to a string does not fail, here and below.
        let _ = writeln!(self.text, "{HELP}{name} {help}\n# TYPE {name} {kind}");
    }

    /// Adds a sample to the family.
    pub(super) fn sample(&mut self, labels: &[(&str, &str)], value: impl Display) {
        self.line("", labels, value);
    }

    /// Begins a family of one sample and adds that.
    pub(super) fn single(&mut self, name: &'static str, kind: Kind, help: &str, value: impl Display) {
        self.family(name, kind, help);
        self.sample(&[], value);
    }

    /// Adds the samples of a histogram to the family.
    pub(super) fn histogram(&mut self, labels: &[(&str, &str)], histogram: &Histogram) {
        let mut cumulative = 0;
        for (bound, count) in BOUNDS.iter().zip(histogram.counts) {
            cumulative += count;
            let bound = bound.to_string();
            self.line("_bucket", &[labels, &[("le", &bound)]].concat(), cumulative);
        }
        self.line("_bucket", &[labels, &[("le", "+Inf")]].concat(), histogram.count);
        self.line("_sum", labels, histogram.sum.as_secs_f64());
        self.line("_count", labels, histogram.count);
    }

    fn line(&mut self, suffix: &str, labels: &[(&str, &str)], value: impl Display) {
        let mut all = self.common.clone();
        add_labels(&mut all, labels);
        let all = all.trim_end_matches(',');
        let _ = writeln!(self.text, "{}{suffix}{{{all}}} {value}", self.family);
    }

    /// The text.
    pub(super) fn finish(self) -> String {
        self.text
    }
}

/// Appends `name="value",` for each.
fn add_labels(to: &mut String, labels: &[(&str, &str)]) {
    for (name, value) in labels {
        to.push_str(name);
        to.push_str("=\"");
        for c in value.chars() {
            match c {
                '\\' | '"' => to.extend(['\\', c]),
                '\n' => to.push_str("\\n"),
                c if c.is_control() => {}
                c => to.push(c),
            }
        }
        to.push_str("\",");
    }
}

/// Several texts as one, in which each family is there once, with the samples of all.
pub fn merge<'a>(texts: impl IntoIterator<Item = &'a str>) -> String {
    let mut families: Vec<(&str, String)> = Vec::new();
    for text in texts {
        let mut at = None;
        let mut lines = text.lines();
        while let Some(line) = lines.next() {
            if line.starts_with(HELP) {
                let found = families.iter().position(|(help, _)| *help == line);
                at = Some(found.unwrap_or(families.len()));
                let kind = lines.next().unwrap_or_default();
                if found.is_none() {
                    families.push((line, format!("{line}\n{kind}\n")));
                }
            } else if let Some((_, family)) = at.and_then(|at: usize| families.get_mut(at)) {
                family.push_str(line);
                family.push('\n');
            }
        }
    }
    families.into_iter().map(|(_, family)| family).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn of(pod: &str) -> Exposition {
        Exposition::new(&[("pod", pod)])
    }

    #[test]
    fn values_of_labels_stay_values_of_labels() {
        let mut all = of("p");
        all.family("m", Kind::Counter, "Help.");
        all.sample(&[("a", "\"} 1\nm 2\\\x1b[2J")], 3);
        assert_eq!(
            all.finish(),
            "# HELP m Help.\n# TYPE m counter\nm{pod=\"p\",a=\"\\\"} 1\\nm 2\\\\[2J\"} 3\n"
        );
    }

    #[test]
    fn buckets_of_a_histogram_are_cumulative() {
        let mut histogram = Histogram::default();
        for ms in [1, 3, 3, 1_000_000] {
            histogram.add(Duration::from_millis(ms));
        }
        let mut all = of("p");
        all.family("m", Kind::Histogram, "Help.");
        all.histogram(&[("r", "x")], &histogram);
        let text = all.finish();
        for line in [
            "m_bucket{pod=\"p\",r=\"x\",le=\"0.001\"} 1",
            "m_bucket{pod=\"p\",r=\"x\",le=\"0.005\"} 3",
            "m_bucket{pod=\"p\",r=\"x\",le=\"30\"} 3",
            "m_bucket{pod=\"p\",r=\"x\",le=\"+Inf\"} 4",
            "m_sum{pod=\"p\",r=\"x\"} 1000.007",
            "m_count{pod=\"p\",r=\"x\"} 4",
        ] {
            assert!(text.lines().any(|other| other == line), "{line}: {text}");
        }
    }

    #[test]
    fn families_of_several_pods_are_there_once() {
        let text = |pod: &str, names: &[&'static str]| {
            let mut all = of(pod);
            for name in names {
                all.single(name, Kind::Gauge, "Help.", 1);
            }
            all.finish()
        };
        let (first, second) = (text("1", &["a", "b"]), text("2", &["b", "c"]));
        let head = |name| format!("# HELP {name} Help.\n# TYPE {name} gauge\n");
        let wanted = [
            head("a") + "a{pod=\"1\"} 1\n",
            head("b") + "b{pod=\"1\"} 1\nb{pod=\"2\"} 1\n",
            head("c") + "c{pod=\"2\"} 1\n",
        ];
        assert_eq!(merge([first.as_str(), &second]), wanted.concat());
        assert_eq!(merge(["no metric\n"]), "");
    }
}
