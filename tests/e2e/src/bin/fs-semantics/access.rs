//! Who may do what: users, groups, and the bits that give or take more than that.

use std::fs::{self, create_dir};
use std::io::Write;
use std::os::unix::fs::{MetadataExt, chown};
use std::path::Path;

use anyhow::{Result, ensure};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::process::umask;

use crate::sys::{ALICE, BOB, as_user, chmod, file, give, in_child, may, mode, open, refused, works};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![
    bits_of_owner_group_and_others,
    supplementary_groups_count,
    directories_need_search_and_write,
    only_the_owner_changes_mode,
    only_root_gives_files_away,
    owner_gives_to_groups_it_is_in,
    files_belong_to_who_made_them,
    umask_applies,
    set_group_id_directory_passes_its_group_on,
    set_id_bits_go_when_another_writes,
    set_id_bits_stay_when_root_writes,
    set_id_bits_go_when_the_file_is_given_away,
    set_group_id_needs_the_group,
    sticky_directory_keeps_others_files,
    open_file_stays_open_whatever_its_mode,
    times_need_owner_or_write,
];

/// A directory in which everybody may make files.
fn open_to_all(dir: &Path) -> Result<()> {
    Ok(chmod(dir, 0o777)?)
}

fn bits_of_owner_group_and_others(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"x")?;
    give(&path, ALICE)?;
    chown(&path, None, Some(77))?;
    let all = [(libc::R_OK, 4), (libc::W_OK, 2), (libc::X_OK, 1)];
    for bits in 0..8 {
        for (shift, user, groups) in [(6, ALICE, &[][..]), (3, BOB, &[77][..]), (0, BOB, &[][..])] {
            // All others have what this one has not.
            chmod(&path, (bits << shift) | (0o777 & !(7 << shift) & !(bits * 0o111)))?;
            as_user(user, groups, || {
                for (what, bit) in all {
                    ensure!(may(&path, what)? == (bits & bit != 0), "{bits:o} << {shift}, {what}");
                }
                ensure!(fs::File::open(&path).is_ok() == (bits & 4 != 0));
                ensure!(fs::OpenOptions::new().write(true).open(&path).is_ok() == (bits & 2 != 0));
                Ok(())
            })?;
        }
    }
    Ok(())
}

fn supplementary_groups_count(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"x")?;
    chown(&path, Some(ALICE), Some(5_000))?;
    chmod(&path, 0o060)?;
    let many: Vec<u32> = (4_950..5_050).collect();
    as_user(BOB, &many, || Ok(open(&path)?.write_all(b"y")?))?;
    as_user(BOB, &[4_999, 5_001], || refused(fs::File::open(&path), Errno::ACCESS))?;
    // In a directory of such a group files can be made.
    create_dir(dir.join("team"))?;
    chown(dir.join("team"), Some(ALICE), Some(5_000))?;
    chmod(&dir.join("team"), 0o770)?;
    as_user(BOB, &many, || {
        file(&dir.join("team/file"), b"")?;
        create_dir(dir.join("team/dir"))?;
        std::os::unix::fs::symlink("x", dir.join("team/link"))?;
        crate::sys::make_node(&dir.join("team/fifo"), rustix::fs::FileType::Fifo)?;
        fs::rename(dir.join("team/file"), dir.join("team/renamed"))?;
        Ok(fs::remove_dir(dir.join("team/dir"))?)
    })?;
    as_user(BOB, &[], || refused(fs::File::create(dir.join("team/other")), Errno::ACCESS))
}

fn directories_need_search_and_write(dir: &Path) -> Result<()> {
    let inner = dir.join("inner");
    create_dir(&inner)?;
    give(&inner, ALICE)?;
    let path = inner.join("file");
    file(&path, b"x")?;
    give(&path, ALICE)?;
    let as_alice = |bits, body: &dyn Fn() -> Result<()>| -> Result<()> {
        chmod(&inner, bits)?;
        as_user(ALICE, &[], body)
    };
    as_alice(0o600, &|| refused(fs::read(&path), Errno::ACCESS))?;
    as_alice(0o600, &|| works(fs::read_dir(&inner)))?;
    as_alice(0o100, &|| works(fs::read(&path)))?;
    as_alice(0o100, &|| refused(fs::read_dir(&inner), Errno::ACCESS))?;
    as_alice(0o500, &|| refused(fs::File::create(inner.join("new")), Errno::ACCESS))?;
    as_alice(0o500, &|| refused(fs::remove_file(&path), Errno::ACCESS))?;
    as_alice(0o500, &|| refused(fs::rename(&path, inner.join("new")), Errno::ACCESS))?;
    as_alice(0o500, &|| refused(fs::hard_link(&path, inner.join("new")), Errno::ACCESS))?;
    as_alice(0o300, &|| Ok(fs::rename(&path, inner.join("new"))?))?;
    // Who may write to the directory may remove what is not theirs.
    give(&inner.join("new"), BOB)?;
    as_alice(0o300, &|| Ok(fs::remove_file(inner.join("new"))?))
}

