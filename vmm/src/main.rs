//! `kvrun-vmm`: one virtual machine, for as long as its control socket is open.
//!
//! Started by the pod engine with the control socket, and what is shared with the guest, as its only descriptors beside 0, 1 and
//! 2. It jails itself first and then does what the socket says. `--check` and `--version` are for people
//! (by way of `kvrun check` and `kvrun env`).

use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::process::ExitCode;

use anyhow::{Context, bail};
use kvrun_vmm::{check, control, jail, thread};
use kvrun_vmm_api::{CONTROL_FD, Channel, SHARE_FD};
use rustix::io::FdFlags;

/// The exit code of a panic, as Rust has it.
const PANICKED: i32 = 101;

fn main() -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(e) => {
            eprintln!("kvrun-vmm: {e:#}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> anyhow::Result<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    match (args.next().as_ref().and_then(|arg| arg.to_str()), args.next()) {
        (None, None) => serve().map(|()| ExitCode::SUCCESS),
        (Some("--check"), None) => report_check(),
        (Some("--version"), None) => {
            report(&format!("kvrun-vmm {}", env!("CARGO_PKG_VERSION")))?;
            Ok(ExitCode::SUCCESS)
        }
        _ => bail!("takes --check, --version or nothing; it is started by kvrun"),
    }
}

fn serve() -> anyhow::Result<()> {
    log::set_logger(&StderrLogger).map(|()| log::set_max_level(log::LevelFilter::Warn)).context("logger")?;
    // Process 1 of a PID namespace takes no SIGABRT of its own (pid_namespaces(7)), so a panic that aborts would look like another crash.
    std::panic::set_hook(Box::new(|panic| {
        eprintln!("kvrun-vmm: {panic}");
        // SAFETY: ends the process, without waiting for its threads.
        unsafe { libc::_exit(PANICKED) }
    }));
    let socket = inherited(CONTROL_FD).with_context(|| {
        format!("no control socket at descriptor {CONTROL_FD}; kvrun-vmm is started by kvrun")
    })?;
    let jail = jail::enter(inherited(SHARE_FD).ok())?;
    thread::confine_spawned().context("cannot start the thread that starts threads")?;
    control::serve(Channel::from(socket), jail)?;
    Ok(())
}

/// A descriptor that the engine has given to this process; to be called once for each number, before any other is opened.
fn inherited(number: i32) -> io::Result<OwnedFd> {
    // SAFETY: used for fcntl(2) only, which answers EBADF if nothing is open under the number.
    let borrowed = unsafe { BorrowedFd::borrow_raw(number) };
    rustix::io::fcntl_setfd(borrowed, FdFlags::CLOEXEC)?;
    // SAFETY: the descriptor is open (just asked), and by the contract with the pod engine it was handed to this process alone; nothing
    // else here uses its number.
    Ok(unsafe { OwnedFd::from_raw_fd(number) })
}

/// Prints the findings as JSON; the exit code tells whether all hold.
fn report_check() -> anyhow::Result<ExitCode> {
    let findings = check::run();
    report(&serde_json::json!({ "findings": findings }).to_string())?;
    Ok(if findings.iter().all(|finding| finding.ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn report(text: &str) -> anyhow::Result<()> {
    use io::Write;
    writeln!(io::stdout(), "{text}").context("standard output")
}

/// Warnings and errors of this program, a line each, on standard error, where the pod engine reads them. Not those of libraries: what
/// they log per guest request, a guest could use to flood the host.
struct StderrLogger;

impl log::Log for StderrLogger {
    fn enabled(&self, metadata: &log::Metadata<'_>) -> bool {
        metadata.target().starts_with("kvrun_vmm")
    }
    fn log(&self, record: &log::Record<'_>) {
        if self.enabled(record.metadata()) {
            eprintln!("kvrun-vmm: {}", record.args());
        }
    }
    fn flush(&self) {}
}
