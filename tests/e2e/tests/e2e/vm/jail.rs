//! The jail and the filters of a machine that runs.

use std::fs::{self, File};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Instant;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::loop_device::Loop;
use kvrun_e2e::trace::Trace;
use kvrun_e2e::vm::link::{HOST, Link};
use kvrun_e2e::vm::{FIRST_SLOT, Machine, Shape};
use kvrun_e2e::{Case, Test, cases, time};
use kvrun_vmm::thread::Class;
use kvrun_vmm_api::{DeviceConfig, FsCache, RateLimit};

use super::fs::install_program;

pub(crate) const CASES: &[Case] = cases![
    every_thread_is_filtered,
    descriptors_are_of_the_kinds_that_are_listed,
    threads_and_descriptors_are_as_many_as_the_table_says,
    killed_by_its_filter_is_137_with_reason,
    landlock_confines_where_the_kernel_has_it,
    no_line_of_the_filters_is_there_for_nothing,
];

/// The one VMM of a test, by its directory in /proc.
fn vmm(t: &Test) -> Result<PathBuf> {
    let vmms = t.vmms()?;
    let [(pid, _)] = vmms.as_slice() else { anyhow::bail!("{} VMMs", vmms.len()) };
    Ok(Path::new("/proc").join(pid.to_string()))
}

fn every_thread_is_filtered(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape { vcpus: 2, ..Shape::default() })?;
    let image = file_on_disk()?;
    vm.attach(FIRST_SLOT, disk(), &[image.as_fd()])?;
    let link = Link::new(1500, 2)?;
    link.attach(&vm, FIRST_SLOT + 1)?;
    vm.sh(&format!("ls -R / >/dev/null; dd if=/dev/vda of=/dev/null bs=64k count=4; ping -c 1 {}", HOST.0))?;
    let mut names = Vec::new();
    for thread in fs::read_dir(vmm(t)?.join("task"))? {
        let status = fs::read_to_string(thread?.path().join("status"))?;
        let field = |key: &str| status.lines().find_map(|l| l.strip_prefix(key)?.strip_prefix(":\t"));
        let name = field("Name").context("no name")?.to_owned();
        // The mode of filters, and how many: its own, and that of the spawner under those of the threads it started.
        let filters = if matches!(name.as_str(), "kvrun-vmm" | "spawner") { "1" } else { "2" };
        ensure!(field("Seccomp") == Some("2") && field("Seccomp_filters") == Some(filters), "{status}");
        ensure!(field("NoNewPrivs") == Some("1") && field("CapBnd") == Some("0000000000000000"), "{status}");
        names.push(name);
    }
    for class in Class::ALL {
        ensure!(names.iter().any(|name| name.starts_with(class.name())), "no {class:?} in {names:?}");
    }
    Ok(())
}

fn descriptors_are_of_the_kinds_that_are_listed(t: &Test) -> Result<()> {
    let _vm = Machine::boot(t, Shape::default())?;
    // Streams, KVM, events, and of the file system the share and this process's own descriptors.
    let kinds = ["/dev/null", "pipe:", "socket:", "anon_inode:", "/dev/kvm", "/share", "/1/fd", "/"];
    for entry in fs::read_dir(vmm(t)?.join("fd"))? {
        let target = fs::read_link(entry?.path())?.to_string_lossy().into_owned();
        let known = kinds.iter().any(|kind| target == *kind || kind.len() > 1 && target.starts_with(kind));
        ensure!(known, "{target}");
    }
    Ok(())
}

/// Threads, and descriptors that lead neither into the share nor to a connection.
#[derive(Clone, Copy, Debug)]
struct Cost {
    threads: usize,
    descriptors: usize,
}

impl Cost {
    const fn of(threads: usize, descriptors: usize) -> Self {
        Self { threads, descriptors }
    }

    /// With this many queues.
    const fn queues(self, queues: usize) -> Self {
        Self::of(self.threads, self.descriptors + 2 * queues)
    }

