//! The device driven as a guest would, with either engine.

use std::fs::File;
use std::io::Write;
use std::os::fd::AsFd;

use rustix::fs::{OFlags, fcntl_getfl};
use tempfile::NamedTempFile;
use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK, VIRTIO_BLK_S_UNSUPP, VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH,
    VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::engine::Choice::{self, Best, Plain};
use super::*;
use crate::devices::virtio::QueuePosition;
use crate::devices::virtio::testing::{Hostile, MockDriver, NOWHERE, Segment, config_of};

const FLUSH: u64 = 1 << VIRTIO_BLK_F_FLUSH;
/// A number no status has.
const NO_STATUS: u8 = 0xee;

/// Tests that are the same for both engines, each run with each.
macro_rules! with_either_engine {
    ($($name:ident,)*) => {
        mod with_a_ring_if_there_is_one {
            $(#[test] fn $name() { super::$name(super::Best); })*
        }
        mod with_blocking_calls {
            $(#[test] fn $name() { super::$name(super::Plain); })*
        }
    };
}

mod life;
mod space;

struct Guest {
    image: NamedTempFile,
    blk: Blk,
    driver: MockDriver,
}

/// What came of a request: its status, the data and how much of the writable part was reported as filled.
#[derive(Debug, PartialEq)]
struct Answer {
    status: u32,
    data: Vec<u8>,
    written: u32,
}

impl Guest {
    /// A disk of `sectors` sectors, each filled with its number.
    fn new(engine: Choice, sectors: u8, read_only: bool) -> Self {
        let mut image = NamedTempFile::new().unwrap();
        for sector in 0..sectors {
            image.write_all(&[sector; 512]).unwrap();
        }
        Self::with(engine, image, BlkOptions { read_only, ..OPTIONS })
    }

    fn with(engine: Choice, image: NamedTempFile, options: BlkOptions<'_>) -> Self {
        let mut blk = open(engine, &image, options);
        let mut driver = MockDriver::new(blk.queue_sizes());
        blk.activate(driver.activation(FLUSH)).unwrap();
        Self { image, blk, driver }
    }

    /// A request in the usual shape: header, one buffer, status.
    fn call(&mut self, kind: u32, sector: u64, out: &[u8], room: usize) -> Answer {
        let header = self.driver.readable(&header(kind, sector));
        let data = if out.is_empty() { self.driver.writable(room) } else { self.driver.readable(out) };
        let status = self.status_byte();
        let segments = if data.len == 0 { vec![header, status] } else { vec![header, data, status] };
        let written = self.send(&segments);
        let status = u32::from(self.driver.read(status.addr, 1)[0]);
        Answer { status, data: self.driver.read(data.addr, room), written }
    }

    fn status_byte(&mut self) -> Segment {
        let status = self.driver.writable(1);
        self.driver.write(status.addr, &[NO_STATUS]);
        status
    }

    /// Offers a chain and waits for it.
    fn send(&mut self, segments: &[Segment]) -> u32 {
        let head = self.driver.add(0, segments);
        self.driver.kick_if_wanted(0);
        let (used, written) = self.driver.wait_used(0);
        assert_eq!(used, head);
        written
    }

    fn content(&self) -> Vec<u8> {
        std::fs::read(self.image.path()).unwrap()
    }

    fn assert_alive(&mut self) {
        assert_eq!(self.call(VIRTIO_BLK_T_IN, 1, &[], 512).data, [1; 512]);
    }
}

with_either_engine! {
    config_space_holds_what_the_features_say,
    bytes_after_the_last_whole_sector_are_out_of_reach,
    reads_sectors,
    writes_sectors,
    parts_may_be_spread_over_descriptors_in_any_way,
    indirect_chains_as_long_as_the_queue_work,
    what_is_not_on_the_disk_is_an_error,
    a_disk_that_has_shrunk_is_an_error,
    serial_number_is_padded_and_cut_to_the_room_there_is,
    unknown_requests_are_unsupported,
    a_read_only_disk_never_writes,
    hostile_chains_get_an_answer_or_end_the_device,
    malformed_requests_have_a_status_if_there_is_room_for_one,
    corrupt_available_ring_ends_the_device_until_reset,
    event_index_loses_no_request,
    a_request_moves_no_more_than_an_honest_driver_asks_for,
}

const OPTIONS: BlkOptions<'_> = BlkOptions { read_only: false, serial: "serial", queues: 1, limit: NO_LIMIT };
const NO_LIMIT: RateLimit =
    RateLimit { bytes_per_second: 0, bytes_burst: 0, ops_per_second: 0, ops_burst: 0 };

fn open(engine: Choice, image: &NamedTempFile, options: BlkOptions<'_>) -> Blk {
    let image = Image::open(image.reopen().unwrap().into(), options.read_only).unwrap();
    Blk::new(image, options, engine).unwrap()
}

/// `struct virtio_blk_discard_write_zeroes` (virtio 1.3 s5.2.6).
fn range(sector: u64, sectors: u32, flags: u32) -> Vec<u8> {
    [&sector.to_le_bytes()[..], &sectors.to_le_bytes(), &flags.to_le_bytes()].concat()
}

fn header(kind: u32, sector: u64) -> Vec<u8> {
    [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat()
}

fn config_space_holds_what_the_features_say(engine: Choice) {
    let mut guest =
        Guest::with(engine, Guest::new(engine, 7, false).image, BlkOptions { queues: 3, ..OPTIONS });
    let config: [u8; 64] = config_of(&mut guest.blk);
    let number = |at: usize| u32::from_le_bytes(config[at..at + 4].try_into().unwrap());
    assert_eq!(config[..8], 7u64.to_le_bytes());
    assert_eq!((number(8), number(12), number(20)), (128 << 10, 254, 512));
    assert_eq!(config[34..36], 3u16.to_le_bytes());
    assert_eq!((number(36), number(40)), (MAX_DISCARD_SECTORS, 1));
    assert_eq!((number(48), number(52), number(56)), (MAX_ZERO_SECTORS, 1, 1));
    assert_eq!(number(60), 0);
    let mut one = Guest::new(engine, 7, true);
    let config: [u8; 64] = config_of(&mut one.blk);
    assert_eq!(config[34..60], [&[1, 0][..], &[0; 24]].concat());
    let differ = [VIRTIO_BLK_F_MQ, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_F_RO];
    let bits = differ.iter().map(|bit| 1u64 << bit).sum::<u64>();
    assert_eq!(guest.blk.features() ^ one.blk.features(), bits);
}

fn bytes_after_the_last_whole_sector_are_out_of_reach(engine: Choice) {
    let mut guest = Guest::new(engine, 2, false);
    guest.image.write_all(&[9; 511]).unwrap();
    guest.blk = open(engine, &guest.image, OPTIONS);
    guest.blk.activate(guest.driver.activation(FLUSH)).unwrap();
    assert_eq!(guest.call(VIRTIO_BLK_T_IN, 2, &[], 512).status, VIRTIO_BLK_S_IOERR);
    guest.assert_alive();
}

fn reads_sectors(engine: Choice) {
    let mut guest = Guest::new(engine, 8, false);
    let answer = guest.call(VIRTIO_BLK_T_IN, 3, &[], 1024);
    assert_eq!(answer.status, VIRTIO_BLK_S_OK);
    assert_eq!(answer.data, [[3; 512], [4; 512]].concat());
    assert_eq!(answer.written, 1025);
}

fn writes_sectors(engine: Choice) {
    let mut guest = Guest::new(engine, 8, false);
    let answer = guest.call(VIRTIO_BLK_T_OUT, 6, &[0xaa; 1024], 0);
    assert_eq!((answer.status, answer.written), (VIRTIO_BLK_S_OK, 1));
    let content = guest.content();
    assert_eq!(content[5 * 512..6 * 512], [5; 512]);
    assert_eq!(content[6 * 512..], [0xaa; 1024]);
    assert_eq!(guest.call(VIRTIO_BLK_T_FLUSH, 0, &[], 0).status, VIRTIO_BLK_S_OK);
}

fn parts_may_be_spread_over_descriptors_in_any_way(engine: Choice) {
    let mut guest = Guest::new(engine, 8, false);
    // Header in three pieces, the last with the first data; data in odd pieces.
    let out: Vec<u8> = (0..1024).map(|i| i as u8).collect();
    let bytes = [header(VIRTIO_BLK_T_OUT, 2), out.clone()].concat();
    let mut segments = Vec::new();
    let mut rest = &bytes[..];
    for length in [1, 7, 11, 700, 1, 320] {
        let (piece, left) = rest.split_at(length);
        segments.push(guest.driver.readable(piece));
        rest = left;
    }
    assert!(rest.is_empty());
    let status = guest.status_byte();
    segments.push(status);
    assert_eq!(guest.send(&segments), 1);
    assert_eq!(guest.driver.read(status.addr, 1), [0]);
    assert_eq!(guest.content()[1024..2048], out);

    // The status in one piece with the last data.
    let header = guest.driver.readable(&header(VIRTIO_BLK_T_IN, 2));
    let (one, two) = (guest.driver.writable(100), guest.driver.writable(925));
    assert_eq!(guest.send(&[header, one, two]), 1025);
    let data = [guest.driver.read(one.addr, 100), guest.driver.read(two.addr, 925)].concat();
    assert_eq!(data[..1024], out);
    assert_eq!(data[1024], 0);
}

fn indirect_chains_as_long_as_the_queue_work(engine: Choice) {
    let mut guest = Guest::new(engine, 255, false);
    let mut segments = vec![guest.driver.readable(&header(VIRTIO_BLK_T_IN, 1))];
    let buffers: Vec<_> = (0..SEG_MAX).map(|_| guest.driver.writable(512)).collect();
    segments.extend(&buffers);
    segments.push(guest.status_byte());
    guest.driver.add_indirect(0, &segments);
    guest.driver.kick(0);
    assert_eq!(guest.driver.wait_used(0).1, SEG_MAX * 512 + 1);
    for (i, buffer) in buffers.iter().enumerate() {
        assert_eq!(guest.driver.read(buffer.addr, 512), [i as u8 + 1; 512]);
    }
}

fn what_is_not_on_the_disk_is_an_error(engine: Choice) {
    let mut guest = Guest::new(engine, 8, false);
    let before = guest.content();
    for (sector, length) in
        [(8, 512), (7, 1024), (u64::MAX, 512), (u64::MAX / 512, 1024), (1 << 55, 512), (0, 511), (0, 1)]
    {
        let read = guest.call(VIRTIO_BLK_T_IN, sector, &[], length);
        assert_eq!((read.status, read.written), (VIRTIO_BLK_S_IOERR, 1), "{sector} {length}");
        assert_eq!(read.data, vec![0; length]);
        let write = guest.call(VIRTIO_BLK_T_OUT, sector, &vec![1; length], 0);
        assert_eq!((write.status, write.written), (VIRTIO_BLK_S_IOERR, 1), "{sector} {length}");
    }
    assert_eq!(guest.content(), before);
    guest.assert_alive();
}

fn a_disk_that_has_shrunk_is_an_error(engine: Choice) {
    let mut guest = Guest::new(engine, 8, false);
    guest.image.as_file().set_len(1024 + 100).unwrap();
    assert_eq!(guest.call(VIRTIO_BLK_T_IN, 2, &[], 512).status, VIRTIO_BLK_S_IOERR);
    guest.assert_alive();
}

fn serial_number_is_padded_and_cut_to_the_room_there_is(engine: Choice) {
    let mut guest = Guest::new(engine, 1, false);
    let answer = guest.call(VIRTIO_BLK_T_GET_ID, 0, &[], 20);
    assert_eq!((answer.status, answer.written), (VIRTIO_BLK_S_OK, 21));
    assert_eq!(answer.data, b"serial\0\0\0\0\0\0\0\0\0\0\0\0\0\0");
    assert_eq!(guest.call(VIRTIO_BLK_T_GET_ID, 0, &[], 3).data, b"ser");
    let long = guest.call(VIRTIO_BLK_T_GET_ID, 0, &[], 40);
    assert_eq!((long.written, &long.data[20..]), (21, &[0; 20][..]));
}

fn unknown_requests_are_unsupported(engine: Choice) {
    let mut guest = Guest::new(engine, 2, false);
    for kind in [2, 5, 14, 0x8000_0000, u32::MAX] {
        assert_eq!(guest.call(kind, 0, &[0; 16], 0).status, VIRTIO_BLK_S_UNSUPP);
    }
    guest.assert_alive();
}

fn a_read_only_disk_never_writes(engine: Choice) {
    let mut guest = Guest::new(engine, 4, true);
    assert_ne!(guest.blk.features() & 1 << VIRTIO_BLK_F_RO, 0);
    let before = guest.content();
    // Though the descriptor would allow it, and whatever the driver negotiated.
    let mode = fcntl_getfl(guest.image.as_file().as_fd()).unwrap() & OFlags::ACCMODE;
    assert_eq!(mode, OFlags::RDWR);
    for _ in 0..2 {
        let answer = guest.call(VIRTIO_BLK_T_OUT, 1, &[0xaa; 512], 0);
        assert_eq!((answer.status, answer.written), (VIRTIO_BLK_S_IOERR, 1));
        for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
            assert_eq!(guest.call(kind, 0, &range(0, 1, 0), 0).status, VIRTIO_BLK_S_IOERR);
        }
        assert_eq!(guest.call(VIRTIO_BLK_T_FLUSH, 0, &[], 0).status, VIRTIO_BLK_S_OK);
        assert_eq!(guest.content(), before);
        guest.blk.reset();
        guest.blk.activate(guest.driver.activation(0)).unwrap();
    }
    guest.assert_alive();
}

fn hostile_chains_get_an_answer_or_end_the_device(engine: Choice) {
    for kind in Hostile::ALL {
        for writable in [true, false] {
            let mut guest = Guest::new(engine, 4, false);
            let before = guest.content();
            let head = guest.driver.add_hostile(0, kind, writable);
            guest.driver.kick(0);
            if matches!(kind, Hostile::HeadBeyondTable) {
                guest.driver.interrupt.wait_reset();
            } else {
                let (used, written) = guest.driver.wait_used(0);
                assert_eq!(used, head);
                assert!(written <= 1, "{kind:?}: {written}");
                guest.assert_alive();
            }
            assert_eq!(guest.content(), before, "{kind:?}");
        }
    }
}

fn malformed_requests_have_a_status_if_there_is_room_for_one(engine: Choice) {
    let mut guest = Guest::new(engine, 4, false);
    let good = guest.driver.readable(&header(VIRTIO_BLK_T_IN, 0));
    let short = guest.driver.readable(&[0; 15]);
    let out = guest.driver.readable(&[0; 512]);
    let room = guest.driver.writable(512);
    let status = guest.status_byte();
    let nowhere = Segment { addr: NOWHERE, len: 512, writable: true };
    let many: Vec<_> = std::iter::once(good).chain(std::iter::repeat_n(room, 300)).chain([status]).collect();
    let shapes: [&[Segment]; 6] = [
        &[short, status],
        &[status],
        &[room, good, status],
        &[good, room, out, status],
        &[good, nowhere, status],
        &[nowhere, good, status],
    ];
    for (i, shape) in shapes.into_iter().enumerate() {
        guest.driver.write(status.addr, &[NO_STATUS]);
        assert_eq!(guest.send(shape), 1, "{i}");
        assert_eq!(guest.driver.read(status.addr, 1), [VIRTIO_BLK_S_IOERR as u8], "{i}");
    }
    // Longer than the queue.
    guest.driver.write(status.addr, &[NO_STATUS]);
    guest.driver.add_indirect(0, &many);
    guest.driver.kick(0);
    assert_eq!(guest.driver.wait_used(0).1, 1);
    assert_eq!(guest.driver.read(status.addr, 1), [VIRTIO_BLK_S_IOERR as u8]);
    // No place for a status: nothing happens.
    let write = guest.driver.readable(&[header(VIRTIO_BLK_T_OUT, 0), vec![0xaa; 512]].concat());
    assert_eq!(guest.send(&[write]), 0);
    assert_eq!(guest.content()[..512], [0; 512]);
    guest.assert_alive();
}

fn corrupt_available_ring_ends_the_device_until_reset(engine: Choice) {
    let mut guest = Guest::new(engine, 4, false);
    guest.driver.jump_avail_idx(0);
    guest.driver.kick(0);
    guest.driver.interrupt.wait_reset();
    assert_eq!(guest.driver.interrupt.resets(), ["available ring of queue 0 is corrupt"]);
    guest.blk.reset();
    guest.blk.activate(guest.driver.activation(FLUSH)).unwrap();
    guest.assert_alive();
}

fn event_index_loses_no_request(engine: Choice) {
    let mut guest = Guest::new(engine, 4, false);
    guest.blk.reset();
    let features = guest.blk.features();
    guest.blk.activate(guest.driver.activation(features)).unwrap();
    for _ in 0..2000 {
        let mark = guest.driver.mark();
        guest.assert_alive();
        guest.driver.release(mark);
    }
}

fn a_request_moves_no_more_than_an_honest_driver_asks_for(engine: Choice) {
    let image = NamedTempFile::new().unwrap();
    image.as_file().set_len(1 << 30).unwrap();
    let mut guest = Guest::with(engine, image, OPTIONS);
    let most = SIZE_MAX as usize;
    let (header, buffer) =
        (guest.driver.readable(&header(VIRTIO_BLK_T_IN, 0)), guest.driver.writable(2 * most));
    for (len, status) in [(most, VIRTIO_BLK_S_OK), (2 * most, VIRTIO_BLK_S_IOERR)] {
        let answer = guest.status_byte();
        let data = Segment { len: len as u32, ..buffer };
        let mut segments = vec![header];
        segments.extend(std::iter::repeat_n(data, SEG_MAX as usize));
        segments.push(answer);
        guest.driver.add_indirect(0, &segments);
        guest.driver.kick(0);
        guest.driver.wait_used(0);
        assert_eq!(u32::from(guest.driver.read(answer.addr, 1)[0]), status, "{len}");
    }
}

#[test]
fn what_cannot_be_a_disk_is_refused() {
    let image = NamedTempFile::new().unwrap();
    let open =
        |fd: File, read_only, serial| Blk::open(fd.into(), BlkOptions { read_only, serial, ..OPTIONS });
    let refusal = |fd, read_only, serial| open(fd, read_only, serial).err().unwrap().to_string();
    let read = || File::open(image.path()).unwrap();
    let both = || image.reopen().unwrap();
    let write = || File::options().write(true).open(image.path()).unwrap();
    let neither = "disk image is neither a regular file nor a block device";
    assert_eq!(refusal(File::open("/dev/null").unwrap(), true, ""), neither);
    assert_eq!(refusal(File::open("/").unwrap(), true, ""), neither);
    assert_eq!(refusal(read(), false, ""), "disk image is not open for writing");
    assert_eq!(refusal(write(), true, ""), "disk image is not open for reading");
    let serial = "serial number \"one and twenty bytes!\" of the disk is longer than 20 bytes";
    assert_eq!(refusal(both(), false, "one and twenty bytes!"), serial);
    assert!(open(read(), true, "exactly twenty bytes").is_ok());
    let nonblocking = both();
    rustix::fs::fcntl_setfl(&nonblocking, OFlags::NONBLOCK).unwrap();
    assert_eq!(refusal(nonblocking, true, ""), "disk image is open with O_NONBLOCK");
    let direct = both();
    // Not every file system has it.
    if rustix::fs::fcntl_setfl(&direct, OFlags::DIRECT).is_ok() {
        assert_eq!(refusal(direct, true, ""), "disk image is open with O_DIRECT");
    }
}

/// Where the kernel has rings, they are used: or the tests above would test one engine twice.
#[test]
fn ring_is_used_if_there_is_one() {
    let event = rustix::event::eventfd(0, rustix::event::EventfdFlags::empty()).unwrap();
    let engine = engine::Engine::new(Best, &[], event.as_fd());
    assert_eq!(matches!(engine, engine::Engine::Ring(_)), io_uring::IoUring::new(1).is_ok());
    assert!(matches!(engine::Engine::new(Plain, &[], event.as_fd()), engine::Engine::Plain(_)));
}
