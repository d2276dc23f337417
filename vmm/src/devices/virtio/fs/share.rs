//! The shared directory: `virtiofsd`'s file server with the settings of a pod, and the threads it may run on.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::time::Duration;

use kvrun_vmm_api::FsCache;
use rustix::fs::{MemfdFlags, Mode, memfd_create};
use rustix::process::{fchdir, umask};
use rustix::thread::{UnshareFlags, unshare_unsafe};
use virtiofsd::descriptor_utils::{Reader, Writer};
use virtiofsd::filesystem::{FileSystem, SerializableFileSystem};
use virtiofsd::passthrough::read_only::PassthroughFsRo;
use virtiofsd::passthrough::xattrmap::XattrMap;
use virtiofsd::passthrough::{CachePolicy, Config, InodeFileHandlesMode, NegotiationMode, PassthroughFs};
use virtiofsd::server::Server;

use super::FsOptions;
use super::descriptors::Allotment;
use super::frame::Request;
use crate::jail;

/// How long the guest may use a name or attribute without asking again, with [`FsCache::Auto`]. The guest sees its own changes at
/// once; those made on the host (an updated volume, a log another process reads and rotates) it sees this much later. Longer
/// saves few requests, since file data is revalidated on every open anyway; shorter makes every step of every path a request.
const AUTO_VALIDITY: Duration = Duration::from_secs(1);
/// The same with [`FsCache::Always`]: what virtiofsd itself takes for it.
const ALWAYS_VALIDITY: Duration = Duration::from_secs(24 * 60 * 60);

/// What the guest's overlayfs writes down about a directory it changes (Linux 6.12 Documentation/filesystems/overlayfs.rst, "Permission model"), under names that
/// are not for the host's root only, which this process is not. The guest has no other way to these.
const XATTR_MAP: &str =
    "/prefix/all/trusted.overlay./user.virtiofs./ /bad/client/user.virtiofs.// /ok/all///";

/// A directory the guest may use. Its session state (open files, known inodes) belongs to one activation of the device.
pub(super) struct Share {
    server: Access,
}

enum Access {
    ReadWrite(Server<PassthroughFs>),
    ReadOnly(Server<PassthroughFsRo>),
}

/// What a share is made from, as often as the driver starts over.
pub(super) struct ShareSource {
    root: OwnedFd,
    options: FsOptions,
    descriptors: Allotment,
    /// `/proc/self/fd`, which the jail has kept for this.
    proc_fds: File,
}

impl ShareSource {
    /// Shares the directory `root` refers to, which is one of `share`.
    ///
    /// # Errors
    /// When the process is out of descriptors.
    pub(super) fn new(
        share: &jail::Share,
        root: OwnedFd,
        options: FsOptions,
        descriptors: Allotment,
    ) -> io::Result<Self> {
        Ok(Self { root, options, descriptors, proc_fds: share.proc_fds()? })
    }

    /// How it is shared.
    pub(super) fn options(&self) -> FsOptions {
        self.options
    }

    /// Makes the calling thread fit to serve this share. The file server changes into directories and changes the umask on the
    /// way, and it finds the root of the share by the name ".": so its threads share neither with the rest of the process.
    ///
    /// # Errors
    /// As `unshare(2)` and `fchdir(2)`.
    pub(super) fn enter(&self) -> io::Result<()> {
        // SAFETY: CLONE_FS parts only working directory, root and umask, on which no memory safety hangs.
        unsafe { unshare_unsafe(UnshareFlags::FS)? };
        fchdir(&self.root)?;
        // The guest's own umask has been applied to the modes it sends.
        umask(Mode::empty());
        Ok(())
    }

