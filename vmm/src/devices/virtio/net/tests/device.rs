//! The device as a whole, over taps of the host's kernel.

use std::error::Error;
use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kvrun_vmm_api::RateLimit;
use libc::{IFF_NO_PI, IFF_TAP, IFF_VNET_HDR};
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4, VIRTIO_NET_F_MQ,
    VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use vmm_sys_util::eventfd::EventFd;

use super::super::pair::Shared;
use super::super::tap::TapError;
use super::super::{Net, NetConfig, NetError, QUEUE_SIZE, header};
use super::host::{self, Host, MAC};
use super::{counter, with_header};
use crate::devices::virtio::testing::{MockDriver, MockInterrupt, Segment, config_of};
use crate::devices::virtio::{
    ActivateError, DeviceRequest, DeviceRequestError, DeviceState, InterruptLine, SavedDevice, VirtioDevice,
};

const UNLIMITED: RateLimit =
    RateLimit { bytes_per_second: 0, bytes_burst: 0, ops_per_second: 0, ops_burst: 0 };
const FEATURES: u64 = 1 << VIRTIO_NET_F_MRG_RXBUF | 1 << VIRTIO_NET_F_CTRL_VQ;

pub(super) fn config(queue_pairs: u8) -> NetConfig {
    NetConfig { mac: MAC, mtu: 1500, queue_pairs, rx_limit: UNLIMITED, tx_limit: UNLIMITED }
}

/// A link with its driver.
pub(super) struct Bench {
    pub(super) host: Host,
    pub(super) net: Net,
    pub(super) driver: MockDriver,
}

impl Bench {
    pub(super) fn new(queue_pairs: u8, features: u64) -> Self {
        let (host, taps) = Host::new(queue_pairs.into());
        let mut net = Net::open(taps, &config(queue_pairs)).unwrap();
        let mut driver = MockDriver::new(net.queue_sizes());
        net.activate(driver.activation(features)).unwrap();
        Self { host, net, driver }
    }

    /// Offers buffers to receive into.
    pub(super) fn offer(&mut self, queue: usize, count: usize) -> Vec<Segment> {
        let buffers: Vec<_> = (0..count).map(|_| self.driver.writable(1600)).collect();
        for buffer in &buffers {
            self.driver.add(queue, &[*buffer]);
        }
        self.driver.kick_if_wanted(queue);
        buffers
    }

    /// Waits for the next frame, which is in the next of `buffers`.
    fn receive(&mut self, buffers: &mut impl Iterator<Item = Segment>) -> Vec<u8> {
        let buffer = buffers.next().unwrap();
        let (_, length) = self.driver.wait_used(0);
        self.driver.read(buffer.addr, length as usize).split_off(header::LENGTH)
    }

    fn send(&mut self, frame: &[u8]) {
        let packet = self.driver.readable(&with_header(frame));
        self.driver.add(1, &[packet]);
        self.driver.kick_if_wanted(1);
        self.driver.wait_used(1);
    }

    fn counter(&self, name: &str) -> u64 {
        self.net.counters().into_iter().find(|(it, _)| *it == name).unwrap().1
    }
}

#[test]
fn frames_pass_both_ways() {
    let mut bench = Bench::new(1, FEATURES);
    let mut buffers = bench.offer(0, 8).into_iter();
    for seed in 0..4 {
        bench.host.send(&host::frame(1000, seed));
        assert_eq!(bench.receive(&mut buffers), host::frame(1000, seed));
        bench.send(&host::frame(500, seed));
        assert_eq!(bench.host.receive(), host::frame(500, seed));
    }
    assert_eq!(bench.counter("rx_packets"), 4);
    assert_eq!(bench.counter("tx_bytes"), 2000);
}

#[test]
fn after_a_reset_neither_memory_nor_interrupt_is_touched() {
    let mut bench = Bench::new(1, FEATURES);
    let buffers = bench.offer(0, 8);
    bench.net.reset();
    bench.net.reset();
    bench.host.send(&host::frame(1000, 1));
    bench.driver.kick(0);
    // Two orders later, the threads have looked around.
    bench.net.pause();
    bench.net.reset();
    assert_eq!(bench.driver.pop_used(0), None);
    assert!(buffers.iter().all(|buffer| bench.driver.read(buffer.addr, 1600) == [0; 1600]));
    assert_eq!(bench.driver.interrupt.queue_count(0), 0);
    // The frame waits in the tap for the next driver.
    let activation = bench.driver.activation(FEATURES);
    bench.net.activate(activation).unwrap();
    let mut buffers = bench.offer(0, 1).into_iter();
    assert_eq!(bench.receive(&mut buffers), host::frame(1000, 1));
}

