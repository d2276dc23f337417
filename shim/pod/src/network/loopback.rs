//! Connections to loopback in the namespace lead to that of the guest: port-forwarding of CRI enters the namespace of a pod and connects to
//! `localhost`, but what listens there does so in the guest.
//!
//! A program of the kernel's, attached to the namespace, is asked which socket a new connection is for (bpf, `BPF_PROG_TYPE_SK_LOOKUP`; Linux
//! Documentation/bpf/prog_sk_lookup.rst), and gives those to 127.0.0.1 and ::1 to one listener of ours, whatever their port is. So nothing is
//! translated, no rules of a firewall are left behind, and it ends with this process. Each connection is copied to a stream of its own to the agent,
//! which connects to the same port in the guest.
//!
//! Of hosts whose kernel is older than 5.9, or that refuse bpf(2), the guest's loopback cannot be reached; nothing else is amiss.

use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener as StdTcpListener};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, sockopt};
use tokio::io::copy_bidirectional_with_sizes;
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::Semaphore;
use tokio::task::{JoinHandle, JoinSet};

use super::{NetworkError, NetworkNamespace, host};
use crate::accept;
use crate::pod::Pod;
use crate::sys::{self, Instruction};
use crate::text;

/// How many connections there may be at a time. More wait to be accepted.
const CONNECTIONS: usize = 64;
/// How many of them may be on their way to the guest, where the agent keeps streams for them.
const CONNECTING: usize = 4;
/// How many wait to be accepted.
const BACKLOG: i32 = 128;
/// One read's size.
const BUFFER: usize = 32 * 1024;

/// The namespace's loopback, as long as it is the guest's.
#[derive(Debug)]
pub(super) struct Loopback {
    /// Closed, the program is detached.
    _attached: OwnedFd,
    serving: JoinHandle<()>,
}

impl Loopback {
    /// Gives the connections to loopback of a namespace to a guest.
    ///
    /// # Errors
    /// [`NetworkError::Host`].
    pub(super) fn lead_to(pod: &Pod, namespace: &NetworkNamespace) -> Result<Self, NetworkError> {
        let made = namespace.run(listen).and_then(|listener| {
            let listener = listener?;
            let attached = attach(namespace, &listener)?;
            listener.set_nonblocking(true)?;
            Ok((attached, TcpListener::from_std(listener)?))
        });
        let (attached, listener) =
            made.map_err(host(|| "lead connections to loopback to the guest".to_owned()))?;
        Ok(Self { _attached: attached, serving: tokio::spawn(serve(listener, pod.clone())) })
    }
}

impl Drop for Loopback {
    fn drop(&mut self) {
        self.serving.abort();
    }
}

/// A listener for both families, in the namespace of the calling thread. Its own address is of no consequence, but that nobody else reaches it.
fn listen() -> io::Result<StdTcpListener> {
    let socket = |family| rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None);
    // Not only if the address is there: loopback may be down, or without IPv6.
    let (socket, address): (_, SocketAddr) = match socket(AddressFamily::INET6) {
        Ok(socket) => {
            sockopt::set_ipv6_v6only(&socket, false)?;
            sockopt::set_ipv6_freebind(&socket, true)?;
            (socket, (Ipv6Addr::LOCALHOST, 0).into())
        }
        // A host without IPv6.
        Err(Errno::AFNOSUPPORT) => {
            let socket = socket(AddressFamily::INET)?;
            sockopt::set_ip_freebind(&socket, true)?;
            (socket, (Ipv4Addr::LOCALHOST, 0).into())
        }
        Err(error) => return Err(error.into()),
    };
    rustix::net::bind(&socket, &address)?;
    rustix::net::listen(&socket, BACKLOG)?;
    Ok(socket.into())
}

/// Has the kernel give a namespace's connections to loopback to a listener, for as long as the descriptor is open.
fn attach(namespace: &NetworkNamespace, listener: &StdTcpListener) -> io::Result<OwnedFd> {
    let map = sys::socket_map(listener)?;
    let program = sys::load_socket_lookup(&program(map.as_raw_fd()))?;
    sys::attach_socket_lookup(&program, namespace)
}

