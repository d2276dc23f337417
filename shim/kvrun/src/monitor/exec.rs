//! What a further process in a container is to be.

use kvrun_pod::bundle::{self, Process};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::error::Error;

/// A program to run in a container.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) enum Program {
    /// An OCI `process`.
    Process(Box<Process>),
    /// The container's own `process`, with other arguments.
    Like(Box<Changes>),
}

/// How a process differs from the container's own.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Changes {
    /// What to run.
    pub(crate) args: Vec<String>,
    /// Whether it has a terminal.
    pub(crate) terminal: bool,
    /// Another working directory.
    pub(crate) cwd: Option<String>,
    /// Variables to set.
    pub(crate) env: Vec<String>,
    /// Another user.
    pub(crate) uid: Option<u32>,
    /// Another group.
    pub(crate) gid: Option<u32>,
    /// More groups.
    pub(crate) additional_gids: Vec<u32>,
    /// More capabilities.
    pub(crate) capabilities: Vec<String>,
    /// No privileges by exec.
    pub(crate) no_new_privs: bool,
}

impl Program {
    /// The OCI `process` for it in a container whose own is `base`, checked.
    pub(crate) fn resolve(self, base: &Process) -> Result<Process, Error> {
        let process = match self {
            Self::Process(process) => *process,
            Self::Like(changes) => changes.apply(base)?,
        };
        bundle::check_process(&process).map_err(|fault| Error::Option(fault.to_string()))?;
        Ok(process)
    }
}

impl Changes {
    /// By runc's rules: a variable replaces the one of its name, a capability is added to the sets that make it effective.
    fn apply(self, base: &Process) -> Result<Process, Error> {
        let senseless = |e: serde_json::Error| Error::Option(format!("the process to run: {e}"));
        let mut process = serde_json::to_value(base).map_err(senseless)?;
        process["args"] = json!(self.args);
        process["terminal"] = json!(self.terminal);
        if let Some(fields) = process.as_object_mut() {
            // The size is that of the container's own terminal.
            fields.remove("consoleSize");
        }
        if let Some(cwd) = self.cwd {
            process["cwd"] = json!(cwd);
        }
        let name = |variable: &str| variable.split('=').next().unwrap_or_default().to_owned();
        let mut env: Vec<String> = base.env().clone().unwrap_or_default();
        for variable in self.env {
            env.retain(|other| name(other) != name(&variable));
            env.push(variable);
        }
        process["env"] = json!(env);
        let user = &mut process["user"];
        if let Some(uid) = self.uid {
            user["uid"] = json!(uid);
            // Without a group it is 0, and the groups of another user are not this one's.
            user["gid"] = json!(self.gid.unwrap_or(0));
            user["additionalGids"] = json!([]);
        }
        if let Value::Object(user) = user {
            let gids = user.entry("additionalGids").or_insert_with(|| json!([]));
            if let Value::Array(gids) = gids {
                gids.extend(self.additional_gids.into_iter().map(Value::from));
            }
        }
        if !self.capabilities.is_empty() {
            let sets = &mut process["capabilities"];
            if sets.is_null() {
                *sets = json!({});
            }
            for set in ["bounding", "effective", "permitted"] {
                let set = &mut sets[set];
                if set.is_null() {
                    *set = json!([]);
                }
                if let Value::Array(set) = set {
                    set.extend(
                        self.capabilities
                            .iter()
                            .filter(|c| !set.contains(&json!(c)))
                            .map(|c| json!(c))
                            .collect::<Vec<_>>(),
                    );
                }
            }
        }
        if self.no_new_privs {
            process["noNewPrivileges"] = json!(true);
        }
        serde_json::from_value(process).map_err(senseless)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base() -> Process {
        serde_json::from_value(json!({
            "terminal": true, "consoleSize": {"height": 1, "width": 2}, "cwd": "/work",
            "user": {"uid": 5, "gid": 6, "additionalGids": [7]}, "args": ["init"], "env": ["A=1", "B=2"],
            "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
        }))
        .unwrap()
    }

    fn resolve(changes: Changes) -> Value {
        serde_json::to_value(Program::Like(Box::new(changes)).resolve(&base()).unwrap()).unwrap()
    }

    #[test]
    fn process_is_like_the_containers_own_but_for_what_is_given() {
        let process =
            resolve(Changes { args: vec!["ls".into()], env: vec!["A=9".into()], ..Changes::default() });
        assert_eq!(process["args"], json!(["ls"]));
        assert_eq!(process["env"], json!(["B=2", "A=9"]));
        assert_eq!(process["cwd"], "/work");
        assert_eq!(process["user"]["uid"], 5);
        assert_eq!(process["user"]["additionalGids"], json!([7]));
        assert!(process.get("consoleSize").is_none() && process["terminal"] != json!(true), "{process}");
    }

    #[test]
    fn another_user_has_not_the_groups_of_the_first() {
        let process = resolve(Changes {
            args: vec!["id".into()],
            uid: Some(1000),
            additional_gids: vec![42],
            capabilities: vec!["CAP_CHOWN".into(), "CAP_KILL".into()],
            no_new_privs: true,
            ..Changes::default()
        });
        assert_eq!((&process["user"]["uid"], &process["user"]["gid"]), (&json!(1000), &json!(0)));
        assert_eq!(process["user"]["additionalGids"], json!([42]));
        assert_eq!(process["capabilities"]["effective"].as_array().unwrap().len(), 2);
        assert_eq!(process["noNewPrivileges"], true);
    }

    #[test]
    fn what_cannot_be_a_process_is_refused_by_name() {
        for (changes, word) in [
            (Changes { args: vec![], ..Changes::default() }, "process.args"),
            (Changes { args: vec!["a".into()], cwd: Some("b".into()), ..Changes::default() }, "process.cwd"),
            (Changes { args: vec!["a".into()], env: vec!["b".into()], ..Changes::default() }, "process.env"),
            (
                Changes { args: vec!["a".into()], capabilities: vec!["CAP_NO".into()], ..Changes::default() },
                "CAP_NO",
            ),
        ] {
            let error = Program::Like(Box::new(changes)).resolve(&base()).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
