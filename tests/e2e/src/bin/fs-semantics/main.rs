//! What Linux programs may expect of a file system, tried out on the one that holds a directory.
//!
//! ```text
//! fs-semantics GROUP DIRECTORY [NAME...]     cases whose names contain NAME; without, all of the group
//! fs-semantics map-and-hold FILE             changes a file by a mapping; see [`mapping::map_and_hold`]
//! fs-semantics hear DIRECTORY                says what it hears of a directory; see [`hear::hear`]
//! ```
//!
//! Prints `ok NAME` or `FAILED NAME: REASON` for each case, and ends with 1 if any failed. The end-to-end tests run it in a guest
//! on a shared directory, and on the file system of the host itself: a case that fails there is wrong. Groups are `main`; `small`,
//! which fills a file system of at most some MiB; `make-large`, which leaves a large directory behind, and `large`, which reads it;
//! and `tmpfile`, what one may do with `O_TMPFILE`. It needs root.
//!
//! Each case runs in a process and a directory of its own, so it may change user, umask and working directory. `sys.rs` has what
//! cases are written with; the other files are the cases, by subject.

mod access;
mod acl;
mod content;
mod directories;
mod hear;
mod large;
mod links;
mod locks;
mod mapping;
mod names;
mod rename;
mod small;
mod sys;
mod tmpfile;
mod writers;
mod xattr;

use std::fs;
use std::io::{self, Write};
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

/// A case: its name and what it does in a directory of its own.
type Case = (&'static str, fn(&Path) -> Result<()>);

/// The cases of a module, named by module and function.
#[macro_export]
macro_rules! cases {
    ($($case:ident),* $(,)?) => {
        &[$((concat!(module_path!(), "::", stringify!($case)), $case)),*]
    };
}

const MAIN: &[&[Case]] = &[
    rename::CASES,
    links::CASES,
    names::CASES,
    directories::CASES,
    content::CASES,
    writers::CASES,
    mapping::CASES,
    locks::CASES,
    access::CASES,
    acl::CASES,
    xattr::CASES,
];

fn main() -> ExitCode {
    match run() {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("fs-semantics: {e:#}");
            ExitCode::from(2)
        }
    }
}

fn run() -> Result<bool> {
    let mut arguments = std::env::args().skip(1);
    let usage = "fs-semantics main|small|make-large|large|tmpfile DIRECTORY [NAME...]";
    let (group, parent) = (arguments.next().context(usage)?, arguments.next().context(usage)?);
    let groups = match group.as_str() {
        "hear" => return hear::hear(Path::new(&parent)),
        "map-and-hold" => return mapping::map_and_hold(Path::new(&parent)).map(|()| true),
        "main" => MAIN,
        "small" => &[small::CASES],
        "make-large" => &[large::MAKING],
        "large" => &[large::READING],
        "tmpfile" => &[tmpfile::CASES],
        other => bail!("there is no group {other}: {usage}"),
    };
    let wanted: Vec<String> = arguments.collect();
    let mut good = true;
    for (name, case) in groups.iter().copied().flatten() {
        // Without the name of the program.
        let name = name.split_once("::").map_or(*name, |(_, name)| name);
        if !wanted.is_empty() && !wanted.iter().any(|part| name.contains(part.as_str())) {
            continue;
        }
        let line = match one(*case, &Path::new(&parent).join(name.replace("::", "."))) {
            Ok(()) => format!("ok {name}\n"),
            Err(e) => {
                good = false;
                format!("FAILED {name}: {e:#}\n")
            }
        };
        io::stdout().write_all(line.as_bytes())?;
    }
    Ok(good)
}

fn one(case: fn(&Path) -> Result<()>, dir: &Path) -> Result<()> {
    fs::create_dir(dir).with_context(|| format!("cannot make {}", dir.display()))?;
    sys::chmod(dir, 0o755)?;
    sys::in_child(|| {
        rustix::process::umask(rustix::fs::Mode::from(0o022));
        case(dir)
    })?;
    sys::remove_tree(dir).context("cannot clean up")
}
