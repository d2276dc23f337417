//! `process.capabilities`: the five sets of capabilities(7).

use oci_spec::runtime::{Capabilities, Capability, LinuxCapabilities};
use rustix::thread::{
    CapabilitySet, CapabilitySets, clear_ambient_capability_set, configure_capability_in_ambient_set,
    remove_capability_from_bounding_set, set_capabilities,
};

use super::error::{SetupError, system};

/// The highest capability we know of; there is none above it in Linux 6.12 (include/uapi/linux/capability.h, `CAP_LAST_CAP`).
const LAST: u32 = 40;

fn number(capability: Capability) -> u32 {
    match capability {
        Capability::Chown => 0,
        Capability::DacOverride => 1,
        Capability::DacReadSearch => 2,
        Capability::Fowner => 3,
        Capability::Fsetid => 4,
        Capability::Kill => 5,
        Capability::Setgid => 6,
        Capability::Setuid => 7,
        Capability::Setpcap => 8,
        Capability::LinuxImmutable => 9,
        Capability::NetBindService => 10,
        Capability::NetBroadcast => 11,
        Capability::NetAdmin => 12,
        Capability::NetRaw => 13,
        Capability::IpcLock => 14,
        Capability::IpcOwner => 15,
        Capability::SysModule => 16,
        Capability::SysRawio => 17,
        Capability::SysChroot => 18,
        Capability::SysPtrace => 19,
        Capability::SysPacct => 20,
        Capability::SysAdmin => 21,
        Capability::SysBoot => 22,
        Capability::SysNice => 23,
        Capability::SysResource => 24,
        Capability::SysTime => 25,
        Capability::SysTtyConfig => 26,
        Capability::Mknod => 27,
        Capability::Lease => 28,
        Capability::AuditWrite => 29,
        Capability::AuditControl => 30,
        Capability::Setfcap => 31,
        Capability::MacOverride => 32,
        Capability::MacAdmin => 33,
        Capability::Syslog => 34,
        Capability::WakeAlarm => 35,
        Capability::BlockSuspend => 36,
        Capability::AuditRead => 37,
        Capability::Perfmon => 38,
        Capability::Bpf => 39,
        Capability::CheckpointRestore => 40,
    }
}

/// Sets as the kernel has them: one bit each.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Sets {
    bounding: u64,
    effective: u64,
    inheritable: u64,
    permitted: u64,
    ambient: u64,
}

impl Sets {
    /// Those of a config. Without any, a process has none, as with runc.
    #[must_use]
    pub fn new(given: Option<&LinuxCapabilities>) -> Self {
        let Some(given) = given else { return Self::default() };
        let bits = |set: &Option<Capabilities>| {
            set.iter().flatten().fold(0, |bits, capability| bits | 1_u64 << number(*capability))
        };
        Self {
            bounding: bits(given.bounding()),
            effective: bits(given.effective()),
            inheritable: bits(given.inheritable()),
            permitted: bits(given.permitted()),
            ambient: bits(given.ambient()),
        }
    }

    /// Drops from the bounding set what is not in it. Before the user changes: it takes `CAP_SETPCAP`.
    ///
    /// # Errors
    ///
    /// [`SetupError`].
    pub fn bound(&self) -> Result<(), SetupError> {
        for capability in (0..=LAST).filter(|capability| self.bounding & (1 << capability) == 0) {
            remove_capability_from_bounding_set(CapabilitySet::from_bits_retain(1 << capability))
                .map_err(system(format!("process.capabilities.bounding: drop capability {capability}")))?;
        }
        Ok(())
    }

    /// Sets the others. After the user has changed.
    ///
    /// # Errors
    ///
    /// [`SetupError`].
    pub fn apply(&self) -> Result<(), SetupError> {
        let sets = CapabilitySets {
            effective: CapabilitySet::from_bits_retain(self.effective),
            permitted: CapabilitySet::from_bits_retain(self.permitted),
            inheritable: CapabilitySet::from_bits_retain(self.inheritable),
        };
        clear_ambient_capability_set().map_err(system("process.capabilities.ambient: clear"))?;
        set_capabilities(None, sets).map_err(system("process.capabilities: set"))?;
        for capability in (0..=LAST).filter(|capability| self.ambient & (1 << capability) != 0) {
            configure_capability_in_ambient_set(CapabilitySet::from_bits_retain(1 << capability), true)
                .map_err(system(format!("process.capabilities.ambient: raise capability {capability}")))?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_set_is_its_own() {
        let given: LinuxCapabilities = serde_json::from_str(
            r#"{"bounding":["CAP_KILL","CAP_CHOWN"],"effective":["CAP_KILL"],"permitted":["CAP_CHECKPOINT_RESTORE"],
                "inheritable":["CAP_NET_RAW"],"ambient":["CAP_SYS_TTY_CONFIG"]}"#,
        )
        .unwrap();
        let expected = Sets {
            bounding: 1 << 5 | 1,
            effective: 1 << 5,
            permitted: 1 << 40,
            inheritable: 1 << 13,
            ambient: 1 << 26,
        };
        assert_eq!(Sets::new(Some(&given)), expected);
        assert_eq!(Sets::new(None), Sets::default());
    }
}
