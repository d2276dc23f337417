//! Receiving.

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::time::Instant;

use kvrun_vmm_api::RateLimit;
use virtio_bindings::virtio_net::{VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MRG_RXBUF};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::super::counters::Counters;
use super::super::header;
use super::super::rx::Receiver;
use super::super::turn::Next;
use super::{MTU, SIZES, counter, frame, queue, tap, with_header};
use crate::devices::virtio::QueueError;
use crate::devices::virtio::testing::{Hostile, MockDriver, Segment};
use crate::rate_limiter::RateLimiter;

const MERGEABLE: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF;
const LONG: u64 = 1 << VIRTIO_NET_F_GUEST_TSO4;
const EVENT_IDX: u64 = 1 << VIRTIO_RING_F_EVENT_IDX;
/// What Linux offers at first for an MTU of 1500.
const BUFFER: usize = 1536;

struct Bench {
    driver: MockDriver,
    receiver: Receiver,
    tap: UnixDatagram,
    host: UnixDatagram,
    counters: Counters,
}

impl Bench {
    fn new(features: u64) -> Self {
        let mut driver = MockDriver::new(&SIZES);
        let receiver = Receiver::new(queue(&mut driver, features), features, MTU);
        let (tap, host) = tap();
        Self { driver, receiver, tap, host, counters: Counters::default() }
    }

    fn offer(&mut self, buffers: usize, length: usize) -> Vec<Segment> {
        let segments: Vec<_> = (0..buffers).map(|_| self.driver.writable(length)).collect();
        for segment in &segments {
            self.driver.add(0, &[*segment]);
        }
        segments
    }

    fn turn(&mut self) -> Result<Next, QueueError> {
        self.limited_turn(None)
    }

    fn limited_turn(&mut self, limiter: Option<&mut RateLimiter>) -> Result<Next, QueueError> {
        let (mem, interrupt) = (&self.driver.mem, &*self.driver.interrupt);
        self.receiver.turn(mem, self.tap.as_fd(), limiter, &self.counters, interrupt)
    }

    fn send(&self, frame: &[u8]) {
        self.host.send(&with_header(frame)).unwrap();
    }

    /// The next packet as a driver puts it together; `buffers` are those offered, in order.
    fn packet(&mut self, buffers: &[Segment]) -> Vec<u8> {
        let mut packet = Vec::new();
        let mut left = 1;
        for buffer in buffers {
            let (_, length) = self.driver.pop_used(0).expect("a packet is whole");
            packet.extend(self.driver.read(buffer.addr, length as usize));
            if packet.len() == length as usize {
                left = usize::from(u16::from_le_bytes([packet[10], packet[11]]));
            }
            left -= 1;
            if left == 0 {
                break;
            }
        }
        assert_eq!(left, 0);
        packet.split_off(header::LENGTH)
    }
}

#[test]
fn packet_is_received_with_its_header() {
    let mut bench = Bench::new(MERGEABLE);
    let buffers = bench.offer(3, BUFFER);
    let mut header = *b"\x01\x01\x22\0\x40\x05\x22\0\x10\0??";
    bench.host.send(&[&header[..], &frame(1514, 1)].concat()).unwrap();
    assert_eq!(bench.turn().unwrap(), Next::Tap);
    assert_eq!(bench.driver.pop_used(0).unwrap().1, 12 + 1514);
    header[10..].copy_from_slice(&[1, 0]);
    assert_eq!(bench.driver.read(buffers[0].addr, 12), header);
    assert_eq!(bench.driver.read(buffers[0].addr + 12, 1514), frame(1514, 1));
    assert_eq!(bench.driver.pop_used(0), None);
    assert_eq!(counter(&bench.counters, "rx_packets"), 1);
    assert_eq!(counter(&bench.counters, "rx_bytes"), 1514);
    assert_eq!(bench.driver.interrupt.queue_count(0), 1);
}

#[test]
fn long_packets_spread_over_mergeable_buffers() {
    let mut bench = Bench::new(MERGEABLE | LONG);
    let mut buffers = bench.offer(128, BUFFER);
    let lengths = [60, 20_000, BUFFER - 12, BUFFER - 11, 65_550];
    for (seed, &length) in lengths.iter().enumerate() {
        bench.send(&frame(length, seed));
        assert_eq!(bench.turn().unwrap(), Next::Tap);
        assert!(bench.packet(&buffers) == frame(length, seed), "packet of {length} bytes");
        buffers.drain(..(length + 12).div_ceil(BUFFER));
    }
}

#[test]
fn without_mergeable_buffers_a_packet_has_a_chain_of_its_own() {
    let mut bench = Bench::new(0);
    for _ in 0..2 {
        let parts = [5, 100, 2000].map(|length| bench.driver.writable(length));
        bench.driver.add_indirect(0, &parts);
        bench.send(&frame(1000, 3));
        bench.turn().unwrap();
        let (_, length) = bench.driver.pop_used(0).unwrap();
        assert_eq!(length, 1012);
        let whole: Vec<u8> =
            parts.iter().flat_map(|part| bench.driver.read(part.addr, part.len as usize)).collect();
        assert_eq!(whole[10..12], [1, 0]);
        assert_eq!(whole[12..1012], frame(1000, 3));
    }
}

