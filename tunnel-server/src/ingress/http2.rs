//! HTTP CONNECT by HTTP/2 (RFC 9113, section 8.5): each stream of a connection is one request. Called by `ingress`.
//!
//! Uses `h2` directly, because ends must be exact: `END_STREAM` is an end of file, `RST_STREAM` a failure. Extended
//! CONNECT (RFC 8441) is not announced; `h2` resets a stream that uses it all the same.
//!
//! A connection carries streams to many nodes, so nothing that one node, one target or one stall should end it: `h2`'s
//! limits on resets are set for all streams at once, and what `h2` would count for ever is bounded by [`Allowance`] instead.
//! Its budget of small DATA frames is still its own: a target that reads none of very many can use it up.

mod allowance;
mod frames;

use std::{
    future::poll_fn,
    io,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, Bytes};
use h2::{
    Ping, PingPong, Reason, RecvStream, SendStream,
    server::{Builder, Connection, SendResponse},
};
use http::{Method, Response, request::Parts};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Interval, MissedTickBehavior, interval_at, timeout},
};
use tracing::{debug, warn};
use tunnel_core::{Aborted, Leg, Lost};
use tunnel_edge::daemon::tasks::TaskSet;

use self::{
    allowance::Allowance,
    frames::{Life, Watched},
};
use super::{Asked, Client, Ingress, IngressSettings, Protocol, reply::Refusal};
use crate::{listener::FAREWELL, route::Request};

/// How every HTTP/2 connection begins.
pub(super) const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Bytes that a client may send on one stream ahead of what the target takes.
pub(crate) const STREAM_WINDOW: u32 = 256 * 1024;
/// Largest window that HTTP/2 knows.
const MAX_WINDOW: u32 = (1 << 31) - 1;
/// Bytes of one stream that wait for a client.
const SEND_BUFFER: usize = 256 * 1024;
/// Most bytes copied at once.
const CHUNK: usize = 64 * 1024;
/// Heads longer than allowed by up to this factor are refused here, which is logged and counted; `h2` refuses what is
/// longer still by itself, and does not tell.
const HEAD_SLACK: usize = 4;
/// How long `h2` remembers which streams it has reset, and so ignores what the client had sent before it heard.
const LATE: Duration = Duration::from_secs(10);
/// A connection is probed this often. It is dead if so long a time passes, while the answer is awaited, without a sign of
/// life.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// A connection without a stream is closed after this many probes.
const IDLE_PROBES: u32 = 10;

/// Serves a connection until it ends.
pub(super) async fn serve<C: Leg>(ingress: Arc<Ingress>, conn: C, client: Client) {
    let settings = &ingress.settings;
    let allowance = Arc::new(Allowance::new(settings.max_streams));
    let life = Arc::<Life>::default();
    let conn = Watched::new(conn, allowance.clone(), life.clone());
    match timeout(settings.header_timeout, builder(settings).handshake(conn)).await {
        Ok(Ok(mut connection)) => {
            let keepalive = Keepalive::new(connection.ping_pong(), life);
            serve_connection(&ingress, connection, keepalive, &client, &allowance).await;
        }
        Ok(Err(error)) => lost(&ingress, &client, &error),
        Err(_) => {
            if ingress.metrics.lines.admit("http2_timed_out", client.peer.source()) {
                warn!(peer = %client.peer, "the HTTP/2 connection did not begin in time");
            }
            ingress.metrics.replied(Protocol::Http2.label(), 408, "head_timed_out");
        }
    }
}

fn builder(settings: &IngressSettings) -> Builder {
    let max_streams = settings.max_streams;
    let burst = Allowance::burst(max_streams);
    let max_head = settings.max_header_size.saturating_mul(HEAD_SLACK);
    // Room for all streams at once: else those that are read slowly would use it up for all others.
    let window = max_streams.saturating_mul(STREAM_WINDOW).min(MAX_WINDOW);
    let mut builder = Builder::new();
    builder
        .max_concurrent_streams(max_streams)
        .max_header_list_size(u32::try_from(max_head).unwrap_or(u32::MAX))
        .initial_window_size(STREAM_WINDOW)
        .initial_connection_window_size(window)
        .max_send_buffer_size(SEND_BUFFER)
        .max_concurrent_reset_streams(burst)
        .reset_stream_duration(LATE)
        .max_pending_accept_reset_streams(burst)
        // It counts as long as the connection lives.
        .max_local_error_reset_streams(None);
    builder
}

