//! A pair of queues carried in this process: a thread that moves packets both ways, in turns.
//!
//! A thread of its own, not the event loop: a guest that keeps its link busy would hold up vsock there, and with it the control of the
//! machine. One for each pair, because that is what several pairs are for.

use std::error::Error;
use std::os::fd::AsFd;
use std::sync::mpsc::SyncSender;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use libc::{POLLERR, POLLHUP, POLLIN, POLLOUT};

use super::control::Control;
use super::counters::Counters;
use super::link::Link;
use super::rx::Receiver;
use super::tap::Tap;
use super::turn::Next;
use super::tx::Transmitter;
use super::worker::{Command, Inbox, NOTHING, Rings, Served, awaited, readable, wait};
use crate::devices::virtio::{GuestRam, InterruptLine, QueueError};
use crate::locked;
use crate::rate_limiter::RateLimiter;

/// What all threads of a link share.
pub(super) struct Shared {
    pub(super) taps: Arc<[Tap]>,
    pub(super) mtu: u16,
    pub(super) counters: Counters,
    pub(super) rx_limit: Mutex<RateLimiter>,
    pub(super) tx_limit: Mutex<RateLimiter>,
}

/// Carries a pair of queues, and with `link` obeys the control queue, until told to stop.
pub(super) fn serve(
    shared: &Shared,
    pair: usize,
    mut link: Option<&mut Link>,
    rings: Rings,
    inbox: &Inbox,
) -> Served {
    let Rings { mem, interrupt, features, pairs, ready_pairs, control, choice } = rings;
    let mut set_up = Ok(());
    if let Some(link) = &mut link {
        set_up = link.choose(choice);
    }
    let mut pairs = pairs.into_iter();
    // The device hands each of these threads one.
    let Some((rx, tx)) = pairs.next() else { return Served::Quit };
    let mut serving = Serving {
        shared,
        tap: &shared.taps[pair],
        mem: &mem,
        interrupt: &*interrupt,
        rx: Receiver::new(rx, features, shared.mtu),
        tx: Transmitter::new(tx, features),
        control: control.map(|queue| Control::new(queue, features, ready_pairs)),
        link,
        next: Tasks { rx: Next::Turn, tx: Next::Turn, control: Next::Turn },
    };
    if let Err(reason) = set_up {
        serving.give_up(&reason);
        // Commands are obeyed all the same: Linux waits for each with its hands in its lap.
        serving.next.control = Next::Turn;
    }
    let reply = loop {
        let due = serving.wait(inbox);
        if due.told {
            match serving.obey(inbox) {
                Told::Nothing => {}
                Told::Stop(reply) => break reply,
                Told::Quit => return Served::Quit,
            }
        }
        if let Err(reason) = serving.turns(&due) {
            serving.give_up(&reason);
        }
    };
    let choice = serving.link.as_ref().map_or(choice, |link| link.choice());
    let pairs = vec![(serving.rx.into_queue(), serving.tx.into_queue())];
    let control = serving.control.map(Control::into_queue);
    let rings = Rings {
        mem: mem.clone(),
        interrupt: interrupt.clone(),
        features,
        pairs,
        ready_pairs,
        control,
        choice,
    };
    Served::Stopped(reply, rings)
}

/// A pair of queues being served.
struct Serving<'s> {
    shared: &'s Shared,
    tap: &'s Tap,
    mem: &'s GuestRam,
    interrupt: &'s dyn InterruptLine,
    rx: Receiver,
    tx: Transmitter,
    control: Option<Control>,
    link: Option<&'s mut Link>,
    next: Tasks<Next>,
}

/// Something about each of the queues.
struct Tasks<T> {
    rx: T,
    tx: T,
    control: T,
}

/// Whose turn it is.
struct Due {
    /// There may be a command for the thread.
    told: bool,
    queues: Tasks<bool>,
}

/// What the thread has been told.
enum Told {
    Nothing,
    Stop(SyncSender<Rings>),
    Quit,
}

