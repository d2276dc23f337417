use std::fs;
use std::os::unix::fs::symlink;

use rustix::fs::{Mode, makedev};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;
use crate::text::chain;

/// A bundle directory with an empty root and this config.
fn bundle(config: &Value) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::create_dir(dir.path().join("rootfs")).unwrap();
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    dir
}

fn good() -> Value {
    json!({
        "ociVersion": "1.2.0",
        "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/true"], "env": ["A=b"], "cwd": "/"},
        "root": {"path": "rootfs"},
        "mounts": [{"destination": "/proc", "type": "proc", "source": "proc"}],
        "linux": {"namespaces": [{"type": "mount"}, {"type": "pid"}]},
    })
}

fn with(change: impl FnOnce(&mut Value)) -> TempDir {
    let mut config = good();
    change(&mut config);
    bundle(&config)
}

/// The one line of error for a bundle, which must name its config.
fn refusal(dir: &Path) -> String {
    let line = chain(&Bundle::load(dir).expect_err("the bundle is refused"));
    assert!(!line.contains('\n'), "more than one line: {line:?}");
    assert!(line.contains("config.json"), "no file named: {line}");
    line
}

/// The bundle is refused with a line that has all of these words.
fn refused(words: &[&str], change: impl FnOnce(&mut Value)) {
    let line = refusal(with(change).path());
    for word in words {
        assert!(line.contains(word), "{word:?} is not in: {line}");
    }
}

fn refused_text(words: &[&str], text: &str) {
    let dir = bundle(&good());
    fs::write(dir.path().join("config.json"), text).unwrap();
    let line = refusal(dir.path());
    for word in words {
        assert!(line.contains(word), "{word:?} is not in: {line}");
    }
}

fn without(name: &str) -> impl FnOnce(&mut Value) {
    let name = name.to_owned();
    move |config| drop(config.as_object_mut().unwrap().remove(&name))
}

fn push(list: &mut Value, item: Value) {
    list.as_array_mut().unwrap().push(item);
}

#[test]
fn good_bundle_is_taken() {
    let dir = with(|c| {
        c["root"]["readonly"] = json!(true);
        c["linux"]["resources"] = json!({"memory": {"limit": 1048576}});
        push(
            &mut c["mounts"],
            json!({"destination": "/a", "type": "bind", "source": "rootfs", "options": ["rbind", "ro"]}),
        );
        push(
            &mut c["mounts"],
            json!({"destination": "/b", "source": "config.json", "options": ["bind", "rro", "rslave"]}),
        );
        c["unknownToTheSpecification"] = json!({"is": "ignored"});
    });
    let (bundle, _) = Bundle::load(dir.path()).unwrap();
    assert!(bundle.is_root_read_only());
    assert_eq!(bundle.memory_limit(), Some(1_048_576));
    let [a, b] = bundle.binds() else { panic!("two bind mounts") };
    assert!(
        a.is_directory()
            && a.is_recursive()
            && a.is_read_only()
            && !a.is_recursively_read_only()
            && !a.follows_host()
    );
    assert!(
        !b.is_directory()
            && !b.is_recursive()
            && !b.is_read_only()
            && b.is_recursively_read_only()
            && b.follows_host()
    );
    assert_eq!((a.index(), b.index()), (1, 2));
}

#[test]
fn later_mount_options_undo_earlier_ones() {
    let dir = with(|c| {
        let options = json!(["bind", "ro", "rw", "rslave", "rprivate"]);
        push(&mut c["mounts"], json!({"destination": "/a", "source": "rootfs", "options": options}));
    });
    let (bundle, _) = Bundle::load(dir.path()).unwrap();
    assert!(!bundle.binds()[0].is_read_only() && !bundle.binds()[0].follows_host());
}

#[test]
fn bundle_that_is_not_there() {
    let dir = tempfile::tempdir().unwrap();
    let line = chain(&Bundle::load(&dir.path().join("none")).unwrap_err());
    assert!(line.contains("/none cannot be opened") && line.contains("No such file"), "{line}");
    let line = refusal(dir.path());
    assert!(line.contains("config.json cannot be opened"), "{line}");
}

