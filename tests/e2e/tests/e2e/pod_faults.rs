//! Whatever of a pod dies or hangs, at whatever step of its life: what containerd says of it is soon true, nothing of it stays, and the next
//! pod starts.

use std::fs;
use std::os::fd::OwnedFd;
use std::os::unix::fs::symlink;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use k8s_cri::v1 as api;
use k8s_cri::v1::NamespaceMode as Mode;
use kvrun_e2e::containerd::SHIM;
use kvrun_e2e::cri::{Cri, Pod, cgroup, processes, script};
use kvrun_e2e::loop_device::{Loop, ext4};
use kvrun_e2e::{Case, Test, cases, time};
use rustix::fs::statvfs;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags, mount as mount_fs, unmount};
use rustix::process::{Signal, pidfd_send_signal};

use crate::cri::{SLEEP, mount, of_container, of_pod, until_logged};
use crate::faults::{HANG_KERNEL, KILL_AGENT};

pub(crate) const CASES: &[Case] = cases![
    vmm_is_killed_at_each_step,
    shim_is_killed_at_each_step,
    containerd_is_killed_at_each_step,
    agent_is_killed_at_each_step,
    process_of_a_container_is_killed_at_each_step,
    guest_hangs_with_its_machine_or_alone,
    state_directory_is_full,
    disk_of_containers_is_full,
    memory_runs_out_on_the_host_and_in_the_guest,
];

/// How soon what is said of a pod must be true, and all of a removed one gone.
const SOON: Duration = Duration::from_secs(5);
/// How long a container has to end when it is asked to: longer than any bound here.
const GRACE: Duration = Duration::from_secs(1000);

/// Where in its life a pod is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Step {
    SandboxStarts,
    SandboxRuns,
    ContainerIsCreated,
    ContainerStarts,
    ContainerRuns,
    ExecRuns,
    ContainerStops,
    ContainerHasEnded,
    SandboxStops,
    SandboxIsRemoved,
}

const STEPS: [Step; 10] = [
    Step::SandboxStarts,
    Step::SandboxRuns,
    Step::ContainerIsCreated,
    Step::ContainerStarts,
    Step::ContainerRuns,
    Step::ExecRuns,
    Step::ContainerStops,
    Step::ContainerHasEnded,
    Step::SandboxStops,
    Step::SandboxIsRemoved,
];

/// Who is killed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Victim {
    Vmm,
    Shim,
    Containerd,
    /// By a [`killer`] in its guest.
    Agent,
}

impl Victim {
    /// Whether somebody is there to kill it.
    fn is_within_reach(self, step: Step) -> bool {
        // Only a container can do it: nobody is there before, and with one there, the other steps are those of a container.
        let of_sandbox = [Step::SandboxStarts, Step::SandboxRuns, Step::SandboxStops, Step::SandboxIsRemoved];
        self != Self::Agent || !of_sandbox.contains(&step)
    }

    fn kill(self, t: &Test, cri: &Cri<'_>, volume: &Path) -> Result<()> {
        match self {
            Self::Vmm => signal(&t.vmms()?, Signal::KILL),
            Self::Shim => signal(&t.processes(SHIM)?, Signal::KILL),
            Self::Containerd => cri.containerd().kill(),
            Self::Agent => {
                fs::write(volume.join("kill"), "")?;
                time::until("the guest is dead", || Ok(t.vmms().is_err()))
            }
        }
    }

    /// Starts it again, if whoever looks after it does that.
    fn revive(self, cri: &Cri<'_>) -> Result<()> {
        if self == Self::Containerd { cri.start_again() } else { Ok(()) }
    }
}

