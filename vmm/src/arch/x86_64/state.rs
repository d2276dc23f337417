//! What a vCPU, the interrupt controllers and the clock are where they stopped: plain data, to be saved and restored.
//!
//! Reading and setting follow an order, for some registers change others: it is said at each step.

use kvm_bindings::{
    CpuId, KVM_CLOCK_REALTIME, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, KVM_MAX_MSR_ENTRIES, Msrs, Xsave, kvm_clock_data, kvm_cpuid_entry2, kvm_debugregs,
    kvm_irqchip, kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events,
    kvm_xcrs, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use serde::{Deserialize, Serialize};
use vmm_sys_util::errno;

/// A state cannot be read or set.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// An ioctl.
    #[error("KVM refuses to {what}")]
    Ioctl {
        /// What was attempted.
        what: &'static str,
        /// Why not.
        #[source]
        source: errno::Error,
    },
    /// A model-specific register.
    #[error("KVM refuses to set MSR {0:#x}")]
    Msr(u32),
    /// The extended state is not as long as that of this host's processor.
    #[error("the extended processor state has {got} words; on this host it has {wanted}")]
    Xsave {
        /// What was given.
        got: usize,
        /// What it is here.
        wanted: usize,
    },
    /// More entries than KVM takes at once.
    #[error("too many {0}")]
    TooMany(&'static str),
}

fn error(what: &'static str) -> impl FnOnce(errno::Error) -> StateError {
    move |source| StateError::Ioctl { what, source }
}

/// What there is to save of a vCPU on this host.
#[derive(Clone, Debug)]
pub struct StateLayout {
    /// The model-specific registers, in the order in which they are set.
    msrs: Vec<u32>,
    /// The length of the extended processor state (x87, SSE, AVX, ...) beyond `kvm_xsave`, in words of 32 bits. `None` for a KVM without
    /// `KVM_CAP_XSAVE2`, where there is nothing beyond it.
    xsave_extra: Option<usize>,
}

impl StateLayout {
    /// Asks this host. To be asked after the first vCPU is made: features of the processor that are enabled later make the state longer.
    ///
    /// # Errors
    /// [`StateError::Ioctl`].
    pub fn new(kvm: &Kvm, vm: &VmFd) -> Result<Self, StateError> {
        let list = kvm.get_msr_index_list().map_err(error("list the MSRs"))?;
        let mut msrs: Vec<u32> =
            list.as_slice().iter().copied().filter(|msr| is_saved(*msr)).chain(MEMORY_TYPES).collect();
        // Last: it is armed against a TSC that must be there by then.
        msrs.sort_by_key(|msr| *msr == IA32_TSC_DEADLINE);
        let size = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        let xsave_extra = size.checked_sub(size_of::<kvm_xsave>()).map(|extra| extra.div_ceil(4));
        Ok(Self { msrs, xsave_extra })
    }

    fn xsave(&self) -> Result<Xsave, StateError> {
        Xsave::new(self.xsave_extra.unwrap_or(0)).map_err(|_| StateError::TooMany("words of processor state"))
    }
}

/// The MTRRs, which KVM has but does not list (Intel SDM volume 3, 13.11): those that are not there are left out when they are read.
const MEMORY_TYPES: [u32; 28] = {
    let mut msrs = [0; 28];
    let mut at = 0;
    // PHYSBASE0, PHYSMASK0 to PHYSMASK7.
    while at < 16 {
        msrs[at] = 0x200 + at as u32;
        at += 1;
    }
    // FIX64K, FIX16K.
    (msrs[16], msrs[17], msrs[18]) = (0x250, 0x258, 0x259);
    // FIX4K.
    at = 0;
    while at < 8 {
        msrs[19 + at] = 0x268 + at as u32;
        at += 1;
    }
    // DEF_TYPE.
    msrs[27] = 0x2ff;
    msrs
};

const IA32_TSC: u32 = 0x10;
const IA32_TSC_DEADLINE: u32 = 0x6e0;

/// The model-specific registers that are a guest's own: what it has set, or what counts for it. (Intel SDM volume 4, table 2-2; AMD APM
/// volume 2, appendix A; Linux 6.12 arch/x86/kvm/x86.c, `msrs_to_save_base` and `emulated_msrs_all`.) Not in here: those that are part of other
/// state (EFER, FS and GS base, APIC base), those that describe the processor, and performance counters, which the guest does not have.
fn is_saved(msr: u32) -> bool {
    matches!(
        msr,
        IA32_TSC
        | 0x11 | 0x12 // kvmclock, old numbers: wall clock, system time
        | 0x3b // TSC_ADJUST
        | 0x48 // SPEC_CTRL
        | 0x122 // TSX_CTRL
        | 0x140 // MISC_FEATURES_ENABLES
        | 0x174..=0x176 // SYSENTER
        | 0x1a0 // MISC_ENABLE
        | 0x1c4 | 0x1c5 // XFD, XFD_ERR
        | 0x1d9 // DEBUGCTL
        | 0x277 // PAT
        | IA32_TSC_DEADLINE
        | 0xda0 // XSS
        | 0x4b56_4d00..=0x4b56_4dff // kvmclock, steal time, async page faults, PV EOI, ...
        | 0xc000_0081..=0xc000_0084 // STAR, LSTAR, CSTAR, SYSCALL_MASK
        | 0xc000_0102 | 0xc000_0103 // KERNEL_GS_BASE, TSC_AUX
        | 0xc001_011f // VIRT_SPEC_CTRL
    )
}

/// A model-specific register.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Msr {
    /// Which.
    pub index: u32,
    /// Its value.
    pub value: u64,
}

