//! From a request to a stream: which node serves the target, and over which of its links. Called by both ingress
//! protocols; asks `grants` and `edges::registry`, and opens the stream with core's `LinkHandle`.

use std::{fmt, sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep},
};
use tracing::debug;
use tunnel_core::{
    Host, LinkHandle, NodeId, OpenError, OpenRequest, Target, TunnelStream,
    proto::messages::{Ingress, RefusalCode},
};

use crate::{
    edges::registry::{Lookup, Registry},
    grants::{Holder, SharedGrants},
    ingress::Caller,
};

/// Links that are tried for one request.
const ATTEMPTS: usize = 2;
/// The part of the dial timeout for which a link may be silent before another is tried.
const SILENCE: u32 = 3;

/// What the control plane asks for, once it is known that it may ask.
#[derive(Clone, Debug)]
pub(crate) struct Request {
    pub(crate) target: Target,
    pub(crate) caller: Caller,
    /// Names the request in the logs of every process on its way.
    pub(crate) id: String,
    /// W3C trace context; empty if there is none.
    pub(crate) traceparent: String,
    pub(crate) ingress: Ingress,
}

/// A request that has reached its target.
#[derive(Debug)]
pub(crate) struct Routed {
    pub(crate) stream: TunnelStream,
    pub(crate) node: NodeId,
    /// What the edge dialled.
    pub(crate) address: String,
    /// Its place among the streams of this gateway, given back when it has ended.
    _place: OwnedSemaphorePermit,
}

/// Why a request did not reach its target.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum RouteError {
    /// Nobody is known to serve this host.
    #[error("no such node: {host} is neither a node known to this gateway nor granted to one")]
    NoSuchNode { host: Host },
    /// Nobody is known to serve this host, but the cluster's nodes are not known yet.
    #[error("{host} is not known yet: the nodes have not been read from the cluster ({cause})")]
    NodesUnread { host: Host, cause: String },
    /// More than one node serves this host.
    #[error("{}", Shared(host, nodes))]
    Ambiguous { host: Host, nodes: Vec<NodeId> },
    /// The node has no link.
    #[error("node {node} has no link to this gateway; {}", LastSeen(*last_seen))]
    Offline { node: NodeId, last_seen: Option<Duration> },
    /// All links of the node drain.
    #[error("node {node} is draining: its edge takes no new streams")]
    Draining { node: NodeId },
    /// The gateway carries as many streams as it may.
    #[error(
        "this gateway carries as many streams as it may ({max}): raise ingress.max_streams, or add a gateway"
    )]
    GatewayFull { max: usize },
    /// The link carries as many streams as it may.
    #[error("node {node} is busy: {text}")]
    Overloaded { node: NodeId, text: String },
    /// The edge said no.
    #[error("{}", Said(node, text))]
    Refused { node: NodeId, code: RefusalCode, text: String },
    /// No answer in time.
    #[error("node {node} did not connect {target} within {} ms", timeout.as_millis())]
    TimedOut { node: NodeId, target: Target, timeout: Duration },
    /// The link went away while the target was dialled.
    #[error("node {node}: {text}")]
    LinkLost { node: NodeId, text: String },
    /// The edge does not speak the protocol right.
    #[error("node {node}: {text}")]
    Protocol { node: NodeId, text: String },
}

/// What an edge said, with its node's name in front unless it stands there already.
struct Said<'a>(&'a NodeId, &'a str);

impl fmt::Display for Said<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(node, text) = self;
        if !text.starts_with(node.as_str()) {
            write!(f, "node {node}: ")?;
        }
        f.write_str(text)
    }
}

/// A host that more than one node has a right to, and how to reach the one that is meant.
struct Shared<'a>(&'a Host, &'a [NodeId]);

impl fmt::Display for Shared<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self(host, nodes) = self;
        let name = host.to_string();
        if !nodes.iter().any(|node| node.as_str() == name) {
            return write!(
                f,
                "{host} is granted to more than one node ({}): ask for the node by its name",
                Names(nodes)
            );
        }
        write!(
            f,
            "{host} is the name of one node and granted to another ({}): ask for the other by its own name, or have \
             the configuration grant {host} to the node of that name alone",
            Names(nodes)
        )
    }
}

struct Names<'a>(&'a [NodeId]);

impl fmt::Display for Names<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 4;
        for (index, node) in self.0.iter().take(SHOWN).enumerate() {
            write!(f, "{}{node}", if index == 0 { "" } else { ", " })?;
        }
        match self.0.len().saturating_sub(SHOWN) {
            0 => Ok(()),
            more => write!(f, " and {more} more"),
        }
    }
}

struct LastSeen(Option<Duration>);

impl fmt::Display for LastSeen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(ago) => {
                write!(f, "last seen {} ago", humantime::format_duration(Duration::from_secs(ago.as_secs())))
            }
            None => f.write_str("it was not seen since this gateway started"),
        }
    }
}

/// Finds the way for requests.
#[derive(Debug)]
pub(crate) struct Router {
    registry: Arc<Registry>,
    grants: SharedGrants,
    dial_timeout: Duration,
    /// For every stream of this gateway.
    places: Arc<Semaphore>,
    max_streams: usize,
}

impl Router {
    pub(crate) fn new(
        registry: Arc<Registry>,
        grants: SharedGrants,
        dial_timeout: Duration,
        max_streams: usize,
    ) -> Self {
        let max_streams = max_streams.clamp(1, Semaphore::MAX_PERMITS);
        Self { registry, grants, dial_timeout, places: Arc::new(Semaphore::new(max_streams)), max_streams }
    }

