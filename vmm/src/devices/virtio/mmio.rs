//! The MMIO transport (virtio 1.3 s4.2), with slots.
//!
//! A [`MmioSlot`] is a page of registers declared to the guest at boot. Empty, it answers device ID 0, which the driver takes
//! for a placeholder and skips in silence (s4.2.2.2; Linux 6.12 drivers/virtio/virtio_mmio.c). The control protocol fills it while
//! the guest runs, and the agent then binds the driver to it; so hot-plug needs neither ACPI nor PCI.
//!
//! What the guest reads of it is memory ([`registers`](super::registers)); what it writes arrives here.
//!
//! Hostile driver: what it configures is frozen once it counts (features at `FEATURES_OK`, queues at `DRIVER_OK`), and every
//! address is checked against guest memory before a device gets a queue.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use kvrun_vmm_api::DeviceMetrics;
use virtio_bindings::virtio_config::{
    VIRTIO_CONFIG_S_ACKNOWLEDGE, VIRTIO_CONFIG_S_DRIVER, VIRTIO_CONFIG_S_DRIVER_OK, VIRTIO_CONFIG_S_FAILED,
    VIRTIO_CONFIG_S_FEATURES_OK, VIRTIO_CONFIG_S_NEEDS_RESET, VIRTIO_F_VERSION_1,
};
use virtio_bindings::virtio_mmio::{VIRTIO_MMIO_INT_CONFIG, VIRTIO_MMIO_INT_VRING};
use virtio_bindings::virtio_ring::VIRTIO_RING_F_EVENT_IDX;
use virtio_queue::{Queue, QueueState, QueueT};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::queue::is_in_memory;
use super::registers::RegisterPage;
use super::state::QueueConfig;
use super::{
    Activation, DeviceRequest, DeviceRequestError, GuestRam, InterruptLine, SlotState, VirtQueue,
    VirtioDevice,
};
use crate::bus::BusDevice;
use crate::locked;

/// Bytes of address space each slot takes.
pub const SLOT_SIZE: u64 = 0x1000;

/// The registers (virtio 1.3 s4.2.2).
pub(super) mod reg {
    pub(in super::super) const MAGIC_VALUE: u64 = 0x000;
    pub(in super::super) const VERSION: u64 = 0x004;
    pub(in super::super) const DEVICE_ID: u64 = 0x008;
    pub(in super::super) const VENDOR_ID: u64 = 0x00c;
    pub(in super::super) const DEVICE_FEATURES: u64 = 0x010;
    pub(in super::super) const DEVICE_FEATURES_SEL: u64 = 0x014;
    pub(in super::super) const DRIVER_FEATURES: u64 = 0x020;
    pub(in super::super) const DRIVER_FEATURES_SEL: u64 = 0x024;
    pub(in super::super) const QUEUE_SEL: u64 = 0x030;
    pub(in super::super) const QUEUE_NUM_MAX: u64 = 0x034;
    pub(in super::super) const QUEUE_NUM: u64 = 0x038;
    pub(in super::super) const QUEUE_READY: u64 = 0x044;
    pub(in super::super) const QUEUE_NOTIFY: u64 = 0x050;
    pub(in super::super) const INTERRUPT_STATUS: u64 = 0x060;
    pub(in super::super) const INTERRUPT_ACK: u64 = 0x064;
    pub(in super::super) const STATUS: u64 = 0x070;
    pub(in super::super) const QUEUE_DESC_LOW: u64 = 0x080;
    pub(in super::super) const QUEUE_DESC_HIGH: u64 = 0x084;
    pub(in super::super) const QUEUE_DRIVER_LOW: u64 = 0x090;
    pub(in super::super) const QUEUE_DRIVER_HIGH: u64 = 0x094;
    pub(in super::super) const QUEUE_DEVICE_LOW: u64 = 0x0a0;
    pub(in super::super) const QUEUE_DEVICE_HIGH: u64 = 0x0a4;
    pub(in super::super) const SHM_LEN_LOW: u64 = 0x0b0;
    pub(in super::super) const SHM_BASE_HIGH: u64 = 0x0bc;
    pub(in super::super) const CONFIG_GENERATION: u64 = 0x0fc;
    pub(in super::super) const CONFIG: u64 = 0x100;
}