    fn now(vmm: &Path) -> Result<Self> {
        let threads = fs::read_dir(vmm.join("task"))?.count();
        let mut descriptors = 0;
        for entry in fs::read_dir(vmm.join("fd"))? {
            // Closed meanwhile.
            let Ok(target) = fs::read_link(entry?.path()) else { continue };
            let target = target.to_string_lossy();
            descriptors += usize::from(!target.starts_with("/share") && !target.starts_with("socket:"));
        }
        Ok(Self { threads, descriptors })
    }
}

impl std::ops::Add for Cost {
    type Output = Self;

    fn add(self, other: Self) -> Self {
        Self::of(self.threads + other.threads, self.descriptors + other.descriptors)
    }
}

/// The table of docs/security.md.
fn threads_and_descriptors_are_as_many_as_the_table_says(t: &Test) -> Result<()> {
    let shape = Shape { vcpus: 2, max_vcpus: 4, memory_mib: 160, hotplug_mib: 64, ..Shape::default() };
    let vm = Machine::boot(t, shape)?;
    let vmm = vmm(t)?;
    let (vcpus, slots) = (usize::from(shape.max_vcpus), usize::from(shape.slots));
    let (vsock, rng) = (Cost::of(0, 1).queues(3), Cost::of(0, 0).queues(1));
    // Two more lead to its directory.
    let share = Cost::of(9, 4).queues(2);
    let alone = Cost::of(4, 9) + Cost::of(vcpus, vcpus + slots) + vsock + rng + share;
    let check = |what: &str, table: Cost| -> Result<()> {
        let now = Cost::now(&vmm)?;
        // There are as many threads as there is work.
        ensure!(
            now.threads <= table.threads && now.descriptors == table.descriptors,
            "{what}: {now:?}, not {table:?}"
        );
        Ok(())
    };
    vm.sh("ls -R / >/dev/null")?;
    check("a machine with a share", alone)?;

    let (image, link) = (file_on_disk()?, Link::new(1500, 2)?);
    vm.attach(FIRST_SLOT, disk(), &[image.as_fd()])?;
    link.attach(&vm, FIRST_SLOT + 1)?;
    vm.attach(FIRST_SLOT + 2, DeviceConfig::Pmem, &[image.as_fd()])?;
    vm.attach(FIRST_SLOT + 3, DeviceConfig::Mem, &[])?;
    vm.attach(FIRST_SLOT + 4, DeviceConfig::Balloon { free_page_reporting: true }, &[])?;
    let second = DeviceConfig::Fs {
        directory: "rootfs".into(),
        tag: "second".into(),
        read_only: true,
        cache: FsCache::Auto,
        writeback: false,
    };
    vm.attach(FIRST_SLOT + 5, second, &[])?;
    vm.sh(&format!("dd if=/dev/urandom of=/dev/vda bs=64k count=4 conv=fsync; ping -c 1 {}", HOST.0))?;
    vm.sh("mount -t virtiofs second /mnt && ls -R /mnt >/dev/null && umount /mnt")?;
    let (blk, net) = (Cost::of(9, 3).queues(1), Cost::of(2, 4).queues(5));
    let (pmem, mem, balloon) = (Cost::of(0, 0).queues(1), Cost::of(0, 0).queues(1), Cost::of(0, 1).queues(5));
    check("with one of everything", alone + blk + net + pmem + mem + balloon + share)?;
    for slot in 0..6 {
        vm.detach(FIRST_SLOT + slot)?;
    }
    check("without them", alone)?;
    drop(link);

    let link = Link::with_vhost(1500, 2)?;
    link.attach(&vm, FIRST_SLOT)?;
    vm.sh(&format!("ping -c 1 {}", HOST.0))?;
    check("with a link that the host's kernel carries", alone + Cost::of(3, 7).queues(5))?;
    vm.detach(FIRST_SLOT)?;
    drop(link);
    check("alone again", alone)
}

