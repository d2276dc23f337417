//! `kvrun metrics` and `kvrun logs --guest`: what can be seen of a machine, whichever door has made it.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use kvrun_pod::container_id::ContainerId;
use kvrun_pod::observe::{FetchError, Page, fetch, merge};
use kvrun_pod::state_dir::{self, CONTAINERD_ROOT};

use super::print;
use crate::cli::Global;
use crate::error::{Error, host};
use crate::monitor::client::Known;

/// Prints the metrics of a machine, or of all that run.
pub(crate) fn metrics(global: &Global, id: Option<&str>) -> Result<(), Error> {
    if let Some(id) = id {
        return print(see(global, id, Page::Metrics)?.trim_end());
    }
    let mut texts = Vec::new();
    for root in [vec![global.root.clone()], namespaces()?].concat() {
        for id in state_dir::all(&root)? {
            let Some(dir) = state_dir::look(&root, &id)? else { continue };
            match fetch(dir, Page::Metrics) {
                Ok(text) => texts.push(text),
                // It has ended, or is in another's machine.
                Err(FetchError::NotRunning) => {}
                Err(error) => tracing::warn!(%id, error = %kvrun_pod::text::chain(&error), "left out"),
            }
        }
    }
    if texts.is_empty() { Ok(()) } else { print(merge(texts.iter().map(String::as_str)).trim_end()) }
}

/// Prints the log of a guest.
pub(crate) fn guest_log(global: &Global, id: &str) -> Result<(), Error> {
    print(see(global, id, Page::GuestLog)?.trim_end())
}

fn see(global: &Global, id: &str, page: Page) -> Result<String, Error> {
    fetch(find(global, id)?, page).map_err(|source| Error::Unseen { id: id.to_owned(), source })
}

/// The state directory of a machine: that of a container below `--root`, or else of a pod of containerd, which a namespace and a slash before its ID make plain.
pub(crate) fn find(global: &Global, name: &str) -> Result<OwnedFd, Error> {
    let (namespace, id) = name.split_once('/').map_or((None, name), |(namespace, id)| (Some(namespace), id));
    let id: ContainerId = id.parse()?;
    if namespace.is_none()
        && let Some(known) = Known::find(&global.root, &id)?
    {
        return known.machine(&global.root);
    }
    let mut found = Vec::new();
    for root in namespaces()? {
        let is_asked_for = namespace.is_none_or(|name| root.file_name() == Some(name.as_ref()));
        if is_asked_for && let Some(known) = Known::find(&root, &id)? {
            found.push(known.machine(&root)?);
        }
    }
    match (found.pop(), found.len()) {
        (Some(dir), 0) => Ok(dir),
        (None, _) => Err(Error::NoMachine { id }),
        (Some(_), _) => Err(Error::Option(format!(
            "there is a pod {id} in several namespaces of containerd: write NAMESPACE/{id}"
        ))),
    }
}

/// Where the pods of each namespace of containerd have their state directories.
fn namespaces() -> Result<Vec<PathBuf>, Error> {
    let error = || host("list the namespaces of containerd");
    let entries = match fs::read_dir(CONTAINERD_ROOT) {
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(error())?,
    };
    entries.map(|entry| Ok(entry.map_err(error())?.path())).collect()
}
