//! CPUs that are there but not online: brought up and taken down through sysfs (Linux 6.12
//! Documentation/core-api/cpu_hotplug.rst).

use std::fs;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};

/// Why CPUs were not brought online or taken offline.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The machine was not made with so many, or none at all are asked for.
    #[error("{wanted} CPUs cannot be online: the machine has 1 to {there}")]
    Range {
        /// How many were asked for.
        wanted: u32,
        /// How many there are.
        there: u32,
    },
    /// The list of CPUs cannot be read.
    #[error("cannot read which CPUs there are")]
    List(#[source] io::Error),
    /// The kernel refuses.
    #[error("cannot {} CPU {cpu}", if *online { "bring up" } else { "take down" })]
    Change {
        /// Which.
        cpu: u32,
        /// Up or down.
        online: bool,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// The CPUs, through sysfs. One change at a time.
#[derive(Clone, Debug)]
pub struct Cpus {
    dir: PathBuf,
    changing: Arc<Mutex<()>>,
}

impl Default for Cpus {
    fn default() -> Self {
        Self { dir: "/sys/devices/system/cpu".into(), changing: Arc::default() }
    }
}

impl Cpus {
    /// Makes the first `wanted` CPUs the ones that are online. CPU 0 always is.
    ///
    /// # Errors
    ///
    /// [`CpuError`]; some CPUs may have changed.
    pub fn set_online(&self, wanted: u32) -> Result<(), CpuError> {
        let _guard = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        let present = fs::read_to_string(self.dir.join("present")).map_err(CpuError::List)?;
        let there = count(&present).ok_or_else(|| {
            CpuError::List(io::Error::new(io::ErrorKind::InvalidData, format!("CPUs {present:?}")))
        })?;
        if wanted == 0 || wanted > there {
            return Err(CpuError::Range { wanted, there });
        }
        for cpu in (wanted..there).rev() {
            self.change(cpu, false)?;
        }
        for cpu in 1..wanted {
            self.change(cpu, true)?;
        }
        Ok(())
    }

    /// The kernel takes a change to what already is for done.
    fn change(&self, cpu: u32, online: bool) -> Result<(), CpuError> {
        let file = self.dir.join(format!("cpu{cpu}/online"));
        fs::write(file, if online { "1" } else { "0" }).map_err(|source| CpuError::Change {
            cpu,
            online,
            source,
        })
    }
}

/// How many CPUs a list of the form `0-3` or `0` names. The MP table of the machine leaves no gaps.
fn count(list: &str) -> Option<u32> {
    let last = match list.trim_end() {
        "0" => "0",
        range => range.strip_prefix("0-")?,
    };
    last.parse::<u32>().ok()?.checked_add(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cpus(name: &str) -> Cpus {
        let dir = std::env::temp_dir().join(format!("kvrun-cpus-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&dir);
        for cpu in 1..4 {
            fs::create_dir_all(dir.join(format!("cpu{cpu}"))).unwrap();
        }
        fs::write(dir.join("present"), "0-3\n").unwrap();
        Cpus { dir, changing: Arc::default() }
    }

    #[test]
    fn the_first_cpus_are_online_and_the_others_are_not() {
        let cpus = cpus("first");
        cpus.set_online(3).unwrap();
        let state = |cpu: u32| fs::read_to_string(cpus.dir.join(format!("cpu{cpu}/online"))).unwrap();
        assert_eq!([1, 2, 3].map(state), ["1", "1", "0"]);
        cpus.set_online(1).unwrap();
        assert_eq!([1, 2, 3].map(state), ["0", "0", "0"]);
        fs::remove_dir_all(cpus.dir).unwrap();
    }

    #[test]
    fn numbers_out_of_range_and_refusals_are_named() {
        let cpus = cpus("range");
        for wanted in [0, 5, u32::MAX] {
            assert!(matches!(cpus.set_online(wanted), Err(CpuError::Range { there: 4, .. })));
        }
        fs::create_dir(cpus.dir.join("cpu2/online")).unwrap();
        let error = cpus.set_online(3).unwrap_err();
        assert!(matches!(error, CpuError::Change { cpu: 2, online: true, .. }), "{error}");
        fs::remove_dir_all(cpus.dir).unwrap();
    }

    #[test]
    fn lists_are_counted() {
        let lists = ["0", "0-31\n", "0-3,5", "1-3", "", "0-4294967295"];
        assert_eq!(lists.map(count), [Some(1), Some(32), None, None, None, None]);
    }
}
