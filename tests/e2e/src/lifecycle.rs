//! Containers that are created and started by commands of their own, as engines do it.

use std::fs::{self, File};
use std::path::PathBuf;
use std::process::{Command, ExitStatus, Stdio};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, pidfd_open, pidfd_send_signal, waitpid};
use serde_json::Value;

use crate::bundle::Bundle;
use crate::fixture::Test;
use crate::process::{self, Outcome};
use crate::time;

/// A process that a command has left behind, and that its reaper, which is the test, waits for.
#[derive(Debug)]
pub struct Left {
    pid: Pid,
    handle: std::os::fd::OwnedFd,
    output: PathBuf,
}

impl Test {
    /// `kvrun create` of a bundle; its process stays.
    ///
    /// # Errors
    /// When it fails.
    pub fn create(&self, bundle: &Bundle) -> Result<Left> {
        self.create_as(self.id(), bundle)
    }

    /// As [`Test::create`], with another ID, which starts with that of the test.
    ///
    /// # Errors
    /// When it fails.
    pub fn create_as(&self, id: &str, bundle: &Bundle) -> Result<Left> {
        let path = bundle.path().to_str().context("a path of ASCII")?;
        self.leave(&["create", "--bundle", path], id)
    }

    /// Runs a command that takes `--pid-file` and an ID, and leaves a process behind. `args` end before the ID.
    ///
    /// # Errors
    /// When it fails.
    pub fn leave(&self, args: &[&str], id: &str) -> Result<Left> {
        self.leave_with(args, id, &[])
    }

    /// As [`Test::leave`], with more arguments after the ID.
    ///
    /// # Errors
    /// When it fails.
    pub fn leave_with(&self, args: &[&str], id: &str, more: &[&str]) -> Result<Left> {
        let name = format!("{id}-{}", next_number());
        let pid_file = self.scratch().join(format!("{name}.pid"));
        let output = self.scratch().join(format!("{name}.out"));
        let errors = self.scratch().join(format!("{name}.err"));
        let mut command = self.kvrun(args);
        command.arg("--pid-file").arg(&pid_file).arg(id).args(more);
        let status = run(&mut command, &output, &errors)?;
        ensure!(status.success(), "{args:?}: {status}: {}", fs::read_to_string(&errors)?);
        let pid: i32 = fs::read_to_string(&pid_file)?.parse().context("no number in the pid file")?;
        let pid = Pid::from_raw(pid).context("no process ID")?;
        let handle =
            pidfd_open(pid, PidfdFlags::empty()).context("the process of the pid file is not there")?;
        Ok(Left { pid, handle, output })
    }

    /// The state document of this test's container.
    ///
    /// # Errors
    /// When there is none.
    pub fn state_document(&self) -> Result<Value> {
        let outcome = self.invoke(&["state", self.id()])?;
        ensure!(outcome.status.success(), "state: {outcome}");
        Ok(serde_json::from_slice(&outcome.stdout)?)
    }

    /// The status of this test's container.
    ///
    /// # Errors
    /// When there is none.
    pub fn status(&self) -> Result<String> {
        Ok(self.state_document()?["status"].as_str().context("no status")?.to_owned())
    }

    /// Runs a command about this test's container that must succeed, in silence.
    ///
    /// # Errors
    /// When it cannot be run.
    #[track_caller]
    pub fn command(&self, name: &str) -> Result<Outcome> {
        Ok(self.invoke(&[name, self.id()])?.exited(0).stdout("").stderr(""))
    }
}

/// A number to tell files apart.
fn next_number() -> u64 {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

/// Runs a command to its end whose output may go on after it.
fn run(command: &mut Command, output: &std::path::Path, errors: &std::path::Path) -> Result<ExitStatus> {
    command.stdin(Stdio::null()).stdout(File::create(output)?).stderr(File::create(errors)?);
    let mut child = command.spawn().with_context(|| format!("cannot start {command:?}"))?;
    process::wait_within(&mut child, time::scaled(time::RUN))
        .with_context(|| format!("{command:?} does not end: {:?}", fs::read_to_string(errors)))
}

impl Left {
    /// Its process ID.
    pub fn pid(&self) -> i32 {
        self.pid.as_raw_nonzero().get()
    }

    /// Sends it a signal.
    ///
    /// # Errors
    /// When it has ended.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(pidfd_send_signal(&self.handle, signal)?)
    }

    /// What was written to its standard output so far.
    ///
    /// # Errors
    /// When it cannot be read.
    pub fn text(&self) -> Result<String> {
        Ok(fs::read_to_string(&self.output)?)
    }

    /// Waits until its standard output contains `text`.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn until(&self, text: &str) -> Result<()> {
        let deadline = Instant::now() + time::scaled(time::RUN);
        while !self.text()?.contains(text) {
            ensure!(Instant::now() < deadline, "{text:?} did not come: {:?}", self.text()?);
            // Nothing tells of a file that grows but the file.
            thread::yield_now();
        }
        Ok(())
    }

    /// Waits for its end, as its reaper: the exit code, or 1000 and the signal.
    ///
    /// # Errors
    /// When it does not end in time.
    pub fn end(&self) -> Result<i32> {
        process::gone_within(&self.handle, time::scaled(time::RUN))?;
        let (_, status) = waitpid(Some(self.pid), WaitOptions::empty())?.context("it was not our child")?;
        let code = status.exit_status();
        code.or(status.terminating_signal().map(|signal| 1000 + signal)).context("no end")
    }
}