    /// Opens the share. To be called on a thread that has [entered](Self::enter) it.
    ///
    /// # Errors
    /// When the root cannot be used.
    pub(super) fn open(&self) -> io::Result<Share> {
        let FsOptions { read_only, cache, writeback } = self.options;
        let (cache_policy, validity) = match cache {
            FsCache::Never => (CachePolicy::Never, Duration::ZERO),
            // Close-to-open: cached data is dropped when a file is opened.
            FsCache::Auto => (CachePolicy::Auto, AUTO_VALIDITY),
            FsCache::Always => (CachePolicy::Always, ALWAYS_VALIDITY),
        };
        let config = Config {
            root_dir: ".".to_owned(),
            proc_sfd_rawfd: Some(self.proc_fds.try_clone()?),
            entry_timeout: validity,
            attr_timeout: validity,
            cache_policy,
            // Without a cache a file can be mapped all the same: programs are.
            allow_mmap: true,
            writeback: writeback && !read_only,
            xattr: true,
            xattrmap: Some(XattrMap::try_from(XATTR_MAP).map_err(io::Error::other)?),
            posix_acl: NegotiationMode::Auto,
            // The root file system and volumes mounted below it have inode numbers in common.
            announce_submounts: true,
            // An inode that the guest has in its caches is a host descriptor. A file handle would stand for it without one, but is a
            // privilege of the host's root, for it opens what no path leads to (Linux 6.12 fs/fhandle.c, may_decode_fh()).
            inode_file_handles: InodeFileHandlesMode::Never,
            readdirplus: true,
            // O_DIRECT reaches the server either way; here it would fail where the host's file system cannot do it
            // (tmpfs before 6.6) and for buffers it finds misaligned.
            allow_direct_io: false,
            // The server drops set-user-ID bits and capabilities itself, so that the guest need not ask before every write.
            killpriv_v2: true,
            guest_fd_limit: self.descriptors.descriptors(),
            ..Config::default()
        };
        let server = if read_only {
            Access::ReadOnly(Server::new(PassthroughFsRo::new(config)?))
        } else {
            Access::ReadWrite(Server::new(PassthroughFs::new(config)?))
        };
        Ok(Share { server })
    }
}

impl Share {
    /// Handles one request; says how long its answer is, which may not all have fitted. A request that is not even well-formed FUSE
    /// has none.
    pub(super) fn handle(&self, request: Request<'_>) -> Option<usize> {
        let Request { reader, writer } = request;
        match &self.server {
            Access::ReadWrite(server) => handle(server, reader, writer),
            Access::ReadOnly(server) => handle(server, reader, writer),
        }
    }

    /// The session in the server's own form. To be called on a thread that has [entered](ShareSource::enter) the share, while no
    /// request is handled.
    ///
    /// # Errors
    /// When an inode cannot be described, or memory is short.
    pub(super) fn save(&self) -> io::Result<Vec<u8>> {
        let file = File::from(memfd_create("session", MemfdFlags::CLOEXEC)?);
        match &self.server {
            Access::ReadWrite(server) => save(server, file.try_clone()?),
            Access::ReadOnly(server) => save(server, file.try_clone()?),
        }?;
        let mut session = vec![0; file.metadata()?.len() as usize];
        file.read_exact_at(&mut session, 0)?;
        Ok(session)
    }

    /// Goes on with a session that [`Share::save`] gave.
    #[cfg(test)]
    pub(super) fn restore(&self, session: &[u8]) -> io::Result<()> {
        let file = File::from(memfd_create("session", MemfdFlags::CLOEXEC)?);
        file.write_all_at(session, 0)?;
        match &self.server {
            Access::ReadWrite(server) => server.deserialize_and_apply(file),
            Access::ReadOnly(server) => server.deserialize_and_apply(file),
        }
    }
}

fn save(server: &impl SerializableFileSystem, to: File) -> io::Result<()> {
    // Nobody cancels it.
    server.prepare_serialization(Arc::default());
    server.serialize(to)
}

fn handle<F: FileSystem + Sync>(server: &Server<F>, reader: Reader<'_>, writer: Writer<'_>) -> Option<usize> {
    // The third argument is for DAX mappings, which this version of the server does not do.
    server.handle_message::<()>(reader, writer, None).ok()
}
