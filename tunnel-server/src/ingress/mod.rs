//! The private door: takes the control plane's connections, finds out who calls, and speaks HTTP CONNECT with them:
//! [`http1`] or [`http2`], by ALPN or by the first bytes. Also the one mapping from a refusal to its reply ([`reply`]).
//!
//! Requests are routed by their target, never by a `Host` header: kube-apiserver sends `Host: 127.0.0.1`.

mod early;
mod http1;
mod http2;
pub(crate) mod reply;

use std::{
    collections::BTreeSet,
    fmt,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use bytes::BytesMut;
use tokio::time::{Instant, timeout_at};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use tunnel_core::{
    Aborted, GatewayId, Leg, NodeId, Relayed, Timeouts,
    identity::{names_in_certificate, node_from_certificate},
    proto::{
        clean_text,
        messages::{AbortCode, Ingress as IngressKind},
    },
    relay,
    tls::{Domain, ServerTls},
};

pub(crate) use self::http2::STREAM_WINDOW as HTTP2_WINDOW;
use self::reply::{Refusal, Reply};
use crate::{
    listener::{Guest, PeerAddr, UNIX_CALLER, handshake},
    metrics::{Counted, Metrics},
    route::{Request, Routed, Router},
};

/// Room for the first bytes of a connection: most requests fit.
const FIRST_READ: usize = 1024;

/// Limits of the ingress.
#[derive(Clone, Debug)]
pub(crate) struct IngressSettings {
    pub(crate) gateway_id: GatewayId,
    /// Names of client certificates that may ask; empty: every certificate of the control plane's CA.
    pub(crate) allowed_clients: BTreeSet<String>,
    pub(crate) handshake_timeout: Duration,
    /// A request's head must be there within this time.
    pub(crate) header_timeout: Duration,
    /// Longest request head, in bytes.
    pub(crate) max_header_size: usize,
    /// Streams at once on one HTTP/2 connection.
    pub(crate) max_streams: u32,
    /// How long a stream may last without moving a byte.
    pub(crate) timeouts: Timeouts,
    /// Sets the gateway's request ids apart from those of others.
    pub(crate) request_seed: u32,
}

/// Everything that a connection of the control plane needs.
#[derive(Debug)]
pub(crate) struct Ingress {
    settings: IngressSettings,
    router: Router,
    metrics: Metrics,
    /// No new requests.
    draining: CancellationToken,
    /// Streams that still run are aborted.
    stopping: CancellationToken,
    requests: AtomicU64,
}

/// Who calls, as far as the connection shows.
#[derive(Clone, Debug)]
pub(crate) struct Client {
    peer: PeerAddr,
    /// The names in its certificate; empty on a Unix socket.
    names: Vec<String>,
    /// The node that its certificate is for, which makes it an edge and no client.
    node: Option<NodeId>,
}

/// A client that may ask. Only [`Ingress::admit`] makes one, here or at the peer that hands the stream on.
#[derive(Clone, Debug)]
pub(crate) struct Caller(String);

impl Caller {
    /// A peer has admitted it.
    pub(crate) fn told_by_peer(caller: &str) -> Self {
        Self(clean_text(caller))
    }

    /// Whose streams its streams are when they are counted: of one certificate's name, of one address where the
    /// certificate has no name, or of all processes behind Unix sockets.
    pub(crate) fn counted_as(&self) -> &str {
        match self.0.rsplit_once(':') {
            Some(_) if self.0.starts_with(UNIX_CALLER) => "unix",
            Some((host, _)) if self.0.parse::<SocketAddr>().is_ok() => host,
            _ => &self.0,
        }
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Which version of HTTP a request came by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Protocol {
    Http1,
    Http2,
}

impl Protocol {
    fn label(self) -> &'static str {
        match self {
            Self::Http1 => "h1",
            Self::Http2 => "h2",
        }
    }
}

/// What a request says, before anyone has judged it.
#[derive(Clone, Debug, Default)]
struct Asked {
    target: String,
    request_id: String,
    traceparent: String,
}

impl Ingress {
    pub(crate) fn new(
        settings: IngressSettings,
        router: Router,
        metrics: Metrics,
        draining: CancellationToken,
        stopping: CancellationToken,
    ) -> Arc<Self> {
        Arc::new(Self { settings, router, metrics, draining, stopping, requests: AtomicU64::new(1) })
    }

    /// Serves one TLS connection until it ends.
    pub(crate) async fn serve_tls<C: Leg + 'static>(
        self: Arc<Self>,
        tls: ServerTls,
        conn: C,
        peer: PeerAddr,
        mut guest: Guest,
    ) {
        let limit = self.settings.handshake_timeout;
        let shaking = handshake(&tls, Domain::ControlPlane, conn, peer, &mut guest, limit, &self.metrics);
        let Some(conn) = shaking.await else { return };
        let _counted = Counted::new(&self.metrics.ingress_connections);
        let connection = conn.get_ref().1;
        let certificate = connection.peer_certificates().and_then(<[_]>::first);
        let names = certificate.map(|der| names_in_certificate(der)).unwrap_or_default();
        let node = certificate.and_then(|der| node_from_certificate(der).ok());
        let client = Client { peer, names, node };
        if connection.alpn_protocol() == Some(b"h2") {
            http2::serve(self, conn, client).await;
        } else {
            self.serve_detected(conn, client).await;
        }
    }

    /// Serves one connection without TLS until it ends: who may connect was decided by whoever opened the door.
    pub(crate) async fn serve_plain<C: Leg + 'static>(self: Arc<Self>, conn: C, peer: PeerAddr) {
        let _counted = Counted::new(&self.metrics.ingress_connections);
        let client = Client { peer, names: Vec::new(), node: None };
        self.serve_detected(conn, client).await;
    }

    async fn serve_detected<C: Leg + 'static>(self: Arc<Self>, mut conn: C, client: Client) {
        let deadline = Instant::now() + self.settings.header_timeout;
        let mut early = BytesMut::with_capacity(FIRST_READ);
        let looking = early::begins_with(&mut conn, &mut early, http2::PREFACE);
        let looked = tokio::select! {
            // A connection that has not said anything yet is of no use to a gateway that leaves.
            biased;
            () = self.draining.cancelled() => return,
            looked = timeout_at(deadline, looking) => looked,
        };
        match looked {
            Ok(Ok(true)) => http2::serve(self, early::Rewound::new(early, conn), client).await,
            Ok(Ok(false)) => http1::serve(self, conn, client, early, deadline).await,
            Ok(Err(error)) => debug!(peer = %client.peer, %error, "gone before its first request"),
            Err(_) => http1::time_out(&self, conn, &client).await,
        }
    }

    /// The client as a caller, if it may ask. On a Unix socket the file's permissions have decided.
    fn admit(&self, client: &Client) -> Result<Caller, Refusal> {
        let first = client.names.first();
        if let PeerAddr::Unix { .. } = client.peer {
            return Ok(Caller(client.peer.to_string()));
        }
        // Where one CA serves both sides, as a cluster's may, no node must reach the others through the gateway.
        if let Some(node) = &client.node {
            return Err(Refusal::ClientIsNode { node: node.clone() });
        }
        let allowed = &self.settings.allowed_clients;
        let name =
            if allowed.is_empty() { first } else { client.names.iter().find(|name| allowed.contains(*name)) };
        match name {
            Some(name) => Ok(Caller(name.clone())),
            None if allowed.is_empty() => Ok(Caller(client.peer.to_string())),
            None => Err(Refusal::ClientNotAllowed {
                client: first.cloned().unwrap_or_else(|| "without a name".to_owned()),
            }),
        }
    }

    /// Gives a request its name, and takes over from the client only what is well-formed.
    fn identify(&self, mut asked: Asked) -> Asked {
        if !is_sane_id(&asked.request_id) {
            let number = self.requests.fetch_add(1, Relaxed);
            asked.request_id = format!("{:08x}-{number}", self.settings.request_seed);
        }
        if !is_traceparent(&asked.traceparent) {
            asked.traceparent.clear();
        }
        asked
    }

    /// Judges what was asked.
    fn request(&self, client: &Client, asked: &Asked) -> Result<Request, Refusal> {
        Ok(Request {
            caller: self.admit(client)?,
            target: asked.target.parse()?,
            id: asked.request_id.clone(),
            traceparent: asked.traceparent.clone(),
            ingress: IngressKind::HttpConnect,
        })
    }

    /// Connects the target, unless `gone` tells first that the client no longer waits: then `None`.
    async fn connect(
        &self,
        protocol: Protocol,
        request: &Request,
        gone: impl Future<Output = ()>,
    ) -> Option<Result<Routed, Refusal>> {
        if self.draining.is_cancelled() {
            return Some(Err(Refusal::GatewayDraining { gateway: self.settings.gateway_id.clone() }));
        }
        let started = Instant::now();
        let routed = tokio::select! {
            // An answer that is there is given; a client that is gone will be noticed soon enough.
            biased;
            routed = self.router.open(request) => routed,
            () = gone => {
                if self.metrics.lines.admit("client_gone", &request.caller) {
                    info!(request = request.id, caller = %request.caller, target = %request.target,
                          protocol = protocol.label(), waited_ms = started.elapsed().as_millis(),
                          "the client went away before the target was connected");
                }
                self.metrics.replied(protocol.label(), 499, "client_gone");
                return None;
            }
        };
        self.metrics.connected(started.elapsed());
        Some(routed.map_err(Refusal::from))
    }

    /// The reply to a refusal; logs and counts it.
    fn refuse(&self, protocol: Protocol, client: &Client, asked: &Asked, refusal: &Refusal) -> Reply {
        let reply = Reply::to(refusal, &self.settings.gateway_id);
        self.metrics.replied(protocol.label(), reply.status.as_u16(), reply.label);
        if !self.metrics.lines.admit(reply.label, client.peer.source()) {
            return reply;
        }
        let target: String = asked.target.chars().take(300).collect();
        warn!(peer = %client.peer, client = client.names.first(), target, protocol = protocol.label(),
              request = asked.request_id,
              status = reply.status.as_u16(), cause = %refusal, "request refused");
        reply
    }

    /// Carries a connected request's bytes until it ends.
    async fn carry(&self, protocol: Protocol, request: &Request, routed: Routed, leg: impl Leg) {
        self.metrics.replied(protocol.label(), 200, "connected");
        let via = routed.via.as_ref().map(GatewayId::as_str);
        debug!(request = request.id, caller = %request.caller, target = %request.target, node = %routed.node, via,
               address = routed.address, protocol = protocol.label(), "connected");
        let _counted = Counted::new(&self.metrics.streams_active);
        let started = Instant::now();
        let stop = async {
            self.stopping.cancelled().await;
            Aborted::new(AbortCode::Drained, "the gateway stops")
        };
        let relayed = relay(leg, routed.stream, self.settings.timeouts, stop).await;
        self.metrics.stream_ended(&relayed);
        let Relayed { forward, backward, end } = relayed;
        let cause = end.reason().map(ToString::to_string);
        info!(request = request.id, caller = %request.caller, target = %request.target, node = %routed.node, via,
              address = routed.address, protocol = protocol.label(), to_target = forward, from_target = backward,
              took_ms = started.elapsed().as_millis(), cause, "ended");
    }
}

/// Longest request id that is taken over from a client.
const MAX_REQUEST_ID: usize = 128;

fn is_sane_id(text: &str) -> bool {
    let allowed = |byte: u8| byte.is_ascii_alphanumeric() || b"-_.:+/=".contains(&byte);
    (1..=MAX_REQUEST_ID).contains(&text.len()) && text.bytes().all(allowed)
}

/// Whether a text is a W3C `traceparent` (Trace Context, section 3.2).
fn is_traceparent(text: &str) -> bool {
    let hex = |field: &str, length: usize| {
        field.len() == length && field.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    let not_zero = |field: &str| field.bytes().any(|byte| byte != b'0');
    let fields: Vec<&str> = text.splitn(5, '-').collect();
    let [version, trace, parent, flags, more @ ..] = fields.as_slice() else { return false };
    text.len() <= 256
        && text.is_ascii()
        && hex(version, 2)
        && *version != "ff"
        && (more.is_empty() || *version != "00")
        && hex(trace, 32)
        && not_zero(trace)
        && hex(parent, 16)
        && not_zero(parent)
        && hex(flags, 2)
}

#[cfg(test)]
mod tests;
