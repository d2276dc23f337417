//! What a virtual machine is made of: the guest kernel, the initramfs with the agent, and the VMM.
//!
//! Each is found, in this order, by an explicit path, by an environment variable, by the configuration ([`crate::config`]), or beside the
//! program that runs:
//! `PREFIX/bin/kvrun` uses `PREFIX/share/kvrun/vmlinux`, `PREFIX/share/kvrun/initramfs.cpio` and
//! `PREFIX/libexec/kvrun/kvrun-vmm`. The first that is given is the one; there is no falling back from a bad one.

use std::ffi::OsString;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

/// One of the three files.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The guest kernel, an uncompressed ELF `vmlinux`.
    Kernel,
    /// The initramfs, an uncompressed cpio archive.
    Initramfs,
    /// The `kvrun-vmm` program.
    Vmm,
}

impl Kind {
    /// All there are.
    pub const ALL: [Self; 3] = [Self::Kernel, Self::Initramfs, Self::Vmm];

    /// The environment variable that names it.
    pub fn variable(self) -> &'static str {
        match self {
            Self::Kernel => "KVRUN_KERNEL",
            Self::Initramfs => "KVRUN_INITRAMFS",
            Self::Vmm => "KVRUN_VMM",
        }
    }

    /// The option of the command line that names it.
    pub fn option(self) -> &'static str {
        match self {
            Self::Kernel => "--kernel",
            Self::Initramfs => "--initramfs",
            Self::Vmm => "--vmm",
        }
    }

    /// The setting of the configuration that names it.
    pub fn setting(self) -> &'static str {
        match self {
            Self::Kernel => "assets.kernel",
            Self::Initramfs => "assets.initramfs",
            Self::Vmm => "assets.vmm",
        }
    }

    fn installed(self) -> &'static str {
        match self {
            Self::Kernel => "share/kvrun/vmlinux",
            Self::Initramfs => "share/kvrun/initramfs.cpio",
            Self::Vmm => "libexec/kvrun/kvrun-vmm",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Kernel => "guest kernel",
            Self::Initramfs => "initramfs",
            Self::Vmm => "VMM",
        })
    }
}

