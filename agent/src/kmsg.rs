//! The log: warnings and errors go to the kernel's log buffer, and from there, errors at least, to the serial console, whose
//! last bytes the VMM keeps and reports. Nothing is written while all is well: every console byte is a VM exit.
//!
//! [`read`] is how whoever runs the machine sees all of the buffer.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;

use log::{Level, LevelFilter, Log, Metadata, Record};

/// The kernel's log buffer (Linux 6.12 Documentation/ABI/testing/dev-kmsg).
pub const PATH: &str = "/dev/kmsg";
/// The most that is read, in bytes: several times what the kernel keeps (`CONFIG_LOG_BUF_SHIFT`). Who writes while we read does not keep us here.
const MAX_LOG: usize = 1 << 20;
/// More than a record can have in bytes (`PRINTK_MESSAGE_MAX` of Linux 6.12 `kernel/printk/internal.h`).
const MAX_RECORD: usize = 8 * 1024;

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
    if let Ok(file) = OpenOptions::new().write(true).open(PATH)
        && log::set_boxed_logger(Box::new(Kmsg(file))).is_ok()
    {
        log::set_max_level(LevelFilter::Warn);
    }
}

/// What is in the buffer, in lines as dmesg(1) has them, oldest first.
///
/// # Errors
///
/// Those of opening and reading [`PATH`].
pub fn read() -> io::Result<Vec<u8>> {
    let mut file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(PATH)?;
    let (mut log, mut record) = (Vec::new(), [0; MAX_RECORD]);
    while log.len() < MAX_LOG {
        match file.read(&mut record) {
            Ok(0) => break,
            Ok(length) => log.extend(line(&record[..length]).unwrap_or_default()),
            Err(err) => match err.raw_os_error() {
                // That was the last one.
                Some(libc::EAGAIN) => break,
                // Some were overwritten before we came to them; the oldest that is left is next.
                Some(libc::EPIPE | libc::EINTR) => {}
                _ => return Err(err),
            },
        }
    }
    log.truncate(MAX_LOG);
    Ok(log)
}

/// A record, `PRIORITY,NUMBER,MICROSECONDS,FLAGS;TEXT`, as a line; what follows in further lines is for programs.
fn line(record: &[u8]) -> Option<Vec<u8>> {
    let text = record.iter().position(|byte| *byte == b';')?;
    let (head, text) = (str::from_utf8(&record[..text]).ok()?, &record[text + 1..]);
    let micros: u64 = head.split(',').nth(2)?.parse().ok()?;
    let mut line = format!("[{:5}.{:06}] ", micros / 1_000_000, micros % 1_000_000).into_bytes();
    line.extend(text.split(|byte| *byte == b'\n').next()?);
    line.push(b'\n');
    Some(line)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_becomes_a_line() {
        let record = b"6,339,5140900,-;a; b\n SUBSYSTEM=acpi\n DEVICE=+acpi:PNP0A03:00\n";
        assert_eq!(line(record).unwrap(), b"[    5.140900] a; b\n");
        assert_eq!(line(b"30,340,12345678901234,-;\n").unwrap(), b"[12345678.901234] \n");
        for wrong in [&b""[..], b"6,339;text\n", b"6,339,x,-;text\n", b"no text"] {
            assert_eq!(line(wrong), None);
        }
    }
}
