//! Names: long ones, odd ones, and deep trees of them. Times of files, and special files.

use std::fs::{self, create_dir};
use std::io::{Read, Write};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags, Timestamps, mkdirat, openat, utimensat};
use rustix::io::Errno;
use rustix::time::Timespec;

use crate::sys::{Child, DIRECTORY, file, list, make_node, refused, set_times};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![
    of_255_bytes,
    of_any_bytes,
    differ_in_case,
    deep_tree_beyond_the_longest_path,
    path_of_the_greatest_length,
    exclusive_creation_has_one_winner,
    times_can_be_set_to_the_nanosecond,
    times_follow_what_is_done,
    fifo_carries_bytes,
    socket_takes_connections,
    program_runs,
];

fn of_255_bytes(dir: &Path) -> Result<()> {
    let (a, b) = (dir.join("a".repeat(255)), dir.join("b".repeat(255)));
    file(&a, b"x")?;
    fs::rename(&a, &b)?;
    fs::hard_link(&b, &a)?;
    ensure!(list(dir)? == ["a".repeat(255), "b".repeat(255)] && fs::read(&a)? == b"x");
    create_dir(dir.join("d".repeat(255)))?;
    std::os::unix::fs::symlink("x", dir.join("s".repeat(255)))?;
    let long = dir.join("c".repeat(256));
    refused(fs::File::create(&long), Errno::NAMETOOLONG)?;
    refused(create_dir(&long), Errno::NAMETOOLONG)?;
    refused(fs::rename(&a, &long), Errno::NAMETOOLONG)?;
    refused(fs::metadata(&long), Errno::NAMETOOLONG)?;
    // Of two bytes each.
    file(&dir.join("é".repeat(127)), b"")?;
    ensure!(list(dir)?.len() == 5);
    Ok(())
}

fn of_any_bytes(dir: &Path) -> Result<()> {
    let name = |bytes: &[u8]| dir.join(std::ffi::OsStr::from_bytes(bytes));
    for byte in (1..=255u8).step_by(6).chain([b'x', b' ', b'\n', b'\\']) {
        file(&name(&[b'x', byte]), &[b'x', byte])?;
        fs::rename(name(&[b'x', byte]), name(&[byte, b'x', byte]))?;
        fs::write(name(&[byte, b'x', byte]), [byte, b'x', byte])?;
    }
    ensure!(list(dir)?.len() == 47);
    for entry in fs::read_dir(dir)? {
        let entry = entry?;
        ensure!(fs::read(entry.path())? == entry.file_name().as_bytes(), "{:?}", entry.file_name());
    }
    for name in ["...", " ", "a\nb", "-rf", "\u{202e}"] {
        file(&dir.join(name), b"")?;
        ensure!(list(dir)?.contains(&name.to_owned()), "{name:?}");
    }
    Ok(())
}

fn differ_in_case(dir: &Path) -> Result<()> {
    file(&dir.join("name"), b"lower")?;
    file(&dir.join("NAME"), b"upper")?;
    ensure!(fs::read(dir.join("name"))? == b"lower" && fs::read(dir.join("NAME"))? == b"upper");
    Ok(())
}

/// Of directories whose names are as long as can be, this many make three of the longest paths.
const DEPTH: usize = 50;

fn deep_tree_beyond_the_longest_path(dir: &Path) -> Result<()> {
    let name = "d".repeat(255);
    let mut at = openat(CWD, dir, DIRECTORY, Mode::empty())?;
    for depth in 0..DEPTH {
        mkdirat(&at, &name, Mode::from(0o755))?;
        at = openat(&at, &name, DIRECTORY, Mode::empty())?;
        if depth % 10 == 0 {
            let create = OFlags::CREATE | OFlags::WRONLY;
            rustix::io::write(openat(&at, "file", create, Mode::from(0o644))?, b"deep")?;
        }
    }
    // Down again from the top, and up from the bottom.
    let mut again = openat(CWD, dir, DIRECTORY, Mode::empty())?;
    for _ in 0..DEPTH {
        again = openat(&again, &name, DIRECTORY, Mode::empty())?;
    }
    ensure!(rustix::fs::fstat(&at)?.st_ino == rustix::fs::fstat(&again)?.st_ino);
    for _ in 0..DEPTH {
        again = openat(&again, "..", DIRECTORY, Mode::empty())?;
    }
    ensure!(rustix::fs::fstat(&again)?.st_ino == dir.metadata()?.ino());
    // A part of it moves elsewhere.
    let below = openat(&again, &name, DIRECTORY, Mode::empty())?;
    rustix::fs::renameat(&below, &name, &again, "moved")?;
    ensure!(list(dir)? == [name.as_str(), "moved"]);
    Ok(())
}

