//! QEMU's microvm machine with the same devices, and virtiofsd beside it.

use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use kvrun_bench::{CONTROL_PORT, SHARE_TAG, STREAM_PORT};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::socket::{
    AddressFamily, Backlog, SockFlag, SockType, VsockAddr, accept4, bind, connect, listen, socket,
};

use super::host::{self, Tap, Which};
use super::{MEMORY_MIB, Machine, Setup};

/// The guest's address on vsock, unlike that of any other machine of this host.
const CID: u32 = 0x6b76;
/// How long the guest may take to connect.
const BOOT_TIMEOUT_MS: u16 = 60_000;
/// Where Debian has it, which is in no PATH.
const VIRTIOFSD: &str = "/usr/libexec/virtiofsd";

/// The processes of the machine. They end with this.
pub(super) struct Qemu(Vec<Child>);

impl Drop for Qemu {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Boots the machine.
pub(super) fn start(setup: &Setup<'_>) -> Result<(Qemu, Machine)> {
    let Setup { stage, initramfs, scratch, vhost } = setup;
    let taps = Tap::all(1, *vhost);
    let disk = host::disk(scratch, "qemu")?;
    let mut processes = Qemu(Vec::new());
    let share_socket = scratch.join("virtiofsd.sock");
    processes.0.push(virtiofsd(&host::share(scratch, "qemu")?, &share_socket)?);

    let listener = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)
        .context("this host has no vsock (modprobe vhost_vsock)")?;
    bind(listener.as_raw_fd(), &VsockAddr::new(libc::VMADDR_CID_ANY, CONTROL_PORT))?;
    listen(&listener, Backlog::new(1)?)?;

    let log = scratch.join("qemu.log");
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-M", "microvm,acpi=off,pit=off,pic=off,rtc=off,x-option-roms=off,memory-backend=ram"])
        // Shared, so that virtiofsd can map it.
        .args(["-object", &format!("memory-backend-memfd,id=ram,size={MEMORY_MIB}M,share=on")])
        .args(["-enable-kvm", "-cpu", "host", "-smp", "1", "-m", &format!("{MEMORY_MIB}M")])
        .args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"])
        .args(["-serial", &format!("file:{}", log.display())])
        .args(["-global", "virtio-mmio.force-legacy=false"])
        .arg("-kernel")
        .arg(&stage.kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", kvrun_pod::pod::KERNEL_CMDLINE])
        .args(["-drive", &format!("if=none,id=disk,format=raw,file={}", disk.display())])
        .args(["-device", "virtio-blk-device,drive=disk"])
        .args(["-device", &format!("vhost-vsock-device,guest-cid={CID}")])
        .args(["-chardev", &format!("socket,id=fs,path={}", share_socket.display())])
        .args(["-device", &format!("vhost-user-fs-device,chardev=fs,tag={SHARE_TAG},queue-size=512")]);
    for tap in &taps {
        let Tap { name, which, .. } = tap;
        let vhost = if *which == Which::Vhost { "on" } else { "off" };
        let mac = tap.mac().map(|byte| format!("{byte:02x}")).join(":");
        qemu.args(["-netdev", &format!("tap,id={name},ifname={name},script=no,downscript=no,vhost={vhost}")])
            .args(["-device", &format!("virtio-net-device,netdev={name},mac={mac}")]);
    }
    processes.0.push(qemu.stdin(Stdio::null()).spawn().context("cannot start qemu-system-x86_64")?);

    let control = accept(&listener).with_context(|| {
        let mut console = String::new();
        let _ = File::open(&log).and_then(|mut log| log.read_to_string(&mut console));
        format!("its guest does not come up: {console}")
    })?;
    let mut machine = Machine::new("qemu_microvm", control, Box::new(connect_stream), &taps)?;
    machine.set_up(&taps)?;
    Ok((processes, machine))
}

/// The file server, with the settings that kvrun's has where its own defaults differ and the guest could tell: so both do the same work.
fn virtiofsd(share: &Path, socket: &Path) -> Result<Child> {
    // Handed over as a descriptor: it is there when QEMU wants to connect, whenever virtiofsd comes to serve it.
    let listener = UnixListener::bind(socket)?;
    rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty())?;
    let mut virtiofsd = Command::new(VIRTIOFSD);
    virtiofsd
        .args(["--fd", &listener.as_raw_fd().to_string()])
        .arg("--shared-dir")
        .arg(share)
        .args(["--cache", "auto", "--xattr", "--posix-acl", "--announce-submounts"])
        .args(["--inode-file-handles=prefer", "--log-level=error"]);
    virtiofsd.stdin(Stdio::null()).spawn().with_context(|| format!("cannot start {VIRTIOFSD}"))
}

fn accept(listener: &OwnedFd) -> Result<OwnedFd> {
    use std::os::fd::AsFd;
    let mut fds = [PollFd::new(listener.as_fd(), PollFlags::POLLIN)];
    ensure!(poll(&mut fds, PollTimeout::from(BOOT_TIMEOUT_MS))? == 1, "it has not connected");
    let stream = accept4(listener.as_raw_fd(), SockFlag::SOCK_CLOEXEC)?;
    // SAFETY: accept4(2) has just returned it to us alone.
    Ok(unsafe { OwnedFd::from_raw_fd(stream) })
}

fn connect_stream() -> Result<OwnedFd> {
    let stream = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(stream.as_raw_fd(), &VsockAddr::new(CID, STREAM_PORT.into()))
        .context("cannot reach the guest")?;
    Ok(stream)
}
