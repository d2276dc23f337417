//! System calls that have no safe wrapper in the crates we use. The only unsafe code of this crate beside the VMM's `pre_exec`.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// What [`mount_setattr`] changes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct MountAttr<'a> {
    /// `MOUNT_ATTR_*` to set.
    pub(crate) set: u64,
    /// `MS_SHARED`, `MS_SLAVE`, `MS_PRIVATE` or 0 for no change.
    pub(crate) propagation: u64,
    /// With `MOUNT_ATTR_IDMAP`: the mappings.
    pub(crate) user_namespace: Option<BorrowedFd<'a>>,
}

/// mount_setattr(2) on the mount that `mount` is the root of, and on those below it if `recursive`.
pub(crate) fn mount_setattr(mount: impl AsFd, recursive: bool, attr: MountAttr<'_>) -> io::Result<()> {
    let attr = libc::mount_attr {
        attr_set: attr.set,
        attr_clr: 0,
        propagation: attr.propagation,
        userns_fd: attr.user_namespace.map_or(0, |fd| fd.as_raw_fd() as u64),
    };
    let flags = libc::AT_EMPTY_PATH | if recursive { libc::AT_RECURSIVE } else { 0 };
    // SAFETY: the descriptor is open while it is borrowed; the path is a C string; the kernel reads `attr` of the length given and
    // keeps no pointer.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            mount.as_fd().as_raw_fd(),
            c"".as_ptr(),
            flags,
            &raw const attr,
            size_of::<libc::mount_attr>(),
        )
    };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Puts this thread, which must be the only one of the process, into a mount namespace of its own.
pub(crate) fn unshare_mount_namespace() -> io::Result<()> {
    // SAFETY: CLONE_NEWNS does not unshare the table of descriptors, which is what makes the call unsafe.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNS) }.map_err(Into::into)
}