#[test]
fn config_that_is_no_file() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("config.json");
    fs::create_dir(&config).unwrap();
    assert!(refusal(dir.path()).contains("not a regular file"));
    fs::remove_dir(&config).unwrap();
    nix::unistd::mkfifo(&config, nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert!(refusal(dir.path()).contains("not a regular file"));
    fs::remove_file(&config).unwrap();
    symlink("nowhere", &config).unwrap();
    assert!(refusal(dir.path()).contains("cannot be opened"));
}

#[test]
fn config_that_is_no_config() {
    refused_text(&["empty"], "");
    refused_text(&["empty"], " \n ");
    refused_text(&["line 2"], "{\n ociVersion: 1\n}");
    refused_text(&["not a valid OCI config"], "[1]");
    refused_text(&["not a valid OCI config"], "null");
    refused_text(&["trailing"], &format!("{} x", good()));
    refused_text(&["larger than 1 MiB"], &" ".repeat(2 << 20));
    refused_text(&["not a valid OCI config"], &format!("{{\"x\":{}", "[".repeat(100_000)));
}

#[test]
fn version_must_be_one_we_support() {
    refused(&["ociVersion is missing"], without("ociVersion"));
    for version in ["2.0.0", "0.5.0"] {
        refused(&["ociVersion", version, "not supported"], |c| c["ociVersion"] = json!(version));
    }
    for version in ["1", "1.x.0", "latest", "1.2"] {
        refused(&["ociVersion", version, "not a version"], |c| c["ociVersion"] = json!(version));
    }
    for version in ["1.0.0", "1.0.2-dev", "1.3.0-rc.1+build"] {
        Bundle::load(with(|c| c["ociVersion"] = json!(version)).path()).unwrap();
    }
}

#[test]
fn process_must_say_what_to_run() {
    refused(&["process is missing"], without("process"));
    refused(&["process.args is missing"], |c| drop(c["process"].as_object_mut().unwrap().remove("args")));
    refused(&["process.args"], |c| c["process"]["args"] = json!([]));
    refused(&["process.args[0]", "empty"], |c| c["process"]["args"] = json!([""]));
    refused(&["process.args[1]", "NUL"], |c| c["process"]["args"] = json!(["a", "b\0c"]));
    refused(&["at process.args"], |c| c["process"]["args"] = json!("sh"));
    refused(&["process.env[0]"], |c| c["process"]["env"] = json!(["novalue"]));
    refused(&["process.env[1]"], |c| c["process"]["env"] = json!(["A=", "=x"]));
    refused(&["process", "cwd"], |c| drop(c["process"].as_object_mut().unwrap().remove("cwd")));
    refused(&["process.cwd", "some/where", "absolute"], |c| c["process"]["cwd"] = json!("some/where"));
    refused(&["process.cwd"], |c| c["process"]["cwd"] = json!(""));
}

#[test]
fn process_limits_and_labels_must_be_possible() {
    let limit = |soft: u64| json!({"type": "RLIMIT_NOFILE", "soft": soft, "hard": 10});
    refused(&["process.rlimits[0]", "RLIMIT_NOFILE", "soft limit 20"], |c| {
        c["process"]["rlimits"] = json!([limit(20)]);
    });
    refused(&["process.rlimits[1]", "twice"], |c| c["process"]["rlimits"] = json!([limit(1), limit(2)]));
    refused(&["process.rlimits[0].type", "RLIMIT_FUN"], |c| {
        c["process"]["rlimits"] = json!([{"type": "RLIMIT_FUN", "soft": 1, "hard": 1}]);
    });
    refused(&["process.capabilities.bounding", "CAP_FLY"], |c| {
        c["process"]["capabilities"] = json!({"bounding": ["CAP_FLY"]});
    });
    refused(&["process.selinuxLabel"], |c| c["process"]["selinuxLabel"] = json!("a:b:c"));
    refused(&["process.apparmorProfile", "mine"], |c| c["process"]["apparmorProfile"] = json!("mine"));
    for profile in ["unconfined", "cri-containerd.apparmor.d", "docker-default", "containers-default-0.57.4"]
    {
        Bundle::load(with(|c| c["process"]["apparmorProfile"] = json!(profile)).path()).unwrap();
    }
}

#[test]
fn root_must_be_a_directory() {
    refused(&["root is missing"], without("root"));
    refused(&["root.path"], |c| c["root"] = json!({}));
    refused(&["root.path", "nowhere", "No such file"], |c| c["root"]["path"] = json!("nowhere"));
    refused(&["root.path", "not a directory"], |c| c["root"]["path"] = json!("config.json"));
    let dir = with(|c| c["root"]["path"] = json!("link"));
    symlink("/", dir.path().join("link")).unwrap();
    assert!(refusal(dir.path()).contains("symbolic link"));
}

