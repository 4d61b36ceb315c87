//! How often strangers may be in the log. Whoever reaches a port can bring lines about, by handshakes that fail or requests
//! that are refused, as fast as the network carries them. So there are only so many lines a minute of one cause about one
//! source; the rest is counted, and one line says how many they were. Asked by whatever logs what a stranger did.

use std::{
    collections::{BTreeMap, HashMap},
    fmt::Display,
    hash::{BuildHasher, RandomState},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family},
    registry::Registry,
};
use tokio::time::{MissedTickBehavior, interval};
use tracing::warn;

/// Lines of one cause about one source within [`PERIOD`].
const PER_SOURCE: u32 = 20;
/// Lines of one cause about all sources that cannot prove who they are, within [`PERIOD`]: addresses cost nothing.
const IN_TOTAL: u32 = 200;
const PERIOD: Duration = Duration::from_secs(60);
/// Sources of one cause that are told apart. Any further ones count as one.
const MAX_SOURCES: usize = 16_384;

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cause {
    cause: &'static str,
}

/// Which lines about strangers are logged. Clones count together.
#[derive(Clone, Debug, Default)]
pub struct Limits(Arc<State>);

#[derive(Debug, Default)]
struct State {
    /// What there was of each cause within this period.
    causes: Mutex<BTreeMap<&'static str, Tally>>,
    left_out: Family<Cause, Counter>,
    /// Random, so that nobody can choose sources that count as one.
    hasher: RandomState,
}

#[derive(Debug, Default)]
struct Tally {
    lines: u32,
    sources: HashMap<u64, u32>,
    left_out: u64,
    /// About whom the line was that was left out last.
    last: String,
}

impl Limits {
    /// Registers the count of lines that were left out.
    pub fn register(&self, registry: &mut Registry) {
        registry.register(
            "log_lines_left_out",
            "Lines about strangers that are not in the log, since there were too many of their cause",
            self.0.left_out.clone(),
        );
    }

    /// Whether a line of this cause about this source may be logged; if not, it is counted. For sources that anyone may
    /// be, such as addresses.
    pub fn admit(&self, cause: &'static str, source: impl Display) -> bool {
        self.judge(cause, &source.to_string(), IN_TOTAL)
    }

    /// As [`Self::admit`], for a source that has proven who it is: there are only so many certificates.
    pub fn admit_known(&self, cause: &'static str, source: impl Display) -> bool {
        self.judge(cause, &source.to_string(), u32::MAX)
    }

    fn judge(&self, cause: &'static str, source: &str, in_total: u32) -> bool {
        let mut causes = self.0.causes.lock();
        let tally = causes.entry(cause).or_default();
        if tally.admits(self.0.hasher.hash_one(source), in_total) {
            return true;
        }
        tally.left_out += 1;
        source.clone_into(&mut tally.last);
        self.0.left_out.get_or_create(&Cause { cause }).inc();
        false
    }

    /// Begins to count anew with each period, and says what was left out in the last, for ever.
    pub async fn renew(&self) {
        let mut period = interval(PERIOD);
        period.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            period.tick().await;
            self.sum_up();
        }
    }

    /// Says what was left out, and begins anew.
    pub fn sum_up(&self) {
        for (cause, lines, last) in self.take() {
            warn!(
                cause,
                lines,
                last,
                "left out of the log: lines of this cause, the last of them about the source given"
            );
        }
    }

    /// What was left out, by cause: how many lines, and about whom the last of them was. Begins anew.
    fn take(&self) -> Vec<(&'static str, u64, String)> {
        let causes = std::mem::take(&mut *self.0.causes.lock());
        let left_out = causes.into_iter().filter(|(_, tally)| tally.left_out > 0);
        left_out.map(|(cause, tally)| (cause, tally.left_out, tally.last)).collect()
    }
}

impl Tally {
    fn admits(&mut self, source: u64, in_total: u32) -> bool {
        if self.lines >= in_total {
            return false;
        }
        let is_apart = self.sources.len() < MAX_SOURCES || self.sources.contains_key(&source);
        let lines = self.sources.entry(if is_apart { source } else { 0 }).or_default();
        if *lines >= PER_SOURCE {
            return false;
        }
        *lines += 1;
        self.lines += 1;
        true
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::encoding::text::encode;
    use tokio::time::timeout;

    use super::*;

    fn admitted(limits: &Limits, cause: &'static str, source: &str, times: u32) -> u32 {
        (0..times).filter(|_| limits.admit(cause, source)).count().try_into().unwrap()
    }

    #[tokio::test(start_paused = true)]
    async fn each_source_has_so_many_lines_of_each_cause_a_minute() {
        let limits = Limits::default();
        assert_eq!(admitted(&limits, "not_tls", "192.0.2.1", 1000), PER_SOURCE);
        assert_eq!(admitted(&limits, "not_tls", "192.0.2.2", PER_SOURCE), PER_SOURCE);
        assert_eq!(admitted(&limits, "expired", "192.0.2.1", 1000), PER_SOURCE);
        let mut registry = Registry::default();
        limits.register(&mut registry);
        let mut text = String::new();
        encode(&mut text, &registry).unwrap();
        assert!(text.contains("log_lines_left_out_total{cause=\"not_tls\"} 980"), "{text}");
        assert_eq!(
            limits.take(),
            [("expired", 980, "192.0.2.1".to_owned()), ("not_tls", 980, "192.0.2.1".to_owned())]
        );
        assert_eq!(limits.take(), []);
        assert_eq!(admitted(&limits, "not_tls", "192.0.2.1", 1000), PER_SOURCE);
        // The first tick is at once, the second one a minute later.
        let renewed = async |time| assert!(timeout(time, limits.renew()).await.is_err());
        renewed(Duration::from_millis(1)).await;
        assert_eq!(admitted(&limits, "not_tls", "192.0.2.1", 1000), PER_SOURCE);
        let (limits, again) = (limits.clone(), limits.clone());
        let task = tokio::spawn(async move { limits.renew().await });
        tokio::task::yield_now().await;
        assert_eq!(admitted(&again, "not_tls", "192.0.2.1", 1000), PER_SOURCE);
        tokio::time::sleep(Duration::from_secs(59)).await;
        assert_eq!(admitted(&again, "not_tls", "192.0.2.1", 1), 0);
        tokio::time::sleep(Duration::from_secs(2)).await;
        assert_eq!(admitted(&again, "not_tls", "192.0.2.1", 1000), PER_SOURCE);
        task.abort();
    }

    #[test]
    fn sources_that_cost_nothing_have_a_limit_together_and_proven_ones_have_not() {
        let limits = Limits::default();
        let sources = |range: std::ops::Range<usize>, admits: &dyn Fn(usize) -> bool| {
            range.filter(|number| admits(*number)).count()
        };
        let in_total = usize::try_from(IN_TOTAL).unwrap();
        assert_eq!(sources(0..10_000, &|number| limits.admit("not_tls", number)), in_total);
        assert_eq!(sources(0..MAX_SOURCES, &|number| limits.admit_known("link_up", number)), MAX_SOURCES);
        // What is beyond the table has the lines of one source, and those in the table keep theirs.
        let further = sources(MAX_SOURCES..2 * MAX_SOURCES, &|number| limits.admit_known("link_up", number));
        assert_eq!(further, usize::try_from(PER_SOURCE).unwrap());
        assert!(limits.admit_known("link_up", 7));
    }
}
