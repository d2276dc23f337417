//! Connecting, data, credit, ends.

use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixDatagram, UnixStream};

use super::guest::{CLOSED, Guest, LISTEN, MAX_DATA, Sock, TX, pattern};
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::testing::config_of;
use crate::devices::virtio::vsock::ConnectError;
use crate::devices::virtio::vsock::connection::BUF_ALLOC;
use crate::devices::virtio::vsock::packet::{HEADER_LEN, Header, SHUT_BOTH, SHUT_RCV, SHUT_SEND, op};

/// The device has forgotten the connection: it answers packets of it as it answers any stray one.
fn assert_forgotten(guest: &mut Guest, sock: &mut Sock) {
    guest.send(&sock.header(op::CREDIT_REQUEST), b"");
    guest.expect(sock, op::RST);
}

fn assert_end(stream: &mut UnixStream) {
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn config_space_holds_the_guest_cid() {
    let mut guest = Guest::asleep();
    let bytes: [u8; 10] = config_of(&mut guest.device);
    assert_eq!(bytes, [3, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
}

#[test]
fn guest_connects_once_to_each_listening_port() {
    let mut guest = Guest::new();
    let (mut first, _stream) = guest.connect(5000, LISTEN[0]);
    assert_eq!(first.peer_alloc, BUF_ALLOC);
    let mut second = Sock::new(5001, LISTEN[0]);
    guest.send(&second.header(op::REQUEST), b"");
    guest.expect(&mut second, op::RST);
    let (_, _other) = guest.connect(5001, LISTEN[1]);
    guest.send(&first.header(op::CREDIT_REQUEST), b"");
    guest.expect(&mut first, op::CREDIT_UPDATE);
}

#[test]
fn used_ports_stay_closed_and_unused_ones_open_across_a_reset() {
    let mut guest = Guest::new();
    let (_, mut stream) = guest.connect(5000, LISTEN[0]);
    guest.device.reset();
    assert_end(&mut stream);
    guest.activate();
    guest.offer_all();
    let mut sock = Sock::new(5000, LISTEN[0]);
    guest.send(&sock.header(op::REQUEST), b"");
    guest.expect(&mut sock, op::RST);
    guest.connect(5000, LISTEN[1]);
}

#[test]
fn connection_to_any_other_port_is_reset() {
    let mut guest = Guest::new();
    let mut sock = Sock::new(5000, CLOSED);
    guest.send(&sock.header(op::REQUEST), b"");
    guest.expect(&mut sock, op::RST);
    assert!(guest.accepted.try_recv().is_err());
}

#[test]
fn host_connects_from_a_port_of_its_own_each_time() {
    let mut guest = Guest::new();
    let (mut one, mut stream) = guest.accept(1024);
    let (two, _other) = guest.accept(1024);
    assert_ne!(one.host_port, two.host_port);
    stream.write_all(b"to the guest").unwrap();
    assert_eq!(guest.read(&mut one, 12), b"to the guest");
    guest.write(&mut one, b"to the host");
    let mut bytes = [0; 11];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!(&bytes, b"to the host");
}

#[test]
fn host_is_told_when_the_guest_refuses() {
    let mut guest = Guest::new();
    let (sock, mut stream, answer) = guest.requested(9);
    guest.send(&sock.header(op::RST), b"");
    assert_eq!(answer.recv().unwrap(), Err(ConnectError::Refused));
    assert_end(&mut stream);
    guest.expect_silence();
}

#[test]
fn host_connects_only_while_the_driver_is_up_and_only_with_a_stream() {
    let mut guest = Guest::asleep();
    let socket = || UnixStream::pair().unwrap().0.into();
    assert_eq!(guest.host_connect(9, socket()).recv().unwrap(), Err(ConnectError::NotReady));
    guest.activate();
    let (datagram, _other) = UnixDatagram::pair().unwrap();
    assert_eq!(guest.host_connect(9, datagram.into()).recv().unwrap(), Err(ConnectError::NotAStream));
    let pipe = std::io::pipe().unwrap().0;
    assert_eq!(guest.host_connect(9, pipe.into()).recv().unwrap(), Err(ConnectError::NotAStream));
    guest.device.reset();
    assert_eq!(guest.host_connect(9, socket()).recv().unwrap(), Err(ConnectError::NotReady));
}

#[test]
fn host_that_hangs_up_gives_up_connecting() {
    let mut guest = Guest::new();
    let (mut sock, stream, answer) = guest.requested(9);
    drop(stream);
    assert_eq!(answer.recv().unwrap(), Err(ConnectError::Reset));
    guest.expect(&mut sock, op::RST);
    guest.send(&sock.header(op::RESPONSE), b"");
    guest.expect(&mut sock, op::RST);
}

#[test]
fn data_sent_before_the_guest_accepts_is_not_lost() {
    let mut guest = Guest::new();
    let (mut sock, mut stream, answer) = guest.requested(9);
    stream.write_all(b"early").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    guest.send(&sock.header(op::RESPONSE), b"");
    assert_eq!(answer.recv().unwrap(), Ok(()));
    assert_eq!(guest.read(&mut sock, 5), b"early");
    assert_eq!(guest.expect(&mut sock, op::SHUTDOWN).0.flags, SHUT_SEND);
}

#[test]
fn data_of_odd_sizes_passes_both_ways() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    for (seed, len) in
        [1, 2, 3, 43, 44, 45, 4051, 4052, 4053, 4096, 8191, 40_000, 65_535].into_iter().enumerate()
    {
        let sent = pattern(len, seed as u64);
        stream.write_all(&sent).unwrap();
        assert!(guest.read(&mut sock, len) == sent, "{len} bytes to the guest");
        guest.write(&mut sock, &sent);
        let mut got = vec![0; len];
        stream.read_exact(&mut got).unwrap();
        assert!(got == sent, "{len} bytes to the host");
    }
    guest.write(&mut sock, b"");
    guest.expect_silence();
}

#[test]
fn packets_may_be_cut_anywhere() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    let data = pattern(100, 1);
    let header = Header { len: 100, ..sock.header(op::RW) };
    let mut bytes = header.encode().to_vec();
    bytes.extend(&data);
    // As many pieces as the queue is long: more than one system call takes.
    let shreds: Vec<usize> = (1..128).collect();
    for cuts in [&[1, 2, 43, 44, 45][..], &[10, 50], &[44], &[143], &[20, 60, 100, 120], &shreds] {
        let mut segments = Vec::new();
        let mut from = 0;
        for &to in cuts.iter().chain([&bytes.len()]) {
            segments.push(guest.driver.readable(&bytes[from..to]));
            from = to;
        }
        guest.send_chain(&segments);
        let head = guest.driver.add_indirect(TX, &segments);
        guest.driver.kick(TX);
        assert_eq!(guest.driver.wait_used(TX), (head, 0));
        for _ in 0..2 {
            let mut got = [0; 100];
            stream.read_exact(&mut got).unwrap();
            assert_eq!(got[..], data, "{cuts:?}");
        }
    }
    sock.tx_cnt = 1000;
    // What is beyond the length in the header is not data.
    let longer =
        [guest.driver.readable(&Header { len: 3, ..header }.encode()), guest.driver.readable(b"abcdef")];
    guest.send_chain(&longer);
    let mut got = [0; 3];
    stream.read_exact(&mut got).unwrap();
    assert_eq!(&got, b"abc");
    guest.write(&mut sock, b"!");
    stream.read_exact(&mut got[..1]).unwrap();
    assert_eq!(got[0], b'!');
}

#[test]
fn receive_buffers_may_be_cut_anywhere() {
    let mut guest = Guest::asleep();
    guest.activate();
    for lens in [[7, 36, 2, 955], [44, 1, 1, 954], [100, 400, 1, 499]] {
        let buffer = lens.iter().map(|&len| guest.driver.writable(len)).collect();
        guest.offer(buffer);
    }
    guest.driver.kick(0);
    let (mut sock, mut stream) = guest.accept(1024);
    let sent = pattern(5000, 3);
    stream.write_all(&sent).unwrap();
    assert!(guest.read(&mut sock, 5000) == sent);
}

#[test]
fn data_waits_for_the_credit_of_the_guest() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    sock.buf_alloc = 5000;
    guest.send(&sock.header(op::CREDIT_UPDATE), b"");
    let sent = pattern(11_000, 4);
    stream.write_all(&sent).unwrap();
    let mut got = Vec::new();
    while got.len() < 5000 {
        got.extend(guest.expect(&mut sock, op::RW).1);
    }
    guest.expect_silence();
    sock.fwd_cnt = 5000;
    guest.send(&sock.header(op::CREDIT_UPDATE), b"");
    while got.len() < 10_000 {
        got.extend(guest.expect(&mut sock, op::RW).1);
    }
    guest.expect_silence();
    // A smaller buffer than what is under way is no credit, and no harm.
    sock.buf_alloc = 4000;
    guest.send(&sock.header(op::CREDIT_UPDATE), b"");
    guest.expect_silence();
    sock.fwd_cnt = 10_000;
    guest.send(&sock.header(op::CREDIT_UPDATE), b"");
    got.extend(guest.expect(&mut sock, op::RW).1);
    assert!(got == sent);
}

