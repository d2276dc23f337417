//! Whether this host's KVM can run a guest kernel, found out by asking it and by running a tiny guest.
//!
//! Some hosts have a `/dev/kvm` that emulates the guest's ring 0 in software and knows only part of the instruction set: it answers
//! every question as the real one does, and a guest kernel dies on it within a millisecond. So asking is not enough.
//!
//! * this file - [`run`], the questions and the verdict.
//! * [`guest`] - the tiny guest: one probe of `probes.s` at a time, each bounded in time.

mod guest;

use std::fs::File;
use std::os::fd::{FromRawFd, IntoRawFd};

use kvm_bindings::{KVM_API_VERSION, KVM_MAX_CPUID_ENTRIES};
use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

use crate::arch::NEEDED_CAPABILITIES;

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What: a capability or an instruction.
    pub name: String,
    /// Whether it is as a guest kernel needs it.
    pub ok: bool,
    /// What was seen.
    pub detail: String,
}

impl Finding {
    fn new(name: impl Into<String>, ok: bool, detail: impl Into<String>) -> Self {
        Self { name: name.into(), ok, detail: detail.into() }
    }
}

/// Looks at everything a guest kernel needs of this host's KVM. Takes well under a second, or a few if a probe hangs.
///
/// The host can run virtual machines if every finding is `ok`.
pub fn run() -> Vec<Finding> {
    const PATH: &str = "/dev/kvm";
    match File::options().read(true).write(true).open(PATH) {
        Ok(file) => {
            // SAFETY: the descriptor is open and given away here.
            let kvm = unsafe { Kvm::from_raw_fd(file.into_raw_fd()) };
            let mut findings = vec![Finding::new(PATH, true, "can be opened for reading and writing")];
            findings.extend(run_with(&kvm));
            findings
        }
        Err(error) => {
            let remedy = match error.kind() {
                std::io::ErrorKind::NotFound => {
                    "load the module kvm_intel or kvm_amd, and enable virtualization in the firmware"
                }
                std::io::ErrorKind::PermissionDenied => "run as root",
                _ => "another hypervisor may be using the processor",
            };
            vec![Finding::new(PATH, false, format!("{error}; {remedy}"))]
        }
    }
}

/// As [`run`], with `/dev/kvm` open already.
pub fn run_with(kvm: &Kvm) -> Vec<Finding> {
    let version = kvm.get_api_version();
    let mut findings = vec![Finding::new(
        "KVM API",
        version == KVM_API_VERSION as i32,
        format!("version {version}, needed is {KVM_API_VERSION}"),
    )];
    if !findings[0].ok {
        return findings;
    }
    for (capability, name) in NEEDED_CAPABILITIES {
        let ok = kvm.check_extension(*capability);
        findings.push(Finding::new(
            *name,
            ok,
            if ok { "present" } else { "missing; a newer host kernel has it" },
        ));
    }
    findings.push(kvmclock(kvm));
    findings.extend(guest::run(kvm));
    findings
}

/// The guest has no other clock whose frequency it knows.
fn kvmclock(kvm: &Kvm) -> Finding {
    // Linux Documentation/virt/kvm/x86/cpuid.rst: KVM_FEATURE_CLOCKSOURCE2, with the MSRs 0x4b564d00 and 0x4b564d01.
    const FEATURES: u32 = 0x4000_0001;
    const CLOCKSOURCE2: u32 = 1 << 3;
    let name = "kvmclock";
    match kvm.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES) {
        Ok(cpuid) => {
            let ok =
                cpuid.as_slice().iter().any(|leaf| leaf.function == FEATURES && leaf.eax & CLOCKSOURCE2 != 0);
            Finding::new(name, ok, if ok { "present" } else { "missing from the supported CPUID" })
        }
        Err(error) => Finding::new(name, false, format!("cannot get the supported CPUID: {error}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_verdict_on_this_host_names_each_thing_once() {
        let findings = run();
        let mut names: Vec<_> = findings.iter().map(|finding| &finding.name).collect();
        names.sort();
        names.dedup();
        assert_eq!(names.len(), findings.len());
        assert!(findings.iter().all(|finding| !finding.detail.is_empty()));
        for finding in findings {
            println!("{:5} {}: {}", finding.ok, finding.name, finding.detail);
        }
    }
}
