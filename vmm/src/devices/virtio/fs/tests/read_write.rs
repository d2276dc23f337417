//! What a guest does to a share.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};

use super::*;
use crate::devices::virtio::testing::config_of;

#[test]
fn config_space_holds_the_tag_and_one_request_queue() {
    let mut guest = Guest::unmounted(false);
    let config: [u8; 48] = config_of(&mut guest.fs);
    assert_eq!(&config[..8], b"share\0\0\0");
    assert_eq!(config[36..40], 1u32.to_le_bytes());
    assert_eq!(config[40..], [0; 8]);
}

#[test]
fn init_negotiates_requests_of_a_mebibyte() {
    let mut guest = Guest::unmounted(false);
    let answer = guest.init();
    assert_eq!(u32_at(&answer, 0), 7);
    // max_write, and max_pages: with the headers, a queue holds that many descriptors.
    assert_eq!(u32_at(&answer, 20), 1 << 20);
    let max_pages = u16::from_le_bytes(answer[28..30].try_into().unwrap());
    assert!(max_pages == 256 && u32::from(max_pages) + 4 <= u32::from(QUEUE_SIZES[1]));
    // FUSE_POSIX_ACL, FUSE_MAX_PAGES, FUSE_SUBMOUNTS, FUSE_HANDLE_KILLPRIV_V2; not FUSE_WRITEBACK_CACHE.
    let flags = u32_at(&answer, 12);
    assert_eq!(
        flags & (1 << 20 | 1 << 22 | 1 << 27 | 1 << 28 | 1 << 16),
        1 << 20 | 1 << 22 | 1 << 27 | 1 << 28
    );
}

#[test]
fn looks_up_what_the_host_has() {
    let mut guest = Guest::mounted(false);
    fs::write(guest.dir.path().join("hello"), "hello").unwrap();
    let entry = guest.lookup(ROOT, "hello").unwrap();
    assert_eq!((entry.size, entry.mode), (5, 0o100_644));
    assert_eq!(guest.lookup(ROOT, "absent").unwrap_err(), libc::ENOENT);
    let attr = Attr::parse(&guest.call(op::GETATTR, entry.node, &[0; 16]).unwrap()[16..]);
    assert_eq!((attr.size, attr.mode), (5, 0o100_644));
}

#[test]
fn reads_a_file() {
    let mut guest = Guest::mounted(false);
    let content: Vec<u8> = (0..300_000u32).flat_map(u32::to_le_bytes).collect();
    fs::write(guest.dir.path().join("big"), &content).unwrap();
    let node = guest.lookup(ROOT, "big").unwrap().node;
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    assert!(guest.read(node, handle, 0, 1 << 20).unwrap() == content[..1 << 20]);
    assert!(guest.read(node, handle, 1 << 20, 1 << 20).unwrap() == content[1 << 20..]);
    assert!(guest.read(node, handle, 1 << 30, 4096).unwrap().is_empty());
    guest.call(op::RELEASE, node, &release_args(handle)).unwrap();
    assert_eq!(guest.read(node, handle, 0, 4096).unwrap_err(), libc::EBADF);
}

#[test]
fn reads_into_as_many_buffers_as_linux_uses() {
    let mut guest = Guest::mounted(false);
    let content: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    fs::write(guest.dir.path().join("big"), &content).unwrap();
    let node = guest.lookup(ROOT, "big").unwrap().node;
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    for indirect in [false, true] {
        let message = guest.message(op::READ, node, &io_args(handle, 0, 1 << 20));
        let heap = guest.driver.mark();
        let mut segments = vec![guest.driver.readable(&message[..40]), guest.driver.readable(&message[40..])];
        let header = guest.driver.writable(16);
        segments.push(header);
        let pages: Vec<_> = (0..256).map(|_| guest.driver.writable(4096)).collect();
        segments.extend(&pages);
        if indirect {
            guest.driver.add_indirect(REQUESTS, &segments);
        } else {
            guest.driver.add(REQUESTS, &segments);
        }
        guest.driver.kick(REQUESTS);
        assert_eq!(guest.driver.wait_used(REQUESTS).1, 16 + (1 << 20));
        for (i, page) in pages.iter().enumerate() {
            assert!(guest.driver.read(page.addr, 4096) == content[i * 4096..][..4096], "page {i}");
        }
        guest.driver.release(heap);
    }
}

