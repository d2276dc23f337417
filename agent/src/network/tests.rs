//! With the host's kernel, in a network namespace of the test's thread.

use std::fs::{self, File};
use std::os::fd::AsRawFd;
use std::os::unix::fs::symlink;

use super::*;

/// Two taps in a new network namespace, as the interfaces of slots 2 and 3. Root only.
struct Bench {
    slots: Slots,
    sysfs: std::path::PathBuf,
    _taps: [File; 2],
}

impl Bench {
    fn new(name: &str) -> Self {
        // SAFETY: a call without pointers; the test's thread is its own.
        assert_eq!(unsafe { libc::unshare(libc::CLONE_NEWNET) }, 0, "this test needs root");
        let sysfs = std::env::temp_dir().join(format!("kvrun-network-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&sysfs);
        let driver = sysfs.join("bus/platform/drivers/virtio-mmio");
        fs::create_dir_all(&driver).unwrap();
        for (slot, name) in [(2, "eth0"), (3, "eth1")] {
            let device = sysfs.join(format!("bus/platform/devices/virtio-mmio.{slot}"));
            fs::create_dir_all(device.join("virtio0/net").join(name)).unwrap();
            symlink(&driver, device.join("driver")).unwrap();
        }
        Self { slots: Slots::under(sysfs.clone()), sysfs, _taps: [tap("eth0"), tap("eth1")] }
    }

    fn set_up(&self, plan: &Plan) -> Result<(), NetworkError> {
        set_up(&self.slots, plan)
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.sysfs);
    }
}

fn tap(name: &str) -> File {
    let fd = File::options().read(true).write(true).open("/dev/net/tun").unwrap();
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TAP | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF takes a pointer to an `ifreq`.
    let result = unsafe { libc::ioctl(fd.as_raw_fd(), libc::TUNSETIFF, &raw mut request) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    fd
}

fn on_link(address: IpAddr, length: u8) -> Address {
    Address { prefix: Prefix { address, length }, no_route: false }
}

fn interface(slot: u32, name: &str, addresses: &[([u8; 4], u8)]) -> Interface {
    let prefix = |&(address, length): &([u8; 4], u8)| on_link(IpAddr::from(address), length);
    Interface {
        slot,
        name: name.to_owned(),
        mtu: Some(1400),
        mac: Some([2, 0, 0, 0, 0, slot as u8]),
        no_arp: false,
        addresses: addresses.iter().map(prefix).collect(),
    }
}

fn route(interface: &str, destination: ([u8; 4], u8), gateway: Option<[u8; 4]>) -> Route {
    Route {
        interface: interface.to_owned(),
        destination: Prefix { address: destination.0.into(), length: destination.1 },
        gateway: gateway.map(IpAddr::from),
        gateway_on_link: false,
        source: None,
        metric: None,
        mtu: None,
        table: None,
    }
}

fn proc_net(file: &str) -> String {
    fs::read_to_string(format!("/proc/thread-self/net/{file}")).unwrap()
}

#[test]
fn interfaces_get_what_is_planned_also_a_second_time() {
    let bench = Bench::new("planned");
    let mut eth = interface(2, "pod0", &[([10, 1, 0, 2], 24)]);
    eth.addresses.push(on_link("fd00::2".parse().unwrap(), 64));
    // Of this one, there is no route in the list.
    eth.addresses.push(Address { no_route: true, ..on_link([10, 2, 0, 2].into(), 24) });
    let mut plan = Plan {
        interfaces: vec![eth],
        routes: vec![
            route("pod0", ([169, 254, 1, 1], 32), None),
            route("pod0", ([0; 4], 0), Some([169, 254, 1, 1])),
            Route {
                gateway_on_link: true,
                metric: Some(7),
                ..route("pod0", ([10, 9, 0, 0], 16), Some([192, 168, 0, 1]))
            },
        ],
        neighbors: vec![Neighbor {
            interface: "pod0".to_owned(),
            address: [169, 254, 1, 1].into(),
            mac: [0xee; 6],
        }],
    };
    for _ in 0..2 {
        bench.set_up(&plan).unwrap();
        assert!(index("eth0").is_err());
        // Linux Documentation/networking/proc_net_tcp.rst has the byte order: addresses as numbers of this machine.
        let routes = proc_net("route");
        let lines: Vec<Vec<&str>> = routes.lines().map(|line| line.split_whitespace().collect()).collect();
        let gateway = |destination: &str, metric: &str| {
            let line =
                lines.iter().find(|line| line[0] == "pod0" && line[1] == destination && line[6] == metric);
            line.map(|line| line[2].to_owned())
        };
        assert_eq!(gateway("00000000", "0").unwrap(), "0101FEA9", "{routes}");
        assert_eq!(gateway("0101FEA9", "0").unwrap(), "00000000", "{routes}");
        assert_eq!(gateway("0000090A", "7").unwrap(), "0100A8C0", "{routes}");
        assert_eq!(gateway("0000010A", "0").unwrap(), "00000000", "{routes}");
        assert_eq!(lines.iter().filter(|line| line[0] == "pod0").count(), 4, "{routes}");
        let arp = proc_net("arp");
        assert!(arp.contains("169.254.1.1") && arp.contains("ee:ee:ee:ee:ee:ee"), "{arp}");
        let v6 = proc_net("if_inet6");
        // Its flags: permanent, no search for duplicates.
        assert!(v6.contains("fd000000000000000000000000000002") && v6.contains(" 82 "), "{v6}");
        // From here on the guest calls it that.
        let net = bench.sysfs.join("bus/platform/devices/virtio-mmio.2/virtio0/net");
        let _ = fs::rename(net.join("eth0"), net.join("pod0"));
        plan.interfaces[0].mtu = None;
    }
}

#[test]
fn interfaces_may_swap_their_names() {
    let bench = Bench::new("swap");
    let before = (index("eth0").unwrap(), index("eth1").unwrap());
    let plan = Plan {
        interfaces: vec![interface(3, "eth0", &[]), interface(2, "eth1", &[])],
        routes: vec![],
        neighbors: vec![],
    };
    bench.set_up(&plan).unwrap();
    assert_eq!((index("eth1").unwrap(), index("eth0").unwrap()), before);
}

#[test]
fn what_the_kernel_refuses_is_named() {
    let bench = Bench::new("refused");
    let plan = |slot, route: Option<Route>| Plan {
        interfaces: vec![interface(slot, "eth0", &[])],
        routes: route.into_iter().collect(),
        neighbors: vec![],
    };
    let unreachable = plan(2, Some(route("eth0", ([0; 4], 0), Some([10, 0, 0, 1]))));
    let error = bench.set_up(&unreachable).unwrap_err();
    assert_eq!(error.to_string(), "cannot make the route to 0.0.0.0/0 by eth0");
    let nowhere = plan(2, Some(route("eth7", ([10, 0, 0, 0], 8), None)));
    let error = bench.set_up(&nowhere).unwrap_err();
    assert_eq!(error.to_string(), "cannot find the interface eth7");
    assert!(matches!(bench.set_up(&plan(9, None)), Err(NetworkError::Slot(SlotError::Unknown(9)))));
    fs::remove_dir_all(bench.sysfs.join("bus/platform/devices/virtio-mmio.3/virtio0/net")).unwrap();
    assert!(matches!(bench.set_up(&plan(3, None)), Err(NetworkError::NoInterface(3))));
}
