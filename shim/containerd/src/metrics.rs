//! What a container uses, as containerd's metrics of cgroup v2 (`github.com/containerd/cgroups/cgroup2/stats/metrics.proto`).

use std::collections::{BTreeMap, HashMap};

use containerd_shim::protos::cgroups_v2::metrics::{
    CPUStat, IOEntry, IOStat, MemoryEvents, MemoryStat, Metrics, PidsStat,
};
use containerd_shim::protos::protobuf::MessageField;
use containerd_shim::protos::protobuf::well_known_types::any::Any;

/// The metrics from what the guest counts, by the names of the cgroup's files (`ContainerStatsResponse` of the agent's protocol).
pub(crate) fn cgroup_v2(counters: &HashMap<String, u64>) -> containerd_shim::Result<Any> {
    let get = |name: &str| counters.get(name).copied().unwrap_or(0);
    let cpu = |name: &str| get(&format!("cpu.stat/{name}"));
    let memory = |name: &str| get(&format!("memory.stat/{name}"));
    let event = |name: &str| get(&format!("memory.events/{name}"));
    let metrics = Metrics {
        pids: MessageField::some(PidsStat {
            current: get("pids.current"),
            // 0 is "no limit" there.
            limit: counters.get("pids.max").copied().filter(|max| *max != u64::MAX).unwrap_or(0),
            ..Default::default()
        }),
        cpu: MessageField::some(CPUStat {
            usage_usec: cpu("usage_usec"),
            user_usec: cpu("user_usec"),
            system_usec: cpu("system_usec"),
            nr_periods: cpu("nr_periods"),
            nr_throttled: cpu("nr_throttled"),
            throttled_usec: cpu("throttled_usec"),
            nr_bursts: cpu("nr_bursts"),
            burst_usec: cpu("burst_usec"),
            ..Default::default()
        }),
        memory: MessageField::some(MemoryStat {
            anon: memory("anon"),
            file: memory("file"),
            kernel_stack: memory("kernel_stack"),
            slab: memory("slab"),
            sock: memory("sock"),
            shmem: memory("shmem"),
            file_mapped: memory("file_mapped"),
            file_dirty: memory("file_dirty"),
            file_writeback: memory("file_writeback"),
            anon_thp: memory("anon_thp"),
            inactive_anon: memory("inactive_anon"),
            active_anon: memory("active_anon"),
            inactive_file: memory("inactive_file"),
            active_file: memory("active_file"),
            unevictable: memory("unevictable"),
            slab_reclaimable: memory("slab_reclaimable"),
            slab_unreclaimable: memory("slab_unreclaimable"),
            pgfault: memory("pgfault"),
            pgmajfault: memory("pgmajfault"),
            usage: get("memory.current"),
            usage_limit: get("memory.max"),
            swap_usage: get("memory.swap.current"),
            swap_limit: get("memory.swap.max"),
            max_usage: get("memory.peak"),
            ..Default::default()
        }),
        memory_events: MessageField::some(MemoryEvents {
            low: event("low"),
            high: event("high"),
            max: event("max"),
            oom: event("oom"),
            oom_kill: event("oom_kill"),
            ..Default::default()
        }),
        io: MessageField::some(IOStat { usage: io(counters), ..Default::default() }),
        ..Default::default()
    };
    containerd_shim::util::convert_to_any(Box::new(metrics))
}

fn io(counters: &HashMap<String, u64>) -> Vec<IOEntry> {
    let mut devices: BTreeMap<(u64, u64), IOEntry> = BTreeMap::new();
    for (name, value) in counters {
        let Some((device, key)) = name.strip_prefix("io.stat/").and_then(|rest| rest.split_once('/')) else {
            continue;
        };
        let Some((Ok(major), Ok(minor))) = device.split_once(':').map(|(a, b)| (a.parse(), b.parse())) else {
            continue;
        };
        let entry =
            devices.entry((major, minor)).or_insert_with(|| IOEntry { major, minor, ..Default::default() });
        match key {
            "rbytes" => entry.rbytes = *value,
            "wbytes" => entry.wbytes = *value,
            "rios" => entry.rios = *value,
            "wios" => entry.wios = *value,
            _ => {}
        }
    }
    devices.into_values().collect()
}

#[cfg(test)]
mod tests {
    use containerd_shim::protos::protobuf::Message;

    use super::*;

    #[test]
    fn counters_are_metrics_of_cgroup_v2() {
        let counters: HashMap<String, u64> = [
            ("cpu.stat/usage_usec", 5),
            ("memory.current", 7),
            ("memory.max", u64::MAX),
            ("memory.events/oom_kill", 2),
            ("pids.max", u64::MAX),
            ("io.stat/254:16/rbytes", 11),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        let any = cgroup_v2(&counters).unwrap();
        assert_eq!(any.type_url, "io.containerd.cgroups.v2.Metrics");
        let metrics = Metrics::parse_from_bytes(&any.value).unwrap();
        assert_eq!(
            (metrics.cpu.usage_usec, metrics.memory.usage, metrics.memory.usage_limit),
            (5, 7, u64::MAX)
        );
        assert_eq!((metrics.memory_events.oom_kill, metrics.pids.limit), (2, 0));
        assert_eq!(
            (metrics.io.usage[0].major, metrics.io.usage[0].minor, metrics.io.usage[0].rbytes),
            (254, 16, 11)
        );
    }
}
