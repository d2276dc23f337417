//! The table of all settings.

use std::fmt::Write;
use std::path::{Path, PathBuf};

use kvrun_vmm_api::config::{MAX_MEMORY_MIB, MAX_VCPUS, MEM_BLOCK_MIB};
use toml::de::DeValue;
use tracing::level_filters::LevelFilter;

use super::Config;
use crate::annotations;
use crate::assets::Kind;
use crate::size::MIN_MEMORY_MIB;

/// A setting.
pub(super) struct Setting {
    /// Section and name, joined by a dot.
    pub(super) key: &'static str,
    /// What it means, and why its default is what it is: lines of a comment.
    doc: &'static [&'static str],
    /// Takes a value; the error completes "must be".
    pub(super) set: fn(&mut Config, &DeValue<'_>) -> Result<(), String>,
    pub(super) value: Value,
}

/// What a setting is, in TOML.
#[derive(Clone, Copy)]
pub(super) enum Value {
    /// What the configuration has.
    Of(fn(&Config) -> String),
    /// The path of a file, which other things than the configuration may say, and an example of one, as there is no default.
    Asset {
        /// Which file.
        kind: Kind,
        /// In TOML.
        example: &'static str,
    },
}

impl Setting {
    /// The part of the file that it is in.
    pub(super) fn section(&self) -> &'static str {
        self.key.split_once('.').map_or(self.key, |(section, _)| section)
    }

    /// What it is called there.
    pub(super) fn name(&self) -> &'static str {
        self.key.split_once('.').map_or("", |(_, name)| name)
    }
}

/// The levels of the log by name.
const LEVELS: [(&str, LevelFilter); 4] = [
    ("error", LevelFilter::ERROR),
    ("warn", LevelFilter::WARN),
    ("info", LevelFilter::INFO),
    ("debug", LevelFilter::DEBUG),
];

/// All settings, those of a section in a row.
pub(super) const SETTINGS: &[Setting] = &[
    Setting {
        key: "machine.memory_mib",
        doc: &[
            "Memory in MiB of a machine whose containers have no memory limit, an even number; with limits, they count, and",
            "what the guest needs beside them. 512: the least that common server software starts in. The host gives what is",
            "touched.",
        ],
        set: |config, value| {
            config.sizes.memory_mib = memory(value)?;
            Ok(())
        },
        value: Value::Of(|config| config.sizes.memory_mib.to_string()),
    },
    Setting {
        key: "machine.max_memory_mib",
        doc: &[
            "The most memory in MiB that limits or annotations may ask for, also while the machine runs, an even number; more",
            "is refused. The default is the most a machine can have: what pods may ask for is bounded elsewhere already, in",
            "Kubernetes by quotas.",
        ],
        set: |config, value| {
            config.sizes.max_memory_mib = memory(value)?;
            Ok(())
        },
        value: Value::Of(|config| config.sizes.max_memory_mib.to_string()),
    },
    Setting {
        key: "machine.vcpus",
        doc: &[
            "vCPUs of a machine whose containers have no CPU quota. One starts fastest and costs the host least.",
        ],
        set: |config, value| {
            config.sizes.vcpus = cpus(value)?;
            Ok(())
        },
        value: Value::Of(|config| config.sizes.vcpus.to_string()),
    },
    Setting {
        key: "machine.max_vcpus",
        doc: &[
            "The most vCPUs that quotas or annotations may ask for. The default is what a machine can have.",
        ],
        set: |config, value| {
            config.sizes.max_vcpus = cpus(value)?;
            Ok(())
        },
        value: Value::Of(|config| config.sizes.max_vcpus.to_string()),
    },
    Setting {
        key: "assets.kernel",
        doc: &[
            "The guest kernel, an uncompressed ELF vmlinux. By default it is where `make install` puts it, so that program,",
            "kernel and initramfs are of one version. The option --kernel and the variable KVRUN_KERNEL come first.",
        ],
        set: |config, value| {
            config.assets.kernel = Some(path(value)?);
            Ok(())
        },
        value: Value::Asset { kind: Kind::Kernel, example: "\"/usr/local/share/kvrun/vmlinux\"" },
    },
    Setting {
        key: "assets.initramfs",
        doc: &["The initramfs with the agent, an uncompressed cpio archive. As above."],
        set: |config, value| {
            config.assets.initramfs = Some(path(value)?);
            Ok(())
        },
        value: Value::Asset { kind: Kind::Initramfs, example: "\"/usr/local/share/kvrun/initramfs.cpio\"" },
    },
    Setting {
        key: "assets.vmm",
        doc: &["The program kvrun-vmm. As above."],
        set: |config, value| {
            config.assets.vmm = Some(path(value)?);
            Ok(())
        },
        value: Value::Asset { kind: Kind::Vmm, example: "\"/usr/local/libexec/kvrun/kvrun-vmm\"" },
    },
    Setting {
        key: "log.level",
        doc: &[
            "What goes to containerd's log, or to the file of --log: error, warn, info or debug. info is a line when a",
            "container is created, started, ended and deleted. `debug` of containerd and --debug of kvrun come first.",
        ],
        set: |config, value| {
            let name = if let DeValue::String(name) = value { name.as_ref() } else { "" };
            let level = LEVELS.into_iter().find(|(level, _)| *level == name);
            config.log_level = level.ok_or("\"error\", \"warn\", \"info\" or \"debug\"")?.1;
            Ok(())
        },
        value: Value::Of(|config| {
            let level = LEVELS.into_iter().find(|(_, level)| *level == config.log_level);
            format!("{:?}", level.map_or("", |(name, _)| name))
        }),
    },
    Setting {
        key: "annotations.allowed",
        doc: &[
            "Annotations of pods and bundles that have an effect: \"io.kvrun.memory_mib\" and \"io.kvrun.vcpus\" say the size",
            "with which the machine starts, up to the most above. None by default, because whoever may create a pod writes",
            "them. One that begins with io.kvrun. and is not allowed is refused.",
        ],
        set: |config, value| {
            config.allowed_annotations = allowed(value)?;
            Ok(())
        },
        value: Value::Of(|config| format!("{:?}", config.allowed_annotations)),
    },
    Setting {
        key: "debug.root",
        doc: &[
            "A directory with the programs that `kvrun debug` may run in the guests of machines made from now on: their root",
            "file system, with bin/sh, for example. They may do anything in the guest, and the guest can read the directory.",
            "\"\", the default: none may be run.",
        ],
        set: |config, value| {
            let is_off = matches!(value, DeValue::String(text) if text.is_empty());
            config.debug_root = if is_off { None } else { Some(path(value)?) };
            Ok(())
        },
        value: Value::Of(|config| format!("{:?}", config.debug_root.as_deref().unwrap_or(Path::new("")))),
    },
];