fn path_of_the_greatest_length(dir: &Path) -> Result<()> {
    std::env::set_current_dir(dir)?;
    let mut path = String::new();
    while path.len() + 102 < 4095 {
        path.push_str(&"d".repeat(100));
        create_dir(&path)?;
        path.push('/');
    }
    path.push_str(&"f".repeat(4095 - path.len()));
    ensure!(path.len() == 4095);
    file(Path::new(&path), b"x")?;
    ensure!(fs::read(&path)? == b"x");
    path.push('f');
    refused(fs::read(&path), Errno::NAMETOOLONG)
}

fn exclusive_creation_has_one_winner(dir: &Path) -> Result<()> {
    let flags = OFlags::CREATE | OFlags::EXCL | OFlags::WRONLY;
    let rounds = 25;
    let tried = |who: u8| {
        for round in 0..rounds {
            match openat(CWD, dir.join(format!("file{round}")), flags, Mode::from(0o644)) {
                Ok(file) => ensure!(rustix::io::write(file, &[who])? == 1),
                Err(e) => ensure!(e == Errno::EXIST, "{e}"),
            }
            match mkdirat(CWD, dir.join(format!("dir{round}")), Mode::from(0o755)) {
                Ok(()) => drop(file(&dir.join(format!("dir{round}/{who}")), b"")?),
                Err(e) => ensure!(e == Errno::EXIST, "{e}"),
            }
        }
        Ok(())
    };
    let children =
        [Child::start(|| tried(b'1'))?, Child::start(|| tried(b'2'))?, Child::start(|| tried(b'3'))?];
    for child in children {
        child.wait()?;
    }
    for round in 0..rounds {
        ensure!(fs::read(dir.join(format!("file{round}")))?.len() == 1, "{round} has two makers");
        ensure!(list(&dir.join(format!("dir{round}")))?.len() == 1, "{round} has two makers");
    }
    Ok(())
}

fn times_can_be_set_to_the_nanosecond(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    std::os::unix::fs::symlink("file", dir.join("link"))?;
    let set = |name: &str, accessed: (i64, i64), modified: (i64, i64)| {
        let at = |(tv_sec, tv_nsec)| Timespec { tv_sec, tv_nsec };
        let times = Timestamps { last_access: at(accessed), last_modification: at(modified) };
        utimensat(CWD, dir.join(name), &times, AtFlags::SYMLINK_NOFOLLOW)
    };
    let get = |name: &str| -> Result<_> {
        let m = dir.join(name).symlink_metadata()?;
        Ok(((m.atime(), m.atime_nsec()), (m.mtime(), m.mtime_nsec())))
    };
    set("file", (1_000_000_000, 123_456_789), (2_000_000_000, 987_654_321))?;
    ensure!(get("file")? == ((1_000_000_000, 123_456_789), (2_000_000_000, 987_654_321)));
    set("file", (7, 0), (0, UTIME_OMIT))?;
    ensure!(get("file")? == ((7, 0), (2_000_000_000, 987_654_321)));
    set("file", (0, UTIME_OMIT), (0, UTIME_NOW))?;
    let (accessed, modified) = get("file")?;
    ensure!(accessed == (7, 0) && modified.0 > 1_600_000_000 && modified.0 != 2_000_000_000);
    set("link", (11, 0), (12, 0))?;
    ensure!(get("link")? == ((11, 0), (12, 0)) && get("file")?.0 == (7, 0));
    // Before the epoch, and after what 32 bits hold.
    set("file", (-1, 0), (5_000_000_000, 0))?;
    ensure!(get("file")? == ((-1, 0), (5_000_000_000, 0)));
    Ok(())
}

