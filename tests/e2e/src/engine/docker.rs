//! docker.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;

use super::{IMAGE, image_archive, output, prepare_network, remove_directories};
use crate::containerd::{remove_state, search_path};
use crate::fixture::Test;
use crate::process::{Outcome, Running};
use crate::terminal::{Terminal, on_terminal};

/// A docker daemon with its own containerd, both of a test, and its command line.
#[derive(Debug)]
pub struct Docker<'a> {
    test: &'a Test,
    dir: PathBuf,
    daemon: Running,
    containerd: Running,
}

impl<'a> Docker<'a> {
    /// One that has [`IMAGE`].
    ///
    /// # Errors
    /// When it does not come up.
    pub fn new(test: &'a Test) -> Result<Self> {
        prepare_network()?;
        let dir = test.scratch().join("docker");
        fs::create_dir_all(&dir)?;
        let config = json!({
            "runtimes": {"kvrun": {"path": test.program()}},
            "default-runtime": "kvrun",
            "data-root": dir.join("data"),
            "exec-root": dir.join("exec"),
            "pidfile": dir.join("docker.pid"),
            "hosts": [format!("unix://{}", dir.join("docker.sock").display())],
            "containerd": dir.join("containerd.sock"),
            "exec-opts": ["native.cgroupdriver=cgroupfs"],
            "cgroup-parent": format!("/{}", test.id()),
            "features": {"buildkit": false},
            "shutdown-timeout": 5,
        });
        let containerd = containerd(test, &dir)?;
        let path = dir.join("daemon.json");
        fs::write(&path, config.to_string())?;
        let mut command = Command::new("dockerd");
        test.environment(&mut command);
        command.arg("--config-file").arg(&path);
        let daemon = Running::start(&mut command)?.without_input();
        daemon.stderr.until("API listen on").with_context(|| format!("dockerd: {:?}", daemon.stderr))?;
        let docker = Self { test, dir, daemon, containerd };
        let archive = image_archive(&docker.dir)?;
        let status = docker.command(&["import", "-", IMAGE]).stdin(archive).stdout(Stdio::null()).status()?;
        ensure!(status.success(), "docker import: {status}");
        Ok(docker)
    }

    /// A docker command.
    pub fn command(&self, args: &[&str]) -> Command {
        let mut command = Command::new("docker");
        self.environment(&mut command);
        command.args(args);
        command
    }

    fn environment(&self, command: &mut Command) {
        self.test.environment(command);
        command
            .env("HOME", &self.dir)
            .env("DOCKER_HOST", format!("unix://{}", self.dir.join("docker.sock").display()));
    }

    /// What a command becomes.
    ///
    /// # Errors
    /// When it cannot be started, or does not end in time.
    pub fn invoke(&self, args: &[&str]) -> Result<Outcome> {
        self.start(args)?.without_input().wait()
    }

    /// What a command says that must succeed.
    ///
    /// # Errors
    /// When it does not.
    pub fn say(&self, args: &[&str]) -> Result<String> {
        output(self.command(args))
    }

    /// A command with its streams on pipes.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start(&self, args: &[&str]) -> Result<Running> {
        Running::start(&mut self.command(args))
    }

    /// A command on a terminal.
    ///
    /// # Errors
    /// When it cannot be started.
    pub fn start_on(&self, terminal: &Terminal, args: &[&str]) -> Result<Running> {
        let mut command = on_terminal("docker");
        self.environment(&mut command);
        command.args(args);
        terminal.attach(command)
    }

    /// A directory for the test's files.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// What the daemon has said so far.
    pub fn log(&self) -> String {
        self.daemon.stderr.text()
    }

    /// Removes all containers and ends the daemon.
    ///
    /// # Errors
    /// When it cannot.
    pub fn end(self) -> Result<()> {
        let all = self.say(&["ps", "--all", "--quiet"])?;
        for id in all.lines() {
            self.say(&["rm", "--force", id])?;
        }
        self.daemon.signal(Signal::TERM)?;
        self.daemon.wait()?.exited(0);
        self.containerd.signal(Signal::TERM)?;
        self.containerd.wait()?.exited(0);
        remove_state("moby")?;
        remove_directories(&["/run/containerd", "/run/docker"])
    }
}

/// Plugins of containerd that docker has no use for: each costs time at the start.
const UNUSED: [&str; 10] = [
    "io.containerd.cri.v1.images",
    "io.containerd.cri.v1.runtime",
    "io.containerd.grpc.v1.cri",
    "io.containerd.internal.v1.tracing",
    "io.containerd.nri.v1.nri",
    "io.containerd.snapshotter.v1.blockfile",
    "io.containerd.snapshotter.v1.btrfs",
    "io.containerd.snapshotter.v1.devmapper",
    "io.containerd.snapshotter.v1.zfs",
    "io.containerd.tracing.processor.v1.otlp",
];

/// The daemon starts one itself if it is told of none, but gives that 15 s, which the lab does not always keep.
fn containerd(test: &Test, dir: &Path) -> Result<Running> {
    let (path, here) = (dir.join("containerd.toml"), dir.display());
    let config = format!(
        "version = 3\nroot = \"{here}/containerd\"\nstate = \"{here}/containerd-state\"\n\
         disabled_plugins = {UNUSED:?}\n[grpc]\naddress = \"{here}/containerd.sock\"\n"
    );
    fs::write(&path, config)?;
    let mut command = Command::new("containerd");
    test.environment(&mut command);
    command.env("PATH", search_path(test)).arg("--config").arg(&path);
    let containerd = Running::start(&mut command)?.without_input();
    containerd
        .stderr
        .until("successfully booted")
        .with_context(|| format!("containerd: {:?}", containerd.stderr))?;
    Ok(containerd)
}
