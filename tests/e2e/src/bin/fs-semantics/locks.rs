//! Locks, of all three kinds, between two processes.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use crate::sys::{Child, Turns, file, open, refused};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![
    flock_excludes,
    flock_can_be_shared_and_waited_for,
    flock_belongs_to_the_open_file,
    posix_locks_exclude_by_range,
    posix_lock_is_waited_for,
    posix_locks_go_with_any_close,
    posix_locks_end_with_their_process,
    posix_deadlock_is_found,
    ofd_locks_exclude_within_a_process,
    ofd_lock_stays_until_the_last_close,
];

/// fcntl(2) locks: a command, a type, and a range.
fn lock(file: &File, command: i32, kind: i32, start: i64, len: i64) -> std::io::Result<libc::flock> {
    let mut lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: the structure lives through the call.
    match unsafe { libc::fcntl(file.as_raw_fd(), command, &raw mut lock) } {
        0 => Ok(lock),
        _ => Err(std::io::Error::last_os_error()),
    }
}

fn flock_excludes(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let held = file(&path, b"")?;
    flock(&held, FlockOperation::LockExclusive)?;
    let try_it = |operation| Child::start(|| Ok(flock(open(&path)?, operation)?))?.wait();
    for operation in [FlockOperation::NonBlockingLockExclusive, FlockOperation::NonBlockingLockShared] {
        Child::start(|| refused(flock(open(&path)?, operation), Errno::WOULDBLOCK))?.wait()?;
    }
    flock(&held, FlockOperation::LockShared)?;
    try_it(FlockOperation::NonBlockingLockShared)?;
    flock(&held, FlockOperation::Unlock)?;
    try_it(FlockOperation::NonBlockingLockExclusive)
}

fn flock_can_be_shared_and_waited_for(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let held = file(&path, b"")?;
    flock(&held, FlockOperation::LockExclusive)?;
    let (mut mine, mut other) = Turns::pair()?;
    let waiter = Child::start(|| {
        let file = open(&path)?;
        refused(flock(&file, FlockOperation::NonBlockingLockExclusive), Errno::WOULDBLOCK)?;
        other.pass()?;
        flock(&file, FlockOperation::LockExclusive)?;
        ensure!(std::fs::read(&path)? == b"done");
        Ok(())
    })?;
    mine.wait()?;
    std::fs::write(&path, "done")?;
    flock(&held, FlockOperation::Unlock)?;
    waiter.wait()
}

fn flock_belongs_to_the_open_file(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let held = file(&path, b"")?;
    flock(&held, FlockOperation::LockExclusive)?;
    // A descriptor of the same open file has it too, another open file has not.
    let same = held.try_clone()?;
    flock(&same, FlockOperation::NonBlockingLockExclusive)?;
    refused(flock(open(&path)?, FlockOperation::NonBlockingLockExclusive), Errno::WOULDBLOCK)?;
    drop(held);
    refused(flock(open(&path)?, FlockOperation::NonBlockingLockExclusive), Errno::WOULDBLOCK)?;
    drop(same);
    Ok(flock(open(&path)?, FlockOperation::NonBlockingLockExclusive)?)
}

fn posix_locks_exclude_by_range(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let held = file(&path, &[0; 100])?;
    lock(&held, libc::F_SETLK, libc::F_WRLCK, 10, 10)?;
    lock(&held, libc::F_SETLK, libc::F_RDLCK, 40, 10)?;
    let me = std::process::id() as i32;
    Child::start(|| {
        let file = open(&path)?;
        for (start, len) in [(10, 1), (19, 1), (0, 11), (15, 0)] {
            refused(lock(&file, libc::F_SETLK, libc::F_RDLCK, start, len), Errno::AGAIN)?;
        }
        let found = lock(&file, libc::F_GETLK, libc::F_WRLCK, 0, 30)?;
        ensure!(i32::from(found.l_type) == libc::F_WRLCK && found.l_pid == me);
        ensure!((found.l_start, found.l_len) == (10, 10));
        lock(&file, libc::F_SETLK, libc::F_RDLCK, 40, 10)?;
        refused(lock(&file, libc::F_SETLK, libc::F_WRLCK, 40, 10), Errno::AGAIN)?;
        lock(&file, libc::F_SETLK, libc::F_WRLCK, 0, 10)?;
        lock(&file, libc::F_SETLK, libc::F_WRLCK, 20, 20)?;
        Ok(())
    })?
    .wait()?;
    // In the middle a lock can be given up.
    lock(&held, libc::F_SETLK, libc::F_UNLCK, 13, 3)?;
    Child::start(|| {
        let file = open(&path)?;
        lock(&file, libc::F_SETLK, libc::F_WRLCK, 13, 3)?;
        refused(lock(&file, libc::F_SETLK, libc::F_WRLCK, 12, 1), Errno::AGAIN)?;
        refused(lock(&file, libc::F_SETLK, libc::F_WRLCK, 16, 1), Errno::AGAIN)
    })?
    .wait()
}

