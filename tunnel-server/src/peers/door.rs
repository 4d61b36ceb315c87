//! The door of the peers: takes the links that other gateways dial, tells each what this gateway holds, and hands their
//! streams on to local edge links. A stream that came from a peer never goes to another peer: that is the one hop.

use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    sync::watch,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use tunnel_core::{
    Aborted, GatewayId, Incoming, Leg, Link, LinkConfig, LinkError, LinkEvent, LinkHandle, NodeId,
    PendingStream, Relayed, Timeouts, TunnelStream,
    proto::{
        clean_text,
        control::choose_version,
        messages::{
            AbortCode, Capability, Hello, Holding, Holdings, Open, RefusalCode, Reject, RejectCode, Welcome,
        },
    },
    relay,
    tls::{Domain, ServerTls},
};
use tunnel_edge::daemon::tasks::TaskSet;

use super::mesh::{Mesh, Own};
use crate::{
    SOFTWARE,
    directory::Generation,
    edges::{
        held::{Held, News},
        registry::Registry,
    },
    ingress::Caller,
    listener::{Guest, PeerAddr, handshake},
    metrics::{Counted, Metrics},
    route::{Request, RouteError, Routed, Router},
};

/// How much of a message holdings may take, in bytes. Less than fits, for what else is in it.
const MAX_TOLD: usize = 48 * 1024;
/// What the wire format needs for a holding beside its node's name.
const HOLDING_OVERHEAD: usize = 20;
/// Changes are gathered for so long before they are told.
const GATHER: Duration = Duration::from_millis(20);
/// How long a stream's header may take.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// When a peer that was rejected should try again, at the earliest.
const RETRY_AFTER: Duration = Duration::from_secs(2);

/// The door of the peers.
#[derive(Debug)]
pub(crate) struct PeerDoor {
    pub(crate) tls: ServerTls,
    pub(crate) own: Own,
    pub(crate) mesh: Arc<Mesh>,
    pub(crate) heartbeat: Duration,
    pub(crate) handshake_timeout: Duration,
    pub(crate) link: LinkConfig,
    pub(crate) registry: Arc<Registry>,
    pub(crate) router: Router,
    pub(crate) metrics: Metrics,
    /// How long a stream may last without moving a byte.
    pub(crate) timeouts: Timeouts,
    /// Streams that still run are aborted.
    pub(crate) aborting: CancellationToken,
    /// Links that are still up are closed.
    pub(crate) closing: CancellationToken,
    /// Names each link in the logs of both sides.
    pub(crate) sessions: AtomicU64,
    /// Numbers each telling of everything, from 1.
    pub(crate) epochs: AtomicU64,
    /// How many streams are being handed on.
    pub(crate) running: watch::Sender<usize>,
}

/// A peer that may have a link.
struct Admitted {
    gateway: GatewayId,
    version: u32,
    wants_holdings: bool,
}

