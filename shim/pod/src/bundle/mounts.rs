//! The rules for `mounts`, and the sources of those that are bind mounts.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{Mount, Spec};
use rustix::fs::{FileType, OFlags};

use super::{BundleError, Fault, open_named};
use crate::share::is_shareable;

/// File systems a container may have mounted: those of the guest's kernel that need nothing of the host.
const TYPES: [&str; 8] = ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs"];

/// A bind mount whose source was found.
#[derive(Debug)]
pub struct Bind {
    index: usize,
    path: PathBuf,
    source: OwnedFd,
    is_directory: bool,
    is_recursive: bool,
    read_only: bool,
    recursively_read_only: bool,
    follows_host: bool,
}

impl Bind {
    /// Which of the spec's mounts it is.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The source as the spec has it, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The source, open as a path only: a directory or a regular file.
    pub fn source(&self) -> BorrowedFd<'_> {
        self.source.as_fd()
    }

    /// Whether the source is a directory.
    pub fn is_directory(&self) -> bool {
        self.is_directory
    }

    /// Whether mounts below the source come along (`rbind`).
    pub fn is_recursive(&self) -> bool {
        self.is_recursive
    }

    /// Whether it must not be changed (`ro`), mounts below it aside.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether nothing below it must be changed (`rro`).
    pub fn is_recursively_read_only(&self) -> bool {
        self.recursively_read_only
    }

    /// Whether what the host mounts below the source later is to appear (`slave`, `rslave`).
    pub fn follows_host(&self) -> bool {
        self.follows_host
    }
}

/// Whether a mount is a bind mount (config.md, "Mounts": by type, or by option).
fn is_bind(mount: &Mount) -> bool {
    mount.typ().as_deref() == Some("bind") || has_option(mount, &["bind", "rbind"])
}

fn has_option(mount: &Mount, names: &[&str]) -> bool {
    mount.options().iter().flatten().any(|option| names.contains(&option.as_str()))
}

/// Whether of the options named the last one given is of the first list: later options undo earlier ones, as in mount(8).
fn last_option(mount: &Mount, yes: &[&str], no: &[&str]) -> bool {
    let options = mount.options().iter().flatten().rev();
    let mut decisive = options.filter_map(|o| {
        if yes.contains(&o.as_str()) { Some(true) } else { no.contains(&o.as_str()).then_some(false) }
    });
    decisive.next().unwrap_or(false)
}

pub(super) fn check(spec: &Spec) -> Result<(), Fault> {
    spec.mounts().iter().flatten().enumerate().try_for_each(|(index, mount)| check_one(index, mount))
}

fn check_one(index: usize, mount: &Mount) -> Result<(), Fault> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    let destination = mount.destination();
    if !destination.is_absolute() {
        let problem = format!("{destination:?} is not absolute: it must start with /");
        return Err(Fault::new(field("destination"), problem));
    }
    if mount.uid_mappings().is_some()
        || mount.gid_mappings().is_some()
        || has_option(mount, &["idmap", "ridmap"])
    {
        let problem = "asks for an ID-mapped mount, which kvrun does not have; leave out uidMappings, gidMappings, idmap and ridmap";
        return Err(Fault::new(format!("mounts[{index}]"), problem));
    }
    if is_bind(mount) {
        if mount.source().as_ref().is_none_or(|s| s.as_os_str().is_empty()) {
            let problem = format!("is missing: the bind mount at {} needs a source", destination.display());
            return Err(Fault::new(field("source"), problem));
        }
        if has_option(mount, &["shared", "rshared"]) {
            let problem = "has shared or rshared: a mount made in the guest cannot appear on the host; use rslave or rprivate";
            return Err(Fault::new(field("options"), problem));
        }
        return Ok(());
    }
    match mount.typ().as_deref() {
        Some(typ) if TYPES.contains(&typ) => Ok(()),
        Some(typ) => {
            let problem = format!("{typ:?} is not supported; use bind or one of {}", TYPES.join(", "));
            Err(Fault::new(field("type"), problem))
        }
        None => Err(Fault::new(field("type"), "is missing: it must be bind or a file system".to_owned())),
    }
}

/// Opens the sources of all bind mounts of a spec that was checked.
pub(super) fn open_binds(
    config: &Path,
    bundle: BorrowedFd<'_>,
    spec: &Spec,
) -> Result<Vec<Bind>, BundleError> {
    let mut binds = Vec::new();
    for (index, mount) in spec.mounts().iter().flatten().enumerate().filter(|(_, mount)| is_bind(mount)) {
        let path = mount.source().clone().unwrap_or_default();
        let field = format!("mounts[{index}].source");
        let (source, kind) = open_named(config, bundle, &field, &path, OFlags::empty())?;
        if !is_shareable(kind) {
            let problem = format!(
                "{} is {}, which cannot be shared with a virtual machine; only directories and regular files can",
                path.display(),
                name_of(kind)
            );
            return Err(BundleError::Field { path: config.to_owned(), fault: Fault::new(field, problem) });
        }
        let typ = mount.typ().as_deref();
        binds.push(Bind {
            index,
            path,
            source,
            is_directory: kind == FileType::Directory,
            // `bind` as a type with no option: MS_BIND alone, as runc has it.
            is_recursive: has_option(mount, &["rbind"]) || (typ == Some("rbind")),
            read_only: last_option(mount, &["ro"], &["rw"]),
            recursively_read_only: last_option(mount, &["rro"], &["rrw"]),
            follows_host: last_option(
                mount,
                &["slave", "rslave"],
                &["private", "rprivate", "unbindable", "runbindable"],
            ),
        });
    }
    Ok(binds)
}

fn name_of(kind: FileType) -> &'static str {
    match kind {
        FileType::Socket => "a socket",
        FileType::Fifo => "a FIFO",
        FileType::BlockDevice => "a block device",
        FileType::CharacterDevice => "a character device",
        _ => "a special file",
    }
}
