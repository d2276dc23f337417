//! The host's side of a link: a tap in the network namespace that `tests/fuzz/run` makes, and a packet socket on it.

use std::fs::File;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_UP, IFF_VNET_HDR, c_int};

/// A tap of two queues, its interface up.
pub(crate) struct Tap {
    queues: [OwnedFd; 2],
    packets: OwnedFd,
}

impl Tap {
    /// Makes it.
    pub(crate) fn new() -> Self {
        let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE;
        let queues = [(); 2].map(|()| {
            let queue = File::options().read(true).write(true).open("/dev/net/tun").expect("/dev/net/tun");
            let mut request = request();
            request.ifr_ifru.ifru_flags = flags as i16;
            // SAFETY: TUNSETIFF takes a pointer to an `ifreq`.
            succeed("make a tap", unsafe {
                libc::ioctl(queue.as_raw_fd(), libc::TUNSETIFF, &raw mut request)
            });
            queue.into()
        });
        let packets = socket(libc::AF_PACKET, libc::SOCK_RAW | libc::SOCK_NONBLOCK);
        let mut up = request();
        up.ifr_ifru.ifru_flags = IFF_UP as i16;
        // SAFETY: SIOCSIFFLAGS takes a pointer to an `ifreq`.
        succeed("set the tap up", unsafe {
            libc::ioctl(packets.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut up)
        });
        let mut index = request();
        // SAFETY: SIOCGIFINDEX takes a pointer to an `ifreq` and fills in the index.
        let index = unsafe {
            succeed("find the tap", libc::ioctl(packets.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut index));
            index.ifr_ifru.ifru_ifindex
        };
        // SAFETY: all zero is a valid `sockaddr_ll`.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_ifindex = index;
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: `address` is a socket address of `length` bytes.
        succeed("bind to the tap", unsafe {
            libc::bind(packets.as_raw_fd(), (&raw const address).cast(), length)
        });
        Self { queues, packets }
    }

    /// Descriptors of its queues.
    pub(crate) fn queues(&self) -> Vec<OwnedFd> {
        self.queues.iter().map(|queue| queue.try_clone().expect("descriptor")).collect()
    }

    /// Sends a frame towards the guest, if it is one.
    pub(crate) fn send(&self, frame: &[u8]) {
        // A frame that is too short or finds no room is lost.
        let _ = rustix::io::write(&self.packets, frame);
    }
}

/// A request about the interface.
fn request() -> libc::ifreq {
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"fuzz") {
        *to = *from as libc::c_char;
    }
    request
}

fn socket(family: c_int, kind: c_int) -> OwnedFd {
    // SAFETY: a call without pointers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, 0) };
    succeed("make a socket", fd);
    // SAFETY: just made, and owned by nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}

fn succeed(what: &str, result: c_int) {
    assert!(result >= 0, "cannot {what}: {}", std::io::Error::last_os_error());
}
