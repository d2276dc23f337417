//! Big transfers, many connections, fairness, lack of buffers.

use std::collections::HashMap;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::thread;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::guest::{CLOSED, Guest, LISTEN, MAX_DATA, Sock, TX, pattern};
use crate::devices::virtio::vsock::connection::{BUF_ALLOC, MAX_BURST, SMALL_BUF_ALLOC};
use crate::devices::virtio::vsock::packet::{HEADER_LEN, Header, SHUT_BOTH, SHUT_SEND, op};
use crate::devices::virtio::vsock::table::{MANY_CONNECTIONS, MAX_CONNECTIONS, MAX_STRAY_RESETS};
use crate::devices::virtio::vsock::{ConnectError, QUEUE_SIZES};

#[test]
fn big_transfer_is_exact_both_ways_at_once() {
    transfer(&mut Guest::new());
}

#[test]
fn big_transfer_is_exact_with_event_indices() {
    transfer(&mut Guest::with_features(1 << VIRTIO_RING_F_EVENT_IDX));
}

fn transfer(guest: &mut Guest) {
    const SIZE: usize = 8 << 20;
    let (mut sock, stream) = guest.accept(1024);
    let (to_guest, to_host) = (pattern(SIZE, 1), pattern(SIZE, 2));
    let (mut reading, mut writing) = (stream.try_clone().unwrap(), stream);
    thread::scope(|scope| {
        scope.spawn(|| {
            writing.write_all(&to_guest).unwrap();
            writing.shutdown(std::net::Shutdown::Write).unwrap();
        });
        let reader = scope.spawn(|| {
            let mut all = Vec::new();
            reading.read_to_end(&mut all).unwrap();
            assert!(all == to_host, "what the host received differs");
        });
        let (mut received, mut sent, mut told, mut ended) = (Vec::with_capacity(SIZE), 0, 0, false);
        while sent < SIZE || !ended {
            // Odd sizes, so that packets and buffers never line up.
            let len = sock.credit().min(MAX_DATA - 17).min(SIZE - sent);
            if len > 0 {
                guest.write(&mut sock, &to_host[sent..sent + len]);
                sent += len;
            } else {
                let packet = guest.recv();
                take(packet, &mut sock, &mut received, &mut ended);
            }
            while let Some(packet) = guest.try_recv() {
                take(packet, &mut sock, &mut received, &mut ended);
            }
            sock.fwd_cnt = received.len() as u32;
            if received.len() - told > 60_000 {
                told = received.len();
                guest.send(&sock.header(op::CREDIT_UPDATE), b"");
            }
        }
        assert!(received == to_guest, "what the guest received differs");
        guest.shutdown(&sock, SHUT_SEND);
        reader.join().unwrap();
    });
}

fn take((header, data): (Header, Vec<u8>), sock: &mut Sock, received: &mut Vec<u8>, ended: &mut bool) {
    sock.note(&header);
    match header.op {
        op::RW => {
            assert!(!*ended, "data after the end");
            received.extend(data);
        }
        op::SHUTDOWN => *ended = true,
        op::CREDIT_UPDATE => {}
        other => panic!("unexpected operation {other}"),
    }
}

