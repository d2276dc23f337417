//! Guests that break the rules.

use std::io::{Read, Write};

use super::guest::{CID, CLOSED, Guest, LISTEN, RX, Sock, TX};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::testing::{Hostile, Segment};
use crate::devices::virtio::vsock::ConnectError;
use crate::devices::virtio::vsock::connection::BUF_ALLOC;
use crate::devices::virtio::vsock::packet::{HEADER_LEN, Header, SHUT_BOTH, op};

/// A device whose driver broke the rules closes everything, asks for a reset once, and works again after it.
fn assert_recovers(guest: &mut Guest, what: &str) {
    guest.driver.interrupt.wait_reset();
    guest.driver.kick(RX);
    guest.driver.kick(TX);
    let socket = std::os::unix::net::UnixStream::pair().unwrap().0.into();
    assert_eq!(guest.host_connect(9, socket).recv().unwrap(), Err(ConnectError::NotReady), "{what}");
    guest.device.reset();
    assert_eq!(guest.driver.interrupt.resets().len(), 1, "{what}");
    guest.activate();
    guest.offer_all();
    let (mut sock, mut stream) = guest.accept(1024);
    stream.write_all(b"well again").unwrap();
    assert_eq!(guest.read(&mut sock, 10), b"well again", "{what}");
}

#[test]
fn broken_chains_to_the_device_end_it() {
    for kind in Hostile::ALL {
        let mut guest = Guest::new();
        let (_, mut stream) = guest.accept(1024);
        guest.driver.add_hostile(TX, kind, false);
        guest.driver.kick(TX);
        guest.driver.interrupt.wait_reset();
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{kind:?}");
        assert_recovers(&mut guest, &format!("{kind:?}"));
    }
}

#[test]
fn broken_receive_buffers_end_the_device() {
    for kind in Hostile::ALL {
        let mut guest = Guest::asleep();
        guest.activate();
        guest.driver.add_hostile(RX, kind, true);
        guest.driver.kick(RX);
        guest.send(&Sock::new(1, CLOSED).header(op::REQUEST), b"");
        assert_recovers(&mut guest, &format!("{kind:?}"));
    }
}

#[test]
fn broken_receive_buffers_end_the_device_in_the_middle_of_data() {
    for kind in Hostile::ALL {
        let mut guest = Guest::asleep();
        guest.activate();
        for _ in 0..3 {
            let buffer = guest.driver.writable(4096);
            guest.offer(vec![buffer]);
        }
        guest.driver.kick(RX);
        let (_, mut stream) = guest.accept(1024);
        guest.driver.add_hostile(RX, kind, true);
        guest.driver.kick(RX);
        stream.write_all(&[1; 20_000]).unwrap();
        assert_recovers(&mut guest, &format!("{kind:?}"));
    }
}

#[test]
fn corrupt_available_rings_end_the_device() {
    for queue in [RX, TX] {
        let mut guest = Guest::asleep();
        guest.activate();
        guest.driver.jump_avail_idx(queue);
        let mut segment = guest.driver.readable(&Sock::new(1, CLOSED).header(op::REQUEST).encode());
        segment.len = HEADER_LEN as u32;
        guest.driver.add(TX, &[segment]);
        guest.driver.kick(TX);
        guest.driver.interrupt.wait_reset();
        guest.device.reset();
    }
}

#[test]
fn wrong_directions_and_missing_room_end_the_device() {
    type Break = fn(&mut Guest);
    let breaks: [(&str, Break); 5] = [
        ("writable packet", |guest| {
            let segment = guest.driver.writable(HEADER_LEN);
            guest.driver.add(TX, &[segment]);
        }),
        ("packet with a writable tail", |guest| {
            let header = guest.driver.readable(&Sock::new(1, 2).header(op::RW).encode());
            let tail = guest.driver.writable(10);
            guest.driver.add(TX, &[header, tail]);
        }),
        ("packet shorter than a header", |guest| {
            let segment = guest.driver.readable(&[0; HEADER_LEN - 1]);
            guest.driver.add(TX, &[segment]);
        }),
        ("readable receive buffer", |guest| {
            let segment = guest.driver.readable(&[0; 100]);
            guest.driver.add(RX, &[segment]);
            let packet = guest.driver.readable(&Sock::new(1, CLOSED).header(op::REQUEST).encode());
            guest.driver.add(TX, &[packet]);
        }),
        ("receive buffer shorter than a header", |guest| {
            let segment = guest.driver.writable(HEADER_LEN - 1);
            guest.driver.add(RX, &[segment]);
            let packet = guest.driver.readable(&Sock::new(1, CLOSED).header(op::REQUEST).encode());
            guest.driver.add(TX, &[packet]);
        }),
    ];
    for (what, break_it) in breaks {
        let mut guest = Guest::asleep();
        guest.activate();
        break_it(&mut guest);
        guest.driver.kick(TX);
        assert_recovers(&mut guest, what);
    }
}

#[test]
fn receive_buffer_without_room_for_data_ends_the_device_once_there_is_data() {
    let mut guest = Guest::asleep();
    guest.activate();
    for _ in 0..2 {
        let buffer = guest.driver.writable(HEADER_LEN);
        guest.offer(vec![buffer]);
    }
    guest.driver.kick(RX);
    let (_, mut stream) = guest.accept(1024);
    stream.write_all(b"x").unwrap();
    assert_recovers(&mut guest, "no room");
}

#[test]
fn chain_longer_than_the_queue_ends_the_device() {
    let mut guest = Guest::new();
    let byte = guest.driver.readable(&[0]);
    guest.driver.add_indirect(TX, &[byte; 129]);
    guest.driver.kick(TX);
    assert_recovers(&mut guest, "long indirect chain");
}

