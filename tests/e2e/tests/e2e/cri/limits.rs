//! What a pod and its containers may do, and have of the machine and the host.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Context, Result, ensure};
use k8s_cri::v1 as api;
use kvrun_e2e::containerd::{RUNTIME, SHIM};
use kvrun_e2e::cri::{Cri, script};
use kvrun_e2e::guest::{GUEST_SIZE, guest_size};
use kvrun_e2e::{Case, Test, cases, time};

use super::{GRACE, SLEEP, mount, of_container, of_pod};
use crate::pod_faults::nothing_is_left;

pub(crate) const CASES: &[Case] = cases![
    security_context_holds,
    classes_of_service_are_as_the_kubelet_says,
    pod_is_as_its_runtime_its_annotations_and_its_slice_say,
    limits_hold_and_can_be_changed,
    machine_grows_and_shrinks_with_what_its_containers_ask_for,
];

fn security_context_holds(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let mut config = cri.pod_config("secure");
    if let Some(linux) = &mut config.linux {
        linux.sysctls.insert("net.ipv4.ip_unprivileged_port_start".to_owned(), "0".to_owned());
    }
    let pod = cri.run_pod(config)?;
    let text = "exec 2>/dev/null; id -u; id -G; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status | tr -d '\\t'; \
        echo x > /file || echo root: no; echo x > /group/file; cat /proc/sys/net/ipv4/ip_unprivileged_port_start; wc -c < /proc/cpuinfo";
    let mut config = script("secure", text);
    // A volume as a kubelet prepares it for `fsGroup`.
    let volume = t.scratch().join("group");
    fs::create_dir(&volume)?;
    chown(&volume, None, Some(2000))?;
    fs::set_permissions(&volume, fs::Permissions::from_mode(0o2770))?;
    config.mounts = vec![mount(&volume, "/group", false)];
    let context = of_container(&mut config)?;
    context.run_as_user = Some(api::Int64Value { value: 1000 });
    context.run_as_group = Some(api::Int64Value { value: 1001 });
    context.supplemental_groups = vec![2000];
    context.readonly_rootfs = true;
    context.no_new_privs = true;
    context.seccomp = Some(api::SecurityProfile {
        profile_type: api::security_profile::ProfileType::RuntimeDefault.into(),
        localhost_ref: String::new(),
    });
    context.masked_paths = vec!["/proc/cpuinfo".to_owned()];
    pod.wait(&pod.start(config)?)?;
    let written = fs::metadata(volume.join("file"))?;
    ensure!((written.uid(), written.gid()) == (1000, 2000), "{written:?}");
    let log = pod.log("secure")?;
    for line in [
        "1000\n1001 2000\n",
        "CapEff:0000000000000000\n",
        "NoNewPrivs:1\n",
        "Seccomp:2\n",
        "root: no\n0\n",
        "\n0\n",
    ] {
        ensure!(log.contains(line), "{line:?}: {log}");
    }
    let mut config = script("capable", "grep -E 'Cap(Eff|Bnd)' /proc/self/status | tr -d '\\t'");
    of_container(&mut config)?.capabilities = Some(api::Capability {
        add_capabilities: vec!["NET_ADMIN".to_owned()],
        drop_capabilities: vec!["ALL".to_owned()],
        ..Default::default()
    });
    pod.wait(&pod.start(config)?)?;
    let log = pod.log("capable")?;
    ensure!(log == "CapEff:0000000000001000\nCapBnd:0000000000001000\n", "{log}");
    pod.remove()?;

    // Privileged is what it is in the guest: there are no devices of the host.
    let mut config = cri.pod_config("privileged");
    of_pod(&mut config)?.privileged = true;
    let pod = cri.run_pod(config)?;
    let text = "grep CapEff /proc/self/status; mkdir /mnt && mount -t tmpfs none /mnt && echo mounted; test -e /dev/vda || echo no disk; \
        ln -s usr/lib /lib; ln -s usr/lib64 /lib64; PATH=/usr/sbin:/usr/bin; exec 2>&1; \
        /usr/bin/ip tuntap add of-pod0 mode tun && /usr/bin/ip -o link show of-pod0; nft add table inet of-pod && nft list tables; \
        iptables-nft -A OUTPUT -d 192.0.2.1 -j REJECT && iptables-nft -S OUTPUT";
    let mut config = script("privileged", text);
    of_container(&mut config)?.privileged = true;
    // Programs of the host's that busybox does not have, and a device of which the guest has its own.
    config.mounts =
        vec![mount(Path::new("/usr"), "/usr", true), mount(Path::new("/dev/net/tun"), "/dev/net/tun", false)];
    pod.wait(&pod.start(config)?)?;
    let log = pod.log("privileged")?;
    for line in [
        "CapEff:\t000001ffffffffff\nmounted\nno disk\n",
        "of-pod0: <",
        "table inet of-pod\n",
        "-A OUTPUT -d 192.0.2.1/32 -j REJECT",
    ] {
        ensure!(log.contains(line), "{line:?}: {log}");
    }
    pod.remove()?;
    cri.end()
}

