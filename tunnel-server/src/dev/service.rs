//! The service behind each edge of `dev`: HTTPS that says which node it is, sends and takes bytes with checksums, and a
//! plain echo for half-close. Real programs to try the tunnel with, nothing more.

use std::{convert::Infallible, fmt::Write as _, io, net::SocketAddr, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full, combinators::BoxBody};
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use ring::digest::{Context, SHA256};
use tokio::{
    io::AsyncWriteExt,
    net::{TcpListener, TcpStream},
    task::JoinSet,
};
use tokio_rustls::TlsAcceptor;

/// Bytes are sent and made in pieces of this size.
const PIECE: usize = 64 * 1024;
/// Largest download that is served.
const LARGEST: u64 = 4 << 30;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);

/// The hexadecimal SHA-256 of a finished digest.
pub(super) fn hex(context: Context) -> String {
    context.finish().as_ref().iter().fold(String::new(), |mut text, byte| {
        // Writing to a string cannot fail.
        let _ = write!(text, "{byte:02x}");
        text
    })
}

/// The `n`-th piece of every download: no two are the same.
pub(super) fn piece(n: u64, length: usize) -> Bytes {
    let mut state = n.wrapping_add(1).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let words = (0..length.div_ceil(8)).flat_map(|_| {
        // xorshift64: fast, and nothing compresses or repeats.
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.take(length).collect()
}

/// The pieces of a download of so many bytes.
pub(super) fn pieces(bytes: u64) -> impl Iterator<Item = Bytes> {
    let full = bytes / PIECE as u64;
    let rest = usize::try_from(bytes % PIECE as u64).unwrap_or_default();
    (0..full).map(|n| piece(n, PIECE)).chain((rest > 0).then(|| piece(full, rest)))
}

/// Serves HTTPS at a node until the listener fails; owns every connection.
pub(super) async fn serve_https(listener: TcpListener, tls: TlsAcceptor, node: Arc<str>) -> io::Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let (tcp, peer) = listener.accept().await?;
        let (tls, node) = (tls.clone(), node.clone());
        connections.spawn(async move {
            let Ok(stream) = tls.accept(tcp).await else { return };
            let service = service_fn(|request| answer(request, &node, peer));
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIMEOUT);
            // An error here is the client's: it has hung up.
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
        });
        while connections.try_join_next().is_some() {}
    }
}

async fn answer(
    request: Request<Incoming>,
    node: &str,
    peer: SocketAddr,
) -> Result<Response<BoxBody<Bytes, Infallible>>, hyper::Error> {
    let text = |status, text: String| {
        let mut response = Response::new(Full::new(Bytes::from(text)).boxed());
        *response.status_mut() = status;
        response
    };
    match (request.method(), request.uri().path()) {
        (&Method::GET, "/") => Ok(text(StatusCode::OK, format!("hello from {node}, dialled by {peer}\n"))),
        (&Method::GET, "/download") => {
            let wanted = request.uri().query().and_then(|query| query.strip_prefix("bytes="));
            match wanted.and_then(|bytes| bytes.parse().ok()).filter(|bytes| *bytes <= LARGEST) {
                Some(bytes) => Ok(Response::new(download(bytes))),
                None => Ok(text(StatusCode::BAD_REQUEST, format!("say ?bytes=N, at most {LARGEST}\n"))),
            }
        }
        (&Method::POST, "/upload") => {
            let mut digest = Context::new(&SHA256);
            let mut body = request.into_body();
            while let Some(frame) = body.frame().await {
                if let Some(bytes) = frame?.data_ref() {
                    digest.update(bytes);
                }
            }
            Ok(text(StatusCode::OK, format!("{}\n", hex(digest))))
        }
        _ => Ok(text(
            StatusCode::NOT_FOUND,
            "there is GET /, GET /download?bytes=N and POST /upload\n".to_owned(),
        )),
    }
}

fn download(bytes: u64) -> BoxBody<Bytes, Infallible> {
    let frames = pieces(bytes).map(|piece| Ok(hyper::body::Frame::data(piece)));
    BodyExt::boxed(http_body_util::StreamBody::new(futures_util::stream::iter(frames)))
}

/// Echoes at a node until the listener fails. A half-close of the client is answered after all its bytes.
pub(super) async fn serve_echo(listener: TcpListener) -> io::Result<()> {
    let mut connections = JoinSet::new();
    loop {
        let (tcp, _) = listener.accept().await?;
        connections.spawn(echo(tcp));
        while connections.try_join_next().is_some() {}
    }
}

async fn echo(mut tcp: TcpStream) {
    let (mut reader, mut writer) = tcp.split();
    if tokio::io::copy(&mut reader, &mut writer).await.is_ok() {
        // The client has gone if this fails.
        let _ = writer.shutdown().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn downloads_have_the_length_that_was_asked_for_and_no_equal_pieces() {
        for bytes in [0, 1, PIECE as u64, 3 * PIECE as u64 + 17] {
            assert_eq!(pieces(bytes).map(|piece| piece.len() as u64).sum::<u64>(), bytes);
        }
        let all: Vec<Bytes> = pieces(10 * PIECE as u64).collect();
        assert!(all.windows(2).all(|pair| pair[0] != pair[1]));
    }
}
