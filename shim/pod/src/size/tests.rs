use super::demand::MILLION;
use super::*;

fn vcpus(quota: Option<i64>, period: Option<u64>) -> Result<u8, SizeError> {
    Sizes::default().vcpus_for(quota, period)
}

fn memory_mib(limit: Option<i64>) -> Result<u32, SizeError> {
    Sizes::default().memory_for(limit, 0)
}

fn with_annotations(annotations: &[(&str, &str)]) -> Spec {
    let mut spec = Spec::default();
    let all = annotations.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    spec.set_annotations(Some(all.collect()));
    spec
}

#[test]
fn quota_is_rounded_up_to_whole_cpus() {
    assert_eq!(vcpus(None, None), Ok(1));
    assert_eq!(vcpus(Some(-1), Some(100_000)), Ok(1));
    assert_eq!(vcpus(Some(1), Some(100_000)), Ok(1));
    assert_eq!(vcpus(Some(150_000), None), Ok(2));
    assert_eq!(vcpus(Some(200_000), Some(100_000)), Ok(2));
    assert_eq!(vcpus(Some(3_200_000), Some(100_000)), Ok(32));
}

#[test]
fn every_cpu_of_a_list_is_there() {
    let up_to_last = |list| up_to_last(list, MAX_VCPUS);
    assert_eq!((up_to_last(""), up_to_last("0"), up_to_last("3,1-2")), (Ok(0), Ok(1), Ok(4)));
    for bad in ["32", "a", "2-1", "1,,2", "-1", "0-"] {
        let refused = SizeError::Cpus { list: bad.to_owned(), max: MAX_VCPUS };
        assert_eq!(up_to_last(bad), Err(refused), "{bad}");
    }
}

#[test]
fn impossible_cpus_are_refused() {
    assert!(matches!(vcpus(Some(3_200_001), Some(100_000)), Err(SizeError::Vcpus { cpus: 33, .. })));
    assert!(matches!(vcpus(Some(i64::MAX), Some(1)), Err(SizeError::Vcpus { .. })));
    assert_eq!(vcpus(Some(1), Some(0)), Err(SizeError::Period));
}

#[test]
fn size_of_a_pod_is_what_its_containers_come_to() {
    let size = |annotations: &[_]| VmSize::for_spec(&with_annotations(annotations), &Sizes::default());
    let all = [(POD_QUOTA, "150000"), (POD_PERIOD, "100000"), (POD_MEMORY, "536870912")];
    let pod = size(&all).unwrap();
    assert_eq!((pod.vcpus.boot, pod.memory_mib), (2, 592));
    // What containerd says of a pod without limits.
    let unlimited = size(&[(POD_QUOTA, "0"), (POD_PERIOD, "0"), (POD_MEMORY, "0")]);
    assert_eq!(unlimited, size(&[]));
    for name in [POD_QUOTA, POD_MEMORY] {
        let error = size(&[(name, "much")]).unwrap_err();
        assert!(error.to_string().contains(name), "{error}");
    }
}

#[test]
fn memory_limit_gets_the_guests_own_need_on_top() {
    assert_eq!(memory_mib(None), Ok(512));
    assert_eq!(memory_mib(Some(-1)), Ok(512));
    assert_eq!(memory_mib(Some(1)), Ok(128));
    assert_eq!(memory_mib(Some(64 << 20)), Ok(130));
    assert_eq!(memory_mib(Some(512 << 20)), Ok(592));
    assert!(matches!(memory_mib(Some(i64::MAX)), Err(SizeError::Memory { .. })));
    assert!(matches!(memory_mib(Some(1 << 40)), Err(SizeError::Memory { .. })));
}

