//! What machines cost the host.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use kvrun_e2e::Test;

/// The process IDs of all VMMs of this test.
pub(super) fn vmms(t: &Test) -> Result<Vec<i32>> {
    Ok(t.vmms()?.into_iter().map(|(pid, _)| pid).collect())
}

/// How much memory that is no file's the VMMs of this test have, in MiB.
pub(super) fn anonymous_mib(t: &Test) -> Result<u64> {
    let mut kib = 0;
    for pid in vmms(t)? {
        kib += field(&fs::read_to_string(format!("/proc/{pid}/status"))?, "RssAnon:")?;
    }
    Ok(kib >> 10)
}

/// What of a file a process has mapped.
#[derive(Debug, Default)]
pub(super) struct Mapping {
    pub(super) rss_kib: u64,
    pub(super) pss_kib: u64,
    pub(super) private_dirty_kib: u64,
}

/// The mapping of `file` in a process, if it has one.
pub(super) fn mapping(pid: i32, file: &Path) -> Result<Option<Mapping>> {
    let smaps = fs::read_to_string(format!("/proc/{pid}/smaps"))?;
    let name = file.file_name().and_then(|name| name.to_str()).context("the file has a name")?;
    let Some(start) = smaps.find(name) else { return Ok(None) };
    let of_it = &smaps[start..];
    Ok(Some(Mapping {
        rss_kib: field(of_it, "Rss:")?,
        pss_kib: field(of_it, "Pss:")?,
        private_dirty_kib: field(of_it, "Private_Dirty:")?,
    }))
}

/// The first number behind `name`.
fn field(text: &str, name: &str) -> Result<u64> {
    let value =
        text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    Ok(value.split_whitespace().next().context("no number")?.parse()?)
}
