//! What cases are written with: other processes and users, and system calls that `std` does not have.

use std::ffi::CString;
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, openat, unlinkat};
use rustix::io::Errno;

/// A user that owns nothing.
pub(crate) const ALICE: u32 = 2001;
/// Another.
pub(crate) const BOB: u32 = 2002;

/// Another process of this program.
pub(crate) struct Child {
    pid: libc::pid_t,
    report: File,
}

impl Child {
    /// Does `body` in a process of its own. This process must have one thread.
    pub(crate) fn start(body: impl FnOnce() -> Result<()>) -> Result<Self> {
        let (report, mut complaint) = io::pipe()?;
        // SAFETY: the process has one thread, so the child is free to do anything.
        match unsafe { libc::fork() } {
            -1 => bail!(io::Error::last_os_error()),
            0 => {
                drop(report);
                let code = match body() {
                    Ok(()) => 0,
                    Err(e) => {
                        let _ = write!(complaint, "{e:#}");
                        1
                    }
                };
                // SAFETY: ends the process, without the destructors of what the parent holds.
                unsafe { libc::_exit(code) }
            }
            pid => Ok(Self { pid, report: File::from(OwnedFd::from(report)) }),
        }
    }

    /// Waits for its end: the signal that ended it, if one did.
    pub(crate) fn signal(mut self) -> Result<Option<i32>> {
        let mut complaint = String::new();
        self.report.read_to_string(&mut complaint)?;
        let mut status = 0;
        // SAFETY: writes to a local variable.
        ensure!(unsafe { libc::waitpid(self.pid, &raw mut status, 0) } == self.pid, "waitpid");
        if libc::WIFSIGNALED(status) {
            return Ok(Some(libc::WTERMSIG(status)));
        }
        ensure!(libc::WEXITSTATUS(status) == 0, "{complaint}");
        Ok(None)
    }

    /// Waits for its end, which must be a good one.
    pub(crate) fn wait(self) -> Result<()> {
        match self.signal()? {
            None => Ok(()),
            Some(signal) => bail!("ended by signal {signal}"),
        }
    }
}

/// Does `body` in a process of its own, to the end.
pub(crate) fn in_child(body: impl FnOnce() -> Result<()>) -> Result<()> {
    Child::start(body)?.wait()
}

/// Does `body` as a user, with one group of the same number and supplementary groups.
pub(crate) fn as_user(user: u32, groups: &[u32], body: impl FnOnce() -> Result<()>) -> Result<()> {
    in_child(|| {
        // SAFETY: plain system calls; the slice outlives the first.
        let done = unsafe {
            libc::setgroups(groups.len(), groups.as_ptr()) == 0
                && libc::setresgid(user, user, user) == 0
                && libc::setresuid(user, user, user) == 0
        };
        ensure!(done, "cannot become user {user}");
        body()
    })
    .with_context(|| format!("as user {user} of groups {groups:?}"))
}

/// Fails unless `result` is the error.
pub(crate) fn refused<T, E: Into<io::Error>>(result: Result<T, E>, expected: Errno) -> Result<()> {
    match result {
        Ok(_) => bail!("succeeded, and should be {expected}"),
        Err(e) => {
            let e = e.into();
            ensure!(e.raw_os_error() == Some(expected.raw_os_error()), "{e}, and should be {expected}");
            Ok(())
        }
    }
}

/// Fails unless `result` is good, whatever it is.
pub(crate) fn works<T, E: Into<anyhow::Error>>(result: Result<T, E>) -> Result<()> {
    result.map(drop).map_err(Into::into)
}

/// Makes a file with some content.
pub(crate) fn file(path: &Path, content: &[u8]) -> Result<File> {
    let mut file = OpenOptions::new().read(true).write(true).create_new(true).open(path)?;
    file.write_all(content)?;
    Ok(file)
}

/// Opens a file for reading and writing.
pub(crate) fn open(path: &Path) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).open(path)
}

/// Opens a file for writing with flags of open(2).
pub(crate) fn open_with(path: &Path, flags: i32) -> io::Result<File> {
    OpenOptions::new().read(true).write(true).custom_flags(flags).open(path)
}

/// All of a file from its beginning, by its descriptor.
pub(crate) fn content(file: &File) -> Result<Vec<u8>> {
    let mut bytes = vec![0; file.metadata()?.len() as usize];
    file.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}

/// The permission bits, with those for set-user-ID, set-group-ID and sticky.
pub(crate) fn mode(path: &Path) -> Result<u32> {
    Ok(path.symlink_metadata()?.mode() & 0o7777)
}

