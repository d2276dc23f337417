//! The container's cgroup on the host, which holds this process and the VMM.
//!
//! cgroup v2 only, by its file system. The process joins before it starts anything, so that all of it is accounted there; it leaves, and
//! removes what it made, when the [`HostCgroup`] is dropped.

use std::fs;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Component, Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::rmdir;
use rustix::io::Errno;

use crate::state_dir::{ContainerDir, StateError};

/// How long the kernel may take over the end of what a crash has left in a cgroup.
const EMPTY_TIMEOUT: Duration = Duration::from_secs(5);

/// What can go wrong with the cgroup.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// The form that names a scope of systemd, without `--systemd-cgroup`.
    #[error(
        "linux.cgroupsPath {path:?} is of the form slice:prefix:name, which goes with --systemd-cgroup: use both, or give a path such as /kvrun/NAME"
    )]
    Systemd {
        /// As in the spec.
        path: String,
    },
    /// A path, with `--systemd-cgroup`.
    #[error(
        "linux.cgroupsPath {path:?} is not of the form slice:prefix:name, which --systemd-cgroup asks for"
    )]
    NotSystemd {
        /// As in the spec.
        path: String,
    },
    /// It climbs out.
    #[error("linux.cgroupsPath {path:?} is invalid: it must name a cgroup below the root, without \"..\"")]
    Invalid {
        /// As in the spec.
        path: String,
    },
    /// No cgroup v2 on this host.
    #[error(
        "linux.cgroupsPath needs cgroup v2, which is not mounted on this host; leave it out, or mount cgroup2 at /sys/fs/cgroup"
    )]
    NoV2,
    /// A step failed.
    #[error("{step} {}", path.display())]
    Io {
        /// Which.
        step: &'static str,
        /// Of what.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It could not be remembered.
    #[error(transparent)]
    State(#[from] StateError),
}

/// Membership in the container's cgroup. Dropping it takes the process back to where it came from and removes what was made.
#[derive(Debug)]
pub struct HostCgroup {
    previous: PathBuf,
    /// Outermost first.
    made: Vec<PathBuf>,
}

/// Where cgroup v2 is mounted on this host.
pub fn v2_mount_point() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(v2_mount_of_line).map(PathBuf::from)
}

/// proc(5), mountinfo: the fifth field is the mount point, the first after " - " the type of file system.
fn v2_mount_of_line(line: &str) -> Option<&str> {
    let (mount, fs) = line.split_once(" - ")?;
    let mut mount = mount.split(' ');
    // A cgroup namespace's inside is "/" too; a bind mount of some cgroup is not.
    let (root, point) = (mount.nth(3)?, mount.next()?);
    (fs.split(' ').next() == Some("cgroup2") && root == "/").then_some(point)
}

/// How `linux.cgroupsPath` is to be read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Driver {
    /// As a path.
    Cgroupfs,
    /// As `slice:prefix:name`, a scope. We make the directory that systemd would make, and do not tell systemd of it.
    Systemd,
}

impl Driver {
    /// The one that a path looks like it was written for.
    pub fn of(path: &Path) -> Self {
        let text = path.to_string_lossy();
        if text.matches(':').count() == 2 && !text.contains('/') { Self::Systemd } else { Self::Cgroupfs }
    }
}