#[test]
fn packets_in_the_name_of_others_are_dropped() {
    let mut guest = Guest::new();
    let (sock, mut stream) = guest.accept(1024);
    let good = Header { len: 1, ..sock.header(op::RW) };
    for header in [
        Header { src_cid: 2, ..good },
        Header { src_cid: 1 << 32 | u64::from(CID), ..good },
        Header { dst_cid: u64::from(CID), ..good },
        Header { dst_cid: 0, ..good },
        Header { dst_cid: u64::MAX, ..good },
        Header { src_cid: 4, op: op::RST, ..good },
        Header { src_cid: 4, src_port: 1, dst_port: LISTEN[0], op: op::REQUEST, ..good },
    ] {
        guest.send(&header, b"x");
        guest.expect_silence();
    }
    guest.send(&good, b"y");
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    assert_eq!(byte[0], b'y');
}

#[test]
fn stray_packets_get_an_rst_of_their_own_type_but_never_one_for_an_rst() {
    let mut guest = Guest::new();
    let mut sock = Sock::new(5, LISTEN[0]);
    for op in [0, op::RESPONSE, op::SHUTDOWN, op::RW, op::CREDIT_UPDATE, op::CREDIT_REQUEST, 8, u16::MAX] {
        guest.send(&Header { flags: SHUT_BOTH, ..sock.header(op) }, b"");
        guest.expect(&mut sock, op::RST);
    }
    for kind in [0, 2, u16::MAX] {
        guest.send(&Header { kind, ..sock.header(op::REQUEST) }, b"");
        let (reset, _) = guest.recv();
        assert_eq!((reset.op, reset.kind), (op::RST, kind));
        guest.send(&Header { kind, ..sock.header(op::RST) }, b"");
    }
    for _ in 0..1000 {
        guest.send(&sock.header(op::RST), b"");
    }
    guest.expect_silence();
    // The port is still open.
    guest.connect(5, LISTEN[0]);
}

#[test]
fn nonsense_on_a_connection_ends_it() {
    type Spoil = fn(&mut Header);
    let nonsense: [(&str, Spoil); 8] = [
        ("unknown operation", |header| header.op = 8),
        ("no operation", |header| header.op = 0),
        ("request", |header| header.op = op::REQUEST),
        ("response", |header| header.op = op::RESPONSE),
        ("more data than is there", |header| header.len = 4),
        ("the most data there can be", |header| header.len = u32::MAX),
        ("more data than the buffer", |header| header.len = BUF_ALLOC + 1),
        ("unknown operation with a length", |header| (header.op, header.len) = (9, 1)),
    ];
    let mut guest = Guest::new();
    for (what, spoil) in nonsense {
        let (mut sock, mut stream) = guest.accept(1024);
        let mut header = Header { len: 3, ..sock.header(op::RW) };
        spoil(&mut header);
        guest.send(&header, b"abc");
        guest.expect(&mut sock, op::RST);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0, "{what}");
    }
    guest.expect_silence();
}

#[test]
fn socket_type_of_an_open_connection_cannot_change() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    guest.send(&Header { kind: 2, len: 1, ..sock.header(op::RW) }, b"x");
    assert_eq!(guest.recv().0.kind, 2);
    guest.write(&mut sock, b"y");
    let mut byte = [0];
    stream.read_exact(&mut byte).unwrap();
    assert_eq!(byte[0], b'y');
}

#[test]
fn data_beyond_the_credit_ends_the_connection() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    let mut sent = 0;
    // The host does not read: its socket and then the device fill up.
    loop {
        guest.catch_up(&mut sock);
        let len = sock.credit().min(super::guest::MAX_DATA);
        if len == 0 {
            break;
        }
        guest.write(&mut sock, &vec![1; len]);
        sent += len;
    }
    guest.write(&mut sock, b"x");
    guest.expect(&mut sock, op::RST);
    // What was within the credit and had not been passed on is lost with it; nothing else is delivered.
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert!(got.len() < sent && got.iter().all(|&byte| byte == 1));
}

#[test]
fn data_after_the_end_ends_the_connection() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    guest.shutdown(&sock, 2);
    guest.write(&mut sock, b"x");
    guest.expect(&mut sock, op::RST);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn nonsense_about_credit_only_harms_the_guest() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    sock.fwd_cnt = 1;
    guest.send(&sock.header(op::CREDIT_UPDATE), b"");
    stream.write_all(b"hello").unwrap();
    guest.expect_silence();
    (sock.fwd_cnt, sock.buf_alloc) = (0, u32::MAX);
    guest.send(&sock.header(op::CREDIT_UPDATE), b"");
    assert_eq!(guest.expect(&mut sock, op::RW).1, b"hello");
}

#[test]
fn pending_connect_is_answered_when_the_guest_answers_with_nonsense() {
    let mut guest = Guest::new();
    for op in [op::RW, op::SHUTDOWN, op::REQUEST, op::CREDIT_UPDATE, 99] {
        let (mut sock, mut stream, answer) = guest.requested(9);
        guest.send(&sock.header(op), b"");
        assert_eq!(answer.recv().unwrap(), Err(ConnectError::Reset));
        guest.expect(&mut sock, op::RST);
        assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    }
}

#[test]
fn packet_in_a_buffer_the_guest_changes_meanwhile_is_read_once() {
    let mut guest = Guest::new();
    let (sock, mut stream) = guest.accept(1024);
    // The header's memory is also the data: whatever is read twice would differ.
    let header = Header { len: HEADER_LEN as u32, ..sock.header(op::RW) };
    let segment = guest.driver.readable(&header.encode());
    let twice = Segment { ..segment };
    guest.send_chain(&[segment, twice]);
    let mut got = [0; HEADER_LEN];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(got, header.encode());
}
