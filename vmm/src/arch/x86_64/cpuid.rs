//! What the processor says it is: what KVM supports on this host, less what a pod cannot use, plus what KVM leaves to the VMM:
//! the APIC ID of each vCPU, and one thread per core, all cores in one package.
//!
//! Leaves: Intel SDM volume 2, CPUID; AMD APM volume 3, appendix E; Linux Documentation/virt/kvm/x86/cpuid.rst.

use std::io;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2};
use kvm_ioctls::{Cap, Kvm};
use vmm_sys_util::errno;

/// The processor cannot be described.
#[derive(Debug, thiserror::Error)]
pub enum CpuidError {
    /// KVM does not tell what it supports.
    #[error("cannot get the supported CPUID from KVM")]
    Supported(#[source] errno::Error),
    /// More leaves than KVM takes.
    #[error("the host's processor has more than {KVM_MAX_CPUID_ENTRIES} CPUID leaves")]
    TooMany,
    /// Permission for AMX.
    #[error("cannot get permission to use AMX in the guest")]
    Amx(#[source] io::Error),
}

mod leaf {
    pub(super) const VENDOR: u32 = 0;
    pub(super) const FEATURES: u32 = 1;
    pub(super) const CACHES: u32 = 4;
    pub(super) const THERMAL: u32 = 6;
    pub(super) const EXTENDED_FEATURES: u32 = 7;
    pub(super) const PMU: u32 = 0xa;
    pub(super) const TOPOLOGY: u32 = 0xb;
    pub(super) const TOPOLOGY_V2: u32 = 0x1f;
    pub(super) const AMD_FEATURES: u32 = 0x8000_0001;
    pub(super) const AMD_SIZES: u32 = 0x8000_0008;
    pub(super) const AMD_CACHES: u32 = 0x8000_001d;
    pub(super) const AMD_TOPOLOGY: u32 = 0x8000_001e;
    pub(super) const AMD_PMU: u32 = 0x8000_0022;
    pub(super) const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;
}

/// What all vCPUs have in common.
#[derive(Clone, Debug)]
pub(super) struct Template {
    entries: Vec<kvm_cpuid_entry2>,
    vcpus: u8,
}

impl Template {
    /// Asks KVM what it supports, and takes from it what fits a machine of `vcpus` vCPUs.
    pub(super) fn new(kvm: &Kvm, vcpus: u8) -> Result<Self, CpuidError> {
        request_amx().map_err(CpuidError::Amx)?;
        let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Supported)?;
        let deadline_timer = kvm.check_extension(Cap::TscDeadlineTimer);
        Ok(Self { entries: filter(supported.as_slice(), vcpus, deadline_timer), vcpus })
    }

    /// The CPUID of one vCPU, whose APIC ID is its index.
    pub(super) fn for_vcpu(&self, index: u8) -> Result<CpuId, CpuidError> {
        let mut entries = self.entries.clone();
        set_apic_id(&mut entries, index, self.vcpus);
        CpuId::from_entries(&entries).map_err(|_| CpuidError::TooMany)
    }
}

/// How many bits a physical address has (AMD APM volume 3, CPUID 0x80000008 EAX; Intel SDM volume 2, likewise).
pub(super) fn address_bits(kvm: &Kvm) -> Result<u8, CpuidError> {
    let supported = kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).map_err(CpuidError::Supported)?;
    Ok(address_bits_of(supported.as_slice()))
}

fn address_bits_of(entries: &[kvm_cpuid_entry2]) -> u8 {
    // A processor without the leaf has 36 (Intel SDM volume 3, 4.1.4).
    entries.iter().find(|entry| entry.function == leaf::AMD_SIZES).map_or(36, |entry| entry.eax as u8)
}

/// Asks for permission to use AMX in guests of this process, without which KVM reports half of it
/// (Linux Documentation/arch/x86/xstate.rst). A host without AMX, or too old to know of it, says so and all is well.
fn request_amx() -> io::Result<()> {
    const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_int = 0x1025;
    const XFEATURE_XTILEDATA: libc::c_ulong = 18;
    // SAFETY: the call takes two numbers and no pointer.
    if unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, XFEATURE_XTILEDATA) } == 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EINVAL | libc::EOPNOTSUPP | libc::ENOSYS) => Ok(()),
        _ => Err(error),
    }
}

