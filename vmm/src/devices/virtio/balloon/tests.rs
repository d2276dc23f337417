use std::sync::Arc;
use std::thread::JoinHandle;

use vm_memory::{Bytes, GuestAddress};

use super::queues::{DEFLATE, HINTS, INFLATE, REPORTS, STATS as STATS_QUEUE};
use super::*;
use crate::devices::virtio::QueuePosition;
use crate::devices::virtio::testing::{Hostile, MockDriver, NOWHERE, Segment};
use crate::event_loop::EventLoop;

/// Guest memory of the tests: 8 MiB from 0. What is free of rings and buffers begins here.
const FREE: u64 = 6 << 20;
const ALL: u64 = feature::STATS_VQ
    | feature::DEFLATE_ON_OOM
    | feature::FREE_PAGE_HINT
    | feature::PAGE_POISON
    | feature::PAGE_REPORTING;

struct Bench {
    balloon: Balloon,
    config: ConfigSpace,
    driver: MockDriver,
    actual: Arc<AtomicU32>,
    events: LoopHandle,
    thread: Option<JoinHandle<()>>,
}

impl Bench {
    fn new() -> Self {
        let (events, handle) = EventLoop::new().unwrap();
        let thread = Some(std::thread::spawn(move || events.run().unwrap()));
        let mut driver = MockDriver::new(&QUEUE_SIZES);
        let actual = Arc::new(AtomicU32::new(99));
        let memory = Reclaimable::new(driver.mem.clone());
        let mut balloon = Balloon::new(handle.clone(), memory, true, actual.clone());
        let config = ConfigSpace::alone();
        balloon.place_config(config.clone());
        balloon.activate(driver.activation(ALL)).unwrap();
        Self { balloon, config, driver, actual, events: handle, thread }
    }

    /// Writes to the first bytes of a page.
    fn mark(&self, page: u64) {
        self.driver.write(FREE + page * PAGE, b"mark");
    }

    fn is_marked(&self, page: u64) -> bool {
        self.driver.read(FREE + page * PAGE, 4) == b"mark"
    }

    /// Offers a chain, kicks, and waits for it to come back.
    fn send(&mut self, queue: usize, segments: &[Segment]) {
        let head = self.driver.add(queue, segments);
        self.driver.kick(queue);
        assert_eq!(self.driver.wait_used(queue), (head, 0));
    }

    fn send_bytes(&mut self, queue: usize, bytes: &[u8]) {
        let segment = self.driver.readable(bytes);
        self.send(queue, &[segment]);
    }

    fn send_pfns(&mut self, queue: usize, pfns: &[u32]) {
        let bytes: Vec<u8> = pfns.iter().flat_map(|pfn| pfn.to_le_bytes()).collect();
        self.send_bytes(queue, &bytes);
    }

    fn counter(&self, name: &str) -> u64 {
        self.balloon.counters().into_iter().find(|counter| counter.0 == name).unwrap().1
    }

    fn config(&self) -> [u32; 4] {
        let bytes: [u8; 16] = self.config.read();
        std::array::from_fn(|i| u32::from_le_bytes(bytes[i * 4..][..4].try_into().unwrap()))
    }

    fn start_round(&mut self) -> u32 {
        self.balloon.request(DeviceRequest::HintFreePages).unwrap();
        self.config()[2]
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        self.balloon.reset();
        self.events.quit();
        self.thread.take().unwrap().join().unwrap();
    }
}

fn page(page: u64) -> u32 {
    ((FREE / PAGE) + page) as u32
}

fn pages(first: u64, count: u64) -> Segment {
    Segment { addr: FREE + first * PAGE, len: (count * PAGE) as u32, writable: true }
}

#[test]
fn pages_given_up_go_back_in_whatever_order() {
    let mut bench = Bench::new();
    (0..16).for_each(|page| bench.mark(page));
    bench.send_pfns(INFLATE, &[page(9), page(3), page(2), page(4), page(9), page(0)]);
    let marked: Vec<_> = (0..16).filter(|&page| bench.is_marked(page)).collect();
    assert_eq!(marked, [1, 5, 6, 7, 8, 10, 11, 12, 13, 14, 15]);
    assert_eq!(bench.counter("bytes_inflated"), 5 * PAGE);
    bench.send_pfns(DEFLATE, &[page(9), page(3)]);
    assert_eq!(bench.counter("bytes_deflated"), 2 * PAGE);
}

