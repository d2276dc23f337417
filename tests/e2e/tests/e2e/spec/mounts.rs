//! `mounts`, `root` and what is at `/dev`, as far as `crate::files` does not have it.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Result, ensure};
use kvrun_e2e::{Case, Test, cases};
use rustix::mount::{MountFlags, UnmountFlags};
use serde_json::{Value, json};

use super::{capability, mount, output};

pub(crate) const CASES: &[Case] = cases![
    attributes_of_a_mount,
    attributes_undo_each_other,
    access_times,
    attributes_of_a_file_system,
    propagation_of_a_mount,
    recursively_read_only_bind_mount,
    id_mapped_bind_mount,
    tmpfs_that_copies_up,
    types_of_file_systems,
    cgroups_without_a_cgroup_namespace,
    bind_mount_of_a_file_over_a_file,
    default_devices_without_a_mount_on_dev,
    read_only_dev_has_its_devices,
    default_links,
    root_propagation,
    masked_directories_are_empty,
    unknown_option_is_named,
    option_without_effect_is_named,
];

/// The options of the mount at a path, the mount's own and then the file system's; and its propagation (proc_pid_mountinfo(5)).
fn mount_info(text: &str, path: &str) -> (String, String) {
    let line = text.lines().rfind(|line| line.split(' ').nth(4) == Some(path)).unwrap_or_default();
    let (mount, file_system) = line.split_once(" - ").unwrap_or_default();
    let fields: Vec<&str> = mount.split(' ').collect();
    let options =
        format!("{},{}", fields.get(5).unwrap_or(&""), file_system.rsplit(' ').next().unwrap_or(""));
    (options, fields.get(6..).unwrap_or_default().join(" "))
}

