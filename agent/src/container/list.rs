//! The processes of a container, as `/proc` has them (proc(5)).

use std::collections::HashMap;
use std::fs::{self, File};
use std::io::Read;

/// The most that are listed.
const MAX: usize = 32 * 1024;
/// The most that is taken of a command line, in bytes.
const MAX_COMMAND: u64 = 4096;
/// `USER_HZ`, in which `/proc` counts: 100 on every architecture we know.
const MS_PER_TICK: u64 = 10;
/// Linux Documentation/admin-guide/devices.txt: the majors of Unix98 terminals.
const PTS_MAJORS: std::ops::Range<u64> = 136..144;

/// A process.
#[derive(Debug, PartialEq, Eq)]
pub struct Listed {
    /// As the container has it.
    pub pid: u32,
    /// Likewise; 0 if it is not in the list.
    pub parent_pid: u32,
    /// As the guest has it.
    pub uid: u32,
    /// Seconds since the epoch.
    pub started_s: u64,
    /// CPU time.
    pub cpu_ms: u64,
    /// Its controlling terminal, or empty.
    pub terminal: String,
    /// Its command line, or its name in brackets.
    pub command: String,
}

/// Looks at processes of a container whose first one is `init`, all in the guest's numbers. One that ends meanwhile is left out.
#[must_use]
pub fn list(init: i32, pids: &[i32]) -> Vec<Listed> {
    // How deep the container's PID namespace is.
    let level = ns_pids(init).map_or(0, |pids| pids.len().saturating_sub(1));
    let boot = fs::read_to_string("/proc/stat").unwrap_or_default();
    let boot: u64 = boot.lines().find_map(|l| l.strip_prefix("btime ")?.trim().parse().ok()).unwrap_or(0);
    let found: Vec<(i32, i32, Listed)> =
        pids.iter().take(MAX).filter_map(|pid| look(*pid, level, boot)).collect();
    let known: HashMap<i32, u32> = found.iter().map(|(pid, _, listed)| (*pid, listed.pid)).collect();
    let mut rows: Vec<Listed> = found
        .into_iter()
        .map(|(_, parent, listed)| Listed { parent_pid: known.get(&parent).copied().unwrap_or(0), ..listed })
        .collect();
    rows.sort_by_key(|listed| listed.pid);
    rows
}

/// Its numbers, from that in the guest inwards.
fn ns_pids(pid: i32) -> Option<Vec<u32>> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("NSpid:"))?;
    line.split_whitespace().map(|number| number.parse().ok()).collect()
}

fn look(pid: i32, level: usize, boot: u64) -> Option<(i32, i32, Listed)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let uid = status.lines().find_map(|l| l.strip_prefix("Uid:")?.split_whitespace().next()?.parse().ok())?;
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let stat = Stat::parse(&stat)?;
    let listed = Listed {
        pid: *ns_pids(pid)?.get(level)?,
        parent_pid: 0,
        uid,
        started_s: boot + stat.start_ticks * MS_PER_TICK / 1000,
        cpu_ms: stat.cpu_ticks * MS_PER_TICK,
        terminal: terminal(stat.terminal),
        command: command(pid).unwrap_or_else(|| format!("[{}]", stat.name)),
    };
    Some((pid, stat.parent, listed))
}

fn command(pid: i32) -> Option<String> {
    let mut bytes = Vec::new();
    File::open(format!("/proc/{pid}/cmdline")).ok()?.take(MAX_COMMAND).read_to_end(&mut bytes).ok()?;
    let text = String::from_utf8_lossy(&bytes).trim_end_matches('\0').replace('\0', " ");
    (!text.is_empty()).then_some(text)
}

struct Stat {
    name: String,
    parent: i32,
    terminal: u64,
    cpu_ticks: u64,
    start_ticks: u64,
}

impl Stat {
    /// proc_pid_stat(5): the second field is the name in parentheses, in which anything may be.
    fn parse(text: &str) -> Option<Self> {
        let (head, rest) = text.rsplit_once(')')?;
        let (_, name) = head.split_once('(')?;
        let fields: Vec<&str> = rest.split_whitespace().collect();
        // Numbered from 3, the state.
        let field = |number: usize| fields.get(number - 3).copied();
        let count = |number: usize| field(number)?.parse::<u64>().ok();
        Some(Self {
            name: name.to_owned(),
            parent: field(4)?.parse().ok()?,
            terminal: count(7)?,
            cpu_ticks: count(14)? + count(15)?,
            start_ticks: count(22)?,
        })
    }
}

/// The number of a device, as proc_pid_stat(5) has it: minor in bits 0..8 and 20..32, major in 8..20.
fn terminal(device: u64) -> String {
    let (major, minor) = ((device >> 8) & 0xfff, (device & 0xff) | ((device >> 12) & 0xf_ff00));
    if PTS_MAJORS.contains(&major) {
        format!("pts/{}", (major - PTS_MAJORS.start) * 256 + minor)
    } else {
        String::new()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_listed() {
        let pid = std::process::id().cast_signed();
        let listed = list(pid, &[pid, i32::MAX]);
        assert_eq!(listed.len(), 1);
        assert!(listed[0].started_s > 0 && !listed[0].command.is_empty());
        assert_eq!(listed[0].parent_pid, 0);
    }

    #[test]
    fn terminals_have_names() {
        assert_eq!(terminal(0), "");
        assert_eq!(terminal((136 << 8) | 3), "pts/3");
        assert_eq!(terminal((137 << 8) | 1), "pts/257");
    }

    #[test]
    fn name_of_a_process_may_look_like_anything() {
        let stat = Stat::parse("7 (a) b) S 5 1 2 34816 4 5 6 7 8 9 10 11 12 13 14 15 16 17 99").unwrap();
        assert_eq!(
            (stat.name.as_str(), stat.parent, stat.terminal, stat.start_ticks),
            ("a) b", 5, 34816, 99)
        );
        assert_eq!(stat.cpu_ticks, 21);
        assert!(Stat::parse("7 a").is_none());
    }
}
