//! PID 1 of the lab: modules, mounts, device nodes, cgroups; then the server, and orphans.

use super::{server, static_keys};
use anyhow::{Context, Result, bail, ensure};
use nix::mount::{MsFlags, mount};
use nix::sys::reboot::{RebootMode, reboot};
use nix::sys::stat::{Mode, SFlag, makedev, mknod};
use nix::sys::wait::wait;
use nix::unistd::{chdir, chroot, sethostname};
use rustix::fs::inotify;
use rustix::io::Errno;
use std::convert::Infallible;
use std::ffi::CString;
use std::fs::{self, File, OpenOptions};
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// Configuration in the initramfs: lines of words separated by tabs. `ports N`; `share TAG DIR ro|rw`.
pub(crate) const CONFIG: &str = "lab.conf";
/// Directory of the modules in the initramfs; they are loaded in the order of their names.
pub(crate) const MODULES: &str = "modules";
const ROOT_DISK: &str = "/dev/vda";
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Runs the lab. If anything fails the reason goes to the console and the machine is switched off, which the front door
/// reports with the tail of the console.
pub(crate) fn main() -> ! {
    let Err(error) = run();
    eprintln!("lab init: {error:#}");
    rustix::fs::sync();
    let error = reboot(RebootMode::RB_POWER_OFF);
    panic!("power off: {error:?}");
}

fn run() -> Result<Infallible> {
    mount_at("proc", "proc", "/proc", "")?;
    mount_at("sysfs", "sysfs", "/sys", "")?;
    mount_at("devtmpfs", "devtmpfs", "/dev", "")?;
    let config = fs::read_to_string(Path::new("/").join(CONFIG)).context("read the lab's configuration")?;
    load_modules()?;
    wait_for_device(ROOT_DISK)?;
    mount_with(ROOT_DISK, "/root", "ext4", MsFlags::MS_NOATIME, "")?;
    enter_root()?;
    mount_rest()?;
    make_static_nodes()?;
    set_up_cgroups()?;
    sethostname("lab").context("set the host name")?;
    // The standard way to bring an interface up without a netlink library.
    run_tool("ip", &["link", "set", "lo", "up"])?;
    // A module asked for by the kernel comes from the root image.
    write("/proc/sys/net/ipv4/ip_forward", "1")?;
    write("/proc/sys/fs/inotify/max_user_instances", "1024")?;

    // Deterministic time has one CPU, so no such race, and nothing that runs beside a benchmark.
    let cpus = std::thread::available_parallelism().context("count CPUs")?;
    let _held = (cpus.get() > 1).then(static_keys::hold).transpose().context("hold KVM's static keys")?;

    let mut ports = 0;
    for line in config.lines() {
        match line.split('\t').collect::<Vec<_>>()[..] {
            ["ports", count] => ports = count.parse().context("parse the number of ports")?,
            ["share", tag, directory, mode] => mount_share(tag, directory, mode == "rw")?,
            _ => bail!("unknown line in the lab's configuration: {line}"),
        }
    }

    let mut server = Command::new("/proc/self/exe")
        .arg0("lab-server")
        .args([server::ROLE, &ports.to_string()])
        .env_clear()
        .envs([("PATH", PATH), ("HOME", "/root"), ("LANG", "C.UTF-8"), ("TERM", "dumb")])
        .spawn()
        .context("start the command server")?;
    let server_pid = i32::try_from(server.id()).context("a PID is positive")?;
    loop {
        let status = wait().context("wait for children")?;
        if status.pid().is_some_and(|pid| pid.as_raw() == server_pid) {
            // Already reaped; this only tells std so.
            let _ = server.try_wait();
            bail!("the command server is gone: {status:?}");
        }
    }
}

fn load_modules() -> Result<()> {
    let directory = Path::new("/").join(MODULES);
    let mut modules: Vec<_> = fs::read_dir(&directory)
        .with_context(|| format!("read {}", directory.display()))?
        .map(|entry| entry.map(|entry| entry.path()))
        .collect::<Result<_, _>>()?;
    modules.sort();
    for module in modules {
        let file = File::open(&module).with_context(|| format!("open {}", module.display()))?;
        match rustix::system::finit_module(&file, c"", 0) {
            // Faster code for an instruction this CPU does not have.
            Err(Errno::NODEV) => {}
            result => result.with_context(|| format!("load {}", module.display()))?,
        }
    }
    Ok(())
}

/// Makes the mounted root the root; the mounts made so far move into it.
fn enter_root() -> Result<()> {
    for directory in ["dev", "proc", "sys"] {
        let target = format!("/root/{directory}");
        mount_with(&format!("/{directory}"), &target, "", MsFlags::MS_MOVE, "")?;
    }
    // pivot_root does not work on the initramfs (Linux Documentation/filesystems/ramfs-rootfs-initramfs.rst).
    chdir("/root").context("enter the root file system")?;
    mount_with(".", "/", "", MsFlags::MS_MOVE, "")?;
    chroot(".").context("change the root directory")?;
    chdir("/").context("enter the new root directory")?;
    // As systemd does on an ordinary host.
    mount_with("none", "/", "", MsFlags::MS_SHARED | MsFlags::MS_REC, "")
}

