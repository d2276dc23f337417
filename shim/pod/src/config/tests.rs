use std::fs;
use std::os::unix::fs::PermissionsExt;

use super::*;

fn parse(text: &str) -> Result<Config, ConfigError> {
    Config::parse("f", text)
}

fn faults(text: &str) -> Vec<String> {
    match parse(text).unwrap_err() {
        ConfigError::Faults { faults } => faults.iter().map(ToString::to_string).collect(),
        other => panic!("{other}"),
    }
}

#[test]
fn default_file_says_what_is_the_case_without_one() {
    let text = default_file();
    let config = parse(&text).unwrap();
    assert_eq!(Config { given: Vec::new(), ..config.clone() }, Config::default());
    // All but those that have an example only; and these can be taken as they are, too.
    assert_eq!(config.given.len(), SETTINGS.len() - 3);
    let examples: String = text
        .lines()
        .map(|line| {
            let line =
                line.strip_prefix('#').filter(|rest| rest.starts_with(char::is_alphabetic)).unwrap_or(line);
            format!("{line}\n")
        })
        .collect();
    let config = parse(&examples).unwrap();
    assert_eq!(config.given.len(), SETTINGS.len());
    assert_eq!(config.assets.kernel.as_deref(), Some(Path::new("/usr/local/share/kvrun/vmlinux")));
    assert!(text.lines().all(|line| line.chars().count() <= 120), "{text}");
}

#[test]
fn settings_have_the_values_of_the_text() {
    let config = parse(
        "[machine]\nmemory_mib = 0x100\nmax_vcpus = 4\n[log]\nlevel = \"debug\"\n[annotations]\nallowed = [\"io.kvrun.vcpus\"]\n[assets]\nvmm = \"/v\"\n[debug]\nroot = \"/d\"",
    )
    .unwrap();
    assert_eq!((config.sizes.memory_mib, config.sizes.max_vcpus, config.sizes.vcpus), (256, 4, 1));
    assert_eq!(config.log_level, LevelFilter::DEBUG);
    assert_eq!(config.allowed_annotations, ["io.kvrun.vcpus"]);
    let effective = config
        .effective(&Source::File("/f".into()), &Paths { kernel: Some("/k".into()), ..Paths::default() });
    let lines: Vec<String> =
        effective.unwrap().into_iter().map(|e| format!("{} = {} # {}", e.key, e.value, e.origin)).collect();
    for line in [
        "machine.memory_mib = 256 # /f",
        "machine.vcpus = 1 # default",
        "assets.kernel = \"/k\" # --kernel",
        "assets.vmm = \"/v\" # /f",
        "log.level = \"debug\" # /f",
        "annotations.allowed = [\"io.kvrun.vcpus\"] # /f",
        "debug.root = \"/d\" # /f",
    ] {
        assert!(lines.iter().any(|other| other == line), "{line}: {lines:?}");
    }
    assert!(
        lines
            .iter()
            .any(|line| line.starts_with("assets.initramfs = ") && line.ends_with("# beside this program"))
    );
}

#[test]
fn every_fault_is_named_with_its_line() {
    assert_eq!(
        faults("[machine]\nmemory = 5\nvcpus = 0\n\n[machines]\nx = 1\n[log]\nlevel = 3\n"),
        [
            "f:2: there is no setting of [machine] \"memory\": there are memory_mib, max_memory_mib, vcpus, max_vcpus",
            "f:3: machine.vcpus must be a number from 1 to 32",
            "f:5: there is no section \"machines\": there are machine, assets, log, annotations, debug",
            "f:8: log.level must be \"error\", \"warn\", \"info\" or \"debug\"",
        ]
    );
    for (text, words) in [
        ("machine = 1", "f:1: machine is a section"),
        ("vcpus = 1", "f:1: there is no section \"vcpus\""),
        ("[machine]\nvcpus = \"1\"", "f:2: machine.vcpus must be a number"),
        ("[machine]\nmemory_mib = 1_000_000_000_000", "f:2: machine.memory_mib must be an even number"),
        ("[machine]\nmemory_mib = 64", "from 128 to 1048576"),
        ("[machine]\nmax_memory_mib = 601", "an even number"),
        ("[assets]\nvmm = \"vmm\"", "f:2: assets.vmm must be an absolute path"),
        ("[annotations]\nallowed = [\"io.kvrun.kernel\"]", "f:2: annotations.allowed must be a list"),
        ("[annotations]\nallowed = \"io.kvrun.vcpus\"", "f:2: annotations.allowed must be a list"),
        ("[machine]\nvcpus = 1\nvcpus = 2", "f:3: "),
        ("[machine]\nvcpus 1", "f:2: "),
        ("[machine]\nmax_memory_mib = 256", "machine.memory_mib 512 is more than machine.max_memory_mib 256"),
        ("[machine]\nvcpus = 3\nmax_vcpus = 2", "machine.vcpus 3 is more than machine.max_vcpus 2"),
    ] {
        let found = faults(text);
        assert!(found.len() == 1 && found[0].contains(words), "{text:?}: {found:?}");
        assert_eq!(found[0].lines().count(), 1);
    }
    let error = parse("a = 1\nb = 2").unwrap_err().to_string();
    assert!(
        error.starts_with("f:1: ") && error.ends_with("(and 1 more: see `kvrun config check`)"),
        "{error}"
    );
}

#[test]
fn file_that_others_may_write_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("config.toml");
    let load = || Config::load(&Source::File(path.clone()));
    assert!(matches!(load(), Err(ConfigError::Read { .. })));
    fs::write(&path, "[machine]\nvcpus = 2\n").unwrap();
    let as_root = rustix::process::geteuid().is_root();
    for (mode, accepted) in [(0o644, true), (0o600, true), (0o664, false), (0o646, false)] {
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        match load() {
            Ok(config) => assert!(accepted && as_root && config.sizes.vcpus == 2, "{mode:o}"),
            Err(ConfigError::Untrusted { .. }) => assert!(!accepted || !as_root, "{mode:o}"),
            Err(other) => panic!("{other}"),
        }
    }
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    if as_root {
        std::os::unix::fs::chown(&path, Some(1), None).unwrap();
        assert!(matches!(load(), Err(ConfigError::Untrusted { problem: "does not belong to root", .. })));
        std::os::unix::fs::chown(&path, Some(0), None).unwrap();
        fs::write(&path, "#".repeat(65 * 1024)).unwrap();
        assert!(matches!(load(), Err(ConfigError::NotText { problem: "is longer than 64 KiB", .. })));
        fs::write(&path, [0xff]).unwrap();
        assert!(matches!(load(), Err(ConfigError::NotText { problem: "is not UTF-8", .. })));
    }
    assert!(matches!(Config::load(&Source::File(dir.path().into())), Err(ConfigError::NotText { .. })));
}
