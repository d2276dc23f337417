//! The host's ends of a guest's links.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;

use crate::sys;

/// A tap device in the network namespace of the calling thread, for [`DeviceConfig::Net`](kvrun_vmm_api::DeviceConfig::Net): a
/// descriptor per pair of queues. It has neither address nor peer, is down, and is gone with its descriptors. The thread needs `CAP_NET_ADMIN`.
///
/// # Errors
/// As open(2) of `/dev/net/tun`, and `TUNSETIFF`.
pub fn open_tap(name: &str, queue_pairs: u8) -> io::Result<Vec<OwnedFd>> {
    (0..queue_pairs)
        .map(|_| {
            let tap = File::options().read(true).write(true).open("/dev/net/tun")?;
            sys::make_tap(&tap, name, queue_pairs > 1)?;
            Ok(tap.into())
        })
        .collect()
}

/// As many descriptors of vhost-net as a link of so many pairs of queues takes.
///
/// # Errors
/// As open(2); [`io::ErrorKind::NotFound`] if the host has no vhost-net.
pub fn open_vhost(queue_pairs: u8) -> io::Result<Vec<OwnedFd>> {
    (0..queue_pairs)
        .map(|_| Ok(File::options().read(true).write(true).open("/dev/vhost-net")?.into()))
        .collect()
}
