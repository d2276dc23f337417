//! The network of a pod: what its network namespace on the host has is what its guest has.
//!
//! An engine makes a namespace and gives it links, mostly one end of a veth pair, with addresses and routes. For each of them
//! [`Network::update`] makes a tap device beside it and has traffic control hand every packet over, from the link to the tap and back; the
//! guest gets a virtio-net device, carried by the host's kernel where that has vhost-net, with the link's Ethernet address, name, MTU, addresses, routes and neighbours. So for whoever is
//! at the other end, and for the container, nothing is different. The link itself keeps its addresses, by which engines know it, and is
//! heard no more.
//!
//! * [`namespace`] - namespaces, and work in them.
//! * [`scan`] - what is in one.
//! * [`tap`] - tap devices.
//! * [`loopback`] - connections to loopback in the namespace.
//! * [`redirect`] - the traffic control.
//!
//! The engines and the kernel of the host are trusted; what a guest has written is copied, and not looked at.

mod loopback;
mod namespace;
mod redirect;
mod scan;
mod tap;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kvrun_agent_api::agent::SetUpNetworkRequest;
use kvrun_netlink::Netlink;
use kvrun_vmm_api::{DeviceConfig, RateLimit};
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::link::{
    AfSpecInet6, AfSpecUnspec, In6AddrGenMode, LinkAttribute, LinkFlags, LinkMessage,
};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketType, netdevice, socket};

use self::loopback::Loopback;
pub use self::namespace::{Identity, NetworkNamespace, enter_new};
use self::scan::{Link, Lists, Scan};
pub use self::tap::{Tap, open_tap, open_vhost};
use crate::pod::{Pod, PodError, Slots};
use crate::text;

/// How the names of our taps begin.
const TAP_PREFIX: &str = "kvrun";

/// Why a pod cannot have its network.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// The host refuses.
    #[error("cannot {what}")]
    Host {
        /// What was attempted.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The namespace is that of the host.
    #[error(
        "linux.namespaces: {} is the network namespace of the host, in which a guest cannot be; name another one, or leave the path out",
        path.display()
    )]
    OfHost {
        /// As it is named.
        path: PathBuf,
    },
    /// Another machine has the links.
    #[error(
        "the network namespace is that of another container's machine, by its link {link}; a container in the same one must be in the same pod"
    )]
    InUse {
        /// The other machine's tap.
        link: String,
    },
    /// A link that no guest can be on.
    #[error("link {name} of the network namespace {what}; take it down or out of the namespace")]
    Link {
        /// Its name.
        name: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// A route that no guest can have.
    #[error("the route to {to} of the network namespace {what}, which the guest cannot have; remove it")]
    Route {
        /// Its destination.
        to: String,
        /// What is wrong with it.
        what: &'static str,
    },
    /// There is no slot left.
    #[error(
        "link {name} of the network namespace is one too many: the machine has no slot left for it; take it down"
    )]
    TooMany {
        /// The first without a slot.
        name: String,
    },
    /// The machine failed.
    #[error("attach the machine to its network")]
    Pod(#[from] PodError),
}

/// The network of a pod. Dropped, the links of the namespace are as they were before.
#[derive(Debug)]
pub struct Network {
    namespace: NetworkNamespace,
    queue_pairs: u8,
    joined: Vec<Joined>,
    /// What the guest has set up.
    done: SetUpNetworkRequest,
    /// `None` until the machine is on a link, and where the host cannot do it.
    loopback: Option<Loopback>,
}

/// A link that the machine is on.
#[derive(Debug)]
struct Joined {
    slot: u8,
    link: u32,
    tap: u32,
}

/// A device that the machine is to have.
#[derive(Debug)]
struct Device {
    slot: u8,
    config: DeviceConfig,
    /// The tap's queues, and those of vhost-net where the host has it.
    fds: Vec<OwnedFd>,
}