#[test]
fn as_many_connections_as_there_can_be_and_no_more() {
    let mut guest = Guest::new();
    let mut all: Vec<(Sock, UnixStream)> = (0..MAX_CONNECTIONS).map(|_| guest.accept(1024)).collect();
    // The first have room for much, the others for less.
    let room = |index: usize| all[index].0.peer_alloc;
    assert_eq!(
        [room(0), room(MANY_CONNECTIONS - 1), room(MANY_CONNECTIONS), room(MAX_CONNECTIONS - 1)],
        [BUF_ALLOC, BUF_ALLOC, SMALL_BUF_ALLOC, SMALL_BUF_ALLOC]
    );
    let (near, far) = UnixStream::pair().unwrap();
    assert_eq!(guest.host_connect(9, far.into()).recv().unwrap(), Err(ConnectError::TooMany));
    drop(near);
    let mut extra = Sock::new(77, LISTEN[0]);
    guest.send(&extra.header(op::REQUEST), b"");
    guest.expect(&mut extra, op::RST);

    // All speak at once; each hears its own.
    for (i, (_, stream)) in all.iter_mut().enumerate() {
        stream.write_all(&i.to_le_bytes()).unwrap();
    }
    let mut heard = HashMap::new();
    while heard.len() < all.len() {
        let (header, data) = guest.recv();
        assert_eq!(header.op, op::RW);
        heard.insert(header.src_port, usize::from_le_bytes(data.try_into().unwrap()));
    }
    for (i, (sock, stream)) in all.iter_mut().enumerate() {
        assert_eq!(heard[&sock.host_port], i);
        guest.write(sock, &i.to_le_bytes());
        let mut bytes = [0; 8];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(usize::from_le_bytes(bytes), i);
    }
    // One leaves, and there is room for one more.
    let (mut sock, _stream) = all.pop().unwrap();
    guest.shutdown(&sock, SHUT_BOTH);
    guest.expect(&mut sock, op::RST);
    guest.connect(77, LISTEN[0]);
}

#[test]
fn connections_that_end_while_they_wait_for_buffers_leave_no_trace() {
    let mut guest = Guest::asleep();
    guest.activate();
    let buffer = guest.driver.writable(4096);
    guest.offer(vec![buffer]);
    guest.driver.kick(0);
    let mut all: Vec<(Sock, UnixStream)> = (0..300).map(|_| guest.accept(1024)).collect();
    for (_, stream) in &mut all {
        stream.write_all(b"hello").unwrap();
    }
    let (first, last) = (all[0].0.host_port, all[299].0.host_port);
    for (sock, _) in &all[1..299] {
        guest.send(&sock.header(op::RST), b"");
    }
    let mut heard = vec![guest.recv().0.src_port, guest.recv().0.src_port];
    heard.sort_unstable();
    assert_eq!(heard, [first, last]);
    guest.expect_silence();
}

#[test]
fn busy_connections_take_turns() {
    let mut guest = Guest::new();
    let mut all: Vec<(Sock, UnixStream)> = (0..8).map(|_| guest.accept(1024)).collect();
    for (sock, stream) in &mut all {
        sock.buf_alloc = 1 << 30;
        guest.send(&sock.header(op::CREDIT_UPDATE), b"");
        stream.set_nonblocking(true).unwrap();
        let bytes = vec![7; 100_000];
        assert_eq!(stream.write(&bytes).unwrap(), bytes.len());
    }
    // Whoever is ahead, is so by no more than two bursts of each of the others.
    let mut bytes: HashMap<u32, usize> = all.iter().map(|(sock, _)| (sock.host_port, 0)).collect();
    let mut finished = 0;
    while finished < all.len() {
        let (header, data) = guest.recv();
        assert_eq!(header.op, op::RW);
        let mine = bytes.get_mut(&header.src_port).unwrap();
        *mine += data.len();
        if *mine == 100_000 {
            finished += 1;
            if finished == 1 {
                let least = bytes.values().min().unwrap();
                assert!(100_000 - least <= 2 * usize::from(MAX_BURST) * 4096, "{bytes:?}");
            }
        }
    }
}

#[test]
fn small_message_does_not_wait_for_a_big_transfer() {
    let mut guest = Guest::asleep();
    guest.activate();
    for _ in 0..4 {
        let buffer = guest.driver.writable(4096);
        guest.offer(vec![buffer]);
    }
    guest.driver.kick(0);
    let (big, mut big_stream) = guest.accept(1024);
    let (small, mut small_stream) = guest.accept(1024);
    big_stream.set_nonblocking(true).unwrap();
    assert_eq!(big_stream.write(&vec![1; 150_000]).unwrap(), 150_000);
    assert_eq!(guest.recv().0.src_port, big.host_port);
    small_stream.write_all(b"hello").unwrap();
    // The four buffers that may be filled already, a burst under way, and those of the turn after.
    for _ in 0..16 {
        let (header, data) = guest.recv();
        if header.src_port == small.host_port {
            assert_eq!(data, b"hello");
            return;
        }
    }
    panic!("the small message waits behind the big transfer");
}

