//! `kvrun update`: other limits for a running container.

use std::fs::File;
use std::io::{self, Read};
use std::os::fd::AsFd;
use std::path::Path;

use kvrun_pod::bundle::{LinuxResources, MAX_CONFIG};
use kvrun_pod::record::Status;

use crate::cli::Global;
use crate::cli::update::UpdateArgs;
use crate::error::{Error, host};
use crate::monitor::client::{Known, PATIENCE};
use crate::monitor::protocol::{Request, payload};

/// Changes them.
pub(crate) fn update(global: &Global, args: &UpdateArgs) -> Result<(), Error> {
    if let Some(why) = args.refused() {
        return Err(Error::Option(why.to_owned()));
    }
    let container = Known::get(&global.root, &args.id)?;
    let status = container.record.status();
    if status == Status::Stopped {
        return Err(Error::NotRunning { id: container.id().clone(), status });
    }
    let resources: LinuxResources = match &args.resources {
        Some(path) => read(path)?,
        None => serde_json::from_value(args.as_resources()).map_err(host("read the options"))?,
    };
    let payload = payload(&resources).map_err(host("write the resources"))?;
    let connection = container.connect(&global.root, PATIENCE)?;
    connection.ask(Request::Update, &[payload.as_fd()]).map(drop)
}

fn read(path: &Path) -> Result<LinuxResources, Error> {
    let error = |e: &dyn std::fmt::Display| Error::Option(format!("--resources {}: {e}", path.display()));
    let source: Box<dyn Read> = if path == Path::new("-") {
        Box::new(io::stdin())
    } else {
        Box::new(File::open(path).map_err(|e| error(&e))?)
    };
    let mut bytes = Vec::new();
    source.take(MAX_CONFIG).read_to_end(&mut bytes).map_err(|e| error(&e))?;
    serde_json::from_slice(&bytes).map_err(|e| error(&e))
}
