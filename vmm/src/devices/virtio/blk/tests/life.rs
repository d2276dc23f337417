//! Queues, limits, pauses and resets while there is work.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use super::*;

/// Sectors of the disks here; sector `i` is full of `i`.
const SECTORS: u8 = 128;

with_either_engine! {
    every_queue_is_served,
    queues_may_be_left_out,
    nothing_happens_after_a_reset,
    nothing_that_was_in_flight_happens_after_a_reset,
    a_pause_loses_nothing,
    a_broken_device_can_be_paused,
    limit_is_kept_and_can_be_changed,
    limit_of_operations_takes_its_time,
    throttled_device_can_be_paused_and_reset,
    everything_is_counted,
}

/// A read that has been offered.
struct Offered {
    queue: usize,
    head: u16,
    sector: u8,
    room: Segment,
}

impl Guest {
    fn busy(engine: Choice, queues: u8, limit: RateLimit) -> Self {
        let image = Guest::new(engine, SECTORS, false).image;
        Self::with(engine, image, BlkOptions { queues, limit, ..OPTIONS })
    }

    /// Offers a read of one sector, without a kick.
    fn offer_read(&mut self, queue: usize, sector: u8) -> Offered {
        let header = self.driver.readable(&header(VIRTIO_BLK_T_IN, sector.into()));
        let (room, status) = (self.driver.writable(512), self.status_byte());
        self.driver.write(room.addr, &[0xee; 512]);
        let head = self.driver.add(queue, &[header, room, status]);
        Offered { queue, head, sector, room }
    }

    /// Offers to zero one sector or, for sector 0, which is zeroes, to flush. A ring has threads of the kernel do either, and never does it at once.
    fn offer_slow(&mut self, queue: usize, sector: u8) -> Offered {
        let kind = if sector == 0 { VIRTIO_BLK_T_FLUSH } else { VIRTIO_BLK_T_WRITE_ZEROES };
        let mut segments = vec![self.driver.readable(&header(kind, 0))];
        if sector != 0 {
            segments.push(self.driver.readable(&range(sector.into(), 1, 0)));
        }
        let room = self.status_byte();
        segments.push(room);
        let head = self.driver.add(queue, &segments);
        Offered { queue, head, sector, room }
    }

    /// Takes what is done from the used rings.
    fn collect(&mut self, done: &mut HashSet<(usize, u16)>) {
        for queue in 0..2 {
            while let Some((head, _)) = self.driver.pop_used(queue) {
                done.insert((queue, head));
            }
        }
    }

    fn assert_read(&self, read: &Offered) {
        assert_eq!(self.driver.read(read.room.addr, 512), [read.sector; 512]);
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.blk.counters().into_iter().filter(|counter| counter.1 != 0).collect()
    }
}

fn every_queue_is_served(engine: Choice) {
    let mut guest = Guest::busy(engine, 4, NO_LIMIT);
    let mut reads = Vec::new();
    for sector in 0..SECTORS {
        reads.push(guest.offer_read(usize::from(sector % 4), sector));
    }
    for queue in 0..4 {
        guest.driver.kick(queue);
    }
    for queue in 0..4 {
        for _ in 0..SECTORS / 4 {
            assert_eq!(guest.driver.wait_used(queue).1, 513);
        }
    }
    for read in &reads {
        guest.assert_read(read);
    }
    // Each queue wakes a sleeping device.
    for queue in [2, 0, 3, 1, 1] {
        let read = guest.offer_read(queue, 9);
        guest.driver.kick_if_wanted(queue);
        assert_eq!(guest.driver.wait_used(queue), (read.head, 513));
        guest.assert_read(&read);
    }
}

fn queues_may_be_left_out(engine: Choice) {
    let mut guest = Guest::busy(engine, 3, NO_LIMIT);
    guest.blk.reset();
    let mut activation = guest.driver.activation(FLUSH);
    activation.queues[0] = None;
    activation.queues[2] = None;
    guest.blk.activate(activation).unwrap();
    let read = guest.offer_read(1, 5);
    guest.driver.kick(1);
    assert_eq!(guest.driver.wait_used(1), (read.head, 513));
    guest.assert_read(&read);
    guest.blk.pause();
    let position = QueuePosition { next_avail: 1, next_used: 1 };
    assert_eq!(guest.blk.save().unwrap().queues, [None, Some(position), None]);
    guest.blk.reset();
    let mut none = guest.driver.activation(FLUSH);
    none.queues.fill_with(|| None);
    assert!(matches!(guest.blk.activate(none), Err(ActivateError::MissingQueue(0))));
}

