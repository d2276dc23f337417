//! Standard input and output of a container: bytes copied between descriptors of the caller and streams of the guest.
//!
//! Each stream is its own vsock connection, which starts with a random token that tells the agent whose it is. The descriptors are the caller's
//! and shared with others (a terminal, a pipe, a file), so they are never made non-blocking, and each is served by a thread of its own
//! that may wait in read(2), write(2) or splice(2), by which output goes to a pipe without passing through this process. Buffers are
//! bounded: a reader that does not read stops the writer, as a pipe would.
//!
//! Ends:
//! * end-of-file on the caller's input closes the sending direction of its stream;
//! * the guest's end-of-file ends the copying of an output;
//! * an output whose reader is gone (`EPIPE`) closes its stream, by which the container learns of it;
//! * [`Copying::drain`] is called when the process has ended: the outputs have all of what was written by then, within
//!   a bound for a guest that never says so.

use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Shutdown;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use kvrun_agent_api::agent::Stdio as Tokens;
use kvrun_agent_api::{STREAM_PORT, TOKEN_LEN};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::pipe::{SpliceFlags, splice};
use rustix::rand::{GetRandomFlags, getrandom};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

use crate::vmm::{Vmm, VmmError};

/// How much is read at once, in bytes: as much as a pipe holds.
const BUFFER: usize = 64 * 1024;
/// The stack of a copying thread, in bytes. Its buffer is on the heap.
const STACK: usize = 64 * 1024;
/// How long an ended process's output may stay silent before we stop waiting for its end-of-file.
const DRAIN_SILENCE: Duration = Duration::from_secs(5);

/// What can go wrong before bytes flow.
#[derive(Debug, thiserror::Error)]
pub enum StdioError {
    /// The guest did not take the stream.
    #[error("connect {stream} to the guest")]
    Connect {
        /// `stdin`, `stdout` or `stderr`.
        stream: &'static str,
        /// Why.
        #[source]
        source: VmmError,
    },
    /// The host failed.
    #[error("set up the copying of {stream}")]
    Host {
        /// `stdin`, `stdout` or `stderr`.
        stream: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The caller's descriptors; `None` is `/dev/null` in the container. With a terminal there is no `stderr`.
#[derive(Debug, Default)]
pub struct Stdio {
    /// Read from.
    pub stdin: Option<OwnedFd>,
    /// Written to.
    pub stdout: Option<OwnedFd>,
    /// Written to.
    pub stderr: Option<OwnedFd>,
}

impl Stdio {
    /// Which of them are there.
    pub fn wanted(&self) -> Wanted {
        Wanted { stdin: self.stdin.is_some(), stdout: self.stdout.is_some(), stderr: self.stderr.is_some() }
    }
}

/// Which streams a process has; the others are `/dev/null`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wanted {
    /// Standard input.
    pub stdin: bool,
    /// Standard output; all output of a terminal.
    pub stdout: bool,
    /// Standard error; none with a terminal.
    pub stderr: bool,
}

/// The streams of a process, connected to the guest; those that are not wanted are not there.
#[derive(Debug)]
pub struct Streams(pub [Option<UnixStream>; 3]);

/// Streams that have a token each but are not connected yet.
#[derive(Debug)]
pub(crate) struct Planned {
    tokens: [u64; 3],
}

const NAMES: [&str; 3] = ["stdin", "stdout", "stderr"];

impl Planned {
    /// Gives each stream a token.
    pub(crate) fn new(wanted: Wanted) -> Result<Self, StdioError> {
        let mut tokens = [0; 3];
        let wanted = [wanted.stdin, wanted.stdout, wanted.stderr];
        for ((token, wanted), stream) in tokens.iter_mut().zip(wanted).zip(NAMES) {
            if wanted {
                *token = random_token().map_err(|source| StdioError::Host { stream, source })?;
            }
        }
        Ok(Self { tokens })
    }

    /// The tokens as the agent is told them.
    pub(crate) fn tokens(&self) -> Tokens {
        let [stdin_token, stdout_token, stderr_token] = self.tokens;
        Tokens { stdin_token, stdout_token, stderr_token, ..Default::default() }
    }

