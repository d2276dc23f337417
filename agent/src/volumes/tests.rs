//! These need root, like everything that mounts.

use std::fs;
use std::mem::MaybeUninit;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};

use kvrun_agent_api::agent::Empty;
use rustix::fs::inotify::{self, ReadFlags};
use rustix::fs::{StatVfsMountFlags, statvfs};

use super::*;
use crate::path::tests::{FORK_OR_UNMOUNT, private_run};

fn entry(path: &str, mode: u32, kind: Kind) -> VolumeEntry {
    VolumeEntry { path: path.to_owned(), mode, kind: Some(kind), ..Default::default() }
}

fn dir(path: &str) -> VolumeEntry {
    entry(path, 0o755, Kind::Directory(Empty::new()))
}

fn file(path: &str, content: &str) -> VolumeEntry {
    entry(path, 0o644, Kind::File(content.as_bytes().to_vec()))
}

fn link(path: &str, target: &str) -> VolumeEntry {
    entry(path, 0, Kind::Link(target.as_bytes().to_vec()))
}

/// A volume as a kubelet has it: `keys`, each with the name of the version in it.
fn published(version: &str, keys: &[&str]) -> Vec<VolumeEntry> {
    let data = format!("..{version}");
    let mut entries = vec![dir(""), dir(&data)];
    entries.extend(keys.iter().map(|key| file(&format!("{data}/{key}"), version)));
    entries.push(link("..data", &data));
    entries.extend(keys.iter().map(|key| link(key, &format!("..data/{key}"))));
    entries
}

fn at(name: &str) -> PathBuf {
    Path::new("/run/kvrun/volumes/7/files").join(name)
}

fn read(name: &str) -> String {
    fs::read_to_string(at(name)).unwrap()
}

fn names() -> Vec<String> {
    let mut names: Vec<_> = fs::read_dir(at(""))
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    names
}

/// Whatever is heard of a directory.
struct Ears(OwnedFd);

impl Ears {
    fn on(path: &Path) -> Self {
        let inotify = inotify::init(inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC).unwrap();
        inotify::add_watch(&inotify, path, inotify::WatchFlags::ALL_EVENTS).unwrap();
        Self(inotify)
    }

    fn heard(&self) -> Vec<(ReadFlags, String)> {
        let mut buffer = [MaybeUninit::uninit(); 4096];
        let mut reader = inotify::Reader::new(&self.0, &mut buffer);
        let mut heard = Vec::new();
        while let Ok(event) = reader.next() {
            let name = event.file_name().map_or_else(String::new, |name| name.to_str().unwrap().to_owned());
            heard.push((event.events(), name));
        }
        heard
    }
}

#[test]
fn volume_is_as_it_is_told_and_gone_when_it_is_removed() {
    let _guard = FORK_OR_UNMOUNT.lock().unwrap();
    private_run();
    let volumes = Volumes::default();
    let mut entries = published("one", &["key"]);
    let mut secret = file("..one/secret", "s");
    (secret.mode, secret.uid, secret.gid) = (0o2440, 5, 6);
    entries.push(secret);
    (entries[0].mode, entries[0].gid) = (0o2775, 7);
    volumes.update(7, &entries).unwrap();
    assert_eq!(
        (read("key"), names()),
        ("one".to_owned(), ["..data", "..one", "key"].map(str::to_owned).to_vec())
    );
    let secret = fs::metadata(at("..one/secret")).unwrap();
    assert_eq!((secret.mode() & 0o7777, secret.uid(), secret.gid()), (0o2440, 5, 6));
    let root = fs::metadata(at("")).unwrap();
    assert_eq!((root.mode() & 0o7777, root.uid(), root.gid()), (0o2775, 0, 7));
    let flags = statvfs(at("")).unwrap().f_flag;
    assert!(flags.contains(StatVfsMountFlags::NOSUID | StatVfsMountFlags::NODEV), "{flags:?}");

    let open = File::open(at("key")).unwrap();
    volumes.remove(7).unwrap();
    assert!(!Path::new("/run/kvrun/volumes/7").exists());
    assert_eq!(io::read_to_string(open).unwrap(), "one", "who still has it open goes on");
    volumes.remove(7).unwrap();
}

