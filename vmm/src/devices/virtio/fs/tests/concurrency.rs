//! Requests that block in the host, and what happens beside them. A lease (fcntl(2), `F_SETLEASE`) makes an open wait until the
//! test gives it up.

use std::fs::File;
use std::os::fd::AsRawFd;

use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;

use super::super::FsState;
use super::super::pool::{MAX_THREADS, REST};
use super::*;
use crate::devices::virtio::{DeviceState, QueuePosition, SavedDevice};

/// Linux include/uapi/asm-generic/fcntl.h.
const F_SETSIG: libc::c_int = 10;

/// A file that cannot be opened for writing by others until this is dropped.
struct Leased(File);

impl Leased {
    fn new(guest: &Guest, name: &str) -> Self {
        let file = File::create(guest.dir.path().join(name)).unwrap();
        // SAFETY: plain system calls on an open descriptor. The signal that tells of a broken lease would end the process;
        // SIGURG does not.
        unsafe {
            assert_eq!(libc::fcntl(file.as_raw_fd(), F_SETSIG, libc::SIGURG), 0);
            assert_eq!(libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, libc::F_WRLCK), 0);
        }
        Self(file)
    }

    /// Waits until somebody waits for the file.
    fn wait_for_opener(&self) {
        // SAFETY: a plain system call on an open descriptor.
        while unsafe { libc::fcntl(self.0.as_raw_fd(), libc::F_GETLEASE) } == libc::F_WRLCK {
            std::thread::yield_now();
        }
    }
}

/// A mounted share for each way in which driver and device tell each other when to look (virtio 1.3 s2.7.7, s2.7.10).
fn in_each_mode(test: impl Fn(Guest)) {
    for features in [0, 1 << VIRTIO_RING_F_EVENT_IDX] {
        let mut guest = Guest::unmounted(false);
        guest.fs.reset();
        guest.fs.activate(guest.driver.activation(features)).unwrap();
        guest.init();
        test(guest);
    }
}

/// Offers an open that will block; returns its head.
fn open_later(guest: &mut Guest, node: u64) -> u16 {
    let message = guest.message(op::OPEN, node, &fields(&[libc::O_RDWR as u32, 0]));
    let segments = [guest.driver.readable(&message), guest.driver.writable(ROOM)];
    guest.driver.add(REQUESTS, &segments)
}

#[test]
fn a_request_that_blocks_does_not_hold_up_others() {
    in_each_mode(|mut guest| {
        let leased = Leased::new(&guest, "slow");
        let slow = guest.lookup(ROOT, "slow").unwrap().node;
        let head = open_later(&mut guest, slow);
        guest.driver.kick_if_wanted(REQUESTS);
        leased.wait_for_opener();
        for _ in 0..100 {
            let attributes = guest.message(op::GETATTR, ROOT, &[0; 16]);
            let segments = [guest.driver.readable(&attributes), guest.driver.writable(ROOM)];
            let other = guest.driver.add(REQUESTS, &segments);
            guest.driver.kick_if_wanted(REQUESTS);
            assert_eq!(guest.driver.wait_used(REQUESTS).0, other);
        }
        drop(leased);
        assert_eq!(guest.driver.wait_used(REQUESTS), (head, 32));
    });
}

#[test]
fn one_kick_for_many_requests_is_enough() {
    for blocked in [1, MAX_THREADS - 1] {
        in_each_mode(|mut guest| {
            let leased: Vec<_> = (0..blocked).map(|i| Leased::new(&guest, &format!("slow{i}"))).collect();
            let nodes: Vec<_> =
                (0..blocked).map(|i| guest.lookup(ROOT, &format!("slow{i}")).unwrap().node).collect();
            for node in nodes {
                open_later(&mut guest, node);
            }
            let attributes = guest.message(op::GETATTR, ROOT, &[0; 16]);
            let segments = [guest.driver.readable(&attributes), guest.driver.writable(ROOM)];
            let last = guest.driver.add(REQUESTS, &segments);
            guest.driver.kick_if_wanted(REQUESTS);
            // It was behind all those that block.
            assert_eq!(guest.driver.wait_used(REQUESTS).0, last);
            drop(leased);
            for _ in 0..blocked {
                assert_eq!(guest.driver.wait_used(REQUESTS).1, 32);
            }
        });
    }
}