    /// Connects all streams, at the same time.
    pub(crate) async fn connect(self, vmm: &Vmm) -> Result<Streams, StdioError> {
        let [stdin, stdout, stderr] = NAMES.map(|name| {
            let index = NAMES.iter().position(|n| *n == name).unwrap_or_default();
            connect(vmm, name, self.tokens[index])
        });
        let (stdin, stdout, stderr) = tokio::try_join!(stdin, stdout, stderr)?;
        Ok(Streams([stdin, stdout, stderr]))
    }
}

async fn connect(vmm: &Vmm, name: &'static str, token: u64) -> Result<Option<UnixStream>, StdioError> {
    if token == 0 {
        return Ok(None);
    }
    let mut stream =
        vmm.connect(STREAM_PORT).await.map_err(|source| StdioError::Connect { stream: name, source })?;
    let header: [u8; TOKEN_LEN] = token.to_le_bytes();
    // The first bytes of an empty socket: they fit.
    stream.write_all(&header).map_err(|source| StdioError::Host { stream: name, source })?;
    Ok(Some(stream))
}

/// A number that is not 0 and that no container can guess.
fn random_token() -> io::Result<u64> {
    loop {
        let mut bytes = [0; 8];
        if getrandom(&mut bytes, GetRandomFlags::empty())? == bytes.len() && bytes != [0; 8] {
            return Ok(u64::from_le_bytes(bytes));
        }
    }
}

/// The threads that copy. Dropping it closes the streams and leaves behind no thread that does not wait for the caller's own
/// descriptors.
#[derive(Debug)]
pub struct Copying {
    /// Readable from the moment the process has ended.
    ended: Arc<OwnedFd>,
    streams: Vec<UnixStream>,
    outputs: Vec<oneshot::Receiver<()>>,
}

impl Copying {
    /// Starts to copy between the caller's descriptors and their streams.
    ///
    /// # Errors
    /// [`StdioError::Host`].
    pub fn start(stdio: Stdio, streams: Streams) -> Result<Self, StdioError> {
        let host = |stream, source: Errno| StdioError::Host { stream, source: source.into() };
        let ended =
            eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK).map_err(|e| host("streams", e))?;
        let mut copying = Self { ended: Arc::new(ended), streams: Vec::new(), outputs: Vec::new() };
        let fds = [stdio.stdin, stdio.stdout, stdio.stderr];
        for ((fd, stream), name) in fds.into_iter().zip(streams.0).zip(NAMES) {
            if let (Some(fd), Some(stream)) = (fd, stream) {
                copying
                    .add(name, File::from(fd), stream)
                    .map_err(|source| StdioError::Host { stream: name, source })?;
            }
        }
        Ok(copying)
    }

    fn add(&mut self, name: &'static str, file: File, stream: UnixStream) -> io::Result<()> {
        self.streams.push(stream.try_clone()?);
        let ended = Arc::clone(&self.ended);
        let thread = thread::Builder::new().name(name.to_owned()).stack_size(STACK);
        if name == "stdin" {
            thread.spawn(move || log_end(name, copy_input(file, stream, &ended)))?;
        } else {
            let (done, receiver) = oneshot::channel();
            thread.spawn(move || {
                log_end(name, copy_output(&stream, file, &ended));
                // Nobody may wait for it.
                let _ = done.send(());
            })?;
            self.outputs.push(receiver);
        }
        Ok(())
    }

    /// After the end of the process: waits until the outputs have all that was written. A guest that does not end a stream is
    /// given up after 5 s of silence; a reader of ours that does not read is waited for.
    pub async fn drain(mut self) {
        // Adding 1 to a counter of 0 neither blocks nor fails.
        let _ = rustix::io::write(&*self.ended, &1_u64.to_ne_bytes());
        for output in self.outputs.drain(..) {
            // An error is a thread that is gone, which is as good.
            let _ = output.await;
        }
    }
}

