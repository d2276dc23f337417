//! The machine as a pod's own container ([`kvrun_pod::sandbox`]): what ends where no process does, and makes way for one that is needed.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kvrun_pod::bundle::Spec;
use kvrun_pod::container::{Exit, ExitState, VmDeath};
use kvrun_pod::pod::Pod as Vm;
use kvrun_pod::sandbox;
use tokio::sync::oneshot;

use crate::events::Events;
use crate::task::Task;

/// A machine that stands for a container, or has done so.
#[derive(Debug)]
pub(crate) struct StandIn {
    /// Of the process, if it is needed.
    pub(crate) spec: Spec,
    /// Held while the process is made.
    pub(crate) making: tokio::sync::Mutex<()>,
    end: Mutex<Option<oneshot::Sender<ExitState>>>,
}

impl StandIn {
    /// Stands for the container of this task and spec, until it is ended, gives way, or the machine dies. Must be called in a tokio runtime.
    pub(crate) fn start(vm: &Vm, task: &Arc<Task>, events: Events, spec: &Spec) -> Self {
        let (end, ended) = oneshot::channel();
        let (vm, task) = (vm.clone(), Arc::clone(task));
        tokio::spawn(async move {
            let state = tokio::select! {
                biased;
                ended = ended => match ended {
                    Ok(state) => state,
                    // It gave way.
                    Err(_) => return,
                },
                death = vm.ended() => ExitState::VmDied(VmDeath::Died(death)),
            };
            // Its start is told first, by whoever holds this; and a process that takes over tells its end.
            let _changing = task.changing.lock().await;
            if task.process().is_err() {
                task.has_ended(&Exit { state, oom_killed: false }, &events);
            }
        });
        Self {
            spec: sandbox::in_guests_namespaces(spec),
            making: tokio::sync::Mutex::default(),
            end: Mutex::new(Some(end)),
        }
    }

    fn end(&self) -> MutexGuard<'_, Option<oneshot::Sender<ExitState>>> {
        self.end.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether the machine stands for it: it has not ended, and no process has taken over.
    pub(crate) fn stands(&self) -> bool {
        self.end().as_ref().is_some_and(|end| !end.is_closed())
    }

    /// Takes a signal as the process would; false if the machine does not stand for it any more.
    pub(crate) fn signal(&self, signal: i32) -> bool {
        match sandbox::end_by(signal) {
            Some(state) => self.end().take().is_some_and(|end| end.send(state).is_ok()),
            None => self.stands(),
        }
    }

    /// Makes way for the process; false if it has ended.
    pub(crate) fn give_way(&self) -> bool {
        self.end().take().is_some_and(|end| !end.is_closed())
    }
}