fn tmpfs(options: &[&str]) -> Value {
    json!({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": options})
}

/// The options and the propagation of a tmpfs with these options.
fn info_of_tmpfs(t: &Test, options: &[&str]) -> Result<(String, String)> {
    let text = output(t, "cat /proc/self/mountinfo", |spec| mount(spec, tmpfs(options)))?;
    Ok(mount_info(&text, "/mnt"))
}

fn has(options: &str, name: &str) -> bool {
    options.split(',').any(|option| option == name)
}

fn attributes_of_a_mount(t: &Test) -> Result<()> {
    let asked = ["ro", "nosuid", "nodev", "noexec", "nosymfollow", "size=1m", "mode=0700"];
    let (options, _) = info_of_tmpfs(t, &asked)?;
    for name in ["ro", "nosuid", "nodev", "noexec", "nosymfollow", "size=1024k", "mode=700"] {
        ensure!(has(&options, name), "no {name} in {options}");
    }
    Ok(())
}

fn attributes_undo_each_other(t: &Test) -> Result<()> {
    let asked = [
        "ro",
        "rw",
        "nosuid",
        "suid",
        "nodev",
        "dev",
        "noexec",
        "exec",
        "nosymfollow",
        "symfollow",
        "defaults",
    ];
    let (options, _) = info_of_tmpfs(t, &asked)?;
    for name in ["ro", "nosuid", "nodev", "noexec", "nosymfollow"] {
        ensure!(!has(&options, name), "{name} in {options}");
    }
    Ok(())
}

fn access_times(t: &Test) -> Result<()> {
    let text = output(t, "cat /proc/self/mountinfo", |spec| {
        for (name, options) in [
            ("a", json!(["noatime", "nodiratime"])),
            ("b", json!(["strictatime"])),
            ("c", json!(["noatime", "relatime"])),
            ("d", json!(["rnoatime"])),
        ] {
            mount(
                spec,
                json!({"destination": format!("/m{name}"), "type": "tmpfs", "source": "x", "options": options}),
            );
        }
    })?;
    let options = |name: &str| mount_info(&text, name).0;
    ensure!(has(&options("/ma"), "noatime") && has(&options("/ma"), "nodiratime"), "{text}");
    ensure!(!has(&options("/mb"), "noatime") && !has(&options("/mb"), "relatime"), "{text}");
    ensure!(has(&options("/mc"), "relatime") && has(&options("/md"), "noatime"), "{text}");
    Ok(())
}

fn attributes_of_a_file_system(t: &Test) -> Result<()> {
    let (options, _) =
        info_of_tmpfs(t, &["sync", "dirsync", "lazytime", "silent", "loud", "nomand", "noiversion"])?;
    for name in ["sync", "dirsync", "lazytime"] {
        ensure!(has(&options, name), "no {name} in {options}");
    }
    Ok(())
}

fn propagation_of_a_mount(t: &Test) -> Result<()> {
    let text = output(t, "cat /proc/self/mountinfo", |spec| {
        for option in ["rshared", "unbindable", "rslave", "private"] {
            mount(
                spec,
                json!({"destination": format!("/m{option}"), "type": "tmpfs", "source": "x", "options": [option]}),
            );
        }
    })?;
    let propagation = |name: &str| mount_info(&text, name).1;
    ensure!(propagation("/mrshared").starts_with("shared:"), "{text}");
    ensure!(propagation("/munbindable") == "unbindable", "{text}");
    // Nothing to be a slave of: as private.
    ensure!(propagation("/mrslave").is_empty() && propagation("/mprivate").is_empty(), "{text}");
    Ok(())
}

fn recursively_read_only_bind_mount(t: &Test) -> Result<()> {
    let shared = t.scratch().join("shared");
    let below = shared.join("below");
    fs::create_dir_all(&below)?;
    rustix::mount::mount("tmpfs", &below, c"tmpfs", MountFlags::empty(), None)?;
    let bundle = t.script("touch /mnt/file || echo refused; touch /mnt/below/file || echo refused too")?;
    let outcome = t.run(&bundle.with_bind(&shared, "/mnt", &["rbind", "rro"])?);
    let written = below.join("file").exists();
    rustix::mount::unmount(&below, UnmountFlags::empty())?;
    outcome?.exited(0).stdout("refused\nrefused too\n");
    ensure!(!written, "it was written to");
    Ok(())
}

fn id_mapped_bind_mount(t: &Test) -> Result<()> {
    let shared = t.scratch().join("shared");
    fs::create_dir(&shared)?;
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o777))?;
    fs::write(shared.join("theirs"), "")?;
    chown(shared.join("theirs"), Some(5000), Some(6000))?;
    let script = "stat -c '%u %g' /mnt/theirs; touch /mnt/ours; stat -c '%u %g' /mnt/ours";
    let text = output(t, script, |spec| {
        spec["process"]["user"] = json!({"uid": 1001, "gid": 1002});
        // What is 5000 and following on disk is 1000 and following in the mount.
        mount(
            spec,
            json!({"destination": "/mnt", "type": "bind", "source": shared, "options": ["bind", "idmap"],
            "uidMappings": [{"containerID": 0, "hostID": 0, "size": 1}, {"containerID": 5000, "hostID": 1000, "size": 100}],
            "gidMappings": [{"containerID": 0, "hostID": 0, "size": 1}, {"containerID": 6000, "hostID": 1000, "size": 100}]}),
        );
    })?;
    ensure!(text == "1000 1000\n1001 1002\n", "{text}");
    let made = fs::metadata(shared.join("ours"))?;
    ensure!((made.uid(), made.gid()) == (5001, 6002), "on the host {}:{}", made.uid(), made.gid());
    Ok(())
}

