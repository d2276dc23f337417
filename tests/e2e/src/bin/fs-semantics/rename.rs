//! rename(2), in all its ways.

use std::fs::{self, create_dir, rename};
use std::io::Read;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{CWD, FileType, RenameFlags, renameat_with};
use rustix::io::Errno;

use crate::sys::{file, list, make_node, refused};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![
    replaces_any_kind_of_file_by_any_other,
    moves_between_directories,
    replaces_an_empty_directory_only,
    does_not_mix_files_and_directories,
    does_not_move_a_directory_into_itself,
    to_another_name_of_the_same_file_does_nothing,
    keeps_open_files_what_they_are,
    replaced_open_file_lives_on,
    moves_the_working_directory_along,
    noreplace_refuses_to_replace,
    exchange_swaps_any_two,
    updates_what_it_changes,
];

/// Makes a file of each kind but directory; their names.
fn one_of_each(dir: &Path) -> Result<[&'static str; 4]> {
    file(&dir.join("file"), b"content")?;
    symlink("file", dir.join("link"))?;
    make_node(&dir.join("fifo"), FileType::Fifo)?;
    make_node(&dir.join("socket"), FileType::Socket)?;
    Ok(["file", "link", "fifo", "socket"])
}

fn replaces_any_kind_of_file_by_any_other(dir: &Path) -> Result<()> {
    for from in 0..4 {
        for to in (0..4).filter(|to| *to != from) {
            let pair = dir.join(format!("{from}{to}"));
            create_dir(&pair)?;
            let names = one_of_each(&pair)?;
            let (from, to) = (pair.join(names[from]), pair.join(names[to]));
            let before = from.symlink_metadata()?;
            rename(&from, &to)?;
            let after = to.symlink_metadata()?;
            ensure!(
                after.ino() == before.ino() && after.file_type() == before.file_type(),
                "{}",
                to.display()
            );
            refused(from.symlink_metadata(), Errno::NOENT)?;
            ensure!(list(&pair)?.len() == 3);
        }
    }
    Ok(())
}

fn moves_between_directories(dir: &Path) -> Result<()> {
    let (from, to) = (dir.join("from"), dir.join("to"));
    create_dir(&from)?;
    create_dir(&to)?;
    for name in one_of_each(&from)? {
        rename(from.join(name), to.join(name))?;
    }
    create_dir(from.join("dir"))?;
    file(&from.join("dir/inner"), b"inner")?;
    let (from_links, to_links) = (from.metadata()?.nlink(), to.metadata()?.nlink());
    rename(from.join("dir"), to.join("dir"))?;
    ensure!(list(&from)?.is_empty());
    ensure!(list(&to)? == ["dir", "fifo", "file", "link", "socket"]);
    ensure!(fs::read(to.join("dir/inner"))? == b"inner");
    // Where directories count the directories in them (btrfs does not).
    if from_links == 3 {
        ensure!(from.metadata()?.nlink() == 2 && to.metadata()?.nlink() == to_links + 1);
    }
    ensure!(to.join("dir/..").metadata()?.ino() == to.metadata()?.ino());
    Ok(())
}

fn replaces_an_empty_directory_only(dir: &Path) -> Result<()> {
    let (one, empty, full) = (dir.join("one"), dir.join("empty"), dir.join("full"));
    for path in [&one, &empty, &full] {
        create_dir(path)?;
    }
    file(&one.join("x"), b"")?;
    file(&full.join("y"), b"")?;
    refused(rename(&one, &full), Errno::NOTEMPTY)?;
    rename(&one, &empty)?;
    ensure!(list(dir)? == ["empty", "full"] && list(&empty)? == ["x"]);
    Ok(())
}

fn does_not_mix_files_and_directories(dir: &Path) -> Result<()> {
    create_dir(dir.join("dir"))?;
    for name in one_of_each(dir)? {
        refused(rename(dir.join(name), dir.join("dir")), Errno::ISDIR)?;
        refused(rename(dir.join("dir"), dir.join(name)), Errno::NOTDIR)?;
    }
    refused(rename(dir.join("missing"), dir.join("file")), Errno::NOENT)?;
    refused(rename(dir.join("file"), dir.join("missing/file")), Errno::NOENT)?;
    refused(rename(dir.join("file"), dir.join("file/file")), Errno::NOTDIR)?;
    ensure!(list(dir)?.len() == 5);
    Ok(())
}

fn does_not_move_a_directory_into_itself(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir.join("a/b/c"))?;
    for to in ["a/x", "a/b/x", "a/b/c/x"] {
        refused(rename(dir.join("a"), dir.join(to)), Errno::INVAL)?;
    }
    // Nor over one of those it is in.
    refused(rename(dir.join("a/b/c"), dir.join("a")), Errno::NOTEMPTY)?;
    ensure!(dir.join("a/b/c").is_dir());
    Ok(())
}