#[test]
fn guest_is_asked_for_memory_and_says_what_it_gave() {
    let mut bench = Bench::new();
    assert_eq!(bench.actual.load(Ordering::Relaxed), 0);
    bench.balloon.request(DeviceRequest::Inflate(5 << 20)).unwrap();
    bench.driver.interrupt.wait("a change of configuration", |counts| counts.config == 1);
    assert_eq!(bench.config()[0], 5 * 256);
    bench.balloon.write_config(4, &1000u32.to_le_bytes());
    assert_eq!((bench.config()[1], bench.actual.load(Ordering::Relaxed)), (1000, 1000));
    for (offset, bytes) in [(0, &[1; 4][..]), (8, &[1; 4]), (16, &[1; 4]), (4, &[1; 2]), (u64::MAX, &[1; 4])]
    {
        bench.balloon.write_config(offset, bytes);
    }
    assert_eq!(bench.config(), [5 * 256, 1000, hint::DONE, 0]);
    let refused = bench.balloon.request(DeviceRequest::Inflate((8 << 20) + 1));
    assert!(matches!(refused, Err(DeviceRequestError::Range { most: 0x80_0000, .. })));
    let refused = bench.balloon.request(DeviceRequest::Plug(0));
    assert!(matches!(refused, Err(DeviceRequestError::NotForThis(_))));
}

#[test]
fn pages_that_are_not_memory_are_passed_over() {
    let mut bench = Bench::new();
    bench.mark(1);
    // Outside, across the end, and the largest there is.
    bench.send_pfns(INFLATE, &[(8 << 20 >> 12) as u32, u32::MAX, (NOWHERE >> 12) as u32, page(1)]);
    assert!(!bench.is_marked(1));
    assert_eq!((bench.counter("refused"), bench.counter("bytes_inflated")), (3, PAGE));
    // Half a page number, and a list of which half is not in memory.
    bench.send_bytes(INFLATE, &[1, 2]);
    let list = bench.driver.readable(&page(2).to_le_bytes());
    bench.mark(2);
    bench.send(INFLATE, &[list, Segment { addr: NOWHERE, len: 64, writable: false }]);
    assert!(!bench.is_marked(2));
}

#[test]
fn giving_up_the_pages_of_the_queues_harms_the_guest_alone() {
    let mut bench = Bench::new();
    let list: Vec<u8> = (0..256u32).flat_map(u32::to_le_bytes).collect();
    let segment = bench.driver.readable(&list);
    bench.driver.add(INFLATE, &[segment]);
    bench.driver.kick(INFLATE);
    // Rings of zeroes are not those the device was in the middle of.
    bench.driver.interrupt.wait_reset();
    bench.balloon.reset();
    bench.balloon.activate(bench.driver.activation(ALL)).unwrap();
    bench.send_pfns(INFLATE, &[page(0)]);
}

#[test]
fn lists_are_read_up_to_a_bound() {
    let mut bench = Bench::new();
    bench.mark(0);
    bench.mark(1);
    let mut list = vec![page(0); 1024];
    list.push(page(1));
    bench.send_pfns(INFLATE, &list);
    assert!(!bench.is_marked(0) && bench.is_marked(1));
}

#[test]
fn free_pages_reported_lose_their_contents() {
    let mut bench = Bench::new();
    (0..8).for_each(|page| bench.mark(page));
    let nowhere = Segment { addr: NOWHERE, len: 4096, writable: true };
    let readable = Segment { writable: false, ..pages(6, 1) };
    bench.send(REPORTS, &[readable, pages(0, 2), nowhere, pages(4, 2)]);
    let marked: Vec<_> = (0..8).filter(|&page| bench.is_marked(page)).collect();
    assert_eq!(marked, [2, 3, 6, 7]);
    assert_eq!((bench.counter("bytes_reported"), bench.counter("refused")), (4 * PAGE, 1));
}

#[test]
fn one_chain_gives_back_a_bounded_amount() {
    let mut bench = Bench::new();
    bench.mark(0);
    // 127 times a MiB that is not the page's; what is left of 128 MiB is less than the next asks for.
    let mut segments = vec![Segment { addr: 5 << 20, len: 1 << 20, writable: true }; 127];
    segments.push(pages(0, 1));
    bench.send(REPORTS, &segments);
    assert!(!bench.is_marked(0));
    bench.mark(0);
    segments = vec![Segment { addr: 4 << 20, len: 2 << 20, writable: true }; 64];
    segments.push(pages(0, 1));
    bench.send(REPORTS, &segments);
    assert!(bench.is_marked(0));
}