/// A write to a register that KVM can turn into a signal, without an exit to this process (KVM's ioeventfd).
#[derive(Debug)]
pub struct Signal {
    /// Where the register is in the slot.
    pub offset: u64,
    /// What is written there.
    pub value: u32,
    /// What is signalled.
    pub event: EventFd,
}

const MAGIC: u32 = u32::from_le_bytes(*b"virt");
const MMIO_VERSION: u32 = 2;
const VENDOR: u32 = u32::from_le_bytes(*b"kvrn");

/// One slot of the machine.
pub struct MmioSlot {
    mem: GuestRam,
    /// Raises the slot's interrupt line in the guest when written (KVM irqfd).
    irq: Arc<EventFd>,
    registers: RegisterPage,
    transport: Mutex<Option<Transport>>,
}

/// A request about a slot that cannot be met.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// There is a device in the slot.
    #[error("the slot is taken")]
    Taken,
    /// There is no device in the slot.
    #[error("the slot is empty")]
    Empty,
    /// The host is out of descriptors.
    #[error("no descriptor left for the queues of the device")]
    Descriptors,
    /// The device refuses a request.
    #[error(transparent)]
    Device(#[from] DeviceRequestError),
}

impl MmioSlot {
    /// An empty slot with these registers, all zero so far, whose interrupt line is raised by `irq`.
    pub fn new(mem: GuestRam, irq: EventFd, registers: RegisterPage) -> Self {
        let slot = Self { mem, irq: Arc::new(irq), registers, transport: Mutex::new(None) };
        slot.show_empty();
        slot
    }

    /// s4.2.2.2: what there is without a device, beside zeroes.
    fn show_empty(&self) {
        for (register, value) in
            [(reg::MAGIC_VALUE, MAGIC), (reg::VERSION, MMIO_VERSION), (reg::VENDOR_ID, VENDOR)]
        {
            self.registers.set(register, value);
        }
    }

    /// Puts a device into the slot. Returns what can be registered with KVM: the driver's kick of each queue, in order, and writes that tell nothing;
    /// without that, all of them arrive as register writes and work all the same.
    ///
    /// # Errors
    /// [`SlotError::Taken`], [`SlotError::Descriptors`].
    pub fn fill(&self, device: Box<dyn VirtioDevice>) -> Result<Vec<Signal>, SlotError> {
        let mut slot = self.lock();
        if slot.is_some() {
            return Err(SlotError::Taken);
        }
        let mut transport =
            Transport::new(device, self.mem.clone(), self.irq.clone(), self.registers.clone())?;
        let signals = transport.signals()?;
        transport.show();
        *slot = Some(transport);
        Ok(signals)
    }

    /// Takes the device out of the slot, at rest. Returns what [`MmioSlot::fill`] returned, for deregistration.
    ///
    /// # Errors
    /// [`SlotError::Empty`].
    pub fn empty(&self) -> Result<Vec<Signal>, SlotError> {
        let mut transport = self.lock().take().ok_or(SlotError::Empty)?;
        transport.reset();
        self.registers.clear();
        self.show_empty();
        transport.signals()
    }

