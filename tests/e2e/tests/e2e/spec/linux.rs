//! `linux`: namespaces, devices, seccomp.

use anyhow::{Result, ensure};
use kvrun_e2e::{Case, Test, cases};
use serde_json::{Value, json};

use super::{capability, output, push};

pub(crate) const CASES: &[Case] = cases![
    user_namespace_has_its_mappings,
    time_namespace_has_its_offsets,
    domain_name_is_the_specs,
    namespaces_left_out_are_the_guests,
    network_sysctls_are_the_containers,
    devices_of_the_spec_are_made,
    device_that_is_in_the_way_is_named,
    other_devices_are_denied,
    devices_can_be_allowed_and_denied,
    seccomp_gives_its_error,
    seccomp_compares_arguments,
    seccomp_kills,
    seccomp_without_no_new_privileges,
    seccomp_default_is_an_error,
    seccomp_knows_32_bit_programs,
];

fn user_namespace_has_its_mappings(t: &Test) -> Result<()> {
    let script = "id -u; cat /proc/self/uid_map | tr -s ' '; cat /proc/self/gid_map | tr -s ' '; \
        echo > /dev/null && test -c /dev/zero && echo devices; touch /dev/shm/x && stat -c '%u %g' /dev/shm/x; cat /proc/self/setgroups";
    let text = output(t, script, |spec| {
        push(&mut spec["linux"]["namespaces"], json!({"type": "user"}));
        let map = json!([{"containerID": 0, "hostID": 100_000, "size": 65536}]);
        spec["linux"]["uidMappings"] = map.clone();
        spec["linux"]["gidMappings"] = map;
    })?;
    ensure!(text == "0\n 0 100000 65536\n 0 100000 65536\ndevices\n0 0\nallow\n", "{text}");
    Ok(())
}

fn time_namespace_has_its_offsets(t: &Test) -> Result<()> {
    let text = output(t, "cut -d. -f1 /proc/uptime; tr -s ' ' < /proc/self/timens_offsets", |spec| {
        push(&mut spec["linux"]["namespaces"], json!({"type": "time"}));
        spec["linux"]["timeOffsets"] = json!({"boottime": {"secs": 1_000_000, "nanosecs": 0}, "monotonic": {"secs": 5000, "nanosecs": 7}});
    })?;
    let uptime: u64 = text.lines().next().unwrap_or_default().parse()?;
    ensure!((1_000_000..1_100_000).contains(&uptime), "{text}");
    ensure!(text.contains("monotonic 5000 7\n") && text.contains("boottime 1000000 0\n"), "{text}");
    Ok(())
}

fn domain_name_is_the_specs(t: &Test) -> Result<()> {
    let text =
        output(t, "cat /proc/sys/kernel/domainname", |spec| spec["domainname"] = json!("some.domain"))?;
    ensure!(text == "some.domain\n", "{text}");
    Ok(())
}

fn namespaces_left_out_are_the_guests(t: &Test) -> Result<()> {
    // The agent is PID 1 of the guest; the guest's own host name is "kvrun".
    let bundle =
        t.script("cat /proc/1/comm; hostname")?.without_namespace("pid")?.without_namespace("uts")?;
    let bundle = bundle.with(|spec| _ = spec.as_object_mut().map(|spec| spec.remove("hostname")))?;
    let text = t.run(&bundle)?.exited(0).stderr("").text();
    ensure!(text == "init\nkvrun\n" || text == "kvrun-agent\nkvrun\n", "{text}");
    Ok(())
}

fn network_sysctls_are_the_containers(t: &Test) -> Result<()> {
    let text = output(
        t,
        "cat /proc/sys/net/ipv4/ip_forward /proc/sys/kernel/shmmax; ip addr show lo | grep -c 127.0.0.1",
        |spec| {
            spec["linux"]["sysctl"] = json!({"net.ipv4.ip_forward": "1", "kernel/shmmax": "4096"});
        },
    )?;
    ensure!(text == "1\n4096\n1\n", "{text}");
    Ok(())
}

