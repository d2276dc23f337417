//! `kvrun ps`: the processes of a container.
//!
//! They are the guest's, and have no numbers on the host. So the table, for people, has the container's own numbers; the JSON list, whose readers
//! look the numbers up on the host, has those of the processes on the host that stand for processes that were asked for: the container's
//! own, and each `exec`.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvrun_pod::record::Status;

use super::{print, table};
use crate::cli::{Global, ListFormat, PsArgs};
use crate::error::{Error, host};
use crate::monitor::client::{Known, PATIENCE};
use crate::monitor::protocol::{ProcessRow, Request};

/// A column: its names in `-o`, its heading, its text.
struct Column {
    names: &'static [&'static str],
    heading: &'static str,
    cell: fn(&ProcessRow, SystemTime) -> String,
}

const COLUMNS: [Column; 8] = [
    Column { names: &["uid", "user", "euid", "euser"], heading: "UID", cell: |p, _| p.uid.to_string() },
    Column { names: &["pid"], heading: "PID", cell: |p, _| p.pid.to_string() },
    Column { names: &["ppid"], heading: "PPID", cell: |p, _| p.parent_pid.to_string() },
    Column { names: &["c", "pcpu", "%cpu"], heading: "C", cell: cpu_percent },
    Column { names: &["stime", "start_time", "etime"], heading: "ELAPSED", cell: elapsed },
    Column { names: &["tty", "tt", "tname"], heading: "TTY", cell: |p, _| or(&p.terminal, "?") },
    Column { names: &["time", "cputime"], heading: "TIME", cell: |p, _| clock(p.cpu_ms / 1000) },
    Column { names: &["cmd", "args", "command"], heading: "CMD", cell: |p, _| p.command.clone() },
];
/// The name of the program only.
const COMM: Column = Column { names: &["comm", "ucmd"], heading: "COMMAND", cell: |p, _| name(&p.command) };

/// Prints them.
pub(crate) fn ps(global: &Global, args: &PsArgs) -> Result<(), Error> {
    let columns = columns(&args.options)?;
    let container = Known::get(&global.root, &args.id)?;
    let status = container.record.status();
    if status == Status::Stopped {
        return Err(Error::NotRunning { id: container.id().clone(), status });
    }
    let connection = container.connect(&global.root, PATIENCE)?;
    if args.format == ListFormat::Json {
        let pids: Vec<i32> = connection.fetch(Request::HostProcesses)?;
        return print(&serde_json::to_string(&pids).map_err(host("write JSON"))?);
    }
    let processes: Vec<ProcessRow> = connection.fetch(Request::Processes)?;
    let now = SystemTime::now();
    let mut rows = vec![columns.iter().map(|column| column.heading.to_owned()).collect::<Vec<_>>()];
    rows.extend(
        processes.iter().map(|process| columns.iter().map(|column| (column.cell)(process, now)).collect()),
    );
    print(&table(&rows))
}

/// Those that options of ps(1) ask for; which processes there are is not theirs to say.
fn columns(options: &[String]) -> Result<Vec<Column>, Error> {
    let unknown = |what: &str| {
        Error::Option(format!(
            "ps: {what:?} is not supported; use -ef, aux, or -o with pid, ppid, uid, c, etime, tty, time, comm, cmd"
        ))
    };
    let mut chosen = Vec::new();
    let mut words = options.iter();
    while let Some(word) = words.next() {
        let list = match word.strip_prefix("-o").or_else(|| word.strip_prefix("--format=")) {
            None if word == "--format" || word == "-eo" => {
                words.next().ok_or_else(|| unknown(word))?.as_str()
            }
            None if word.trim_start_matches('-').chars().all(|c| "Aefaxulw".contains(c)) => continue,
            None => return Err(unknown(word)),
            Some("") => words.next().ok_or_else(|| unknown(word))?.as_str(),
            Some(list) => list,
        };
        for name in list.split([',', ' ']).filter(|name| !name.is_empty()) {
            let all = COLUMNS.into_iter().chain([COMM]);
            chosen.push(
                all.into_iter().find(|column| column.names.contains(&name)).ok_or_else(|| unknown(name))?,
            );
        }
    }
    Ok(if chosen.is_empty() { COLUMNS.into() } else { chosen })
}

fn or(text: &str, otherwise: &str) -> String {
    if text.is_empty() { otherwise.to_owned() } else { text.to_owned() }
}

fn age(process: &ProcessRow, now: SystemTime) -> Duration {
    let started = UNIX_EPOCH.checked_add(Duration::from_secs(process.started_s));
    started.and_then(|started| now.duration_since(started).ok()).unwrap_or_default()
}

fn cpu_percent(process: &ProcessRow, now: SystemTime) -> String {
    let age = u64::try_from(age(process, now).as_millis()).unwrap_or(u64::MAX).max(1);
    (u128::from(process.cpu_ms) * 100 / u128::from(age)).min(999).to_string()
}

fn elapsed(process: &ProcessRow, now: SystemTime) -> String {
    clock(age(process, now).as_secs())
}

fn clock(seconds: u64) -> String {
    format!("{:02}:{:02}:{:02}", seconds / 3600, seconds / 60 % 60, seconds % 60)
}

fn name(command: &str) -> String {
    let program = command.split(' ').next().unwrap_or_default();
    program.rsplit('/').next().unwrap_or_default().to_owned()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headings(options: &[&str]) -> Option<Vec<&'static str>> {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        Some(columns(&options).ok()?.iter().map(|column| column.heading).collect())
    }

    #[test]
    fn options_of_ps_choose_columns() {
        for options in [&[][..], &["-ef"], &["aux"], &["-e", "-f"]] {
            assert_eq!(headings(options).unwrap().len(), COLUMNS.len(), "{options:?}");
        }
        for options in
            [&["-o", "pid,comm"][..], &["-opid,comm"], &["-eo", "pid comm"], &["--format=pid,comm"]]
        {
            assert_eq!(headings(options).unwrap(), ["PID", "COMMAND"], "{options:?}");
        }
        for options in [&["-o"][..], &["-o", "nice"], &["--sort=pid"], &["-Z"]] {
            assert!(headings(options).is_none(), "{options:?}");
        }
    }

    #[test]
    fn times_are_clocks() {
        assert_eq!(clock(3 * 3600 + 62), "03:01:02");
        assert_eq!(name("/bin/sleep 10"), "sleep");
    }
}
