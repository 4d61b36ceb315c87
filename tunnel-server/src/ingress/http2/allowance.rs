//! How much trouble a client may make on one connection: requests that it gives up before they are answered, and streams
//! that are reset since it broke a rule. Each costs work, and frees its place among the connection's streams at once, so
//! that nothing else bounds how many there are. Bounded per time: a client that lives for months has its share each
//! second. What a node or a target does counts for nothing here.

use std::time::Duration;

use parking_lot::Mutex;
use tokio::{sync::Notify, time::Instant};

/// For each stream that a connection may have at once, so many of its requests may come to nothing each second: as many
/// as if the client's patience were a quarter of a second.
const PER_SECOND: u32 = 4;
/// A connection with few streams may do as if it had so many: clients do not know the limit when they begin.
const LEAST_STREAMS: u32 = 64;
/// What was not used in so long a time may be used at once: after a stall of this process, or of the network, everything
/// that the client has given up meanwhile comes in one moment.
const BURST: Duration = Duration::from_secs(4);

/// One connection's allowance, shared by all who see trouble.
#[derive(Debug)]
pub(super) struct Allowance {
    bucket: Mutex<Bucket>,
    exceeded: Notify,
}

impl Allowance {
    /// Of a connection that may have this many streams at once.
    pub(super) fn new(max_streams: u32) -> Self {
        let each = Duration::from_secs(1) / (PER_SECOND * max_streams.max(LEAST_STREAMS));
        Self { bucket: Mutex::new(Bucket { until: Instant::now(), each }), exceeded: Notify::new() }
    }

    /// How many may come at once.
    pub(super) fn burst(max_streams: u32) -> usize {
        let seconds = usize::try_from(BURST.as_secs()).unwrap_or(usize::MAX);
        let per_second = PER_SECOND.saturating_mul(max_streams.max(LEAST_STREAMS));
        seconds.saturating_mul(usize::try_from(per_second).unwrap_or(usize::MAX))
    }

    /// One more.
    pub(super) fn charge(&self) {
        if !self.bucket.lock().take(Instant::now()) {
            self.exceeded.notify_one();
        }
    }

    /// Completes when there was more than is allowed. Cancel-safe.
    pub(super) async fn exceeded(&self) {
        self.exceeded.notified().await;
    }
}

/// A token bucket that knows only when it will be full again.
#[derive(Debug)]
struct Bucket {
    until: Instant,
    /// How long it takes to fill up again what one takes.
    each: Duration,
}

impl Bucket {
    fn take(&mut self, now: Instant) -> bool {
        self.until = self.until.max(now) + self.each;
        self.until - now <= BURST
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_gives_its_burst_and_then_what_has_filled_up() {
        let each = Duration::from_millis(100);
        let start = Instant::now();
        let mut bucket = Bucket { until: start, each };
        let now = start + Duration::from_secs(60);
        let mut given = |at: Instant| (0..1000).take_while(|_| bucket.take(at)).count();
        assert_eq!(given(now), 40, "no more than the burst, however long it was not used");
        // What was refused has been taken all the same: the one who does not stop gets nothing.
        assert_eq!(given(now + each), 0);
        assert_eq!(given(now + 4 * each), 2);
        assert_eq!(given(now + Duration::from_secs(60)), 40);
    }

    #[test]
    fn connections_with_few_streams_have_a_burst_of_their_own() {
        assert_eq!(Allowance::burst(1), 1024);
        assert_eq!(Allowance::burst(64), 1024);
        assert_eq!(Allowance::burst(250), 4000);
        let allowance = Allowance::new(250);
        assert_eq!(allowance.bucket.lock().each, Duration::from_millis(1));
    }
}
