use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt, symlink};
use std::sync::Mutex;
use std::thread;

use kvrun_agent_api::agent::VolumeEntry;
use kvrun_agent_api::agent::volume_entry::Kind;
use kvrun_agent_api::{MAX_VOLUME_BYTES, MAX_VOLUME_DEPTH, MAX_VOLUME_ENTRIES};
use rustix::fs::{CWD, FileType, Mode, mknodat};
use serde_json::json;

use super::*;
use crate::pod::tests::{Extent, Program, Volumes, boot, guest_with_volumes, run};
use crate::share::tests::{Fixture, in_namespace};

/// As a kubelet does it (pkg/volume/util/atomic_writer.go, `Write`).
fn publish(volume: &Path, version: &str) {
    let data = format!("..{version}");
    let before = fs::read_link(volume.join("..data")).ok();
    fs::create_dir(volume.join(&data)).unwrap();
    fs::write(volume.join(&data).join("key"), version).unwrap();
    symlink(&data, volume.join("..data_tmp")).unwrap();
    fs::rename(volume.join("..data_tmp"), volume.join("..data")).unwrap();
    if let Some(before) = before {
        fs::remove_dir_all(volume.join(before)).unwrap();
    } else {
        symlink("..data/key", volume.join("key")).unwrap();
    }
}

fn of<'e>(entries: &'e [VolumeEntry], path: &str) -> Option<&'e Kind> {
    entries.iter().find(|entry| entry.path == path)?.kind.as_ref()
}

/// What `key` has in it, if it leads somewhere.
fn key(entries: &[VolumeEntry]) -> Option<String> {
    let Some(Kind::Link(data)) = of(entries, "..data") else { return None };
    match of(entries, &format!("{}/key", String::from_utf8_lossy(data))) {
        Some(Kind::File(content)) => Some(String::from_utf8_lossy(content).into_owned()),
        _ => None,
    }
}

fn open(path: &Path) -> OwnedFd {
    File::open(path).unwrap().into()
}

struct Host {
    pod: Pod,
    extent: Arc<Mutex<Extent>>,
    told: Volumes,
    dir: tempfile::TempDir,
}

impl Host {
    async fn new() -> Self {
        let (extent, told) = (Arc::<Mutex<Extent>>::default(), Volumes::default());
        let guest = guest_with_volumes(Program::Sleep, Arc::clone(&extent), Arc::clone(&told));
        Self { pod: boot(guest).await.unwrap(), extent, told, dir: tempfile::tempdir().unwrap() }
    }

    fn volume(&self, name: &str) -> PathBuf {
        let volume = self.dir.path().join(name);
        fs::create_dir(&volume).unwrap();
        publish(&volume, "one");
        volume
    }

    async fn add(&self, volume: &Path) -> Result<u64, WatchError> {
        self.pod.watched.add(&self.pod, open(volume), volume).await
    }

    async fn release(&self, number: u64) {
        self.pod.watched.release(&self.pod, number).await.unwrap();
    }

    /// Waits until the guest was told of a volume with this in its key, and nothing but what belongs to that.
    async fn until(&self, number: u64, version: &str) {
        let is_there = |(told, entries): &(u64, Option<Vec<VolumeEntry>>)| {
            let Some(entries) = entries else { return false };
            *told == number && entries.len() == 5 && key(entries).as_deref() == Some(version)
        };
        let mut told = self.told.subscribe();
        told.wait_for(|told| told.last().is_some_and(is_there)).await.unwrap();
    }

    fn count(&self) -> usize {
        self.told.borrow().len()
    }

    async fn is_at_rest(&self) -> bool {
        let table = self.pod.watched.0.lock().await;
        table.watching.is_none() && table.volumes.is_empty()
    }
}

#[test]
fn volume_is_copied_once_and_followed_until_the_last_container_goes() {
    run(async {
        let host = Host::new().await;
        let (volume, other) = (host.volume("volume"), host.volume("other"));
        let number = host.add(&volume).await.unwrap();
        host.until(number, "one").await;
        assert_eq!(host.add(&volume).await.unwrap(), number);
        assert_eq!(host.count(), 1);
        let second = host.add(&other).await.unwrap();
        assert_ne!(second, number);

        publish(&volume, "two");
        host.until(number, "two").await;
        host.release(number).await;
        publish(&volume, "three");
        host.until(number, "three").await;
        host.release(number).await;
        assert_eq!(*host.told.borrow().last().unwrap(), (number, None));

        // The other one goes on, and hears nothing of the first.
        publish(&volume, "four");
        publish(&other, "two");
        host.until(second, "two").await;
        let since = host
            .told
            .borrow()
            .iter()
            .rev()
            .take_while(|(_, entries)| entries.is_some())
            .all(|(of, _)| *of == second);
        assert!(since);
        host.release(second).await;
        assert!(host.is_at_rest().await);
        // One that comes again is a new one.
        let again = host.add(&volume).await.unwrap();
        host.until(again, "four").await;
        assert!(again > second);
    });
}

