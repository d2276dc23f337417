//! The guest before anything else runs: file systems, cgroups, loopback, host name.

use std::fs;
use std::io;
use std::path::Path;

use nix::errno::Errno;
use nix::mount::{MsFlags, mount};
use nix::sys::stat::Mode;
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use crate::cgroup::ROOT as CGROUP_ROOT;

/// What the host name is until somebody gives the machine another.
const HOST_NAME: &str = "kvrun";

/// Why the guest cannot be used. Fatal.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file system.
    #[error("cannot mount {fs_type} on {target}")]
    Mount {
        /// Its type.
        fs_type: &'static str,
        /// Where.
        target: &'static str,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// The change from the initial root to a file system that containers can pivot away from.
    #[error("cannot change the root: {step}")]
    Root {
        /// Which step.
        step: &'static str,
        /// Why.
        #[source]
        errno: Errno,
    },
    /// The cgroup hierarchy.
    #[error("cannot set up cgroups: {what}")]
    Cgroup {
        /// Which step.
        what: &'static str,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Sets the guest up. Runs once, in PID 1.
///
/// # Errors
///
/// [`BootError`]. What a guest can do without is only logged by the kernel's absence of it.
pub fn set_up() -> Result<(), BootError> {
    change_root()?;
    file_systems()?;
    short_grace_periods();
    cgroups(Path::new(CGROUP_ROOT))?;
    loopback_up();
    // Fails without CAP_SYS_ADMIN only.
    let _ = nix::unistd::sethostname(HOST_NAME);
    Ok(())
}

const PRIVATE: MsFlags = MsFlags::MS_NOSUID.union(MsFlags::MS_NODEV).union(MsFlags::MS_NOEXEC);

/// Moves to a tmpfs root. The initial root cannot be pivoted away from (Linux 6.12 fs/namespace.c, `path_pivot_root`: the
/// old root needs a parent mount), and every container does pivot. The agent's binary stays where it is, below the new
/// root, and is executed again as `/proc/self/exe`: nothing is copied.
fn change_root() -> Result<(), BootError> {
    const STAGE: &str = "/run";
    // The limits are for containers that get hold of the guest's root: they share the memory of the pod, not the agent's
    // ability to keep its state.
    let limits = "mode=0755,size=32m,nr_inodes=16k";
    mount(Some("root"), STAGE, Some("tmpfs"), MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some(limits))
        .map_err(|errno| BootError::Mount { fs_type: "tmpfs", target: STAGE, errno })?;
    let step = |step| move |errno| BootError::Root { step, errno };
    nix::unistd::chdir(STAGE).map_err(step("chdir"))?;
    for (dir, mode) in [("dev", 0o755), ("proc", 0o555), ("sys", 0o555), ("run", 0o755), ("run/kvrun", 0o755)]
    {
        nix::unistd::mkdir(dir, Mode::from_bits_retain(mode)).map_err(step("mkdir"))?;
    }
    nix::unistd::mkdir("tmp", Mode::from_bits_retain(0o1777)).map_err(step("mkdir"))?;
    mount(Some("."), "/", None::<&str>, MsFlags::MS_MOVE, None::<&str>).map_err(step("move"))?;
    nix::unistd::chroot(".").map_err(step("chroot"))?;
    nix::unistd::chdir("/").map_err(step("chdir"))
}

fn file_systems() -> Result<(), BootError> {
    let devices = MsFlags::MS_NOSUID | MsFlags::MS_NOEXEC;
    make("proc", "/proc", PRIVATE, None)?;
    make("sysfs", "/sys", PRIVATE, None)?;
    make("devtmpfs", "/dev", devices, Some("mode=0755"))?;
    make("cgroup2", CGROUP_ROOT, PRIVATE, Some("nsdelegate"))?;
    for dir in ["/dev/pts", "/dev/shm", "/dev/mqueue"] {
        // There already: the mount tells if it is no directory.
        let _ = nix::unistd::mkdir(dir, Mode::from_bits_retain(0o755));
    }
    make("devpts", "/dev/pts", devices, Some("gid=5,mode=0620,ptmxmode=0666"))?;
    make("tmpfs", "/dev/shm", MsFlags::MS_NOSUID | MsFlags::MS_NODEV, Some("mode=1777,size=50%"))?;
    make("mqueue", "/dev/mqueue", PRIVATE, None)
}

fn make(
    fs_type: &'static str,
    target: &'static str,
    flags: MsFlags,
    data: Option<&str>,
) -> Result<(), BootError> {
    mount(Some(fs_type), target, Some(fs_type), flags, data).map_err(|errno| BootError::Mount {
        fs_type,
        target,
        errno,
    })
}

/// Hands every controller on to the containers. The agent stays in the root, which the "no internal process constraint"
/// exempts (Linux 6.12 Documentation/admin-guide/cgroup-v2.rst).
fn cgroups(root: &Path) -> Result<(), BootError> {
    let error = |what| move |source| BootError::Cgroup { what, source };
    let controllers =
        fs::read_to_string(root.join("cgroup.controllers")).map_err(error("read cgroup.controllers"))?;
    let enable: Vec<String> = controllers.split_whitespace().map(|name| format!("+{name}")).collect();
    if enable.is_empty() {
        return Ok(());
    }
    fs::write(root.join("cgroup.subtree_control"), enable.join(" ")).map_err(error("enable the controllers"))
}

/// Lets waits for an RCU grace period be short: entering a cgroup or leaving a mount or a namespace waits for one, some
/// 10 ms each, and every container does all of that. The kernel does the same until it starts init (Linux 6.12
/// kernel/rcu/update.c, `rcu_end_inkernel_boot`). The price is an interrupt to each CPU, for which a small machine that
/// waits for its next container has the time. A kernel without this switch is slower, not wrong.
fn short_grace_periods() {
    let _ = fs::write("/sys/kernel/rcu_expedited", "1");
}

/// Brings the loopback of this process's network namespace up: everybody expects `127.0.0.1`.
pub(crate) fn loopback_up() {
    let Ok(socket) = socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None) else {
        return;
    };
    // SAFETY: an all-zero ifreq is a valid value of this C struct.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    request.ifr_name[0] = b'l' as libc::c_char;
    request.ifr_name[1] = b'o' as libc::c_char;
    request.ifr_ifru.ifru_flags = (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
    // SAFETY: the request outlives the call, and SIOCSIFFLAGS reads no more than an ifreq.
    unsafe {
        libc::ioctl(std::os::fd::AsRawFd::as_raw_fd(&socket), libc::SIOCSIFFLAGS as libc::Ioctl, &request)
    };
}
