//! From a request to a stream: which node serves the target, and by which way. A way is a link of the node to this
//! gateway, or the link to a peer that holds one. Called by both ingress protocols, and by the peers' door for streams
//! that have come a hop already; asks `grants`, `edges::registry` and `directory`, and opens the stream with core's
//! `LinkHandle`.

use std::{fmt, num::NonZeroUsize, sync::Arc, time::Duration};

use tokio::{
    sync::{OwnedSemaphorePermit, Semaphore},
    time::{Instant, sleep},
};
use tracing::debug;
use tunnel_core::{
    GatewayId, Host, LinkHandle, NodeId, OpenError, OpenRequest, Target, TunnelStream,
    proto::messages::{Ingress, RefusalCode},
};

use crate::{
    callers::{CallerPlace, Callers},
    directory::{Directory, Holder as Elsewhere},
    edges::registry::{Lookup, Registry},
    grants::{Holder, SharedGrants},
    ingress::Caller,
    metrics::Metrics,
    peers::mesh::Mesh,
};

/// Ways that are tried for one request before others are looked for.
const ATTEMPTS: usize = 4;
/// Ways that are tried for one request at all.
const MOST_TRIED: usize = 2 * ATTEMPTS;
/// How long a node that has just left its gateway is waited for: it may have a link to another one already, of which the
/// word is on its way. While a gateway leaves, its edges do so one after another.
const SETTLING: Duration = Duration::from_millis(500);
/// How often it is looked for in that time.
const LOOK_AGAIN: Duration = Duration::from_millis(10);
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
    /// The peer that holds the node's link, if it is not this gateway.
    pub(crate) via: Option<GatewayId>,
    /// Its place among the streams of this gateway and of its caller, given back when it has ended.
    _place: Place,
}

type Place = (OwnedSemaphorePermit, Option<CallerPlace>);

/// How many streams a gateway carries.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct StreamLimits {
    /// All together.
    pub(crate) total: usize,
    /// Those of one caller to one node, beside those to its kubelet that are kept for it.
    pub(crate) per_caller: Option<NonZeroUsize>,
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
    /// Nobody is known to serve this host, but what is known of other gateways is not whole.
    #[error("{host} is not known to this gateway, but {cause}")]
    Unsure { host: Host, cause: String },
    /// More than one node serves this host.
    #[error("{}", Shared(host, nodes))]
    Ambiguous { host: Host, nodes: Vec<NodeId> },
    /// The node has no link.
    #[error("node {node} has no link to this gateway; {}", LastSeen(*last_seen))]
    Offline { node: NodeId, last_seen: Option<Duration> },
    /// The node has no link, and had one to another gateway.
    #[error(
        "node {node} has no link to any gateway that is known here: the last one was to gateway {gateway}, until {} ago; \
         look at the log of its edge, and whether that gateway runs",
        Seconds(*ago)
    )]
    Nowhere { node: NodeId, gateway: GatewayId, ago: Duration },
    /// Only gateways that cannot be reached are known to hold a link to the node.
    #[error(
        "node {node} is linked to gateway {}, which this gateway has no link to: look at both gateways' logs, and whether \
         they reach each other",
        Names(gateways)
    )]
    Unreachable { node: NodeId, gateways: Vec<GatewayId> },
    /// The gateway that is known to have held a link to the node last is out of reach, and may hold it still.
    #[error(
        "node {node} was linked to gateway {gateway}, to which this gateway lost its link {} ago: does that gateway run, and \
         do the two reach each other?",
        Seconds(*ago)
    )]
    OutOfReach { node: NodeId, gateway: GatewayId, ago: Duration },
    /// All links of the node drain.
    #[error("node {node} is draining: its edge takes no new streams")]
    Draining { node: NodeId },
    /// The gateway carries as many streams as it may.
    #[error(
        "this gateway carries as many streams as it may ({max}): raise ingress.max_streams, or add a gateway"
    )]
    GatewayFull { max: usize },
    /// The caller has as many streams to the node as it may.
    #[error(
        "{caller} has as many streams to node {node} as one caller may ({max}): close some, or raise \
         ingress.max_streams_per_caller"
    )]
    CallerFull { node: NodeId, caller: String, max: NonZeroUsize },
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

struct Names<'a, N>(&'a [N]);

impl<N: fmt::Display> fmt::Display for Names<'_, N> {
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

/// A time, to the second.
struct Seconds(Duration);

