//! Whether an edge is connected: written by `agent` and `link`, read by the readiness probe of the admin endpoint.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::metrics::Metrics;

/// Says whether an agent holds a link. Cheap to clone; outlives the agent harmlessly.
#[derive(Clone, Debug)]
pub struct AgentStatus(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    /// Links that are up; one that drains still serves its streams, and counts.
    links: usize,
    /// When `links` last became zero.
    since: Instant,
    last_error: Option<String>,
}

impl AgentStatus {
    pub(crate) fn new() -> Self {
        Self(Arc::new(Mutex::new(State { links: 0, since: Instant::now(), last_error: None })))
    }

    /// `Ok` while at least one link is up; otherwise for how long there has been none, and why, for people.
    pub fn ready(&self) -> Result<(), String> {
        let state = self.0.lock();
        if state.links > 0 {
            return Ok(());
        }
        let cause = state.last_error.as_deref().unwrap_or("no attempt has ended yet");
        Err(format!("not connected to any gateway for {} s: {cause}", state.since.elapsed().as_secs()))
    }

    pub(crate) fn failed(&self, cause: String) {
        self.0.lock().last_error = Some(cause);
    }

    /// Counts a link until the returned value is dropped, here and in the metrics.
    pub(crate) fn link_up(&self, metrics: &Metrics) -> LinkUp {
        self.0.lock().links += 1;
        metrics.links.inc();
        LinkUp { status: self.clone(), metrics: metrics.clone() }
    }
}

/// A link is up for as long as this lives.
#[derive(Debug)]
pub(crate) struct LinkUp {
    status: AgentStatus,
    metrics: Metrics,
}

impl LinkUp {
    /// The link has ended, because of `cause`.
    pub(crate) fn lost(self, cause: String) {
        self.status.failed(cause);
    }
}

impl Drop for LinkUp {
    fn drop(&mut self) {
        let mut state = self.status.0.lock();
        state.links -= 1;
        state.since = Instant::now();
        self.metrics.links.dec();
    }
}