fn to_another_name_of_the_same_file_does_nothing(dir: &Path) -> Result<()> {
    let (one, other) = (dir.join("one"), dir.join("other"));
    file(&one, b"x")?;
    fs::hard_link(&one, &other)?;
    rename(&one, &other)?;
    rename(&one, &one)?;
    ensure!(list(dir)? == ["one", "other"] && one.metadata()?.nlink() == 2);
    Ok(())
}

fn keeps_open_files_what_they_are(dir: &Path) -> Result<()> {
    let open = file(&dir.join("old"), b"content")?;
    fs::create_dir_all(dir.join("far/away"))?;
    rename(dir.join("old"), dir.join("far/away/new"))?;
    rename(dir.join("far"), dir.join("near"))?;
    let mut content = String::new();
    fs::File::open(dir.join("near/away/new"))?.read_to_string(&mut content)?;
    ensure!(content == "content");
    rustix::io::pwrite(&open, b"CON", 0)?;
    ensure!(fs::read(dir.join("near/away/new"))? == b"CONtent");
    ensure!(open.metadata()?.ino() == dir.join("near/away/new").metadata()?.ino());
    Ok(())
}

fn replaced_open_file_lives_on(dir: &Path) -> Result<()> {
    let old = file(&dir.join("name"), b"old")?;
    file(&dir.join("new"), b"new")?;
    rename(dir.join("new"), dir.join("name"))?;
    ensure!(fs::read(dir.join("name"))? == b"new");
    ensure!(crate::sys::content(&old)? == b"old" && old.metadata()?.nlink() == 0);
    rustix::io::pwrite(&old, b"OLDER", 0)?;
    ensure!(crate::sys::content(&old)? == b"OLDER");
    ensure!(fs::read(dir.join("name"))? == b"new");
    Ok(())
}

fn moves_the_working_directory_along(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir.join("a/here"))?;
    create_dir(dir.join("b"))?;
    std::env::set_current_dir(dir.join("a/here"))?;
    rename(dir.join("a/here"), dir.join("b/there"))?;
    file(Path::new("made"), b"")?;
    ensure!(dir.join("b/there/made").exists());
    ensure!(std::env::current_dir()?.ends_with("b/there"));
    ensure!(Path::new("..").metadata()?.ino() == dir.join("b").metadata()?.ino());
    Ok(())
}

fn noreplace_refuses_to_replace(dir: &Path) -> Result<()> {
    let names = one_of_each(dir)?;
    create_dir(dir.join("dir"))?;
    let with =
        |from: &str, to: &str| renameat_with(CWD, dir.join(from), CWD, dir.join(to), RenameFlags::NOREPLACE);
    for name in names {
        refused(with("file", name), Errno::EXIST)?;
    }
    refused(with("file", "dir"), Errno::EXIST)?;
    refused(with("dir", "file"), Errno::EXIST)?;
    with("file", "new")?;
    with("dir", "new dir")?;
    ensure!(list(dir)? == ["fifo", "link", "new", "new dir", "socket"]);
    Ok(())
}

fn exchange_swaps_any_two(dir: &Path) -> Result<()> {
    let names = one_of_each(dir)?;
    create_dir(dir.join("dir"))?;
    file(&dir.join("dir/inner"), b"")?;
    let swap =
        |from: &str, to: &str| renameat_with(CWD, dir.join(from), CWD, dir.join(to), RenameFlags::EXCHANGE);
    let inode = |name: &str| dir.join(name).symlink_metadata().map(|m| m.ino());
    for name in names.into_iter().filter(|name| *name != "file").chain(["dir"]) {
        let before = (inode("file")?, inode(name)?);
        swap("file", name)?;
        ensure!((inode(name)?, inode("file")?) == before, "{name}");
        swap("file", name)?;
        ensure!((inode("file")?, inode(name)?) == before, "{name}");
    }
    refused(swap("file", "missing"), Errno::NOENT)?;
    let both = RenameFlags::EXCHANGE | RenameFlags::NOREPLACE;
    refused(renameat_with(CWD, dir.join("file"), CWD, dir.join("link"), both), Errno::INVAL)?;
    refused(swap("dir", "dir/inner"), Errno::INVAL)
}

fn updates_what_it_changes(dir: &Path) -> Result<()> {
    create_dir(dir.join("from"))?;
    create_dir(dir.join("to"))?;
    file(&dir.join("from/x"), b"")?;
    crate::sys::set_times(&dir.join("from"), 1, 1)?;
    crate::sys::set_times(&dir.join("to"), 1, 1)?;
    rename(dir.join("from/x"), dir.join("to/x"))?;
    for name in ["from", "to"] {
        ensure!(dir.join(name).metadata()?.mtime() > 1, "{name}");
    }
    Ok(())
}
