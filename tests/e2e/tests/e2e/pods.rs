//! Containers that share a machine, by the annotations of CRI implementations.

use std::fs;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::guest::{GUEST_SIZE, guest_size};
use kvrun_e2e::{Bundle, Case, Left, Test, cases, time};
use rustix::process::Signal;
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = cases![
    containers_of_a_pod_share_a_machine,
    sandbox_takes_a_signal_after_a_container_was_removed,
    deleted_sandbox_takes_its_containers_along,
    namespaces_of_the_sandbox_can_be_joined,
    id_that_is_used_again_has_files_of_its_own,
    removed_container_leaves_nothing_open,
    container_whose_process_was_killed_can_be_deleted_and_made_again,
    container_of_a_pod_needs_its_sandbox,
    machine_is_as_large_as_its_containers_ask,
];

const SLEEP: &str = "echo up; trap 'exit 0' TERM; sleep 1000 & wait";

/// Kind and sandbox, as containerd's CRI plugin names them.
pub(crate) fn member(bundle: Bundle, kind: &str, sandbox: &str) -> Result<Bundle> {
    bundle.with(|spec| {
        spec["annotations"] =
            json!({"io.kubernetes.cri.container-type": kind, "io.kubernetes.cri.sandbox-id": sandbox});
    })
}

/// A running sandbox.
pub(crate) fn sandbox(t: &Test) -> Result<Left> {
    let left = t.create(&member(t.script(SLEEP)?, "sandbox", t.id())?)?;
    t.command("start")?;
    left.until("up\n")?;
    Ok(left)
}

/// A running container beside it.
pub(crate) fn beside(t: &Test, id: &str, script: &str) -> Result<Left> {
    let left = t.create_as(id, &member(t.script(script)?, "container", t.id())?)?;
    t.invoke(&["start", id])?.exited(0).stdout("").stderr("");
    Ok(left)
}

/// Of a container whose machine goes down: it is killed before, and sometimes nobody is there any more to tell. A shell says 137 of both.
fn is_killed(end: i32) -> bool {
    matches!(end, 137 | 1009)
}

pub(crate) fn gone(t: &Test, sandbox: &Left) -> Result<()> {
    t.invoke(&["delete", "--force", t.id()])?.exited(0).stdout("").stderr("");
    sandbox.end()?;
    Ok(())
}

fn containers_of_a_pod_share_a_machine(t: &Test) -> Result<()> {
    let script = "echo boot $(cat /proc/sys/kernel/random/boot_id); trap 'exit 0' TERM; sleep 1000 & wait";
    let pause = t.create(&member(t.script(script)?, "sandbox", t.id())?)?;
    t.command("start")?;
    pause.until("boot")?;
    let vmms = t.vmms()?.len();
    let (one, two) = (format!("{}-one", t.id()), format!("{}-two", t.id()));
    let first = beside(t, &one, &format!("{script}; exit 3"))?;
    // By CRI-O's names.
    let second = t.create_as(
        &two,
        &t.script("cat /proc/sys/kernel/random/boot_id; exit 4")?.with(|spec| {
            spec["annotations"] = json!({"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": t.id()});
        })?,
    )?;
    ensure!(t.vmms()?.len() == vmms, "there is another machine");
    t.invoke(&["start", &two])?.exited(0).stderr("");
    first.until("boot")?;
    ensure!(first.text()? == pause.text()?, "another machine");
    ensure!(second.end()? == 4, "another exit code");
    ensure!(format!("boot {}", second.text()?) == pause.text()?, "another machine");
    // Each has its processes to itself.
    t.invoke(&["exec", &one, "sh", "-c", "pidof sleep | wc -w"])?.exited(0).stdout("1\n").stderr("");
    let pids = t.invoke(&["ps", "--format", "json", &one])?.exited(0).text();
    ensure!(pids == format!("[{}]\n", first.pid()), "{pids}");
    t.invoke(&["delete", &two])?.exited(0).stderr("");
    t.invoke(&["kill", &one, "TERM"])?.exited(0).stderr("");
    ensure!(first.end()? == 0, "another end");
    t.invoke(&["delete", &one])?.exited(0).stderr("");
    gone(t, &pause)
}

