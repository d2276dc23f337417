//! What a guest should not send. The device must outlive it, and nothing outside the share may change.

use std::fs;

use super::*;
use crate::devices::virtio::testing::{Hostile, NOWHERE};

/// The device still does its work.
fn assert_alive(guest: &mut Guest) {
    guest.call(op::GETATTR, ROOT, &[0; 16]).unwrap();
}

/// Sends something that has no answer.
fn send_in_vain(guest: &mut Guest, message: &[u8], room: usize) {
    assert!(guest.driver.request(REQUESTS, message, room).is_empty());
    assert_alive(guest);
}

#[test]
fn hostile_chains_come_back_empty() {
    for kind in Hostile::ALL {
        for (queue, writable) in [(0, true), (0, false), (REQUESTS, true), (REQUESTS, false)] {
            let mut guest = Guest::mounted(false);
            let head = guest.driver.add_hostile(queue, kind, writable);
            guest.driver.kick(queue);
            if matches!(kind, Hostile::HeadBeyondTable) {
                guest.driver.interrupt.wait_reset();
            } else {
                assert_eq!(guest.driver.wait_used(queue), (head, 0), "{kind:?}");
                assert_alive(&mut guest);
            }
            guest.fs.reset();
        }
    }
}

#[test]
fn corrupt_available_ring_ends_the_device_until_reset() {
    for queue in [0, REQUESTS] {
        let mut guest = Guest::mounted(false);
        guest.driver.jump_avail_idx(queue);
        guest.driver.kick(queue);
        guest.driver.interrupt.wait_reset();
        assert_eq!(guest.driver.interrupt.resets(), [format!("available ring of queue {queue} is corrupt")]);
        guest.fs.reset();
        guest.fs.activate(guest.driver.activation(0)).unwrap();
        guest.init();
        assert_alive(&mut guest);
    }
}

#[test]
fn garbage_has_no_answer() {
    let mut guest = Guest::mounted(false);
    for length in [1, 4, 16, 39] {
        send_in_vain(&mut guest, &vec![0xff; length], ROOM);
    }
    // A header that promises more, or less, than there is.
    for promised in [0u32, 39, 1 << 20] {
        let mut message = guest.message(op::LOOKUP, ROOT, b"x\0");
        message[..4].copy_from_slice(&promised.to_le_bytes());
        send_in_vain(&mut guest, &message, ROOM);
    }
    // Beyond what the server takes at all.
    let mut message = guest.message(op::GETATTR, ROOT, &[0; 16]);
    message[..4].copy_from_slice(&u32::MAX.to_le_bytes());
    assert_eq!(guest.send(&message, ROOM).unwrap_err(), libc::ENOMEM);
    assert_eq!(guest.call(9999, ROOT, &[]).unwrap_err(), libc::ENOSYS);
    assert_eq!(guest.call(op::SETLKW, ROOT, &[0; 48]).unwrap_err(), libc::ENOSYS);
    assert_alive(&mut guest);
}

#[test]
fn names_do_not_leave_the_directory_they_are_in() {
    let mut guest = Guest::mounted(false);
    // The parent of the share is the guest's goal; the share's own directory is `inside/share` of it.
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("victim"), "precious").unwrap();
    fs::create_dir_all(outside.path().join("share/sub")).unwrap();
    fs::write(outside.path().join("share/mine"), "").unwrap();
    let root = OwnedFd::from(fs::File::open(outside.path().join("share")).unwrap());
    guest.fs = share(root, options(false), DESCRIPTORS);
    guest.fs.activate(guest.driver.activation(0)).unwrap();
    guest.init();
    let mine = guest.lookup(ROOT, "mine").unwrap().node;

    let bad = ["../victim", "..", ".", "", "sub/../../victim", "/etc/passwd", "sub/x"];
    for name in bad {
        let requests: Vec<(u32, Vec<u8>)> = vec![
            (op::LOOKUP, c_str(name)),
            (op::UNLINK, c_str(name)),
            (op::RMDIR, c_str(name)),
            (op::MKDIR, with_names(fields(&[0o755, 0]), &[name])),
            (op::MKNOD, with_names(fields(&[0o100_644, 0, 0, 0]), &[name])),
            (op::CREATE, with_names(fields(&[2 | libc::O_TRUNC as u32, 0o644, 0, 0]), &[name])),
            (op::SYMLINK, with_names(vec![], &[name, "target"])),
            (op::LINK, with_names(fields64(&[mine]), &[name])),
            (op::RENAME, with_names(fields64(&[ROOT]), &["mine", name])),
            (op::RENAME, with_names(fields64(&[ROOT]), &[name, "stolen"])),
            (op::RENAME2, with_names(fields64(&[ROOT, 0]), &["mine", name])),
            (op::RENAME2, with_names(fields64(&[ROOT, 0]), &[name, "stolen"])),
        ];
        for (opcode, args) in requests {
            let message = guest.message(opcode, ROOT, &args);
            send_in_vain(&mut guest, &message, ROOM);
        }
    }
    // Not terminated: the next bytes in memory are none of its business.
    let message = guest.message(op::LOOKUP, ROOT, b"mine");
    send_in_vain(&mut guest, &message, ROOM);

    assert_eq!(fs::read_to_string(outside.path().join("victim")).unwrap(), "precious");
    assert_eq!(guest.list(ROOT), ["mine", "sub"]);
}

