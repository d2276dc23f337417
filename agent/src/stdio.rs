//! The standard streams of a process: pipes or a pty on its side, vsock streams on the other, and the pumps between.
//!
//! A process never gets the vsock socket itself: `/dev/stdout` must be openable, and sockets are not.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::fs::{Gid, Uid, fchown};
use rustix::net::Shutdown;
use rustix::pipe::{PipeFlags, fcntl_getpipe_size, pipe_with};
use tokio::sync::watch;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::timeout;

use crate::descriptor::Descriptor;

/// One read's size, and a pipe's default capacity. Only pages that data has reached cost memory.
const BUFFER: usize = 64 * 1024;
/// Most that a pty holds between slave and master: the flip buffers (`TTYB_DEFAULT_MEM_LIMIT` of Linux 6.12
/// `drivers/tty/tty_buffer.c`, 64 KiB) and the line discipline's read buffer.
const PTY_CAPACITY: usize = 128 * 1024;
/// How long the end of a process is held back for its output, which somebody may take slowly, or not at all. The output itself stays
/// on its way.
const HELD_BACK: Duration = Duration::from_secs(1);

/// What the process gets as descriptors 0, 1 and 2.
#[derive(Debug)]
pub struct ProcessEnds {
    /// Standard input.
    pub stdin: OwnedFd,
    /// Standard output.
    pub stdout: OwnedFd,
    /// Standard error.
    pub stderr: OwnedFd,
}

/// The agent's ends, each with the stream it belongs to.
#[derive(Debug, Default)]
pub struct AgentEnds {
    /// From the engine to the process.
    pub input: Option<(Descriptor, Arc<Descriptor>)>,
    /// From the process to the engine.
    pub outputs: Vec<(Arc<Descriptor>, Descriptor)>,
}

/// The engine's streams for one process. `None`: the process gets `/dev/null`.
#[derive(Debug, Default)]
pub struct EngineStreams {
    /// Standard input.
    pub stdin: Option<Descriptor>,
    /// Standard output; all output of a terminal.
    pub stdout: Option<Descriptor>,
    /// Standard error; `None` with a terminal.
    pub stderr: Option<Descriptor>,
}

/// Makes a pipe for each stream. `owner`, in the guest's numbers, may open them again through `/proc/self/fd`, as
/// `/dev/stdout` does.
///
/// # Errors
///
/// Out of descriptors.
pub fn pipes(streams: EngineStreams, owner: (u32, u32)) -> io::Result<(ProcessEnds, AgentEnds)> {
    let mut agent = AgentEnds::default();
    let stdin = match streams.stdin {
        None => null()?,
        Some(stream) => {
            let (read, write) = owned_pipe(owner)?;
            agent.input = Some((stream, Arc::new(Descriptor::new(write)?)));
            read
        }
    };
    let mut output = |stream: Option<Descriptor>| match stream {
        None => null(),
        Some(stream) => {
            let (read, write) = owned_pipe(owner)?;
            agent.outputs.push((Arc::new(Descriptor::new(read)?), stream));
            Ok(write)
        }
    };
    let stdout = output(streams.stdout)?;
    let stderr = output(streams.stderr)?;
    Ok((ProcessEnds { stdin, stdout, stderr }, agent))
}

/// The ends before a terminal exists: the process makes it inside the container and connects itself to it.
///
/// # Errors
///
/// Out of descriptors.
pub fn null_ends() -> io::Result<ProcessEnds> {
    Ok(ProcessEnds { stdin: null()?, stdout: null()?, stderr: null()? })
}

/// Connects the engine's streams to the master of a terminal.
#[must_use]
pub fn terminal(streams: EngineStreams, master: &Arc<Descriptor>) -> AgentEnds {
    AgentEnds {
        input: streams.stdin.map(|stream| (stream, master.clone())),
        outputs: streams.stdout.map(|stream| (master.clone(), stream)).into_iter().collect(),
    }
}

fn null() -> io::Result<OwnedFd> {
    Ok(File::options().read(true).write(true).open("/dev/null")?.into())
}