/// A file is not there or not usable.
#[derive(Debug, thiserror::Error)]
pub enum AssetError {
    /// It cannot be opened.
    #[error("{kind} {} cannot be opened; install it there, or name another with {}, {} or the setting {}", path.display(), kind.option(), kind.variable(), kind.setting())]
    Open {
        /// Which.
        kind: Kind,
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It is a directory, a device, empty or not executable.
    #[error("{kind} {} {problem}; name another with {}, {} or the setting {}", path.display(), kind.option(), kind.variable(), kind.setting())]
    Unusable {
        /// Which.
        kind: Kind,
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// Neither named nor to be guessed.
    #[error("the path of this program is unknown, so the {kind} cannot be found beside it; name it with {}, {} or the setting {}", kind.option(), kind.variable(), kind.setting())]
    NoExecutable {
        /// Which.
        kind: Kind,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// Where the path of a file comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Origin {
    /// The caller gave it.
    Given,
    /// The environment variable.
    Variable,
    /// The configuration.
    Configuration,
    /// It is where the file is installed, beside the program that runs.
    Installed,
}

/// Paths of some of the files.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Paths {
    /// The guest kernel.
    pub kernel: Option<PathBuf>,
    /// The initramfs.
    pub initramfs: Option<PathBuf>,
    /// The VMM.
    pub vmm: Option<PathBuf>,
}

impl Paths {
    fn of(&self, kind: Kind) -> Option<&Path> {
        match kind {
            Kind::Kernel => self.kernel.as_deref(),
            Kind::Initramfs => self.initramfs.as_deref(),
            Kind::Vmm => self.vmm.as_deref(),
        }
    }
}

/// What is said of the files, but for the environment.
#[derive(Clone, Debug, Default)]
pub struct Named {
    /// By the caller.
    pub given: Paths,
    /// By the configuration.
    pub configured: Paths,
}

impl Named {
    /// The path in use for one of the files, and where it comes from; it may not exist.
    ///
    /// # Errors
    /// [`AssetError::NoExecutable`].
    pub fn path(&self, kind: Kind) -> Result<(PathBuf, Origin), AssetError> {
        choose(self, kind, std::env::var_os(kind.variable()), std::env::current_exe)
    }

    /// Opens one of the files for reading.
    ///
    /// # Errors
    /// [`AssetError`] naming the file and what to do.
    pub fn open(&self, kind: Kind) -> Result<Asset, AssetError> {
        let (path, _) = self.path(kind)?;
        open(kind, path)
    }
}

/// One of the files, open.
#[derive(Debug)]
pub struct Asset {
    /// Where it is.
    pub path: PathBuf,
    /// The file, open for reading.
    pub file: File,
    /// Its size in bytes.
    pub size: u64,
}

/// The three files, open.
#[derive(Debug)]
pub struct Assets {
    /// The guest kernel.
    pub kernel: Asset,
    /// The initramfs.
    pub initramfs: Asset,
    /// The VMM.
    pub vmm: Asset,
}

impl Assets {
    /// Finds and opens all.
    ///
    /// # Errors
    /// [`AssetError`] of the first that is not usable.
    pub fn open(named: &Named) -> Result<Self, AssetError> {
        Ok(Self {
            kernel: named.open(Kind::Kernel)?,
            initramfs: named.open(Kind::Initramfs)?,
            vmm: named.open(Kind::Vmm)?,
        })
    }
}

fn choose(
    named: &Named,
    kind: Kind,
    variable: Option<OsString>,
    executable: impl FnOnce() -> io::Result<PathBuf>,
) -> Result<(PathBuf, Origin), AssetError> {
    if let Some(path) = named.given.of(kind) {
        return Ok((path.to_owned(), Origin::Given));
    }
    if let Some(path) = variable.filter(|v| !v.is_empty()) {
        return Ok((path.into(), Origin::Variable));
    }
    if let Some(path) = named.configured.of(kind) {
        return Ok((path.to_owned(), Origin::Configuration));
    }
    let executable = executable().map_err(|source| AssetError::NoExecutable { kind, source })?;
    let prefix = executable.parent().and_then(Path::parent).unwrap_or(Path::new("/"));
    Ok((prefix.join(kind.installed()), Origin::Installed))
}

fn open(kind: Kind, path: PathBuf) -> Result<Asset, AssetError> {
    let unusable = |path, problem| Err(AssetError::Unusable { kind, path, problem });
    // O_NONBLOCK: opening a FIFO must not wait for a writer; it means nothing for the regular file we want.
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC | rustix::fs::OFlags::NONBLOCK;
    let opened = rustix::fs::open(&path, flags, rustix::fs::Mode::empty()).map_err(io::Error::from);
    let (file, metadata) = match opened.map(File::from).and_then(|f| f.metadata().map(|m| (f, m))) {
        Ok(found) => found,
        Err(source) => return Err(AssetError::Open { kind, path, source }),
    };
    if !metadata.is_file() {
        return unusable(path, "is not a regular file");
    }
    if metadata.len() == 0 {
        return unusable(path, "is empty");
    }
    if kind == Kind::Vmm && metadata.permissions().mode() & 0o111 == 0 {
        return unusable(path, "is not executable");
    }
    Ok(Asset { path, file, size: metadata.len() })
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    #[test]
    fn option_wins_over_variable_over_configuration_over_prefix() {
        let paths = |path: &str| Paths { kernel: Some(path.into()), ..Paths::default() };
        let configured = Named { given: Paths::default(), configured: paths("/configured") };
        let given = Named { given: paths("/given"), ..configured.clone() };
        let found = |named: &Named, kind, variable: &str| {
            let variable = Some(variable.into());
            choose(named, kind, variable, || Ok("/opt/k/bin/kvrun".into())).unwrap()
        };
        assert_eq!(found(&given, Kind::Kernel, "/env"), ("/given".into(), Origin::Given));
        assert_eq!(found(&configured, Kind::Kernel, "/env"), ("/env".into(), Origin::Variable));
        assert_eq!(found(&configured, Kind::Kernel, ""), ("/configured".into(), Origin::Configuration));
        for (kind, path) in [
            (Kind::Kernel, "/opt/k/share/kvrun/vmlinux"),
            (Kind::Initramfs, "/opt/k/share/kvrun/initramfs.cpio"),
            (Kind::Vmm, "/opt/k/libexec/kvrun/kvrun-vmm"),
        ] {
            assert_eq!(found(&Named::default(), kind, ""), (path.into(), Origin::Installed));
        }
    }

    #[test]
    fn unusable_files_are_named_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let missing = open(Kind::Kernel, dir.path().join("none")).unwrap_err();
        assert!(missing.to_string().contains("/none cannot be opened"));
        assert!(missing.to_string().contains("--kernel, KVRUN_KERNEL or the setting assets.kernel"));
        let directory = open(Kind::Kernel, dir.path().to_owned()).unwrap_err();
        assert!(directory.to_string().contains("is not a regular file"));
        fs::write(dir.path().join("empty"), "").unwrap();
        assert!(
            open(Kind::Initramfs, dir.path().join("empty")).unwrap_err().to_string().contains("is empty")
        );
        fs::write(dir.path().join("vmm"), "x").unwrap();
        assert!(
            open(Kind::Vmm, dir.path().join("vmm")).unwrap_err().to_string().contains("is not executable")
        );
        assert_eq!(open(Kind::Kernel, dir.path().join("vmm")).unwrap().size, 1);
    }

    #[test]
    fn fifo_is_refused_without_waiting_for_a_writer() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        assert!(matches!(open(Kind::Kernel, path), Err(AssetError::Unusable { .. })));
    }
}