fn posix_lock_is_waited_for(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let held = file(&path, b"")?;
    lock(&held, libc::F_SETLK, libc::F_WRLCK, 0, 0)?;
    let (mut mine, mut other) = Turns::pair()?;
    let waiter = Child::start(|| {
        let file = open(&path)?;
        other.pass()?;
        lock(&file, libc::F_SETLKW, libc::F_WRLCK, 0, 0)?;
        ensure!(std::fs::read(&path)? == b"done");
        Ok(())
    })?;
    mine.wait()?;
    rustix::io::pwrite(&held, b"done", 0)?;
    lock(&held, libc::F_SETLK, libc::F_UNLCK, 0, 0)?;
    waiter.wait()
}

fn posix_locks_go_with_any_close(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let held = file(&path, b"")?;
    lock(&held, libc::F_SETLK, libc::F_WRLCK, 0, 0)?;
    drop(open(&path)?);
    Child::start(|| {
        lock(&open(&path)?, libc::F_SETLK, libc::F_WRLCK, 0, 0)?;
        Ok(())
    })?
    .wait()
}

fn posix_locks_end_with_their_process(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    // Killed, it does not even close.
    let child = Child::start(|| {
        lock(&open(&path)?, libc::F_SETLK, libc::F_WRLCK, 0, 0)?;
        let file = open(&path)?;
        lock(&file, libc::F_SETLK, libc::F_WRLCK, 0, 0)?;
        // SAFETY: ends this process.
        unsafe { libc::raise(libc::SIGKILL) };
        Ok(())
    })?;
    ensure!(child.signal()? == Some(libc::SIGKILL));
    lock(&open(&path)?, libc::F_SETLK, libc::F_WRLCK, 0, 0)?;
    Ok(())
}

fn posix_deadlock_is_found(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let held = file(&path, b"")?;
    lock(&held, libc::F_SETLK, libc::F_WRLCK, 0, 1)?;
    let (mut mine, mut other) = Turns::pair()?;
    // Whichever of the two comes second is refused; the other gets its lock when that one has gone.
    let both = |file: &File, at| match lock(file, libc::F_SETLKW, libc::F_WRLCK, at, 1) {
        Ok(_) => Ok(false),
        Err(e) if e.raw_os_error() == Some(libc::EDEADLK) => Ok(true),
        Err(e) => Err(e),
    };
    let child = Child::start(|| {
        let file = open(&path)?;
        lock(&file, libc::F_SETLK, libc::F_WRLCK, 1, 1)?;
        other.pass()?;
        let refused = both(&file, 0)?;
        rustix::io::pwrite(&file, &[u8::from(refused)], 0)?;
        Ok(())
    })?;
    mine.wait()?;
    let refused = both(&held, 1)?;
    lock(&held, libc::F_SETLK, libc::F_UNLCK, 0, 0)?;
    child.wait()?;
    let there = crate::sys::content(&held)? == [1];
    ensure!(refused != there, "here {refused}, there {there}");
    Ok(())
}

fn ofd_locks_exclude_within_a_process(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let one = file(&path, b"")?;
    let other = open(&path)?;
    lock(&one, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 10)?;
    refused(lock(&other, libc::F_OFD_SETLK, libc::F_WRLCK, 5, 10), Errno::AGAIN)?;
    lock(&other, libc::F_OFD_SETLK, libc::F_WRLCK, 10, 10)?;
    let found = lock(&other, libc::F_OFD_GETLK, libc::F_WRLCK, 0, 5)?;
    ensure!(i32::from(found.l_type) == libc::F_WRLCK && found.l_pid == -1);
    // And against locks of the old kind.
    refused(lock(&other, libc::F_SETLK, libc::F_WRLCK, 0, 1), Errno::AGAIN)?;
    Child::start(|| refused(lock(&open(&path)?, libc::F_OFD_SETLK, libc::F_RDLCK, 0, 1), Errno::AGAIN))?
        .wait()
}

fn ofd_lock_stays_until_the_last_close(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let one = file(&path, b"")?;
    lock(&one, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0)?;
    let same = one.try_clone()?;
    drop(one);
    drop(open(&path)?);
    refused(lock(&open(&path)?, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0), Errno::AGAIN)?;
    drop(same);
    lock(&open(&path)?, libc::F_OFD_SETLK, libc::F_WRLCK, 0, 0)?;
    Ok(())
}
