//! Receiving and sending are tested turn by turn, over a socket that stands in for a tap; the device as a whole with taps of the host's kernel.

mod control;
mod device;
mod host;
mod rx;
mod tx;

use std::os::unix::net::UnixDatagram;

use super::counters::Counters;
use super::header;
use crate::devices::virtio::VirtQueue;
use crate::devices::virtio::testing::MockDriver;

/// A queue of the size of the device's.
const SIZES: [u16; 1] = [super::QUEUE_SIZE];
const MTU: u16 = 1500;

/// A tap, as it were, and the host at its other side: a datagram is a frame with its header.
fn tap() -> (UnixDatagram, UnixDatagram) {
    let (tap, host) = UnixDatagram::pair().unwrap();
    tap.set_nonblocking(true).unwrap();
    host.set_nonblocking(true).unwrap();
    (tap, host)
}

fn queue(driver: &mut MockDriver, features: u64) -> VirtQueue {
    driver.activation(features).queues.remove(0).unwrap()
}

/// A frame of `length` bytes, no two of which are the same for different `seed`s.
fn frame(length: usize, seed: usize) -> Vec<u8> {
    (0..length).map(|i| (i * 7 + i / 251 + seed * 13) as u8).collect()
}

/// With the header before it that says nothing.
fn with_header(frame: &[u8]) -> Vec<u8> {
    [&[0; header::LENGTH], frame].concat()
}

fn counter(counters: &Counters, name: &str) -> u64 {
    counters.all().into_iter().find(|(it, _)| *it == name).unwrap().1
}