#[test]
fn pausing_loses_nothing() {
    let mut bench = Bench::new(1, FEATURES);
    let mut buffers = bench.offer(0, 16).into_iter();
    bench.host.send(&host::frame(100, 0));
    assert_eq!(bench.receive(&mut buffers), host::frame(100, 0));
    for round in 1..4 {
        bench.net.pause();
        bench.net.pause();
        let SavedDevice { queues, state } = bench.net.save().unwrap();
        let position = queues[0].unwrap();
        assert_eq!(position.next_used, 1 + 3 * (u16::from(round) - 1));
        assert_eq!(position.next_avail, position.next_used, "what is taken in advance is put back");
        let DeviceState::Net(state) = state else { panic!("{state:?}") };
        assert_eq!((state.mac, state.mtu, state.pairs_in_use), (MAC, 1500, 1));
        let json = serde_json::to_string(&bench.net.save()).unwrap();
        assert_eq!(serde_json::from_str::<Option<SavedDevice>>(&json).unwrap(), bench.net.save());
        // What comes meanwhile, from either side.
        for seed in 0..3 {
            bench.host.send(&host::frame(100, round * 10 + seed));
        }
        let packet = bench.driver.readable(&with_header(&host::frame(60, round)));
        bench.driver.add(1, &[packet]);
        bench.driver.kick(1);
        assert_eq!(bench.driver.pop_used(0), None);
        assert_eq!(bench.driver.pop_used(1), None);
        bench.net.resume();
        bench.net.resume();
        for seed in 0..3 {
            assert_eq!(bench.receive(&mut buffers), host::frame(100, round * 10 + seed));
        }
        bench.driver.wait_used(1);
    }
    bench.net.pause();
    bench.net.reset();
    assert!(bench.net.save().unwrap().queues.is_empty());
}

/// Notes which queue had a turn in which it moved something, in order, and how many packets had been received by then: each ends with an
/// interrupt.
struct Turns {
    turns: Mutex<Vec<(u16, u64)>>,
    link: Arc<Shared>,
    driver: Arc<MockInterrupt>,
}

impl Turns {
    fn queues(&self) -> Vec<u16> {
        self.turns.lock().unwrap().iter().map(|(queue, _)| *queue).collect()
    }

    /// How many packets had been received by the turns of a queue, in order.
    fn received_by(&self, queue: u16) -> Vec<u64> {
        let turns = self.turns.lock().unwrap();
        turns.iter().filter(|(it, _)| *it == queue).map(|(_, received)| *received).collect()
    }

    fn received(&self) -> u64 {
        counter(&self.link.counters, "rx_packets")
    }
}

impl InterruptLine for Turns {
    fn signal_queue(&self, queue: u16) {
        self.turns.lock().unwrap().push((queue, self.received()));
        self.driver.signal_queue(queue);
    }

    fn queue_event(&self) -> io::Result<EventFd> {
        self.driver.queue_event()
    }

    fn signal_config(&self) {
        self.driver.signal_config();
    }

    fn needs_reset(&self, reason: &dyn Error) {
        self.driver.needs_reset(reason);
    }
}

/// A link whose driver is not there yet, but has decided what to say first.
fn with_turns(prepare: impl FnOnce(&mut Bench)) -> (Bench, Arc<Turns>) {
    let mut bench = Bench::new(1, FEATURES);
    bench.net.reset();
    let mut activation = bench.driver.activation(FEATURES);
    let (link, driver) = (bench.net.shared.clone(), bench.driver.interrupt.clone());
    let turns = Arc::new(Turns { turns: Mutex::default(), link, driver });
    activation.interrupt = turns.clone();
    prepare(&mut bench);
    bench.net.activate(activation).unwrap();
    (bench, turns)
}

#[test]
fn neither_direction_waits_for_the_other_to_run_dry() {
    let many = usize::from(QUEUE_SIZE);
    let (mut bench, turns) = with_turns(|bench| {
        let packet = bench.driver.readable(&with_header(&host::frame(60, 1)));
        for _ in 0..many {
            bench.host.send(&host::frame(60, 0));
            bench.driver.add(1, &[packet]);
        }
        bench.offer(0, many);
    });
    for _ in 0..many {
        bench.driver.wait_used(0);
        bench.driver.wait_used(1);
    }
    // 64 packets each.
    assert_eq!(turns.queues(), [0, 1, 0, 1, 0, 1, 0, 1]);
}