    /// The kind of device in the slot.
    pub fn device_name(&self) -> Option<&'static str> {
        self.lock().as_ref().map(|transport| transport.device.name())
    }

    /// Brings the device, if any, to rest: [`VirtioDevice::pause`].
    pub fn pause(&self) {
        if let Some(transport) = self.lock().as_mut() {
            transport.device.pause();
        }
    }

    /// Lets it go on: [`VirtioDevice::resume`].
    pub fn resume(&self) {
        if let Some(transport) = self.lock().as_mut() {
            transport.device.resume();
        }
    }

    /// What the slot and its device, which is paused, would need to go on elsewhere. `None` if it is empty, or its device is of a kind
    /// that cannot be saved.
    pub fn save(&self) -> Option<SlotState> {
        self.lock().as_ref()?.save()
    }

    /// What the device, if any, has counted.
    pub fn metrics(&self) -> Option<DeviceMetrics> {
        self.lock().as_ref().map(|transport| DeviceMetrics {
            device: transport.device.name().to_owned(),
            counters: transport.device.counters().into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
        })
    }

    /// Passes a request to the device.
    ///
    /// # Errors
    /// [`SlotError::Empty`], [`SlotError::Device`].
    pub fn request(&self, request: DeviceRequest) -> Result<(), SlotError> {
        Ok(self.lock().as_mut().ok_or(SlotError::Empty)?.device.request(request)?)
    }

    fn lock(&self) -> MutexGuard<'_, Option<Transport>> {
        locked(self.transport.lock())
    }
}

impl BusDevice for MmioSlot {
    /// What KVM does by itself where the registers are shown to the guest.
    fn read(&self, offset: u64, data: &mut [u8]) {
        self.registers.read(offset, data);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut slot = self.lock();
        let Some(transport) = slot.as_mut() else { return };
        // s4.2.2.2: the driver must access control registers by aligned 32-bit reads and writes.
        if offset >= reg::CONFIG {
            transport.device.write_config(offset - reg::CONFIG, data);
        } else if let Ok(data) = data.try_into() {
            transport.write(offset, u32::from_le_bytes(data));
        }
    }
}

/// The registers of a filled slot.
struct Transport {
    device: Box<dyn VirtioDevice>,
    mem: GuestRam,
    interrupt: Arc<MmioInterrupt>,
    registers: RegisterPage,
    device_features_select: u32,
    driver_features_select: u32,
    driver_features: u64,
    queue_select: u32,
    queues: Vec<QueueRegisters>,
    /// Signalled when the driver acknowledges used buffers and that tells nothing ([`VirtioDevice::is_interrupted_elsewhere`]). Nobody reads it.
    acknowledged: Option<EventFd>,
}

/// One queue: what the driver has configured of it, and its kick.
struct QueueRegisters {
    max_size: u16,
    config: QueueConfig,
    kick: EventFd,
}

impl QueueRegisters {
    /// The queue as configured, if that is one a device can work on.
    fn queue(&self, event_idx_enabled: bool, mem: &GuestRam) -> Option<Queue> {
        let QueueConfig { size, ready, desc_table, avail_ring, used_ring } = self.config;
        let queue = Queue::try_from(QueueState {
            max_size: self.max_size,
            next_avail: 0,
            next_used: 0,
            event_idx_enabled,
            size: u16::try_from(size).ok()?,
            ready,
            desc_table,
            avail_ring,
            used_ring,
        })
        .ok()?;
        (queue.is_valid(&**mem) && is_in_memory(&queue, mem)).then_some(queue)
    }
}

impl Transport {
    fn new(
        device: Box<dyn VirtioDevice>,
        mem: GuestRam,
        irq: Arc<EventFd>,
        registers: RegisterPage,
    ) -> Result<Self, SlotError> {
        let mut queues = Vec::with_capacity(device.queue_sizes().len());
        for &max_size in device.queue_sizes() {
            queues.push(QueueRegisters {
                max_size,
                config: QueueConfig::default(),
                kick: EventFd::new(EFD_NONBLOCK).map_err(|_| SlotError::Descriptors)?,
            });
        }
        let acknowledged = device.is_interrupted_elsewhere().then(|| EventFd::new(EFD_NONBLOCK)).transpose();
        let acknowledged = acknowledged.map_err(|_| SlotError::Descriptors)?;
        let interrupt = Arc::new(MmioInterrupt {
            device: device.name(),
            irq,
            registers: registers.clone(),
            raised_elsewhere: AtomicBool::new(false),
            complained: AtomicBool::new(false),
        });
        Ok(Self {
            device,
            mem,
            interrupt,
            registers,
            device_features_select: 0,
            driver_features_select: 0,
            driver_features: 0,
            queue_select: 0,
            queues,
            acknowledged,
        })
    }

