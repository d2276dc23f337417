//! Token buckets that bound how many bytes and operations a device moves.
//!
//! Two buckets, one of bytes and one of operations, fill at a steady rate up to their burst; what is moved is taken out of both. There is
//! no thread and no timer here: a device whose buckets are too empty learns until when ([`Throttled`]), and waits for that together
//! with whatever else it waits for (a deadline of poll(2) or of a ring, a timerfd). Time is always the caller's, so that one look at the
//! clock serves a batch.
//!
//! A device that knows the size of an operation beforehand (a block request, a packet to send) calls [`RateLimiter::take`]. One that learns
//! it only by doing it (a packet received) asks [`RateLimiter::allow`] and then tells [`RateLimiter::charge`].
//!
//! What is promised: in any span of time `t`, at most `burst + rate * t` is let through, plus, once, what the largest operation exceeds the
//! burst by (an operation larger than the burst waits for a full bucket, and leaves a debt that those after it pay). And the other
//! way round: who asks again at the time named is let through.

use std::time::{Duration, Instant};

use kvrun_vmm_api::RateLimit;

/// A burst that is not configured is what goes in this time.
const DEFAULT_BURST: Duration = Duration::from_millis(100);
/// Levels are kept in billionths of a token: what a rate of one token per second adds in a nanosecond.
const TOKEN: i128 = 1_000_000_000;

/// Bounds what one direction of one device moves.
#[derive(Clone, Debug)]
pub struct RateLimiter {
    limit: RateLimit,
    bytes: Option<Bucket>,
    ops: Option<Bucket>,
}

/// The operation may not go yet.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Throttled {
    /// When it may, if nothing else goes before it.
    pub until: Instant,
}

impl RateLimiter {
    /// A limiter after a rest: whole bursts may go.
    pub fn new(limit: RateLimit, now: Instant) -> Self {
        Self {
            limit,
            bytes: Bucket::new(limit.bytes_per_second, limit.bytes_burst, now),
            ops: Bucket::new(limit.ops_per_second, limit.ops_burst, now),
        }
    }

    /// Changes the limit. What was saved up is kept as far as the new burst goes; debts are forgiven.
    pub fn set(&mut self, limit: RateLimit, now: Instant) {
        let old = std::mem::replace(self, Self::new(limit, now));
        for (bucket, old) in [(&mut self.bytes, old.bytes), (&mut self.ops, old.ops)] {
            if let (Some(bucket), Some(mut old)) = (bucket, old) {
                old.fill(now);
                bucket.level = old.level.clamp(0, bucket.burst);
            }
        }
    }

    /// The limit in force.
    pub fn limit(&self) -> RateLimit {
        self.limit
    }

    /// Whether everything may go at any time: then no clock need be read for the other calls.
    pub fn is_unbounded(&self) -> bool {
        self.bytes.is_none() && self.ops.is_none()
    }

    /// Lets one operation of `bytes` bytes go, and counts it.
    ///
    /// # Errors
    /// [`Throttled`]; nothing is counted.
    pub fn take(&mut self, bytes: u64, now: Instant) -> Result<(), Throttled> {
        self.allow(bytes, now)?;
        self.charge(bytes, now);
        Ok(())
    }

    /// Whether one operation of `bytes` bytes, or of at least as many if their number is not known, may go now.
    ///
    /// # Errors
    /// [`Throttled`].
    pub fn allow(&mut self, bytes: u64, now: Instant) -> Result<(), Throttled> {
        let wait = |bucket: &mut Option<Bucket>, tokens| {
            bucket.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait(tokens, now))
        };
        let wait = wait(&mut self.bytes, bytes).max(wait(&mut self.ops, 1));
        // A debt can be of centuries (a byte per second, gigabytes moved), but not of more than a clock can tell.
        if wait.is_zero() { Ok(()) } else { Err(Throttled { until: now + wait }) }
    }

    /// Counts one operation of `bytes` bytes that has gone, whether there were tokens for it or not.
    pub fn charge(&mut self, bytes: u64, now: Instant) {
        for (bucket, tokens) in [(&mut self.bytes, bytes), (&mut self.ops, 1)] {
            if let Some(bucket) = bucket {
                bucket.fill(now);
                bucket.level = bucket.level.saturating_sub(i128::from(tokens) * TOKEN);
            }
        }
    }
}

/// Tokens; how many is in billionths.
#[derive(Clone, Debug)]
struct Bucket {
    /// Tokens per second, which is billionths of a token per nanosecond. Not 0.
    rate: u64,
    /// The most that is saved up; at least one token.
    burst: i128,
    /// Below 0: a debt.
    level: i128,
    /// Up to when `level` counts.
    filled: Instant,
}

impl Bucket {
    /// A full bucket; `None` without a bound.
    fn new(rate: u64, burst: u64, now: Instant) -> Option<Self> {
        if rate == 0 {
            return None;
        }
        let burst = match burst {
            0 => (i128::from(rate) * DEFAULT_BURST.as_nanos() as i128).max(TOKEN),
            _ => i128::from(burst) * TOKEN,
        };
        Some(Self { rate, burst, level: burst, filled: now })
    }