#[test]
fn guest_is_told_of_new_room_before_it_runs_out() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    let mut got = vec![0; MAX_DATA];
    let mut updates = 0;
    for round in 0..20 {
        assert!(sock.credit() >= MAX_DATA, "out of credit in round {round}");
        let sent = pattern(MAX_DATA, round);
        guest.write(&mut sock, &sent);
        stream.read_exact(&mut got).unwrap();
        assert!(got == sent);
        updates += guest.take_updates(&mut sock);
    }
    assert!((5..=10).contains(&updates), "{updates} credit updates for 20 packets");
}

#[test]
fn credit_request_is_answered() {
    let mut guest = Guest::new();
    let (mut sock, _stream) = guest.accept(1024);
    guest.write(&mut sock, b"12345");
    guest.send(&sock.header(op::CREDIT_REQUEST), b"");
    let (update, _) = guest.expect(&mut sock, op::CREDIT_UPDATE);
    assert_eq!((update.buf_alloc, update.fwd_cnt), (BUF_ALLOC, 5));
}

/// Sends until the credit is used up, which the host does not read: the socket's own buffer is full, and the rest waits in the
/// device.
pub(super) fn fill(guest: &mut Guest, sock: &mut Sock) -> Vec<u8> {
    let mut all = Vec::new();
    loop {
        let len = sock.credit().min(MAX_DATA);
        let data = pattern(len, all.len() as u64);
        guest.write(sock, &data);
        all.extend(data);
        guest.catch_up(sock);
        if sock.credit() == 0 {
            assert!(all.len() > BUF_ALLOC as usize);
            return all;
        }
    }
}

