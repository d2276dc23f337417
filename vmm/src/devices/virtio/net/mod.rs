//! The network device (virtio 1.3 s5.1): a link between the guest and a tap device of the host.
//!
//! * this file - [`Net`], the device.
//! * [`tap`] - the host's end; [`link`] - what the driver decides about it, by the queue of [`control`].
//! * [`pair`] - carries a pair of queues in this process, in turns ([`turn`]) of [`rx`] and [`tx`], from and to guest memory without a copy
//!   between ([`buffers`]); [`header`] checks what the guest says of its packets.
//! * [`vhost`] - carries them in the host's kernel instead.
//! * [`worker`] - the threads of either.
//!
//! Not offered: filters for addresses and VLANs (whoever is on a pod's link is meant to hear all of it), a link state (the link is up while it is
//! there), UFO (no Linux since 4.14 has it).

mod buffers;
mod control;
mod counters;
mod header;
mod link;
mod pair;
mod rx;
mod tap;
#[cfg(test)]
mod tests;
mod turn;
mod tx;
mod vhost;
mod worker;

use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex};
use std::time::Instant;

use kvrun_vmm_api::RateLimit;
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_NET;
use virtio_bindings::virtio_net::{
    VIRTIO_NET_F_CSUM, VIRTIO_NET_F_CTRL_GUEST_OFFLOADS, VIRTIO_NET_F_CTRL_VQ, VIRTIO_NET_F_GUEST_USO4,
    VIRTIO_NET_F_HOST_ECN, VIRTIO_NET_F_HOST_TSO4, VIRTIO_NET_F_HOST_TSO6, VIRTIO_NET_F_HOST_USO,
    VIRTIO_NET_F_MAC, VIRTIO_NET_F_MQ, VIRTIO_NET_F_MRG_RXBUF, VIRTIO_NET_F_MTU,
};
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};

use self::counters::Counters;
use self::link::{Choice, Link};
use self::pair::Shared;
use self::tap::{GUEST_OFFLOADS, Tap, TapError};
use self::vhost::{Vhost, VhostError};
use self::worker::{Rings, Worker};
use super::{
    ActivateError, Activation, ConfigSpace, DeviceRequest, DeviceRequestError, DeviceState, SavedDevice,
    VirtioDevice,
};
use crate::locked;
use crate::rate_limiter::RateLimiter;

/// Of the queues for packets.
const QUEUE_SIZE: u16 = 256;
/// Of the control queue. The driver has one command under way.
const CONTROL_SIZE: u16 = 16;
/// `struct virtio_net_config` (virtio 1.3 s5.1.4) up to what the features offered make valid: mac, status, max_virtqueue_pairs, mtu.
const CONFIG_LEN: usize = 12;

/// What a link is like.
#[derive(Clone, Copy, Debug)]
pub struct NetConfig {
    /// The guest's Ethernet address.
    pub mac: [u8; 6],
    /// MTU in bytes.
    pub mtu: u16,
    /// Pairs of queues; at least 1.
    pub queue_pairs: u8,
    /// How fast the guest may receive.
    pub rx_limit: RateLimit,
    /// How fast it may send.
    pub tx_limit: RateLimit,
}

