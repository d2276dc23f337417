//! The host's ends of a guest's links: tap devices.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use crate::sys;

/// A tap device, for [`DeviceConfig::Net`](kvrun_vmm_api::DeviceConfig::Net): gone with its descriptors.
#[derive(Debug)]
pub struct Tap {
    /// What it is called.
    pub name: String,
    /// A descriptor per pair of queues.
    pub queues: Vec<OwnedFd>,
}

/// Makes a tap device in the network namespace of the calling thread. It has neither address nor peer, and is down. For a `%d` in the name the kernel
/// puts the first number that is free. The thread needs `CAP_NET_ADMIN`.
///
/// # Errors
/// As open(2) of `/dev/net/tun`, and `TUNSETIFF`.
pub fn open_tap(name: &str, queue_pairs: u8) -> io::Result<Tap> {
    let mut tap = Tap { name: name.to_owned(), queues: Vec::new() };
    for _ in 0..queue_pairs {
        let queue = File::options().read(true).write(true).open("/dev/net/tun")?;
        tap.name = sys::make_tap(&queue, &tap.name, queue_pairs > 1)?;
        tap.queues.push(queue.into());
    }
    Ok(tap)
}

/// As many descriptors of vhost-net as a link of so many pairs of queues takes.
///
/// # Errors
/// As open(2): a host without vhost-net has no such file, or none that can be opened.
pub fn open_vhost(queue_pairs: u8) -> io::Result<Vec<OwnedFd>> {
    (0..queue_pairs)
        .map(|_| Ok(File::options().read(true).write(true).open("/dev/vhost-net")?.into()))
        .collect()
}