#[test]
fn packets_leave_in_the_midst_of_a_flood() {
    let (mut bench, turns) = with_turns(|_| ());
    let buffer = bench.offer(0, usize::from(QUEUE_SIZE))[0];
    let packet = bench.driver.readable(&with_header(&host::frame(60, 1)));
    let Bench { host, driver, .. } = &mut bench;
    let (host, end) = (&*host, AtomicBool::new(false));
    // How many packets were received before each left.
    let mut waited = Vec::new();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while !end.load(Ordering::Relaxed) {
                    host.throw(&host::frame(60, 0));
                }
            });
        }
        let receive = |driver: &mut MockDriver| {
            while driver.pop_used(0).is_some() {
                driver.add(0, &[buffer]);
            }
            driver.kick_if_wanted(0);
        };
        let began = Instant::now();
        let is_stuck = || began.elapsed() > Duration::from_secs(30);
        for sent in 0..100 {
            let before = turns.received();
            while turns.received() < before + 256 && !is_stuck() {
                receive(driver);
            }
            driver.add(1, &[packet]);
            driver.kick_if_wanted(1);
            let kicked = turns.received();
            let left = loop {
                receive(driver);
                match turns.received_by(1).get(sent) {
                    Some(left) => break left.saturating_sub(kicked),
                    None if is_stuck() => break u64::MAX,
                    None => {}
                }
            };
            waited.push(left);
            driver.pop_used(1);
        }
        end.store(true, Ordering::Relaxed);
    });
    // A turn of 64 may be under way when the driver kicks, and another begin before the kick is seen.
    assert!(waited.iter().all(|packets| *packets <= 128), "{waited:?}");
}

#[test]
fn frames_for_an_interface_that_is_down_are_dropped() {
    let mut bench = Bench::new(1, FEATURES);
    bench.host.set_up(false);
    bench.send(&host::frame(60, 1));
    assert_eq!(bench.counter("tx_dropped"), 1);
    bench.host.set_up(true);
    bench.send(&host::frame(60, 2));
    assert_eq!(bench.host.receive(), host::frame(60, 2));
}

#[test]
fn packets_are_spread_over_the_pairs_the_driver_uses() {
    let mut bench = Bench::new(4, FEATURES | 1 << VIRTIO_NET_F_MQ);
    let received = |bench: &mut Bench| -> Vec<usize> {
        (0..4).map(|pair| std::iter::from_fn(|| bench.driver.pop_used(2 * pair)).count()).collect()
    };
    for pair in 0..4 {
        bench.offer(2 * pair, 200);
    }
    for (pairs, sent) in [(1, 64), (4, 128), (1, 192)] {
        assert_eq!(super::control::set_pairs(&mut bench.driver, 8, pairs), 0);
        let before = received(&mut bench);
        assert_eq!(before, [0; 4]);
        for port in 0..64 {
            bench.host.send(&host::datagram(port));
        }
        let mut all = vec![0; 4];
        while all.iter().sum::<usize>() < 64 {
            for (sum, more) in all.iter_mut().zip(received(&mut bench)) {
                *sum += more;
            }
            std::thread::yield_now();
        }
        let in_use = all.iter().filter(|count| **count > 0).count();
        assert_eq!(in_use, usize::from(pairs), "{all:?}");
        assert_eq!(bench.counter("rx_packets"), sent);
    }
    // A reset begins with one pair again.
    super::control::set_pairs(&mut bench.driver, 8, 3);
    bench.net.pause();
    let DeviceState::Net(state) = bench.net.save().unwrap().state else { panic!() };
    assert_eq!(state.pairs_in_use, 3);
    bench.net.resume();
    bench.net.reset();
    let DeviceState::Net(state) = bench.net.save().unwrap().state else { panic!() };
    assert_eq!(state.pairs_in_use, 1);
}

