//! A running `kvrun`, and what became of it. Every wait has a bound and says, when it is over, what was seen until then.

use std::fmt;
use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, ChildStdin, Command, ExitStatus, Stdio};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open};

use crate::time;

/// Waits until a process has ended: its pidfd reads as ready.
///
/// # Errors
/// When it has not within `limit`.
pub fn gone_within(process: impl AsFd, limit: Duration) -> Result<()> {
    let timeout = Timespec::try_from(limit)?;
    let mut fds = [PollFd::new(&process, PollFlags::IN)];
    if poll(&mut fds, Some(&timeout))? == 0 {
        bail!("the process did not end within {limit:?}");
    }
    Ok(())
}

/// Waits for a child.
///
/// # Errors
/// When it has not ended within `limit`; it still runs then.
pub fn wait_within(child: &mut Child, limit: Duration) -> Result<ExitStatus> {
    gone_within(pidfd_open(Pid::from_child(child), PidfdFlags::empty())?, limit)?;
    Ok(child.wait()?)
}

/// A stream that is read to its end in the background.
#[derive(Clone)]
pub struct Captured(Arc<(Mutex<Seen>, Condvar)>);

#[derive(Default)]
struct Seen {
    bytes: Vec<u8>,
    ended: bool,
}

impl Captured {
    /// Starts to read. An error counts as the end: a terminal ends with one (`EIO`).
    pub fn new(mut stream: impl Read + Send + 'static) -> Self {
        let captured = Self(Arc::default());
        let writer = captured.clone();
        thread::spawn(move || {
            let mut buffer = vec![0; 64 * 1024];
            loop {
                let length = stream.read(&mut buffer).unwrap_or(0);
                let mut seen = writer.lock();
                seen.bytes.extend_from_slice(&buffer[..length]);
                seen.ended = length == 0;
                writer.0.1.notify_all();
                if length == 0 {
                    return;
                }
            }
        });
        captured
    }

    fn lock(&self) -> MutexGuard<'_, Seen> {
        self.0.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until `text` was read.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn until(&self, text: &str) -> Result<()> {
        self.wait(Some(text), Instant::now() + time::scaled(time::RUN))
    }

    /// What was read so far.
    pub fn bytes(&self) -> Vec<u8> {
        self.lock().bytes.clone()
    }

    /// What was read so far, as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.lock().bytes).into_owned()
    }

    /// Waits until `text` was read, or the stream is at its end.
    pub(crate) fn wait(&self, text: Option<&str>, deadline: Instant) -> Result<()> {
        let left = deadline.saturating_duration_since(Instant::now());
        let arrived = |seen: &Seen| {
            text.is_some_and(|text| seen.bytes.windows(text.len()).any(|window| window == text.as_bytes()))
        };
        let waited = self.0.1.wait_timeout_while(self.lock(), left, |seen| !arrived(seen) && !seen.ended);
        let (seen, _) = waited.unwrap_or_else(PoisonError::into_inner);
        match text {
            Some(text) if !arrived(&seen) => bail!("{text:?} did not come (end of stream: {})", seen.ended),
            None if !seen.ended => bail!("the stream did not end"),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Captured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}", self.text())
    }
}

/// A running `kvrun`. Dropped, it is killed.
#[derive(Debug)]
pub struct Running {
    child: Child,
    deadline: Instant,
    /// Its standard input, until it is closed.
    pub stdin: Option<ChildStdin>,
    /// Its standard output; empty when the test has taken it elsewhere.
    pub stdout: Captured,
    /// Its standard error.
    pub stderr: Captured,
}

