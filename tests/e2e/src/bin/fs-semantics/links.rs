//! Hard links, symbolic links, and files without a name.

use std::fs::{self, create_dir, hard_link};
use std::os::unix::fs::{FileExt, MetadataExt, symlink};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{AtFlags, FileType, Mode, OFlags, linkat, openat, readlinkat, unlinkat};
use rustix::io::Errno;

use crate::sys::{content, file, list, make_node, refused};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![
    hard_links_are_one_file,
    hard_links_to_links_fifos_and_sockets,
    hard_link_refuses_directories_and_what_exists,
    open_file_can_be_linked_by_its_descriptor,
    many_hard_links,
    symbolic_links_of_every_length,
    symbolic_link_is_not_followed_when_asked_so,
    symbolic_links_in_a_circle,
    unlinked_open_file_lives_on,
    unlinked_name_can_be_made_anew,
    path_descriptor_outlives_the_name,
    rmdir_takes_only_empty_directories,
    removed_directory_can_be_held_but_not_used,
];

fn hard_links_are_one_file(dir: &Path) -> Result<()> {
    let (one, other) = (dir.join("one"), dir.join("other"));
    file(&one, b"x")?;
    create_dir(dir.join("dir"))?;
    hard_link(&one, &other)?;
    hard_link(&other, dir.join("dir/third"))?;
    let (a, b) = (one.metadata()?, dir.join("dir/third").metadata()?);
    ensure!(a.ino() == b.ino() && a.nlink() == 3 && b.nlink() == 3);
    fs::write(&one, "longer")?;
    ensure!(fs::read(&other)? == b"longer");
    crate::sys::chmod(&other, 0o600)?;
    ensure!(crate::sys::mode(&one)? == 0o600);
    fs::remove_file(&one)?;
    ensure!(other.metadata()?.nlink() == 2 && fs::read(&other)? == b"longer");
    Ok(())
}

fn hard_links_to_links_fifos_and_sockets(dir: &Path) -> Result<()> {
    symlink("nowhere", dir.join("link"))?;
    make_node(&dir.join("fifo"), FileType::Fifo)?;
    make_node(&dir.join("socket"), FileType::Socket)?;
    for name in ["link", "fifo", "socket"] {
        let linked = dir.join(format!("{name}2"));
        hard_link(dir.join(name), &linked)?;
        let (a, b) = (dir.join(name).symlink_metadata()?, linked.symlink_metadata()?);
        ensure!(a.ino() == b.ino() && b.nlink() == 2 && a.file_type() == b.file_type(), "{name}");
    }
    Ok(())
}

fn hard_link_refuses_directories_and_what_exists(dir: &Path) -> Result<()> {
    create_dir(dir.join("dir"))?;
    file(&dir.join("one"), b"")?;
    file(&dir.join("other"), b"")?;
    refused(hard_link(dir.join("dir"), dir.join("new")), Errno::PERM)?;
    refused(hard_link(dir.join("one"), dir.join("other")), Errno::EXIST)?;
    refused(hard_link(dir.join("one"), dir.join("dir")), Errno::EXIST)?;
    refused(hard_link(dir.join("missing"), dir.join("new")), Errno::NOENT)?;
    ensure!(list(dir)? == ["dir", "one", "other"]);
    Ok(())
}

fn open_file_can_be_linked_by_its_descriptor(dir: &Path) -> Result<()> {
    let open = file(&dir.join("name"), b"x")?;
    linkat(&open, "", rustix::fs::CWD, dir.join("new"), AtFlags::EMPTY_PATH)?;
    ensure!(open.metadata()?.nlink() == 2 && fs::read(dir.join("new"))? == b"x");
    // But not once it has no name.
    fs::remove_file(dir.join("name"))?;
    fs::remove_file(dir.join("new"))?;
    refused(linkat(&open, "", rustix::fs::CWD, dir.join("new"), AtFlags::EMPTY_PATH), Errno::NOENT)
}

fn many_hard_links(dir: &Path) -> Result<()> {
    let open = file(&dir.join("0"), b"")?;
    for i in 1..100 {
        hard_link(dir.join("0"), dir.join(i.to_string()))?;
    }
    ensure!(open.metadata()?.nlink() == 100 && list(dir)?.len() == 100);
    for i in 0..99 {
        fs::remove_file(dir.join(i.to_string()))?;
    }
    ensure!(open.metadata()?.nlink() == 1);
    Ok(())
}

fn symbolic_links_of_every_length(dir: &Path) -> Result<()> {
    for length in [1, 59, 60, 61, 255, 256, 1023, 4094, 4095] {
        let path = dir.join(length.to_string());
        let target = "t/".repeat(length / 2) + &"x".repeat(length % 2);
        symlink(&target, &path)?;
        ensure!(fs::read_link(&path)?.as_os_str().len() == length, "{length}");
        ensure!(fs::read_link(&path)? == Path::new(&target), "{length}");
        ensure!(path.symlink_metadata()?.size() == length as u64, "{length}");
    }
    refused(symlink("x".repeat(4096), dir.join("4096")), Errno::NAMETOOLONG)?;
    refused(symlink("", dir.join("0")), Errno::NOENT)?;
    refused(symlink("x", dir.join("1")), Errno::EXIST)
}