fn sandbox_takes_a_signal_after_a_container_was_removed(t: &Test) -> Result<()> {
    let pause = sandbox(t)?;
    let (one, two) = (format!("{}-one", t.id()), format!("{}-two", t.id()));
    let first = beside(t, &one, SLEEP)?;
    first.until("up\n")?;
    for _ in 0..3 {
        let second = beside(t, &two, "exit 4")?;
        ensure!(second.end()? == 4, "another exit code");
        t.invoke(&["delete", &two])?.exited(0).stderr("");
        t.invoke(&["kill", t.id(), "0"])?.exited(0).stderr("");
    }
    t.invoke(&["kill", t.id(), "TERM"])?.exited(0).stdout("").stderr("");
    ensure!(pause.end()? == 0, "another end");
    // The sandbox is the machine's first container: with it, all end.
    ensure!(is_killed(first.end()?), "another end");
    t.command("delete")?;
    t.invoke(&["delete", &one])?.exited(0).stderr("");
    Ok(())
}

fn deleted_sandbox_takes_its_containers_along(t: &Test) -> Result<()> {
    let pause = sandbox(t)?;
    let one = format!("{}-one", t.id());
    let first = beside(t, &one, SLEEP)?;
    first.until("up\n")?;
    gone(t, &pause)?;
    ensure!(is_killed(first.end()?), "another end");
    let state: Value = serde_json::from_slice(&t.invoke(&["state", &one])?.exited(0).stdout)?;
    ensure!(state["status"] == "stopped", "{state}");
    t.invoke(&["kill", &one, "TERM"])?.exited(1).error(&["not running"]);
    t.invoke(&["delete", &one])?.exited(0).stderr("");
    Ok(())
}

fn namespaces_of_the_sandbox_can_be_joined(t: &Test) -> Result<()> {
    let pause = sandbox(t)?;
    let look = "for n in ipc net uts pid; do readlink /proc/self/ns/$n; done";
    let of_pause = t.invoke(&["exec", t.id(), "sh", "-c", look])?.exited(0).stderr("").text();
    let one = format!("{}-one", t.id());
    let bundle = member(t.script(look)?, "container", t.id())?.with(|spec| {
        for namespace in spec["linux"]["namespaces"].as_array_mut().into_iter().flatten() {
            for (kind, file) in [("network", "net"), ("ipc", "ipc"), ("uts", "uts")] {
                if namespace["type"] == kind {
                    namespace["path"] = json!(format!("/proc/{}/ns/{file}", pause.pid()));
                }
            }
        }
    })?;
    let first = t.create_as(&one, &bundle)?;
    t.invoke(&["start", &one])?.exited(0).stderr("");
    ensure!(first.end()? == 0, "another exit code");
    let of_first = first.text()?;
    let (ours, theirs): (Vec<&str>, Vec<&str>) = (of_first.lines().collect(), of_pause.lines().collect());
    ensure!(ours[..3] == theirs[..3] && ours[3] != theirs[3], "{ours:?}, {theirs:?}");
    t.invoke(&["delete", &one])?.exited(0).stderr("");
    gone(t, &pause)
}

fn id_that_is_used_again_has_files_of_its_own(t: &Test) -> Result<()> {
    let pause = sandbox(t)?;
    let one = format!("{}-one", t.id());
    for text in ["first", "second", "third"] {
        let (data, volume) = (t.scratch().join(format!("{text}-data")), t.scratch().join(text));
        fs::create_dir(&volume)?;
        fs::write(volume.join("in-volume"), text)?;
        fs::write(&data, text)?;
        let bundle = t.script("cat /in-root /data /volume/in-volume")?;
        fs::write(bundle.rootfs().join("in-root"), text)?;
        let bundle =
            bundle.with_bind(&data, "/data", &["bind"])?.with_bind(&volume, "/volume", &["rbind"])?;
        let left = t.create_as(&one, &member(bundle, "container", t.id())?)?;
        t.invoke(&["start", &one])?.exited(0).stderr("");
        ensure!(left.end()? == 0 && left.text()? == text.repeat(3), "{:?}", left.text()?);
        t.invoke(&["delete", &one])?.exited(0).stderr("");
    }
    gone(t, &pause)
}

