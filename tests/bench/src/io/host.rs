//! What the machines' devices stand on: taps, files, a network namespace.

use std::fs::{self, File};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use kvrun_pod::network::open_tap;
use nix::sched::{CloneFlags, unshare};

use super::DISK;

/// Which of a machine's links.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Which {
    /// The VMM carries it.
    Link,
    /// The host's kernel does.
    Vhost,
}

/// A tap, and the addresses at both its ends.
pub(super) struct Tap {
    pub(super) which: Which,
    pub(super) name: String,
    network: u8,
}

impl Tap {
    /// The taps of a machine, which has a number. They are to be made.
    pub(super) fn all(machine: u8, vhost: bool) -> Vec<Self> {
        let tap = |which, name, network| Self { which, name: format!("{name}{machine}"), network };
        let mut taps = vec![tap(Which::Link, "link", 2 * machine)];
        if vhost {
            taps.push(tap(Which::Vhost, "vhost", 2 * machine + 1));
        }
        taps
    }

    /// Makes it; it is gone with the descriptor.
    pub(super) fn open(&self) -> Result<OwnedFd> {
        let tap = open_tap(&self.name, 1).with_context(|| format!("cannot make tap {}", self.name))?;
        tap.queues.into_iter().next().context("no descriptor")
    }

    /// The guest's Ethernet address.
    pub(super) fn mac(&self) -> [u8; 6] {
        [0x02, 0x6b, 0x76, 0, self.network, 2]
    }

    /// The guest's address.
    pub(super) fn guest_address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 1, self.network, 2)
    }

    /// Gives the host's end its address and brings it up.
    pub(super) fn up(&self) -> Result<()> {
        ip(&format!("addr add 10.1.{}.1/24 dev {}", self.network, self.name))?;
        ip(&format!("link set {} up", self.name))
    }
}

fn ip(arguments: &str) -> Result<()> {
    let output = Command::new("ip").args(arguments.split(' ')).output().context("cannot run ip")?;
    ensure!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}

/// Enters a network namespace that is nobody else's. To be called while there is one thread.
pub(super) fn own_network() -> Result<()> {
    unshare(CloneFlags::CLONE_NEWNET).context("cannot make a network namespace")
}

/// Whether the host can carry links in its kernel.
pub(super) fn has_vhost_net() -> bool {
    File::options().read(true).write(true).open("/dev/vhost-net").is_ok()
}

/// A machine's disk, all of it in memory.
pub(super) fn disk(scratch: &Path, machine: &str) -> Result<PathBuf> {
    let path = scratch.join(format!("{machine}.img"));
    fs::write(&path, vec![0x5a; DISK]).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(path)
}

/// The directory a machine shares.
pub(super) fn share(scratch: &Path, machine: &str) -> Result<PathBuf> {
    let path = scratch.join(format!("{machine}-share"));
    fs::create_dir(&path).with_context(|| format!("cannot make {}", path.display()))?;
    Ok(path)
}
