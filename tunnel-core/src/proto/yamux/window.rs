//! How much a side may send before it is told that there is room for more: large enough for the way's bandwidth times
//! its delay, and no larger.
//!
//! Every stream begins with [`INITIAL`], as the protocol wants it. A quarter of the window that is consumed within half
//! a round trip says that the sender waits for us more than for the network, and the window is doubled. It so ends at
//! two to four times what is under way at any time, if the budget allows. A window never shrinks; what it grew by is
//! given back when the stream ends.

use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

/// The window that every stream begins with, in bytes.
pub const INITIAL: u32 = 256 * 1024;

/// Between two measurements of the round trip, while there is traffic.
const PING_PERIOD: Duration = Duration::from_secs(10);
/// Measurements that are remembered. The shortest counts, since the others measured queues.
const SAMPLES: usize = 8;
/// Shorter round trips count as this: on a fast network, waking up takes longer than the way.
const SHORTEST: Duration = Duration::from_millis(1);

/// The receiving side of one stream's flow control.
#[derive(Debug)]
pub(super) struct ReceiveWindow {
    /// What the sender may have under way and unread at once.
    size: u32,
    /// What the sender may still send, as it knows.
    open: u32,
    updated: Instant,
}

impl ReceiveWindow {
    pub(super) fn new(now: Instant) -> Self {
        Self { size: INITIAL, open: INITIAL, updated: now }
    }

    /// The sender has used `bytes` of it: whether it was allowed to.
    pub(super) fn take(&mut self, bytes: u32) -> bool {
        let left = self.open.checked_sub(bytes);
        self.open = left.unwrap_or(0);
        left.is_some()
    }

    /// By how much the window grew beyond what every stream has.
    pub(super) fn grown(&self) -> usize {
        (self.size - INITIAL) as usize
    }

    /// What the sender shall be told that it may send more, once that is worth a frame. `unread` bytes have arrived
    /// and were not taken. Growing takes from `budget`.
    pub(super) fn update(
        &mut self,
        unread: usize,
        now: Instant,
        rtt: Option<Duration>,
        budget: &mut usize,
    ) -> Option<u32> {
        let unread = u32::try_from(unread).unwrap_or(u32::MAX);
        let consumed = (self.size - self.open).saturating_sub(unread);
        if consumed < self.size / 4 {
            return None;
        }
        let soon = rtt.is_some_and(|rtt| now.saturating_duration_since(self.updated) < rtt.max(SHORTEST) / 2);
        let growth = if soon { self.size.min(u32::try_from(*budget).unwrap_or(u32::MAX)) } else { 0 };
        let growth = growth.min(i32::MAX as u32 - self.size);
        *budget -= growth as usize;
        self.size += growth;
        self.open += consumed + growth;
        self.updated = now;
        Some(consumed + growth)
    }
}

/// The round trip of a connection, measured by pings while there is traffic.
#[derive(Debug, Default)]
pub(super) struct RoundTrip {
    samples: VecDeque<Duration>,
    asked: Option<Instant>,
    /// The last ping's, if it has not come back.
    awaited: Option<u32>,
    next_number: u32,
}

impl RoundTrip {
    /// The number of a ping that shall be sent now, if one is due.
    pub(super) fn ping(&mut self, now: Instant) -> Option<u32> {
        if self.asked.is_some_and(|at| now.saturating_duration_since(at) < PING_PERIOD) {
            return None;
        }
        self.asked = Some(now);
        self.awaited = Some(self.next_number);
        self.next_number = self.next_number.wrapping_add(1);
        self.awaited
    }

    /// A ping has come back.
    pub(super) fn pong(&mut self, number: u32, now: Instant) {
        // Only the last one: an earlier one has taken longer than is of use.
        let Some(at) = self.asked.filter(|_| self.awaited == Some(number)) else { return };
        self.awaited = None;
        self.samples.truncate(SAMPLES - 1);
        self.samples.push_front(now.saturating_duration_since(at));
    }

    pub(super) fn shortest(&self) -> Option<Duration> {
        self.samples.iter().min().copied()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    /// A sender that always fills the window, over a way of `rtt` and `rate` bytes a second: the window's size at last.
    fn settled(rtt: Duration, rate: f64, budget: usize) -> u32 {
        let (mut now, mut left) = (Instant::now(), budget);
        let mut window = ReceiveWindow::new(now);
        for _ in 0..1000 {
            let quarter = window.size / 4;
            // No more than one window a round trip, and no more than the rate.
            let window_limited = rtt.as_secs_f64() / 4.0;
            now += Duration::from_secs_f64(window_limited.max(f64::from(quarter) / rate));
            assert!(window.take(quarter));
            assert!(window.update(0, now, Some(rtt), &mut left).is_some());
        }
        assert_eq!(left + window.grown(), budget);
        window.size
    }

    #[test]
    fn a_window_grows_to_a_few_times_what_is_under_way() {
        // 1 Gbit/s at 50 ms: 6.25 MB under way.
        let size = settled(50 * MS, 125e6, 1 << 30);
        assert!((12_500_000..=25_000_000).contains(&size), "{size}");
        // 10 Gbit/s at 0.1 ms: waking up counts as a millisecond.
        let size = settled(MS / 10, 1.25e9, 1 << 30);
        assert!((INITIAL..=5_000_000).contains(&size), "{size}");
        // A slow way needs no more than it has.
        assert_eq!(settled(10 * MS, 5e6, 1 << 30), INITIAL);
    }

    #[test]
    fn no_window_grows_beyond_the_budget() {
        assert_eq!(settled(500 * MS, 1e9, 1_000_000), INITIAL + 1_000_000);
        assert_eq!(settled(500 * MS, 1e9, 0), INITIAL);
    }

    #[test]
    fn a_reader_that_takes_nothing_gets_nothing_more() {
        let now = Instant::now();
        let mut window = ReceiveWindow::new(now);
        assert!(window.take(INITIAL));
        let mut budget = 1 << 20;
        assert_eq!(window.update(INITIAL as usize, now, Some(MS), &mut budget), None);
        assert_eq!(window.update((INITIAL - INITIAL / 4 + 1) as usize, now, Some(MS), &mut budget), None);
        assert!(!window.take(1));
    }

    #[test]
    fn the_shortest_of_the_last_round_trips_counts() {
        let mut trip = RoundTrip::default();
        let mut now = Instant::now();
        for ms in [9_u32, 3, 20, 20, 20, 20, 20, 20, 20] {
            let number = trip.ping(now).unwrap();
            assert_eq!(trip.ping(now), None);
            trip.pong(number.wrapping_add(7), now);
            now += ms * MS;
            trip.pong(number, now);
            now += PING_PERIOD;
        }
        assert_eq!(trip.shortest(), Some(3 * MS));
        let number = trip.ping(now).unwrap();
        now += 20 * MS;
        trip.pong(number, now);
        assert_eq!(trip.shortest(), Some(20 * MS));
    }
}