fn owned_pipe((uid, gid): (u32, u32)) -> io::Result<(OwnedFd, OwnedFd)> {
    let (read, write) = pipe_with(PipeFlags::CLOEXEC)?;
    // Both ends are one inode.
    fchown(&read, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    Ok((read, write))
}

/// The running pumps of one process.
#[derive(Debug)]
pub struct Pumps {
    input: Option<AbortHandle>,
    outputs: JoinSet<()>,
    ended: watch::Sender<bool>,
}

impl Pumps {
    /// Starts to pump.
    #[must_use]
    pub fn start(ends: AgentEnds) -> Self {
        let (ended, _) = watch::channel(false);
        let input = ends.input.map(|(stream, sink)| tokio::spawn(pump_in(stream, sink)).abort_handle());
        let mut outputs = JoinSet::new();
        for (source, stream) in ends.outputs {
            outputs.spawn(pump_out(source, stream, ended.subscribe()));
        }
        Self { input, outputs, ended }
    }

    /// To be called when the process has been reaped: completes when all it wrote is handed over and the streams' ends are
    /// marked. If that takes longer than [`HELD_BACK`] it completes too, and the rest follows as the engine takes it.
    pub async fn finish(mut self) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
        self.ended.send_replace(true);
        let all = async { while self.outputs.join_next().await.is_some() {} };
        let _ = timeout(HELD_BACK, all).await;
        self.outputs.detach_all();
    }
}

impl Drop for Pumps {
    /// Without [`Pumps::finish`], the process was never started or the container is gone: nothing is left to hand over.
    fn drop(&mut self) {
        if let Some(input) = self.input.take() {
            input.abort();
        }
    }
}

/// Engine to process, until the engine ends the stream or the process no longer reads.
async fn pump_in(stream: Descriptor, sink: Arc<Descriptor>) {
    let mut buf = Vec::with_capacity(BUFFER);
    loop {
        buf.clear();
        match stream.read(&mut buf).await {
            // Dropping the sink closes a pipe: end-of-file. A terminal has no end-of-file but what its user types.
            Ok(0) | Err(_) => return,
            Ok(_) => {}
        }
        if sink.write_all(&buf).await.is_err() {
            // The process has closed its input. The engine learns it when it writes more.
            stream.shutdown(Shutdown::Both);
            return;
        }
    }
}

