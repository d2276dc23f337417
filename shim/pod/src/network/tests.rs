//! With the host's kernel, in a network namespace of the test's thread, where taps of the test stand for an engine's links. Root only. (What
//! traffic control does is tested end to end: not every kernel on which this is built has it.)

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use kvrun_agent_api::agent as api;
use netlink_packet_core::NLM_F_CREATE;
use netlink_packet_route::address::{AddressAttribute, AddressHeaderFlags, AddressMessage};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{
    RouteAttribute, RouteFlags, RouteHeader, RouteMessage, RouteMetric, RouteProtocol, RouteScope, RouteType,
};

use super::scan::Address;
use super::*;

const MAC: [u8; 6] = [0x02, 0x6b, 0x76, 0, 0, 7];

/// A namespace with links that are up.
struct Bench {
    netlink: Netlink,
    taps: Vec<(u32, Tap)>,
}

impl Bench {
    fn new(links: &[&str]) -> Self {
        enter_new().expect("this test needs root");
        let mut netlink = Netlink::open().unwrap();
        let taps = links.iter().map(|name| {
            let tap = open_tap(name, 1).unwrap();
            let socket = socket(AddressFamily::INET, SocketType::DGRAM, None).unwrap();
            (netdevice::name_to_index(&socket, &tap.name).unwrap(), tap)
        });
        let taps: Vec<_> = taps.collect();
        for (index, _) in &taps {
            let mut message = LinkMessage::default();
            message.header.index = *index;
            message.attributes.push(LinkAttribute::Address(MAC.to_vec()));
            netlink.change(RouteNetlinkMessage::SetLink(message), 0).unwrap();
            take_up(&mut netlink, *index, 1400).unwrap();
        }
        Self { netlink, taps }
    }

    fn make(&mut self, message: RouteNetlinkMessage) {
        self.netlink.change(message, NLM_F_CREATE).unwrap();
    }

    fn give_address(&mut self, link: usize, local: &str, peer: &str, length: u8) {
        let (local, peer): (IpAddr, IpAddr) = (local.parse().unwrap(), peer.parse().unwrap());
        let mut message = AddressMessage::default();
        message.header.family = family(local);
        message.header.prefix_len = length;
        message.header.index = self.taps[link].0;
        message.header.flags = AddressHeaderFlags::Nodad;
        message.attributes = vec![AddressAttribute::Local(local), AddressAttribute::Address(peer)];
        self.make(RouteNetlinkMessage::NewAddress(message));
    }

    fn route(&self, link: usize, to: &str, length: u8, more: &[RouteAttribute]) -> RouteMessage {
        let to: IpAddr = to.parse().unwrap();
        let mut message = RouteMessage::default();
        message.header.address_family = family(to);
        message.header.destination_prefix_length = length;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.protocol = RouteProtocol::Static;
        message.header.kind = RouteType::Unicast;
        message.header.scope = RouteScope::Universe;
        message.attributes = vec![RouteAttribute::Oif(self.taps[link].0)];
        if length > 0 {
            message.attributes.push(RouteAttribute::Destination(to.into()));
        }
        message.attributes.extend_from_slice(more);
        message
    }

    fn scan(&mut self) -> Result<Scan, NetworkError> {
        Scan::of(&Lists::read(&mut self.netlink).unwrap(), &[])
    }
}

fn family(address: IpAddr) -> netlink_packet_route::AddressFamily {
    match address {
        IpAddr::V4(_) => netlink_packet_route::AddressFamily::Inet,
        IpAddr::V6(_) => netlink_packet_route::AddressFamily::Inet6,
    }
}

fn gateway(address: &str) -> RouteAttribute {
    RouteAttribute::Gateway(address.parse::<IpAddr>().unwrap().into())
}

/// Interface, destination, gateway.
fn described(route: &api::Route) -> String {
    let ip = |bytes: &[u8]| match <[u8; 4]>::try_from(bytes) {
        Ok(four) => Ipv4Addr::from(four).to_string(),
        Err(_) => <[u8; 16]>::try_from(bytes).map(|all| Ipv6Addr::from(all).to_string()).unwrap_or_default(),
    };
    let to = route.destination.as_ref().unwrap();
    format!("{} {}/{} {}", route.interface, ip(&to.address), to.length, ip(&route.gateway))
}