impl fmt::Display for Seconds {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        humantime::format_duration(Duration::from_secs(self.0.as_secs())).fmt(f)
    }
}

struct LastSeen(Option<Duration>);

impl fmt::Display for LastSeen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(ago) => write!(f, "last seen {} ago", Seconds(ago)),
            None => f.write_str("it was not seen since this gateway started"),
        }
    }
}

/// Finds the way for requests. Clones find the same ways, and share what bounds them.
#[derive(Clone, Debug)]
pub(crate) struct Router {
    registry: Arc<Registry>,
    grants: SharedGrants,
    directory: Arc<dyn Directory>,
    /// The links to other gateways, if there may be any.
    mesh: Option<Arc<Mesh>>,
    dial_timeout: Duration,
    /// For every stream of this gateway.
    places: Arc<Semaphore>,
    max_streams: usize,
    /// For those of each caller, if that is bounded.
    callers: Option<Arc<Callers>>,
    metrics: Metrics,
}

/// One way to a node.
#[derive(Clone, Debug)]
enum Way {
    /// Its link to this gateway.
    Link(LinkHandle),
    /// The link to a peer that says it holds one.
    Peer(Elsewhere, LinkHandle),
}

impl Way {
    fn link(&self) -> &LinkHandle {
        match self {
            Self::Link(link) | Self::Peer(_, link) => link,
        }
    }

    fn gateway(&self) -> Option<&GatewayId> {
        match self {
            Self::Link(_) => None,
            Self::Peer(holder, _) => Some(&holder.gateway),
        }
    }

    /// Whether the other is no better than this one: the same link, and the same word of what lies behind it.
    fn is_same(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::Link(one), Self::Link(another)) => one.is_same(another),
            (Self::Peer(holder, one), Self::Peer(another_holder, another)) => {
                holder == another_holder && one.is_same(another)
            }
            _ => false,
        }
    }
}

impl Router {
    pub(crate) fn new(
        registry: Arc<Registry>,
        grants: SharedGrants,
        (directory, mesh): (Arc<dyn Directory>, Option<Arc<Mesh>>),
        dial_timeout: Duration,
        limits: StreamLimits,
        metrics: Metrics,
    ) -> Self {
        let max_streams = limits.total.clamp(1, Semaphore::MAX_PERMITS);
        let places = Arc::new(Semaphore::new(max_streams));
        let callers = limits.per_caller.map(Callers::new);
        Self { registry, grants, directory, mesh, dial_timeout, places, max_streams, callers, metrics }
    }

    /// Connects the target of a request.
    ///
    /// A way that turns out to be lost, draining, full or wrong is made up for by the next one: nothing was sent to the
    /// target yet. Cancel-safe: dropping the future tells the edge to give up.
    pub(crate) async fn open(&self, request: &Request) -> Result<Routed, RouteError> {
        let node = self.node_of(&request.target.host)?;
        let asked = Instant::now();
        let (deadline, settled) = (asked + self.dial_timeout, asked + SETTLING.min(self.dial_timeout));
        let (mut tried, mut failure): (Vec<Way>, _) = (Vec::new(), None);
        loop {
            let ways = match self.ways(&node) {
                Ok(ways) => ways,
                Err(no_way) => {
                    failure.get_or_insert(no_way);
                    Vec::new()
                }
            };
            let is_new = |way: &Way| !tried.iter().any(|known| known.is_same(way));
            let ways: Vec<Way> = ways.into_iter().filter(is_new).take(ATTEMPTS).collect();
            if !ways.is_empty() {
                match self.open_by(&ways, &node, request, deadline).await {
                    Err(error) if is_the_ways_fault(&error) => failure = Some(error),
                    decided => return decided,
                }
                tried.extend(ways);
            }
            match failure {
                // What was wrong with the ways may have become known meanwhile, and with it a better one.
                Some(failure)
                    if !self.may_turn_up(&failure)
                        || tried.len() >= MOST_TRIED
                        || Instant::now() >= settled =>
                {
                    return Err(failure);
                }
                _ => sleep(LOOK_AGAIN).await,
            }
        }
    }

    /// Whether the node may be found at another gateway in a moment.
    fn may_turn_up(&self, failure: &RouteError) -> bool {
        use RouteError as E;
        let is_recent = |ago: &Duration| *ago < SETTLING;
        self.mesh.is_some()
            && match failure {
                E::Draining { .. } | E::LinkLost { .. } => true,
                E::Offline { last_seen, .. } => last_seen.as_ref().is_some_and(is_recent),
                E::Nowhere { ago, .. } | E::OutOfReach { ago, .. } => is_recent(ago),
                _ => false,
            }
    }