fn killed_by_its_filter_is_137_with_reason(t: &Test) -> Result<()> {
    let run = t.start(&t.script("echo ready; sleep 1000")?)?.without_input();
    run.until("ready\n")?;
    // One of them: all vCPUs, also those that are not online, would say so at the same time.
    let is_vcpu = |thread: &&PathBuf| {
        fs::read_to_string(thread.join("comm")).is_ok_and(|name| name.starts_with("vcpu"))
    };
    let threads = fs::read_dir(vmm(t)?.join("task"))?.map(|entry| Ok(entry?.path()));
    let threads = threads.collect::<Result<Vec<_>>>()?;
    let vcpu = threads.iter().find(|thread| is_vcpu(thread)).context("no vCPU")?;
    let vcpu = vcpu.file_name().context("no name")?.to_string_lossy().into_owned();
    // strace takes it out of the guest when it attaches, and makes another call of the ioctl(2) by which it goes on.
    let mut strace = Command::new("strace")
        .args(["-qq", "-o", "/dev/null", "-e", "trace=ioctl"])
        .args(["-e", "inject=ioctl:error=EIO:syscall=getppid", "-p", &vcpu])
        .spawn()
        .context("cannot run strace")?;
    let outcome = run.wait()?;
    strace.wait()?;
    let line = "killed by its seccomp filter: thread of class vcpu, system call 110 (getppid), arguments ";
    let outcome = outcome.exited(137).stdout("ready\n").report(&["kvrun-vmm", line]);
    ensure!(outcome.stderr.matches("getppid").count() == 1, "said twice: {outcome}");
    Ok(())
}

fn landlock_confines_where_the_kernel_has_it(t: &Test) -> Result<()> {
    let program =
        std::env::var_os("KVRUN_VMM_TESTS").context("KVRUN_VMM_TESTS must name the VMM's unit tests")?;
    let output = Command::new(program).args(["jail::landlock::", "--nocapture"]).output()?;
    let said = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "{said}\n{}", String::from_utf8_lossy(&output.stderr));
    // SAFETY: asks for the version of the interface, and passes no memory (landlock_create_ruleset(2)).
    let version = unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, 0, 0, 1) };
    ensure!(version < 1 || !said.contains("skipped"), "the kernel has version {version}: {said}");
    // That is what it does; and this is that a real VMM has it.
    let trace = start_trace(t)?;
    drop(Machine::boot(t, Shape::default())?);
    let expected: &[i64] = if version < 1 { &[] } else { &[0] };
    let answered = trace.finish()?.landlock;
    ensure!(answered == expected, "the kernel has version {version}, and answered {answered:?}");
    Ok(())
}

fn start_trace(t: &Test) -> Result<Trace> {
    let dir = t.scratch().join("tracing");
    fs::create_dir(&dir)?;
    Trace::start(&dir, t.id())
}

fn no_line_of_the_filters_is_there_for_nothing(t: &Test) -> Result<()> {
    let trace = start_trace(t)?;
    let began = Instant::now();
    work(t)?;
    let usage = trace.finish()?;
    eprintln!("{} calls in {:?}", usage.calls(), began.elapsed());
    let idle = usage.idle();
    ensure!(idle.is_empty(), "nobody needs\n  {}", idle.join("\n  "));
    Ok(())
}

/// Whatever a machine can do, once.
fn work(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape { vcpus: 2, memory_mib: 160, hotplug_mib: 64, ..Shape::default() })?;
    on_files(&vm)?;
    over_links(&vm)?;
    on_disks(t, &vm)?;
    on_memory(&vm)?;
    // A connection that the guest ends in one direction, and one that nobody accepts.
    ensure!(vm.block_on(vm.pod().vmm().connect(4711)).is_err());
    vm.pause()?;
    vm.resume()?;
    vm.shutdown();
    Ok(())
}

