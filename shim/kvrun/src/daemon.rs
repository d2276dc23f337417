//! A child that outlives its parent: it says how its beginning went, and its parent ends.
//!
//! The child is made by fork(2) of the command itself, so that it is the orphan of that command and not of a service: engines
//! make themselves the reaper of such orphans (`PR_SET_CHILD_SUBREAPER`), and wait for the process of the pid file.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;

use kvrun_pod::channel::AsyncChannel;
use kvrun_vmm_api::{Channel, ChannelError};
use nix::unistd::{ForkResult, fork};
use serde::{Deserialize, Serialize};

use crate::error::{Error, Failure, host};

/// What the child tells its parent, once.
#[derive(Debug, Serialize, Deserialize)]
enum Word {
    /// It is what it is meant to be, and stays.
    Ready,
    /// It cannot, and has ended.
    Failed(Failure),
}

/// Runs `child` in a child process, in a session of its own; returns in the parent, when the child is ready. What `child` returns is the
/// child's end. To be called while there is one thread.
pub(crate) fn start<F>(child: F) -> Result<(), Error>
where
    F: FnOnce(&Parent) -> Result<crate::attach::End, Error>,
{
    let (ours, theirs) = Channel::pair().map_err(|e| channel_error("make a socket pair", e))?;
    // SAFETY: there is one thread, so the child may do whatever this process may.
    match unsafe { fork() }.map_err(host("fork"))? {
        ForkResult::Parent { .. } => {
            drop(theirs);
            let word =
                ours.receive::<Word>().map_err(|e| channel_error("hear from the container's process", e))?;
            match word.map(|received| received.message) {
                Some(Word::Ready) => Ok(()),
                Some(Word::Failed(failure)) => Err(Error::Elsewhere(failure)),
                None => Err(host("start the container's process: it ended without a word")(io::Error::from(
                    io::ErrorKind::UnexpectedEof,
                ))),
            }
        }
        ForkResult::Child => {
            drop(ours);
            let parent = Parent(theirs);
            let result =
                rustix::process::setsid().map_err(host("make a session")).and_then(|_| child(&parent));
            match result {
                Ok(end) => end.take_on(),
                Err(error) => {
                    // If the parent is gone, so is whoever would want to know.
                    let _ = parent.0.send(&Word::Failed(error.to_failure()), &[]);
                    std::process::exit(error.code().into());
                }
            }
        }
    }
}

/// Whoever waits for the child to be ready.
#[derive(Debug)]
pub(crate) struct Parent(Channel);

impl Parent {
    /// Lets the parent end. Afterwards standard input, output and error are `/dev/null`: they are the container's alone.
    pub(crate) fn ready(&self) -> Result<(), Error> {
        let null =
            File::options().read(true).write(true).open("/dev/null").map_err(host("open /dev/null"))?;
        rustix::stdio::dup2_stdin(&null).map_err(host("replace standard input"))?;
        rustix::stdio::dup2_stdout(&null).map_err(host("replace standard output"))?;
        rustix::stdio::dup2_stderr(&null).map_err(host("replace standard error"))?;
        self.0.send(&Word::Ready, &[]).map_err(|e| channel_error("tell that the container is ready", e))
    }
}

/// An error of a socket between our own processes.
pub(crate) fn channel_error(step: &'static str, error: ChannelError) -> Error {
    Error::Host { step, source: io::Error::other(error) }
}

/// For `?` in the runtime.
pub(crate) fn async_channel(channel: Channel) -> Result<AsyncChannel, Error> {
    AsyncChannel::new(channel).map_err(host("watch a socket"))
}

/// Writes our process ID so that a reader sees all of it or nothing.
pub(crate) fn write_pid_file(path: &Path) -> Result<(), Error> {
    write_pid(path).map_err(|source| Error::PidFile { path: path.to_owned(), source })
}

fn write_pid(path: &Path) -> io::Result<()> {
    let mut name = std::ffi::OsString::from(".");
    name.push(path.file_name().ok_or(io::ErrorKind::InvalidInput)?);
    name.push(format!(".{}", std::process::id()));
    let temporary = path.with_file_name(name);
    let written = File::options()
        .write(true)
        .create_new(true)
        .open(&temporary)
        .and_then(|mut file| file.write_all(std::process::id().to_string().as_bytes()))
        .and_then(|()| std::fs::rename(&temporary, path));
    if written.is_err() {
        // It may not have been made.
        let _ = std::fs::remove_file(&temporary);
    }
    written
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn pid_file_holds_our_process_id_and_leaves_no_temporary() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pid");
        fs::write(&path, "older").unwrap();
        write_pid_file(&path).unwrap();
        assert_eq!(fs::read_to_string(&path).unwrap(), std::process::id().to_string());
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_pid_file(&dir.path().join("none/pid")).is_err());
    }
}