#[test]
fn a_name_that_spans_buffers_is_still_checked() {
    let mut guest = Guest::mounted(false);
    let message = guest.message(op::UNLINK, ROOT, &c_str("../victim"));
    let mut segments: Vec<_> = message.iter().map(|byte| guest.driver.readable(&[*byte])).collect();
    segments.push(guest.driver.writable(ROOM));
    let head = guest.driver.add(REQUESTS, &segments);
    guest.driver.kick(REQUESTS);
    assert_eq!(guest.driver.wait_used(REQUESTS), (head, 0));
    assert_alive(&mut guest);
}

#[test]
fn no_room_for_an_answer_is_no_answer() {
    let mut guest = Guest::mounted(false);
    fs::write(guest.dir.path().join("file"), "content").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().node;
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    let dir = u64_at(&guest.call(op::OPENDIR, ROOT, &fields(&[0, 0])).unwrap(), 0);
    for room in [0, 1, 15] {
        for size in [0, 4096] {
            let read = guest.message(op::READ, node, &io_args(handle, 0, size));
            send_in_vain(&mut guest, &read, room);
            for opcode in [op::READDIR, op::READDIRPLUS] {
                let list = guest.message(opcode, ROOT, &io_args(dir, 0, size));
                send_in_vain(&mut guest, &list, room);
            }
        }
        let attributes = guest.message(op::GETATTR, ROOT, &[0; 16]);
        send_in_vain(&mut guest, &attributes, room);
    }
    // Room for a header only: the answer does not fit, an error would.
    let attributes = guest.message(op::GETATTR, ROOT, &[0; 16]);
    send_in_vain(&mut guest, &attributes, 16);
}

#[test]
fn offsets_beyond_all_files_are_beyond_the_end() {
    let mut guest = Guest::mounted(false);
    let (entry, handle) = guest.create(ROOT, "file", libc::O_RDWR, 0o100_644).unwrap();
    for offset in [i64::MAX as u64, i64::MAX as u64 + 1, u64::MAX] {
        assert!(guest.read(entry.node, handle, offset, 4096).unwrap_or_default().is_empty());
        guest.write(entry.node, handle, offset, b"x").unwrap_err();
    }
    assert_eq!(guest.dir.path().join("file").metadata().unwrap().len(), 0);
}

#[test]
fn sizes_beyond_all_reason_are_refused() {
    let mut guest = Guest::mounted(false);
    fs::write(guest.dir.path().join("file"), "content").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().node;
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    // Less comes than asked for: what there is room for.
    let answer = guest.call_with_room(op::READ, node, &io_args(handle, 0, u32::MAX), 20).unwrap();
    assert_eq!(answer, b"cont");
    assert_eq!(
        guest.call(op::GETXATTR, node, &with_names(fields(&[u32::MAX, 0]), &["user.x"])).unwrap_err(),
        libc::ENOMEM
    );
    let dir = u64_at(&guest.call(op::OPENDIR, ROOT, &fields(&[0, 0])).unwrap(), 0);
    assert_eq!(guest.call(op::READDIR, ROOT, &io_args(dir, 0, u32::MAX)).unwrap_err(), libc::ENOMEM);
}

