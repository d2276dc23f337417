//! A process of the host that is named in a file: its number is used again one day, so its start time goes with it.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde::{Deserialize, Serialize};

/// A process that is, or was, there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct HostProcess {
    /// Its number in the PID namespace of whoever wrote it down.
    pub pid: i32,
    /// When it started, in clock ticks after the boot of the host (proc_pid_stat(5), field 22).
    pub start_time: u64,
}

/// A process that was there when it was looked at, and has not been another one since.
#[derive(Debug)]
pub struct Alive(OwnedFd);

impl HostProcess {
    /// The process that has this number now.
    ///
    /// # Errors
    /// There is none, or `/proc` is not mounted.
    pub fn of(pid: i32) -> io::Result<Self> {
        let stat = stat(pid)?;
        Ok(Self { pid, start_time: stat.start_time })
    }

    /// This process.
    ///
    /// # Errors
    /// `/proc` is not mounted.
    pub fn current() -> io::Result<Self> {
        Self::of(rustix::process::getpid().as_raw_nonzero().get())
    }

    /// A handle for it; `None` if it has ended, be it waited for or not.
    pub fn alive(&self) -> Option<Alive> {
        // The descriptor first: if the process that has the number now started when ours did, it is ours, and the descriptor is its.
        let pidfd = pidfd_open(Pid::from_raw(self.pid)?, PidfdFlags::empty()).ok()?;
        let stat = stat(self.pid).ok()?;
        (stat.start_time == self.start_time && !stat.ended).then_some(Alive(pidfd))
    }
}

impl Alive {
    /// Sends a signal; one that has ended meanwhile does not mind.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.0, signal);
    }

    /// Whether it ends within `bound`.
    pub fn ends_within(&self, bound: Duration) -> bool {
        let fd = self.0.as_fd();
        let deadline = std::time::Instant::now() + bound;
        loop {
            let left = deadline.saturating_duration_since(std::time::Instant::now());
            let timeout = Timespec::try_from(left).unwrap_or(Timespec { tv_sec: 0, tv_nsec: 0 });
            match poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&timeout)) {
                Ok(ready) => return ready > 0,
                Err(rustix::io::Errno::INTR) => {}
                Err(_) => return false,
            }
        }
    }
}

struct Stat {
    ended: bool,
    start_time: u64,
}

fn stat(pid: i32) -> io::Result<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&text).ok_or_else(|| io::ErrorKind::InvalidData.into())
}

/// proc_pid_stat(5): the second field is the name in parentheses, in which anything may be.
fn parse_stat(text: &str) -> Option<Stat> {
    let (_, rest) = text.rsplit_once(')')?;
    let mut fields = rest.split_whitespace();
    let ended = matches!(fields.next()?, "Z" | "X");
    let start_time = fields.nth(18)?.parse().ok()?;
    Some(Stat { ended, start_time })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    #[test]
    fn process_is_alive_until_it_ends_even_if_nobody_waits_for_it() {
        assert!(HostProcess::current().unwrap().alive().is_some());
        let mut child = Command::new("sleep").arg("1000").spawn().unwrap();
        let process = HostProcess::of(child.id() as i32).unwrap();
        let alive = process.alive().unwrap();
        assert!(!alive.ends_within(Duration::ZERO));
        alive.signal(Signal::KILL);
        assert!(alive.ends_within(Duration::from_secs(60)));
        assert!(process.alive().is_none());
        child.wait().unwrap();
        assert!(process.alive().is_none());
    }

    #[test]
    fn number_that_another_process_has_now_is_not_the_process() {
        let mut process = HostProcess::current().unwrap();
        process.start_time += 1;
        assert!(process.alive().is_none());
    }

    #[test]
    fn name_of_a_process_may_look_like_anything() {
        let stat =
            parse_stat("7 (a) Z 1 (b)) S 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 4711 20").unwrap();
        assert_eq!((stat.ended, stat.start_time), (false, 4711));
        assert!(parse_stat("7 (a) S 1").is_none());
    }
}
