//! Volumes that a kubelet keeps up to date while containers read them: configMaps, secrets, the downward API, and what is projected of those. Programs expect to
//! hear of a change (inotify(7)), and a share does not tell a guest of any. So the guest is given a copy of such a volume, in its own memory
//! (`UpdateVolume`), and the volume is watched here and its copy brought in step.
//!
//! Contract:
//! * A container that cannot have a copy has what the share has, and the log says so.
//! * A directory that several containers of the pod have is one copy; it goes with the last of them, and so does the watch.
//! * A copy is sent as the volume was at one moment ([`tree::read`]): the agent's swaps are those of the kubelet.
//! * What is not as it should be later (the volume has grown too large, say) leaves the copy as it is, and is said once.

mod tree;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Component, Path, PathBuf};
use std::sync::{Arc, Weak};

use kvrun_agent_api::{GUEST_VOLUMES_DIR, VOLUME_FILES};
use oci_spec::runtime::Spec;
use rustix::fs::inotify::{self, CreateFlags, ReadFlags, WatchFlags};
use rustix::io::Errno;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::accept::Serving;
use crate::agent::{Agent, AgentError};
use crate::bundle::Bind;
use crate::pod::{Pod, PodError};
use crate::share::{Place, Share};
use crate::text;
use tree::TreeError;

/// Kubernetes names the directory of a volume `.../volumes/PLUGIN/NAME`. Not these are what `subPath` mounts, which is never changed.
const PLUGINS: [&str; 4] = [
    "kubernetes.io~configmap",
    "kubernetes.io~secret",
    "kubernetes.io~projected",
    "kubernetes.io~downward-api",
];
/// Of a volume's own directory: a kubelet writes below it only before it renames something there. The last but one is a change of owner or mode, which an
/// older kubelet makes last, in the order of names.
const CHANGES: WatchFlags = WatchFlags::CREATE
    .union(WatchFlags::CLOSE_WRITE)
    .union(WatchFlags::MOVE)
    .union(WatchFlags::DELETE)
    .union(WatchFlags::ATTRIB)
    .union(WatchFlags::ONLYDIR);
/// Some dozens of events; what does not fit is read in the next turn.
const EVENTS: usize = 4096;

