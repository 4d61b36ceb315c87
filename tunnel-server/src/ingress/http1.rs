//! HTTP CONNECT by HTTP/1.1 (and 1.0). Called by `ingress` with what was read so far.
//!
//! Written on a read loop of its own, because every byte counts: kube-apiserver fails if anything follows the head of
//! the reply before it has spoken, and what a client sends right behind its request must reach the target first.

use std::{fmt::Write, sync::Arc};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWriteExt},
    time::{Instant, timeout, timeout_at},
};
use tracing::debug;
use tunnel_core::{Aborted, Leg, proto::messages::AbortCode};

use super::{Asked, Client, Ingress, Protocol, early::Rewound, reply::Refusal};
use crate::{
    listener::say_farewell,
    route::{Request, Routed},
};

/// Most bytes taken from a client while its target is dialled. Its further bytes wait in its own send buffer.
const MAX_EARLY: usize = 64 * 1024;
/// Header fields of one request.
const MAX_FIELDS: usize = 100;
/// The whole reply to a request whose target is connected.
const CONNECTED: &[u8] = b"HTTP/1.1 200 OK\r\n\r\n";

/// Serves the one request of a connection. Its head must be there by `deadline`.
pub(super) async fn serve<C: Leg>(
    ingress: Arc<Ingress>,
    mut conn: C,
    client: Client,
    mut input: BytesMut,
    deadline: Instant,
) {
    let reading = read_head(&mut conn, &mut input, ingress.settings.max_header_size);
    let Ok(head) = timeout_at(deadline, reading).await else {
        return time_out(&ingress, conn, &client).await;
    };
    let asked = match head {
        Ok(asked) => ingress.identify(asked),
        Err(refusal) => return refuse(&ingress, conn, &client, &Asked::default(), &refusal).await,
    };
    // From here on, `input` is what the client says to its target.
    match ingress.request(&client, &asked) {
        Ok(request) => connect(&ingress, conn, &client, &asked, request, input).await,
        Err(refusal) => refuse(&ingress, conn, &client, &asked, &refusal).await,
    }
}

/// Refuses a client that was too slow.
pub(super) async fn time_out(ingress: &Ingress, conn: impl Leg, client: &Client) {
    let refusal = Refusal::HeadTimedOut { millis: ingress.settings.header_timeout.as_millis() };
    refuse(ingress, conn, client, &Asked::default(), &refusal).await;
}

async fn connect(
    ingress: &Ingress,
    mut conn: impl Leg,
    client: &Client,
    asked: &Asked,
    request: Request,
    mut early: BytesMut,
) {
    let gone = client_gone(&mut conn, &mut early);
    match ingress.connect(Protocol::Http1, &request, gone).await {
        Some(Ok(routed)) => carry(ingress, conn, &request, routed, early).await,
        Some(Err(refusal)) => refuse(ingress, conn, client, asked, &refusal).await,
        None => {}
    }
}

/// Completes when the client no longer waits. What it says meanwhile goes to `early`.
///
/// A client that ends before it was answered has gone, unless it has said something first: that is a request whose bytes
/// were sent at once, and which waits for an answer to them.
async fn client_gone(conn: &mut (impl AsyncRead + Unpin), early: &mut BytesMut) {
    while early.len() < MAX_EARLY {
        match conn.read_buf(early).await {
            Ok(1..) => {}
            Ok(0) if !early.is_empty() => break,
            Ok(0) | Err(_) => return,
        }
    }
    std::future::pending::<()>().await;
}

async fn carry(
    ingress: &Ingress,
    mut conn: impl Leg,
    request: &Request,
    mut routed: Routed,
    early: BytesMut,
) {
    if let Err(error) = write(ingress, &mut conn, CONNECTED).await {
        debug!(request = request.id, %error, "the client went away as the target was connected");
        let reason = Aborted::new(AbortCode::Cancelled, "the client went away as the target was connected");
        routed.stream.abort(reason);
        return;
    }
    ingress.carry(Protocol::Http1, request, routed, Rewound::new(early, conn)).await;
}

async fn refuse(ingress: &Ingress, mut conn: impl Leg, client: &Client, asked: &Asked, refusal: &Refusal) {
    let reply = ingress.refuse(Protocol::Http1, client, asked, refusal);
    let body = reply.body();
    let mut text = format!("HTTP/1.1 {} {}\r\n", reply.status.as_u16(), reply.reason);
    for (name, value) in &reply.fields {
        let _ = write!(text, "{name}: {value}\r\n");
    }
    let _ = write!(text, "content-length: {}\r\nconnection: close\r\n\r\n{body}", body.len());
    if write(ingress, &mut conn, text.as_bytes()).await.is_ok() {
        say_farewell(conn).await;
    }
}

/// A client that does not even read its reply is not waited for longer than one that does not send its request.
async fn write(ingress: &Ingress, conn: &mut impl Leg, bytes: &[u8]) -> std::io::Result<()> {
    timeout(ingress.settings.header_timeout, async {
        conn.write_all(bytes).await?;
        conn.flush().await
    })
    .await?
}

/// Reads a request's head off `input` and `conn`; what follows it stays in `input`.
async fn read_head(
    conn: &mut (impl AsyncRead + Unpin),
    input: &mut BytesMut,
    max: usize,
) -> Result<Asked, Refusal> {
    let mut parsed = 0;
    loop {
        // Only a line's end can complete a head. The first bytes are looked at in any case: they show what is not HTTP.
        if parsed == 0 || input[parsed..].contains(&b'\n') {
            parsed = input.len();
            if let Some((asked, length)) = parse(&input[..input.len().min(max)], max)? {
                input.advance(length);
                return Ok(asked);
            }
        }
        if input.len() >= max {
            return Err(Refusal::HeadTooLong { max });
        }
        match conn.read_buf(input).await {
            Ok(1..) => {}
            Ok(0) => {
                return Err(Refusal::Malformed("the connection ended in the middle of its head".to_owned()));
            }
            Err(error) => return Err(Refusal::Malformed(error.to_string())),
        }
    }
}

/// What is asked, and how long the head is; `None` if it is not complete.
fn parse(input: &[u8], max: usize) -> Result<Option<(Asked, usize)>, Refusal> {
    let mut fields = [httparse::EMPTY_HEADER; MAX_FIELDS];
    let mut request = httparse::Request::new(&mut fields);
    let length = match request.parse(input) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) => return Ok(None),
        Err(httparse::Error::TooManyHeaders) => return Err(Refusal::HeadTooLong { max }),
        Err(error) => return Err(Refusal::Malformed(format!("{error} (is this HTTP?)"))),
    };
    let method = request.method.unwrap_or_default();
    if method != "CONNECT" {
        return Err(Refusal::NotConnect { method: method.chars().take(32).collect() });
    }
    let field = |name: &str| {
        let field = request.headers.iter().find(|field| field.name.eq_ignore_ascii_case(name));
        field.and_then(|field| std::str::from_utf8(field.value).ok()).unwrap_or_default().to_owned()
    };
    let asked = Asked {
        target: request.path.unwrap_or_default().to_owned(),
        request_id: field("x-request-id"),
        traceparent: field("traceparent"),
    };
    Ok(Some((asked, length)))
}