fn nothing_happens_after_a_reset(engine: Choice) {
    for _ in 0..20 {
        let mut guest = Guest::busy(engine, 2, NO_LIMIT);
        let reads: Vec<_> =
            (0..SECTORS).map(|sector| guest.offer_read(usize::from(sector % 2), sector)).collect();
        guest.driver.kick(0);
        guest.driver.kick(1);
        guest.blk.reset();
        // What was done was done before the reset returned; the rest never will be.
        let mut done = HashSet::new();
        guest.collect(&mut done);
        for read in &reads {
            if done.contains(&(read.queue, read.head)) {
                guest.assert_read(read);
            } else {
                assert_eq!(guest.driver.read(read.room.addr, 512), [0xee; 512]);
            }
        }
        guest.driver.kick(0);
        guest.blk.activate(guest.driver.activation(FLUSH)).unwrap();
        guest.assert_alive();
    }
}

fn nothing_that_was_in_flight_happens_after_a_reset(engine: Choice) {
    let mut in_flight = 0;
    for _ in 0..20 {
        let mut guest = Guest::busy(engine, 2, NO_LIMIT);
        // Sector 1 is for the sign of life.
        let sectors = (2..SECTORS).map(|sector| if sector % 8 == 0 { 0 } else { sector });
        let offered: Vec<_> =
            sectors.map(|sector| guest.offer_slow(usize::from(sector % 2), sector)).collect();
        guest.driver.kick(0);
        guest.driver.kick(1);
        let mut done = HashSet::from([(0, guest.driver.wait_used(0).0)]);
        guest.collect(&mut done);
        let before = done.len();
        guest.blk.reset();
        guest.collect(&mut done);
        in_flight += done.len() - before;
        let content = guest.content();
        for Offered { queue, head, sector, room } in &offered {
            let is_done = done.contains(&(*queue, *head));
            let (byte, status) = if is_done { (0, 0) } else { (*sector, NO_STATUS) };
            assert_eq!(content[usize::from(*sector) * 512..][..512], [byte; 512]);
            assert_eq!(guest.driver.read(room.addr, 1), [status]);
        }
        guest.blk.activate(guest.driver.activation(FLUSH)).unwrap();
        guest.assert_alive();
        assert_eq!(guest.content(), content);
    }
    assert!(in_flight > 0, "the resets had nothing to wait for");
}

fn a_pause_loses_nothing(engine: Choice) {
    let mut guest = Guest::busy(engine, 2, NO_LIMIT);
    assert_eq!(guest.blk.save().unwrap().queues, []);
    let mut used = [0u16; 2];
    let mark = guest.driver.mark();
    for round in 0..50u16 {
        let reads: Vec<_> =
            (0..64).map(|i| guest.offer_read(i % 2, (round as u8 + i as u8) % SECTORS)).collect();
        guest.driver.kick(0);
        guest.driver.kick(1);
        guest.blk.pause();
        guest.blk.pause();
        // What is taken is answered, and the rest is in the rings.
        let positions = guest.blk.save().unwrap().queues;
        for (queue, position) in positions.into_iter().enumerate() {
            let QueuePosition { next_avail, next_used } = position.unwrap();
            assert_eq!(next_avail, next_used);
            while guest.driver.pop_used(queue).is_some() {
                used[queue] += 1;
            }
            assert_eq!(next_used, used[queue]);
        }
        guest.blk.resume();
        guest.blk.resume();
        for (queue, used) in used.iter_mut().enumerate() {
            while *used < (round + 1) * 32 {
                guest.driver.wait_used(queue);
                *used += 1;
            }
        }
        for read in &reads {
            guest.assert_read(read);
        }
        guest.driver.release(mark);
    }
    // Neither does a reset during a pause do harm, nor a resume after it.
    guest.blk.pause();
    guest.blk.reset();
    guest.blk.resume();
    guest.blk.activate(guest.driver.activation(FLUSH)).unwrap();
    guest.assert_alive();
}

fn a_broken_device_can_be_paused(engine: Choice) {
    let mut guest = Guest::busy(engine, 1, NO_LIMIT);
    guest.driver.jump_avail_idx(0);
    guest.driver.kick(0);
    guest.driver.interrupt.wait_reset();
    guest.blk.pause();
    guest.blk.resume();
    guest.blk.pause();
    guest.blk.resume();
    guest.blk.reset();
    assert_eq!(guest.driver.interrupt.resets().len(), 1);
    guest.blk.activate(guest.driver.activation(FLUSH)).unwrap();
    guest.assert_alive();
}

