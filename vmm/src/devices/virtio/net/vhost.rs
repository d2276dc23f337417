//! Pairs of queues carried by the host's kernel (vhost-net): it is kicked by the driver and interrupts it without this process.
//!
//! One thread of this process stays: it sets vhost up, and serves the control queue. ioctl(2) with `VHOST_SET_OWNER`, `VHOST_SET_FEATURES`,
//! `VHOST_SET_MEM_TABLE`, `VHOST_SET_VRING_{NUM,BASE,ADDR,KICK,CALL,ERR}`, `VHOST_GET_VRING_BASE` and `VHOST_NET_SET_BACKEND` is its; only
//! `VHOST_GET_FEATURES` is called when the link is attached.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd, RawFd};
use std::sync::atomic::Ordering;

use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::vhost_binding::{VHOST_NET_SET_BACKEND, vhost_vring_file};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_net::VIRTIO_NET_F_MRG_RXBUF;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use vm_memory::{Bytes, GuestAddress, GuestMemory, GuestMemoryRegion, GuestRegionMmap};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::ioctl::ioctl_with_ref;

use super::control::Control;
use super::link::Link;
use super::pair::Shared;
use super::tap::Tap;
use super::turn::Next;
use super::worker::{Command, Inbox, NOTHING, Rings, Served, readable, wait};
use crate::devices::virtio::{GuestRam, VirtQueue};

/// The features that whoever serves the queues must know of.
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_NET_F_MRG_RXBUF;

