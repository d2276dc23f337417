//! What a container sees of the machine that it is in.

use anyhow::{Context, Result};

/// A script that tells the size of the guest.
pub const GUEST_SIZE: &str = "nproc; awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo";

/// What [`GUEST_SIZE`] has written: CPUs online, and memory in MiB, of which the kernel has kept some for itself.
///
/// # Errors
/// When it has written something else.
pub fn guest_size(text: &str) -> Result<(u64, u64)> {
    let numbers =
        text.split_once('\n').and_then(|(cpus, mib)| Some((cpus.parse().ok()?, mib.trim().parse().ok()?)));
    numbers.with_context(|| format!("no size of a guest: {text:?}"))
}
