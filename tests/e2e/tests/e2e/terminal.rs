//! `terminal: true` through a real pseudo-terminal.

use anyhow::{Result, ensure};
use kvrun_e2e::{Bundle, Case, Terminal, Test, cases};
use rustix::termios::LocalModes;
use serde_json::json;

pub(crate) const CASES: &[Case] = cases![
    container_sees_a_terminal_of_the_same_size,
    resize_reaches_the_container,
    control_c_interrupts_the_container,
    typed_line_is_echoed_once_and_read,
    settings_are_restored_after_the_end,
    settings_are_restored_when_the_container_cannot_start,
    terminal_without_a_terminal_is_refused,
];

fn on_terminal(bundle: Bundle) -> Result<Bundle> {
    bundle.with(|spec| spec["process"]["terminal"] = json!(true))
}

fn container_sees_a_terminal_of_the_same_size(t: &Test) -> Result<()> {
    let terminal = Terminal::open(31, 97)?;
    let bundle = on_terminal(t.script("test -t 0 && test -t 1 && test -t 2 && stty size; tty; echo done")?)?;
    let run = terminal.start(t, &bundle)?;
    run.until("done\r\n")?;
    let shown = run.stdout.text();
    ensure!(shown.contains("31 97\r\n"), "the terminal shows {shown:?}");
    ensure!(
        shown.contains("/dev/pts/0\r\n") || shown.contains("/dev/console\r\n"),
        "the terminal shows {shown:?}"
    );
    run.wait()?.exited(0).stderr("");
    Ok(())
}

fn resize_reaches_the_container(t: &Test) -> Result<()> {
    let terminal = Terminal::open(24, 80)?;
    let script = "trap 'stty size; exit 5' WINCH; echo ready; sleep 1000 & wait";
    let run = terminal.start(t, &on_terminal(t.script(script)?)?)?;
    run.until("ready\r\n")?;
    terminal.resize(40, 132)?;
    run.until("40 132\r\n")?;
    run.wait()?.exited(5).stderr("");
    Ok(())
}

fn control_c_interrupts_the_container(t: &Test) -> Result<()> {
    let terminal = Terminal::open(24, 80)?;
    let script = "trap 'echo interrupted; exit 3' INT; echo ready; sleep 1000 & wait";
    let run = terminal.start(t, &on_terminal(t.script(script)?)?)?;
    run.until("ready\r\n")?;
    terminal.keys(b"\x03")?;
    run.until("interrupted\r\n")?;
    run.wait()?.exited(3).stderr("");
    Ok(())
}

fn typed_line_is_echoed_once_and_read(t: &Test) -> Result<()> {
    let terminal = Terminal::open(24, 80)?;
    let run = terminal
        .start(t, &on_terminal(t.script("echo ready; read line; echo \"<$line>\"; cat; echo done")?)?)?;
    run.until("ready\r\n")?;
    terminal.keys(b"hello\r")?;
    run.until("<hello>\r\n")?;
    // Control-D on an empty line is the end of input.
    terminal.keys(b"\x04")?;
    run.until("done\r\n")?;
    let outcome = run.wait()?.exited(0).stderr("");
    ensure!(
        outcome.text() == "ready\r\nhello\r\n<hello>\r\ndone\r\n",
        "the terminal shows {:?}",
        outcome.text()
    );
    Ok(())
}

fn settings_are_restored_after_the_end(t: &Test) -> Result<()> {
    let terminal = Terminal::open(24, 80)?;
    let before = format!("{:?}", terminal.settings()?);
    let run = terminal.start(t, &on_terminal(t.script("echo ready; read line; exit 2")?)?)?;
    run.until("ready\r\n")?;
    // While it runs, keys go to the container as they are.
    let raw = terminal.settings()?.local_modes;
    ensure!(!raw.intersects(LocalModes::ICANON | LocalModes::ECHO | LocalModes::ISIG), "not raw: {raw:?}");
    terminal.keys(b"\r")?;
    run.wait()?.exited(2).stderr("");
    let after = format!("{:?}", terminal.settings()?);
    ensure!(before == after, "settings before: {before}, after: {after}");
    Ok(())
}

fn settings_are_restored_when_the_container_cannot_start(t: &Test) -> Result<()> {
    let terminal = Terminal::open(24, 80)?;
    let before = format!("{:?}", terminal.settings()?);
    let run = terminal.start(t, &on_terminal(t.bundle(&["/bin/no-such-command"])?)?)?;
    run.wait()?.exited(127).error(&["/bin/no-such-command"]);
    let after = format!("{:?}", terminal.settings()?);
    ensure!(before == after, "settings before: {before}, after: {after}");
    Ok(())
}

fn terminal_without_a_terminal_is_refused(t: &Test) -> Result<()> {
    t.run(&on_terminal(t.bundle(&["/bin/true"])?)?)?.failed().stdout("").error(&["terminal"]);
    Ok(())
}
