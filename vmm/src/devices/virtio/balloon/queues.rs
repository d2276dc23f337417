//! What the driver says in its queues.
//!
//! Everything here is an offer: to drop pages that cannot be dropped, or more than there is time for, is left out, and the guest is none
//! the wiser. So each chain costs a bounded amount of work, whatever it says.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use vm_memory::{Bytes, GuestAddress};

use super::{Shared, hint};
use crate::devices::virtio::queue::Chain;
use crate::devices::virtio::served::{Serve, Turn};
use crate::devices::virtio::{GuestRam, InterruptLine, QueueError, VirtQueue};
use crate::memory::reclaim::{PAGE, Reclaimable};

/// virtio 1.3 s5.5.2.
pub(super) const INFLATE: usize = 0;
pub(super) const DEFLATE: usize = 1;
pub(super) const STATS: usize = 2;
pub(super) const HINTS: usize = 3;
pub(super) const REPORTS: usize = 4;

/// How much one chain, and one turn beyond what its last chain takes, may give back, in bytes. Linux reports 32 blocks of up to 4 MiB at a
/// time (Linux 6.12 mm/page_reporting.h, MAX_PAGE_ORDER). Freeing as much in small pages takes some milliseconds.
const MOST: u64 = 128 << 20;
/// What a chain costs of a turn at least, so that empty ones end it too.
const MIN_COST: u64 = MOST / 64;
/// How many pages one chain may inflate or deflate. Linux sends 256 (Linux 6.12 drivers/virtio/virtio_balloon.c).
const MAX_PFNS: usize = 1024;
/// `struct virtio_balloon_stat`: tag and value, packed.
const STAT_LEN: usize = 10;
/// Linux 6.12 knows 16 of them.
const MAX_STATS: usize = 32;

/// Serves all queues of a balloon.
pub(super) struct Queues {
    shared: Arc<Shared>,
    memory: Reclaimable,
    interrupt: Arc<dyn InterruptLine>,
    /// The driver says what it fills free pages with.
    poisons: bool,
    /// A chain that is returned when statistics are wanted anew.
    stats: Option<u16>,
    /// The driver is sending hints of the round that is asked for.
    hinting: bool,
}

impl Serve for Queues {
    fn turn(&mut self, queue: &mut VirtQueue, mem: &GuestRam) -> Result<Turn, QueueError> {
        let mut turn = Turn::default();
        if usize::from(queue.index()) == STATS && self.shared.stats_wanted.load(Ordering::Acquire) {
            turn.answered |= self.ask_for_stats(queue, mem)?;
        }
        let mut budget = MOST;
        while budget > 0 {
            let Some(chain) = queue.pop(mem)? else { return Ok(turn) };
            let head = chain.head_index();
            let done = match usize::from(queue.index()) {
                INFLATE => self.inflate(mem, chain),
                DEFLATE => self.deflate(mem, chain),
                STATS => {
                    self.take_stats(mem, chain);
                    // A driver has one such chain; of one that offers more, all but the last are returned.
                    if let Some(held) = self.stats.replace(head) {
                        queue.add_used(mem, held, 0)?;
                        turn.answered = true;
                    }
                    budget = budget.saturating_sub(MIN_COST);
                    continue;
                }
                HINTS => self.hint(mem, chain),
                _ => self.report(chain),
            };
            budget = budget.saturating_sub(done.max(MIN_COST));
            queue.add_used(mem, head, 0)?;
            turn.answered = true;
        }
        turn.more = true;
        Ok(turn)
    }
}

impl Queues {
    pub(super) fn new(
        shared: Arc<Shared>,
        memory: Reclaimable,
        interrupt: Arc<dyn InterruptLine>,
        poisons: bool,
    ) -> Self {
        Self { shared, memory, interrupt, poisons, stats: None, hinting: false }
    }

    /// The chain in which the driver wants to be asked for statistics.
    pub(super) fn stats_chain(&self) -> Option<u16> {
        self.stats
    }

    /// s5.5.6.1: the driver gives up pages. How many bytes went back to the host.
    fn inflate(&self, mem: &GuestRam, chain: Chain<'_>) -> u64 {
        let mut pages = pfns(mem, chain);
        pages.sort_unstable();
        let mut done = 0;
        // One call for pages that follow each other.
        for run in pages.chunk_by(|one, next| next.checked_sub(*one).is_some_and(|step| step <= 1)) {
            let (Some(&first), Some(&last)) = (run.first(), run.last()) else { continue };
            let length = (u64::from(last - first) + 1) * PAGE;
            done += self.give_back(GuestAddress(u64::from(first) * PAGE), length);
        }
        self.shared.counters.bytes_inflated.add(done);
        done
    }

