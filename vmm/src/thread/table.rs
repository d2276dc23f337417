//! The table of system calls: who may make which, with which arguments, and why. Also part of the build script, which makes the filters from
//! it.
//!
//! One line per call and reason. A call that no line allows ends the process ([`super::violation`]); with those of [`NEVER`] the kernel does that itself. A line that one of its classes does not need is an error
//! too: `tests/e2e` looks at real machines and finds it, unless the line says [`Rule::rarely`] when it is needed.
//!
//! A filter sees the number of a call and its arguments, not what pointers among them point to. Arguments are looked at where they tell much used
//! calls from dangerous ones: no memory is ever made executable, no socket is made, no ioctl is made but those listed.
//!
//! Calls that a thread makes before its own filter is on - when it starts, and the main thread until the guest does - are not those of its class.

use super::class::Class;
use Class::{Blk, EventLoop, Fs, Main, Net, Spawner, Vcpu};

/// A system call.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Call {
    /// Its number.
    pub number: i64,
    /// Its name, with `SYS_` before it.
    pub name: &'static str,
}

/// What an argument must be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// The argument of this index is exactly this in its lower 32 bits, which is all that the calls in question look at.
    Is(u8, u32),
    /// The argument of this index has none of these bits.
    Without(u8, u32),
    /// The argument of this index is a null pointer.
    Null(u8),
}

impl Condition {
    /// Whether it holds of these arguments.
    pub fn holds(self, args: [u64; 6]) -> bool {
        match self {
            Self::Is(index, value) => args[usize::from(index)] as u32 == value,
            Self::Without(index, bits) => args[usize::from(index)] as u32 & bits == 0,
            Self::Null(index) => args[usize::from(index)] == 0,
        }
    }
}

/// A line of the table.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// Whose.
    pub who: &'static [Class],
    /// What they may do ...
    pub call: Call,
    /// ... if all of this holds.
    pub when: &'static [Condition],
    /// What for.
    pub why: &'static str,
    /// The occasion, if it is not one of every run.
    pub rarely: Option<&'static str>,
    /// The call is not made, and its caller gets this error number.
    pub refused: Option<u16>,
}

impl Rule {
    const fn rarely(mut self, when: &'static str) -> Self {
        self.rarely = Some(when);
        self
    }

    const fn refused(mut self, error: i32) -> Self {
        self.refused = Some(error as u16);
        self
    }
}

const fn allow(who: &'static [Class], call: Call, when: &'static [Condition], why: &'static str) -> Rule {
    Rule { who, call, when, why, rarely: None, refused: None }
}

macro_rules! call {
    ($name:ident) => {
        Call { number: libc::$name, name: stringify!($name) }
    };
}

use Condition::{Is, Null, Without};

const EVERY: &[Class] = &[Main, Vcpu, EventLoop, Fs, Blk, Net];
/// Those that begin and end while the machine is there.
const SPAWNED: &[Class] = &[Vcpu, EventLoop, Fs, Blk, Net];
const ANY: &[Condition] = &[];
/// No memory that can be executed.
const NO_CODE: &[Condition] = &[Without(2, libc::PROT_EXEC as u32)];

/// `KVMIO` of Linux include/uapi/linux/kvm.h, with the number of a request without data.
const fn kvm(number: u32) -> u32 {
    0xae << 8 | number
}

/// The same for a request that the kernel reads `size` bytes for.
const fn kvm_write(number: u32, size: u32) -> u32 {
    1 << 30 | size << 16 | kvm(number)
}

/// The same for a request that the kernel writes `size` bytes for.
const fn kvm_read(number: u32, size: u32) -> u32 {
    2 << 30 | size << 16 | kvm(number)
}

const KVM_RUN: u32 = kvm(0x80);
const KVM_KVMCLOCK_CTRL: u32 = kvm(0xad);
const KVM_GET_REGS: u32 = kvm_read(0x81, 144);
const KVM_SET_USER_MEMORY_REGION: u32 = kvm_write(0x46, 32);
const KVM_IOEVENTFD: u32 = kvm_write(0x79, 64);

/// A request of Linux include/uapi/linux/vhost.h: whether the kernel reads (1) or writes (2) data or both, which, how many bytes.
const fn vhost(direction: u32, number: u32, size: u32) -> u32 {
    direction << 30 | size << 16 | 0xaf << 8 | number
}