#[test]
fn links_have_their_addresses_and_their_limits() {
    let mut bench = Bench::new(&["eth0", "net1"]);
    bench.give_address(0, "10.88.0.2", "10.88.0.2", 16);
    bench.give_address(0, "fd00::2", "fd00::2", 64);
    bench.give_address(1, "192.0.2.1", "192.0.2.9", 32);
    let scan = bench.scan().unwrap();
    let names: Vec<_> = scan.links.iter().map(|link| link.name.as_str()).collect();
    assert_eq!(names, ["eth0", "net1"], "without loopback");
    let eth0 = &scan.links[0];
    assert_eq!((eth0.mac, eth0.mtu), (MAC, 1400));
    let address = |ip: &str, bits, has_route| Address { ip: ip.parse().unwrap(), bits, has_route };
    let addresses = [address("10.88.0.2", 16, true), address("fd00::2", 64, true)];
    assert!(addresses.iter().all(|one| eth0.addresses.contains(one)), "{:?}", eth0.addresses);
    // Our end, not the peer's; the way to the peer is a route that the guest would not make by itself.
    assert_eq!(scan.links[1].addresses, [address("192.0.2.1", 32, false)]);
    assert_eq!(scan.routes.iter().map(described).collect::<Vec<_>>(), ["net1 192.0.2.9/32 "]);
    let interface = eth0.interface(5);
    assert_eq!((interface.slot, interface.mtu, interface.mac), (5, 1400, MAC.to_vec()));
}

#[test]
fn network_that_is_behind_a_gateway_is_not_on_the_link() {
    let mut bench = Bench::new(&["eth0"]);
    bench.give_address(0, "10.88.0.2", "10.88.0.2", 16);
    // As CNI's plugin ptp does.
    let mut made_by_kernel = bench.route(0, "10.88.0.0", 16, &[]);
    made_by_kernel.header.protocol = RouteProtocol::Kernel;
    made_by_kernel.header.scope = RouteScope::Link;
    bench.netlink.change(RouteNetlinkMessage::DelRoute(made_by_kernel), 0).unwrap();
    let mut to_gateway = bench.route(0, "10.88.0.1", 32, &[]);
    to_gateway.header.scope = RouteScope::Link;
    let over_gateway = bench.route(0, "10.88.0.0", 16, &[gateway("10.88.0.1")]);
    for route in [to_gateway, over_gateway] {
        bench.make(RouteNetlinkMessage::NewRoute(route));
    }
    let scan = bench.scan().unwrap();
    let interface = scan.links[0].interface(3);
    let given = interface.addresses.iter().find(|given| given.address == [10, 88, 0, 2]).unwrap();
    assert!(given.no_route);
    assert_eq!(
        scan.routes.iter().map(described).collect::<Vec<_>>(),
        ["eth0 10.88.0.1/32 ", "eth0 10.88.0.0/16 10.88.0.1"]
    );
}

#[test]
fn link_on_which_nobody_answers_to_arp_is_told_so() {
    let mut bench = Bench::new(&["eth0"]);
    assert!(!bench.scan().unwrap().links[0].interface(3).no_arp);
    let mut message = LinkMessage::default();
    message.header.index = bench.taps[0].0;
    message.header.flags = LinkFlags::Noarp;
    message.header.change_mask = LinkFlags::Noarp;
    bench.netlink.change(RouteNetlinkMessage::SetLink(message), 0).unwrap();
    assert!(bench.scan().unwrap().links[0].interface(3).no_arp);
}