#[test]
fn more_blocking_requests_than_threads_are_all_served_in_the_end() {
    in_each_mode(|mut guest| {
        let leased = Leased::new(&guest, "slow");
        let slow = guest.lookup(ROOT, "slow").unwrap().node;
        for _ in 0..MAX_THREADS * 2 {
            open_later(&mut guest, slow);
            guest.driver.kick_if_wanted(REQUESTS);
        }
        leased.wait_for_opener();
        // Each thread blocks, and as many requests wait: whoever took another one would be seen here.
        let pool = guest.fs.pool.as_ref().unwrap();
        while pool.busy() < MAX_THREADS {
            std::thread::yield_now();
        }
        assert_eq!((pool.busy(), pool.threads()), (MAX_THREADS, MAX_THREADS));
        drop(leased);
        for _ in 0..MAX_THREADS * 2 {
            assert_eq!(guest.driver.wait_used(REQUESTS).1, 32);
        }
    });
}

#[test]
fn a_reset_waits_for_requests_in_flight() {
    in_each_mode(|mut guest| {
        let leased = Leased::new(&guest, "slow");
        let slow = guest.lookup(ROOT, "slow").unwrap().node;
        let head = open_later(&mut guest, slow);
        guest.driver.kick_if_wanted(REQUESTS);
        leased.wait_for_opener();
        std::thread::scope(|scope| {
            let fs = &mut guest.fs;
            let reset = scope.spawn(move || fs.reset());
            // The request ends only with the lease, and the reset only with the request.
            drop(leased);
            reset.join().unwrap();
        });
        assert_eq!(guest.driver.pop_used(REQUESTS), Some((head, 32)));
        assert_eq!(guest.driver.interrupt.resets(), [""; 0]);
    });
}

#[test]
fn no_request_is_lost() {
    in_each_mode(|mut guest| {
        for round in 0..500 {
            let mark = guest.driver.mark();
            let many = 1 + round % 40;
            for _ in 0..many {
                let attributes = guest.message(op::GETATTR, ROOT, &[0; 16]);
                let segments = [guest.driver.readable(&attributes), guest.driver.writable(ROOM)];
                guest.driver.add(REQUESTS, &segments);
                guest.driver.kick_if_wanted(REQUESTS);
            }
            for _ in 0..many {
                assert_eq!(guest.driver.wait_used(REQUESTS).1, 16 + 104);
            }
            guest.driver.release(mark);
        }
    });
}

#[test]
fn a_pause_waits_for_requests_in_flight() {
    in_each_mode(|mut guest| {
        let leased = Leased::new(&guest, "slow");
        let slow = guest.lookup(ROOT, "slow").unwrap().node;
        let head = open_later(&mut guest, slow);
        guest.driver.kick_if_wanted(REQUESTS);
        leased.wait_for_opener();
        std::thread::scope(|scope| {
            let fs = &mut guest.fs;
            let pause = scope.spawn(move || fs.pause());
            // The request ends only with the lease, and the pause only with the request.
            drop(leased);
            pause.join().unwrap();
        });
        assert_eq!(guest.driver.pop_used(REQUESTS), Some((head, 32)));
        guest.fs.resume();
    });
}

#[test]
fn nothing_is_taken_while_paused_and_nothing_is_lost() {
    in_each_mode(|mut guest| {
        for _ in 0..50 {
            let mark = guest.driver.mark();
            let attributes = guest.message(op::GETATTR, ROOT, &[0; 16]);
            let segments = [guest.driver.readable(&attributes), guest.driver.writable(ROOM)];
            // Some before the pause, which may be in flight when it comes, and some after it.
            for _ in 0..5 {
                guest.driver.add(REQUESTS, &segments);
                guest.driver.kick_if_wanted(REQUESTS);
            }
            guest.fs.pause();
            guest.fs.pause();
            let mut answered = 0;
            while guest.driver.pop_used(REQUESTS).is_some() {
                answered += 1;
            }
            for _ in 0..5 {
                guest.driver.add(REQUESTS, &segments);
                guest.driver.kick(REQUESTS);
            }
            std::thread::yield_now();
            assert_eq!(guest.driver.pop_used(REQUESTS), None);
            guest.fs.resume();
            guest.fs.resume();
            for _ in answered..10 {
                assert_eq!(guest.driver.wait_used(REQUESTS).1, 16 + 104);
            }
            guest.driver.release(mark);
        }
    });
}

