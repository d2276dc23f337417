//! Paths in requests, and how they are followed: below [`GUEST_RUN_DIR`], and through no symbolic link. A shared directory is
//! mounted there, and a container may have put any link into it.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};

use kvrun_agent_api::GUEST_RUN_DIR;
use rustix::fs::{CWD, Mode, OFlags, ResolveFlags, mkdirat, openat, openat2};
use rustix::io::Errno;

/// Where the agent keeps its own things below [`GUEST_RUN_DIR`]; not a place for mounts.
pub const OCI_DIR: &str = "oci";

/// Why a path is refused.
#[derive(Debug, thiserror::Error)]
pub enum PathError {
    /// The text itself is at fault.
    #[error("{0:?} is not a path below {GUEST_RUN_DIR} without '.', '..' or empty parts")]
    Outside(String),
    /// The agent's own directory.
    #[error("{0:?} is where the agent keeps its state")]
    Reserved(String),
    /// It cannot be opened or made; `ELOOP` means a symbolic link.
    #[error("cannot open {GUEST_RUN_DIR}/{path}")]
    Open {
        /// The path, below [`GUEST_RUN_DIR`].
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A path below [`GUEST_RUN_DIR`], checked.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct RunPath(PathBuf);

impl RunPath {
    /// Checks a path from a request.
    ///
    /// # Errors
    ///
    /// [`PathError::Outside`], [`PathError::Reserved`].
    pub fn parse(text: &str) -> Result<Self, PathError> {
        let outside = || PathError::Outside(text.chars().take(256).collect());
        let below =
            text.strip_prefix(GUEST_RUN_DIR).and_then(|rest| rest.strip_prefix('/')).ok_or_else(outside)?;
        if text.len() >= libc::PATH_MAX as usize
            || text.contains('\0')
            || below.split('/').any(|part| matches!(part, "" | "." | ".."))
        {
            return Err(outside());
        }
        let path = PathBuf::from(below);
        if path.components().next() == Some(Component::Normal(OCI_DIR.as_ref())) {
            return Err(PathError::Reserved(text.chars().take(256).collect()));
        }
        Ok(Self(path))
    }

    /// Opens the directory, which is made with its parents where missing.
    ///
    /// # Errors
    ///
    /// [`PathError::Open`].
    pub fn open_or_create(&self) -> Result<OwnedFd, PathError> {
        let error =
            |errno: Errno| PathError::Open { path: self.0.display().to_string(), source: errno.into() };
        let mut dir = open_run_dir().map_err(error)?;
        for part in self.0.components() {
            dir = match open_part(&dir, part.as_os_str().as_ref()) {
                Err(Errno::NOENT) => {
                    match mkdirat(&dir, part.as_os_str(), Mode::from_raw_mode(0o755)) {
                        Ok(()) | Err(Errno::EXIST) => {}
                        Err(errno) => return Err(error(errno)),
                    }
                    open_part(&dir, part.as_os_str().as_ref()).map_err(error)?
                }
                other => other.map_err(error)?,
            };
        }
        Ok(dir)
    }

    /// Opens the directory that holds the last part. `None`: it does not exist.
    ///
    /// # Errors
    ///
    /// [`PathError::Open`].
    pub fn open_parent(&self) -> Result<Option<(OwnedFd, &Path)>, PathError> {
        let error =
            |errno: Errno| PathError::Open { path: self.0.display().to_string(), source: errno.into() };
        let mut dir = open_run_dir().map_err(error)?;
        if let Some(parent) = self.0.parent() {
            for part in parent.components() {
                dir = match open_part(&dir, part.as_os_str().as_ref()) {
                    Err(Errno::NOENT) => return Ok(None),
                    other => other.map_err(error)?,
                };
            }
        }
        Ok(self.0.file_name().map(|name| (dir, Path::new(name))))
    }
}

impl std::fmt::Display for RunPath {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{GUEST_RUN_DIR}/{}", self.0.display())
    }
}

/// The path of an open descriptor, for system calls that want a path.
#[must_use]
pub fn of_fd(fd: &impl AsRawFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn open_run_dir() -> Result<OwnedFd, Errno> {
    openat(CWD, GUEST_RUN_DIR, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
}

/// One part at a time: `RESOLVE_NO_SYMLINKS` covers the only part there is, and mount points may be crossed.
fn open_part(dir: &OwnedFd, part: &Path) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(dir, part, flags, Mode::empty(), ResolveFlags::NO_SYMLINKS | ResolveFlags::BENEATH)
}

#[cfg(test)]
pub(crate) mod tests {
    use std::fs;
    use std::os::unix::fs::symlink;

    use nix::mount::{MsFlags, mount};
    use nix::sched::{CloneFlags, unshare};

    use super::*;

    /// For tests that unmount and tests that fork: between fork and exec a child holds every descriptor of this process,
    /// and a file system is busy with one of its own among them.
    pub(crate) static FORK_OR_UNMOUNT: std::sync::Mutex<()> = std::sync::Mutex::new(());

    /// Gives this thread a `/run` of its own. Needs root.
    pub(crate) fn private_run() {
        const NOTHING: Option<&str> = None;
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        mount(NOTHING, "/", NOTHING, MsFlags::MS_PRIVATE | MsFlags::MS_REC, NOTHING).unwrap();
        mount(Some("run"), "/run", Some("tmpfs"), MsFlags::empty(), NOTHING).unwrap();
        fs::create_dir(GUEST_RUN_DIR).unwrap();
    }

    #[test]
    fn only_plain_paths_below_the_run_directory_are_taken() {
        for good in ["/run/kvrun/a", "/run/kvrun/a/b.c/..d"] {
            assert_eq!(RunPath::parse(good).unwrap().to_string(), good);
        }
        let long = format!("/run/kvrun/{}", "a/".repeat(3000));
        for bad in [
            "",
            "/",
            "/run/kvrun",
            "/run/kvrun/",
            "/run/kvrunner/a",
            "run/kvrun/a",
            "/run/kvrun/../a",
            "/run/kvrun/a/..",
            "/run/kvrun//a",
            "/run/kvrun/a/",
            "/run/kvrun/./a",
            "/run/kvrun/a\0b",
            "/etc",
            &long,
        ] {
            assert!(matches!(RunPath::parse(bad), Err(PathError::Outside(_))), "{bad:?}");
        }
        for reserved in ["/run/kvrun/oci", "/run/kvrun/oci/state"] {
            assert!(matches!(RunPath::parse(reserved), Err(PathError::Reserved(_))));
        }
    }

    #[test]
    fn a_symbolic_link_on_the_way_is_not_followed() {
        private_run();
        fs::create_dir(format!("{GUEST_RUN_DIR}/share")).unwrap();
        symlink("/etc", format!("{GUEST_RUN_DIR}/share/link")).unwrap();
        symlink("real", format!("{GUEST_RUN_DIR}/share/inside")).unwrap();
        for path in ["share/link", "share/link/new", "share/inside/x"] {
            let path = RunPath::parse(&format!("{GUEST_RUN_DIR}/{path}")).unwrap();
            assert!(matches!(path.open_or_create(), Err(PathError::Open { .. })), "{path}");
        }
        assert!(!Path::new("/etc/new").exists());
        RunPath::parse("/run/kvrun/share/new/deep").unwrap().open_or_create().unwrap();
        assert!(Path::new("/run/kvrun/share/new/deep").is_dir());
    }
}
