//! A directory of 100,000 files. Made and read by cases of different groups, for a guest in an emulated machine needs long to make them.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use anyhow::{Result, ensure};

use crate::directories::make_many;
use crate::sys::{file, list};
use crate::{Case, cases};

pub(crate) const MAKING: &[Case] = cases![is_made];
pub(crate) const READING: &[Case] = cases![is_complete_and_can_be_changed];

const MANY: usize = 100_000;

/// Beside the directories of the cases.
fn directory(dir: &Path) -> std::path::PathBuf {
    dir.with_file_name("large")
}

fn is_made(dir: &Path) -> Result<()> {
    let dir = directory(dir);
    fs::create_dir(&dir)?;
    make_many(&dir, MANY)
}

fn is_complete_and_can_be_changed(dir: &Path) -> Result<()> {
    let dir = directory(dir);
    let names = list(&dir)?;
    ensure!(names.len() == MANY, "{} names", names.len());
    ensure!(names.iter().enumerate().all(|(i, name)| *name == format!("file-{i:06}")));
    let mut changed: HashSet<String> = names.into_iter().collect();
    for i in (0..MANY).step_by(1000) {
        let path = |name: &str| dir.join(format!("{name}-{i:06}"));
        fs::rename(path("file"), path("renamed"))?;
        fs::remove_file(dir.join(format!("file-{:06}", i + 1)))?;
        file(&path("new"), b"")?;
        changed.remove(&format!("file-{i:06}"));
        changed.remove(&format!("file-{:06}", i + 1));
        changed.extend([format!("renamed-{i:06}"), format!("new-{i:06}")]);
    }
    let mut seen = HashSet::with_capacity(MANY);
    for entry in fs::read_dir(&dir)? {
        let name = entry?.file_name().to_string_lossy().into_owned();
        ensure!(seen.insert(name.clone()), "{name} twice");
    }
    ensure!(seen == changed, "{} names", seen.len());
    Ok(())
}
