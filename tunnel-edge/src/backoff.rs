//! How long to wait before the next attempt to reach a gateway: exponential, with full jitter between a floor and a
//! growing ceiling, so that ten thousand edges that lost a gateway together do not come back together. Used by
//! `agent`; random numbers come from the caller.

use std::time::Duration;

use rand::{Rng, RngCore};

/// The state of one series of attempts.
#[derive(Clone, Debug)]
pub(crate) struct Backoff {
    floor: Duration,
    failures: u32,
}

impl Backoff {
    /// Delays will be `floor` or longer.
    pub(crate) fn new(floor: Duration) -> Self {
        Self { floor, failures: 0 }
    }

    /// The delay before the next attempt: no longer than `cap`, which depends on what has failed; a cap below the floor
    /// counts as the floor. `at_least` is the far side's wish: it is the floor of this delay, as far as the cap allows,
    /// and the jitter is added to it, lest all who were told the same come back together.
    pub(crate) fn after_failure(
        &mut self,
        at_least: Duration,
        cap: Duration,
        rng: &mut impl RngCore,
    ) -> Duration {
        let cap = cap.max(self.floor);
        let spread = self.ceiling(cap).saturating_sub(self.floor);
        self.failures = self.failures.saturating_add(1);
        let low = at_least.clamp(self.floor, cap);
        let high = low.saturating_add(spread).min(cap);
        rng.random_range(low..=high)
    }

    /// A short delay for a move that nothing forces: up to the floor.
    pub(crate) fn spread(&self, rng: &mut impl RngCore) -> Duration {
        rng.random_range(Duration::ZERO..=self.floor)
    }

    /// Something held long enough: the next series begins at the floor.
    pub(crate) fn reset(&mut self) {
        self.failures = 0;
    }

    /// The longest that the next delay may be: twice the floor at first, then twice as much each time.
    fn ceiling(&self, cap: Duration) -> Duration {
        let doublings = self.failures.saturating_add(1).min(31);
        self.floor.saturating_mul(1 << doublings).min(cap)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rand::{SeedableRng, rngs::SmallRng};

    fn durations() -> impl Strategy<Value = (Duration, Duration)> {
        (1u64..10_000, 0u64..600_000)
            .prop_map(|(floor, more)| (Duration::from_millis(floor), Duration::from_millis(floor + more)))
    }

    proptest! {
        #[test]
        fn stays_between_floor_and_cap((floor, cap) in durations(), wishes in prop::collection::vec(0u64..10_000_000, 1..80), seed: u64) {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut backoff = Backoff::new(floor);
            for wish in wishes {
                let wish = Duration::from_millis(wish);
                let delay = backoff.after_failure(wish, cap, &mut rng);
                prop_assert!(delay >= floor && delay <= cap, "{delay:?}");
                prop_assert!(delay >= wish.min(cap), "{delay:?} is sooner than the far side asked");
            }
            prop_assert!(backoff.spread(&mut rng) <= floor);
        }

        #[test]
        fn its_ceiling_doubles_until_the_cap_and_falls_back_on_reset((floor, cap) in durations(), seed: u64) {
            let mut rng = SmallRng::seed_from_u64(seed);
            let mut backoff = Backoff::new(floor);
            let first = backoff.ceiling(cap);
            let mut before = first;
            for _ in 0..60 {
                backoff.after_failure(Duration::ZERO, cap, &mut rng);
                prop_assert_eq!(backoff.ceiling(cap), (before * 2).min(cap));
                before = backoff.ceiling(cap);
            }
            prop_assert_eq!(before, cap);
            backoff.reset();
            prop_assert_eq!(backoff.ceiling(cap), first);
        }
    }

    #[test]
    fn jitter_spreads_over_the_whole_range() {
        let mut rng = SmallRng::seed_from_u64(7);
        let (floor, cap) = (Duration::from_secs(1), Duration::from_secs(64));
        let mut backoff = Backoff::new(floor);
        for _ in 0..20 {
            backoff.after_failure(Duration::ZERO, cap, &mut rng);
        }
        let delays: Vec<_> = (0..200).map(|_| backoff.after_failure(Duration::ZERO, cap, &mut rng)).collect();
        assert!(delays.iter().any(|delay| *delay < Duration::from_secs(8)));
        assert!(delays.iter().any(|delay| *delay > Duration::from_secs(56)));
    }
}
