//! The `/proc` that processes of the host find in the mount namespace of a container.
//!
//! The container's processes are the guest's. So it is a FUSE file system that asks the guest, through the monitor: of the container's own `/proc`
//! ([`ProcEntry`]), what programs that list processes look at.
//!
//! What the guest says is passed on as it is: to whoever enters the namespace of a container, as with every runtime.

use std::collections::HashMap;
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, UNIX_EPOCH};

use fuser::{
    Config, Errno, FileAttr, FileHandle, FileType, Filesystem, FopenFlags, Generation, INodeNo, LockOwner,
    OpenFlags, ReplyAttr, ReplyData, ReplyDirectory, ReplyEmpty, ReplyEntry, ReplyOpen, Request, Session,
    SessionACL,
};
use kvrun_pod::agent::ProcEntry;
use kvrun_pod::container_id::ContainerId;
use kvrun_pod::record::Status;
use kvrun_pod::state_dir::StateError;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

use crate::error::Error;
use crate::monitor::client::Known;
use crate::monitor::protocol;

/// How long a monitor may take to answer: longer than a guest may.
const PATIENCE: Duration = Duration::from_secs(40);
/// Nothing is kept: processes come and go.
const TTL: Duration = Duration::ZERO;

/// Mounts that of a container, attached nowhere yet, and serves it in a thread until this process ends.
///
/// # Errors
/// The host has no FUSE (`/dev/fuse`).
pub(crate) fn mount(root: &Path, id: &ContainerId) -> io::Result<OwnedFd> {
    let device = File::options().read(true).write(true).open("/dev/fuse")?;
    let fs = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let number = device.as_raw_fd().to_string();
    for (key, value) in
        [("source", "kvrun"), ("fd", &number), ("rootmode", "40555"), ("user_id", "0"), ("group_id", "0")]
    {
        fsconfig_set_string(&fs, key, value)?;
    }
    fsconfig_set_flag(&fs, "allow_other")?;
    fsconfig_create(&fs)?;
    let attributes = MountAttrFlags::MOUNT_ATTR_RDONLY
        | MountAttrFlags::MOUNT_ATTR_NODEV
        | MountAttrFlags::MOUNT_ATTR_NOSUID
        | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    let mounted = fsmount(&fs, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
    let proc = GuestProc::new(root, id);
    thread::Builder::new().name("guest-proc".into()).spawn(move || {
        let session = Session::from_fd(proc, device.into(), SessionACL::All, Config::default());
        if let Err(error) = session.and_then(Session::run) {
            tracing::debug!(%error, "serve the container's /proc");
        }
    })?;
    Ok(mounted)
}

/// What is in a directory: paths below it, with what they are.
type Tree = [(&'static str, FileType)];

/// The root, which also has a directory for each process. Without what would be about the guest as a whole and nobody reads here.
const SYSTEM: &Tree = &[
    ("", FileType::Directory),
    ("loadavg", FileType::RegularFile),
    ("meminfo", FileType::RegularFile),
    ("stat", FileType::RegularFile),
    ("uptime", FileType::RegularFile),
    ("version", FileType::RegularFile),
];
/// The directory of a process.
const PROCESS: &Tree = &[
    ("", FileType::Directory),
    ("attr", FileType::Directory),
    ("attr/current", FileType::RegularFile),
    ("cmdline", FileType::RegularFile),
    ("comm", FileType::RegularFile),
    ("ns", FileType::Directory),
    ("ns/pid", FileType::Symlink),
    ("stat", FileType::RegularFile),
    ("statm", FileType::RegularFile),
    ("status", FileType::RegularFile),
];

/// Something in the file system: an entry of a process's directory, or of the root, if the process is 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Node {
    process: u32,
    entry: usize,
}

impl Node {
    const ROOT: Self = Self { process: 0, entry: 0 };

    const fn tree(self) -> &'static Tree {
        if self.process == 0 { SYSTEM } else { PROCESS }
    }

    const fn kind(self) -> FileType {
        self.tree()[self.entry].1
    }

    const fn name(self) -> &'static str {
        self.tree()[self.entry].0
    }

    /// The root's is 1.
    const fn inode(self) -> INodeNo {
        INodeNo(((self.process as u64) << 8) + self.entry as u64 + 1)
    }

    fn of(inode: INodeNo) -> Option<Self> {
        let number = inode.0.checked_sub(1)?;
        let node =
            Self { process: u32::try_from(number >> 8).ok()?, entry: usize::try_from(number & 0xff).ok()? };
        (node.entry < node.tree().len()).then_some(node)
    }

    /// As the guest has it, below `/proc`.
    fn path(self) -> String {
        match (self.process, self.name()) {
            (0, name) => name.to_owned(),
            (process, "") => process.to_string(),
            (process, name) => format!("{process}/{name}"),
        }
    }

    /// What is in it, processes aside; with their last names.
    fn children(self) -> impl Iterator<Item = (&'static str, Self)> {
        let parent = self.name();
        self.tree().iter().enumerate().skip(1).filter_map(move |(entry, (path, _))| {
            let name = if parent.is_empty() { path } else { path.strip_prefix(parent)?.strip_prefix('/')? };
            (!name.contains('/')).then_some((name, Self { entry, ..self }))
        })
    }

    fn attributes(self) -> FileAttr {
        let perm = if self.kind() == FileType::RegularFile { 0o444 } else { 0o555 };
        FileAttr {
            ino: self.inode(),
            // Nobody knows before it is read, as in any procfs.
            size: 0,
            blocks: 0,
            atime: UNIX_EPOCH,
            mtime: UNIX_EPOCH,
            ctime: UNIX_EPOCH,
            crtime: UNIX_EPOCH,
            kind: self.kind(),
            perm,
            nlink: 1,
            uid: 0,
            gid: 0,
            rdev: 0,
            blksize: 4096,
            flags: 0,
        }
    }
}

