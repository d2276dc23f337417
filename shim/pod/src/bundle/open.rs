//! How what a config names is opened: by its path, or by a process that sees more than this one and hands it over.

use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{Mode, OFlags, Stat, fstat, openat};

use crate::network::NetworkNamespace;
use crate::share::Trees;

/// The files that a bundle names, open as paths only, and its config as it was read.
#[derive(Debug)]
pub struct Files {
    config: Vec<u8>,
    opened: Vec<OwnedFd>,
}

impl Files {
    /// The text of `config.json`.
    pub fn config(&self) -> &[u8] {
        &self.config
    }

    /// The root file system, and the source of each of [`Bundle::binds`](super::Bundle::binds).
    pub(crate) fn opened(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.opened.iter().map(AsFd::as_fd)
    }
}

/// What a process hands over that has loaded a bundle for another one.
#[derive(Debug)]
pub struct HandedOver<'a> {
    /// A file with the text of `config.json`.
    pub config: File,
    /// The network namespace of the container.
    pub network: NetworkNamespace,
    /// Its files.
    pub trees: &'a Trees,
}

/// Opens what a config names, in the order of the config.
pub(super) trait Opener {
    /// A file or a directory; what it is.
    fn file(&mut self, path: &Path, flags: OFlags) -> io::Result<Stat>;
    /// A network namespace.
    fn network(&mut self, path: &Path) -> io::Result<NetworkNamespace>;
}

/// By paths, which are relative to the bundle (config.md, "Root", "Mounts").
pub(super) struct ByPath {
    bundle: OwnedFd,
    opened: Vec<OwnedFd>,
}

impl ByPath {
    pub(super) fn new(bundle: OwnedFd) -> Self {
        Self { bundle, opened: Vec::new() }
    }

    pub(super) fn into_files(self, config: Vec<u8>) -> Files {
        Files { config, opened: self.opened }
    }
}

impl Opener for ByPath {
    fn file(&mut self, path: &Path, flags: OFlags) -> io::Result<Stat> {
        let file = openat(&self.bundle, path, OFlags::PATH | OFlags::CLOEXEC | flags, Mode::empty())?;
        let stat = fstat(&file)?;
        self.opened.push(file);
        Ok(stat)
    }

    fn network(&mut self, path: &Path) -> io::Result<NetworkNamespace> {
        NetworkNamespace::open(path)
    }
}

/// What somebody else has opened.
pub(super) struct Opened<'a> {
    network: Option<NetworkNamespace>,
    files: std::vec::IntoIter<BorrowedFd<'a>>,
}

impl<'a> Opened<'a> {
    pub(super) fn new(network: NetworkNamespace, trees: &'a Trees) -> Self {
        Self { network: Some(network), files: trees.descriptors().into_iter() }
    }
}

impl Opener for Opened<'_> {
    fn file(&mut self, _: &Path, _: OFlags) -> io::Result<Stat> {
        Ok(fstat(self.files.next().ok_or_else(missing)?)?)
    }

    fn network(&mut self, _: &Path) -> io::Result<NetworkNamespace> {
        self.network.take().ok_or_else(missing)
    }
}

/// A config has at most one network namespace, and as many files as whoever read it has found: it is another one.
fn missing() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "it was not handed over")
}
