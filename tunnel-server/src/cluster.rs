//! Watches the cluster's nodes, and keeps the grants in force in step with them. Built by `process` when the
//! configuration names a kubeconfig; run by [`crate::Gateway`], which drops it at its end.
//!
//! What was known stays: when the API server is gone, the last table is in force until it is back. Every failure has the
//! same cure, after a backoff: the credentials are read again, a new client lists all nodes and watches from there. So
//! rotated certificates are found, which a client reads only once, and whatever was missed meanwhile is made up for.

mod access;
mod nodes;

use std::{collections::BTreeSet, pin::pin, time::Duration};

use futures_util::{Stream, StreamExt};
use kube::{
    Api,
    runtime::{
        utils::Backoff,
        watcher::{self, DefaultBackoff, Event, watcher},
    },
};
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{debug, info, instrument::WithSubscriber, subscriber::NoSubscriber, warn};

pub use self::access::{Access, AccessError};
use self::{
    access::Clients,
    nodes::{Dropped, Node, Nodes},
};
use crate::{
    grants::{Grants, SharedGrants},
    metrics::Metrics,
};

/// How long the API server should let one watch last. A connection that died silently is noticed soon after.
const WATCH_SECONDS: u32 = 60;
/// At most one new table in this time: a burst of changes becomes one.
const PUBLISH_PERIOD: Duration = Duration::from_millis(100);
/// A watch that lasts this long after its list is a success. One that is cut sooner may be cut again and again.
const HOLD: Duration = Duration::from_secs(10);
/// If the backoff should ever run out.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// Different causes of one outage that are logged; and lines that are logged for one new table.
const MAX_LINES: usize = 16;

/// Keeps `grants` in step with the cluster.
pub(crate) struct ClusterWatch {
    clients: Clients,
    configured: Grants,
    grants: SharedGrants,
    metrics: Metrics,
    nodes: Nodes,
    /// All nodes were read at least once.
    complete: bool,
    /// Nodes have changed, and when a table of that may be published.
    due: Option<Instant>,
    published: Option<Instant>,
    backoff: DefaultBackoff,
    /// All nodes were listed, and when that counts as a success.
    holds_at: Option<Instant>,
    /// What the log says of the table in force.
    dropped: BTreeSet<Dropped>,
    /// What the log says of the outage that lasts.
    causes: BTreeSet<String>,
    /// The log says that the nodes were lost, after they had been read.
    lost: bool,
}

impl ClusterWatch {
    /// Until the nodes are read, `grants` are those that are configured, and say so.
    pub(crate) fn new(access: Access, configured: Grants, grants: SharedGrants, metrics: Metrics) -> Self {
        grants.replace(configured.clone().without_nodes_yet("the gateway has just started".to_owned()));
        Self {
            clients: Clients::new(access),
            configured,
            grants,
            metrics,
            nodes: Nodes::default(),
            complete: false,
            due: None,
            published: None,
            backoff: DefaultBackoff::default(),
            holds_at: None,
            dropped: BTreeSet::new(),
            causes: BTreeSet::new(),
            lost: false,
        }
    }

    /// Watches for ever. Dropping the future ends it.
    pub(crate) async fn run(mut self) {
        loop {
            let lost = self.watch().await;
            sleep(self.pause(&lost)).await;
        }
    }

    /// Lists all nodes and watches them, until that fails.
    async fn watch(&mut self) -> Lost {
        let client = match self.clients.next().await {
            Ok(client) => client,
            Err(error) => return Lost::failed(&error.to_string()),
        };
        let config = watcher::Config::default().timeout(WATCH_SECONDS);
        self.follow(watcher(Api::<Node>::all(client), config)).await
    }

    async fn follow(&mut self, events: impl Stream<Item = Result<Event<Node>, watcher::Error>>) -> Lost {
        let mut events = pin!(events);
        loop {
            tokio::select! {
                // What is due goes first, so that a flood of events cannot hold it back.
                biased;
                () = sleep_until(self.due.unwrap_or_else(Instant::now)), if self.due.is_some() => self.publish(),
                () = sleep_until(self.holds_at.unwrap_or_else(Instant::now)), if self.holds_at.is_some() => self.hold(),
                // kube would log every failure again, at each retry: `report` does it once.
                event = events.next().with_subscriber(NoSubscriber::new()) => match event {
                    Some(Ok(event)) => self.apply(event),
                    Some(Err(error)) => return Lost::by(&error),
                    None => return Lost::failed("the watch has ended"),
                }
            }
        }
    }