    fn fill(&mut self, now: Instant) {
        // Zero if `now` is before `filled`: two threads may look at the clock in one order and come here in the other.
        let elapsed = now.saturating_duration_since(self.filled);
        let gained = i128::from(self.rate).saturating_mul(elapsed.as_nanos() as i128);
        self.level = self.level.saturating_add(gained).min(self.burst);
        self.filled = self.filled.max(now);
    }

    /// How long until an operation that takes `tokens` may go.
    fn wait(&mut self, tokens: u64, now: Instant) -> Duration {
        self.fill(now);
        // More than the burst is never there at once.
        let wanted = (i128::from(tokens) * TOKEN).min(self.burst);
        let missing = wanted.saturating_sub(self.level);
        if missing <= 0 {
            return Duration::ZERO;
        }
        let nanos = (missing as u128).div_ceil(u128::from(self.rate));
        Duration::from_nanos(u64::try_from(nanos).unwrap_or(u64::MAX))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    fn bytes(rate: u64, burst: u64) -> RateLimit {
        RateLimit { bytes_per_second: rate, bytes_burst: burst, ..RateLimit::default() }
    }

    fn ops(rate: u64, burst: u64) -> RateLimit {
        RateLimit { ops_per_second: rate, ops_burst: burst, ..RateLimit::default() }
    }

    #[test]
    fn without_limits_everything_goes() {
        let now = Instant::now();
        let mut limiter = RateLimiter::new(RateLimit::default(), now);
        assert!(limiter.is_unbounded());
        for _ in 0..1000 {
            limiter.take(u64::MAX, now).unwrap();
        }
    }

    #[test]
    fn after_the_burst_comes_the_rate() {
        let now = Instant::now();
        let mut limiter = RateLimiter::new(bytes(1000, 500), now);
        limiter.take(500, now).unwrap();
        let until = now + Duration::from_millis(100);
        assert_eq!(limiter.take(100, now), Err(Throttled { until }));
        assert!(limiter.take(100, until - Duration::from_nanos(1)).is_err());
        limiter.take(100, until).unwrap();
        // A rest saves up no more than the burst.
        let later = until + 100 * SECOND;
        limiter.take(500, later).unwrap();
        assert!(limiter.take(1, later).is_err());
    }

    #[test]
    fn burst_that_is_not_configured_is_a_tenth_of_a_second() {
        let now = Instant::now();
        let mut limiter = RateLimiter::new(ops(1000, 0), now);
        for _ in 0..100 {
            limiter.take(0, now).unwrap();
        }
        assert_eq!(limiter.take(0, now), Err(Throttled { until: now + Duration::from_millis(1) }));
        // However slow, one may go.
        RateLimiter::new(ops(1, 0), now).take(0, now).unwrap();
    }

    #[test]
    fn both_bounds_hold_and_what_one_refuses_is_not_counted_by_the_other() {
        let now = Instant::now();
        let limit = RateLimit { bytes_per_second: 1000, bytes_burst: 1000, ops_per_second: 2, ops_burst: 2 };
        let mut limiter = RateLimiter::new(limit, now);
        limiter.take(1, now).unwrap();
        limiter.take(1, now).unwrap();
        for _ in 0..10 {
            assert_eq!(limiter.take(998, now), Err(Throttled { until: now + SECOND / 2 }));
        }
        limiter.take(998, now + SECOND / 2).unwrap();
    }

    #[test]
    fn an_operation_larger_than_the_burst_goes_and_is_paid_for_afterwards() {
        let now = Instant::now();
        let mut limiter = RateLimiter::new(bytes(1000, 10), now);
        limiter.take(5000, now).unwrap();
        assert_eq!(limiter.take(0, now), Err(Throttled { until: now + Duration::from_millis(4990) }));
    }

    #[test]
    fn a_debt_is_charged_by_who_learns_the_size_later() {
        let now = Instant::now();
        let mut limiter = RateLimiter::new(bytes(1000, 100), now);
        limiter.allow(1, now).unwrap();
        limiter.charge(1100, now);
        assert_eq!(limiter.allow(1, now), Err(Throttled { until: now + Duration::from_millis(1001) }));
    }

    #[test]
    fn a_new_limit_keeps_savings_and_forgives_debts() {
        let now = Instant::now();
        let mut limiter = RateLimiter::new(bytes(1000, 1000), now);
        limiter.take(600, now).unwrap();
        limiter.set(bytes(10, 500), now);
        assert_eq!(limiter.limit(), bytes(10, 500));
        limiter.take(400, now).unwrap();
        assert!(limiter.take(1, now).is_err());
        limiter.charge(1 << 40, now);
        limiter.set(bytes(1000, 0), now);
        assert_eq!(limiter.allow(1, now), Err(Throttled { until: now + Duration::from_millis(1) }));
        limiter.set(RateLimit::default(), now);
        limiter.take(u64::MAX, now).unwrap();
    }

    #[test]
    fn extremes_neither_overflow_nor_panic() {
        let now = Instant::now();
        for rate in [1, u64::MAX] {
            for burst in [0, 1, u64::MAX] {
                let limit = RateLimit {
                    bytes_per_second: rate,
                    bytes_burst: burst,
                    ops_per_second: rate,
                    ops_burst: burst,
                };
                let mut limiter = RateLimiter::new(limit, now);
                for _ in 0..10 {
                    let _ = limiter.take(u64::MAX, now);
                    limiter.charge(u64::MAX, now);
                    let _ = limiter.take(u64::MAX, now + Duration::from_secs(1 << 40));
                    // A look at the clock that another thread has overtaken.
                    let _ = limiter.take(1, now);
                }
            }
        }
    }

    fn limits() -> impl Strategy<Value = RateLimit> {
        let rate = prop_oneof![Just(0), 1..10u64, 1..1_000_000u64, Just(u64::MAX)];
        let burst = prop_oneof![Just(0), 1..10u64, 1..1_000_000u64];
        (rate.clone(), burst.clone(), rate, burst).prop_map(
            |(bytes_per_second, bytes_burst, ops_per_second, ops_burst)| RateLimit {
                bytes_per_second,
                bytes_burst,
                ops_per_second,
                ops_burst,
            },
        )
    }

    /// The burst of a limit in tokens, rounded up.
    fn burst(rate: u64, burst: u64) -> u128 {
        if burst == 0 { u128::from(rate).div_ceil(10).max(1) } else { burst.into() }
    }

    proptest! {
        /// Whatever is asked whenever: in every span of time no more goes than burst, rate and one large operation allow.
        #[test]
        fn no_span_of_time_sees_more_than_the_bound(
            limit in limits(),
            asked in prop::collection::vec((0..2_000_000_000u64, 0..3_000_000u64), 1..60),
        ) {
            let begin = Instant::now();
            let mut now = begin;
            let mut limiter = RateLimiter::new(limit, now);
            let mut gone: Vec<(Duration, u64)> = Vec::new();
            for (pause, size) in asked {
                now += Duration::from_nanos(pause);
                if limiter.take(size, now).is_ok() {
                    gone.push((now - begin, size));
                }
            }
            for first in 0..gone.len() {
                let (mut bytes, mut largest) = (0u128, 0u128);
                for (count, &(at, size)) in (1..).zip(&gone[first..]) {
                    let span = (at - gone[first].0).as_nanos();
                    let filled = |rate: u64| (u128::from(rate) * span).div_ceil(1_000_000_000);
                    bytes += u128::from(size);
                    largest = largest.max(size.into());
                    if limit.bytes_per_second != 0 {
                        let burst = burst(limit.bytes_per_second, limit.bytes_burst);
                        let excess = largest.saturating_sub(burst);
                        prop_assert!(bytes <= burst + filled(limit.bytes_per_second) + excess);
                    }
                    if limit.ops_per_second != 0 {
                        let burst = burst(limit.ops_per_second, limit.ops_burst);
                        prop_assert!(count <= burst + filled(limit.ops_per_second));
                    }
                }
            }
        }

        /// Who waits as long as told is let through, and not a nanosecond earlier.
        #[test]
        fn the_time_named_is_the_earliest(
            limit in limits(),
            sizes in prop::collection::vec(0..3_000_000u64, 1..40),
        ) {
            let mut now = Instant::now();
            let mut limiter = RateLimiter::new(limit, now);
            for size in sizes {
                if let Err(Throttled { until }) = limiter.take(size, now) {
                    prop_assert!(until > now);
                    prop_assert!(limiter.allow(size, until - Duration::from_nanos(1)).is_err());
                    now = until;
                    prop_assert_eq!(limiter.take(size, now), Ok(()));
                }
            }
        }

        /// A device that always has something to move gets its rate: nothing is lost to rounding.
        #[test]
        fn who_always_asks_gets_the_whole_rate(rate in 1..1_000_000u64, size in 1..5000u64, count in 1..300u64) {
            let begin = Instant::now();
            let mut now = begin;
            let mut limiter = RateLimiter::new(bytes(rate, 1), begin);
            for _ in 0..count {
                if let Err(Throttled { until }) = limiter.take(size, now) {
                    now = until;
                    prop_assert_eq!(limiter.take(size, now), Ok(()));
                }
            }
            // All but the first and the burst have waited for what went before; each wait is rounded up by a nanosecond at most.
            let paid = (count - 1) * size;
            let ideal = Duration::from_nanos((u128::from(paid) * 1_000_000_000 / u128::from(rate)) as u64);
            prop_assert!(now - begin <= ideal + Duration::from_nanos(count));
        }
    }
}