fn only_the_owner_changes_mode(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    give(&path, ALICE)?;
    as_user(ALICE, &[], || Ok(chmod(&path, 0o666)?))?;
    as_user(BOB, &[ALICE], || refused(chmod(&path, 0o777), Errno::PERM))?;
    ensure!(mode(&path)? == 0o666);
    chmod(&path, 0o600)?;
    Ok(())
}

fn only_root_gives_files_away(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    give(&path, ALICE)?;
    as_user(ALICE, &[], || refused(chown(&path, Some(BOB), None), Errno::PERM))?;
    as_user(BOB, &[], || refused(chown(&path, Some(BOB), None), Errno::PERM))?;
    as_user(ALICE, &[], || Ok(chown(&path, Some(ALICE), None)?))?;
    chown(&path, Some(BOB), None)?;
    ensure!(path.metadata()?.uid() == BOB && path.metadata()?.gid() == ALICE);
    Ok(())
}

fn owner_gives_to_groups_it_is_in(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    give(&path, ALICE)?;
    as_user(ALICE, &[77, 78], || Ok(chown(&path, None, Some(78))?))?;
    ensure!(path.metadata()?.gid() == 78);
    as_user(ALICE, &[77, 78], || refused(chown(&path, None, Some(79)), Errno::PERM))?;
    as_user(BOB, &[77, 78], || refused(chown(&path, None, Some(77)), Errno::PERM))
}

fn files_belong_to_who_made_them(dir: &Path) -> Result<()> {
    open_to_all(dir)?;
    as_user(ALICE, &[77], || {
        file(&dir.join("file"), b"")?;
        create_dir(dir.join("dir"))?;
        std::os::unix::fs::symlink("file", dir.join("link"))?;
        crate::sys::make_node(&dir.join("fifo"), rustix::fs::FileType::Fifo)?;
        Ok(crate::sys::make_node(&dir.join("socket"), rustix::fs::FileType::Socket)?)
    })?;
    for name in ["file", "dir", "link", "fifo", "socket"] {
        let metadata = dir.join(name).symlink_metadata()?;
        ensure!((metadata.uid(), metadata.gid()) == (ALICE, ALICE), "{name}");
    }
    Ok(())
}

fn umask_applies(dir: &Path) -> Result<()> {
    open_to_all(dir)?;
    for mask in [0, 0o022, 0o077, 0o777] {
        let name = format!("{mask:o}");
        in_child(|| {
            umask(Mode::from(mask));
            let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
            rustix::fs::openat(rustix::fs::CWD, dir.join(&name), flags, Mode::from(0o6777))?;
            rustix::fs::mkdirat(rustix::fs::CWD, dir.join(format!("dir{name}")), Mode::from(0o1777))?;
            Ok(())
        })?;
        ensure!(mode(&dir.join(&name))? == 0o6777 & !mask, "{name}");
        ensure!(mode(&dir.join(format!("dir{name}")))? == 0o1777 & !mask, "dir{name}");
    }
    Ok(())
}

fn set_group_id_directory_passes_its_group_on(dir: &Path) -> Result<()> {
    chown(dir, None, Some(77))?;
    chmod(dir, 0o2777)?;
    as_user(ALICE, &[], || {
        file(&dir.join("file"), b"")?;
        create_dir(dir.join("dir"))?;
        works(file(&dir.join("dir/file"), b""))
    })?;
    for name in ["file", "dir", "dir/file"] {
        ensure!(dir.join(name).metadata()?.gid() == 77, "{name}");
    }
    ensure!(mode(&dir.join("dir"))? == 0o2755 && mode(&dir.join("file"))? == 0o644);
    Ok(())
}

fn set_id_bits_go_when_another_writes(dir: &Path) -> Result<()> {
    for (name, write) in [
        ("write", &(|path: &Path| Ok(open(path)?.write_all(b"y")?)) as &dyn Fn(&Path) -> Result<()>),
        ("truncate", &|path| Ok(open(path)?.set_len(0)?)),
        ("open", &|path| works(crate::sys::open_with(path, libc::O_TRUNC))),
    ] {
        let path = dir.join(name);
        file(&path, b"x")?;
        for bits in [0o4777, 0o2777, 0o6777] {
            give(&path, ALICE)?;
            chmod(&path, bits)?;
            ensure!(mode(&path)? == bits);
            as_user(BOB, &[], || write(&path))?;
            ensure!(mode(&path)? == 0o777, "{name}: {bits:o} became {:o}", mode(&path)?);
        }
        // Reading changes nothing.
        chmod(&path, 0o6777)?;
        as_user(BOB, &[], || works(fs::read(&path)))?;
        ensure!(mode(&path)? == 0o6777, "{name}: {:o}", mode(&path)?);
    }
    Ok(())
}

