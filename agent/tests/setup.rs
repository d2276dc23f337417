//! What the agent sets up for a process, with real containers on this host's kernel: further processes of a container, namespaces of another
//! one, and the devices.

#![allow(clippy::unwrap_used, reason = "a test fails by panic")]

mod lab;

use std::fs::{self, File};
use std::io::Read;
use std::path::Path;

use kvrun_agent::oci::create::{Creation, OciError, What, create};
use kvrun_agent::reaper::End;
use kvrun_agent::stdio::ProcessEnds;
use lab::{Ended, Lab, config, lab, refusal, stdio};
use serde_json::{Value, json};

/// Runs a further process in the container `id`: what it writes, and how it ends.
async fn exec(lab: &Lab, id: &str, container: u32, process: &Value) -> Result<(String, End), OciError> {
    let file = "/run/kvrun/process.json";
    fs::write(file, process.to_string()).unwrap();
    let null = || File::options().read(true).write(true).open("/dev/null").unwrap().into();
    let (read, write) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let creation = Creation {
        helper: Path::new(env!("CARGO_BIN_EXE_kvrun-agent")),
        bundle: &Path::new("/run/kvrun/oci/bundles").join(id),
        cgroup: &Path::new("kvrun").join(id),
        what: What::Process { container: container as i32, process: Path::new(file) },
        stdio: ProcessEnds { stdin: null(), stdout: write, stderr: null() },
    };
    let created = create(creation, &lab.reaper).await?;
    created.gate.start().await?;
    let end = created.end.await.unwrap();
    let mut text = String::new();
    File::from(read).read_to_string(&mut text).unwrap();
    Ok((text, end))
}

fn process(script: &str) -> Value {
    json!({ "user": { "uid": 0, "gid": 0 }, "args": ["sh", "-c", script], "env": ["PATH=/bin"], "cwd": "/" })
}

#[test]
fn a_further_process_is_in_the_container_with_its_own_rights() {
    lab(|lab| async move {
        let mut first = config("exec sleep 1000");
        first["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ALLOW",
            "syscalls": [{ "names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO" }],
        });
        let pid = lab.create("box", &first, stdio(None, None, None)).await.unwrap();
        lab.start("box").await.unwrap();

        let mut second = process(
            "cat /proc/1/comm /proc/sys/kernel/hostname; id -u; id -g; pwd; echo $COLOUR; umask; \
             cat /proc/self/oom_score_adj; grep -E '^(CapEff|Seccomp):' /proc/self/status; grep ^0:: /proc/self/cgroup; \
             busybox mkdir /tmp/x 2>/dev/null || echo refused; exit 7",
        );
        second["user"] = json!({ "uid": 1000, "gid": 1001, "umask": 0o27 });
        second["cwd"] = "/tmp".into();
        second["env"] = json!(["PATH=/bin", "COLOUR=green"]);
        second["oomScoreAdj"] = 77.into();
        second["noNewPrivileges"] = true.into();
        second["capabilities"] = json!({ "bounding": ["CAP_KILL"], "permitted": ["CAP_KILL"], "effective": ["CAP_KILL"],
            "inheritable": ["CAP_KILL"], "ambient": ["CAP_KILL"] });
        let (text, end) = exec(&lab, "box", pid, &second).await.unwrap();
        assert_eq!(
            text,
            "sleep\nbox\n1000\n1001\n/tmp\ngreen\n0027\n77\nCapEff:\t0000000000000020\nSeccomp:\t2\n0::/\nrefused\n"
        );
        assert_eq!(end, End::Exited(7));

        let missing = exec(
            &lab,
            "box",
            pid,
            &json!({ "user": { "uid": 0, "gid": 0 }, "args": ["no-such"], "cwd": "/" }),
        )
        .await;
        assert!(matches!(missing.unwrap_err(), OciError::NotFound(_)));
        let mut lost = process("true");
        lost["cwd"] = "/no/such/directory".into();
        let text = exec(&lab, "box", pid, &lost).await.unwrap_err().to_string();
        assert!(text.starts_with("process.cwd: change to /no/such/directory"), "{text}");
        lab.remove("box").await.unwrap();
    });
}

