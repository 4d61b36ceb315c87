//! Whether an edge is connected: written by `keeper` and `link`, read by the readiness probe of the admin endpoint.

use std::sync::Arc;

use parking_lot::Mutex;
use tokio::time::Instant;

use crate::{daemon::tasks::Vital, metrics::Metrics};

/// Says whether an agent holds a link. Cheap to clone; outlives the agent harmlessly.
#[derive(Clone, Debug)]
pub struct AgentStatus {
    state: Arc<Mutex<State>>,
    vital: Vital,
}

#[derive(Debug)]
struct State {
    /// Links that new streams may come over. One whose gateway drains is among them, until there is another in its place or
    /// it ends: as long as the gateway has no other way to the node, it goes on to use it.
    links: usize,
    /// When `links` last became zero.
    since: Instant,
    last_error: Option<String>,
}

impl AgentStatus {
    pub(crate) fn new() -> Self {
        let state = State { links: 0, since: Instant::now(), last_error: None };
        Self { state: Arc::new(Mutex::new(state)), vital: Vital::default() }
    }

    /// What watches the tasks that the agent cannot do without.
    pub(crate) fn vital(&self) -> &Vital {
        &self.vital
    }

    /// `Ok` while at least one link is up; otherwise for how long there has been none, and why, for people. Not ready either
    /// once the agent has failed.
    pub fn ready(&self) -> Result<(), String> {
        self.vital.check().map_err(|failure| failure.to_string())?;
        let state = self.state.lock();
        if state.links > 0 {
            return Ok(());
        }
        let cause = state.last_error.as_deref().unwrap_or("no attempt has ended yet");
        Err(format!("not connected to any gateway for {} s: {cause}", state.since.elapsed().as_secs()))
    }

    pub(crate) fn failed(&self, cause: String) {
        self.state.lock().last_error = Some(cause);
    }

    /// Links that new streams may come over.
    pub(crate) fn links(&self) -> usize {
        self.state.lock().links
    }

    /// Counts a link until the returned value is dropped, in the metrics, and here until a newer one takes over.
    pub(crate) fn link_up(&self, metrics: &Metrics) -> LinkUp {
        self.state.lock().links += 1;
        metrics.links.inc();
        LinkUp { status: self.clone(), metrics: metrics.clone(), serving: true, draining: false }
    }
}

/// A link is up for as long as this lives.
#[derive(Debug)]
pub(crate) struct LinkUp {
    status: AgentStatus,
    metrics: Metrics,
    /// Whether new streams may come over it.
    serving: bool,
    draining: bool,
}

impl LinkUp {
    /// No new streams will come over the link soon, because of `cause`.
    pub(crate) fn drains(&mut self, cause: String) {
        self.status.failed(cause);
        self.draining = true;
    }

    /// No new streams come over the link, since there is a newer one.
    pub(crate) fn retires(&mut self) {
        self.stop_serving();
    }

    fn stop_serving(&mut self) {
        if std::mem::take(&mut self.serving) {
            let mut state = self.status.state.lock();
            state.links -= 1;
            state.since = Instant::now();
        }
    }

    /// The link has ended, because of `cause`. If it was to end anyhow, that is not why there is no other.
    pub(crate) fn lost(self, cause: String) {
        if self.serving && !self.draining {
            self.status.failed(cause);
        }
    }
}

impl Drop for LinkUp {
    fn drop(&mut self) {
        self.stop_serving();
        self.metrics.links.dec();
    }
}

#[cfg(test)]
mod tests {
    use prometheus_client::registry::Registry;

    use super::*;

    #[test]
    fn the_end_of_a_link_that_has_retired_is_not_why_there_is_none() {
        let (status, metrics) = (AgentStatus::new(), Metrics::new(&mut Registry::default()));
        let mut old = status.link_up(&metrics);
        let new = status.link_up(&metrics);
        old.retires();
        assert_eq!((status.ready(), metrics.links.get()), (Ok(()), 2));
        new.lost("cut".to_owned());
        old.lost("its last stream has ended".to_owned());
        assert!(status.ready().unwrap_err().ends_with("s: cut"), "{:?}", status.ready());
        assert_eq!(metrics.links.get(), 0);
    }

    #[test]
    fn a_link_whose_gateway_drains_counts_until_it_ends_and_is_why_there_is_none() {
        let (status, metrics) = (AgentStatus::new(), Metrics::new(&mut Registry::default()));
        let mut only = status.link_up(&metrics);
        only.drains("the gateway drains".to_owned());
        assert_eq!((status.ready(), status.links()), (Ok(()), 1));
        only.lost("its last stream has ended".to_owned());
        assert!(status.ready().unwrap_err().ends_with("s: the gateway drains"), "{:?}", status.ready());
    }
}
