//! Requests to the kernel's routing subsystem, one at a time (rtnetlink(7)): of the guest's by the agent, of the host's by the pod engine.

#![forbid(unsafe_code)]

use std::io;

use netlink_packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkBuffer, NetlinkMessage, NetlinkPayload,
};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_ROUTE;

/// How often a list is asked for that changes while it is read.
const ATTEMPTS: u32 = 16;

/// A socket to the routing subsystem of the network namespace it was made in.
pub struct Netlink {
    socket: Socket,
    sequence: u32,
}

impl Netlink {
    /// One of the calling thread's network namespace.
    ///
    /// # Errors
    /// As socket(2).
    pub fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        Ok(Self { socket, sequence: 0 })
    }

    /// Changes something. `flags` are `NLM_F_CREATE` and the like.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn change(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.send(message, flags | NLM_F_ACK)?;
        loop {
            for answer in self.receive()? {
                if let NetlinkPayload::Error(error) = parse(&answer)?.payload {
                    return acknowledged(&error);
                }
            }
        }
    }

    /// All there is of what the message asks for.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn list(&mut self, message: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        // Linux Documentation/userspace-api/netlink/intro.rst, "NLM_F_DUMP_INTR": what was read may contradict itself.
        for _ in 0..ATTEMPTS {
            if let Some(list) = self.try_list(message.clone())? {
                return Ok(list);
            }
        }
        Err(io::Error::other("it does not stop changing"))
    }

    fn try_list(&mut self, message: RouteNetlinkMessage) -> io::Result<Option<Vec<RouteNetlinkMessage>>> {
        self.send(message, NLM_F_DUMP)?;
        let (mut list, mut interrupted) = (Vec::new(), false);
        loop {
            for answer in self.receive()? {
                let answer = parse(&answer)?;
                interrupted |= answer.header.flags & NLM_F_DUMP_INTR != 0;
                match answer.payload {
                    NetlinkPayload::InnerMessage(one) => list.push(one),
                    NetlinkPayload::Done(done) if done.code < 0 => {
                        return Err(io::Error::from_raw_os_error(-done.code));
                    }
                    NetlinkPayload::Done(_) => return Ok((!interrupted).then_some(list)),
                    NetlinkPayload::Error(error) => acknowledged(&error)?,
                    _ => {}
                }
            }
        }
    }

    fn send(&mut self, message: RouteNetlinkMessage, flags: u16) -> io::Result<()> {
        self.sequence += 1;
        let mut request = NetlinkMessage::from(message);
        request.header.flags = NLM_F_REQUEST | flags;
        request.header.sequence_number = self.sequence;
        request.finalize();
        let mut bytes = vec![0; request.buffer_len()];
        request.serialize(&mut bytes);
        self.socket.send(&bytes, 0).map(drop)
    }

    /// The next messages that answer the last request, as bytes: what is left of earlier ones is not looked into.
    fn receive(&mut self) -> io::Result<Vec<Vec<u8>>> {
        let (bytes, _) = self.socket.recv_from_full()?;
        let mut rest = bytes.as_slice();
        let mut messages = Vec::new();
        while !rest.is_empty() {
            let header = NetlinkBuffer::new_checked(rest).map_err(malformed)?;
            let length = header.length() as usize;
            if header.sequence_number() == self.sequence {
                messages.push(rest[..length].to_vec());
            }
            // netlink(7), NLMSG_ALIGN.
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        Ok(messages)
    }
}

fn parse(bytes: &[u8]) -> io::Result<NetlinkMessage<RouteNetlinkMessage>> {
    NetlinkMessage::deserialize(bytes).map_err(malformed)
}

fn malformed(error: impl std::fmt::Display) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
}

/// An error of 0 is an acknowledgement.
fn acknowledged(error: &netlink_packet_core::ErrorMessage) -> io::Result<()> {
    if error.code.is_none() { Ok(()) } else { Err(error.to_io()) }
}
