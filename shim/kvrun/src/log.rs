//! Errors and traces: standard error for people, a log file for the program that called us.
//!
//! A caller such as conmon or containerd's runc shim gives `--log FILE --log-format json` and reads the last line
//! of the file when we fail: an object with `level`, `msg` and `time`.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Mutex;

use kvrun_pod::config::Config;
use kvrun_pod::log::{self, Format, Level, line};
use kvrun_pod::text;
use tracing::level_filters::LevelFilter;

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
    file: Option<(File, Format)>,
    /// Of the traces that go to the file, unless all do.
    level: Option<Level>,
}

impl Log {
    /// Standard error only.
    pub(crate) fn none() -> Self {
        Self { file: None, level: None }
    }

    /// Opens the log file, if there is one, and sends traces to it: warnings, until the configuration says what, or everything with `debug`. Without a file
    /// only `debug` traces, to standard error.
    pub(crate) fn open(path: Option<&Path>, format: Format, debug: bool) -> Result<Self, LogError> {
        let level = if debug { LevelFilter::DEBUG } else { LevelFilter::WARN };
        let Some(path) = path else {
            if debug {
                log::install(format, &[], level, io::stderr);
            }
            return Ok(Self::none());
        };
        let error = |source| LogError { path: path.to_owned(), source };
        let file = OpenOptions::new().append(true).create(true).mode(0o644).open(path).map_err(error)?;
        let level = log::install(format, &[], level, Mutex::new(file.try_clone().map_err(error)?));
        Ok(Self { file: Some((file, format)), level: Some(level).filter(|_| !debug) })
    }

    /// Does as the configuration says.
    pub(crate) fn obey(&self, config: &Config) {
        if let Some(level) = &self.level {
            level.set(config.log_level);
        }
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
