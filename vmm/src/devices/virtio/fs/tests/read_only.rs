//! What a guest cannot do to a read-only share, whatever it sends.

use std::fs;
use std::path::Path;

use super::*;

/// Path, content, mode and extended attributes of all there is, in one comparable form.
fn snapshot(dir: &Path) -> String {
    let mut entries: Vec<_> = fs::read_dir(dir)
        .unwrap()
        .map(|entry| {
            let path = entry.unwrap().path();
            let metadata = path.symlink_metadata().unwrap();
            let content = if metadata.is_file() { fs::read(&path).unwrap() } else { Vec::new() };
            let mut attribute = [0; 64];
            let attribute = rustix::fs::lgetxattr(&path, "user.color", &mut attribute)
                .ok()
                .map(|n| attribute[..n].to_vec());
            (path, content, metadata.permissions(), metadata.modified().unwrap(), attribute)
        })
        .collect();
    entries.sort_by(|a, b| a.0.cmp(&b.0));
    format!("{entries:?}")
}

#[test]
fn every_change_is_refused() {
    let mut guest = Guest::unmounted(true);
    let path = guest.dir.path().to_owned();
    fs::write(path.join("file"), "content").unwrap();
    fs::create_dir(path.join("dir")).unwrap();
    rustix::fs::setxattr(path.join("file"), "user.color", b"red", rustix::fs::XattrFlags::empty()).unwrap();
    guest.init();
    let before = snapshot(&path);
    let file = guest.lookup(ROOT, "file").unwrap().node;
    let handle = guest.open(file, libc::O_RDONLY).unwrap();

    let mut write = io_args(handle, 0, 3);
    write.extend(b"new");
    // struct fuse_setattr_in: FATTR_SIZE, FATTR_MODE, FATTR_UID, FATTR_MTIME in turn.
    let setattr = |valid: u32| {
        let mut args = fields(&[valid, 0]);
        args.resize(88, 0);
        args
    };
    let mut setxattr = with_names(fields(&[4, 0, 0, 0]), &["user.color"]);
    setxattr.extend(b"blue");
    let changes: Vec<(&str, u32, u64, Vec<u8>)> = vec![
        ("write", op::WRITE, file, write),
        ("truncate", op::SETATTR, file, setattr(1 << 3)),
        ("chmod", op::SETATTR, file, setattr(1 << 0)),
        ("chown", op::SETATTR, file, setattr(1 << 1)),
        ("utimes", op::SETATTR, file, setattr(1 << 5)),
        ("setxattr", op::SETXATTR, file, setxattr),
        ("removexattr", op::REMOVEXATTR, file, c_str("user.color")),
        ("fallocate", op::FALLOCATE, file, fields64(&[handle, 0, 4096, 0])),
        ("copy_file_range", op::COPY_FILE_RANGE, file, fields64(&[handle, 0, file, handle, 3, 3, 0])),
        ("symlink", op::SYMLINK, ROOT, with_names(vec![], &["l", "file"])),
        ("mknod", op::MKNOD, ROOT, with_names(fields(&[0o100_644, 0, 0, 0]), &["n"])),
        ("mkdir", op::MKDIR, ROOT, with_names(fields(&[0o755, 0]), &["d"])),
        ("unlink", op::UNLINK, ROOT, c_str("file")),
        ("rmdir", op::RMDIR, ROOT, c_str("dir")),
        ("rename", op::RENAME, ROOT, with_names(fields64(&[ROOT]), &["file", "f"])),
        ("rename2", op::RENAME2, ROOT, with_names(fields64(&[ROOT, 0]), &["file", "f"])),
        ("link", op::LINK, ROOT, with_names(fields64(&[file]), &["l"])),
        ("create", op::CREATE, ROOT, with_names(fields(&[libc::O_RDWR as u32, 0o100_644, 0, 0]), &["n"])),
        ("create read-only", op::CREATE, ROOT, with_names(fields(&[0, 0o100_644, 0, 0]), &["n"])),
        ("create over", op::CREATE, ROOT, with_names(fields(&[libc::O_RDWR as u32, 0o644, 0, 0]), &["file"])),
        ("open for writing", op::OPEN, file, fields(&[libc::O_WRONLY as u32, 0])),
        ("open for both", op::OPEN, file, fields(&[libc::O_RDWR as u32, 0])),
    ];
    for (what, opcode, node, args) in changes {
        assert_eq!(guest.call(opcode, node, &args).unwrap_err(), libc::EROFS, "{what}");
        assert_eq!(snapshot(&path), before, "{what}");
    }
    for (what, flags) in
        [("truncating open", libc::O_TRUNC), ("mode 3", 3), ("tmpfile", libc::O_TMPFILE | libc::O_RDWR)]
    {
        guest.open(file, flags).unwrap_err();
        guest.open(ROOT, flags).unwrap_err();
        assert_eq!(snapshot(&path), before, "{what}");
    }
    guest.call(op::TMPFILE, ROOT, &with_names(fields(&[2, 0o600, 0, 0]), &["t"])).unwrap_err();
    assert_eq!(snapshot(&path), before);
}

#[test]
fn reading_works() {
    let mut guest = Guest::mounted(true);
    fs::write(guest.dir.path().join("file"), "content").unwrap();
    let node = guest.lookup(ROOT, "file").unwrap().node;
    let handle = guest.open(node, libc::O_RDONLY).unwrap();
    assert_eq!(guest.read(node, handle, 0, 64).unwrap(), b"content");
    assert_eq!(guest.list(ROOT), ["file"]);
}