fn limited(cpu_quota: i64, memory_mib: i64) -> api::LinuxContainerResources {
    api::LinuxContainerResources {
        memory_limit_in_bytes: memory_mib << 20,
        cpu_period: 100_000,
        cpu_quota,
        cpu_shares: 512,
        ..Default::default()
    }
}

/// A container that sleeps, with these limits.
fn with_limits(name: &str, resources: api::LinuxContainerResources) -> Result<api::ContainerConfig> {
    let mut config = script(name, SLEEP);
    config.linux.as_mut().context("none")?.resources = Some(resources);
    Ok(config)
}

/// What a kubelet says of the containers of a pod of each class of quality of service.
fn classes_of_service_are_as_the_kubelet_says(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    for (class, oom_score_adj, cpu_shares, weight) in
        [("guaranteed", -997, 1024, "39"), ("burstable", 984, 512, "20"), ("besteffort", 1000, 2, "1")]
    {
        let mut config = cri.pod_config(class);
        let parent = format!("/{}/{class}/pod", t.id());
        config.linux.as_mut().context("none")?.cgroup_parent = parent.clone();
        let pod = cri.run_pod(config)?;
        let resources = api::LinuxContainerResources {
            oom_score_adj,
            cpu_shares,
            unified: [("memory.oom.group".to_owned(), "1".to_owned())].into(),
            ..Default::default()
        };
        let id = pod.start(with_limits(class, resources)?)?;
        let seen =
            pod.sh(&id, "cat /proc/1/oom_score_adj; cd /sys/fs/cgroup; cat cpu.weight memory.oom.group")?;
        ensure!(seen == format!("{oom_score_adj}\n{weight}\n1\n"), "{class}: {seen}");
        for (pid, _) in t.vmms()?.into_iter().chain(t.processes(SHIM)?) {
            let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
            ensure!(cgroup.contains(&parent), "{pid} is not in the pod's cgroup: {cgroup}");
        }
        // What a kubelet asks for every ten seconds.
        let stats = pod.stats(&id)?;
        let memory = stats.memory.and_then(|memory| memory.working_set_bytes).map_or(0, |bytes| bytes.value);
        let cpu = stats.cpu.and_then(|cpu| cpu.usage_core_nano_seconds).map_or(0, |used| used.value);
        ensure!(memory > 0 && cpu > 0, "{memory} bytes, {cpu} ns");
        pod.remove()?;
    }
    cri.end()
}

fn pod_is_as_its_runtime_its_annotations_and_its_slice_say(t: &Test) -> Result<()> {
    let settings = t.scratch().join("sized.toml");
    fs::write(&settings, "[machine]\nmemory_mib = 300\n[annotations]\nallowed = [\"io.kvrun.vcpus\"]\n")?;
    let runtime = format!(
        "[plugins.'io.containerd.cri.v1.runtime'.containerd.runtimes.sized]\nruntime_type = \"{RUNTIME}\"\n\
         pod_annotations = [\"io.kvrun.*\"]\noptions = {{ ConfigPath = \"{}\" }}\n",
        settings.display()
    );
    let cri = Cri::with_config(t, &runtime)?;
    // That of a kubelet that leaves cgroups to systemd. It makes the slice before the pod.
    let slice = format!("{}.slice", t.id().replace('-', "_"));
    let dir = Path::new("/sys/fs/cgroup").join(&slice);
    fs::create_dir(&dir)?;
    let sized = |name: &str, annotation: &str| -> Result<api::PodSandboxConfig> {
        let mut config = cri.pod_config(name);
        config.linux.as_mut().context("none")?.cgroup_parent = format!("/{slice}");
        config.annotations = [(annotation.to_owned(), "2".to_owned())].into();
        Ok(config)
    };
    let pod = cri.run_pod_by("sized", sized("sized", "io.kvrun.vcpus")?)?;
    let id = pod.start(script("main", SLEEP))?;
    let (cpus, mib) = guest_size(&pod.sh(&id, GUEST_SIZE)?)?;
    ensure!(cpus == 2 && (200..300).contains(&mib), "{cpus} CPUs, {mib} MiB");
    let scope = format!("/{slice}/cri-containerd-{}.scope", pod.id());
    for (pid, _) in t.vmms()?.into_iter().chain(t.processes(SHIM)?) {
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        ensure!(cgroup.trim_end() == format!("0::{scope}"), "{pid} is in {cgroup}");
    }
    pod.remove()?;
    let error = cri.run_pod_by("sized", sized("refused", "io.kvrun.memory_mib")?).err().context("a pod")?;
    ensure!(format!("{error:#}").contains("annotation io.kvrun.memory_mib is not allowed"), "{error:#}");
    nothing_is_left(&cri)?;
    // Nothing is in it any more.
    fs::remove_dir(&dir)?;
    cri.end()
}

