//! `mounts[].options` (config.md, "Linux mount options"): which attributes of the mount they are, and what is left for the file system.
//! Later options undo earlier ones, as in mount(8). What would have no effect is refused.

use oci_spec::runtime::Mount;

use super::error::SetupError;
use super::sys::MountAttr;

const ATIME: u64 = libc::MOUNT_ATTR__ATIME;

/// Attributes of a mount by option: what is set, what is cleared. Each exists with an `r` before it, for the mounts below as well.
const ATTRIBUTES: [(&str, u64, u64); 21] = [
    ("ro", libc::MOUNT_ATTR_RDONLY, 0),
    ("rw", 0, libc::MOUNT_ATTR_RDONLY),
    ("nosuid", libc::MOUNT_ATTR_NOSUID, 0),
    ("suid", 0, libc::MOUNT_ATTR_NOSUID),
    ("nodev", libc::MOUNT_ATTR_NODEV, 0),
    ("dev", 0, libc::MOUNT_ATTR_NODEV),
    ("noexec", libc::MOUNT_ATTR_NOEXEC, 0),
    ("exec", 0, libc::MOUNT_ATTR_NOEXEC),
    ("nosymfollow", libc::MOUNT_ATTR_NOSYMFOLLOW, 0),
    ("symfollow", 0, libc::MOUNT_ATTR_NOSYMFOLLOW),
    ("nodiratime", libc::MOUNT_ATTR_NODIRATIME, 0),
    ("diratime", 0, libc::MOUNT_ATTR_NODIRATIME),
    // One of three, the kernel wants the field cleared (mount_setattr(2)).
    ("relatime", libc::MOUNT_ATTR_RELATIME, ATIME),
    ("noatime", libc::MOUNT_ATTR_NOATIME, ATIME),
    ("strictatime", libc::MOUNT_ATTR_STRICTATIME, ATIME),
    // Back to the default, which is relatime.
    ("atime", libc::MOUNT_ATTR_RELATIME, ATIME),
    ("norelatime", libc::MOUNT_ATTR_STRICTATIME, ATIME),
    ("nostrictatime", libc::MOUNT_ATTR_RELATIME, ATIME),
    ("defaults", 0, 0),
    // A file system made by fsopen(2) tells its caller what is wrong, and not the kernel's log.
    ("silent", 0, 0),
    ("loud", 0, 0),
];

const PROPAGATION: [(&str, libc::c_ulong); 4] = [
    ("shared", libc::MS_SHARED),
    ("slave", libc::MS_SLAVE),
    ("private", libc::MS_PRIVATE),
    ("unbindable", libc::MS_UNBINDABLE),
];

/// The state a file system has anyway.
const DEFAULTS: [&str; 4] = ["async", "nomand", "noiversion", "nolazytime"];
/// Attributes of a file system rather than of a mount.
const OF_FILE_SYSTEM: [&str; 3] = ["sync", "dirsync", "lazytime"];

/// Options, sorted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct MountOptions {
    /// A bind mount, and whether with the mounts below its source.
    pub bind: Option<bool>,
    /// Attributes of the mount itself.
    pub attr: MountAttr,
    /// Attributes of the mount and those below it.
    pub recursive: MountAttr,
    /// `MS_*`, and whether for the mounts below as well.
    pub propagation: Vec<(u64, bool)>,
    /// What the image has at the mount point is copied into the new tmpfs.
    pub copy_up: bool,
    /// For the file system: a flag, or a name and its value.
    pub data: Vec<(String, Option<String>)>,
}

impl MountOptions {
    /// Sorts the options of `mounts[index]`.
    ///
    /// # Errors
    ///
    /// [`SetupError::Field`].
    pub fn parse(index: usize, mount: &Mount) -> Result<Self, SetupError> {
        let mut options = Self::default();
        let typ = mount.typ().as_deref();
        if typ == Some("bind") {
            options.bind = Some(false);
        }
        for option in mount.options().iter().flatten() {
            options.take(option);
        }
        let refuse = |problem: String| Err(SetupError::field(format!("mounts[{index}].options"), problem));
        if options.copy_up && typ != Some("tmpfs") {
            return refuse("has tmpcopyup, which is for the type tmpfs".to_owned());
        }
        for (name, _) in &options.data {
            if matches!(name.as_str(), "remount" | "mand" | "iversion") {
                return refuse(format!("has {name}, which has no effect on a new mount; remove it"));
            }
            if options.bind.is_some() {
                return refuse(format!("has {name:?}, which has no effect on a bind mount; remove it"));
            }
        }
        Ok(options)
    }