    fn signals(&self) -> Result<Vec<Signal>, SlotError> {
        let kicks = self.queues.iter().zip(0..).map(|(queue, index)| (reg::QUEUE_NOTIFY, index, &queue.kick));
        let acknowledged = self.acknowledged.iter();
        let acknowledged = acknowledged.map(|event| (reg::INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING, event));
        let signal = |(offset, value, event): (_, _, &EventFd)| {
            let event = event.try_clone().map_err(|_| SlotError::Descriptors)?;
            Ok(Signal { offset, value, event })
        };
        kicks.chain(acknowledged).map(signal).collect()
    }

    fn features(&self) -> u64 {
        self.device.features() | 1 << VIRTIO_F_VERSION_1
    }

    /// Shows the guest that there is a device. The ID comes last: whoever reads it finds the rest.
    fn show(&mut self) {
        self.device.place_config(self.registers.config_space());
        // s4.2.2: no shared memory region reads as one of length 2^64 - 1.
        for register in (reg::SHM_LEN_LOW..=reg::SHM_BASE_HIGH).step_by(4) {
            self.registers.set(register, u32::MAX);
        }
        self.show_selected();
        self.registers.set(reg::DEVICE_ID, self.device.device_id());
    }

    /// Shows what depends on what the driver has selected.
    fn show_selected(&self) {
        let queue = self.queues.get(self.queue_select as usize);
        self.registers.set(reg::DEVICE_FEATURES, half(self.features(), self.device_features_select));
        self.registers.set(reg::QUEUE_NUM_MAX, queue.map_or(0, |queue| queue.max_size.into()));
        self.registers.set(reg::QUEUE_READY, queue.map_or(0, |queue| queue.config.ready.into()));
    }

    fn write(&mut self, offset: u64, value: u32) {
        match offset {
            reg::DEVICE_FEATURES_SEL => self.device_features_select = value,
            reg::DRIVER_FEATURES_SEL => self.driver_features_select = value,
            reg::DRIVER_FEATURES => self.accept_features(value),
            reg::QUEUE_SEL => self.queue_select = value,
            reg::QUEUE_NOTIFY => {
                if let Some(registers) = self.queues.get(value as usize) {
                    // Only a counter at its limit refuses, and then the kick is there already.
                    let _ = registers.kick.write(1);
                }
            }
            reg::INTERRUPT_ACK => self.interrupt.acknowledge(value),
            reg::STATUS => self.set_status(value),
            _ => self.configure_queue(offset, value),
        }
        if !matches!(offset, reg::QUEUE_NOTIFY | reg::INTERRUPT_ACK) {
            self.show_selected();
        }
    }

    /// s2.2.2: the driver accepts features between `DRIVER` and `FEATURES_OK`, never later.
    fn accept_features(&mut self, value: u32) {
        if !self.has(VIRTIO_CONFIG_S_DRIVER) || self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        match self.driver_features_select {
            0 => set_low(&mut self.driver_features, value),
            1 => set_high(&mut self.driver_features, value),
            _ => {}
        }
    }

    /// Queue registers count between `FEATURES_OK` and `DRIVER_OK`; a ready queue does not change (s4.2.2.2). After that, a driver can only take a
    /// queue back, which the device then must not touch. Linux does so when it lets go of a device (drivers/virtio/virtio_mmio.c, `vm_del_vq`),
    /// so all of the device stops.
    fn configure_queue(&mut self, offset: u64, value: u32) {
        if !self.has(VIRTIO_CONFIG_S_FEATURES_OK) {
            return;
        }
        let live = self.has(VIRTIO_CONFIG_S_DRIVER_OK);
        let Some(QueueRegisters { config, .. }) = self.queues.get_mut(self.queue_select as usize) else {
            return;
        };
        if live {
            if offset == reg::QUEUE_READY && value & 1 == 0 && config.ready {
                config.ready = false;
                self.device.reset();
            }
            return;
        }
        if offset == reg::QUEUE_READY {
            config.ready = value & 1 == 1;
            return;
        }
        if config.ready {
            return;
        }
        match offset {
            reg::QUEUE_NUM => config.size = value,
            reg::QUEUE_DESC_LOW => set_low(&mut config.desc_table, value),
            reg::QUEUE_DESC_HIGH => set_high(&mut config.desc_table, value),
            reg::QUEUE_DRIVER_LOW => set_low(&mut config.avail_ring, value),
            reg::QUEUE_DRIVER_HIGH => set_high(&mut config.avail_ring, value),
            reg::QUEUE_DEVICE_LOW => set_low(&mut config.used_ring, value),
            reg::QUEUE_DEVICE_HIGH => set_high(&mut config.used_ring, value),
            _ => {}
        }
    }

