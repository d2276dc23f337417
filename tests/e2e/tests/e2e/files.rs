//! The root file system and bind mounts: the host's files, with the access the spec gives.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::Path;

use anyhow::{Result, ensure};
use kvrun_e2e::{Case, Test, cases};
use serde_json::json;

pub(crate) const CASES: &[Case] = cases![
    root_file_system_is_the_bundles,
    written_files_have_their_owner_and_mode_on_the_host,
    every_kind_of_file_can_be_made,
    readonly_root_refuses_writes,
    bound_directory_is_shared_both_ways,
    bound_directory_can_be_read_only,
    bound_file_is_shared_both_ways,
    bound_file_can_be_read_only,
    mount_points_are_made,
    tmpfs_stays_in_the_guest,
    link_in_the_root_file_system_does_not_lead_to_the_host,
];

fn root_file_system_is_the_bundles(t: &Test) -> Result<()> {
    let bundle = t.script("cat /mark; rm /mark; echo from inside > /made")?;
    fs::write(bundle.rootfs().join("mark"), "from outside\n")?;
    t.run(&bundle)?.exited(0).stdout("from outside\n").stderr("");
    ensure!(!bundle.rootfs().join("mark").exists(), "/mark was not removed");
    ensure!(fs::read_to_string(bundle.rootfs().join("made"))? == "from inside\n", "/made has other content");
    Ok(())
}

/// Type and permission bits, owner and group.
fn identity(path: &Path) -> Result<(u32, u32, u32)> {
    let metadata = path.symlink_metadata()?;
    Ok((metadata.mode() & 0o7777, metadata.uid(), metadata.gid()))
}

fn written_files_have_their_owner_and_mode_on_the_host(t: &Test) -> Result<()> {
    let bundle =
        t.script("umask 027; echo data > /tmp/file; mkdir /tmp/dir; echo > /tmp/tool; chmod 4755 /tmp/tool")?;
    fs::set_permissions(bundle.rootfs().join("tmp"), fs::Permissions::from_mode(0o1777))?;
    let bundle = bundle.with(|spec| spec["process"]["user"] = json!({"uid": 1000, "gid": 1001}))?;
    t.run(&bundle)?.exited(0).stdout("").stderr("");
    let tmp = bundle.rootfs().join("tmp");
    ensure!(identity(&tmp.join("file"))? == (0o640, 1000, 1001), "file: {:?}", identity(&tmp.join("file"))?);
    ensure!(identity(&tmp.join("dir"))? == (0o750, 1000, 1001), "dir: {:?}", identity(&tmp.join("dir"))?);
    ensure!(identity(&tmp.join("tool"))? == (0o4755, 1000, 1001), "tool: {:?}", identity(&tmp.join("tool"))?);
    ensure!(fs::read_to_string(tmp.join("file"))? == "data\n", "file has other content");
    Ok(())
}

fn every_kind_of_file_can_be_made(t: &Test) -> Result<()> {
    let script = "cd /tmp; echo data > file; ln file hard; ln -s file soft; mkfifo fifo; truncate -s 1000000 sparse
        mv file moved; cat soft 2>/dev/null || echo dangling; ls -l | tail -n +2 | cut -c1 | sort | tr -d '\\n'";
    let bundle = t.script(script)?;
    t.run(&bundle)?.exited(0).stdout("dangling\n---lp").stderr("");
    let tmp = bundle.rootfs().join("tmp");
    ensure!(fs::metadata(tmp.join("moved"))?.nlink() == 2, "the hard link is none");
    ensure!(fs::read_link(tmp.join("soft"))? == Path::new("file"), "the symbolic link leads elsewhere");
    ensure!(fs::metadata(tmp.join("sparse"))?.len() == 1_000_000, "the sparse file has another size");
    Ok(())
}

fn readonly_root_refuses_writes(t: &Test) -> Result<()> {
    let bundle =
        t.script("touch /file || echo refused; mount -o remount,rw / 2>/dev/null || echo refused again")?;
    let bundle = bundle.with(|spec| spec["root"]["readonly"] = json!(true))?;
    let outcome = t.run(&bundle)?.exited(0).stdout("refused\nrefused again\n");
    ensure!(outcome.stderr.contains("Read-only file system"), "{outcome}");
    ensure!(!bundle.rootfs().join("file").exists(), "the file is there");
    Ok(())
}

fn bound_directory_is_shared_both_ways(t: &Test) -> Result<()> {
    let shared = t.scratch();
    fs::write(shared.join("in"), "from outside\n")?;
    fs::set_permissions(&shared, fs::Permissions::from_mode(0o777))?;
    let bundle = t.script("cat /mnt/in; echo from inside > /mnt/out; chmod 604 /mnt/out")?;
    let bundle = bundle.with(|spec| spec["process"]["user"] = json!({"uid": 77, "gid": 88}))?;
    let bundle = bundle.with_bind(&shared, "/mnt", &["rbind", "rw"])?;
    t.run(&bundle)?.exited(0).stdout("from outside\n").stderr("");
    ensure!(fs::read_to_string(shared.join("out"))? == "from inside\n", "out has other content");
    ensure!(identity(&shared.join("out"))? == (0o604, 77, 88), "out: {:?}", identity(&shared.join("out"))?);
    Ok(())
}