/// The file that says what is the case without one.
pub fn default_file() -> String {
    let mut text = String::from(
        "# The configuration of kvrun and of its containerd shim, /etc/kvrun/config.toml. All that it says here is the\n\
         # default. It must belong to root, and nobody else may be able to write it. `kvrun config check` finds mistakes.\n",
    );
    let (config, mut section) = (Config::default(), "");
    for setting in SETTINGS {
        if setting.section() != section {
            section = setting.section();
            // Writing to a string does not fail.
            let _ = writeln!(text, "\n[{section}]");
        } else {
            text.push('\n');
        }
        for line in setting.doc {
            let _ = writeln!(text, "# {line}");
        }
        let name = setting.name();
        let _ = match setting.value {
            Value::Asset { example, .. } => writeln!(text, "#{name} = {example}"),
            Value::Of(show) => writeln!(text, "{name} = {}", show(&config)),
        };
    }
    text
}

fn number(value: &DeValue<'_>, min: u32, max: u32) -> Result<u32, String> {
    let number = match value {
        DeValue::Integer(number) => u32::from_str_radix(number.as_str(), number.radix()).ok(),
        _ => None,
    };
    number.filter(|number| (min..=max).contains(number)).ok_or(format!("a number from {min} to {max}"))
}

/// Of whole blocks ([`MEM_BLOCK_MIB`]).
fn memory(value: &DeValue<'_>) -> Result<u32, String> {
    let number = number(value, MIN_MEMORY_MIB, MAX_MEMORY_MIB);
    let even = number.ok().filter(|mib| mib.is_multiple_of(MEM_BLOCK_MIB));
    even.ok_or(format!("an even number from {MIN_MEMORY_MIB} to {MAX_MEMORY_MIB}"))
}

fn cpus(value: &DeValue<'_>) -> Result<u8, String> {
    let number = number(value, 1, MAX_VCPUS.into())?;
    u8::try_from(number).map_err(|e| e.to_string())
}

fn path(value: &DeValue<'_>) -> Result<PathBuf, String> {
    match value {
        DeValue::String(path) if path.starts_with('/') && !path.contains('\0') => Ok(path.as_ref().into()),
        _ => Err("an absolute path, in quotes".to_owned()),
    }
}

fn allowed(value: &DeValue<'_>) -> Result<Vec<&'static str>, String> {
    let wanted = || format!("a list of names, of which there are {:?}", annotations::KNOWN);
    let DeValue::Array(names) = value else { return Err(wanted()) };
    let known = |name: &DeValue<'_>| match name {
        DeValue::String(name) => annotations::KNOWN.into_iter().find(|known| known == name),
        _ => None,
    };
    names.iter().map(|name| known(name.get_ref()).ok_or_else(wanted)).collect()
}
