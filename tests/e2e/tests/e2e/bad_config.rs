//! A `config.json` that cannot be: one line that names what is wrong, and nothing left behind.

use anyhow::Result;
use kvrun_e2e::{Case, Test, cases};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] = cases![
    empty_file,
    no_json,
    json_of_another_shape,
    huge_file,
    no_version,
    unknown_version,
    no_process,
    no_arguments,
    argument_of_another_type,
    argument_with_a_nul,
    relative_working_directory,
    no_root,
    root_that_does_not_exist,
    root_that_is_a_file,
    root_that_is_a_link,
    unknown_namespace,
    namespace_of_the_host,
    unknown_capability,
    unknown_resource_limit,
    soft_limit_above_hard_limit,
    relative_mount_destination,
    bind_source_that_does_not_exist,
    bind_source_that_is_a_socket,
    unknown_file_system,
    too_many_cpus,
    too_much_memory,
    cgroup_path_that_leads_out,
    device_of_the_host,
    hostname_that_is_too_long,
    unknown_sysctl,
];

/// The change makes the bundle one that is refused, in a line with all of these words.
fn refused(t: &Test, words: &[&str], change: impl FnOnce(&mut Value)) -> Result<()> {
    t.run(&t.bundle(&["/bin/true"])?.with(change)?)?.failed().stdout("").error(words);
    Ok(())
}

fn refused_text(t: &Test, words: &[&str], text: &str) -> Result<()> {
    t.run(&t.bundle(&["/bin/true"])?.with_text(text)?)?.failed().stdout("").error(words);
    Ok(())
}

fn push(list: &mut Value, item: Value) {
    list.as_array_mut().expect("the default spec has this list").push(item);
}

fn bind(spec: &mut Value, source: &str) {
    let mount = json!({"destination": "/mnt", "type": "bind", "source": source, "options": ["bind"]});
    push(&mut spec["mounts"], mount);
}

fn empty_file(t: &Test) -> Result<()> {
    refused_text(t, &["config.json"], "")
}

fn no_json(t: &Test) -> Result<()> {
    refused_text(t, &["config.json", "line 2"], "{\n  ociVersion: 1.2.0\n}\n")
}

fn json_of_another_shape(t: &Test) -> Result<()> {
    refused_text(t, &["config.json"], "[1, 2, 3]")
}

fn huge_file(t: &Test) -> Result<()> {
    refused_text(t, &["config.json"], &format!("{{\"x\": \"{}\"}}", "x".repeat(32 << 20)))
}

fn no_version(t: &Test) -> Result<()> {
    refused(t, &["ociVersion"], |spec| _ = spec.as_object_mut().map(|spec| spec.remove("ociVersion")))
}

fn unknown_version(t: &Test) -> Result<()> {
    refused(t, &["ociVersion", "9.0.0"], |spec| spec["ociVersion"] = json!("9.0.0"))
}

fn no_process(t: &Test) -> Result<()> {
    refused(t, &["process"], |spec| _ = spec.as_object_mut().map(|spec| spec.remove("process")))
}

fn no_arguments(t: &Test) -> Result<()> {
    refused(t, &["process.args"], |spec| spec["process"]["args"] = json!([]))
}

fn argument_of_another_type(t: &Test) -> Result<()> {
    refused(t, &["process.args"], |spec| spec["process"]["args"] = json!("/bin/true"))
}

fn argument_with_a_nul(t: &Test) -> Result<()> {
    refused(t, &["process.args"], |spec| spec["process"]["args"] = json!(["/bin/echo", "a\u{0}b"]))
}

fn relative_working_directory(t: &Test) -> Result<()> {
    refused(t, &["process.cwd", "some/where"], |spec| spec["process"]["cwd"] = json!("some/where"))
}

fn no_root(t: &Test) -> Result<()> {
    refused(t, &["root"], |spec| _ = spec.as_object_mut().map(|spec| spec.remove("root")))
}

fn root_that_does_not_exist(t: &Test) -> Result<()> {
    refused(t, &["no-such-rootfs"], |spec| spec["root"]["path"] = json!("no-such-rootfs"))
}