/// The spec's path below the mount point, without its leading slash.
///
/// # Errors
/// [`CgroupError::Systemd`], [`CgroupError::NotSystemd`], [`CgroupError::Invalid`].
pub fn relative(path: &Path, driver: Driver) -> Result<PathBuf, CgroupError> {
    let text = || path.to_string_lossy().into_owned();
    // runc docs/systemd.md: slice:prefix:name, of which slice and prefix may be empty and name has no slash.
    let parts: Vec<String> = path.to_string_lossy().split(':').map(str::to_owned).collect();
    let scope = <[String; 3]>::try_from(parts).ok().filter(|_| !path.to_string_lossy().contains('/'));
    match (driver, scope) {
        (Driver::Cgroupfs, None) => {}
        (Driver::Cgroupfs, Some(_)) => return Err(CgroupError::Systemd { path: text() }),
        (Driver::Systemd, None) => return Err(CgroupError::NotSystemd { path: text() }),
        (Driver::Systemd, Some([slice, prefix, name])) => {
            let invalid = || CgroupError::Invalid { path: text() };
            let mut directory = slice_directory(&slice).ok_or_else(invalid)?;
            let unit = if prefix.is_empty() { name } else { format!("{prefix}-{name}") };
            directory.push(if unit.ends_with(".slice") { unit } else { format!("{unit}.scope") });
            return relative(&Path::new("/").join(directory), Driver::Cgroupfs);
        }
    }
    let mut relative = PathBuf::new();
    for component in path.components() {
        match component {
            Component::RootDir | Component::CurDir => {}
            Component::Normal(name) if !name.to_string_lossy().contains('\n') => relative.push(name),
            _ => return Err(CgroupError::Invalid { path: text() }),
        }
    }
    if relative.as_os_str().is_empty() { Err(CgroupError::Invalid { path: text() }) } else { Ok(relative) }
}

/// Where systemd has a slice (systemd.slice(5)): `a-b.slice` is in `a.slice`. An empty name is `system.slice`, as in runc.
fn slice_directory(slice: &str) -> Option<PathBuf> {
    let name = match slice {
        "" => "system",
        "-.slice" => return Some(PathBuf::new()),
        _ => slice.strip_suffix(".slice")?,
    };
    let mut directory = PathBuf::new();
    let mut so_far = String::new();
    for part in name.split('-') {
        if part.is_empty() {
            return None;
        }
        so_far += part;
        directory.push(format!("{so_far}.slice"));
        so_far.push('-');
    }
    Some(directory)
}

impl HostCgroup {
    /// Makes the cgroup that a spec's `linux.cgroupsPath` names, if it is not there, and moves this process into it.
    ///
    /// # Errors
    /// [`CgroupError`]; nothing is then left behind.
    pub fn join(path: &Path, driver: Driver, dir: &ContainerDir) -> Result<Self, CgroupError> {
        let relative = relative(path, driver)?;
        let mount_point = v2_mount_point().ok_or(CgroupError::NoV2)?;
        let previous = current(&mount_point)?;
        let mut missing = Vec::new();
        let mut cgroup = mount_point;
        for name in &relative {
            cgroup.push(name);
            if !cgroup.exists() {
                missing.push(cgroup.clone());
            }
        }
        dir.remember_cgroups(&missing)?;
        let mut joined = Self { previous, made: Vec::new() };
        for directory in missing {
            enable_controllers(&directory);
            fs::create_dir(&directory).map_err(|source| io_error("make the cgroup", &directory, source))?;
            joined.made.push(directory);
        }
        enter(&cgroup).map_err(|source| io_error("join the cgroup", &cgroup, source))?;
        Ok(joined)
    }
}

impl Drop for HostCgroup {
    fn drop(&mut self) {
        if let Err(error) = enter(&self.previous) {
            tracing::warn!(cgroup = %self.previous.display(), %error, "leave the container's cgroup");
        }
        for directory in self.made.iter().rev() {
            match fs::remove_dir(directory) {
                Ok(()) => {}
                // Another container's cgroup may have been made below one of ours.
                Err(error) => tracing::debug!(cgroup = %directory.display(), %error, "remove the cgroup"),
            }
        }
    }
}

/// Removes a cgroup that a crash has left behind, once it is empty: the kernel kills the VMM with whoever has started it, and that may take a
/// moment, also of one that nobody had written down yet.
///
/// # Errors
/// As rmdir(2).
pub(crate) fn remove_left_behind(cgroup: &Path) -> Result<(), Errno> {
    let deadline = Instant::now() + EMPTY_TIMEOUT;
    let events = fs::File::open(cgroup.join("cgroup.events"));
    loop {
        // Cgroup v2, "Core Interface Files": a change after this is an event for poll(2).
        if let Ok(events) = &events {
            let _ = events.read_at(&mut [0; 64], 0);
        }
        let removed = rmdir(cgroup);
        let left = deadline.saturating_duration_since(Instant::now());
        match (&events, removed) {
            (Ok(events), Err(Errno::BUSY)) if !left.is_zero() => {
                let left =
                    Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() };
                poll(&mut [PollFd::new(events, PollFlags::PRI)], Some(&left))?;
            }
            (_, removed) => return removed,
        }
    }
}