/// Why something cannot be a link.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// Neither a tap for each pair of queues, nor as many of vhost-net beside.
    #[error("a link of {pairs} queue pairs takes {pairs} or twice as many descriptors, not {got}")]
    Descriptors {
        /// How many pairs.
        pairs: u8,
        /// How many descriptors.
        got: usize,
    },
    /// The address is not that of one station.
    #[error("{0:02x?} is not the Ethernet address of a guest")]
    Mac([u8; 6]),
    /// The first descriptors are not usable taps.
    #[error(transparent)]
    Tap(#[from] TapError),
    /// The others are not usable vhost-net devices.
    #[error(transparent)]
    Vhost(#[from] VhostError),
    /// Nobody would enforce the limit.
    #[error("a link that vhost-net carries cannot be limited")]
    LimitedVhost,
    /// The host is out of threads or descriptors.
    #[error("cannot start the threads of a link")]
    Threads(#[source] io::Error),
}

/// What there is to save of a link beside its queues.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NetState {
    /// The guest's Ethernet address.
    pub mac: [u8; 6],
    /// MTU in bytes.
    pub mtu: u16,
    /// How many pairs of queues the device has.
    pub queue_pairs: u16,
    /// Feature bits the device offers.
    pub features: u64,
    /// How many pairs the driver uses.
    pub pairs_in_use: u16,
    /// Offloads the driver takes, as feature bits.
    pub offloads: u64,
}

/// The network device.
pub struct Net {
    mac: [u8; 6],
    queue_pairs: u16,
    features: u64,
    queue_sizes: Vec<u16>,
    vhost: bool,
    shared: Arc<Shared>,
    /// The first obeys the control queue. In this order they are stopped: it has orders for the others.
    workers: Vec<Worker>,
    state: State,
}

enum State {
    Inactive,
    Active,
    /// What each of the workers served.
    Paused(Vec<Rings>),
}

impl Net {
    /// A link over `fds`: a tap for each pair of queues, then, if the kernel is to carry packets, as many of `/dev/vhost-net`.
    ///
    /// # Errors
    /// [`NetError`].
    pub fn open(mut fds: Vec<OwnedFd>, config: &NetConfig) -> Result<Self, NetError> {
        // IEEE 802: the lowest bit of the first byte means a group.
        if config.mac[0] & 1 != 0 || config.mac == [0; 6] {
            return Err(NetError::Mac(config.mac));
        }
        let pairs = usize::from(config.queue_pairs);
        if fds.len() != pairs && fds.len() != 2 * pairs {
            return Err(NetError::Descriptors { pairs: config.queue_pairs, got: fds.len() });
        }
        let vhosts = fds.split_off(pairs);
        let vhosts = vhosts.into_iter().map(Vhost::open).collect::<Result<Vec<_>, _>>()?;
        let taps = fds.into_iter().map(|fd| Tap::open(fd, pairs > 1)).collect::<Result<Arc<[_]>, _>>()?;
        let guest_offloads = match taps.first() {
            Some(tap) => tap.probe_offloads()?,
            None => return Err(NetError::Descriptors { pairs: 0, got: 0 }),
        };
        Self::over(taps, vhosts, guest_offloads, config)
    }

    fn over(
        taps: Arc<[Tap]>,
        mut vhosts: Vec<Vhost>,
        guest_offloads: u64,
        config: &NetConfig,
    ) -> Result<Self, NetError> {
        let now = Instant::now();
        let (rx_limit, tx_limit) =
            (RateLimiter::new(config.rx_limit, now), RateLimiter::new(config.tx_limit, now));
        let vhost = !vhosts.is_empty();
        if vhost && !(rx_limit.is_unbounded() && tx_limit.is_unbounded()) {
            return Err(NetError::LimitedVhost);
        }
        let shared = Arc::new(Shared {
            taps: taps.clone(),
            mtu: config.mtu,
            counters: Counters::default(),
            rx_limit: Mutex::new(rx_limit),
            tx_limit: Mutex::new(tx_limit),
        });

        let mut others = Vec::new();
        for pair in if vhost { 1..1 } else { 1..taps.len() } {
            let shared = shared.clone();
            let serve = move |rings, inbox: &_| pair::serve(&shared, pair, None, rings, inbox);
            others.push(Worker::start(&format!("net{pair}"), serve).map_err(NetError::Threads)?);
        }
        let mut link = Link::new(taps, others.iter().map(|worker| worker.mailbox().clone()).collect());
        let first = {
            let shared = shared.clone();
            Worker::start("net0", move |rings, inbox| match &mut vhosts[..] {
                [] => pair::serve(&shared, 0, Some(&mut link), rings, inbox),
                vhosts => vhost::serve(vhosts, &shared, &mut link, rings, inbox),
            })
        };
        let mut workers = vec![first.map_err(NetError::Threads)?];
        workers.append(&mut others);

        let queue_pairs = u16::from(config.queue_pairs);
        let mut queue_sizes = vec![QUEUE_SIZE; 2 * usize::from(queue_pairs)];
        queue_sizes.push(CONTROL_SIZE);
        Ok(Self {
            mac: config.mac,
            queue_pairs,
            features: features(queue_pairs, guest_offloads),
            queue_sizes,
            vhost,
            shared,
            workers,
            state: State::Inactive,
        })
    }

    /// Takes what the workers serve back from them.
    fn stop(&mut self) -> Vec<Rings> {
        self.workers.iter().filter_map(Worker::stop).collect()
    }

    fn start(&mut self, rings: Vec<Rings>) {
        for (worker, rings) in self.workers.iter().zip(rings) {
            worker.serve(rings);
        }
        self.state = State::Active;
    }
}

/// What a device of so many pairs of queues offers, over a host that does these offloads towards the guest.
fn features(queue_pairs: u16, guest_offloads: u64) -> u64 {
    let mut features = guest_offloads;
    for feature in [
        VIRTIO_RING_F_INDIRECT_DESC,
        VIRTIO_RING_F_EVENT_IDX,
        VIRTIO_NET_F_MAC,
        VIRTIO_NET_F_MTU,
        VIRTIO_NET_F_MRG_RXBUF,
        VIRTIO_NET_F_CTRL_VQ,
        VIRTIO_NET_F_CTRL_GUEST_OFFLOADS,
        VIRTIO_NET_F_CSUM,
        VIRTIO_NET_F_HOST_TSO4,
        VIRTIO_NET_F_HOST_TSO6,
        VIRTIO_NET_F_HOST_ECN,
    ] {
        features |= 1 << feature;
    }
    // A host that can make such packets can take them: Linux learned both at once.
    if guest_offloads & 1 << VIRTIO_NET_F_GUEST_USO4 != 0 {
        features |= 1 << VIRTIO_NET_F_HOST_USO;
    }
    if queue_pairs > 1 {
        features |= 1 << VIRTIO_NET_F_MQ;
    }
    features
}

impl VirtioDevice for Net {
    fn device_id(&self) -> u32 {
        VIRTIO_ID_NET
    }

    fn name(&self) -> &'static str {
        "net"
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.queue_sizes
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn is_interrupted_elsewhere(&self) -> bool {
        self.vhost
    }

    fn place_config(&mut self, space: ConfigSpace) {
        let mut config = [0; CONFIG_LEN];
        config[..6].copy_from_slice(&self.mac);
        config[8..10].copy_from_slice(&self.queue_pairs.to_le_bytes());
        config[10..].copy_from_slice(&self.shared.mtu.to_le_bytes());
        space.write(0, &config);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let Activation { mem, features, mut queues, interrupt } = activation;
        // s5.1.2: the control queue comes after the pairs, of which there is one without MQ.
        let pairs = if features & 1 << VIRTIO_NET_F_MQ == 0 { 1 } else { self.queue_pairs };
        let mut take = |index: u16| queues.get_mut(usize::from(index)).and_then(Option::take);
        let mut ready = Vec::new();
        for pair in 0..pairs {
            match (take(2 * pair), take(2 * pair + 1)) {
                (Some(rx), Some(tx)) => ready.push((rx, tx)),
                // The driver may leave pairs out that it will not use.
                _ if pair > 0 => break,
                (None, _) => return Err(ActivateError::MissingQueue(0)),
                (_, None) => return Err(ActivateError::MissingQueue(1)),
            }
        }
        let mut control = take(2 * pairs).filter(|_| features & 1 << VIRTIO_NET_F_CTRL_VQ != 0);
        let ready_pairs = ready.len() as u16;
        let choice = Choice { pairs: 1, offloads: features & GUEST_OFFLOADS };
        let mut rings = |pairs| {
            let (mem, interrupt, control) = (mem.clone(), interrupt.clone(), control.take());
            Rings { mem, interrupt, features, pairs, ready_pairs, control, choice }
        };
        let rings = match self.vhost {
            true => vec![rings(ready)],
            false => ready.into_iter().map(|pair| rings(vec![pair])).collect(),
        };
        self.start(rings);
        Ok(())
    }

    fn reset(&mut self) {
        self.stop();
        self.state = State::Inactive;
    }

    fn pause(&mut self) {
        if let State::Active = self.state {
            self.state = State::Paused(self.stop());
        }
    }

    fn resume(&mut self) {
        if let State::Paused(rings) = &mut self.state {
            let rings = std::mem::take(rings);
            self.start(rings);
        }
    }

    fn save(&self) -> Option<SavedDevice> {
        let mut queues = Vec::new();
        // s5.1.6.5: as after a reset.
        let mut choice = Choice { pairs: 1, offloads: 0 };
        if let State::Paused(all) = &self.state {
            queues = vec![None; self.queue_sizes.len()];
            choice = all.first().map_or(choice, |rings| rings.choice);
            for rings in all {
                let pairs = rings.pairs.iter().flat_map(|(rx, tx)| [rx, tx]);
                for queue in pairs.chain(&rings.control) {
                    queues[usize::from(queue.index())] = Some(queue.position());
                }
            }
        }
        let state = NetState {
            mac: self.mac,
            mtu: self.shared.mtu,
            queue_pairs: self.queue_pairs,
            features: self.features,
            pairs_in_use: choice.pairs,
            offloads: choice.offloads,
        };
        Some(SavedDevice { queues, state: DeviceState::Net(state) })
    }

    fn counters(&self) -> Vec<(&'static str, u64)> {
        self.shared.counters.all()
    }

    fn request(&mut self, request: DeviceRequest) -> Result<(), DeviceRequestError> {
        let DeviceRequest::Limit(rx, Some(tx)) = request else {
            return Err(DeviceRequestError::NotForThis(request));
        };
        if self.vhost {
            return Err(DeviceRequestError::NotForThis(request));
        }
        let now = Instant::now();
        locked(self.shared.rx_limit.lock()).set(rx, now);
        locked(self.shared.tx_limit.lock()).set(tx, now);
        // Some may be waiting as long as the old limits said.
        for worker in &self.workers {
            worker.mailbox().wake();
        }
        Ok(())
    }
}
