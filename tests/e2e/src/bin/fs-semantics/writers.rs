//! Several processes on one file.

use std::fs::{self, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Result, ensure};

use crate::sys::{Child, Turns, content, file, open};
use crate::{Case, cases};

pub(crate) const CASES: &[Case] = cases![
    appending_writers_lose_nothing,
    what_one_writes_the_other_reads,
    truncation_is_seen_by_others,
    a_position_is_shared_after_fork,
    new_files_are_seen_at_once,
    closing_one_descriptor_keeps_the_other,
];

fn appending_writers_lose_nothing(dir: &Path) -> Result<()> {
    let path = dir.join("log");
    file(&path, b"")?;
    let (writers, lines) = (4, 100);
    let write = |who: usize| {
        let mut log = OpenOptions::new().append(true).open(&path)?;
        for line in 0..lines {
            log.write_all(format!("writer {who} line {line:04} {}\n", "x".repeat(line % 90)).as_bytes())?;
        }
        Ok(())
    };
    let children = (0..writers).map(|who| Child::start(|| write(who))).collect::<Result<Vec<_>>>()?;
    for child in children {
        child.wait()?;
    }
    let log = fs::read_to_string(&path)?;
    ensure!(log.lines().count() == writers * lines, "{} lines", log.lines().count());
    for who in 0..writers {
        let begin = format!("writer {who} line ");
        let mine: Vec<_> = log.lines().filter(|line| line.starts_with(&begin)).collect();
        ensure!(mine.len() == lines, "{} lines of writer {who}", mine.len());
        for (number, line) in mine.iter().enumerate() {
            ensure!(**line == format!("{begin}{number:04} {}", "x".repeat(number % 90)), "{line}");
        }
    }
    Ok(())
}

fn what_one_writes_the_other_reads(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let here = file(&path, &[0; 100_000])?;
    let (mut mine, mut other) = Turns::pair()?;
    let child = Child::start(|| {
        let there = open(&path)?;
        for round in 1..15u8 {
            other.wait()?;
            ensure!(content(&there)?.iter().all(|byte| *byte == round), "round {round}");
            there.write_all_at(&vec![round + 100; 100_000], 0)?;
            other.pass()?;
        }
        Ok(())
    })?;
    for round in 1..15u8 {
        here.write_all_at(&vec![round; 100_000], 0)?;
        mine.pass()?;
        mine.wait()?;
        ensure!(content(&here)?.iter().all(|byte| *byte == round + 100), "round {round}");
    }
    child.wait()
}

fn truncation_is_seen_by_others(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let here = file(&path, &[7; 50_000])?;
    ensure!(content(&here)?.len() == 50_000);
    Child::start(|| Ok(open(&path)?.set_len(10)?))?.wait()?;
    ensure!(here.metadata()?.len() == 10);
    let mut bytes = [0; 100];
    ensure!(here.read_at(&mut bytes, 0)? == 10 && here.read_at(&mut bytes, 20)? == 0);
    Child::start(|| Ok(open(&path)?.set_len(20)?))?.wait()?;
    ensure!(content(&here)? == [[7; 10], [0; 10]].concat());
    Ok(())
}

fn a_position_is_shared_after_fork(dir: &Path) -> Result<()> {
    let mut here = file(&dir.join("file"), b"0123456789")?;
    here.seek(SeekFrom::Start(2))?;
    let mut there = here.try_clone()?;
    Child::start(|| Ok(there.read_exact(&mut [0; 3])?))?.wait()?;
    ensure!(here.stream_position()? == 5);
    Ok(())
}

fn new_files_are_seen_at_once(dir: &Path) -> Result<()> {
    // Also where it has just been seen that there is none.
    let (mut mine, mut other) = Turns::pair()?;
    let child = Child::start(|| {
        for round in 0..25 {
            other.wait()?;
            let path = dir.join(format!("file{round}"));
            fs::write(dir.join("temporary"), format!("round {round}"))?;
            fs::rename(dir.join("temporary"), &path)?;
            other.pass()?;
        }
        Ok(())
    })?;
    for round in 0..25 {
        let path = dir.join(format!("file{round}"));
        ensure!(!path.exists());
        mine.pass()?;
        mine.wait()?;
        ensure!(fs::read_to_string(&path)? == format!("round {round}"));
        fs::remove_file(&path)?;
        ensure!(!path.exists());
    }
    child.wait()
}

fn closing_one_descriptor_keeps_the_other(dir: &Path) -> Result<()> {
    let path = dir.join("file");
    let one = file(&path, b"content")?;
    let other = open(&path)?;
    let third = one.try_clone()?;
    drop(one);
    ensure!(content(&other)? == b"content" && content(&third)? == b"content");
    drop(other);
    third.write_all_at(b"C", 0)?;
    ensure!(fs::read(&path)? == b"Content");
    Ok(())
}