/// At this rate, what comes after the burst takes longer than any test waits.
const SLOW: RateLimit = RateLimit { bytes_per_second: 1, bytes_burst: 1024, ..NO_LIMIT };

fn limit_is_kept_and_can_be_changed(engine: Choice) {
    let mut guest = Guest::busy(engine, 2, SLOW);
    let reads: Vec<_> = (0..4).map(|i| guest.offer_read(i % 2, i as u8)).collect();
    guest.driver.kick(0);
    guest.driver.kick(1);
    // The burst is two sectors, and every queue has its turn.
    for read in &reads[..2] {
        assert_eq!(guest.driver.wait_used(read.queue), (read.head, 513));
    }
    guest.driver.kick(0);
    assert!(guest.driver.pop_used(0).is_none() && guest.driver.pop_used(1).is_none());
    guest.blk.request(DeviceRequest::Limit(NO_LIMIT, None)).unwrap();
    for read in &reads[2..] {
        assert_eq!(guest.driver.wait_used(read.queue), (read.head, 513));
    }
    let wrong = DeviceRequest::Limit(NO_LIMIT, Some(NO_LIMIT));
    assert_eq!(guest.blk.request(wrong), Err(DeviceRequestError::NotForThis(wrong)));
    assert_eq!(
        guest.blk.request(DeviceRequest::HintFreePages),
        Err(DeviceRequestError::NotForThis(DeviceRequest::HintFreePages))
    );
}

fn limit_of_operations_takes_its_time(engine: Choice) {
    let limit = RateLimit { ops_per_second: 100, ops_burst: 1, ..NO_LIMIT };
    let begin = Instant::now();
    let mut guest = Guest::busy(engine, 1, limit);
    for _ in 0..11 {
        guest.assert_alive();
    }
    assert!(begin.elapsed() >= Duration::from_millis(100));
    assert!(guest.counters().iter().any(|&(name, count)| name == "throttled" && count >= 1));
}

fn throttled_device_can_be_paused_and_reset(engine: Choice) {
    let mut guest = Guest::busy(engine, 1, SLOW);
    let reads: Vec<_> = (0..3).map(|sector| guest.offer_read(0, sector)).collect();
    guest.driver.kick(0);
    for read in &reads[..2] {
        assert_eq!(guest.driver.wait_used(0), (read.head, 513));
    }
    guest.blk.pause();
    // The one that waits is in the ring.
    let position = QueuePosition { next_avail: 2, next_used: 2 };
    assert_eq!(guest.blk.save().unwrap().queues, [Some(position)]);
    guest.blk.request(DeviceRequest::Limit(NO_LIMIT, None)).unwrap();
    assert!(guest.driver.pop_used(0).is_none());
    guest.blk.resume();
    assert_eq!(guest.driver.wait_used(0), (reads[2].head, 513));
    // As after a rest.
    guest.blk.request(DeviceRequest::Limit(SLOW, None)).unwrap();
    for sector in 0..3 {
        guest.offer_read(0, sector);
    }
    guest.driver.kick(0);
    guest.driver.wait_used(0);
    guest.driver.wait_used(0);
    guest.blk.reset();
    assert!(guest.driver.pop_used(0).is_none());
}

fn everything_is_counted(engine: Choice) {
    let mut guest = Guest::busy(engine, 1, NO_LIMIT);
    guest.call(VIRTIO_BLK_T_IN, 0, &[], 1024);
    guest.call(VIRTIO_BLK_T_OUT, 0, &[1; 512], 0);
    guest.call(VIRTIO_BLK_T_OUT, 0, &[1; 1536], 0);
    guest.call(VIRTIO_BLK_T_FLUSH, 0, &[], 0);
    guest.call(VIRTIO_BLK_T_IN, SECTORS.into(), &[], 512);
    guest.call(VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    let expected = [
        ("reads", 1),
        ("writes", 2),
        ("bytes_read", 1024),
        ("bytes_written", 2048),
        ("flushes", 1),
        ("errors", 1),
    ];
    assert_eq!(guest.counters(), expected);
}

#[test]
fn state_survives_json() {
    let guest = Guest::busy(Plain, 2, SLOW);
    let saved = guest.blk.save().unwrap();
    let DeviceState::Blk(state) = &saved.state else { panic!("{saved:?}") };
    assert_eq!((state.sectors, state.read_only, &state.serial[..7]), (128, false, &b"serial\0"[..]));
    let json = serde_json::to_string(&saved).unwrap();
    assert_eq!(serde_json::from_str::<SavedDevice>(&json).unwrap(), saved);
}
