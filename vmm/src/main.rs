//! `kvrun-vmm`: one virtual machine, for as long as its control socket is open.
//!
//! Started by the pod engine with the control socket as its only descriptor beside 0, 1 and 2. `--check` and `--version` are for people
//! (by way of `kvrun check` and `kvrun env`).

use std::os::fd::{FromRawFd, OwnedFd};
use std::process::ExitCode;

use anyhow::{Context, bail};
use kvrun_vmm::{check, control};
use kvrun_vmm_api::{CONTROL_FD, Channel};
use rustix::process::{Resource, Rlimit};

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
    let socket = rustix::io::fcntl_getfd(borrowed_control())
        .map(|_| {
            // SAFETY: the descriptor is open (just asked), and by the contract with the pod engine it is the control socket,
            // handed to this process alone; nothing else here uses its number.
            unsafe { OwnedFd::from_raw_fd(CONTROL_FD) }
        })
        .with_context(|| {
            format!("no control socket at descriptor {CONTROL_FD}; kvrun-vmm is started by kvrun")
        })?;
    rustix::io::fcntl_setfd(&socket, rustix::io::FdFlags::CLOEXEC).context("control socket")?;

    // The file server holds one descriptor per file the guest has open.
    let files = rustix::process::getrlimit(Resource::Nofile);
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: files.maximum, ..files })
        .context("cannot raise the limit of open files")?;

    control::serve(Channel::from(socket))?;
    Ok(())
}

fn borrowed_control() -> rustix::fd::BorrowedFd<'static> {
    // SAFETY: used for fcntl(2) only, which answers EBADF if nothing is open under the number.
    unsafe { rustix::fd::BorrowedFd::borrow_raw(CONTROL_FD) }
}

/// Prints the findings as JSON; the exit code tells whether all hold.
fn report_check() -> anyhow::Result<ExitCode> {
    let findings = check::run();
    report(&serde_json::json!({ "findings": findings }).to_string())?;
    Ok(if findings.iter().all(|finding| finding.ok) { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn report(text: &str) -> anyhow::Result<()> {
    use std::io::Write;
    writeln!(std::io::stdout(), "{text}").context("standard output")
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
