//! The devices of guest memory, over a machine without KVM.

use std::fs::File;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::atomic::AtomicU32;
use std::sync::{Arc, LazyLock};

use kvrun_vmm::devices::virtio::balloon::Balloon;
use kvrun_vmm::devices::virtio::mem::Mem;
use kvrun_vmm::devices::virtio::pmem::Pmem;
use kvrun_vmm::devices::virtio::{DeviceRequest, VirtioDevice};
use kvrun_vmm::memory::hotplug::Hotplug;
use kvrun_vmm::memory::reclaim::Reclaimable;
use kvrun_vmm::memory::slot::{MemorySlot, MemorySlots};
use kvrun_vmm::memory::window::Window;
use libfuzzer_sys::Corpus;
use rustix::fs::{MemfdFlags, memfd_create};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestAddress, GuestMemoryMmap, GuestRegionMmap};

use crate::devices::{EVENTS, drive, live};
use crate::driver;

/// Where a region of more memory begins, and its length: eight blocks.
const REGION: GuestAddress = GuestAddress(1 << 33);
const LENGTH: usize = 16 << 20;

/// Memory slots of no machine.
struct NoSlots;

impl MemorySlots for NoSlots {
    fn add(&self, _: MemorySlot) -> io::Result<()> {
        Ok(())
    }
    fn remove(&self, _: MemorySlot) -> io::Result<()> {
        Ok(())
    }
}

/// The region, mapped once.
static MEMORY: LazyLock<Arc<GuestRegionMmap<()>>> = LazyLock::new(|| {
    let region = MmapRegion::new(LENGTH).expect("address space");
    Arc::new(GuestRegionMmap::new(region, REGION).expect("an address"))
});

/// virtio-pmem.
pub(crate) fn pmem(data: &[u8]) -> Corpus {
    let window = Arc::new(Window::new(MEMORY.clone(), Arc::new(NoSlots)));
    let file: OwnedFd = memfd_create("image", MemfdFlags::CLOEXEC).expect("memfd");
    File::from(file.try_clone().expect("descriptor")).set_len(5000).expect("memory");
    let file = window.map(file).expect("a file that fits");
    live(data, Box::new(Pmem::new(EVENTS.clone(), file)), &[0])
}

/// virtio-mem, asked now for more and now for less.
pub(crate) fn mem(data: &[u8]) -> Corpus {
    let all = GuestMemoryMmap::from_arc_regions(vec![MEMORY.clone()]).expect("one region");
    let hotplug =
        Arc::new(Hotplug::new(MEMORY.clone(), Arc::new(NoSlots), Reclaimable::new(Arc::new(all)), 512));
    let mut device = Mem::new(EVENTS.clone(), hotplug.clone(), LENGTH as u64);
    let wanted = u64::from(data.first().copied().unwrap_or(0) % 9) * (2 << 20);
    // A device whose driver is not there yet may refuse.
    let _ = device.request(DeviceRequest::Plug(wanted));
    let outcome = live(data, Box::new(device), &[0]);
    assert!(hotplug.plugged() <= LENGTH as u64);
    outcome
}

/// virtio-balloon in the driver's own memory.
pub(crate) fn balloon(data: &[u8]) -> Corpus {
    let mem = driver::memory();
    let reporting = data.first().is_some_and(|byte| byte & 1 == 1);
    let device =
        Balloon::new(EVENTS.clone(), Reclaimable::new(mem.clone()), reporting, Arc::new(AtomicU32::new(0)));
    drive(data, Box::new(device), mem, &[0, 1, 3, 4], |_| Ok(()))
}
