//! The agent's end of the helper.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::oneshot;

use super::{REPORT_MAX, Report};
use crate::descriptor::Descriptor;
use crate::reaper::{End, Reaper};
use crate::stdio::ProcessEnds;

/// Why a process could not be created or started. The text of the first three is for the user.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// The program to run does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The program to run cannot be executed.
    #[error("{0}")]
    NotExecutable(String),
    /// Anything else.
    #[error("{0}")]
    Failed(String),
    /// The helper ended without a word.
    #[error("the process that creates the container ended unexpectedly ({0:?})")]
    HelperDied(Option<End>),
    /// A system call of the agent.
    #[error("cannot {what}")]
    System {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

fn system<E: Into<io::Error>>(what: &'static str) -> impl FnOnce(E) -> OciError {
    move |err| OciError::System { what, source: err.into() }
}

/// What the helper needs.
#[derive(Debug)]
pub struct Creation<'a> {
    /// The program that is the helper: the agent itself.
    pub helper: &'a Path,
    /// The directory with the container's `config.json`.
    pub bundle: &'a Path,
    /// The container's cgroup, relative to the root of cgroups.
    pub cgroup: &'a Path,
    /// Which process.
    pub what: What<'a>,
    /// The process's descriptors 0, 1 and 2; with a terminal, it replaces them.
    pub stdio: ProcessEnds,
}

/// Which process is created.
#[derive(Clone, Copy, Debug)]
pub enum What<'a> {
    /// The first of a new container.
    Container {
        /// Its ID.
        id: &'a str,
        /// The bundle directory on the host, which hooks are told.
        host_bundle: &'a Path,
    },
    /// A further one of a running container.
    Process {
        /// The container's first process.
        container: i32,
        /// A file with the OCI `process`.
        process: &'a Path,
    },
}

/// A process that waits for the start.
#[derive(Debug)]
pub struct Created {
    /// The process.
    pub pid: i32,
    /// The process; stays valid when the number is used again.
    pub pidfd: OwnedFd,
    /// Its end.
    pub end: oneshot::Receiver<End>,
    /// The master of its terminal, if its `process.terminal` is true.
    pub terminal: Option<OwnedFd>,
    /// Starts it.
    pub gate: StartGate,
}

/// Creates a container, or a process in one. Dropping the future kills the helper; what it has started by then ends, and is in the
/// container's cgroup.
///
/// # Errors
///
/// [`OciError`].
pub async fn create(creation: Creation<'_>, reaper: &Reaper) -> Result<Created, OciError> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(system("make a socket pair"))?;
    let mut reports = Reports::new(ours)?;
    let helper = Helper::spawn(creation, theirs, reaper)?;
    loop {
        match reports.next().await? {
            Some(Report::Created { pid }) => {
                // The helper is still the parent of this process, so it has not been reaped, nor its number used again.
                let end = reaper.register(pid);
                let pid_type = Pid::from_raw(pid).ok_or(OciError::HelperDied(None))?;
                let pidfd = pidfd_open(pid_type, PidfdFlags::empty())
                    .map_err(system("open the container's process"))?;
                reports.answer().await?;
                // The helper exits by itself now.
                helper.leave();
                let terminal = reports.terminal.take();
                return Ok(Created { pid, pidfd, end, terminal, gate: StartGate { reports } });
            }
            Some(Report::Terminal) => {}
            Some(Report::NotFound(text)) => return Err(OciError::NotFound(text)),
            Some(Report::NotExecutable(text)) => return Err(OciError::NotExecutable(text)),
            Some(Report::Failed(text)) => return Err(OciError::Failed(text)),
            None => return Err(OciError::HelperDied(helper.end().await)),
        }
    }
}

/// Starts the user's program of a created process.
#[derive(Debug)]
pub struct StartGate {
    reports: Reports,
}

impl StartGate {
    /// Completes when the program runs, or the process has ended.
    ///
    /// # Errors
    ///
    /// [`OciError`]: it cannot be executed, or a hook failed. The process ends by itself then.
    pub async fn start(mut self) -> Result<(), OciError> {
        // One that has ended (EPIPE) has said why, or its end is told by the reaper.
        let _ = self.reports.answer().await;
        match self.reports.next().await? {
            None | Some(Report::Created { .. } | Report::Terminal) => Ok(()),
            Some(Report::NotFound(text)) => Err(OciError::NotFound(text)),
            Some(Report::NotExecutable(text)) => Err(OciError::NotExecutable(text)),
            Some(Report::Failed(text)) => Err(OciError::Failed(text)),
        }
    }
}

/// Receives reports, and the descriptor that comes with one.
#[derive(Debug)]
struct Reports {
    socket: Descriptor,
    terminal: Option<OwnedFd>,
}

impl Reports {
    fn new(socket: OwnedFd) -> Result<Self, OciError> {
        let socket = Descriptor::new(socket).map_err(system("watch the helper's socket"))?;
        Ok(Self { socket, terminal: None })
    }

    /// `None`: nobody is left who could send one.
    async fn next(&mut self) -> Result<Option<Report>, OciError> {
        let mut buf = vec![0; REPORT_MAX];
        let (n, fd) = self.socket.receive(&mut buf).await.map_err(system("read the helper's report"))?;
        if n == 0 {
            return Ok(None);
        }
        if let Some(fd) = fd {
            self.terminal = Some(fd);
        }
        serde_json::from_slice(&buf[..n]).map(Some).map_err(system("understand the helper's report"))
    }

    async fn answer(&self) -> Result<(), OciError> {
        self.socket.write_all(b"1").await.map_err(system("answer the helper"))
    }
}

/// The helper process, killed when dropped.
struct Helper {
    pidfd: Option<OwnedFd>,
    end: Option<oneshot::Receiver<End>>,
}

impl Helper {
    fn spawn(creation: Creation<'_>, socket: OwnedFd, reaper: &Reaper) -> Result<Self, OciError> {
        let mut command = Command::new(creation.helper);
        let (verb, name, extra) = match creation.what {
            What::Container { id, host_bundle } => ("create", id.to_owned(), host_bundle),
            What::Process { container, process } => ("exec", container.to_string(), process),
        };
        command
            .args(["oci", verb, &socket.as_raw_fd().to_string()])
            .args([creation.bundle, creation.cgroup])
            .arg(name)
            .arg(extra)
            .env_clear()
            .stdin(creation.stdio.stdin)
            .stdout(creation.stdio.stdout)
            .stderr(creation.stdio.stderr);
        // SAFETY: the closure makes one system call, between fork and exec in the child. It owns the socket, whose number is
        // the same there.
        unsafe { command.pre_exec(move || Ok(fcntl_setfd(&socket, FdFlags::empty())?)) };
        let child = command.spawn().map_err(system("start the helper process"))?;
        // Before the reaper can run, which is a task of this thread.
        let end = reaper.register(child.id() as i32);
        let pid = Pid::from_child(&child);
        let pidfd = pidfd_open(pid, PidfdFlags::empty()).map_err(system("open the helper process"))?;
        Ok(Self { pidfd: Some(pidfd), end: Some(end) })
    }

    fn leave(mut self) {
        self.pidfd = None;
    }

    async fn end(mut self) -> Option<End> {
        let end = self.end.take()?.await.ok();
        self.pidfd = None;
        end
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        if let Some(pidfd) = &self.pidfd {
            let _ = pidfd_send_signal(pidfd, Signal::KILL);
        }
    }
}
