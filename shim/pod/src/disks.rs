//! Block devices of the host that configs name in `linux.devices`. Each becomes a disk of the machine; the container has it at the path it
//! asked for, by the numbers it has in the guest, and so do the rules of `linux.resources.devices`.
//!
//! A device that several containers of a pod name is one disk: two would not see what is written to the other.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use oci_spec::runtime::{Linux, LinuxDevice, LinuxDeviceCgroup, LinuxDeviceType, Spec};
use rustix::fs::{CWD, FileType, Mode, OFlags, fstat, makedev, openat};

use crate::pod::{Pod, PodError};

/// Why a container cannot have a block device.
#[derive(Debug, thiserror::Error)]
pub enum DiskError {
    /// The host has none of these numbers, or it cannot be opened.
    #[error("linux.devices: {path} is block device {major}:{minor} of the host, which cannot be opened")]
    Open {
        /// Where the container is to have it.
        path: String,
        /// Its numbers.
        major: i64,
        /// The second of them.
        minor: i64,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The machine cannot be given it.
    #[error("linux.devices: {path} cannot be a disk of the machine")]
    Attach {
        /// Where the container is to have it.
        path: String,
        /// Why.
        #[source]
        source: PodError,
    },
    /// Another container has it so that it cannot be written to.
    #[error("linux.devices: {path} may be written to, but is read-only to another container of the pod")]
    ReadOnly {
        /// Where the container is to have it.
        path: String,
    },
    /// The machine or the agent failed.
    #[error(transparent)]
    Pod(#[from] PodError),
}

/// Device numbers.
type Numbers = (i64, i64);

/// The disks of a machine that are devices of the host, by their numbers there.
pub(crate) type Disks = tokio::sync::Mutex<HashMap<Numbers, Disk>>;

/// One of them.
#[derive(Debug)]
pub(crate) struct Disk {
    slot: u8,
    read_only: bool,
    in_guest: Numbers,
    containers: usize,
}

/// Gives the machine the block devices of a spec; the spec with their numbers in the guest, and what is to be given to [`detach`]
/// when the container is gone.
///
/// # Errors
/// [`DiskError`]; nothing is attached then.
pub(crate) async fn attach<'s>(
    pod: &Pod,
    spec: &'s Spec,
) -> Result<(Cow<'s, Spec>, Vec<Numbers>), DiskError> {
    let Some(linux) = spec.linux().as_ref().filter(|linux| devices(linux).next().is_some()) else {
        return Ok((Cow::Borrowed(spec), Vec::new()));
    };
    let rules = linux.resources().as_ref().and_then(|resources| resources.devices().as_deref());
    let rules = rules.unwrap_or_default();
    let mut disks = pod.disks.lock().await;
    let mut used: Vec<(Numbers, Numbers)> = Vec::new();
    for device in devices(linux) {
        let numbers = (device.major(), device.minor());
        if used.iter().any(|(of_host, _)| *of_host == numbers) {
            continue;
        }
        match attach_one(pod, &mut disks, device, rules).await {
            Ok(in_guest) => used.push((numbers, in_guest)),
            Err(error) => {
                drop(disks);
                detach(pod, &used.into_iter().map(|(of_host, _)| of_host).collect::<Vec<_>>()).await;
                return Err(error);
            }
        }
    }
    drop(disks);
    let mut spec = spec.clone();
    if let Some(linux) = spec.linux_mut() {
        renumber(linux, &used);
    }
    Ok((Cow::Owned(spec), used.into_iter().map(|(of_host, _)| of_host).collect()))
}

/// Takes the disks of a container that is gone from the guest away, unless other containers have them.
pub(crate) async fn detach(pod: &Pod, used: &[Numbers]) {
    let mut disks = pod.disks.lock().await;
    for numbers in used {
        let Some(disk) = disks.get_mut(numbers) else { continue };
        disk.containers -= 1;
        if disk.containers > 0 {
            continue;
        }
        let slot = disk.slot;
        disks.remove(numbers);
        pod.remove_device(slot).await;
    }
}

fn devices(linux: &Linux) -> impl Iterator<Item = &LinuxDevice> {
    linux.devices().iter().flatten().filter(|device| device.typ() == LinuxDeviceType::B)
}

async fn attach_one(
    pod: &Pod,
    disks: &mut HashMap<Numbers, Disk>,
    device: &LinuxDevice,
    rules: &[LinuxDeviceCgroup],
) -> Result<Numbers, DiskError> {
    let numbers = (device.major(), device.minor());
    let path = || device.path().display().to_string();
    let writable = is_writable(rules, numbers);
    if let Some(disk) = disks.get_mut(&numbers) {
        if writable && disk.read_only {
            return Err(DiskError::ReadOnly { path: path() });
        }
        disk.containers += 1;
        return Ok(disk.in_guest);
    }
    let (file, read_only) = open(numbers, writable).map_err(|source| DiskError::Open {
        path: path(),
        major: numbers.0,
        minor: numbers.1,
        source,
    })?;
    let (slot, disk) = pod.add_disk(file.as_fd(), read_only).await.map_err(|source| match source {
        PodError::NoSlot | PodError::NoDisk => DiskError::Attach { path: path(), source },
        error => error.into(),
    })?;
    let in_guest = (disk.major.into(), disk.minor.into());
    disks.insert(numbers, Disk { slot, read_only, in_guest, containers: 1 });
    Ok(in_guest)
}

/// Opens a block device of the host by its numbers; whether it can only be read.
fn open((major, minor): Numbers, writable: bool) -> io::Result<(OwnedFd, bool)> {
    let none = || io::Error::new(io::ErrorKind::NotFound, "the host has no such block device");
    let numbers = (u32::try_from(major).map_err(|_| none())?, u32::try_from(minor).map_err(|_| none())?);
    let uevent = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).map_err(|_| none())?;
    let name = uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=")).ok_or_else(none)?;
    let path = Path::new("/dev").join(name);
    let open = |access| -> io::Result<File> {
        Ok(openat(CWD, &path, access | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())?.into())
    };
    let (file, read_only) = match writable.then(|| open(OFlags::RDWR)) {
        Some(Ok(file)) => (file, false),
        // A disk that nobody may write to.
        Some(Err(error)) if !matches!(error.raw_os_error(), Some(libc::EROFS | libc::EACCES)) => {
            return Err(error);
        }
        _ => (open(OFlags::RDONLY)?, true),
    };
    let stat = fstat(&file)?;
    if FileType::from_raw_mode(stat.st_mode) != FileType::BlockDevice
        || stat.st_rdev != makedev(numbers.0, numbers.1)
    {
        return Err(io::Error::other(format!("{} is another device", path.display())));
    }
    Ok((file.into(), read_only))
}

