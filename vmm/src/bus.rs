//! Which device answers which I/O port or physical address.
//!
//! A [`Bus`] is filled before the first vCPU runs and never changes afterwards, so vCPU threads look devices up without a
//! lock; a device brings its own. (A virtio-mmio slot that is empty is still a device: it answers device ID 0.)

use std::sync::Arc;

/// A device that answers a range of ports or addresses. Any vCPU thread may call it, several at a time.
///
/// Offsets are relative to the range the device was inserted with, and an access never reaches past that range. The guest
/// chooses offset, width and data: a device ignores a write and answers all ones to a read that make no sense to it.
/// A string instruction (`rep outsb`) to a port arrives as one access with all its data.
pub trait BusDevice: Send + Sync {
    /// The guest reads `data.len()` bytes at `offset`.
    fn read(&self, offset: u64, data: &mut [u8]);
    /// The guest writes `data` at `offset`.
    fn write(&self, offset: u64, data: &[u8]);
}

/// A range cannot be put on the bus.
#[derive(Debug, thiserror::Error)]
#[error("cannot put a device at {base:#x}..+{length:#x}: the range is empty, wraps or is taken")]
pub struct BusError {
    base: u64,
    length: u64,
}

struct Range {
    base: u64,
    length: u64,
    device: Arc<dyn BusDevice>,
}

/// Ranges of ports or addresses and their devices.
#[derive(Default)]
pub struct Bus {
    /// Sorted by base, disjoint.
    ranges: Vec<Range>,
}

impl Bus {
    /// A bus without devices.
    pub fn new() -> Self {
        Self::default()
    }

    /// Puts `device` at `base..base + length`.
    ///
    /// # Errors
    /// [`BusError`] if the range is empty, wraps around or overlaps another.
    pub fn insert(&mut self, base: u64, length: u64, device: Arc<dyn BusDevice>) -> Result<(), BusError> {
        let error = BusError { base, length };
        let Some(last) = length.checked_sub(1).and_then(|extent| base.checked_add(extent)) else {
            return Err(error);
        };
        let index = self.ranges.partition_point(|range| range.base <= base);
        let overlaps_previous =
            index.checked_sub(1).is_some_and(|i| base - self.ranges[i].base < self.ranges[i].length);
        let overlaps_next = self.ranges.get(index).is_some_and(|next| next.base <= last);
        if overlaps_previous || overlaps_next {
            return Err(error);
        }
        self.ranges.insert(index, Range { base, length, device });
        Ok(())
    }

    /// Carries out a read. What no device answers reads as all ones, as on an ISA or PCI bus; returns whether one did.
    pub fn read(&self, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((range, offset)) => {
                range.device.read(offset, data);
                true
            }
            None => {
                data.fill(0xff);
                false
            }
        }
    }

    /// Carries out a write. What no device answers is lost; returns whether one did.
    pub fn write(&self, address: u64, data: &[u8]) -> bool {
        match self.find(address, data.len()) {
            Some((range, offset)) => {
                range.device.write(offset, data);
                true
            }
            None => false,
        }
    }

    /// The range that holds all `length` bytes at `address`, and the offset in it. A port access of a string instruction is
    /// longer than the port is wide; it belongs to whom its first byte belongs to.
    fn find(&self, address: u64, length: usize) -> Option<(&Range, u64)> {
        let index = self.ranges.partition_point(|range| range.base <= address).checked_sub(1)?;
        let range = &self.ranges[index];
        let offset = address - range.base;
        let room = range.length.checked_sub(offset)?;
        (room > 0 && (length as u64 <= room || length > MAX_SINGLE_ACCESS)).then_some((range, offset))
    }
}

/// The widest access of one instruction that is not a string instruction, in bytes: KVM splits what is wider.
const MAX_SINGLE_ACCESS: usize = 8;
