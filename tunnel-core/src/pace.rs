//! How many bytes may stand in line before a connection: what it sends in two milliseconds. On a slow way, whatever turns
//! out to be urgent later, a keystroke behind a copy, would wait behind more; on a fast one, whoever fills the line and
//! whoever empties it would wait for each other.

use std::{
    ops::RangeInclusive,
    time::{Duration, Instant},
};

/// How long it may take to send what stands in line.
const WAIT: Duration = Duration::from_millis(2);
/// Over so long the rate is measured at least. Longer than other processes have the processor in between.
const PERIOD: Duration = Duration::from_millis(10);

/// How fast a connection sends. Before that was measured, it counts as slow.
#[derive(Debug)]
pub(crate) struct Pace {
    since: Instant,
    /// Bytes since then.
    sent: usize,
    /// Bytes in [`WAIT`], as measured last.
    line: usize,
}

impl Pace {
    pub(crate) fn new(now: Instant) -> Self {
        Self { since: now, sent: 0, line: 0 }
    }

    /// So many bytes leave.
    pub(crate) fn note(&mut self, bytes: usize) {
        self.sent = self.sent.saturating_add(bytes);
    }

    /// How many bytes may stand in line, within these bounds.
    pub(crate) fn line(&mut self, bounds: RangeInclusive<usize>, now: Instant) -> usize {
        let elapsed = now.saturating_duration_since(self.since);
        if elapsed >= PERIOD {
            let line = self.sent as u128 * WAIT.as_nanos() / elapsed.as_nanos();
            self.line = usize::try_from(line).unwrap_or(usize::MAX);
            (self.since, self.sent) = (now, 0);
        }
        self.line.clamp(*bounds.start(), *bounds.end())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: RangeInclusive<usize> = 1000..=1_000_000;

    /// The line after a second of sending so many bytes a millisecond, all of them at the first of each `burst`.
    fn line(rate: usize, burst: u32) -> usize {
        let begun = Instant::now();
        let mut pace = Pace::new(begun);
        let mut line = 0;
        for ms in (0..=1000).step_by(burst as usize) {
            line = pace.line(BOUNDS, begun + Duration::from_millis(ms));
            pace.note(rate.saturating_mul(burst as usize));
        }
        line
    }

    #[test]
    fn what_is_sent_in_two_milliseconds_may_stand_in_line() {
        for burst in [1, 2, 5] {
            assert_eq!(line(125_000, burst), 250_000, "{burst}");
        }
        assert_eq!(line(10, 1), 1000);
        assert_eq!(line(10_000_000, 1), 1_000_000);
        assert_eq!(line(usize::MAX, 5), 1_000_000);
    }

    #[test]
    fn a_connection_counts_as_slow_until_it_was_measured_and_after_a_rest() {
        let begun = Instant::now();
        let mut pace = Pace::new(begun);
        pace.note(10_000_000);
        assert_eq!(pace.line(BOUNDS, begun + PERIOD / 2), 1000);
        assert_eq!(pace.line(BOUNDS, begun + PERIOD), 1_000_000);
        pace.note(10_000_000);
        assert_eq!(pace.line(BOUNDS, begun + PERIOD + PERIOD / 2), 1_000_000);
        assert_eq!(pace.line(BOUNDS, begun + Duration::from_mins(1)), 1000);
    }
}
