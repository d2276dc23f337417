//! The configuration: a few settings of whoever runs the host, in a TOML file.
//!
//! * [`settings`] - the table of all settings: name, meaning, default and reason, in one place.
//! * Here - where the text comes from and whom it may belong to; what is wrong with it, each fault with its line.
//!
//! The file is root's. Nobody else may be able to write it: it names the programs that run as root. What it does not say is as the table says, and without a file
//! everything is. A setting that is not known is an error, and so is one of another type or out of its range: nothing is ignored.

mod settings;

use std::borrow::Cow;
use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use toml::de::{DeTable, DeValue};
use tracing::level_filters::LevelFilter;

use crate::assets::{Named, Origin, Paths};
use crate::size::Sizes;
use crate::text;

pub use settings::default_file;
use settings::{SETTINGS, Setting, Value};

/// The file that is read unless another is named.
pub const DEFAULT_PATH: &str = "/etc/kvrun/config.toml";
/// The longest text in bytes.
const MAX_TEXT: u64 = 64 * 1024;

/// Where the configuration comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// [`DEFAULT_PATH`], which need not be there.
    Default,
    /// This file, which must be there.
    File(PathBuf),
    /// This text, which somebody trusted handed over.
    Text {
        /// What to call it.
        name: &'static str,
        /// The text.
        text: String,
    },
}

impl Source {
    /// What to call it.
    pub fn name(&self) -> Cow<'_, str> {
        match self {
            Self::Default => DEFAULT_PATH.into(),
            Self::File(path) => path.to_string_lossy(),
            Self::Text { name, .. } => (*name).into(),
        }
    }
}

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("read the configuration {}", path.display())]
    Read {
        /// Where.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// It could say anything on somebody else's behalf.
    #[error("the configuration {} {problem}: have root own it, and nobody else able to write it (chown root, chmod go-w)", path.display())]
    Untrusted {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// It is no text of ours.
    #[error("the configuration {} {problem}", path.display())]
    NotText {
        /// Where.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// It says what cannot be.
    #[error("{}{}", faults[0], rest(faults.len()))]
    Faults {
        /// All of them, in order, at least one.
        faults: Vec<Fault>,
    },
}

fn rest(faults: usize) -> String {
    if faults == 1 { String::new() } else { format!(" (and {} more: see `kvrun config check`)", faults - 1) }
}

/// Something wrong in the text.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// The text's name.
    name: String,
    /// The number of the line, from 1.
    line: usize,
    /// What is wrong there, and what to do.
    what: String,
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}: {}", self.name, self.line, self.what)
    }
}

/// The settings.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Config {
    /// Sizes of machines.
    pub sizes: Sizes,
    /// Where the parts of a machine are, if not where they are installed.
    pub assets: Paths,
    /// What goes to the log.
    pub log_level: LevelFilter,
    /// The annotations of [`crate::annotations`] that have an effect.
    pub allowed_annotations: Vec<&'static str>,
    /// The directory with the programs that may be run in guests ([`crate::debug`]); without one, none may.
    pub debug_root: Option<PathBuf>,
    /// The keys that the text has set.
    given: Vec<&'static str>,
}

impl Default for Config {
    fn default() -> Self {
        Self {
            sizes: Sizes::default(),
            assets: Paths::default(),
            log_level: LevelFilter::INFO,
            allowed_annotations: Vec::new(),
            debug_root: None,
            given: Vec::new(),
        }
    }
}

/// A setting that is in effect.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Effective {
    /// Its section and name: `machine.vcpus`.
    pub key: String,
    /// Its value, in TOML.
    pub value: String,
    /// Where that comes from.
    pub origin: String,
}

impl Config {
    /// Reads it.
    ///
    /// # Errors
    /// [`ConfigError`].
    pub fn load(source: &Source) -> Result<Self, ConfigError> {
        let name = source.name();
        match source {
            Source::Text { text, .. } => Self::parse(&name, text),
            Source::File(path) => Self::parse(&name, &read(path)?),
            Source::Default => match read(Path::new(DEFAULT_PATH)) {
                Ok(text) => Self::parse(&name, &text),
                Err(ConfigError::Read { source, .. }) if source.kind() == io::ErrorKind::NotFound => {
                    Ok(Self::default())
                }
                Err(error) => Err(error),
            },
        }
    }

    fn parse(name: &str, text: &str) -> Result<Self, ConfigError> {
        let mut faults = Faults { name, text, found: Vec::new() };
        let mut config = Self::default();
        match DeTable::parse(text) {
            Ok(table) => config.take(table.get_ref(), &mut faults),
            Err(error) => {
                faults.add(error.span().map_or(0, |span| span.start), text::one_line(error.message(), 200));
            }
        }
        if faults.found.is_empty() {
            for what in config.contradictions() {
                faults.add(0, what);
            }
        }
        if faults.found.is_empty() {
            return Ok(config);
        }
        faults.found.sort_by_key(|fault| fault.line);
        Err(ConfigError::Faults { faults: faults.found })
    }