/// chmod(2).
pub(crate) fn chmod(path: &Path, mode: u32) -> io::Result<()> {
    std::fs::set_permissions(path, Permissions::from_mode(mode))
}

/// chown(2) of both to the same number.
pub(crate) fn give(path: &Path, user: u32) -> io::Result<()> {
    std::os::unix::fs::lchown(path, Some(user), Some(user))
}

/// The names in a directory but `.` and `..`, sorted.
pub(crate) fn list(dir: &Path) -> Result<Vec<String>> {
    let mut names = std::fs::read_dir(dir)?
        .map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned()))
        .collect::<io::Result<Vec<_>>>()?;
    names.sort();
    Ok(names)
}

/// Makes a FIFO or a socket.
pub(crate) fn make_node(path: &Path, kind: FileType) -> io::Result<()> {
    Ok(rustix::fs::mknodat(rustix::fs::CWD, path, kind, Mode::from(0o644), 0)?)
}

/// Whether access(2) says that a user in `as_user` may.
pub(crate) fn may(path: &Path, what: libc::c_int) -> Result<bool> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the string outlives the call.
    Ok(unsafe { libc::access(path.as_ptr(), what) } == 0)
}

/// Removes a directory with all below it, however deep.
pub(crate) fn remove_tree(dir: &Path) -> Result<()> {
    // From each directory the way back is "..", so neither paths nor open files grow with the depth.
    let mut at = openat(rustix::fs::CWD, dir, DIRECTORY, Mode::empty())?;
    let mut names: Vec<CString> = Vec::new();
    loop {
        let mut inner = None;
        for entry in Dir::read_from(&at)? {
            let entry = entry?;
            if entry.file_name() == c"." || entry.file_name() == c".." {
                continue;
            }
            match unlinkat(&at, entry.file_name(), AtFlags::empty()) {
                Ok(()) => {}
                Err(Errno::ISDIR | Errno::PERM) => inner = Some(entry.file_name().to_owned()),
                Err(e) => return Err(e.into()),
            }
        }
        if let Some(inner) = inner {
            at = openat(&at, &inner, DIRECTORY, Mode::empty())?;
            names.push(inner);
        } else if let Some(name) = names.pop() {
            at = openat(&at, "..", DIRECTORY, Mode::empty())?;
            unlinkat(&at, &name, AtFlags::REMOVEDIR)?;
        } else {
            return Ok(std::fs::remove_dir(dir)?);
        }
    }
}

/// How a directory is opened to be read.
pub(crate) const DIRECTORY: OFlags = OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// Two ends of a conversation: whoever waits is let go by one byte of the other.
pub(crate) struct Turns {
    reader: io::PipeReader,
    writer: io::PipeWriter,
}

impl Turns {
    /// The parent's end and the child's.
    pub(crate) fn pair() -> Result<(Self, Self)> {
        let ((one_reads, other_writes), (other_reads, one_writes)) = (io::pipe()?, io::pipe()?);
        Ok((
            Self { reader: one_reads, writer: one_writes },
            Self { reader: other_reads, writer: other_writes },
        ))
    }

    /// Lets the other go.
    pub(crate) fn pass(&mut self) -> Result<()> {
        Ok(self.writer.write_all(&[1])?)
    }

    /// Waits for the other.
    pub(crate) fn wait(&mut self) -> Result<()> {
        self.reader.read_exact(&mut [0; 1]).context("the other process ended")
    }
}

/// fallocate(2).
pub(crate) fn fallocate(
    file: impl AsFd,
    mode: rustix::fs::FallocateFlags,
    offset: u64,
    len: u64,
) -> io::Result<()> {
    Ok(rustix::fs::fallocate(file, mode, offset, len)?)
}

/// Sets both times of a file, in seconds since the epoch.
pub(crate) fn set_times(path: &Path, accessed: i64, modified: i64) -> Result<()> {
    let at = |tv_sec| rustix::time::Timespec { tv_sec, tv_nsec: 0 };
    let times = rustix::fs::Timestamps { last_access: at(accessed), last_modification: at(modified) };
    Ok(rustix::fs::utimensat(rustix::fs::CWD, path, &times, AtFlags::SYMLINK_NOFOLLOW)?)
}

/// chown(2).
pub(crate) fn chown(path: &Path, user: u32, group: u32) -> io::Result<()> {
    std::os::unix::fs::lchown(path, Some(user), Some(group))
}
