//! Whole runs of a container: kvrun against crun; and what kvrun's processes hold while one runs.

use std::ffi::OsStr;
use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use serde_json::json;

use crate::boot::now_ns;
use crate::report::Report;
use crate::{MEMORY_MIB, Stage, process};

/// Measures `runs` runs of the bundle's `/bin/true` with each runtime, and of `exec` of it in a running container, then one container at
/// rest.
pub(crate) fn measure(stage: &Stage, bundle: &Path, runs: usize, report: &mut Report) -> Result<()> {
    let timed = |runtime: &OsStr| (0..runs).map(|_| run(runtime, bundle)).collect::<Result<Vec<_>>>();
    report.median("run.true_ms", timed(stage.kvrun.as_os_str())?);
    report.median("run.crun_true_ms", timed(OsStr::new("crun"))?);
    report.median("exec.true_ms", execs(stage.kvrun.as_os_str(), bundle, runs)?);
    report.median("exec.crun_true_ms", execs(OsStr::new("crun"), bundle, runs)?);
    at_rest(stage, bundle, report)
}

/// Times `exec` in a container that waits for its standard input to end.
fn execs(runtime: &OsStr, bundle: &Path, runs: usize) -> Result<Vec<f64>> {
    with_program(bundle, "echo up; read end", || {
        let mut container = Command::new(runtime)
            .arg("run")
            .arg("--bundle")
            .arg(bundle)
            .arg("bench")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()?;
        let mut line = String::new();
        BufReader::new(container.stdout.take().context("no pipe")?).read_line(&mut line)?;
        ensure!(line == "up\n", "the container said {line:?}");
        let times = (0..runs).map(|_| exec(runtime)).collect();
        drop(container.stdin.take());
        container.wait()?;
        times
    })
}

fn exec(runtime: &OsStr) -> Result<f64> {
    let mut command = Command::new(runtime);
    command.args(["exec", "bench", "/bin/true"]).stdin(Stdio::null());
    let started = now_ns();
    let status = command.status().with_context(|| format!("cannot start {}", runtime.display()))?;
    let ended = now_ns();
    ensure!(status.success(), "{} exec: {status}", runtime.display());
    Ok((ended - started) as f64 / 1e6)
}

fn run(runtime: &OsStr, bundle: &Path) -> Result<f64> {
    let mut command = Command::new(runtime);
    command.arg("run").arg("--bundle").arg(bundle).arg("bench").stdin(Stdio::null());
    let started = now_ns();
    let status = command.status().with_context(|| format!("cannot start {}", runtime.display()))?;
    let ended = now_ns();
    ensure!(status.success(), "{}: {status}", runtime.display());
    Ok((ended - started) as f64 / 1e6)
}

/// Runs a container that says when it is up and then waits for its standard input to end.
fn at_rest(stage: &Stage, bundle: &Path, report: &mut Report) -> Result<()> {
    with_program(bundle, "echo up; read end", || hold(stage, bundle, report))
}

/// Has the bundle run a script for as long as `during` takes.
fn with_program<T>(bundle: &Path, script: &str, during: impl FnOnce() -> Result<T>) -> Result<T> {
    let config_path = bundle.join("config.json");
    let original =
        fs::read(&config_path).with_context(|| format!("cannot read {}", config_path.display()))?;
    let mut config: serde_json::Value = serde_json::from_slice(&original)?;
    config["process"]["args"] = json!(["/bin/sh", "-c", script]);
    fs::write(&config_path, serde_json::to_vec(&config)?)?;
    let outcome = during();
    fs::write(&config_path, original)?;
    outcome
}

fn hold(stage: &Stage, bundle: &Path, report: &mut Report) -> Result<()> {
    let mut engine = Command::new(&stage.kvrun)
        .arg("run")
        .arg("--bundle")
        .arg(bundle)
        .arg("bench")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut line = String::new();
    BufReader::new(engine.stdout.take().context("no pipe")?).read_line(&mut line)?;
    ensure!(line == "up\n", "the container said {line:?}");
    let vmm = process::child(engine.id(), "kvrun-vmm")?;
    report.number("mem.vmm_of_container_private_kib", process::private_kib(vmm, MEMORY_MIB)?);
    report.number("mem.vmm_threads", process::threads(vmm)?);
    report.number("mem.engine_private_kib", process::private_kib(engine.id(), MEMORY_MIB)?);
    drop(engine.stdin.take());
    engine.wait()?;
    Ok(())
}