#[test]
fn configuration_has_the_defaults_and_the_most() {
    let sizes = Sizes { memory_mib: 256, max_memory_mib: 600, vcpus: 2, max_vcpus: 4 };
    assert_eq!((sizes.memory_for(None, 0), sizes.vcpus_for(None, None)), (Ok(256), Ok(2)));
    assert_eq!(sizes.memory_for(Some(512 << 20), 0), Ok(592));
    assert_eq!(sizes.memory_for(Some(1 << 30), 0), Err(SizeError::Memory { limit: 1 << 30, max: 600 }));
    assert!(matches!(sizes.vcpus_for(Some(500_000), None), Err(SizeError::Vcpus { cpus: 5, max: 4, .. })));
    assert_eq!(up_to_last("4", 4), Err(SizeError::Cpus { list: "4".into(), max: 4 }));
}

#[test]
fn annotations_of_our_own_say_the_size_within_its_bounds() {
    let sizes = Sizes { max_memory_mib: 1000, max_vcpus: 4, ..Sizes::default() };
    let size = |memory, vcpus| {
        let all = [(annotations::MEMORY_MIB, memory), (annotations::VCPUS, vcpus), (POD_MEMORY, "536870912")];
        VmSize::for_spec(&with_annotations(&all), &sizes)
    };
    let asked = size("201", "3").unwrap();
    assert_eq!((asked.memory_mib, asked.vcpus), (202, VcpuConfig { boot: 3, max: 4 }));
    for (memory, vcpus) in [("127", "1"), ("1001", "1"), ("-1", "1"), ("128", "0"), ("128", "5"), ("1G", "1")]
    {
        let error = size(memory, vcpus).unwrap_err();
        assert!(matches!(error, SizeError::Asked { .. }), "{memory} {vcpus}: {error}");
    }
}

/// One that starts with 1 vCPU and 512 MiB.
const SMALL: VmSize = VmSize { vcpus: VcpuConfig { boot: 1, max: 4 }, memory_mib: 512, max_memory_mib: 2048 };

fn demand(json: &str) -> Demand {
    Demand::default().updated(&serde_json::from_str(json).unwrap()).unwrap()
}

#[test]
fn room_is_no_less_than_there_is_at_the_start() {
    let room = |vcpus, memory_mib| VmSize::with_room(vcpus, memory_mib, &Sizes::default());
    let size = room(1, 512);
    assert_eq!((size.vcpus, size.memory_mib), (VcpuConfig { boot: 1, max: ROOM_VCPUS }, 512));
    assert_eq!(size.max_memory_mib % MEM_BLOCK_MIB, 0);
    assert!((512..=MAX_MEMORY_MIB).contains(&size.max_memory_mib));
    let size = room(ROOM_VCPUS + 1, MAX_MEMORY_MIB);
    assert_eq!((size.vcpus.max, size.max_memory_mib), (ROOM_VCPUS + 1, MAX_MEMORY_MIB));
    let sizes = Sizes { max_memory_mib: 600, max_vcpus: 2, ..Sizes::default() };
    let size = VmSize::with_room(1, 512, &sizes);
    assert_eq!(size.vcpus, VcpuConfig { boot: 1, max: 2 });
    assert!(size.max_memory_mib <= 600, "{size:?}");
}

