//! Shared directories: what programs find there, and what the host and the guest see of each other.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Result, ensure};
use kvrun_e2e::vm::{FIRST_SLOT, Machine, Shape};
use kvrun_e2e::{Case, Test, cases, time};
use kvrun_vmm_api::{DeviceConfig, FsCache};

pub(crate) const CASES: &[Case] = cases![
    names_and_links_are_those_of_a_file_system,
    directories_are_those_of_a_file_system,
    content_is_that_of_a_file_system,
    users_and_rights_are_those_of_a_file_system,
    processes_share_it_as_a_file_system,
    nothing_changes_without_a_cache,
    nothing_changes_with_all_caches,
    full_file_system_is_full_for_the_guest,
    directory_of_100_000_files_is_complete,
    files_without_a_name_are_refused,
    device_nodes_are_refused,
    several_shares_are_apart,
    read_only_share_is_read_only,
    host_sees_what_the_guest_has_mapped,
    guest_sees_what_the_host_changes,
    locks_are_not_the_hosts,
    later_mounts_appear,
    pause_loses_nothing,
    descriptors_follow_what_the_guest_has_in_its_caches,
    what_is_done_is_counted,
];

/// The program that knows what a file system does.
const PROGRAM: &str = "fs-semantics";
/// Where the agent mounts: each share by its tag.
const MOUNTS: &str = "/run/kvrun";
/// The usual caching.
const AUTO: (FsCache, bool) = (FsCache::Auto, false);

/// A machine with a share of its own, `data`.
struct Guest {
    vm: Machine,
    /// The directory on the host.
    dir: PathBuf,
}

impl Guest {
    fn boot(t: &Test, caching: (FsCache, bool)) -> Result<Self> {
        let vm = Machine::boot(t, Shape::default())?;
        let dir = share(&vm, FIRST_SLOT, "data", false, caching)?;
        Ok(Self { vm, dir })
    }

    /// Has the program try out a group, or those of its cases that are named, in the guest and on the host's own file system. In the
    /// guest, those in `different` must fail, and no others.
    fn compare(&self, group: &str, cases: &[&str], different: &[&str]) -> Result<()> {
        let program = install_program(&self.vm)?;
        let on_host = self.dir.join("on-host");
        fs::create_dir_all(&on_host)?;
        let output = Command::new(&program).arg(group).arg(&on_host).args(cases).output()?;
        let said = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "on the host:\n{said}");

        let in_guest = self.vm.run(&format!(
            "mkdir -p /run/kvrun/data/in-guest && fs-semantics {group} /run/kvrun/data/in-guest {}",
            cases.join(" ")
        ))?;
        ensure!(in_guest.code <= 1, "{in_guest}");
        let failed: BTreeSet<_> = in_guest
            .stdout
            .lines()
            .filter_map(|line| line.strip_prefix("FAILED ")?.split(": ").next())
            .collect();
        let good = in_guest.stdout.lines().filter(|line| line.starts_with("ok ")).count();
        ensure!(good + failed.len() == said.lines().count(), "{in_guest}");
        ensure!(good + failed.len() > 0, "no case was tried: {in_guest}");
        ensure!(failed == different.iter().copied().collect(), "{in_guest}");
        Ok(())
    }
}

/// Installs that program, which guests find by its name from then on.
pub(super) fn install_program(vm: &Machine) -> Result<PathBuf> {
    let installed = vm.rootfs().join("bin").join(PROGRAM);
    if !installed.exists() {
        vm.install(program()?)?;
    }
    Ok(installed)
}

/// Where it is on the host: where it has been copied with this one, or where it has been built.
pub(crate) fn program() -> Result<PathBuf> {
    let copied = std::env::current_exe()?.with_file_name(PROGRAM);
    let built = Path::new(env!("CARGO_BIN_EXE_fs-semantics"));
    Ok(if copied.exists() { copied } else { built.to_owned() })
}