fn limits_hold_and_can_be_changed(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    // What its containers come to, as a kubelet adds it up.
    let mut config = cri.pod_config("limits");
    config.linux.as_mut().context("none")?.resources = Some(api::LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 150_000,
        memory_limit_in_bytes: 256 << 20,
        ..Default::default()
    });
    let pod = cri.run_pod(config)?;
    let id = pod.start(with_limits("limited", limited(50_000, 64))?)?;
    let files = "cd /sys/fs/cgroup; cat memory.max cpu.max cpu.weight";
    ensure!(pod.sh(&id, files)? == "67108864\n50000 100000\n20\n", "{}", pod.sh(&id, files)?);
    ensure!(pod.sh(&id, "nproc")? == "2\n", "the machine has 1.5 CPUs, rounded up");
    for (pid, _) in t.vmms()?.into_iter().chain(t.processes(SHIM)?) {
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        ensure!(cgroup.contains(t.id()), "{pid} is not in the pod's cgroup: {cgroup}");
    }
    let total: u64 = pod.sh(&id, "awk '/MemTotal/ {print $2}' /proc/meminfo")?.trim().parse()?;
    ensure!((256 << 10..384 << 10).contains(&total), "the machine has {total} KiB");
    pod.update(&id, limited(50_000, 96))?;
    ensure!(pod.sh(&id, files)?.starts_with("100663296\n"), "{}", pod.sh(&id, files)?);

    let mut hungry = script("hungry", "exec dd if=/dev/zero of=/dev/null bs=64M count=1");
    hungry.linux.as_mut().context("none")?.resources = Some(limited(50_000, 32));
    let ended = pod.wait(&pod.start(hungry)?)?;
    ensure!(ended.exit_code == 137 && ended.reason == "OOMKilled", "{ended:?}");
    ensure!(pod.sh(&id, "echo fine")? == "fine\n", "the others are not killed");
    pod.remove()?;
    cri.end()
}

fn machine_grows_and_shrinks_with_what_its_containers_ask_for(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let pod = cri.run_pod(cri.pod_config("growing"))?;
    let first = pod.start(with_limits("first", limited(100_000, 384))?)?;
    let size = || guest_size(&pod.sh(&first, GUEST_SIZE)?);
    let (cpus, at_start) = size()?;
    ensure!(cpus == 1 && (400..512).contains(&at_start), "{cpus} CPUs, {at_start} MiB");
    // Both have 768 MiB and 2 CPUs; the guest needs 64 MiB and a 32nd beside.
    let second = pod.start(with_limits("second", limited(100_000, 384))?)?;
    let is = |cpus: u64, more_mib: u64| {
        time::until(&format!("{cpus} CPUs, {more_mib} MiB more"), || {
            Ok(size()? == (cpus, at_start + more_mib))
        })
    };
    is(2, 768 + 24 + 64 - 512)?;
    pod.update(&first, limited(200_000, 512))?;
    is(3, 896 + 28 + 64 - 512)?;
    ensure!(pod.sh(&first, "cat /sys/fs/cgroup/memory.max")? == "536870912\n");
    let error = pod.update(&first, limited(100_000, 8 << 20)).err().context("no host has 8 TiB")?;
    ensure!(format!("{error:#}").contains("linux.resources.memory.limit: what the containers"), "{error:#}");
    is(3, 896 + 28 + 64 - 512)?;
    pod.update(&first, limited(100_000, 32))?;
    is(2, 0)?;
    pod.stop(&second, GRACE)?;
    is(1, 0)?;
    pod.remove()?;
    cri.end()
}
