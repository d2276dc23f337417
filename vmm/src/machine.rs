//! A booted machine: memory, vCPUs, buses and slots, put together from a [`VmConfig`].

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;

use kvm_ioctls::{IoEventAddress, Kvm, VmFd};
use kvrun_vmm_api::config::{
    FIRST_FREE_SLOT, GUEST_CID, MAX_BLK_QUEUES, MAX_BLK_SERIAL, MAX_FS_TAG, MAX_MEMORY_MIB, MAX_NET_MTU,
    MAX_NET_QUEUE_PAIRS, MAX_SLOTS, MAX_VCPUS, MIN_MEMORY_MIB, MIN_NET_MTU, RNG_SLOT, VSOCK_SLOT,
};
use kvrun_vmm_api::control::CONSOLE_TAIL;
use kvrun_vmm_api::{DeviceConfig, ExitReason, RequestError, VmConfig, VmMetrics, VmState};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::arch::{self, ArchError, BootSource, PlatformState, StateLayout};
use crate::bus::BusError;
use crate::devices::legacy::{BootMarks, Console, KeyboardController, boot_marks, console, keyboard};
use crate::devices::virtio::blk::{Blk, BlkError, BlkOptions};
use crate::devices::virtio::fs::{Fs, FsError, FsOptions};
use crate::devices::virtio::mmio::{MmioSlot, SLOT_SIZE, Signal, SlotError};
use crate::devices::virtio::net::{Net, NetConfig, NetError};
use crate::devices::virtio::registers::Registers;
use crate::devices::virtio::rng::Rng;
use crate::devices::virtio::vsock::{Accepted, Vsock, VsockHandle};
use crate::devices::virtio::{DeviceRequest, DeviceRequestError, VirtioDevice};
use crate::event_loop::{EventLoop, LoopHandle};
use crate::jail::Jail;
use crate::memory::devices::{MemoryDeviceError, MemoryDevices};
use crate::memory::slot::MemorySlots;
use crate::memory::{AddressSpace, MemoryError};
use crate::state::{MachineState, SaveError};
use crate::thread::{self, Class};
use crate::vcpu::{Buses, ExitSlot, VcpuError, VcpuSet};

/// The stack of the event loop's thread in bytes; what is not touched costs nothing.
const LOOP_STACK: usize = 256 * 1024;