fn tmpfs_that_copies_up(t: &Test) -> Result<()> {
    let script = "cat /data/file /data/dir/deep; readlink /data/link; stat -c '%a %u' /data /data/file /own; echo new > /data/file";
    let bundle = t.script(script)?;
    let data = bundle.rootfs().join("data");
    fs::create_dir_all(data.join("dir"))?;
    fs::set_permissions(&data, fs::Permissions::from_mode(0o710))?;
    fs::write(data.join("file"), "old\n")?;
    chown(data.join("file"), Some(77), None)?;
    fs::set_permissions(data.join("file"), fs::Permissions::from_mode(0o604))?;
    fs::write(data.join("dir/deep"), "deep\n")?;
    std::os::unix::fs::symlink("/etc/passwd", data.join("link"))?;
    let bundle = bundle.with(|spec| {
        for set in ["bounding", "effective", "permitted"] {
            super::push(&mut spec["process"]["capabilities"][set], "CAP_DAC_OVERRIDE".into());
        }
        mount(
            spec,
            json!({"destination": "/data", "type": "tmpfs", "source": "x", "options": ["tmpcopyup"]}),
        );
        // What the options say goes before what the image has.
        let own = ["tmpcopyup", "mode=1777", "uid=5"];
        mount(spec, json!({"destination": "/own", "type": "tmpfs", "source": "x", "options": own}));
    })?;
    t.run(&bundle)?.exited(0).stderr("").stdout("old\ndeep\n/etc/passwd\n710 0\n604 77\n1777 5\n");
    ensure!(fs::read_to_string(data.join("file"))? == "old\n", "the host's file was changed");
    Ok(())
}

fn types_of_file_systems(t: &Test) -> Result<()> {
    let text = output(t, "cat /proc/self/mountinfo; stat -c '%a %g' /dev/pts/ptmx", |spec| {
        mount(spec, json!({"destination": "/ram", "type": "ramfs", "source": "ramfs"}));
        mount(
            spec,
            json!({"destination": "/cgroup2", "type": "cgroup2", "source": "cgroup2", "options": ["ro"]}),
        );
    })?;
    for (path, typ) in [
        ("/proc", "proc"),
        ("/sys", "sysfs"),
        ("/dev", "tmpfs"),
        ("/dev/pts", "devpts"),
        ("/dev/shm", "tmpfs"),
        ("/dev/mqueue", "mqueue"),
        ("/sys/fs/cgroup", "cgroup2"),
        ("/cgroup2", "cgroup2"),
        ("/ram", "ramfs"),
    ] {
        let line = text.lines().find(|line| line.split(' ').nth(4) == Some(path)).unwrap_or_default();
        ensure!(line.contains(&format!(" - {typ} ")), "{path} is not {typ}: {text}");
    }
    let (options, _) = mount_info(&text, "/sys");
    ensure!(has(&options, "ro") && has(&options, "nosuid") && has(&options, "noexec"), "{options}");
    let (options, _) = mount_info(&text, "/dev/pts");
    ensure!(
        has(&options, "gid=5") && has(&options, "mode=620") && has(&options, "ptmxmode=666"),
        "{options}"
    );
    Ok(())
}

fn cgroups_without_a_cgroup_namespace(t: &Test) -> Result<()> {
    let bundle = t.script("cat /sys/fs/cgroup/cgroup.procs; cat /sys/fs/cgroup/pids.max")?;
    let bundle = bundle.without_namespace("cgroup")?.with(|spec| {
        spec["linux"]["resources"]["pids"] = json!({"limit": 77});
    })?;
    let text = t.run(&bundle)?.exited(0).stderr("").text();
    ensure!(text.starts_with("1\n") && text.ends_with("\n77\n"), "not its own cgroup: {text}");
    Ok(())
}

fn bind_mount_of_a_file_over_a_file(t: &Test) -> Result<()> {
    let file = t.scratch().join("file");
    fs::write(&file, "from the host\n")?;
    let bundle = t.script("cat /etc/group")?.with_bind(&file, "/etc/group", &["bind", "ro", "private"])?;
    t.run(&bundle)?.exited(0).stderr("").stdout("from the host\n");
    Ok(())
}