fn symbolic_link_is_not_followed_when_asked_so(dir: &Path) -> Result<()> {
    file(&dir.join("file"), b"x")?;
    symlink("file", dir.join("link"))?;
    symlink("missing", dir.join("dangling"))?;
    ensure!(fs::read(dir.join("link"))? == b"x");
    refused(fs::read(dir.join("dangling")), Errno::NOENT)?;
    refused(crate::sys::open_with(&dir.join("link"), libc::O_NOFOLLOW), Errno::LOOP)?;
    let exclusive = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
    refused(openat(rustix::fs::CWD, dir.join("dangling"), exclusive, Mode::from(0o600)), Errno::EXIST)?;
    // Without O_EXCL the file it leads to is made.
    let create = OFlags::CREATE | OFlags::WRONLY;
    openat(rustix::fs::CWD, dir.join("dangling"), create, Mode::from(0o600))?;
    ensure!(dir.join("missing").is_file());
    std::os::unix::fs::lchown(dir.join("link"), Some(5), Some(6))?;
    ensure!(dir.join("link").symlink_metadata()?.uid() == 5 && dir.join("file").metadata()?.uid() == 0);
    let link = openat(rustix::fs::CWD, dir.join("link"), OFlags::PATH | OFlags::NOFOLLOW, Mode::empty())?;
    ensure!(readlinkat(&link, "", Vec::new())?.as_bytes() == b"file");
    Ok(())
}

fn symbolic_links_in_a_circle(dir: &Path) -> Result<()> {
    symlink("b", dir.join("a"))?;
    symlink("a", dir.join("b"))?;
    refused(fs::read(dir.join("a")), Errno::LOOP)?;
    refused(fs::metadata(dir.join("a/x")), Errno::LOOP)?;
    symlink(".", dir.join("self"))?;
    file(&dir.join("file"), b"x")?;
    ensure!(fs::read(dir.join("self/self/self/self/file"))? == b"x");
    Ok(())
}

fn unlinked_open_file_lives_on(dir: &Path) -> Result<()> {
    let open = file(&dir.join("file"), b"content")?;
    fs::remove_file(dir.join("file"))?;
    ensure!(list(dir)?.is_empty() && open.metadata()?.nlink() == 0);
    open.write_all_at(b"new", 7)?;
    ensure!(content(&open)? == b"contentnew");
    open.set_len(3)?;
    open.sync_all()?;
    open.set_permissions(std::os::unix::fs::PermissionsExt::from_mode(0o640))?;
    let metadata = open.metadata()?;
    ensure!(metadata.len() == 3 && metadata.mode() & 0o777 == 0o640);
    // By way of /proc it can be opened again.
    let again = fs::File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&open)))?;
    ensure!(content(&again)? == b"con");
    Ok(())
}

fn unlinked_name_can_be_made_anew(dir: &Path) -> Result<()> {
    let mut inodes = Vec::new();
    for round in 0..20 {
        let open = file(&dir.join("file"), format!("round {round}").as_bytes())?;
        inodes.push((open.metadata()?.ino(), open));
        fs::remove_file(dir.join("file"))?;
    }
    for (round, (_, open)) in inodes.iter().enumerate() {
        ensure!(content(open)? == format!("round {round}").as_bytes());
    }
    inodes.sort_by_key(|(inode, _)| *inode);
    inodes.dedup_by_key(|(inode, _)| *inode);
    ensure!(inodes.len() == 20, "files that live have different inode numbers");
    create_dir(dir.join("file"))?;
    fs::remove_dir(dir.join("file"))?;
    symlink("x", dir.join("file"))?;
    ensure!(fs::read_link(dir.join("file"))? == Path::new("x"));
    Ok(())
}

fn path_descriptor_outlives_the_name(dir: &Path) -> Result<()> {
    file(&dir.join("file"), b"x")?;
    let held = openat(rustix::fs::CWD, dir.join("file"), OFlags::PATH, Mode::empty())?;
    fs::rename(dir.join("file"), dir.join("moved"))?;
    let open = fs::File::open(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&held)))?;
    ensure!(content(&open)? == b"x");
    Ok(())
}

fn rmdir_takes_only_empty_directories(dir: &Path) -> Result<()> {
    create_dir(dir.join("dir"))?;
    file(&dir.join("dir/file"), b"")?;
    refused(fs::remove_dir(dir.join("dir")), Errno::NOTEMPTY)?;
    refused(fs::remove_dir(dir.join("dir/file")), Errno::NOTDIR)?;
    refused(fs::remove_dir(dir.join("dir/.")), Errno::INVAL)?;
    refused(fs::remove_file(dir.join("dir")), Errno::ISDIR)?;
    fs::remove_file(dir.join("dir/file"))?;
    fs::remove_dir(dir.join("dir"))?;
    refused(fs::remove_dir(dir.join("dir")), Errno::NOENT)
}

fn removed_directory_can_be_held_but_not_used(dir: &Path) -> Result<()> {
    create_dir(dir.join("dir"))?;
    std::env::set_current_dir(dir.join("dir"))?;
    let held = fs::File::open(".")?;
    fs::remove_dir(dir.join("dir"))?;
    refused(fs::File::create("file"), Errno::NOENT)?;
    refused(create_dir("dir"), Errno::NOENT)?;
    refused(unlinkat(&held, "x", AtFlags::empty()), Errno::NOENT)?;
    ensure!(list(Path::new("."))?.is_empty());
    // A new one of the same name is another.
    create_dir(dir.join("dir"))?;
    file(&dir.join("dir/file"), b"")?;
    ensure!(list(Path::new("."))?.is_empty());
    Ok(())
}
