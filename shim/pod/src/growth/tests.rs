//! With a guest that is as large as it is asked to be, or is not.

use serde_json::json;

use super::*;
use crate::container::{Container, CreateError};
use crate::pod::machine;
use crate::pod::tests::{Extent, Program, SIZE, boot, guest_with, run};
use crate::stdio::Stdio;

const MIB: u64 = 1 << 20;

struct Machine {
    pod: Pod,
    extent: Arc<Mutex<Extent>>,
}

impl Machine {
    async fn boot() -> Self {
        let extent: Arc<Mutex<Extent>> = Arc::default();
        let pod = boot(guest_with(Program::Sleep, Arc::clone(&extent))).await.unwrap();
        Self { pod, extent }
    }

    fn extent(&self) -> Extent {
        *self.extent.lock().unwrap()
    }

    /// Waits until the guest has been asked for so much.
    async fn is_asked_for(&self, cpus: u32, plugged_mib: u32) {
        while (self.extent().cpus, self.extent().plugged_mib) != (cpus, plugged_mib) {
            tokio::task::yield_now().await;
        }
    }

    async fn create(&self, id: &str, resources: serde_json::Value) -> Result<Container, CreateError> {
        let spec = json!({"ociVersion": "1.2.0", "linux": {"resources": resources}});
        let spec: Spec = serde_json::from_value(spec).unwrap();
        self.pod.create(&id.parse().unwrap(), &spec, Stdio::default()).await
    }
}

fn limits(quota: i64, memory: u64) -> serde_json::Value {
    json!({"cpu": {"quota": quota, "period": 100_000}, "memory": {"limit": memory}})
}

async fn update(container: &Container, resources: serde_json::Value) -> Result<(), GrowthError> {
    container.process().update(&serde_json::from_value(resources).unwrap()).await
}

#[test]
fn machine_grows_before_a_container_is_made_and_shrinks_when_it_is_gone() {
    run(async {
        let machine = Machine::boot().await;
        let free = machine.create("c0", json!({})).await.unwrap();
        assert_eq!(machine.extent(), Extent::default());
        let first = machine.create("c1", limits(150_000, 200 * MIB)).await.unwrap();
        // 200 MiB, 6 of overhead for them, 64 for the guest.
        assert_eq!(
            machine.extent(),
            Extent { cpus: 2, plugged_mib: 270 - 128, devices: 1, ..Extent::default() }
        );
        let second = machine.create("c2", limits(150_000, 100 * MIB)).await.unwrap();
        // Three CPUs together, not two for each.
        assert_eq!(
            machine.extent(),
            Extent { cpus: 3, plugged_mib: 374 - 128, devices: 1, ..Extent::default() }
        );
        second.delete().await;
        machine.is_asked_for(2, 270 - 128).await;
        first.delete().await;
        free.delete().await;
        machine.is_asked_for(1, 0).await;
        assert_eq!(machine.extent().devices, 1);
    });
}

#[test]
fn containers_that_come_at_the_same_time_are_added_up() {
    run(async {
        let machine = Machine::boot().await;
        let create = |id| machine.create(id, limits(100_000, 100 * MIB));
        let (first, second, third) = tokio::join!(create("c1"), create("c2"), create("c3"));
        machine.is_asked_for(3, 374 - 128).await;
        drop(first.unwrap());
        // Dropped without a word, it asks for nothing any more, once the others change.
        second.unwrap().delete().await;
        machine.is_asked_for(1, 168 - 128).await;
        drop(third.unwrap());
    });
}

#[test]
fn update_changes_the_machine_as_well() {
    run(async {
        let machine = Machine::boot().await;
        let container = machine.create("c1", limits(100_000, 64 * MIB)).await.unwrap();
        assert_eq!(machine.extent().plugged_mib, 130 - 128);
        update(&container, json!({"memory": {"limit": 512 * MIB}})).await.unwrap();
        assert_eq!((machine.extent().cpus, machine.extent().plugged_mib), (0, 592 - 128));
        update(&container, json!({"cpu": {"quota": 400_000}})).await.unwrap();
        assert_eq!((machine.extent().cpus, machine.extent().plugged_mib), (4, 592 - 128));
        update(&container, limits(-1, 64 * MIB)).await.unwrap();
        machine.is_asked_for(1, 130 - 128).await;
        // What the guest refuses leaves the machine as it is.
        let refused = json!({"memory": {"limit": 512 * MIB}, "pids": {"limit": 5}});
        assert!(matches!(update(&container, refused).await, Err(GrowthError::Pod(_))));
        machine.is_asked_for(1, 130 - 128).await;
    });
}

#[test]
fn limits_that_there_is_no_room_for_change_nothing() {
    run(async {
        let machine = Machine::boot().await;
        let container = machine.create("c1", limits(300_000, 64 * MIB)).await.unwrap();
        let before = machine.extent();
        for (resources, word) in [
            (limits(100_001, 64 * MIB), "5 CPUs, and it can have 4"),
            (limits(100_000, 900 * MIB), "1058 MiB with its overhead, and it can have 1024 MiB"),
            (json!({"cpu": {"cpus": "2-4"}}), "5 CPUs, and it can have 4"),
        ] {
            let error = machine.create("c2", resources).await.unwrap_err();
            assert!(matches!(error, CreateError::Growth(GrowthError::Size(_))), "{error:?}");
            assert!(error.to_string().contains(word), "{error}");
        }
        let error = update(&container, limits(500_000, 64 * MIB)).await.unwrap_err();
        assert!(error.to_string().contains("5 CPUs, and it can have 4"), "{error}");
        assert_eq!(machine.extent(), before);
        // What was refused is not counted.
        machine.create("c2", limits(100_000, 64 * MIB)).await.unwrap();
    });
}

#[test]
fn guest_that_does_not_plug_is_not_waited_for() {
    run(async {
        let mut stubborn = Machine::boot().await;
        stubborn.pod.growth = Growth::with_patience(&machine(SIZE), Duration::from_millis(20));
        stubborn.extent.lock().unwrap().is_stubborn = true;
        let error = stubborn.create("c1", limits(200_000, 200 * MIB)).await.unwrap_err();
        let CreateError::Growth(GrowthError::NotPlugged { wanted_mib: 142, plugged_mib: 0, .. }) = error
        else {
            panic!("{error}")
        };
        // It is asked no more, and not for CPUs.
        stubborn.is_asked_for(0, 0).await;
        stubborn.create("c2", json!({})).await.unwrap();
    });
}