/// Process to engine, until everybody has closed the pipe (a pty says EIO then), or the process has ended and what it left in
/// the pipe is taken. A child of the process that lives on and writes does not hold that up.
async fn pump_out(source: Arc<Descriptor>, stream: Descriptor, mut ended: watch::Receiver<bool>) {
    let mut buf = Vec::with_capacity(BUFFER);
    let draining = loop {
        buf.clear();
        tokio::select! {
            biased;
            // A dropped sender: as after the end.
            _ = ended.wait_for(|ended| *ended) => break true,
            result = source.read(&mut buf) => match result {
                Ok(0) | Err(_) => break false,
                Ok(_) => {}
            },
        }
        if stream.write_all(&buf).await.is_err() {
            // The engine has closed the stream. Dropping the source tells the process: SIGPIPE, or EIO on a terminal.
            return;
        }
    };
    if draining {
        // As much as can have been in there when the process ended, and no more than there is.
        let mut left = fcntl_getpipe_size(source.as_fd()).unwrap_or(PTY_CAPACITY);
        while left > 0 {
            buf.clear();
            match source.try_read(&mut buf) {
                Ok(0) | Err(_) => break,
                Ok(n) => left = left.saturating_sub(n),
            }
            if stream.write_all(&buf).await.is_err() {
                return;
            }
        }
    }
    stream.shutdown(Shutdown::Write);
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::fs::MetadataExt;
    use std::os::unix::net::UnixStream;

    use super::*;

    fn stream() -> (UnixStream, Option<Descriptor>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        (ours, Some(Descriptor::new(theirs.into()).unwrap()))
    }

    fn read_to_end(mut stream: UnixStream) -> Vec<u8> {
        let mut bytes = Vec::new();
        stream.set_nonblocking(false).unwrap();
        stream.read_to_end(&mut bytes).unwrap();
        bytes
    }

    #[tokio::test]
    async fn what_a_process_wrote_before_its_end_is_handed_over_although_the_pipe_stays_open() {
        let (engine, stdout) = stream();
        let (process, agent) = pipes(EngineStreams { stdout, ..Default::default() }, (0, 0)).unwrap();
        let mut pipe = File::from(process.stdout);
        // A full pipe, before the pump has had its first turn.
        pipe.write_all(&[7; BUFFER]).unwrap();
        Pumps::start(agent).finish().await;
        assert_eq!(read_to_end(engine), [7; BUFFER]);
        assert_eq!(pipe.write(b"x").unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test(start_paused = true)]
    async fn an_engine_that_reads_nothing_holds_the_end_up_for_a_bounded_time_and_loses_nothing() {
        const SIZE: usize = 1 << 20;
        let (engine, stdout) = stream();
        let (process, agent) = pipes(EngineStreams { stdout, ..Default::default() }, (0, 0)).unwrap();
        rustix::pipe::fcntl_setpipe_size(&process.stdout, SIZE).unwrap();
        File::from(process.stdout).write_all(&vec![9; SIZE]).unwrap();
        let before = tokio::time::Instant::now();
        Pumps::start(agent).finish().await;
        assert!(before.elapsed() <= 2 * HELD_BACK, "{:?}", before.elapsed());
        let read = tokio::task::spawn_blocking(move || read_to_end(engine)).await.unwrap();
        assert_eq!(read.len(), SIZE);
    }

    #[tokio::test]
    async fn the_end_of_stdin_closes_the_pipe_and_a_reader_that_leaves_closes_the_stream() {
        let (mut engine, stdin) = stream();
        let (process, agent) = pipes(EngineStreams { stdin, ..Default::default() }, (0, 0)).unwrap();
        let pumps = Pumps::start(agent);
        engine.write_all(b"all").unwrap();
        engine.shutdown(std::net::Shutdown::Write).unwrap();
        let mut pipe = File::from(process.stdin);
        let text = tokio::task::spawn_blocking(move || {
            let mut text = String::new();
            pipe.read_to_string(&mut text).map(|_| text)
        });
        assert_eq!(text.await.unwrap().unwrap(), "all");
        pumps.finish().await;

        let (mut engine, stdin) = stream();
        let (process, agent) = pipes(EngineStreams { stdin, ..Default::default() }, (0, 0)).unwrap();
        let _pumps = Pumps::start(agent);
        drop(process);
        engine.write_all(b"to nobody").unwrap();
        assert_eq!(tokio::task::spawn_blocking(move || read_to_end(engine)).await.unwrap(), b"");
    }

    #[tokio::test]
    async fn a_closed_engine_stream_is_a_broken_pipe_to_the_process() {
        let (engine, stdout) = stream();
        let (process, agent) = pipes(EngineStreams { stdout, ..Default::default() }, (0, 0)).unwrap();
        let _pumps = Pumps::start(agent);
        drop(engine);
        let mut pipe = File::from(process.stdout);
        let error = tokio::task::spawn_blocking(move || {
            loop {
                if let Err(err) = pipe.write_all(b"line") {
                    return err;
                }
            }
        });
        assert_eq!(error.await.unwrap().kind(), io::ErrorKind::BrokenPipe);
    }

    #[tokio::test]
    async fn pipes_belong_to_the_user_and_absent_streams_are_dev_null() {
        let (_engine, stdin) = stream();
        let (process, agent) = pipes(EngineStreams { stdin, ..Default::default() }, (1000, 1001)).unwrap();
        let metadata = File::from(process.stdin).metadata().unwrap();
        assert_eq!((metadata.uid(), metadata.gid()), (1000, 1001));
        let null = std::fs::metadata("/dev/null").unwrap().rdev();
        assert_eq!(File::from(process.stdout).metadata().unwrap().rdev(), null);
        assert!(agent.outputs.is_empty());
    }
}
