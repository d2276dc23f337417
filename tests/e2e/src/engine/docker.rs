//! docker.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};
use rustix::process::Signal;
use serde_json::json;

use super::{Engine, prepare_network, remove_directories};
use crate::containerd::{self, remove_state};
use crate::fixture::Test;
use crate::process::Running;

/// A docker daemon with its own containerd, both of a test, and its command line.
#[derive(Debug)]
pub struct Docker<'a> {
    test: &'a Test,
    dir: PathBuf,
    daemon: Running,
    containerd: Running,
}

impl Engine for Docker<'_> {
    const PROGRAM: &'static str = "docker";

    fn prepare(&self, command: &mut Command) {
        self.test.environment(command);
        command
            .env("HOME", &self.dir)
            .env("DOCKER_HOST", format!("unix://{}", self.dir.join("docker.sock").display()));
    }
}

impl<'a> Docker<'a> {
    /// One that has [`IMAGE`](super::IMAGE).
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
        docker.import_image(&docker.dir)?;
        Ok(docker)
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

/// Plugins of containerd that only docker has no use for.
const UNUSED: [&str; 2] = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.blockfile"];

/// The daemon starts one itself if it is told of none, but gives that 15 s, which the lab does not always keep.
fn containerd(test: &Test, dir: &Path) -> Result<Running> {
    let (path, here) = (dir.join("containerd.toml"), dir.display());
    let disabled = [&containerd::UNUSED[..], &containerd::CRI, &UNUSED].concat();
    let config = format!(
        "version = 3\nroot = \"{here}/containerd\"\nstate = \"{here}/containerd-state\"\n\
         disabled_plugins = {disabled:?}\n[grpc]\naddress = \"{here}/containerd.sock\"\n"
    );
    fs::write(&path, config)?;
    containerd::start(test, &containerd::INSTALLED, &path)
}
