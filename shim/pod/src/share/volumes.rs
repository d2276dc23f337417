//! The sources of bind mounts, each once for all containers of the pod that have it.
//!
//! What is mounted twice on the host is two file systems to the guest, whatever is in them (Linux 6.12 fs/fuse/dir.c, `fuse_dentry_automount`): a lock that one
//! container has in the first does not keep another one out of the second, a socket in one is not that in the other, nor is a shared mapping.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsFd;

use rustix::fs::fstat;

/// What the share has in `volumes`, by number. No number is used twice.
#[derive(Debug, Default)]
pub(super) struct Volumes {
    next: u64,
    all: BTreeMap<u64, Volume>,
}

#[derive(Debug)]
struct Volume {
    file: FileId,
    is_directory: bool,
    users: usize,
}

/// Which file or directory it is, for as long as it is open: that at the root of a mount, or the image of a layer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(crate) struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    pub(crate) fn of(tree: impl AsFd) -> io::Result<Self> {
        let stat = fstat(tree)?;
        Ok(Self { device: stat.st_dev, inode: stat.st_ino })
    }
}

impl Volumes {
    /// A number for a volume to be made.
    pub(super) fn number(&mut self) -> u64 {
        let number = self.next;
        self.next += 1;
        number
    }

    /// Those that have the same file or directory, but perhaps with other mounts below it or other options.
    pub(super) fn alike(&self, file: FileId) -> impl Iterator<Item = u64> {
        self.all.iter().filter(move |(_, volume)| volume.file == file).map(|(number, _)| *number)
    }

    /// Adds one with one user.
    pub(super) fn insert(&mut self, number: u64, file: FileId, is_directory: bool) {
        self.all.insert(number, Volume { file, is_directory, users: 1 });
    }

    /// Adds a user.
    pub(super) fn use_again(&mut self, number: u64) {
        if let Some(volume) = self.all.get_mut(&number) {
            volume.users += 1;
        }
    }

    /// Takes a user away; whether it is a directory, if that was the last one.
    pub(super) fn release(&mut self, number: u64) -> Option<bool> {
        let volume = self.all.get_mut(&number)?;
        volume.users -= 1;
        if volume.users > 0 {
            return None;
        }
        self.all.remove(&number).map(|volume| volume.is_directory)
    }
}

/// Whether what is mounted at `old` and below it serves who asks for what is at `new`: the same parts of the same file systems with the same options. What
/// can be written to also serves who does not want to write: the guest sees to that. The paths are as in `table`, the contents of mountinfo
/// (proc_pid_mountinfo(5)).
pub(super) fn serves(table: &str, old: &str, new: &str) -> bool {
    let (old, new) = (mounts(table, old), mounts(table, new));
    !new.is_empty()
        && old.len() == new.len()
        && old
            .iter()
            .zip(&new)
            .all(|(old, new)| old.rest == new.rest && (old.is_writable || !new.is_writable))
}

/// A mount, as far as it matters.
#[derive(Debug)]
struct Entry<'t> {
    is_writable: bool,
    /// Where it is below the path, device, root in that, other options, whence it gets what is mounted later.
    rest: [&'t str; 5],
}

fn mounts<'t>(table: &'t str, path: &str) -> Vec<Entry<'t>> {
    let entry = |line: &'t str| {
        let mut fields = line.split(' ').skip(2);
        let (device, root, place, options) = (fields.next()?, fields.next()?, fields.next()?, fields.next()?);
        let below = place.strip_prefix(path).filter(|below| below.is_empty() || below.starts_with('/'))?;
        let (access, options) = options.split_once(',').unwrap_or((options, ""));
        let master = fields.take_while(|field| *field != "-").find(|field| field.starts_with("master:"));
        let rest = [below, device, root, options, master.unwrap_or_default()];
        Some(Entry { is_writable: access == "rw", rest })
    };
    let mut found: Vec<_> = table.lines().filter_map(entry).collect();
    found.sort_by_key(|entry| entry.rest);
    found
}

/// A path as mountinfo has it.
pub(super) fn escaped(path: &str) -> String {
    // Linux 6.12 fs/proc_namespace.c, `show_mountinfo`.
    let mut text = String::new();
    for c in path.chars() {
        match c {
            ' ' | '\t' | '\n' | '\\' => text.push_str(&format!("\\{:03o}", u32::from(c))),
            c => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn same_mounts_serve_and_others_do_not() {
        let table = "\
            1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/sda rw\n\
            2 1 8:1 /data /s/0 rw,nosuid,nodev shared:2 - ext4 /dev/sda rw\n\
            3 1 8:1 /data /s/1 rw,nosuid,nodev shared:3 - ext4 /dev/sda rw\n\
            4 1 8:1 /data /s/2 ro,nosuid,nodev shared:4 - ext4 /dev/sda rw\n\
            5 1 8:1 /data /s/3 rw,nosuid,nodev,noexec shared:5 - ext4 /dev/sda rw\n\
            6 1 8:1 /data /s/4 rw,nosuid,nodev shared:6 master:1 - ext4 /dev/sda rw\n\
            7 1 8:1 /data /s/5 rw,nosuid,nodev shared:7 - ext4 /dev/sda rw\n\
            8 7 0:9 / /s/5/below rw shared:8 - tmpfs none rw\n\
            9 1 8:1 /data /s/6 rw,nosuid,nodev shared:9 - ext4 /dev/sda rw\n\
            10 9 0:9 / /s/6/below rw shared:10 - tmpfs none rw\n\
            11 1 8:1 /data /s/11 rw,nosuid,nodev shared:11 - ext4 /dev/sda rw\n";
        let all = ["/s/0", "/s/1", "/s/2", "/s/3", "/s/4", "/s/5", "/s/6", "/s/11"];
        let pairs = |old: &str| -> Vec<_> { all.into_iter().filter(|new| serves(table, old, new)).collect() };
        assert_eq!(pairs("/s/0"), ["/s/0", "/s/1", "/s/2", "/s/11"]);
        assert_eq!(pairs("/s/2"), ["/s/2"], "what cannot be written to does not serve who writes");
        assert_eq!(pairs("/s/3"), ["/s/3"]);
        assert_eq!(pairs("/s/4"), ["/s/4"]);
        assert_eq!(pairs("/s/5"), ["/s/5", "/s/6"]);
        assert!(!serves(table, "/s/7", "/s/7"), "nothing is there");
    }

    #[test]
    fn paths_are_escaped_as_the_kernel_does() {
        assert_eq!(escaped("/a b\\c\n"), "/a\\040b\\134c\\012");
    }

    #[test]
    fn last_user_takes_a_volume_away() {
        let mut volumes = Volumes::default();
        let file = FileId { device: 1, inode: 2 };
        let number = volumes.number();
        volumes.insert(number, file, true);
        assert_eq!(volumes.alike(file).collect::<Vec<_>>(), [number]);
        assert_eq!(volumes.alike(FileId { device: 2, inode: 2 }).count(), 0);
        volumes.use_again(number);
        assert_eq!(volumes.release(number), None);
        assert_eq!(volumes.release(number), Some(true));
        assert_eq!(volumes.release(number), None);
        assert_eq!((volumes.alike(file).count(), volumes.number()), (0, number + 1));
    }
}