impl Network {
    /// That of a namespace, for a machine with so many vCPUs. Nothing is joined yet.
    pub fn new(namespace: NetworkNamespace, vcpus: u8) -> Self {
        let queue_pairs = vcpus.clamp(1, kvrun_vmm_api::config::MAX_NET_QUEUE_PAIRS);
        Self {
            namespace,
            queue_pairs,
            joined: Vec::new(),
            done: SetUpNetworkRequest::default(),
            loopback: None,
        }
    }

    /// Whether it is that of a namespace.
    ///
    /// # Errors
    /// As fstat(2).
    pub fn is_of(&self, namespace: &NetworkNamespace) -> io::Result<bool> {
        Ok(self.namespace.identity()? == namespace.identity()?)
    }

    /// Gives the machine the links of the namespace that it does not have yet, and the addresses and routes of all. Engines configure a namespace
    /// before a container is created, while it is, or before it is started.
    ///
    /// # Errors
    /// [`NetworkError`].
    pub async fn update(&mut self, pod: &Pod) -> Result<(), NetworkError> {
        let Self { namespace, queue_pairs, joined, done, loopback } = self;
        let (scan, devices) = namespace
            .run(|| join(joined, *queue_pairs, &pod.slots))
            .map_err(host(|| "enter the network namespace".to_owned()))??;
        for device in devices {
            let fds: Vec<BorrowedFd<'_>> = device.fds.iter().map(AsFd::as_fd).collect();
            pod.vmm().attach(device.slot, device.config, &fds).await.map_err(PodError::from)?;
            pod.or_death(pod.agent().bind_slot(device.slot)).await?;
        }
        // Mostly all is there the first time, and nothing has changed the second.
        let request = request(scan, joined);
        if request != *done {
            pod.or_death(pod.agent().set_up_network(&request)).await?;
            *done = request;
        }
        if !joined.is_empty() && loopback.is_none() {
            match Loopback::lead_to(pod, namespace) {
                Ok(made) => *loopback = Some(made),
                // Most pods are never asked for it.
                Err(error) => tracing::warn!(error = %text::chain(&error), "there is no port-forwarding"),
            }
        }
        Ok(())
    }
}

impl Drop for Network {
    fn drop(&mut self) {
        // The taps are gone with the machine.
        let links: Vec<u32> = self.joined.iter().map(|joined| joined.link).collect();
        if links.is_empty() {
            return;
        }
        let released = self.namespace.run(|| -> io::Result<()> {
            let mut netlink = Netlink::open()?;
            links.iter().try_for_each(|link| redirect::remove(&mut netlink, *link).map(drop))
        });
        if let Err(error) = released.and_then(|inner| inner) {
            tracing::warn!(%error, "give the links of the network namespace back");
        }
    }
}

