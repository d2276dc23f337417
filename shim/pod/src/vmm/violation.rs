//! Which system call a VMM was killed for, as far as the host's kernel log tells.
//!
//! The kernel tells the parent of the signal only. It logs the call as an audit record (Linux 6.12 kernel/auditsc.c, audit_seccomp()), which
//! is in the kernel log unless an audit daemon takes it. So this is for the person who looks into it, and decides nothing.

use std::fmt;
use std::io;

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// The most that is read of the kernel log, in records.
const MAX_RECORDS: usize = 100_000;

/// A call that a filter did not allow.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Violation {
    /// The thread that made it.
    thread: String,
    /// The number of the call.
    call: u32,
}

impl fmt::Display for Violation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "its thread {:?} made system call {}, says the kernel log", self.thread, self.call)
    }
}

/// The last violation of a VMM in the kernel log; `None` where there is none, or no log for us.
pub(super) fn last() -> Option<Violation> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let log = rustix::fs::open("/dev/kmsg", flags, Mode::empty()).map_err(io::Error::from).ok()?;
    let mut record = [0; 8192];
    let mut found = None;
    for _ in 0..MAX_RECORDS {
        match rustix::io::read(&log, &mut record) {
            Ok(0) => break,
            Ok(length) => found = parse(&String::from_utf8_lossy(&record[..length])).or(found),
            // Linux Documentation/ABI/testing/dev-kmsg: records were overwritten meanwhile; the next one is still there.
            Err(Errno::PIPE | Errno::INTR) => {}
            Err(_) => break,
        }
    }
    found
}

/// A record like `audit: type=1326 audit(1.2:3): ... pid=7 comm="vcpu0" exe="/usr/libexec/kvrun/kvrun-vmm" sig=31 ... syscall=39 ...`.
fn parse(record: &str) -> Option<Violation> {
    let field = |key: &str| {
        let mut values =
            record.split_whitespace().filter_map(|word| word.strip_prefix(key)?.strip_prefix('='));
        values.next().map(|value| value.trim_matches('"'))
    };
    if field("type")? != "1326" || field("sig")? != "31" || !field("exe")?.ends_with("/kvrun-vmm") {
        return None;
    }
    // The name of a thread is the VMM's word.
    let thread = field("comm")?.chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(15).collect();
    Some(Violation { thread, call: field("syscall")?.parse().ok()? })
}

#[cfg(test)]
mod tests {
    use super::*;

    const RECORD: &str = "5,812,4711,-;audit: type=1326 audit(1700000000.123:42): auid=4294967295 uid=0 gid=0 ses=4294967295 \
        subj=unconfined pid=77 comm=\"vcpu0\" exe=\"/opt/kvrun/libexec/kvrun/kvrun-vmm\" sig=31 arch=c000003e syscall=39 compat=0 \
        ip=0x4a2b3c code=0x80000000\n";

    #[test]
    fn record_of_the_kernel_names_thread_and_call() {
        let violation = parse(RECORD).unwrap();
        assert_eq!(violation, Violation { thread: "vcpu0".into(), call: 39 });
        assert_eq!(violation.to_string(), "its thread \"vcpu0\" made system call 39, says the kernel log");
    }

    #[test]
    fn records_of_others_are_passed_over() {
        for (from, to) in
            [("type=1326", "type=1300"), ("sig=31", "sig=0"), ("kvrun-vmm\"", "chrome\""), ("syscall=39", "")]
        {
            assert_eq!(parse(&RECORD.replace(from, to)), None, "{to}");
        }
        assert_eq!(parse(""), None);
    }
}
