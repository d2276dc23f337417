//! A container's files as processes of the host find them: in the mount namespace of the process that stands for it.
//!
//! Engines enter that namespace to copy files into a running container and out of it (`podman cp`), and to read `/proc`. So it must have the container's
//! root and nothing of the host's: as far as files are the host's, that is, which those of the guest's own file systems (tmpfs) are not.

use std::ffi::OsStr;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{MountPropagationFlags, MoveMountFlags, UnmountFlags, mount_change, move_mount, unmount};
use rustix::process::{chdir, fchdir, pivot_root};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::{ShareError, Trees};
use crate::bundle::{Bundle, Files};

/// Where a root is mounted that nobody is in yet: any directory there always is.
const ASIDE: &str = "/proc";

/// A container's files, attached nowhere yet.
#[derive(Debug)]
pub struct View {
    /// The root, and then what is mounted at each of the destinations.
    trees: Trees,
    destinations: Vec<PathBuf>,
}

impl View {
    /// Those of a bundle that this process has loaded.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn of(bundle: &Bundle, files: &Files) -> Result<Self, ShareError> {
        let mounts = bundle.spec().mounts().as_deref().unwrap_or_default();
        let binds = bundle.binds().iter().filter_map(|bind| mounts.get(bind.index()));
        let destinations = binds.map(|mount| mount.destination().clone()).collect();
        Ok(Self { trees: Trees::of(bundle, files)?, destinations })
    }

    /// Puts the calling thread, and no other, into a mount namespace that has these files and nothing else, with `proc`, a mount that is attached nowhere, as its
    /// `/proc`. What has no mount point among them is left out: in the guest it may be on a file system of the guest's.
    ///
    /// # Errors
    /// As unshare(2), mount(2), pivot_root(2).
    pub fn enter(self, proc: Option<OwnedFd>) -> io::Result<()> {
        let mut trees = self.trees.into_iter();
        let root = trees.next().ok_or(io::ErrorKind::InvalidInput)?;
        // SAFETY: neither flag unshares the table of descriptors, which is what makes the call unsafe.
        unsafe { unshare_unsafe(UnshareFlags::FS | UnshareFlags::NEWNS)? };
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        move_mount(&root, "", CWD, ASIDE, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?;
        for (tree, destination) in trees.zip(&self.destinations) {
            attach(&tree, &root, destination)?;
        }
        if let Some(proc) = proc {
            attach(&proc, &root, Path::new("/proc"))?;
        }
        // pivot_root(2), NOTES: the old root lies on the new one then, from where it is taken away.
        fchdir(&root)?;
        pivot_root(".", ".")?;
        unmount(".", UnmountFlags::DETACH)?;
        Ok(chdir("/")?)
    }
}

fn attach(tree: impl AsFd, root: impl AsFd, destination: &Path) -> io::Result<()> {
    // The root is a stranger's: its symbolic links lead nowhere else.
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let flags = OFlags::PATH | OFlags::CLOEXEC;
    let target = match rustix::fs::openat2(root, destination, flags, Mode::empty(), resolve) {
        Ok(target) => target,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(()),
        Err(error) => return Err(error.into()),
    };
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH;
    match move_mount(tree, OsStr::new(""), &target, OsStr::new(""), flags) {
        // A file over a directory, or the other way round.
        Ok(()) | Err(Errno::NOTDIR) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
