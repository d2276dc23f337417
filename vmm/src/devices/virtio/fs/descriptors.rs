//! How many host descriptors a share may hold for its guest.
//!
//! A guest holds one per open file, and where the file system has no file handles (overlayfs, mostly) one more per inode it has
//! in its caches. What it holds beyond its part it is refused with `ENFILE`. All shares of a machine live on the limit of one
//! process, so each is promised a part that no other share can take, and all leave enough for everything else.

use std::io;
use std::sync::Mutex;

use kvrun_vmm_api::config::{FIRST_FREE_SLOT, MAX_SLOTS};
use rustix::process::{Resource, getrlimit};

use crate::locked;

/// Descriptors kept for the rest of the process: queues, sockets and files of other devices, and those a request holds while it is
/// being handled. Half of the limit if that is less.
const RESERVED: u64 = 8192;
/// How many shares a machine can have.
const MAX_SHARES: u64 = (MAX_SLOTS - FIRST_FREE_SLOT) as u64;
/// A share that would get fewer is refused.
const MIN_ALLOTMENT: u64 = 16;

/// How many descriptors are promised to shares beyond what each is sure of.
#[derive(Debug)]
struct Promised(Mutex<u64>);

/// Those of this process.
static PROMISED: Promised = Promised(Mutex::new(0));

/// Descriptors promised to a share, until this is dropped.
#[derive(Debug)]
pub(super) struct Allotment {
    promised: &'static Promised,
    assured: u64,
    extra: u64,
}

impl Allotment {
    /// Half of the limit is divided equally among as many shares as there can be. Of the other half each share gets half of what is
    /// left when it comes, for most machines have one share that matters.
    ///
    /// # Errors
    /// When the limit of open files is too low to share anything.
    pub(super) fn new() -> io::Result<Self> {
        PROMISED.allot(getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX))
    }

    /// This many, for a test.
    #[cfg(test)]
    pub(super) fn of(descriptors: u64) -> Self {
        Self { promised: &PROMISED, assured: descriptors, extra: 0 }
    }

    /// How many.
    pub(super) fn descriptors(&self) -> u64 {
        self.assured + self.extra
    }
}

impl Drop for Allotment {
    fn drop(&mut self) {
        *locked(self.promised.0.lock()) -= self.extra;
    }
}

impl Promised {
    fn allot(&'static self, limit: u64) -> io::Result<Allotment> {
        let all = limit - RESERVED.min(limit / 2);
        let assured = all / 2 / MAX_SHARES;
        let mut promised = locked(self.0.lock());
        let extra = (all / 2).saturating_sub(*promised) / 2;
        if assured + extra < MIN_ALLOTMENT {
            return Err(io::Error::other(format!("{limit} open files are too few to share a directory")));
        }
        *promised += extra;
        Ok(Allotment { promised: self, assured, extra })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn promised() -> &'static Promised {
        Box::leak(Box::new(Promised(Mutex::new(0))))
    }

    #[test]
    fn as_many_shares_as_there_can_be_stay_within_the_limit() {
        for limit in [4096, 20_000, 524_288, 1 << 20, u64::MAX] {
            let promised = promised();
            let shares: Vec<_> = (0..MAX_SHARES).map(|_| promised.allot(limit).unwrap()).collect();
            let all: u64 = shares.iter().map(Allotment::descriptors).sum();
            assert!(all <= limit - RESERVED.min(limit / 2), "{all} of {limit}");
            let least = shares.iter().map(Allotment::descriptors).min().unwrap();
            assert!(least >= limit / 256, "{least} of {limit}");
            assert!(shares[0].descriptors() >= limit / 8, "{:?}", shares[0]);
        }
    }

    #[test]
    fn what_a_share_was_promised_goes_to_others_after_it() {
        let promised = promised();
        let first = promised.allot(10_000).unwrap().descriptors();
        for _ in 0..100 {
            assert_eq!(promised.allot(10_000).unwrap().descriptors(), first);
        }
    }

    #[test]
    fn a_limit_that_is_too_low_is_an_error() {
        assert!(promised().allot(64).is_err());
    }
}
