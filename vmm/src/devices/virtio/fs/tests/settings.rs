//! What the settings of a share change for the guest, and what the device counts.

use std::fs;

use super::*;

/// `FOPEN_DIRECT_IO` and `FOPEN_KEEP_CACHE` (Linux include/uapi/linux/fuse.h).
const DIRECT_IO: u32 = 1 << 0;
const KEEP_CACHE: u32 = 1 << 1;
/// `FUSE_WRITEBACK_CACHE`.
const WRITEBACK_CACHE: u32 = 1 << 16;

/// For how many seconds names and attributes are valid, and how data of an open file is cached.
fn caching(cache: FsCache) -> (u64, u64, u32) {
    let mut guest = Guest::with(FsOptions { cache, ..options(false) }, DESCRIPTORS);
    guest.init();
    fs::write(guest.dir.path().join("file"), "x").unwrap();
    let entry = guest.call(op::LOOKUP, ROOT, &c_str("file")).unwrap();
    let open = guest.call(op::OPEN, u64_at(&entry, 0), &fields(&[libc::O_RDONLY as u32, 0])).unwrap();
    (u64_at(&entry, 16), u64_at(&entry, 24), u32_at(&open, 8))
}

#[test]
fn the_guest_caches_what_the_share_allows() {
    assert_eq!(caching(FsCache::Never), (0, 0, DIRECT_IO));
    assert_eq!(caching(FsCache::Auto), (1, 1, 0));
    assert_eq!(caching(FsCache::Always), (86_400, 86_400, KEEP_CACHE));
}

#[test]
fn writes_are_kept_back_only_if_asked_for() {
    for (read_only, writeback, expected) in [(false, false, false), (false, true, true), (true, true, false)]
    {
        let options = FsOptions { read_only, writeback, cache: FsCache::Auto };
        let answer = Guest::with(options, DESCRIPTORS).init();
        assert_eq!(u32_at(&answer, 12) & WRITEBACK_CACHE != 0, expected, "{options:?}");
    }
}

#[test]
fn shares_do_not_see_each_other() {
    let (mut one, mut other) = (Guest::mounted(false), Guest::mounted(true));
    one.create(ROOT, "of-one", libc::O_RDWR, 0o600).unwrap();
    fs::write(other.dir.path().join("of-other"), "").unwrap();
    assert_eq!(one.list(ROOT), ["of-one"]);
    assert_eq!(other.list(ROOT), ["of-other"]);
    one.fs.reset();
    assert_eq!(other.list(ROOT), ["of-other"]);
}

#[test]
fn a_guest_holds_no_more_descriptors_than_its_share_may() {
    let mut guest = Guest::with(options(false), 20);
    guest.init();
    fs::write(guest.dir.path().join("file"), "x").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().node;
    let mut open = Vec::new();
    let refused = loop {
        match guest.open(node, libc::O_RDONLY) {
            Ok(handle) => open.push(handle),
            Err(error) => break error,
        }
        assert!(open.len() <= 20);
    };
    // The root and the file itself may take one each.
    assert_eq!(refused, libc::ENFILE);
    assert!(open.len() >= 18, "{}", open.len());
    // What is open works on, and what is closed makes room.
    assert_eq!(guest.read(node, open[0], 0, 10).unwrap(), b"x");
    guest.call(op::RELEASE, node, &release_args(open[0])).unwrap();
    guest.open(node, libc::O_RDONLY).unwrap();
}

#[test]
fn requests_errors_and_bytes_are_counted() {
    let mut guest = Guest::unmounted(false);
    let count = |guest: &Guest| {
        let counters = guest.fs.counters();
        assert_eq!(
            counters.iter().map(|c| c.0).collect::<Vec<_>>(),
            ["requests", "errors", "bytes_read", "bytes_written"]
        );
        counters.iter().map(|c| c.1).collect::<Vec<_>>()
    };
    assert_eq!(count(&guest), [0; 4]);
    guest.init();
    let (file, handle) = guest.create(ROOT, "file", libc::O_RDWR, 0o600).unwrap();
    assert_eq!(count(&guest), [2, 0, 0, 0]);
    assert_eq!(guest.write(file.node, handle, 0, &[7; 5000]).unwrap(), 5000);
    assert_eq!(guest.read(file.node, handle, 0, 8192).unwrap().len(), 5000);
    assert_eq!(guest.read(file.node, handle, 5000, 8192).unwrap().len(), 0);
    assert_eq!(count(&guest), [5, 0, 5000, 5000]);
    assert_eq!(guest.lookup(ROOT, "missing").unwrap_err(), libc::ENOENT);
    assert_eq!(guest.write(file.node, handle + 1, 0, &[7; 100]).unwrap_err(), libc::EBADF);
    assert_eq!(count(&guest), [7, 2, 5000, 5000]);
    // Over the life of the device, whatever its driver does.
    guest.fs.reset();
    guest.fs.activate(guest.driver.activation(0)).unwrap();
    guest.init();
    assert_eq!(count(&guest), [8, 2, 5000, 5000]);
}
