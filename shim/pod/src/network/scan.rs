//! What a network namespace has, as the guest is to have it.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kvrun_agent_api::agent as api;
use kvrun_netlink::Netlink;
use kvrun_vmm_api::config::{MAX_NET_MTU, MIN_NET_MTU};
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{
    InfoData, InfoIpVlan, InfoKind, IpVlanMode, LinkAttribute, LinkFlags, LinkInfo, LinkLayerType,
    LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol,
    RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};

use super::{NetworkError, TAP_PREFIX};

/// What a namespace has.
#[derive(Debug, Default)]
pub(super) struct Scan {
    /// Links that are up, except loopback.
    pub(super) links: Vec<Link>,
    /// Routes over these links, each after those it needs.
    pub(super) routes: Vec<api::Route>,
    /// Neighbours on these links that somebody has written down.
    pub(super) neighbors: Vec<api::Neighbor>,
}

/// A link.
#[derive(Debug)]
pub(super) struct Link {
    /// Its number in the namespace.
    pub(super) index: u32,
    /// Its Ethernet address.
    pub(super) mac: [u8; 6],
    /// Its MTU in bytes.
    pub(super) mtu: u16,
    /// Whether nobody on it answers to ARP, as on an ipvlan link in mode l3.
    pub(super) no_arp: bool,
    /// Its name and addresses.
    pub(super) name: String,
    pub(super) addresses: Vec<Address>,
}

/// An address of a link.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) ip: IpAddr,
    /// How many bits its network has.
    pub(super) bits: u8,
    /// Whether there is the route to its network over the link that the kernel makes unless it is told not to. CNI's plugin ptp removes it: the
    /// others of the network are behind the gateway.
    pub(super) has_route: bool,
}

/// The lists of the kernel from which a [`Scan`] is made.
#[derive(Debug, Default)]
pub(super) struct Lists {
    pub(super) links: Vec<LinkMessage>,
    pub(super) addresses: Vec<AddressMessage>,
    pub(super) routes: Vec<RouteMessage>,
    pub(super) neighbors: Vec<NeighbourMessage>,
}

impl Lists {
    /// Those of a namespace.
    pub(super) fn read(netlink: &mut Netlink) -> io::Result<Self> {
        let mut lists = Self::default();
        let mut asked = vec![
            RouteNetlinkMessage::GetLink(LinkMessage::default()),
            RouteNetlinkMessage::GetAddress(AddressMessage::default()),
        ];
        for family in [AddressFamily::Inet, AddressFamily::Inet6] {
            let (mut route, mut neighbor) = (RouteMessage::default(), NeighbourMessage::default());
            route.header.address_family = family;
            neighbor.header.family = family;
            asked.extend([RouteNetlinkMessage::GetRoute(route), RouteNetlinkMessage::GetNeighbour(neighbor)]);
        }
        for message in asked {
            for answer in netlink.list(&message)? {
                match answer {
                    RouteNetlinkMessage::NewLink(link) => lists.links.push(link),
                    RouteNetlinkMessage::NewAddress(address) => lists.addresses.push(address),
                    RouteNetlinkMessage::NewRoute(route) => lists.routes.push(route),
                    RouteNetlinkMessage::NewNeighbour(neighbor) => lists.neighbors.push(neighbor),
                    _ => {}
                }
            }
        }
        Ok(lists)
    }
}

impl Scan {
    /// What there is for a machine whose taps are `ours`.
    ///
    /// # Errors
    /// [`NetworkError`] if the namespace has what a guest cannot have.
    pub(super) fn of(lists: &Lists, ours: &[u32]) -> Result<Self, NetworkError> {
        let mut scan = Self::default();
        for message in lists.links.iter().filter(|link| !ours.contains(&link.header.index)) {
            if let Some(mut link) = link(message)? {
                let on_link = lists.addresses.iter().filter(|address| address.header.index == link.index);
                link.addresses = on_link.filter_map(address).collect();
                for address in &mut link.addresses {
                    address.has_route = lists.routes.iter().any(|route| is_of(route, link.index, address));
                }
                scan.links.push(link);
            }
        }
        for message in &lists.routes {
            scan.routes.extend(scan.route(message)?);
        }
        // What is on the link first: a gateway is.
        scan.routes.sort_by_key(|route| !route.gateway.is_empty());
        scan.neighbors = lists.neighbors.iter().filter_map(|message| scan.neighbor(message)).collect();
        Ok(scan)
    }