#[test]
fn slow_host_holds_the_guest_back_and_loses_nothing() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    let sent = fill(&mut guest, &mut sock);
    let mut got = vec![0; sent.len()];
    stream.read_exact(&mut got).unwrap();
    assert!(got == sent);
    while sock.credit() < BUF_ALLOC as usize / 2 {
        guest.expect(&mut sock, op::CREDIT_UPDATE);
    }
}

#[test]
fn guest_ends_first_then_the_host() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    guest.write(&mut sock, b"last words");
    guest.shutdown(&sock, SHUT_SEND);
    let mut words = Vec::new();
    stream.read_to_end(&mut words).unwrap();
    assert_eq!(words, b"last words");
    stream.write_all(b"an answer").unwrap();
    assert_eq!(guest.read(&mut sock, 9), b"an answer");
    drop(stream);
    assert_eq!(guest.expect(&mut sock, op::SHUTDOWN).0.flags, SHUT_BOTH);
    guest.send(&sock.header(op::RST), b"");
    assert_forgotten(&mut guest, &mut sock);
}

#[test]
fn host_ends_first_then_the_guest() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    stream.write_all(b"last words").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.read(&mut sock, 10), b"last words");
    assert_eq!(guest.expect(&mut sock, op::SHUTDOWN).0.flags, SHUT_SEND);
    guest.write(&mut sock, b"an answer");
    guest.shutdown(&sock, SHUT_BOTH);
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer, b"an answer");
    guest.expect(&mut sock, op::RST);
    assert_forgotten(&mut guest, &mut sock);
}

#[test]
fn both_sides_end_sending_and_the_connection_is_over() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    guest.shutdown(&sock, SHUT_SEND);
    assert_end(&mut stream);
    stream.shutdown(Shutdown::Write).unwrap();
    assert_eq!(guest.expect(&mut sock, op::SHUTDOWN).0.flags, SHUT_BOTH);
    // Both ask at the same time: one RST settles it.
    guest.shutdown(&sock, SHUT_BOTH);
    guest.expect(&mut sock, op::RST);
    assert_forgotten(&mut guest, &mut sock);
}

#[test]
fn guest_that_receives_no_more_stops_the_host_from_writing() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    guest.shutdown(&sock, SHUT_RCV);
    guest.expect_silence();
    assert_eq!(stream.write(b"x").unwrap_err().kind(), ErrorKind::BrokenPipe);
    guest.write(&mut sock, b"still here");
    guest.shutdown(&sock, SHUT_SEND);
    let mut words = Vec::new();
    stream.read_to_end(&mut words).unwrap();
    assert_eq!(words, b"still here");
    guest.expect(&mut sock, op::RST);
}