#[test]
fn creates_and_writes_a_file() {
    let mut guest = Guest::mounted(false);
    let (entry, handle) = guest.create(ROOT, "new", libc::O_RDWR, 0o100_666).unwrap();
    let data: Vec<u8> = (0..1u32 << 18).flat_map(u32::to_le_bytes).collect();
    assert_eq!(guest.write(entry.node, handle, 0, &data).unwrap(), 1 << 20);
    assert_eq!(guest.write(entry.node, handle, 1 << 20, b"end").unwrap(), 3);
    let path = guest.dir.path().join("new");
    let written = fs::read(&path).unwrap();
    assert!(written[..1 << 20] == data && &written[1 << 20..] == b"end");
    // The guest has applied its umask; the host's does not matter.
    assert_eq!(path.metadata().unwrap().permissions().mode() & 0o7777, 0o666);
}

#[test]
fn files_belong_to_the_user_who_created_them() {
    if !rustix::process::geteuid().is_root() {
        println!("skipped: only root can create files for others");
        return;
    }
    let mut guest = Guest::mounted(false);
    fs::set_permissions(guest.dir.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let args = with_names(fields(&[0o755, 0]), &["theirs"]);
    let message = guest.message_from(1234, op::MKDIR, ROOT, &args);
    let entry = Entry::parse(&guest.send(&message, ROOM).unwrap());
    assert_eq!(entry.uid, 1234);
    assert_eq!(guest.dir.path().join("theirs").metadata().unwrap().uid(), 1234);
    // And the threads are root again.
    let entry =
        Entry::parse(&guest.call(op::MKDIR, ROOT, &with_names(fields(&[0o755, 0]), &["mine"])).unwrap());
    assert_eq!(entry.uid, 0);
}

#[test]
fn lists_a_directory_larger_than_an_answer() {
    let mut guest = Guest::mounted(false);
    let mut names: Vec<String> = (0..500).map(|i| format!("file-{i:03}-{}", "x".repeat(i % 200))).collect();
    for name in &names {
        fs::write(guest.dir.path().join(name), "").unwrap();
    }
    names.sort();
    assert_eq!(guest.list(ROOT), names);
}

#[test]
fn renames_links_and_removes() {
    let mut guest = Guest::mounted(false);
    let path = guest.dir.path().to_owned();
    fs::write(path.join("a"), "a").unwrap();
    let node = guest.lookup(ROOT, "a").unwrap().node;
    guest.call(op::LINK, ROOT, &with_names(fields64(&[node]), &["b"])).unwrap();
    guest.call(op::RENAME, ROOT, &with_names(fields64(&[ROOT]), &["a", "c"])).unwrap();
    guest.call(op::SYMLINK, ROOT, &with_names(vec![], &["l", "../somewhere/else"])).unwrap();
    assert_eq!(guest.list(ROOT), ["b", "c", "l"]);
    assert_eq!(fs::read_link(path.join("l")).unwrap().to_str().unwrap(), "../somewhere/else");
    let node = guest.lookup(ROOT, "l").unwrap().node;
    assert_eq!(guest.call(op::READLINK, node, &[]).unwrap(), b"../somewhere/else");
    for name in ["b", "c", "l"] {
        guest.call(op::UNLINK, ROOT, &c_str(name)).unwrap();
    }
    assert!(guest.list(ROOT).is_empty());
}

#[test]
fn extended_attributes_work() {
    let mut guest = Guest::mounted(false);
    let (entry, _) = guest.create(ROOT, "f", libc::O_RDWR, 0o100_644).unwrap();
    // FUSE_SETXATTR_EXT was negotiated with POSIX ACLs: four fields.
    let mut args = with_names(fields(&[5, 0, 0, 0]), &["user.color"]);
    args.extend(b"green");
    guest.call(op::SETXATTR, entry.node, &args).unwrap();
    let value = guest.call(op::GETXATTR, entry.node, &with_names(fields(&[64, 0]), &["user.color"])).unwrap();
    assert_eq!(value, b"green");
}

#[test]
fn attributes_of_an_overlay_have_another_name_on_the_host() {
    const ON_HOST: &str = "user.virtiofs.trusted.overlay.opaque";
    let mut guest = Guest::mounted(false);
    let (entry, _) = guest.create(ROOT, "f", libc::O_RDWR, 0o100_644).unwrap();
    let named = |name: &str| {
        let mut args = with_names(fields(&[1, 0, 0, 0]), &[name]);
        args.extend(b"y");
        args
    };
    guest.call(op::SETXATTR, entry.node, &named("trusted.overlay.opaque")).unwrap();
    let mut value = [0; 2];
    assert_eq!(rustix::fs::getxattr(guest.dir.path().join("f"), ON_HOST, &mut value), Ok(1));
    assert_eq!(value[0], b'y');
    let get = with_names(fields(&[64, 0]), &["trusted.overlay.opaque"]);
    assert_eq!(guest.call(op::GETXATTR, entry.node, &get).unwrap(), b"y");
    assert_eq!(guest.call(op::SETXATTR, entry.node, &named(ON_HOST)).unwrap_err(), libc::EPERM);
}

#[test]
fn a_link_out_of_the_share_leads_nowhere_on_the_host() {
    let mut guest = Guest::mounted(false);
    let outside = tempfile::tempdir().unwrap();
    fs::write(outside.path().join("secret"), "secret").unwrap();
    symlink(outside.path(), guest.dir.path().join("way-out")).unwrap();
    let node = guest.lookup(ROOT, "way-out").unwrap().node;
    assert_ne!(guest.lookup(node, "secret").map(|entry| entry.size).unwrap_err(), 0);
    assert_ne!(guest.open(node, libc::O_RDONLY).unwrap_err(), 0);
}

#[test]
fn forgotten_inodes_are_gone() {
    let mut guest = Guest::mounted(false);
    fs::write(guest.dir.path().join("f"), "").unwrap();
    let node = guest.lookup(ROOT, "f").unwrap().node;
    let forget = guest.message(op::FORGET, node, &fields64(&[1]));
    // As Linux sends it: on the hiprio queue, without room for an answer.
    let segment = guest.driver.readable(&forget);
    let head = guest.driver.add(0, &[segment]);
    guest.driver.kick(0);
    assert_eq!(guest.driver.wait_used(0), (head, 0));
    assert_eq!(guest.call(op::GETATTR, node, &[0; 16]).unwrap_err(), libc::EBADF);
}

#[test]
fn a_reset_ends_the_session() {
    let mut guest = Guest::mounted(false);
    fs::write(guest.dir.path().join("f"), "content").unwrap();
    let node = guest.lookup(ROOT, "f").unwrap().node;
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    guest.fs.reset();
    guest.fs.reset();
    guest.fs.activate(guest.driver.activation(0)).unwrap();
    guest.init();
    assert_eq!(guest.call(op::GETATTR, node, &[0; 16]).unwrap_err(), libc::EBADF);
    assert_eq!(guest.read(node, handle, 0, 16).unwrap_err(), libc::EBADF);
    assert_eq!(guest.lookup(ROOT, "f").unwrap().size, 7);
}

#[test]
fn what_cannot_be_shared_is_refused() {
    let dir = TempDir::new().unwrap();
    fs::create_dir(dir.path().join("in")).unwrap();
    fs::write(dir.path().join("file"), "").unwrap();
    symlink("in", dir.path().join("link")).unwrap();
    let share = jail::Share::unjailed(fs::File::open(dir.path()).unwrap().into());
    let message = |outcome: Result<Fs, super::super::FsError>| outcome.err().unwrap().to_string();
    Fs::new(&share, "in", "x", options(false)).unwrap();
    for directory in ["", "file", "link", "none", "..", "in/../..", "/", "nul\0"] {
        let message = message(Fs::new(&share, directory, "x", options(false)));
        assert_eq!(message, format!("cannot open the directory {directory:?} of the share"));
    }
    for tag in ["", "seven-and-thirty-characters-is-too-lo", "nul\0"] {
        assert!(message(Fs::new(&share, ".", tag, options(false))).starts_with("tag "), "{tag}");
    }
}
