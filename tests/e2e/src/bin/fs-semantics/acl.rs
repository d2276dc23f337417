//! POSIX access control lists (acl(5)), in the form of their extended attributes.

use std::fs::{self, create_dir};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{Mode, XattrFlags, getxattr, removexattr, setxattr};
use rustix::io::Errno;
use rustix::process::umask;

use crate::sys::{ALICE, BOB, as_user, chmod, chown, file, give, mode, refused, works};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![
    named_users_and_groups_have_access,
    mask_limits_all_but_owner_and_others,
    mode_and_list_are_one,
    default_list_is_inherited,
    umask_does_not_apply_to_inherited_lists,
    only_the_owner_changes_the_list,
    list_that_makes_no_sense_is_refused,
    set_group_id_goes_with_a_list_of_another_group,
];

const ACCESS: &str = "system.posix_acl_access";
const DEFAULT: &str = "system.posix_acl_default";

/// Linux include/uapi/linux/posix_acl.h: tags of entries.
const USER_OBJ: u16 = 0x01;
const USER: u16 = 0x02;
const GROUP_OBJ: u16 = 0x04;
const GROUP: u16 = 0x08;
const MASK: u16 = 0x10;
const OTHER: u16 = 0x20;

/// A list as an attribute (posix_acl_xattr.h): version 2, and entries of tag, permissions and ID.
fn list(entries: &[(u16, u16, u32)]) -> Vec<u8> {
    let mut bytes = 2u32.to_le_bytes().to_vec();
    for (tag, permissions, id) in entries {
        bytes.extend(tag.to_le_bytes());
        bytes.extend(permissions.to_le_bytes());
        bytes.extend(id.to_le_bytes());
    }
    bytes
}

const NONE: u32 = u32::MAX;

/// Owner all, `named` what it says, group nothing, mask, others nothing.
fn with_named(named: (u16, u16, u32), mask: u16) -> Vec<u8> {
    list(&[(USER_OBJ, 7, NONE), named, (GROUP_OBJ, 0, NONE), (MASK, mask, NONE), (OTHER, 0, NONE)])
}

fn with_group(named: (u16, u16, u32), mask: u16) -> Vec<u8> {
    list(&[(USER_OBJ, 7, NONE), (GROUP_OBJ, 0, NONE), named, (MASK, mask, NONE), (OTHER, 0, NONE)])
}

fn set(path: &Path, name: &str, value: &[u8]) -> rustix::io::Result<()> {
    setxattr(path, name, value, XattrFlags::empty())
}

fn get(path: &Path, name: &str) -> rustix::io::Result<Vec<u8>> {
    let mut value = vec![0; 4096];
    let len = getxattr(path, name, &mut value)?;
    value.truncate(len);
    Ok(value)
}

fn named_users_and_groups_have_access(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"x")?;
    set(&path, ACCESS, &with_named((USER, 6, ALICE), 7))?;
    as_user(ALICE, &[], || works(crate::sys::open(&path)))?;
    as_user(BOB, &[], || refused(fs::read(&path), Errno::ACCESS))?;
    set(&path, ACCESS, &with_group((GROUP, 4, 77), 7))?;
    as_user(ALICE, &[], || refused(fs::read(&path), Errno::ACCESS))?;
    as_user(BOB, &[77], || works(fs::read(&path)))?;
    as_user(BOB, &[77], || refused(crate::sys::open(&path), Errno::ACCESS))?;
    removexattr(&path, ACCESS)?;
    as_user(BOB, &[77], || refused(fs::read(&path), Errno::ACCESS))?;
    // In directories too.
    create_dir(dir.join("dir"))?;
    chmod(&dir.join("dir"), 0o700)?;
    set(&dir.join("dir"), ACCESS, &with_named((USER, 7, BOB), 7))?;
    as_user(BOB, &[], || works(file(&dir.join("dir/his"), b"")))?;
    as_user(ALICE, &[], || refused(fs::metadata(dir.join("dir/his")), Errno::ACCESS))
}

fn mask_limits_all_but_owner_and_others(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"x")?;
    set(&path, ACCESS, &with_named((USER, 7, ALICE), 4))?;
    as_user(ALICE, &[], || works(fs::read(&path)))?;
    as_user(ALICE, &[], || refused(crate::sys::open(&path), Errno::ACCESS))?;
    // The group's bits of the mode are the mask.
    chmod(&path, 0o760)?;
    as_user(ALICE, &[], || works(crate::sys::open(&path)))?;
    ensure!(get(&path, ACCESS)? == with_named((USER, 7, ALICE), 6));
    Ok(())
}