    fn link(&self, index: u32) -> Option<&Link> {
        self.links.iter().find(|link| link.index == index)
    }

    /// A route the guest is to have; `None` for one of another table, one over a link it does not have, and one its kernel makes by itself.
    fn route(&self, message: &RouteMessage) -> Result<Option<api::Route>, NetworkError> {
        let header = &message.header;
        let mut table = u32::from(header.table);
        let (mut link, mut multipath, mut via) = (None, false, false);
        let zero = match header.address_family {
            AddressFamily::Inet => IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            AddressFamily::Inet6 => IpAddr::V6(Ipv6Addr::UNSPECIFIED),
            _ => return Ok(None),
        };
        let mut destination = zero;
        let mut route = api::Route::new();
        for attribute in &message.attributes {
            match attribute {
                RouteAttribute::Table(number) => table = *number,
                RouteAttribute::Oif(index) => link = self.link(*index),
                RouteAttribute::Destination(address) => destination = ip(address).unwrap_or(zero),
                RouteAttribute::Gateway(address) => {
                    route.gateway = ip(address).map(octets).unwrap_or_default();
                }
                RouteAttribute::PrefSource(address) => {
                    route.source = ip(address).map(octets).unwrap_or_default();
                }
                RouteAttribute::Priority(metric) => route.metric = *metric,
                RouteAttribute::Metrics(metrics) => {
                    let mtu = metrics.iter().find_map(|metric| match metric {
                        RouteMetric::Mtu(mtu) => Some(*mtu),
                        _ => None,
                    });
                    route.mtu = mtu.unwrap_or(0);
                }
                RouteAttribute::MultiPath(_) => multipath = true,
                RouteAttribute::Via(_) => via = true,
                _ => {}
            }
        }
        if table != u32::from(RouteHeader::RT_TABLE_MAIN) || header.kind != RouteType::Unicast {
            return Ok(None);
        }
        let refused = |what| {
            Err(NetworkError::Route {
                to: format!("{destination}/{}", header.destination_prefix_length),
                what,
            })
        };
        if multipath {
            return refused("has several next hops");
        }
        let Some(link) = link else { return Ok(None) };
        if via {
            return refused("has a gateway of the other family");
        }
        let length = header.destination_prefix_length;
        if header.protocol == RouteProtocol::Kernel && link.implies(destination, length) {
            return Ok(None);
        }
        route.interface = link.name.clone();
        route.destination = Some(prefix(destination, length)).into();
        route.gateway_on_link = header.flags.contains(RouteFlags::Onlink);
        Ok(Some(route))
    }

    fn neighbor(&self, message: &NeighbourMessage) -> Option<api::Neighbor> {
        let link = self.link(message.header.ifindex)?;
        if message.header.state != NeighbourState::Permanent {
            return None;
        }
        let mut neighbor = api::Neighbor { interface: link.name.clone(), ..Default::default() };
        for attribute in &message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(address)) => {
                    neighbor.address = octets((*address).into());
                }
                NeighbourAttribute::Destination(NeighbourAddress::Inet6(address)) => {
                    neighbor.address = octets((*address).into());
                }
                NeighbourAttribute::LinkLayerAddress(mac) => neighbor.mac = mac.clone(),
                _ => {}
            }
        }
        (neighbor.mac.len() == 6 && !neighbor.address.is_empty()).then_some(neighbor)
    }
}

impl Link {
    /// For the agent, with the slot in which the link's device is.
    pub(super) fn interface(&self, slot: u8) -> api::Interface {
        api::Interface {
            slot: slot.into(),
            name: self.name.clone(),
            mtu: self.mtu.into(),
            mac: self.mac.to_vec(),
            no_arp: self.no_arp,
            addresses: self.addresses.iter().map(Address::prefix).collect(),
            ..Default::default()
        }
    }

    /// Whether a kernel makes the route by itself when it is given the addresses.
    fn implies(&self, destination: IpAddr, length: u8) -> bool {
        let link_local = matches!(destination, IpAddr::V6(address) if address.is_unicast_link_local());
        link_local || self.addresses.iter().any(|address| address.is_in(destination, length))
    }
}

impl Address {
    /// Whether its network is this one.
    fn is_in(&self, destination: IpAddr, length: u8) -> bool {
        self.bits == length
            && network(self.ip, self.bits) == network(destination, length)
            && self.ip.is_ipv4() == destination.is_ipv4()
    }

