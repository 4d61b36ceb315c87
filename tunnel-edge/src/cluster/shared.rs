//! A [`Cluster`] as the keepers and links of one agent share it: under a lock, with a signal when something has changed.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tracing::info;
use tunnel_core::proto::messages::{Gateway, Welcome};

use super::{Cluster, Purpose, Step, Tally, Turn};
use crate::metrics::Metrics;

/// Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct SharedCluster(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    state: Mutex<State>,
    changed: watch::Sender<()>,
    metrics: Metrics,
}

#[derive(Debug)]
struct State {
    cluster: Cluster,
    /// As it was last shown.
    shown: Tally,
}

impl SharedCluster {
    pub(crate) fn new(cluster: Cluster, metrics: Metrics) -> Self {
        let shown = cluster.tally();
        metrics.links_wanted.inc_by(count(shown.wanted));
        let state = Mutex::new(State { cluster, shown });
        Self(Arc::new(Shared { state, changed: watch::Sender::new(()), metrics }))
    }

    /// Hears of every change, until all clones of this are gone.
    pub(crate) fn changes(&self) -> watch::Receiver<()> {
        self.0.changed.subscribe()
    }

    pub(crate) fn tally(&self) -> Tally {
        self.0.state.lock().cluster.tally()
    }

    pub(crate) fn next(&self, seat: usize, purpose: Purpose) -> Step {
        self.0.state.lock().cluster.next(seat, purpose, Instant::now())
    }

    pub(crate) fn turn(&self, seat: usize) -> Turn {
        self.0.state.lock().cluster.turn(seat, Instant::now())
    }

    pub(crate) fn claim(
        &self,
        seat: usize,
        purpose: Purpose,
        expected: Option<&str>,
        welcome: &Welcome,
    ) -> Option<u64> {
        let said = (&*welcome.gateway_id, &*welcome.gateways);
        self.change(|cluster, now| cluster.claim(seat, purpose, expected, said, now))
    }

    pub(crate) fn unreachable(&self, gateway: &str) -> bool {
        self.change(|cluster, now| cluster.unreachable(gateway, now))
    }

    pub(crate) fn updated(&self, link: u64, gateways: &[Gateway]) {
        self.change(|cluster, _| cluster.updated(link, gateways));
    }

    pub(crate) fn draining(&self, link: u64) {
        self.change(|cluster, _| cluster.draining(link));
    }

    pub(crate) fn lost(&self, link: u64) {
        self.change(|cluster, now| cluster.lost(link, now));
    }

    pub(crate) fn move_ended(&self, seat: usize) {
        self.change(|cluster, _| cluster.move_ended(seat));
    }

    fn change<T>(&self, change: impl FnOnce(&mut Cluster, Instant) -> T) -> T {
        let done = {
            let mut state = self.0.state.lock();
            let done = change(&mut state.cluster, Instant::now());
            self.show(&mut state);
            done
        };
        self.0.changed.send_replace(());
        done
    }

    /// Metrics count in steps, since several agents of one process may share them.
    fn show(&self, state: &mut State) {
        let (before, tally) = (state.shown, state.cluster.tally());
        let metrics = &self.0.metrics;
        metrics.links_wanted.inc_by(count(tally.wanted) - count(before.wanted));
        metrics.gateways_linked.inc_by(count(tally.held) - count(before.held));
        metrics.gateways_known.inc_by(count(tally.known) - count(before.known));
        state.shown = tally;
        if before.known != tally.known && before.known != 0 {
            let Tally { known, wanted, .. } = tally;
            info!(gateways = known, links_wanted = wanted, "the number of gateways has changed");
        }
    }
}

fn count(number: usize) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}
