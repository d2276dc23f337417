//! Hooks on the host, and containers that share a machine.

use std::fs;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::{Bundle, Case, Test, cases};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = cases![
    hooks_run_at_their_time_with_the_state,
    hook_that_fails_before_the_start_fails_the_creation,
    containers_of_a_pod_share_a_machine,
    container_of_a_pod_needs_its_sandbox,
];

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

fn member(bundle: Bundle, kind: &str, sandbox: &str) -> Result<Bundle> {
    bundle.with(|spec| {
        spec["annotations"] =
            json!({"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": sandbox});
    })
}

fn containers_of_a_pod_share_a_machine(t: &Test) -> Result<()> {
    let script = "echo boot $(cat /proc/sys/kernel/random/boot_id); trap 'exit 0' TERM; sleep 1000 & wait";
    let pause = t.create(&member(t.script(script)?, "sandbox", t.id())?)?;
    t.command("start")?;
    pause.until("boot")?;
    let vmms = t.vmms()?.len();
    let (one, two) = (format!("{}-one", t.id()), format!("{}-two", t.id()));
    let first = t.create_as(&one, &member(t.script(&format!("{script}; exit 3"))?, "container", t.id())?)?;
    let second = t.create_as(
        &two,
        &member(t.script("cat /proc/sys/kernel/random/boot_id; exit 4")?, "container", t.id())?,
    )?;
    ensure!(t.vmms()?.len() == vmms, "there is another machine");
    t.invoke(&["start", &one])?.exited(0).stderr("");
    t.invoke(&["start", &two])?.exited(0).stderr("");
    first.until("boot")?;
    ensure!(first.text()? == pause.text()?, "another machine");
    ensure!(second.end()? == 4, "another exit code");
    ensure!(format!("boot {}", second.text()?) == pause.text()?, "another machine");
    t.invoke(&["exec", &one, "sh", "-c", "ls /proc | grep -c '^[0-9]'"])?.exited(0).stderr("");
    t.invoke(&["delete", &two])?.exited(0).stderr("");
    // Its name can be used again.
    let again = t.create_as(&two, &member(t.script("exit 5")?, "container", t.id())?)?;
    t.invoke(&["start", &two])?.exited(0).stderr("");
    ensure!(again.end()? == 5, "another exit code");
    t.invoke(&["delete", &two])?.exited(0).stderr("");
    // The first container is the machine's: with it, all end.
    t.invoke(&["delete", "--force", t.id()])?.exited(0).stderr("");
    pause.end()?;
    ensure!(first.end()? == 137, "another end");
    let state: Value = serde_json::from_slice(&t.invoke(&["state", &one])?.stdout)?;
    ensure!(state["status"] == "stopped", "{state}");
    t.invoke(&["delete", &one])?.exited(0).stderr("");
    Ok(())
}

fn container_of_a_pod_needs_its_sandbox(t: &Test) -> Result<()> {
    let bundle = member(t.bundle(&["true"])?, "container", "no-such-sandbox")?;
    let path = bundle.path().to_str().context("ASCII")?;
    t.invoke(&["create", "-b", path, t.id()])?
        .exited(1)
        .stdout("")
        .error(&["no-such-sandbox", "does not exist"]);
    t.invoke(&["list", "-q"])?.exited(0).stdout("");
    Ok(())
}