impl PeerDoor {
    /// Serves one connection until its link ends.
    pub(crate) async fn serve<C: Leg + 'static>(self: Arc<Self>, conn: C, peer: PeerAddr, mut guest: Guest) {
        let limit = self.handshake_timeout;
        let shaking = handshake(&self.tls, Domain::Peer, conn, peer, &mut guest, limit, &self.metrics);
        let Some(conn) = shaking.await else { return };
        let pending = match Link::accept(conn, self.link.clone()).await {
            Ok(pending) => pending,
            Err(error) => {
                self.metrics.handshake_failed(Domain::Peer, error.label());
                if self.metrics.lines.admit("peer_not_introduced", peer.source()) {
                    warn!(%peer, cause = %error, "no link: the peer did not introduce itself");
                }
                return;
            }
        };
        let admitted = match self.admit(pending.hello()) {
            Ok(admitted) => admitted,
            Err(reject) => {
                // Each gateway's list may name the gateway itself.
                if reject.code() != RejectCode::SameGateway
                    && self.metrics.lines.admit("peer_rejected", peer.source())
                {
                    warn!(%peer, cause = reject.text, "peer rejected");
                }
                return pending.reject(reject).await;
            }
        };
        match pending.welcome(self.welcome(&admitted)) {
            Ok(link) => self.hold(link, admitted, peer).await,
            Err(error) if self.metrics.lines.admit("peer_link_not_up", peer.source()) => {
                warn!(%peer, cause = %error, "the peer's link ended before it was up");
            }
            Err(_) => {}
        }
    }

    fn admit(&self, hello: &Hello) -> Result<Admitted, Reject> {
        let reject = |code, text| Reject::new(code, text, RETRY_AFTER);
        let own = &self.own;
        if hello.instance_id == own.instance.as_str() {
            return Err(reject(RejectCode::SameGateway, format!("this is gateway {} itself", own.gateway)));
        }
        let version = choose_version(hello)?;
        let gateway: GatewayId = hello
            .gateway_id
            .parse()
            .map_err(|error| reject(RejectCode::Malformed, format!("in the hello, {error}")))?;
        if gateway == own.gateway {
            let text = format!("two gateways are named {gateway}: give each a gateway_id of its own");
            return Err(reject(RejectCode::Identity, text));
        }
        let wants_holdings = hello.capabilities().any(|capability| capability == Capability::Holdings);
        Ok(Admitted { gateway, version, wants_holdings })
    }

    fn welcome(&self, admitted: &Admitted) -> Welcome {
        Welcome {
            version: admitted.version,
            gateway_id: self.own.gateway.to_string(),
            session_id: format!("{}-peer-{}", self.own.gateway, self.sessions.fetch_add(1, Relaxed)),
            heartbeat_ms: u32::try_from(self.heartbeat.as_millis()).unwrap_or(u32::MAX),
            max_streams: u32::try_from(self.link.max_streams).unwrap_or(u32::MAX),
            software: SOFTWARE.to_owned(),
            ..Welcome::default()
        }
    }

    async fn hold(self: &Arc<Self>, mut link: Link, admitted: Admitted, peer: PeerAddr) {
        let Admitted { gateway, wants_holdings, .. } = admitted;
        if self.metrics.lines.admit_known("peer_linked", &gateway) {
            info!(%gateway, %peer, "a peer has linked");
        }
        let _visit = self.mesh.visit(gateway.clone());
        let handle = link.handle();
        handle.introduce(self.own.introduction());
        let mut streams = TaskSet::new("a forwarded stream", &self.metrics.panics);
        let (mut told_leaving, mut told_to_close) = (self.own.leaving.is_cancelled(), false);
        let serving = async {
            loop {
                tokio::select! {
                    // What happened to the link is true already; then what the gateway wants; then what has ended.
                    biased;
                    event = link.next() => match event {
                        LinkEvent::Closed(error) => return error,
                        LinkEvent::Stream(incoming) => {
                            let (door, gateway) = (self.clone(), gateway.clone());
                            streams.spawn(async move { door.forward(incoming, &gateway).await });
                        }
                        // The peer makes another link; and only this side tells what it holds and who it is.
                        LinkEvent::WearsOut
                        | LinkEvent::Draining(_)
                        | LinkEvent::Updated(_)
                        | LinkEvent::Holdings(_)
                        | LinkEvent::Gateway(_) => {}
                    },
                    () = self.closing.cancelled(), if !told_to_close => {
                        told_to_close = true;
                        handle.close("the gateway stops");
                    }
                    () = self.own.leaving.cancelled(), if !told_leaving => {
                        told_leaving = true;
                        handle.introduce(self.own.introduction());
                    }
                    Some(()) = streams.next_ended() => {}
                }
            }
        };
        let end: LinkError = tokio::select! {
            biased;
            end = serving => end,
            never = self.tell(&handle), if wants_holdings => match never {},
        };
        // The link's end has aborted them, each with its reason.
        streams.all_ended().await;
        if self.metrics.lines.admit_known("peer_link_ended", &gateway) {
            info!(%gateway, %peer, cause = %end, "a peer's link has ended");
        }
    }

    /// Tells a peer what this gateway holds, for ever.
    async fn tell(&self, handle: &LinkHandle) -> std::convert::Infallible {
        let mut news = News::of(&self.registry);
        let (mut epoch, mut part) = (0, 0);
        loop {
            let (holdings, is_all) = match news.next().await {
                Held::All(all) => {
                    (all.into_iter().map(|(node, held)| holding(&node, Some(held))).collect(), true)
                }
                Held::Changed(changed) => {
                    (changed.into_iter().map(|(node, held)| holding(&node, held)).collect::<Vec<_>>(), false)
                }
            };
            if is_all {
                (epoch, part) = (self.epochs.fetch_add(1, Relaxed), 0);
            }
            let parts = in_parts(holdings);
            let last = parts.len() - 1;
            for (index, holdings) in parts.into_iter().enumerate() {
                handle.tell_holdings(Holdings { epoch, part, more: is_all && index < last, holdings }).await;
                part += 1;
            }
            sleep(GATHER).await;
        }
    }

    /// Hands a peer's stream on to a local link.
    async fn forward(&self, incoming: Incoming, from: &GatewayId) {
        let mut pending = match incoming.header(Instant::now() + HEADER_TIMEOUT).await {
            Ok(pending) => pending,
            Err(error) => return debug!(%from, %error, "a peer's stream began without a usable header"),
        };
        let _running = Running::new(&self.running);
        let (node, request, patience) = match asked(pending.open()) {
            Ok(asked) => asked,
            Err(text) => return refuse(pending, RefusalCode::Malformed, &text).await,
        };
        let opened = tokio::select! {
            // What has been connected for nobody is dropped.
            biased;
            reason = pending.cancelled() => {
                return debug!(request = request.id, %from, %reason, "given up before it was connected");
            }
            opened = self.router.open_here(&node, &request, patience) => opened,
        };
        let routed = match opened {
            Ok(routed) => routed,
            Err(error) => {
                let code = refusal_code(&error);
                if self.metrics.lines.admit("forwarded_refused", &request.caller) {
                    info!(request = request.id, %from, caller = %request.caller, target = %request.target, %node,
                          cause = %error, "forwarded stream refused");
                }
                self.metrics.forwarded("refused");
                return refuse(pending, code, &error.to_string()).await;
            }
        };
        match pending.accept(routed.address.clone()).await {
            Ok(stream) => self.carry(stream, routed, &request, from).await,
            Err(error) => debug!(request = request.id, %from, %error, "given up just when it was connected"),
        }
    }

    async fn carry(&self, stream: TunnelStream, routed: Routed, request: &Request, from: &GatewayId) {
        self.metrics.forwarded("connected");
        let _counted = Counted::new(&self.metrics.forwarded_active);
        let started = Instant::now();
        let stop = async {
            self.aborting.cancelled().await;
            Aborted::new(AbortCode::Drained, "the gateway stops")
        };
        let Relayed { forward, backward, end } = relay(stream, routed.stream, self.timeouts, stop).await;
        info!(request = request.id, %from, caller = %request.caller, target = %request.target, node = %routed.node,
              to_target = forward, from_target = backward, took_ms = started.elapsed().as_millis(),
              cause = end.reason().map(ToString::to_string), "forwarded stream ended");
    }
}