    /// s3.1.1: the driver walks through the status bits in order, adding one at a time, or starts over by writing 0.
    fn set_status(&mut self, value: u32) {
        if value == 0 {
            self.reset();
            return;
        }
        if value & VIRTIO_CONFIG_S_FAILED != 0 {
            self.set(VIRTIO_CONFIG_S_FAILED);
            return;
        }
        let steps = [
            VIRTIO_CONFIG_S_ACKNOWLEDGE,
            VIRTIO_CONFIG_S_DRIVER,
            VIRTIO_CONFIG_S_FEATURES_OK,
            VIRTIO_CONFIG_S_DRIVER_OK,
        ];
        for step in steps {
            if self.has(step) {
                continue;
            }
            if value & step == 0 || (step == VIRTIO_CONFIG_S_FEATURES_OK && !self.features_hold()) {
                return;
            }
            self.set(step);
            if step == VIRTIO_CONFIG_S_DRIVER_OK {
                self.activate();
            }
        }
    }

    /// s2.2.2: `FEATURES_OK` stays clear if the driver accepted what was not offered; a driver without `VERSION_1` is a legacy one.
    fn features_hold(&self) -> bool {
        self.driver_features & !self.features() == 0 && self.driver_features & 1 << VIRTIO_F_VERSION_1 != 0
    }

    fn activate(&mut self) {
        let event_idx = self.driver_features & 1 << VIRTIO_RING_F_EVENT_IDX != 0;
        let mut queues = Vec::with_capacity(self.queues.len());
        for (index, registers) in self.queues.iter().enumerate() {
            if !registers.config.ready {
                queues.push(None);
                continue;
            }
            let Some(queue) = registers.queue(event_idx, &self.mem) else {
                self.interrupt.needs_reset(&BadQueue(index));
                return;
            };
            let Ok(kick) = registers.kick.try_clone() else {
                self.interrupt.needs_reset(&SlotError::Descriptors);
                return;
            };
            queues.push(Some(VirtQueue::new(index as u16, queue, kick)));
        }
        let outcome = self.device.activate(Activation {
            mem: self.mem.clone(),
            features: self.driver_features,
            queues,
            interrupt: self.interrupt.clone(),
        });
        if let Err(e) = outcome {
            self.interrupt.needs_reset(&e);
        }
    }

    fn reset(&mut self) {
        self.device.reset();
        for registers in &mut self.queues {
            registers.config = QueueConfig::default();
            let _ = registers.kick.read();
        }
        self.interrupt.raised_elsewhere.store(false, Ordering::Release);
        self.registers.set(reg::INTERRUPT_STATUS, 0);
        self.registers.set(reg::STATUS, 0);
        self.device_features_select = 0;
        self.driver_features_select = 0;
        self.driver_features = 0;
        self.queue_select = 0;
    }

    fn save(&self) -> Option<SlotState> {
        let status = self.status();
        Some(SlotState {
            status: status & !VIRTIO_CONFIG_S_NEEDS_RESET,
            broken: status & VIRTIO_CONFIG_S_NEEDS_RESET != 0,
            interrupt_status: self.registers.at(reg::INTERRUPT_STATUS).load(Ordering::Acquire),
            device_features_select: self.device_features_select,
            driver_features_select: self.driver_features_select,
            driver_features: self.driver_features,
            queue_select: self.queue_select,
            queues: self.queues.iter().map(|queue| queue.config).collect(),
            device: self.device.save()?,
        })
    }

