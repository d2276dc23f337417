//! `kvrun check`: whether this host can run virtual machines.
//!
//! What needs KVM is found out by `kvrun-vmm --check`, which opens it, asks for its capabilities, and runs a tiny guest that
//! executes in ring 0 what a kernel needs; the rest is looked at here.

use std::io::{self, Write};
use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use anyhow::Context;
use kvrun_pod::assets::{Kind, Named};
use kvrun_pod::{cgroup, text};
use serde::Deserialize;
use tokio::io::AsyncReadExt;

use crate::cli::Global;

/// How long the VMM may take over its findings; the tiny guest takes milliseconds.
const TIMEOUT: Duration = Duration::from_secs(60);
/// The most that is read of its findings, in bytes.
const MAX_FINDINGS: u64 = 256 * 1024;

/// What `kvrun-vmm --check` prints.
#[derive(Debug, Deserialize)]
struct Findings {
    findings: Vec<Finding>,
}

/// One row of the table.
#[derive(Debug, Deserialize, PartialEq, Eq)]
struct Finding {
    name: String,
    ok: bool,
    detail: String,
}

impl Finding {
    fn new(name: impl Into<String>, result: Result<String, String>) -> Self {
        let ok = result.is_ok();
        let (Ok(detail) | Err(detail)) = result;
        Self { name: name.into(), ok, detail }
    }
}

/// Prints the table; whether all is well.
pub(crate) fn check(global: &Global) -> anyhow::Result<bool> {
    let named = global.assets(&global.load_config()?);
    let mut findings = host_findings(&named);
    match named.open(Kind::Vmm) {
        Ok(vmm) => match vmm_findings(&vmm.path) {
            Ok(found) => findings.extend(found),
            Err(error) => findings.push(Finding::new("KVM", Err(format!("{error:#}")))),
        },
        // Reported as missing already.
        Err(_) => findings.push(Finding::new("KVM", Err("not checked without the VMM".into()))),
    }
    print(&mut io::stdout().lock(), &findings).context("write the table")?;
    Ok(findings.iter().all(|finding| finding.ok))
}

fn host_findings(named: &Named) -> Vec<Finding> {
    let mut findings: Vec<Finding> = Kind::ALL
        .into_iter()
        .map(|kind| {
            let found =
                named.open(kind).map(|asset| format!("{} ({} bytes)", asset.path.display(), asset.size));
            Finding::new(kind.to_string(), found.map_err(|e| text::chain(&e)))
        })
        .collect();
    let root = if rustix::process::geteuid().is_root() {
        Ok("yes".into())
    } else {
        Err("no: kvrun needs root to mount what it shares with a guest".into())
    };
    findings.push(Finding::new("running as root", root));
    let cgroup = cgroup::v2_mount_point().map(|path| path.display().to_string());
    findings.push(Finding::new(
        "cgroup v2",
        cgroup.ok_or_else(|| "not mounted: mount cgroup2 at /sys/fs/cgroup".into()),
    ));
    findings
}

fn vmm_findings(vmm: &Path) -> anyhow::Result<Vec<Finding>> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("start")?;
    let output = runtime.block_on(async {
        let mut child = tokio::process::Command::new(vmm)
            .arg("--check")
            .env_clear()
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("run {}", vmm.display()))?;
        let stdout = child.stdout.take().context("no pipe to the VMM")?;
        let exchange = async {
            let mut output = Vec::new();
            stdout
                .take(MAX_FINDINGS)
                .read_to_end(&mut output)
                .await
                .context("read the findings of the VMM")?;
            child.wait().await.context("wait for the VMM")?;
            Ok(output)
        };
        let result = tokio::time::timeout(TIMEOUT, exchange).await;
        result.unwrap_or_else(|_| {
            Err(anyhow::anyhow!("the VMM did not end its check within {} s", TIMEOUT.as_secs()))
        })
    })?;
    let findings: Findings = serde_json::from_slice(&output)
        .with_context(|| format!("{} --check did not print findings; is it kvrun's VMM?", vmm.display()))?;
    anyhow::ensure!(!findings.findings.is_empty(), "the VMM found nothing to check");
    Ok(findings.findings)
}

fn print(to: &mut impl Write, findings: &[Finding]) -> io::Result<()> {
    let width = findings.iter().map(|finding| finding.name.chars().count()).max().unwrap_or(0);
    for finding in findings {
        let verdict = if finding.ok { "ok  " } else { "FAIL" };
        let detail = text::one_line(&finding.detail, 1000);
        writeln!(to, "{verdict}  {:width$}  {detail}", text::one_line(&finding.name, 100))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn program(dir: &Path, script: &str) -> std::path::PathBuf {
        let (text, program) = (dir.join("script"), dir.join("vmm"));
        std::fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
        // What a test beside this one starts inherits a descriptor that is open here, and what is open for writing cannot be run.
        let installed = std::process::Command::new("install").args([&text, &program]).status().unwrap();
        assert!(installed.success());
        program
    }

    #[test]
    fn findings_of_the_vmm_are_rows_of_the_table() {
        let dir = tempfile::tempdir().unwrap();
        let vmm = program(
            dir.path(),
            r#"echo '{"findings":[{"name":"KVM API","ok":false,"detail":"11"}]}'; exit 1"#,
        );
        let findings = vmm_findings(&vmm).unwrap();
        assert_eq!(findings, [Finding::new("KVM API", Err("11".into()))]);
        let mut table = Vec::new();
        print(&mut table, &findings).unwrap();
        assert_eq!(String::from_utf8(table).unwrap(), "FAIL  KVM API  11\n");
    }

    #[test]
    fn vmm_that_prints_no_findings_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        for (script, message) in [
            ("echo hello", "did not print findings"),
            ("exit 0", "did not print findings"),
            (r#"echo '{"findings":[]}'"#, "found nothing"),
        ] {
            let error = vmm_findings(&program(dir.path(), script)).unwrap_err().to_string();
            assert!(error.contains(message), "{script}: {error}");
        }
    }
}