#[test]
fn packets_wait_for_buffers() {
    for features in [MERGEABLE, MERGEABLE | EVENT_IDX] {
        let mut bench = Bench::new(features);
        bench.send(&frame(100, 1));
        assert_eq!(bench.turn().unwrap(), Next::Kick);
        // Not room enough yet for what might come.
        let mut buffers = bench.offer(2, 600);
        assert_eq!(bench.turn().unwrap(), Next::Kick);
        buffers.extend(bench.offer(1, 600));
        assert_eq!(bench.turn().unwrap(), Next::Kick, "of three, one is filled");
        assert_eq!(bench.packet(&buffers), frame(100, 1));
        assert!(!bench.driver.kicks_disabled(0));
        assert_eq!(counter(&bench.counters, "rx_starved"), 3);
    }
}

#[test]
fn packet_longer_than_the_link_allows_is_dropped_whole() {
    let mut bench = Bench::new(MERGEABLE);
    let buffers = bench.offer(1, 12 + 14 + 4 + 1500);
    bench.send(&frame(14 + 4 + 1501, 1));
    bench.send(&frame(14 + 4 + 1500, 2));
    bench.turn().unwrap();
    assert_eq!(bench.packet(&buffers), frame(14 + 4 + 1500, 2));
    assert_eq!(counter(&bench.counters, "rx_dropped"), 1);
}

#[test]
fn turn_ends_though_there_is_more_to_receive() {
    let mut bench = Bench::new(MERGEABLE | LONG);
    bench.offer(200, BUFFER);
    // As many as fit into the socket, each a large part of the turn.
    let mut sent = 0;
    while bench.host.send(&with_header(&frame(60_000, sent))).is_ok() {
        sent += 1;
    }
    assert!(sent > 2, "{sent}");
    let next = bench.turn().unwrap();
    let received = counter(&bench.counters, "rx_packets");
    assert!(received <= 5, "{received}");
    assert!(next == Next::Turn || next == Next::Kick || received == sent as u64, "{next:?}");
    assert_eq!(bench.driver.interrupt.queue_count(0), 1, "the driver hears of all at once");
}

#[test]
fn limit_holds_packets_back_and_loses_none() {
    let mut bench = Bench::new(MERGEABLE);
    let buffers = bench.offer(4, BUFFER);
    let limit = RateLimit { ops_per_second: 1000, ops_burst: 1, ..RateLimit::default() };
    let mut limiter = RateLimiter::new(limit, Instant::now());
    bench.send(&frame(100, 1));
    bench.send(&frame(100, 2));
    let mut throttled = 0;
    loop {
        match bench.limited_turn(Some(&mut limiter)).unwrap() {
            Next::At(_) => throttled += 1,
            next => break assert_eq!(next, Next::Tap),
        }
    }
    assert!(throttled > 0);
    assert_eq!(counter(&bench.counters, "rx_throttled"), throttled);
    assert_eq!(bench.packet(&buffers), frame(100, 1));
    assert_eq!(bench.packet(&buffers[1..]), frame(100, 2));
}

#[test]
fn buffers_taken_in_advance_are_put_back() {
    let mut bench = Bench::new(MERGEABLE | LONG);
    let buffers = bench.offer(60, BUFFER);
    bench.send(&frame(3000, 1));
    bench.turn().unwrap();
    assert_eq!(bench.packet(&buffers), frame(3000, 1));
    let Bench { driver, receiver, tap, host, counters } = bench;
    let queue = receiver.into_queue();
    assert_eq!(queue.position().next_avail, 2);
    assert_eq!(queue.position().next_used, 2);
    let receiver = Receiver::new(queue, MERGEABLE | LONG, MTU);
    let mut bench = Bench { driver, receiver, tap, host, counters };
    bench.send(&frame(3000, 2));
    bench.turn().unwrap();
    assert_eq!(bench.packet(&buffers[2..]), frame(3000, 2));
}

#[test]
fn tap_that_has_gone_is_left_alone() {
    let mut bench = Bench::new(MERGEABLE);
    bench.offer(1, BUFFER);
    // Not open for reading.
    let (_, writer) = std::io::pipe().unwrap();
    let (mem, interrupt) = (&bench.driver.mem, &*bench.driver.interrupt);
    let next = bench.receiver.turn(mem, writer.as_fd(), None, &bench.counters, interrupt).unwrap();
    assert_eq!(next, Next::Never);
}

#[test]
fn buffers_that_no_packet_fits_break_the_device() {
    let offers: [(u64, usize, usize); 3] = [(MERGEABLE, 1, 11), (0, 1, 1000), (MERGEABLE, 256, 12)];
    for (features, count, length) in offers {
        // Together they hold a packet of the MTU, but not one of a driver that takes long ones.
        let mut bench = Bench::new(features | LONG);
        bench.offer(count, length);
        if features == 0 {
            bench.offer(1, length);
        }
        assert!(matches!(bench.turn(), Err(QueueError::Request { .. })), "{count} of {length}");
    }
}

#[test]
fn hostile_buffers_do_no_harm() {
    for features in [0, MERGEABLE, MERGEABLE | LONG] {
        for kind in Hostile::ALL {
            for writable in [false, true] {
                let mut bench = Bench::new(features);
                bench.driver.add_hostile(0, kind, writable);
                bench.send(&frame(1000, 1));
                // Broken, or waiting for more: what cannot hold a packet is not written to.
                match bench.turn() {
                    Err(_) | Ok(Next::Kick) => {}
                    // 256 times the same 64 bytes make room enough.
                    Ok(Next::Tap) => assert!(matches!(kind, Hostile::Loop), "{kind:?}"),
                    Ok(next) => panic!("{kind:?}: {next:?}"),
                }
            }
        }
        let mut bench = Bench::new(features);
        bench.driver.jump_avail_idx(0);
        assert!(matches!(bench.turn(), Err(QueueError::Available { .. })));
    }
}
