//! Extended attributes (xattr(7)).

use std::ffi::CString;
use std::fs;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{
    XattrFlags, getxattr, lgetxattr, listxattr, llistxattr, lremovexattr, lsetxattr, removexattr, setxattr,
};
use rustix::io::Errno;

use crate::sys::{ALICE, BOB, as_user, chmod, file, give, open, refused};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![
    are_kept_with_files_and_directories,
    can_be_created_or_replaced_only,
    of_every_size,
    too_small_a_buffer_is_an_error,
    follow_the_file,
    need_the_right_to_write,
    not_on_links_and_special_files,
    links_need_not_have_any,
    of_trust_are_for_root,
    capability_is_kept_and_goes_with_a_write,
];

fn set(path: &Path, name: &str, value: &[u8]) -> rustix::io::Result<()> {
    setxattr(path, name, value, XattrFlags::empty())
}

fn get(path: &Path, name: &str) -> rustix::io::Result<Vec<u8>> {
    let mut value = vec![0; 65536];
    let len = getxattr(path, name, &mut value)?;
    value.truncate(len);
    Ok(value)
}

fn names(path: &Path) -> Result<Vec<String>> {
    let mut list = vec![0; 65536];
    let len = listxattr(path, &mut list)?;
    let mut names: Vec<_> = list[..len]
        .split(|byte| *byte == 0)
        .map(|name| String::from_utf8_lossy(name).into_owned())
        .filter(|name| name.starts_with("user."))
        .collect();
    names.sort();
    Ok(names)
}

fn are_kept_with_files_and_directories(dir: &Path) -> Result<()> {
    file(&dir.join("file"), b"")?;
    for path in [dir.join("file"), dir.to_owned()] {
        ensure!(names(&path)?.is_empty());
        set(&path, "user.one", b"1")?;
        set(&path, "user.empty", b"")?;
        set(&path, "user.bytes", &[0, 255, 0])?;
        ensure!(get(&path, "user.one")? == b"1" && get(&path, "user.empty")? == b"");
        ensure!(get(&path, "user.bytes")? == [0, 255, 0]);
        ensure!(names(&path)? == ["user.bytes", "user.empty", "user.one"]);
        removexattr(&path, "user.one")?;
        refused(get(&path, "user.one"), Errno::NODATA)?;
        refused(removexattr(&path, "user.one"), Errno::NODATA)?;
        ensure!(names(&path)? == ["user.bytes", "user.empty"]);
    }
    Ok(())
}

fn can_be_created_or_replaced_only(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    refused(setxattr(&path, "user.x", b"1", XattrFlags::REPLACE), Errno::NODATA)?;
    setxattr(&path, "user.x", b"2", XattrFlags::CREATE)?;
    refused(setxattr(&path, "user.x", b"3", XattrFlags::CREATE), Errno::EXIST)?;
    setxattr(&path, "user.x", b"4", XattrFlags::REPLACE)?;
    ensure!(get(&path, "user.x")? == b"4");
    Ok(())
}

fn of_every_size(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    // As far as any file system goes (ext4: a block for all).
    for size in [0, 1, 255, 256, 1000, 3000] {
        let value = vec![size as u8; size];
        set(&path, "user.x", &value)?;
        ensure!(get(&path, "user.x")? == value, "{size}");
    }
    let long = format!("user.{}", "n".repeat(250));
    set(&path, &long, b"x")?;
    ensure!(names(&path)? == [long.as_str(), "user.x"]);
    refused(set(&path, &format!("{long}n"), b"x"), Errno::RANGE)?;
    refused(set(&path, "user.x", &vec![0; 65537]), Errno::TOOBIG)?;
    refused(set(&path, "nonsense.x", b""), Errno::OPNOTSUPP)
}

fn too_small_a_buffer_is_an_error(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    set(&path, "user.x", b"0123456789")?;
    refused(getxattr(&path, "user.x", &mut [0u8; 9]), Errno::RANGE)?;
    ensure!(getxattr(&path, "user.x", &mut [0u8; 10])? == 10);
    refused(listxattr(&path, &mut [0u8; 3]), Errno::RANGE)?;
    // Without a buffer it is asked for the size.
    let path = CString::new(path.as_os_str().as_bytes())?;
    // SAFETY: the strings outlive the calls, which write nothing.
    let (value, list) = unsafe {
        let value = libc::getxattr(path.as_ptr(), c"user.x".as_ptr(), std::ptr::null_mut(), 0);
        (value, libc::listxattr(path.as_ptr(), std::ptr::null_mut(), 0))
    };
    ensure!(value == 10 && list >= 7, "{value}, {list}");
    Ok(())
}

