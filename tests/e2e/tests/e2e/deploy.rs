//! kvrun on the nodes of a cluster (shim/deploy): what the chart has a kubelet do, done with containerd.

use std::collections::HashMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use gtmpl::{Func, FuncError, Template, Value as Templated};
use kvrun_e2e::containerd::{Containerd, SHIM};
use kvrun_e2e::cri::{Cri, script};
use kvrun_e2e::{Case, Outcome, Test, cases};
use serde_json::{Value, json};

pub(crate) const CASES: &[Case] =
    cases![versions_come_and_go_beside_pods_that_run, node_that_does_not_fit_is_left_as_it_was];

const VALUES: &str = include_str!("../../../../shim/deploy/chart/values.yaml");
const DAEMON_SET: &str = include_str!("../../../../shim/deploy/chart/templates/daemonset.yaml");
const RUNTIME_CLASS: &str = include_str!("../../../../shim/deploy/chart/templates/runtimeclass.yaml");

/// What the templates are given for a value.
fn templated(value: &Value) -> Templated {
    match value {
        Value::Object(map) => {
            Templated::Map(map.iter().map(|(key, value)| (key.clone(), templated(value))).collect())
        }
        Value::String(text) => Templated::String(text.clone()),
        other => Templated::String(other.to_string()),
    }
}

/// Helm's function: a string of YAML.
fn quote(arguments: &[Templated]) -> Result<Templated, FuncError> {
    let texts: Vec<_> = arguments.iter().map(|text| Value::from(text.to_string()).to_string()).collect();
    Ok(Templated::String(texts.join(" ")))
}

/// What Helm makes of a template.
fn render(template: &str, values: &Value) -> Result<Value> {
    let mut parsed = Template::default();
    parsed.add_func("quote", quote as Func);
    parsed.parse(template)?;
    let context: HashMap<_, _> = [
        ("Values".to_owned(), templated(values)),
        ("Release".to_owned(), templated(&json!({"Name": "kvrun", "Namespace": "kube-system"}))),
    ]
    .into();
    Ok(serde_saphyr::from_str(&parsed.render(&gtmpl::Context::from(Templated::Map(context)))?)?)
}

/// A node, and the chart for it.
struct Node<'t> {
    t: &'t Test,
    values: Value,
    /// Where kvrun is put.
    prefix: PathBuf,
    /// Is there once containerd was to be restarted.
    restart: PathBuf,
}

impl<'t> Node<'t> {
    /// Whose containerd has this configuration.
    fn new(t: &'t Test, config: &Path, image: &str) -> Result<Self> {
        let [prefix, restart] = ["kvrun", "restart"].map(|name| t.scratch().join(name));
        let mut values: Value = serde_saphyr::from_str(VALUES)?;
        values["image"] = image.into();
        values["prefix"] = json!(prefix);
        values["containerd"] = json!({"config": config, "restart": format!("touch {}", restart.display())});
        Ok(Self { t, values, prefix, restart })
    }

    /// Runs the container that the chart has for this mode, as one of runc; `version` in the place of what the image says it is.
    fn run(&self, containerd: &Containerd<'_>, mode: &str, version: Option<&str>) -> Result<Outcome> {
        let mut values = self.values.clone();
        values["mode"] = mode.into();
        let pod = &render(DAEMON_SET, &values)?["spec"]["template"]["spec"];
        let container = &pod["initContainers"][0];
        ensure!(container["securityContext"]["privileged"] == true, "{container}");
        let text =
            |value: &Value| value.as_str().map(str::to_owned).with_context(|| format!("no text: {value}"));
        let list = |value: &Value| value.as_array().cloned().unwrap_or_default();
        let mut args: Vec<String> =
            ["run", "--rm", "--runtime", "io.containerd.runc.v2", "--privileged"].map(str::to_owned).into();
        for variable in list(&container["env"]) {
            args.extend([
                "--env".to_owned(),
                format!("{}={}", text(&variable["name"])?, text(&variable["value"])?),
            ]);
        }
        for mount in list(&container["volumeMounts"]) {
            let volume = list(&pod["volumes"]).into_iter().find(|volume| volume["name"] == mount["name"]);
            let source = text(&volume.context("no volume")?["hostPath"]["path"])?;
            let destination = text(&mount["mountPath"])?;
            args.extend([
                "--mount".to_owned(),
                format!("type=bind,src={source},dst={destination},options=rbind:rw"),
            ]);
        }
        if let Some(version) = version {
            let file = self.t.scratch().join("version");
            fs::write(&file, version)?;
            let mount = format!("type=bind,src={},dst=/kvrun/version,options=bind:ro", file.display());
            args.extend(["--mount".to_owned(), mount]);
        }
        args.extend([text(&container["image"])?, format!("{}-node", self.t.id())]);
        for word in list(&container["command"]) {
            args.push(text(&word)?);
        }
        containerd.ctr(&args.iter().map(String::as_str).collect::<Vec<_>>())
    }

    /// Whether containerd was to be restarted since we asked last.
    fn restarted(&self) -> bool {
        fs::remove_file(&self.restart).is_ok()
    }