fn bound_directory_can_be_read_only(t: &Test) -> Result<()> {
    let shared = t.scratch();
    fs::write(shared.join("in"), "from outside\n")?;
    let bundle = t.script("cat /mnt/in; echo x > /mnt/in || echo refused; rm /mnt/in || echo refused too")?;
    let bundle = bundle.with_bind(&shared, "/mnt", &["rbind", "ro"])?;
    let outcome = t.run(&bundle)?.exited(0).stdout("from outside\nrefused\nrefused too\n");
    ensure!(outcome.stderr.contains("Read-only file system"), "{outcome}");
    ensure!(fs::read_to_string(shared.join("in"))? == "from outside\n", "in was changed");
    Ok(())
}

fn bound_file_is_shared_both_ways(t: &Test) -> Result<()> {
    let file = t.scratch().join("file");
    fs::write(&file, "from outside\n")?;
    fs::write(t.scratch().join("other"), "secret\n")?;
    chown(&file, Some(77), Some(88))?;
    let bundle =
        t.script("cat /etc/bound; stat -c '%u %g' /etc/bound; echo from inside > /etc/bound; ls /etc")?;
    let bundle = bundle.with(|spec| spec["process"]["user"] = json!({"uid": 77, "gid": 88}))?;
    let bundle = bundle.with_bind(&file, "/etc/bound", &["bind", "rw"])?;
    t.run(&bundle)?.exited(0).stdout("from outside\n77 88\nbound\ngroup\npasswd\n").stderr("");
    ensure!(fs::read_to_string(&file)? == "from inside\n", "the file has other content");
    Ok(())
}

fn bound_file_can_be_read_only(t: &Test) -> Result<()> {
    let file = t.scratch().join("file");
    fs::write(&file, "from outside\n")?;
    let bundle = t.script("cat /etc/bound; echo x > /etc/bound || echo refused")?;
    let bundle = bundle.with_bind(&file, "/etc/bound", &["bind", "ro"])?;
    let outcome = t.run(&bundle)?.exited(0).stdout("from outside\nrefused\n");
    ensure!(outcome.stderr.contains("Read-only file system"), "{outcome}");
    ensure!(fs::read_to_string(&file)? == "from outside\n", "the file was changed");
    Ok(())
}

fn mount_points_are_made(t: &Test) -> Result<()> {
    let file = t.scratch().join("file");
    fs::write(&file, "content\n")?;
    let bundle = t.script("cat /new/place/file; ls -d /new/dir")?;
    let bundle = bundle.with_bind(&file, "/new/place/file", &["bind", "ro"])?;
    let bundle = bundle.with_bind(&t.scratch(), "/new/dir", &["rbind", "ro"])?;
    t.run(&bundle)?.exited(0).stdout("content\n/new/dir\n").stderr("");
    Ok(())
}

fn tmpfs_stays_in_the_guest(t: &Test) -> Result<()> {
    let bundle = t.script("echo x > /tmp/file; stat -f -c %T /tmp; stat -c %a /tmp")?.with(|spec| {
        let mount = json!({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=1770"]});
        spec["mounts"].as_array_mut().expect("an array").push(mount);
    })?;
    t.run(&bundle)?.exited(0).stdout("tmpfs\n1770\n").stderr("");
    ensure!(!bundle.rootfs().join("tmp/file").exists(), "the file is on the host");
    Ok(())
}

fn link_in_the_root_file_system_does_not_lead_to_the_host(t: &Test) -> Result<()> {
    // The container's own /scratch is what such a path means in the container, and there is none.
    let secret = t.scratch().join("secret");
    fs::write(&secret, "secret\n")?;
    let bundle = t.script("cat /link || echo not there")?;
    std::os::unix::fs::symlink(&secret, bundle.rootfs().join("link"))?;
    t.run(&bundle)?.exited(0).stdout("not there\n");

    // Nor is a mount point that such a link stands for made on the host. Whether it is made in the container or refused is
    // the OCI engine's choice; runc and crun differ.
    let outside = t.scratch().join("outside");
    fs::create_dir(&outside)?;
    let bundle = t.script("ls -A /away")?;
    std::os::unix::fs::symlink(&outside, bundle.rootfs().join("away"))?;
    let outcome = t.run(&bundle.with_bind(&secret, "/away/secret", &["bind", "ro"])?)?;
    ensure!(fs::read_dir(&outside)?.next().is_none(), "a mount point was made on the host: {outcome}");
    Ok(())
}
