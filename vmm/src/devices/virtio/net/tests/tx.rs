//! Sending.

use std::os::fd::AsFd;
use std::os::unix::net::UnixDatagram;
use std::time::Instant;

use kvrun_vmm_api::RateLimit;
use rustix::net::sockopt::set_socket_send_buffer_size;
use virtio_bindings::virtio_net::VIRTIO_NET_F_CSUM;

use super::super::counters::Counters;
use super::super::header;
use super::super::turn::Next;
use super::super::tx::Transmitter;
use super::{SIZES, counter, frame, queue, tap, with_header};
use crate::devices::virtio::QueueError;
use crate::devices::virtio::testing::{Hostile, MockDriver};
use crate::rate_limiter::RateLimiter;

struct Bench {
    driver: MockDriver,
    transmitter: Transmitter,
    tap: UnixDatagram,
    host: UnixDatagram,
    counters: Counters,
}

impl Bench {
    fn new(features: u64) -> Self {
        let mut driver = MockDriver::new(&SIZES);
        let transmitter = Transmitter::new(queue(&mut driver, features), features);
        let (tap, host) = tap();
        Self { driver, transmitter, tap, host, counters: Counters::default() }
    }

    fn turn(&mut self) -> Result<Next, QueueError> {
        self.limited_turn(None)
    }

    fn limited_turn(&mut self, limiter: Option<&mut RateLimiter>) -> Result<Next, QueueError> {
        let (mem, interrupt) = (&self.driver.mem, &*self.driver.interrupt);
        self.transmitter.turn(mem, self.tap.as_fd(), limiter, &self.counters, interrupt)
    }

    fn send(&mut self, frame: &[u8]) -> u16 {
        let packet = self.driver.readable(&with_header(frame));
        self.driver.add(0, &[packet])
    }

    /// The next packet at the host.
    fn packet(&self) -> Option<Vec<u8>> {
        let mut packet = vec![0; 70_000];
        let length = self.host.recv(&mut packet).ok()?;
        packet.truncate(length);
        Some(packet)
    }
}

#[test]
fn packet_arrives_however_it_is_cut() {
    let mut bench = Bench::new(1 << VIRTIO_NET_F_CSUM);
    // A checksum to be made, and what the host is not to see: an unknown flag, a number of buffers.
    let mut packet = b"\x81\0\xff\xff\0\0\x0e\0\x10\0\x07\x07".to_vec();
    packet.extend(frame(100, 1));
    let mut seen = b"\x01\0\x64\0\0\0\x0e\0\x10\0\0\0".to_vec();
    seen.extend(frame(100, 1));
    for cut in [1, 11, 12, 13, 111] {
        for indirect in [false, true] {
            let parts = [&packet[..cut], &[], &packet[cut..]].map(|part| bench.driver.readable(part));
            let head = match indirect {
                true => bench.driver.add_indirect(0, &parts),
                false => bench.driver.add(0, &parts),
            };
            assert_eq!(bench.turn().unwrap(), Next::Kick);
            assert_eq!(bench.driver.pop_used(0), Some((head, 0)));
            assert_eq!(bench.packet().unwrap(), seen);
        }
    }
    assert_eq!(counter(&bench.counters, "tx_packets"), 10);
    assert_eq!(counter(&bench.counters, "tx_bytes"), 1000);
}

#[test]
fn packet_the_host_does_not_take_is_lost_and_the_next_is_not() {
    let mut bench = Bench::new(0);
    let (tap, gone) = tap();
    drop(gone);
    let tap = std::mem::replace(&mut bench.tap, tap);
    let lost = bench.send(&frame(60, 1));
    assert_eq!(bench.turn().unwrap(), Next::Kick);
    assert_eq!(bench.driver.pop_used(0), Some((lost, 0)));
    assert_eq!(counter(&bench.counters, "tx_dropped"), 1);
    bench.tap = tap;
    bench.send(&frame(60, 2));
    bench.turn().unwrap();
    assert_eq!(bench.packet().unwrap(), with_header(&frame(60, 2)));
}

