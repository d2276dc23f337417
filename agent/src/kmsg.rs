//! The log: warnings and errors go to the kernel's log buffer, and from there, errors at least, to the serial console, whose
//! last bytes the VMM keeps and reports. Nothing is written while all is well: every console byte is a VM exit.

use std::fs::{File, OpenOptions};
use std::io::Write;

use log::{Level, LevelFilter, Log, Metadata, Record};

struct Kmsg(File);

/// The longest line: the kernel cuts records near 1 KiB (`LOG_LINE_MAX` of Linux 6.12 `kernel/printk/printk.c`).
const LINE_MAX: usize = 900;

impl Log for Kmsg {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.level() <= Level::Warn
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // Priorities of syslog(2); facility 3 is "daemon".
        let priority = (3 << 3) | if record.level() == Level::Error { 3 } else { 4 };
        let mut line = format!("<{priority}>kvrun-agent: {}", record.args()).replace('\n', " ");
        if let Some((cut, _)) = line.char_indices().find(|(index, _)| *index >= LINE_MAX) {
            line.truncate(cut);
        }
        line.push('\n');
        // One write is one record. There is nowhere to report a failure to.
        let _ = (&self.0).write_all(line.as_bytes());
    }

    fn flush(&self) {}
}

/// Installs the logger. Without `/dev/kmsg` there is no log, which is no reason not to run.
pub fn install() {
    if let Ok(file) = OpenOptions::new().write(true).open("/dev/kmsg")
        && log::set_boxed_logger(Box::new(Kmsg(file))).is_ok()
    {
        log::set_max_level(LevelFilter::Warn);
    }
}