#[test]
fn mounts_must_be_possible_in_a_guest() {
    let mounts = |mount: Value| move |c: &mut Value| push(&mut c["mounts"], mount);
    refused(
        &["mounts[1].destination", "some/where"],
        mounts(json!({"destination": "some/where", "type": "tmpfs"})),
    );
    refused(&["mounts[1]", "destination"], mounts(json!({"type": "tmpfs"})));
    refused(&["mounts[1].type", "quiltfs"], mounts(json!({"destination": "/a", "type": "quiltfs"})));
    refused(&["mounts[1].type", "missing"], mounts(json!({"destination": "/a"})));
    refused(&["mounts[1].source", "missing"], mounts(json!({"destination": "/a", "type": "bind"})));
    let bind = |source: &str, options: Value| json!({"destination": "/a", "type": "bind", "source": source, "options": options});
    refused(&["mounts[1].source", "/no/such", "No such file"], mounts(bind("/no/such", json!([]))));
    refused(&["mounts[1].options", "shared"], mounts(bind("rootfs", json!(["rbind", "rshared"]))));
    refused(&["mounts[1]", "ID-mapped"], mounts(bind("rootfs", json!(["rbind", "idmap"]))));
}

#[test]
fn sockets_fifos_and_devices_that_are_only_the_hosts_are_no_bind_sources() {
    let dir = tempfile::tempdir().unwrap();
    let (socket, fifo, memory) =
        (dir.path().join("socket"), dir.path().join("fifo"), dir.path().join("memory"));
    let _listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    rustix::fs::mknodat(CWD, &fifo, FileType::Fifo, Mode::RWXU, 0).unwrap();
    rustix::fs::mknodat(CWD, &memory, FileType::CharacterDevice, Mode::RWXU, makedev(1, 1)).unwrap();
    for (path, kind) in [(socket, "a socket"), (fifo, "a FIFO"), (memory, "a character device")] {
        let path = path.display().to_string();
        refused(&["mounts[1].source", &path, kind], |c| {
            push(&mut c["mounts"], json!({"destination": "/a", "source": path, "options": ["bind"]}));
        });
    }
}

#[test]
fn namespaces_of_the_host_cannot_be_joined() {
    refused(&["linux is missing"], without("linux"));
    refused(&["linux.namespaces[2].type", "flavour"], |c| {
        push(&mut c["linux"]["namespaces"], json!({"type": "flavour"}));
    });
    refused(&["linux.namespaces[2].type", "pid", "twice"], |c| {
        push(&mut c["linux"]["namespaces"], json!({"type": "pid"}));
    });
    refused(&["linux.namespaces", "mount"], |c| c["linux"]["namespaces"] = json!([{"type": "pid"}]));
}

#[test]
fn namespaces_of_a_sibling_are_found_in_the_guest() {
    let siblings = |pid| (pid == 77).then(|| "infra".parse().unwrap());
    let load = |kind: &str, path: &str| {
        let dir = with(|c| push(&mut c["linux"]["namespaces"], json!({"type": kind, "path": path})));
        Bundle::load_beside(dir.path(), &siblings).map(|(bundle, _)| bundle).map_err(|e| chain(&e))
    };
    let bundle = load("ipc", "/proc/77/ns/ipc").unwrap();
    let namespaces = bundle.spec().linux().as_ref().unwrap().namespaces().clone().unwrap();
    assert_eq!(namespaces[2].path().as_deref(), Some(Path::new("/run/kvrun/containers/infra/ns/ipc")));
    assert_eq!(bundle.siblings(), ["infra".parse().unwrap()]);
    for (kind, path) in [
        ("ipc", "/proc/78/ns/ipc"),
        ("ipc", "/proc/77/ns/uts"),
        ("uts", "/var/run/utsns/1"),
        ("ipc", "/proc/self/ns/ipc"),
        ("uts", "/proc/77/../1/ns/uts"),
    ] {
        let line = load(kind, path).unwrap_err();
        assert!(line.contains("linux.namespaces[2].path") && line.contains(path), "{line}");
    }
}

