//! What is asked for, checked.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kvrun_agent_api::agent as api;

/// The longest name of an interface in bytes (Linux: `IFNAMSIZ` less its NUL).
const MAX_NAME: usize = 15;

/// A request cannot be met, whatever the guest is like; the text says which of its values is at fault.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct PlanError(String);

/// What a [`api::SetUpNetworkRequest`] asks for.
#[derive(Debug, PartialEq, Eq)]
pub struct Plan {
    pub(super) interfaces: Vec<Interface>,
    pub(super) routes: Vec<Route>,
    pub(super) neighbors: Vec<Neighbor>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) slot: u32,
    pub(super) name: String,
    pub(super) mtu: Option<u32>,
    pub(super) mac: Option<[u8; 6]>,
    pub(super) no_arp: bool,
    pub(super) addresses: Vec<Address>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Address {
    pub(super) prefix: Prefix,
    pub(super) no_route: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Prefix {
    pub(super) address: IpAddr,
    pub(super) length: u8,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) interface: String,
    pub(super) destination: Prefix,
    pub(super) gateway: Option<IpAddr>,
    pub(super) gateway_on_link: bool,
    pub(super) source: Option<IpAddr>,
    pub(super) metric: Option<u32>,
    pub(super) mtu: Option<u32>,
    pub(super) table: Option<u32>,
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Neighbor {
    pub(super) interface: String,
    pub(super) address: IpAddr,
    pub(super) mac: [u8; 6],
}

impl Plan {
    /// Checks a request.
    ///
    /// # Errors
    /// [`PlanError`].
    pub fn parse(request: &api::SetUpNetworkRequest) -> Result<Self, PlanError> {
        let interfaces = request.interfaces.iter().map(interface).collect::<Result<Vec<_>, _>>()?;
        for (at, one) in interfaces.iter().enumerate() {
            if interfaces[..at].iter().any(|other| other.name == one.name || other.slot == one.slot) {
                return Err(PlanError(format!(
                    "interface {:?} of slot {} is there twice",
                    one.name, one.slot
                )));
            }
        }
        Ok(Self {
            interfaces,
            routes: request.routes.iter().map(route).collect::<Result<_, _>>()?,
            neighbors: request.neighbors.iter().map(neighbor).collect::<Result<_, _>>()?,
        })
    }
}

fn interface(interface: &api::Interface) -> Result<Interface, PlanError> {
    Ok(Interface {
        slot: interface.slot,
        name: name(&interface.name)?,
        mtu: not_zero(interface.mtu),
        mac: Some(&interface.mac).filter(|mac| !mac.is_empty()).map(|bytes| mac(bytes)).transpose()?,
        no_arp: interface.no_arp,
        addresses: interface
            .addresses
            .iter()
            .map(|given| Ok(Address { prefix: prefix(given)?, no_route: given.no_route }))
            .collect::<Result<_, _>>()?,
    })
}

fn route(route: &api::Route) -> Result<Route, PlanError> {
    let destination =
        prefix(route.destination.as_ref().ok_or(PlanError("a route goes nowhere".to_owned()))?)?;
    let same_family = |bytes: &Vec<u8>| {
        if bytes.is_empty() {
            return Ok(None);
        }
        let address = ip(bytes)?;
        if address.is_ipv4() != destination.address.is_ipv4() {
            return Err(PlanError(format!("{address} is not of the family of {}", destination.address)));
        }
        Ok(Some(address))
    };
    Ok(Route {
        interface: name(&route.interface)?,
        destination,
        gateway: same_family(&route.gateway)?,
        gateway_on_link: route.gateway_on_link,
        source: same_family(&route.source)?,
        metric: not_zero(route.metric),
        mtu: not_zero(route.mtu),
        table: not_zero(route.table),
    })
}

fn neighbor(neighbor: &api::Neighbor) -> Result<Neighbor, PlanError> {
    Ok(Neighbor {
        interface: name(&neighbor.interface)?,
        address: ip(&neighbor.address)?,
        mac: mac(&neighbor.mac)?,
    })
}

/// Linux 6.12 net/core/dev.c, `dev_valid_name()`; and no `%`, by which the kernel would make a name up.
fn name(name: &str) -> Result<String, PlanError> {
    let bad = |c: char| matches!(c, '/' | ':' | '%') || c.is_whitespace() || c.is_control();
    if name.is_empty() || name.len() > MAX_NAME || [".", ".."].contains(&name) || name.contains(bad) {
        let name: String = name.chars().take(2 * MAX_NAME).collect();
        return Err(PlanError(format!("an interface cannot be called {name:?}")));
    }
    Ok(name.to_owned())
}

fn prefix(prefix: &api::IpPrefix) -> Result<Prefix, PlanError> {
    let address = ip(&prefix.address)?;
    let longest = if address.is_ipv4() { 32 } else { 128 };
    match u8::try_from(prefix.length) {
        Ok(length) if length <= longest => Ok(Prefix { address, length }),
        _ => Err(PlanError(format!("the prefix of {address} cannot have {} bits", prefix.length))),
    }
}

fn ip(bytes: &[u8]) -> Result<IpAddr, PlanError> {
    if let Ok(bytes) = <[u8; 4]>::try_from(bytes) {
        return Ok(Ipv4Addr::from(bytes).into());
    }
    match <[u8; 16]>::try_from(bytes) {
        Ok(bytes) => Ok(Ipv6Addr::from(bytes).into()),
        Err(_) => Err(PlanError(format!("an IP address has 4 or 16 bytes, not {}", bytes.len()))),
    }
}

fn mac(bytes: &[u8]) -> Result<[u8; 6], PlanError> {
    bytes.try_into().map_err(|_| PlanError(format!("an Ethernet address has 6 bytes, not {}", bytes.len())))
}

fn not_zero(value: u32) -> Option<u32> {
    (value != 0).then_some(value)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request() -> api::SetUpNetworkRequest {
        let prefix =
            |address: &[u8], length| api::IpPrefix { address: address.into(), length, ..Default::default() };
        api::SetUpNetworkRequest {
            interfaces: vec![api::Interface {
                slot: 3,
                name: "eth0".to_owned(),
                mtu: 9000,
                mac: vec![2, 0, 0, 0, 0, 1],
                no_arp: true,
                addresses: vec![
                    prefix(&[10, 0, 0, 2], 24),
                    api::IpPrefix { no_route: true, ..prefix(&[0xfd; 16], 64) },
                ],
                ..Default::default()
            }],
            routes: vec![api::Route {
                interface: "eth0".to_owned(),
                destination: Some(prefix(&[0; 4], 0)).into(),
                gateway: vec![10, 0, 0, 1],
                metric: 100,
                ..Default::default()
            }],
            neighbors: vec![api::Neighbor {
                interface: "eth0".to_owned(),
                address: vec![10, 0, 0, 1],
                mac: vec![2, 0, 0, 0, 0, 9],
                ..Default::default()
            }],
            ..Default::default()
        }
    }

    #[test]
    fn everything_asked_for_is_in_the_plan() {
        let plan = Plan::parse(&request()).unwrap();
        let address = IpAddr::from([10, 0, 0, 2]);
        let first = Address { prefix: Prefix { address, length: 24 }, no_route: false };
        let second = Address { prefix: Prefix { address: [0xfd; 16].into(), length: 64 }, no_route: true };
        assert_eq!(plan.interfaces[0].addresses, [first, second]);
        assert!(plan.interfaces[0].no_arp);
        assert_eq!((plan.interfaces[0].mtu, plan.interfaces[0].mac), (Some(9000), Some([2, 0, 0, 0, 0, 1])));
        assert_eq!((plan.routes[0].gateway, plan.routes[0].source), (Some([10, 0, 0, 1].into()), None));
        assert_eq!((plan.routes[0].metric, plan.routes[0].table), (Some(100), None));
        assert_eq!(plan.neighbors[0].mac, [2, 0, 0, 0, 0, 9]);
    }

    #[test]
    fn what_cannot_be_is_refused_by_name() {
        type Change = fn(&mut api::SetUpNetworkRequest);
        let changes: [(Change, &str); 12] = [
            (|r| r.interfaces[0].name.clear(), "cannot be called \"\""),
            (|r| r.interfaces[0].name = "a/b".to_owned(), "cannot be called \"a/b\""),
            (|r| r.interfaces[0].name = "eth%d".to_owned(), "cannot be called"),
            (|r| r.interfaces[0].name = "x".repeat(16), "cannot be called"),
            (|r| r.interfaces[0].mac = vec![1; 5], "6 bytes, not 5"),
            (|r| r.interfaces[0].addresses[0].length = 33, "10.0.0.2 cannot have 33 bits"),
            (|r| r.interfaces[0].addresses[1].length = 300, "cannot have 300 bits"),
            (|r| r.interfaces[0].addresses[0].address = vec![1; 5], "4 or 16 bytes, not 5"),
            (|r| r.interfaces.push(r.interfaces[0].clone()), "\"eth0\" of slot 3 is there twice"),
            (|r| r.routes[0].destination.clear(), "goes nowhere"),
            (|r| r.routes[0].gateway = vec![1; 16], "not of the family of 0.0.0.0"),
            (|r| r.neighbors[0].mac.clear(), "6 bytes, not 0"),
        ];
        for (change, message) in changes {
            let mut request = request();
            change(&mut request);
            let error = Plan::parse(&request).unwrap_err().to_string();
            assert!(error.contains(message), "{error}");
        }
    }
}