/// Why vhost-net does not carry a link.
#[derive(Debug, thiserror::Error)]
pub enum VhostError {
    /// The host refused.
    #[error("cannot {what}")]
    Ioctl {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: vhost::Error,
    },
    /// It lacks what every link needs.
    #[error("vhost-net of this host lacks features {0:#x}")]
    Features(u64),
    /// A ring broke the rules.
    #[error("vhost-net found a queue corrupt")]
    Queue,
    /// The taps cannot be set up as the driver wants them.
    #[error("cannot set the taps up")]
    Link(#[source] io::Error),
    /// The host is out of descriptors.
    #[error("cannot make an event for vhost-net")]
    Event(#[source] io::Error),
}

/// One descriptor of `/dev/vhost-net`: it carries one pair of queues.
pub(super) struct Vhost {
    fd: OwnedFd,
    /// The guest's, while it is carried.
    mem: GuestRam,
    carrying: bool,
}

impl Vhost {
    /// Checks the descriptor.
    pub(super) fn open(fd: OwnedFd) -> Result<Self, VhostError> {
        let vhost = Self { fd, mem: GuestRam::default(), carrying: false };
        let missing = FEATURES & !vhost.get_features().map_err(failed("learn what vhost-net can do"))?;
        if missing != 0 {
            return Err(VhostError::Features(missing));
        }
        Ok(vhost)
    }

    /// Lets the kernel carry a pair of queues. `call` interrupts the driver, `error` is told of corrupt rings.
    fn start(
        &mut self,
        tap: &Tap,
        // To receive, to send: the order is vhost-net's.
        rings: [&VirtQueue; 2],
        mem: &GuestRam,
        features: u64,
        call: &EventFd,
        error: &EventFd,
    ) -> Result<(), VhostError> {
        match self.set_owner() {
            // By an earlier start, or by an earlier device over the same descriptor. Another process's vhost refuses what follows.
            Err(vhost::Error::IoctlError(e)) if e.raw_os_error() == Some(libc::EBUSY) => {}
            other => other.map_err(failed("own vhost-net"))?,
        }
        self.mem = mem.clone();
        self.set_features(features & FEATURES).map_err(failed("set the features of vhost-net"))?;
        let regions: Vec<_> = mem.iter().map(memory_region).collect();
        self.set_mem_table(&regions).map_err(failed("show vhost-net the guest's memory"))?;
        for (index, queue) in rings.into_iter().enumerate() {
            self.set_ring(index, queue, call, error).map_err(failed("hand vhost-net a queue"))?;
        }
        self.carrying = true;
        for (index, queue) in rings.into_iter().enumerate() {
            self.set_backend(index, tap.as_fd().as_raw_fd()).map_err(failed("hand vhost-net a tap"))?;
            // What the driver has offered before is to be looked at, too.
            queue.kick_again();
        }
        Ok(())
    }

    fn set_ring(
        &self,
        index: usize,
        queue: &VirtQueue,
        call: &EventFd,
        error: &EventFd,
    ) -> vhost::Result<()> {
        let state = queue.state();
        self.set_vring_num(index, state.size)?;
        self.set_vring_base(index, state.next_avail)?;
        let config = VringConfigData {
            queue_max_size: state.size,
            queue_size: state.size,
            flags: 0,
            desc_table_addr: state.desc_table,
            used_ring_addr: state.used_ring,
            avail_ring_addr: state.avail_ring,
            log_addr: None,
        };
        self.set_vring_addr(index, &config)?;
        self.set_vring_call(index, call)?;
        self.set_vring_err(index, error)?;
        self.set_vring_kick(index, queue.kick_event())
    }

    /// Takes a pair of queues back from the kernel: when this returns, it touches neither them nor guest memory.
    fn stop(&mut self, rings: [&mut VirtQueue; 2]) {
        if !std::mem::take(&mut self.carrying) {
            return;
        }
        for (index, queue) in rings.into_iter().enumerate() {
            // Linux 6.12 drivers/vhost/net.c, vhost_net_set_backend(): waits for what is under way, and cannot fail for a queue that
            // has been set up.
            let stopped = self.set_backend(index, -1).and_then(|()| self.get_vring_base(index));
            match stopped {
                Ok(next_avail) => {
                    // vhost keeps no more of this than the ring does (virtio 1.3 s2.7.8): the index after the flags.
                    let used = GuestAddress(queue.state().used_ring + 2);
                    let next_used = self.mem.load(used, Ordering::Acquire).map_or(0, u16::from_le);
                    queue.set_position(next_avail as u16, next_used);
                }
                Err(e) => log::error!("vhost-net does not give a queue back: {e}"),
            }
        }
        self.mem = GuestRam::default();
    }

    fn set_backend(&self, index: usize, tap: RawFd) -> vhost::Result<()> {
        let file = vhost_vring_file { index: index as u32, fd: tap };
        // SAFETY: the request takes a pointer to such a struct, which outlives the call.
        if unsafe { ioctl_with_ref(self, VHOST_NET_SET_BACKEND(), &file) } < 0 {
            return Err(vhost::Error::IoctlError(io::Error::last_os_error()));
        }
        Ok(())
    }
}

impl AsRawFd for Vhost {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl VhostKernBackend for Vhost {
    type AS = GuestRam;

    fn mem(&self) -> &GuestRam {
        &self.mem
    }
}

fn memory_region(region: &GuestRegionMmap<()>) -> VhostUserMemoryRegionInfo {
    VhostUserMemoryRegionInfo {
        guest_phys_addr: region.start_addr().0,
        memory_size: region.len(),
        userspace_addr: region.as_ptr() as u64,
        // For vhost in other processes.
        mmap_offset: 0,
        mmap_handle: -1,
    }
}

fn failed(what: &'static str) -> impl Fn(vhost::Error) -> VhostError {
    move |source| VhostError::Ioctl { what, source }
}

/// Lets `vhosts` carry pairs of queues, one each, and obeys the control queue, until told to stop.
pub(super) fn serve(
    vhosts: &mut [Vhost],
    shared: &Shared,
    link: &mut Link,
    rings: Rings,
    inbox: &Inbox,
) -> Served {
    let Rings { mem, interrupt, features, mut pairs, ready_pairs, control, choice } = rings;
    let mut control = control.map(|queue| Control::new(queue, features, ready_pairs));
    let mut next = Next::Turn;
    let started = link.choose(choice).map_err(VhostError::Link).and_then(|()| {
        let call = interrupt.queue_event().map_err(VhostError::Event)?;
        let error = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(VhostError::Event)?;
        for ((vhost, tap), (rx, tx)) in vhosts.iter_mut().zip(&*shared.taps).zip(&pairs) {
            vhost.start(tap, [rx, tx], &mem, features, &call, &error)?;
        }
        Ok(error)
    });
    // Written to when vhost finds something wrong with a queue.
    let mut error = match started {
        Ok(error) => Some(error),
        Err(reason) => {
            // Commands are obeyed all the same: Linux waits for each with its hands in its lap.
            interrupt.needs_reset(&reason);
            None
        }
    };
    let reply = 'serving: loop {
        let kick = control.as_ref().filter(|_| next == Next::Kick).map(|control| control.queue().kick());
        let mut fds = [
            readable(inbox),
            kick.map_or(NOTHING, |kick| readable(&kick)),
            error.as_ref().map_or(NOTHING, readable),
        ];
        wait(&mut fds, next.deadline());
        let [told, kicked, wrong] = fds.map(|fd| fd.revents != 0);
        if told {
            inbox.clear();
            while let Some(command) = inbox.next() {
                match command {
                    Command::Stop(reply) => break 'serving Some(reply),
                    Command::Quit => break 'serving None,
                    Command::Start(_) | Command::Receive => {}
                }
            }
        }
        if wrong {
            interrupt.needs_reset(&VhostError::Queue);
            (error, next) = (None, Next::Never);
        }
        if !kicked && next != Next::Turn {
            continue;
        }
        next = match &mut control {
            Some(control) => {
                control.queue().clear_kick();
                control.turn(&mem, link, &shared.counters, &*interrupt).unwrap_or_else(|reason| {
                    interrupt.needs_reset(&reason);
                    Next::Never
                })
            }
            None => Next::Never,
        };
    };
    for (vhost, (rx, tx)) in vhosts.iter_mut().zip(&mut pairs) {
        vhost.stop([rx, tx]);
    }
    let Some(reply) = reply else { return Served::Quit };
    let (choice, control) = (link.choice(), control.map(Control::into_queue));
    let rings = Rings { mem, interrupt, features, pairs, ready_pairs, control, choice };
    Served::Stopped(reply, rings)
}