#[test]
fn link_is_swapped_at_once_and_what_it_left_is_removed_after() {
    let _guard = FORK_OR_UNMOUNT.lock().unwrap();
    private_run();
    let volumes = Volumes::default();
    volumes.update(7, &published("one", &["key", "stale"])).unwrap();
    let ears = Ears::on(&at(""));
    volumes.update(7, &published("two", &["-new", "key"])).unwrap();
    let heard: Vec<_> =
        ears.heard().into_iter().filter(|(flags, _)| !flags.contains(ReadFlags::ATTRIB)).collect();
    let said = |flags: ReadFlags, name: &str| (flags, name.to_owned());
    assert_eq!(
        heard,
        [
            said(ReadFlags::CREATE | ReadFlags::ISDIR, "..two"),
            said(ReadFlags::MOVED_TO, "..data"),
            // It leads through the other, and so comes after it.
            said(ReadFlags::CREATE, "-new"),
            said(ReadFlags::DELETE, "stale"),
            said(ReadFlags::DELETE | ReadFlags::ISDIR, "..one"),
        ]
    );
    assert_eq!((read("key"), read("-new")), ("two".to_owned(), "two".to_owned()));
    assert_eq!(names(), ["-new", "..data", "..two", "key"]);
    assert_eq!(fs::read_dir("/run/kvrun/volumes/7/new").unwrap().count(), 0);
}

#[test]
fn link_stays_until_all_it_is_to_lead_to_is_there() {
    let _guard = FORK_OR_UNMOUNT.lock().unwrap();
    private_run();
    let volumes = Volumes::default();
    volumes.update(7, &published("one", &["key"])).unwrap();
    // In the way of the last file.
    fs::create_dir_all(at("..two/last")).unwrap();
    let refused = volumes.update(7, &published("two", &["key", "last"])).unwrap_err();
    assert!(matches!(&refused, VolumeError::Change { path, .. } if path == "..two/last"), "{refused}");
    assert_eq!((read("key"), read("..two/key")), ("one".to_owned(), "two".to_owned()));
    fs::remove_dir(at("..two/last")).unwrap();
    volumes.update(7, &published("two", &["key", "last"])).unwrap();
    assert_eq!((read("key"), read("last")), ("two".to_owned(), "two".to_owned()));
}

#[test]
fn what_is_the_same_is_left_alone() {
    let _guard = FORK_OR_UNMOUNT.lock().unwrap();
    private_run();
    let volumes = Volumes::default();
    let mut entries = published("one", &["key", "other"]);
    volumes.update(7, &entries).unwrap();
    let looks = || {
        let stat = |name: &str| {
            let stat = at(name).symlink_metadata().unwrap();
            (stat.ino(), stat.mtime_nsec(), stat.ctime_nsec())
        };
        ["..one/key", "..data", "key"].map(stat)
    };
    let before = looks();
    let (above, below) = (Ears::on(&at("")), Ears::on(&at("..one")));
    volumes.update(7, &entries).unwrap();
    assert_eq!((looks(), above.heard(), below.heard()), (before, vec![], vec![]));

    // Of one that changes in place, the neighbours.
    entries[3] = file("..one/other", "changed");
    volumes.update(7, &entries).unwrap();
    assert_eq!((looks(), above.heard()), (before, vec![]));
    assert_eq!(below.heard(), [(ReadFlags::MOVED_TO, "other".to_owned())]);
    assert_eq!(read("other"), "changed");
    below.heard();

    // A file keeps its content when its permissions change.
    entries[2].mode = 0o600;
    volumes.update(7, &entries).unwrap();
    let key = fs::metadata(at("key")).unwrap();
    assert_eq!((key.ino(), key.permissions().mode() & 0o7777), (before[0].0, 0o600));
    assert_eq!(below.heard(), [(ReadFlags::ATTRIB, "key".to_owned())]);
}

#[test]
fn entry_becomes_one_of_another_kind() {
    let _guard = FORK_OR_UNMOUNT.lock().unwrap();
    private_run();
    let volumes = Volumes::default();
    let first = [dir(""), dir("a"), dir("a/b"), file("a/b/c", "1"), file("f", "2"), link("l", "f")];
    volumes.update(7, &first).unwrap();
    let second = [dir(""), file("a", "3"), dir("f"), file("f/g", "4"), file("l", "5")];
    volumes.update(7, &second).unwrap();
    assert_eq!([read("a"), read("f/g"), read("l")], ["3", "4", "5"]);
    volumes.update(7, &first).unwrap();
    assert_eq!([read("a/b/c"), read("f"), read("l")], ["1", "2", "2"]);
    volumes.update(7, &[dir("")]).unwrap();
    assert!(names().is_empty());
}