#[test]
fn contents_that_the_guest_relies_on_are_kept() {
    let mut bench = Bench::new();
    bench.balloon.write_config(12, &0xaaaa_aaaau32.to_le_bytes());
    bench.mark(0);
    bench.send(REPORTS, &[pages(0, 1)]);
    assert!(bench.is_marked(0));
    bench.balloon.write_config(12, &0u32.to_le_bytes());
    bench.send(REPORTS, &[pages(0, 1)]);
    assert!(!bench.is_marked(0));
}

#[test]
fn hints_count_between_start_and_stop_of_the_round_asked_for() {
    let mut bench = Bench::new();
    (0..8).for_each(|page| bench.mark(page));
    bench.send(HINTS, &[pages(0, 1)]);
    bench.send_bytes(HINTS, &hint::DONE.to_le_bytes());
    bench.send(HINTS, &[pages(0, 1)]);
    assert!(bench.is_marked(0), "no round was asked for");

    let round = bench.start_round();
    assert!(round >= hint::FIRST);
    bench.send_bytes(HINTS, &(round + 1).to_le_bytes());
    bench.send(HINTS, &[pages(0, 1)]);
    bench.send_bytes(HINTS, &[1, 2]);
    assert!(bench.is_marked(0), "another round");
    bench.send_bytes(HINTS, &round.to_le_bytes());
    bench.send(HINTS, &[pages(1, 2)]);
    assert_eq!(bench.config()[2], round);
    bench.send_bytes(HINTS, &hint::STOP.to_le_bytes());
    assert_eq!(bench.config()[2], hint::DONE);
    bench.driver.interrupt.wait("the end of the round", |counts| counts.config == 2);
    bench.send(HINTS, &[pages(4, 1)]);
    let marked: Vec<_> = (0..8).filter(|&page| bench.is_marked(page)).collect();
    assert_eq!(marked, [0, 3, 4, 5, 6, 7]);
    assert_eq!((bench.counter("bytes_hinted"), bench.counter("hint_rounds")), (2 * PAGE, 1));
    assert_ne!(bench.start_round(), round);
}

#[test]
fn hints_need_a_driver_that_can() {
    let mut bench = Bench::new();
    for features in [None, Some(0)] {
        bench.balloon.reset();
        if let Some(features) = features {
            bench.balloon.activate(bench.driver.activation(features)).unwrap();
        }
        let refused = bench.balloon.request(DeviceRequest::HintFreePages);
        assert_eq!(refused, Err(DeviceRequestError::NotReady));
    }
}

#[test]
fn guest_tells_about_itself_when_asked() {
    let mut bench = Bench::new();
    let stats = |free: u64| {
        let stat = |tag: u16, value: u64| [&tag.to_le_bytes()[..], &value.to_le_bytes()].concat();
        // An unknown tag, and half a record.
        [stat(4, free), stat(999, 1), stat(5, 100), vec![6, 0, 1]].concat()
    };
    // Of two chains the first comes back, and then the other one is held.
    let offer_two = |bench: &mut Bench, free: u64| {
        let heads = [(); 2].map(|()| {
            let segment = bench.driver.readable(&stats(free));
            bench.driver.add(STATS_QUEUE, &[segment])
        });
        bench.driver.kick(STATS_QUEUE);
        assert_eq!(bench.driver.wait_used(STATS_QUEUE), (heads[0], 0));
        heads[1]
    };
    let held = offer_two(&mut bench, 50);
    let counters = bench.balloon.counters();
    assert!(counters.contains(&("guest_free_bytes", 50)) && counters.contains(&("guest_total_bytes", 100)));
    assert!(counters.iter().all(|counter| counter.0 != "guest_available_bytes"), "it did not say");
    // Whoever looks makes it be asked again.
    assert_eq!(bench.driver.wait_used(STATS_QUEUE), (held, 0));
    let held = offer_two(&mut bench, 60);
    bench.balloon.pause();
    assert!(bench.driver.pop_used(STATS_QUEUE).is_none());
    let saved = bench.balloon.save().unwrap();
    let DeviceState::Balloon(state) = &saved.state else { panic!("{saved:?}") };
    assert_eq!(state.stats, Some(held));
    assert!(bench.balloon.counters().contains(&("guest_free_bytes", 60)));
    bench.balloon.resume();
    assert_eq!(bench.driver.wait_used(STATS_QUEUE), (held, 0));
    bench.balloon.reset();
    assert!(bench.balloon.counters().iter().all(|counter| counter.0 != "guest_free_bytes"));
}

