//! The runtime-spec field by field, from inside the container; docs/oci.md names the test of each field.

use anyhow::Result;
use kvrun_e2e::Test;
use serde_json::Value;

pub(crate) mod disks;
pub(crate) mod hooks;
pub(crate) mod linux;
pub(crate) mod mounts;
pub(crate) mod process;
pub(crate) mod refused;
pub(crate) mod resources;

/// What a script writes in a container whose spec was changed; it must succeed and complain of nothing.
fn output(t: &Test, script: &str, change: impl FnOnce(&mut Value)) -> Result<String> {
    Ok(t.run(&t.script(script)?.with(change)?)?.exited(0).stderr("").text())
}

fn push(list: &mut Value, item: Value) {
    if list.is_null() {
        *list = Value::Array(Vec::new());
    }
    list.as_array_mut().expect("a list").push(item);
}

fn mount(spec: &mut Value, mount: Value) {
    push(&mut spec["mounts"], mount);
}

/// Gives every set of capabilities one more.
fn capability(spec: &mut Value, name: &str) {
    for set in ["bounding", "effective", "permitted"] {
        push(&mut spec["process"]["capabilities"][set], name.into());
    }
}