/// Puts a directory of the machine's share, made here, into a slot, and has the guest mount it below [`MOUNTS`], for
/// all scripts; the directory.
fn share(vm: &Machine, slot: u8, tag: &str, read_only: bool, caching: (FsCache, bool)) -> Result<PathBuf> {
    let dir = attach(vm, slot, tag, read_only, caching)?;
    vm.block_on(vm.pod().agent().mount_virtiofs(tag, &format!("{MOUNTS}/{tag}")))?;
    Ok(dir)
}

/// The same without mounting it.
fn attach(vm: &Machine, slot: u8, tag: &str, read_only: bool, caching: (FsCache, bool)) -> Result<PathBuf> {
    let dir = vm.rootfs().with_file_name(tag);
    if !dir.exists() {
        fs::create_dir(&dir)?;
    }
    let (cache, writeback) = caching;
    let device =
        DeviceConfig::Fs { directory: tag.to_owned(), tag: tag.to_owned(), read_only, cache, writeback };
    vm.attach(slot, device, &[])?;
    Ok(dir)
}

fn names_and_links_are_those_of_a_file_system(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, AUTO)?;
    guest.compare("main", &["rename::", "links::"], &[])?;
    guest.compare("main", &["names::"], &[])
}

fn directories_are_those_of_a_file_system(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, AUTO)?;
    let (some, others) = (["lists_", "tells_", "stays_"], ["can_be_", "two_", "cannot_"]);
    for cases in [some, others].map(|names| names.map(|name| format!("directories::{name}"))) {
        guest.compare("main", &cases.each_ref().map(String::as_str), &[])?;
    }
    Ok(())
}

fn content_is_that_of_a_file_system(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, AUTO)?;
    guest.compare("main", &["content::"], &[])?;
    guest.compare("main", &["mapping::"], &[])
}

fn users_and_rights_are_those_of_a_file_system(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, AUTO)?;
    guest.compare("main", &["access::"], ROOT_WRITES)?;
    guest.compare("main", &["acl::"], &[])?;
    guest.compare("main", &["xattr::"], TRUSTED)
}

/// The host's kernel leaves these bits only to a writer with a privilege that the VMM in its jail does not have.
const ROOT_WRITES: &[&str] = &["access::set_id_bits_stay_when_root_writes"];
/// The host's kernel keeps these attributes for privileges that the VMM in its jail does not have.
const TRUSTED: &[&str] = &["xattr::not_on_links_and_special_files", "xattr::of_trust_are_for_root"];

fn processes_share_it_as_a_file_system(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, AUTO)?;
    guest.compare("main", &["writers::", "locks::"], &[])
}

fn nothing_changes_without_a_cache(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, (FsCache::Never, false))?;
    guest.compare("main", &["content::", "mapping::"], &[])?;
    guest.compare("main", &["writers::", "rename::"], &[])
}

fn nothing_changes_with_all_caches(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, (FsCache::Always, true))?;
    guest.compare("main", &["content::", "mapping::", "writers::"], &[])?;
    guest.compare("main", &["rename::", "access::"], ROOT_WRITES)
}

fn full_file_system_is_full_for_the_guest(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, AUTO)?;
    let mut small = Vec::new();
    for place in ["on-host", "in-guest"] {
        fs::create_dir(guest.dir.join(place))?;
        let (on, options) = (guest.dir.join(place), Some(c"size=4m,nr_inodes=300"));
        rustix::mount::mount("small", &on, "tmpfs", rustix::mount::MountFlags::empty(), options)?;
        small.push(Mounted(on));
    }
    guest.compare("small", &[], &[])
}

fn directory_of_100_000_files_is_complete(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, AUTO)?;
    // Made on the host for both: the guest would take minutes, where it is emulated.
    fs::create_dir(guest.dir.join("in-guest"))?;
    let program = install_program(&guest.vm)?;
    fs::create_dir(guest.dir.join("on-host"))?;
    for place in ["on-host", "in-guest"] {
        let made = Command::new(&program).arg("make-large").arg(guest.dir.join(place)).status()?;
        ensure!(made.success(), "{made}");
    }
    guest.compare("large", &[], &[])
}

