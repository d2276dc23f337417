//! kvrun's machine: its devices are attached once it runs, as the pod engine attaches them.

use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Context, Result};
use kvrun_bench::{CONTROL_PORT, Job, SHARE_TAG, STREAM_PORT};
use kvrun_pod::network::open_vhost;
use kvrun_pod::pod;
use kvrun_pod::size::{Sizes, VmSize};
use kvrun_pod::vmm::Vmm;
use kvrun_vmm_api::config::FIRST_FREE_SLOT;
use kvrun_vmm_api::{DeviceConfig, FsCache, RateLimit, VmConfig};
use tokio::runtime::Runtime;
use tokio::time::timeout;

use super::host::{self, Tap, Which};
use super::{MEMORY_MIB, Machine, Setup};
use crate::process;

/// How long the guest may take to connect.
const BOOT_TIMEOUT: Duration = Duration::from_secs(120);

/// The VMM of the machine. It ends with this.
pub(super) struct Kvrun(Vmm);

impl Kvrun {
    /// Its process.
    pub(super) fn pid(&self) -> Result<u32> {
        process::child(std::process::id(), "kvrun-vmm")
    }

    /// Ends it.
    pub(super) fn stop(self, runtime: &Runtime) {
        runtime.block_on(self.0.stop());
    }
}

/// Boots the machine and attaches its devices.
pub(super) fn start(setup: &Setup<'_>, runtime: &Rc<Runtime>) -> Result<(Kvrun, Machine)> {
    let Setup { stage, initramfs, scratch, vhost } = setup;
    let taps = Tap::all(0, *vhost);
    let disk = File::options().read(true).write(true).open(host::disk(scratch, "kvrun")?)?;
    let share = File::open(host::share(scratch, "kvrun")?)?;
    let (vmm, control) = runtime.block_on(async {
        let kvm = File::options().read(true).write(true).open("/dev/kvm").context("cannot open /dev/kvm")?;
        let kernel = File::open(&stage.kernel).context("cannot open the kernel image")?;
        let initramfs = File::open(initramfs).context("cannot open the guest's initramfs")?;
        let size = VmSize::with_room(1, MEMORY_MIB, &Sizes::default());
        let config = VmConfig { vsock_listen: vec![CONTROL_PORT], ..pod::machine(size) };
        let vmm = Vmm::spawn(&stage.vmm, Some(share.as_fd()))?;
        let control = vmm.expect(CONTROL_PORT);
        vmm.boot(config, kvm.as_fd(), kernel.as_fd(), initramfs.as_fd())?.running().await?;
        let control =
            timeout(BOOT_TIMEOUT, control.accepted()).await.context("its guest does not come up")??;
        anyhow::Ok((vmm, control))
    })?;
    // The VMM hands over a socket that does not block.
    rustix::io::ioctl_fionbio(&control, false)?;

    let (connector, runtime_of_it) = (vmm.clone(), Rc::clone(runtime));
    let connect = move || connect(&runtime_of_it, &connector);
    let mut machine = Machine::new("kvrun", control, Box::new(connect), &taps)?;
    let mut slot = FIRST_FREE_SLOT;
    let mut attach = |device: DeviceConfig, fds: &[OwnedFd]| -> Result<()> {
        let fds: Vec<BorrowedFd<'_>> = fds.iter().map(AsFd::as_fd).collect();
        runtime.block_on(vmm.attach(slot, device, &fds))?;
        machine.tell(&Job::Bind { slot })?;
        slot += 1;
        Ok(())
    };
    let unlimited = RateLimit::default();
    let blk = DeviceConfig::Blk { read_only: false, serial: String::new(), queues: 1, limit: unlimited };
    attach(blk, &[disk.into()])?;
    for tap in &taps {
        let mut fds = vec![tap.open()?];
        if tap.which == Which::Vhost {
            fds.extend(open_vhost(1).context("cannot open vhost-net")?);
        }
        let (mac, mtu) = (tap.mac(), 1500);
        let net = DeviceConfig::Net { mac, mtu, queue_pairs: 1, rx_limit: unlimited, tx_limit: unlimited };
        attach(net, &fds)?;
    }
    let fs = DeviceConfig::Fs {
        directory: ".".to_owned(),
        tag: SHARE_TAG.to_owned(),
        read_only: false,
        cache: FsCache::Auto,
        writeback: false,
    };
    attach(fs, &[])?;
    machine.set_up(&taps)?;
    Ok((Kvrun(vmm), machine))
}

fn connect(runtime: &Runtime, vmm: &Vmm) -> Result<OwnedFd> {
    Ok(runtime.block_on(vmm.connect(STREAM_PORT.into())).context("cannot reach the guest")?.into())
}
