//! The cgroup of a container: where it is, who is in it, how it ends. The helper makes it, sets its [`limits`] and its
//! [`device_filter`]; the agent kills and removes it. cgroup v2 only (Linux 6.12 `Documentation/admin-guide/cgroup-v2.rst`).

use std::fs;
use std::io;
use std::path::{Component, Path, PathBuf};

use rustix::process::{Pid, Signal};

use self::event_file::EventFile;

pub mod device_filter;
pub mod event_file;
pub mod freeze;
pub mod limits;
pub mod stats;

/// Where the hierarchy is mounted.
pub const ROOT: &str = "/sys/fs/cgroup";
const MEMORY_EVENTS: &str = "memory.events";

/// Why a `linux.cgroupsPath` is refused.
#[derive(Debug, thiserror::Error)]
#[error("linux.cgroupsPath {0:?} must name a cgroup below the root, without '..'")]
pub struct CgroupPathError(PathBuf);

/// A container's cgroup.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    /// Relative to [`ROOT`].
    path: PathBuf,
}

impl Cgroup {
    /// The cgroup for `linux.cgroupsPath`, which is taken below the guest's root whether it starts with '/' or not;
    /// without it, `kvrun/ID`.
    ///
    /// # Errors
    ///
    /// [`CgroupPathError`].
    pub fn from_spec(cgroups_path: Option<&Path>, id: &str) -> Result<Self, CgroupPathError> {
        let Some(given) = cgroups_path.filter(|path| !path.as_os_str().is_empty()) else {
            return Ok(Self { path: Path::new("kvrun").join(id) });
        };
        let mut path = PathBuf::new();
        for component in given.components() {
            match component {
                Component::RootDir | Component::CurDir => {}
                Component::Normal(name) => path.push(name),
                Component::ParentDir | Component::Prefix(_) => return Err(CgroupPathError(given.to_owned())),
            }
        }
        if path.as_os_str().is_empty() {
            return Err(CgroupPathError(given.to_owned()));
        }
        Ok(Self { path })
    }

    /// Where it is, relative to [`ROOT`].
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether one is the other, or below it: then killing one would kill the other.
    #[must_use]
    pub fn overlaps(&self, other: &Self) -> bool {
        self.path.starts_with(&other.path) || other.path.starts_with(&self.path)
    }

    /// Kills every process in it and below. Nothing to kill is no error.
    ///
    /// # Errors
    ///
    /// The write of `cgroup.kill`.
    pub fn kill(&self) -> io::Result<()> {
        match fs::write(self.dir().join("cgroup.kill"), "1") {
            Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }

    /// Sends a signal to every process in it and below. A process that ends or starts meanwhile may or may not get it.
    ///
    /// # Errors
    ///
    /// `cgroup.procs` cannot be read.
    pub fn signal(&self, signal: u32) -> io::Result<()> {
        if signal == Signal::KILL.as_raw() as u32 {
            return self.kill();
        }
        signal_tree(&self.dir(), signal as i32)
    }

    /// How many of the processes in it and below the OOM killer has killed. The kernel counts one before it kills it (Linux 6.12 mm/oom_kill.c,
    /// `__oom_kill_process`), so whoever has been told of its end finds it counted.
    #[must_use]
    pub fn oom_kills(&self) -> u64 {
        oom_kills(&fs::read_to_string(self.dir().join(MEMORY_EVENTS)).unwrap_or_default())
    }

    /// Completes when the OOM killer has killed more than `seen`: how many by now. Never, where memory is not counted.
    ///
    /// # Errors
    ///
    /// `memory.events` cannot be read or watched: `ENODEV` if the cgroup was removed.
    pub async fn more_oom_kills(&self, seen: u64) -> io::Result<u64> {
        match EventFile::open(&self.dir().join(MEMORY_EVENTS)) {
            Err(err) if err.kind() == io::ErrorKind::NotFound => std::future::pending().await,
            events => events?.until(|text| Some(oom_kills(text)).filter(|kills| *kills > seen)).await,
        }
    }

    /// Removes it and what its processes made below it. `EBUSY`: there are processes left.
    ///
    /// # Errors
    ///
    /// rmdir(2).
    pub fn remove(&self) -> io::Result<()> {
        remove_tree(&self.dir())
    }

    /// The processes in it and below, in the guest's numbers.
    #[must_use]
    pub fn processes(&self) -> Vec<i32> {
        let mut found = Vec::new();
        processes_of_tree(&self.dir(), &mut found);
        found
    }

    /// Its directory.
    #[must_use]
    pub fn dir(&self) -> PathBuf {
        Path::new(ROOT).join(&self.path)
    }
}

/// What `memory.events` says.
fn oom_kills(text: &str) -> u64 {
    let count = text.lines().find_map(|line| line.strip_prefix("oom_kill "));
    count.and_then(|count| count.parse().ok()).unwrap_or(0)
}

fn processes_of_tree(dir: &Path, found: &mut Vec<i32>) {
    let procs = fs::read_to_string(dir.join("cgroup.procs")).unwrap_or_default();
    found.extend(procs.lines().filter_map(|line| line.parse::<i32>().ok()));
    for child in children(dir) {
        processes_of_tree(&child, found);
    }
}

fn children(dir: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    fs::read_dir(dir)
        .into_iter()
        .flatten()
        .filter_map(Result::ok)
        .filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()))
        .map(|entry| entry.path())
}

