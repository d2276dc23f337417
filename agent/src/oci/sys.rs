//! System calls that have no safe wrapper in the crates we use.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What [`clone`] returns.
#[derive(Debug)]
pub enum Cloned {
    /// In the child.
    Child,
    /// In the parent: the child's number.
    Parent(i32),
}

fn check(result: libc::c_long) -> io::Result<libc::c_long> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// clone3(2) like fork(2), with new namespaces, and into `cgroup` at once: a process that is born there need not be moved,
/// which would wait for every CPU.
///
/// # Errors
///
/// clone3(2). `EBUSY`: the cgroup may not hold processes.
///
/// # Safety
///
/// The process has one thread: no other could have held a lock that the child finds taken for ever.
pub unsafe fn clone(namespaces: u64, cgroup: BorrowedFd<'_>) -> io::Result<Cloned> {
    // Linux 6.12 include/uapi/linux/sched.h; libc's constant is too narrow for it.
    const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
    // SAFETY: an all-zero clone_args is a valid value: no pointer in it is used.
    let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
    args.flags = namespaces | CLONE_INTO_CGROUP;
    args.exit_signal = libc::SIGCHLD as u64;
    args.cgroup = cgroup.as_raw_fd() as u64;
    // SAFETY: without CLONE_VM this is a fork: the child has its own copy of memory, on the same stack.
    let pid =
        check(unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) })?;
    Ok(if pid == 0 { Cloned::Child } else { Cloned::Parent(pid as i32) })
}

