//! Network links of the guest: names, addresses, routes, neighbours, as the engine wants them.
//!
//! [`plan`] checks what is asked for, this file has the kernel do it by way of [`Netlink`].

pub mod plan;

use std::io;
use std::net::IpAddr;

use kvrun_netlink::Netlink;
use netlink_packet_core::{NLM_F_CREATE, NLM_F_REPLACE};
use netlink_packet_route::address::{AddressAttribute, AddressFlags, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};
use netlink_packet_route::{AddressFamily, RouteNetlinkMessage};
use rustix::net::{SocketType, netdevice, socket};

use self::plan::{Address, Interface, Neighbor, Plan, Prefix, Route};
use crate::slots::{SlotError, Slots};

/// Why the network could not be set up.
#[derive(Debug, thiserror::Error)]
pub enum NetworkError {
    /// There is no such slot.
    #[error(transparent)]
    Slot(#[from] SlotError),
    /// The device in the slot is not a bound network device.
    #[error("slot {0} has no network interface")]
    NoInterface(u32),
    /// The kernel refuses.
    #[error("cannot {what}")]
    Refused {
        /// What was attempted.
        what: String,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

/// Has the kernel do what is planned.
///
/// # Errors
/// [`NetworkError`]; what comes before the refused part is done.
pub fn set_up(slots: &Slots, plan: &Plan) -> Result<(), NetworkError> {
    let open = |source| NetworkError::Refused { what: "speak with the kernel's network".to_owned(), source };
    let mut netlink = Netlink::open().map_err(open)?;
    let mut links = Vec::new();
    for interface in &plan.interfaces {
        let now = slots.interface(interface.slot)?.ok_or(NetworkError::NoInterface(interface.slot))?;
        links.push((interface, index(&now)?, now));
    }
    // The kernel calls them as they come, so one may have the name another is to get: first all let go of their names.
    for (interface, index, now) in &links {
        if *now != interface.name {
            rename(&mut netlink, *index, now, &format!("slot{}", interface.slot))?;
        }
    }
    for (interface, index, now) in &links {
        if *now != interface.name {
            rename(&mut netlink, *index, now, &interface.name)?;
        }
        set_link(&mut netlink, *index, interface)?;
    }
    for route in &plan.routes {
        let message = route_message(route, index(&route.interface)?);
        let Prefix { address, length } = route.destination;
        let what = || format!("make the route to {address}/{length} by {}", route.interface);
        request(&mut netlink, RouteNetlinkMessage::NewRoute(message), what)?;
    }
    for neighbor in &plan.neighbors {
        let message = neighbor_message(neighbor, index(&neighbor.interface)?);
        let what = || format!("make {} a neighbour on {}", neighbor.address, neighbor.interface);
        request(&mut netlink, RouteNetlinkMessage::NewNeighbour(message), what)?;
    }
    Ok(())
}

fn request(
    netlink: &mut Netlink,
    message: RouteNetlinkMessage,
    what: impl FnOnce() -> String,
) -> Result<(), NetworkError> {
    // Made, or changed to be like it. A link is only ever changed.
    let make = match message {
        RouteNetlinkMessage::SetLink(_) => 0,
        _ => NLM_F_CREATE | NLM_F_REPLACE,
    };
    netlink.change(message, make).map_err(|source| NetworkError::Refused { what: what(), source })
}

/// The number of an interface.
fn index(name: &str) -> Result<u32, NetworkError> {
    socket(rustix::net::AddressFamily::INET, SocketType::DGRAM, None)
        .and_then(|socket| netdevice::name_to_index(&socket, name))
        .map_err(|e| NetworkError::Refused { what: format!("find the interface {name}"), source: e.into() })
}

/// Calls an interface by another name; that takes it down.
fn rename(netlink: &mut Netlink, index: u32, now: &str, name: &str) -> Result<(), NetworkError> {
    let what = || format!("call the interface {now} {name}");
    let mut message = link_message(index, LinkFlags::empty());
    request(netlink, RouteNetlinkMessage::SetLink(message.clone()), what)?;
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    request(netlink, RouteNetlinkMessage::SetLink(message), what)
}

/// Gives an interface everything but its name, and takes it up.
fn set_link(netlink: &mut Netlink, index: u32, interface: &Interface) -> Result<(), NetworkError> {
    let name = &interface.name;
    let mut message = link_message(index, LinkFlags::Up);
    message.header.change_mask |= LinkFlags::Noarp;
    if interface.no_arp {
        message.header.flags |= LinkFlags::Noarp;
    }
    message.attributes.extend(interface.mtu.map(LinkAttribute::Mtu));
    message.attributes.extend(interface.mac.map(|mac| LinkAttribute::Address(mac.to_vec())));
    request(netlink, RouteNetlinkMessage::SetLink(message), || format!("take the interface {name} up"))?;
    for given in &interface.addresses {
        let message = address_message(given, index);
        let Prefix { address, length } = given.prefix;
        let what = || format!("give the interface {name} the address {address}/{length}");
        request(netlink, RouteNetlinkMessage::NewAddress(message), what)?;
    }
    Ok(())
}

fn link_message(index: u32, flags: LinkFlags) -> LinkMessage {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = flags;
    message.header.change_mask = LinkFlags::Up;
    message
}

fn address_message(given: &Address, index: u32) -> AddressMessage {
    let Address { prefix, no_route } = given;
    let mut message = AddressMessage::default();
    message.header.family = family(prefix.address);
    message.header.prefix_len = prefix.length;
    message.header.index = index;
    if prefix.address.is_ipv6() {
        // The host has made sure that nobody else has it; asking would keep it from use for a second.
        message.header.flags = AddressHeaderFlags::Nodad;
    }
    message.attributes =
        vec![AddressAttribute::Address(prefix.address), AddressAttribute::Local(prefix.address)];
    if *no_route {
        // Instead of those in the header, for which this one is too large.
        let flags = u32::from(message.header.flags.bits()) | AddressFlags::Noprefixroute.bits();
        message.attributes.push(AddressAttribute::Flags(AddressFlags::from_bits_retain(flags)));
    }
    message
}

fn route_message(route: &Route, index: u32) -> RouteMessage {
    let mut message = RouteMessage::default();
    let header = &mut message.header;
    header.address_family = family(route.destination.address);
    header.destination_prefix_length = route.destination.length;
    // A table beyond 255 is named by its attribute only.
    header.table = RouteHeader::RT_TABLE_MAIN;
    header.protocol = RouteProtocol::Static;
    header.kind = RouteType::Unicast;
    header.scope = if route.gateway.is_some() { RouteScope::Universe } else { RouteScope::Link };
    if route.gateway_on_link {
        header.flags = RouteFlags::Onlink;
    }
    let attributes = &mut message.attributes;
    attributes.push(RouteAttribute::Oif(index));
    if route.destination.length > 0 {
        attributes.push(RouteAttribute::Destination(route.destination.address.into()));
    }
    attributes.extend(route.gateway.map(|gateway| RouteAttribute::Gateway(gateway.into())));
    attributes.extend(route.source.map(|source| RouteAttribute::PrefSource(source.into())));
    attributes.extend(route.metric.map(RouteAttribute::Priority));
    attributes.extend(route.mtu.map(|mtu| RouteAttribute::Metrics(vec![RouteMetric::Mtu(mtu)])));
    attributes.extend(route.table.map(RouteAttribute::Table));
    message
}

fn neighbor_message(neighbor: &Neighbor, index: u32) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = family(neighbor.address);
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.header.kind = RouteType::Unicast;
    let address = match neighbor.address {
        IpAddr::V4(address) => NeighbourAddress::Inet(address),
        IpAddr::V6(address) => NeighbourAddress::Inet6(address),
    };
    message.attributes = vec![
        NeighbourAttribute::Destination(address),
        NeighbourAttribute::LinkLayerAddress(neighbor.mac.to_vec()),
    ];
    message
}

fn family(address: IpAddr) -> AddressFamily {
    if address.is_ipv4() { AddressFamily::Inet } else { AddressFamily::Inet6 }
}

#[cfg(test)]
mod tests;
