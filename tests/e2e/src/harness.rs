//! The harness: libtest's command line and output (`libtest-mimic`), with two differences.
//!
//! A host that cannot run VMs makes every test *skipped*, with the reason, never passed; with `KVRUN_E2E_REQUIRED=1` it is a
//! failure. And every test runs in a process of its own, see [`isolation`](crate::isolation), which the harness ends when its time
//! is over.

use std::env;
use std::io::Read;
use std::panic::{self, AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use kvrun_pod::pod::PodError;
use kvrun_pod::text;
use libtest_mimic::{Arguments, Completion, Failed, Trial};

use crate::fixture::Test;
use crate::leaks::Snapshot;
use crate::{isolation, process, time};

/// A test.
#[derive(Debug)]
pub struct Case {
    /// Its name, with the path of its module.
    pub name: &'static str,
    /// The test.
    pub test: fn(&Test) -> Result<()>,
    /// A program of the host without which it is skipped.
    pub needs: Option<&'static str>,
}

impl Case {
    /// The name without that of the test binary.
    fn short_name(&self) -> &'static str {
        self.name.split_once("::").map_or(self.name, |(_, name)| name)
    }
}

/// Set for the process of one test: the name of the test.
const CASE_VARIABLE: &str = "KVRUN_E2E_CASE";
/// Set for the process of one test: its container ID.
const ID_VARIABLE: &str = "KVRUN_E2E_ID";

/// `K/N`: run only the K-th of N parts of the tests, so that N machines can share them. `none`: run nothing, for who runs the tests of the
/// whole workspace and these elsewhere.
const PART_VARIABLE: &str = "KVRUN_E2E_PART";

/// How many of the longest tests are told at the end.
const LONGEST: usize = 20;

/// `main` of the test binary.
pub fn main(groups: &[&'static [Case]]) -> ExitCode {
    let cases = groups.iter().flat_map(|group| group.iter());
    if let Ok(name) = env::var(CASE_VARIABLE) {
        return match cases.into_iter().find(|case| case.short_name() == name) {
            Some(case) => in_own_process(case),
            None => fail(&format!("there is no test {name}")),
        };
    }
    let part = env::var(PART_VARIABLE).ok();
    if part.as_deref() == Some("none") {
        return ExitCode::SUCCESS;
    }
    let part = match part.as_deref().map(Part::parse) {
        None => Part { number: 0, of: 1 },
        Some(Some(part)) => part,
        Some(None) => return fail(&format!("{PART_VARIABLE} is neither none nor K/N with K from 1 to N")),
    };
    let mut arguments = Arguments::from_args();
    // What takes time here is a CPU's work: more tests at a time than CPUs would only run into their bounds.
    let cpus = thread::available_parallelism().map_or(1, usize::from);
    arguments.test_threads.get_or_insert(cpus.min(2));
    let required = env::var_os("KVRUN_E2E_REQUIRED").is_some_and(|v| v == "1");
    let mut skip = None;
    if !arguments.list
        && let Err(reason) = check_host()
    {
        if required {
            return fail(&format!("this host must run the end-to-end tests, but: {reason:#}"));
        }
        skip = Some(format!("{reason:#}"));
    }
    let times = Times::default();
    let in_part = cases.enumerate().filter(|(index, _)| index % part.of == part.number);
    let trials = in_part.map(|(index, case)| {
        let missing = case.needs.filter(|program| !is_there(program));
        let skip =
            skip.clone().or_else(|| missing.map(|program| format!("there is no {program} on this host")));
        let id = format!("e2e-{}-{index}", std::process::id());
        let times = times.clone();
        Trial::ignorable_test(case.short_name(), move || match skip {
            Some(reason) if required => Err(reason.into()),
            Some(reason) => Ok(Completion::ignored_with(reason)),
            None => times.of(case, || spawn(case, &id)).map(|()| Completion::Completed),
        })
    });
    let conclusion = libtest_mimic::run(&arguments, trials.collect());
    times.print_longest();
    conclusion.exit_code()
}

/// How long each test took.
#[derive(Clone, Default)]
struct Times(Arc<Mutex<Vec<(Duration, &'static str)>>>);

impl Times {
    fn of<T>(&self, case: &'static Case, test: impl FnOnce() -> T) -> T {
        let before = Instant::now();
        let result = test();
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        times.push((before.elapsed(), case.short_name()));
        result
    }

    /// Those to look at when the whole takes too long.
    fn print_longest(&self) {
        let mut times = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        times.sort_unstable_by(|one, other| other.cmp(one));
        let all: Duration = times.iter().map(|(time, _)| *time).sum();
        eprintln!("{:.1} s in tests; the longest:", all.as_secs_f64());
        for (time, name) in times.iter().take(LONGEST) {
            eprintln!("{:6.1} s  {name}", time.as_secs_f64());
        }
    }
}

/// Whether a program is where tests look for programs, unless it is named by its path.
fn is_there(program: &str) -> bool {
    ["/usr/sbin", "/usr/bin", "/sbin", "/bin"].iter().any(|dir| Path::new(dir).join(program).exists())
}

/// A part of the tests: every N-th, so that neighbours, which mostly take as long, are spread.
struct Part {
    number: usize,
    of: usize,
}

impl Part {
    fn parse(text: &str) -> Option<Self> {
        let (number, of) = text.split_once('/')?;
        let (number, of) = (number.parse::<usize>().ok()?.checked_sub(1)?, of.parse().ok()?);
        (number < of).then_some(Self { number, of })
    }
}

fn fail(message: &str) -> ExitCode {
    eprintln!("e2e: {message}");
    ExitCode::FAILURE
}

/// The program under test: `KVRUN`, or the staged one of the tree this binary was built in.
pub(crate) fn kvrun() -> Result<PathBuf> {
    if let Some(path) = env::var_os("KVRUN") {
        return PathBuf::from(path).canonicalize().context("KVRUN names no program");
    }
    let me = env::current_exe().context("cannot find the path of this binary")?;
    let staged = me.ancestors().map(|dir| dir.join("stage/bin/kvrun")).find(|path| path.exists());
    staged.context("there is no kvrun: run `make build`, or name one with KVRUN")
}

/// Whether tests can run here at all.
fn check_host() -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "the tests need root");
    let output = Command::new(kvrun()?).arg("check").output().context("cannot run `kvrun check`")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!(
            "`kvrun check` says this host cannot run VMs: {}",
            said.lines().last().unwrap_or("no reason given")
        );
    }
    Ok(())
}