/// The file system.
struct GuestProc {
    root: PathBuf,
    id: ContainerId,
    /// What the open files say, by their handles: all at once, as it was when they were opened.
    files: Mutex<HashMap<u64, Vec<u8>>>,
    opened: AtomicU64,
}

impl GuestProc {
    fn new(root: &Path, id: &ContainerId) -> Self {
        Self { root: root.to_owned(), id: id.clone(), files: Mutex::default(), opened: AtomicU64::new(0) }
    }

    fn files(&self) -> MutexGuard<'_, HashMap<u64, Vec<u8>>> {
        self.files.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn look(&self, node: Node) -> Result<ProcEntry, Errno> {
        let ask = || -> Result<Option<ProcEntry>, Error> {
            let container = Known::find(&self.root, &self.id)?
                .ok_or_else(|| StateError::Unknown { id: self.id.clone() })?;
            let connection = container.connect(&self.root, PATIENCE)?;
            connection.fetch(protocol::Request::LookAtProc { path: node.path() })
        };
        match ask() {
            Ok(found) => found.ok_or(Errno::ENOENT),
            // It has no processes.
            Err(Error::NotRunning { .. } | Error::WrongState { status: Status::Creating, .. }) => {
                Err(Errno::ENOENT)
            }
            Err(error) => {
                tracing::debug!(error = %kvrun_pod::text::chain(&error), "look at the container's /proc");
                Err(Errno::EIO)
            }
        }
    }

    fn find(&self, parent: INodeNo, name: &OsStr) -> Result<Node, Errno> {
        let (parent, name) = (Node::of(parent).ok_or(Errno::ENOENT)?, name.to_str().ok_or(Errno::ENOENT)?);
        if let Some((_, node)) = parent.children().find(|(child, _)| *child == name) {
            return Ok(node);
        }
        let node = process(name).filter(|_| parent == Node::ROOT).ok_or(Errno::ENOENT)?;
        self.look(node).map(|_| node)
    }

    /// What is in a directory, in the order of inodes, which go up: so each is the cookie of the next.
    fn list(&self, dir: INodeNo) -> Result<Vec<(String, Node)>, Errno> {
        let dir = Node::of(dir).ok_or(Errno::ENOENT)?;
        let mut all: Vec<_> = dir.children().map(|(name, node)| (name.to_owned(), node)).collect();
        if dir == Node::ROOT
            && let ProcEntry::Directory(names) = self.look(dir)?
        {
            all.extend(names.into_iter().filter_map(|name| process(&name).map(|node| (name, node))));
        }
        all.sort_by_key(|(_, node)| node.inode().0);
        Ok(all)
    }
}