/// A vCPU where it stopped.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VcpuState {
    /// Running, halted, waiting for a start-up interrupt.
    pub mp_state: kvm_mp_state,
    /// General registers.
    pub regs: kvm_regs,
    /// Segments, control registers, EFER, APIC base.
    pub sregs: kvm_sregs,
    /// x87, SSE, AVX and what else XSAVE saves, in words of 32 bits.
    pub xsave: Vec<u32>,
    /// Extended control registers.
    pub xcrs: kvm_xcrs,
    /// Debug registers.
    pub debug_regs: kvm_debugregs,
    /// Local APIC.
    pub lapic: kvm_lapic_state,
    /// Frequency of the time stamp counter.
    pub tsc_khz: u32,
    /// What the processor says it is.
    pub cpuid: Vec<kvm_cpuid_entry2>,
    /// Model-specific registers, in the order in which they are to be set.
    pub msrs: Vec<Msr>,
    /// Exceptions and interrupts under way.
    pub events: kvm_vcpu_events,
}

impl VcpuState {
    /// Reads the state of a vCPU that is held outside of the guest, with no exit of it unanswered.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn save(vcpu: &VcpuFd, layout: &StateLayout) -> Result<Self, StateError> {
        // First: KVM takes in pending INIT and start-up interrupts as it reads this (Linux 6.12 arch/x86/kvm/x86.c,
        // kvm_arch_vcpu_ioctl_get_mpstate), which changes registers and the APIC.
        let mp_state = vcpu.get_mp_state().map_err(error("read the run state"))?;
        let mut xsave = layout.xsave()?;
        if layout.xsave_extra.is_some() {
            // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 says, and no feature is enabled after it was asked.
            unsafe { vcpu.get_xsave2(&mut xsave) }.map_err(error("read the extended state"))?;
        } else {
            let read = vcpu.get_xsave().map_err(error("read the extended state"))?;
            // SAFETY: the length of what follows the header, none, stays as it is.
            unsafe { xsave.as_mut_fam_struct() }.xsave.region = read.region;
        }
        let words = xsave.as_fam_struct_ref().xsave.region.iter().chain(xsave.as_slice());
        Ok(Self {
            mp_state,
            regs: vcpu.get_regs().map_err(error("read the registers"))?,
            sregs: vcpu.get_sregs().map_err(error("read the special registers"))?,
            xsave: words.copied().collect(),
            xcrs: vcpu.get_xcrs().map_err(error("read the extended control registers"))?,
            debug_regs: vcpu.get_debug_regs().map_err(error("read the debug registers"))?,
            lapic: vcpu.get_lapic().map_err(error("read the local APIC"))?,
            tsc_khz: vcpu.get_tsc_khz().map_err(error("read the TSC's frequency"))?,
            cpuid: vcpu
                .get_cpuid2(KVM_MAX_CPUID_ENTRIES)
                .map_err(error("read the CPUID"))?
                .as_slice()
                .to_vec(),
            msrs: read_msrs(vcpu, &layout.msrs)?,
            // Last: an interrupt that the calls before have moved on is in here.
            events: vcpu.get_vcpu_events().map_err(error("read the pending events"))?,
        })
    }

    /// Makes a vCPU that has never run the one that was saved.
    ///
    /// # Errors
    /// [`StateError`]; the vCPU is then of no use.
    pub fn restore(&self, vcpu: &VcpuFd, layout: &StateLayout) -> Result<(), StateError> {
        // First: what the processor has decides which registers exist.
        let cpuid = CpuId::from_entries(&self.cpuid).map_err(|_| StateError::TooMany("CPUID entries"))?;
        vcpu.set_cpuid2(&cpuid).map_err(error("set the CPUID"))?;
        self.restore_tsc_khz(vcpu)?;
        vcpu.set_mp_state(self.mp_state).map_err(error("set the run state"))?;
        vcpu.set_regs(&self.regs).map_err(error("set the registers"))?;
        vcpu.set_sregs(&self.sregs).map_err(error("set the special registers"))?;
        self.restore_xsave(vcpu, layout)?;
        // A host without XSAVE has none, and refuses to set none.
        if self.xcrs.nr_xcrs > 0 {
            vcpu.set_xcrs(&self.xcrs).map_err(error("set the extended control registers"))?;
        }
        vcpu.set_debug_regs(&self.debug_regs).map_err(error("set the debug registers"))?;
        // After the special registers, which hold the APIC's base and mode; before the MSRs, for the timer's mode is in the APIC and its
        // deadline is an MSR.
        vcpu.set_lapic(&self.lapic).map_err(error("set the local APIC"))?;
        write_msrs(vcpu, &self.msrs)?;
        // Last: everything before could have changed what is pending.
        vcpu.set_vcpu_events(&self.events).map_err(error("set the pending events"))
    }

    /// Frequencies that differ by less than 250 ppm (KVM's own tolerance, Linux 6.12 arch/x86/kvm/x86.c, `tsc_tolerance_ppm`) are the same.
    fn restore_tsc_khz(&self, vcpu: &VcpuFd) -> Result<(), StateError> {
        let here = vcpu.get_tsc_khz().map_err(error("read the TSC's frequency"))?;
        if u64::from(here.abs_diff(self.tsc_khz)) * 1_000_000 <= u64::from(here) * 250 {
            return Ok(());
        }
        vcpu.set_tsc_khz(self.tsc_khz).map_err(error("set the TSC's frequency"))
    }

    fn restore_xsave(&self, vcpu: &VcpuFd, layout: &StateLayout) -> Result<(), StateError> {
        let mut xsave = layout.xsave()?;
        let header = xsave.as_fam_struct_ref().xsave.region.len();
        let wanted = header + layout.xsave_extra.unwrap_or(0);
        if self.xsave.len() != wanted {
            return Err(StateError::Xsave { got: self.xsave.len(), wanted });
        }
        let (region, extra) = self.xsave.split_at(header);
        // SAFETY: the length of what follows the header stays as it is.
        unsafe { xsave.as_mut_fam_struct() }.xsave.region.copy_from_slice(region);
        xsave.as_mut_slice().copy_from_slice(extra);
        // SAFETY: the buffer is as long as KVM_CAP_XSAVE2 says, and no feature is enabled after it was asked.
        unsafe { vcpu.set_xsave2(&xsave) }.map_err(error("set the extended state"))
    }
}