    /// s5.5.6.1: the driver takes pages back, for which there is nothing to do but to count.
    fn deflate(&self, mem: &GuestRam, chain: Chain<'_>) -> u64 {
        self.shared.counters.bytes_deflated.add(pfns(mem, chain).len() as u64 * PAGE);
        0
    }

    /// s5.5.6.7: free pages. They are not used before the chain is returned.
    fn report(&self, chain: Chain<'_>) -> u64 {
        let done = self.drop_contents(chain);
        self.shared.counters.bytes_reported.add(done);
        done
    }

    /// s5.5.6.5: in a readable chain the number of the round that begins, or the end of it; in a writable one, free pages, which the driver
    /// holds until the device is done with the round.
    fn hint(&mut self, mem: &GuestRam, chain: Chain<'_>) -> u64 {
        let Some(first) = chain.clone().next() else { return 0 };
        if first.is_write_only() {
            let done = if self.hinting { self.drop_contents(chain) } else { 0 };
            self.shared.counters.bytes_hinted.add(done);
            return done;
        }
        let Ok(command) = mem.read_obj::<u32>(first.addr()).map(u32::from_le) else { return 0 };
        let Shared { hint: asked, counters, .. } = &*self.shared;
        let round = asked.load(Ordering::Acquire);
        if command != hint::STOP {
            self.hinting = command == round && round != hint::DONE;
        } else if std::mem::take(&mut self.hinting)
            // A new round may have been asked for meanwhile; then the driver hears of that one only.
            && asked.compare_exchange(round, hint::DONE, Ordering::AcqRel, Ordering::Acquire).is_ok()
        {
            counters.hint_rounds.add(1);
            self.shared.show();
            self.interrupt.signal_config();
        }
        0
    }

    /// Drops the contents of a chain's writable buffers; how many bytes they are.
    fn drop_contents(&self, chain: Chain<'_>) -> u64 {
        // s5.5.6.6: a driver that fills free pages with something finds zeroes if they are dropped.
        if self.poisons && self.shared.poison.load(Ordering::Acquire) != 0 {
            return 0;
        }
        let mut done = 0;
        for descriptor in chain {
            let length = u64::from(descriptor.len()).min(MOST - done);
            if descriptor.is_write_only() && length > 0 {
                done += self.give_back(descriptor.addr(), length);
            }
        }
        done
    }

    fn give_back(&self, start: GuestAddress, length: u64) -> u64 {
        self.memory.give_back(start, length).unwrap_or_else(|_| {
            self.shared.counters.refused.add(1);
            0
        })
    }

    /// s5.5.6.3: the driver's answer. What it does not mention is not known.
    fn take_stats(&self, mem: &GuestRam, chain: Chain<'_>) {
        // What it says now is what was wanted, asked for or not.
        self.shared.stats_wanted.store(false, Ordering::Release);
        let mut bytes = [0; STAT_LEN * MAX_STATS];
        let bytes = read(mem, chain, &mut bytes);
        for stat in bytes.chunks_exact(STAT_LEN) {
            let (tag, value) = stat.split_at(2);
            let tag = usize::from(u16::from_le_bytes([tag[0], tag[1]]));
            if let (Some(known), Ok(value)) = (self.shared.stats.get(tag), value.try_into()) {
                known.store(u64::from_le_bytes(value), Ordering::Relaxed);
            }
        }
    }

    /// Returns the chain in which the driver wants to be asked, if it is here; whether it was.
    fn ask_for_stats(&mut self, queue: &mut VirtQueue, mem: &GuestRam) -> Result<bool, QueueError> {
        let Some(held) = self.stats.take() else { return Ok(false) };
        queue.add_used(mem, held, 0)?;
        Ok(true)
    }
}

/// The page numbers in a chain, the first [`MAX_PFNS`] of them.
fn pfns(mem: &GuestRam, chain: Chain<'_>) -> Vec<u32> {
    let mut bytes = [0; 4 * MAX_PFNS];
    let bytes = read(mem, chain, &mut bytes);
    bytes.as_chunks::<4>().0.iter().map(|&bytes| u32::from_le_bytes(bytes)).collect()
}

/// Reads as much of the readable part of a chain as there is room for, up to the first buffer that is not in memory.
fn read<'b>(mem: &GuestRam, chain: Chain<'_>, room: &'b mut [u8]) -> &'b [u8] {
    let mut filled = 0;
    for descriptor in chain.readable() {
        let length = (descriptor.len() as usize).min(room.len() - filled);
        if mem.read_slice(&mut room[filled..filled + length], descriptor.addr()).is_err() {
            break;
        }
        filled += length;
    }
    &room[..filled]
}