/// What differs from a file system of the host's own is said elsewhere; here it is enough to have asked.
const ON_FILES: [&[&str]; 4] = [
    &[
        "names::times_can",
        "names::fifo_carries",
        "rename::exchange",
        "links::hard_links_to",
        "links::symbolic_links_of",
    ],
    &[
        "content::holes_and",
        "content::punched",
        "content::ranges",
        "content::statfs",
        "directories::can_be_flushed",
    ],
    &["access::only_the_owner", "access::set_id_bits_go_when_another", "access::supplementary_groups"],
    &[
        "xattr::are_kept",
        "xattr::not_on_links",
        "xattr::links_need_not_have_any",
        "acl::set_group_id_goes_with_a_list_of_another_group",
    ],
];

fn on_files(vm: &Machine) -> Result<()> {
    install_program(vm)?;
    for (number, cases) in ON_FILES.iter().enumerate() {
        let names = cases.join(" ");
        let tried = vm.run(&format!("mkdir /tried{number} && fs-semantics main /tried{number} {names}"))?;
        ensure!(tried.code <= 1 && tried.stdout.lines().count() >= cases.len(), "{tried}");
    }
    vm.sh("sync; mv /tried0 /moved && rm -r /moved; umask 0; mkdir -m 777 /mode; chmod 1777 /mode").map(drop)
}

fn over_links(vm: &Machine) -> Result<()> {
    // The kernel may carry it or the VMM; both in several queues.
    for make in [Link::new, Link::with_vhost] {
        let link = make(1500, 2)?;
        link.attach(vm, FIRST_SLOT)?;
        vm.sh(&format!("ping -c 2 {}", HOST.0))?;
        vm.pause()?;
        vm.resume()?;
        vm.detach(FIRST_SLOT)?;
    }
    Ok(())
}

fn disk() -> DeviceConfig {
    DeviceConfig::Blk { read_only: false, serial: "x".into(), queues: 1, limit: RateLimit::default() }
}

fn on_disks(t: &Test, vm: &Machine) -> Result<()> {
    let script = "dd if=/dev/urandom of=/dev/vda bs=64k count=4 conv=fsync && dd if=/dev/vda of=/dev/null bs=64k count=4
                  blkdiscard /dev/vda";
    // On a disk, so with an io_uring; in memory; and a block device.
    let in_memory = File::options().read(true).write(true).create_new(true).open(t.scratch().join("disk"))?;
    in_memory.set_len(4 << 20)?;
    let device = Loop::over(&t.scratch().join("disk"))?;
    let on_device = File::options().read(true).write(true).open(device.path())?;
    for image in [&file_on_disk()?, &in_memory, &on_device] {
        vm.attach(FIRST_SLOT, disk(), &[image.as_fd()])?;
        vm.sh(script)?;
        vm.detach(FIRST_SLOT)?;
    }
    Ok(())
}

fn on_memory(vm: &Machine) -> Result<()> {
    let image = file_on_disk()?;
    let device = vm.attach(FIRST_SLOT, DeviceConfig::Pmem, &[image.as_fd()])?.context("no block device")?;
    vm.sh(&format!("dd if=/dev/{device} of=/dev/null bs=64k"))?;
    vm.detach(FIRST_SLOT)?;
    vm.attach(FIRST_SLOT, DeviceConfig::Mem, &[])?;
    for mib in [16, 0] {
        vm.block_on(vm.pod().vmm().resize_memory(mib))?;
        time::until("the guest has done as asked", || Ok(vm.state()?.plugged_mib == mib))?;
    }
    vm.attach(FIRST_SLOT + 1, DeviceConfig::Balloon { free_page_reporting: false }, &[])?;
    vm.block_on(vm.pod().vmm().set_balloon(8))?;
    time::until("the guest has done as asked", || Ok(vm.state()?.balloon_mib == 8))
}

/// A file of 4 MiB without a name on the disk of the machine the tests run on.
fn file_on_disk() -> Result<File> {
    use rustix::fs::{CWD, Mode, OFlags};
    let flags = OFlags::TMPFILE | OFlags::RDWR | OFlags::CLOEXEC;
    let file = File::from(rustix::fs::openat(CWD, "/var/tmp", flags, Mode::RUSR | Mode::WUSR)?);
    file.set_len(4 << 20)?;
    Ok(file)
}
