//! The devices of guest memory, made of what a machine has of it.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::AddressSpace;
use super::hotplug::Hotplug;
use super::reclaim::{PAGE, Reclaimable};
use super::slot::MemorySlots;
use super::window::{Window, WindowError};
use crate::devices::virtio::balloon::Balloon;
use crate::devices::virtio::mem::Mem;
use crate::devices::virtio::pmem::Pmem;
use crate::event_loop::LoopHandle;

/// A device of guest memory cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum MemoryDeviceError {
    /// A file as memory.
    #[error("cannot make the file memory of the guest")]
    Window(#[from] WindowError),
    /// There is nowhere to put files.
    #[error("the host has no address space for files as memory of the guest")]
    NoWindow,
    /// The machine was booted without room for more memory.
    #[error("the machine was booted with memory that cannot grow")]
    NoHotplug,
}

impl MemoryDeviceError {
    /// Whether the one who asked is at fault, not the host.
    pub fn is_invalid(&self) -> bool {
        matches!(self, Self::Window(WindowError::NotAFile | WindowError::Empty | WindowError::Full(_)))
    }
}

/// What devices of guest memory are made of.
pub struct MemoryDevices {
    window: Option<Arc<Window>>,
    hotplug: Option<Arc<Hotplug>>,
    /// How much may be plugged, in bytes.
    most: u64,
    reclaimable: Reclaimable,
    /// What the guest says the balloon holds, in pages.
    in_balloon: Arc<AtomicU32>,
}

impl MemoryDevices {
    /// For a machine with this address space that may grow by `most` bytes; `max_slots` is how many memory slots there can be.
    pub fn new(
        space: &AddressSpace,
        most: u64,
        slots: &Arc<impl MemorySlots + 'static>,
        max_slots: usize,
    ) -> Self {
        let reclaimable = Reclaimable::new(space.anonymous.clone());
        let window = space.window.clone().map(|region| Arc::new(Window::new(region, slots.clone())));
        let hotplug = space
            .hotplug
            .clone()
            .map(|region| Arc::new(Hotplug::new(region, slots.clone(), reclaimable.clone(), max_slots)));
        Self { window, hotplug, most, reclaimable, in_balloon: Arc::default() }
    }

    /// A virtio-pmem device for a file.
    ///
    /// # Errors
    /// [`MemoryDeviceError`].
    pub fn pmem(&self, events: LoopHandle, file: OwnedFd) -> Result<Pmem, MemoryDeviceError> {
        let window = self.window.as_ref().ok_or(MemoryDeviceError::NoWindow)?;
        Ok(Pmem::new(events, window.map(file)?))
    }

    /// The virtio-mem device.
    ///
    /// # Errors
    /// [`MemoryDeviceError::NoHotplug`].
    pub fn mem(&self, events: LoopHandle) -> Result<Mem, MemoryDeviceError> {
        let hotplug = self.hotplug.clone().ok_or(MemoryDeviceError::NoHotplug)?;
        Ok(Mem::new(events, hotplug, self.most))
    }

    /// The balloon.
    pub fn balloon(&self, events: LoopHandle, reporting: bool) -> Balloon {
        Balloon::new(events, self.reclaimable.clone(), reporting, self.in_balloon.clone())
    }

    /// How much is plugged, in bytes.
    pub fn plugged(&self) -> u64 {
        self.hotplug.as_ref().map_or(0, |hotplug| hotplug.plugged())
    }

    /// How much the balloon holds, in bytes, as the guest says.
    pub fn in_balloon(&self) -> u64 {
        u64::from(self.in_balloon.load(Ordering::Relaxed)) * PAGE
    }
}