#[test]
fn handles_and_nodes_are_not_guessed() {
    let mut guest = Guest::mounted(false);
    for number in [0, 2, 77, u64::MAX] {
        assert_eq!(guest.call(op::GETATTR, number, &[0; 16]).unwrap_err(), libc::EBADF);
        assert_eq!(guest.read(ROOT, number, 0, 16).unwrap_err(), libc::EBADF);
    }
}

#[test]
fn after_destroy_there_is_nothing_until_init() {
    let mut guest = Guest::mounted(false);
    let destroy = guest.message(op::DESTROY, 0, &[]);
    assert!(guest.driver.request(REQUESTS, &destroy, ROOM).is_empty());
    assert_eq!(guest.call(op::GETATTR, ROOT, &[0; 16]).unwrap_err(), libc::EBADF);
    guest.init();
    assert_alive(&mut guest);
}

#[test]
fn private_memory_of_the_device_is_out_of_reach() {
    let mut guest = Guest::mounted(false);
    for addr in [1 << 56, (1 << 56) + 4096, NOWHERE] {
        for flags in [0, crate::devices::virtio::testing::WRITE] {
            let head = guest.driver.add_raw(REQUESTS, addr, 64, flags, 0);
            guest.driver.kick(REQUESTS);
            assert_eq!(guest.driver.wait_used(REQUESTS), (head, 0));
        }
    }
    assert_alive(&mut guest);
}

#[test]
fn a_session_can_begin_again_and_again() {
    let mut guest = Guest::mounted(false);
    let node = guest.create(ROOT, "file", libc::O_RDWR, 0o100_644).unwrap().0.node;
    // A client without any feature; that it does not know FUSE_SUBMOUNTS is not even noticed.
    let answer = guest.call(op::INIT, 0, &fields(&[7, 40, 0, 0])).unwrap();
    assert_eq!(u32_at(&answer, 12), 1 << 27);
    assert_eq!(guest.call(op::GETATTR, node, &[0; 16]).unwrap_err(), libc::EBADF);
    assert_eq!(guest.call(op::INIT, 0, &fields(&[6, 0, 0, 0])).unwrap_err(), libc::EPROTO);
    assert_alive(&mut guest);
}

/// The same numbers in every run (xorshift64).
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, bound: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % bound
    }
}

#[test]
fn nonsense_does_not_end_the_device() {
    let mut guest = Guest::mounted(false);
    let mut numbers = Numbers(0x9e37_79b9_7f4a_7c15);
    // Handles 0 and 1.
    guest.create(ROOT, "a", libc::O_RDWR, 0o100_644).unwrap();
    guest.call(op::OPENDIR, ROOT, &fields(&[0, 0])).unwrap();
    let interesting = [0, 1, 2, 3, 16, 4096, 1 << 20, 1 << 31, u32::MAX.into(), 1 << 63, u64::MAX];
    for _ in 0..20_000 {
        let mark = guest.driver.mark();
        let mut args = Vec::new();
        for _ in 0..numbers.below(8) {
            args.extend(interesting[numbers.below(interesting.len() as u64) as usize].to_le_bytes());
        }
        for _ in 0..numbers.below(3) {
            args.extend([b'a' + numbers.below(3) as u8, 0]);
        }
        let opcode = match numbers.below(60) as u32 {
            // One would end the session for all that follow, the other fill the host's disk.
            op::DESTROY | op::FALLOCATE => op::LOOKUP,
            other => other,
        };
        let node = numbers.below(5);
        let mut message = guest.message(opcode, node, &args);
        if numbers.below(8) == 0 {
            message.truncate(numbers.below(message.len() as u64 + 1) as usize);
        }
        // Each piece in a buffer of its own, and room in two.
        let cut = numbers.below(message.len() as u64 + 1) as usize;
        let (front, back) = message.split_at(cut);
        let room = [0, 1, 15, 16, 64, 256, 8192][numbers.below(7) as usize];
        let segments = [
            guest.driver.readable(front),
            guest.driver.readable(back),
            guest.driver.writable(room / 3),
            guest.driver.writable(room - room / 3),
        ];
        let head = guest.driver.add(REQUESTS, &segments);
        guest.driver.kick_if_wanted(REQUESTS);
        let (used, written) = guest.driver.wait_used(REQUESTS);
        assert_eq!(used, head);
        assert!(written as usize <= room);
        guest.driver.release(mark);
    }
    assert_eq!(guest.driver.interrupt.resets(), [""; 0]);
    // Whatever the session has become, a new one can begin.
    guest.init();
    assert_alive(&mut guest);
}