fn follow_the_file(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let held = file(&path, b"")?;
    set(&path, "user.x", b"1")?;
    fs::rename(&path, dir.join("new"))?;
    fs::hard_link(dir.join("new"), dir.join("other"))?;
    ensure!(get(&dir.join("other"), "user.x")? == b"1");
    fs::remove_file(dir.join("other"))?;
    fs::remove_file(dir.join("new"))?;
    let mut value = [0; 10];
    ensure!(rustix::fs::fgetxattr(&held, "user.x", &mut value)? == 1);
    rustix::fs::fsetxattr(&held, "user.y", b"2", XattrFlags::empty())?;
    rustix::fs::fremovexattr(&held, "user.x")?;
    refused(rustix::fs::fgetxattr(&held, "user.x", &mut value), Errno::NODATA)?;
    // A new file of the same name has nothing of it.
    file(&path, b"")?;
    refused(get(&path, "user.y"), Errno::NODATA)
}

fn need_the_right_to_write(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    give(&path, ALICE)?;
    as_user(ALICE, &[], || Ok(set(&path, "user.x", b"1")?))?;
    as_user(BOB, &[], || {
        ensure!(get(&path, "user.x")? == b"1");
        refused(set(&path, "user.x", b"2"), Errno::ACCESS)?;
        refused(removexattr(&path, "user.x"), Errno::ACCESS)
    })?;
    chmod(&path, 0o602)?;
    as_user(BOB, &[], || Ok(set(&path, "user.x", b"2")?))?;
    chmod(&path, 0o600)?;
    as_user(BOB, &[], || refused(get(&path, "user.x"), Errno::ACCESS))
}

fn not_on_links_and_special_files(dir: &Path) -> Result<()> {
    file(&dir.join("file"), b"")?;
    std::os::unix::fs::symlink("file", dir.join("link"))?;
    crate::sys::make_node(&dir.join("fifo"), rustix::fs::FileType::Fifo)?;
    let empty = XattrFlags::empty();
    refused(lsetxattr(dir.join("link"), "user.x", b"1", empty), Errno::PERM)?;
    refused(set(&dir.join("fifo"), "user.x", b"1"), Errno::PERM)?;
    set(&dir.join("link"), "user.x", b"1")?;
    ensure!(get(&dir.join("file"), "user.x")? == b"1");
    lsetxattr(dir.join("link"), "trusted.x", b"2", empty)?;
    ensure!(lgetxattr(dir.join("link"), "trusted.x", &mut [0u8; 10])? == 1);
    refused(get(&dir.join("file"), "trusted.x"), Errno::NODATA)
}

fn links_need_not_have_any(dir: &Path) -> Result<()> {
    let link = dir.join("link");
    std::os::unix::fs::symlink("nothing", &link)?;
    refused(lgetxattr(&link, "trusted.x", &mut [0u8; 10]), Errno::NODATA)?;
    ensure!(llistxattr(&link, &mut [0u8; 0])? == 0);
    let removed = lremovexattr(&link, "trusted.x");
    // Who may not touch what is trusted is not told whether it is there.
    ensure!(matches!(removed, Err(Errno::NODATA | Errno::PERM)), "{removed:?}");
    Ok(())
}

fn of_trust_are_for_root(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    give(&path, ALICE)?;
    set(&path, "trusted.x", b"1")?;
    as_user(ALICE, &[], || {
        refused(get(&path, "trusted.x"), Errno::NODATA)?;
        refused(set(&path, "trusted.x", b"2"), Errno::PERM)
    })?;
    ensure!(get(&path, "trusted.x")? == b"1");
    Ok(())
}

/// `struct vfs_cap_data` of revision 2 (Linux include/uapi/linux/capability.h): effective, permitted CAP_NET_RAW.
const CAPABILITY: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

fn capability_is_kept_and_goes_with_a_write(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let name = "security.capability";
    file(&path, b"x")?;
    chmod(&path, 0o777)?;
    set(&path, name, &CAPABILITY)?;
    ensure!(get(&path, name)? == CAPABILITY);
    fs::read(&path)?;
    ensure!(get(&path, name)? == CAPABILITY);
    open(&path)?.write_all(b"y")?;
    refused(get(&path, name), Errno::NODATA)?;
    set(&path, name, &CAPABILITY)?;
    open(&path)?.set_len(0)?;
    refused(get(&path, name), Errno::NODATA)?;
    set(&path, name, &CAPABILITY)?;
    give(&path, ALICE)?;
    refused(get(&path, name), Errno::NODATA)?;
    as_user(ALICE, &[], || refused(set(&path, name, &CAPABILITY), Errno::PERM))
}
