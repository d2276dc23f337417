//! `linux.devices` that are block devices of the host.

use std::fs::{self, File};

use anyhow::{Result, ensure};
use kvrun_e2e::loop_device::Loop;
use kvrun_e2e::{Bundle, Case, Test, cases};
use serde_json::{Value, json};

use super::push;
use crate::pods::{beside, gone, member, sandbox};

pub(crate) const CASES: &[Case] = cases![
    block_device_is_a_disk,
    block_device_is_a_disk_in_a_user_namespace,
    block_device_that_may_only_be_read_cannot_be_written,
    containers_of_a_pod_have_one_disk_and_leave_none,
    block_device_that_is_not_there_is_named,
];

/// A block device of 4 MiB over the test's file `name`, which begins with its name.
fn device(t: &Test, name: &str) -> Result<Loop> {
    let path = t.scratch().join(name);
    fs::write(&path, format!("{name}\n"))?;
    File::options().write(true).open(&path)?.set_len(4 << 20)?;
    Loop::over(&path)
}

/// Has the container have it at a path, as engines say it.
fn with(spec: &mut Value, device: &Loop, path: &str, access: &str) -> Result<()> {
    let (major, minor) = device.numbers()?;
    push(
        &mut spec["linux"]["devices"],
        json!({"path": path, "type": "b", "major": major, "minor": minor, "fileMode": 0o660}),
    );
    let rules = &mut spec["linux"]["resources"]["devices"];
    if rules.is_null() {
        push(rules, json!({"allow": false, "access": "rwm"}));
    }
    push(rules, json!({"allow": true, "type": "b", "major": major, "minor": minor, "access": access}));
    Ok(())
}

fn script(t: &Test, script: &str, device: &Loop, access: &str) -> Result<Bundle> {
    let mut result = Ok(());
    let bundle = t.script(script)?.with(|spec| result = with(spec, device, "/dev/data", access))?;
    result.map(|()| bundle)
}

/// What the file behind a device begins with.
fn content(t: &Test, name: &str) -> Result<String> {
    Ok(String::from_utf8_lossy(&fs::read(t.scratch().join(name))?[..16]).into_owned())
}

fn block_device_is_a_disk(t: &Test) -> Result<()> {
    let (one, two) = (device(t, "one")?, device(t, "two")?);
    let (major, minor) = one.numbers()?;
    // By the numbers it has on the host, it is nothing here.
    let text = format!("stat -c '%F %a' /dev/data; head -n 1 /dev/data; head -n 1 /dev/deep/other; cat /sys/class/block/vda/size;
        echo changed | dd of=/dev/again conv=fsync 2>/dev/null; head -n 1 /dev/data;
        mknod /tmp/host b {major} {minor} && (: < /tmp/host) || echo denied");
    let mut result = Ok(());
    let bundle = script(t, &text, &one, "rwm")?.with(|spec| {
        result =
            with(spec, &one, "/dev/again", "rwm").and_then(|()| with(spec, &two, "/dev/deep/other", "rwm"));
        super::capability(spec, "CAP_MKNOD");
        super::mount(
            spec,
            json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["dev"]}),
        );
    })?;
    result?;
    let outcome = t.run(&bundle)?.exited(0);
    ensure!(outcome.text() == "block special file 660\none\ntwo\n8192\nchanged\ndenied\n", "{outcome}");
    ensure!(outcome.stderr.contains("Operation not permitted"), "{outcome}");
    ensure!(content(t, "one")?.starts_with("changed\n") && content(t, "two")?.starts_with("two\n"));
    Ok(())
}

fn block_device_is_a_disk_in_a_user_namespace(t: &Test) -> Result<()> {
    let one = device(t, "one")?;
    let bundle = script(t, "head -n 1 /dev/data", &one, "rwm")?.with(|spec| {
        push(&mut spec["linux"]["namespaces"], json!({"type": "user"}));
        let map = json!([{"containerID": 0, "hostID": 0, "size": 65536}]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
    })?;
    t.run(&bundle)?.exited(0).stderr("").stdout("one\n");
    Ok(())
}

fn block_device_that_may_only_be_read_cannot_be_written(t: &Test) -> Result<()> {
    let one = device(t, "one")?;
    let text =
        "head -n 1 /dev/data; cat /sys/class/block/vda/ro; (echo x > /dev/data) 2>/dev/null || echo denied";
    t.run(&script(t, text, &one, "r")?)?.exited(0).stderr("").stdout("one\n1\ndenied\n");
    ensure!(content(t, "one")?.starts_with("one\n"));
    Ok(())
}

fn containers_of_a_pod_have_one_disk_and_leave_none(t: &Test) -> Result<()> {
    let one = device(t, "one")?;
    let pause = sandbox(t)?;
    let (first, second) = (format!("{}-first", t.id()), format!("{}-second", t.id()));
    let write = script(t, "echo first > /dev/data; echo up; sleep 1000", &one, "rwm")?;
    let writer = t.create_as(&first, &member(write, "container", t.id())?)?;
    t.invoke(&["start", &first])?.exited(0).stderr("");
    writer.until("up\n")?;
    // It is one disk: neither has to wait until the other's is written.
    let read = member(
        script(t, "head -n 1 /dev/data; readlink /sys/class/block/vd*", &one, "r")?,
        "container",
        t.id(),
    )?;
    let reader = t.create_as(&second, &read)?;
    t.invoke(&["start", &second])?.exited(0).stderr("");
    let (code, seen) = (reader.end()?, reader.text()?);
    let (head, tail) = ("first\n../../devices/virtio-mmio-cmdline/", "/block/vda\n");
    ensure!(code == 0 && seen.starts_with(head) && seen.ends_with(tail), "{seen}");
    for id in [&second, &first] {
        t.invoke(&["delete", "--force", id])?.exited(0).stderr("");
    }
    writer.end()?;
    ensure!(content(t, "one")?.starts_with("first\n"));
    // Again, in the same slot.
    for _ in 0..2 {
        let reader = t.create_as(&second, &read)?;
        t.invoke(&["start", &second])?.exited(0).stderr("");
        ensure!(reader.end()? == 0 && reader.text()? == seen, "{seen}{}", reader.text()?);
        t.invoke(&["delete", &second])?.exited(0).stderr("");
    }
    let none = beside(t, &first, "ls /sys/class/block | grep -c vd")?;
    ensure!(none.end()? == 1 && none.text()? == "0\n", "{}", none.text()?);
    t.invoke(&["delete", &first])?.exited(0).stderr("");
    gone(t, &pause)
}

fn block_device_that_is_not_there_is_named(t: &Test) -> Result<()> {
    let bundle = t.bundle(&["/bin/true"])?.with(|spec| {
        spec["linux"]["devices"] = json!([{"path": "/dev/data", "type": "b", "major": 4095, "minor": 77}]);
    })?;
    t.run(&bundle)?.failed().stdout("").error(&[
        "linux.devices",
        "/dev/data",
        "4095:77",
        "no such block device",
    ]);
    Ok(())
}
