//! What is in a volume, all of it, as the agent takes it.

use std::collections::BTreeMap;
use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, OwnedFd};

use kvrun_agent_api::agent::volume_entry::Kind;
use kvrun_agent_api::agent::{Empty, VolumeEntry};
use kvrun_agent_api::{MAX_VOLUME_BYTES, MAX_VOLUME_DEPTH, MAX_VOLUME_ENTRIES};
use rustix::fs::{
    AtFlags, Dir, FileType, Mode, OFlags, ResolveFlags, Stat, fstat, openat2, readlinkat, statat,
};
use rustix::io::Errno;

/// How often a volume is read that changes all the time.
const READINGS: usize = 16;

/// Why there is nothing to send.
#[derive(Debug, thiserror::Error)]
pub(super) enum TreeError {
    #[error(
        "it has more than {MAX_VOLUME_ENTRIES} entries, more than {MAX_VOLUME_BYTES} bytes, or directories more than {MAX_VOLUME_DEPTH} deep"
    )]
    TooLarge,
    #[error("{path} in it is {what}")]
    Foreign { path: String, what: &'static str },
    #[error("it changes all the time")]
    Restless,
    #[error("it was removed")]
    Removed,
    #[error("read {path:?} in it")]
    Read {
        path: String,
        #[source]
        source: io::Error,
    },
}

/// Reads a volume as it is at one moment: until two readings are alike. What has changed between them would else lead nowhere in the guest, for a moment.
pub(super) fn read(directory: &OwnedFd) -> Result<Vec<VolumeEntry>, TreeError> {
    let mut last = Reading::of(directory)?;
    for _ in 1..READINGS {
        let again = Reading::of(directory)?;
        if again == last {
            return Ok(again);
        }
        last = again;
    }
    Err(TreeError::Restless)
}

struct Reading {
    entries: Vec<VolumeEntry>,
    bytes: usize,
}

impl Reading {
    fn of(directory: &OwnedFd) -> Result<Vec<VolumeEntry>, TreeError> {
        let failed = |errno: Errno| TreeError::Read { path: String::new(), source: errno.into() };
        let stat = fstat(directory).map_err(failed)?;
        if stat.st_nlink == 0 {
            return Err(TreeError::Removed);
        }
        let mut reading = Self { entries: Vec::new(), bytes: 0 };
        reading.add(String::new(), &stat, Kind::Directory(Empty::new()))?;
        reading.read(directory, "", 0)?;
        Ok(reading.entries)
    }

    fn add(&mut self, path: String, stat: &Stat, kind: Kind) -> Result<(), TreeError> {
        if self.entries.len() == MAX_VOLUME_ENTRIES {
            return Err(TreeError::TooLarge);
        }
        let (mode, uid, gid) = (stat.st_mode & 0o7777, stat.st_uid, stat.st_gid);
        self.entries.push(VolumeEntry { path, mode, uid, gid, kind: Some(kind), ..Default::default() });
        Ok(())
    }

    /// Adds what is in a directory, in the order of names. What goes while we look is left out: that is a change, of which we hear.
    fn read(&mut self, directory: impl AsFd, above: &str, depth: usize) -> Result<(), TreeError> {
        if depth == MAX_VOLUME_DEPTH {
            return Err(TreeError::TooLarge);
        }
        let failed = |path: &str| {
            let path = path.to_owned();
            move |errno: Errno| TreeError::Read { path, source: errno.into() }
        };
        let mut names = BTreeMap::new();
        for entry in Dir::read_from(&directory).map_err(failed(above))? {
            let entry = entry.map_err(failed(above))?;
            let name = entry.file_name();
            if matches!(name.to_bytes(), b"." | b"..") {
                continue;
            }
            if self.entries.len() + names.len() == MAX_VOLUME_ENTRIES {
                return Err(TreeError::TooLarge);
            }
            let below = if above.is_empty() { String::new() } else { format!("{above}/") };
            let Ok(text) = name.to_str() else {
                let path = format!("{below}{}", name.to_string_lossy());
                return Err(TreeError::Foreign { path, what: "of a name that is not UTF-8" });
            };
            names.insert(name.to_owned(), format!("{below}{text}"));
        }
        for (name, path) in names {
            match self.read_one(&directory, &name, &path, depth) {
                Err(OneError::Gone) => {}
                Err(OneError::Tree(error)) => return Err(error),
                Err(OneError::Os(Errno::XDEV)) => {
                    return Err(TreeError::Foreign { path, what: "another file system" });
                }
                Err(OneError::Os(errno)) => return Err(failed(&path)(errno)),
                Ok(()) => {}
            }
        }
        Ok(())
    }

    fn read_one(
        &mut self,
        directory: impl AsFd,
        name: &CStr,
        path: &str,
        depth: usize,
    ) -> Result<(), OneError> {
        let stat = statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let open = |flags: OFlags| {
            let flags = flags | OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
            let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
            openat2(&directory, name, flags, Mode::empty(), resolve)
        };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                let below = open(OFlags::DIRECTORY)?;
                self.add(path.to_owned(), &stat, Kind::Directory(Empty::new()))?;
                self.read(&below, path, depth + 1)?;
            }
            FileType::RegularFile => {
                let file = open(OFlags::empty())?;
                if FileType::from_raw_mode(fstat(&file)?.st_mode) != FileType::RegularFile {
                    return Err(OneError::Gone);
                }
                let left = MAX_VOLUME_BYTES - self.bytes;
                let mut content = Vec::new();
                let read = File::from(file).take(left as u64 + 1).read_to_end(&mut content);
                read.map_err(|source| TreeError::Read { path: path.to_owned(), source })?;
                if content.len() > left {
                    return Err(TreeError::TooLarge.into());
                }
                self.bytes += content.len();
                self.add(path.to_owned(), &stat, Kind::File(content))?;
            }
            FileType::Symlink => {
                let target = readlinkat(&directory, name, Vec::new())?.into_bytes();
                self.add(path.to_owned(), &stat, Kind::Link(target))?;
            }
            _ => {
                let what = "no directory, file or link";
                return Err(TreeError::Foreign { path: path.to_owned(), what }.into());
            }
        }
        Ok(())
    }
}

/// Why an entry was not read.
enum OneError {
    /// It is not there any more, or is something else.
    Gone,
    Os(Errno),
    Tree(TreeError),
}

impl From<Errno> for OneError {
    fn from(errno: Errno) -> Self {
        match errno {
            Errno::NOENT | Errno::LOOP | Errno::NOTDIR | Errno::NXIO => Self::Gone,
            errno => Self::Os(errno),
        }
    }
}

impl From<TreeError> for OneError {
    fn from(error: TreeError) -> Self {
        Self::Tree(error)
    }
}
