//! The command line's end of a pod's debug socket.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;

use kvrun_vmm_api::{ChannelError, Received};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};

use super::{Answer, Ended, Request, Terminal};
use crate::channel::AsyncChannel;
use crate::state_dir::{DEBUG_SOCKET, POD_SOCKET, socket_path};
use crate::stdio::Stdio;

/// Why no program runs in a guest.
#[derive(Debug, thiserror::Error)]
pub enum DebugError {
    /// Nobody answers for it.
    #[error("its machine does not run")]
    NotRunning,
    /// The machine was made without.
    #[error("debugging was off when it was made: set debug.root in the configuration, and make it anew")]
    Off,
    /// The socket failed.
    #[error("ask the process that serves it")]
    Channel(#[from] ChannelError),
    /// The engine says no.
    #[error("{0}")]
    Refused(String),
}

impl From<Errno> for DebugError {
    fn from(error: Errno) -> Self {
        Self::Channel(error.into())
    }
}

/// A program that runs in a guest. Dropped before its end, it is killed.
#[derive(Debug)]
pub struct Client(AsyncChannel);

impl Client {
    /// Has a program run in the machine that has this state directory: with these streams, and a terminal, if it is told of one. Must be called in a tokio
    /// runtime.
    ///
    /// # Errors
    /// [`DebugError`].
    pub async fn run(
        dir: impl AsFd,
        args: Vec<String>,
        terminal: Option<Terminal>,
        stdio: Stdio,
    ) -> Result<Self, DebugError> {
        let channel = AsyncChannel::of_socket(open(dir.as_fd())?)?;
        let streams = stdio.wanted();
        let fds: Vec<OwnedFd> = [stdio.stdin, stdio.stdout, stdio.stderr].into_iter().flatten().collect();
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        channel.send(&Request::Run { args, terminal, streams }, &fds).await?;
        match channel.receive().await? {
            Some(Received { message: Answer::Running, .. }) => Ok(Self(channel)),
            Some(Received { message: Answer::Failed(why), .. }) => Err(DebugError::Refused(why)),
            Some(Received { message: Answer::Ended(_), .. }) | None => Err(DebugError::NotRunning),
        }
    }

    /// Waits for its end, by when all its output has been written. Cancel-safe.
    pub async fn wait(&self) -> Ended {
        loop {
            match self.0.receive().await {
                Ok(Some(Received { message: Answer::Ended(ended), .. })) => return ended,
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return Ended::VmDied("the process that served it is gone".to_owned()),
            }
        }
    }

    /// Sends it a signal. It may have ended.
    pub async fn signal(&self, signal: i32) {
        self.say(&Request::Signal(signal)).await;
    }

    /// Sets the size of its terminal.
    pub async fn resize(&self, rows: u16, columns: u16) {
        self.say(&Request::Resize { rows, columns }).await;
    }

    async fn say(&self, request: &Request) {
        if let Err(error) = self.0.send(request, &[]).await {
            // What is wrong is told by the end.
            tracing::debug!(%error, "talk to the process that serves the pod");
        }
    }
}

fn open(dir: BorrowedFd<'_>) -> Result<OwnedFd, DebugError> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    match connect(&socket, &SocketAddrUnix::new(socket_path(dir, DEBUG_SOCKET))?) {
        Ok(()) => Ok(socket),
        Err(Errno::NOENT) if UnixStream::connect(socket_path(dir, POD_SOCKET)).is_ok() => {
            Err(DebugError::Off)
        }
        Err(Errno::NOENT | Errno::CONNREFUSED) => Err(DebugError::NotRunning),
        Err(error) => Err(error.into()),
    }
}
