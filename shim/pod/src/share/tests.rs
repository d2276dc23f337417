//! These need root, like everything that mounts.

use std::fs;
use std::io::{Seek, Write};
use std::thread;

use serde_json::json;

use super::*;
use crate::bundle::{Files, HandedOver};
use crate::network::NetworkNamespace;

/// Runs a test on a thread that is in a mount namespace of its own; mounts there end with it.
pub(crate) fn in_namespace(test: impl FnOnce(&MountNamespace) + Send + 'static) {
    let thread = thread::spawn(move || {
        sys::unshare_mount_namespace().expect("tests of mounts run as root");
        mount_change("/", MountPropagationFlags::DOWNSTREAM | MountPropagationFlags::REC).unwrap();
        test(&MountNamespace(()));
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// A bundle in a directory, and the share mounted in it.
pub(crate) struct Fixture {
    /// Unmounted before its directory is removed.
    pub(crate) share: Share,
    dir: tempfile::TempDir,
}

impl Fixture {
    pub(crate) fn new(namespace: &MountNamespace) -> Self {
        let dir = tempfile::tempdir().unwrap();
        for name in ["bundle/rootfs/etc", "share", "data/below"] {
            fs::create_dir_all(dir.path().join(name)).unwrap();
        }
        fs::write(dir.path().join("bundle/rootfs/etc/motd"), "hello").unwrap();
        fs::write(dir.path().join("file"), "a file").unwrap();
        let share = Share::mount(namespace, &dir.path().join("share")).unwrap();
        Self { share, dir }
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub(crate) fn add(
        &self,
        read_only: bool,
        mounts: &serde_json::Value,
    ) -> Result<(Spec, Place), ShareError> {
        self.write_config(read_only, mounts);
        let (bundle, files) = self.bundle();
        self.share.add(&bundle, Trees::of(&bundle, &files)?)
    }

    fn write_config(&self, read_only: bool, mounts: &serde_json::Value) {
        let config = json!({
            "ociVersion": "1.2.0",
            "process": {"user": {"uid": 0, "gid": 0}, "args": ["/bin/true"], "cwd": "/work/here"},
            "root": {"path": "rootfs", "readonly": read_only},
            "mounts": mounts,
            "linux": {"namespaces": [{"type": "mount"}]},
        });
        fs::write(self.path("bundle/config.json"), config.to_string()).unwrap();
    }

    fn bundle(&self) -> (Bundle, Files) {
        Bundle::load(&self.path("bundle")).unwrap()
    }

    fn bind(&self, source: &str, options: &[&str]) -> serde_json::Value {
        json!([{"destination": "/mnt", "type": "bind", "source": self.path(source), "options": options}])
    }
}

#[test]
fn guest_sees_the_root_and_the_spec_says_where() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        let (spec, _) = f.add(false, &f.bind("data", &["rbind"])).unwrap();
        assert_eq!(spec.root().as_ref().unwrap().path(), Path::new("/run/kvrun/share/0/rootfs"));
        let source = spec.mounts().as_ref().unwrap()[0].source().clone().unwrap();
        assert_eq!(source, Path::new("/run/kvrun/share/volumes/0"));

        assert_eq!(fs::read_to_string(f.path("share/0/rootfs/etc/motd")).unwrap(), "hello");
        // The working directory is made if it is missing; mount points are left to the agent.
        assert!(f.path("bundle/rootfs/work/here").is_dir() && !f.path("bundle/rootfs/mnt").exists());
        fs::write(f.path("share/0/rootfs/new"), "from the guest").unwrap();
        assert_eq!(fs::read_to_string(f.path("bundle/rootfs/new")).unwrap(), "from the guest");
        fs::write(f.path("share/volumes/0/new"), "too").unwrap();
        assert_eq!(fs::read_to_string(f.path("data/new")).unwrap(), "too");
    });
}

#[test]
fn file_is_shared_as_a_file() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        f.add(false, &f.bind("file", &["bind"])).unwrap();
        assert_eq!(fs::read_to_string(f.path("share/volumes/0")).unwrap(), "a file");
    });
}

#[test]
fn share_itself_cannot_be_filled_by_the_guest() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        f.add(false, &json!([])).unwrap();
        for place in ["share/x", "share/0/x", "share/volumes/x"] {
            let error = fs::write(f.path(place), "x").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{place}");
        }
    });
}

#[test]
fn read_only_root_is_read_only_and_has_its_mount_points() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        f.add(true, &f.bind("file", &["bind"])).unwrap();
        let error = fs::write(f.path("share/0/rootfs/x"), "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
        assert!(f.path("bundle/rootfs/mnt").is_file());
        assert!(f.path("bundle/rootfs/work/here").is_dir());
        // It is the share that is read-only, not the bundle.
        fs::write(f.path("bundle/rootfs/x"), "x").unwrap();
    });
}

/// A tmpfs on `data/below`.
pub(crate) fn mount_tmpfs(path: &Path) {
    let none: Option<&std::ffi::CStr> = None;
    rustix::mount::mount("tmpfs", path, "tmpfs", rustix::mount::MountFlags::empty(), none).unwrap();
}

