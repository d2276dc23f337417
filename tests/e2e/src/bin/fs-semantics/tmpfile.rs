//! Files made without a name (`O_TMPFILE`).

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::{AtFlags, CWD, Mode, OFlags, linkat, openat};
use rustix::io::Errno;

use crate::sys::{list, refused};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![has_no_name_until_it_is_given_one, exclusive_one_never_gets_one];

fn make(dir: &Path, flags: OFlags) -> Result<fs::File> {
    Ok(openat(CWD, dir, OFlags::TMPFILE | OFlags::RDWR | flags, Mode::from(0o640))?.into())
}

fn has_no_name_until_it_is_given_one(dir: &Path) -> Result<()> {
    let file = make(dir, OFlags::empty())?;
    rustix::io::pwrite(&file, b"content", 0)?;
    ensure!(list(dir)?.is_empty() && file.metadata()?.nlink() == 0);
    ensure!(crate::sys::content(&file)? == b"content");
    linkat(&file, "", CWD, dir.join("name"), AtFlags::EMPTY_PATH)?;
    ensure!(fs::read(dir.join("name"))? == b"content" && file.metadata()?.nlink() == 1);
    ensure!(crate::sys::mode(&dir.join("name"))? == 0o640);
    Ok(())
}

fn exclusive_one_never_gets_one(dir: &Path) -> Result<()> {
    let file = make(dir, OFlags::EXCL)?;
    refused(linkat(&file, "", CWD, dir.join("name"), AtFlags::EMPTY_PATH), Errno::NOENT)
}