    /// After a watch: how long until the next.
    fn pause(&mut self, lost: &Lost) -> Duration {
        self.metrics.cluster_in_sync.set(0);
        self.holds_at = None;
        if self.due.is_some() {
            self.publish();
        }
        self.report(lost);
        self.backoff.next().unwrap_or(LONGEST_PAUSE)
    }

    /// The watch has lasted: whatever was wrong is over.
    fn hold(&mut self) {
        self.holds_at = None;
        self.backoff.reset();
        self.causes.clear();
        if std::mem::take(&mut self.lost) {
            info!(nodes = self.nodes.count(), "the cluster's nodes are read again");
        }
    }

    fn apply(&mut self, event: Event<Node>) {
        let listed = matches!(event, Event::InitDone);
        let changed = self.nodes.apply(event);
        if listed {
            self.metrics.cluster_in_sync.set(1);
            self.holds_at = Some(Instant::now() + HOLD);
        }
        if changed || (listed && !self.complete) {
            let now = Instant::now();
            let earliest = self.published.map_or(now, |published| published + PUBLISH_PERIOD);
            self.due.get_or_insert(earliest.max(now));
        }
        if listed && !self.complete {
            self.complete = true;
            info!(nodes = self.nodes.count(), access = %self.clients.access(), "the nodes have been read from the cluster");
        }
    }

    fn publish(&mut self) {
        self.due = None;
        self.published = Some(Instant::now());
        let (table, dropped) = self.nodes.grants(&self.configured);
        self.metrics.cluster_nodes.set(i64::try_from(self.nodes.count()).unwrap_or(i64::MAX));
        let new: Vec<&Dropped> = dropped.difference(&self.dropped).collect();
        for dropped in new.iter().take(MAX_LINES) {
            warn!("{dropped}");
        }
        if let Some(more) = new.len().checked_sub(MAX_LINES).filter(|more| *more > 0) {
            warn!(more, "and more that nodes claim is not granted");
        }
        self.dropped = dropped;
        if self.grants.replace(table) {
            debug!("new grants are in force");
        }
    }

    /// Says once in an outage what is wrong.
    fn report(&mut self, lost: &Lost) {
        let cause = match lost {
            Lost::Outdated => return debug!("the watch is too far behind: all nodes are listed anew"),
            Lost::Failed(cause) => cause,
        };
        if !self.complete {
            self.grants.replace(self.configured.clone().without_nodes_yet(cause.clone()));
        }
        if self.causes.len() < MAX_LINES && self.causes.insert(cause.clone()) {
            self.lost = self.complete;
            let server = self.clients.server();
            let state = if self.complete { "what is known of them stays" } else { "none is known yet" };
            warn!(access = %self.clients.access(), server, cause, state, "the nodes cannot be read from the cluster; trying again");
        }
    }
}

/// Why a watch ended.
#[derive(Debug, PartialEq, Eq)]
enum Lost {
    /// The API server no longer has the changes since the last that was seen (410 Gone): nothing is wrong.
    Outdated,
    Failed(String),
}

impl Lost {
    fn by(error: &watcher::Error) -> Self {
        use watcher::Error as E;
        match error {
            E::WatchError(status) if status.code == 410 => Self::Outdated,
            E::WatchStartFailed(kube::Error::Api(status)) if status.code == 410 => Self::Outdated,
            E::WatchError(status) => Self::failed(&format!(
                "the API server ends the watch with {}: {}",
                status.code, status.message
            )),
            E::InitialListFailed(error) | E::WatchStartFailed(error) | E::WatchFailed(error) => {
                Self::failed(&access::causes(error))
            }
            E::NoResourceVersion => Self::failed("the API server's answer has no resource version"),
        }
    }

    fn failed(cause: &str) -> Self {
        Self::Failed(access::shorten(cause))
    }
}

#[cfg(test)]
mod tests;