#[test]
fn a_further_process_runs_on_its_cpus() {
    lab(|lab| async move {
        let pid = lab.create("cpus", &config("exec sleep 1000"), stdio(None, None, None)).await.unwrap();
        lab.start("cpus").await.unwrap();
        let mut second = process("grep ^Cpus_allowed_list /proc/self/status");
        second["execCPUAffinity"] = json!({ "initial": "0-1", "final": "0" });
        let (text, _) = exec(&lab, "cpus", pid, &second).await.unwrap();
        assert_eq!(text, "Cpus_allowed_list:\t0\n");
        second["execCPUAffinity"] = json!({ "initial": "x" });
        let text = exec(&lab, "cpus", pid, &second).await.unwrap_err().to_string();
        assert!(text.contains("execCPUAffinity"), "{text}");
        lab.remove("cpus").await.unwrap();
    });
}

#[test]
fn a_further_process_of_a_user_namespace_is_in_it() {
    lab(|lab| async move {
        let mut first = config("exec sleep 1000");
        first["linux"]["namespaces"].as_array_mut().unwrap().push(json!({ "type": "user" }));
        let map = json!([{ "containerID": 0, "hostID": 100_000, "size": 1000 }]);
        first["linux"]["uidMappings"] = map.clone();
        first["linux"]["gidMappings"] = map;
        let pid = lab.create("user", &first, stdio(None, None, None)).await.unwrap();
        lab.start("user").await.unwrap();
        let (text, _) = exec(&lab, "user", pid, &process("id -u; cat /proc/self/uid_map")).await.unwrap();
        assert_eq!(text.split_whitespace().collect::<Vec<_>>(), ["0", "0", "100000", "1000"]);
        lab.remove("user").await.unwrap();
    });
}

#[test]
fn a_container_joins_namespaces_of_another_one() {
    lab(|lab| async move {
        let mut infra = config("exec sleep 1000");
        infra["hostname"] = "infra".into();
        lab.create("infra", &infra, stdio(None, None, None)).await.unwrap();
        lab.start("infra").await.unwrap();

        let join = |id: &str| {
            let mut config = config("cat /proc/sys/kernel/hostname /proc/1/comm");
            config["hostname"].take();
            config["linux"]["namespaces"] = json!([
                { "type": "mount" },
                { "type": "uts", "path": format!("/run/kvrun/containers/{id}/ns/uts") },
                { "type": "ipc", "path": format!("/run/kvrun/containers/{id}/ns/ipc") },
                { "type": "pid", "path": format!("/run/kvrun/containers/{id}/ns/pid") },
            ]);
            config
        };
        assert_eq!(lab.run("app", &join("infra")).await, ("infra\nsleep\n".to_owned(), Ended::Exit(0)));
        let (_, text) = refusal(lab.create("lost", &join("nobody"), stdio(None, None, None)).await);
        assert!(text.starts_with("linux.namespaces[1].path") && text.contains("nobody"), "{text}");
        lab.remove("infra").await.unwrap();
    });
}

#[test]
fn devices_that_are_not_allowed_cannot_be_opened() {
    lab(|lab| async move {
        let script = "head -c1 /dev/zero | wc -c; (: < /dev/fuse) 2>/dev/null && echo opened; true";
        let with_rules = |rules: Value| {
            let mut config = config(script);
            config["linux"]["devices"] =
                json!([{ "path": "/dev/fuse", "type": "c", "major": 10, "minor": 229 }]);
            config["linux"]["resources"] = json!({ "devices": rules });
            config
        };
        let (denied, _) = lab.run("denied", &with_rules(json!([{ "allow": false, "access": "rwm" }]))).await;
        assert_eq!(denied, "1\n");
        let rule = json!([{ "allow": true, "type": "c", "major": 10, "minor": 229, "access": "rwm" }]);
        let (text, ended) = lab.run("allowed", &with_rules(rule)).await;
        // Whether this host has a driver for it is another question: then it is ENXIO or ENODEV.
        let expected = if File::open("/dev/fuse").is_ok() { "1\nopened\n" } else { "1\n" };
        assert_eq!((text.as_str(), ended), (expected, Ended::Exit(0)));
    });
}
