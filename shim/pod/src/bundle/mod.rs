//! The OCI bundle: reads `config.json`, checks it, and opens what it names.
//!
//! Every byte is a stranger's. What is wrong, and what we cannot do, is refused in one line that names the field; nothing that has
//! an effect is accepted and ignored. (Properties that the specification does not know are ignored, as it demands: config.md,
//! "Extensibility".)
//!
//! * This file: reading, and what a bundle says.
//! * [`open`]: opens the root file system and the sources of bind mounts, each exactly once.
//! * [`check`]: the rules for what a spec may say, as far as no other file has them.
//! * [`process`], [`namespaces`], [`mounts`]: the rules for those.

mod check;
mod mounts;
mod namespaces;
mod open;
mod process;

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::fs::{CWD, FileType, Mode, OFlags, openat};

pub use check::is_default_apparmor_profile;
pub use mounts::{Bind, IdMap};
use namespaces::Resolved;
pub use namespaces::{Siblings, is_namespace_of, path_of};
pub use oci_spec::runtime::{Hook, LinuxMemory, LinuxResources, Process, Spec};
use oci_spec::runtime::{Hooks, LinuxNamespaceBuilder, LinuxNamespaceType};
use open::{ByPath, Opened, Opener};
pub use open::{Files, HandedOver};
pub use process::CAPABILITIES;

use crate::container_id::ContainerId;
use crate::network::NetworkNamespace;

/// The largest `config.json` in bytes: ten times what engines write, seccomp profile included, and small enough for one message
/// to the agent.
pub const MAX_CONFIG: u64 = 1024 * 1024;

/// What is wrong with a bundle.
#[derive(Debug, thiserror::Error)]
pub enum BundleError {
    /// The bundle or its config cannot be opened.
    #[error("bundle: {} cannot be opened; name a directory that contains config.json", path.display())]
    Open {
        /// The directory or the file.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The config is no file we read.
    #[error("{}: {problem}", path.display())]
    Config {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The config is not JSON, or not of the specification's types.
    #[error("{}: not a valid OCI config{}", path.display(), at(field))]
    Json {
        /// The file.
        path: PathBuf,
        /// Where in it; empty or `.` for the whole.
        field: String,
        /// Why.
        #[source]
        source: serde_json::Error,
    },
    /// A field has a value it must not have, or asks for what we cannot do.
    #[error("{}: {fault}", path.display())]
    Field {
        /// The file.
        path: PathBuf,
        /// Which, and what is wrong.
        fault: Fault,
    },
    /// What a field names cannot be opened.
    #[error("{}: {field}: {} cannot be opened", config.display(), path.display())]
    Named {
        /// The file.
        config: PathBuf,
        /// Which.
        field: String,
        /// What it names.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl BundleError {
    fn named(config: &Path, field: &str, path: &Path, source: io::Error) -> Self {
        Self::Named { config: config.to_owned(), field: field.to_owned(), path: path.to_owned(), source }
    }
}

fn at(field: &str) -> String {
    if field.is_empty() || field == "." { String::new() } else { format!(", at {field}") }
}

/// A field, and what is wrong with it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{field} {problem}")]
pub struct Fault {
    /// As a path in the document, for example `mounts[2].source`.
    field: String,
    /// The rest of the sentence.
    problem: String,
}

impl Fault {
    fn new(field: impl Into<String>, problem: impl Into<String>) -> Self {
        Self { field: field.into(), problem: problem.into() }
    }
}

/// A bundle that was read and found good.
#[derive(Debug)]
pub struct Bundle {
    path: PathBuf,
    spec: Spec,
    rootfs: PathBuf,
    root: Root,
    binds: Vec<Bind>,
    network: HostNetwork,
    siblings: Vec<ContainerId>,
}

/// What the directory is that a config names as root.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Root {
    /// The root file system.
    Files,
    /// An empty one, over which the guest mounts it from a disk ([`root_disk`](crate::root_disk)).
    Disk,
    /// One for what is changed in it; the guest mounts that and its layers over it ([`layers`](crate::layers)).
    Layers,
}

/// The network namespace that the config asks for.
#[derive(Debug)]
pub enum HostNetwork {
    /// None: the container has no part in a network of the host.
    None,
    /// A new one, which an engine configures once it knows a process in it.
    New,
    /// One that is there.
    Named {
        /// Its path.
        path: PathBuf,
        /// The namespace.
        namespace: NetworkNamespace,
    },
}

impl HostNetwork {
    fn open(
        config: &Path,
        named: Option<(usize, Option<PathBuf>)>,
        opener: &mut dyn Opener,
    ) -> Result<Self, BundleError> {
        match named {
            None => Ok(Self::None),
            Some((_, None)) => Ok(Self::New),
            Some((index, Some(path))) => match opener.network(&path) {
                Ok(namespace) => Ok(Self::Named { path, namespace }),
                Err(source) => {
                    let field = format!("linux.namespaces[{index}].path");
                    Err(BundleError::named(config, &field, &path, source))
                }
            },
        }
    }
}

fn open_directory(path: &Path) -> Result<OwnedFd, BundleError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let opened = openat(CWD, path, flags, Mode::empty());
    opened.map_err(|e| BundleError::Open { path: path.to_owned(), source: e.into() })
}

impl Bundle {
    /// Reads the bundle in a directory, and opens what it names. If that is to be shared ([`Trees::of`](crate::share::Trees::of)), after
    /// [`enter_mount_namespace`](crate::share::enter_mount_namespace): mounts of another namespace cannot be cloned.
    ///
    /// # Errors
    /// [`BundleError`], one line that names the file, the field and what is wrong.
    pub fn load(directory: &Path) -> Result<(Self, Files), BundleError> {
        Self::load_beside(directory, &|_| None)
    }