fn root_that_is_a_file(t: &Test) -> Result<()> {
    refused(t, &["config.json", "directory"], |spec| spec["root"]["path"] = json!("config.json"))
}

fn root_that_is_a_link(t: &Test) -> Result<()> {
    let link = t.scratch().join("link-to-root");
    std::os::unix::fs::symlink("/", &link)?;
    refused(t, &["link-to-root"], |spec| spec["root"]["path"] = json!(link))
}

fn unknown_namespace(t: &Test) -> Result<()> {
    refused(t, &["linux.namespaces", "flavour"], |spec| {
        push(&mut spec["linux"]["namespaces"], json!({"type": "flavour"}));
    })
}

fn namespace_of_the_host(t: &Test) -> Result<()> {
    refused(t, &["namespace", "/proc/1/ns/ipc"], |spec| {
        spec["linux"]["namespaces"] =
            json!([{"type": "mount"}, {"type": "uts"}, {"type": "ipc", "path": "/proc/1/ns/ipc"}]);
    })
}

fn unknown_capability(t: &Test) -> Result<()> {
    refused(t, &["CAP_FLY"], |spec| spec["process"]["capabilities"]["bounding"] = json!(["CAP_FLY"]))
}

fn unknown_resource_limit(t: &Test) -> Result<()> {
    refused(t, &["RLIMIT_FUN"], |spec| {
        push(&mut spec["process"]["rlimits"], json!({"type": "RLIMIT_FUN", "soft": 1, "hard": 1}));
    })
}

fn soft_limit_above_hard_limit(t: &Test) -> Result<()> {
    refused(t, &["RLIMIT_NOFILE"], |spec| {
        spec["process"]["rlimits"] = json!([{"type": "RLIMIT_NOFILE", "soft": 20, "hard": 10}]);
    })
}

fn relative_mount_destination(t: &Test) -> Result<()> {
    refused(t, &["mount", "some/where"], |spec| {
        push(&mut spec["mounts"], json!({"destination": "some/where", "type": "tmpfs", "source": "tmpfs"}));
    })
}

fn bind_source_that_does_not_exist(t: &Test) -> Result<()> {
    refused(t, &["/no/such/source"], |spec| bind(spec, "/no/such/source"))
}

fn bind_source_that_is_a_socket(t: &Test) -> Result<()> {
    let path = t.scratch().join("socket");
    let _listener = std::os::unix::net::UnixListener::bind(&path)?;
    let path = path.display().to_string();
    refused(t, &[&path, "socket"], |spec| bind(spec, &path))
}

fn unknown_file_system(t: &Test) -> Result<()> {
    refused(t, &["quiltfs"], |spec| {
        push(&mut spec["mounts"], json!({"destination": "/mnt", "type": "quiltfs", "source": "none"}));
    })
}

fn too_many_cpus(t: &Test) -> Result<()> {
    refused(t, &["linux.resources.cpu.quota"], |spec| {
        spec["linux"]["resources"]["cpu"] = json!({"quota": 100_000_000, "period": 100_000});
    })
}

fn too_much_memory(t: &Test) -> Result<()> {
    refused(t, &["linux.resources.memory.limit"], |spec| {
        spec["linux"]["resources"]["memory"] = json!({"limit": i64::MAX});
    })
}

fn cgroup_path_that_leads_out(t: &Test) -> Result<()> {
    refused(t, &["cgroupsPath", "../.."], |spec| spec["linux"]["cgroupsPath"] = json!("/../../etc"))
}

fn device_of_the_host(t: &Test) -> Result<()> {
    refused(t, &["/dev/host-disk"], |spec| {
        spec["linux"]["devices"] =
            json!([{"path": "/dev/host-disk", "type": "c", "major": 10, "minor": 237}]);
    })
}

fn hostname_that_is_too_long(t: &Test) -> Result<()> {
    // sethostname(2): at most 64 bytes (__NEW_UTS_LEN).
    refused(t, &["hostname"], |spec| spec["hostname"] = json!("x".repeat(65)))
}

fn unknown_sysctl(t: &Test) -> Result<()> {
    refused(t, &["sysctl", "kernel.flavour"], |spec| spec["linux"]["sysctl"] = json!({"kernel.flavour": "1"}))
}