impl Serving<'_> {
    /// Waits until there is something to do.
    fn wait(&self, inbox: &Inbox) -> Due {
        let Tasks { rx, tx, control } = self.next;
        let tap = if rx == Next::Tap { POLLIN } else { 0 } | if tx == Next::Tap { POLLOUT } else { 0 };
        let control_kick = self.control.as_ref().filter(|_| control == Next::Kick);
        let mut fds = [
            Some(readable(inbox)),
            (rx == Next::Kick).then(|| readable(&self.rx.queue().kick())),
            (tx == Next::Kick).then(|| readable(&self.tx.queue().kick())),
            control_kick.map(|control| readable(&control.queue().kick())),
            (tap != 0).then(|| awaited(&self.tap.as_fd(), tap)),
        ]
        .map(|awaited| awaited.unwrap_or(NOTHING));
        wait(&mut fds, [rx, tx, control].into_iter().filter_map(Next::deadline).min());
        let [told, rx_kick, tx_kick, control_kick, tap] = fds.map(|fd| fd.revents);
        let due = |next: Next, kick, event| match next {
            Next::Turn => true,
            Next::Kick => kick != 0,
            // Trouble, too, shows itself to who reads or writes.
            Next::Tap => tap & (event | POLLERR | POLLHUP) != 0,
            Next::At(time) => Instant::now() >= time,
            Next::Never => false,
        };
        let queues = Tasks {
            rx: due(rx, rx_kick, POLLIN),
            tx: due(tx, tx_kick, POLLOUT),
            control: due(control, control_kick, 0),
        };
        Due { told: told != 0, queues }
    }

    /// Does what the thread has been told.
    fn obey(&mut self, inbox: &Inbox) -> Told {
        inbox.clear();
        while let Some(command) = inbox.next() {
            match command {
                Command::Receive if self.next.rx == Next::Never => self.next.rx = Next::Turn,
                Command::Stop(reply) => return Told::Stop(reply),
                Command::Quit => return Told::Quit,
                Command::Receive | Command::Start(_) => {}
            }
        }
        // The limits may have changed.
        for next in [&mut self.next.rx, &mut self.next.tx] {
            if let Next::At(_) = next {
                *next = Next::Turn;
            }
        }
        Told::Nothing
    }

    /// Gives each queue that is due its turn.
    fn turns(&mut self, due: &Due) -> Result<(), QueueError> {
        let Shared { counters, rx_limit, tx_limit, .. } = self.shared;
        let (mem, interrupt, tap) = (self.mem, self.interrupt, self.tap.as_fd());
        if due.queues.rx {
            self.rx.queue().clear_kick();
            let mut limit = bounded(rx_limit);
            self.next.rx = self.rx.turn(mem, tap, limit.as_deref_mut(), counters, interrupt)?;
        }
        if due.queues.tx {
            self.tx.queue().clear_kick();
            let mut limit = bounded(tx_limit);
            self.next.tx = self.tx.turn(mem, tap, limit.as_deref_mut(), counters, interrupt)?;
        }
        if due.queues.control {
            self.next.control = match (&mut self.control, &mut self.link) {
                (Some(control), Some(link)) => {
                    control.queue().clear_kick();
                    control.turn(mem, link, counters, interrupt)?
                }
                _ => Next::Never,
            };
        }
        Ok(())
    }

    /// Serves the driver no more, until it resets the device.
    fn give_up(&mut self, reason: &dyn Error) {
        self.interrupt.needs_reset(reason);
        self.next = Tasks { rx: Next::Never, tx: Next::Never, control: Next::Never };
    }
}

/// The limiter, if it has to be asked. Threads whose link is not limited do not hold each other up.
fn bounded(limiter: &Mutex<RateLimiter>) -> Option<MutexGuard<'_, RateLimiter>> {
    Some(locked(limiter.lock())).filter(|limiter| !limiter.is_unbounded())
}