fn default_devices_without_a_mount_on_dev(t: &Test) -> Result<()> {
    for with_directory in [true, false] {
        let script = "for d in null zero full random urandom tty; do test -c /dev/$d || echo no $d; done; echo > /dev/null";
        let bundle = t.script(script)?.with(|spec| {
            let mounts = spec["mounts"].as_array_mut().expect("mounts");
            mounts.retain(|mount| !mount["destination"].as_str().unwrap_or("").starts_with("/dev"));
        })?;
        if !with_directory {
            fs::remove_dir(bundle.rootfs().join("dev"))?;
        }
        // The second run finds what the first has left: nothing but the mount point.
        for _ in 0..2 {
            t.run(&bundle)?.exited(0).stdout("").stderr("");
            let left: Vec<_> = fs::read_dir(bundle.rootfs().join("dev"))?.collect();
            ensure!(left.is_empty(), "left in the root file system: {left:?}");
        }
    }
    Ok(())
}

fn read_only_dev_has_its_devices(t: &Test) -> Result<()> {
    let bundle = t.script("echo > /dev/null; touch /dev/file || echo refused")?.with(|spec| {
        for mount in spec["mounts"].as_array_mut().into_iter().flatten() {
            if mount["destination"] == "/dev" {
                mount["options"] = json!(["nosuid", "ro", "mode=755"]);
            }
        }
    })?;
    t.run(&bundle)?.exited(0).stdout("refused\n");
    Ok(())
}

fn default_links(t: &Test) -> Result<()> {
    let text = output(
        t,
        "cd /dev; for l in fd stdin stdout stderr ptmx; do readlink $l; done; echo through > /dev/stdout",
        |_| {},
    )?;
    let expected = "/proc/self/fd\n/proc/self/fd/0\n/proc/self/fd/1\n/proc/self/fd/2\npts/ptmx\nthrough\n";
    ensure!(text == expected, "{text}");
    Ok(())
}

fn root_propagation(t: &Test) -> Result<()> {
    for (asked, seen) in [("unbindable", "unbindable"), ("rslave", ""), ("rprivate", "")] {
        let text =
            output(t, "cat /proc/self/mountinfo", |spec| spec["linux"]["rootfsPropagation"] = json!(asked))?;
        let (_, propagation) = mount_info(&text, "/");
        ensure!(propagation == seen, "{asked}: {propagation:?} in {text}");
    }
    Ok(())
}

fn masked_directories_are_empty(t: &Test) -> Result<()> {
    let script = "ls -A /etc | wc -l; cat /bin/true | wc -c; touch /etc/x || echo refused";
    let bundle = t.script(script)?.with(|spec| {
        capability(spec, "CAP_DAC_OVERRIDE");
        spec["linux"]["maskedPaths"] = json!(["/etc", "/not/there", "/root"]);
        spec["linux"]["readonlyPaths"] = json!(["/tmp", "/not/there"]);
    })?;
    let text = t.run(&bundle)?.exited(0).text();
    ensure!(text.starts_with("0\n") && text.ends_with("refused\n"), "{text}");
    let bundle = t.script("touch /tmp/x || echo refused")?.with(|spec| {
        spec["linux"]["readonlyPaths"] = json!(["/tmp", "/not/there"]);
    })?;
    t.run(&bundle)?.exited(0).stdout("refused\n");
    ensure!(!Path::new(&bundle.rootfs().join("tmp/x")).exists(), "it was written to");
    Ok(())
}

fn unknown_option_is_named(t: &Test) -> Result<()> {
    let bundle = t.bundle(&["/bin/true"])?.with(|spec| mount(spec, tmpfs(&["flavour=vanilla"])))?;
    t.run(&bundle)?.failed().stdout("").error(&["mounts[7]", "/mnt", "flavour"]);
    Ok(())
}

fn option_without_effect_is_named(t: &Test) -> Result<()> {
    let bundle = t.bundle(&["/bin/true"])?.with_bind(&t.scratch(), "/mnt", &["bind", "dirsync"])?;
    t.run(&bundle)?.failed().stdout("").error(&["mounts[7].options", "dirsync"]);
    let bundle = t.bundle(&["/bin/true"])?.with(|spec| mount(spec, tmpfs(&["remount"])))?;
    t.run(&bundle)?.failed().stdout("").error(&["mounts[7].options", "remount"]);
    Ok(())
}
