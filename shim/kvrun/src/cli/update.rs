//! Options of `update`, those of runc and crun.

use std::path::PathBuf;

use clap::Args;
use serde_json::{Map, Value, json};

#[derive(Debug, Default, Args)]
pub(crate) struct UpdateArgs {
    /// File with OCI resources to apply, instead of the other options; - is standard input
    #[arg(short, long, value_name = "FILE")]
    pub(crate) resources: Option<PathBuf>,
    /// Memory limit in bytes; -1: none
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    memory: Option<i64>,
    /// Memory that is left to it in bytes
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    memory_reservation: Option<i64>,
    /// Limit of memory and swap in bytes; -1: none
    #[arg(long, value_name = "BYTES", allow_negative_numbers = true)]
    memory_swap: Option<i64>,
    /// CPU time for each period in microseconds; -1: no limit
    #[arg(long, value_name = "US", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,
    /// The period in microseconds
    #[arg(long, value_name = "US")]
    cpu_period: Option<u64>,
    /// CPU time beyond the quota in microseconds
    #[arg(long, value_name = "US")]
    cpu_burst: Option<u64>,
    /// CPU weight, 2 to 262144
    #[arg(long, visible_alias = "cpu-shares", value_name = "SHARES")]
    cpu_share: Option<u64>,
    /// 1: use CPUs only when nobody else does
    #[arg(long, value_name = "0|1")]
    cpu_idle: Option<i64>,
    /// CPUs of the guest it may use
    #[arg(long, value_name = "LIST")]
    cpuset_cpus: Option<String>,
    /// Memory nodes of the guest it may use
    #[arg(long, value_name = "LIST")]
    cpuset_mems: Option<String>,
    /// Weight of block I/O, 10 to 1000
    #[arg(long, value_name = "WEIGHT")]
    blkio_weight: Option<u16>,
    /// Limit of processes; -1: none
    #[arg(long, value_name = "N", allow_negative_numbers = true)]
    pids_limit: Option<i64>,
    /// Refused: cgroup v2 has no such limit
    #[arg(long, value_name = "US", hide = true)]
    cpu_rt_period: Option<u64>,
    /// Refused: cgroup v2 has no such limit
    #[arg(long, value_name = "US", hide = true)]
    cpu_rt_runtime: Option<i64>,
    /// Refused: the guest has no resctrl
    #[arg(long, value_name = "SCHEMA", hide = true)]
    l3_cache_schema: Option<String>,
    /// Refused: the guest has no resctrl
    #[arg(long, value_name = "SCHEMA", hide = true)]
    mem_bw_schema: Option<String>,
    /// Name of the container
    #[arg(value_name = "ID")]
    pub(crate) id: String,
}

impl UpdateArgs {
    /// An option that cannot be obeyed.
    pub(crate) fn refused(&self) -> Option<&'static str> {
        [
            (self.cpu_rt_period.is_some(), "--cpu-rt-period: cgroup v2 has no limits of real-time CPU"),
            (self.cpu_rt_runtime.is_some(), "--cpu-rt-runtime: cgroup v2 has no limits of real-time CPU"),
            (self.l3_cache_schema.is_some(), "--l3-cache-schema: the guest has no resctrl"),
            (self.mem_bw_schema.is_some(), "--mem-bw-schema: the guest has no resctrl"),
        ]
        .into_iter()
        .find_map(|(given, why)| given.then_some(why))
    }

    /// The single options as OCI `linux.resources`.
    pub(crate) fn as_resources(&self) -> Value {
        let object = |fields: Vec<(&str, Option<Value>)>| -> Option<Value> {
            let set = fields.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?)));
            Some(set.collect::<Map<_, _>>()).filter(|map| !map.is_empty()).map(Value::Object)
        };
        let memory = object(vec![
            ("limit", self.memory.map(Into::into)),
            ("reservation", self.memory_reservation.map(Into::into)),
            ("swap", self.memory_swap.map(Into::into)),
        ]);
        let cpu = object(vec![
            ("quota", self.cpu_quota.map(Into::into)),
            ("period", self.cpu_period.map(Into::into)),
            ("burst", self.cpu_burst.map(Into::into)),
            ("shares", self.cpu_share.map(Into::into)),
            ("idle", self.cpu_idle.map(Into::into)),
            ("cpus", self.cpuset_cpus.clone().map(Into::into)),
            ("mems", self.cpuset_mems.clone().map(Into::into)),
        ]);
        let resources = object(vec![
            ("memory", memory),
            ("cpu", cpu),
            ("blockIO", self.blkio_weight.map(|weight| json!({ "weight": weight }))),
            ("pids", self.pids_limit.map(|limit| json!({ "limit": limit }))),
        ]);
        resources.unwrap_or_else(|| json!({}))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn single_options_are_the_fields_of_the_specification() {
        let args = UpdateArgs {
            memory: Some(-1),
            cpu_quota: Some(5),
            cpuset_cpus: Some("0-1".into()),
            pids_limit: Some(7),
            ..UpdateArgs::default()
        };
        let expected =
            json!({"memory": {"limit": -1}, "cpu": {"quota": 5, "cpus": "0-1"}, "pids": {"limit": 7}});
        assert_eq!(args.as_resources(), expected);
        assert_eq!(UpdateArgs::default().as_resources(), json!({}));
        assert!(args.refused().is_none());
    }
}