impl Drop for Copying {
    fn drop(&mut self) {
        let _ = rustix::io::write(&*self.ended, &1_u64.to_ne_bytes());
        for stream in &self.streams {
            // Wakes a thread that reads or writes it. It may be closed already.
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

fn log_end(name: &'static str, result: io::Result<()>) {
    if let Err(error) = result {
        tracing::debug!(stream = name, %error, "copying ended");
    }
}

/// Copies until end-of-file, the guest's loss of interest, or the end of the process.
fn copy_input(mut from: File, mut to: UnixStream, ended: &OwnedFd) -> io::Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        let mut fds = [
            PollFd::new(&from, PollFlags::IN),
            // Hang-up is always reported.
            PollFd::new(&to, PollFlags::empty()),
            PollFd::new(ended, PollFlags::IN),
        ];
        wait(&mut fds, None)?;
        if !fds[1].revents().is_empty() || !fds[2].revents().is_empty() {
            return Ok(());
        }
        match from.read(&mut buffer) {
            Ok(0) => break,
            Ok(n) => to.write_all(&buffer[..n])?,
            // A shared description may have been made non-blocking by another program; we wait in poll.
            Err(e) if matches!(e.kind(), io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock) => {}
            // Linux n_tty: EIO when the terminal is hung up. It is the end of the input, like any other failure to read.
            Err(e) => {
                to.shutdown(Shutdown::Write)?;
                return Err(e);
            }
        }
    }
    to.shutdown(Shutdown::Write)
}

/// Copies until the guest's end-of-file or our reader's loss of interest.
fn copy_output(from: &UnixStream, to: File, ended: &OwnedFd) -> io::Result<()> {
    let mut sink = Sink::new(to)?;
    let mut process_ended = false;
    loop {
        if process_ended {
            let mut fds = [PollFd::new(from, PollFlags::IN)];
            if wait(&mut fds, Some(DRAIN_SILENCE))? == 0 {
                return Err(io::ErrorKind::TimedOut.into());
            }
        } else {
            let mut fds = [PollFd::new(from, PollFlags::IN), PollFd::new(ended, PollFlags::IN)];
            wait(&mut fds, None)?;
            process_ended = !fds[1].revents().is_empty();
            if fds[0].revents().is_empty() {
                continue;
            }
        }
        match sink.take(from) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) => {
                // The container's next write finds out.
                let _ = from.shutdown(Shutdown::Both);
                return Err(error);
            }
        }
    }
}

/// Where output goes.
enum Sink {
    /// A pipe or FIFO: bytes go to it within the kernel.
    Pipe(File),
    /// Anything else, with a buffer.
    Other(File, Vec<u8>),
}

impl Sink {
    fn new(to: File) -> io::Result<Self> {
        Ok(if to.metadata()?.file_type().is_fifo() {
            Self::Pipe(to)
        } else {
            Self::Other(to, vec![0; BUFFER])
        })
    }

    /// Hands over some of what there is, and waits for it if need be: how much; 0 at the end of the stream.
    fn take(&mut self, mut from: &UnixStream) -> io::Result<usize> {
        match self {
            Self::Pipe(to) => loop {
                match splice(from, None, &*to, None, BUFFER, SpliceFlags::empty()) {
                    Err(Errno::INTR) => {}
                    // Another program may have made the pipe non-blocking.
                    Err(Errno::AGAIN) => drop(wait(&mut [PollFd::new(&*to, PollFlags::OUT)], None)?),
                    result => return Ok(result?),
                }
            },
            Self::Other(to, buffer) => {
                let count = loop {
                    match from.read(buffer) {
                        Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                        result => break result?,
                    }
                };
                write_all(to, &buffer[..count])?;
                Ok(count)
            }
        }
    }
}