async fn serve_connection<C: Leg>(
    ingress: &Arc<Ingress>,
    mut connection: Connection<Watched<C>, Bytes>,
    mut keepalive: Keepalive,
    client: &Client,
    allowance: &Arc<Allowance>,
) {
    let mut streams = TaskSet::new("an HTTP/2 stream", &ingress.metrics.panics);
    let (mut leaving, mut idle_probes) = (false, 0);
    loop {
        tokio::select! {
            // Ended streams make room for new ones; who does too much gets no more of them; leaving waits for what has
            // arrived; probing can wait.
            biased;
            Some(()) = streams.next_ended() => {}
            () = allowance.exceeded() => {
                flooded(ingress, client, "it gave up, or spoiled, too many requests in a short time");
                connection.abrupt_shutdown(Reason::ENHANCE_YOUR_CALM);
                let _ = timeout(FAREWELL, poll_fn(|cx| connection.poll_closed(cx))).await;
                break;
            }
            accepted = connection.accept() => match accepted {
                Some(Ok((request, respond))) => {
                    let (ingress, allowance) = (ingress.clone(), allowance.clone());
                    streams.spawn(serve_stream(ingress, client.clone(), allowance, request, respond));
                }
                Some(Err(error)) => {
                    lost(ingress, client, &error);
                    break;
                }
                None => break,
            },
            () = ingress.draining.cancelled(), if !leaving => {
                leaving = true;
                connection.graceful_shutdown();
            }
            alive = keepalive.probed() => {
                idle_probes = if streams.is_empty() { idle_probes + 1 } else { 0 };
                if !alive {
                    if ingress.metrics.lines.admit("http2_dead", client.peer.source()) {
                        warn!(
                            peer = %client.peer,
                            "the HTTP/2 connection is dead: its probe was not answered, and nothing else came"
                        );
                    }
                    break;
                }
                if idle_probes >= IDLE_PROBES && !leaving {
                    leaving = true;
                    connection.graceful_shutdown();
                }
            }
        }
    }
    // Streams that still run learn from this that their connection is gone.
    drop(connection);
    streams.all_ended().await;
}

fn lost(ingress: &Ingress, client: &Client, error: &h2::Error) {
    if error.is_io() || error.is_remote() {
        debug!(peer = %client.peer, %error, "the HTTP/2 connection ended");
    } else if error.reason() == Some(Reason::ENHANCE_YOUR_CALM) {
        flooded(ingress, client, &error.to_string());
    } else {
        if ingress.metrics.lines.admit("http2_broken", client.peer.source()) {
            warn!(peer = %client.peer, %error, "the HTTP/2 connection was ended: the client broke the protocol");
        }
        ingress.metrics.replied(Protocol::Http2.label(), 400, "malformed");
    }
}

fn flooded(ingress: &Ingress, client: &Client, cause: &str) {
    if ingress.metrics.lines.admit("http2_flooded", client.peer.source()) {
        warn!(peer = %client.peer, client = client.names.first(), cause,
              "the HTTP/2 connection was ended: the client asked too much of it");
    }
    ingress.metrics.replied(Protocol::Http2.label(), 429, "flooded");
}

/// Finds out whether a connection is alive.
struct Keepalive {
    pings: Option<PingPong>,
    due: Interval,
    waiting: bool,
    life: Arc<Life>,
    /// Its signs at the last probe.
    seen: u64,
}

impl Keepalive {
    fn new(pings: Option<PingPong>, life: Arc<Life>) -> Self {
        let mut due = interval_at(Instant::now() + KEEPALIVE, KEEPALIVE);
        due.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self { pings, due, waiting: false, life, seen: 0 }
    }

    /// Waits until the next probe is due; whether the client has lived since the last one. Cancel-safe.
    async fn probed(&mut self) -> bool {
        let Some(pings) = &mut self.pings else { return std::future::pending().await };
        loop {
            tokio::select! {
                // An answer that has come counts, however late it is seen.
                biased;
                pong = poll_fn(|cx| pings.poll_pong(cx)), if self.waiting => {
                    self.waiting = false;
                    if pong.is_err() {
                        return false;
                    }
                }
                _ = self.due.tick() => {
                    let seen = std::mem::replace(&mut self.seen, self.life.signs());
                    if self.waiting {
                        return seen != self.seen;
                    }
                    self.waiting = pings.send_ping(Ping::opaque()).is_ok();
                    return true;
                }
            }
        }
    }
}

/// Serves one request.
async fn serve_stream(
    ingress: Arc<Ingress>,
    client: Client,
    allowance: Arc<Allowance>,
    request: http::Request<RecvStream>,
    mut respond: SendResponse<Bytes>,
) {
    let (head, body) = request.into_parts();
    let asked = ingress.identify(asked(&head));
    let request = match judge(&ingress, &client, &head, &asked) {
        Ok(request) => request,
        Err(refusal) => return refuse(&ingress, respond, &client, &allowance, &asked, &refusal),
    };
    let gone = async {
        // However it is gone, nobody waits any more.
        let _ = poll_fn(|cx| respond.poll_reset(cx)).await;
    };
    let routed = match ingress.connect(Protocol::Http2, &request, gone).await {
        Some(Ok(routed)) => routed,
        Some(Err(refusal)) => return refuse(&ingress, respond, &client, &allowance, &asked, &refusal),
        None => return allowance.charge(),
    };
    match respond.send_response(Response::new(()), false) {
        Ok(send) => {
            ingress.carry(Protocol::Http2, &request, routed, H2Leg::new(body, send)).await;
        }
        Err(error) => {
            debug!(request = request.id, %error, "the client went away as the target was connected");
            allowance.charge();
        }
    }
}