/// A request that the machine refuses, or a machine that cannot be.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// A value of the configuration is out of its range.
    #[error("{what} is {value}; it must be {range}")]
    Range {
        /// Which value.
        what: &'static str,
        /// What it is.
        value: u64,
        /// What it may be.
        range: String,
    },
    /// The request came with the wrong number of descriptors.
    #[error("the request takes {wanted} descriptors and came with {got}")]
    Descriptors {
        /// How many it takes.
        wanted: usize,
        /// How many came.
        got: usize,
    },
    /// A second boot.
    #[error("the machine has been booted already")]
    BootedAlready,
    /// The slot cannot be attached to or detached from.
    #[error("slot {slot}")]
    Slot {
        /// Which one.
        slot: u8,
        /// Why not.
        #[source]
        source: SlotError,
    },
    /// A block device.
    #[error("cannot attach the block device")]
    Blk(#[from] BlkError),
    /// A shared directory, but the engine gave the process none to share.
    #[error("there is no share: the process was started without one")]
    NoShare,
    /// A shared directory.
    #[error("cannot attach the shared directory")]
    Fs(#[from] FsError),
    /// A link.
    #[error("cannot attach the link")]
    Net(#[from] NetError),
    /// A device of guest memory.
    #[error("cannot attach a device of guest memory")]
    MemoryDevice(#[from] MemoryDeviceError),
    /// There can be only one of its kind.
    #[error("the machine has a device of kind {0} already")]
    SecondDevice(&'static str),
    /// The guest would lose memory that it uses.
    #[error("{} MiB are plugged by the device in slot {slot}; unplug them first", plugged >> 20)]
    InUse {
        /// Which slot.
        slot: u8,
        /// In bytes.
        plugged: u64,
    },
    /// Guest memory.
    #[error("cannot get guest memory")]
    Memory(#[from] MemoryError),
    /// The processor's part.
    #[error(transparent)]
    Arch(#[from] ArchError),
    /// A request is for a device that is not there.
    #[error("the machine has no {0}")]
    NoSuchDevice(&'static str),
    /// Two devices at one address.
    #[error("cannot lay out the devices")]
    Bus(#[from] BusError),
    /// The filter of the calling thread.
    #[error("cannot filter the system calls of the main thread")]
    Filter(#[from] seccompiler::Error),
    /// The vCPUs.
    #[error("cannot start the vCPUs")]
    Vcpu(#[from] VcpuError),
    /// Something of the host.
    #[error("cannot {what}")]
    Host {
        /// What was attempted.
        what: &'static str,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
}

impl From<MachineError> for RequestError {
    fn from(e: MachineError) -> Self {
        let message = whole_chain(&e);
        match e {
            MachineError::Net(NetError::Threads(_)) => Self::Host(message),
            MachineError::Range { .. }
            | MachineError::Descriptors { .. }
            | MachineError::Blk(_)
            | MachineError::Fs(_)
            | MachineError::Net(_)
            | MachineError::Memory(MemoryError::TooLarge(_)) => Self::Invalid(message),
            MachineError::MemoryDevice(ref e) if e.is_invalid() => Self::Invalid(message),
            MachineError::Arch(ArchError::Kernel(_) | ArchError::Boot(_)) => Self::Invalid(message),
            MachineError::BootedAlready
            | MachineError::NoSuchDevice(_)
            | MachineError::NoShare
            | MachineError::MemoryDevice(_)
            | MachineError::SecondDevice(_)
            | MachineError::InUse { .. } => Self::Precondition(message),
            MachineError::Slot { source: SlotError::Device(DeviceRequestError::Range { .. }), .. } => {
                Self::Invalid(message)
            }
            MachineError::Slot {
                source: SlotError::Taken | SlotError::Empty | SlotError::Device(_), ..
            } => Self::Precondition(message),
            _ => Self::Host(message),
        }
    }
}

/// An error with its causes, in one line.
fn whole_chain(e: &dyn std::error::Error) -> String {
    let mut text = e.to_string();
    let mut source = e.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    text
}

/// A booted machine.
pub struct Machine {
    vm: Arc<VmFd>,
    vcpus: VcpuSet,
    exit: Arc<ExitSlot>,
    slots: Vec<Arc<MmioSlot>>,
    memory: MemoryDevices,
    vsock: VsockHandle,
    console: Arc<Console>,
    marks: Arc<BootMarks>,
    event_loop: EventLoopThread,
    jail: Jail,
    layout: StateLayout,
}

impl Machine {
    /// Builds the machine and lets its vCPUs run. `fds`: see [`VmConfig`]. `accepted` hears of connections from the guest.
    ///
    /// # Errors
    /// [`MachineError`]; nothing is left of the attempt.
    pub fn boot(
        config: &VmConfig,
        fds: [OwnedFd; 3],
        jail: Jail,
        accepted: Accepted,
    ) -> Result<Self, MachineError> {
        check_ranges(config)?;
        let [kvm, kernel, initramfs] = fds;
        // SAFETY: the descriptor was handed over by the engine as that of /dev/kvm and is owned here alone. (On any other
        // kind of file, the first ioctl is refused.)
        let kvm = unsafe { Kvm::from_raw_fd(kvm.into_raw_fd()) };
        let (kernel, initramfs) = (File::from(kernel), File::from(initramfs));

        let mib = |mib: u32| u64::from(mib) << 20;
        let address_bits = arch::address_bits(&kvm)?;
        let map = arch::memory_layout(mib(config.memory_mib), mib(config.hotplug_mib), address_bits);
        let space = AddressSpace::map(&map.map_err(MemoryError::from)?)?;
        let source = BootSource { kernel: &kernel, initramfs: &initramfs, cmdline: &cmdline(config) };
        let arch::Built { vm, vcpus, layout } = arch::build(&kvm, &space.ram, &source, config.vcpus)?;
        let memory = MemoryDevices::new(&space, mib(config.hotplug_mib), &vm, kvm.get_nr_memslots());

        let event_loop = EventLoopThread::spawn()?;
        let exit = Arc::new(ExitSlot::new().map_err(host("make the exit event"))?);
        let mut buses = Buses::default();
        let console = Arc::new(Console::new(interrupt_line(&vm, console::GSI)?, CONSOLE_TAIL));
        let marks = Arc::new(BootMarks::new());
        let keyboard = Arc::new(KeyboardController::new(exit.clone()));
        buses.ports.insert(console::BASE, console::LENGTH, console.clone())?;
        buses.ports.insert(boot_marks::BASE, 1, marks.clone())?;
        buses.ports.insert(keyboard::BASE, keyboard::LENGTH, keyboard)?;

        let mut slots = Vec::with_capacity(config.slots.into());
        let registers = Registers::new(arch::MMIO_BASE, config.slots)?;
        vm.add(registers.memory_slot()).map_err(host("show the guest the registers of its devices"))?;
        for index in 0..config.slots {
            let Some(page) = registers.page(index) else { break };
            let irq = interrupt_line(&vm, slot_gsi(index))?;
            let slot = Arc::new(MmioSlot::new(space.all.clone(), irq, page));
            buses.mmio.insert(slot_address(index), SLOT_SIZE, slot.clone())?;
            slots.push(slot);
        }
        let (vsock, vsock_handle) =
            Vsock::new(event_loop.handle.clone(), GUEST_CID, config.vsock_listen.clone(), accepted)
                .map_err(host("make the vsock device"))?;

        let vcpus = VcpuSet::spawn(vcpus, Arc::new(buses), exit.clone())?;
        let machine = Self {
            vm,
            vcpus,
            exit,
            slots,
            memory,
            vsock: vsock_handle,
            console,
            marks,
            event_loop,
            jail,
            layout,
        };
        machine.fill(VSOCK_SLOT, Box::new(vsock))?;
        machine.fill(RNG_SLOT, Box::new(Rng::new(machine.event_loop.handle.clone())))?;
        thread::confine(Class::Main)?;
        machine.vcpus.resume();
        Ok(machine)
    }

    /// Puts a device into an empty slot; `fds`: see [`DeviceConfig`].
    ///
    /// # Errors
    /// [`MachineError`]; the slot is as it was.
    pub fn attach(&self, slot: u8, device: DeviceConfig, fds: Vec<OwnedFd>) -> Result<(), MachineError> {
        self.free_slot(slot)?;
        let device: Box<dyn VirtioDevice> = match device {
            DeviceConfig::Fs { directory, tag, read_only, cache, writeback } => {
                in_range("length of the tag", tag.len() as u64, 1..=MAX_FS_TAG as u64)?;
                let [] = exactly(fds)?;
                let share = self.jail.share().ok_or(MachineError::NoShare)?;
                Box::new(Fs::new(share, &directory, &tag, FsOptions { read_only, cache, writeback })?)
            }
            DeviceConfig::Blk { read_only, serial, queues, limit } => {
                in_range("length of the serial number", serial.len() as u64, 0..=MAX_BLK_SERIAL as u64)?;
                in_range("number of queues", queues.into(), 1..=MAX_BLK_QUEUES.into())?;
                let [image] = exactly(fds)?;
                let options = BlkOptions { read_only, serial: &serial, queues, limit };
                Box::new(Blk::open(image, options)?)
            }
            DeviceConfig::Net { mac, mtu, queue_pairs, rx_limit, tx_limit } => {
                in_range("MTU", mtu.into(), MIN_NET_MTU.into()..=MAX_NET_MTU.into())?;
                in_range("number of queue pairs", queue_pairs.into(), 1..=MAX_NET_QUEUE_PAIRS.into())?;
                let config = NetConfig { mac, mtu, queue_pairs, rx_limit, tx_limit };
                Box::new(Net::open(fds, &config)?)
            }
            DeviceConfig::Pmem => {
                let [file] = exactly(fds)?;
                Box::new(self.memory.pmem(self.event_loop.handle.clone(), file)?)
            }
            DeviceConfig::Mem => {
                let [] = exactly(fds)?;
                self.only_one("mem")?;
                Box::new(self.memory.mem(self.event_loop.handle.clone())?)
            }
            DeviceConfig::Balloon { free_page_reporting } => {
                let [] = exactly(fds)?;
                self.only_one("balloon")?;
                Box::new(self.memory.balloon(self.event_loop.handle.clone(), free_page_reporting))
            }
        };
        self.fill(slot, device)
    }

    /// Takes the device out of a slot.
    ///
    /// # Errors
    /// [`MachineError::Slot`] if it is empty, [`MachineError::Range`] if there is no such slot or it is not to be emptied.
    pub fn detach(&self, slot: u8) -> Result<(), MachineError> {
        let plugged = self.memory.plugged();
        if plugged > 0 && self.free_slot(slot)?.device_name() == Some("mem") {
            return Err(MachineError::InUse { slot, plugged });
        }
        let signals = self.free_slot(slot)?.empty().map_err(|source| MachineError::Slot { slot, source })?;
        for Signal { offset, value, event } in signals {
            self.vm
                .unregister_ioevent(&event, &register(slot, offset), value)
                .map_err(|e| host("have KVM forget a register")(e.into()))?;
        }
        Ok(())
    }

    /// Holds all vCPUs, then brings every device to rest: in this order, for a vCPU may be about to kick a device. Idempotent.
    pub fn pause(&self) {
        self.vcpus.pause();
        for slot in &self.slots {
            slot.pause();
        }
    }

    /// Lets devices and vCPUs go on. Idempotent.
    pub fn resume(&self) {
        for slot in &self.slots {
            slot.resume();
        }
        self.vcpus.resume();
    }

    /// All of the machine but its memory, which must be paused. Not to be called where threads have filters: what they would have to allow for it
    /// is in docs/limits.md.
    ///
    /// # Errors
    /// [`SaveError`]; the machine is as it was.
    pub fn save(&self) -> Result<MachineState, SaveError> {
        let vcpus = self.vcpus.save(&self.layout)?;
        let slots = self.slots.iter().zip(0..).map(|(slot, index)| match slot.save() {
            None if slot.device_name().is_some() => Err(SaveError::Device(index)),
            saved => Ok(saved),
        });
        Ok(MachineState {
            slots: slots.collect::<Result<_, _>>()?,
            console: self.console.save(),
            vcpus,
            platform: PlatformState::save(&self.vm)?,
        })
    }

    /// Passes a request to the device in `slot`.
    ///
    /// # Errors
    /// [`MachineError::Slot`], [`MachineError::Range`].
    pub fn request(&self, slot: u8, request: DeviceRequest) -> Result<(), MachineError> {
        let device = self.free_slot(slot)?;
        // A size of memory is read in two halves, and no vCPU may find one of the old and one of the new: see `ConfigSpace::write`.
        let held = matches!(request, DeviceRequest::Plug(_)) && !self.vcpus.is_paused();
        if held {
            self.vcpus.pause();
        }
        let outcome = device.request(request);
        if held {
            self.vcpus.resume();
        }
        outcome.map_err(|source| MachineError::Slot { slot, source })
    }

    /// Passes a request to the one device of its kind that a machine can have.
    ///
    /// # Errors
    /// [`MachineError::NoSuchDevice`], [`MachineError::Slot`].
    pub fn request_of(&self, kind: &'static str, request: DeviceRequest) -> Result<(), MachineError> {
        let found = self.slots.iter().position(|slot| slot.device_name() == Some(kind));
        self.request(found.ok_or(MachineError::NoSuchDevice(kind))? as u8, request)
    }

    /// What the machine has counted.
    pub fn metrics(&self) -> VmMetrics {
        VmMetrics {
            exits: self.vcpus.exits_by_kind(),
            slots: self.slots.iter().map(|slot| slot.metrics()).collect(),
        }
    }

    /// Reaches vsock ports in the guest.
    pub fn vsock(&self) -> &VsockHandle {
        &self.vsock
    }

    /// What the machine is doing.
    pub fn state(&self) -> VmState {
        VmState {
            paused: self.vcpus.is_paused(),
            slots: self.slots.iter().map(|slot| slot.device_name().map(str::to_owned)).collect(),
            first_entry_ns: self.vcpus.first_entry_ns(),
            boot_marks: self.marks.marks(),
            exits: self.vcpus.exits(),
            plugged_mib: (self.memory.plugged() >> 20) as u32,
            balloon_mib: (self.memory.in_balloon() >> 20) as u32,
        }
    }

    /// Readable once the machine has ended of itself; [`Machine::exit_reason`] then tells why.
    pub fn exit_event(&self) -> BorrowedFd<'_> {
        self.exit.as_fd()
    }

    /// Why the machine has ended of itself, if it has.
    pub fn exit_reason(&self) -> Option<&ExitReason> {
        self.exit.reason()
    }

    /// Takes all vCPUs out of the guest for good and brings every device to rest. Idempotent.
    pub fn stop(&mut self) {
        self.vcpus.stop();
        for slot in &self.slots {
            // An empty slot is at rest.
            let _ = slot.empty();
        }
        self.event_loop.stop();
    }

    /// The end of what the guest wrote to its console.
    pub fn console_tail(&self) -> String {
        self.console.tail()
    }

    fn only_one(&self, kind: &'static str) -> Result<(), MachineError> {
        if self.slots.iter().any(|slot| slot.device_name() == Some(kind)) {
            return Err(MachineError::SecondDevice(kind));
        }
        Ok(())
    }

    fn free_slot(&self, slot: u8) -> Result<&MmioSlot, MachineError> {
        in_range("slot", slot.into(), FIRST_FREE_SLOT.into()..=self.slots.len() as u64 - 1)?;
        Ok(&self.slots[usize::from(slot)])
    }

    fn fill(&self, slot: u8, device: Box<dyn VirtioDevice>) -> Result<(), MachineError> {
        let signals = self.slots[usize::from(slot)]
            .fill(device)
            .map_err(|source| MachineError::Slot { slot, source })?;
        for Signal { offset, value, event } in signals {
            self.vm
                .register_ioevent(&event, &register(slot, offset), value)
                .map_err(|e| host("have KVM watch a register")(e.into()))?;
        }
        Ok(())
    }
}

/// The descriptors of a request that takes `N`.
///
/// # Errors
/// [`MachineError::Descriptors`].
pub fn exactly<const N: usize>(fds: Vec<OwnedFd>) -> Result<[OwnedFd; N], MachineError> {
    fds.try_into().map_err(|fds: Vec<_>| MachineError::Descriptors { wanted: N, got: fds.len() })
}

fn host(what: &'static str) -> impl Fn(io::Error) -> MachineError {
    move |source| MachineError::Host { what, source }
}

fn in_range(
    what: &'static str,
    value: u64,
    range: std::ops::RangeInclusive<u64>,
) -> Result<(), MachineError> {
    if range.contains(&value) {
        return Ok(());
    }
    Err(MachineError::Range { what, value, range: format!("{} to {}", range.start(), range.end()) })
}

fn check_ranges(config: &VmConfig) -> Result<(), MachineError> {
    in_range("memory in MiB", config.memory_mib.into(), MIN_MEMORY_MIB.into()..=MAX_MEMORY_MIB.into())?;
    let room = u64::from(MAX_MEMORY_MIB - config.memory_mib);
    in_range("memory to plug in MiB", config.hotplug_mib.into(), 0..=room)?;
    in_range("number of vCPUs", config.vcpus.max.into(), 1..=MAX_VCPUS.into())?;
    in_range("number of vCPUs at boot", config.vcpus.boot.into(), 1..=config.vcpus.max.into())?;
    in_range("number of slots", config.slots.into(), FIRST_FREE_SLOT.into()..=MAX_SLOTS.into())
}

/// The kernel command line: the engine's, then what only the VMM knows.
fn cmdline(config: &VmConfig) -> String {
    let mut line = config.cmdline.clone();
    if let Some(vcpus) = arch::cmdline_for_vcpus(config.vcpus) {
        line.push(' ');
        line.push_str(&vcpus);
    }
    for slot in 0..config.slots {
        // Linux 6.12 Documentation/admin-guide/kernel-parameters.txt: virtio_mmio.device=<size>@<baseaddr>:<irq>[:<id>].
        let declared = format!(" virtio_mmio.device=4K@{:#x}:{}:{slot}", slot_address(slot), slot_gsi(slot));
        line.push_str(&declared);
    }
    line
}

/// Where the registers of a slot are. [`MAX_SLOTS`] pages fit below [`arch::MMIO_END`] by far.
fn slot_address(slot: u8) -> u64 {
    arch::MMIO_BASE + u64::from(slot) * SLOT_SIZE
}

/// The interrupt line of a slot. When there are more slots than lines, they share: the driver asks for that (`IRQF_SHARED`).
fn slot_gsi(slot: u8) -> u32 {
    arch::FIRST_GSI + u32::from(slot) % (arch::GSIS - arch::FIRST_GSI)
}

fn register(slot: u8, offset: u64) -> IoEventAddress {
    IoEventAddress::Mmio(slot_address(slot) + offset)
}

/// An interrupt line of the guest, raised when the descriptor is written.
fn interrupt_line(vm: &VmFd, gsi: u32) -> Result<EventFd, MachineError> {
    let line = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(host("make an interrupt line"))?;
    vm.register_irqfd(&line, gsi).map_err(|e| host("register an interrupt line with KVM")(e.into()))?;
    Ok(line)
}

/// The event loop on its thread; ends when dropped.
struct EventLoopThread {
    handle: LoopHandle,
    thread: Option<JoinHandle<()>>,
}

impl EventLoopThread {
    fn spawn() -> Result<Self, MachineError> {
        let (event_loop, handle) = EventLoop::new().map_err(host("make the event loop"))?;
        let thread = thread::spawn(Class::EventLoop, "events", LOOP_STACK, move || {
            if let Err(e) = event_loop.run() {
                log::error!("the event loop failed: {e}");
            }
        })
        .map_err(host("start the event loop's thread"))?;
        Ok(Self { handle, thread: Some(thread) })
    }

    fn stop(&mut self) {
        if let Some(thread) = self.thread.take() {
            self.handle.quit();
            // An error would be a panic of the thread, and this program aborts on panic.
            let _ = thread.join();
        }
    }
}

impl Drop for EventLoopThread {
    fn drop(&mut self) {
        self.stop();
    }
}

#[cfg(test)]
mod tests {
    use kvrun_vmm_api::VcpuConfig;

    use super::*;

    fn config() -> VmConfig {
        VmConfig {
            memory_mib: 128,
            hotplug_mib: 0,
            vcpus: VcpuConfig { boot: 1, max: 2 },
            cmdline: "quiet".to_owned(),
            slots: 3,
            vsock_listen: vec![],
        }
    }

    #[test]
    fn cmdline_declares_every_slot() {
        let line = cmdline(&config());
        assert_eq!(line.matches("virtio_mmio.device=").count(), 3);
        let base = arch::MMIO_BASE;
        assert!(line.starts_with("quiet maxcpus=1 virtio_mmio.device=4K@"), "{line}");
        assert!(line.contains(&format!("4K@{:#x}:{}:2", base + 0x2000, arch::FIRST_GSI + 2)), "{line}");
    }

    #[test]
    fn slots_beyond_the_interrupt_lines_share_them() {
        let lines: Vec<_> = (0..MAX_SLOTS).map(slot_gsi).collect();
        assert_eq!(lines[0], lines[(arch::GSIS - arch::FIRST_GSI) as usize]);
        assert!(lines.iter().all(|gsi| (arch::FIRST_GSI..arch::GSIS).contains(gsi)));
        assert!(slot_address(MAX_SLOTS) <= arch::MMIO_END);
    }

    #[test]
    fn values_out_of_range_are_refused_by_name() {
        let bad = [
            (VmConfig { memory_mib: 1, ..config() }, "memory in MiB is 1; it must be 48 to"),
            (VmConfig { vcpus: VcpuConfig { boot: 1, max: 0 }, ..config() }, "number of vCPUs is 0"),
            (VmConfig { vcpus: VcpuConfig { boot: 3, max: 2 }, ..config() }, "number of vCPUs at boot is 3"),
            (VmConfig { hotplug_mib: MAX_MEMORY_MIB, ..config() }, "memory to plug in MiB is 1048576"),
            (VmConfig { slots: 1, ..config() }, "number of slots is 1; it must be 2 to 64"),
        ];
        for (config, message) in bad {
            let error = check_ranges(&config).unwrap_err().to_string();
            assert!(error.starts_with(message), "{error}");
        }
        check_ranges(&config()).unwrap();
    }
}
