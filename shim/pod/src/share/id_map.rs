//! ID-mapped bind mounts (mount_setattr(2), "ID-mapped mounts"). They are made on the host, where the file system is: the file server then finds the
//! files with the owners that the container is to see, and what it creates gets those of the other side.

use std::fs::{self, File};
use std::io;
use std::os::fd::AsFd;

use crate::bundle::IdMap;
use crate::sys::{self, MountAttr};

/// Maps the owners in a tree that is attached nowhere yet.
pub(super) fn apply(tree: impl AsFd, map: &IdMap) -> io::Result<()> {
    let error = |what: &str| {
        let what = what.to_owned();
        move |err: io::Error| io::Error::new(err.kind(), format!("{what}: {err}"))
    };
    // The kernel takes mappings in the form of a user namespace, and a namespace needs a process until it is open.
    let process = sys::Idle::in_user_namespace().map_err(error("make a user namespace"))?;
    let file = |name: &str| format!("/proc/{}/{name}", process.pid());
    fs::write(file("uid_map"), &map.uids).map_err(error("write its uidMappings"))?;
    fs::write(file("gid_map"), &map.gids).map_err(error("write its gidMappings"))?;
    let namespace = File::open(file("ns/user")).map_err(error("open the user namespace"))?;
    let attr = MountAttr {
        set: libc::MOUNT_ATTR_IDMAP,
        user_namespace: Some(namespace.as_fd()),
        ..MountAttr::default()
    };
    sys::mount_setattr(tree, map.recursive, attr)
        .map_err(error("map the IDs of its file system, which may not support that"))
}
