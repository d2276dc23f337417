//! Discards and zeroes.

use std::os::unix::fs::MetadataExt;

use super::*;

const UNMAP: u32 = virtio_bindings::virtio_blk::VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP;
const MIB: usize = 1 << 20;

with_either_engine! {
    discards_give_space_back,
    zeroes_are_zeroes_with_or_without_the_space,
    ranges_that_cannot_be_are_errors,
}

/// A disk of 4 MiB, all of it in use on the host.
fn full_disk(engine: Choice) -> Guest {
    let mut image = NamedTempFile::new().unwrap();
    image.write_all(&vec![0xaa; 4 * MIB]).unwrap();
    image.as_file().sync_all().unwrap();
    Guest::with(engine, image, OPTIONS)
}

impl Guest {
    /// Bytes the image takes on the host.
    fn space(&self) -> u64 {
        self.image.as_file().metadata().unwrap().blocks() * 512
    }

    fn count(&self, name: &str) -> u64 {
        self.blk.counters().into_iter().find(|counter| counter.0 == name).unwrap().1
    }
}

fn discards_give_space_back(engine: Choice) {
    let mut guest = full_disk(engine);
    let before = guest.space();
    let answer = guest.call(VIRTIO_BLK_T_DISCARD, 0, &range(2048, 4096, 0), 0);
    assert_eq!((answer.status, answer.written), (VIRTIO_BLK_S_OK, 1));
    assert!(before - guest.space() >= 2 * MIB as u64 - 16384);
    let content = guest.content();
    assert_eq!(content.len(), 4 * MIB);
    assert!(content[..MIB].iter().chain(&content[3 * MIB..]).all(|&byte| byte == 0xaa));
    assert_eq!(guest.count("discards"), 1);
}

fn zeroes_are_zeroes_with_or_without_the_space(engine: Choice) {
    let mut guest = full_disk(engine);
    let before = guest.space();
    assert_eq!(guest.call(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(1, 2048, UNMAP), 0).status, VIRTIO_BLK_S_OK);
    assert!(before - guest.space() >= MIB as u64 - 16384);
    let holey = guest.space();
    assert_eq!(guest.call(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(4097, 2048, 0), 0).status, VIRTIO_BLK_S_OK);
    // tmpfs cannot keep the space; others may need a block or two for their own records.
    assert!(guest.blk.disk.image.is_in_memory() || holey.abs_diff(guest.space()) <= 16384);
    for (sector, byte) in (0..).zip(guest.content().chunks(512)) {
        let zero = (1..2049).contains(&sector) || (4097..6145).contains(&sector);
        assert_eq!(byte, [if zero { 0 } else { 0xaa }; 512], "sector {sector}");
    }
    assert_eq!(guest.count("zeroes"), 2);
    // And for a driver that does not flush.
    guest.blk.reset();
    guest.blk.activate(guest.driver.activation(0)).unwrap();
    assert_eq!(guest.call(VIRTIO_BLK_T_WRITE_ZEROES, 0, &range(0, 1, 0), 0).status, VIRTIO_BLK_S_OK);
    assert_eq!(guest.content()[..512], [0; 512]);
    assert_eq!((guest.count("zeroes"), guest.count("flushes")), (3, 0));
}

fn ranges_that_cannot_be_are_errors(engine: Choice) {
    let mut guest = full_disk(engine);
    let before = guest.content();
    let sectors = (4 * MIB / 512) as u64;
    for kind in [VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_WRITE_ZEROES] {
        let most = if kind == VIRTIO_BLK_T_DISCARD { MAX_DISCARD_SECTORS } else { MAX_ZERO_SECTORS };
        let two = [range(0, 1, 0), range(1, 1, 0)].concat();
        let bad = [
            (range(sectors, 1, 0), VIRTIO_BLK_S_IOERR),
            (range(sectors - 1, 2, 0), VIRTIO_BLK_S_IOERR),
            (range(u64::MAX, 1, 0), VIRTIO_BLK_S_IOERR),
            (range(u64::MAX / 512, u32::MAX, 0), VIRTIO_BLK_S_IOERR),
            (range(0, 0, 0), VIRTIO_BLK_S_IOERR),
            (range(0, most + 1, 0), VIRTIO_BLK_S_IOERR),
            (range(0, 1, 0)[..15].to_vec(), VIRTIO_BLK_S_IOERR),
            (two, VIRTIO_BLK_S_IOERR),
            (range(0, 1, 2), VIRTIO_BLK_S_UNSUPP),
            (range(0, 1, u32::MAX), VIRTIO_BLK_S_UNSUPP),
        ];
        for (bytes, status) in bad {
            let answer = guest.call(kind, 0, &bytes, 0);
            assert_eq!((answer.status, answer.written), (status, 1), "{kind} {bytes:?}");
        }
    }
    assert_eq!(guest.call(VIRTIO_BLK_T_DISCARD, 0, &range(0, 1, UNMAP), 0).status, VIRTIO_BLK_S_UNSUPP);
    assert_eq!(guest.content(), before);
    assert_eq!(guest.count("errors"), 21);
}
