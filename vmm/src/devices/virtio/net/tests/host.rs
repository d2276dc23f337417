//! A tap device of the host's kernel, in a network namespace of its own, and a socket on the host's side of it.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};
use std::time::Duration;

use libc::{IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TAP, IFF_UP, IFF_VNET_HDR, TUNSETIFF, c_int, c_short};
use rustix::io::Errno;

/// EtherType for experiments (IEEE 802): what the kernel itself sends has others.
pub(super) const EXPERIMENT: [u8; 2] = [0x88, 0xb5];
pub(super) const MAC: [u8; 6] = [0x02, 0, 0, 0, 0, 1];

/// The host's side of a link. The thread that makes it moves into its namespace.
pub(super) struct Host {
    packets: OwnedFd,
    control: OwnedFd,
}

impl Host {
    /// A host with a tap of so many queues, and the tap. Its interface is up.
    pub(super) fn new(queues: usize) -> (Self, Vec<OwnedFd>) {
        // SAFETY: a call without pointers. The test harness runs each test on a thread of its own.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "this test needs root");
        // Nothing but what the test sends.
        std::fs::write("/proc/sys/net/ipv6/conf/default/disable_ipv6", "1").unwrap();
        let multi_queue = if queues > 1 { IFF_MULTI_QUEUE } else { 0 };
        let flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | multi_queue;
        let taps = (0..queues).map(|_| tap(flags)).collect();
        let host = Self {
            packets: socket(libc::AF_PACKET, libc::SOCK_RAW),
            control: socket(libc::AF_INET, libc::SOCK_DGRAM),
        };
        host.set_up(true);
        let mut request = request(0);
        // SAFETY: SIOCGIFINDEX takes a pointer to an `ifreq` and fills in the index.
        let index = unsafe {
            assert_eq!(libc::ioctl(host.control.as_raw_fd(), libc::SIOCGIFINDEX, &raw mut request), 0);
            request.ifr_ifru.ifru_ifindex
        };
        // SAFETY: all zero is a valid `sockaddr_ll`.
        let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
        address.sll_family = libc::AF_PACKET as u16;
        address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
        address.sll_ifindex = index;
        let length = size_of_val(&address) as libc::socklen_t;
        // SAFETY: `address` is a socket address of `length` bytes.
        let bound = unsafe { libc::bind(host.packets.as_raw_fd(), (&raw const address).cast(), length) };
        assert_eq!(bound, 0);
        rustix::net::sockopt::set_socket_timeout(
            &host.packets,
            rustix::net::sockopt::Timeout::Recv,
            Some(Duration::from_secs(20)),
        )
        .unwrap();
        (host, taps)
    }

    /// Sets the interface up or down.
    pub(super) fn set_up(&self, up: bool) {
        let mut request = request(if up { IFF_UP } else { 0 });
        // SAFETY: SIOCSIFFLAGS takes a pointer to an `ifreq`.
        let result = unsafe { libc::ioctl(self.control.as_raw_fd(), libc::SIOCSIFFLAGS, &raw mut request) };
        assert_eq!(result, 0);
    }

    /// Sends a frame to the guest.
    pub(super) fn send(&self, frame: &[u8]) {
        let flags = rustix::net::SendFlags::empty();
        assert_eq!(rustix::net::send(&self.packets, frame, flags).unwrap(), frame.len());
    }

    /// Sends a frame that may be lost: to more than the tap holds.
    pub(super) fn throw(&self, frame: &[u8]) {
        let _ = rustix::net::send(&self.packets, frame, rustix::net::SendFlags::empty());
    }

    /// The next experimental frame from the guest.
    pub(super) fn receive(&self) -> Vec<u8> {
        loop {
            let mut frame = vec![0; 70_000];
            let flags = rustix::net::RecvFlags::empty();
            let length = match rustix::net::recv(&self.packets, &mut frame[..], flags) {
                Ok((length, _)) => length,
                // Told once after the interface was down.
                Err(Errno::NETDOWN) => continue,
                Err(e) => panic!("no frame arrives: {e}"),
            };
            frame.truncate(length);
            if frame[12..14] == EXPERIMENT {
                return frame;
            }
        }
    }
}

/// An experimental frame of `length` bytes for the guest.
pub(super) fn frame(length: usize, seed: u8) -> Vec<u8> {
    let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 2], &EXPERIMENT].concat();
    frame.resize(length, seed);
    frame
}

/// An IPv4 datagram of the flow with this source port, for the guest.
pub(super) fn datagram(port: u16) -> Vec<u8> {
    let mut frame = [&MAC[..], &[2, 0, 0, 0, 0, 2], &[8, 0]].concat();
    // Version and length, type of service, total length, ID, fragment, time to live, UDP, checksum; addresses.
    frame.extend([0x45, 0, 0, 28, 0, 0, 0, 0, 64, 17, 0, 0]);
    frame.extend([10, 0, 0, 1, 10, 0, 0, 2]);
    frame.extend([port.to_be_bytes(), 7u16.to_be_bytes(), 8u16.to_be_bytes(), [0, 0]].concat());
    frame
}

/// A queue of the tap of this namespace, which is made if it is not there.
pub(super) fn tap(flags: c_int) -> OwnedFd {
    let fd = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    let mut request = request(flags);
    // SAFETY: TUNSETIFF takes a pointer to an `ifreq`.
    let result = unsafe { libc::ioctl(fd.as_fd().as_raw_fd(), TUNSETIFF, &raw mut request) };
    assert_eq!(result, 0, "{}", std::io::Error::last_os_error());
    fd.into()
}

fn request(flags: c_int) -> libc::ifreq {
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(b"tap0") {
        *to = *from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = flags as c_short;
    request
}

fn socket(family: c_int, kind: c_int) -> OwnedFd {
    // SAFETY: a call without pointers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, 0) };
    assert!(fd >= 0, "{}", std::io::Error::last_os_error());
    // SAFETY: the descriptor was just made and is owned by nobody else.
    unsafe { OwnedFd::from_raw_fd(fd) }
}