fn set_id_bits_stay_when_root_writes(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"x")?;
    chmod(&path, 0o6777)?;
    open(&path)?.write_all(b"z")?;
    ensure!(mode(&path)? == 0o6777, "{:o}", mode(&path)?);
    Ok(())
}

fn set_id_bits_go_when_the_file_is_given_away(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    give(&path, ALICE)?;
    for (bits, left) in [(0o4755, 0o755), (0o2755, 0o755), (0o6755, 0o755)] {
        chmod(&path, bits)?;
        give(&path, if path.metadata()?.uid() == ALICE { BOB } else { ALICE })?;
        ensure!(mode(&path)? == left, "{bits:o} became {:o}", mode(&path)?);
    }
    give(&path, ALICE)?;
    chmod(&path, 0o6755)?;
    as_user(ALICE, &[77], || Ok(chown(&path, None, Some(77))?))?;
    ensure!(mode(&path)? == 0o755);
    // A directory's are for something else and stay.
    create_dir(dir.join("dir"))?;
    chmod(&dir.join("dir"), 0o2755)?;
    give(&dir.join("dir"), ALICE)?;
    ensure!(mode(&dir.join("dir"))? == 0o2755);
    Ok(())
}

fn set_group_id_needs_the_group(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    chown(&path, Some(ALICE), Some(77))?;
    as_user(ALICE, &[], || Ok(chmod(&path, 0o2755)?))?;
    ensure!(mode(&path)? == 0o755);
    as_user(ALICE, &[77], || Ok(chmod(&path, 0o2755)?))?;
    ensure!(mode(&path)? == 0o2755);
    Ok(())
}

fn sticky_directory_keeps_others_files(dir: &Path) -> Result<()> {
    chmod(dir, 0o1777)?;
    as_user(ALICE, &[], || {
        file(&dir.join("hers"), b"")?;
        Ok(create_dir(dir.join("her dir"))?)
    })?;
    as_user(BOB, &[], || {
        file(&dir.join("his"), b"")?;
        refused(fs::remove_file(dir.join("hers")), Errno::PERM)?;
        refused(fs::remove_dir(dir.join("her dir")), Errno::PERM)?;
        refused(fs::rename(dir.join("hers"), dir.join("x")), Errno::PERM)?;
        refused(fs::rename(dir.join("his"), dir.join("hers")), Errno::PERM)
    })?;
    as_user(ALICE, &[], || {
        fs::rename(dir.join("hers"), dir.join("still hers"))?;
        Ok(fs::remove_file(dir.join("still hers"))?)
    })?;
    // The directory's owner may.
    give(dir, BOB)?;
    chmod(dir, 0o1777)?;
    as_user(BOB, &[], || Ok(fs::remove_dir(dir.join("her dir"))?))
}

fn open_file_stays_open_whatever_its_mode(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"content")?;
    give(&path, ALICE)?;
    as_user(ALICE, &[], || {
        let mut file = open(&path)?;
        chmod(&path, 0)?;
        file.write_all(b"C")?;
        ensure!(crate::sys::content(&file)? == b"Content");
        refused(open(&path), Errno::ACCESS)
    })?;
    open_to_all(dir)?;
    // Made read-only, and written all the same by who made it so.
    as_user(ALICE, &[], || {
        let flags = rustix::fs::OFlags::CREATE | rustix::fs::OFlags::WRONLY;
        let made = rustix::fs::openat(rustix::fs::CWD, dir.join("new"), flags, Mode::from(0o444))?;
        ensure!(rustix::io::write(&made, b"x")? == 1);
        refused(open(&dir.join("new")), Errno::ACCESS)
    })
}

fn times_need_owner_or_write(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    file(&path, b"")?;
    give(&path, ALICE)?;
    chmod(&path, 0o602)?;
    as_user(ALICE, &[], || crate::sys::set_times(&path, 1, 1))?;
    as_user(BOB, &[], || {
        let error = crate::sys::set_times(&path, 1, 1).err().and_then(|e| e.downcast::<Errno>().ok());
        ensure!(error == Some(Errno::PERM), "{error:?}");
        // To now, whoever may write.
        let now = rustix::time::Timespec { tv_sec: 0, tv_nsec: (1 << 30) - 1 };
        let times = rustix::fs::Timestamps { last_access: now, last_modification: now };
        Ok(rustix::fs::utimensat(rustix::fs::CWD, &path, &times, rustix::fs::AtFlags::empty())?)
    })?;
    ensure!(path.metadata()?.mtime() > 1);
    Ok(())
}