    /// As [`Self::open`], for a stream that a peer hands on: only by a link of the node to this gateway.
    pub(crate) async fn open_here(
        &self,
        node: &NodeId,
        request: &Request,
        patience: Duration,
    ) -> Result<Routed, RouteError> {
        let deadline = Instant::now() + patience.min(self.dial_timeout);
        self.open_by(&self.links(node)?, node, request, deadline).await
    }

    async fn open_by(
        &self,
        ways: &[Way],
        node: &NodeId,
        request: &Request,
        deadline: Instant,
    ) -> Result<Routed, RouteError> {
        let to_kubelet = self.is_kubelet(node, &request.target);
        let place = self.place(node, request, to_kubelet)?;
        let mut failure = None;
        for (attempt, way) in ways.iter().take(ATTEMPTS).enumerate() {
            let is_last = attempt + 1 == ways.len().min(ATTEMPTS);
            let opened = tokio::select! {
                // An answer goes before the suspicion that there will be none.
                biased;
                opened = self.open_on(way, node, request, to_kubelet, deadline) => opened,
                () = self.falls_silent(way.link()), if !is_last => {
                    let text = "the link has been silent since it was asked".to_owned();
                    Err(RouteError::LinkLost { node: node.clone(), text })
                }
            };
            match opened {
                Err(error) if is_the_ways_fault(&error) => {
                    debug!(request = request.id, %error, "trying the next way to the node");
                    failure = Some(error);
                }
                Err(error) => return Err(error),
                Ok((stream, address)) => {
                    let (node, via) = (node.clone(), way.gateway().cloned());
                    return Ok(Routed { stream, node, address, via, _place: place });
                }
            }
        }
        Err(failure.unwrap_or_else(|| RouteError::Draining { node: node.clone() }))
    }

    /// Places for a stream that is still to be opened.
    fn place(&self, node: &NodeId, request: &Request, to_kubelet: bool) -> Result<Place, RouteError> {
        let full = |_| RouteError::GatewayFull { max: self.max_streams };
        let place = self.places.clone().try_acquire_owned().map_err(full)?;
        let caller = &request.caller;
        let of_caller = self.callers.as_ref().map(|callers| callers.place(node, caller, to_kubelet));
        let too_many = |max| {
            let caller = caller.counted_as().to_owned();
            RouteError::CallerFull { node: node.clone(), caller, max }
        };
        Ok((place, of_caller.transpose().map_err(too_many)?))
    }