fn files_without_a_name_are_refused(t: &Test) -> Result<()> {
    // As a file system may: programs then make one with a name and remove that.
    let guest = Guest::boot(t, AUTO)?;
    guest.compare(
        "tmpfile",
        &[],
        &["tmpfile::has_no_name_until_it_is_given_one", "tmpfile::exclusive_one_never_gets_one"],
    )?;
    let said = guest.vm.run("fs-semantics tmpfile /run/kvrun/data")?.stdout;
    ensure!(said.matches("Operation not supported").count() == 2, "{said}");
    Ok(())
}

fn device_nodes_are_refused(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, AUTO)?;
    for node in ["c 1 3", "b 8 0"] {
        let done = guest.vm.run(&format!("mknod /run/kvrun/data/node {node}"))?;
        ensure!(done.code == 1 && done.stderr.contains("Operation not permitted"), "{done}");
    }
    ensure!(fs::read_dir(&guest.dir)?.next().is_none());
    // One that is there, and in containers' images some are, is seen and leads nowhere but to what the guest has itself.
    let made = Command::new("mknod").arg(guest.dir.join("null")).args(["c", "1", "3"]).status()?;
    ensure!(made.success());
    ensure!(
        guest.vm.sh("stat -c '%F %t %T' /run/kvrun/data/null; echo gone > /run/kvrun/data/null; cat /run/kvrun/data/null")?
            == "character special file 1 3\n"
    );
    Ok(())
}

fn several_shares_are_apart(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape::default())?;
    let settings = [("one", AUTO), ("two", (FsCache::Never, false)), ("three", (FsCache::Always, true))];
    for (slot, (tag, caching)) in (FIRST_SLOT..).zip(settings) {
        let dir = attach(&vm, slot, tag, false, caching)?;
        // What is mounted goes with the script; what is kept back is then written.
        let script =
            format!("mount -t virtiofs {tag} /mnt && echo {tag} > /mnt/file && cat /mnt/file && ls /mnt");
        ensure!(vm.sh(&script)? == format!("{tag}\nfile\n"));
        ensure!(fs::read_to_string(dir.join("file"))? == format!("{tag}\n"));
    }
    // One goes, while another is in use; it may come again.
    let mut user =
        vm.start("mount -t virtiofs one /mnt && exec 3</mnt/file && echo open; read line; cat <&3")?;
    user.until("open\n")?;
    vm.detach(FIRST_SLOT + 1)?;
    let gone = vm.run("mount -t virtiofs two /mnt")?;
    ensure!(gone.code != 0, "{gone}");
    attach(&vm, FIRST_SLOT + 1, "two", true, AUTO)?;
    ensure!(vm.sh("mount -t virtiofs two /mnt && cat /mnt/file")? == "two\n");
    user.write("go on\n")?;
    let done = user.wait()?;
    ensure!(done.code == 0 && done.stdout == "open\none\n", "{done}");
    Ok(())
}

fn read_only_share_is_read_only(t: &Test) -> Result<()> {
    let vm = Machine::boot(t, Shape::default())?;
    let dir = attach(&vm, FIRST_SLOT, "data", true, (FsCache::Auto, true))?;
    fs::write(dir.join("file"), "content\n")?;
    let script = "mount -t virtiofs data /mnt && cd /mnt && cat file
        for try in 'echo x > file' 'echo x > new' 'rm file' 'mkdir dir' 'chmod 777 file' 'mv file other' 'ln file hard' \
            'touch file' 'mkfifo fifo' 'truncate -s 1 file'; do
            sh -c \"$try\" 2>/dev/null && echo \"done: $try\"
        done; cat file";
    ensure!(vm.sh(script)? == "content\ncontent\n");
    ensure!(fs::read_dir(&dir)?.count() == 1 && fs::read_to_string(dir.join("file"))? == "content\n");
    Ok(())
}

fn host_sees_what_the_guest_has_mapped(t: &Test) -> Result<()> {
    // This case maps a file, and leaves through msync what must then be seen outside.
    let guest = Guest::boot(t, (FsCache::Always, true))?;
    guest.compare("main", &["mapping::shared_mapping_is_the_file"], &[])?;
    let mut script = guest.vm.start(
        "cp /bin/fs-semantics /run/kvrun/data/held && exec fs-semantics map-and-hold /run/kvrun/data/held",
    )?;
    script.until("mapped\n")?;
    ensure!(!fs::read(guest.dir.join("held"))?.starts_with(b"from a mapping"));
    script.write("flush\n")?;
    script.until("flushed\n")?;
    ensure!(fs::read(guest.dir.join("held"))?.starts_with(b"from a mapping"), "the host does not see it");
    script.write("end\n")?;
    let done = script.wait()?;
    ensure!(done.code == 0, "{done}");
    Ok(())
}