/// The directory of a process, by its name.
fn process(name: &str) -> Option<Node> {
    let process: u32 = name.parse().ok().filter(|number| *number > 0)?;
    (process.to_string() == name).then_some(Node { process, entry: 0 })
}

impl Filesystem for GuestProc {
    fn lookup(&self, _: &Request, parent: INodeNo, name: &OsStr, reply: ReplyEntry) {
        match self.find(parent, name) {
            Ok(node) => reply.entry(&TTL, &node.attributes(), Generation(0)),
            Err(error) => reply.error(error),
        }
    }

    fn getattr(&self, _: &Request, inode: INodeNo, _: Option<FileHandle>, reply: ReplyAttr) {
        match Node::of(inode) {
            Some(node) => reply.attr(&TTL, &node.attributes()),
            None => reply.error(Errno::ENOENT),
        }
    }

    fn readdir(&self, _: &Request, inode: INodeNo, _: FileHandle, offset: u64, mut reply: ReplyDirectory) {
        let all = match self.list(inode) {
            Ok(all) => all,
            Err(error) => return reply.error(error),
        };
        for (name, node) in all.into_iter().filter(|(_, node)| node.inode().0 > offset) {
            if reply.add(node.inode(), node.inode().0, node.kind(), name) {
                break;
            }
        }
        reply.ok();
    }

    fn open(&self, _: &Request, inode: INodeNo, _: OpenFlags, reply: ReplyOpen) {
        match Node::of(inode).ok_or(Errno::ENOENT).and_then(|node| self.look(node)) {
            Ok(ProcEntry::File(data)) => {
                let handle = self.opened.fetch_add(1, Ordering::Relaxed);
                self.files().insert(handle, data);
                reply.opened(FileHandle(handle), FopenFlags::FOPEN_DIRECT_IO);
            }
            Ok(_) => reply.error(Errno::EIO),
            Err(error) => reply.error(error),
        }
    }

    fn read(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        offset: u64,
        size: u32,
        _: OpenFlags,
        _: Option<LockOwner>,
        reply: ReplyData,
    ) {
        let files = self.files();
        let data = files.get(&handle.0).map_or(&[][..], Vec::as_slice);
        let rest = usize::try_from(offset).ok().and_then(|offset| data.get(offset..)).unwrap_or_default();
        reply.data(&rest[..rest.len().min(size as usize)]);
    }

    fn release(
        &self,
        _: &Request,
        _: INodeNo,
        handle: FileHandle,
        _: OpenFlags,
        _: Option<LockOwner>,
        _: bool,
        reply: ReplyEmpty,
    ) {
        self.files().remove(&handle.0);
        reply.ok();
    }

    fn readlink(&self, _: &Request, inode: INodeNo, reply: ReplyData) {
        match Node::of(inode).ok_or(Errno::ENOENT).and_then(|node| self.look(node)) {
            Ok(ProcEntry::Link(target)) => reply.data(&target),
            Ok(_) => reply.error(Errno::EIO),
            Err(error) => reply.error(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nodes_have_inodes_and_paths() {
        assert_eq!(Node::ROOT.inode(), INodeNo::ROOT);
        for process in [0, 1, 4711, u32::MAX] {
            let tree = Node { process, entry: 0 }.tree();
            for entry in 0..tree.len() {
                let node = Node { process, entry };
                assert_eq!(Node::of(node.inode()), Some(node));
            }
            assert_eq!(Node::of(INodeNo(Node { process, entry: tree.len() }.inode().0)), None);
        }
        let names = |node: Node| node.children().map(|(name, node)| (name, node.path())).collect::<Vec<_>>();
        let process = process("7").unwrap();
        assert!(names(process).contains(&("attr", "7/attr".into())));
        assert!(!names(process).iter().any(|(name, _)| name.contains('/')));
        let (_, namespaces) = process.children().find(|(name, _)| *name == "ns").unwrap();
        assert_eq!(names(namespaces), [("pid", "7/ns/pid".to_owned())]);
        assert!(names(Node::ROOT).contains(&("stat", "stat".into())));
    }

    #[test]
    fn process_is_a_number_as_procfs_writes_it() {
        for name in ["0", "007", "-1", "self", "", "4294967296", "1 "] {
            assert_eq!(process(name), None, "{name:?}");
        }
    }
}
