//! One test: its directories, its container ID, and how it starts `kvrun`.

use std::ffi::OsStr;
use std::fs;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Instant;

use anyhow::{Context, Result};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::bundle::Bundle;
use crate::leaks;
use crate::process::{Outcome, Running};

/// The name of the VMM's process.
pub(crate) const VMM: &str = "kvrun-vmm";

/// What a test has.
#[derive(Debug)]
pub struct Test {
    id: String,
    dir: PathBuf,
    kvrun: PathBuf,
    next_bundle: AtomicUsize,
}

impl Test {
    /// One with such a container ID, in [isolation](crate::isolation).
    ///
    /// # Errors
    /// When its directories cannot be made.
    pub fn new(id: String, kvrun: PathBuf) -> Result<Self> {
        let test = Self { dir: Path::new("/tmp").join(&id), id, kvrun, next_bundle: AtomicUsize::new(0) };
        for dir in [test.state(), test.temporary(), test.bundles(), test.scratch()] {
            fs::create_dir_all(&dir).with_context(|| format!("cannot make {}", dir.display()))?;
        }
        Ok(test)
    }

    /// The container ID of this test; further containers append to it.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The program under test.
    pub fn program(&self) -> &Path {
        &self.kvrun
    }

    /// Where `kvrun` is installed.
    pub fn prefix(&self) -> &Path {
        self.kvrun.ancestors().nth(2).unwrap_or(Path::new("/"))
    }

    /// `--root` of `kvrun`.
    pub fn state(&self) -> PathBuf {
        self.dir.join("state")
    }

    /// `TMPDIR` of `kvrun`.
    pub fn temporary(&self) -> PathBuf {
        self.dir.join("tmp")
    }

    /// Where the bundles are.
    pub fn bundles(&self) -> PathBuf {
        self.dir.join("bundles")
    }

    /// A directory for the test's own files.
    pub fn scratch(&self) -> PathBuf {
        self.dir.join("scratch")
    }

    /// A bundle that runs a command.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn bundle(&self, args: &[&str]) -> Result<Bundle> {
        let number = self.next_bundle.fetch_add(1, Ordering::Relaxed);
        Bundle::create(&self.bundles().join(number.to_string()), args)
    }

    /// A bundle that runs a shell script as PID 1.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn script(&self, script: &str) -> Result<Bundle> {
        self.bundle(&["/bin/sh", "-c", script])
    }

    /// `kvrun --root STATE` with arguments.
    pub fn kvrun<S: AsRef<OsStr>>(&self, args: impl IntoIterator<Item = S>) -> Command {
        let mut command = Command::new(&self.kvrun);
        command.arg("--root").arg(self.state()).args(args);
        self.environment(&mut command);
        command
    }

    /// The environment of `kvrun`: only what is named here, so that no setting of the caller changes a test.
    pub fn environment(&self, command: &mut Command) {
        command.env_clear().env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin").env("TMPDIR", self.temporary());
    }

    /// The arguments that run a bundle.
    pub fn run_args<'a>(&'a self, bundle: &'a Bundle) -> [&'a OsStr; 4] {
        ["run".as_ref(), "--bundle".as_ref(), bundle.path().as_os_str(), self.id.as_ref()]
    }

    /// Runs a bundle to its end, without input.
    ///
    /// # Errors
    /// When `kvrun` cannot be started or does not end in time.
    pub fn run(&self, bundle: &Bundle) -> Result<Outcome> {
        self.start(bundle)?.without_input().wait()
    }

    /// Runs any `kvrun` command to its end, without input.
    ///
    /// # Errors
    /// When `kvrun` cannot be started or does not end in time.
    pub fn invoke(&self, args: &[&str]) -> Result<Outcome> {
        Running::start(&mut self.kvrun(args))?.without_input().wait()
    }

    /// Starts a bundle with its streams on pipes.
    ///
    /// # Errors
    /// When `kvrun` cannot be started.
    pub fn start(&self, bundle: &Bundle) -> Result<Running> {
        Running::start(&mut self.kvrun(self.run_args(bundle)))
    }

    /// Waits until a run has started its VMM, which is long before anything runs in the container.
    ///
    /// # Errors
    /// When that does not happen in time.
    pub fn until_vmm(&self, run: &Running) -> Result<()> {
        while self.vmms().is_err() {
            // Nothing tells of a new process but the table of processes.
            anyhow::ensure!(Instant::now() < run.deadline(), "no VMM: stderr {:?}", run.stderr);
            thread::yield_now();
        }
        Ok(())
    }

    /// Handles of all VMM processes of this test, with their process IDs.
    ///
    /// # Errors
    /// When there is none.
    pub fn vmms(&self) -> Result<Vec<(i32, OwnedFd)>> {
        self.processes(VMM)
    }

    /// Handles of all processes of this test with such a name, with their process IDs. Linux cuts a name after 15 bytes.
    ///
    /// # Errors
    /// When there is none.
    pub fn processes(&self, wanted: &str) -> Result<Vec<(i32, OwnedFd)>> {
        let mut found = Vec::new();
        for (pid, name) in leaks::running()? {
            if name == wanted {
                let handle = Pid::from_raw(pid).context("no process ID")?;
                match pidfd_open(handle, PidfdFlags::empty()) {
                    Ok(process) => found.push((pid, process)),
                    // It has ended meanwhile, as the helper of a VMM does that jails itself.
                    Err(Errno::SRCH) => {}
                    Err(error) => return Err(error.into()),
                }
            }
        }
        anyhow::ensure!(!found.is_empty(), "no process is named {wanted}");
        Ok(found)
    }
}
