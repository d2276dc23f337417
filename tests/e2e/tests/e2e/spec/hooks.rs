//! The hooks that run in the guest: `createContainer` and `startContainer`.

use std::fs;
use std::os::unix::fs::PermissionsExt;

use anyhow::{Result, ensure};
use kvrun_e2e::{Bundle, Case, Test, cases};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = cases![
    hooks_run_in_the_container_before_its_program,
    hook_that_fails_ends_the_container,
    hook_that_hangs_is_killed,
];

fn with_hook(bundle: Bundle, kind: &str, script: &str, extra: Value) -> Result<Bundle> {
    let name = format!("hook-{kind}");
    let path = bundle.rootfs().join(&name);
    fs::write(&path, format!("#!/bin/sh\n{script}\n"))?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755))?;
    bundle.with(|spec| {
        let mut hook = json!({"path": format!("/{name}"), "args": ["hook", "one", "two"], "env": ["PATH=/bin", "KIND=test"]});
        for (key, value) in extra.as_object().into_iter().flatten() {
            hook[key] = value.clone();
        }
        spec["hooks"][kind] = json!([hook]);
        spec["annotations"] = json!({"some.key": "some value"});
    })
}

fn hooks_run_in_the_container_before_its_program(t: &Test) -> Result<()> {
    let script = "cat /tmp/create /tmp/start";
    let write = |file: &str| format!("{{ echo $1 $2 $KIND $(hostname); cat; echo; }} > /tmp/{file}");
    let bundle = with_hook(t.script(script)?, "createContainer", &write("create"), json!({}))?;
    let bundle = with_hook(bundle, "startContainer", &write("start"), json!({"timeout": 100}))?;
    let text = t.run(&bundle)?.exited(0).stderr("").text();
    let lines: Vec<&str> = text.lines().collect();
    ensure!(lines.len() == 4 && lines[0] == "one two test kvrun" && lines[2] == lines[0], "{text}");
    for (line, status) in [(lines[1], "creating"), (lines[3], "created")] {
        let state: Value = serde_json::from_str(line)?;
        ensure!(state["status"] == status && state["id"] == t.id() && state["pid"] == 1, "{state}");
        ensure!(
            state["ociVersion"] == "1.2.0"
                && state["annotations"]["some.key"] == "some value"
                && state["bundle"] == json!(bundle.path()),
            "{state}"
        );
    }
    Ok(())
}

fn hook_that_fails_ends_the_container(t: &Test) -> Result<()> {
    for kind in ["createContainer", "startContainer"] {
        let bundle = with_hook(t.script("echo not reached")?, kind, "echo no luck >&2; exit 7", json!({}))?;
        t.run(&bundle)?.failed().stdout("").error(&[&format!("hooks.{kind}[0]"), "exit code 7", "no luck"]);
    }
    Ok(())
}

fn hook_that_hangs_is_killed(t: &Test) -> Result<()> {
    let bundle =
        with_hook(t.script("echo not reached")?, "createContainer", "sleep 1000", json!({"timeout": 1}))?;
    t.run(&bundle)?.failed().stdout("").error(&["hooks.createContainer[0]", "1s"]);
    Ok(())
}
