//! Hooks on the host.

use std::fs;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::{Case, Test, cases};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] =
    cases![hooks_run_at_their_time_with_the_state, hook_that_fails_before_the_start_fails_the_creation,];

/// A hook that appends a word, and the state it reads, to a file.
fn hook(file: &str, word: &str) -> Value {
    let script = format!("echo {word} $(cat) >> {file}");
    json!([{"path": "/bin/sh", "args": ["sh", "-c", script], "env": ["PATH=/usr/bin:/bin"], "timeout": 60}])
}

fn hooks_run_at_their_time_with_the_state(t: &Test) -> Result<()> {
    let file = t.scratch().join("hooks").display().to_string();
    let kinds = ["prestart", "createRuntime", "poststart", "poststop"];
    let bundle = t.script("sleep 1000")?.with(|spec| {
        spec["hooks"] = kinds.iter().map(|kind| ((*kind).to_owned(), hook(&file, kind))).collect();
    })?;
    let seen = || -> Result<Vec<(String, String)>> {
        let text = fs::read_to_string(&file).unwrap_or_default();
        text.lines()
            .map(|line| {
                let (word, state) = line.split_once(' ').context("no state")?;
                let state: Value = serde_json::from_str(state)?;
                ensure!(state["id"] == t.id() && state["bundle"] == json!(bundle.path()), "{state}");
                ensure!((state["status"] != "stopped") == state["pid"].is_number(), "{state}");
                Ok((word.to_owned(), state["status"].as_str().context("no status")?.to_owned()))
            })
            .collect()
    };
    let expected = [
        ("prestart", "creating"),
        ("createRuntime", "creating"),
        ("poststart", "running"),
        ("poststop", "stopped"),
    ]
    .map(|(word, status)| (word.to_owned(), status.to_owned()));
    let left = t.create(&bundle)?;
    ensure!(seen()? == expected[..2], "after create: {:?}", seen()?);
    t.command("start")?;
    ensure!(seen()? == expected[..3], "after start: {:?}", seen()?);
    t.invoke(&["kill", t.id(), "9"])?.exited(0);
    left.end()?;
    ensure!(seen()? == expected[..3], "after the end: {:?}", seen()?);
    t.command("delete")?;
    ensure!(seen()? == expected, "after delete: {:?}", seen()?);
    Ok(())
}

fn hook_that_fails_before_the_start_fails_the_creation(t: &Test) -> Result<()> {
    for kind in ["prestart", "createRuntime"] {
        let failing = json!([{"path": "/bin/sh", "args": ["sh", "-c", "echo why >&2; exit 3"]}]);
        let bundle = t.script("echo must not run")?.with(|spec| spec["hooks"] = json!({kind: failing}))?;
        let path = bundle.path().to_str().context("ASCII")?;
        t.invoke(&["create", "-b", path, t.id()])?.exited(1).stdout("").error(&[kind, "hook", "why"]);
        t.run(&bundle)?.exited(1).stdout("").error(&[kind, "hook", "why"]);
    }
    t.invoke(&["list", "-q"])?.exited(0).stdout("");
    Ok(())
}