/// How many low bits of an APIC ID number the vCPUs of the package.
fn core_bits(vcpus: u8) -> u32 {
    vcpus.next_power_of_two().trailing_zeros()
}

fn is_amd(entries: &[kvm_cpuid_entry2]) -> bool {
    // "AuthenticAMD" and "HygonGenuine" in EBX, EDX, ECX; the EBX of each.
    const AMD: [u32; 2] = [u32::from_le_bytes(*b"Auth"), u32::from_le_bytes(*b"Hygo")];
    entries.iter().any(|entry| entry.function == leaf::VENDOR && AMD.contains(&entry.ebx))
}

/// Everything that is the same for all vCPUs.
fn filter(supported: &[kvm_cpuid_entry2], vcpus: u8, deadline_timer: bool) -> Vec<kvm_cpuid_entry2> {
    let amd = is_amd(supported);
    let max_basic =
        supported.iter().find(|entry| entry.function == leaf::VENDOR).map_or(0, |entry| entry.eax);
    let (count, bits) = (u32::from(vcpus), core_bits(vcpus));
    let mut entries: Vec<_> = supported
        .iter()
        .copied()
        // Topology leaves are made below; a leaf that is not there reads as zero, which for 0x80000026 means "look at 0xb".
        .filter(|entry| !matches!(entry.function, leaf::TOPOLOGY | leaf::TOPOLOGY_V2 | leaf::AMD_TOPOLOGY_V2))
        .collect();
    for entry in &mut entries {
        match entry.function {
            leaf::FEATURES => {
                const PDCM: u32 = 1 << 15;
                const TSC_DEADLINE: u32 = 1 << 24;
                const HYPERVISOR: u32 = 1 << 31;
                const HTT: u32 = 1 << 28;
                entry.ecx = entry.ecx & !(PDCM | TSC_DEADLINE) | HYPERVISOR;
                if deadline_timer {
                    entry.ecx |= TSC_DEADLINE;
                }
                // Logical processors in the package, valid if HTT.
                entry.ebx = entry.ebx & !0x00ff_0000 | (1 << bits) << 16;
                entry.edx = if vcpus > 1 { entry.edx | HTT } else { entry.edx & !HTT };
            }
            leaf::CACHES if entry.eax & 0x1f != 0 => share_cache(entry, bits),
            // The APIC timer runs in all power states; no turbo, no energy hint, no thermal sensor.
            leaf::THERMAL => {
                const ARAT: u32 = 1 << 2;
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (ARAT, 0, 0, 0);
            }
            leaf::EXTENDED_FEATURES if entry.index == 0 => {
                // UMWAIT would let a guest hold a host CPU without being preempted by a halt exit.
                const WAITPKG: u32 = 1 << 5;
                entry.ecx &= !WAITPKG;
            }
            leaf::PMU | leaf::AMD_PMU => (entry.eax, entry.ebx, entry.ecx, entry.edx) = (0, 0, 0, 0),
            leaf::AMD_FEATURES => {
                const PERFCTR_CORE: u32 = 1 << 23;
                const PERFCTR_NB: u32 = 1 << 24;
                const PERFCTR_LLC: u32 = 1 << 28;
                entry.ecx &= !(PERFCTR_CORE | PERFCTR_NB | PERFCTR_LLC);
                if amd {
                    // Each logical processor is a core, not a thread of one.
                    const CMP_LEGACY: u32 = 1 << 1;
                    entry.ecx = if vcpus > 1 { entry.ecx | CMP_LEGACY } else { entry.ecx & !CMP_LEGACY };
                }
            }
            // Cores in the package less one, and the width of their number in an APIC ID.
            leaf::AMD_SIZES if amd => entry.ecx = bits << 12 | (count - 1),
            leaf::AMD_CACHES if entry.eax & 0x1f != 0 => share_cache(entry, bits),
            _ => {}
        }
    }
    // V2 takes precedence over V1 in Linux; both say the same. Intel and AMD alike have 0xb.
    for function in [leaf::TOPOLOGY, leaf::TOPOLOGY_V2].into_iter().filter(|&leaf| leaf <= max_basic) {
        const LEVEL_THREAD: u32 = 1;
        const LEVEL_CORE: u32 = 2;
        for (index, (shift, processors, level)) in
            [(0, 1, LEVEL_THREAD), (bits, count, LEVEL_CORE), (0, 0, 0)].into_iter().enumerate()
        {
            entries.push(kvm_cpuid_entry2 {
                function,
                index: index as u32,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: shift,
                ebx: processors,
                ecx: level << 8 | index as u32,
                ..Default::default()
            });
        }
    }
    entries
}