    /// As [`Bundle::load`], for a container of a pod in which there are others, whose namespaces it may join.
    ///
    /// # Errors
    /// [`BundleError`].
    pub fn load_beside(directory: &Path, siblings: Siblings<'_>) -> Result<(Self, Files), BundleError> {
        let bundle = open_directory(directory)?;
        let path = directory.join("config.json");
        // O_NONBLOCK: a FIFO must not make us wait for its writer.
        let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let file = openat(&bundle, "config.json", flags, Mode::empty());
        let file = file.map_err(|e| BundleError::Open { path: path.clone(), source: e.into() })?;
        let config = read(&path, file.into())?;
        let mut by_path = ByPath::new(bundle);
        let bundle = Self::resolve(directory, &config, siblings, &mut by_path)?;
        Ok((bundle, by_path.into_files(config)))
    }

    /// As [`Bundle::load`], of a directory that has no `config.json`, with this one instead.
    ///
    /// # Errors
    /// [`BundleError`].
    pub fn of_config(directory: &Path, config: Vec<u8>) -> Result<(Self, Files), BundleError> {
        let mut by_path = ByPath::new(open_directory(directory)?);
        let bundle = Self::resolve(directory, &config, &|_| None, &mut by_path)?;
        Ok((bundle, by_path.into_files(config)))
    }

    /// The bundle that another process has loaded from a directory, perhaps one that this process does not see.
    ///
    /// # Errors
    /// [`BundleError`].
    pub fn handed_over(
        directory: &Path,
        handed: HandedOver<'_>,
        siblings: Siblings<'_>,
    ) -> Result<Self, BundleError> {
        let config = read(&directory.join("config.json"), handed.config)?;
        let mut opener = Opened::new(handed.network, handed.trees);
        Self::resolve(directory, &config, siblings, &mut opener)
    }

    /// Checks a config and finds what it names. What is opened is first the root, then the source of each bind mount in their order.
    fn resolve(
        directory: &Path,
        bytes: &[u8],
        siblings: Siblings<'_>,
        opener: &mut dyn Opener,
    ) -> Result<Self, BundleError> {
        let config = directory.join("config.json");
        let mut spec = parse(&config, bytes)?;
        let fault = |fault| BundleError::Field { path: config.clone(), fault };
        check::check(&spec).map_err(fault)?;
        let resolved = match spec.linux_mut() {
            Some(linux) => namespaces::resolve(linux, siblings).map_err(fault)?,
            None => Resolved::default(),
        };
        let network = HostNetwork::open(&config, resolved.network, opener)?;

        let root = spec.root().as_ref().map(|root| root.path().clone()).unwrap_or_default();
        let opened = opener.file(&root, OFlags::NOFOLLOW);
        let stat = opened.map_err(|source| BundleError::named(&config, "root.path", &root, source))?;
        let kind = FileType::from_raw_mode(stat.st_mode);
        let rootfs = directory.join(&root);
        if kind != FileType::Directory {
            // As in runc; a link could be made to point elsewhere between two looks at it.
            let link = kind == FileType::Symlink;
            let what = if link { "a symbolic link; name the directory itself" } else { "not a directory" };
            let problem = format!("{} is {what}", rootfs.display());
            return Err(fault(Fault::new("root.path", problem)));
        }
        let binds = mounts::open_binds(&config, &spec, opener)?;
        let (path, siblings) = (directory.to_owned(), resolved.siblings);
        Ok(Self { path, spec, rootfs, root: Root::Files, binds, network, siblings })
    }

    /// Its directory, as given.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its `config.json`.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// Where the root file system is.
    pub fn rootfs_path(&self) -> &Path {
        &self.rootfs
    }

    /// Whether the container must not change its root.
    pub fn is_root_read_only(&self) -> bool {
        self.spec.root().as_ref().and_then(oci_spec::runtime::Root::readonly).unwrap_or(false)
    }

    /// Tells what it names as root, if not the root file system.
    pub fn set_root(&mut self, root: Root) {
        self.root = root;
    }

