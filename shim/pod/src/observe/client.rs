//! The command line's end of a pod's socket.

use std::io::{self, Read, Write};
use std::os::fd::AsFd;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use super::Page;
use crate::state_dir::{POD_SOCKET, socket_path};
use crate::text;

/// How long the engine may be silent: longer than the guest has to answer it.
const PATIENCE: Duration = Duration::from_secs(60);
/// The longest answer in bytes.
const MAX_ANSWER: u64 = 16 * 1024 * 1024;

/// Why something of a pod cannot be seen.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// Nobody answers on its socket.
    #[error("its machine does not run")]
    NotRunning,
    /// The socket failed.
    #[error("ask the process that serves it")]
    Socket(#[source] io::Error),
    /// The engine says no.
    #[error("{0}")]
    Refused(String),
}

/// Asks the pod that has this state directory.
///
/// # Errors
/// [`FetchError`].
pub fn fetch(dir: impl AsFd, page: Page) -> Result<String, FetchError> {
    let path = socket_path(dir.as_fd(), POD_SOCKET);
    let stream = UnixStream::connect(path).map_err(|error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => FetchError::NotRunning,
        _ => FetchError::Socket(error),
    })?;
    let answer = converse(&stream, page).map_err(FetchError::Socket)?;
    let garbled = || FetchError::Socket(io::ErrorKind::InvalidData.into());
    let (head, body) = answer.split_once("\r\n\r\n").ok_or_else(garbled)?;
    let status = head.lines().next().and_then(|line| line.split(' ').nth(1)).ok_or_else(garbled)?;
    if status != "200" {
        return Err(FetchError::Refused(text::one_line(body, 4096)));
    }
    Ok(body.to_owned())
}

fn converse(mut stream: &UnixStream, page: Page) -> io::Result<String> {
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_write_timeout(Some(PATIENCE))?;
    write!(stream, "GET {} HTTP/1.0\r\n\r\n", page.path())?;
    let mut answer = String::new();
    stream.take(MAX_ANSWER).read_to_string(&mut answer)?;
    if answer.is_empty() {
        // The engine ended while it was asked.
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(answer)
}
