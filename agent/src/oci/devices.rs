//! `/dev`: the default devices and links of config-linux.md, and `linux.devices`.

use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use oci_spec::runtime::{LinuxDevice, LinuxDeviceType, LinuxNamespaceType, Spec};
use rustix::fs::{
    AtFlags, FileType, Gid, Mode, Uid, chmodat, chownat, fstat, major, makedev, minor, mknodat, stat, statat,
    symlinkat, unlinkat,
};
use rustix::io::Errno;

use super::error::{SetupError, system};
use super::in_root;
use super::rootfs::{attach_at, clone_file};

/// Default devices, major and minor number (Linux Documentation/admin-guide/devices.txt).
const DEFAULT: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];

/// Default links and what they lead to. `ptmx` is config-linux.md's; `core` is runc's.
const LINKS: [(&str, &str); 5] = [
    ("fd", "/proc/self/fd"),
    ("stdin", "/proc/self/fd/0"),
    ("stdout", "/proc/self/fd/1"),
    ("stderr", "/proc/self/fd/2"),
    ("core", "/proc/kcore"),
];

/// A device node to be made.
#[derive(Debug)]
struct Node {
    field: String,
    path: PathBuf,
    kind: FileType,
    number: u64,
    mode: u32,
    owner: (u32, u32),
}

/// A device of the guest, to be mounted over a file.
#[derive(Debug)]
pub struct Bound {
    node: Node,
    tree: OwnedFd,
}

fn nodes(spec: &Spec) -> Result<Vec<Node>, SetupError> {
    let mut list = Vec::new();
    let devices = spec.linux().as_ref().and_then(|linux| linux.devices().as_deref()).unwrap_or_default();
    for (index, device) in devices.iter().enumerate() {
        list.push(node(format!("linux.devices[{index}]"), device)?);
    }
    for (path, major, minor) in DEFAULT {
        if !devices.iter().any(|device| device.path() == Path::new(path)) {
            list.push(Node {
                field: "default devices".to_owned(),
                path: path.into(),
                kind: FileType::CharacterDevice,
                number: makedev(major, minor),
                mode: 0o666,
                owner: (0, 0),
            });
        }
    }
    Ok(list)
}

fn node(field: String, device: &LinuxDevice) -> Result<Node, SetupError> {
    let kind = match device.typ() {
        LinuxDeviceType::C | LinuxDeviceType::U => FileType::CharacterDevice,
        LinuxDeviceType::B => FileType::BlockDevice,
        LinuxDeviceType::P => FileType::Fifo,
        LinuxDeviceType::A => return Err(SetupError::field(format!("{field}.type"), "must be c, b, u or p")),
    };
    let number = |name: &str, value: i64| {
        u32::try_from(value)
            .map_err(|_| SetupError::field(format!("{field}.{name}"), format!("{value} is no device number")))
    };
    let number = match kind {
        FileType::Fifo => 0,
        _ => makedev(number("major", device.major())?, number("minor", device.minor())?),
    };
    let (mode, owner) =
        (device.file_mode().unwrap_or(0o666), (device.uid().unwrap_or(0), device.gid().unwrap_or(0)));
    Ok(Node { field, path: device.path().clone(), kind, number, mode, owner })
}

/// Finds the guest's own nodes for a container in a user namespace, where none can be made (mknod(2), `EPERM`).
///
/// # Errors
///
/// [`SetupError`].
pub fn bound(spec: &Spec) -> Result<Vec<Bound>, SetupError> {
    let nodes = nodes(spec)?.into_iter().filter(|node| node.kind != FileType::Fifo);
    nodes
        .map(|node| {
            let find = |path: &Path| {
                stat(path).is_ok_and(|stat| {
                    stat.st_rdev == node.number && FileType::from_raw_mode(stat.st_mode) == node.kind
                })
            };
            // At its own path, or at that of a default device with another name.
            let default = DEFAULT.iter().find(|(_, major, minor)| makedev(*major, *minor) == node.number);
            let disk = disk(&node);
            let candidates =
                [Some(node.path.as_path()), default.map(|(path, ..)| Path::new(*path)), disk.as_deref()];
            let found = candidates.into_iter().flatten().find(|path| path.starts_with("/dev") && find(path));
            let path = found.map(Path::to_owned).ok_or_else(|| {
                let problem = format!(
                    "({}) cannot be made in a {} namespace, and the guest has no such device",
                    node.path.display(),
                    LinuxNamespaceType::User,
                );
                SetupError::field(&node.field, problem)
            })?;
            let tree =
                clone_file(&path).map_err(system(format!("{}: clone {}", node.field, path.display())))?;
            Ok(Bound { node, tree })
        })
        .collect()
}