fn asked(head: &Parts) -> Asked {
    let field = |name: &str| {
        let value = head.headers.get(name).and_then(|value| value.to_str().ok());
        value.unwrap_or_default().to_owned()
    };
    let target = head.uri.authority().map(ToString::to_string).unwrap_or_default();
    Asked { target, request_id: field("x-request-id"), traceparent: field("traceparent") }
}

fn judge(ingress: &Ingress, client: &Client, head: &Parts, asked: &Asked) -> Result<Request, Refusal> {
    if head.method != Method::CONNECT {
        return Err(Refusal::NotConnect { method: head.method.as_str().chars().take(32).collect() });
    }
    let max = ingress.settings.max_header_size;
    if head_size(head) > max {
        return Err(Refusal::HeadTooLong { max });
    }
    ingress.request(client, asked)
}

/// How long a head is, in bytes of names and values.
fn head_size(head: &Parts) -> usize {
    let authority = head.uri.authority().map_or(0, |authority| authority.as_str().len());
    head.headers.iter().fold(authority, |size, (name, value)| size + name.as_str().len() + value.len())
}

fn refuse(
    ingress: &Ingress,
    mut respond: SendResponse<Bytes>,
    client: &Client,
    allowance: &Allowance,
    asked: &Asked,
    refusal: &Refusal,
) {
    let reply = ingress.refuse(Protocol::Http2, client, asked, refusal);
    let body = reply.body();
    let mut response = Response::builder().status(reply.status).header("content-length", body.len());
    for (name, value) in reply.fields {
        response = response.header(name, value);
    }
    let Ok(response) = response.body(()) else { return respond.send_reset(Reason::INTERNAL_ERROR) };
    match respond.send_response(response, false) {
        Ok(mut send) => _ = send.send_data(body.into(), true),
        // The client is gone.
        Err(_) => allowance.charge(),
    }
}

/// One stream of a connection as a leg of a relay.
struct H2Leg {
    receive: RecvStream,
    /// What has arrived and was not read yet.
    unread: Bytes,
    send: SendStream<Bytes>,
    shut: bool,
}

impl H2Leg {
    fn new(receive: RecvStream, send: SendStream<Bytes>) -> Self {
        Self { receive, unread: Bytes::new(), send, shut: false }
    }
}

impl AsyncRead for H2Leg {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.unread.is_empty() {
            match ready!(this.receive.poll_data(cx)) {
                Some(Ok(bytes)) => this.unread = bytes,
                Some(Err(error)) => return Poll::Ready(Err(reset(error))),
                None if this.receive.is_end_stream() => return Poll::Ready(Ok(())),
                // RFC 9113, section 8.5: nothing but data may come on a connected stream.
                None => return Poll::Ready(Err(reset("the client sent trailers"))),
            }
        }
        let taken = this.unread.len().min(buf.remaining());
        buf.put_slice(&this.unread[..taken]);
        this.unread.advance(taken);
        // Only what was taken makes room for more. It fails if the stream is gone, which reading on will show.
        let _ = this.receive.flow_control().release_capacity(taken);
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for H2Leg {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let send = &mut self.send;
        let wanted = bytes.len().min(CHUNK);
        if wanted == 0 {
            return Poll::Ready(Ok(0));
        }
        send.reserve_capacity(wanted);
        let mut room = send.capacity();
        while room == 0 {
            room = match ready!(send.poll_capacity(cx)) {
                Some(room) => room.map_err(reset)?,
                None => return Poll::Ready(Err(reset("the stream is closed"))),
            };
        }
        let written = wanted.min(room);
        send.send_data(Bytes::copy_from_slice(&bytes[..written]), false).map_err(reset)?;
        Poll::Ready(Ok(written))
    }

    /// The connection's task sends by itself what it was given.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.shut {
            self.shut = true;
            self.send.send_data(Bytes::new(), true).map_err(reset)?;
        }
        Poll::Ready(Ok(()))
    }
}

impl Leg for H2Leg {
    fn abort(&mut self, _: &Aborted) {
        self.send.send_reset(Reason::CONNECT_ERROR);
    }

    /// The client resets the stream, or its connection is gone.
    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Lost> {
        Poll::Ready(Lost::Failed(match ready!(self.send.poll_reset(cx)) {
            Ok(reason) => reset(format!("the client reset its stream: {reason}")),
            Err(error) => reset(format!("the client's connection broke: {error}")),
        }))
    }

    /// The connection's probes tell.
    fn vanished(&self) -> Option<io::Error> {
        None
    }
}

fn reset(error: impl Into<Box<dyn std::error::Error + Send + Sync>>) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}
