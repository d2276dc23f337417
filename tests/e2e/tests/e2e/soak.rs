//! Many pods: one after another, and all at once. How many is a setting, because most hosts have no time for many.

use std::collections::BTreeSet;
use std::fs;
use std::thread;

use anyhow::{Context, Result, anyhow, ensure};
use kvrun_e2e::cri::{Cri, HOST, Pod, script};
use kvrun_e2e::{Case, Test, cases};

use crate::cri::{SLEEP, setting, until_logged};
use crate::pod_faults::nothing_is_left;

pub(crate) const CASES: &[Case] = cases![pods_in_sequence_leave_nothing_and_take_no_memory, pods_at_once];

/// The environment variable with the number of pods.
const COUNT_VARIABLE: &str = "KVRUN_E2E_PODS";
/// How many are at once, at most: as many as a host with 4 GiB has room for.
const AT_ONCE: usize = 30;
/// How many of these are made, and removed, at the same time.
const IN_PARALLEL: usize = 4;
/// From how many pods on memory is looked at: below, whatever else the host does weighs more.
const MEASURED: usize = 50;
/// What may be gone of the host's memory in the end, in KiB: containerd's, and what it has logged.
const MEMORY: u64 = 64 << 10;

fn count() -> Result<usize> {
    setting(COUNT_VARIABLE, 4)
}

/// A pod, and its container.
fn start<'c>(cri: &'c Cri<'_>, number: usize) -> Result<(Pod<'c>, String)> {
    let pod = cri.run_pod(cri.pod_config(&format!("pod-{number}")))?;
    let id = pod.start(script("main", SLEEP))?;
    Ok((pod, id))
}

/// What the host could still give, in KiB.
fn memory_available() -> Result<u64> {
    let text = fs::read_to_string("/proc/meminfo")?;
    let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    Ok(line.context("no MemAvailable")?.trim_end_matches(" kB").trim().parse()?)
}

fn pods_in_sequence_leave_nothing_and_take_no_memory(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let count = count()?;
    let mut before = 0;
    for number in 0..count {
        let (pod, _) = start(&cri, number)?;
        until_logged(&pod, "main", "up")?;
        pod.remove()?;
        nothing_is_left(&cri).with_context(|| format!("after pod {number}"))?;
        // By then all is in memory that is read but once.
        if number == count / 4 {
            before = memory_available()?;
        }
    }
    let after = memory_available()?;
    let lost = before.saturating_sub(after);
    ensure!(
        count < MEASURED || lost < MEMORY,
        "{before} KiB were available after a quarter, {after} KiB in the end"
    );
    cri.end()
}

/// Does the same with several at the same time; all results.
fn in_parallel<T: Send, R: Send>(all: Vec<T>, act: impl Fn(T) -> Result<R> + Sync) -> Result<Vec<R>> {
    thread::scope(|scope| {
        let acting: Vec<_> = all.into_iter().map(|one| scope.spawn(|| act(one))).collect();
        let ended = acting.into_iter().map(|one| one.join().map_err(|_| anyhow!("the thread panicked"))?);
        ended.collect()
    })
}

fn pods_at_once(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let count = count()?.min(AT_ONCE);
    let mut pods = Vec::new();
    for first in (0..count).step_by(IN_PARALLEL) {
        let numbers = first..count.min(first + IN_PARALLEL);
        pods.extend(in_parallel(numbers.collect(), |number| start(&cri, number))?);
    }
    ensure!(t.vmms()?.len() == count, "a machine each");
    let mut addresses = BTreeSet::new();
    for (pod, id) in &pods {
        until_logged(pod, "main", "up")?;
        pod.sh(id, &format!("ping -c 1 -q {HOST}"))?;
        addresses.insert(pod.pod_status()?.network.context("no network")?.ip);
    }
    ensure!(addresses.len() == count, "{addresses:?}");
    while !pods.is_empty() {
        let some = pods.split_off(pods.len().saturating_sub(IN_PARALLEL));
        in_parallel(some, |(pod, _)| pod.remove())?;
    }
    nothing_is_left(&cri)?;
    cri.end()
}