    /// What it names as root.
    pub fn root(&self) -> Root {
        self.root
    }

    /// The bind mounts among its mounts.
    pub fn binds(&self) -> &[Bind] {
        &self.binds
    }

    /// Its network namespace. In [`Bundle::spec`] there is none: in the guest, all containers are on the network of the guest.
    pub fn network(&self) -> &HostNetwork {
        &self.network
    }

    /// The containers whose namespaces it joins.
    pub fn siblings(&self) -> &[ContainerId] {
        &self.siblings
    }

    /// Whether the process has a terminal.
    pub fn has_terminal(&self) -> bool {
        self.spec.process().as_ref().and_then(Process::terminal).unwrap_or(false)
    }

    /// Its memory limit in bytes, if it has one.
    pub fn memory_limit(&self) -> Option<u64> {
        let resources = self.spec.linux().as_ref()?.resources().as_ref()?;
        u64::try_from(resources.memory().as_ref()?.limit()?).ok().filter(|limit| *limit > 0)
    }

    /// Its hooks of one kind.
    fn hooks_of(&self, kind: impl FnOnce(&Hooks) -> &Option<Vec<Hook>>) -> Vec<Hook> {
        self.spec.hooks().as_ref().and_then(|hooks| kind(hooks).clone()).unwrap_or_default()
    }

    /// The hooks that run on the host before the container's own program may, with their kinds, in their order.
    pub fn creation_hooks(&self) -> [(&'static str, Vec<Hook>); 2] {
        #[allow(deprecated, reason = "deprecated in the specification, and in use")]
        let prestart = self.hooks_of(Hooks::prestart);
        [("prestart", prestart), ("createRuntime", self.hooks_of(Hooks::create_runtime))]
    }

    /// `hooks.poststart`.
    pub fn poststart_hooks(&self) -> Vec<Hook> {
        self.hooks_of(Hooks::poststart)
    }

    /// `hooks.poststop`.
    pub fn poststop_hooks(&self) -> Vec<Hook> {
        self.hooks_of(Hooks::poststop)
    }

    /// `annotations`.
    pub fn annotations(&self) -> BTreeMap<String, String> {
        self.spec.annotations().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect()
    }

    /// `linux.cgroupsPath`.
    pub fn cgroups_path(&self) -> Option<&Path> {
        self.spec.linux().as_ref()?.cgroups_path().as_deref().filter(|p| !p.as_os_str().is_empty())
    }

    /// Sets the size of the terminal the process starts with.
    pub fn set_console_size(&mut self, rows: u16, columns: u16) {
        let size = oci_spec::runtime::BoxBuilder::default().height(rows).width(columns).build();
        if let (Some(process), Ok(size)) = (self.spec.process_mut(), size) {
            process.set_console_size(Some(size));
        }
    }
}

/// Gives a container in the guest a network namespace of its own, with nothing but loopback.
pub fn add_network_namespace(spec: &mut Spec) {
    let Some(namespaces) = spec.linux_mut().as_mut().and_then(|linux| linux.namespaces_mut().as_mut()) else {
        return;
    };
    // It has no field without a default.
    if let Ok(network) = LinuxNamespaceBuilder::default().typ(LinuxNamespaceType::Network).build() {
        namespaces.push(network);
    }
}

/// Checks the `process` of a config, or one for a further process in a container.
///
/// # Errors
/// Which field is at fault, and how.
pub fn check_process(process: &Process) -> Result<(), Fault> {
    check::process_fields(process)
}

fn read(config: &Path, file: File) -> Result<Vec<u8>, BundleError> {
    let open_error = |source| BundleError::Open { path: config.to_owned(), source };
    let problem = |problem| BundleError::Config { path: config.to_owned(), problem };
    if !file.metadata().map_err(open_error)?.is_file() {
        return Err(problem("not a regular file"));
    }
    let mut bytes = Vec::new();
    file.take(MAX_CONFIG + 1).read_to_end(&mut bytes).map_err(open_error)?;
    if bytes.len() as u64 > MAX_CONFIG {
        return Err(problem("larger than 1 MiB, which no OCI config is"));
    }
    if bytes.iter().all(u8::is_ascii_whitespace) {
        return Err(problem("empty; it must hold an OCI config"));
    }
    Ok(bytes)
}

fn parse(config: &Path, bytes: &[u8]) -> Result<Spec, BundleError> {
    let error = |field: String, source| BundleError::Json { path: config.to_owned(), field, source };
    let mut deserializer = serde_json::Deserializer::from_slice(bytes);
    let spec = serde_path_to_error::deserialize(&mut deserializer);
    let spec = spec.map_err(|e| error(e.path().to_string(), e.into_inner()))?;
    deserializer.end().map_err(|e| error(String::new(), e))?;
    Ok(spec)
}

#[cfg(test)]
mod tests;
