//! A machine whose guest does jobs, whoever runs it.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::fd::OwnedFd;

use anyhow::{Context, Result};
use kvrun_bench::{Answer, Job, STREAM_PORT, Stream};

use super::host::{Tap, Which};
use super::{Over, Work, peer};

/// A machine.
pub(super) struct Machine {
    name: &'static str,
    control: BufReader<File>,
    connect: Box<dyn Fn() -> Result<OwnedFd>>,
    /// The guest's addresses on its links.
    vhost: Option<Ipv4Addr>,
    link: Ipv4Addr,
}

impl Machine {
    /// A machine whose guest has connected for its jobs, and to whose [`STREAM_PORT`] of vsock `connect` connects.
    pub(super) fn new(
        name: &'static str,
        control: OwnedFd,
        connect: Box<dyn Fn() -> Result<OwnedFd>>,
        taps: &[Tap],
    ) -> Result<Self> {
        let address = |which| taps.iter().find(|tap| tap.which == which).map(Tap::guest_address);
        let (vhost, link) = (address(Which::Vhost), address(Which::Link).context("no link")?);
        Ok(Self { name, control: BufReader::new(control.into()), connect, vhost, link })
    }

    /// By what name its figures are known.
    pub(super) fn name(&self) -> &'static str {
        self.name
    }

    /// Brings the guest's devices up, which are there.
    pub(super) fn set_up(&mut self, taps: &[Tap]) -> Result<()> {
        for tap in taps {
            tap.up()?;
            self.tell(&Job::Link { mac: tap.mac(), address: tap.guest_address() })?;
        }
        self.tell(&Job::Mount).map(drop)
    }

    /// Has the guest do a job; how many milliseconds it took.
    pub(super) fn tell(&mut self, job: &Job) -> Result<f64> {
        let line = serde_json::to_string(job)? + "\n";
        self.control.get_mut().write_all(line.as_bytes()).context("the guest is gone")?;
        let mut answer = String::new();
        self.control.read_line(&mut answer).context("the guest is gone")?;
        match serde_json::from_str(&answer).with_context(|| format!("the guest said {answer:?}"))? {
            Answer::Took { ns } => Ok(ns as f64 / 1e6),
            Answer::Failed(why) => anyhow::bail!("in the guest: {why}"),
        }
    }

    /// Has the guest do a job with the host's help; how many milliseconds it took.
    pub(super) fn perform(&mut self, work: &Work) -> Result<f64> {
        let (over, job, bytes) = match *work {
            Work::Guest(ref job) => return self.tell(job),
            Work::Stream(over, job, bytes) => (over, job, bytes),
        };
        let tcp = |address| -> Result<OwnedFd> {
            let stream = TcpStream::connect((address, STREAM_PORT)).context("cannot reach the guest")?;
            stream.set_nodelay(true)?;
            Ok(stream.into())
        };
        let stream = match over {
            Over::Vsock => (self.connect)()?,
            Over::Link => tcp(self.link)?,
            Over::Vhost => tcp(self.vhost.context("no link by vhost-net")?)?,
        };
        let job = job(Stream { tcp: over != Over::Vsock, bytes });
        let peer = peer::start(&job, stream);
        let took = self.tell(&job)?;
        peer.join().map_err(|_| anyhow::anyhow!("the peer panicked"))??;
        Ok(took)
    }
}