/// Why a container has no copy of a volume, or one that is behind.
#[derive(Debug, thiserror::Error)]
enum WatchError {
    #[error("open the volume")]
    Open(#[source] io::Error),
    #[error("watch it (sysctls fs.inotify.*)")]
    Watch(#[source] io::Error),
    #[error(transparent)]
    Tree(#[from] TreeError),
    #[error(transparent)]
    Agent(#[from] AgentError),
    #[error(transparent)]
    Pod(#[from] PodError),
}

/// A mount of a container whose source is such a volume.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Which of the spec's mounts.
    mount: usize,
    /// Its number in the share.
    number: u64,
    path: PathBuf,
}

impl Kept {
    /// What a bind mount is, if it is that. With owners mapped it is the host's business alone.
    pub(crate) fn of(bind: &Bind, number: u64) -> Option<Self> {
        let is_kept = bind.is_directory()
            && (bind.is_read_only() || bind.is_recursively_read_only())
            && bind.id_map().is_none()
            && is_kept(bind.path());
        is_kept.then(|| Self { mount: bind.index(), number, path: bind.path().to_owned() })
    }
}

fn is_kept(path: &Path) -> bool {
    let mut parts = path.components().rev().map(Component::as_os_str).skip(1);
    parts.next().is_some_and(|plugin| PLUGINS.iter().any(|known| plugin == *known))
        && parts.next().is_some_and(|part| part == "volumes")
}

/// Gives the guest copies of a container's volumes of that kind, and has the spec name them instead of the share's. For a machine that is ready, once for
/// each container.
pub async fn copy(pod: &Pod, share: &Share, place: &mut Place, spec: &mut Spec) {
    for kept in std::mem::take(&mut place.kept) {
        let opened = share.open_volume(kept.number).map_err(WatchError::Open);
        let copied = async { pod.watched.add(pod, opened?, &kept.path).await };
        match copied.await {
            Ok(number) => {
                place.copies.push(number);
                let mount = spec.mounts_mut().as_mut().and_then(|mounts| mounts.get_mut(kept.mount));
                if let Some(mount) = mount {
                    let source = format!("{GUEST_VOLUMES_DIR}/{number}/{VOLUME_FILES}");
                    mount.set_source(Some(source.into()));
                }
            }
            Err(error) => {
                let (path, error) = (kept.path.display(), text::chain(&error));
                tracing::warn!(%path, error, "changes of a volume are seen in the container, but not heard by inotify");
            }
        }
    }
}

/// Takes a container's copies away. Nothing of it uses them any more.
pub(crate) async fn release(pod: &Pod, place: &Place) {
    for number in &place.copies {
        if let Err(error) = pod.watched.release(pod, *number).await {
            tracing::debug!(number, error = %text::chain(&error), "remove the copy of a volume");
        }
    }
}

/// The volumes of a pod of which the guest has copies.
#[derive(Debug, Default)]
pub(crate) struct Watched(tokio::sync::Mutex<Table>);

#[derive(Debug, Default)]
struct Table {
    next: u64,
    /// As long as there is something to watch: a host has only so many of them.
    watching: Option<Watching>,
    /// By watch, of which a directory has one however often it is asked for.
    volumes: BTreeMap<i32, Volume>,
}

#[derive(Debug)]
struct Watching {
    inotify: Arc<AsyncFd<OwnedFd>>,
    _task: Serving,
}

#[derive(Debug)]
struct Volume {
    number: u64,
    directory: OwnedFd,
    path: PathBuf,
    containers: usize,
    /// It has been said that the copy is not in step.
    is_behind: bool,
}

impl Watched {
    /// Adds a container that has a volume; the number of its copy.
    async fn add(self: &Arc<Self>, pod: &Pod, directory: OwnedFd, path: &Path) -> Result<u64, WatchError> {
        let table = &mut *self.0.lock().await;
        let inotify = table.watch(self, &pod.agent).map_err(WatchError::Watch)?;
        let by_descriptor = format!("/proc/self/fd/{}", directory.as_raw_fd());
        let added = async {
            // Before it is read, so that nothing is missed.
            let watch = inotify::add_watch(inotify.get_ref(), by_descriptor, CHANGES);
            let watch = watch.map_err(|errno| WatchError::Watch(errno.into()))?;
            if let Some(volume) = table.volumes.get_mut(&watch) {
                volume.containers += 1;
                return Ok(volume.number);
            }
            let number = table.next;
            table.next += 1;
            let sent = async {
                let entries = tree::read(&directory)?;
                Ok::<_, WatchError>(pod.or_death(pod.agent.update_volume(number, entries)).await?)
            };
            if let Err(error) = sent.await {
                let _ = inotify::remove_watch(inotify.get_ref(), watch);
                return Err(error);
            }
            let path = path.to_owned();
            table.volumes.insert(watch, Volume { number, directory, path, containers: 1, is_behind: false });
            Ok(number)
        };
        let added = added.await;
        table.rest();
        added
    }

    /// Takes a container away that has a copy.
    async fn release(&self, pod: &Pod, number: u64) -> Result<(), PodError> {
        let table = &mut *self.0.lock().await;
        let found = table.volumes.iter_mut().find(|(_, volume)| volume.number == number);
        let Some((watch, volume)) = found else { return Ok(()) };
        volume.containers -= 1;
        if volume.containers > 0 {
            return Ok(());
        }
        let watch = *watch;
        table.volumes.remove(&watch);
        if let Some(watching) = &table.watching {
            // It is not there any more if the directory is not.
            let _ = inotify::remove_watch(watching.inotify.get_ref(), watch);
        }
        table.rest();
        pod.or_death(pod.agent.remove_volume(number)).await
    }

    /// Brings copies in step whose volumes have changed.
    async fn update(&self, agent: &Agent, changed: &Changed) {
        for (watch, volume) in &mut self.0.lock().await.volumes {
            if changed.is_all || changed.watches.contains(watch) {
                volume.update(agent).await;
            }
        }
    }
}

impl Table {
    /// The inotify instance, new if there is none.
    fn watch(&mut self, watched: &Arc<Watched>, agent: &Agent) -> io::Result<Arc<AsyncFd<OwnedFd>>> {
        if let Some(watching) = &self.watching {
            return Ok(Arc::clone(&watching.inotify));
        }
        let inotify = inotify::init(CreateFlags::CLOEXEC | CreateFlags::NONBLOCK)?;
        // SAFETY: an OwnedFd is one descriptor, open for as long as it lives, and it lives in here.
        let inotify = unsafe { AsyncFd::register_with_interest(inotify, Interest::READABLE) };
        let inotify = Arc::new(inotify.map_err(io::Error::from)?);
        let task = Serving::start(attend(Arc::clone(&inotify), Arc::downgrade(watched), agent.clone()));
        self.watching = Some(Watching { inotify: Arc::clone(&inotify), _task: task });
        Ok(inotify)
    }

    /// Gives the inotify instance up if there is nothing to watch.
    fn rest(&mut self) {
        if self.volumes.is_empty() {
            self.watching = None;
        }
    }
}

/// Hears of changes for as long as there is something to watch. It must not keep the machine, whose end is when nobody has it any more.
async fn attend(inotify: Arc<AsyncFd<OwnedFd>>, watched: Weak<Watched>, agent: Agent) {
    loop {
        let changed = match inotify.async_io(Interest::READABLE, Changed::read).await {
            Ok(changed) => changed,
            Err(error) => {
                tracing::warn!(%error, "changes of volumes are no longer heard");
                return;
            }
        };
        let Some(watched) = watched.upgrade() else { return };
        watched.update(&agent, &changed).await;
    }
}

/// Where something has changed.
#[derive(Debug, Default)]
struct Changed {
    watches: BTreeSet<i32>,
    /// There was more than the kernel remembers.
    is_all: bool,
}

impl Changed {
    /// All that there is to be heard now.
    fn read(inotify: &OwnedFd) -> io::Result<Self> {
        let mut buffer = [MaybeUninit::uninit(); EVENTS];
        let mut reader = inotify::Reader::new(inotify, &mut buffer);
        let mut changed = Self::default();
        let mut is_first = true;
        loop {
            match reader.next() {
                Ok(event) => {
                    changed.is_all |= event.events().contains(ReadFlags::QUEUE_OVERFLOW);
                    changed.watches.insert(event.wd());
                }
                Err(Errno::INTR) => continue,
                Err(Errno::AGAIN) if !is_first => return Ok(changed),
                Err(errno) => return Err(errno.into()),
            }
            is_first = false;
        }
    }
}

impl Volume {
    async fn update(&mut self, agent: &Agent) {
        let updated = async {
            let entries = tree::read(&self.directory)?;
            Ok::<_, WatchError>(agent.update_volume(self.number, entries).await?)
        };
        match updated.await {
            Ok(()) => self.is_behind = false,
            // A volume that is removed is removed for good, and with the machine goes all.
            Err(
                error @ (WatchError::Tree(TreeError::Removed)
                | WatchError::Agent(AgentError::Disconnected { .. })),
            ) => {
                tracing::debug!(path = %self.path.display(), %error, "a volume changes no more");
            }
            Err(_) if self.is_behind => {}
            Err(error) => {
                self.is_behind = true;
                let (path, error) = (self.path.display(), text::chain(&error));
                tracing::warn!(%path, error, "a volume has changed, and containers have it as it was");
            }
        }
    }
}

#[cfg(test)]
mod tests;