#[test]
fn everything_reaches_a_slow_host_when_the_guest_closes() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    let sent = fill(&mut guest, &mut sock);
    guest.shutdown(&sock, SHUT_BOTH);
    guest.expect_silence();
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert!(got == sent);
    guest.expect(&mut sock, op::RST);
    assert_forgotten(&mut guest, &mut sock);
}

#[test]
fn everything_reaches_a_slow_host_when_the_guest_resets() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    let sent = fill(&mut guest, &mut sock);
    guest.send(&sock.header(op::RST), b"");
    assert_forgotten(&mut guest, &mut sock);
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    assert!(got == sent);
    guest.expect_silence();
}

#[test]
fn everything_reaches_the_guest_when_the_host_closes() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    sock.buf_alloc = 10_000;
    guest.send(&sock.header(op::CREDIT_UPDATE), b"");
    let sent = pattern(100_000, 5);
    stream.write_all(&sent).unwrap();
    drop(stream);
    let mut got = Vec::new();
    let end = loop {
        let (header, data) = guest.recv();
        match header.op {
            op::RW => {
                got.extend(data);
                sock.fwd_cnt = got.len() as u32;
                guest.send(&sock.header(op::CREDIT_UPDATE), b"");
            }
            // While the guest is out of credit, it learns that nobody reads what it writes.
            op::SHUTDOWN if header.flags == SHUT_RCV => {}
            _ => break header,
        }
    };
    assert_eq!((end.op, end.flags), (op::SHUTDOWN, SHUT_BOTH));
    assert!(got == sent);
    guest.send(&sock.header(op::RST), b"");
    guest.expect_silence();
}

#[test]
fn guest_learns_that_nobody_reads_what_it_writes() {
    let mut guest = Guest::new();
    let (mut sock, stream) = guest.accept(1024);
    stream.shutdown(Shutdown::Read).unwrap();
    guest.write(&mut sock, b"for nobody");
    assert_eq!(guest.expect(&mut sock, op::SHUTDOWN).0.flags, SHUT_RCV);
    guest.write(&mut sock, b"sent before it knew");
    guest.expect_silence();
    drop(stream);
    assert_eq!(guest.expect(&mut sock, op::SHUTDOWN).0.flags, SHUT_BOTH);
    // Packets that crossed the end are no offence.
    guest.write(&mut sock, b"late");
    guest.expect_silence();
    guest.send(&sock.header(op::RST), b"");
    assert_forgotten(&mut guest, &mut sock);
}

#[test]
fn host_that_closes_with_unread_data_ends_the_connection() {
    let mut guest = Guest::new();
    let (mut sock, stream) = guest.accept(1024);
    fill(&mut guest, &mut sock);
    drop(stream);
    loop {
        let (header, _) = guest.recv();
        if header.op != op::CREDIT_UPDATE {
            assert_eq!((header.op, header.flags & SHUT_RCV), (op::SHUTDOWN, SHUT_RCV));
            break;
        }
    }
}

#[test]
fn reset_closes_streams_and_answers_pending_connects() {
    let mut guest = Guest::new();
    let (_, mut stream) = guest.accept(1024);
    let (_, mut pending, answer) = guest.requested(1025);
    guest.device.reset();
    assert_eq!(answer.recv().unwrap(), Err(ConnectError::Reset));
    assert_end(&mut stream);
    assert_end(&mut pending);
    // Nothing touches guest memory any more, and resetting again does nothing.
    let head = guest.driver.readable(&[0; HEADER_LEN]);
    guest.driver.add(TX, &[head]);
    guest.driver.kick(TX);
    guest.device.reset();
    assert!(guest.driver.pop_used(TX).is_none());
    guest.activate();
    guest.offer_all();
    guest.accept(1024);
}

#[test]
fn end_of_the_loop_closes_streams_and_answers_pending_connects() {
    let mut guest = Guest::new();
    let (_, mut stream) = guest.accept(1024);
    let (_, _pending, answer) = guest.requested(1025);
    guest.events.quit();
    assert_eq!(answer.recv().unwrap(), Err(ConnectError::Reset));
    assert_end(&mut stream);
}

#[test]
fn stream_with_a_duplicate_elsewhere_still_ends() {
    let mut guest = Guest::new();
    let (near, far) = UnixStream::pair().unwrap();
    let _duplicate = far.try_clone().unwrap();
    let answer = guest.host_connect(9, far.into());
    let request = guest.recv().0;
    let mut sock = Sock::new(9, request.src_port);
    guest.send(&sock.header(op::RESPONSE), b"");
    answer.recv().unwrap().unwrap();
    guest.shutdown(&sock, SHUT_BOTH);
    guest.expect(&mut sock, op::RST);
    assert_end(&mut super::guest::patient(near));
}