/// Where the guest has a block device of these numbers, if it has.
fn disk(node: &Node) -> Option<PathBuf> {
    if node.kind != FileType::BlockDevice {
        return None;
    }
    // A link whose last part is the name.
    let link = format!("/sys/dev/block/{}:{}", major(node.number), minor(node.number));
    Some(Path::new("/dev").join(std::fs::read_link(link).ok()?.file_name()?))
}

/// Makes nodes and links. With the umask 0.
///
/// # Errors
///
/// [`SetupError`].
pub fn make(root: BorrowedFd<'_>, spec: &Spec, bound: Vec<Bound>) -> Result<(), SetupError> {
    let mut remaining = nodes(spec)?;
    for Bound { node, tree } in bound {
        remaining.retain(|other| other.path != node.path);
        let what = format!("{}: mount {}", node.field, node.path.display());
        in_root::make(root, &node.path, true)
            .and_then(|target| attach_at(&tree, &target))
            .map_err(system(what))?;
    }
    for node in &remaining {
        make_node(root, node)?;
    }
    let dev = in_root::open(root, Path::new("/dev")).map_err(system("open /dev"))?;
    for (name, target) in LINKS {
        match symlinkat(target, &dev, name) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(system(format!("make the link /dev/{name}"))(errno)),
        }
    }
    // The instance of the container's devpts, whatever was there.
    match unlinkat(&dev, "ptmx", AtFlags::empty()) {
        Ok(()) | Err(Errno::NOENT) => {}
        Err(errno) => return Err(system("replace /dev/ptmx")(errno)),
    }
    symlinkat("pts/ptmx", &dev, "ptmx").map_err(system("make the link /dev/ptmx"))
}

fn make_node(root: BorrowedFd<'_>, node: &Node) -> Result<(), SetupError> {
    let what = || system(format!("{}: make {}", node.field, node.path.display()));
    let (Some(parent), Some(name)) = (node.path.parent(), node.path.file_name()) else {
        return Err(SetupError::field(
            &node.field,
            format!("has the path {}, which is no file", node.path.display()),
        ));
    };
    let parent = in_root::make(root, parent, false).map_err(what())?;
    match mknodat(&parent, name, node.kind, Mode::from_raw_mode(node.mode), node.number) {
        Ok(()) => {}
        Err(Errno::EXIST) => {
            // config-linux.md, "Devices": "If a file already exists at path that does not match the requested device, the runtime
            // MUST generate an error."
            let found = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).map_err(what())?;
            let fits = FileType::from_raw_mode(found.st_mode) == node.kind
                && (node.kind == FileType::Fifo || found.st_rdev == node.number);
            if !fits {
                let problem = format!("({}) exists already, and is something else", node.path.display());
                return Err(SetupError::field(&node.field, problem));
            }
        }
        Err(errno) => return Err(what()(errno)),
    }
    let (uid, gid) = (Uid::from_raw(node.owner.0), Gid::from_raw(node.owner.1));
    chownat(&parent, name, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(what())?;
    chmodat(&parent, name, Mode::from_raw_mode(node.mode), AtFlags::empty()).map_err(what())
}

/// Whether a descriptor is the master end of a terminal multiplexer: character device 5:2.
#[must_use]
pub fn is_ptmx(fd: &OwnedFd) -> bool {
    fstat(fd).is_ok_and(|stat| {
        stat.st_rdev == makedev(5, 2) && FileType::from_raw_mode(stat.st_mode) == FileType::CharacterDevice
    })
}