/// What [`mount_setattr`] changes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct MountAttr {
    /// `MOUNT_ATTR_*` to set.
    pub set: u64,
    /// `MOUNT_ATTR_*` to clear.
    pub clear: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE`, `MS_UNBINDABLE`, or 0 for no change.
    pub propagation: u64,
}

impl MountAttr {
    /// Whether it changes nothing.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// mount_setattr(2) on the mount that `mount` is the root of, and on those below it if `recursive`.
///
/// # Errors
///
/// mount_setattr(2).
pub fn mount_setattr(mount: impl AsFd, recursive: bool, attr: MountAttr) -> io::Result<()> {
    if attr.is_empty() {
        return Ok(());
    }
    let raw = libc::mount_attr {
        attr_set: attr.set,
        attr_clr: attr.clear,
        propagation: attr.propagation,
        userns_fd: 0,
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the descriptor is open while it is borrowed; the path is a C string; the kernel reads `raw` of the length
    // given and keeps no pointer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const raw,
            size_of::<libc::mount_attr>(),
        )
    };
    check(result).map(drop)
}

/// setns(2) into every namespace of `process` that `namespaces` (`CLONE_NEW*`) names, or into the one that a file of
/// `/proc/PID/ns` stands for. A namespace of process IDs is that of later children.
///
/// # Errors
///
/// setns(2).
pub fn setns(fd: impl AsFd, namespaces: libc::c_int) -> io::Result<()> {
    // SAFETY: takes integers. CLONE_NEWNS and CLONE_NEWUSER fail in a process with threads; nothing else is shared here.
    check(unsafe { libc::setns(fd.as_fd().as_raw_fd(), namespaces) }.into()).map(drop)
}

/// unshare(2) of `CLONE_NEW*`.
///
/// # Errors
///
/// unshare(2).
pub fn unshare(namespaces: libc::c_int) -> io::Result<()> {
    // SAFETY: takes an integer; namespaces only, so the table of descriptors stays shared as it was.
    check(unsafe { libc::unshare(namespaces) }.into()).map(drop)
}

/// `struct sched_attr` (Linux 6.12 include/uapi/linux/sched/types.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, Default)]
pub struct SchedAttr {
    /// Of this structure.
    pub size: u32,
    /// `SCHED_*`.
    pub policy: u32,
    /// `SCHED_FLAG_*`.
    pub flags: u64,
    /// For `SCHED_OTHER` and `SCHED_BATCH`.
    pub nice: i32,
    /// For `SCHED_FIFO` and `SCHED_RR`.
    pub priority: u32,
    /// For `SCHED_DEADLINE`, nanoseconds.
    pub runtime: u64,
    /// As above.
    pub deadline: u64,
    /// As above.
    pub period: u64,
    /// 0 to 1024.
    pub util_min: u32,
    /// As above.
    pub util_max: u32,
}

/// sched_setattr(2) of a process.
///
/// # Errors
///
/// sched_setattr(2).
pub fn sched_setattr(pid: i32, mut attr: SchedAttr) -> io::Result<()> {
    attr.size = size_of::<SchedAttr>() as u32;
    // SAFETY: the kernel reads as much of `attr` as its first field says.
    check(unsafe { libc::syscall(libc::SYS_sched_setattr, pid, &raw const attr, 0) }).map(drop)
}

/// ioprio_set(2) of a process: `class` 1 to 3, `level` 0 to 7.
///
/// # Errors
///
/// ioprio_set(2).
pub fn ioprio_set(pid: i32, class: u32, level: u32) -> io::Result<()> {
    const IOPRIO_WHO_PROCESS: libc::c_int = 1;
    const IOPRIO_CLASS_SHIFT: u32 = 13;
    let value = (class << IOPRIO_CLASS_SHIFT) | level;
    // SAFETY: takes integers.
    check(unsafe { libc::syscall(libc::SYS_ioprio_set, IOPRIO_WHO_PROCESS, pid, value) }).map(drop)
}

/// A new, empty session keyring for this process, so that it does not share its parent's.
///
/// # Errors
///
/// keyctl(2); `ENOSYS` in a kernel without keys.
pub fn join_new_session_keyring() -> io::Result<()> {
    const KEYCTL_JOIN_SESSION_KEYRING: libc::c_int = 1;
    // SAFETY: a null name asks for an anonymous keyring.
    check(unsafe { libc::syscall(libc::SYS_keyctl, KEYCTL_JOIN_SESSION_KEYRING, std::ptr::null::<u8>()) })
        .map(drop)
}

/// personality(2).
///
/// # Errors
///
/// personality(2).
pub fn personality(value: libc::c_ulong) -> io::Result<()> {
    // SAFETY: takes an integer.
    check(unsafe { libc::personality(value) }.into()).map(drop)
}

/// Sets the flag on every descriptor from 3 up that closes it at exec.
///
/// # Errors
///
/// close_range(2).
pub fn close_others_at_exec() -> io::Result<()> {
    // SAFETY: only sets flags.
    check(unsafe { libc::syscall(libc::SYS_close_range, 3, u32::MAX, libc::CLOSE_RANGE_CLOEXEC) }).map(drop)
}

/// Makes the terminal `slave` the controlling one of this session, which this process leads.
///
/// # Errors
///
/// `TIOCSCTTY`.
pub fn set_controlling_terminal(slave: impl AsFd) -> io::Result<()> {
    // SAFETY: TIOCSCTTY takes an integer.
    check(unsafe { libc::ioctl(slave.as_fd().as_raw_fd(), libc::TIOCSCTTY, 0) }.into()).map(drop)
}

/// The slave of a terminal's master.
///
/// # Errors
///
/// `TIOCSPTLCK`, `TIOCGPTPEER`.
pub fn open_slave(master: impl AsFd) -> io::Result<OwnedFd> {
    let (master, unlock) = (master.as_fd().as_raw_fd(), 0_i32);
    // SAFETY: TIOCSPTLCK reads an int.
    check(unsafe { libc::ioctl(master, libc::TIOCSPTLCK, &raw const unlock) }.into())?;
    let flags = libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC;
    // SAFETY: TIOCGPTPEER takes open flags as its argument and touches no memory of ours.
    let slave = check(unsafe { libc::ioctl(master, libc::TIOCGPTPEER, flags) }.into())?;
    // SAFETY: the kernel has just made this descriptor and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(slave as i32) })
}

/// An anonymous file with these contents, to be read from its start.
///
/// # Errors
///
/// memfd_create(2), write(2).
pub fn file_of(contents: &[u8]) -> io::Result<std::fs::File> {
    use std::io::{Seek, Write};
    let fd = rustix::fs::memfd_create("kvrun", rustix::fs::MemfdFlags::CLOEXEC)?;
    let mut file = std::fs::File::from(fd);
    file.write_all(contents)?;
    file.rewind()?;
    Ok(file)
}