/// Gives the links of the namespace at a path back that a machine had which was killed with its engine. Not if another one has them meanwhile;
/// and if the namespace is gone, so are they.
///
/// # Errors
/// [`NetworkError`].
pub fn release(path: &Path) -> Result<(), NetworkError> {
    let Ok(namespace) = NetworkNamespace::open(path) else { return Ok(()) };
    let release = || -> Result<(), NetworkError> {
        let (mut netlink, lists) = look()?;
        let scan = match Scan::of(&lists, &[]) {
            Ok(scan) => scan,
            Err(NetworkError::InUse { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        for Link { index, name, .. } in scan.links {
            redirect::remove(&mut netlink, index).map_err(host(|| format!("give the link {name} back")))?;
        }
        Ok(())
    };
    namespace.run(release).map_err(host(|| "enter the network namespace".to_owned()))?
}

/// The names of the links of a namespace that a guest could be on.
///
/// # Errors
/// [`NetworkError`].
pub fn links(namespace: &NetworkNamespace) -> Result<Vec<String>, NetworkError> {
    let scan = namespace.run(|| Scan::of(&look()?.1, &[]));
    let scan = scan.map_err(host(|| "enter the network namespace".to_owned()))??;
    Ok(scan.links.into_iter().map(|link| link.name).collect())
}

/// What the calling thread's namespace has.
fn look() -> Result<(Netlink, Lists), NetworkError> {
    let looked = Netlink::open().and_then(|mut netlink| Ok((Lists::read(&mut netlink)?, netlink)));
    let (lists, netlink) = looked.map_err(host(|| "read the network namespace".to_owned()))?;
    Ok((netlink, lists))
}

/// Joins a tap to each link of the calling thread's namespace that is not in `joined` yet.
fn join(
    joined: &mut Vec<Joined>,
    queue_pairs: u8,
    slots: &Slots,
) -> Result<(Scan, Vec<Device>), NetworkError> {
    let (mut netlink, lists) = look()?;
    let taps: Vec<u32> = joined.iter().map(|joined| joined.tap).collect();
    let scan = Scan::of(&lists, &taps)?;
    let mut devices = Vec::new();
    for Link { index: link, mac, mtu, name, .. } in &scan.links {
        if joined.iter().any(|joined| joined.link == *link) {
            continue;
        }
        let make = || -> io::Result<(Tap, u32)> {
            let tap = open_tap(&format!("{TAP_PREFIX}%d"), queue_pairs)?;
            let socket = socket(AddressFamily::INET, SocketType::DGRAM, None)?;
            let index = netdevice::name_to_index(&socket, &tap.name)?;
            Ok((tap, index))
        };
        let (tap, index) = make().map_err(host(|| format!("make a tap device for the link {name}")))?;
        // It stays taken if the rest fails: with it, the machine does.
        let slot = slots.take().ok_or_else(|| NetworkError::TooMany { name: name.clone() })?;
        // From here on there may be something to undo.
        joined.push(Joined { slot, link: *link, tap: index });
        take_up(&mut netlink, index, *mtu)
            .and_then(|()| redirect::make(&mut netlink, *link, index))
            .and_then(|()| redirect::make(&mut netlink, index, *link))
            .map_err(host(|| format!("join a tap device to the link {name}")))?;
        let unlimited = RateLimit::default();
        let config =
            DeviceConfig::Net { mac: *mac, mtu: *mtu, queue_pairs, rx_limit: unlimited, tx_limit: unlimited };
        let mut fds = tap.queues;
        match open_vhost(queue_pairs) {
            Ok(vhost) => fds.extend(vhost),
            // The VMM carries the packets then, and does it about as fast.
            Err(error) => tracing::debug!(%error, "open /dev/vhost-net"),
        }
        devices.push(Device { slot, config, fds });
    }
    Ok((scan, devices))
}

/// Takes a tap up, without addresses: nobody on the host speaks over it.
fn take_up(netlink: &mut Netlink, tap: u32, mtu: u16) -> io::Result<()> {
    let mut message = LinkMessage::default();
    message.header.index = tap;
    let mut silent = message.clone();
    silent.attributes =
        vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![AfSpecInet6::AddrGenMode(
            In6AddrGenMode::None,
        )])])];
    match netlink.change(RouteNetlinkMessage::SetLink(silent), 0) {
        // No IPv6 on this host, or none with so small an MTU.
        Err(error) if error.raw_os_error() == Some(Errno::AFNOSUPPORT.raw_os_error()) => {}
        result => result?,
    }
    message.header.flags = LinkFlags::Up;
    message.header.change_mask = LinkFlags::Up;
    message.attributes = vec![LinkAttribute::Mtu(mtu.into())];
    netlink.change(RouteNetlinkMessage::SetLink(message), 0)
}

/// What the guest is to set up.
fn request(scan: Scan, joined: &[Joined]) -> SetUpNetworkRequest {
    let slot_of =
        |link: &Link| joined.iter().find(|joined| joined.link == link.index).map(|joined| joined.slot);
    let interfaces = scan.links.iter().filter_map(|link| Some(link.interface(slot_of(link)?))).collect();
    SetUpNetworkRequest { interfaces, routes: scan.routes, neighbors: scan.neighbors, ..Default::default() }
}

fn host(what: impl FnOnce() -> String) -> impl FnOnce(io::Error) -> NetworkError {
    move |source| NetworkError::Host { what: what(), source }
}

#[cfg(test)]
mod tests;