#[test]
fn without_receive_buffers_everything_waits_and_nothing_is_lost() {
    let mut guest = Guest::asleep();
    guest.activate();
    let mut streams = Vec::new();
    let mut answers = Vec::new();
    for i in 0..100u32 {
        let (mut near, far) = UnixStream::pair().unwrap();
        near.write_all(&i.to_le_bytes()).unwrap();
        answers.push(guest.host_connect(5000 + i, far.into()));
        streams.push(near);
    }
    // A storm of packets that deserve an RST, on top.
    for port in 0..1000 {
        guest.send(&Sock::new(port, CLOSED).header(op::REQUEST), b"");
    }
    guest.offer_all();
    let (mut requests, mut resets) = (Vec::new(), 0);
    while requests.len() < 100 || resets < MAX_STRAY_RESETS {
        let (header, _) = guest.recv();
        match header.op {
            op::REQUEST => requests.push(Sock::new(header.dst_port, header.src_port)),
            op::RST => resets += 1,
            other => panic!("unexpected operation {other}"),
        }
    }
    guest.expect_silence();
    for sock in &requests {
        guest.send(&sock.header(op::RESPONSE), b"");
    }
    for answer in answers {
        answer.recv().unwrap().unwrap();
    }
    let mut got: Vec<u32> = (0..100)
        .map(|_| {
            let (header, data) = guest.recv();
            assert_eq!(header.op, op::RW);
            assert_eq!(u32::from_le_bytes(data.clone().try_into().unwrap()) + 5000, header.dst_port);
            header.dst_port
        })
        .collect();
    got.sort_unstable();
    assert!(got.into_iter().eq(5000..5100));
}

#[test]
fn guest_that_only_sends_is_served_without_receive_buffers() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    // All receive buffers are used up by data nobody takes away.
    sock.buf_alloc = 1 << 30;
    guest.send(&sock.header(op::CREDIT_UPDATE), b"");
    let flood = thread::spawn({
        let mut stream = stream.try_clone().unwrap();
        move || stream.write_all(&vec![5; QUEUE_SIZES[0] as usize * 4052 + 1000])
    });
    let mut flooded = 0;
    for _ in 0..QUEUE_SIZES[0] {
        flooded += guest.recv_and_keep().1.len();
    }
    let sent = pattern(MAX_DATA, 8);
    for _ in 0..3 {
        guest.write(&mut sock, &sent);
        let mut got = vec![0; MAX_DATA];
        stream.read_exact(&mut got).unwrap();
        assert!(got == sent);
    }
    guest.offer_all();
    let total = QUEUE_SIZES[0] as usize * 4052 + 1000;
    while flooded < total {
        let (header, data) = guest.recv();
        if header.op == op::RW {
            flooded += data.len();
        }
    }
    assert_eq!(flooded, total);
    flood.join().unwrap().unwrap();
}

#[test]
fn many_packets_at_once_are_taken_in_order() {
    let mut guest = Guest::new();
    let (sock, mut stream) = guest.accept(1024);
    let mut heads = Vec::new();
    for i in 0..QUEUE_SIZES[TX] {
        let mut bytes = Header { len: 2, ..sock.header(op::RW) }.encode().to_vec();
        bytes.extend(i.to_le_bytes());
        assert_eq!(bytes.len(), HEADER_LEN + 2);
        let segment = guest.driver.readable(&bytes);
        heads.push(guest.driver.add(TX, &[segment]));
    }
    // One kick for more than the device takes in one turn.
    guest.driver.kick(TX);
    for head in heads {
        assert_eq!(guest.driver.wait_used(TX), (head, 0));
    }
    for i in 0..QUEUE_SIZES[TX] {
        let mut bytes = [0; 2];
        stream.read_exact(&mut bytes).unwrap();
        assert_eq!(u16::from_le_bytes(bytes), i);
    }
}
