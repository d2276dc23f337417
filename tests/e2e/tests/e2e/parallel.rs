//! Many at once.

use anyhow::Result;
use kvrun_e2e::{Case, Running, Test, cases};

pub(crate) const CASES: &[Case] = cases![ten_containers_run_at_once];

fn ten_containers_run_at_once(t: &Test) -> Result<()> {
    let mut running = Vec::new();
    for number in 0..10 {
        let bundle = t.script(&format!("echo ready; read line; echo {number} $line; exit {number}"))?;
        let id = format!("{}-{number}", t.id());
        let mut command = t.kvrun(["run", "--bundle"]);
        running.push(Running::start(command.arg(bundle.path()).arg(&id))?);
    }
    // None is told to end before all of them run.
    for run in &running {
        run.until("ready\n")?;
    }
    for run in &running {
        let stdin = run.stdin.as_ref();
        stdin.map(|mut stdin| std::io::Write::write_all(&mut stdin, b"go\n")).transpose()?;
    }
    for (number, run) in running.into_iter().enumerate() {
        let code = i32::try_from(number)?;
        run.wait()?.exited(code).stdout(&format!("ready\n{number} go\n")).stderr("");
    }
    Ok(())
}