/// Counts a forwarded stream for as long as it runs.
struct Running<'a>(&'a watch::Sender<usize>);

impl<'a> Running<'a> {
    fn new(running: &'a watch::Sender<usize>) -> Self {
        running.send_modify(|running| *running += 1);
        Self(running)
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        self.0.send_modify(|running| *running -= 1);
    }
}

/// What a peer asks for: of which node, and how long it waits for the answer.
fn asked(open: &Open) -> Result<(NodeId, Request, Duration), String> {
    let node = open.node.parse().map_err(|error| format!("the stream's node: {error}"))?;
    let request = Request {
        target: open.target.parse().map_err(|error| format!("the stream's target: {error}"))?,
        caller: Caller::told_by_peer(&open.caller),
        id: clean_text(&open.request_id),
        traceparent: clean_text(&open.traceparent),
        ingress: open.ingress(),
    };
    Ok((node, request, Duration::from_millis(open.timeout_ms.into())))
}

async fn refuse(pending: PendingStream, code: RefusalCode, text: &str) {
    if let Err(error) = pending.refuse(code, text).await {
        debug!(%error, "the refusal did not reach the peer");
    }
}

/// By the first two the peer knows that another gateway may be better off.
fn refusal_code(error: &RouteError) -> RefusalCode {
    use RouteError as E;
    match error {
        E::Offline { .. } | E::Nowhere { .. } | E::OutOfReach { .. } | E::Draining { .. } => {
            RefusalCode::NoSuchNode
        }
        E::LinkLost { .. } => RefusalCode::LinkLost,
        E::GatewayFull { .. } | E::CallerFull { .. } | E::Overloaded { .. } => RefusalCode::Overloaded,
        E::TimedOut { .. } => RefusalCode::DialTimeout,
        // An edge that says what only gateways say would make its node unknown to the peer.
        E::Refused { code, .. } if !matches!(code, RefusalCode::NoSuchNode | RefusalCode::LinkLost) => *code,
        E::Refused { .. }
        | E::Protocol { .. }
        | E::NoSuchNode { .. }
        | E::NodesUnread { .. }
        | E::Unsure { .. }
        | E::Ambiguous { .. }
        | E::Unreachable { .. } => RefusalCode::Internal,
    }
}

