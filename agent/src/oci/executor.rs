//! The last step of a container's first process: finding its program, and exec. Runs inside the container, as the container's
//! user, under its seccomp filter.

use std::ffi::CString;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use libcontainer::workload::{Executor, ExecutorError, ExecutorValidationError};
use nix::errno::Errno;
use nix::fcntl::AT_FDCWD;
use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
use nix::unistd::{AccessFlags, execv, faccessat};
use oci_spec::runtime::Spec;

use super::{Report, Reporter};

/// Where a command without '/' is looked for when `process.env` has no `PATH`: what Docker gives to every container.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Executes `process.args`, and reports by kind what is wrong with it.
#[derive(Clone, Debug)]
pub struct ContainerExecutor {
    reporter: Reporter,
}

impl ContainerExecutor {
    /// Reports through `reporter`.
    #[must_use]
    pub fn new(reporter: Reporter) -> Self {
        Self { reporter }
    }
}

impl Executor for ContainerExecutor {
    /// Before the container counts as created: a missing program is an error of create, as with runc.
    fn validate(&self, spec: &Spec) -> Result<(), ExecutorValidationError> {
        let args = args(spec).ok_or_else(|| invalid("process.args is empty"))?;
        find(&args[0], path_variable(spec)).map(drop).map_err(|report| {
            self.reporter.send(&report);
            invalid("process.args[0] cannot be executed")
        })
    }

    fn exec(&self, spec: &Spec) -> Result<(), ExecutorError> {
        let args = args(spec).ok_or(ExecutorError::InvalidArg)?;
        let program = find(&args[0], path_variable(spec)).map_err(|report| {
            self.reporter.send(&report);
            ExecutorError::InvalidArg
        })?;
        let c_args: Vec<CString> = args
            .iter()
            .map(|arg| CString::new(arg.as_bytes()))
            .collect::<Result<_, _>>()
            .map_err(|_| ExecutorError::InvalidArg)?;
        let c_program =
            CString::new(program.as_os_str().as_bytes()).map_err(|_| ExecutorError::InvalidArg)?;

        // Rust's runtime ignores SIGPIPE, and an ignored signal stays ignored over exec.
        // SAFETY: SIG_DFL installs no handler.
        let _ = unsafe { signal(Signal::SIGPIPE, SigHandler::SigDfl) };
        let _ = SigSet::empty().thread_set_mask();

        let Err(errno) = execv(&c_program, &c_args);
        let program = program.display();
        self.reporter.send(&match errno {
            // The program itself was found just now.
            Errno::ENOENT => Report::NotFound(format!(
                "cannot execute {program:?}: the interpreter or dynamic loader it names does not exist"
            )),
            Errno::EACCES | Errno::EPERM | Errno::ENOEXEC | Errno::EISDIR | Errno::ELIBBAD => {
                Report::NotExecutable(format!("cannot execute {program:?}: {}", errno.desc()))
            }
            _ => Report::Detail(format!("cannot execute {program:?}: {}", errno.desc())),
        });
        Err(ExecutorError::Other(errno.desc().to_owned()))
    }
}

fn invalid(text: &str) -> ExecutorValidationError {
    ExecutorValidationError::ArgValidationError(text.to_owned())
}

fn args(spec: &Spec) -> Option<&[String]> {
    let args = spec.process().as_ref()?.args().as_ref()?;
    args.first().is_some_and(|program| !program.is_empty()).then_some(args)
}

fn path_variable(spec: &Spec) -> &str {
    let env = spec.process().as_ref().and_then(|process| process.env().as_ref());
    env.into_iter().flatten().find_map(|entry| entry.strip_prefix("PATH=")).unwrap_or(DEFAULT_PATH)
}

/// The program that `name` means: a path if it has a '/', else the first executable file of that name along `path`.
fn find(name: &str, path: &str) -> Result<PathBuf, Report> {
    if name.contains('/') {
        return match look(Path::new(name)) {
            Look::Executable | Look::Unknown => Ok(name.into()),
            Look::Missing => {
                Err(Report::NotFound(format!("executable {name:?} does not exist in the container")))
            }
            Look::Unusable(why) => Err(Report::NotExecutable(format!("cannot execute {name:?}: {why}"))),
        };
    }
    let mut unusable = None;
    for dir in path.split(':') {
        // POSIX: an empty entry means the working directory.
        let candidate = Path::new(if dir.is_empty() { "." } else { dir }).join(name);
        match look(&candidate) {
            Look::Executable | Look::Unknown => return Ok(candidate),
            Look::Missing => {}
            Look::Unusable(why) => {
                unusable.get_or_insert_with(|| format!("cannot execute {:?}: {why}", candidate.display()));
            }
        }
    }
    match unusable {
        Some(text) => Err(Report::NotExecutable(text)),
        None => {
            Err(Report::NotFound(format!("executable {name:?} not found in the container's $PATH ({path})")))
        }
    }
}

enum Look {
    Executable,
    Missing,
    Unusable(&'static str),
    /// The seccomp filter forbids to look: exec will tell.
    Unknown,
}

fn look(path: &Path) -> Look {
    match std::fs::metadata(path) {
        Err(err) => match err.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOENT | Errno::ENOTDIR) => Look::Missing,
            Some(errno @ (Errno::EACCES | Errno::ELOOP | Errno::ENAMETOOLONG)) => {
                Look::Unusable(errno.desc())
            }
            _ => Look::Unknown,
        },
        Ok(metadata) if metadata.is_dir() => Look::Unusable("it is a directory"),
        Ok(_) => match faccessat(AT_FDCWD, path, AccessFlags::X_OK, nix::fcntl::AtFlags::AT_EACCESS) {
            Ok(()) => Look::Executable,
            Err(Errno::EACCES) => Look::Unusable("permission denied"),
            Err(_) => Look::Unknown,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_missing_program_and_one_without_permission_are_told_apart() {
        let dir = std::env::temp_dir().join(format!("kvrun-executor-{}", std::process::id()));
        std::fs::create_dir_all(dir.join("sub")).unwrap();
        std::fs::write(dir.join("data"), "x").unwrap();
        let path = dir.to_str().unwrap();

        assert!(matches!(find("no-such", path), Err(Report::NotFound(text)) if text.contains("\"no-such\"")));
        assert!(
            matches!(find("/no/such", path), Err(Report::NotFound(text)) if text.contains("\"/no/such\""))
        );
        assert!(
            matches!(find("data", path), Err(Report::NotExecutable(text)) if text.contains("permission denied"))
        );
        assert!(matches!(find("sub", path), Err(Report::NotExecutable(text)) if text.contains("directory")));
        assert!(matches!(find(&format!("{path}/data"), ""), Err(Report::NotExecutable(_))));
        assert_eq!(find("sh", &format!("{path}:/bin")).unwrap(), Path::new("/bin/sh"));

        std::fs::remove_dir_all(dir).unwrap();
    }
}
