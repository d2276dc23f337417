//! `kvrun events`: figures of a container, in runc's form, and its OOM kills.

use std::collections::BTreeMap;
use std::thread;

use kvrun_pod::record::Status;
use serde_json::{Map, Value, json};

use super::print;
use crate::cli::{EventsArgs, Global};
use crate::error::Error;
use crate::monitor::client::{Known, PATIENCE};
use crate::monitor::protocol::Request;

/// What the guest's cgroup counts, by name; see `ContainerStatsResponse` of the agent's protocol.
type Counters = BTreeMap<String, u64>;

/// Prints the figures once, or until the container has stopped.
pub(crate) fn events(global: &Global, args: &EventsArgs) -> Result<(), Error> {
    let container = Known::get(&global.root, &args.id)?;
    let status = container.record.status();
    if status == Status::Stopped {
        return Err(Error::NotRunning { id: container.id().clone(), status });
    }
    let connection = container.connect(&global.root, PATIENCE)?;
    let mut kills = None;
    loop {
        let counters: Counters = match connection.fetch(Request::Stats) {
            // It has stopped since.
            Err(_) if kills.is_some() => return Ok(()),
            other => other?,
        };
        let killed = counters.get("memory.events/oom_kill").copied().unwrap_or(0);
        // Not those from before the first look. One line however many there were since, as runc's: the guest says how many.
        if kills.is_some_and(|before| killed > before) {
            line("oom", args, None)?;
        }
        kills = Some(killed);
        line("stats", args, Some(stats(&counters)))?;
        if args.stats {
            return Ok(());
        }
        thread::sleep(args.interval);
    }
}

fn line(kind: &str, args: &EventsArgs, data: Option<Value>) -> Result<(), Error> {
    let mut event = json!({"type": kind, "id": args.id});
    if let Some(data) = data {
        event["data"] = data;
    }
    print(&event.to_string())
}

/// The counters as runc names them (its `types/events.go`).
fn stats(counters: &Counters) -> Value {
    let get = |name: &str| counters.get(name).copied().unwrap_or(0);
    // "No limit" is the largest number there, and here.
    let entry = |prefix: &str, failures: u64| {
        json!({
            "limit": get(&format!("{prefix}.max")), "usage": get(&format!("{prefix}.current")),
            "max": get(&format!("{prefix}.peak")), "failcnt": failures,
        })
    };
    let raw: Map<String, Value> = counters
        .iter()
        .filter_map(|(name, value)| Some((name.strip_prefix("memory.stat/")?.to_owned(), json!(value))))
        .collect();
    let us = |name: &str| get(name).saturating_mul(1000);
    json!({
        "cpu": {
            "usage": {"total": us("cpu.stat/usage_usec"), "kernel": us("cpu.stat/system_usec"), "user": us("cpu.stat/user_usec")},
            "throttling": {
                "periods": get("cpu.stat/nr_periods"), "throttledPeriods": get("cpu.stat/nr_throttled"),
                "throttledTime": us("cpu.stat/throttled_usec"),
            },
            "psi": pressure(counters, "cpu"),
        },
        "cpuset": {},
        "memory": {
            "cache": get("memory.stat/file"),
            "usage": entry("memory", get("memory.events/max")),
            "swap": entry("memory.swap", get("memory.swap.events/max")),
            "kernel": {"limit": 0, "usage": get("memory.stat/kernel"), "max": 0, "failcnt": 0},
            "kernelTCP": {"limit": 0, "usage": get("memory.stat/sock"), "max": 0, "failcnt": 0},
            "raw": raw,
            "psi": pressure(counters, "memory"),
        },
        "pids": {"current": get("pids.current"), "limit": limit(get("pids.max"))},
        "blkio": blkio(counters),
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": Value::Null,
    })
}

/// runc's 0 for no limit of processes.
fn limit(max: u64) -> u64 {
    if max == u64::MAX { 0 } else { max }
}

fn pressure(counters: &Counters, resource: &str) -> Value {
    let get = |key: &str| counters.get(&format!("{resource}.pressure/{key}")).copied().unwrap_or(0);
    let part = |part: &str| {
        // They are counted in hundredths.
        let average = |seconds: u32| get(&format!("{part}/avg{seconds}")) as f64 / 100.0;
        json!({"avg10": average(10), "avg60": average(60), "avg300": average(300), "total": get(&format!("{part}/total"))})
    };
    json!({"some": part("some"), "full": part("full")})
}

fn blkio(counters: &Counters) -> Value {
    let mut bytes = Vec::new();
    let mut operations = Vec::new();
    for (name, value) in counters {
        let Some((device, key)) = name.strip_prefix("io.stat/").and_then(|rest| rest.split_once('/')) else {
            continue;
        };
        let Some((major, minor)) = device.split_once(':') else { continue };
        let (list, op) = match key {
            "rbytes" => (&mut bytes, "Read"),
            "wbytes" => (&mut bytes, "Write"),
            "rios" => (&mut operations, "Read"),
            "wios" => (&mut operations, "Write"),
            _ => continue,
        };
        let number = |text: &str| text.parse::<u64>().unwrap_or(0);
        list.push(json!({"major": number(major), "minor": number(minor), "op": op, "value": value}));
    }
    json!({"ioServiceBytesRecursive": bytes, "ioServicedRecursive": operations, "psi": pressure(counters, "io")})
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counters_have_runcs_names() {
        let counters: Counters = [
            ("cpu.stat/usage_usec", 5),
            ("memory.current", 7),
            ("memory.max", u64::MAX),
            ("memory.stat/anon", 9),
            ("pids.current", 2),
            ("pids.max", u64::MAX),
            ("io.stat/254:16/rbytes", 11),
            ("cpu.pressure/some/avg10", 150),
        ]
        .map(|(name, value)| (name.to_owned(), value))
        .into();
        let stats = stats(&counters);
        assert_eq!(stats["cpu"]["usage"]["total"], 5000);
        assert_eq!(stats["cpu"]["psi"]["some"]["avg10"], 1.5);
        assert_eq!(stats["memory"]["usage"]["usage"], 7);
        assert_eq!(stats["memory"]["usage"]["limit"], u64::MAX);
        assert_eq!(stats["memory"]["raw"]["anon"], 9);
        assert_eq!((&stats["pids"]["current"], &stats["pids"]["limit"]), (&json!(2), &json!(0)));
        assert_eq!(
            stats["blkio"]["ioServiceBytesRecursive"][0],
            json!({"major": 254, "minor": 16, "op": "Read", "value": 11})
        );
    }
}
