//! What a process holds of its own.

use std::fs;

use anyhow::{Context, Result};

/// Private memory of a process in KiB (proc_pid_smaps(5): `Private_Clean` and `Private_Dirty`), without mappings of at least
/// `guest_ram_mib` MiB: in a VMM that is the memory of its guest and nothing else is as large.
pub(crate) fn private_kib(pid: u32, guest_ram_mib: u32) -> Result<f64> {
    let path = format!("/proc/{pid}/smaps");
    let smaps = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    let (mut total, mut size) = (0, 0);
    for line in smaps.lines() {
        let Some((name, value)) = line.split_once(':') else { continue };
        let kib =
            || value.trim().trim_end_matches(" kB").parse::<u64>().with_context(|| format!("{path}: {line}"));
        match name {
            "Size" => size = kib()?,
            "Private_Clean" | "Private_Dirty" | "Private_Hugetlb"
                if size < u64::from(guest_ram_mib) << 10 =>
            {
                total += kib()?;
            }
            _ => {}
        }
    }
    Ok(total as f64)
}

/// Number of threads of a process.
pub(crate) fn threads(pid: u32) -> Result<f64> {
    Ok(fs::read_dir(format!("/proc/{pid}/task"))?.count() as f64)
}

/// The child of `parent` whose command is `comm`.
pub(crate) fn child(parent: u32, comm: &str) -> Result<u32> {
    // All threads of a process may have children.
    for task in fs::read_dir(format!("/proc/{parent}/task"))? {
        let children = fs::read_to_string(task?.path().join("children"))?;
        for pid in children.split_whitespace() {
            if fs::read_to_string(format!("/proc/{pid}/comm"))?.trim_end() == comm {
                return Ok(pid.parse()?);
            }
        }
    }
    anyhow::bail!("process {parent} has no child {comm}")
}