fn mount_below(f: &Fixture) {
    mount_tmpfs(&f.path("data/below"));
}

#[test]
fn read_only_bind_leaves_mounts_below_it_unless_recursive() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        mount_below(&f);
        f.add(false, &f.bind("data", &["rbind", "ro"])).unwrap();
        let write = |name: &str| fs::write(f.path(&format!("share/{name}")), "x");
        assert_eq!(write("volumes/0/x").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        write("volumes/0/below/x").unwrap();

        let f = Fixture::new(namespace);
        mount_below(&f);
        f.add(false, &f.bind("data", &["rbind", "rro"])).unwrap();
        let write = |name: &str| fs::write(f.path(&format!("share/{name}")), "x");
        assert_eq!(write("volumes/0/x").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        assert_eq!(write("volumes/0/below/x").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
    });
}

#[test]
fn bind_that_is_not_recursive_leaves_out_what_is_mounted_below() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        mount_below(&f);
        fs::write(f.path("data/below/x"), "x").unwrap();
        f.add(false, &f.bind("data", &["bind"])).unwrap();
        assert!(!f.path("share/volumes/0/below/x").exists());
    });
}

#[test]
fn device_nodes_in_the_share_do_not_open_on_the_host() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        let node = f.path("bundle/rootfs/null");
        let (major, minor) = (1, 3);
        let mode = Mode::RUSR | Mode::WUSR;
        rustix::fs::mknodat(CWD, &node, FileType::CharacterDevice, mode, rustix::fs::makedev(major, minor))
            .unwrap();
        f.add(false, &json!([])).unwrap();
        let error = fs::File::open(f.path("share/0/rootfs/null")).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::PermissionDenied);
    });
}

#[test]
fn removed_container_leaves_nothing_and_its_place_is_not_used_again() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        let mounts = || fs::read_to_string("/proc/thread-self/mountinfo").unwrap().lines().count();
        let before = mounts();
        let (_, place) = f.add(false, &f.bind("file", &["bind"])).unwrap();
        assert_eq!(place.in_guest(), Path::new("/run/kvrun/share/0"));
        let removed = ["/run/kvrun/share/0", "/run/kvrun/share/volumes/0"].map(PathBuf::from);
        assert_eq!(f.share.remove(&place), removed);
        let left = || ["share", "share/volumes"].map(|dir| fs::read_dir(f.path(dir)).unwrap().count());
        assert_eq!(left(), [1, 0]);
        // One that cannot be added leaves nothing either.
        f.write_config(false, &f.bind("file", &["bind"]));
        let (bundle, files) = f.bundle();
        let mut trees: Vec<_> = Trees::of(&bundle, &files).unwrap().into_iter().collect();
        trees.truncate(1);
        assert!(f.share.add(&bundle, Trees::from(trees)).is_err());
        fs::write(f.path("bundle/rootfs/mnt"), "").unwrap();
        let below = json!([{"destination": "/mnt/below", "type": "tmpfs"}]);
        assert!(f.add(true, &below).is_err());
        assert_eq!((left(), mounts()), ([1, 0], before));
        let (_, place) = f.add(false, &json!([])).unwrap();
        assert_eq!(place.in_guest(), Path::new("/run/kvrun/share/2"));
    });
}

#[test]
fn containers_that_bind_the_same_have_one_volume() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        let source = |(spec, place): (Spec, Place)| {
            let source = spec.mounts().as_ref().unwrap()[0].source().clone().unwrap();
            (source.strip_prefix("/run/kvrun/share/volumes").unwrap().to_str().unwrap().to_owned(), place)
        };
        let add = |name: &str, options: &[&str]| source(f.add(false, &f.bind(name, options)).unwrap());
        let (first, first_place) = add("data", &["rbind"]);
        let (second, second_place) = add("data", &["rbind"]);
        let (reader, reader_place) = add("data", &["rbind", "ro"]);
        assert_eq!([&first, &second, &reader], ["0"; 3]);
        // With other mounts in it, it is something else, and so is another directory.
        mount_below(&f);
        let (later, later_place) = add("data", &["rbind"]);
        let (below, below_place) = add("data/below", &["rbind"]);
        let (file, file_place) = add("file", &["bind"]);
        let (same_file, same_file_place) = add("file", &["bind"]);
        assert_eq!([&later, &below, &file, &same_file], ["3", "4", "5", "5"]);

        assert_eq!(f.share.remove(&first_place).len(), 1);
        assert_eq!(f.share.remove(&reader_place).len(), 1);
        fs::write(f.path("share/volumes/0/new"), "new").unwrap();
        assert_eq!(f.share.remove(&second_place).len(), 2);
        assert!(!f.path("share/volumes/0").exists());
        for place in [later_place, below_place, file_place, same_file_place] {
            f.share.remove(&place);
        }
        assert_eq!(fs::read_dir(f.path("share/volumes")).unwrap().count(), 0);

        // Who must not write does not get what others write to.
        let (reader, _) = add("file", &["bind", "ro"]);
        let (writer, _) = add("file", &["bind"]);
        assert_ne!(reader, writer);
        let error = fs::write(f.path("share/volumes").join(reader), "x").unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem);
    });
}

