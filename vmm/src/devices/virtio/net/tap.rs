//! The host's end of a link: queues of a tap device that the engine has made.
//!
//! The engine hands them in attached to their interface. What depends on the guest's driver - which offloads it takes, how many queues it
//! uses - is set here, on the descriptors; Linux asks for no privilege for that (6.12 drivers/net/tun.c, `__tun_chr_ioctl()`: only
//! `TUNSETIFF` of an existing interface does).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{
    IFF_ATTACH_QUEUE, IFF_DETACH_QUEUE, IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_VNET_HDR, TUN_F_CSUM,
    TUN_F_TSO_ECN, TUN_F_TSO4, TUN_F_TSO6, TUN_F_USO4, TUN_F_USO6, TUNGETIFF, TUNSETOFFLOAD, TUNSETQUEUE,
    TUNSETVNETHDRSZ,
};
use rustix::io::ioctl_fionbio;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_ECN, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_GUEST_TSO6,
    VIRTIO_NET_F_GUEST_USO4, VIRTIO_NET_F_GUEST_USO6,
};

use super::header;

/// Which flag of `TUNSETOFFLOAD` lets the host send what the driver accepts by which feature. (UFO is left out: no Linux since 4.14 makes
/// or takes such packets.)
const OFFLOADS: [(u32, u32); 6] = [
    (VIRTIO_NET_F_GUEST_CSUM, TUN_F_CSUM),
    (VIRTIO_NET_F_GUEST_TSO4, TUN_F_TSO4),
    (VIRTIO_NET_F_GUEST_TSO6, TUN_F_TSO6),
    (VIRTIO_NET_F_GUEST_ECN, TUN_F_TSO_ECN),
    (VIRTIO_NET_F_GUEST_USO4, TUN_F_USO4),
    (VIRTIO_NET_F_GUEST_USO6, TUN_F_USO6),
];
/// Linux knows these since 6.2, and only both together.
const USO: u64 = 1 << VIRTIO_NET_F_GUEST_USO4 | 1 << VIRTIO_NET_F_GUEST_USO6;
/// What the feature bits of a driver can say about offloads towards it.
pub(super) const GUEST_OFFLOADS: u64 = {
    let (mut bits, mut i) = (0, 0);
    while i < OFFLOADS.len() {
        bits |= 1 << OFFLOADS[i].0;
        i += 1;
    }
    bits
};

/// Why a descriptor cannot be the host's end of a link.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// It is of something else, or of a tap that has no interface.
    #[error("not a tap device with an interface")]
    NotATap(#[source] io::Error),
    /// It was made with other flags.
    #[error("tap device was made with flags {flags:#x}; it needs {needed:#x}")]
    Flags {
        /// As `TUNGETIFF` tells them.
        flags: i32,
        /// What must be among them.
        needed: i32,
    },
    /// The host refused.
    #[error("cannot {what} of a tap device")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// One queue of a tap device.
#[derive(Debug)]
pub(super) struct Tap(OwnedFd);

impl Tap {
    /// Checks the descriptor and prepares it: non-blocking, packets preceded by the header of virtio 1.
    pub(super) fn open(fd: OwnedFd, multi_queue: bool) -> Result<Self, TapError> {
        let tap = Self(fd);
        // SAFETY: all zero is a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        tap.ioctl(TUNGETIFF, &raw mut request).map_err(TapError::NotATap)?;
        // SAFETY: TUNGETIFF has filled in the flags.
        let flags = i32::from(unsafe { request.ifr_ifru.ifru_flags });
        let needed = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | if multi_queue { IFF_MULTI_QUEUE } else { 0 };
        if flags & needed != needed {
            return Err(TapError::Flags { flags, needed });
        }
        let failed = |what| move |source| TapError::Host { what, source };
        ioctl_fionbio(&tap.0, true).map_err(io::Error::from).map_err(failed("change the mode"))?;
        let mut length = header::LENGTH as i32;
        tap.ioctl(TUNSETVNETHDRSZ, &raw mut length).map_err(failed("set the header length"))?;
        Ok(tap)
    }

    /// Which offloads towards the guest the host can do, as feature bits of a driver. Leaves none of them on.
    pub(super) fn probe_offloads(&self) -> Result<u64, TapError> {
        let failed = |source| TapError::Host { what: "set the offloads", source };
        let mut offloads = GUEST_OFFLOADS;
        if let Err(e) = self.set_offloads(offloads) {
            if e.raw_os_error() != Some(libc::EINVAL) {
                return Err(failed(e));
            }
            offloads &= !USO;
            self.set_offloads(offloads).map_err(failed)?;
        }
        self.set_offloads(0).map_err(failed)?;
        Ok(offloads)
    }

    /// Lets the host send packets that need these offloads, given as feature bits of the driver; all queues of the tap at once.
    pub(super) fn set_offloads(&self, mut features: u64) -> io::Result<()> {
        // virtio 1.3 s5.1.3.1: all others require GUEST_CSUM. A driver that breaks this gets none.
        if features & 1 << VIRTIO_NET_F_GUEST_CSUM == 0 {
            features = 0;
        }
        if features & USO != USO {
            features &= !USO;
        }
        let flags = OFFLOADS.iter().filter(|(bit, _)| features & 1 << bit != 0).map(|(_, flag)| flag);
        let flags: u32 = flags.sum();
        // SAFETY: TUNSETOFFLOAD takes its argument by value.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
    }

    /// Lets the host spread packets over this queue too, or no longer. Not for the state it is in already.
    pub(super) fn attach(&self, attached: bool) -> io::Result<()> {
        // SAFETY: all zero is a valid `ifreq`.
        let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
        request.ifr_ifru.ifru_flags = if attached { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE } as i16;
        self.ioctl(TUNSETQUEUE, &raw mut request)
    }

    fn ioctl<T>(&self, request: libc::Ioctl, argument: *mut T) -> io::Result<()> {
        // SAFETY: `argument` is what the request takes, at each of the calls above, and outlives the call.
        check(unsafe { libc::ioctl(self.0.as_raw_fd(), request, argument) })
    }
}

impl AsFd for Tap {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

#[cfg(test)]
impl From<OwnedFd> for Tap {
    /// A socket that stands in for a tap: a frame per datagram.
    fn from(fd: OwnedFd) -> Self {
        Self(fd)
    }
}

fn check(result: libc::c_int) -> io::Result<()> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
