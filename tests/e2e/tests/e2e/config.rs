//! The configuration: a file, what is wrong with one, and what it changes.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::PathBuf;

use anyhow::{Result, ensure};
use kvrun_e2e::containerd::{Containerd, IMAGE, RUNTIME};
use kvrun_e2e::{Bundle, Case, Outcome, Test, cases};
use serde_json::json;

pub(crate) const CASES: &[Case] = cases![
    mistakes_are_told_each_in_a_line,
    file_of_somebody_else_is_refused,
    settings_and_allowed_annotations_size_the_machine,
    annotation_that_is_not_allowed_is_refused,
    containerd_names_the_configuration,
];

/// What a container sees of its machine: CPUs, and memory in MiB, which is some less than the machine has.
const SIZE: &str = "nproc; awk '/^MemTotal/ { print int($2 / 1024) }' /proc/meminfo";

fn file(t: &Test, text: &str) -> Result<PathBuf> {
    let path = t.scratch().join("config.toml");
    fs::write(&path, text)?;
    Ok(path)
}

/// `kvrun --config FILE run`.
fn run(t: &Test, bundle: &Bundle, text: &str) -> Result<Outcome> {
    let path = file(t, text)?;
    let bundle = bundle.path().to_string_lossy();
    t.invoke(&["--config", &path.to_string_lossy(), "run", "--bundle", &bundle, t.id()])
}

/// What [`SIZE`] has printed.
fn size(text: &str) -> Vec<u32> {
    text.lines().filter_map(|line| line.trim().parse().ok()).collect()
}

fn is_of(text: &str, cpus: u32, memory_mib: u32) -> Result<()> {
    // The kernel takes 20 to 60 MiB of what the machine has for itself.
    let [seen_cpus, seen_mib] = size(text)[..] else { anyhow::bail!("no size: {text:?}") };
    let range = memory_mib - memory_mib / 16 - 60..memory_mib;
    ensure!(
        seen_cpus == cpus && range.contains(&seen_mib),
        "{cpus} CPUs and {range:?} MiB expected: {text:?}"
    );
    Ok(())
}

fn mistakes_are_told_each_in_a_line(t: &Test) -> Result<()> {
    let default = t.invoke(&["config", "default"])?.exited(0).stderr("").text();
    let path = file(t, &default)?;
    let path = path.to_string_lossy();
    let outcome = t.invoke(&["config", "check", &path])?.exited(0).stderr("");
    ensure!(outcome.text() == format!("{path}: no mistakes\n"), "{outcome}");

    file(t, "[machine]\nvcpu = 2\nmemory_mib = \"1G\"\n[debugging]\n")?;
    let outcome = t.invoke(&["config", "check", &path])?.exited(1).stdout("");
    let lines: Vec<&str> = outcome.stderr.lines().collect();
    for (line, words) in lines.iter().zip([
        ":2: there is no setting of [machine] \"vcpu\"",
        ":3: machine.memory_mib must be an even number from 128 to",
        ":4: there is no section \"debugging\"",
    ]) {
        ensure!(line.starts_with("kvrun: ") && line.contains(words), "{words}: {outcome}");
    }
    ensure!(lines.len() == 3, "{outcome}");
    // Nothing runs with such a file; what needs no machine does.
    let bundle = t.bundle(&["/bin/true"])?;
    run(t, &bundle, &fs::read_to_string(&*path)?)?.exited(1).error(&["config.toml:2", "vcpu", "2 more"]);
    t.invoke(&["--config", &path, "list", "--quiet"])?.exited(0).stdout("").stderr("");

    file(t, "[machine]\nvcpus = 2\n")?;
    let shown = t.invoke(&["--config", &path, "config", "show"])?.exited(0).stderr("").text();
    let kernel =
        format!("assets.kernel = {:?}  # beside this program", t.prefix().join("share/kvrun/vmlinux"));
    for line in [&format!("machine.vcpus = 2  # {path}"), "machine.memory_mib = 512  # default", &kernel] {
        ensure!(shown.lines().any(|other| other == line), "{line}: {shown}");
    }
    t.invoke(&["--config", "/no/such/file", "config", "show"])?.exited(1).error(&["/no/such/file"]);
    Ok(())
}