/// As podman's are, which it mounts where no other namespace hears of it.
#[test]
fn files_that_only_another_namespace_has_are_handed_over() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        f.write_config(true, &f.bind("data", &["rbind", "ro"]));
        let (mut config, trees) = thread::scope(|scope| {
            let other = scope.spawn(|| {
                sys::unshare_mount_namespace().unwrap();
                mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
                mount_tmpfs(&f.path("bundle/rootfs"));
                fs::write(f.path("bundle/rootfs/motd"), "theirs").unwrap();
                mount_below(&f);
                fs::write(f.path("data/below/x"), "x").unwrap();
                let (bundle, files) = f.bundle();
                let mut config = tempfile::tempfile().unwrap();
                config.write_all(files.config()).unwrap();
                (config, Trees::of(&bundle, &files).unwrap())
            });
            other.join().unwrap()
        });
        config.rewind().unwrap();
        // As it arrives in another process.
        let fds: Vec<_> = trees.descriptors().iter().map(|fd| fd.try_clone_to_owned().unwrap()).collect();
        drop(trees);
        let trees = Trees::from(fds);
        let network = NetworkNamespace::current().unwrap();
        let handed = HandedOver { config, network, trees: &trees };
        let bundle = Bundle::handed_over(&f.path("bundle"), handed, &|_| None).unwrap();
        f.share.add(&bundle, trees).unwrap();
        assert_eq!(fs::read_to_string(f.path("share/0/rootfs/motd")).unwrap(), "theirs");
        assert_eq!(fs::read_to_string(f.path("share/volumes/0/below/x")).unwrap(), "x");
        assert!(f.path("share/0/rootfs/mnt").is_dir(), "a mount point in a read-only root");
        for name in ["0/rootfs/x", "volumes/0/x"] {
            let error = fs::write(f.path("share").join(name), "x").unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{name}");
        }
    });
}

#[test]
fn what_was_not_handed_over_is_named() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        f.write_config(false, &json!([]));
        let (bundle, files) = f.bundle();
        let trees = Trees::of(&bundle, &files).unwrap();
        f.write_config(false, &f.bind("data", &["bind"]));
        let config = fs::File::open(f.path("bundle/config.json")).unwrap();
        let handed = HandedOver { config, network: NetworkNamespace::current().unwrap(), trees: &trees };
        let error = Bundle::handed_over(&f.path("bundle"), handed, &|_| None).unwrap_err();
        assert!(error.to_string().contains("mounts[0].source"), "{error}");
    });
}

#[test]
fn share_is_gone_when_dropped() {
    in_namespace(|namespace| {
        let Fixture { dir, share } = Fixture::new(namespace);
        drop(share);
        assert_eq!(fs::read_dir(dir.path().join("share")).unwrap().count(), 0);
        fs::remove_dir(dir.path().join("share")).unwrap();
    });
}

#[test]
fn namespace_is_refused_to_a_process_with_threads() {
    let (sender, receiver) = std::sync::mpsc::channel::<()>();
    let other = thread::spawn(move || receiver.recv());
    assert!(matches!(enter_mount_namespace(), Err(ShareError::Namespace(_))));
    drop(sender);
    let _ = other.join();
}

#[test]
fn view_has_the_containers_files_and_none_of_the_hosts() {
    in_namespace(|namespace| {
        let f = Fixture::new(namespace);
        std::os::unix::fs::symlink("/etc", f.path("bundle/rootfs/link")).unwrap();
        fs::create_dir(f.path("bundle/rootfs/etc/data")).unwrap();
        fs::write(f.path("data/named"), "data").unwrap();
        f.write_config(
            true,
            &json!([
                {"destination": "/link/data", "type": "bind", "source": f.path("data"), "options": ["rbind"]},
                {"destination": "/etc/file", "type": "bind", "source": f.path("file"), "options": ["bind", "ro"]},
                {"destination": "/tmp", "type": "tmpfs"},
            ]),
        );
        let (bundle, files) = f.bundle();
        let view = View::of(&bundle, &files).unwrap();
        let outside = f.path("data");
        // Its thread ends with the namespace.
        thread::spawn(move || {
            view.enter(None).unwrap();
            assert_eq!(fs::read_to_string("/etc/motd").unwrap(), "hello");
            // The link leads to the container's directory, not to the host's.
            assert_eq!(fs::read_to_string("/etc/data/named").unwrap(), "data");
            assert_eq!(fs::read_to_string("/etc/file").unwrap(), "a file");
            assert!(!outside.exists() && !Path::new("/etc/passwd").exists());
            fs::write("/etc/data/new", "from the host").unwrap();
            for read_only in ["/new", "/etc/file"] {
                let error = fs::write(read_only, "x").unwrap_err();
                assert_eq!(error.kind(), io::ErrorKind::ReadOnlyFilesystem, "{read_only}");
            }
            assert_eq!(fs::canonicalize("/..").unwrap(), Path::new("/"));
        })
        .join()
        .unwrap();
        assert_eq!(fs::read_to_string(f.path("data/new")).unwrap(), "from the host");
    });
}
