//! The helper process: applies one config with libcontainer, reports, and exits.

use std::ffi::OsString;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::process::ExitCode;

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::error::LibcontainerError;
use libcontainer::syscall::syscall::SyscallType;
use rustix::io::{FdFlags, fcntl_setfd};

use super::events::ErrorEvents;
use super::executor::ContainerExecutor;
use super::{Report, Reporter, error_chain, one_line};

/// The socket's name in a bundle directory, to which libcontainer sends the master of a terminal.
pub const CONSOLE_SOCKET: &str = "console.sock";

/// `oci create SOCKET-FD STATE-ROOT BUNDLE ID TERMINAL(0|1)`; descriptors 0, 1 and 2 are the container's.
pub fn main(args: &[OsString]) -> ExitCode {
    let words: Option<Vec<&str>> = args.iter().map(|arg| arg.to_str()).collect();
    let Some(["oci", "create", socket, state_root, bundle, id, terminal]) = words.as_deref() else {
        eprintln!("kvrun-agent is the init process of a kvrun guest and is not started by hand");
        return ExitCode::from(2);
    };
    let Ok(socket) = socket.parse::<RawFd>() else { return ExitCode::from(2) };
    // SAFETY: the agent has left this descriptor open for this process, under the number it gives.
    let socket = unsafe { OwnedFd::from_raw_fd(socket) };
    if fcntl_setfd(&socket, FdFlags::CLOEXEC).is_err() {
        return ExitCode::from(2);
    }
    let reporter = Reporter::new(socket);

    let panics = reporter.clone();
    std::panic::set_hook(Box::new(move |info| panics.send(&Report::Failed(one_line(&info.to_string())))));
    // There is no other subscriber.
    let _ = tracing::subscriber::set_global_default(ErrorEvents(reporter.clone()));

    match create(Path::new(state_root), Path::new(bundle), id, *terminal == "1", &reporter) {
        Ok(Some(pid)) => {
            reporter.send(&Report::Created { pid });
            reporter.wait_for_answer();
            ExitCode::SUCCESS
        }
        Ok(None) => {
            reporter.send(&Report::Failed("libcontainer names no process for the container".to_owned()));
            ExitCode::FAILURE
        }
        Err(err) => {
            reporter.send(&Report::Failed(error_chain(&err)));
            ExitCode::FAILURE
        }
    }
}

fn create(
    state_root: &Path,
    bundle: &Path,
    id: &str,
    terminal: bool,
    reporter: &Reporter,
) -> Result<Option<i32>, LibcontainerError> {
    let container = ContainerBuilder::new(id.to_owned(), SyscallType::default())
        .with_executor(ContainerExecutor::new(reporter.clone()))
        .with_root_path(state_root)?
        .with_console_socket(terminal.then(|| bundle.join(CONSOLE_SOCKET)))
        .validate_id()?
        .as_init(bundle)
        .with_systemd(false)
        .build()?;
    Ok(container.pid().map(nix_pid))
}

/// libcontainer's nix is another version than ours.
fn nix_pid(pid: impl Into<i32>) -> i32 {
    pid.into()
}