fn guest_sees_what_the_host_changes(t: &Test) -> Result<()> {
    // Without caches at once; with the usual ones after a second at most; with all of them whenever the guest has reason to ask.
    for (tag, caching, script) in [
        ("never", (FsCache::Never, false), "cat $dir/file; ls $dir"),
        ("auto", AUTO, "until [ \"$(cat $dir/file)\" = two ]; do :; done; cat $dir/file; ls $dir"),
    ] {
        let vm = Machine::boot(t, Shape::default())?;
        let dir = share(&vm, FIRST_SLOT, tag, false, caching)?;
        fs::write(dir.join("file"), "one\n")?;
        let sh = |script: &str| vm.sh(&format!("dir={MOUNTS}/{tag}; {script}"));
        ensure!(sh("cat $dir/file; ls $dir")? == "one\nfile\n");
        fs::write(dir.join("new"), "")?;
        fs::write(dir.join("file"), "two\n")?;
        ensure!(sh(script)? == "two\nfile\nnew\n", "{tag}");
        // As Kubernetes updates a volume: a link changes from one directory to another.
        for (target, content) in [("a", "first\n"), ("b", "second\n")] {
            fs::create_dir(dir.join(target))?;
            fs::write(dir.join(target).join("key"), content)?;
        }
        std::os::unix::fs::symlink("a", dir.join("..data"))?;
        sh("until [ \"$(cat $dir/..data/key)\" = first ]; do :; done")?;
        std::os::unix::fs::symlink("b", dir.join("..new"))?;
        fs::rename(dir.join("..new"), dir.join("..data"))?;
        sh("until [ \"$(cat $dir/..data/key)\" = second ]; do :; done")?;
    }
    Ok(())
}

fn locks_are_not_the_hosts(t: &Test) -> Result<()> {
    // Documented: locks of the guest are between its own processes.
    let guest = Guest::boot(t, AUTO)?;
    fs::write(guest.dir.join("file"), "")?;
    let held = fs::File::open(guest.dir.join("file"))?;
    rustix::fs::flock(&held, rustix::fs::FlockOperation::LockExclusive)?;
    guest.vm.install("/usr/bin/flock")?;
    guest.vm.sh("flock -n /run/kvrun/data/file echo locked")?;
    Ok(())
}

fn later_mounts_appear(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, AUTO)?;
    fs::create_dir(guest.dir.join("late"))?;
    ensure!(
        guest.vm.sh("ls -A /run/kvrun/data/late; cd /run/kvrun/data/late; echo under > file; cat file")?
            == "under\n"
    );
    let volume = t.scratch().join("volume");
    fs::create_dir(&volume)?;
    fs::write(volume.join("in"), "from the volume\n")?;
    rustix::mount::mount_bind(&volume, guest.dir.join("late"))?;
    let mounted = Mounted(guest.dir.join("late"));
    let look = "until [ -e /run/kvrun/data/late/in ]; do :; done; cat /run/kvrun/data/late/in; echo from the guest > /run/kvrun/data/late/out";
    ensure!(guest.vm.sh(look)? == "from the volume\n");
    ensure!(fs::read_to_string(volume.join("out"))? == "from the guest\n");
    // A file system of its own is one in the guest too.
    ensure!(
        guest
            .vm
            .sh("[ $(stat -c %d /run/kvrun/data/late/in) != $(stat -c %d /run/kvrun/data) ] || echo same")?
            == ""
    );
    guest.vm.sh("echo 2 > /proc/sys/vm/drop_caches")?;
    drop(mounted);
    ensure!(
        guest.vm.sh("until [ -e /run/kvrun/data/late/file ]; do :; done; cat /run/kvrun/data/late/file")?
            == "under\n"
    );
    Ok(())
}