#[test]
fn routes_come_after_those_they_need_and_keep_their_properties() {
    let mut bench = Bench::new(&["eth0"]);
    bench.give_address(0, "10.88.0.2", "10.88.0.2", 16);
    bench.give_address(0, "fd00::2", "fd00::2", 64);
    let on_link = bench.route(0, "169.254.1.1", 32, &[]);
    let mtu = RouteAttribute::Metrics(vec![RouteMetric::Mtu(1300)]);
    let source = RouteAttribute::PrefSource("10.88.0.2".parse::<IpAddr>().unwrap().into());
    let default =
        bench.route(0, "0.0.0.0", 0, &[gateway("10.88.0.1"), RouteAttribute::Priority(7), mtu, source]);
    let default6 = bench.route(0, "::", 0, &[gateway("fd00::1")]);
    let mut elsewhere = bench.route(0, "10.99.0.0", 16, &[gateway("10.0.0.1")]);
    elsewhere.header.flags = RouteFlags::Onlink;
    let mut other_table = bench.route(0, "10.77.0.0", 16, &[]);
    other_table.header.table = 100;
    // A gateway is on the link, so its route must be there first; in the list of the kernel it comes last.
    for route in [on_link, default, default6, elsewhere, other_table] {
        bench.make(RouteNetlinkMessage::NewRoute(route));
    }
    let scan = bench.scan().unwrap();
    let mut all: Vec<_> = scan.routes.iter().map(described).collect();
    assert_eq!(all[0], "eth0 169.254.1.1/32 ");
    all.sort();
    assert_eq!(
        all,
        [
            "eth0 0.0.0.0/0 10.88.0.1",
            "eth0 10.99.0.0/16 10.0.0.1",
            "eth0 169.254.1.1/32 ",
            "eth0 ::/0 fd00::1"
        ]
    );
    let default = scan.routes.iter().find(|route| described(route).contains("0.0.0.0/0")).unwrap();
    assert_eq!((default.metric, default.mtu, default.source.as_slice()), (7, 1300, &[10, 88, 0, 2][..]));
    assert!(scan.routes.iter().any(|route| route.gateway_on_link && described(route).contains("10.99")));
}

#[test]
fn neighbours_that_were_written_down_go_along() {
    let mut bench = Bench::new(&["eth0"]);
    bench.give_address(0, "10.88.0.2", "10.88.0.2", 16);
    for (address, state) in
        [([10, 88, 0, 1], NeighbourState::Permanent), ([10, 88, 0, 3], NeighbourState::Stale)]
    {
        let mut message = NeighbourMessage::default();
        message.header.family = netlink_packet_route::AddressFamily::Inet;
        message.header.ifindex = bench.taps[0].0;
        message.header.state = state;
        message.attributes = vec![
            NeighbourAttribute::Destination(NeighbourAddress::Inet(address.into())),
            NeighbourAttribute::LinkLayerAddress(MAC.to_vec()),
        ];
        bench.make(RouteNetlinkMessage::NewNeighbour(message));
    }
    let scan = bench.scan().unwrap();
    assert_eq!(scan.neighbors.len(), 1);
    assert_eq!((&scan.neighbors[0].address, &scan.neighbors[0].mac), (&vec![10, 88, 0, 1], &MAC.to_vec()));
}

#[test]
fn what_a_guest_cannot_have_is_refused_by_name() {
    let bench = |links: &[&str], prepare: &dyn Fn(&mut Bench)| {
        let links: Vec<String> = links.iter().map(|name| (*name).to_owned()).collect();
        std::thread::scope(|scope| {
            let test = scope.spawn(move || {
                let links: Vec<&str> = links.iter().map(String::as_str).collect();
                Bench::new(&links)
            });
            let mut bench = test.join().unwrap();
            prepare(&mut bench);
            bench.scan().expect_err("it is refused").to_string()
        })
    };
    let line = bench(&["eth0", "kvrun0"], &|_| {});
    assert!(line.contains("kvrun0") && line.contains("another container's machine"), "{line}");
    let line = bench(&["eth0"], &|bench| {
        bench.give_address(0, "10.88.0.2", "10.88.0.2", 16);
        let via = |last: u8| {
            let mut hop = netlink_packet_route::route::RouteNextHop::default();
            hop.interface_index = bench.taps[0].0;
            hop.attributes.push(gateway(&format!("10.88.0.{last}")));
            hop
        };
        let mut route = bench.route(0, "10.66.0.0", 16, &[RouteAttribute::MultiPath(vec![via(3), via(4)])]);
        route.attributes.retain(|attribute| !matches!(attribute, RouteAttribute::Oif(_)));
        bench.make(RouteNetlinkMessage::NewRoute(route));
    });
    assert!(line.contains("10.66.0.0/16") && line.contains("several next hops"), "{line}");
}

#[test]
fn work_in_a_namespace_leaves_the_thread_where_it_was() {
    let before = NetworkNamespace::current().unwrap().identity().unwrap();
    let other = std::thread::spawn(|| {
        enter_new().expect("this test needs root");
        NetworkNamespace::current().unwrap()
    });
    let other = other.join().unwrap();
    let within = other.run(|| NetworkNamespace::current().unwrap().identity().unwrap()).unwrap();
    assert_eq!(within, other.identity().unwrap());
    assert_ne!(within, before);
    assert_eq!(NetworkNamespace::current().unwrap().identity().unwrap(), before);
}
