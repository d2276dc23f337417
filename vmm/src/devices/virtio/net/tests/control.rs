//! The control queue.

use virtio_bindings::virtio_net::{
    VIRTIO_NET_CTRL_GUEST_OFFLOADS, VIRTIO_NET_CTRL_MQ, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MQ,
};

use super::device::Bench;
use crate::devices::virtio::VirtioDevice;
use crate::devices::virtio::testing::{Hostile, MockDriver};

const OK: u8 = 0;
const ERR: u8 = 1;
const MQ: u64 = 1 << VIRTIO_NET_F_CTRL_VQ | 1 << VIRTIO_NET_F_MQ;
const OFFLOADS: u64 = 1 << VIRTIO_NET_F_CTRL_VQ
    | 1 << VIRTIO_NET_F_CTRL_GUEST_OFFLOADS
    | 1 << VIRTIO_NET_F_GUEST_CSUM
    | 1 << VIRTIO_NET_F_GUEST_TSO4;

/// Gives a command; what became of it.
fn command(driver: &mut MockDriver, queue: usize, class: u32, data: &[u8]) -> u8 {
    let bytes = [&[class as u8, 0], data].concat();
    match driver.request(queue, &bytes, 1)[..] {
        [ack] => ack,
        ref other => panic!("{other:?}"),
    }
}

/// Uses so many pairs; what became of it.
pub(super) fn set_pairs(driver: &mut MockDriver, queue: usize, pairs: u16) -> u8 {
    command(driver, queue, VIRTIO_NET_CTRL_MQ, &pairs.to_le_bytes())
}

#[test]
fn driver_uses_as_many_pairs_as_there_are() {
    let mut bench = Bench::new(3, MQ);
    for (pairs, outcome) in [(1, OK), (3, OK), (2, OK), (0, ERR), (4, ERR), (0xffff, ERR)] {
        assert_eq!(set_pairs(&mut bench.driver, 6, pairs), outcome, "{pairs}");
    }
}

#[test]
fn without_mq_the_control_queue_is_the_third() {
    let mut bench = Bench::new(3, 1 << VIRTIO_NET_F_CTRL_VQ);
    assert_eq!(set_pairs(&mut bench.driver, 2, 1), ERR);
}

#[test]
fn driver_takes_fewer_offloads_but_not_others() {
    let mut bench = Bench::new(1, OFFLOADS);
    let (csum, tso4) = (1u64 << VIRTIO_NET_F_GUEST_CSUM, 1u64 << VIRTIO_NET_F_GUEST_TSO4);
    for (offloads, outcome) in
        [(0, OK), (csum, OK), (csum | tso4, OK), (tso4, OK), (tso4 << 1, ERR), (1, ERR)]
    {
        let class = VIRTIO_NET_CTRL_GUEST_OFFLOADS;
        let ack = command(&mut bench.driver, 2, class, &u64::to_le_bytes(offloads));
        assert_eq!(ack, outcome, "{offloads:#x}");
    }
}

#[test]
fn what_is_no_command_is_refused() {
    let mut bench = Bench::new(2, MQ | OFFLOADS);
    for bytes in
        [&[][..], &[4], &[4, 0], &[4, 0, 1], &[4, 0, 1, 0, 0], &[4, 1, 1, 0], &[0, 0, 1], &[0xff; 300]]
    {
        assert_eq!(bench.driver.request(4, bytes, 1), [ERR], "{bytes:?}");
    }
    // Cut anywhere.
    let parts = [[4], [0], [2], [0]].map(|byte| bench.driver.readable(&byte));
    let ack = bench.driver.writable(1);
    bench.driver.write(ack.addr, &[0xee]);
    bench.driver.add_indirect(4, &[&parts[..], &[ack]].concat());
    bench.driver.kick(4);
    assert_eq!(bench.driver.wait_used(4).1, 1);
    assert_eq!(bench.driver.read(ack.addr, 1), [OK]);
}

#[test]
fn hostile_commands_do_no_harm() {
    let mut bench = Bench::new(2, MQ);
    for kind in Hostile::ALL {
        for writable in [false, true] {
            let head = bench.driver.add_hostile(4, kind, writable);
            bench.driver.kick(4);
            if let Hostile::HeadBeyondTable = kind {
                bench.driver.interrupt.wait_reset();
                bench.net.reset();
                let activation = bench.driver.activation(MQ);
                bench.net.activate(activation).unwrap();
                continue;
            }
            assert_eq!(bench.driver.wait_used(4).0, head, "{kind:?}");
        }
    }
    assert_eq!(set_pairs(&mut bench.driver, 4, 2), OK);
    bench.driver.jump_avail_idx(4);
    bench.driver.kick(4);
    bench.driver.interrupt.wait_reset();
}
