//! The public door: makes a link of each connection that an edge dials, and holds it until it ends.
//!
//! A node's identity is what its certificate says. What the edge claims in its `Hello` is only compared with it, so
//! that an edge with the wrong credential hears so instead of serving another node.

pub(crate) mod registry;

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::{Duration, SystemTime},
};

use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval_at, sleep_until},
};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};
use tunnel_core::{
    GatewayId, InstanceId, Leg, Link, LinkConfig, LinkError, LinkEvent, LinkHandle, NodeId, PendingLink,
    identity::{IdentityError, node_from_certificate, validity_of_certificate},
    proto::{
        ALPN_EDGE,
        control::choose_version,
        messages::{Hello, Reject, RejectCode, Update, Welcome},
    },
    tls::{Domain, ServerTls},
};

use self::registry::{Place, Registry};
use crate::{
    grants::{Grants, SharedGrants},
    listener::{PeerAddr, handshake, say_farewell},
    metrics::Metrics,
};

/// When a rejected edge should try again, at the earliest, where trying sooner is of no use.
const RETRY_AFTER: Duration = Duration::from_secs(5);
/// An edge whose credential is wrong needs a person.
const RETRY_AFTER_REPAIR: Duration = Duration::from_secs(60);
/// The longest that a timer is set for: some certificates are valid for longer than timers can run.
const LONGEST_TIMER: Duration = Duration::from_secs(24 * 3600);

/// What the door needs to know.
#[derive(Clone, Debug)]
pub(crate) struct EdgeSettings {
    pub(crate) gateway_id: GatewayId,
    pub(crate) heartbeat: Duration,
    /// For TLS, and again for the hello.
    pub(crate) handshake_timeout: Duration,
    pub(crate) drain_timeout: Duration,
    pub(crate) link: LinkConfig,
}

/// The door of the edges.
#[derive(Debug)]
pub(crate) struct EdgeDoor {
    tls: ServerTls,
    settings: EdgeSettings,
    registry: Arc<Registry>,
    grants: SharedGrants,
    metrics: Metrics,
    /// No new links; those that are up tell their edges to go elsewhere.
    draining: CancellationToken,
    /// Links that are still up are closed.
    stopping: CancellationToken,
    /// Names each link in the logs of both sides.
    sessions: AtomicU64,
}

/// An edge that may have a link.
struct Admitted {
    node: NodeId,
    instance: InstanceId,
    version: u32,
    place: Place,
}

/// A link that is up, and what its log lines say.
struct Session {
    link: Link,
    node: NodeId,
    instance: InstanceId,
    peer: PeerAddr,
    id: String,
    /// What the edge was told that it serves.
    told: Vec<String>,
    grants: watch::Receiver<Arc<Grants>>,
    expiry: Expiry,
}

/// The end of the certificate that an edge proved itself by.
#[derive(Clone, Copy, Debug)]
struct Expiry {
    /// As the certificate has it.
    not_after: SystemTime,
    /// By the clock that timers follow. `None`: farther away than that clock can count.
    at: Option<Instant>,
}

impl EdgeDoor {
    #[allow(clippy::too_many_arguments, reason = "called once")]
    pub(crate) fn new(
        tls: ServerTls,
        settings: EdgeSettings,
        registry: Arc<Registry>,
        grants: SharedGrants,
        metrics: Metrics,
        draining: CancellationToken,
        stopping: CancellationToken,
    ) -> Arc<Self> {
        let link = LinkConfig {
            handshake_timeout: settings.handshake_timeout,
            accept_streams: false,
            ..settings.link
        };
        let settings = EdgeSettings { link, ..settings };
        let sessions = AtomicU64::new(1);
        Arc::new(Self { tls, settings, registry, grants, metrics, draining, stopping, sessions })
    }