#[test]
fn demands_are_added_up_before_they_are_rounded() {
    let total = |demands: &[&str]| {
        let all: Vec<Demand> = demands.iter().map(|json| demand(json)).collect();
        SMALL.total(&all).map(|total| (total.vcpus, total.memory_mib))
    };
    let half = r#"{"cpu":{"quota":50000},"memory":{"limit":104857600}}"#;
    let third = r#"{"cpu":{"quota":50000,"period":150000}}"#;
    assert_eq!(total(&[]), Ok((1, 512)));
    assert_eq!(total(&["{}", r#"{"cpu":{"quota":-1},"memory":{"limit":-1}}"#]), Ok((1, 512)));
    assert_eq!(total(&[half, half]), Ok((1, 512)));
    assert_eq!(total(&[half, half, half]), Ok((2, 512)));
    assert_eq!(total(&[third, third, third]), Ok((1, 512)));
    assert_eq!(total(&[half, half, half, half, half]), Ok((3, 500 + 15 + 64 + 1)));
    assert_eq!(total(&[half, r#"{"cpu":{"cpus":"0,3"}}"#]), Ok((4, 512)));
    assert_eq!(
        total(&[r#"{"cpu":{"quota":9223372036854775807,"period":1}}"#, half]),
        Err(SizeError::RoomVcpus { cpus: u64::MAX.div_ceil(MILLION), most: 4 })
    );
    let huge = r#"{"memory":{"limit":9223372036854775807}}"#;
    assert!(matches!(total(&[huge, huge, huge]), Err(SizeError::RoomMemory { most_mib: 2048, .. })));
}

#[test]
fn total_of_what_the_machine_was_made_for_is_its_size_at_the_start() {
    for (quota, limit) in [(1, 1), (150_000, 64 << 20), (400_000, 512 << 20)] {
        let json = format!(r#"{{"cpu":{{"quota":{quota}}},"memory":{{"limit":{limit}}}}}"#);
        let mut spec = Spec::default();
        let linux = format!(r#"{{"resources":{json}}}"#);
        spec.set_linux(Some(serde_json::from_str(&linux).unwrap()));
        let size = VmSize::for_spec(&spec, &Sizes::default()).unwrap();
        assert_eq!(Demand::of(&spec), Ok(demand(&json)));
        assert_eq!(size.total([&demand(&json)]), Ok(size.at_start()));
    }
}

#[test]
fn huge_pages_come_on_top() {
    let of = |json: &str| {
        let mut spec = Spec::default();
        spec.set_linux(Some(serde_json::from_str(&format!(r#"{{"resources":{json}}}"#)).unwrap()));
        VmSize::for_spec(&spec, &Sizes::default()).unwrap().memory_mib
    };
    let huge = r#""hugepageLimits":[{"pageSize":"2MB","limit":268435456},{"pageSize":"1GB","limit":0}]"#;
    assert_eq!(
        of(&format!(r#"{{"memory":{{"limit":268435456}},{huge}}}"#)),
        of(r#"{"memory":{"limit":536870912}}"#)
    );
    // Without a limit of memory, in what there is by default, as far as they fit.
    assert_eq!(of(&format!("{{{huge}}}")), 512);
    assert_eq!(
        of(r#"{"hugepageLimits":[{"pageSize":"2MB","limit":1073741824}]}"#),
        of(r#"{"memory":{"limit":1073741824}}"#)
    );
}

#[test]
fn what_an_update_does_not_name_stays() {
    let before = demand(
        r#"{"cpu":{"quota":50000,"period":20000,"cpus":"0-1"},"memory":{"limit":4096},"hugepageLimits":[{"pageSize":"2MB","limit":1}]}"#,
    );
    let updated = |json: &str| before.updated(&serde_json::from_str(json).unwrap()).unwrap();
    for nothing in ["{}", r#"{"cpu":{"quota":0,"period":0,"cpus":""},"memory":{"limit":0}}"#] {
        assert_eq!(updated(nothing), before);
    }
    assert_eq!(updated(r#"{"cpu":{"quota":20000}}"#).millionths(), MILLION);
    // A period without a quota is one without a limit.
    assert_eq!(updated(r#"{"cpu":{"period":10000}}"#).millionths(), 0);
    assert_eq!(updated(r#"{"memory":{"limit":-1}}"#), Demand { memory: 0, ..before.clone() });
    let huge_pages = r#"{"hugepageLimits":[{"pageSize":"2MB","limit":2097152}]}"#;
    assert_eq!(updated(huge_pages), Demand { huge_pages: 2 << 20, ..before.clone() });
    assert_eq!(updated(r#"{"cpu":{"cpus":"0"}}"#), Demand { cpus: 1, ..before.clone() });
    let wrong = serde_json::from_str(r#"{"cpu":{"cpus":"a"}}"#).unwrap();
    assert_eq!(before.updated(&wrong), Err(SizeError::Cpus { list: "a".to_owned(), max: MAX_VCPUS }));
}