fn file_of_somebody_else_is_refused(t: &Test) -> Result<()> {
    let bundle = t.bundle(&["/bin/true"])?;
    let path = file(t, "")?;
    chown(&path, Some(1000), None)?;
    run(t, &bundle, "")?.exited(1).stdout("").error(&["config.toml", "does not belong to root"]);
    chown(&path, Some(0), None)?;
    fs::set_permissions(&path, fs::Permissions::from_mode(0o666))?;
    run(t, &bundle, "")?.exited(1).stdout("").error(&["config.toml", "written by others"]);
    Ok(())
}

fn settings_and_allowed_annotations_size_the_machine(t: &Test) -> Result<()> {
    let settings = "[machine]\nmemory_mib = 300\nvcpus = 2\nmax_memory_mib = 400\n";
    let bundle = t.script(SIZE)?;
    is_of(&run(t, &bundle, settings)?.exited(0).stderr("").text(), 2, 300)?;

    let allowed =
        format!("{settings}[annotations]\nallowed = [\"io.kvrun.memory_mib\", \"io.kvrun.vcpus\"]\n");
    let sized = |memory: &str| {
        t.script(SIZE)?.with(|spec| {
            spec["annotations"] = json!({"io.kvrun.memory_mib": memory, "io.kvrun.vcpus": "1"});
        })
    };
    is_of(&run(t, &sized("200")?, &allowed)?.exited(0).stderr("").text(), 1, 200)?;
    let words = ["io.kvrun.memory_mib", "128 to 400", "max_memory_mib", "500"];
    run(t, &sized("500")?, &allowed)?.exited(1).stdout("").error(&words);
    Ok(())
}

fn annotation_that_is_not_allowed_is_refused(t: &Test) -> Result<()> {
    let with = |name: &str| t.bundle(&["/bin/true"])?.with(|spec| spec["annotations"] = json!({name: "2"}));
    let settings = "[annotations]\nallowed = [\"io.kvrun.memory_mib\"]\n";
    let words = ["io.kvrun.vcpus", "not allowed", "annotations.allowed"];
    run(t, &with("io.kvrun.vcpus")?, settings)?.exited(1).stdout("").error(&words);
    let words = ["io.kvrun.kernel", "remove it"];
    run(t, &with("io.kvrun.kernel")?, settings)?.exited(1).stdout("").error(&words);
    Ok(())
}

fn containerd_names_the_configuration(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let path =
        file(t, "[machine]\nvcpus = 2\nmemory_mib = 300\n[annotations]\nallowed = [\"io.kvrun.vcpus\"]\n")?;
    let path = path.to_string_lossy();
    let run = |flags: &[&str]| {
        let before = ["run", "--rm", "--runtime", RUNTIME, "--runtime-config-path", &path];
        containerd.ctr(&[&before[..], flags, &[IMAGE, t.id(), "sh", "-c", SIZE]].concat())
    };
    is_of(&run(&[])?.exited(0).text(), 2, 300)?;
    is_of(&run(&["--annotation", "io.kvrun.vcpus=1"])?.exited(0).text(), 1, 300)?;
    // Each line of the shim's log says which pod, and which container, it is about.
    let (log, about) = (containerd.log(), format!("namespace=default pod={0} container={0}", t.id()));
    for what in ["created", "started", "ended", "deleted"] {
        let said = |line: &str| line.contains(&format!("msg=\"{what}\"")) && line.contains(&about);
        ensure!(log.lines().any(said), "{what}: {log}");
    }

    let refused = |outcome: Outcome, words: &str| -> Result<()> {
        let outcome = outcome.failed();
        ensure!(outcome.stderr.contains(words), "{words}: {outcome}");
        Ok(())
    };
    let annotation = ["--annotation", "io.kvrun.memory_mib=200"];
    refused(run(&annotation)?, "annotation io.kvrun.memory_mib is not allowed")?;
    file(t, "[machine]\nvcpu = 2\n")?;
    refused(run(&[])?, "config.toml:2: there is no setting of [machine] \"vcpu\"")?;
    fs::remove_file(&*path)?;
    refused(run(&[])?, "read the configuration")?;
    containerd.end()
}