    fn prefix(&self) -> api::IpPrefix {
        api::IpPrefix { no_route: !self.has_route, ..prefix(self.ip, self.bits) }
    }
}

/// Whether a route is the one to the network of an address that the kernel has made.
fn is_of(route: &RouteMessage, link: u32, address: &Address) -> bool {
    let by_link = route.attributes.contains(&RouteAttribute::Oif(link));
    let to = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Destination(to) => ip(to),
        _ => None,
    });
    by_link
        && route.header.kind == RouteType::Unicast
        && route.header.protocol == RouteProtocol::Kernel
        && to.is_some_and(|to| address.is_in(to, route.header.destination_prefix_length))
}

/// A link that the guest is to be on; `None` for loopback, for one that is down and for one that is part of another.
fn link(message: &LinkMessage) -> Result<Option<Link>, NetworkError> {
    let header = &message.header;
    let (mut name, mut mac, mut mtu, mut part) = (String::new(), Vec::new(), 0, false);
    let (mut tun, mut l3s) = (false, false);
    for attribute in &message.attributes {
        match attribute {
            LinkAttribute::IfName(text) => name.clone_from(text),
            LinkAttribute::Address(bytes) => mac.clone_from(bytes),
            LinkAttribute::Mtu(bytes) => mtu = *bytes,
            LinkAttribute::Controller(index) => part = *index != 0,
            LinkAttribute::LinkInfo(infos) => {
                tun |= infos.contains(&LinkInfo::Kind(InfoKind::Tun));
                l3s |= infos.iter().any(is_l3s);
            }
            _ => {}
        }
    }
    if tun && name.starts_with(TAP_PREFIX) {
        return Err(NetworkError::InUse { link: name });
    }
    if header.flags.contains(LinkFlags::Loopback) || !header.flags.contains(LinkFlags::Up) || part {
        return Ok(None);
    }
    let refused = |what| NetworkError::Link { name: name.clone(), what };
    let (LinkLayerType::Ether, Ok(mac)) = (header.link_layer_type, <[u8; 6]>::try_from(mac)) else {
        return Err(refused("is not an Ethernet link"));
    };
    if l3s {
        return Err(refused(
            "is an ipvlan link in mode l3s, which traffic control does not see; use l2 or l3",
        ));
    }
    let fits = |mtu: &u16| (MIN_NET_MTU..=MAX_NET_MTU).contains(mtu);
    let mtu = u16::try_from(mtu)
        .ok()
        .filter(fits)
        .ok_or_else(|| refused("has an MTU that virtio-net cannot have"))?;
    let no_arp = header.flags.contains(LinkFlags::Noarp);
    Ok(Some(Link { index: header.index, mac, mtu, no_arp, name, addresses: Vec::new() }))
}

/// Linux 6.12 drivers/net/ipvlan/ipvlan_l3s.c: what arrives is handed over behind the link's hook for traffic control.
fn is_l3s(info: &LinkInfo) -> bool {
    let LinkInfo::Data(InfoData::IpVlan(data)) = info else { return false };
    data.contains(&InfoIpVlan::Mode(IpVlanMode::L3S))
}

/// An address, whose route is still to be looked for; `None` for one that somebody else was found to have.
fn address(message: &AddressMessage) -> Option<Address> {
    if message.header.flags.contains(AddressHeaderFlags::Dadfailed) {
        return None;
    }
    // rtnetlink(7): where they differ, IFA_ADDRESS is the peer's.
    let local = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Local(address) => Some(*address),
        _ => None,
    });
    let any = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Address(address) => Some(*address),
        _ => None,
    });
    local.or(any).map(|ip| Address { ip, bits: message.header.prefix_len, has_route: false })
}

fn ip(address: &RouteAddress) -> Option<IpAddr> {
    match address {
        RouteAddress::Inet(address) => Some((*address).into()),
        RouteAddress::Inet6(address) => Some((*address).into()),
        _ => None,
    }
}

fn prefix(address: IpAddr, length: u8) -> api::IpPrefix {
    api::IpPrefix { address: octets(address), length: length.into(), ..Default::default() }
}

fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// The address's first bits, the others 0.
fn network(address: IpAddr, bits: u8) -> u128 {
    let (value, width) = match address {
        IpAddr::V4(address) => (u128::from(u32::from(address)) << 96, 32),
        IpAddr::V6(address) => (u128::from(address), 128),
    };
    let bits = u32::from(bits.min(width));
    if bits == 0 { 0 } else { value >> (128 - bits) << (128 - bits) }
}
