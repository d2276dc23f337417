//! The host's side of a stream: the same program for both machines.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::thread::{self, JoinHandle};

use anyhow::{Result, ensure};
use kvrun_bench::{Job, Stream, copy};
use rustix::net::{Shutdown, shutdown};

/// Bytes of a write and of a read.
const CHUNK: usize = 256 * 1024;

/// Helps the guest with a job, on a thread of its own.
pub(super) fn start(job: &Job, stream: OwnedFd) -> JoinHandle<Result<()>> {
    let job = job.clone();
    thread::spawn(move || {
        let stream = File::from(stream);
        match job {
            Job::Send(work) => read(stream, work),
            Job::Receive(work) => write(stream, work),
            Job::PingPong(work) => echo(stream, work),
            other => anyhow::bail!("{other:?} takes no stream"),
        }
    })
}

fn read(mut stream: File, work: Stream) -> Result<()> {
    let mut chunk = vec![0; CHUNK];
    let received = copy::read(&mut stream, &mut chunk)?;
    ensure!(received == work.bytes, "received {received} of {} bytes", work.bytes);
    Ok(stream.write_all(&[0])?)
}

fn write(mut stream: File, work: Stream) -> Result<()> {
    let chunk = vec![0x5a; CHUNK];
    stream.read_exact(&mut [0])?;
    copy::write(&mut stream, work.bytes, &chunk)?;
    shutdown(&stream, Shutdown::Write)?;
    // Closed by the guest first: nothing is thrown away on the way.
    ensure!(stream.read(&mut [0])? == 0, "the guest sent too much");
    Ok(())
}

fn echo(mut stream: File, work: Stream) -> Result<()> {
    let mut byte = [0];
    for _ in 0..work.bytes {
        stream.read_exact(&mut byte)?;
        stream.write_all(&byte)?;
    }
    Ok(())
}