#[test]
fn new_limit_counts_at_once() {
    let mut bench = Bench::new(1, FEATURES);
    // A byte per second: the first packet goes, and leaves a debt of 25 minutes.
    let crawl = RateLimit { bytes_per_second: 1, bytes_burst: 1, ..UNLIMITED };
    bench.net.request(DeviceRequest::Limit(UNLIMITED, Some(crawl))).unwrap();
    bench.send(&host::frame(1500, 1));
    let packet = bench.driver.readable(&with_header(&host::frame(60, 2)));
    bench.driver.add(1, &[packet]);
    bench.driver.kick_if_wanted(1);
    while bench.counter("tx_throttled") == 0 {
        std::thread::yield_now();
    }
    assert_eq!(bench.driver.pop_used(1), None);
    bench.net.request(DeviceRequest::Limit(UNLIMITED, Some(UNLIMITED))).unwrap();
    bench.driver.wait_used(1);
    let one = DeviceRequest::Limit(UNLIMITED, None);
    assert_eq!(bench.net.request(one), Err(DeviceRequestError::NotForThis(one)));
}

#[test]
fn configuration_space_tells_address_pairs_and_mtu() {
    let (_host, taps) = Host::new(2);
    let mut net = Net::open(taps, &config(2)).unwrap();
    let space: [u8; 16] = config_of(&mut net);
    assert_eq!(space, [2, 0, 0, 0, 0, 1, 0, 0, 2, 0, 0xdc, 0x05, 0, 0, 0, 0]);
    assert_eq!(net.queue_sizes().len(), 5);
    for feature in [VIRTIO_NET_F_MQ, VIRTIO_NET_F_MTU, VIRTIO_NET_F_GUEST_CSUM, VIRTIO_NET_F_GUEST_TSO4] {
        assert_ne!(net.features() & 1 << feature, 0, "{feature}");
    }
}

#[test]
fn what_is_not_a_link_is_refused() {
    let (_host, taps) = Host::new(2);
    let null = || OwnedFd::from(File::open("/dev/null").unwrap());
    let count = Net::open(vec![null()], &config(2));
    assert!(matches!(count, Err(NetError::Descriptors { pairs: 2, got: 1 })));
    let none = Net::open(vec![], &config(0));
    assert!(matches!(none, Err(NetError::Descriptors { .. })));
    let file = Net::open(vec![null()], &config(1));
    assert!(matches!(file, Err(NetError::Tap(TapError::NotATap(_)))));
    for mac in [[0; 6], [0xff; 6], [3, 0, 0, 0, 0, 1]] {
        let group = Net::open(vec![null()], &NetConfig { mac, ..config(1) });
        assert!(matches!(group, Err(NetError::Mac(_))));
    }
    let vhost = Net::open(vec![null(), null()], &config(1));
    assert!(matches!(vhost, Err(NetError::Vhost(_))));
    drop(taps);
    let plain = Net::open(vec![host::tap(IFF_TAP | IFF_NO_PI)], &config(1));
    assert!(matches!(plain, Err(NetError::Tap(TapError::Flags { .. }))));
    let single = host::tap(IFF_TAP | IFF_NO_PI | IFF_VNET_HDR);
    let again = single.try_clone().unwrap();
    assert!(matches!(Net::open(vec![single, again], &config(2)), Err(NetError::Tap(TapError::Flags { .. }))));
}

#[test]
fn driver_must_set_up_the_first_pair() {
    let (_host, taps) = Host::new(2);
    let mut net = Net::open(taps, &config(2)).unwrap();
    let mut driver = MockDriver::new(net.queue_sizes());
    for missing in [0, 1] {
        let mut activation = driver.activation(FEATURES | 1 << VIRTIO_NET_F_MQ);
        activation.queues[missing] = None;
        let error = net.activate(activation).unwrap_err();
        assert!(matches!(error, ActivateError::MissingQueue(queue) if usize::from(queue) == missing));
    }
    // The others it may leave out, and the control queue.
    let mut activation = driver.activation(FEATURES | 1 << VIRTIO_NET_F_MQ);
    activation.queues.truncate(2);
    net.activate(activation).unwrap();
    net.reset();
}

#[test]
fn taps_can_be_attached_again() {
    let (_host, taps) = Host::new(3);
    for _ in 0..3 {
        let again = taps.iter().map(|tap| tap.try_clone().unwrap()).collect();
        let mut net = Net::open(again, &config(3)).unwrap();
        let mut driver = MockDriver::new(net.queue_sizes());
        // Of three, it uses one.
        net.activate(driver.activation(FEATURES | 1 << VIRTIO_NET_F_MQ)).unwrap();
        assert_eq!(super::control::set_pairs(&mut driver, 6, 1), 0);
    }
}
