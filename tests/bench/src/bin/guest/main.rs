//! The only program of the guests whose devices are measured: does as it is told, and says how long that took.
//!
//! * this file - init: mounts, and the connection over which jobs come.
//! * [`disk`], [`files`], [`streams`] - the work.
//! * [`link`] - the guest's end of a link.

mod disk;
mod files;
mod link;
mod streams;

use std::fs::{self, File};
use std::io::{BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::time::Duration;

use anyhow::{Context, Result};
use kvrun_bench::{Answer, CONTROL_PORT, Job, SHARE_TAG};
use nix::sys::socket::{AddressFamily, SockFlag, SockType, VsockAddr, connect, socket};
use rustix::mount::{MountFlags, mount};

use crate::streams::Listeners;

/// The host's address on vsock: `VMADDR_CID_HOST` of Linux <linux/vm_sockets.h>.
const HOST_CID: u32 = 2;
/// Where the share is.
const SHARE: &str = "/share";

fn main() -> Result<()> {
    for (kind, at) in [("devtmpfs", "/dev"), ("proc", "/proc"), ("sysfs", "/sys")] {
        fs::create_dir_all(at)?;
        mount(kind, at, kind, MountFlags::empty(), None).with_context(|| format!("cannot mount {at}"))?;
    }
    let listeners = Listeners::new()?;
    let control = socket(AddressFamily::Vsock, SockType::Stream, SockFlag::SOCK_CLOEXEC, None)?;
    connect(control.as_raw_fd(), &VsockAddr::new(HOST_CID, CONTROL_PORT)).context("cannot reach the host")?;
    let control = File::from(control);
    for line in BufReader::new(&control).lines() {
        let job = serde_json::from_str(&line?)?;
        let answer = match perform(&job, &listeners) {
            Ok(took) => Answer::Took { ns: took.as_nanos() as u64 },
            Err(e) => Answer::Failed(format!("{job:?}: {e:#}")),
        };
        (&control).write_all(format!("{}\n", serde_json::to_string(&answer)?).as_bytes())?;
    }
    // The host has had enough; that init ends would be a panic.
    Ok(rustix::system::reboot(rustix::system::RebootCommand::Restart)?)
}

/// Does a job; how long it took, without what only prepares it.
fn perform(job: &Job, listeners: &Listeners) -> Result<Duration> {
    match *job {
        Job::Bind { slot } => {
            fs::write("/sys/bus/platform/drivers/virtio-mmio/bind", format!("virtio-mmio.{slot}"))?;
            Ok(Duration::ZERO)
        }
        Job::Link { mac, address } => link::set_up(mac, address).map(|()| Duration::ZERO),
        Job::Mount => {
            fs::create_dir_all(SHARE)?;
            mount(SHARE_TAG, SHARE, "virtiofs", MountFlags::empty(), None)?;
            Ok(Duration::ZERO)
        }
        Job::DiskSequential { write, block, count } => disk::sequential(write, block, count),
        Job::DiskRandom { write, depth, count } => disk::random(write, depth, count),
        Job::Send(stream) => streams::send(listeners, stream),
        Job::Receive(stream) => streams::receive(listeners, stream),
        Job::PingPong(stream) => streams::ping_pong(listeners, stream),
        Job::FileWrite { bytes } => files::write(bytes),
        Job::FileRead { bytes } => files::read(bytes),
        Job::Files { count } => files::many(count),
    }
}