fn devices_of_the_spec_are_made(t: &Test) -> Result<()> {
    let script =
        "stat -c '%F %t:%T %a %u %g' /dev/mynull /dev/deep/fifo; stat -c %a /dev/zero; echo > /dev/mynull";
    let text = output(t, script, |spec| {
        spec["linux"]["devices"] = json!([
            {"path": "/dev/mynull", "type": "c", "major": 1, "minor": 3, "fileMode": 0o640, "uid": 5, "gid": 6},
            {"path": "/dev/deep/fifo", "type": "p", "fileMode": 0o600},
            {"path": "/dev/zero", "type": "u", "major": 1, "minor": 5, "fileMode": 0o444},
        ]);
        capability(spec, "CAP_DAC_OVERRIDE");
    })?;
    ensure!(text == "character special file 1:3 640 5 6\nfifo 0:0 600 0 0\n444\n", "{text}");
    Ok(())
}

fn device_that_is_in_the_way_is_named(t: &Test) -> Result<()> {
    let bundle = t.bundle(&["/bin/true"])?.with(|spec| {
        spec["linux"]["devices"] = json!([{"path": "/dev/shm", "type": "c", "major": 1, "minor": 3}]);
    })?;
    t.run(&bundle)?.failed().stdout("").error(&["linux.devices[0]", "/dev/shm", "exists already"]);
    Ok(())
}

/// Makes /dev/fuse, which no container may open unless its spec says so.
fn with_fuse(spec: &mut Value, rules: Value) {
    spec["linux"]["devices"] =
        json!([{"path": "/dev/fuse", "type": "c", "major": 10, "minor": 229, "fileMode": 0o666}]);
    spec["linux"]["resources"]["devices"] = rules;
}

fn other_devices_are_denied(t: &Test) -> Result<()> {
    // Making a node is always allowed, with the capability for it; opening it is not. 1:1 is all of memory.
    let script = "mknod /dev/mem c 1 1 && echo made; (: < /dev/mem) || echo denied; (: < /dev/fuse) || echo denied too; head -c1 /dev/zero | wc -c";
    for rules in [json!([{"allow": false, "access": "rwm"}]), Value::Null] {
        let bundle = t.script(script)?.with(|spec| {
            capability(spec, "CAP_MKNOD");
            capability(spec, "CAP_SYS_RAWIO");
            with_fuse(spec, rules);
        })?;
        let outcome = t.run(&bundle)?.exited(0).stdout("made\ndenied\ndenied too\n1\n");
        ensure!(outcome.stderr.contains("Operation not permitted"), "{outcome}");
    }
    Ok(())
}

fn devices_can_be_allowed_and_denied(t: &Test) -> Result<()> {
    let deny_all = json!({"allow": false, "access": "rwm"});
    let fuse = |allow: bool, access: &str| json!({"allow": allow, "type": "c", "major": 10, "minor": 229, "access": access});
    let script = ": < /dev/fuse && echo read; : > /dev/fuse && echo write";
    for (rules, expected) in [
        (json!([deny_all, fuse(true, "rw")]), "read\nwrite\n"),
        (json!([deny_all, fuse(true, "r")]), "read\n"),
        (json!([{"allow": true, "access": "rwm"}, fuse(false, "w")]), "read\n"),
    ] {
        // A redirection that fails ends the shell's command, not the shell, with an error.
        let script =
            format!("sh -c '{script}' 2>/dev/null; sh -c ': > /dev/fuse && echo write' 2>/dev/null; true");
        let bundle = t.script(&script)?.with(|spec| with_fuse(spec, rules.clone()))?;
        let text = t.run(&bundle)?.exited(0).text();
        let (reads, writes) = (text.contains("read\n"), text.contains("write\n"));
        ensure!(
            reads == expected.contains("read") && writes == expected.contains("write"),
            "{rules}: {text}"
        );
    }
    Ok(())
}

fn seccomp(spec: &mut Value, syscalls: &Value) {
    spec["linux"]["seccomp"] = json!({
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"],
        "flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_SPEC_ALLOW", "SECCOMP_FILTER_FLAG_TSYNC"],
        "syscalls": syscalls,
    });
}

const MKDIR: [&str; 2] = ["mkdir", "mkdirat"];

fn seccomp_gives_its_error(t: &Test) -> Result<()> {
    let bundle = t.script("mkdir /tmp/x; rmdir /tmp/y; grep ^Seccomp: /proc/self/status")?.with(|spec| {
        // ENOLINK, EPERM by default; and a name that nobody knows.
        seccomp(
            spec,
            &json!([
                {"names": MKDIR, "action": "SCMP_ACT_ERRNO", "errnoRet": 67},
                {"names": ["rmdir", "unlinkat", "no_such_call"], "action": "SCMP_ACT_ERRNO"},
            ]),
        );
    })?;
    let outcome = t.run(&bundle)?.exited(0).stdout("Seccomp:\t2\n");
    ensure!(outcome.stderr.contains("Link has been severed"), "{outcome}");
    ensure!(outcome.stderr.contains("Operation not permitted"), "{outcome}");
    Ok(())
}