fn holding(node: &NodeId, generation: Option<Generation>) -> Holding {
    Holding { node: node.to_string(), generation: generation.unwrap_or(0) }
}

/// Cuts holdings into as many messages as they need, at least one.
fn in_parts(holdings: Vec<Holding>) -> Vec<Vec<Holding>> {
    let (mut parts, mut part, mut size) = (Vec::new(), Vec::new(), 0);
    for holding in holdings {
        let needs = holding.node.len() + HOLDING_OVERHEAD;
        if size + needs > MAX_TOLD {
            parts.push(std::mem::take(&mut part));
            size = 0;
        }
        size += needs;
        part.push(holding);
    }
    parts.push(part);
    parts
}

#[cfg(test)]
mod tests {
    use prost::Message;
    use tunnel_core::proto::MAX_MESSAGE;

    use super::*;
    use crate::testing::node;

    #[test]
    fn holdings_are_cut_into_parts_that_fit_a_message() {
        assert_eq!(in_parts(Vec::new()), [Vec::new()]);
        let name = |number: usize| format!("{number:05}.{}", "x".repeat(60));
        let all: Vec<Holding> =
            (0..5000).map(|number| Holding { node: name(number), generation: u64::MAX }).collect();
        let parts = in_parts(all.clone());
        assert!(parts.len() > 5, "{}", parts.len());
        for part in &parts {
            let holdings = Holdings { epoch: u64::MAX, part: u64::MAX, more: true, holdings: part.clone() };
            assert!(
                !part.is_empty() && holdings.encoded_len() + 16 < MAX_MESSAGE,
                "{}",
                holdings.encoded_len()
            );
        }
        assert_eq!(parts.concat(), all);
        assert_eq!(in_parts(all[..3].to_vec()), [&all[..3]]);
    }

    #[test]
    fn what_a_peer_asks_for_is_taken_over_whole() {
        let open = Open {
            node: "edge-a".to_owned(),
            target: "10.0.0.1:22".to_owned(),
            request_id: "r-1".to_owned(),
            traceparent: "00-1-2-01".to_owned(),
            caller: "kube-apiserver\n".to_owned(),
            timeout_ms: 1500,
            ..Open::default()
        };
        let (to, request, patience) = asked(&open).unwrap();
        assert_eq!((to, request.target.to_string().as_str()), (node("edge-a"), "10.0.0.1:22"));
        assert_eq!((request.id.as_str(), request.traceparent.as_str()), ("r-1", "00-1-2-01"));
        assert_eq!(
            (request.caller.to_string().as_str(), patience),
            ("kube-apiserver ", Duration::from_millis(1500))
        );
        assert!(
            asked(&Open { node: "NOT A NAME".to_owned(), ..open.clone() })
                .unwrap_err()
                .contains("the stream's node")
        );
        assert!(
            asked(&Open { target: "nowhere".to_owned(), ..open })
                .unwrap_err()
                .contains("the stream's target")
        );
    }

    #[test]
    fn a_refusal_says_whether_another_gateway_may_be_better_off() {
        use RefusalCode as C;
        let text = String::new;
        let refused = |code| RouteError::Refused { node: node("edge-a"), code, text: text() };
        let cases = [
            (RouteError::Offline { node: node("edge-a"), last_seen: None }, C::NoSuchNode),
            (RouteError::Draining { node: node("edge-a") }, C::NoSuchNode),
            (RouteError::LinkLost { node: node("edge-a"), text: text() }, C::LinkLost),
            (RouteError::Overloaded { node: node("edge-a"), text: text() }, C::Overloaded),
            (RouteError::GatewayFull { max: 1 }, C::Overloaded),
            (
                RouteError::CallerFull {
                    node: node("edge-a"),
                    caller: "me".to_owned(),
                    max: 1.try_into().unwrap(),
                },
                C::Overloaded,
            ),
            (RouteError::Protocol { node: node("edge-a"), text: text() }, C::Internal),
            (refused(C::ConnectionRefused), C::ConnectionRefused),
            (refused(C::NotAllowed), C::NotAllowed),
            // Only a gateway may say these of an edge.
            (refused(C::NoSuchNode), C::Internal),
            (refused(C::LinkLost), C::Internal),
        ];
        for (error, code) in cases {
            assert_eq!(refusal_code(&error), code, "{error}");
        }
    }
}
