//! `kvrun state`: the state document (runtime.md, "State").

use super::print_json;
use crate::cli::Global;
use crate::error::Error;
use crate::monitor::client::Known;

/// Prints it.
pub(crate) fn state(global: &Global, id: &str) -> Result<(), Error> {
    let record = Known::get(&global.root, id)?.record;
    print_json(&record.state(record.status()))
}
