//! Bind mounts of a file system of huge pages (hugetlbfs), as a kubelet makes one for an emptyDir of the medium `HugePages`. Huge pages of the host are of no
//! use in a guest, which has memory of its own: the container gets a hugetlbfs of the guest's, empty, and not shared with other containers.

use std::io;
use std::os::fd::AsFd;

use oci_spec::runtime::Mount;
use rustix::fs::{fstat, fstatfs};

/// Linux include/uapi/linux/magic.h, `HUGETLBFS_MAGIC`.
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;
/// The size of huge pages that the guest makes of its memory as they are asked for; larger ones it would have to keep from its start on.
const PAGE: u64 = 2 << 20;

/// A directory of a hugetlbfs of the host.
#[derive(Debug)]
pub(super) struct HugePages {
    mode: u32,
    uid: u32,
    gid: u32,
}

impl HugePages {
    /// What a tree is, if it is that.
    ///
    /// # Errors
    /// It cannot be looked at; its pages are of another size than the guest's.
    pub(super) fn of(tree: impl AsFd) -> io::Result<Option<Self>> {
        let fs = fstatfs(&tree)?;
        if u64::try_from(fs.f_type) != Ok(HUGETLBFS_MAGIC) {
            return Ok(None);
        }
        // Documentation/admin-guide/mm/hugetlbpage.rst; fs/hugetlbfs/inode.c, hugetlbfs_statfs.
        if u64::try_from(fs.f_bsize) != Ok(PAGE) {
            let problem = format!("it has pages of {} bytes, and a guest those of {PAGE}", fs.f_bsize);
            return Err(io::Error::new(io::ErrorKind::Unsupported, problem));
        }
        let stat = fstat(tree)?;
        Ok(Some(Self { mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid }))
    }

    /// Has the guest mount one of its own, whose owner and mode are the same.
    pub(super) fn mount_instead(&self, mount: &mut Mount) {
        let mut options = mount.options().clone().unwrap_or_default();
        options.retain(|option| !matches!(option.as_str(), "bind" | "rbind"));
        let Self { mode, uid, gid } = self;
        options.extend([
            "pagesize=2M".to_owned(),
            format!("mode={mode:o}"),
            format!("uid={uid}"),
            format!("gid={gid}"),
        ]);
        mount.set_typ(Some("hugetlbfs".to_owned()));
        mount.set_source(Some("hugetlbfs".into()));
        mount.set_options(Some(options));
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;

    #[test]
    fn other_file_systems_are_left_alone() {
        assert!(HugePages::of(File::open("/proc").unwrap()).unwrap().is_none());
    }

    #[test]
    fn flags_of_the_mount_stay() {
        let mut mount = Mount::default();
        mount.set_options(Some(["rbind", "rprivate", "nosuid"].map(str::to_owned).to_vec()));
        HugePages { mode: 0o1777, uid: 1, gid: 2 }.mount_instead(&mut mount);
        let options = mount.options().as_deref().unwrap_or_default();
        assert_eq!(options, ["rprivate", "nosuid", "pagesize=2M", "mode=1777", "uid=1", "gid=2"]);
        assert_eq!(mount.typ().as_deref(), Some("hugetlbfs"));
    }
}
