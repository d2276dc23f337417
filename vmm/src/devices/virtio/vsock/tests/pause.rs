//! Pausing: nothing happens, nothing is lost, and what is saved is where it stopped.

use std::io::{Read, Write};

use super::guest::{Guest, LISTEN, RX, TX, pattern};
use super::streams::fill;
use crate::devices::virtio::vsock::connection::BUF_ALLOC;
use crate::devices::virtio::vsock::packet::op;
use crate::devices::virtio::{DeviceState, QueuePosition, VirtioDevice};

#[test]
fn bytes_on_their_way_wait_on_both_sides() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    let (to_guest, to_host) = (pattern(3000, 1), pattern(5000, 2));
    guest.device.pause();
    stream.write_all(&to_guest).unwrap();
    let head = guest.queue_data(&mut sock, &to_host);
    assert!(guest.try_recv().is_none() && guest.driver.pop_used(TX).is_none());
    guest.device.resume();
    assert_eq!(guest.driver.wait_used(TX).0, head);
    assert_eq!(guest.read(&mut sock, to_guest.len()), to_guest);
    let mut got = vec![0; to_host.len()];
    stream.read_exact(&mut got).unwrap();
    assert!(got == to_host);
}

#[test]
fn backlog_and_ends_survive_a_pause() {
    let mut guest = Guest::new();
    let (mut sock, mut stream) = guest.accept(1024);
    // More than the Unix socket takes: the rest waits in the device.
    let bytes = fill(&mut guest, &mut sock);
    guest.device.pause();
    guest.device.resume();
    let mut got = vec![0; bytes.len()];
    stream.read_exact(&mut got).unwrap();
    assert!(got == bytes);
    while sock.credit() < BUF_ALLOC as usize / 2 {
        guest.expect(&mut sock, op::CREDIT_UPDATE);
    }
    guest.device.pause();
    drop(stream);
    guest.device.resume();
    guest.expect(&mut sock, op::SHUTDOWN);
}

#[test]
fn connects_asked_for_meanwhile_are_made_afterwards() {
    let mut guest = Guest::new();
    guest.device.pause();
    let (near, far) = std::os::unix::net::UnixStream::pair().unwrap();
    let answer = guest.host_connect(9, far.into());
    assert!(answer.try_recv().is_err() && guest.try_recv().is_none());
    guest.device.resume();
    assert_eq!(guest.recv().0.op, op::REQUEST);
    drop(near);
}

#[test]
fn reset_of_a_paused_device_closes_everything() {
    let mut guest = Guest::new();
    let (_, mut stream) = guest.accept(1024);
    guest.device.pause();
    guest.device.reset();
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
    guest.device.resume();
    guest.activate();
    guest.offer_all();
    guest.accept(1024);
}

#[test]
fn state_names_open_ports_and_positions() {
    let mut guest = Guest::new();
    let (mut sock, _stream) = guest.connect(7, LISTEN[1]);
    guest.write(&mut sock, b"x");
    let (other, _other_stream) = guest.accept(1024);
    guest.device.pause();
    let saved = guest.device.save().unwrap();
    let DeviceState::Vsock(state) = saved.state.clone() else { panic!("{saved:?}") };
    assert_eq!(state.listen, [LISTEN[0], LISTEN[2]].into());
    // The next connection comes from another port than the last: the guest may not have forgotten that one.
    assert_eq!(state.next_host_port, other.host_port + 1);
    let at = |next| Some(QueuePosition { next_avail: next, next_used: next });
    // To the guest: RESPONSE and REQUEST. From it: REQUEST, RW and RESPONSE.
    assert_eq!(saved.queues, [at(2), at(3), at(0)]);
    let text = serde_json::to_string(&saved).unwrap();
    assert_eq!(serde_json::from_str::<crate::devices::virtio::SavedDevice>(&text).unwrap(), saved);
    assert_eq!(guest.driver.pop_used(RX), None);
    guest.device.resume();
    let counted = |name| guest.device.counters().into_iter().find(|(n, _)| *n == name).unwrap().1;
    assert_eq!((counted("connections_from_guest"), counted("connections_to_guest")), (1, 1));
    assert_eq!((counted("bytes_from_guest"), counted("bytes_to_guest")), (1, 0));
    assert_eq!((counted("packets_from_guest"), counted("packets_to_guest")), (3, 2));
}
