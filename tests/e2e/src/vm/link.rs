//! A network link between the test's own network namespace and a machine.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use kvrun_agent_api::agent::{Interface, IpPrefix, Neighbor, Route, SetUpNetworkRequest};
use kvrun_pod::network::{open_tap, open_vhost};
use kvrun_vmm_api::{DeviceConfig, RateLimit};

use super::Machine;

/// The guest's Ethernet address.
pub const GUEST_MAC: [u8; 6] = [0x02, 0x6b, 0x76, 0, 0, 2];
/// That of the host.
const HOST_MAC: [u8; 6] = [0x02, 0x6b, 0x76, 0, 0, 1];
/// The host's addresses.
pub const HOST: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(10, 1, 0, 1), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 1));
/// The guest's.
pub const GUEST: (Ipv4Addr, Ipv6Addr) =
    (Ipv4Addr::new(10, 1, 0, 2), Ipv6Addr::new(0xfd00, 0, 0, 0, 0, 0, 0, 2));
/// The guest's name of it.
pub const NAME: &str = "pod0";

/// A tap that is up and has the host's addresses; gone when dropped and detached.
#[derive(Debug)]
pub struct Link {
    fds: Vec<OwnedFd>,
    /// As it is attached.
    pub config: DeviceConfig,
    mtu: u16,
}

impl Link {
    /// A link that the VMM carries.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn new(mtu: u16, queue_pairs: u8) -> Result<Self> {
        let unlimited = RateLimit::default();
        let fds = open_tap("tap0", queue_pairs).context("cannot make a tap")?.queues;
        let mac = HOST_MAC.map(|byte| format!("{byte:02x}")).join(":");
        let (v4, v6) = HOST;
        for command in [
            format!("link set tap0 address {mac} mtu {mtu} up"),
            format!("addr add {v4}/24 dev tap0"),
            format!("-6 addr add {v6}/64 dev tap0 nodad"),
        ] {
            let output = Command::new("ip").args(command.split(' ')).output().context("cannot run ip")?;
            ensure!(output.status.success(), "ip {command}: {}", String::from_utf8_lossy(&output.stderr));
        }
        let config =
            DeviceConfig::Net { mac: GUEST_MAC, mtu, queue_pairs, rx_limit: unlimited, tx_limit: unlimited };
        Ok(Self { fds, config, mtu })
    }

    /// A link that the host's kernel carries.
    ///
    /// # Errors
    /// When the host refuses, or has no vhost-net.
    pub fn with_vhost(mtu: u16, queue_pairs: u8) -> Result<Self> {
        let mut link = Self::new(mtu, queue_pairs)?;
        link.fds.extend(open_vhost(queue_pairs).context("cannot open vhost-net")?);
        Ok(link)
    }

    /// Attaches the link and has the guest set it up, with a route and a neighbour.
    ///
    /// # Errors
    /// When the VMM or the guest refuses.
    pub fn attach(&self, vm: &Machine, slot: u8) -> Result<()> {
        let fds: Vec<BorrowedFd<'_>> = self.fds.iter().map(AsFd::as_fd).collect();
        vm.attach(slot, self.config.clone(), &fds)?;
        self.set_up(vm, slot)
    }

    /// Has the guest set up the link in a slot.
    ///
    /// # Errors
    /// When the guest refuses.
    pub fn set_up(&self, vm: &Machine, slot: u8) -> Result<()> {
        let request = self.request(slot);
        vm.block_on(vm.pod().agent().set_up_network(&request)).context("the guest's network")
    }

    fn request(&self, slot: u8) -> SetUpNetworkRequest {
        let default = |address: IpAddr, gateway: IpAddr| Route {
            interface: NAME.to_owned(),
            destination: Some(prefix(address, 0)).into(),
            gateway: octets(gateway),
            ..Default::default()
        };
        SetUpNetworkRequest {
            interfaces: vec![Interface {
                slot: slot.into(),
                name: NAME.to_owned(),
                mtu: self.mtu.into(),
                addresses: vec![prefix(GUEST.0.into(), 24), prefix(GUEST.1.into(), 64)],
                ..Default::default()
            }],
            routes: vec![
                default(Ipv4Addr::UNSPECIFIED.into(), HOST.0.into()),
                default(Ipv6Addr::UNSPECIFIED.into(), HOST.1.into()),
            ],
            neighbors: vec![Neighbor {
                interface: NAME.to_owned(),
                address: octets(HOST.0.into()),
                mac: HOST_MAC.to_vec(),
                ..Default::default()
            }],
            ..Default::default()
        }
    }
}

fn prefix(address: IpAddr, length: u32) -> IpPrefix {
    IpPrefix { address: octets(address), length, ..Default::default() }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}
