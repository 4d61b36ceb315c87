//! How much a side may send before it is told that there is room for more: large enough for the way's bandwidth times
//! its delay, and no larger.
//!
//! Every stream begins with [`INITIAL`], as the protocol wants it. A half of the window that is consumed within one round
//! trip says that the sender waits for us more than for the network, and the window is doubled. It so ends at two to four
//! times what is under way at any time, if the budget allows. A window never shrinks; what it grew by is given back when
//! the stream ends.

use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
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

/// Memory by which the receive windows of many connections may grow together, in bytes. What one took is for others when
/// its streams have ended.
#[derive(Debug)]
pub struct WindowPool {
    left: AtomicUsize,
}

impl WindowPool {
    /// A pool of so many bytes.
    pub fn new(bytes: usize) -> Self {
        Self { left: AtomicUsize::new(bytes) }
    }

    /// Bytes that nobody has taken.
    pub fn left(&self) -> usize {
        self.left.load(Relaxed)
    }

    /// As many of `wanted` bytes as there are.
    fn take(&self, wanted: usize) -> usize {
        let taken = |left: usize| left.min(wanted);
        let before = self.left.fetch_update(Relaxed, Relaxed, |left| Some(left - taken(left)));
        taken(before.unwrap_or(0))
    }

    fn give_back(&self, bytes: usize) {
        self.left.fetch_add(bytes, Relaxed);
    }
}

/// By how much the windows of one connection may still grow: its own limit, and what there is in the pool.
#[derive(Debug)]
pub(super) struct Budget {
    left: usize,
    taken: usize,
    pool: Option<Arc<WindowPool>>,
}

impl Budget {
    pub(super) fn new(bytes: usize) -> Self {
        Self { left: bytes, taken: 0, pool: None }
    }

    /// From now on, also no more than the pool has.
    pub(super) fn share(&mut self, pool: Arc<WindowPool>) {
        self.pool = Some(pool);
    }

    /// As much of `wanted` bytes as there is.
    fn take(&mut self, wanted: usize) -> usize {
        let wanted = wanted.min(self.left);
        let taken = self.pool.as_ref().map_or(wanted, |pool| pool.take(wanted));
        self.left -= taken;
        self.taken += taken;
        taken
    }

    pub(super) fn give_back(&mut self, bytes: usize) {
        self.left += bytes;
        self.taken -= bytes;
        if let Some(pool) = &self.pool {
            pool.give_back(bytes);
        }
    }
}

impl Drop for Budget {
    fn drop(&mut self) {
        self.give_back(self.taken);
    }
}

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

    /// Whether the sender shall be told that it may send more. `unread` bytes have arrived and are not consumed.
    pub(super) fn update_due(&self, unread: usize) -> UpdateDue {
        match self.consumed(unread) {
            consumed if consumed >= self.size / 2 => UpdateDue::Now,
            consumed if consumed >= self.size / 4 => UpdateDue::WithOthers,
            _ => UpdateDue::No,
        }
    }

    fn consumed(&self, unread: usize) -> u32 {
        (self.size - self.open).saturating_sub(u32::try_from(unread).unwrap_or(u32::MAX))
    }

    /// What the sender shall be told that it may send more. Growing takes from `budget`.
    pub(super) fn update(
        &mut self,
        unread: usize,
        now: Instant,
        rtt: Option<Duration>,
        budget: &mut Budget,
    ) -> u32 {
        let consumed = self.consumed(unread);
        let elapsed = now.saturating_duration_since(self.updated).as_nanos();
        // A half in a round trip: of more or less than a half, in as much more or less time.
        let soon = |rtt: Duration| {
            elapsed * u128::from(self.size) < rtt.max(SHORTEST).as_nanos() * 2 * u128::from(consumed)
        };
        let wanted = if rtt.is_some_and(soon) { self.size.min(i32::MAX as u32 - self.size) } else { 0 };
        let growth = u32::try_from(budget.take(wanted as usize)).unwrap_or(0);
        self.size += growth;
        self.open += consumed + growth;
        self.updated = now;
        consumed + growth
    }
}

/// When the sender is told that it may send more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum UpdateDue {
    No,
    /// With whatever is sent anyway: there is time.
    WithOthers,
    Now,
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
        let (mut now, mut left) = (Instant::now(), Budget::new(budget));
        let mut window = ReceiveWindow::new(now);
        for turn in 0..1000 {
            // Now a half of it, as when nothing else is sent, now less.
            let part = [2, 2, 4, 3][turn % 4];
            // No more than one window a round trip, and no more than the rate.
            let window_limited = rtt.as_secs_f64() / f64::from(part);
            let bytes = window.size / part;
            now += Duration::from_secs_f64(window_limited.max(f64::from(bytes) / rate));
            assert!(window.take(bytes));
            assert!(window.update(0, now, Some(rtt), &mut left) >= bytes);
        }
        assert_eq!((left.left + window.grown(), left.taken), (budget, window.grown()));
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
    fn many_connections_share_a_pool_and_give_back_what_they_took() {
        let pool = Arc::new(WindowPool::new(1_000_000));
        let mut budgets = [1_000_000, 400_000].map(Budget::new);
        for budget in &mut budgets {
            budget.share(pool.clone());
        }
        let [first, second] = &mut budgets;
        assert_eq!((first.take(700_000), second.take(500_000), first.take(1)), (700_000, 300_000, 0));
        first.give_back(200_000);
        // Its own limit counts too.
        assert_eq!((second.take(500_000), pool.left()), (100_000, 100_000));
        drop(budgets);
        assert_eq!(pool.left(), 1_000_000);
    }

    #[test]
    fn a_reader_that_takes_nothing_gets_nothing_more() {
        let now = Instant::now();
        let mut window = ReceiveWindow::new(now);
        assert!(window.take(INITIAL));
        let due = |consumed: u32| window.update_due((INITIAL - consumed) as usize);
        assert_eq!((due(0), due(INITIAL / 4 - 1)), (UpdateDue::No, UpdateDue::No));
        assert_eq!((due(INITIAL / 4), due(INITIAL / 2 - 1)), (UpdateDue::WithOthers, UpdateDue::WithOthers));
        assert_eq!((due(INITIAL / 2), due(INITIAL)), (UpdateDue::Now, UpdateDue::Now));
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