    fn take(&mut self, table: &DeTable<'_>, faults: &mut Faults<'_>) {
        for (section, value) in table {
            let (name, at) = (section.get_ref(), section.span().start);
            if !SETTINGS.iter().any(|setting| setting.section() == *name) {
                faults.add(at, unknown("section", name, SETTINGS.iter().map(Setting::section)));
                continue;
            }
            let DeValue::Table(entries) = value.get_ref() else {
                faults.add(at, format!("{name} is a section: write [{name}], and its settings below"));
                continue;
            };
            for (key, value) in entries {
                let in_section = SETTINGS.iter().filter(|setting| setting.section() == *name);
                match in_section.clone().find(|setting| setting.name() == *key.get_ref()) {
                    None => {
                        let known = in_section.map(Setting::name);
                        let what = format!("setting of [{name}]");
                        faults.add(key.span().start, unknown(&what, key.get_ref(), known));
                    }
                    Some(setting) => match (setting.set)(self, value.get_ref()) {
                        Ok(()) => self.given.push(setting.key),
                        Err(wanted) => {
                            faults.add(value.span().start, format!("{} must be {wanted}", setting.key));
                        }
                    },
                }
            }
        }
    }

    /// What is wrong although each setting is right.
    fn contradictions(&self) -> Vec<String> {
        let sizes = &self.sizes;
        let mut found = Vec::new();
        if sizes.memory_mib > sizes.max_memory_mib {
            found.push(format!(
                "machine.memory_mib {} is more than machine.max_memory_mib {}",
                sizes.memory_mib, sizes.max_memory_mib
            ));
        }
        if sizes.vcpus > sizes.max_vcpus {
            found.push(format!(
                "machine.vcpus {} is more than machine.max_vcpus {}",
                sizes.vcpus, sizes.max_vcpus
            ));
        }
        found
    }

    /// Every setting as it is in effect; `given` are paths that the caller was given otherwise.
    ///
    /// # Errors
    /// The path of this program is not known.
    pub fn effective(
        &self,
        source: &Source,
        given: &Paths,
    ) -> Result<Vec<Effective>, crate::assets::AssetError> {
        let file = source.name();
        let named = Named { given: given.clone(), configured: self.assets.clone() };
        SETTINGS.iter().map(|setting| self.one_effective(setting, &file, &named)).collect()
    }

    fn one_effective(
        &self,
        setting: &Setting,
        file: &str,
        named: &Named,
    ) -> Result<Effective, crate::assets::AssetError> {
        let (value, origin) = match setting.value {
            Value::Asset { kind, .. } => {
                let (path, origin) = named.path(kind)?;
                let origin = match origin {
                    Origin::Given => kind.option().to_owned(),
                    Origin::Variable => kind.variable().to_owned(),
                    Origin::Configuration => file.to_owned(),
                    Origin::Installed => "beside this program".to_owned(),
                };
                (format!("{:?}", path.display().to_string()), origin)
            }
            Value::Of(show) => {
                let is_given = self.given.contains(&setting.key);
                let origin = if is_given { file.to_owned() } else { "default".to_owned() };
                (show(self), origin)
            }
        };
        Ok(Effective { key: setting.key.to_owned(), value, origin })
    }
}

/// Collects what is wrong.
struct Faults<'a> {
    name: &'a str,
    text: &'a str,
    found: Vec<Fault>,
}

impl Faults<'_> {
    /// Adds one at an offset of the text.
    fn add(&mut self, at: usize, what: String) {
        let line = self.text.bytes().take(at).filter(|byte| *byte == b'\n').count() + 1;
        self.found.push(Fault { name: self.name.to_owned(), line, what });
    }
}

fn unknown(what: &str, name: &str, known: impl Iterator<Item = &'static str>) -> String {
    let mut known: Vec<&str> = known.collect();
    known.dedup();
    format!("there is no {what} {:?}: there are {}", text::one_line(name, 64), known.join(", "))
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let error = |source| ConfigError::Read { path: path.to_owned(), source };
    let untrusted = |problem| Err(ConfigError::Untrusted { path: path.to_owned(), problem });
    let not_text = |problem| ConfigError::NotText { path: path.to_owned(), problem };
    // O_NONBLOCK: opening a FIFO must not wait for a writer; it means nothing for the regular file we want.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK;
    let opened = rustix::fs::open(path, flags, Mode::empty());
    let file = File::from(opened.map_err(|e| error(e.into()))?);
    let metadata = file.metadata().map_err(error)?;
    if !metadata.is_file() {
        return Err(not_text("is not a regular file"));
    }
    if metadata.uid() != 0 {
        return untrusted("does not belong to root");
    }
    if metadata.mode() & 0o022 != 0 {
        return untrusted("can be written by others than root");
    }
    let mut bytes = Vec::new();
    file.take(MAX_TEXT + 1).read_to_end(&mut bytes).map_err(error)?;
    if bytes.len() as u64 > MAX_TEXT {
        return Err(not_text("is longer than 64 KiB"));
    }
    String::from_utf8(bytes).map_err(|_| not_text("is not UTF-8"))
}

#[cfg(test)]
mod tests;
