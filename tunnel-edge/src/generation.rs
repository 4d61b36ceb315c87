//! The number that tells which of a node's links is the newest, also after its edge was started anew. Used by `keeper`.

use std::{
    fmt,
    sync::atomic::{AtomicU64, Ordering::Relaxed},
    time::SystemTime,
};

/// Gives out generations, each higher than the one before, whatever the clock does.
pub(crate) struct Generations {
    clock: Box<dyn Fn() -> SystemTime + Send + Sync>,
    last: AtomicU64,
}

impl fmt::Debug for Generations {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Generations").field("last", &self.last).finish_non_exhaustive()
    }
}

impl Generations {
    pub(crate) fn new(clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        Self { clock: Box::new(clock), last: AtomicU64::new(0) }
    }

    /// Milliseconds since 1970, or one more than the last.
    pub(crate) fn next(&self) -> u64 {
        let since = (self.clock)().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        let now = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        let after = |last: u64| now.max(last.saturating_add(1));
        let last = self.last.fetch_update(Relaxed, Relaxed, |last| Some(after(last)));
        after(last.unwrap_or_default())
    }
}

#[cfg(test)]
mod tests {
    use std::{sync::Arc, time::Duration};

    use super::*;

    #[test]
    fn rise_with_a_clock_that_stands_still_or_goes_back() {
        let millis = Arc::new(AtomicU64::new(1_000));
        let clock = millis.clone();
        let generations =
            Generations::new(move || SystemTime::UNIX_EPOCH + Duration::from_millis(clock.load(Relaxed)));
        assert_eq!([generations.next(), generations.next()], [1_000, 1_001]);
        millis.store(500, Relaxed);
        assert_eq!(generations.next(), 1_002);
        millis.store(2_000, Relaxed);
        assert_eq!(generations.next(), 2_000);
    }
}