/// Runs one test in its own process, within its time.
fn spawn(case: &Case, id: &str) -> Result<(), Failed> {
    let me = env::current_exe()?;
    let mut child = isolation::command(&me)
        .env(CASE_VARIABLE, case.short_name())
        .env(ID_VARIABLE, id)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let mut stderr = child.stderr.take().ok_or("no pipe")?;
    let said = thread::spawn(move || {
        let mut bytes = Vec::new();
        // The end of this pipe is the end of the last process of the test.
        let _ = stderr.read_to_end(&mut bytes);
        String::from_utf8_lossy(&bytes).into_owned()
    });
    let limit = time::scaled(time::TEST);
    let ended = process::wait_within(&mut child, limit);
    if ended.is_err() {
        // Ends the init process of the test's PID namespace, and with it every process in there.
        child.kill()?;
        child.wait()?;
    }
    let said = said.join().unwrap_or_default();
    match ended {
        Ok(status) if status.success() => Ok(()),
        Ok(status) => Err(format!("{said}the test's process ended with {status}").into()),
        Err(_) => Err(format!("{said}the test did not end within {limit:?}").into()),
    }
}

/// The life of the process of one test.
fn in_own_process(case: &Case) -> ExitCode {
    let run = || -> Result<()> {
        let id = env::var(ID_VARIABLE).context("no container ID")?;
        let kvrun = kvrun()?;
        isolation::enter(&kvrun)?;
        let test = Test::new(id, kvrun)?;
        // With its first runtime, tokio makes a pair of sockets for signals that it keeps as long as the process lives.
        drop(tokio::runtime::Builder::new_current_thread().enable_all().build()?);
        let before = Snapshot::take(&test)?;
        panic::set_hook(Box::new(|info| eprintln!("{info}")));
        match catch_unwind(AssertUnwindSafe(|| (case.test)(&test))) {
            Ok(result) => result?,
            Err(_) => bail!("the test panicked"),
        }
        let left = Snapshot::take(&test)?.since(&before);
        ensure!(left.is_empty(), "left behind:\n  {}", left.join("\n  "));
        Ok(())
    };
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // Of machines that are run without kvrun's command line, which tells it itself.
            let end = error.chain().find_map(|cause| cause.downcast_ref::<PodError>()?.vm_end());
            let console = end.into_iter().flat_map(|end| text::lines(&end.console_tail));
            let console: String = console.map(|line| format!("\nconsole: {line}")).collect();
            fail(&format!("{error:#}{console}"))
        }
    }
}
