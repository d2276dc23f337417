//! A machine for a container: what is set up for it, in the order in which it must be, and undone in reverse.

use std::path::Path;
use std::sync::Arc;

use kvrun_pod::annotations;
use kvrun_pod::assets::Assets;
use kvrun_pod::bundle::{Bundle, Files, HostNetwork};
use kvrun_pod::cgroup::HostCgroup;
use kvrun_pod::config::Config;
use kvrun_pod::container_id::ContainerId;
use kvrun_pod::host_process::HostProcess;
use kvrun_pod::log;
use kvrun_pod::network::{self, Network, NetworkNamespace};
use kvrun_pod::pod::{self, Pod, Starting};
use kvrun_pod::process::Process;
use kvrun_pod::record::Record;
use kvrun_pod::share::{MountNamespace, Share, Trees};
use kvrun_pod::size::VmSize;
use kvrun_pod::state_dir::ContainerDir;
use kvrun_pod::stdio::{Streams, Wanted};
use kvrun_pod::watched;

use crate::cli::Global;
use crate::error::{Error, host};
use crate::monitor::{Container, Monitor, describe, run_creation_hooks};

/// The machine's links, while it has some. Also of a machine on no network of the host.
pub(crate) type Links = Arc<tokio::sync::Mutex<Option<Network>>>;

/// Puts this process, which must have one thread, into the container's network namespace: engines configure that of the process in the pid file.
/// Returns the one it was in.
pub(crate) fn enter_network(bundle: &Bundle) -> Result<NetworkNamespace, Error> {
    let home = NetworkNamespace::current().map_err(host("find our own network namespace"))?;
    match bundle.network() {
        HostNetwork::None => {}
        HostNetwork::New => network::enter_new().map_err(host("make a network namespace"))?,
        HostNetwork::Named { path, namespace } => {
            namespace.check(path, &home)?;
            namespace.enter().map_err(host("enter the network namespace"))?;
        }
    }
    Ok(home)
}

/// Puts this process into the container's cgroup on the host, if its config names one.
pub(crate) fn join_cgroup(
    global: &Global,
    bundle: &Bundle,
    dir: &ContainerDir,
) -> Result<Option<HostCgroup>, Error> {
    match (global.cgroup_driver(), bundle.cgroups_path()) {
        (Some(driver), Some(path)) => Ok(Some(HostCgroup::join(path, driver, dir)?)),
        _ => Ok(None),
    }
}

/// What a container has on the host before its machine runs. Dropping it undoes it.
#[derive(Debug)]
pub(crate) struct Prepared {
    // In the order in which it is undone.
    links: Links,
    share: Arc<Share>,
    _cgroup: Option<HostCgroup>,
    dir: ContainerDir,
    config: Config,
    assets: Assets,
    size: VmSize,
    record: Record,
    home: Arc<NetworkNamespace>,
}

impl Prepared {
    /// Sets it up for a bundle, and puts this process, which must have one thread, into the container's network namespace. A container that is
    /// `transient` belongs to this process.
    pub(crate) fn new(
        global: &Global,
        config: Config,
        namespace: &MountNamespace,
        id: &ContainerId,
        bundle: &Bundle,
        transient: bool,
    ) -> Result<Self, Error> {
        annotations::check(&bundle.annotations(), &config.allowed_annotations)?;
        let size = VmSize::for_spec(bundle.spec(), &config.sizes)?;
        let assets = Assets::open(&global.assets(&config))?;
        let (dir, record) = claim(&global.root, id, |record| {
            record.transient = transient;
            if let HostNetwork::Named { path, .. } = bundle.network() {
                record.network = Some(std::path::absolute(path).map_err(host("find our working directory"))?);
            }
            describe(record, bundle)
        })?;
        let home = Arc::new(enter_network(bundle)?);
        let links = match bundle.network() {
            HostNetwork::None => None,
            HostNetwork::New | HostNetwork::Named { .. } => {
                let namespace = NetworkNamespace::current().map_err(host("find the network namespace"))?;
                Some(Network::new(namespace, size.vcpus.boot))
            }
        };
        let cgroup = join_cgroup(global, bundle, &dir)?;
        let share = Arc::new(Share::mount(namespace, &dir.make_share_directory()?)?);
        let links = Arc::new(tokio::sync::Mutex::new(links));
        Ok(Self { links, share, _cgroup: cgroup, dir, config, assets, size, record, home })
    }

    /// What the machine is configured with.
    pub(crate) fn config(&self) -> &Config {
        &self.config
    }

    /// The network namespace this process was in before.
    pub(crate) fn home(&self) -> Arc<NetworkNamespace> {
        Arc::clone(&self.home)
    }

    /// Its state directory.
    pub(crate) fn dir(&self) -> &ContainerDir {
        &self.dir
    }

    /// Its record as it is being created.
    pub(crate) fn record(&self) -> &Record {
        &self.record
    }

    /// Boots the machine and creates the container in it, up to but not including its process. Must be called in a tokio runtime.
    pub(crate) async fn create(
        &mut self,
        bundle: &Bundle,
        files: Files,
        wanted: Wanted,
    ) -> Result<(Pod, Process, Streams), Error> {
        let starting = Starting::spawn(&self.assets, pod::machine(self.size), self.share.directory())?;
        // If this process is killed, somebody else may have to end the VMM. One that has ended already is reported below.
        self.record.vmm = starting.vmm().process().ok();
        self.record.write(self.dir.as_fd()).map_err(host("write the container's record"))?;
        // While the guest boots. Its place in the share is there for as long as the machine.
        let (mut spec, mut place) = self.share.add(bundle, Trees::of(bundle, &files)?)?;
        // Or the engine could not unmount them.
        drop(files);
        let pod = starting.ready().await?;
        run_creation_hooks(bundle, &self.record, &self.home).await?;
        if let Some(network) = &mut *self.links.lock().await {
            network.update(&pod).await?;
        }
        watched::copy(&pod, &self.share, &mut place, &mut spec).await;
        let (process, streams) =
            pod.create_process(&self.record.id, &self.record.bundle, &spec, wanted).await?;
        Ok((pod, process, streams))
    }

    /// Serves the machine and its first container to the command line.
    pub(crate) fn serve(
        &self,
        pod: &Pod,
        process: Process,
        bundle: Bundle,
    ) -> Result<(Arc<Monitor>, Arc<Container>), Error> {
        let dir = self.dir.reopen()?;
        let container = Container::new(process, bundle, dir, self.record.clone(), None)?;
        let (share, links) = (Arc::clone(&self.share), Arc::clone(&self.links));
        let monitor = Monitor::new(pod.clone(), self, share, links, &container)?;
        monitor.serve(self.dir.as_fd())?;
        Ok((monitor, container))
    }
}

/// Makes an ID ours, with a record that says so.
pub(crate) fn claim(
    root: &Path,
    id: &ContainerId,
    describe: impl FnOnce(&mut Record) -> Result<(), Error>,
) -> Result<(ContainerDir, Record), Error> {
    let dir = ContainerDir::claim(root, id)?;
    let process = HostProcess::current().map_err(host("read /proc/self/stat"))?;
    let mut record = Record::creating(id.clone(), process, log::now());
    describe(&mut record)?;
    record.write(dir.as_fd()).map_err(host("write the container's record"))?;
    Ok((dir, record))
}
