//! Requests that block in the host, and what happens beside them. A lease (fcntl(2), `F_SETLEASE`) makes an open wait until the
//! test gives it up.

use std::fs::File;
use std::os::fd::AsRawFd;

use super::super::pool::MAX_THREADS;
use super::*;

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

/// Offers an open that will block; returns its head.
fn open_later(guest: &mut Guest, node: u64) -> u16 {
    let message = guest.message(op::OPEN, node, &fields(&[libc::O_RDWR as u32, 0]));
    let segments = [guest.driver.readable(&message), guest.driver.writable(ROOM)];
    guest.driver.add(REQUESTS, &segments)
}

#[test]
fn a_request_that_blocks_does_not_hold_up_others() {
    let mut guest = Guest::mounted(false);
    let leased = Leased::new(&guest, "slow");
    let slow = guest.lookup(ROOT, "slow").unwrap().node;
    let head = open_later(&mut guest, slow);
    guest.driver.kick(REQUESTS);
    leased.wait_for_opener();
    for _ in 0..100 {
        let attributes = guest.message(op::GETATTR, ROOT, &[0; 16]);
        let segments = [guest.driver.readable(&attributes), guest.driver.writable(ROOM)];
        let other = guest.driver.add(REQUESTS, &segments);
        guest.driver.kick(REQUESTS);
        assert_eq!(guest.driver.wait_used(REQUESTS).0, other);
    }
    drop(leased);
    assert_eq!(guest.driver.wait_used(REQUESTS), (head, 32));
}

#[test]
fn one_kick_for_many_requests_is_enough() {
    for blocked in [1, MAX_THREADS - 1] {
        let mut guest = Guest::mounted(false);
        let leased: Vec<_> = (0..blocked).map(|i| Leased::new(&guest, &format!("slow{i}"))).collect();
        let nodes: Vec<_> = (0..blocked).map(|i| guest.lookup(ROOT, &format!("slow{i}")).unwrap().node).collect();
        for node in nodes {
            open_later(&mut guest, node);
        }
        let attributes = guest.message(op::GETATTR, ROOT, &[0; 16]);
        let segments = [guest.driver.readable(&attributes), guest.driver.writable(ROOM)];
        let last = guest.driver.add(REQUESTS, &segments);
        guest.driver.kick(REQUESTS);
        // It was behind all those that block.
        assert_eq!(guest.driver.wait_used(REQUESTS).0, last);
        drop(leased);
        for _ in 0..blocked {
            assert_eq!(guest.driver.wait_used(REQUESTS).1, 32);
        }
    }
}

#[test]
fn more_blocking_requests_than_threads_are_all_served_in_the_end() {
    let mut guest = Guest::mounted(false);
    let leased = Leased::new(&guest, "slow");
    let slow = guest.lookup(ROOT, "slow").unwrap().node;
    for _ in 0..MAX_THREADS * 2 {
        open_later(&mut guest, slow);
        guest.driver.kick(REQUESTS);
    }
    leased.wait_for_opener();
    drop(leased);
    for _ in 0..MAX_THREADS * 2 {
        assert_eq!(guest.driver.wait_used(REQUESTS).1, 32);
    }
}

#[test]
fn a_reset_waits_for_requests_in_flight() {
    let mut guest = Guest::mounted(false);
    let leased = Leased::new(&guest, "slow");
    let slow = guest.lookup(ROOT, "slow").unwrap().node;
    let head = open_later(&mut guest, slow);
    guest.driver.kick(REQUESTS);
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
}

#[test]
fn event_index_loses_no_request() {
    let mut guest = Guest::mounted(false);
    guest.fs.reset();
    let activation = guest.driver.activation(guest.fs.features());
    guest.fs.activate(activation).unwrap();
    guest.init();
    for _ in 0..2000 {
        guest.call(op::GETATTR, ROOT, &[0; 16]).unwrap();
    }
}