fn removed_container_leaves_nothing_open(t: &Test) -> Result<()> {
    let pause = sandbox(t)?;
    let one = format!("{}-one", t.id());
    let vmm = t.vmms()?.first().context("no VMM")?.0;
    let open = || -> Result<usize> { Ok(fs::read_dir(format!("/proc/{vmm}/fd"))?.count()) };
    let mut first = None;
    for _ in 0..3 {
        let left = beside(t, &one, "ls -R / > /dev/null 2>&1; exit 0")?;
        left.end()?;
        t.invoke(&["delete", &one])?.exited(0).stderr("");
        let Some(most) = first else {
            // The first may leave what all have in common.
            first = Some(open()?);
            continue;
        };
        // The guest tells what it has forgotten a moment later.
        let deadline = Instant::now() + time::scaled(time::RUN);
        while open()? > most {
            ensure!(Instant::now() < deadline, "{} descriptors are open, {most} were before", open()?);
            std::thread::yield_now();
        }
    }
    gone(t, &pause)
}

fn container_whose_process_was_killed_can_be_deleted_and_made_again(t: &Test) -> Result<()> {
    let pause = sandbox(t)?;
    let one = format!("{}-one", t.id());
    for _ in 0..3 {
        let left = beside(t, &one, SLEEP)?;
        left.until("up\n")?;
        left.signal(Signal::KILL)?;
        ensure!(left.end()? == 1009, "another end");
        let state: Value = serde_json::from_slice(&t.invoke(&["state", &one])?.exited(0).stdout)?;
        ensure!(state["status"] == "stopped", "{state}");
        t.invoke(&["delete", &one])?.exited(0).stdout("").stderr("");
    }
    let left = beside(t, &one, "exit 7")?;
    ensure!(left.end()? == 7, "another exit code");
    t.invoke(&["delete", &one])?.exited(0).stderr("");
    gone(t, &pause)
}

fn machine_is_as_large_as_its_containers_ask(t: &Test) -> Result<()> {
    let pause = sandbox(t)?;
    let size =
        || guest_size(&t.invoke(&["exec", t.id(), "sh", "-c", GUEST_SIZE])?.exited(0).stderr("").text());
    let (cpus, at_start) = size()?;
    ensure!(cpus == 1, "{cpus} CPUs");
    let is = |cpus: u64, more_mib: u64| {
        time::until(&format!("{cpus} CPUs, {more_mib} MiB more"), || {
            Ok(size()? == (cpus, at_start + more_mib))
        })
    };
    let one = format!("{}-one", t.id());
    let limited = |quota: u64, memory_mib: u64| {
        member(t.script(SLEEP)?, "container", t.id())?.with(|spec| {
            spec["linux"]["resources"] = json!({
                "cpu": {"quota": quota, "period": 100_000}, "memory": {"limit": memory_mib << 20},
            });
        })
    };
    let first = t.create_as(&one, &limited(150_000, 512)?)?;
    is(2, 512 + 16 + 64 - 512)?;
    t.invoke(&["start", &one])?.exited(0).stdout("").stderr("");
    // Of a container that is refused, nothing is left.
    let refused = limited(150_000, 8 << 20)?;
    let path = refused.path().to_str().context("ASCII")?;
    t.invoke(&["create", "-b", path, &format!("{}-two", t.id())])?
        .exited(1)
        .error(&["linux.resources.memory.limit", "machine"]);
    is(2, 512 + 16 + 64 - 512)?;
    // One without limits of its own is given some, beyond what there is.
    t.invoke(&["update", "--memory", "268435456", t.id()])?.exited(0).stdout("").stderr("");
    is(2, 768 + 24 + 64 - 512)?;
    t.invoke(&["kill", &one, "KILL"])?.exited(0).stderr("");
    ensure!(is_killed(first.end()?), "another end");
    is(1, 0)?;
    t.invoke(&["delete", &one])?.exited(0).stderr("");
    gone(t, &pause)
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