#[test]
fn network_namespace_is_the_hosts_and_none_in_the_guest() {
    let load = |network: Option<Value>| {
        let dir = with(|c| {
            if let Some(network) = network {
                push(&mut c["linux"]["namespaces"], network);
            }
        });
        Bundle::load(dir.path()).map(|(bundle, _)| bundle).map_err(|e| chain(&e))
    };
    assert!(matches!(load(None).unwrap().network(), HostNetwork::None));
    let new = load(Some(json!({"type": "network"}))).unwrap();
    assert!(matches!(new.network(), HostNetwork::New));
    assert_eq!(new.spec().linux().as_ref().unwrap().namespaces().as_ref().unwrap().len(), 2);
    let ours = load(Some(json!({"type": "network", "path": "/proc/self/ns/net"}))).unwrap();
    let HostNetwork::Named { namespace, .. } = ours.network() else { panic!("{ours:?}") };
    let current = NetworkNamespace::current().unwrap();
    assert_eq!(namespace.identity().unwrap(), current.identity().unwrap());
    for path in ["/run/netns/none-such", "/dev/null", "/etc"] {
        let line = load(Some(json!({"type": "network", "path": path}))).unwrap_err();
        assert!(line.contains("linux.namespaces[2].path") && line.contains(path), "{line}");
    }
}

#[test]
fn what_needs_a_namespace_is_refused_without_it() {
    refused(&["hostname", "UTS"], |c| c["hostname"] = json!("x"));
    refused(&["domainname", "UTS"], |c| c["domainname"] = json!("x"));
    let ids = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
    refused(&["linux.uidMappings", "user namespace"], |c| c["linux"]["uidMappings"] = ids.clone());
    refused(&["linux.gidMappings is missing"], |c| {
        push(&mut c["linux"]["namespaces"], json!({"type": "user"}));
        c["linux"]["uidMappings"] = ids.clone();
    });
    let offsets = |name: &str| json!({name: {"secs": 1, "nanosecs": 0}});
    refused(&["linux.timeOffsets", "time namespace"], |c| c["linux"]["timeOffsets"] = offsets("monotonic"));
    refused(&["linux.timeOffsets.realtime"], |c| c["linux"]["timeOffsets"] = offsets("realtime"));
    refused(&["linux.namespaces[0].path", "mount namespace"], |c| {
        c["linux"]["namespaces"] = json!([{"type": "mount", "path": "/proc/1/ns/mnt"}]);
    });
}

#[test]
fn process_attributes_must_be_possible() {
    let process = |name: &'static str, value: Value| move |c: &mut Value| c["process"][name] = value;
    refused(&["process.user.umask", "0o7777"], process("user", json!({"uid": 0, "gid": 0, "umask": 0o7777})));
    refused(&["process.oomScoreAdj", "1001"], process("oomScoreAdj", json!(1001)));
    let priority = json!({"class": "IOPRIO_CLASS_BE", "priority": 8});
    refused(&["process.ioPriority.priority", "8"], process("ioPriority", priority));
    refused(&["process.execCPUAffinity.initial"], process("execCPUAffinity", json!({"initial": "a-b"})));
    for (sets, words) in [
        (json!({"effective": ["CAP_KILL"]}), ["process.capabilities.effective", "CAP_KILL", "permitted"]),
        (json!({"inheritable": ["CAP_KILL"]}), ["process.capabilities.inheritable", "CAP_KILL", "bounding"]),
        (
            json!({"ambient": ["CAP_KILL"], "permitted": ["CAP_KILL"]}),
            ["process.capabilities.ambient", "CAP_KILL", "inheritable"],
        ),
    ] {
        refused(&words, process("capabilities", sets));
    }
}

#[test]
fn id_mapped_mounts_need_mappings_and_a_bind_mount() {
    let ids = json!([{"containerID": 0, "hostID": 1000, "size": 10}]);
    let mount = |mount: Value| move |c: &mut Value| push(&mut c["mounts"], mount);
    let own = json!({"destination": "/a", "type": "bind", "source": "rootfs", "options": ["bind", "ridmap"],
        "uidMappings": ids, "gidMappings": ids});
    let (bundle, _) = Bundle::load(with(mount(own)).path()).unwrap();
    let map = bundle.binds()[0].id_map().unwrap();
    assert_eq!((map.uids.as_str(), map.gids.as_str(), map.recursive), ("0 1000 10\n", "0 1000 10\n", true));
    refused(
        &["mounts[1].gidMappings", "missing"],
        mount(json!({"destination": "/a", "type": "bind", "source": "rootfs",
        "uidMappings": ids})),
    );
    refused(
        &["mounts[1].uidMappings", "bind mount"],
        mount(json!({"destination": "/a", "type": "tmpfs",
        "uidMappings": ids, "gidMappings": ids})),
    );
}