fn signal_tree(dir: &Path, signal: i32) -> io::Result<()> {
    let procs = match fs::read_to_string(dir.join("cgroup.procs")) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => return Ok(()),
        other => other?,
    };
    for pid in procs.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)) {
        // SAFETY: kill(2) takes integers only. rustix has no call for signal numbers without a name.
        unsafe { libc::kill(pid.as_raw_nonzero().get(), signal) };
    }
    children(dir).try_for_each(|child| signal_tree(&child, signal))
}

fn remove_tree(dir: &Path) -> io::Result<()> {
    for child in children(dir) {
        remove_tree(&child)?;
    }
    match fs::remove_dir(dir) {
        Err(err) if err.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn path(given: Option<&str>) -> Option<String> {
        let cgroup = Cgroup::from_spec(given.map(Path::new), "c1").ok()?;
        Some(cgroup.path().to_str()?.to_owned())
    }

    #[test]
    fn the_path_is_always_below_the_root() {
        for (given, expected) in [
            (None, "kvrun/c1"),
            (Some(""), "kvrun/c1"),
            (Some("a/b"), "a/b"),
            (Some("//a/./b/"), "a/b"),
            (Some("system.slice:docker:c1"), "system.slice:docker:c1"),
        ] {
            assert_eq!(path(given).as_deref(), Some(expected));
        }
        for bad in ["/", ".", "a/../b", ".."] {
            assert_eq!(path(Some(bad)), None, "{bad}");
        }
    }

    #[test]
    fn two_cgroups_overlap_if_one_is_inside_the_other() {
        let cgroup = |path: &str| Cgroup::from_spec(Some(Path::new(path)), "c").unwrap();
        assert!(cgroup("a/b").overlaps(&cgroup("a")));
        assert!(cgroup("a").overlaps(&cgroup("a/b/c")));
        assert!(!cgroup("a/b").overlaps(&cgroup("a/bc")));
    }

    #[test]
    fn a_cgroup_that_never_was_is_killed_and_removed_without_an_error() {
        let cgroup = Cgroup::from_spec(Some(Path::new("kvrun-test/never/was")), "c").unwrap();
        cgroup.kill().unwrap();
        cgroup.signal(15).unwrap();
        cgroup.remove().unwrap();
        assert_eq!(cgroup.oom_kills(), 0);
    }

    #[test]
    fn oom_kills_are_those_of_processes() {
        // `oom` counts failures to get memory, `oom_group_kill` cgroups.
        let text = "low 0\nhigh 0\nmax 9\noom 7\noom_kill 3\noom_group_kill 2\n";
        assert_eq!((oom_kills(text), oom_kills("oom 7\n"), oom_kills("")), (3, 0, 0));
    }
}
