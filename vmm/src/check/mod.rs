//! Whether this host's KVM can run a guest kernel, found out by asking it and by running a tiny guest.

use kvm_ioctls::Kvm;
use serde::{Deserialize, Serialize};

/// One thing that was looked at.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Finding {
    /// What: a capability or an instruction.
    pub name: String,
    /// Whether it is as a guest kernel needs it.
    pub ok: bool,
    /// What was seen; if not `ok`, what it means.
    pub detail: String,
}