/// Makes a cache's sharing fit: the last level is shared by the package, the others belong to one core.
fn share_cache(entry: &mut kvm_cpuid_entry2, bits: u32) {
    let level = entry.eax >> 5 & 7;
    let sharing = if level >= 3 { (1 << bits) - 1 } else { 0 };
    // Bits 25..14: logical processors that share it, less one. Intel only, bits 31..26: cores in the package, less one
    // (reserved on AMD, where zero is right).
    let cores = if entry.function == leaf::CACHES { (1u32 << bits) - 1 } else { 0 };
    entry.eax = entry.eax & 0x3fff | sharing << 14 | cores << 26;
}

/// What differs between vCPUs.
fn set_apic_id(entries: &mut [kvm_cpuid_entry2], index: u8, vcpus: u8) {
    let id = u32::from(index);
    let amd = is_amd(entries);
    for entry in entries {
        match entry.function {
            leaf::FEATURES => entry.ebx = entry.ebx & 0x00ff_ffff | id << 24,
            leaf::TOPOLOGY | leaf::TOPOLOGY_V2 => entry.edx = id,
            leaf::AMD_TOPOLOGY if amd => {
                // Extended APIC ID; core ID with one thread per core; one node, number 0.
                (entry.eax, entry.ebx, entry.ecx, entry.edx) = (id, id, 0, 0);
                debug_assert!(index < vcpus);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn vendor(name: &[u8; 12], max: u32) -> kvm_cpuid_entry2 {
        let word = |i: usize| u32::from_le_bytes([name[i], name[i + 1], name[i + 2], name[i + 3]]);
        leaf(0, 0, [max, word(0), word(8), word(4)])
    }

    fn get(entries: &[kvm_cpuid_entry2], function: u32, index: u32) -> kvm_cpuid_entry2 {
        *entries.iter().find(|entry| (entry.function, entry.index) == (function, index)).unwrap()
    }

    fn intel() -> Vec<kvm_cpuid_entry2> {
        vec![
            vendor(b"GenuineIntel", 0x1f),
            leaf(1, 0, [0xc06f2, 0x12ff_0800, !(1 << 31), u32::MAX]),
            // First-level data and third-level cache.
            leaf(4, 0, [0xfc00_4121, 1, 2, 3]),
            leaf(4, 3, [0xfc1f_c163, 1, 2, 3]),
            leaf(4, 4, [0, 0, 0, 0]),
            leaf(6, 0, [0xff, 1, 9, 0]),
            leaf(7, 0, [2, u32::MAX, u32::MAX, u32::MAX]),
            leaf(0xa, 0, [0x0830_0805, 0, 0, 0x603]),
            leaf(0xb, 0, [1, 2, 0x100, 77]),
            leaf(0xb, 1, [6, 64, 0x201, 77]),
            leaf(0x1f, 0, [1, 2, 0x100, 77]),
        ]
    }

    #[test]
    fn processor_tells_how_many_address_bits_it_has() {
        let sizes = kvm_cpuid_entry2 { function: 0x8000_0008, eax: 0x3028, ..Default::default() };
        assert_eq!(address_bits_of(&[sizes]), 40);
        assert_eq!(address_bits_of(&[]), 36);
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id_everywhere() {
        for vcpus in [1, 2, 3, 32] {
            let template = Template { entries: filter(&intel(), vcpus, true), vcpus };
            for index in 0..vcpus {
                let cpuid = template.for_vcpu(index).unwrap();
                let entries = cpuid.as_slice();
                assert_eq!(get(entries, 1, 0).ebx >> 24, u32::from(index));
                assert_eq!(get(entries, 1, 0).ebx & 0xff00, 0x0800, "CLFLUSH line size is kept");
                for (function, level) in [(0xb, 0), (0xb, 1), (0x1f, 0), (0x1f, 1)] {
                    assert_eq!(get(entries, function, level).edx, u32::from(index));
                }
            }
        }
    }

    #[test]
    fn topology_is_one_package_of_single_threaded_cores() {
        for (vcpus, bits) in [(1, 0), (2, 1), (3, 2), (4, 2), (5, 3), (32, 5)] {
            let entries = filter(&intel(), vcpus, true);
            let (threads, cores, end) = (get(&entries, 0xb, 0), get(&entries, 0xb, 1), get(&entries, 0xb, 2));
            assert_eq!((threads.eax, threads.ebx, threads.ecx), (0, 1, 0x100));
            assert_eq!((cores.eax, cores.ebx, cores.ecx), (bits, u32::from(vcpus), 0x201));
            assert_eq!((end.eax, end.ebx, end.ecx), (0, 0, 2));
            assert_eq!(get(&entries, 1, 0).ebx >> 16 & 0xff, 1 << bits);
            assert_eq!(get(&entries, 1, 0).edx >> 28 & 1, u32::from(vcpus > 1));
            let (first, last) = (get(&entries, 4, 0).eax, get(&entries, 4, 3).eax);
            assert_eq!((first >> 14 & 0xfff, last >> 14 & 0xfff), (0, (1 << bits) - 1));
            assert_eq!((first & 0x3fff, last & 0x3fff), (0x121, 0x163), "what the cache is stays");
            assert_eq!(entries.iter().filter(|entry| entry.function == 0x1f).count(), 3);
        }
    }

    #[test]
    fn what_a_pod_cannot_use_is_hidden() {
        let entries = filter(&intel(), 2, true);
        let features = get(&entries, 1, 0);
        assert_eq!(features.ecx >> 15 & 1, 0, "PDCM");
        assert_eq!(features.ecx >> 31, 1, "hypervisor");
        assert_eq!(features.ecx >> 24 & 1, 1, "TSC deadline");
        assert_eq!(get(&filter(&intel(), 2, false), 1, 0).ecx >> 24 & 1, 0);
        assert_eq!(get(&entries, 7, 0).ecx >> 5 & 1, 0, "WAITPKG");
        let thermal = get(&entries, 6, 0);
        assert_eq!(
            (thermal.eax, thermal.ecx),
            (4, 0),
            "no turbo, no energy hint; the APIC timer never stops"
        );
        let pmu = get(&entries, 0xa, 0);
        assert_eq!((pmu.eax, pmu.ebx, pmu.ecx, pmu.edx), (0, 0, 0, 0));
    }

    #[test]
    fn amd_says_it_in_its_own_leaves_too() {
        let supported = [
            vendor(b"AuthenticAMD", 0x10),
            leaf(1, 0, [0, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, u32::MAX, u32::MAX]),
            leaf(0x8000_0008, 0, [0x3030, 5, 0x703f, 7]),
            leaf(0x8000_001d, 3, [0x3c163, 0, 0, 0]),
            leaf(0x8000_001e, 0, [77, 77, 77, 0]),
            leaf(0x8000_0022, 0, [1, 6, 0, 0]),
            leaf(0x8000_0026, 0, [1, 2, 3, 4]),
        ];
        let template = Template { entries: filter(&supported, 3, true), vcpus: 3 };
        let cpuid = template.for_vcpu(2).unwrap();
        let entries = cpuid.as_slice();
        assert_eq!(get(entries, 0x8000_0001, 0).ecx >> 23 & 0b10_0011, 0, "performance counters");
        assert_eq!(get(entries, 0x8000_0008, 0).ecx, 2 << 12 | 2);
        assert_eq!(get(entries, 0x8000_0008, 0).eax, 0x3030, "address sizes are kept");
        assert_eq!(get(entries, 0x8000_001d, 3).eax, 0x163 | 3 << 14);
        assert_eq!(get(entries, 0x8000_001e, 0).eax, 2);
        assert_eq!(get(entries, 0x8000_001e, 0).ebx, 2);
        assert_eq!(get(entries, 0x8000_0022, 0).eax, 0);
        assert!(entries.iter().all(|entry| entry.function != 0x8000_0026));
        assert!(entries.iter().all(|entry| entry.function != 0x1f), "beyond the highest leaf");
        assert_eq!(get(entries, 0xb, 1).edx, 2);
    }

    #[test]
    fn too_many_leaves_are_an_error() {
        let template = Template { entries: vec![leaf(1, 0, [0; 4]); KVM_MAX_CPUID_ENTRIES + 1], vcpus: 1 };
        assert!(matches!(template.for_vcpu(0), Err(CpuidError::TooMany)));
    }
}