#[test]
fn what_a_container_has_put_there_leads_nowhere() {
    let _guard = FORK_OR_UNMOUNT.lock().unwrap();
    private_run();
    let volumes = Volumes::default();
    let outside = Path::new("/run/outside");
    fs::create_dir(outside).unwrap();
    fs::write(outside.join("key"), "mine").unwrap();
    volumes.update(7, &published("one", &["key"])).unwrap();
    symlink(outside, at("..two")).unwrap();
    fs::remove_file(at("..one/key")).unwrap();
    fs::remove_dir(at("..one")).unwrap();
    symlink(outside, at("..one")).unwrap();
    // By both names: of what is to come and of what is to go.
    let _ = volumes.update(7, &published("two", &["key"]));
    assert_eq!(fs::read_to_string(outside.join("key")).unwrap(), "mine");
    assert_eq!(fs::read_dir(outside).unwrap().count(), 1);
    assert_eq!(read("key"), "two");
    volumes.remove(7).unwrap();
    assert!(outside.join("key").exists());
}

#[test]
fn only_what_a_volume_may_have_is_taken() {
    let _guard = FORK_OR_UNMOUNT.lock().unwrap();
    private_run();
    let volumes = Volumes::default();
    let long = "n".repeat(256);
    let deep = vec!["d"; MAX_VOLUME_DEPTH + 1].join("/");
    let mut high = dir("d");
    high.mode = 0o10755;
    let mut nobody = dir("d");
    nobody.uid = u32::MAX;
    let mut nothing = dir("d");
    nothing.kind = None;
    for bad in [
        vec![],
        vec![file("", "x")],
        vec![dir("d")],
        vec![dir(""), dir("")],
        vec![dir(""), file("../x", "x")],
        vec![dir(""), dir("a"), file("a/../x", "x")],
        vec![dir(""), file("/x", "x")],
        vec![dir(""), file("x/", "x")],
        vec![dir(""), file("./x", "x")],
        vec![dir(""), file("x\0", "x")],
        vec![dir(""), file(&long, "x")],
        vec![dir(""), dir(&deep)],
        vec![dir(""), file("a/x", "x")],
        vec![dir(""), link("a", "/"), file("a/x", "x")],
        vec![dir(""), file("x", "x"), dir("x")],
        vec![dir(""), link("l", "")],
        vec![dir(""), link("l", "a\0")],
        vec![dir(""), high],
        vec![dir(""), nobody],
        vec![dir(""), nothing],
    ] {
        let refused = volumes.update(7, &bad).unwrap_err();
        assert!(matches!(refused, VolumeError::Entry { .. }), "{refused}");
    }
    let many: Vec<_> =
        std::iter::once(dir("")).chain((0..MAX_VOLUME_ENTRIES).map(|n| file(&n.to_string(), ""))).collect();
    let half = "x".repeat(MAX_VOLUME_BYTES / 2 + 1);
    for bad in [many, vec![dir(""), file("a", &half), file("b", &half)]] {
        assert!(matches!(volumes.update(7, &bad).unwrap_err(), VolumeError::Long));
    }
    assert!(!Path::new("/run/kvrun/volumes/7").exists());
}

#[test]
fn two_states_of_the_largest_volume_have_room() {
    let _guard = FORK_OR_UNMOUNT.lock().unwrap();
    private_run();
    let volumes = Volumes::default();
    let keys: Vec<_> = (0..(MAX_VOLUME_ENTRIES - 3) / 2).map(|n| format!("k{n}")).collect();
    let keys: Vec<_> = keys.iter().map(String::as_str).collect();
    for version in ["one", "two", "three"] {
        let mut entries = published(version, &keys);
        for entry in &mut entries {
            if let Some(Kind::File(content)) = &mut entry.kind {
                content.resize(MAX_VOLUME_BYTES / keys.len(), b'.');
            }
        }
        volumes.update(7, &entries).unwrap();
        assert!(read("k0").starts_with(version));
    }
}