#[test]
fn guest_is_never_told_of_half_a_change() {
    run(async {
        let host = Host::new().await;
        let volume = host.volume("volume");
        let number = host.add(&volume).await.unwrap();
        let writer =
            thread::spawn(move || (0..200).for_each(|version| publish(&volume, &format!("v{version}"))));
        host.until(number, "v199").await;
        writer.join().unwrap();
        let told = host.told.borrow();
        for (_, entries) in told.iter() {
            let entries = entries.as_ref().unwrap();
            assert!(key(entries).is_some(), "{entries:?}");
        }
    });
}

#[test]
fn copy_stays_as_it_was_while_its_volume_cannot_be_one() {
    run(async {
        let host = Host::new().await;
        let volume = host.volume("volume");
        let number = host.add(&volume).await.unwrap();
        host.until(number, "one").await;
        let is_behind =
            async || host.pod.watched.0.lock().await.volumes.values().all(|volume| volume.is_behind);
        File::create(volume.join("large")).unwrap().set_len(MAX_VOLUME_BYTES as u64).unwrap();
        while !is_behind().await {
            tokio::task::yield_now().await;
        }
        assert_eq!(host.count(), 1);
        fs::remove_file(volume.join("large")).unwrap();
        host.until(number, "one").await;
        publish(&volume, "two");
        host.until(number, "two").await;
        assert!(!is_behind().await);
    });
}

#[test]
fn volume_that_is_removed_is_no_error() {
    run(async {
        let host = Host::new().await;
        let (volume, other) = (host.volume("volume"), host.volume("other"));
        let (number, second) = (host.add(&volume).await.unwrap(), host.add(&other).await.unwrap());
        fs::remove_dir_all(&volume).unwrap();
        publish(&other, "two");
        host.until(second, "two").await;
        assert!(host.pod.watched.0.lock().await.volumes.values().all(|volume| !volume.is_behind));
        host.release(number).await;
        host.release(second).await;
        assert!(host.is_at_rest().await);
    });
}

#[test]
fn nothing_is_watched_of_which_there_is_no_copy() {
    run(async {
        let host = Host::new().await;
        let volume = host.volume("volume");
        host.extent.lock().unwrap().is_stubborn = true;
        assert!(matches!(host.add(&volume).await, Err(WatchError::Pod(_))));
        host.extent.lock().unwrap().is_stubborn = false;
        fs::write(volume.join("large"), vec![0; MAX_VOLUME_BYTES]).unwrap();
        assert!(matches!(host.add(&volume).await, Err(WatchError::Tree(TreeError::TooLarge))));
        assert!(host.is_at_rest().await);
        assert_eq!(host.count(), 0);
    });
}

#[test]
fn machine_ends_while_a_volume_is_watched() {
    run(async {
        let host = Host::new().await;
        let volume = host.volume("volume");
        host.add(&volume).await.unwrap();
        let watched = Arc::downgrade(&host.pod.watched);
        host.pod.shutdown().await;
        assert!(watched.upgrade().is_none(), "somebody keeps it");
    });
}

#[test]
fn spec_names_copies_of_what_a_kubelet_keeps_and_the_share_for_all_else() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        let sources = [
            ("data/volumes/kubernetes.io~configmap/a", "ro"),
            ("data/volumes/kubernetes.io~secret/b", "rro"),
            ("data/volumes/kubernetes.io~secret/foreign", "ro"),
            ("data/volumes/kubernetes.io~projected/writable", "rw"),
            ("data/volumes/kubernetes.io~empty-dir/c", "ro"),
        ];
        let mounts = sources.map(|(source, option)| {
            fs::create_dir_all(f.path(source)).unwrap();
            json!({"destination": format!("/{source}"), "type": "bind", "source": f.path(source), "options": ["rbind", option]})
        });
        mknodat(CWD, f.path(sources[2].0).join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        let (mut spec, mut place) = f.add(false, &mounts.into_iter().collect()).unwrap();
        run(async {
            let host = Host::new().await;
            copy(&host.pod, &f.share, &mut place, &mut spec).await;
            let sources = spec.mounts().iter().flatten().map(|mount| mount.source().clone().unwrap());
            let sources: Vec<_> = sources.map(|source| source.display().to_string()).collect();
            let copy = |number| format!("/run/kvrun/volumes/{number}/files");
            let share = |number| format!("/run/kvrun/share/volumes/{number}");
            assert_eq!(sources, [copy(0), copy(1), share(2), share(3), share(4)]);
            host.pod.take_from_share(&f.share, &place).await;
            let gone: Vec<_> = host
                .told
                .borrow()
                .iter()
                .filter(|(_, entries)| entries.is_none())
                .map(|(of, _)| *of)
                .collect();
            assert_eq!(gone, [0, 1]);
            assert!(host.is_at_rest().await);
        });
    });
}

