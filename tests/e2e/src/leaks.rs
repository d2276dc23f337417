//! What must be the same before and after a test.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use rustix::process::{WaitOptions, wait};

use crate::fixture::Test;
use crate::isolation::FRESH;

/// Where cgroup v2 is mounted.
const CGROUPS: &str = "/sys/fs/cgroup";

/// Everything a container can leave on its host, one line each.
#[derive(Debug)]
pub struct Snapshot(BTreeSet<String>);

impl Snapshot {
    /// Looks at the host as this test sees it.
    ///
    /// # Errors
    /// When something cannot be looked at.
    pub fn take(test: &Test) -> Result<Self> {
        let mut found = BTreeSet::new();
        processes(&mut found)?;
        mounts(&mut found)?;
        sockets(&mut found)?;
        cgroups(Path::new(CGROUPS), test.id(), &mut found)?;
        for (dir, _) in FRESH {
            files(Path::new(dir), test, &mut found)?;
        }
        Ok(Self(found))
    }

    /// What is new since an earlier one.
    pub fn since(&self, before: &Self) -> Vec<String> {
        self.0.difference(&before.0).cloned().collect()
    }
}

/// All processes of this PID namespace but its first, which is the test.
fn processes(found: &mut BTreeSet<String>) -> Result<()> {
    // Orphans that have ended wait for us, their new parent.
    while let Ok(Some(_)) = wait(WaitOptions::NOHANG) {}
    for (pid, name) in running()? {
        found.insert(format!("process {pid} {name}"));
    }
    Ok(())
}

/// Process ID and name of every process of the test but itself.
pub(crate) fn running() -> Result<Vec<(i32, String)>> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").context("cannot read /proc")? {
        let Some(pid) = entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()) else {
            continue;
        };
        if pid.unsigned_abs() == std::process::id() {
            continue;
        }
        // It may end meanwhile, and one that has ended may still wait for its parent.
        let state = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
        let ended = state.rsplit_once(')').is_none_or(|(_, rest)| rest.starts_with(" Z"));
        if let Ok(name) = fs::read_to_string(format!("/proc/{pid}/comm"))
            && !ended
        {
            found.push((pid, name.trim_end().to_owned()));
        }
    }
    Ok(found)
}

fn mounts(found: &mut BTreeSet<String>) -> Result<()> {
    let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read mounts")?;
    found.extend(table.lines().map(|line| format!("mount {line}")));
    Ok(())
}

fn sockets(found: &mut BTreeSet<String>) -> Result<()> {
    let table = fs::read_to_string("/proc/net/unix").context("cannot read Unix sockets")?;
    // unix(7) of procfs: Num RefCount Protocol Flags Type St Inode [Path]; the first ones change with use.
    for line in table.lines().skip(1) {
        let identity: Vec<&str> = line.split_whitespace().skip(6).collect();
        found.insert(format!("unix socket {}", identity.join(" ")));
    }
    Ok(())
}

fn cgroups(dir: &Path, id: &str, found: &mut BTreeSet<String>) -> Result<()> {
    for path in subdirectories(dir)? {
        if path.to_string_lossy().contains(id) {
            found.insert(format!("cgroup {}", path.display()));
        }
        cgroups(&path, id, found)?;
    }
    Ok(())
}

/// Directories come and go with the tests beside this one: one that is gone has none below it.
fn subdirectories(dir: &Path) -> Result<Vec<PathBuf>> {
    let list = || -> io::Result<Vec<PathBuf>> {
        let mut found = Vec::new();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                found.push(entry.path());
            }
        }
        Ok(found)
    };
    match list() {
        Err(error)
            if error.kind() == io::ErrorKind::NotFound
                || error.raw_os_error() == Some(rustix::io::Errno::NODEV.raw_os_error()) =>
        {
            Ok(Vec::new())
        }
        other => other.with_context(|| format!("cannot list {}", dir.display())),
    }
}

/// Everything below a directory, except what the test itself makes there: scratch files, and in its bundles their
/// `config.json` and `rootfs`.
fn files(dir: &Path, test: &Test, found: &mut BTreeSet<String>) -> Result<()> {
    for entry in fs::read_dir(dir).with_context(|| format!("cannot list {}", dir.display()))? {
        let path = entry?.path();
        let in_bundle = path.parent().and_then(Path::parent) == Some(&test.bundles());
        if path == test.scratch() || in_bundle && (path.ends_with("config.json") || path.ends_with("rootfs"))
        {
            continue;
        }
        // The bundles themselves are the test's.
        if path.parent() != Some(&test.bundles()) {
            found.insert(format!("file {}", path.display()));
        }
        if path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
            files(&path, test, found)?;
        }
    }
    Ok(())
}