fn seccomp_compares_arguments(t: &Test) -> Result<()> {
    // kill(2) with SIGUSR1 (10) or SIGUSR2 (12): two comparisons of one argument are alternatives. Signal 0 is allowed.
    let script =
        "kill -0 $$ && echo allowed; kill -USR1 $$ || echo refused; kill -USR2 $$ || echo refused too";
    let bundle = t.script(script)?.with(|spec| {
        let is = |value: u32| json!({"index": 1, "value": value, "op": "SCMP_CMP_EQ"});
        seccomp(
            spec,
            &json!([
                {"names": ["kill"], "action": "SCMP_ACT_ERRNO", "errnoRet": 1, "args": [is(10), is(12)]},
                {"names": ["umask"], "action": "SCMP_ACT_ERRNO", "args": [
                    {"index": 0, "value": 0o777, "valueTwo": 0o77, "op": "SCMP_CMP_MASKED_EQ"}]},
            ]),
        );
    })?;
    t.run(&bundle)?.exited(0).stdout("allowed\nrefused\nrefused too\n");
    Ok(())
}

fn seccomp_kills(t: &Test) -> Result<()> {
    for action in ["SCMP_ACT_KILL_PROCESS", "SCMP_ACT_TRAP", "SCMP_ACT_KILL"] {
        let bundle = t.script("mkdir /tmp/x; echo ended with $?")?.with(|spec| {
            seccomp(spec, &json!([{"names": MKDIR, "action": action}]));
        })?;
        // SIGSYS is 31.
        t.run(&bundle)?.exited(0).stdout("ended with 159\n");
    }
    Ok(())
}

fn seccomp_without_no_new_privileges(t: &Test) -> Result<()> {
    let script =
        "mkdir /tmp/x 2>/dev/null || echo refused; grep -E '^(NoNewPrivs|Seccomp):' /proc/self/status";
    let text = output(t, script, |spec| {
        spec["process"]["noNewPrivileges"] = json!(false);
        spec["process"]["user"] = json!({"uid": 1000, "gid": 1000});
        seccomp(spec, &json!([{"names": MKDIR, "action": "SCMP_ACT_ERRNO"}]));
    })?;
    ensure!(text == "refused\nNoNewPrivs:\t0\nSeccomp:\t2\n", "{text}");
    Ok(())
}

fn seccomp_default_is_an_error(t: &Test) -> Result<()> {
    // What a static busybox needs to say something.
    let allowed: &[&str] = &[
        "execve",
        "brk",
        "arch_prctl",
        "set_tid_address",
        "set_robust_list",
        "rseq",
        "prlimit64",
        "readlink",
        "readlinkat",
        "getrandom",
        "mprotect",
        "write",
        "writev",
        "exit_group",
        "exit",
        "getuid",
        "geteuid",
        "getgid",
        "getegid",
        "newfstatat",
        "fstat",
        "stat",
        "ioctl",
        "prctl",
        "uname",
        "mmap",
        "munmap",
        "close",
        "getpid",
        "rt_sigaction",
        "rt_sigprocmask",
        "getcwd",
        "read",
        "open",
        "openat",
        "fcntl",
        "setuid",
        "setgid",
        "poll",
        "futex",
        "sigaltstack",
        "getppid",
        "gettid",
        "lseek",
    ];
    let bundle = t.bundle(&["/bin/mkdir", "/tmp/x"])?.with(|spec| {
        spec["linux"]["seccomp"] = json!({
            "defaultAction": "SCMP_ACT_ERRNO",
            "defaultErrnoRet": 67,
            "syscalls": [{"names": allowed, "action": "SCMP_ACT_ALLOW"}],
        });
    })?;
    let outcome = t.run(&bundle)?.exited(1).stdout("");
    ensure!(outcome.stderr.contains("Link has been severed"), "{outcome}");
    Ok(())
}

fn seccomp_knows_32_bit_programs(t: &Test) -> Result<()> {
    // A filter for one architecture kills what runs as another; with the other in its list it must not.
    let bundle = t
        .script("echo alive")?
        .with(|spec| seccomp(spec, &json!([{"names": MKDIR, "action": "SCMP_ACT_LOG"}])))?;
    t.run(&bundle)?.exited(0).stdout("alive\n").stderr("");
    Ok(())
}