/// Whether a rule is about a block device: of any numbers, or of these.
fn is_about(rule: &LinuxDeviceCgroup, (major, minor): Numbers) -> bool {
    // A negative number is any, too, as in runc.
    let fits = |asked: Option<i64>, number: i64| asked.is_none_or(|asked| asked < 0 || asked == number);
    let kind = rule.typ().unwrap_or(LinuxDeviceType::A);
    kind == LinuxDeviceType::A
        || (kind == LinuxDeviceType::B && fits(rule.major(), major) && fits(rule.minor(), minor))
}

/// Whether the rules let a container write to a device; the last one counts. Without rules it may: then the guest decides.
fn is_writable(rules: &[LinuxDeviceCgroup], numbers: Numbers) -> bool {
    let writes = |rule: &&LinuxDeviceCgroup| {
        is_about(rule, numbers) && rule.access().as_deref().is_none_or(|access| access.contains('w'))
    };
    rules.iter().rfind(writes).is_none_or(LinuxDeviceCgroup::allow)
}

/// Puts the numbers that devices have in the guest in the place of those on the host.
fn renumber(linux: &mut Linux, used: &[(Numbers, Numbers)]) {
    for device in linux.devices_mut().iter_mut().flatten() {
        if device.typ() != LinuxDeviceType::B {
            continue;
        }
        let numbers = (device.major(), device.minor());
        if let Some((_, (major, minor))) = used.iter().find(|(of_host, _)| *of_host == numbers) {
            device.set_major(*major).set_minor(*minor);
        }
    }
    let Some(rules) = linux.resources_mut().as_mut().and_then(|resources| resources.devices_mut().as_mut())
    else {
        return;
    };
    *rules = rules.iter().flat_map(|rule| in_guest(rule, used)).collect();
}

/// What a rule is in the guest: itself if it names no block device, else one for each device it is about. What the numbers of others mean in
/// the guest, nobody meant.
fn in_guest(rule: &LinuxDeviceCgroup, used: &[(Numbers, Numbers)]) -> Vec<LinuxDeviceCgroup> {
    let names = |number: Option<i64>| number.is_some_and(|number| number >= 0);
    if rule.typ() != Some(LinuxDeviceType::B) || !(names(rule.major()) || names(rule.minor())) {
        return vec![rule.clone()];
    }
    let about = used.iter().filter(|(of_host, _)| is_about(rule, *of_host));
    about
        .map(|(_, (major, minor))| {
            let mut rule = rule.clone();
            rule.set_major(Some(*major)).set_minor(Some(*minor));
            rule
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(json: &str) -> Vec<LinuxDeviceCgroup> {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn last_rule_about_a_device_says_whether_it_may_be_written_to() {
        for (json, writable) in [
            ("[]", true),
            (r#"[{"allow":false,"access":"rwm"}]"#, false),
            (
                r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"minor":16,"access":"r"}]"#,
                false,
            ),
            (r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"access":"rw"}]"#, true),
            (
                r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"minor":17,"access":"rw"}]"#,
                false,
            ),
            (
                r#"[{"allow":false,"access":"rwm"},{"allow":true,"type":"c","major":8,"minor":16,"access":"rw"}]"#,
                false,
            ),
            (r#"[{"allow":true,"type":"a","major":-1,"minor":-1,"access":"rwm"}]"#, true),
        ] {
            assert_eq!(is_writable(&rules(json), (8, 16)), writable, "{json}");
        }
    }

    #[test]
    fn numbers_of_the_host_do_not_reach_the_guest() {
        let json = r#"{"devices":[{"path":"/dev/disk","type":"b","major":8,"minor":16},{"path":"/dev/null","type":"c","major":1,"minor":3}],
            "resources":{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"access":"r"},
            {"allow":true,"type":"b","major":254,"minor":0,"access":"rwm"},{"allow":true,"type":"c","major":8,"minor":16,"access":"rwm"}]}}"#;
        let mut linux: Linux = serde_json::from_str(json).unwrap();
        renumber(&mut linux, &[((8, 16), (254, 32))]);
        let json = r#"{"devices":[{"path":"/dev/disk","type":"b","major":254,"minor":32},{"path":"/dev/null","type":"c","major":1,"minor":3}],
            "resources":{"devices":[{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":254,"minor":32,"access":"r"},
            {"allow":true,"type":"c","major":8,"minor":16,"access":"rwm"}]}}"#;
        assert_eq!(linux, serde_json::from_str(json).unwrap());
    }

    #[test]
    fn device_that_is_not_there_is_an_error() {
        for numbers in [(-1, 0), (4095, 1_048_575), (1, 3)] {
            assert_eq!(open(numbers, true).unwrap_err().kind(), io::ErrorKind::NotFound, "{numbers:?}");
        }
    }
}