    /// Serves one connection until its link ends.
    pub(crate) async fn serve<C: Leg + 'static>(self: Arc<Self>, conn: C, peer: PeerAddr) {
        let deadline = self.settings.handshake_timeout;
        let shaking = handshake(&self.tls, Domain::Edge, conn, peer, deadline, &self.metrics);
        let Some(conn) = shaking.await else { return };
        let connection = conn.get_ref().1;
        // A client that offers no protocol at all passes TLS: it is no edge.
        if connection.alpn_protocol() != Some(ALPN_EDGE) {
            self.metrics.handshake_failed(Domain::Edge, "alpn");
            warn!(%peer, "refused: the client does not ask for the application protocol (ALPN) of edges");
            return say_farewell(conn).await;
        }
        let (identity, expiry) = (identity(&conn), expiry(&conn));
        let pending = match Link::accept(conn, self.settings.link).await {
            Ok(pending) => pending,
            Err(error) => {
                self.metrics.handshake_failed(Domain::Edge, error.label());
                warn!(%peer, node = identity_text(&identity), cause = %error, "no link: the edge did not introduce itself");
                return;
            }
        };
        match self.admit(identity, pending.hello()) {
            Ok(admitted) => self.hold(pending, admitted, expiry, peer).await,
            Err(reject) => self.reject(pending, reject, peer).await,
        }
    }

    async fn reject(&self, pending: PendingLink, reject: Reject, peer: PeerAddr) {
        self.metrics.rejected(reject_label(reject.code()));
        warn!(%peer, software = pending.hello().software, cause = reject.text, "edge rejected");
        pending.reject(reject).await;
    }

    /// Decides by the credential; the hello's claims must agree with it.
    fn admit(&self, identity: Result<NodeId, IdentityError>, hello: &Hello) -> Result<Admitted, Reject> {
        if self.draining.is_cancelled() {
            let text = format!("gateway {} is about to leave: use another", self.settings.gateway_id);
            return Err(reject(RejectCode::Draining, text, RETRY_AFTER));
        }
        let version = choose_version(hello)?;
        let node =
            identity.map_err(|error| reject(RejectCode::Identity, error.to_string(), RETRY_AFTER_REPAIR))?;
        if !hello.node_claim.is_empty() && hello.node_claim != node.as_str() {
            let claim: String = hello.node_claim.chars().take(253).collect();
            let text = format!(
                "the edge says it is node {claim:?}, but its certificate is node {:?}'s: \
                 set the edge's node name to that, or give it a certificate of its own",
                node.as_str()
            );
            return Err(reject(RejectCode::Identity, text, RETRY_AFTER_REPAIR));
        }
        let instance = hello.instance_id.parse().map_err(|error| {
            reject(RejectCode::Malformed, format!("in the hello, {error}"), RETRY_AFTER_REPAIR)
        })?;
        let place = self
            .registry
            .place()
            .map_err(|full| reject(RejectCode::Overloaded, full.to_string(), RETRY_AFTER))?;
        Ok(Admitted { node, instance, version, place })
    }

    /// Welcomes the edge, registers its link, and holds it until it ends.
    async fn hold(&self, pending: PendingLink, admitted: Admitted, expiry: Expiry, peer: PeerAddr) {
        let Admitted { node, instance, version, place } = admitted;
        let software = pending.hello().software.clone();
        let id = self.session_id();
        let mut grants = self.grants.subscribe();
        let told = granted(&grants.borrow_and_update(), &node);
        let link = match pending.welcome(self.welcome(told.clone(), version, &id)) {
            Ok(link) => link,
            Err(error) => {
                self.metrics.handshake_failed(Domain::Edge, error.label());
                warn!(%peer, %node, cause = %error, "the link ended before it was up");
                return;
            }
        };
        let registration = self.registry.register(place, node.clone(), instance.clone(), link.handle());
        info!(%node, %instance, %peer, session = id, software, "link up");
        let up_since = Instant::now();
        let mut session = Session { link, node, instance, peer, id, told, grants, expiry };
        let end = self.until_closed(&mut session).await;
        drop(registration);
        self.metrics.link_closed(end.label());
        let Session { node, instance, peer, id, .. } = session;
        info!(%node, %instance, %peer, session = id, cause = %end, up_ms = up_since.elapsed().as_millis(), "link down");
    }

    fn session_id(&self) -> String {
        format!("{}-{}", self.settings.gateway_id, self.sessions.fetch_add(1, Relaxed))
    }

    fn welcome(&self, granted: Vec<String>, version: u32, session_id: &str) -> Welcome {
        Welcome {
            version,
            gateway_id: self.settings.gateway_id.to_string(),
            session_id: session_id.to_owned(),
            heartbeat_ms: u32::try_from(self.settings.heartbeat.as_millis()).unwrap_or(u32::MAX),
            granted,
            max_streams: u32::try_from(self.settings.link.max_streams).unwrap_or(u32::MAX),
            software: concat!("tunnel-server/", env!("CARGO_PKG_VERSION")).to_owned(),
            ..Welcome::default()
        }
    }

    async fn until_closed(&self, session: &mut Session) -> LinkError {
        let handle = session.link.handle();
        let mut sample = interval_at(Instant::now() + self.settings.heartbeat, self.settings.heartbeat);
        sample.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (mut told_to_drain, mut told_to_close) = (false, false);
        loop {
            let expires = session.expiry.timer();
            tokio::select! {
                // What happened to the link is true already; then what the gateway wants, its ends first; measuring can
                // wait.
                biased;
                event = session.link.next() => match event {
                    LinkEvent::Closed(error) => return error,
                    LinkEvent::Draining(drain) => {
                        info!(node = %session.node, session = session.id, reason = drain.reason, "the edge drains");
                    }
                    // Edges may not open streams yet, and only gateways send updates.
                    LinkEvent::Stream(_) | LinkEvent::Updated(_) => {}
                },
                () = self.stopping.cancelled(), if !told_to_close => {
                    told_to_close = true;
                    handle.close("the gateway stops");
                }
                () = self.draining.cancelled(), if !told_to_drain => {
                    told_to_drain = true;
                    handle.drain(self.settings.drain_timeout, "the gateway is about to leave");
                }
                () = sleep_until(expires), if !told_to_close => if session.expiry.is_over() {
                    told_to_close = true;
                    session.expire(&handle);
                },
                Ok(()) = session.grants.changed() => session.tell_grants(&handle),
                _ = sample.tick() => {
                    if let Some(rtt) = handle.rtt() {
                        self.metrics.round_trip(rtt.last);
                    }
                }
            }
        }
    }
}