/// KVM_GET_API_VERSION on an open `/dev/kvm`; `ENOTTY` if it is something else.
pub(crate) fn kvm_api_version(kvm: impl AsFd) -> io::Result<i32> {
    /// `_IO(KVMIO, 0x00)`, Linux include/uapi/linux/kvm.h.
    const KVM_GET_API_VERSION: libc::c_ulong = 0xae00;
    // SAFETY: the descriptor is open while it is borrowed; the request takes no argument.
    let result = unsafe { libc::ioctl(kvm.as_fd().as_raw_fd(), KVM_GET_API_VERSION, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes `tun`, a fresh descriptor of `/dev/net/tun`, a queue of the tap device `name`, whose packets carry the header of virtio. The name it has
/// then, which differs if there is a `%d` in the one given.
pub(crate) fn make_tap(tun: impl AsFd, name: &str, multi_queue: bool) -> io::Result<String> {
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays a NUL.
    if name.len() >= request.ifr_name.len() {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags =
        (flags | if multi_queue { libc::IFF_MULTI_QUEUE } else { 0 }) as libc::c_short;
    // SAFETY: TUNSETIFF reads and writes an `ifreq`, which lives as long as the call.
    let result = unsafe { libc::ioctl(tun.as_fd().as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    let name = request.ifr_name.iter().map(|c| *c as u8).take_while(|c| *c != 0).collect();
    String::from_utf8(name).map_err(|_| io::ErrorKind::InvalidData.into())
}

/// One instruction of a program for the kernel (`struct bpf_insn`, Linux include/uapi/linux/bpf.h).
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Instruction {
    pub(crate) code: u8,
    /// Destination in the lower, source in the upper half.
    pub(crate) registers: u8,
    pub(crate) offset: i16,
    pub(crate) immediate: i32,
}

/// bpf(2), of commands that answer a number.
///
/// # Safety
/// What the attribute points to must be as the command has it, and outlive the call.
unsafe fn bpf<T>(command: libc::c_int, attribute: &T) -> io::Result<i32> {
    // SAFETY: the kernel reads the attribute, of the length given; the rest is the caller's.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, &raw const *attribute, size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as i32) }
}

/// A map with one element: a socket that listens.
pub(crate) fn socket_map(socket: impl AsFd) -> io::Result<OwnedFd> {
    const BPF_MAP_CREATE: libc::c_int = 0;
    const BPF_MAP_UPDATE_ELEM: libc::c_int = 2;
    const BPF_MAP_TYPE_SOCKMAP: u32 = 15;
    // Type, sizes of a key and of a value, number of elements.
    let create = [BPF_MAP_TYPE_SOCKMAP, 4, 4, 1];
    // SAFETY: the attribute has no pointers.
    let map = unsafe { bpf(BPF_MAP_CREATE, &create) }?;
    // SAFETY: the kernel has just made this descriptor (with O_CLOEXEC) and nobody else knows of it.
    let map = unsafe { OwnedFd::from_raw_fd(map) };
    let (key, value) = (0_u32, socket.as_fd().as_raw_fd());
    // Map, key, value, flags.
    let update = [map.as_raw_fd() as u64, &raw const key as u64, &raw const value as u64, 0];
    // SAFETY: key and value have the sizes of the map's and outlive the call.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &update) }?;
    Ok(map)
}

/// `BPF_SK_LOOKUP`.
const SOCKET_LOOKUP: u32 = 36;

/// Loads a program that says for which socket a packet is.
pub(crate) fn load_socket_lookup(program: &[Instruction]) -> io::Result<OwnedFd> {
    const BPF_PROG_LOAD: libc::c_int = 5;
    const BPF_PROG_TYPE_SK_LOOKUP: u32 = 30;
    /// The fields of `union bpf_attr` up to the last one that we use.
    #[repr(C)]
    struct Load {
        program_type: u32,
        instruction_count: u32,
        instructions: u64,
        license: u64,
        /// Log, version of the kernel, flags, name, network interface.
        unused: [u32; 11],
        expected_attach_type: u32,
    }
    let load = Load {
        program_type: BPF_PROG_TYPE_SK_LOOKUP,
        instruction_count: program.len() as u32,
        instructions: program.as_ptr() as u64,
        // It calls no function that asks for one.
        license: c"Apache-2.0".as_ptr() as u64,
        unused: [0; 11],
        expected_attach_type: SOCKET_LOOKUP,
    };
    // SAFETY: the instructions and the license outlive the call.
    let loaded = unsafe { bpf(BPF_PROG_LOAD, &load) }?;
    // SAFETY: the kernel has just made this descriptor (with O_CLOEXEC) and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(loaded) })
}

/// Attaches such a program to a network namespace, until the descriptor is closed.
pub(crate) fn attach_socket_lookup(program: &OwnedFd, namespace: impl AsFd) -> io::Result<OwnedFd> {
    const BPF_LINK_CREATE: libc::c_int = 28;
    // Program, target, type, flags.
    let create = [program.as_raw_fd() as u32, namespace.as_fd().as_raw_fd() as u32, SOCKET_LOOKUP, 0];
    // SAFETY: the attribute has no pointers.
    let link = unsafe { bpf(BPF_LINK_CREATE, &create) }?;
    // SAFETY: the kernel has just made this descriptor (with O_CLOEXEC) and nobody else knows of it.
    Ok(unsafe { OwnedFd::from_raw_fd(link) })
}

/// Has the children of this thread start in a PID namespace of their own, all in one.
pub(crate) fn unshare_pid_namespace_of_children() -> io::Result<()> {
    // SAFETY: CLONE_NEWPID does not unshare the table of descriptors, which is what makes the call unsafe.
    unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWPID) }.map_err(Into::into)
}

/// In the child of a fork: each descriptor gets its target number, and everything above the last target is closed by the coming
/// exec. Targets ascend, and every descriptor is above all targets. Async-signal-safe.
pub(crate) fn keep_descriptors(kept: &[(i32, i32)]) -> io::Result<()> {
    let mut first = 0;
    for (descriptor, target) in kept {
        // SAFETY: plain system calls on numbers; the target belongs to nobody in the child, which execs or exits next.
        let result = unsafe { libc::dup2(*descriptor, *target) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        first = target.unsigned_abs() + 1;
    }
    let last = u32::MAX;
    // SAFETY: as above; CLOSE_RANGE_CLOEXEC only sets flags.
    let result = unsafe { libc::syscall(libc::SYS_close_range, first, last, libc::CLOSE_RANGE_CLOEXEC) };
    if result == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// A process that does nothing, in namespaces of its own. Dropped, it is gone.
#[derive(Debug)]
pub(crate) struct Idle(i32);

impl Idle {
    /// One in a new user namespace.
    pub(crate) fn in_user_namespace() -> io::Result<Self> {
        // SAFETY: an all-zero clone_args is a valid value: no pointer in it is used. Without an exit signal, nobody who
        // waits for other children hears of it.
        let mut args: libc::clone_args = unsafe { std::mem::zeroed() };
        args.flags = libc::CLONE_NEWUSER as u64;
        // SAFETY: without CLONE_VM this is a fork; the child makes one system call after another and touches no lock.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, &raw mut args, size_of::<libc::clone_args>()) };
        match pid {
            0 => loop {
                // SAFETY: takes nothing. Only SIGKILL is meant to end it.
                unsafe { libc::pause() };
            },
            1.. => Ok(Self(pid as i32)),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Its number.
    pub(crate) fn pid(&self) -> i32 {
        self.0
    }
}

impl Drop for Idle {
    fn drop(&mut self) {
        // SAFETY: our own child, which has not been waited for, so that the number is its. __WALL: it has no exit signal.
        unsafe {
            libc::kill(self.0, libc::SIGKILL);
            libc::waitpid(self.0, std::ptr::null_mut(), libc::__WALL);
        }
    }
}
