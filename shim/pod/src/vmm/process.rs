//! Starting the VMM process, and making sure that it ends.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use kvrun_vmm_api::{CONTROL_FD, SHARE_FD};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, pidfd_open, pidfd_send_signal, waitid,
};

use crate::host_process::HostProcess;
use crate::{spawn, sys};

/// The stack of the thread that starts a child, in bytes.
const SPAWN_STACK: usize = 128 * 1024;

/// A child that was started and not yet waited for.
#[derive(Debug)]
pub(super) struct Child {
    /// Refers to it until it is reaped.
    pub(super) pidfd: OwnedFd,
    /// The reading end of its standard error, non-blocking.
    pub(super) stderr: OwnedFd,
}

/// Starts `program` as process 1 of a new PID namespace, with an empty environment, `control` as descriptor [`CONTROL_FD`],
/// `share`, if there is one, as [`SHARE_FD`], a pipe as standard error, `/dev/null` as standard input and output, and no other
/// descriptor.
pub(super) fn spawn(program: &Path, control: &OwnedFd, share: Option<BorrowedFd<'_>>) -> io::Result<Child> {
    let (stderr, theirs) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&stderr, true)?;
    let mut command = Command::new(program);
    command.arg0("kvrun-vmm").env_clear().current_dir("/");
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::from(theirs));
    let mut inherited = vec![(control.as_fd(), CONTROL_FD)];
    inherited.extend(share.map(|share| (share, SHARE_FD)));
    // In a session of its own: signals the terminal sends to our process group are ours to forward, and must not kill the machine.
    let child = in_new_pid_namespace(|| spawn::in_new_session(&mut command, &inherited))?;
    let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidData)?;
    // The child is not reaped yet, so its number is still its own.
    let pidfd = pidfd_open(pid, PidfdFlags::empty())?;
    Ok(Child { pidfd, stderr })
}

/// Calls `spawn` on a thread whose children are in a PID namespace of their own. A thread of its own, because what it has
/// unshared is not given back: it could not start threads any more.
fn in_new_pid_namespace<T: Send>(spawn: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    thread::scope(|scope| {
        let spawning = thread::Builder::new().stack_size(SPAWN_STACK).spawn_scoped(scope, || {
            sys::unshare_pid_namespace_of_children()?;
            spawn()
        })?;
        spawning.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Status {
    /// Exited with this code.
    Exited(i32),
    /// Killed by this signal.
    Signaled(i32),
    /// Somebody else reaped it.
    Unknown,
}

/// Reaps the child, which has ended or is about to; blocks until then.
pub(super) fn reap(pidfd: &OwnedFd) -> Status {
    loop {
        match waitid(WaitId::PidFd(pidfd.as_fd()), WaitIdOptions::EXITED) {
            Ok(Some(status)) => {
                let code = status.exit_status().map(Status::Exited);
                return code.or(status.terminating_signal().map(Status::Signaled)).unwrap_or(Status::Unknown);
            }
            Err(rustix::io::Errno::INTR) => {}
            // ECHILD: reaped already.
            Ok(None) | Err(_) => return Status::Unknown,
        }
    }
}

/// Kills and reaps the process when dropped, whatever became of those who watch it.
#[derive(Debug)]
pub(super) struct Guard {
    pidfd: OwnedFd,
}

impl Guard {
    pub(super) fn new(child: &Child) -> io::Result<Self> {
        Ok(Self { pidfd: child.pidfd.try_clone()? })
    }

    /// The process, as others find it.
    pub(super) fn host_process(&self) -> io::Result<HostProcess> {
        // pidfd_open(2): the number in the PID namespace of this /proc is in the descriptor's fdinfo.
        let info = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", self.pidfd.as_raw_fd()))?;
        let pid = info.lines().find_map(|line| line.strip_prefix("Pid:")?.trim().parse().ok());
        HostProcess::of(pid.ok_or(io::ErrorKind::InvalidData)?)
    }

    /// Another descriptor for the process.
    #[cfg(test)]
    pub(super) fn pidfd(&self) -> OwnedFd {
        self.pidfd.try_clone().unwrap()
    }

    pub(super) fn kill(&self) {
        // It may have ended already; there is no other error for a child of ours.
        let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        self.kill();
        reap(&self.pidfd);
    }
}
