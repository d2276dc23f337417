//! The command line's end of a connection to a monitor.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use kvrun_pod::container_id::ContainerId;
use kvrun_pod::record::{Record, Status};
use kvrun_pod::state_dir::{self, SOCKET, StateError};
use kvrun_pod::stdio::{Streams, Wanted};
use kvrun_vmm_api::{Channel, ChannelError, Received};
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use serde::de::DeserializeOwned;

use super::protocol::{Answer, Call, Request, unpack};
use crate::attach::{Attended, End};
use crate::daemon::{async_channel, channel_error};
use crate::error::{Error, host};

/// How long a monitor may take over a request: longer than the guest has for it, hooks included.
pub(crate) const PATIENCE: Duration = Duration::from_secs(660);

/// A container as its state directory has it.
#[derive(Debug)]
pub(crate) struct Known {
    /// What is written down.
    pub(crate) record: Record,
    dir: OwnedFd,
}

impl Known {
    /// Looks it up.
    pub(crate) fn find(root: &Path, id: &ContainerId) -> Result<Option<Self>, Error> {
        let Some(dir) = state_dir::look(root, id)? else { return Ok(None) };
        let path = root.join(id.as_str());
        let read = Record::read(dir.as_fd());
        let record = read.map_err(|source| StateError::Io { step: "read the record in", path, source })?;
        Ok(record.map(|record| Self { record, dir }))
    }

    /// Looks it up; there must be one.
    pub(crate) fn get(root: &Path, id: &str) -> Result<Self, Error> {
        let id: ContainerId = id.parse()?;
        Self::find(root, &id)?.ok_or_else(|| StateError::Unknown { id }.into())
    }

    /// Its ID.
    pub(crate) fn id(&self) -> &ContainerId {
        &self.record.id
    }

    /// The state directory of its machine: its own, or that of the container whose machine it is in.
    pub(crate) fn machine(self, root: &Path) -> Result<OwnedFd, Error> {
        Ok(self.sandbox(root)?.unwrap_or(self.dir))
    }

    fn sandbox(&self, root: &Path) -> Result<Option<OwnedFd>, Error> {
        Ok(match &self.record.sandbox {
            Some(sandbox) => state_dir::look(root, sandbox)?,
            None => None,
        })
    }

    /// Connects to its monitor, which gets `patience` for each message.
    pub(crate) fn connect(&self, root: &Path, patience: Duration) -> Result<Connection, Error> {
        let id = self.id().clone();
        let other = self.sandbox(root)?;
        let dir = other.as_ref().unwrap_or(&self.dir);
        let path = state_dir::socket_path(dir.as_fd(), SOCKET);
        let channel = connect_to(&path, patience).map_err(|e| match e {
            // Nobody listens: there is no monitor yet, or none any more.
            Errno::CONNREFUSED | Errno::NOENT => self.not_served(),
            e => Error::Silent { id: id.clone(), source: e.into() },
        })?;
        Ok(Connection { id, channel })
    }

    fn not_served(&self) -> Error {
        let id = self.id().clone();
        match self.record.status() {
            Status::Creating => Error::WrongState { what: "use", id, status: Status::Creating },
            _ => Error::NotRunning { id, status: Status::Stopped },
        }
    }
}

fn connect_to(path: &str, patience: Duration) -> Result<Channel, Errno> {
    let socket = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Recv, Some(patience))?;
    // Also bounds connect(2) when the backlog is full (Linux net/unix/af_unix.c, unix_wait_for_peer).
    set_socket_timeout(&socket, Timeout::Send, Some(patience))?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket.into())
}

/// A connection.
#[derive(Debug)]
pub(crate) struct Connection {
    id: ContainerId,
    channel: Channel,
}

impl Connection {
    /// The same connection, for another container of the machine.
    pub(crate) fn about(self, id: &ContainerId) -> Self {
        Self { id: id.clone(), channel: self.channel }
    }

    /// Asks, and waits for the answer.
    pub(crate) fn ask(&self, request: Request, fds: &[BorrowedFd<'_>]) -> Result<Received<Answer>, Error> {
        let call = Call { id: self.id.clone(), request };
        self.channel.send(&call, fds).map_err(|e| self.error(e))?;
        let answer = self.channel.receive::<Answer>().map_err(|e| self.error(e))?;
        match answer {
            // The monitor ended while it was asked.
            None => Err(Error::NotRunning { id: self.id.clone(), status: Status::Stopped }),
            Some(Received { message: Answer::Failed(failure), .. }) => Err(Error::Elsewhere(failure)),
            Some(answer) => Ok(answer),
        }
    }

    /// Asks for something to be done.
    pub(crate) fn tell(&self, request: Request) -> Result<(), Error> {
        self.ask(request, &[]).map(drop)
    }

    /// Asks for data.
    pub(crate) fn fetch<T: DeserializeOwned>(&self, request: Request) -> Result<T, Error> {
        let answer = self.ask(request, &[])?;
        unpack(answer.fds).map_err(|source| Error::Silent { id: self.id.clone(), source })
    }

    /// Asks for a process; the connection then stands for it. Must be called in a tokio runtime.
    pub(crate) fn attach(
        self,
        request: Request,
        fds: &[BorrowedFd<'_>],
        wanted: Wanted,
    ) -> Result<(Remote, Streams), Error> {
        let answer = self.ask(request, fds)?;
        let mut fds = answer.fds.into_iter();
        let mut next = |wanted: bool| if wanted { fds.next().map(UnixStream::from) } else { None };
        let streams = Streams([next(wanted.stdin), next(wanted.stdout), next(wanted.stderr)]);
        // From here on there is no hurry.
        set_socket_timeout(self.channel.as_fd(), Timeout::Recv, None).map_err(host("use a socket"))?;
        let remote = Remote { id: self.id, channel: async_channel(self.channel)? };
        Ok((remote, streams))
    }

    fn error(&self, error: ChannelError) -> Error {
        match error {
            ChannelError::Socket(Errno::PIPE | Errno::CONNRESET) => {
                Error::NotRunning { id: self.id.clone(), status: Status::Stopped }
            }
            ChannelError::Socket(e) => Error::Silent { id: self.id.clone(), source: e.into() },
            e => channel_error("talk to the process that serves the container", e),
        }
    }
}

/// A process in a machine that another process of ours serves.
#[derive(Debug)]
pub(crate) struct Remote {
    id: ContainerId,
    channel: kvrun_pod::channel::AsyncChannel,
}

impl Remote {
    async fn say(&self, request: Request) {
        let call = Call { id: self.id.clone(), request };
        if let Err(error) = self.channel.send(&call, &[]).await {
            tracing::debug!(%error, "talk to the process that serves the container");
        }
    }
}

impl Attended for Remote {
    async fn wait(&self) -> End {
        loop {
            match self.channel.receive::<Answer>().await {
                Ok(Some(Received { message: Answer::Ended(end), .. })) => return end,
                Ok(Some(_)) => {}
                Ok(None) | Err(_) => return End::lost(),
            }
        }
    }

    async fn signal(&self, signal: i32) {
        self.say(Request::Signal { signal }).await;
    }

    async fn resize(&self, rows: u16, columns: u16) {
        self.say(Request::Resize { rows, columns }).await;
    }
}
