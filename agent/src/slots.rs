//! virtio-mmio slots: binding and unbinding their driver by hand (Linux 6.12 `drivers/virtio/virtio_mmio.c`: the driver keeps
//! its `bind` and `unbind` files, and a slot that is empty at boot is skipped).

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

/// The most slots a machine can have, far above what any VMM declares.
const MAX_SLOTS: u32 = 256;

/// Why a slot could not be bound or unbound.
#[derive(Debug, thiserror::Error)]
pub enum SlotError {
    /// The machine has no such slot.
    #[error("slot {0} does not exist on this machine")]
    Unknown(u32),
    /// The kernel refuses: the slot is empty (`ENODEV`), or its device does not work.
    #[error("cannot bind the virtio driver to slot {slot}; is the slot filled?")]
    Bind {
        /// The slot.
        slot: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// There is a virtio device, and no driver took it.
    #[error("no driver of this kernel took the virtio device in slot {0}")]
    NoDriver(u32),
    /// The kernel refuses.
    #[error("cannot unbind the virtio driver from slot {slot}")]
    Unbind {
        /// The slot.
        slot: u32,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A block device in a slot.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct BlockDevice {
    /// As in `/dev`.
    pub name: String,
    /// Its device numbers.
    pub major: u32,
    /// The second of them.
    pub minor: u32,
}

/// The slots, through sysfs.
#[derive(Clone, Debug)]
pub struct Slots {
    sysfs: PathBuf,
}

impl Default for Slots {
    fn default() -> Self {
        Self { sysfs: "/sys".into() }
    }
}

impl Slots {
    /// Those of a sysfs elsewhere.
    #[cfg(test)]
    pub(crate) fn under(sysfs: PathBuf) -> Self {
        Self { sysfs }
    }

    /// Binds the driver, if it is not bound, and gives the block device in the slot, if there is one.
    /// The kernel probes in the write itself, so the device is there afterwards.
    ///
    /// # Errors
    ///
    /// [`SlotError`].
    pub fn bind(&self, slot: u32) -> Result<Option<BlockDevice>, SlotError> {
        let device = self.device(slot)?;
        if !device.join("driver").exists() {
            let result = fs::write(self.driver().join("bind"), name(slot));
            // A second request for the same slot may have been quicker.
            if let Err(source) = result
                && !device.join("driver").exists()
            {
                return Err(SlotError::Bind { slot, source });
            }
        }
        let virtio = virtio_device(&device).ok_or(SlotError::NoDriver(slot))?;
        if !virtio.join("driver").exists() {
            return Err(SlotError::NoDriver(slot));
        }
        if let Some(bus) = first_entry(&virtio, |name| name.starts_with("ndbus")) {
            return pmem_device(&virtio.join(bus)).ok_or(SlotError::NoDriver(slot)).map(Some);
        }
        Ok(block_device(&virtio))
    }

    /// Unbinds the driver, if it is bound.
    ///
    /// # Errors
    ///
    /// [`SlotError::Unknown`], [`SlotError::Unbind`].
    pub fn unbind(&self, slot: u32) -> Result<(), SlotError> {
        let device = self.device(slot)?;
        if !device.join("driver").exists() {
            return Ok(());
        }
        fs::write(self.driver().join("unbind"), name(slot))
            .map_err(|source| SlotError::Unbind { slot, source })
    }

    /// The name of the network interface in a slot; `None` where there is none, or the driver is not bound.
    ///
    /// # Errors
    ///
    /// [`SlotError::Unknown`].
    pub fn interface(&self, slot: u32) -> Result<Option<String>, SlotError> {
        let virtio = virtio_device(&self.device(slot)?);
        Ok(virtio.and_then(|virtio| first_entry(&virtio.join("net"), |_| true)))
    }

    fn device(&self, slot: u32) -> Result<PathBuf, SlotError> {
        let device = self.sysfs.join("bus/platform/devices").join(name(slot));
        if slot >= MAX_SLOTS || !device.exists() {
            return Err(SlotError::Unknown(slot));
        }
        Ok(device)
    }

    fn driver(&self) -> PathBuf {
        self.sysfs.join("bus/platform/drivers/virtio-mmio")
    }
}

fn name(slot: u32) -> String {
    format!("virtio-mmio.{slot}")
}

/// The virtio device of a bound slot: its only child named `virtioN`.
fn virtio_device(device: &Path) -> Option<PathBuf> {
    let is_virtio =
        |name: &str| name.strip_prefix("virtio").is_some_and(|n| n.bytes().all(|b| b.is_ascii_digit()));
    first_entry(device, is_virtio).map(|name| device.join(name))
}

/// The block device of a pmem device, whose virtio device has a bus of regions of namespaces. Those are probed in their own time;
/// reading `wait_probe` waits for that (Linux 6.12 drivers/nvdimm/core.c).
fn pmem_device(bus: &Path) -> Option<BlockDevice> {
    fs::read(bus.join("wait_probe")).ok()?;
    let region = bus.join(first_entry(bus, |name| name.starts_with("region"))?);
    // Beside the one with the memory there is a seed for another one, which has no block device.
    fs::read_dir(&region)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter(|name| name.starts_with("namespace"))
        .find_map(|namespace| block_device(&region.join(namespace)))
}

/// The block device of a device.
fn block_device(device: &Path) -> Option<BlockDevice> {
    let name = first_entry(&device.join("block"), |_| true)?;
    let numbers = fs::read_to_string(device.join("block").join(&name).join("dev")).ok()?;
    let (major, minor) = numbers.trim().split_once(':')?;
    Some(BlockDevice { name, major: major.parse().ok()?, minor: minor.parse().ok()? })
}

fn first_entry(dir: &Path, matches: impl Fn(&str) -> bool) -> Option<String> {
    fs::read_dir(dir)
        .ok()?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .find(|name| matches(name))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    /// A sysfs with slot 1 empty, slot 2 bound to a block device, slot 3 bound to a device nobody drives.
    fn sysfs(name: &str) -> Slots {
        let sysfs = std::env::temp_dir().join(format!("kvrun-slots-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&sysfs);
        let driver = sysfs.join("bus/platform/drivers/virtio-mmio");
        fs::create_dir_all(&driver).unwrap();
        for slot in 1..=3 {
            fs::create_dir_all(sysfs.join(format!("bus/platform/devices/virtio-mmio.{slot}/power"))).unwrap();
        }
        for (slot, virtio) in [(2, "virtio0"), (3, "virtio1")] {
            let device = sysfs.join(format!("bus/platform/devices/virtio-mmio.{slot}"));
            symlink(&driver, device.join("driver")).unwrap();
            fs::create_dir(device.join(virtio)).unwrap();
        }
        let block = sysfs.join("bus/platform/devices/virtio-mmio.2/virtio0");
        symlink(&driver, block.join("driver")).unwrap();
        fs::create_dir_all(block.join("block/vda/queue")).unwrap();
        fs::write(block.join("block/vda/dev"), "254:16\n").unwrap();
        Slots { sysfs }
    }

    #[test]
    fn a_bound_slot_tells_its_block_device() {
        let slots = sysfs("bound");
        let vda = BlockDevice { name: "vda".to_owned(), major: 254, minor: 16 };
        assert_eq!(slots.bind(2).unwrap(), Some(vda));
        assert!(matches!(slots.bind(3), Err(SlotError::NoDriver(3))));
        fs::remove_dir_all(slots.sysfs).unwrap();
    }

    #[test]
    fn a_pmem_device_is_a_block_device_too() {
        let slots = sysfs("pmem");
        let virtio = slots.device(3).unwrap().join("virtio1");
        symlink(slots.driver(), virtio.join("driver")).unwrap();
        let bus = virtio.join("ndbus0");
        fs::create_dir_all(bus.join("region0/namespace0.1")).unwrap();
        fs::write(bus.join("wait_probe"), "1\n").unwrap();
        assert!(matches!(slots.bind(3), Err(SlotError::NoDriver(3))), "its memory cannot be used");
        fs::create_dir_all(bus.join("region0/namespace0.0/block/pmem0")).unwrap();
        fs::write(bus.join("region0/namespace0.0/block/pmem0/dev"), "259:0\n").unwrap();
        let pmem = BlockDevice { name: "pmem0".to_owned(), major: 259, minor: 0 };
        assert_eq!(slots.bind(3).unwrap(), Some(pmem));
        fs::remove_dir_all(slots.sysfs).unwrap();
    }

    #[test]
    fn slots_that_are_missing_or_refused_are_named() {
        let slots = sysfs("missing");
        for slot in [0, 4, u32::MAX] {
            assert!(matches!(slots.bind(slot), Err(SlotError::Unknown(_))));
            assert!(matches!(slots.unbind(slot), Err(SlotError::Unknown(_))));
        }
        // The kernel would refuse the write; here it is a directory that does.
        fs::create_dir(slots.driver().join("bind")).unwrap();
        assert!(matches!(slots.bind(1), Err(SlotError::Bind { slot: 1, .. })));
        slots.unbind(1).unwrap();
        slots.unbind(2).unwrap();
        assert_eq!(fs::read_to_string(slots.driver().join("unbind")).unwrap(), "virtio-mmio.2");
        fs::remove_dir_all(slots.sysfs).unwrap();
    }
}