/// Reads those that this vCPU has: what its CPUID does not promise is not there.
fn read_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, StateError> {
    let mut read = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let entries: Vec<_> = left
            .iter()
            .take(KVM_MAX_MSR_ENTRIES)
            .map(|&index| kvm_msr_entry { index, ..Default::default() })
            .collect();
        let mut msrs = Msrs::from_entries(&entries).map_err(|_| StateError::TooMany("MSRs"))?;
        // KVM stops at the first that is not there, and says how many there were before it.
        let count = vcpu.get_msrs(&mut msrs).map_err(error("read the MSRs"))?;
        read.extend(msrs.as_slice()[..count].iter().map(|msr| Msr { index: msr.index, value: msr.data }));
        left = &left[(count + usize::from(count < entries.len())).min(left.len())..];
    }
    // A deadline of 0 is a timer that is not armed; or one that has just fired, of which KVM will not remind a vCPU that was restored. The
    // guest takes a tick too many in its stride, but not one too few.
    let tsc = read.iter().find(|msr| msr.index == IA32_TSC).map(|msr| msr.value);
    for msr in &mut read {
        if msr.index == IA32_TSC_DEADLINE && msr.value == 0 {
            msr.value = tsc.unwrap_or_default();
        }
    }
    Ok(read)
}

