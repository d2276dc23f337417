//! An overlay of read-only layers and a directory that has what is changed in them (Linux 6.12 Documentation/filesystems/overlayfs.rst).

use std::os::fd::OwnedFd;

use rustix::fs::{AtFlags, Mode, OFlags, fchown, openat, statat, unlinkat};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use crate::mounts::MountError;
use crate::path::{RunPath, of_fd};

/// The directory of changes proper, in that which has all of them.
const UPPER: &str = "upper";
/// One that the kernel needs beside it, on the same mount.
const WORK: &str = "work";
/// What the kernel makes in that.
const WORK_IN_WORK: &str = "work";

/// What an overlay is made of.
#[derive(Clone, Debug)]
pub(crate) struct Overlay {
    changes: RunPath,
    upper: RunPath,
    work: RunPath,
    layers: Vec<RunPath>,
}

impl Overlay {
    /// Checks the parts of a request.
    ///
    /// # Errors
    ///
    /// [`MountError::Source`], [`MountError::Path`].
    pub(crate) fn parse(changes: &str, layers: &[String]) -> Result<Self, MountError> {
        let layers = layers.iter().map(|layer| {
            // What these mean among the options of an overlay is something else.
            if layer.contains([':', ',', '\\']) {
                return Err(MountError::Source(layer.chars().take(64).collect(), "a path of a layer"));
            }
            Ok(RunPath::parse(layer)?)
        });
        let layers = layers.collect::<Result<Vec<_>, MountError>>()?;
        if layers.is_empty() {
            return Err(MountError::Source(changes.chars().take(64).collect(), "over any layers"));
        }
        Ok(Self {
            changes: RunPath::parse(changes)?,
            upper: RunPath::parse(&format!("{changes}/{UPPER}"))?,
            work: RunPath::parse(&format!("{changes}/{WORK}"))?,
            layers,
        })
    }

    /// Where they are mounted, the uppermost first.
    pub(crate) fn layers(&self) -> &[RunPath] {
        &self.layers
    }

    /// Makes the directories, where they are missing.
    ///
    /// # Errors
    ///
    /// [`MountError::Path`], [`MountError::Changes`].
    pub(crate) fn make(&self) -> Result<Made<'_>, MountError> {
        let is_new = match self.upper.open_parent()? {
            Some((parent, name)) => statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW).is_err(),
            None => true,
        };
        let (upper, work) = (self.upper.open_or_create()?, self.work.open_or_create()?);
        let made = Made { overlay: self, upper, work };
        if is_new && let Err(errno) = made.give_root_its_owner() {
            made.remove();
            return Err(MountError::Changes(self.changes.clone(), errno.into()));
        }
        Ok(made)
    }
}

/// The directories, open as paths.
#[derive(Debug)]
pub(crate) struct Made<'o> {
    overlay: &'o Overlay,
    upper: OwnedFd,
    work: OwnedFd,
}

impl Made<'_> {
    /// The root of the overlay is to belong to whom that of the uppermost layer does.
    fn give_root_its_owner(&self) -> Result<(), Errno> {
        let Some(Ok(Some((parent, name)))) = self.overlay.layers.first().map(RunPath::open_parent) else {
            return Err(Errno::NOENT);
        };
        let layer = statat(&parent, name, AtFlags::SYMLINK_NOFOLLOW)?;
        let upper = openat(&self.upper, ".", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?;
        fchown(&upper, Some(Uid::from_raw(layer.st_uid)), Some(Gid::from_raw(layer.st_gid)))
    }

    /// What the kernel is told.
    pub(crate) fn options(&self) -> String {
        let layers: Vec<_> = self.overlay.layers.iter().map(ToString::to_string).collect();
        // By descriptor: a container may have put a symbolic link into what is shared.
        let (upper, work) = (of_fd(&self.upper), of_fd(&self.work));
        format!("lowerdir={},upperdir={},workdir={}", layers.join(":"), upper.display(), work.display())
    }

    /// Takes the directories away again, as far as nothing has been changed yet.
    pub(crate) fn remove(self) {
        let _ = unlinkat(&self.work, WORK_IN_WORK, AtFlags::REMOVEDIR);
        for path in [&self.overlay.work, &self.overlay.upper, &self.overlay.changes] {
            if let Ok(Some((parent, name))) = path.open_parent() {
                let _ = unlinkat(&parent, name, AtFlags::REMOVEDIR);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parts_are_checked() {
        let of = |changes: &str, layers: &[&str]| {
            Overlay::parse(changes, &layers.iter().map(|layer| (*layer).to_owned()).collect::<Vec<_>>())
        };
        let overlay = of("/run/kvrun/changes", &["/run/kvrun/layers/4", "/run/kvrun/layers/3"]).unwrap();
        assert_eq!(overlay.layers().len(), 2);
        assert_eq!(overlay.upper.to_string(), "/run/kvrun/changes/upper");
        for layers in
            [&[][..], &["/run/kvrun/a:/etc"], &["/run/kvrun/a,upperdir=/etc"], &["/run/kvrun/a\\:b"]]
        {
            assert!(matches!(of("/run/kvrun/changes", layers), Err(MountError::Source(..))), "{layers:?}");
        }
        for (changes, layer) in [("/etc", "/run/kvrun/a"), ("/run/kvrun/changes", "/etc")] {
            assert!(matches!(of(changes, &[layer]), Err(MountError::Path(_))), "{changes} {layer}");
        }
    }
}