fn io_error(step: &'static str, path: &Path, source: io::Error) -> CgroupError {
    CgroupError::Io { step, path: path.to_owned(), source }
}

/// The cgroup this process is in (cgroups(7), /proc/PID/cgroup: the line of v2 starts with `0::`).
fn current(mount_point: &Path) -> Result<PathBuf, CgroupError> {
    const FILE: &str = "/proc/self/cgroup";
    let text = fs::read_to_string(FILE).map_err(|source| io_error("read", Path::new(FILE), source))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).ok_or(CgroupError::NoV2)?;
    Ok(mount_point.join(path))
}

fn enter(cgroup: &Path) -> io::Result<()> {
    fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string())
}

/// Turns on, for a cgroup about to be made, the controllers its parent has, so that what runs in it is accounted. A parent
/// that holds processes refuses (cgroups(7), "no internal processes"), and then it is not.
fn enable_controllers(cgroup: &Path) {
    let Some(parent) = cgroup.parent() else { return };
    let available = fs::read_to_string(parent.join("cgroup.controllers")).unwrap_or_default();
    for controller in available.split_whitespace() {
        if let Err(error) = fs::write(parent.join("cgroup.subtree_control"), format!("+{controller}")) {
            tracing::debug!(cgroup = %parent.display(), controller, %error, "controller not enabled");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_the_root() {
        assert_eq!(relative(Path::new("/a/b"), Driver::Cgroupfs).unwrap(), Path::new("a/b"));
        assert_eq!(relative(Path::new("a/./b"), Driver::Cgroupfs).unwrap(), Path::new("a/b"));
        assert_eq!(
            relative(Path::new("/kubepods/pod:1"), Driver::Cgroupfs).unwrap(),
            Path::new("kubepods/pod:1")
        );
        for path in ["", "/", "../a", "/a/../../b", "a\nb"] {
            assert!(
                matches!(relative(Path::new(path), Driver::Cgroupfs), Err(CgroupError::Invalid { .. })),
                "{path:?}"
            );
        }
    }

    #[test]
    fn systemd_form_is_refused_by_name_without_its_option() {
        for path in ["system.slice:kvrun:x", "::", "user.slice::x"] {
            let error = relative(Path::new(path), Driver::Cgroupfs).unwrap_err();
            assert!(matches!(error, CgroupError::Systemd { .. }), "{path:?}");
            assert!(error.to_string().contains("linux.cgroupsPath"));
        }
    }

    #[test]
    fn scope_is_where_systemd_would_have_it() {
        for (path, expected) in [
            ("machine.slice:libpod:1f", "machine.slice/libpod-1f.scope"),
            ("a-b-c.slice::x", "a.slice/a-b.slice/a-b-c.slice/x.scope"),
            (":kvrun:x", "system.slice/kvrun-x.scope"),
            ("-.slice:kvrun:x", "kvrun-x.scope"),
            ("machine.slice:libpod:p.slice", "machine.slice/libpod-p.slice"),
        ] {
            assert_eq!(relative(Path::new(path), Driver::Systemd).unwrap(), Path::new(expected));
        }
        for path in ["/a/b", "a", "a:b:c/d"] {
            assert!(matches!(
                relative(Path::new(path), Driver::Systemd),
                Err(CgroupError::NotSystemd { .. })
            ));
        }
        for path in ["a:b:c", "-a.slice:b:c", "a--b.slice:b:c"] {
            assert!(
                matches!(relative(Path::new(path), Driver::Systemd), Err(CgroupError::Invalid { .. })),
                "{path}"
            );
        }
    }

    #[test]
    fn mount_point_is_read_from_mountinfo() {
        let line = "35 24 0:30 / /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate";
        assert_eq!(v2_mount_of_line(line), Some("/sys/fs/cgroup"));
        let line = "36 24 0:31 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu";
        assert_eq!(v2_mount_of_line(line), None);
        assert_eq!(v2_mount_of_line("35 24 0:30 /sub /mnt rw - cgroup2 cgroup2 rw"), None);
    }
}
