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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use super::*;

    /// Answers with its name; notes what is written.
    struct Probe(u8, Mutex<Vec<(u64, Vec<u8>)>>);

    impl BusDevice for Probe {
        fn read(&self, offset: u64, data: &mut [u8]) {
            data.fill(self.0);
            data[0] = offset as u8;
        }
        fn write(&self, offset: u64, data: &[u8]) {
            self.1.lock().unwrap().push((offset, data.to_vec()));
        }
    }

    fn probe(name: u8) -> Arc<Probe> {
        Arc::new(Probe(name, Mutex::default()))
    }

    #[test]
    fn access_reaches_the_device_of_its_range() {
        let (low, high) = (probe(1), probe(2));
        let mut bus = Bus::new();
        bus.insert(0x2000, 0x1000, high.clone()).unwrap();
        bus.insert(0x1000, 0x1000, low.clone()).unwrap();
        let mut data = [0; 2];
        assert!(bus.read(0x1ffe, &mut data));
        assert_eq!(data, [0xfe, 1]);
        assert!(bus.read(0x2000, &mut data));
        assert_eq!(data, [0, 2]);
        assert!(bus.write(0x2ffc, &[1, 2, 3, 4]));
        assert_eq!(*high.1.lock().unwrap(), [(0xffc, vec![1, 2, 3, 4])]);
        assert!(low.1.lock().unwrap().is_empty());
    }

    #[test]
    fn nothing_answers_all_ones_and_loses_writes() {
        let mut bus = Bus::new();
        let mut data = [0; 4];
        assert!(!bus.read(0, &mut data));
        assert_eq!(data, [0xff; 4]);
        bus.insert(0x10, 0x10, probe(1)).unwrap();
        for address in [0, 0xf, 0x20, u64::MAX] {
            assert!(!bus.read(address, &mut data), "{address:#x}");
            assert_eq!(data, [0xff; 4]);
            assert!(!bus.write(address, &data), "{address:#x}");
        }
    }

    #[test]
    fn access_that_reaches_past_the_range_is_nobodys() {
        let mut bus = Bus::new();
        let device = probe(1);
        bus.insert(0x10, 4, device.clone()).unwrap();
        assert!(!bus.write(0x12, &[0; 4]));
        assert!(bus.write(0x12, &[0; 2]));
        // A string instruction writes all its data to one port.
        assert!(bus.write(0x13, &[0; 100]));
        assert_eq!(device.1.lock().unwrap().len(), 2);
    }

    #[test]
    fn ranges_that_overlap_or_wrap_are_refused() {
        let mut bus = Bus::new();
        bus.insert(0x10, 0x10, probe(1)).unwrap();
        for (base, length) in
            [(0x10, 0x10), (0x1f, 1), (0x8, 9), (0, u64::MAX), (0x14, 2), (0x30, 0), (u64::MAX, 2)]
        {
            assert!(bus.insert(base, length, probe(2)).is_err(), "{base:#x}..+{length:#x}");
        }
        bus.insert(0x20, 1, probe(2)).unwrap();
        bus.insert(0xf, 1, probe(2)).unwrap();
        bus.insert(u64::MAX, 1, probe(3)).unwrap();
        assert!(bus.write(u64::MAX, &[0]));
    }
}