    /// Whether the target is the node's own kubelet, and not a pod that has the same port.
    fn is_kubelet(&self, node: &NodeId, target: &Target) -> bool {
        let grants = self.grants.load();
        let is_node_itself = || match &target.host {
            Host::Name(name) if name == node.as_str() => true,
            host => grants.has_exactly(node, host),
        };
        target.port == grants.kubelet_port(node) && is_node_itself()
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

    /// The ways to a node, the preferred one first: its own links here; then the peers that hold one, those that are
    /// about to leave last.
    fn ways(&self, node: &NodeId) -> Result<Vec<Way>, RouteError> {
        let links = self.links(node);
        let holders = self.directory.holders(node);
        let Some(mesh) = self.mesh.as_ref().filter(|_| !holders.is_empty()) else {
            return links.map_err(|error| self.known_elsewhere(error));
        };
        let mut ways = links.unwrap_or_default();
        let (leaving, staying): (Vec<_>, Vec<_>) =
            holders.into_iter().partition(|holder| mesh.is_leaving(&holder.gateway));
        let mut unreachable = Vec::new();
        for holder in staying.into_iter().chain(leaving) {
            match mesh.link(&holder.gateway) {
                Some(link) => ways.push(Way::Peer(holder, link)),
                None => unreachable.push(holder.gateway),
            }
        }
        if ways.is_empty() {
            return Err(RouteError::Unreachable { node: node.clone(), gateways: unreachable });
        }
        Ok(ways)
    }

    /// Says of an offline node where it was linked last, if that was not here.
    fn known_elsewhere(&self, error: RouteError) -> RouteError {
        let RouteError::Offline { node, last_seen } = error else { return error };
        match self.directory.last_held(&node) {
            Some(last) if last_seen.is_none_or(|ago| last.until.elapsed() < ago) => {
                let (gateway, ago) = (last.gateway, last.until.elapsed());
                let is_linked = self.mesh.as_ref().is_some_and(|mesh| mesh.link(&gateway).is_some());
                if is_linked {
                    RouteError::Nowhere { node, gateway, ago }
                } else {
                    RouteError::OutOfReach { node, gateway, ago }
                }
            }
            _ => RouteError::Offline { node, last_seen },
        }
    }

    /// The node's links to this gateway.
    fn links(&self, node: &NodeId) -> Result<Vec<Way>, RouteError> {
        let node = node.clone();
        match self.registry.lookup(&node) {
            Lookup::Links(links) => Ok(links.into_iter().map(Way::Link).collect()),
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
        let is_elsewhere = |node: &NodeId| {
            !self.directory.holders(node).is_empty() || self.directory.last_held(node).is_some()
        };
        let is_there = |node: &NodeId| grants.knows(node) || self.registry.knows(node) || is_elsewhere(node);
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
                None => match self.mesh.as_ref().and_then(|mesh| mesh.gap()) {
                    Some(cause) => RouteError::Unsure { host: host.clone(), cause },
                    None => RouteError::NoSuchNode { host: host.clone() },
                },
            }),
        }
    }

    async fn open_on(
        &self,
        way: &Way,
        node: &NodeId,
        request: &Request,
        to_kubelet: bool,
        deadline: Instant,
    ) -> Result<(TunnelStream, String), RouteError> {
        let open = OpenRequest {
            target: request.target.to_string(),
            request_id: request.id.clone(),
            traceparent: request.traceparent.clone(),
            ingress: request.ingress,
            caller: request.caller.to_string(),
            // Only a peer needs to be told.
            node: way.gateway().map(|_| node.to_string()).unwrap_or_default(),
            reserved: to_kubelet,
        };
        let left = deadline.saturating_duration_since(Instant::now());
        let opened = way.link().open(open, left).await;
        if let Way::Peer(holder, _) = way {
            self.learn(holder, node, &opened);
        }
        opened.map_err(|error| self.explain(error, way, node.clone(), request))
    }

    /// A peer that has no such link is not to be asked again for it.
    fn learn<T>(&self, holder: &Elsewhere, node: &NodeId, opened: &Result<T, OpenError>) {
        let outcome = match opened {
            Ok(_) => "connected",
            Err(OpenError::Refused { code: RefusalCode::NoSuchNode, .. }) => {
                self.directory.disprove(node, holder);
                "stale"
            }
            Err(OpenError::Refused { .. }) => "refused",
            Err(_) => "failed",
        };
        self.metrics.handed_to_peer(outcome);
    }

    fn explain(&self, error: OpenError, way: &Way, node: NodeId, request: &Request) -> RouteError {
        let by = |text: String| match way.gateway() {
            Some(gateway) => format!("by gateway {gateway}: {text}"),
            None => text,
        };
        match error {
            OpenError::Refused { code: RefusalCode::Overloaded, text } => {
                RouteError::Overloaded { node, text: by(text) }
            }
            OpenError::Refused { code, text } => match (code, way) {
                (RefusalCode::NoSuchNode, Way::Peer(holder, _)) => {
                    RouteError::Nowhere { node, gateway: holder.gateway.clone(), ago: Duration::ZERO }
                }
                (RefusalCode::LinkLost, Way::Peer(..)) => RouteError::LinkLost { node, text: by(text) },
                _ => RouteError::Refused { node, code, text },
            },
            OpenError::Draining => RouteError::Draining { node },
            OpenError::TimedOut(_) => {
                RouteError::TimedOut { node, target: request.target.clone(), timeout: self.dial_timeout }
            }
            error @ OpenError::Overloaded { .. } => {
                RouteError::Overloaded { node, text: by(error.to_string()) }
            }
            error @ OpenError::LinkLost(_) => RouteError::LinkLost { node, text: by(error.to_string()) },
            error @ OpenError::Protocol(_) => RouteError::Protocol { node, text: by(error.to_string()) },
        }
    }
}

/// Whether another way may well be better.
fn is_the_ways_fault(error: &RouteError) -> bool {
    matches!(
        error,
        RouteError::LinkLost { .. }
            | RouteError::Draining { .. }
            | RouteError::Overloaded { .. }
            | RouteError::Offline { .. }
            | RouteError::Nowhere { .. }
    )
}

#[cfg(test)]
mod tests;