impl Running {
    /// Starts a command with all streams on pipes.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(command: &mut Command) -> Result<Self> {
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
        let stdout = Captured::new(child.stdout.take().context("no stdout")?);
        let stderr = Captured::new(child.stderr.take().context("no stderr")?);
        let stdin = child.stdin.take();
        Ok(Self { child, deadline: Instant::now() + time::scaled(time::RUN), stdin, stdout, stderr })
    }

    /// A child that was started otherwise; `stdout` and `stderr` are what is to be seen of it.
    pub fn adopt(child: Child, stdout: Captured, stderr: Captured) -> Self {
        Self { child, deadline: Instant::now() + time::scaled(time::RUN), stdin: None, stdout, stderr }
    }

    /// Closes its standard input.
    #[must_use]
    pub fn without_input(mut self) -> Self {
        self.stdin = None;
        self
    }

    /// Waits until its standard output contains `text`.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn until(&self, text: &str) -> Result<()> {
        let waited = self.stdout.wait(Some(text), self.deadline);
        waited.with_context(|| format!("stdout {:?}, stderr {:?}", self.stdout, self.stderr))
    }

    /// Sends a signal to `kvrun` itself.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).context("cannot send a signal to kvrun")
    }

    /// Kills it.
    ///
    /// # Errors
    /// When it does not end.
    pub fn kill(&mut self) -> Result<()> {
        self.child.kill()?;
        self.exit_status().map(drop)
    }

    /// The same, which may take as long again from now on.
    #[must_use]
    pub fn anew(mut self) -> Self {
        self.deadline = Instant::now() + time::scaled(time::RUN);
        self
    }

    /// When it must have ended.
    pub fn deadline(&self) -> Instant {
        self.deadline
    }

    /// Waits for its end and that of its streams.
    ///
    /// # Errors
    /// When that takes too long; it is killed then.
    pub fn wait(mut self) -> Result<Outcome> {
        let status = self.exit_status()?;
        for stream in [&self.stdout, &self.stderr] {
            stream
                .wait(None, self.deadline)
                .with_context(|| self.seen("kvrun has ended, but a stream is held open"))?;
        }
        Ok(Outcome { status, stdout: self.stdout.bytes(), stderr: self.stderr.text() })
    }

    fn exit_status(&mut self) -> Result<ExitStatus> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        wait_within(&mut self.child, left).with_context(|| self.seen("kvrun does not end"))
    }

    fn seen(&self, what: &str) -> String {
        format!("{what}; stdout {:?}, stderr {:?}", self.stdout, self.stderr)
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // Both fail when it has ended and was waited for.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// What became of a `kvrun`. Its checks panic with all that was seen.
#[derive(Debug)]
pub struct Outcome {
    /// How it ended.
    pub status: ExitStatus,
    /// All it wrote to standard output.
    pub stdout: Vec<u8>,
    /// All it wrote to standard error.
    pub stderr: String,
}

impl Outcome {
    /// Standard output as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// It exited with this code.
    #[track_caller]
    pub fn exited(self, code: i32) -> Self {
        assert!(self.status.code() == Some(code), "exit code {code} expected: {self}");
        self
    }

    /// It exited with a code other than 0.
    #[track_caller]
    pub fn failed(self) -> Self {
        assert!(self.status.code().is_some_and(|code| code != 0), "failure expected: {self}");
        self
    }

    /// It wrote exactly this to standard output.
    #[track_caller]
    pub fn stdout(self, text: &str) -> Self {
        assert!(self.stdout == text.as_bytes(), "stdout {text:?} expected: {self}");
        self
    }

    /// It wrote exactly this to standard error.
    #[track_caller]
    pub fn stderr(self, text: &str) -> Self {
        assert!(self.stderr == text, "stderr {text:?} expected: {self}");
        self
    }

    /// It wrote one line to standard error, an error of `kvrun` that contains all of `words`.
    #[track_caller]
    pub fn error(self, words: &[&str]) -> Self {
        assert!(self.stderr.lines().count() == 1, "one line of error expected: {self}");
        self.report(words)
    }

    /// Standard error starts with a line of `kvrun` that contains all of `words`; more may follow, such as the console.
    #[track_caller]
    pub fn report(self, words: &[&str]) -> Self {
        let first = self.stderr.lines().next().unwrap_or_default();
        assert!(
            first.starts_with("kvrun: "),
            "a line that starts with \"kvrun: \" expected on stderr: {self}"
        );
        for word in words {
            let found = first.to_lowercase().contains(&word.to_lowercase());
            assert!(found, "an error that names {word:?} expected: {self}");
        }
        self
    }
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.status.code(), self.status.signal()) {
            (Some(code), _) => write!(f, "kvrun exited with {code}")?,
            (None, signal) => write!(f, "kvrun was killed by signal {}", signal.unwrap_or(0))?,
        }
        write!(f, "\n--- stdout\n{}\n--- stderr\n{}", self.text(), self.stderr)
    }
}