fn write_msrs(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), StateError> {
    for chunk in msrs.chunks(KVM_MAX_MSR_ENTRIES) {
        let entries: Vec<_> = chunk
            .iter()
            .map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() })
            .collect();
        let entries = Msrs::from_entries(&entries).map_err(|_| StateError::TooMany("MSRs"))?;
        let count = vcpu.set_msrs(&entries).map_err(error("set the MSRs"))?;
        if let Some(refused) = chunk.get(count) {
            return Err(StateError::Msr(refused.index));
        }
    }
    Ok(())
}

/// What the vCPUs share: interrupt controllers and clock.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlatformState {
    /// kvmclock.
    pub clock: kvm_clock_data,
    /// The two legacy interrupt controllers and the IOAPIC.
    pub irqchips: [kvm_irqchip; 3],
}

impl PlatformState {
    /// Reads the state of a machine whose vCPUs are held and whose devices are at rest, for those raise interrupts.
    ///
    /// # Errors
    /// [`StateError::Ioctl`].
    pub fn save(vm: &VmFd) -> Result<Self, StateError> {
        let clock = vm.get_clock().map_err(error("read the clock"))?;
        let mut irqchips: [kvm_irqchip; 3] = Default::default();
        let ids = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];
        for (chip, chip_id) in irqchips.iter_mut().zip(ids) {
            chip.chip_id = chip_id;
            vm.get_irqchip(chip).map_err(error("read an interrupt controller"))?;
        }
        Ok(Self { clock, irqchips })
    }

    /// Sets it, after the vCPUs and before the devices. Where the host's KVM keeps time by the host's real time, the guest's
    /// clock goes on as if it had never stopped; elsewhere, from where it was.
    ///
    /// # Errors
    /// [`StateError::Ioctl`].
    pub fn restore(&self, vm: &VmFd) -> Result<(), StateError> {
        // KVM tells more by its flags than it takes (Linux Documentation/virt/kvm/api.rst, 4.30).
        let clock = kvm_clock_data { flags: self.clock.flags & KVM_CLOCK_REALTIME, ..self.clock };
        vm.set_clock(&clock).map_err(error("set the clock"))?;
        for chip in &self.irqchips {
            vm.set_irqchip(chip).map_err(error("set an interrupt controller"))?;
        }
        Ok(())
    }
}