    fn status(&self) -> u32 {
        self.registers.at(reg::STATUS).load(Ordering::Acquire)
    }

    fn has(&self, bit: u32) -> bool {
        self.status() & bit != 0
    }

    fn set(&self, bit: u32) {
        self.registers.at(reg::STATUS).fetch_or(bit, Ordering::AcqRel);
    }
}

/// The half of `features` that `select` names.
fn half(features: u64, select: u32) -> u32 {
    match select {
        0 => features as u32,
        1 => (features >> 32) as u32,
        _ => 0,
    }
}

fn set_low(value: &mut u64, low: u32) {
    *value = *value >> 32 << 32 | u64::from(low);
}

fn set_high(value: &mut u64, high: u32) {
    *value = u64::from(high) << 32 | u64::from(*value as u32);
}

#[derive(Debug, thiserror::Error)]
#[error("queue {0} is not where or what a queue can be")]
struct BadQueue(usize);

/// The interrupt of one filled slot.
struct MmioInterrupt {
    device: &'static str,
    irq: Arc<EventFd>,
    registers: RegisterPage,
    /// Somebody else raises the interrupt for used buffers, so it cannot be known here whether it is pending. The guest always finds it
    /// announced: a driver then looks into its rings, and goes away if there is nothing (Linux 6.12 drivers/virtio/virtio_ring.c,
    /// vring_interrupt()).
    raised_elsewhere: AtomicBool,
    /// A guest may break a device over and over; it is told of once.
    complained: AtomicBool,
}

impl MmioInterrupt {
    fn status(&self) -> &AtomicU32 {
        self.registers.at(reg::INTERRUPT_STATUS)
    }

    fn acknowledge(&self, causes: u32) {
        let elsewhere = self.raised_elsewhere.load(Ordering::Acquire);
        let stays = if elsewhere { VIRTIO_MMIO_INT_VRING } else { 0 };
        self.status().fetch_and(!causes | stays, Ordering::AcqRel);
    }

    /// A cause that the driver has not acknowledged yet is on its way to it already: it acknowledges first and looks second (s4.2.3.3;
    /// Linux 6.12 drivers/virtio/virtio_mmio.c, vm_interrupt()), so it will find what the cause stands for by now. A busy queue
    /// thus interrupts no oftener than its driver takes interrupts. Nothing of the kind is known of used buffers that are also announced elsewhere.
    fn raise(&self, cause: u32) {
        let is_unknown = cause == VIRTIO_MMIO_INT_VRING && self.raised_elsewhere.load(Ordering::Acquire);
        if is_unknown || self.status().fetch_or(cause, Ordering::AcqRel) & cause == 0 {
            // Only a counter at its limit refuses, and then the interrupt is pending already.
            let _ = self.irq.write(1);
        }
    }
}

impl InterruptLine for MmioInterrupt {
    fn signal_queue(&self, _queue: u16) {
        self.raise(VIRTIO_MMIO_INT_VRING);
    }

    fn queue_event(&self) -> io::Result<EventFd> {
        let event = self.irq.try_clone()?;
        self.raised_elsewhere.store(true, Ordering::Release);
        self.status().fetch_or(VIRTIO_MMIO_INT_VRING, Ordering::AcqRel);
        Ok(event)
    }

    fn signal_config(&self) {
        self.raise(VIRTIO_MMIO_INT_CONFIG);
    }

    fn needs_reset(&self, reason: &dyn std::error::Error) {
        self.registers.at(reg::STATUS).fetch_or(VIRTIO_CONFIG_S_NEEDS_RESET, Ordering::AcqRel);
        if !self.complained.swap(true, Ordering::AcqRel) {
            let cause = reason.source().map_or(String::new(), |source| format!(": {source}"));
            log::warn!("virtio-{} stops until its driver resets it: {reason}{cause}", self.device);
        }
        self.signal_config();
    }
}

#[cfg(test)]
#[path = "mmio_tests.rs"]
mod tests;
