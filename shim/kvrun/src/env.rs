//! `kvrun env`: versions, and the files in use.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use kvrun_pod::assets::Kind;
use kvrun_pod::{agent, text};

use crate::cli::Global;

/// Prints the table; whether every file is there.
pub(crate) fn env(global: &Global) -> anyhow::Result<bool> {
    let named = global.assets(&global.load_config()?);
    let mut rows = vec![("kvrun".to_owned(), env!("CARGO_PKG_VERSION").to_owned())];
    let mut complete = true;
    let mut files = Vec::new();
    for kind in Kind::ALL {
        let found = named.open(kind);
        complete &= found.is_ok();
        if kind == Kind::Vmm
            && let Ok(asset) = &found
        {
            rows.push(("VMM version".to_owned(), vmm_version(&asset.path)));
        }
        let value = match found {
            Ok(asset) => format!("{} ({} bytes)", asset.path.display(), asset.size),
            Err(error) => format!("missing: {}", text::chain(&error)),
        };
        files.push((kind.to_string(), value));
    }
    rows.push(("agent protocol".to_owned(), agent::PROTOCOL.to_owned()));
    rows.extend(files);
    print(&mut io::stdout().lock(), &rows).context("write the table")?;
    Ok(complete)
}

/// What the VMM says its version is.
fn vmm_version(vmm: &Path) -> String {
    let output =
        Command::new(vmm).arg("--version").env_clear().stdin(Stdio::null()).stderr(Stdio::null()).output();
    match output {
        Ok(output) if output.status.success() => {
            let version = text::one_line(&String::from_utf8_lossy(&output.stdout), 100);
            version.strip_prefix("kvrun-vmm ").unwrap_or(&version).to_owned()
        }
        Ok(output) => format!("unknown ({})", output.status),
        Err(error) => format!("unknown ({error})"),
    }
}

fn print(to: &mut impl Write, rows: &[(String, String)]) -> io::Result<()> {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    rows.iter().try_for_each(|(name, value)| writeln!(to, "{name:width$}  {value}"))
}
