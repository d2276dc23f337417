//! podman.

use std::fs;
use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result};
use rustix::mount::{UnmountFlags, unmount};

use super::{Engine, prepare_network, remove_directories, remove_if_there};
use crate::fixture::Test;

/// A podman whose storage, network and containers belong to a test. Dropped, all of it is gone.
#[derive(Debug)]
pub struct Podman<'a> {
    test: &'a Test,
    dir: PathBuf,
}

impl Engine for Podman<'_> {
    const PROGRAM: &'static str = "podman";

    fn prepare(&self, command: &mut Command) {
        self.test.environment(command);
        command
            .env("HOME", &self.dir)
            .env("TMPDIR", &self.dir)
            .env("CONTAINERS_CONF", self.dir.join("containers.conf"))
            .env("CONTAINERS_STORAGE_CONF", self.dir.join("storage.conf"));
    }
}

impl<'a> Podman<'a> {
    /// One that has [`IMAGE`](super::IMAGE).
    ///
    /// # Errors
    /// When podman refuses.
    pub fn new(test: &'a Test) -> Result<Self> {
        prepare_network()?;
        let podman = Self { test, dir: test.scratch().join("podman") };
        fs::create_dir_all(&podman.dir)?;
        podman.configure()?;
        podman.import_image(&podman.dir)?;
        Ok(podman)
    }

    fn configure(&self) -> Result<()> {
        let (dir, kvrun) = (self.dir.display(), self.test.program().display());
        // Without systemd: cgroups by their files, logs by files.
        let containers = format!(
            "[containers]\nlog_driver = \"k8s-file\"\n\
             [network]\nnetwork_config_dir = \"{dir}/networks\"\n\
             [engine]\nruntime = \"kvrun\"\nruntime_supports_json = [\"kvrun\"]\ncgroup_manager = \"cgroupfs\"\n\
             events_logger = \"file\"\nenv = [\"TMPDIR={dir}\"]\n\
             [engine.runtimes]\nkvrun = [\"{kvrun}\"]\n"
        );
        fs::write(self.dir.join("containers.conf"), containers)?;
        let storage = format!(
            "[storage]\ndriver = \"overlay\"\ngraphroot = \"{dir}/storage\"\nrunroot = \"{dir}/run\"\n"
        );
        fs::write(self.dir.join("storage.conf"), storage).context("cannot write storage.conf")
    }

    /// A directory for the test's files.
    pub fn dir(&self) -> &std::path::Path {
        &self.dir
    }

    /// Removes all containers, and what podman itself keeps.
    ///
    /// # Errors
    /// When it cannot.
    pub fn end(self) -> Result<()> {
        self.say(&["pod", "rm", "--all", "--force", "--time", "0"])?;
        self.say(&["rm", "--all", "--force", "--time", "0"])?;
        self.say(&["system", "reset", "--force"])?;
        // What podman and its network program keep as long as the host runs. `/run/kvrun` must be empty.
        let _ = unmount("/run/netns", UnmountFlags::DETACH);
        remove_directories(&["/run/containers", "/run/libpod", "/run/lock", "/run/netns", "/run/podman"])?;
        remove_if_there(fs::remove_file("/dev/shm/libpod_lock"))?;
        remove_if_there(fs::remove_dir("/run/kvrun")).context("kvrun has left something in /run/kvrun")
    }
}
