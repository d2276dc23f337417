//! Devices that serve their queues on the event loop, a turn at a time: a turn ends after a bounded amount of work, and the next comes
//! after everything else that is ready.

use std::io;
use std::sync::Arc;

use rustix::event::epoll::EventFlags;

use super::loop_part::LoopPart;
use super::{ActivateError, Activation, GuestRam, InterruptLine, QueueError, QueuePosition, VirtQueue};
use crate::event_loop::{LoopHandle, Registry, Subscriber};

/// What a device does with its queues.
pub(crate) trait Serve: Send + 'static {
    /// Serves chains of a queue for one turn.
    ///
    /// # Errors
    /// [`QueueError`]: the driver broke the rules, and the device is deaf until it is reset.
    fn turn(&mut self, queue: &mut VirtQueue, mem: &GuestRam) -> Result<Turn, QueueError>;

    /// Ends what is under way in a queue, for the device is about to rest.
    ///
    /// # Errors
    /// As [`Serve::turn`].
    fn settle(&mut self, _queue: &mut VirtQueue, _mem: &GuestRam) -> Result<Turn, QueueError> {
        Ok(Turn::default())
    }
}

/// How a turn went.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Turn {
    /// Chains have been returned.
    pub(crate) answered: bool,
    /// There may be more to do.
    pub(crate) more: bool,
}

/// The queues of a device and what serves them, on the event loop.
pub(crate) struct Served<S> {
    serve: S,
    mem: GuestRam,
    interrupt: Arc<dyn InterruptLine>,
    /// `None` where the driver did not make it ready.
    queues: Vec<Option<VirtQueue>>,
    broken: bool,
}

impl<S: Serve> Served<S> {
    fn deregister(&self, registry: &Registry<'_>) {
        for queue in self.queues.iter().flatten() {
            // Fails only if it is not registered.
            let _ = registry.delete(queue.kick());
        }
    }

    fn serve(&mut self, index: usize) -> Result<(), QueueError> {
        let Some(queue) = self.queues.get_mut(index).and_then(Option::as_mut) else { return Ok(()) };
        queue.clear_kick();
        let turn = self.serve.turn(queue, &self.mem)?;
        Self::after(turn, queue, &self.mem, &*self.interrupt)
    }

    fn settle(&mut self) -> Result<(), QueueError> {
        for queue in self.queues.iter_mut().flatten() {
            let turn = self.serve.settle(queue, &self.mem)?;
            Self::after(turn, queue, &self.mem, &*self.interrupt)?;
        }
        Ok(())
    }

    fn after(
        turn: Turn,
        queue: &mut VirtQueue,
        mem: &GuestRam,
        interrupt: &dyn InterruptLine,
    ) -> Result<(), QueueError> {
        if turn.answered && queue.needs_interrupt(mem)? {
            interrupt.signal_queue(queue.index());
        }
        if turn.more {
            queue.kick_again();
        }
        Ok(())
    }
}

impl<S: Serve> Subscriber for Served<S> {
    fn subscribe(&mut self, registry: &Registry<'_>) -> io::Result<()> {
        if self.broken {
            return Ok(());
        }
        for queue in self.queues.iter().flatten() {
            registry.add(queue.kick(), queue.index().into(), EventFlags::IN)?;
        }
        Ok(())
    }

    fn ready(&mut self, token: u32, _events: EventFlags, registry: &Registry<'_>) {
        // An event of the batch in which the device broke.
        if self.broken {
            return;
        }
        if let Err(reason) = self.serve(token as usize) {
            self.broken = true;
            self.deregister(registry);
            self.interrupt.needs_reset(&reason);
        }
    }

    fn unsubscribe(&mut self, registry: &Registry<'_>) {
        self.deregister(registry);
    }
}

/// The part of such a device on the event loop: see [`LoopPart`].
pub(crate) struct ServedPart<S> {
    part: LoopPart<Served<S>>,
}

impl<S: Serve> ServedPart<S> {
    /// No part yet, for this loop.
    pub(crate) fn new(events: LoopHandle) -> Self {
        Self { part: LoopPart::new(events) }
    }

    /// Starts to serve the queues, all of which must be there.
    ///
    /// # Errors
    /// [`ActivateError::MissingQueue`], [`ActivateError::Host`].
    pub(crate) fn start(&mut self, activation: Activation, serve: S) -> Result<(), ActivateError> {
        if let Some(missing) = activation.queues.iter().position(Option::is_none) {
            return Err(ActivateError::MissingQueue(missing as u16));
        }
        self.start_with_some(activation, serve)
    }

    /// Starts to serve the queues that are there.
    ///
    /// # Errors
    /// [`ActivateError::Host`].
    pub(crate) fn start_with_some(&mut self, activation: Activation, serve: S) -> Result<(), ActivateError> {
        let Activation { mem, queues, interrupt, .. } = activation;
        let served = Served { serve, mem, interrupt, queues, broken: false };
        self.part.start(Box::new(served)).map_err(wait_error)
    }

    pub(crate) fn stop(&mut self) {
        self.part.stop();
    }

    /// Takes the device off the loop, nothing being under way.
    pub(crate) fn pause(&mut self) {
        self.part.pause();
        let Some(served) = self.part.paused_mut() else { return };
        if !served.broken
            && let Err(reason) = served.settle()
        {
            served.broken = true;
            served.interrupt.needs_reset(&reason);
        }
    }

    /// The loop.
    #[cfg(test)]
    pub(crate) fn events(&self) -> &LoopHandle {
        &self.part.events
    }

    /// What serves, while it is paused.
    pub(crate) fn paused(&self) -> Option<&S> {
        self.part.paused().map(|served| &served.serve)
    }

    /// Goes on; a device that cannot is deaf until it is reset.
    pub(crate) fn resume(&mut self) {
        let interrupt = self.part.paused().map(|served| served.interrupt.clone());
        if let (Err(e), Some(interrupt)) = (self.part.resume(), interrupt) {
            interrupt.needs_reset(&wait_error(e));
        }
    }

    /// How far each queue has come, while it is paused; none if the driver has not started the device.
    pub(crate) fn positions(&self) -> Vec<Option<QueuePosition>> {
        let queues = self.part.paused().map(|served| served.queues.iter());
        queues.into_iter().flatten().map(|queue| queue.as_ref().map(VirtQueue::position)).collect()
    }
}

fn wait_error(source: io::Error) -> ActivateError {
    ActivateError::Host { what: "wait for the driver's requests", source }
}
