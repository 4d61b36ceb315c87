//! HTTP/2 as the `h2` client sees it.

use std::future::poll_fn;

use bytes::Bytes;
use h2::{
    Reason, RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
};
use http::{Method, Request, StatusCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tunnel_core::{TunnelStream, proto::messages::AbortCode};

use super::*;

async fn client(site: &Site) -> SendRequest<Bytes> {
    let (io, _task) = site.client();
    // Its own room for what it does not read must not be what one of its streams uses up.
    let mut builder = h2::client::Builder::new();
    builder.initial_connection_window_size(4 << 20);
    let (send, connection) = builder.handshake(io).await.unwrap();
    tokio::spawn(connection);
    send.ready().await.unwrap()
}

pub(super) fn connect(
    client: &mut SendRequest<Bytes>,
    authority: &str,
) -> (ResponseFuture, SendStream<Bytes>) {
    let request = Request::builder().method(Method::CONNECT).uri(authority).body(()).unwrap();
    client.send_request(request, false).unwrap()
}

/// A connected stream: how the client sends, how it receives, and the edge's side.
pub(super) async fn connected(
    site: &mut Site,
    client: &mut SendRequest<Bytes>,
) -> (SendStream<Bytes>, RecvStream, TunnelStream) {
    let (response, send) = connect(client, "edge-a:10250");
    let pending = site.edge.pending().await;
    assert_eq!(pending.open().target, "edge-a:10250");
    let edge = pending.accept("127.0.0.1:10250".to_owned()).await.unwrap();
    let response = response.await.unwrap();
    assert_eq!(response.status(), StatusCode::OK);
    (send, response.into_body(), edge)
}

pub(super) async fn text(mut body: RecvStream) -> Result<String, h2::Error> {
    let mut bytes = Vec::new();
    while let Some(piece) = body.data().await {
        let piece = piece?;
        body.flow_control().release_capacity(piece.len())?;
        bytes.extend_from_slice(&piece);
    }
    Ok(String::from_utf8(bytes).unwrap())
}

#[tokio::test]
async fn bytes_and_half_close_go_both_ways() {
    let mut site = Site::up().await;
    let mut client = client(&site).await;
    let (mut send, receive, mut edge) = connected(&mut site, &mut client).await;
    send.send_data("question".into(), true).unwrap();
    let mut question = String::new();
    edge.read_to_string(&mut question).await.unwrap();
    assert_eq!(question, "question");
    edge.write_all(b"answer").await.unwrap();
    edge.shutdown().await.unwrap();
    assert_eq!(text(receive).await.unwrap(), "answer");
}

#[tokio::test]
async fn refusals_say_why_in_every_way_that_is_left() {
    let mut site = Site::up().await;
    let mut client = client(&site).await;
    for (authority, status, words) in [
        ("nobody:1", StatusCode::NOT_FOUND, "no such node: nobody"),
        ("edge-a", StatusCode::BAD_REQUEST, "has no port"),
    ] {
        let (response, _send) = connect(&mut client, authority);
        let response = response.await.unwrap();
        assert_eq!(response.status(), status);
        let proxy_status = response.headers()["proxy-status"].to_str().unwrap().to_owned();
        assert!(proxy_status.contains(words), "{proxy_status}");
        assert!(text(response.into_body()).await.unwrap().contains(words));
    }
    let (response, _send) = connect(&mut client, "edge-a:1");
    site.edge_refuses(RefusalCode::ConnectionRefused, "refused").await;
    assert_eq!(response.await.unwrap().status(), StatusCode::BAD_GATEWAY);
    let get = Request::get("https://edge-a/").body(()).unwrap();
    let (response, _) = client.send_request(get, true).unwrap();
    let response = response.await.unwrap();
    assert_eq!(
        (response.status(), &response.headers()["allow"]),
        (StatusCode::METHOD_NOT_ALLOWED, &"CONNECT".parse().unwrap())
    );
}

#[tokio::test]
async fn a_reset_cancels_the_dial() {
    let mut site = Site::up().await;
    let mut client = client(&site).await;
    let (_response, mut send) = connect(&mut client, "edge-a:10250");
    let mut pending = site.edge.pending().await;
    send.send_reset(Reason::CANCEL);
    assert_eq!(pending.cancelled().await.code, AbortCode::Cancelled);
}

#[tokio::test]
async fn a_lost_connection_cancels_the_dial() {
    let mut site = Site::up().await;
    let (io, task) = site.client();
    let (mut send, connection) = h2::client::handshake(io).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = Request::builder().method(Method::CONNECT).uri("edge-a:10250").body(()).unwrap();
    let _asked = send.send_request(request, false).unwrap();
    let mut pending = site.edge.pending().await;
    connection.abort();
    assert_eq!(pending.cancelled().await.code, AbortCode::Cancelled);
    task.await.unwrap();
}

#[tokio::test]
async fn a_reset_of_either_side_is_a_reset_of_the_other() {
    let mut site = Site::up().await;
    let mut client = client(&site).await;

    let (mut send, _receive, mut edge) = connected(&mut site, &mut client).await;
    send.send_reset(Reason::CANCEL);
    assert!(edge.read(&mut [0; 1]).await.is_err());

    // Also when the client has nothing more to say, and nothing is said to it.
    let (mut send, _receive, mut edge) = connected(&mut site, &mut client).await;
    send.send_data(Bytes::new(), true).unwrap();
    assert_eq!(edge.read(&mut [0; 1]).await.unwrap(), 0);
    send.send_reset(Reason::CANCEL);
    // Its end of file stays one until the abort arrives.
    let aborted = async {
        while edge.read(&mut [0; 1]).await.is_ok() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(10), aborted).await.expect("the edge learns of the reset");

    let (_send, receive, mut edge) = connected(&mut site, &mut client).await;
    edge.write_all(b"half an ans").await.unwrap();
    drop(edge);
    assert_eq!(text(receive).await.unwrap_err().reason(), Some(Reason::CONNECT_ERROR));
}

/// The target of one stream never reads, the client of another never reads: a third must not notice.
#[tokio::test]
async fn a_slow_reader_stops_only_its_own_stream() {
    const PLENTY: usize = 8 << 20;
    let mut site = Site::up().await;
    let mut client = client(&site).await;
    let (mut stuck_send, _stuck_receive, _stuck_edge) = connected(&mut site, &mut client).await;
    let (_unread_send, _unread_receive, mut unread_edge) = connected(&mut site, &mut client).await;
    let sender = tokio::spawn(async move {
        stuck_send.reserve_capacity(PLENTY);
        let mut sent = 0;
        while let Some(Ok(room)) = poll_fn(|cx| stuck_send.poll_capacity(cx)).await {
            stuck_send.send_data(vec![0; room].into(), false).unwrap();
            sent += room;
            assert!(sent < PLENTY, "everything was taken, though nobody reads");
            stuck_send.reserve_capacity(PLENTY);
        }
    });
    let writer = tokio::spawn(async move { unread_edge.write_all(&vec![0; PLENTY]).await });
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
    let (mut send, receive, mut edge) = connected(&mut site, &mut client).await;
    send.send_data("question".into(), true).unwrap();
    let mut question = String::new();
    edge.read_to_string(&mut question).await.unwrap();
    assert_eq!(question, "question");
    edge.write_all(b"answer").await.unwrap();
    edge.shutdown().await.unwrap();
    assert_eq!(text(receive).await.unwrap(), "answer");
    assert!(!sender.is_finished() && !writer.is_finished());
    sender.abort();
    writer.abort();
}

#[tokio::test]
async fn a_draining_gateway_lets_streams_finish() {
    let mut site = Site::up().await;
    let (io, task) = site.client();
    let (send, connection) = h2::client::handshake(io).await.unwrap();
    tokio::spawn(connection);
    let mut client = send.ready().await.unwrap();
    let (mut send, receive, mut edge) = connected(&mut site, &mut client).await;
    site.draining.cancel();
    send.send_data("question".into(), true).unwrap();
    let mut question = String::new();
    edge.read_to_string(&mut question).await.unwrap();
    edge.write_all(b"answer").await.unwrap();
    edge.shutdown().await.unwrap();
    assert_eq!(text(receive).await.unwrap(), "answer");
    task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn a_client_that_does_not_answer_probes_is_dead() {
    let site = Site::up().await;
    let (mut io, task) = site.client();
    // A preface and empty settings, then silence.
    io.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0").await.unwrap();
    let started = tokio::time::Instant::now();
    task.await.unwrap();
    assert_eq!(started.elapsed().as_secs(), 60);
}

#[tokio::test(start_paused = true)]
async fn garbage_behind_the_preface_ends_the_connection() {
    let site = Site::up().await;
    let (mut io, task) = site.client();
    io.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff").await.unwrap();
    drop(io);
    task.await.unwrap();
}
