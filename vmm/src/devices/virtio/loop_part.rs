//! The part of a device that works on the event loop: started, paused, resumed and stopped as its device is.

use std::io;

use crate::event_loop::{LoopHandle, Subscriber, SubscriberId};

/// Where the part is. While it works, the loop owns it; while it is paused, this does.
pub(crate) struct LoopPart<T> {
    pub(super) events: LoopHandle,
    state: State<T>,
}

enum State<T> {
    None,
    Working(SubscriberId),
    Paused(Box<T>),
}

impl<T: Subscriber> LoopPart<T> {
    /// No part yet, for this loop.
    pub(crate) fn new(events: LoopHandle) -> Self {
        Self { events, state: State::None }
    }

    /// Hands the part to the loop.
    ///
    /// # Errors
    /// As [`LoopHandle::add`]; the part is dropped.
    pub(crate) fn start(&mut self, part: Box<T>) -> io::Result<()> {
        self.state = State::None;
        self.state = State::Working(self.events.add(part)?);
        Ok(())
    }

    /// Takes the part off the loop. What makes its descriptors ready meanwhile is seen after [`LoopPart::resume`].
    pub(crate) fn pause(&mut self) {
        if let State::Working(id) = self.state {
            // A loop that has ended has dropped it.
            self.state = self.events.take(id).map_or(State::None, State::Paused);
        }
    }

    /// Gives the part back to the loop.
    ///
    /// # Errors
    /// As [`LoopPart::start`].
    pub(crate) fn resume(&mut self) -> io::Result<()> {
        match std::mem::replace(&mut self.state, State::None) {
            State::Paused(part) => self.start(part),
            other => {
                self.state = other;
                Ok(())
            }
        }
    }

    /// Ends and drops it.
    pub(crate) fn stop(&mut self) {
        self.pause();
        self.state = State::None;
    }

    /// The part, while it is paused.
    pub(crate) fn paused(&self) -> Option<&T> {
        match &self.state {
            State::Paused(part) => Some(part),
            _ => None,
        }
    }

    /// As [`LoopPart::paused`], to change it.
    pub(crate) fn paused_mut(&mut self) -> Option<&mut T> {
        match &mut self.state {
            State::Paused(part) => Some(part),
            _ => None,
        }
    }
}