fn mode_and_list_are_one(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    set(&path, ACCESS, &with_named((USER, 5, ALICE), 5))?;
    ensure!(mode(&path)? == 0o750);
    // A list that says no more than the mode is none.
    let plain = list(&[(USER_OBJ, 6, NONE), (GROUP_OBJ, 4, NONE), (OTHER, 1, NONE)]);
    set(&path, ACCESS, &plain)?;
    ensure!(mode(&path)? == 0o641);
    refused(get(&path, ACCESS), Errno::NODATA)
}

fn default_list_is_inherited(dir: &Path) -> Result<()> {
    let default = with_named((USER, 7, ALICE), 7);
    set(dir, DEFAULT, &default)?;
    refused(get(dir, ACCESS), Errno::NODATA)?;
    file(&dir.join("file"), b"x")?;
    create_dir(dir.join("dir"))?;
    ensure!(get(&dir.join("dir"), DEFAULT)? == default && get(&dir.join("dir"), ACCESS)? == default);
    // Made with 0666: nobody may execute.
    let inherited = list(&[
        (USER_OBJ, 6, NONE),
        (USER, 7, ALICE),
        (GROUP_OBJ, 0, NONE),
        (MASK, 6, NONE),
        (OTHER, 0, NONE),
    ]);
    ensure!(get(&dir.join("file"), ACCESS)? == inherited && mode(&dir.join("file"))? == 0o660);
    refused(get(&dir.join("file"), DEFAULT), Errno::NODATA)?;
    as_user(ALICE, &[], || works(crate::sys::open(&dir.join("file"))))?;
    as_user(BOB, &[], || refused(fs::read(dir.join("file")), Errno::ACCESS))?;
    file(&dir.join("dir/file"), b"")?;
    ensure!(get(&dir.join("dir/file"), ACCESS)? == inherited);
    // What was there before has nothing of it, nor has what comes when it is gone.
    removexattr(dir, DEFAULT)?;
    file(&dir.join("later"), b"")?;
    refused(get(&dir.join("later"), ACCESS), Errno::NODATA)?;
    refused(set(&dir.join("file"), DEFAULT, &default), Errno::ACCESS)
}

fn umask_does_not_apply_to_inherited_lists(dir: &Path) -> Result<()> {
    let default = list(&[(USER_OBJ, 7, NONE), (GROUP_OBJ, 7, NONE), (OTHER, 7, NONE)]);
    set(dir, DEFAULT, &default)?;
    umask(Mode::from(0o077));
    file(&dir.join("file"), b"")?;
    create_dir(dir.join("dir"))?;
    crate::sys::make_node(&dir.join("fifo"), rustix::fs::FileType::Fifo)?;
    ensure!(mode(&dir.join("file"))? == 0o666 && mode(&dir.join("dir"))? == 0o777);
    ensure!(mode(&dir.join("fifo"))? == 0o644);
    removexattr(dir, DEFAULT)?;
    file(&dir.join("other"), b"")?;
    ensure!(mode(&dir.join("other"))? == 0o600);
    Ok(())
}

fn only_the_owner_changes_the_list(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    give(&path, ALICE)?;
    let new = with_named((USER, 7, BOB), 7);
    as_user(BOB, &[], || refused(set(&path, ACCESS, &new), Errno::PERM))?;
    as_user(ALICE, &[], || Ok(set(&path, ACCESS, &new)?))?;
    as_user(BOB, &[], || refused(removexattr(&path, ACCESS), Errno::PERM))
}

fn list_that_makes_no_sense_is_refused(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    let no_mask = list(&[(USER_OBJ, 7, NONE), (USER, 7, ALICE), (GROUP_OBJ, 7, NONE), (OTHER, 7, NONE)]);
    let no_owner = list(&[(GROUP_OBJ, 7, NONE), (OTHER, 7, NONE)]);
    for bad in [no_mask.as_slice(), &no_owner, b"x", &[1, 0, 0, 0]] {
        ensure!(set(&path, ACCESS, bad).is_err(), "{bad:?}");
    }
    ensure!(mode(&path)? == 0o644);
    Ok(())
}

fn set_group_id_goes_with_a_list_of_another_group(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    chown(&path, ALICE, 77)?;
    chmod(&path, 0o2755)?;
    // Its owner is not in its group.
    as_user(ALICE, &[], || Ok(set(&path, ACCESS, &with_named((USER, 7, BOB), 7))?))?;
    ensure!(mode(&path)? == 0o770, "{:o}", mode(&path)?);
    chmod(&path, 0o2755)?;
    as_user(ALICE, &[77], || Ok(set(&path, ACCESS, &with_named((USER, 7, BOB), 7))?))?;
    ensure!(mode(&path)? == 0o2770, "{:o}", mode(&path)?);
    Ok(())
}
