//! The log of a process: lines for whoever has started it and reads them, an engine's log file or the FIFO of containerd.
//!
//! As text, each is `time="..." level=... msg="..."` and then what else is known, `name=value`: what the process is for, the same in
//! every line, then what the line is about. As JSON, it is an object with `level`, `msg` and `time`, and what the line is about is at the end of `msg`, because
//! that is all that engines show.

use std::fmt;
use std::fmt::Write;

use tracing::field::{Field, Visit};
use tracing::level_filters::LevelFilter;
use tracing::{Event, Subscriber};
use tracing_subscriber::fmt::format::{DefaultFields, Writer};
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields, FormattedFields, MakeWriter};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Registry, reload};

use crate::text;

/// The longest value of a field, in characters.
const MAX_VALUE: usize = 4096;

/// How a line is written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// `time="..." level=... msg="..."`
    Text,
    /// One object per line.
    Json,
}

/// What goes to the log, to be changed while it is written.
#[derive(Clone, Debug)]
pub struct Level(reload::Handle<LevelFilter, Registry>);

impl Level {
    /// Changes it.
    pub fn set(&self, level: LevelFilter) {
        // It fails when there is no log any more.
        let _ = self.0.reload(level);
    }
}

/// Sends traces there, once in the life of a process. `fields` are in every line of text.
pub fn install<W>(format: Format, fields: &[(&str, &str)], level: LevelFilter, writer: W) -> Level
where
    W: for<'w> MakeWriter<'w> + Send + Sync + 'static,
{
    let (filter, handle) = reload::Layer::new(level);
    let mut common = String::new();
    for (name, value) in fields {
        add_field(&mut common, name, value);
    }
    let lines = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .fmt_fields(DefaultFields::new())
        .event_format(Lines { format, common })
        .with_writer(writer);
    tracing_subscriber::registry().with(filter).with(lines).init();
    Level(handle)
}

/// The time, as in RFC 3339.
pub fn now() -> String {
    let mut time = String::new();
    // Writing to a string does not fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    time
}

/// A line, without its end.
pub fn line(format: Format, level: &str, message: &str) -> String {
    let time = now();
    match format {
        Format::Json => serde_json::json!({ "level": level, "msg": message, "time": time }).to_string(),
        Format::Text => format!("time={time:?} level={level} msg={message:?}"),
    }
}

/// Appends ` name=value`, the value in quotes unless it is a word.
fn add_field(to: &mut String, name: &str, value: &str) {
    let is_word = |c: char| c.is_ascii_alphanumeric() || "-._/:@".contains(c);
    let value = text::one_line(value, MAX_VALUE);
    // Writing to a string does not fail.
    let _ = if !value.is_empty() && value.chars().all(is_word) {
        write!(to, " {name}={value}")
    } else {
        write!(to, " {name}={value:?}")
    };
}

/// Formats a trace.
struct Lines {
    format: Format,
    common: String,
}

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut said = Said::default();
        event.record(&mut said);
        for span in context.event_scope().into_iter().flatten() {
            if let Some(fields) = span.extensions().get::<FormattedFields<N>>()
                && !fields.is_empty()
            {
                write!(said.fields, " {}", text::one_line(&fields.fields, MAX_VALUE))?;
            }
        }
        let level = match *event.metadata().level() {
            tracing::Level::ERROR => "error",
            tracing::Level::WARN => "warning",
            tracing::Level::INFO => "info",
            tracing::Level::DEBUG => "debug",
            tracing::Level::TRACE => "trace",
        };
        let message = text::one_line(&said.message, usize::MAX);
        match self.format {
            Format::Json => writeln!(writer, "{}", line(Format::Json, level, &(message + &said.fields))),
            Format::Text => {
                writeln!(writer, "{}{}{}", line(Format::Text, level, &message), self.common, said.fields)
            }
        }
    }
}

/// The message of a trace, and its fields as ` name=value`.
#[derive(Default)]
struct Said {
    message: String,
    fields: String,
}

impl Visit for Said {
    fn record_str(&mut self, field: &Field, value: &str) {
        self.take(field, value);
    }

    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        self.take(field, &format!("{value:?}"));
    }
}

impl Said {
    fn take(&mut self, field: &Field, value: &str) {
        if field.name() == "message" {
            value.clone_into(&mut self.message);
        } else {
            add_field(&mut self.fields, field.name(), value);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::{Arc, Mutex};

    use super::*;

    #[derive(Clone, Default)]
    struct Memory(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Memory {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().extend_from_slice(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn json_line_has_what_callers_read() {
        let value: serde_json::Value = serde_json::from_str(&line(Format::Json, "error", "a \"b\"")).unwrap();
        assert_eq!(value["level"], "error");
        assert_eq!(value["msg"], "a \"b\"");
        let time = value["time"].as_str().unwrap();
        assert!(time.contains('T') && time.ends_with('Z'), "{time}");
    }

    #[test]
    fn text_line_is_one_line() {
        let line = line(Format::Text, "error", "a\nb");
        assert!(line.contains("level=error msg=\"a\\nb\""), "{line}");
        assert!(!line.contains('\n'));
    }

    #[test]
    fn line_says_what_it_is_about_and_the_level_may_change() {
        let memory = Memory::default();
        let writer = Mutex::new(memory.clone());
        let level = install(Format::Text, &[("pod", "p 1"), ("namespace", "n")], LevelFilter::INFO, writer);
        let span = tracing::info_span!("task", container = %"c1");
        span.in_scope(|| tracing::info!(exit = 3, how = "a\nb", "ended"));
        tracing::debug!("not yet");
        level.set(LevelFilter::DEBUG);
        tracing::debug!("now");
        let text = String::from_utf8(memory.0.lock().unwrap().clone()).unwrap();
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2, "{text}");
        let about = "level=info msg=\"ended\" pod=\"p 1\" namespace=n exit=3 how=\"a b\" container=c1";
        assert!(lines[0].starts_with("time=\"") && lines[0].ends_with(about), "{text}");
        assert!(lines[1].ends_with("level=debug msg=\"now\" pod=\"p 1\" namespace=n"), "{text}");
    }
}
