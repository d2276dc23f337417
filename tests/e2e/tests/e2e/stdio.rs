//! Standard input, output and error: complete, apart, in order, and each with its own end.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::process::Stdio;
use std::thread;

use anyhow::{Context, Result, ensure};
use kvrun_e2e::{Case, Test, cases, process, time};

pub(crate) const CASES: &[Case] = cases![
    hundred_megabytes_through_cat_come_back_bit_exact,
    stdout_and_stderr_stay_apart_and_in_order,
    end_of_stdin_reaches_the_container,
    container_ends_while_stdin_is_still_open,
    container_that_never_reads_stdin_ends,
    large_output_right_before_the_end_is_complete,
    reader_that_leaves_early_is_noticed_by_the_writer,
    closed_stdio_is_no_error,
];

/// A pseudo-random stream (xorshift64) in which a byte that is lost, doubled or moved shows.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn fill(&mut self, buffer: &mut [u8]) {
        for chunk in buffer.chunks_exact_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes());
        }
    }
}

pub(crate) const SEED: u64 = 0x9e37_79b9_7f4a_7c15;
const CHUNK: usize = 80_000;

fn hundred_megabytes_through_cat_come_back_bit_exact(t: &Test) -> Result<()> {
    const CHUNKS: usize = 100_000_000 / CHUNK;
    let bundle = t.bundle(&["/bin/cat"])?;
    let mut command = t.kvrun(t.run_args(&bundle));
    let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
    let mut stdin = child.stdin.take().context("no stdin")?;
    let mut stdout = child.stdout.take().context("no stdout")?;
    let writer = thread::spawn(move || -> Result<()> {
        let (mut noise, mut chunk) = (Noise(SEED), vec![0; CHUNK]);
        for _ in 0..CHUNKS {
            noise.fill(&mut chunk);
            stdin.write_all(&chunk)?;
        }
        Ok(())
    });
    let (mut noise, mut expected, mut got) = (Noise(SEED), vec![0; CHUNK], vec![0; CHUNK]);
    for number in 0..CHUNKS {
        noise.fill(&mut expected);
        stdout.read_exact(&mut got).with_context(|| format!("only {number} of {CHUNKS} chunks came back"))?;
        ensure!(got == expected, "chunk {number} of {CHUNKS} came back changed");
    }
    ensure!(stdout.read(&mut got)? == 0, "more came back than was sent");
    writer.join().expect("the writer does not panic")?;
    let status = process::wait_within(&mut child, time::scaled(time::RUN))?;
    ensure!(status.code() == Some(0), "kvrun ended with {status}");
    Ok(())
}

fn stdout_and_stderr_stay_apart_and_in_order(t: &Test) -> Result<()> {
    const LINES: usize = 2000;
    let script = format!("i=0; while [ $i -lt {LINES} ]; do echo out $i; echo err $i >&2; i=$((i+1)); done");
    let lines = |stream: &str| (0..LINES).map(|i| format!("{stream} {i}\n")).collect::<String>();
    t.run(&t.script(&script)?)?.exited(0).stdout(&lines("out")).stderr(&lines("err"));
    Ok(())
}

fn end_of_stdin_reaches_the_container(t: &Test) -> Result<()> {
    let mut run = t.start(&t.script("echo ready; cat; echo the end; exit 3")?)?;
    run.until("ready\n")?;
    run.stdin.take().context("no stdin")?.write_all(b"last words\n")?;
    run.wait()?.exited(3).stdout("ready\nlast words\nthe end\n").stderr("");
    Ok(())
}

fn container_ends_while_stdin_is_still_open(t: &Test) -> Result<()> {
    let run = t.start(&t.script("read line; echo got $line")?)?;
    run.stdin.as_ref().context("no stdin")?.write_all(b"one\ntwo\n")?;
    // `run` keeps the writing end until it is dropped, which is after the wait.
    run.wait()?.exited(0).stdout("got one\n").stderr("");
    Ok(())
}

fn container_that_never_reads_stdin_ends(t: &Test) -> Result<()> {
    let mut run = t.start(&t.script("echo ready; exit 4")?)?;
    let mut stdin = run.stdin.take().context("no stdin")?;
    // More than all buffers on the way together; it ends with EPIPE when kvrun does.
    let writer = thread::spawn(move || {
        let chunk = vec![b'x'; 1 << 20];
        loop {
            if let Err(error) = stdin.write_all(&chunk) {
                return error.kind();
            }
        }
    });
    run.wait()?.exited(4).stdout("ready\n").stderr("");
    ensure!(
        writer.join().expect("the writer does not panic") == ErrorKind::BrokenPipe,
        "stdin did not close"
    );
    Ok(())
}

fn large_output_right_before_the_end_is_complete(t: &Test) -> Result<()> {
    let outcome =
        t.run(&t.script("dd if=/dev/zero bs=1048576 count=4 2>/dev/null; exit 9")?)?.exited(9).stderr("");
    ensure!(outcome.stdout.len() == 4 << 20, "{} bytes of output", outcome.stdout.len());
    Ok(())
}

fn reader_that_leaves_early_is_noticed_by_the_writer(t: &Test) -> Result<()> {
    let bundle = t.script("yes; echo yes ended with $? >&2; exit 9")?;
    let mut command = t.kvrun(t.run_args(&bundle));
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn()?;
    // What `| head -1` does.
    let mut reader = BufReader::new(child.stdout.take().context("no stdout")?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    ensure!(line == "y\n", "read {line:?}");
    drop(reader);
    let status = process::wait_within(&mut child, time::scaled(time::RUN))?;
    let mut stderr = String::new();
    child.stderr.take().context("no stderr")?.read_to_string(&mut stderr)?;
    // 141: SIGPIPE, which is 13.
    ensure!(stderr == "yes ended with 141\n" && status.code() == Some(9), "{status}, stderr {stderr:?}");
    Ok(())
}

fn closed_stdio_is_no_error(t: &Test) -> Result<()> {
    let bundle = t.script("echo to nobody; cat; exit 8")?;
    let mut shell = std::process::Command::new("sh");
    shell.args(["-c", "exec \"$0\" \"$@\" <&- >&- 2>&-"]).arg(t.program()).arg("--root").arg(t.state());
    t.environment(&mut shell);
    let mut child = shell.args(t.run_args(&bundle)).spawn()?;
    let status = process::wait_within(&mut child, time::scaled(time::RUN))?;
    ensure!(status.code() == Some(8), "kvrun ended with {status}");
    Ok(())
}
