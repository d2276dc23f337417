//! What the driver decides for the link as a whole, applied to the taps.

use std::io;
use std::sync::Arc;

use super::tap::Tap;
use super::worker::{Command, Mailbox};

/// What the driver has decided.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Choice {
    /// How many pairs of queues it uses. One until it says otherwise (virtio 1.3 s5.1.6.5.5).
    pub(super) pairs: u16,
    /// Offloads it takes, as feature bits. All it has accepted until it says otherwise (virtio 1.3 s5.1.6.5.6).
    pub(super) offloads: u64,
}

/// The taps of a link, and who carries packets between them and the guest.
pub(super) struct Link {
    taps: Arc<[Tap]>,
    /// The threads of the second pair of queues and those after it, where they have any.
    others: Vec<Mailbox>,
    /// How many of the taps are attached to the interface.
    attached: usize,
    choice: Choice,
}

impl Link {
    /// A link whose taps are all attached.
    pub(super) fn new(taps: Arc<[Tap]>, others: Vec<Mailbox>) -> Self {
        Self { attached: taps.len(), taps, others, choice: Choice { pairs: 1, offloads: 0 } }
    }

    /// What the driver has decided.
    pub(super) fn choice(&self) -> Choice {
        self.choice
    }

    /// Makes the link as a driver has decided.
    ///
    /// # Errors
    /// As ioctl(2).
    pub(super) fn choose(&mut self, choice: Choice) -> io::Result<()> {
        self.set_pairs(choice.pairs)?;
        self.set_offloads(choice.offloads)
    }

    /// Lets the host spread packets over the first `pairs` taps, which must be there.
    ///
    /// # Errors
    /// As ioctl(2).
    pub(super) fn set_pairs(&mut self, pairs: u16) -> io::Result<()> {
        let wanted = usize::from(pairs);
        while self.attached < wanted {
            self.taps[self.attached].attach(true)?;
            self.attached += 1;
        }
        while self.attached > wanted {
            self.taps[self.attached - 1].attach(false)?;
            self.attached -= 1;
        }
        for mailbox in self.others.iter().take(wanted - 1) {
            mailbox.send(Command::Receive);
        }
        self.choice.pairs = pairs;
        Ok(())
    }

    /// Lets the host send packets that need these offloads.
    ///
    /// # Errors
    /// As ioctl(2).
    pub(super) fn set_offloads(&mut self, offloads: u64) -> io::Result<()> {
        // One setting for all queues of a tap device.
        self.taps[0].set_offloads(offloads)?;
        self.choice.offloads = offloads;
        Ok(())
    }
}

impl Drop for Link {
    /// Leaves the taps as they came: the engine may attach them again.
    fn drop(&mut self) {
        for tap in &self.taps[self.attached..] {
            // Fails only if the interface is gone.
            let _ = tap.attach(true);
        }
    }
}