    fn take(&mut self, option: &str) {
        match option {
            "bind" => self.bind = Some(self.bind.unwrap_or(false)),
            "rbind" => self.bind = Some(true),
            "tmpcopyup" => self.copy_up = true,
            // The pod engine maps IDs on the host, where the file system is.
            "idmap" | "ridmap" => {}
            _ if DEFAULTS.contains(&option) => {
                let opposite = option.strip_prefix("no").unwrap_or("sync");
                self.data.retain(|(name, _)| name != opposite);
            }
            _ if OF_FILE_SYSTEM.contains(&option) => self.data.push((option.to_owned(), None)),
            _ => {
                if let Some((_, set, clear)) = ATTRIBUTES.iter().find(|(name, ..)| *name == option) {
                    change(&mut self.attr, *set, *clear);
                } else if let Some(rest) = option.strip_prefix('r')
                    && let Some((_, set, clear)) = ATTRIBUTES[..18].iter().find(|(name, ..)| *name == rest)
                {
                    change(&mut self.recursive, *set, *clear);
                } else if let Some((_, flag)) = PROPAGATION.iter().find(|(name, _)| *name == option) {
                    self.propagation.push((*flag, false));
                } else if let Some(rest) = option.strip_prefix('r')
                    && let Some((_, flag)) = PROPAGATION.iter().find(|(name, _)| *name == rest)
                {
                    self.propagation.push((*flag, true));
                } else {
                    let (name, value) = match option.split_once('=') {
                        Some((name, value)) => (name, Some(value.to_owned())),
                        None => (option, None),
                    };
                    self.data.push((name.to_owned(), value));
                }
            }
        }
    }
}

fn change(attr: &mut MountAttr, set: u64, clear: u64) {
    attr.set = (attr.set & !clear) | set;
    // A bit that is set again need not be cleared, the field of three bits aside.
    attr.clear = (attr.clear & !(set & !ATIME)) | clear;
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(typ: &str, list: &[&str]) -> Result<MountOptions, String> {
        let json = serde_json::json!({ "destination": "/d", "type": typ, "source": "s", "options": list });
        let mount: Mount = serde_json::from_value(json).unwrap();
        MountOptions::parse(7, &mount).map_err(|err| err.to_string())
    }

    #[test]
    fn options_become_attributes_and_the_rest_is_the_file_systems() {
        let options =
            parse("tmpfs", &["nosuid", "strictatime", "mode=755", "size=64k", "tmpcopyup", "noswap"])
                .unwrap();
        assert_eq!(options.attr.set, libc::MOUNT_ATTR_NOSUID | libc::MOUNT_ATTR_STRICTATIME);
        assert_eq!(options.attr.clear, ATIME);
        let data: Vec<_> =
            options.data.iter().map(|(name, value)| (name.as_str(), value.as_deref())).collect();
        assert_eq!(data, [("mode", Some("755")), ("size", Some("64k")), ("noswap", None)]);
        assert!(options.copy_up && options.bind.is_none());
    }

    #[test]
    fn later_options_undo_earlier_ones() {
        let attr = |list: &[&str]| parse("tmpfs", list).unwrap().attr;
        assert_eq!(attr(&["ro", "rw"]), MountAttr { set: 0, clear: libc::MOUNT_ATTR_RDONLY, propagation: 0 });
        assert_eq!(attr(&["rw", "ro"]), MountAttr { set: libc::MOUNT_ATTR_RDONLY, clear: 0, propagation: 0 });
        assert_eq!(attr(&["noatime", "relatime"]), MountAttr { set: 0, clear: ATIME, propagation: 0 });
        assert!(parse("tmpfs", &["sync", "async", "lazytime", "nolazytime"]).unwrap().data.is_empty());
    }

    #[test]
    fn recursive_options_and_propagation() {
        let options = parse("bind", &["rbind", "rro", "rnosuid", "rslave", "private"]).unwrap();
        assert_eq!(options.bind, Some(true));
        assert_eq!(options.recursive.set, libc::MOUNT_ATTR_RDONLY | libc::MOUNT_ATTR_NOSUID);
        assert_eq!(options.propagation, [(libc::MS_SLAVE, true), (libc::MS_PRIVATE, false)]);
        // Not "r" and an option: "rw" is itself, and so is "relatime".
        assert_eq!(parse("bind", &["rw", "relatime"]).unwrap().recursive, MountAttr::default());
        assert_eq!(parse("bind", &["rrw", "rrelatime"]).unwrap().attr, MountAttr::default());
    }

    #[test]
    fn what_has_no_effect_is_refused() {
        for (typ, option) in [
            ("bind", "sync"),
            ("bind", "size=5"),
            ("tmpfs", "remount"),
            ("tmpfs", "mand"),
            ("proc", "tmpcopyup"),
        ] {
            let text = parse(typ, &[option]).unwrap_err();
            assert!(text.starts_with("mounts[7].options has "), "{text}");
        }
    }
}