#[test]
fn a_reset_ends_a_pause() {
    let mut guest = Guest::mounted(false);
    guest.fs.pause();
    guest.fs.reset();
    guest.fs.resume();
    guest.fs.activate(guest.driver.activation(0)).unwrap();
    guest.init();
}

#[test]
fn threads_come_with_requests_that_block_and_go_when_they_are_not_needed() {
    let mut guest = Guest::mounted(false);
    let threads = |guest: &Guest| guest.fs.pool.as_ref().unwrap().threads();
    let leased: Vec<_> = (0..3).map(|i| Leased::new(&guest, &format!("slow{i}"))).collect();
    for (i, leased) in leased.iter().enumerate() {
        let node = guest.lookup(ROOT, &format!("slow{i}")).unwrap().node;
        open_later(&mut guest, node);
        guest.driver.kick_if_wanted(REQUESTS);
        leased.wait_for_opener();
    }
    // One for each request that blocks and one that listens; and another if a look-up came while that one was still at work.
    assert!((4..=5).contains(&threads(&guest)), "{} threads", threads(&guest));
    drop(leased);
    let rest = std::time::Duration::from_secs(REST.tv_sec as u64);
    let start = std::time::Instant::now();
    while threads(&guest) > 1 {
        assert!(start.elapsed() < rest * 10, "{} threads are left", threads(&guest));
        std::thread::yield_now();
    }
    assert!(start.elapsed() >= rest / 2, "they were gone at once");
    // The one that is left serves, and more come again when they are needed.
    for _ in 0..3 {
        assert_eq!(guest.driver.wait_used(REQUESTS).1, 32);
    }
    let leased = Leased::new(&guest, "slow");
    let node = guest.lookup(ROOT, "slow").unwrap().node;
    open_later(&mut guest, node);
    guest.driver.kick_if_wanted(REQUESTS);
    leased.wait_for_opener();
    let attributes = guest.message(op::GETATTR, ROOT, &[0; 16]);
    let segments = [guest.driver.readable(&attributes), guest.driver.writable(ROOM)];
    let other = guest.driver.add(REQUESTS, &segments);
    guest.driver.kick_if_wanted(REQUESTS);
    assert_eq!(guest.driver.wait_used(REQUESTS).0, other);
    drop(leased);
    assert_eq!(guest.driver.wait_used(REQUESTS).1, 32);
}

#[test]
fn a_paused_share_tells_what_it_would_need_to_go_on() {
    let mut guest = Guest::unmounted(false);
    let state = |guest: &Guest| {
        let SavedDevice { queues, state: DeviceState::Fs(state) } = guest.fs.save().unwrap() else {
            panic!("of another kind")
        };
        let text = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<FsState>(&text).unwrap(), state);
        (queues, state)
    };
    guest.init();
    std::fs::create_dir(guest.dir.path().join("dir")).unwrap();
    let dir = guest.lookup(ROOT, "dir").unwrap().node;
    let (file, handle) = guest.create(dir, "file", libc::O_RDWR, 0o600).unwrap();
    guest.write(file.node, handle, 0, b"content").unwrap();
    guest.fs.pause();
    let (queues, saved) = state(&guest);
    assert_eq!(saved.tag, "share");
    assert_eq!(saved.options, options(false));
    let at = |n| Some(QueuePosition { next_avail: n, next_used: n });
    assert_eq!(queues, [at(0), at(4)]);
    // It goes on as if nothing had been.
    guest.fs.resume();
    assert_eq!(guest.read(file.node, handle, 0, 100).unwrap(), b"content");
    // And so does another with its session: the same inode, the same open file.
    guest.fs.reset();
    assert_eq!(state(&guest), (vec![], FsState { session: vec![], ..saved.clone() }));
    guest.fs.activate(guest.driver.activation(0)).unwrap();
    guest.fs.pool.as_ref().unwrap().restore(&saved.session);
    assert_eq!(guest.read(file.node, handle, 0, 100).unwrap(), b"content");
    assert_eq!(guest.lookup(dir, "file").unwrap().node, file.node);
}