/// As [`Write::write_all`], for a description that another program may have made non-blocking.
fn write_all(to: &mut File, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match to.write(bytes) {
            Ok(0) => return Err(io::ErrorKind::WriteZero.into()),
            Ok(n) => bytes = &bytes[n..],
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                wait(&mut [PollFd::new(&to.as_fd(), PollFlags::OUT)], None)?;
            }
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// poll(2), again when interrupted; how many descriptors are ready.
fn wait(fds: &mut [PollFd<'_>], bound: Option<Duration>) -> io::Result<usize> {
    let bound = bound.and_then(|b| Timespec::try_from(b).ok());
    loop {
        match poll(fds, bound.as_ref()) {
            Ok(ready) => return Ok(ready),
            Err(Errno::INTR) => {}
            Err(e) => return Err(e.into()),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Seek, SeekFrom};

    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
    }

    fn output() -> (Copying, UnixStream, io::PipeReader) {
        let (reader, writer) = io::pipe().unwrap();
        let (ours, guest) = UnixStream::pair().unwrap();
        let stdio = Stdio { stdout: Some(writer.into()), ..Stdio::default() };
        let copying = Copying::start(stdio, Streams([None, Some(ours), None])).unwrap();
        (copying, guest, reader)
    }

    fn input(from: OwnedFd) -> (Copying, UnixStream) {
        let (ours, guest) = UnixStream::pair().unwrap();
        let stdio = Stdio { stdin: Some(from), ..Stdio::default() };
        (Copying::start(stdio, Streams([Some(ours), None, None])).unwrap(), guest)
    }

    #[test]
    fn regular_file_as_input_arrives_whole_and_ends() {
        let mut file = tempfile::tempfile().unwrap();
        let bytes: Vec<u8> = (0..300_000_u32).map(|i| (i % 251) as u8).collect();
        file.write_all(&bytes).unwrap();
        file.seek(SeekFrom::Start(0)).unwrap();
        let (_copying, mut guest) = input(file.into());
        let mut got = Vec::new();
        guest.read_to_end(&mut got).unwrap();
        assert!(got == bytes);
    }

    #[test]
    fn output_arrives_whole_before_drain_returns() {
        let (copying, mut guest, mut reader) = output();
        let writer = thread::spawn(move || {
            for _ in 0..100 {
                guest.write_all(&[7; 10_000]).unwrap();
            }
        });
        let read = thread::spawn(move || {
            let mut got = Vec::new();
            reader.read_to_end(&mut got).unwrap();
            got.len()
        });
        runtime().block_on(copying.drain());
        writer.join().unwrap();
        assert_eq!(read.join().unwrap(), 1_000_000);
    }

    #[test]
    fn reader_that_goes_away_closes_the_guests_stream() {
        let (_copying, mut guest, reader) = output();
        drop(reader);
        guest.write_all(b"x").unwrap();
        // The other end is closed: end-of-file, or reset because of what was not read.
        assert!(matches!(guest.read(&mut [0]), Ok(0) | Err(_)));
        assert!((0..100).any(|_| guest.write_all(&[0; 4096]).is_err()));
    }

    #[test]
    fn input_thread_ends_when_the_guest_loses_interest() {
        let (reader, writer) = io::pipe().unwrap();
        let (_copying, guest) = input(reader.into());
        drop(guest);
        // With the thread, the only reading end of the pipe is gone.
        let mut fds = [PollFd::new(&writer, PollFlags::empty())];
        wait(&mut fds, Some(Duration::from_secs(60))).unwrap();
        assert!(fds[0].revents().contains(PollFlags::ERR));
    }

    #[test]
    fn dropping_ends_threads_that_wait_for_the_guest() {
        let (copying, _guest, mut reader) = output();
        drop(copying);
        let mut got = Vec::new();
        // The thread held the only writing end.
        reader.read_to_end(&mut got).unwrap();
        assert!(got.is_empty());
    }

    #[test]
    fn tokens_are_only_for_streams_that_are_there() {
        let planned = Planned::new(Wanted { stdin: false, stdout: true, stderr: true }).unwrap();
        let tokens = planned.tokens();
        assert_eq!(tokens.stdin_token, 0);
        assert_ne!(tokens.stdout_token, 0);
        assert_ne!(tokens.stdout_token, tokens.stderr_token);
    }
}
