//! Copies of the mounts that a container needs, attached nowhere yet.
//!
//! They are made by the process that sees the mounts: engines keep some in mount namespaces of their own, or mount them where no other
//! namespace hears of it, after a pod's monitor has got its own. As descriptors they go to the one that has the share.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{OpenTreeFlags, open_tree};

use super::{ShareError, id_map, mount_points};
use crate::bundle::{Bind, Bundle, Files, Root};
use crate::sys::{self, MountAttr};

/// The mount trees of a container: the root, and one for each of its bind mounts. What the spec says about them is done: they are read-only, have
/// mapped owners, mount points and the working directory.
#[derive(Debug)]
pub struct Trees(Vec<OwnedFd>);

impl Trees {
    /// Those of a bundle that this process has loaded.
    ///
    /// # Errors
    /// [`ShareError`].
    pub fn of(bundle: &Bundle, files: &Files) -> Result<Self, ShareError> {
        let mut opened = files.opened();
        let mut trees = Vec::with_capacity(1 + bundle.binds().len());
        let missing = || io::Error::from(io::ErrorKind::InvalidInput);

        let attach_root = |source| ShareError::Attach { path: bundle.rootfs_path().to_owned(), source };
        let root = opened.next().ok_or_else(missing).map_err(attach_root)?;
        let root = clone_tree(root, true).map_err(|e| attach_root(e.into()))?;
        let is_read_only = match bundle.root() {
            Root::Files => {
                if bundle.is_root_read_only() {
                    mount_points::make(root.as_fd(), bundle)?;
                }
                mount_points::make_working_directory(root.as_fd(), bundle)?;
                bundle.is_root_read_only()
            }
            Root::Disk => true,
            // The guest makes mount points and the working directory there.
            Root::Layers => false,
        };
        restrict(&root, is_read_only, false, false).map_err(attach_root)?;
        trees.push(root);

        for bind in bundle.binds() {
            let source = opened.next().ok_or_else(missing);
            let tree = source.and_then(|source| Self::of_bind(bind, source));
            trees.push(tree.map_err(|source| ShareError::Attach { path: bind.path().to_owned(), source })?);
        }
        Ok(Self(trees))
    }

    fn of_bind(bind: &Bind, source: BorrowedFd<'_>) -> io::Result<OwnedFd> {
        let tree = clone_tree(source, bind.is_recursive())?;
        if let Some(map) = bind.id_map() {
            id_map::apply(&tree, map)?;
        }
        restrict(&tree, bind.is_read_only(), bind.is_recursively_read_only(), bind.follows_host())?;
        Ok(tree)
    }

    /// For another process: the root's first, then those of [`Bundle::binds`] in their order.
    pub fn descriptors(&self) -> Vec<BorrowedFd<'_>> {
        self.0.iter().map(AsFd::as_fd).collect()
    }
}

/// From another process, which has them from [`Trees::descriptors`].
impl From<Vec<OwnedFd>> for Trees {
    fn from(descriptors: Vec<OwnedFd>) -> Self {
        Self(descriptors)
    }
}

impl IntoIterator for Trees {
    type Item = OwnedFd;
    type IntoIter = std::vec::IntoIter<OwnedFd>;

    fn into_iter(self) -> Self::IntoIter {
        self.0.into_iter()
    }
}

/// A copy, attached nowhere, of the mount that `directory` is in, from there down.
pub(super) fn clone_tree(directory: BorrowedFd<'_>, recursive: bool) -> Result<OwnedFd, Errno> {
    let mut flags =
        OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    open_tree(directory, "", flags)
}

/// Sets what holds for a tree whatever the guest does.
fn restrict(
    tree: &OwnedFd,
    read_only: bool,
    recursively_read_only: bool,
    follows_host: bool,
) -> io::Result<()> {
    // A device node in the tree is a node of the guest's for the guest; the VMM must not be led to open the host's.
    let set = libc::MOUNT_ATTR_NODEV | libc::MOUNT_ATTR_NOSUID;
    // Mounts made on the host below the source arrive only where the spec asks for it with `slave` or `rslave`.
    let propagation = if follows_host { libc::MS_SLAVE } else { libc::MS_PRIVATE };
    sys::mount_setattr(tree, true, MountAttr { set, propagation, ..MountAttr::default() })?;
    if read_only || recursively_read_only {
        sys::mount_setattr(
            tree,
            recursively_read_only,
            MountAttr { set: libc::MOUNT_ATTR_RDONLY, ..MountAttr::default() },
        )?;
    }
    Ok(())
}
