//! The machine of the pod.

use std::path::PathBuf;
use std::sync::Arc;

use kvrun_pod::accept::Serving;
use kvrun_pod::assets::{Assets, Named};
use kvrun_pod::bundle::{self, Bundle, Files, HostNetwork, Spec};
use kvrun_pod::cgroup::{self, HostCgroup};
use kvrun_pod::config::Config;
use kvrun_pod::container_id::ContainerId;
use kvrun_pod::debug;
use kvrun_pod::host_process::HostProcess;
use kvrun_pod::network::{Network, NetworkNamespace};
use kvrun_pod::observe;
use kvrun_pod::pod::{self as engine, Pod as Vm, Starting};
use kvrun_pod::record::Record;
use kvrun_pod::share::{MountNamespace, Place, Share, Trees};
use kvrun_pod::size::VmSize;
use kvrun_pod::state_dir::ContainerDir;
use kvrun_pod::watched;

use crate::error::{Error, host};
use crate::serve::Log;
use crate::task::Task;

/// What a machine is made with.
#[derive(Debug)]
pub(crate) struct Host {
    /// That of containerd.
    pub(crate) namespace: String,
    pub(crate) state_root: PathBuf,
    pub(crate) mounts: MountNamespace,
    /// The network namespace of this process.
    pub(crate) home: NetworkNamespace,
    pub(crate) log: Log,
}

/// What the containers of a pod have in common. In the order in which it is undone.
#[derive(Debug)]
pub(crate) struct Machine {
    /// Shows it to whoever asks.
    _observed: Serving,
    /// Runs programs in the guest, if the configuration allows it.
    _debugged: Option<Serving>,
    pub(crate) vm: Vm,
    /// That of the pod's first container.
    pub(crate) config: Config,
    /// Its links, if it is in a network namespace.
    network: tokio::sync::Mutex<Option<Network>>,
    pub(crate) share: Arc<Share>,
    _cgroup: Option<HostCgroup>,
    _dir: ContainerDir,
}

impl Machine {
    /// Brings the machine up, with the files of its first container.
    pub(crate) async fn boot(
        host_side: &Host,
        config: Config,
        id: &ContainerId,
        bundle: &Bundle,
        files: Files,
        task: &Task,
    ) -> Result<(Self, Spec, Place), Error> {
        let size = VmSize::for_spec(bundle.spec(), &config.sizes)?;
        let namespace = network_namespace(host_side, bundle, task)?;
        let mut network = namespace.map(|namespace| Network::new(namespace, size.vcpus.boot));
        let assets = Assets::open(&Named { configured: config.assets.clone(), ..Named::default() })?;
        std::fs::create_dir_all(&host_side.state_root).map_err(host("make the state directory"))?;
        let dir = ContainerDir::claim(&host_side.state_root, id)?;
        let process = HostProcess::current().map_err(host("read /proc/self/stat"))?;
        let mut record = Record::creating(id.clone(), process, String::new());
        if let HostNetwork::Named { path, .. } = bundle.network() {
            record.network = Some(path.clone());
        }
        let write = |record: &Record| record.write(dir.as_fd()).map_err(host("write the pod's record"));
        write(&record)?;
        // Before anything is started, so that all of it is accounted there.
        let cgroup = match bundle.cgroups_path() {
            Some(path) => Some(HostCgroup::join(path, cgroup::Driver::of(path), &dir)?),
            None => None,
        };
        let share = Arc::new(Share::mount(&host_side.mounts, &dir.make_share_directory()?)?);
        let starting = Starting::spawn(&assets, engine::machine(size), share.directory())?;
        // If this process is killed, somebody else may have to end the VMM.
        record.vmm = starting.vmm().process().ok();
        write(&record)?;
        // While the guest boots.
        let (spec, place) = share.add(bundle, Trees::of(bundle, &files)?)?;
        let vm = starting.ready().await?;
        if let Some(network) = &mut network {
            network.update(&vm).await?;
        }
        let labels = observe::Labels { namespace: host_side.namespace.clone(), pod: id.to_string() };
        let observed =
            observe::start(&vm, dir.as_fd(), labels).map_err(host("listen on the pod's socket"))?;
        let debugged =
            debug::start(&vm, &share, &config, dir.as_fd()).map_err(host("listen on the debug socket"))?;
        let network = tokio::sync::Mutex::new(network);
        Ok((
            Self {
                _observed: observed,
                _debugged: debugged,
                vm,
                config,
                network,
                share,
                _cgroup: cgroup,
                _dir: dir,
            },
            spec,
            place,
        ))
    }

    /// All containers of a machine are on its network, or on none.
    pub(crate) async fn check_network(&self, bundle: &Bundle, task: &Task) -> Result<(), Error> {
        let HostNetwork::Named { path, namespace } = bundle.network() else { return Ok(()) };
        let network = self.network.lock().await;
        let is_it = network.as_ref().map(|network| network.is_of(namespace)).transpose();
        if is_it.map_err(host("look at the network namespace"))? != Some(true) {
            return Err(Error::Invalid(format!(
                "linux.namespaces: the pod is not in the network namespace {}, so its container cannot be",
                path.display()
            )));
        }
        enter(task, namespace).map(drop)
    }

    /// Gives the machine what its network namespace has by now: docker and hooks configure it when they know the first container's process.
    pub(crate) async fn update_network(&self) -> Result<(), Error> {
        if let Some(network) = &mut *self.network.lock().await {
            network.update(&self.vm).await?;
        }
        Ok(())
    }

    /// Shares the files of a container that was loaded by this process; its spec, as it is in the guest.
    pub(crate) fn add_to_share(
        &self,
        bundle: &Bundle,
        files: &Files,
        is_first: bool,
    ) -> Result<(Spec, Place), Error> {
        let (mut spec, place) = self.share.add(bundle, Trees::of(bundle, files)?)?;
        // That of the first one is the machine's.
        if !is_first && matches!(bundle.network(), HostNetwork::New) {
            bundle::add_network_namespace(&mut spec);
        }
        Ok((spec, place))
    }

    /// Gives the guest copies of those volumes of a container of which it wants to hear when they change.
    pub(crate) async fn copy_volumes(&self, place: &mut Place, spec: &mut Spec) {
        watched::copy(&self.vm, &self.share, place, spec).await;
    }

    /// Takes a container's files away, which nothing in the guest uses any more.
    pub(crate) async fn forget(&self, place: &Place) {
        self.vm.take_from_share(&self.share, place).await;
    }
}

/// The namespace whose links the machine is to have: the one that is named, which CNI has made before, or a new one, which whoever asked for it
/// finds by the process ID of the container.
fn network_namespace(
    host_side: &Host,
    bundle: &Bundle,
    task: &Task,
) -> Result<Option<NetworkNamespace>, Error> {
    match bundle.network() {
        HostNetwork::None => Ok(None),
        HostNetwork::New => task.enter_network(None).map(Some).map_err(host("make a network namespace")),
        HostNetwork::Named { path, namespace } => {
            namespace.check(path, &host_side.home)?;
            enter(task, namespace).map(Some)
        }
    }
}

/// The process ID of a container is in its network namespace: by it, containers that join the pod name that.
fn enter(task: &Task, namespace: &NetworkNamespace) -> Result<NetworkNamespace, Error> {
    let entered = namespace.try_clone().and_then(|namespace| task.enter_network(Some(namespace)));
    entered.map_err(host("enter the network namespace"))
}
