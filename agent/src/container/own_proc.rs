//! What a container's own `/proc` has, for whoever looks at its processes from the host.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;

use kvrun_agent_api::agent::{Names, look_at_proc_response::Entry};
use rustix::fs::{AtFlags, Dir, FileType, Mode, OFlags, PROC_SUPER_MAGIC, ResolveFlags, fstatfs, openat2};

use crate::oci::in_root;

/// The most that is read of a file, in bytes.
const MAX_DATA: u64 = 64 * 1024;
/// The most names that are read of a directory.
const MAX_NAMES: usize = 32 * 1024;

/// Looks at a path below the `/proc` of a process of the container, as that has it mounted. Only what procfs itself has there is found: nothing that
/// somebody has mounted over it, and nothing behind a link.
///
/// # Errors
/// openat2(2), read(2); `NotFound` also if there is no procfs.
pub fn look(pid: i32, path: &Path) -> io::Result<Entry> {
    let root = File::open(format!("/proc/{pid}/root"))?;
    let proc = in_root::open_without_links(&root, Path::new("proc"))?;
    if fstatfs(&proc)?.f_type != PROC_SUPER_MAGIC {
        return Err(io::ErrorKind::NotFound.into());
    }
    let path = if path.as_os_str().is_empty() { Path::new(".") } else { path };
    let open = |flags: OFlags| {
        let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_XDEV | ResolveFlags::NO_SYMLINKS;
        openat2(&proc, path, flags | OFlags::CLOEXEC | OFlags::NOFOLLOW, Mode::empty(), resolve)
    };
    let found = open(OFlags::PATH)?;
    match FileType::from_raw_mode(rustix::fs::statat(&found, "", AtFlags::EMPTY_PATH)?.st_mode) {
        FileType::Directory => names(open(OFlags::RDONLY | OFlags::DIRECTORY)?),
        FileType::Symlink => Ok(Entry::Link(rustix::fs::readlinkat(&found, "", Vec::new())?.into_bytes())),
        _ => {
            let mut data = Vec::new();
            File::from(open(OFlags::RDONLY | OFlags::NONBLOCK)?).take(MAX_DATA).read_to_end(&mut data)?;
            Ok(Entry::File(data))
        }
    }
}

fn names(dir: impl AsFd) -> io::Result<Entry> {
    let mut names = Vec::new();
    for entry in Dir::read_from(dir)?.take(MAX_NAMES) {
        let name = entry?.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push(name);
        }
    }
    Ok(Entry::Directory(Names { names, ..Default::default() }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_procfs_has_is_found_and_nothing_behind_it() {
        let me = std::process::id();
        let look = |path: &str| look(me as i32, Path::new(path));
        let Entry::Directory(names) = look("").unwrap() else { panic!("not a directory") };
        assert!([me.to_string(), "stat".to_owned()].iter().all(|name| names.names.contains(name)));
        let Entry::File(status) = look(&format!("{me}/status")).unwrap() else { panic!("not a file") };
        assert!(String::from_utf8(status).unwrap().contains(&format!("\nPid:\t{me}\n")));
        let Entry::Link(namespace) = look(&format!("{me}/ns/pid")).unwrap() else { panic!("not a link") };
        assert!(namespace.starts_with(b"pid:["));
        for path in
            ["../etc/passwd", "/etc/passwd", "self/status", "no/such", &format!("{me}/root/etc/passwd")]
        {
            look(path).unwrap_err();
        }
    }
}