    /// Connects the target of a request.
    ///
    /// A link that turns out to be lost, draining or full is made up for once by the node's next one: nothing was sent
    /// to the target yet. Cancel-safe: dropping the future tells the edge to give up.
    pub(crate) async fn open(&self, request: &Request) -> Result<Routed, RouteError> {
        let (node, links) = self.choose(&request.target.host)?;
        let full = |_| RouteError::GatewayFull { max: self.max_streams };
        let place = self.places.clone().try_acquire_owned().map_err(full)?;
        let deadline = Instant::now() + self.dial_timeout;
        let mut failure = None;
        for (attempt, link) in links.iter().take(ATTEMPTS).enumerate() {
            let is_last = attempt + 1 == links.len().min(ATTEMPTS);
            let opened = tokio::select! {
                // An answer goes before the suspicion that there will be none.
                biased;
                opened = self.open_on(link, &node, request, deadline) => opened,
                () = self.falls_silent(link), if !is_last => {
                    let text = "the link has been silent since it was asked".to_owned();
                    Err(RouteError::LinkLost { node: node.clone(), text })
                }
            };
            match opened {
                Err(error) if is_the_links_fault(&error) => {
                    debug!(request = request.id, %error, "trying the node's next link");
                    failure = Some(error);
                }
                Err(error) => return Err(error),
                Ok((stream, address)) => return Ok(Routed { stream, node, address, _place: place }),
            }
        }
        Err(failure.unwrap_or(RouteError::Draining { node }))
    }

    /// Completes when a part of the dial timeout has passed without a byte from the link: it may be half-open. A link that
    /// is heard has a target that is slow, and is waited for. Cancel-safe.
    async fn falls_silent(&self, link: &LinkHandle) {
        let asked = Instant::now();
        sleep(self.dial_timeout / SILENCE).await;
        if link.last_heard() > asked {
            std::future::pending::<()>().await;
        }
    }

    /// The node that serves a host, and its links, the preferred one first.
    fn choose(&self, host: &Host) -> Result<(NodeId, Vec<LinkHandle>), RouteError> {
        let node = self.node_of(host)?;
        match self.registry.lookup(&node) {
            Lookup::Links(links) => Ok((node, links)),
            Lookup::Draining => Err(RouteError::Draining { node }),
            Lookup::Offline { last_seen } => Err(RouteError::Offline { node, last_seen: Some(last_seen) }),
            Lookup::Unknown => Err(RouteError::Offline { node, last_seen: None }),
        }
    }

    /// A node's own name goes before everything that is granted, even while the node is offline. But not a name that
    /// looks like an address: whoever gets a certificate for one would take the streams of the node that has the address.
    fn node_of(&self, host: &Host) -> Result<NodeId, RouteError> {
        let grants = self.grants.load();
        let name = match host {
            Host::Ip(address) => address.to_string(),
            Host::Name(name) => name.clone(),
        };
        let is_there =
            |node: &NodeId| grants.knows(node) || !matches!(self.registry.lookup(node), Lookup::Unknown);
        let holder = match (name.parse().ok().filter(is_there), host) {
            (Some(node), Host::Name(_)) => return Ok(node),
            (Some(node), Host::Ip(_)) => grants.holder_beside(host, node),
            (None, _) => grants.holder(host),
        };
        match holder {
            Holder::One(node) => Ok(node),
            Holder::Several(nodes) => Err(RouteError::Ambiguous { host: host.clone(), nodes }),
            Holder::None => Err(match grants.unread() {
                Some(cause) => RouteError::NodesUnread { host: host.clone(), cause: cause.to_owned() },
                None => RouteError::NoSuchNode { host: host.clone() },
            }),
        }
    }

    async fn open_on(
        &self,
        link: &LinkHandle,
        node: &NodeId,
        request: &Request,
        deadline: Instant,
    ) -> Result<(TunnelStream, String), RouteError> {
        let open = OpenRequest {
            target: request.target.to_string(),
            request_id: request.id.clone(),
            traceparent: request.traceparent.clone(),
            ingress: request.ingress,
            caller: request.caller.to_string(),
            node: String::new(),
        };
        let left = deadline.saturating_duration_since(Instant::now());
        link.open(open, left).await.map_err(|error| self.explain(error, node.clone(), request))
    }

    fn explain(&self, error: OpenError, node: NodeId, request: &Request) -> RouteError {
        match error {
            OpenError::Refused { code: RefusalCode::Overloaded, text } => {
                RouteError::Overloaded { node, text }
            }
            OpenError::Refused { code, text } => RouteError::Refused { node, code, text },
            OpenError::Draining => RouteError::Draining { node },
            OpenError::TimedOut(_) => {
                RouteError::TimedOut { node, target: request.target.clone(), timeout: self.dial_timeout }
            }
            error @ OpenError::Overloaded { .. } => RouteError::Overloaded { node, text: error.to_string() },
            error @ OpenError::LinkLost(_) => RouteError::LinkLost { node, text: error.to_string() },
            error @ OpenError::Protocol(_) => RouteError::Protocol { node, text: error.to_string() },
        }
    }
}

fn is_the_links_fault(error: &RouteError) -> bool {
    matches!(error, RouteError::LinkLost { .. } | RouteError::Draining { .. } | RouteError::Overloaded { .. })
}