#[test]
fn packets_wait_for_room_at_the_host() {
    let mut bench = Bench::new(0);
    set_socket_send_buffer_size(&bench.tap, 4096).unwrap();
    let packets = 200;
    for seed in 0..packets {
        bench.send(&frame(60, seed));
    }
    let mut waits = 0;
    let mut arrived = 0;
    loop {
        match bench.turn().unwrap() {
            Next::Tap => waits += 1,
            Next::Turn => {}
            next => break assert_eq!(next, Next::Kick),
        }
        while let Some(packet) = bench.packet() {
            assert_eq!(packet, with_header(&frame(60, arrived)));
            arrived += 1;
        }
    }
    while bench.packet().is_some() {
        arrived += 1;
    }
    assert!(waits > 0);
    assert_eq!(arrived, packets);
    assert_eq!(std::iter::from_fn(|| bench.driver.pop_used(0)).count(), packets);
}

#[test]
fn turn_ends_though_there_is_more_to_send() {
    let mut bench = Bench::new(0);
    for _ in 0..200 {
        // No packet, so that it is not the socket that ends the turn.
        bench.send(&[]);
    }
    assert_eq!(bench.turn().unwrap(), Next::Turn);
    assert_eq!(counter(&bench.counters, "tx_malformed"), 64);
    assert_eq!(bench.driver.interrupt.queue_count(0), 1);
    while bench.turn().unwrap() == Next::Turn {}
    assert_eq!(counter(&bench.counters, "tx_malformed"), 200);
}

#[test]
fn limit_holds_packets_back_and_loses_none() {
    let mut bench = Bench::new(0);
    let limit = RateLimit { bytes_per_second: 200_000, bytes_burst: 100, ..RateLimit::default() };
    let mut limiter = RateLimiter::new(limit, Instant::now());
    for seed in 0..3 {
        bench.send(&frame(100, seed));
    }
    let mut throttled = 0;
    loop {
        match bench.limited_turn(Some(&mut limiter)).unwrap() {
            Next::At(_) => throttled += 1,
            next => break assert_eq!(next, Next::Kick),
        }
    }
    assert!(throttled > 0);
    assert_eq!(counter(&bench.counters, "tx_throttled"), throttled);
    for seed in 0..3 {
        assert_eq!(bench.packet().unwrap(), with_header(&frame(100, seed)));
    }
}

#[test]
fn what_is_no_packet_is_given_back_and_counted() {
    let mut bench = Bench::new(0);
    let short = bench.driver.readable(&[0; header::LENGTH - 1]);
    let no_frame = bench.driver.readable(&[0; header::LENGTH + 13]);
    let long = bench.driver.readable(&vec![0; header::LENGTH + header::MAX_FRAME + 1]);
    let writable = bench.driver.writable(100);
    let whole = bench.driver.readable(&with_header(&frame(60, 1)));
    for parts in [&[short][..], &[no_frame], &[long], &[writable], &[whole, writable]] {
        let head = bench.driver.add(0, parts);
        assert_eq!(bench.turn().unwrap(), Next::Kick);
        assert_eq!(bench.driver.pop_used(0), Some((head, 0)));
    }
    assert_eq!(counter(&bench.counters, "tx_malformed"), 5);
    assert_eq!(bench.packet(), None);
}

#[test]
fn hostile_chains_do_no_harm() {
    for kind in Hostile::ALL {
        for writable in [false, true] {
            let mut bench = Bench::new(0);
            let head = bench.driver.add_hostile(0, kind, writable);
            match bench.turn() {
                Err(QueueError::Used { .. }) => assert!(matches!(kind, Hostile::HeadBeyondTable)),
                other => {
                    assert_eq!(other.unwrap(), Next::Kick, "{kind:?}");
                    assert_eq!(bench.driver.pop_used(0), Some((head, 0)), "{kind:?}");
                }
            }
        }
    }
    let mut bench = Bench::new(0);
    bench.driver.jump_avail_idx(0);
    assert!(matches!(bench.turn(), Err(QueueError::Available { .. })));
}
