//! The namespaces of the jail.
//!
//! All are made by one unshare(2). Only the PID namespace is not: a process cannot move into one, so the engine starts it there.

use std::os::fd::{AsFd, OwnedFd};

use rustix::event::{EventfdFlags, eventfd};
use rustix::fs::{Mode, OFlags, openat};
use rustix::io::{Errno, read, write};
use rustix::process::{WaitOptions, waitpid};
use rustix::thread::{UnshareFlags, unshare_unsafe};

use super::{JailError, failed, last_errno};

/// Identities are the same inside and outside, as many as there are outside: the file server makes and owns files as the guest says. That they
/// are mapped at all is a privilege over the outer namespace, which a process has lost when it is in the inner one; so a child
/// that stays outside does it.
///
/// `proc` is a procfs in which this process is number 1.
pub(super) fn enter(proc: &OwnedFd) -> Result<(), JailError> {
    let maps = [
        ("1/uid_map", identity(&read_map(proc, "1/uid_map")?)?),
        ("1/gid_map", identity(&read_map(proc, "1/gid_map")?)?),
    ];
    let inside = eventfd(0, EventfdFlags::CLOEXEC).map_err(failed("make an event"))?;

    // SAFETY: there is one thread, so the child may do what it likes.
    let child = match unsafe { libc::fork() } {
        -1 => return Err(failed("start a helper")(last_errno())),
        0 => {
            let outcome = map_identities(proc, &maps, &inside);
            // SAFETY: ends the child at once, without what its copy of the parent would do at exit.
            unsafe { libc::_exit(outcome.map_or_else(Errno::raw_os_error, |()| 0)) }
        }
        child => rustix::process::Pid::from_raw(child),
    };
    let flags = UnshareFlags::NEWUSER
        | UnshareFlags::NEWNS
        | UnshareFlags::NEWNET
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    // SAFETY: the table of descriptors is not unshared, and the only thread does not mind.
    unsafe { unshare_unsafe(flags) }.map_err(failed("make namespaces (it needs root)"))?;
    write(&inside, &1u64.to_ne_bytes()).map_err(failed("tell the helper"))?;

    let step = failed("map users and groups");
    let status = loop {
        match waitpid(child, WaitOptions::empty()) {
            Ok(Some((_, status))) => break status,
            Err(Errno::INTR) | Ok(None) => {}
            Err(e) => return Err(step(e)),
        }
    };
    match status.exit_status() {
        Some(0) => Ok(()),
        Some(errno) => Err(step(Errno::from_raw_os_error(errno))),
        None => Err(step(Errno::CANCELED)),
    }
}

/// What the helper does, in the outer namespace, once its parent is in the inner one.
fn map_identities(proc: &OwnedFd, maps: &[(&str, String); 2], inside: &OwnedFd) -> Result<(), Errno> {
    let mut count = [0; 8];
    while let Err(e) = read(inside, &mut count) {
        if e != Errno::INTR {
            return Err(e);
        }
    }
    for (path, map) in maps {
        // Opened only now: the namespace is that of the process at this moment.
        let file = openat(proc, *path, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())?;
        // user_namespaces(7): in one write.
        write(&file, map.as_bytes())?;
    }
    Ok(())
}

fn read_map(proc: impl AsFd, path: &'static str) -> Result<String, JailError> {
    let step = failed("read who is who outside");
    let file = openat(proc, path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(&step)?;
    // The kernel takes maps of 340 lines.
    let mut bytes = vec![0; 16 * 1024];
    let length = read(&file, &mut bytes).map_err(&step)?;
    Ok(String::from_utf8_lossy(&bytes[..length]).into_owned())
}

/// The map of a namespace in which everybody of the outer one, which has the map `outer` itself, is who they are. Lines are "inside outside
/// count" (user_namespaces(7)).
fn identity(outer: &str) -> Result<String, JailError> {
    let strange = || JailError::IdMap(outer.trim_end().to_owned());
    let mut map = String::new();
    for line in outer.lines() {
        let mut numbers = line.split_whitespace();
        let (Some(first), Some(_), Some(count), None) =
            (numbers.next(), numbers.next(), numbers.next(), numbers.next())
        else {
            return Err(strange());
        };
        map.push_str(&format!("{first} {first} {count}\n"));
    }
    if map.is_empty() { Err(strange()) } else { Ok(map) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn everybody_stays_who_they_are() {
        assert_eq!(identity("         0          0 4294967295\n").unwrap(), "0 0 4294967295\n");
        // As rootless containers have it.
        let rootless = "         0       1000          1\n         1     100000      65536\n";
        assert_eq!(identity(rootless).unwrap(), "0 0 1\n1 1 65536\n");
    }

    #[test]
    fn a_map_that_is_none_is_refused() {
        for map in ["", "0 0\n", "0 0 1 2\n"] {
            assert!(matches!(identity(map), Err(JailError::IdMap(_))), "{map:?}");
        }
    }
}
