//! Network namespaces as engines make them: with one end of a veth pair, whose other end is in the test's own namespace, the host's.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use kvrun_pod::network::{NetworkNamespace, enter_new};
use rustix::mount::{MountFlags, UnmountFlags, mount, unmount};

/// A namespace that is there until it is dropped.
#[derive(Debug)]
pub struct Namespace {
    path: PathBuf,
    inside: NetworkNamespace,
}

impl Namespace {
    /// A new one, at a path.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn new(path: &Path) -> Result<Self> {
        File::create_new(path).with_context(|| format!("cannot make {}", path.display()))?;
        std::thread::scope(|scope| {
            let maker = scope.spawn(|| -> Result<()> {
                enter_new().context("cannot make a network namespace")?;
                mount("/proc/thread-self/ns/net", path, "", MountFlags::BIND, None)?;
                Ok(())
            });
            maker.join().map_err(|_| anyhow::anyhow!("the thread panicked"))?
        })?;
        Ok(Self { path: path.to_owned(), inside: NetworkNamespace::open(path)? })
    }

    /// Its path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Runs a program in it, which must succeed; its output.
    ///
    /// # Errors
    /// When it fails.
    pub fn run(&self, command: &str) -> Result<String> {
        self.inside.run(|| run(command))?
    }

    /// Connects it with the test's own namespace: the link `name` in it, with the first host address of a network each of IPv4 and IPv6 as its
    /// gateways' neighbour. See [`Wire`].
    ///
    /// # Errors
    /// When the host refuses.
    pub fn connect(&self, name: &str, number: u8) -> Result<Wire> {
        let wire = Wire { host: format!("host{number}"), number };
        run(&format!(
            "ip link add {} mtu {MTU} type veth peer name peer{number} mtu {MTU} address {}",
            wire.host,
            wire.mac()
        ))?;
        run(&format!("ip link set peer{number} netns {} name {name}", self.path.display()))?;
        wire.take_up_host()?;
        for command in wire.commands(name) {
            self.run(&command)?;
        }
        Ok(wire)
    }
}

impl Drop for Namespace {
    fn drop(&mut self) {
        // Both fail only if somebody else has done so.
        let _ = unmount(&self.path, UnmountFlags::DETACH);
        let _ = fs::remove_file(&self.path);
    }
}

/// The MTU of both ends.
pub const MTU: u32 = 1400;

/// A veth pair; `10.9.NUMBER.1` and `fd09:NUMBER::1` are the host's, `.2` and `::2` the container's.
#[derive(Debug)]
pub struct Wire {
    /// The end in the test's own namespace.
    pub host: String,
    number: u8,
}

impl Wire {
    /// The host's address.
    pub fn host_address(&self) -> String {
        format!("10.9.{}.1", self.number)
    }

    /// The host's IPv6 address.
    pub fn host_address6(&self) -> String {
        format!("fd09:{}::1", self.number)
    }

    /// The container's address.
    pub fn address(&self) -> String {
        format!("10.9.{}.2", self.number)
    }

    /// The container's IPv6 address.
    pub fn address6(&self) -> String {
        format!("fd09:{}::2", self.number)
    }

    /// The container's Ethernet address.
    pub fn mac(&self) -> String {
        format!("02:6b:76:00:09:{:02x}", self.number)
    }

    /// One whose other end is still in the test's own namespace, called `peer{number}`.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn loose(number: u8) -> Result<Self> {
        let wire = Self { host: format!("host{number}"), number };
        run(&format!("ip link add {} type veth peer name peer{number} address {}", wire.host, wire.mac()))?;
        wire.take_up_host()?;
        Ok(wire)
    }

    fn take_up_host(&self) -> Result<()> {
        run(&format!("ip link set {} up", self.host))?;
        run(&format!("ip addr add {}/24 dev {}", self.host_address(), self.host))?;
        run(&format!("ip addr add {}/64 dev {} nodad", self.host_address6(), self.host)).map(drop)
    }

    /// What configures the container's end, in its namespace.
    pub fn commands(&self, name: &str) -> Vec<String> {
        let first = self.number == 1;
        let default =
            |family: &str, gateway: String| format!("ip {family} route add default via {gateway} dev {name}");
        let mut commands = vec![
            format!("ip link set {name} up"),
            format!("ip addr add {}/24 dev {name}", self.address()),
            format!("ip addr add {}/64 dev {name} nodad", self.address6()),
        ];
        if first {
            commands.extend([default("-4", self.host_address()), default("-6", self.host_address6())]);
        }
        commands
    }
}

impl Drop for Wire {
    fn drop(&mut self) {
        // It is gone already if the namespace of its other end is.
        let _ = Command::new("ip").args(["link", "del", &self.host]).output();
    }
}

/// Runs a program in the calling thread's namespace, which must succeed; its output.
///
/// # Errors
/// When it fails.
pub fn run(command: &str) -> Result<String> {
    let mut words = command.split_whitespace();
    let program = words.next().context("an empty command")?;
    let output =
        Command::new(program).args(words).output().with_context(|| format!("cannot run {program}"))?;
    ensure!(output.status.success(), "{command}: {}", String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}