#[test]
fn queues_are_those_of_the_features() {
    let mut bench = Bench::new();
    assert_eq!(bench.balloon.queue_sizes().len(), 5);
    assert_ne!(bench.balloon.features() & feature::PAGE_REPORTING, 0);
    bench.balloon.reset();
    let mut activation = bench.driver.activation(ALL);
    activation.queues[REPORTS] = None;
    let refused = bench.balloon.activate(activation);
    assert!(matches!(refused, Err(ActivateError::MissingQueue(4))));
    let mut activation = bench.driver.activation(ALL & !feature::PAGE_REPORTING);
    activation.queues[REPORTS] = None;
    bench.balloon.activate(activation).unwrap();

    let memory = Reclaimable::new(bench.driver.mem.clone());
    let plain = Balloon::new(bench.events.clone(), memory, false, Arc::default());
    assert_eq!((plain.queue_sizes().len(), plain.features() & feature::PAGE_REPORTING), (4, 0));
}

#[test]
fn paused_balloon_waits_and_tells_what_to_save() {
    let mut bench = Bench::new();
    bench.balloon.request(DeviceRequest::Inflate(1 << 20)).unwrap();
    bench.balloon.write_config(4, &7u32.to_le_bytes());
    bench.mark(0);
    bench.send_pfns(INFLATE, &[page(1)]);
    bench.balloon.pause();
    let list = bench.driver.readable(&page(0).to_le_bytes());
    bench.driver.add(INFLATE, &[list]);
    bench.driver.kick(INFLATE);
    let saved = bench.balloon.save().unwrap();
    let at = |position| Some(QueuePosition { next_avail: position, next_used: position });
    assert_eq!(saved.queues, [at(1), at(0), at(0), at(0), at(0)]);
    let state = BalloonState { num_pages: 256, actual: 7, hint: hint::DONE, poison: 0, stats: None };
    assert_eq!(saved.state, DeviceState::Balloon(state));
    let json = serde_json::to_string(&saved).unwrap();
    assert_eq!(serde_json::from_str::<SavedDevice>(&json).unwrap(), saved);
    assert!(bench.is_marked(0));
    bench.balloon.resume();
    bench.driver.wait_used(INFLATE);
    assert!(!bench.is_marked(0));
}

#[test]
fn hostile_chains_get_an_answer_or_end_the_device() {
    let mut bench = Bench::new();
    for queue in [INFLATE, DEFLATE, STATS_QUEUE, HINTS, REPORTS] {
        for kind in Hostile::ALL {
            for writable in [true, false] {
                bench.balloon.reset();
                bench.balloon.activate(bench.driver.activation(ALL)).unwrap();
                let round = bench.start_round();
                bench.send_bytes(HINTS, &round.to_le_bytes());
                let head = bench.driver.add_hostile(queue, kind, writable);
                bench.driver.kick(queue);
                if matches!(kind, Hostile::HeadBeyondTable) && queue != STATS_QUEUE {
                    bench.driver.interrupt.wait_reset();
                    continue;
                }
                if queue == STATS_QUEUE {
                    // It comes back when it is not the last any more.
                    let other = bench.driver.readable(&[]);
                    bench.driver.add(queue, &[other]);
                    bench.driver.kick(queue);
                    if matches!(kind, Hostile::HeadBeyondTable) {
                        bench.driver.interrupt.wait_reset();
                        continue;
                    }
                }
                if queue == INFLATE {
                    // What is in the buffer may name the pages of the rings: see above.
                    bench.driver.interrupt.wait("an answer or the end", |counts| {
                        counts.queues.contains_key(&0) || !counts.resets.is_empty()
                    });
                    continue;
                }
                assert_eq!(bench.driver.wait_used(queue).0, head, "{kind:?}");
            }
        }
    }
    assert_eq!(bench.driver.mem.read_obj::<u8>(GuestAddress(FREE)).unwrap(), 0);
}