fn pause_loses_nothing(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, AUTO)?;
    let script = guest.vm.start(
        "cd /run/kvrun/data; for i in $(seq 15); do
            dd if=/dev/urandom of=a bs=16k count=4 2>/dev/null && cp a b && cmp a b && mv b c && cat c | cmp - a || exit 1
            echo $i
        done",
    )?;
    for round in [1, 4, 7, 10] {
        script.until(&format!("{round}\n"))?;
        guest.vm.pause()?;
        // Held at a place where requests were under way; nothing happens to the files meanwhile.
        let before = state_of(&guest.dir)?;
        let again = state_of(&guest.dir)?;
        ensure!(before == again, "{before:?} {again:?}");
        guest.vm.resume()?;
    }
    let done = script.wait()?;
    ensure!(done.code == 0 && done.stdout.ends_with("15\n"), "{done}");
    Ok(())
}

/// Names, sizes and times of change.
fn state_of(dir: &Path) -> Result<Vec<(String, u64, i64)>> {
    let mut state = fs::read_dir(dir)?
        .map(|entry| {
            let entry = entry?;
            let metadata = entry.metadata()?;
            Ok((entry.file_name().to_string_lossy().into_owned(), metadata.len(), metadata.ctime_nsec()))
        })
        .collect::<Result<Vec<_>>>()?;
    state.sort();
    Ok(state)
}

fn descriptors_follow_what_the_guest_has_in_its_caches(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, AUTO)?;
    for directory in 0..20 {
        let dir = guest.dir.join(directory.to_string());
        fs::create_dir(&dir)?;
        for file in 0..100 {
            fs::write(dir.join(file.to_string()), "")?;
        }
    }
    let held = || -> Result<usize> {
        let mut most = 0;
        for (pid, _) in t.vmms()? {
            most = most.max(fs::read_dir(format!("/proc/{pid}/fd"))?.count());
        }
        Ok(most)
    };
    let walk = |dir: &str| {
        guest.vm.sh(&format!("find /run/kvrun/data/{dir} -type f -exec stat -c %s {{}} + | wc -l"))
    };
    // Once before, for the programs of the walk have descriptors, too.
    walk("0")?;
    let before = held()? - 101;
    walk(".")?;
    // One for each, once it has heard of the directories that find has closed: the guest tells it so when it has time.
    let mut walked = 0;
    time::until("the host holds a descriptor for each file", || {
        walked = held()?;
        Ok(walked <= before + 2_030)
    })?;
    // What the guest forgets, the host closes.
    guest.vm.sh("echo 2 > /proc/sys/vm/drop_caches; ls /run/kvrun/data >/dev/null")?;
    let after = held()?;
    ensure!(after <= before + 60, "{before}, then {walked}, then {after}");
    Ok(())
}

fn what_is_done_is_counted(t: &Test) -> Result<()> {
    let guest = Guest::boot(t, AUTO)?;
    let count = |name| guest.vm.counter(FIRST_SLOT, name);
    let before = (count("requests")?, count("errors")?, count("bytes_read")?, count("bytes_written")?);
    guest
        .vm
        .sh("dd if=/dev/zero of=/run/kvrun/data/file bs=100k count=10 2>/dev/null; echo 3 > /proc/sys/vm/drop_caches")?;
    guest.vm.sh("cat /run/kvrun/data/file > /dev/null; cat /run/kvrun/data/missing 2>/dev/null || true")?;
    let after = (count("requests")?, count("errors")?, count("bytes_read")?, count("bytes_written")?);
    ensure!(after.0 > before.0 + 4 && after.1 > before.1, "{before:?} {after:?}");
    // Linux reads whole pages, and no further than the file goes.
    ensure!(after.2 - before.2 == 1_024_000 && after.3 - before.3 == 1_024_000, "{before:?} {after:?}");
    Ok(())
}

/// Something mounted, from where it propagates into the jail; unmounted when dropped.
struct Mounted(PathBuf);

impl Drop for Mounted {
    fn drop(&mut self) {
        // Lazily, for a guest may still be in it; what is left of it then is reported as a leak.
        let _ = rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH);
    }
}