/// Linux include/uapi/linux/fs.h.
const BLKSSZGET: u32 = 0x12 << 8 | 104;
/// The same.
const BLKDISCARD: u32 = 0x12 << 8 | 119;

/// The first real-time signal that the C library leaves to programs: [`kick_signal`](crate::vcpu::kick_signal).
const KICK: u32 = 34;

/// A stream socket of this process and no other, whatever `SOCK_*` flags are with it.
const UNIX_STREAM: &[Condition] = &[
    Is(0, libc::AF_UNIX as u32),
    Is(1, (libc::SOCK_STREAM | libc::SOCK_CLOEXEC | libc::SOCK_NONBLOCK) as u32),
];

/// `CLONE_*` as pthread_create(3) has them (glibc sysdeps/unix/sysv/linux, createthread): a thread, and neither process nor namespace.
pub const CLONE_THREAD: u32 = (libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SYSVSEM
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SETTLS
    | libc::CLONE_PARENT_SETTID
    | libc::CLONE_CHILD_CLEARTID) as u32;

/// What no thread has any use for and whoever takes one over would. Here the kernel ends the process itself and does not leave that to a handler
/// in it ([`super::violation`]), for the price that nobody is told which of these it was, but by the kernel's log.
pub const NEVER: &[Call] = &[
    call!(SYS_execve),
    call!(SYS_execveat),
    call!(SYS_fork),
    call!(SYS_vfork),
    call!(SYS_ptrace),
    call!(SYS_process_vm_readv),
    call!(SYS_process_vm_writev),
    call!(SYS_socket),
    call!(SYS_connect),
    call!(SYS_bind),
    call!(SYS_mount),
    call!(SYS_open_tree),
    call!(SYS_move_mount),
    call!(SYS_fsopen),
    call!(SYS_pivot_root),
    call!(SYS_chroot),
    call!(SYS_setns),
    call!(SYS_bpf),
    call!(SYS_perf_event_open),
    call!(SYS_userfaultfd),
    call!(SYS_keyctl),
    call!(SYS_add_key),
    call!(SYS_open_by_handle_at),
    call!(SYS_kill),
    call!(SYS_pidfd_open),
    call!(SYS_pidfd_getfd),
    call!(SYS_init_module),
    call!(SYS_finit_module),
    call!(SYS_kexec_load),
    call!(SYS_reboot),
    call!(SYS_memfd_create),
    call!(SYS_pkey_mprotect),
    call!(SYS_fsmount),
    call!(SYS_umount2),
    call!(SYS_mount_setattr),
    call!(SYS_delete_module),
    call!(SYS_kexec_file_load),
];

