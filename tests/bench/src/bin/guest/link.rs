//! The guest's end of a link: as `ip addr add` and `ip link set up`, of which the guest has neither.

use std::fs;
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd, OwnedFd};

use anyhow::{Context, Result};
use rustix::net::{AddressFamily, SocketType, socket};

/// Gives the interface with this Ethernet address an address in a network of 256, and brings it up.
pub(crate) fn set_up(mac: [u8; 6], address: Ipv4Addr) -> Result<()> {
    let name = interface(mac)?;
    let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
    let set = |what: &str, request, value: Value| {
        ioctl(&socket, &name, request, value).with_context(|| format!("cannot set the {what} of {name}"))
    };
    set("address", libc::SIOCSIFADDR, Value::Address(address))?;
    set("network mask", libc::SIOCSIFNETMASK, Value::Address(Ipv4Addr::new(255, 255, 255, 0)))?;
    set("flags", libc::SIOCSIFFLAGS, Value::Flags((libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short))
}

fn interface(mac: [u8; 6]) -> Result<String> {
    let wanted = mac.map(|byte| format!("{byte:02x}")).join(":");
    for entry in fs::read_dir("/sys/class/net")? {
        let entry = entry?;
        if fs::read_to_string(entry.path().join("address"))?.trim() == wanted {
            return entry.file_name().into_string().ok().context("an interface with a strange name");
        }
    }
    anyhow::bail!("no interface has the address {wanted}")
}

#[derive(Clone, Copy)]
enum Value {
    Address(Ipv4Addr),
    Flags(libc::c_short),
}

fn ioctl(socket: &OwnedFd, name: &str, request: libc::Ioctl, value: Value) -> io::Result<()> {
    // SAFETY: all zero is a valid `ifreq`.
    let mut argument: libc::ifreq = unsafe { std::mem::zeroed() };
    // The last byte stays zero.
    for (to, from) in argument.ifr_name.iter_mut().take(libc::IFNAMSIZ - 1).zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    match value {
        Value::Flags(flags) => argument.ifr_ifru.ifru_flags = flags,
        Value::Address(address) => {
            let [a, b, c, d] = address.octets();
            // `struct sockaddr_in`: two bytes of port, four of address.
            let bytes = [0, 0, a, b, c, d, 0, 0, 0, 0, 0, 0, 0, 0].map(|byte: u8| byte as libc::c_char);
            argument.ifr_ifru.ifru_addr =
                libc::sockaddr { sa_family: libc::AF_INET as libc::sa_family_t, sa_data: bytes };
        }
    }
    // SAFETY: these requests take a pointer to an `ifreq`, which outlives the call.
    match unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw const argument) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}