/// The program: a connection to loopback is for the socket in the map; all else is looked up as ever.
fn program(map: RawFd) -> Vec<Instruction> {
    // Opcodes (Linux Documentation/bpf/standardization/instruction-set.rst).
    const LOAD_WORD: u8 = 0x61;
    const STORE_WORD: u8 = 0x62;
    const LOAD_POINTER: u8 = 0x18;
    const ADD: u8 = 0x07;
    const MOVE: u8 = 0xb7;
    const MOVE_REGISTER: u8 = 0xbf;
    const JUMP: u8 = 0x05;
    const JUMP_IF: u8 = 0x16;
    const JUMP_IF_NOT: u8 = 0x56;
    const JUMP_IF_NULL: u8 = 0x15;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    const MAP_DESCRIPTOR: u8 = 1;
    // Of `struct bpf_sk_lookup` (Linux include/uapi/linux/bpf.h).
    const FAMILY: i16 = 8;
    const PROTOCOL: i16 = 12;
    const LOCAL_IP4: i16 = 40;
    const LOCAL_IP6: i16 = 44;
    // Functions, and the answer.
    const MAP_LOOKUP_ELEM: i32 = 1;
    const SK_RELEASE: i32 = 86;
    const SK_ASSIGN: i32 = 124;
    const SK_PASS: i32 = 1;
    // Places to jump to.
    const IP4: i16 = 15;
    const ASSIGN: i16 = 17;
    const PASS: i16 = 31;

    // Registers: results, the first three arguments, what is kept over calls, the stack.
    let [r0, r1, r2, r3, context, socket, stack] = [0, 1, 2, 3, 6, 7, 10];
    // In the order of the network, as addresses are in the structure.
    let ip4 = u32::from(Ipv4Addr::LOCALHOST).to_be().cast_signed();
    let ip6_end = 1_u32.to_be().cast_signed();
    let step = |code, to: u8, from: u8, offset, immediate| Instruction {
        code,
        registers: to | (from << 4),
        offset,
        immediate,
    };
    let mut steps = vec![
        step(MOVE_REGISTER, context, r1, 0, 0),
        step(LOAD_WORD, r2, context, PROTOCOL, 0),
        step(JUMP_IF_NOT, r2, 0, PASS, libc::IPPROTO_TCP),
        step(LOAD_WORD, r2, context, FAMILY, 0),
        step(JUMP_IF, r2, 0, IP4, libc::AF_INET),
        step(JUMP_IF_NOT, r2, 0, PASS, libc::AF_INET6),
        step(LOAD_WORD, r2, context, LOCAL_IP6, 0),
        step(JUMP_IF_NOT, r2, 0, PASS, 0),
        step(LOAD_WORD, r2, context, LOCAL_IP6 + 4, 0),
        step(JUMP_IF_NOT, r2, 0, PASS, 0),
        step(LOAD_WORD, r2, context, LOCAL_IP6 + 8, 0),
        step(JUMP_IF_NOT, r2, 0, PASS, 0),
        step(LOAD_WORD, r2, context, LOCAL_IP6 + 12, 0),
        step(JUMP_IF_NOT, r2, 0, PASS, ip6_end),
        step(JUMP, 0, 0, ASSIGN, 0),
        // IP4:
        step(LOAD_WORD, r2, context, LOCAL_IP4, 0),
        step(JUMP_IF_NOT, r2, 0, PASS, ip4),
        // ASSIGN: the element 0 of the map.
        step(STORE_WORD, stack, 0, -4, 0),
        step(MOVE_REGISTER, r2, stack, 0, 0),
        step(ADD, r2, 0, 0, -4),
        step(LOAD_POINTER, r1, MAP_DESCRIPTOR, 0, map),
        step(0, 0, 0, 0, 0),
        step(CALL, 0, 0, 0, MAP_LOOKUP_ELEM),
        step(JUMP_IF_NULL, r0, 0, PASS, 0),
        step(MOVE_REGISTER, socket, r0, 0, 0),
        step(MOVE_REGISTER, r1, context, 0, 0),
        step(MOVE_REGISTER, r2, socket, 0, 0),
        step(MOVE, r3, 0, 0, 0),
        step(CALL, 0, 0, 0, SK_ASSIGN),
        step(MOVE_REGISTER, r1, socket, 0, 0),
        step(CALL, 0, 0, 0, SK_RELEASE),
        // PASS:
        step(MOVE, r0, 0, 0, SK_PASS),
        step(EXIT, 0, 0, 0, 0),
    ];
    // A jump counts from the instruction behind it.
    for (index, step) in (1..).zip(&mut steps) {
        if [JUMP, JUMP_IF, JUMP_IF_NOT, JUMP_IF_NULL].contains(&step.code) {
            step.offset -= index;
        }
    }
    steps
}

/// Takes connections for ever; dropped, it closes them.
async fn serve(listener: TcpListener, pod: Pod) {
    let (all, connecting) = (Arc::new(Semaphore::new(CONNECTIONS)), Arc::new(Semaphore::new(CONNECTING)));
    let mut open = JoinSet::new();
    loop {
        // Neither is ever closed.
        let Ok(place) = Arc::clone(&all).acquire_owned().await else { return };
        while open.try_join_next().is_some() {}
        let (connection, _) = accept::patiently(|| listener.accept()).await;
        let (pod, connecting) = (pod.clone(), Arc::clone(&connecting));
        open.spawn(async move {
            forward(connection, pod, &connecting).await;
            drop(place);
        });
    }
}

async fn forward(mut connection: TcpStream, pod: Pod, connecting: &Semaphore) {
    // The address is the one that was connected to, not the listener's.
    let Ok(port) = connection.local_addr().map(|address| address.port()) else { return };
    let stream = {
        let _connecting = connecting.acquire().await;
        pod.connect_port(port).await
    };
    drop(pod);
    let stream = stream.map_err(|error| text::chain(&error)).and_then(|stream| {
        let stream = stream.set_nonblocking(true).and_then(|()| UnixStream::from_std(stream));
        stream.map_err(|error| error.to_string())
    });
    match stream {
        Ok(mut stream) => {
            // Whoever is left learns of a failure by the end of its connection.
            let _ = copy_bidirectional_with_sizes(&mut connection, &mut stream, BUFFER, BUFFER).await;
        }
        Err(error) => {
            tracing::debug!(port, error, "connect to the guest's loopback");
            // It is reset, as nearly as can be what a port does on which nothing listens.
            let _ = sockopt::set_socket_linger(&connection, Some(Duration::ZERO));
        }
    }
}