    /// The versions on it.
    fn versions(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for entry in fs::read_dir(&self.prefix)? {
            let entry = entry?;
            if entry.file_type()?.is_dir() {
                names.push(entry.file_name().to_string_lossy().into_owned());
            }
        }
        names.sort();
        Ok(names)
    }

    /// Those of which a shim runs.
    fn versions_in_use(&self) -> Result<Vec<String>> {
        let mut names = Vec::new();
        for (pid, _) in self.t.processes(SHIM)? {
            let program = fs::read_link(format!("/proc/{pid}/exe"))?;
            let version =
                program.strip_prefix(&self.prefix).with_context(|| program.display().to_string())?;
            names.push(version.iter().next().unwrap_or_default().to_string_lossy().into_owned());
        }
        names.sort();
        Ok(names)
    }
}

/// The image of this build, in containerd; its name and version.
fn import(containerd: &Containerd<'_>) -> Result<(String, String)> {
    let archive =
        std::env::var("KVRUN_IMAGE").context("KVRUN_IMAGE must name what shim/deploy/image made")?;
    containerd.ctr(&["image", "import", "--local", &archive])?.exited(0);
    let listed = containerd.ctr(&["image", "ls", "-q", "name~=localhost/kvrun"])?.exited(0);
    let names = String::from_utf8(listed.stdout)?;
    let (_, version) = names.trim().split_once(':').with_context(|| format!("no tag: {names}"))?;
    Ok((names.trim().to_owned(), version.to_owned()))
}

fn versions_come_and_go_beside_pods_that_run(t: &Test) -> Result<()> {
    let cri = Cri::new(t)?;
    let config = cri.containerd().config();
    let (image, first) = import(cri.containerd())?;
    let mut node = Node::new(t, &config, &image)?;
    let class = render(RUNTIME_CLASS, &node.values)?;
    ensure!(
        class["handler"] == "kvrun" && class["scheduling"]["nodeSelector"]["kvrun.io/node"] == "true",
        "{class}"
    );

    // A containerd that could not be restarted is restarted by the next try.
    let restart = std::mem::replace(&mut node.values["containerd"]["restart"], json!("false"));
    let failed = node.run(cri.containerd(), "install", None)?;
    ensure!(failed.stderr.contains("could not be restarted"), "{failed}");
    node.values["containerd"]["restart"] = restart;
    node.run(cri.containerd(), "install", None)?.exited(0);
    ensure!(node.versions()? == [first.as_str()] && node.restarted(), "{:?}", node.versions());
    cri.restart()?;
    let old = cri.run_pod(cri.pod_config("old"))?;
    let in_old = old.start(script("main", "sleep 1000"))?;
    ensure!(node.versions_in_use()? == [first.as_str()]);

    // Another version is for pods to come; containerd is left alone.
    node.run(cri.containerd(), "install", Some("second"))?.exited(0);
    ensure!(!node.restarted());
    let new = cri.run_pod(cri.pod_config("new"))?;
    let in_new = new.start(script("main", "sleep 1000"))?;
    ensure!(node.versions_in_use()? == [first.as_str(), "second"], "{:?}", node.versions_in_use());
    ensure!(old.sh(&in_old, "echo still")? == "still\n" && new.sh(&in_new, "echo new")? == "new\n");

    // What pods use stays, and so does what was in use until now; the rest goes.
    node.run(cri.containerd(), "install", Some("third"))?.exited(0);
    ensure!(node.versions()? == [first.as_str(), "second", "third"], "{:?}", node.versions());
    old.remove()?;
    node.run(cri.containerd(), "install", Some("fourth"))?.exited(0);
    ensure!(node.versions()? == ["fourth", "second", "third"], "{:?}", node.versions());

    let refused = node.run(cri.containerd(), "remove", None)?;
    ensure!(refused.stderr.contains("drain it first") && node.versions()?.len() == 3, "{refused}");
    new.remove()?;
    node.run(cri.containerd(), "remove", None)?.exited(0);
    ensure!(node.restarted() && !node.prefix.exists());
    // It comes up without us. It says that it has booted a moment before it serves, and cannot be ended in order in between.
    cri.restart()?;
    cri.containerd().ctr(&["version"])?.exited(0);
    cri.end()
}

fn node_that_does_not_fit_is_left_as_it_was(t: &Test) -> Result<()> {
    let containerd = Containerd::new(t)?;
    let (image, _) = import(&containerd)?;
    let config = t.scratch().join("config.toml");
    let node = Node::new(t, &config, &image)?;
    for (text, words) in [
        ("version = 2\n", "containerd config migrate"),
        ("version = 3\nimports = [\n  \"other.toml\",\n]\n", "to the imports of"),
    ] {
        fs::write(&config, text)?;
        let refused = node.run(&containerd, "install", None)?;
        ensure!(refused.stderr.contains(words), "{refused}");
        ensure!(fs::read_to_string(&config)? == text && !node.restarted(), "{text}");
        ensure!(!node.prefix.join("current").exists());
    }
    containerd.end()
}