/// Those that have ended meanwhile do not mind.
fn signal(processes: &[(i32, OwnedFd)], signal: Signal) -> Result<()> {
    for (_, process) in processes {
        match pidfd_send_signal(process, signal) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

/// Does something while a request is being made; both results.
fn meanwhile<T>(request: impl FnOnce() -> T, act: impl FnOnce() -> Result<()> + Send) -> Result<T> {
    thread::scope(|scope| {
        let acting = scope.spawn(act);
        let answer = request();
        acting.join().map_err(|_| anyhow::anyhow!("the thread panicked"))??;
        Ok(answer)
    })
}

fn vmm_is_killed_at_each_step(t: &Test) -> Result<()> {
    each_step(t, Victim::Vmm)
}

fn shim_is_killed_at_each_step(t: &Test) -> Result<()> {
    each_step(t, Victim::Shim)
}

fn containerd_is_killed_at_each_step(t: &Test) -> Result<()> {
    each_step(t, Victim::Containerd)
}

fn agent_is_killed_at_each_step(t: &Test) -> Result<()> {
    each_step(t, Victim::Agent)
}

fn each_step(t: &Test, victim: Victim) -> Result<()> {
    let cri = Cri::new(t)?;
    let steps = STEPS.into_iter().filter(|step| victim.is_within_reach(*step));
    for (number, step) in steps.enumerate() {
        let case = || format!("{victim:?} is killed when {step:?}");
        kill_at(t, &cri, victim, step, number).with_context(case)?;
        nothing_stays(&cri).with_context(case)?;
    }
    next_pod_starts(&cri)?;
    cri.end()
}

/// Removes all pods; all they had is gone then.
fn nothing_stays(cri: &Cri<'_>) -> Result<()> {
    cri.remove_all()?;
    nothing_is_left(cri)
}

/// Waits, not for long, until there is nothing of pods.
pub(crate) fn nothing_is_left(cri: &Cri<'_>) -> Result<()> {
    let gone = time::until_within(SOON, "nothing is left", || Ok(cri.left_of_pods()?.is_empty()));
    gone.with_context(|| format!("{:?}", cri.left_of_pods()))
}

fn next_pod_starts(cri: &Cri<'_>) -> Result<()> {
    let pod = cri.run_pod(cri.pod_config("next"))?;
    let id = pod.start(script("sleeper", SLEEP))?;
    ensure!(pod.sh(&id, "echo fine")? == "fine\n");
    pod.remove()
}

/// Lets the privileged containers of a pod do with its guest what they want.
fn own_the_guest(config: &mut api::PodSandboxConfig) -> Result<()> {
    let context = of_pod(config)?;
    context.privileged = true;
    context.namespace_options = Some(processes(Mode::Node));
    Ok(())
}

/// A container of such a pod, which sees the agent.
fn privileged(name: &str, text: &str, volume: &Path) -> Result<api::ContainerConfig> {
    let mut config = script(name, text);
    config.mounts.push(mount(volume, "/volume", false));
    let context = of_container(&mut config)?;
    context.privileged = true;
    context.namespace_options = Some(processes(Mode::Node));
    Ok(config)
}

/// The guest's kernel goes on, takes connections for the agent as well, and never runs it again: all but the root cgroup can be frozen
/// (Linux 6.12 Documentation/admin-guide/cgroup-v2.rst, "cgroup.freeze").
const FREEZE_AGENT: &str = "cd /proc/1/root/sys/fs/cgroup && mkdir frozen && echo 1 > frozen/cgroup.procs &&
    echo 1 > frozen/cgroup.freeze && until grep -q 'frozen 1' frozen/cgroup.events; do sleep 0.1; done";

/// A container that freezes the agent, and kills it, when files in its volume say so. A frozen one is killed before it can do anything more.
fn killer(volume: &Path) -> Result<api::ContainerConfig> {
    let text = format!(
        "until [ -e /volume/kill ]; do
            if [ -e /volume/freeze ] && [ ! -e /volume/frozen ]; then ({FREEZE_AGENT}) && echo > /volume/frozen; fi
            sleep 0.1
        done
        ({KILL_AGENT})
        [ ! -e /volume/frozen ] || echo 0 > /proc/1/root/sys/fs/cgroup/frozen/cgroup.freeze"
    );
    privileged("killer", &text, volume)
}

/// Takes a pod to a step of its life, kills somebody, and checks what containerd says then.
fn kill_at(t: &Test, cri: &Cri<'_>, victim: Victim, step: Step, number: usize) -> Result<()> {
    let volume = t.scratch().join(format!("volume-{number}"));
    fs::create_dir(&volume)?;
    let kill = || {
        victim.kill(t, cri, &volume)?;
        victim.revive(cri)
    };
    let mut config = cri.pod_config(&format!("pod-{number}"));
    if victim == Victim::Agent {
        own_the_guest(&mut config)?;
    }
    if step == Step::SandboxStarts {
        let started = meanwhile(
            || cri.run_pod(config),
            || {
                time::until("there is a machine", || Ok(t.vmms().is_ok()))?;
                kill()
            },
        )?;
        let error = started.err().context("a pod without a machine")?;
        let why = format!("{error:#}");
        ensure!(victim != Victim::Vmm || why.contains("the virtual machine died"), "{why}");
        return Ok(());
    }
    let pod = cri.run_pod(config)?;
    if matches!(step, Step::SandboxStops | Step::SandboxIsRemoved) {
        return kill_while_it_ends(t, cri, victim, step, &pod);
    }
    if victim == Victim::Agent {
        pod.start(killer(&volume)?)?;
    }
    let kill_when = |name: &str| {
        time::until(name, || Ok(volume.join(name).exists()))?;
        kill()
    };
    let mut config = script("main", "trap 'echo > /volume/term' TERM; echo up; while :; do sleep 1; done");
    config.mounts.push(mount(&volume, "/volume", false));
    match step {
        Step::SandboxStarts | Step::SandboxStops | Step::SandboxIsRemoved => {}
        Step::SandboxRuns => kill()?,
        Step::ContainerIsCreated => {
            let id = pod.create(config)?;
            kill()?;
            let started = pod.start_created(&id);
            ensure!(started.is_ok() == (victim == Victim::Containerd), "{started:?}");
        }
        Step::ContainerHasEnded => {
            let id = pod.start(script("ends", "exit 3"))?;
            ensure!(pod.wait(&id)?.exit_code == 3);
            kill()?;
            let ended = pod.status(&id)?;
            ensure!(ended.exit_code == 3 && ended.reason == "Error", "{ended:?}");
        }
        Step::ContainerStarts => {
            // It cannot get any further.
            if victim == Victim::Agent {
                fs::write(volume.join("freeze"), "")?;
                time::until("the agent is frozen", || Ok(volume.join("frozen").exists()))?;
            } else {
                signal(&t.vmms()?, Signal::STOP)?;
            }
            let before = threads(t, "container")?;
            let started = meanwhile(
                || pod.start(config),
                || {
                    let in_shim = || Ok(threads(t, "container")? == before + 1);
                    time::until("the shim makes the container", in_shim)?;
                    victim.kill(t, cri, &volume)?;
                    // Goes on, unless it was killed or is about to die with its shim. A guest must not seem to hang for as long as containerd
                    // takes to start.
                    signal(&t.vmms().unwrap_or_default(), Signal::CONT)?;
                    victim.revive(cri)
                },
            )?;
            ensure!(started.is_err(), "a container that was not made");
        }
        Step::ContainerRuns | Step::ExecRuns | Step::ContainerStops => {
            let id = pod.start(config)?;
            until_logged(&pod, "main", "up")?;
            match step {
                Step::ExecRuns => {
                    let ended = meanwhile(
                        || pod.exec(&id, "echo > /volume/exec; exec sleep 1000"),
                        || kill_when("exec"),
                    )?;
                    let code = ended.map(|finished| finished.code).unwrap_or(137);
                    ensure!(code == 137, "the exit code of a killed command: {code}");
                }
                Step::ContainerStops => {
                    // Whether containerd can say that it has stopped depends on who was killed.
                    let _ = meanwhile(|| pod.stop(&id, GRACE), || kill_when("term"))?;
                }
                _ => kill()?,
            }
            if victim == Victim::Containerd {
                ensure!(pod.status(&id)?.state() == api::ContainerState::ContainerRunning);
                ensure!(pod.sh(&id, "echo fine")? == "fine\n");
                pod.stop(&id, Duration::ZERO)?;
            }
            let ended = has_ended(&pod, &id)?;
            ensure!(victim == Victim::Shim || ended.exit_code == 137, "{ended:?}");
        }
    }
    if victim == Victim::Containerd {
        ensure!(
            pod.pod_status()?.state() == api::PodSandboxState::SandboxReady,
            "the pod outlives containerd"
        );
        return Ok(());
    }
    is_not_ready(&pod)?;
    if victim == Victim::Agent {
        // Once for each pod, though all of its containers have ended by it.
        let told = || Ok(cri.containerd().log().matches("Kernel panic - not syncing").count());
        time::until_within(SOON, "why the guest died is told", || told().map(|told| told > number))?;
        ensure!(told()? == number + 1, "{}", cri.containerd().log());
    }
    Ok(())
}

/// Kills somebody while containerd stops a pod with a container, or removes one that still runs.
fn kill_while_it_ends(t: &Test, cri: &Cri<'_>, victim: Victim, step: Step, pod: &Pod<'_>) -> Result<()> {
    let (words, container) = if step == Step::SandboxStops {
        ("StopPodSandbox for", Some(pod.start(script("main", SLEEP))?))
    } else {
        ("RemovePodSandbox for", None)
    };
    // What it is asked waits.
    let shims = t.processes(SHIM)?;
    signal(&shims, Signal::STOP)?;
    let ended = meanwhile(
        || if container.is_some() { pod.stop_sandbox() } else { pod.remove_sandbox() },
        || {
            let asked = |line: &str| line.contains(words) && line.contains(pod.id());
            time::until("containerd is asked", || Ok(cri.containerd().log().lines().any(asked)))?;
            // The agent, for which there must be a volume, is not within reach.
            victim.kill(t, cri, &t.scratch())?;
            signal(&shims, Signal::CONT)?;
            victim.revive(cri)
        },
    )?;
    match victim {
        Victim::Containerd => ensure!(ended.is_err(), "an answer of who was killed"),
        // Whether it could do everything without the shim is containerd's to say.
        Victim::Shim => {}
        _ => ended.context("a machine that is dead already is no obstacle")?,
    }
    let Some(id) = container else { return Ok(()) };
    // What a kubelet does with a pod of which it does not know that it is stopped.
    pod.stop_sandbox()?;
    let ended = has_ended(pod, &id)?;
    ensure!(victim == Victim::Shim || ended.exit_code == 137, "{ended:?}");
    is_not_ready(pod)
}

/// Waits, not for long, until containerd knows that a container has ended; how.
fn has_ended(pod: &Pod<'_>, id: &str) -> Result<api::ContainerStatus> {
    let exited = || Ok(pod.status(id)?.state() == api::ContainerState::ContainerExited);
    time::until_within(SOON, "the container has ended", exited)?;
    pod.status(id)
}

pub(crate) fn is_not_ready(pod: &Pod<'_>) -> Result<()> {
    let is_not = || Ok(pod.pod_status()?.state() == api::PodSandboxState::SandboxNotready);
    time::until_within(SOON, "the pod is not ready", is_not)
}

/// How many threads of shims have a name.
fn threads(t: &Test, name: &str) -> Result<usize> {
    let mut count = 0;
    for (pid, _) in t.processes(SHIM)? {
        // It may end meanwhile, as the one does that containerd runs to find the shim of a pod.
        for thread in fs::read_dir(format!("/proc/{pid}/task")).into_iter().flatten().flatten() {
            let comm = fs::read_to_string(thread.path().join("comm")).unwrap_or_default();
            count += usize::from(comm.trim_end() == name);
        }
    }
    Ok(count)
}

fn process_of_a_container_is_killed_at_each_step(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    // Where processes are shared, another container can do it.
    let mut config = cri.pod_config("shared");
    of_pod(&mut config)?.namespace_options = Some(processes(Mode::Pod));
    let pod = cri.run_pod(config)?;
    let shared = |name: &str, text: &str| -> Result<api::ContainerConfig> {
        let mut config = script(name, text);
        config.mounts.push(mount(&t.scratch(), "/volume", false));
        of_container(&mut config)?.namespace_options = Some(processes(Mode::Pod));
        Ok(config)
    };
    let killer = pod.start(shared("killer", SLEEP)?)?;
    for step in [Step::ContainerRuns, Step::ExecRuns, Step::ContainerStops] {
        let name = format!("{step:?}").to_lowercase();
        let text = format!(
            "echo $$ > /volume/{name}.pid; trap 'echo > /volume/term' TERM; echo {name}; while :; do sleep 1; done"
        );
        let id = pod.start(shared(&name, &text)?)?;
        until_logged(&pod, &name, &name)?;
        let kill = || pod.sh(&killer, &format!("kill -9 $(cat /volume/{name}.pid)")).map(drop);
        let kill_when = |name: &str| {
            time::until(name, || Ok(t.scratch().join(name).exists()))?;
            kill()
        };
        match step {
            Step::ExecRuns => {
                let finished = meanwhile(
                    || pod.exec(&id, "echo > /volume/exec; exec sleep 1000"),
                    || kill_when("exec"),
                )??;
                ensure!(finished.code == 137, "{finished:?}");
            }
            Step::ContainerStops => meanwhile(|| pod.stop(&id, GRACE), || kill_when("term"))??,
            _ => kill()?,
        }
        let ended = has_ended(&pod, &id)?;
        ensure!(ended.exit_code == 137 && ended.reason == "Error", "{step:?}: {ended:?}");
        ensure!(pod.pod_status()?.state() == api::PodSandboxState::SandboxReady, "the others live");
        pod.remove_container(&id)?;
    }
    pod.remove()?;
    nothing_stays(&cri)?;
    cri.end()
}

fn guest_hangs_with_its_machine_or_alone(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    for with_container in [false, true] {
        let pod = cri.run_pod(cri.pod_config(&format!("hangs-{with_container}")))?;
        let id = with_container.then(|| pod.start(script("sleeper", SLEEP))).transpose()?;
        signal(&t.vmms()?, Signal::STOP)?;
        let before = Instant::now();
        if let Some(id) = id {
            // containerd stops the container when it hears of its end, before the answer to the signal or after it.
            if let Err(error) = pod.stop(&id, Duration::from_secs(1)) {
                ensure!(format!("{error:#}").contains("did not deliver a signal"), "{error:#}");
            }
            ensure!(has_ended(&pod, &id)?.exit_code == 137, "{:?}", pod.status(&id)?);
        }
        pod.remove()?;
        // 10 s for the signal.
        let bound = time::scaled(SOON) + Duration::from_secs(10);
        ensure!(before.elapsed() < bound, "it took {:?}", before.elapsed());
        nothing_stays(&cri).context("the guest hung")?;
    }

    let volume = t.scratch().join("volume");
    fs::create_dir(&volume)?;
    let freeze = format!("{FREEZE_AGENT}; echo > /volume/frozen; sleep 1000");
    let why = "the guest did not take a signal in time";
    let told = || cri.containerd().log().matches(why).count();
    for (name, text) in [("kernel", HANG_KERNEL), ("agent", &freeze)] {
        let mut config = cri.pod_config(name);
        own_the_guest(&mut config)?;
        let pod = cri.run_pod(config)?;
        let other = pod.start(script("other", SLEEP))?;
        // Not before containerd knows that it runs: the guest would never say so.
        let text = format!("until [ -e /volume/{name} ]; do sleep 0.1; done; {text}");
        let id = pod.start(privileged("hangs", &text, &volume)?)?;
        fs::write(volume.join(name), "")?;
        if name == "kernel" {
            // Of a guest that does not answer, it is the console.
            let log = || Ok(t.invoke(&["logs", "--guest", pod.id()])?.text());
            time::until("the kernel stands still", || log().map(|log| log.contains("end Kernel panic")))?;
        } else {
            time::until("the agent is frozen", || Ok(volume.join("frozen").exists()))?;
            let metrics = t.invoke(&["metrics", pod.id()])?.exited(0).text();
            ensure!(
                metrics.lines().any(|line| line.starts_with("kvrun_agent_up{") && line.ends_with(" 0")),
                "{metrics}"
            );
        }
        let (before, told_before) = (Instant::now(), told());
        pod.stop(&id, Duration::ZERO)?;
        for container in [&id, &other] {
            let ended = has_ended(&pod, container)?;
            ensure!(ended.exit_code == 137, "{name}: {ended:?}");
        }
        is_not_ready(&pod)?;
        pod.remove()?;
        ensure!(before.elapsed() < time::scaled(SOON), "it took {:?}", before.elapsed());
        nothing_stays(&cri).context(name)?;
        ensure!(told() > told_before, "{}", cri.containerd().log());
    }
    next_pod_starts(&cri)?;
    cri.end()
}

const NO_SPACE: &str = "No space left on device";

/// It is refused, and not only the log of containerd, which follows in the error, has the reason.
fn says_that_there_is_no_space<T>(answer: Result<T>) -> Result<()> {
    let error = format!("{:#}", answer.err().context("it was not refused")?);
    let answer = error.lines().next().unwrap_or_default();
    // In Go it begins with a small letter.
    ensure!(answer.to_lowercase().contains(&NO_SPACE.to_lowercase()), "{error}");
    Ok(())
}

fn state_directory_is_full(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let dir = Path::new("/run/kvrun/containerd");
    fs::create_dir_all(dir)?;
    // No room for a directory, or for what is in it.
    for (name, room) in [("directory", c"nr_inodes=1"), ("file", c"nr_inodes=3"), ("bytes", c"size=4k")] {
        mount_fs("none", dir, "tmpfs", MountFlags::empty(), room)?;
        says_that_there_is_no_space(cri.run_pod(cri.pod_config(name))).context(name)?;
        nothing_is_left(&cri).context(name)?;
        unmount(dir, UnmountFlags::empty())?;
    }
    next_pod_starts(&cri)?;
    cri.end()
}

/// Leaves no room on the disk on which the file is that comes after it.
const FILL: &str = "cat /dev/zero > ";

fn disk_of_containers_is_full(t: &Test) -> Result<()> {
    // A disk for what containers write, and for volumes, as a node has it. What containerd writes itself is not there.
    let (image, disk, snapshotter) =
        (t.scratch().join("disk.ext4"), t.scratch().join("disk"), t.scratch().join("overlayfs"));
    ext4(&image, 24)?;
    let device = Loop::over(&image)?;
    fs::create_dir(&disk)?;
    mount_fs(device.path(), &disk, "ext4", MountFlags::empty(), None)?;
    let volume = disk.join("volume");
    for dir in [&volume, &disk.join("snapshots"), &snapshotter] {
        fs::create_dir(dir)?;
    }
    symlink(disk.join("snapshots"), snapshotter.join("snapshots"))?;
    let config = format!("[plugins.'io.containerd.snapshotter.v1.overlayfs']\nroot_path = {snapshotter:?}\n");
    let cri = Cri::with_config(t, &config)?;
    let with_volume = |name: &str, text: &str, path: &str| {
        let mut config = script(name, text);
        config.mounts.push(mount(&volume, path, false));
        config
    };

    let pod = cri.run_pod(cri.pod_config("full"))?;
    let other = pod.start(with_volume("other", SLEEP, "/volume"))?;
    let late = pod.create(with_volume("late", SLEEP, "/made/for/it"))?;
    let writer = pod.start(script("writer", &format!("{FILL} /file; exit 5")))?;
    let ended = pod.wait(&writer)?;
    ensure!(ended.exit_code == 5 && ended.reason == "Error", "{ended:?}");
    ensure!(pod.log("writer")?.contains(NO_SPACE), "{}", pod.log("writer")?);
    let fill_volume = || -> Result<()> {
        let finished = pod.exec(&other, &format!("{FILL} /volume/file"))?;
        ensure!(finished.code == 1 && finished.stderr.contains(NO_SPACE), "{finished:?}");
        Ok(())
    };
    fill_volume()?;
    // Nothing more is made, by us or by containerd, which made the directories of the first one while there was room.
    says_that_there_is_no_space(pod.start_created(&late)).context("a container without mount points")?;
    says_that_there_is_no_space(pod.create(script("later", SLEEP))).context("a container without files")?;
    ensure!(pod.pod_status()?.state() == api::PodSandboxState::SandboxReady, "the pod goes on");
    ensure!(pod.sh(&other, "echo fine")? == "fine\n");

    // Once there is room, the rest of the pod is as if nothing had been.
    for container in [&late, &writer] {
        pod.remove_container(container)?;
    }
    let room = || -> Result<u64> { Ok(statvfs(&disk).map(|disk| disk.f_bavail * disk.f_frsize)?) };
    time::until_within(SOON, "there is room again", || room().map(|bytes| bytes > 8 << 20))
        .with_context(|| format!("{:?} bytes", room()))?;
    let again = pod.start(with_volume("again", SLEEP, "/made/for/it"))?;
    ensure!(pod.sh(&again, "echo written > /made/for/it/file; cat /made/for/it/file")? == "written\n");
    fill_volume()?;
    pod.remove()?;
    nothing_stays(&cri)?;
    fs::remove_file(volume.join("file"))?;
    next_pod_starts(&cri)?;
    cri.end()?;
    Ok(unmount(&disk, UnmountFlags::empty())?)
}

fn memory_runs_out_on_the_host_and_in_the_guest(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let pod = cri.run_pod(cri.pod_config("host"))?;
    let id = pod.start(script("sleeper", SLEEP))?;
    until_logged(&pod, "sleeper", "up")?;
    // The guest outgrows it. If it were less than the pod has already, the kernel would choose victims until the first one is gone.
    let limit = cgroup(t).join("memory.max");
    let now: u64 = fs::read_to_string(cgroup(t).join("memory.current"))?.trim().parse()?;
    fs::write(&limit, (now + (32 << 20)).to_string())?;
    // The machine may die before the answer comes.
    let _ = pod.start(script("hungry", "exec tail /dev/zero"));
    let ended = has_ended(&pod, &id)?;
    ensure!(ended.exit_code == 137, "{ended:?}");
    is_not_ready(&pod)?;
    pod.remove()?;
    fs::write(&limit, "max")?;
    nothing_stays(&cri).context("no memory on the host")?;

    let mut config = cri.pod_config("guest");
    config.linux.as_mut().context("none")?.resources =
        Some(api::LinuxContainerResources { memory_limit_in_bytes: 64 << 20, ..Default::default() });
    let pod = cri.run_pod(config)?;
    let other = pod.start(script("sleeper", SLEEP))?;
    // It has no limit but the machine.
    let hungry = pod.start(script("hungry", "exec tail /dev/zero"))?;
    let ended = pod.wait(&hungry)?;
    ensure!(ended.exit_code == 137 && ended.reason == "OOMKilled", "{ended:?}");
    ensure!(pod.sh(&other, "echo fine")? == "fine\n", "the others are not killed");
    pod.remove()?;
    nothing_stays(&cri).context("no memory in the guest")?;
    cri.end()
}