/// utimensat(2).
const UTIME_NOW: i64 = (1 << 30) - 1;
const UTIME_OMIT: i64 = (1 << 30) - 2;

fn times_follow_what_is_done(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let open = file(&path, b"x")?;
    let long_ago = |path: &Path| set_times(path, 1, 1);
    let modified = |path: &Path| path.metadata().map(|m| m.mtime() > 1);
    long_ago(&path)?;
    rustix::io::pwrite(&open, b"y", 0)?;
    ensure!(modified(&path)?, "write");
    long_ago(&path)?;
    open.set_len(0)?;
    ensure!(modified(&path)?, "truncate");
    long_ago(&path)?;
    let before = path.metadata()?;
    crate::sys::chmod(&path, 0o600)?;
    let after = path.metadata()?;
    ensure!(
        !modified(&path)? && (after.ctime(), after.ctime_nsec()) >= (before.ctime(), before.ctime_nsec())
    );
    // A directory changes with the names in it, and not with what is in the files.
    long_ago(dir)?;
    rustix::io::pwrite(&open, b"z", 0)?;
    ensure!(!modified(dir)?, "write in it");
    let changes: [(&str, &dyn Fn() -> std::io::Result<()>); 4] = [
        ("link", &|| fs::hard_link(&path, dir.join("other"))),
        ("unlink", &|| fs::remove_file(dir.join("other"))),
        ("mkdir", &|| create_dir(dir.join("sub"))),
        ("rmdir", &|| fs::remove_dir(dir.join("sub"))),
    ];
    for (what, change) in changes {
        long_ago(dir)?;
        change()?;
        ensure!(modified(dir)?, "{what}");
    }
    Ok(())
}

fn fifo_carries_bytes(dir: &Path) -> Result<()> {
    let path = dir.join("fifo");
    make_node(&path, FileType::Fifo)?;
    ensure!(path.symlink_metadata()?.file_type().is_fifo() && crate::sys::mode(&path)? == 0o644);
    let writer =
        Child::start(|| Ok(fs::OpenOptions::new().write(true).open(&path)?.write_all(b"through")?))?;
    let mut got = String::new();
    fs::File::open(&path)?.read_to_string(&mut got)?;
    writer.wait()?;
    ensure!(got == "through");
    let nonblocking = OFlags::WRONLY | OFlags::NONBLOCK;
    refused(openat(CWD, &path, nonblocking, Mode::empty()), Errno::NXIO)
}

fn socket_takes_connections(dir: &Path) -> Result<()> {
    std::env::set_current_dir(dir)?;
    let listener = UnixListener::bind("socket")?;
    ensure!(dir.join("socket").symlink_metadata()?.file_type().is_socket());
    fs::rename("socket", "renamed")?;
    let client = Child::start(|| Ok(UnixStream::connect("renamed")?.write_all(b"through")?))?;
    let mut got = String::new();
    listener.accept()?.0.read_to_string(&mut got)?;
    client.wait()?;
    ensure!(got == "through");
    refused(UnixListener::bind("renamed"), Errno::ADDRINUSE)?;
    drop(listener);
    refused(UnixStream::connect("renamed"), Errno::CONNREFUSED)?;
    refused(fs::File::open("renamed"), Errno::NXIO)
}

fn program_runs(dir: &Path) -> Result<()> {
    let program = dir.join("program");
    fs::copy("/proc/self/exe", &program)?;
    crate::sys::chmod(&program, 0o755)?;
    // Without a group it tells how it is used, and fails.
    let output = std::process::Command::new(&program).output()?;
    ensure!(output.status.code() == Some(2) && output.stderr.starts_with(b"fs-semantics: "), "{output:?}");
    crate::sys::chmod(&program, 0o644)?;
    refused(std::process::Command::new(&program).output(), Errno::ACCESS)
}