/// The table.
#[rustfmt::skip] // One line each.
pub const RULES: &[Rule] = &[
    // What every thread does: wait, allocate, end.
    allow(EVERY, call!(SYS_futex), ANY, "locks, channels, joins"),
    allow(&[Main, Vcpu, EventLoop, Blk, Net], call!(SYS_read), ANY, "eventfds: kicks, wake-ups"),
    allow(EVERY, call!(SYS_write), ANY, "eventfds: interrupts, wake-ups; complaints on standard error"),
    allow(EVERY, call!(SYS_close), ANY, "descriptors that are done with"),
    allow(EVERY, call!(SYS_fcntl), &[Is(1, libc::F_GETFD as u32)], "closing a descriptor").rarely("the VMM is built with debug assertions"),
    allow(&[Main], call!(SYS_brk), ANY, "malloc: the first heap"),
    allow(SPAWNED, call!(SYS_brk), ANY, "malloc: the first heap").rarely("a thread gives back the end of it, which the main thread has left; or there are more threads than heaps, eight for each processor"),
    allow(&[Main, Fs, Blk], call!(SYS_mmap), NO_CODE, "malloc: heaps of threads, large blocks"),
    allow(&[Vcpu, EventLoop, Net], call!(SYS_mmap), NO_CODE, "malloc: heaps of threads, large blocks").rarely("a vector of more than 128 KiB, or a heap is full"),
    allow(EVERY, call!(SYS_munmap), ANY, "malloc; what a thread that ends leaves"),
    allow(EVERY, call!(SYS_mprotect), NO_CODE, "malloc: heaps of threads grow").rarely("the heap of a thread grows beyond 132 KiB"),
    allow(SPAWNED, call!(SYS_madvise), &[Is(2, libc::MADV_DONTNEED as u32)], "the stack of a thread that ends; memory that a guest gives back"),
    allow(&[Main], call!(SYS_madvise), &[Is(2, libc::MADV_DONTNEED as u32)], "malloc: heaps of threads shrink").rarely("it gives back the end of a heap, which a thread has left"),
    allow(EVERY, call!(SYS_mremap), ANY, "malloc: large blocks grow").rarely("a vector grows beyond 128 KiB"),
    allow(&[Main, Vcpu, EventLoop, Blk, Net], call!(SYS_openat), ANY, "malloc asks /proc about overcommitting before it gives memory back, and takes what it would be told in the jail anyway for an answer").refused(libc::ENOENT).rarely("a thread's heap shrinks; no tracer sees it"),
    allow(&[Vcpu, EventLoop], call!(SYS_getrandom), ANY, "keys of hash maps; the entropy device"),
    allow(EVERY, call!(SYS_sigaltstack), ANY, "a thread that ends"),
    allow(EVERY, call!(SYS_rt_sigprocmask), ANY, "a thread that ends"),
    allow(SPAWNED, call!(SYS_exit), ANY, "a thread that ends"),
    allow(&[Main], call!(SYS_exit_group), ANY, "the end of the process"),
    allow(SPAWNED, call!(SYS_exit_group), ANY, "the end of the process").rarely("a panic, or a call that is not allowed"),
    allow(EVERY, call!(SYS_sched_yield), ANY, "channels, for a moment before they sleep").rarely("two threads race for a channel"),
    allow(EVERY, call!(SYS_clock_gettime), ANY, "time").rarely("the host's clock source is one that only the kernel reads"),
    allow(EVERY, call!(SYS_restart_syscall), ANY, "goes on waiting").rarely("somebody stops the process and continues it"),
    allow(EVERY, call!(SYS_rt_sigaction), &[Is(0, libc::SIGABRT as u32)], "abort(3)").rarely("the VMM crashes"),
    allow(EVERY, call!(SYS_rt_sigaction), &[Is(0, libc::SIGSEGV as u32)], "the handler that tells a stack overflow, done").rarely("the VMM crashes"),
    allow(EVERY, call!(SYS_rt_sigaction), &[Is(0, libc::SIGBUS as u32)], "the same handler").rarely("the VMM crashes"),
    allow(EVERY, call!(SYS_gettid), ANY, "abort(3)").rarely("the VMM crashes"),
    allow(SPAWNED, call!(SYS_getpid), ANY, "abort(3)").rarely("the VMM crashes"),
    allow(EVERY, call!(SYS_tgkill), &[Is(2, libc::SIGABRT as u32)], "abort(3)").rarely("the VMM crashes"),
    allow(&[Main, EventLoop, Fs, Blk, Net], call!(SYS_rt_sigreturn), ANY, "the handler that tells a stack overflow").rarely("the VMM crashes"),

    // The guest.
    allow(&[Vcpu], call!(SYS_ioctl), &[Is(1, KVM_RUN)], "runs the guest"),
    allow(&[Vcpu], call!(SYS_ioctl), &[Is(1, KVM_GET_REGS)], "tells where the guest was").rarely("KVM gives up on the guest"),
    allow(&[Vcpu], call!(SYS_ioctl), &[Is(1, KVM_KVMCLOCK_CTRL)], "tells a guest that it was held"),
    allow(&[Vcpu], call!(SYS_rt_sigreturn), ANY, "the kick that takes a vCPU out of the guest"),
    allow(&[Main], call!(SYS_tgkill), &[Is(2, KICK)], "the kick that takes a vCPU out of the guest"),
    allow(&[Main], call!(SYS_getpid), ANY, "which process to kick in; abort(3)"),

    // The control socket, and what it asks for.
    allow(&[Main], call!(SYS_ppoll), ANY, "waits for requests and for the end of the machine"),
    allow(&[Main], call!(SYS_recvmsg), ANY, "requests"),
    allow(&[Main, EventLoop], call!(SYS_sendmsg), ANY, "replies and events; bytes of vsock connections"),
    allow(&[Main], call!(SYS_ioctl), &[Is(1, KVM_IOEVENTFD)], "queues of a device that is attached or detached"),
    allow(&[Main, Vcpu, Net], call!(SYS_eventfd2), ANY, "kicks of a device's queues; what wakes its workers; errors of vhost-net"),
    allow(&[Main], call!(SYS_openat2), ANY, "the directory of a share"),
    allow(&[Main, Vcpu, Fs], call!(SYS_fcntl), &[Is(1, libc::F_DUPFD_CLOEXEC as u32)], "descriptors in two hands"),
    allow(&[Main], call!(SYS_fcntl), &[Is(1, libc::F_GETFL as u32)], "whether a disk's image is open for writing"),
    allow(&[Main], call!(SYS_getsockopt), &[Is(1, libc::SOL_SOCKET as u32), Is(2, libc::SO_DOMAIN as u32)], "what a stream handed in is"),
    allow(&[Main], call!(SYS_getsockopt), &[Is(1, libc::SOL_SOCKET as u32), Is(2, libc::SO_TYPE as u32)], "what a stream handed in is"),
    allow(&[Main], call!(SYS_prlimit64), &[Is(0, 0), Null(2)], "how many descriptors a share may have"),
    allow(&[Main], call!(SYS_fstat), ANY, "what a disk's image is"),
    allow(&[Main], call!(SYS_fstatfs), ANY, "whether a disk's image is in memory"),

    // Devices that wait for descriptors.
    allow(&[Vcpu], call!(SYS_epoll_create1), ANY, "a device's driver is there: what its workers wait with"),
    allow(&[Vcpu, EventLoop], call!(SYS_epoll_ctl), ANY, "what is waited for"),
    allow(&[EventLoop, Fs], call!(SYS_epoll_pwait), ANY, "waits for kicks and for streams"),
    allow(&[EventLoop], call!(SYS_socketpair), UNIX_STREAM, "the two ends of a vsock connection"),
    allow(&[EventLoop], call!(SYS_recvmsg), ANY, "bytes of vsock connections"),
    allow(&[Main, EventLoop], call!(SYS_shutdown), ANY, "vsock connections that end, or half of one"),

    // Files.
    allow(&[Fs], call!(SYS_unshare), &[Is(0, libc::CLONE_FS as u32)], "a working directory and a umask of its own"),
    allow(&[Fs], call!(SYS_fchdir), ANY, "the root of the share; names of descriptors"),
    allow(&[Fs], call!(SYS_umask), ANY, "modes as the guest gives them"),
    allow(&[Fs], call!(SYS_dup), ANY, "a directory to flush"),
    allow(&[Fs], call!(SYS_openat), ANY, "opens a file that has been looked up, by its descriptor"),
    allow(&[Fs], call!(SYS_openat2), ANY, "looks a name up"),
    allow(&[Fs], call!(SYS_statx), ANY, "attributes"),
    allow(&[Fs], call!(SYS_fstatfs), ANY, "statfs(2)"),
    allow(&[Fs], call!(SYS_readlinkat), ANY, "symbolic links"),
    allow(&[Fs], call!(SYS_getdents64), ANY, "directories"),
    allow(&[Fs], call!(SYS_lseek), ANY, "directories, holes"),
    allow(&[Fs], call!(SYS_preadv2), ANY, "data"),
    allow(&[Fs], call!(SYS_pwritev2), ANY, "data"),
    allow(&[Fs], call!(SYS_copy_file_range), ANY, "data"),
    allow(&[Fs], call!(SYS_fallocate), ANY, "space and holes"),
    allow(&[Fs], call!(SYS_ftruncate), ANY, "sizes"),
    allow(&[Fs], call!(SYS_fsync), ANY, "durability"),
    allow(&[Fs], call!(SYS_fdatasync), ANY, "durability"),
    allow(&[Fs], call!(SYS_syncfs), ANY, "durability"),
    allow(&[Fs], call!(SYS_mkdirat), ANY, "makes directories"),
    allow(&[Fs], call!(SYS_mknodat), ANY, "makes FIFOs, sockets and whiteouts"),
    allow(&[Fs], call!(SYS_symlinkat), ANY, "makes symbolic links"),
    allow(&[Fs], call!(SYS_linkat), ANY, "makes hard links"),
    allow(&[Fs], call!(SYS_renameat2), ANY, "renames"),
    allow(&[Fs], call!(SYS_unlinkat), ANY, "removes"),
    allow(&[Fs], call!(SYS_fchmod), ANY, "modes of open files"),
    allow(&[Fs], call!(SYS_fchmodat), ANY, "modes"),
    allow(&[Fs], call!(SYS_fchownat), ANY, "owners"),
    allow(&[Fs], call!(SYS_utimensat), ANY, "times"),
    allow(&[Fs], call!(SYS_fgetxattr), ANY, "extended attributes of files and directories"),
    allow(&[Fs], call!(SYS_fsetxattr), ANY, "extended attributes of files and directories"),
    allow(&[Fs], call!(SYS_flistxattr), ANY, "extended attributes of files and directories"),
    allow(&[Fs], call!(SYS_fremovexattr), ANY, "extended attributes of files and directories"),
    allow(&[Fs], call!(SYS_getxattr), ANY, "extended attributes of what cannot be opened: links, FIFOs"),
    allow(&[Fs], call!(SYS_setxattr), ANY, "extended attributes of what cannot be opened"),
    allow(&[Fs], call!(SYS_listxattr), ANY, "extended attributes of what cannot be opened"),
    allow(&[Fs], call!(SYS_removexattr), ANY, "extended attributes of what cannot be opened"),
    allow(&[Fs], call!(SYS_geteuid), ANY, "acts for a user of the guest"),
    allow(&[Fs], call!(SYS_getegid), ANY, "acts for a user of the guest"),
    allow(&[Fs], call!(SYS_setresuid), ANY, "acts for a user of the guest"),
    allow(&[Fs], call!(SYS_setresgid), ANY, "acts for a user of the guest"),
    allow(&[Fs], call!(SYS_setgroups), ANY, "acts for a user of the guest"),
    allow(&[Fs], call!(SYS_capget), ANY, "writes without CAP_FSETID, so that set-user-ID bits go"),
    allow(&[Fs], call!(SYS_capset), ANY, "writes without CAP_FSETID, so that set-user-ID bits go"),
    allow(&[Fs], call!(SYS_prctl), &[Is(0, libc::PR_CAPBSET_READ as u32)], "libcap-ng: learns what it is to change"),
    allow(&[Fs], call!(SYS_prctl), &[Is(0, libc::PR_CAP_AMBIENT as u32), Is(1, libc::PR_CAP_AMBIENT_IS_SET as u32)], "libcap-ng: learns what it is to change"),

    // Disks. What a ring is told to do no filter sees; but it is done in the jail.
    allow(&[Blk], call!(SYS_io_uring_setup), ANY, "a ring for each session"),
    allow(&[Blk], call!(SYS_io_uring_register), ANY, "what the ring can do"),
    allow(&[Blk], call!(SYS_io_uring_enter), ANY, "work, and waiting for it and for kicks"),
    allow(&[Blk], call!(SYS_ppoll), ANY, "waits for kicks, where there is no ring: the host has none, or the image is in memory"),
    allow(&[Blk], call!(SYS_preadv), ANY, "reads"),
    allow(&[Blk], call!(SYS_pwritev2), ANY, "writes"),
    allow(&[Blk], call!(SYS_fdatasync), ANY, "flushes"),
    allow(&[Blk], call!(SYS_fallocate), ANY, "discards and zeroes"),
    allow(&[Main], call!(SYS_ioctl), &[Is(1, BLKSSZGET)], "the sectors of a block device"),
    allow(&[Main], call!(SYS_lseek), ANY, "the size of a disk's image"),
    allow(&[Blk], call!(SYS_ioctl), &[Is(1, BLKDISCARD)], "discards"),

    // Files in guest memory.
    allow(&[Main, EventLoop], call!(SYS_ioctl), &[Is(1, KVM_SET_USER_MEMORY_REGION)], "files attached or detached; memory plugged or unplugged"),
    allow(&[Main], call!(SYS_statx), ANY, "what a file to map is"),
    allow(&[Main], call!(SYS_madvise), &[Is(2, libc::MADV_DONTDUMP as u32)], "a file mapped for the guest is in no core dump"),

    // Links.
    allow(&[Main], call!(SYS_ioctl), &[Is(1, libc::TUNGETIFF as u32)], "what a tap is"),
    allow(&[Main], call!(SYS_ioctl), &[Is(1, libc::FIONBIO as u32)], "a tap that does not wait"),
    allow(&[Main], call!(SYS_ioctl), &[Is(1, libc::TUNSETVNETHDRSZ as u32)], "headers of a tap's packets"),
    allow(&[Main, Net], call!(SYS_ioctl), &[Is(1, libc::TUNSETOFFLOAD as u32)], "what the driver may leave to the host, and does"),
    allow(&[Net], call!(SYS_ioctl), &[Is(1, libc::TUNSETQUEUE as u32)], "how many queues the driver uses"),
    allow(&[Net], call!(SYS_ppoll), ANY, "waits for kicks and packets"),
    allow(&[Net], call!(SYS_readv), ANY, "packets for the guest"),
    allow(&[Net], call!(SYS_writev), ANY, "packets of the guest"),
    allow(&[Net], call!(SYS_fcntl), &[Is(1, libc::F_DUPFD_CLOEXEC as u32)], "events for vhost-net"),
    allow(&[Main], call!(SYS_ioctl), &[Is(1, vhost(2, 0x00, 8))], "VHOST_GET_FEATURES"),
    allow(&[Net], call!(SYS_ioctl), &[Is(1, vhost(1, 0x00, 8))], "VHOST_SET_FEATURES"),
    allow(&[Net], call!(SYS_ioctl), &[Is(1, vhost(0, 0x01, 0))], "VHOST_SET_OWNER"),
    allow(&[Net], call!(SYS_ioctl), &[Is(1, vhost(1, 0x03, 8))], "VHOST_SET_MEM_TABLE"),
    allow(&[Net], call!(SYS_ioctl), &[Is(1, vhost(1, 0x10, 8))], "VHOST_SET_VRING_NUM"),
    allow(&[Net], call!(SYS_ioctl), &[Is(1, vhost(1, 0x11, 40))], "VHOST_SET_VRING_ADDR"),
    allow(&[Net], call!(SYS_ioctl), &[Is(1, vhost(1, 0x12, 8))], "VHOST_SET_VRING_BASE"),
    allow(&[Net], call!(SYS_ioctl), &[Is(1, vhost(3, 0x12, 8))], "VHOST_GET_VRING_BASE"),
    allow(&[Net], call!(SYS_ioctl), &[Is(1, vhost(1, 0x20, 8))], "VHOST_SET_VRING_KICK"),
    allow(&[Net], call!(SYS_ioctl), &[Is(1, vhost(1, 0x21, 8))], "VHOST_SET_VRING_CALL"),
    allow(&[Net], call!(SYS_ioctl), &[Is(1, vhost(1, 0x22, 8))], "VHOST_SET_VRING_ERR"),
    allow(&[Net], call!(SYS_ioctl), &[Is(1, vhost(1, 0x30, 8))], "VHOST_NET_SET_BACKEND"),

    // How threads begin, up to where their own filters are on.
    allow(&[Spawner], call!(SYS_clone), &[Is(0, CLONE_THREAD)], "starts a thread"),
    allow(&[Spawner], call!(SYS_clone3), ANY, "its flags are in memory, where a filter cannot look; told that there is no such call, the C library takes clone(2)").refused(libc::ENOSYS).rarely("always, but no tracer sees it"),
    allow(&[Spawner], call!(SYS_mmap), NO_CODE, "stacks"),
    allow(&[Spawner], call!(SYS_mprotect), NO_CODE, "their guard pages"),
    allow(&[Spawner], call!(SYS_rt_sigprocmask), ANY, "no signal before a thread is complete"),
    allow(&[Spawner], call!(SYS_set_robust_list), ANY, "the C library's part of a thread"),
    allow(&[Spawner], call!(SYS_rseq), ANY, "the C library's part of a thread"),
    allow(&[Spawner], call!(SYS_gettid), ANY, "where its stack is"),
    allow(&[Spawner], call!(SYS_sched_getaffinity), ANY, "where its stack is"),
    allow(&[Spawner], call!(SYS_sigaltstack), ANY, "where a stack overflow is told"),
    allow(&[Spawner], call!(SYS_prctl), &[Is(0, libc::PR_SET_NAME as u32)], "its name"),
    allow(&[Spawner], call!(SYS_prctl), &[Is(0, libc::PR_SET_NO_NEW_PRIVS as u32), Is(1, 1)], "its own filter"),
    allow(&[Spawner], call!(SYS_seccomp), &[Is(0, libc::SECCOMP_SET_MODE_FILTER)], "its own filter"),
];
