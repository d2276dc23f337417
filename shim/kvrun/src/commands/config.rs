//! `kvrun config`: the configuration, for who writes one.

use kvrun_pod::config::{Config, ConfigError, Source, default_file};

use super::print;
use crate::cli::{ConfigCommand, Global};
use crate::error::{Error, FAILED};
use crate::log::Log;

/// Does it; the exit code.
pub(crate) fn config(global: &Global, what: &ConfigCommand, log: &Log) -> Result<u8, Error> {
    match what {
        ConfigCommand::Default => print(default_file().trim_end())?,
        ConfigCommand::Check { file } => {
            let source = file.clone().map_or_else(|| global.source(), Source::File);
            match Config::load(&source) {
                Ok(_) => print(&format!("{}: no mistakes", source.name()))?,
                Err(ConfigError::Faults { faults }) => {
                    faults.iter().for_each(|fault| log.say(&fault.to_string()));
                    return Ok(FAILED);
                }
                Err(error) => return Err(error.into()),
            }
        }
        ConfigCommand::Show => {
            for setting in global.load_config()?.effective(&global.source(), &global.given())? {
                print(&format!("{} = {}  # {}", setting.key, setting.value, setting.origin))?;
            }
        }
    }
    Ok(0)
}