#[test]
fn directories_of_a_kubelets_volumes_are_known() {
    for (path, expected) in [
        ("/var/lib/kubelet/pods/1/volumes/kubernetes.io~configmap/name", true),
        ("/data/volumes/kubernetes.io~downward-api/name", true),
        ("/var/lib/kubelet/pods/1/volumes/kubernetes.io~projected/kube-api-access-1", true),
        ("/var/lib/kubelet/pods/1/volumes/kubernetes.io~configmap/name/below", false),
        ("/var/lib/kubelet/pods/1/volumes/kubernetes.io~configmap", false),
        ("/var/lib/kubelet/pods/1/volume-subpaths/kubernetes.io~configmap/name", false),
        ("/var/lib/kubelet/pods/1/volumes/kubernetes.io~empty-dir/name", false),
        ("/", false),
    ] {
        assert_eq!(is_kept(Path::new(path)), expected, "{path}");
    }
}

#[test]
fn all_of_a_volume_is_read_and_no_link_followed() {
    let dir = tempfile::tempdir().unwrap();
    let volume = dir.path().join("volume");
    fs::create_dir_all(volume.join("a/b")).unwrap();
    fs::write(dir.path().join("outside"), "secret").unwrap();
    fs::write(volume.join("a/b/file"), "content").unwrap();
    fs::set_permissions(volume.join("a/b/file"), fs::Permissions::from_mode(0o640)).unwrap();
    std::os::unix::fs::chown(volume.join("a/b/file"), Some(5), Some(6)).unwrap();
    fs::set_permissions(volume.join("a/b/file"), fs::Permissions::from_mode(0o2640)).unwrap();
    symlink("../outside", volume.join("link")).unwrap();
    symlink("/", volume.join("a-link")).unwrap();
    let entries = tree::read(&open(&volume)).unwrap();
    let paths: Vec<_> = entries.iter().map(|entry| entry.path.as_str()).collect();
    assert_eq!(paths, ["", "a", "a/b", "a/b/file", "a-link", "link"]);
    assert_eq!((entries[3].mode, entries[3].uid, entries[3].gid), (0o2640, 5, 6));
    assert_eq!(of(&entries, "a/b/file"), Some(&Kind::File(b"content".to_vec())));
    assert_eq!(of(&entries, "link"), Some(&Kind::Link(b"../outside".to_vec())));
    assert_eq!(of(&entries, "a-link"), Some(&Kind::Link(b"/".to_vec())));
}

#[test]
fn volume_beyond_its_bounds_is_not_read() {
    use std::os::unix::ffi::OsStrExt;
    let read = |make: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        make(dir.path());
        tree::read(&open(dir.path())).map(|entries| entries.len())
    };
    let fill = |count: usize| {
        move |dir: &Path| (1..count).for_each(|n| fs::write(dir.join(n.to_string()), "").unwrap())
    };
    assert_eq!(read(&fill(MAX_VOLUME_ENTRIES)).unwrap(), MAX_VOLUME_ENTRIES);
    assert!(matches!(read(&fill(MAX_VOLUME_ENTRIES + 1)), Err(TreeError::TooLarge)));
    let halves = |more: usize| {
        move |dir: &Path| {
            fs::write(dir.join("a"), vec![0; MAX_VOLUME_BYTES / 2]).unwrap();
            fs::write(dir.join("b"), vec![0; MAX_VOLUME_BYTES / 2 + more]).unwrap();
        }
    };
    assert_eq!(read(&halves(0)).unwrap(), 3);
    assert!(matches!(read(&halves(1)), Err(TreeError::TooLarge)));
    let deep = |dir: &Path| fs::create_dir_all(dir.join(vec!["d"; MAX_VOLUME_DEPTH].join("/"))).unwrap();
    assert!(matches!(read(&deep), Err(TreeError::TooLarge)));
    let fifo = |dir: &Path| mknodat(CWD, dir.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
    assert!(matches!(read(&fifo), Err(TreeError::Foreign { .. })));
    let name = |dir: &Path| fs::write(dir.join(std::ffi::OsStr::from_bytes(b"\xff")), "").unwrap();
    assert!(matches!(read(&name), Err(TreeError::Foreign { .. })));

    in_namespace(|_| {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("mounted")).unwrap();
        crate::share::tests::mount_tmpfs(&dir.path().join("mounted"));
        let refused = tree::read(&open(dir.path()));
        assert!(
            matches!(refused, Err(TreeError::Foreign { what: "another file system", .. })),
            "{refused:?}"
        );
    });
}