#[test]
fn what_belongs_to_the_host_is_refused_by_name() {
    let linux = |name: &'static str, value: Value| move |c: &mut Value| c["linux"][name] = value;
    let disk = json!([{"path": "/dev/host-disk", "type": "b", "major": 254, "minor": 0}]);
    Bundle::load(with(linux("devices", disk)).path()).unwrap();
    let gpu = json!([{"path": "/dev/dri/card0", "type": "c", "major": 226, "minor": 0}]);
    refused(&["linux.devices[0]", "/dev/dri/card0", "226:0"], linux("devices", gpu));
    refused(&["linux.rootfsPropagation", "shared"], linux("rootfsPropagation", json!("shared")));
    refused(&["linux.rootfsPropagation", "sideways"], linux("rootfsPropagation", json!("sideways")));
    refused(&["linux.mountLabel"], linux("mountLabel", json!("a:b:c")));
    refused(&["linux.intelRdt"], linux("intelRdt", json!({"closID": "x"})));
    refused(&["linux.sysctl", "kernel.flavour"], linux("sysctl", json!({"kernel.flavour": "1"})));
    refused(&["linux.sysctl", "vm/swappiness"], linux("sysctl", json!({"vm/swappiness": "1"})));
    let notify = json!({"defaultAction": "SCMP_ACT_ALLOW", "listenerPath": "/run/agent.sock"});
    refused(&["linux.seccomp", "SCMP_ACT_NOTIFY"], linux("seccomp", notify));
    Bundle::load(with(linux("sysctl", json!({"net.ipv4.ip_forward": "1", "kernel/shmmax": "1"}))).path())
        .unwrap();
    let null = json!([{"path": "/dev/zero2", "type": "c", "major": 1, "minor": 5}]);
    Bundle::load(with(linux("devices", null)).path()).unwrap();
}

#[test]
fn resources_the_guest_does_not_have_are_refused_by_name() {
    let resources = |value: Value| move |c: &mut Value| c["linux"]["resources"] = value;
    refused(&["linux.resources.cpu.mems", "\"1\""], resources(json!({"cpu": {"mems": "1"}})));
    refused(&["linux.resources.cpu", "realtime"], resources(json!({"cpu": {"realtimeRuntime": 1}})));
    refused(&["disableOOMKiller"], resources(json!({"memory": {"disableOOMKiller": true}})));
    refused(
        &["blockIO.throttleReadBpsDevice"],
        resources(json!({"blockIO": {
        "throttleReadBpsDevice": [{"major": 8, "minor": 0, "rate": 1}]}})),
    );
    refused(&["linux.resources.network"], resources(json!({"network": {"classID": 1}})));
    refused(&["linux.resources.rdma"], resources(json!({"rdma": {"mlx5_1": {"hcaHandles": 3}}})));
    refused(&["linux.resources.memory.limit"], resources(json!({"memory": {"limit": "much"}})));
}

#[test]
fn other_platforms_and_hooks_are_refused_by_name() {
    for (section, value) in [
        ("solaris", json!({})),
        ("windows", json!({"layerFolders": ["a"]})),
        ("vm", json!({"kernel": {"path": "/k"}})),
    ] {
        refused(&[section], |c| c[section] = value);
    }
    for hook in ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"] {
        refused(&[&format!("hooks.{hook}[0].path"), "absolute"], |c| {
            c["hooks"] = json!({hook: [{"path": "bin/hook"}]});
        });
        refused(&[&format!("hooks.{hook}[0].timeout")], |c| {
            c["hooks"] = json!({hook: [{"path": "/bin/hook", "timeout": 0}]});
        });
        Bundle::load(with(|c| c["hooks"] = json!({hook: [{"path": "/bin/hook", "timeout": 1}]})).path())
            .unwrap();
    }
    Bundle::load(with(|c| c["hooks"] = json!({"poststop": []})).path()).unwrap();
    refused(&["hostname", "65 bytes"], |c| c["hostname"] = json!("x".repeat(65)));
}