impl Session {
    /// The edge's certificate is over: a link must not outlive what it was let in by. A new one takes a new certificate.
    fn expire(&self, handle: &LinkHandle) {
        let text = format!(
            "the certificate of node {} expired at {}; the agent must connect with a new one",
            self.node,
            humantime::format_rfc3339_seconds(self.expiry.not_after)
        );
        warn!(node = %self.node, session = self.id, "{text}");
        // The drain carries the words to the edge; a close has none.
        handle.drain(Duration::ZERO, &text);
        handle.close(&text);
    }

    /// Tells the edge what it serves, if that has changed.
    fn tell_grants(&mut self, handle: &LinkHandle) {
        let granted = granted(&self.grants.borrow_and_update(), &self.node);
        if granted != self.told {
            self.told.clone_from(&granted);
            handle.update(Update { granted, ..Update::default() });
        }
    }
}

impl Expiry {
    /// `now` is the time of day.
    fn new(not_after: SystemTime, now: SystemTime) -> Self {
        // That second is still within, so that whoever ends with it is not let in once more.
        let left = not_after.duration_since(now).map_or(Duration::ZERO, |left| left + Duration::from_secs(1));
        Self { not_after, at: Instant::now().checked_add(left) }
    }

    /// When to look again whether it is over.
    fn timer(self) -> Instant {
        let longest = Instant::now() + LONGEST_TIMER;
        self.at.map_or(longest, |at| at.min(longest))
    }

    fn is_over(self) -> bool {
        self.at.is_some_and(|at| Instant::now() >= at)
    }
}

/// What a node serves, as its edge is told.
fn granted(grants: &Grants, node: &NodeId) -> Vec<String> {
    let own_name = std::iter::once(node.to_string());
    own_name.chain(grants.of(node).map(ToString::to_string)).collect()
}

/// When the certificate of a verified client ends. One that cannot be read names no node, and is refused for that.
fn expiry<C>(conn: &TlsStream<C>) -> Expiry {
    let certificate = conn.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let validity = certificate.and_then(|certificate| validity_of_certificate(certificate).ok());
    let now = SystemTime::now();
    Expiry::new(validity.map_or(now, |validity| validity.not_after), now)
}

fn identity<C>(conn: &TlsStream<C>) -> Result<NodeId, IdentityError> {
    let certificate = conn.get_ref().1.peer_certificates().and_then(<[_]>::first);
    node_from_certificate(certificate.ok_or(IdentityError::Malformed)?)
}

fn identity_text(identity: &Result<NodeId, IdentityError>) -> &str {
    identity.as_ref().map_or("unknown", NodeId::as_str)
}

fn reject(code: RejectCode, text: String, retry_after: Duration) -> Reject {
    let retry_after_ms = u32::try_from(retry_after.as_millis()).unwrap_or(u32::MAX);
    Reject { code: code.into(), text, retry_after_ms }
}

fn reject_label(code: RejectCode) -> &'static str {
    match code {
        RejectCode::Unspecified => "unspecified",
        RejectCode::Version => "version",
        RejectCode::Identity => "identity",
        RejectCode::NotAllowed => "not_allowed",
        RejectCode::Overloaded => "overloaded",
        RejectCode::Draining => "draining",
        RejectCode::Malformed => "malformed",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_link_is_looked_at_daily_and_ends_with_its_certificate() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let (day, begun) = (Duration::from_secs(86_400), Instant::now());
        let far = Expiry::new(now + 3 * day / 2, now);
        assert_eq!(far.at, Some(begun + 3 * day / 2 + Duration::from_secs(1)));
        sleep_until(far.timer()).await;
        assert_eq!((begun.elapsed(), far.is_over()), (day, false));
        sleep_until(far.timer()).await;
        assert!(far.is_over() && begun.elapsed() >= 3 * day / 2, "{:?}", begun.elapsed());
        assert!(Expiry::new(now - day, now).is_over());
        let never = Expiry { not_after: now, at: None };
        assert!(!never.is_over() && never.timer() == Instant::now() + day);
    }
}