fn mount_rest() -> Result<()> {
    mount_at("devpts", "devpts", "/dev/pts", "gid=5,mode=620,ptmxmode=666")?;
    mount_at("tmpfs", "shm", "/dev/shm", "mode=1777")?;
    mount_at("mqueue", "mqueue", "/dev/mqueue", "")?;
    mount_at("tmpfs", "run", "/run", "mode=755")?;
    mount_at("tmpfs", "tmp", "/tmp", "mode=1777,size=75%")?;
    mount_at("cgroup2", "cgroup2", "/sys/fs/cgroup", "nsdelegate,memory_recursiveprot")?;
    mount_at("bpf", "bpf", "/sys/fs/bpf", "mode=700")?;
    for directory in ["/run/lock", "/run/netns", "/dev/net"] {
        fs::create_dir_all(directory).with_context(|| format!("make {directory}"))?;
    }
    for (link, target) in [
        ("fd", "/proc/self/fd"),
        ("stdin", "fd/0"),
        ("stdout", "fd/1"),
        ("stderr", "fd/2"),
        ("core", "/proc/kcore"),
    ] {
        let link = format!("/dev/{link}");
        std::os::unix::fs::symlink(target, &link).with_context(|| format!("make {link}"))?;
    }
    Ok(())
}

/// Makes the nodes whose modules load when they are opened (what `kmod static-nodes` lists).
fn make_static_nodes() -> Result<()> {
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").context("read the kernel's release")?;
    let list = format!("/lib/modules/{}/modules.devname", release.trim());
    let list = fs::read_to_string(&list).with_context(|| format!("read {list}"))?;
    for line in list.lines().filter(|line| !line.starts_with('#')) {
        let parse = || {
            let mut words = line.split_ascii_whitespace().skip(1);
            let (name, device) = (words.next()?, words.next()?);
            let kind = if device.starts_with('b') { SFlag::S_IFBLK } else { SFlag::S_IFCHR };
            let (major, minor) = device[1..].split_once(':')?;
            Some((name, kind, makedev(major.parse().ok()?, minor.parse().ok()?)))
        };
        let (name, kind, device) = parse().with_context(|| format!("parse modules.devname: {line}"))?;
        let path = Path::new("/dev").join(name);
        if path.exists() {
            continue;
        }
        fs::create_dir_all(path.parent().context("a node is in a directory")?)?;
        mknod(&path, kind, Mode::from_bits_truncate(0o600), device)
            .with_context(|| format!("make {}", path.display()))?;
    }
    // As udev does; without /dev/kvm this is where the lab fails.
    for node in ["/dev/kvm", "/dev/fuse", "/dev/net/tun"] {
        fs::set_permissions(node, fs::Permissions::from_mode(0o666))
            .with_context(|| format!("open up {node}"))?;
    }
    Ok(())
}

/// All controllers for the children of the root, and a cgroup for the commands, as on a host with systemd.
fn set_up_cgroups() -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    let controllers =
        fs::read_to_string(root.join("cgroup.controllers")).context("read the cgroup controllers")?;
    for controller in controllers.split_ascii_whitespace() {
        write(root.join("cgroup.subtree_control"), &format!("+{controller}"))?;
    }
    fs::create_dir(root.join("lab")).context("make the cgroup of the commands")?;
    write(root.join("lab/cgroup.procs"), "0")
}

fn mount_share(tag: &str, directory: &str, writable: bool) -> Result<()> {
    let flags = if writable { MsFlags::empty() } else { MsFlags::MS_RDONLY };
    // mmap: nothing is cached beyond what mappings need, so the host's changes are seen.
    let options = "trans=virtio,version=9p2000.L,msize=1048576,cache=mmap";
    fs::create_dir_all(directory).with_context(|| format!("make {directory}"))?;
    mount_with(tag, directory, "9p", flags, options)
}

fn wait_for_device(path: &str) -> Result<()> {
    // Watch first, then look: so nothing can happen in between unseen.
    let watch = inotify::init(inotify::CreateFlags::CLOEXEC).context("watch /dev")?;
    inotify::add_watch(&watch, "/dev", inotify::WatchFlags::CREATE).context("watch /dev")?;
    let mut events = [0; 4096];
    while !Path::new(path).exists() {
        rustix::io::read(&watch, &mut events).context("wait for a device")?;
    }
    Ok(())
}

/// Waits for a device node to appear.
pub(super) fn wait_for(path: &str) -> Result<()> {
    wait_for_device(path)
}

fn mount_at(kind: &str, source: &str, target: &str, options: &str) -> Result<()> {
    fs::create_dir_all(target).with_context(|| format!("make {target}"))?;
    mount_with(source, target, kind, MsFlags::empty(), options)
}

fn mount_with(source: &str, target: &str, kind: &str, flags: MsFlags, options: &str) -> Result<()> {
    let kind = (!kind.is_empty()).then_some(kind);
    let options = (!options.is_empty()).then(|| CString::new(options)).transpose()?;
    mount(Some(source), target, kind, flags, options.as_deref())
        .with_context(|| format!("mount {source} on {target}"))
}

fn run_tool(program: &str, args: &[&str]) -> Result<()> {
    let status = Command::new(program).args(args).env("PATH", PATH).status();
    let status = status.with_context(|| format!("start {program}"))?;
    ensure!(status.success(), "{program} {}: {status}", args.join(" "));
    Ok(())
}

fn write(path: impl AsRef<Path>, text: &str) -> Result<()> {
    let path = path.as_ref();
    let mut file =
        OpenOptions::new().write(true).open(path).with_context(|| format!("open {}", path.display()))?;
    file.write_all(text.as_bytes()).with_context(|| format!("write {text} to {}", path.display()))
}
