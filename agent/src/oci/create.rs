//! The agent's end of the helper.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use tokio::sync::oneshot;

use super::{REPORT_MAX, Report};
use crate::descriptor::Descriptor;
use crate::path::of_fd;
use crate::reaper::{End, Reaper};
use crate::stdio::ProcessEnds;

/// Why a container could not be created or started. The text of the first three is for the user.
#[derive(Debug, thiserror::Error)]
pub enum OciError {
    /// The program to run does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The program to run cannot be executed.
    #[error("{0}")]
    NotExecutable(String),
    /// libcontainer's error.
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
    /// Where libcontainer keeps its state.
    pub state_root: &'a Path,
    /// The directory with `config.json`.
    pub bundle: &'a Path,
    /// The container's ID.
    pub id: &'a str,
    /// Whether libcontainer makes a terminal.
    pub terminal: bool,
    /// The container's descriptors 0, 1 and 2.
    pub stdio: ProcessEnds,
}

/// A container whose process waits for the start.
#[derive(Debug)]
pub struct Created {
    /// The process.
    pub pid: i32,
    /// The process; stays valid when the number is used again.
    pub pidfd: OwnedFd,
    /// Its end.
    pub end: oneshot::Receiver<End>,
    /// Starts it.
    pub gate: StartGate,
}

/// Creates a container. Dropping the future kills the helper; what it has started by then is in the container's cgroup.
///
/// # Errors
///
/// [`OciError`].
pub async fn create(creation: Creation<'_>, reaper: &Reaper) -> Result<Created, OciError> {
    let (ours, theirs) = socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
        .map_err(system("make a socket pair"))?;
    let mut reports = Reports::new(ours)?;
    let state_dir = creation.state_root.join(creation.id);
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
                return Ok(Created { pid, pidfd, end, gate: StartGate { reports, state_dir } });
            }
            Some(Report::Failed(text)) => return Err(reports.failure(text)),
            Some(_) => {}
            None => return Err(OciError::HelperDied(helper.end().await)),
        }
    }
}

/// Starts the user's program of a created container.
#[derive(Debug)]
pub struct StartGate {
    reports: Reports,
    state_dir: PathBuf,
}

impl StartGate {
    /// Completes when the program runs, or the process has ended.
    ///
    /// # Errors
    ///
    /// [`OciError`]: it cannot be executed, or a hook failed. The process ends by itself then.
    pub async fn start(mut self) -> Result<(), OciError> {
        // The state directory's path with the socket's may be longer than a socket address takes.
        let dir =
            openat(CWD, &self.state_dir, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
                .map_err(system("open the container's state"))?;
        let socket = of_fd(&dir).join(libcontainer::notify_socket::NOTIFY_FILE);
        // The other end reads until end-of-file, and takes any bytes for the start. Neither call blocks: the listener's
        // backlog is empty.
        let mut stream = UnixStream::connect(socket).map_err(system("reach the container's process"))?;
        io::Write::write_all(&mut stream, b"start").map_err(system("start the container's process"))?;
        drop(stream);
        while self.reports.next().await?.is_some() {}
        match (self.reports.reason.take(), self.reports.detail.take()) {
            (Some(reason), _) => Err(reason),
            (None, Some(detail)) => Err(OciError::Failed(detail)),
            (None, None) => Ok(()),
        }
    }
}

/// Receives reports, and keeps the first of each kind.
#[derive(Debug)]
struct Reports {
    socket: Descriptor,
    reason: Option<OciError>,
    detail: Option<String>,
}

impl Reports {
    fn new(socket: OwnedFd) -> Result<Self, OciError> {
        let socket = Descriptor::new(socket).map_err(system("watch the helper's socket"))?;
        Ok(Self { socket, reason: None, detail: None })
    }

    /// `None`: nobody is left who could send one.
    async fn next(&mut self) -> Result<Option<Report>, OciError> {
        let mut buf = Vec::with_capacity(REPORT_MAX);
        let n = self.socket.read(&mut buf).await.map_err(system("read the helper's report"))?;
        if n == 0 {
            return Ok(None);
        }
        let report = serde_json::from_slice(&buf).map_err(system("understand the helper's report"))?;
        match &report {
            Report::NotFound(text) => {
                self.reason.get_or_insert_with(|| OciError::NotFound(text.clone()));
            }
            Report::NotExecutable(text) => {
                self.reason.get_or_insert_with(|| OciError::NotExecutable(text.clone()));
            }
            // The first is the deepest.
            Report::Detail(text) => {
                self.detail.get_or_insert_with(|| text.clone());
            }
            Report::Created { .. } | Report::Failed(_) => {}
        }
        Ok(Some(report))
    }

    async fn answer(&self) -> Result<(), OciError> {
        self.socket.write_all(b"1", |_| ()).await.map_err(system("answer the helper"))
    }

    fn failure(&mut self, text: String) -> OciError {
        match (self.reason.take(), self.detail.take()) {
            (Some(reason), _) => reason,
            (None, Some(detail)) if !text.contains(&detail) => OciError::Failed(format!("{text} ({detail})")),
            (None, _) => OciError::Failed(text),
        }
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
        command
            .args(["oci", "create", &socket.as_raw_fd().to_string()])
            .args([creation.state_root, creation.bundle])
            .args([creation.id, if creation.terminal { "1" } else { "0" }])
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
