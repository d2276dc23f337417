//! Errors and traces: standard error for people, a log file for the program that called us.
//!
//! A caller such as conmon or containerd's runc shim gives `--log FILE --log-format json` and reads the last line
//! of the file when we fail: an object with `level`, `msg` and `time`.

use std::fmt;
use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use kvrun_pod::text;
use tracing::field::{Field, Visit};
use tracing::{Event, Subscriber};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::time::{FormatTime, SystemTime};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

use crate::cli::LogFormat;
use crate::error::LastWords;

/// The log file cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("log file {}: {source}", path.display())]
pub(crate) struct LogError {
    path: PathBuf,
    source: io::Error,
}

/// Where errors go.
#[derive(Debug)]
pub(crate) struct Log {
    file: Option<(File, LogFormat)>,
}

impl Log {
    /// Standard error only.
    pub(crate) fn none() -> Self {
        Self { file: None }
    }

    /// Opens the log file, if there is one, and sends traces to it: warnings, or everything with `debug`. Without a file only
    /// `debug` traces, to standard error.
    pub(crate) fn open(path: Option<&Path>, format: LogFormat, debug: bool) -> Result<Self, LogError> {
        let level = if debug { LevelFilter::DEBUG } else { LevelFilter::WARN };
        let traces =
            tracing_subscriber::fmt().with_ansi(false).with_max_level(level).event_format(Lines(format));
        let Some(path) = path else {
            if debug {
                traces.with_writer(io::stderr).init();
            }
            return Ok(Self::none());
        };
        let error = |source| LogError { path: path.to_owned(), source };
        let file = OpenOptions::new().append(true).create(true).mode(0o644).open(path).map_err(error)?;
        traces.with_writer(std::sync::Mutex::new(file.try_clone().map_err(error)?)).init();
        Ok(Self { file: Some((file, format)) })
    }

    /// Reports a failure: one line.
    pub(crate) fn fail(&self, message: &str, code: u8) -> ExitCode {
        self.say(message);
        code.into()
    }

    /// Reports something the user must know: one line.
    pub(crate) fn say(&self, message: &str) {
        self.write("error", message);
    }

    /// Reports something that did not work, and without which we go on: one line.
    pub(crate) fn warn(&self, message: &str) {
        self.write("warning", message);
    }

    fn write(&self, level: &str, message: &str) {
        let message = text::one_line(message, usize::MAX);
        // There is no other place to report to.
        let _ = writeln!(io::stderr(), "kvrun: {message}");
        if let Some((file, format)) = &self.file {
            let mut line = line(*format, level, &message);
            line.push('\n');
            let _ = (&*file).write_all(line.as_bytes());
        }
    }

    /// What a machine that died said last, as an indented block on standard error, and in the log file.
    pub(crate) fn last_words(&self, all: &[LastWords]) {
        let mut stderr = io::stderr().lock();
        for words in all {
            let _ = writeln!(stderr, "  last output of the {}:", words.title);
            for text in &words.lines {
                let _ = writeln!(stderr, "    {text}");
                if let Some((file, format)) = &self.file {
                    let text = format!("{}: {text}", words.title);
                    let _ = (&*file).write_all(format!("{}\n", line(*format, "warning", &text)).as_bytes());
                }
            }
        }
    }
}

/// The time, as in RFC 3339.
pub(crate) fn now() -> String {
    let mut time = String::new();
    // Writing to a string does not fail.
    let _ = SystemTime.format_time(&mut Writer::new(&mut time));
    time
}

fn line(format: LogFormat, level: &str, message: &str) -> String {
    let time = now();
    match format {
        LogFormat::Json => serde_json::json!({ "level": level, "msg": message, "time": time }).to_string(),
        LogFormat::Text => format!("time={time:?} level={level} msg={message:?}"),
    }
}

/// Formats a trace like an error.
struct Lines(LogFormat);

impl<S, N> FormatEvent<S, N> for Lines
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        _: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let mut message = Message(String::new());
        event.record(&mut message);
        let level = match *event.metadata().level() {
            tracing::Level::ERROR => "error",
            tracing::Level::WARN => "warning",
            tracing::Level::INFO => "info",
            tracing::Level::DEBUG => "debug",
            tracing::Level::TRACE => "trace",
        };
        writeln!(writer, "{}", line(self.0, level, &text::one_line(&message.0, usize::MAX)))
    }
}

/// The message of a trace, then its fields as `name=value`.
struct Message(String);

impl Visit for Message {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        if field.name() == "message" {
            self.0.insert_str(0, &format!("{value:?}"));
        } else {
            self.0.push_str(&format!(" {}={value:?}", field.name()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn json_line_has_what_callers_read() {
        let value: serde_json::Value =
            serde_json::from_str(&line(LogFormat::Json, "error", "a \"b\"")).unwrap();
        assert_eq!(value["level"], "error");
        assert_eq!(value["msg"], "a \"b\"");
        let time = value["time"].as_str().unwrap();
        assert!(time.contains('T') && time.ends_with('Z'), "{time}");
    }

    #[test]
    fn text_line_is_one_line() {
        let line = line(LogFormat::Text, "error", "a\nb");
        assert!(line.contains("level=error msg=\"a\\nb\""), "{line}");
        assert!(!line.contains('\n'));
    }
}
