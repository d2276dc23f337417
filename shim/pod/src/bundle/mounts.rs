//! The rules for `mounts`, and the sources of those that are bind mounts.

use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxIdMapping, Mount, Spec};
use rustix::fs::{FileType, OFlags, Stat, major, minor};

use super::open::Opener;
use super::{BundleError, Fault};
use crate::share::is_shareable;

/// File systems a container may have mounted: those of the guest's kernel that need nothing of the host.
const TYPES: [&str; 9] =
    ["proc", "sysfs", "tmpfs", "devpts", "mqueue", "cgroup", "cgroup2", "ramfs", "hugetlbfs"];

/// A bind mount whose source was found.
#[derive(Debug)]
pub struct Bind {
    index: usize,
    path: PathBuf,
    is_directory: bool,
    is_recursive: bool,
    read_only: bool,
    recursively_read_only: bool,
    follows_host: bool,
    id_map: Option<IdMap>,
    guest_device: Option<&'static str>,
}

impl Bind {
    /// How the owners of its files appear, if not as they are.
    pub fn id_map(&self) -> Option<&IdMap> {
        self.id_map.as_ref()
    }

    /// Which of the spec's mounts it is.
    pub fn index(&self) -> usize {
        self.index
    }

    /// The source as the spec has it, for messages.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// If the source is a character device that the guest has of its own: where it has it. That is what the container gets, not the host's.
    pub fn guest_device(&self) -> Option<&'static str> {
        self.guest_device
    }

    /// Whether the source is a directory; else it is a regular file, or a device.
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
pub(super) fn is_bind(mount: &Mount) -> bool {
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
    spec.mounts().iter().flatten().enumerate().try_for_each(|(index, mount)| check_one(index, mount, spec))
}

fn check_one(index: usize, mount: &Mount, spec: &Spec) -> Result<(), Fault> {
    let field = |name: &str| format!("mounts[{index}].{name}");
    let destination = mount.destination();
    if !destination.is_absolute() {
        let problem = format!("{destination:?} is not absolute: it must start with /");
        return Err(Fault::new(field("destination"), problem));
    }
    id_map(index, mount, spec)?;
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

/// How the owners of files appear in a bind mount (config.md, "Mounts": `uidMappings`, `gidMappings`, and the options `idmap`, `ridmap`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IdMap {
    /// For `/proc/PID/uid_map`: what is on disk, what it appears as, how many.
    pub(crate) uids: String,
    /// As above, for groups.
    pub(crate) gids: String,
    /// Whether mounts below the source are mapped as well.
    pub(crate) recursive: bool,
}

/// Without mappings of its own, an ID-mapped mount has those of the container's user namespace.
fn id_map(index: usize, mount: &Mount, spec: &Spec) -> Result<Option<IdMap>, Fault> {
    let recursive = has_option(mount, &["ridmap"]);
    let asked = recursive || has_option(mount, &["idmap"]);
    let own = (mount.uid_mappings().as_deref(), mount.gid_mappings().as_deref());
    let (uids, gids, field) = match own {
        (None, None) if !asked => return Ok(None),
        (None, None) => {
            let linux = spec.linux().as_ref();
            let uids = linux.and_then(|linux| linux.uid_mappings().as_deref());
            let gids = linux.and_then(|linux| linux.gid_mappings().as_deref());
            (uids.unwrap_or_default(), gids.unwrap_or_default(), "options")
        }
        (Some(uids), Some(gids)) => (uids, gids, "uidMappings"),
        (Some(_), None) => {
            return Err(Fault::new(
                format!("mounts[{index}].gidMappings"),
                "is missing: uidMappings needs it",
            ));
        }
        (None, Some(_)) => {
            return Err(Fault::new(
                format!("mounts[{index}].uidMappings"),
                "is missing: gidMappings needs it",
            ));
        }
    };
    let field = format!("mounts[{index}].{field}");
    if !is_bind(mount) {
        return Err(Fault::new(field, "asks for an ID-mapped mount, which must be a bind mount"));
    }
    if uids.is_empty() || gids.is_empty() {
        return Err(Fault::new(
            field,
            "asks for an ID-mapped mount without mappings: it needs uidMappings and gidMappings, or a user namespace with them",
        ));
    }
    let lines = |mappings: &[LinuxIdMapping]| {
        mappings.iter().map(|m| format!("{} {} {}\n", m.container_id(), m.host_id(), m.size())).collect()
    };
    Ok(Some(IdMap { uids: lines(uids), gids: lines(gids), recursive }))
}

/// Opens the sources of all bind mounts of a spec that was checked.
pub(super) fn open_binds(
    config: &Path,
    spec: &Spec,
    opener: &mut dyn Opener,
) -> Result<Vec<Bind>, BundleError> {
    let mut binds = Vec::new();
    for (index, mount) in spec.mounts().iter().flatten().enumerate().filter(|(_, mount)| is_bind(mount)) {
        let path = mount.source().clone().unwrap_or_default();
        let field = format!("mounts[{index}].source");
        let opened = opener.file(&path, OFlags::empty());
        let stat = opened.map_err(|source| BundleError::named(config, &field, &path, source))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let guest_device = guest_device(&stat);
        if !is_shareable(kind) && guest_device.is_none() {
            let problem = format!(
                "{} is {}, which cannot be shared with a virtual machine; only directories, regular files and devices that the guest has of its own can",
                path.display(),
                name_of(kind)
            );
            return Err(BundleError::Field { path: config.to_owned(), fault: Fault::new(field, problem) });
        }
        let typ = mount.typ().as_deref();
        binds.push(Bind {
            index,
            path,
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
            id_map: id_map(index, mount, spec)
                .map_err(|fault| BundleError::Field { path: config.to_owned(), fault })?,
            guest_device,
        });
    }
    Ok(binds)
}

fn guest_device(stat: &Stat) -> Option<&'static str> {
    if FileType::from_raw_mode(stat.st_mode) != FileType::CharacterDevice {
        return None;
    }
    super::check::guest_device(major(stat.st_rdev).into(), minor(stat.st_rdev).into())
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
