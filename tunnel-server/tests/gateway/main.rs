//! A whole gateway on real sockets: whom its doors let in, what a cluster's nodes are granted, and how it leaves. The
//! links' other ends are the tests' own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod cluster;
mod defects;
mod process;
mod rig;
mod strangers;

use std::time::Duration;

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tunnel_core::{
    ConnectError, LinkError, LinkEvent,
    proto::messages::{Hello, RejectCode},
    tls::Domain,
};
use tunnel_server::{Grants, LinkLimits, pki::Validity};

use crate::rig::{CONNECT, PATIENCE, hello, pending, start};

#[tokio::test]
async fn a_node_is_who_its_certificate_says() {
    let grants = Grants::from_iter([("edge-a".parse().unwrap(), "10.0.0.0/8".parse().unwrap())]);
    let running = start(|settings| settings.grants = grants).await;
    let (mut link, welcome) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    assert_eq!(welcome.gateway_id, "gw-1");
    assert_eq!(welcome.granted, ["edge-a", "10.0.0.0/8"]);
    running.measured("tunnel_server_links 1").await;
    let (_client, _edge) = running.connected(&mut link).await;

    // A claim to be another node is told with both names, and takes nothing from that node.
    let reject = running.rejected("edge-b", hello("edge-a", "i2")).await;
    assert_eq!(reject.code(), RejectCode::Identity);
    assert!(reject.text.contains("\"edge-a\"") && reject.text.contains("\"edge-b\""), "{}", reject.text);
    running.measured("tunnel_server_rejects_total{code=\"identity\"} 1").await;
    let (_client, _edge) = running.connected(&mut link).await;

    // A certificate of the right CA, but for a server.
    assert!(matches!(running.link("gateway", hello("", "i3")).await, Err(ConnectError::Link(_))));
    running
        .measured("tunnel_server_handshakes_failed_total{domain=\"edge\",cause=\"bad_certificate\"} 1")
        .await;
    let reject = running.rejected("edge-a", hello("", "Not A Name")).await;
    assert_eq!(reject.code(), RejectCode::Malformed);
    let reject =
        running.rejected("edge-a", Hello { min_version: 9, max_version: 9, ..hello("", "i1") }).await;
    assert_eq!(reject.code(), RejectCode::Version);
}

#[tokio::test]
async fn what_is_no_edge_is_refused_and_counted() {
    let running = start(|settings| settings.handshake_timeout = Duration::from_millis(200)).await;
    let client = running.client(Domain::Edge, "edge-a");

    let mut no_protocol = running.tls(running.edges, &client, &[]).await;
    assert_eq!(no_protocol.read(&mut [0; 1]).await.unwrap(), 0);
    running.measured("tunnel_server_handshakes_failed_total{domain=\"edge\",cause=\"alpn\"} 1").await;

    let mut silent = running.tls(running.edges, &client, &[b"edge-tunnel/1"]).await;
    let _ = silent.read(&mut [0; 1]).await;
    running
        .measured("tunnel_server_handshakes_failed_total{domain=\"edge\",cause=\"handshake_timeout\"} 1")
        .await;

    let mut garbage = TcpStream::connect(running.edges).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    garbage.read_to_end(&mut Vec::new()).await.unwrap();
    running.measured("tunnel_server_handshakes_failed_total{domain=\"edge\",cause=\"not_tls\"} 1").await;

    let _stalled = TcpStream::connect(running.edges).await.unwrap();
    running.measured("tunnel_server_handshakes_failed_total{domain=\"edge\",cause=\"timeout\"} 1").await;
    running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
}

#[tokio::test]
async fn links_beyond_the_limit_are_rejected_and_the_oldest_of_a_node_is_superseded() {
    let running = start(|settings| settings.links = LinkLimits { total: 2, per_node: 1 }).await;
    let (mut old, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    let (mut new, _) = running.link("edge-a", hello("edge-a", "i2")).await.unwrap();
    let end = async {
        loop {
            if let LinkEvent::Closed(error) = old.next().await {
                return error;
            }
        }
    };
    let end = timeout(PATIENCE, end).await.unwrap();
    assert!(matches!(end, LinkError::ClosedByPeer), "{end}");
    running.measured("tunnel_server_links_closed_total{cause=\"closed_here\"} 1").await;
    let (_client, _edge) = running.connected(&mut new).await;

    let _other = running.link("edge-b", hello("edge-b", "i3")).await.unwrap();
    running.measured("tunnel_server_links 2").await;
    running.issue("edge-c", "edge-c", Validity::lasting(Duration::from_secs(3600)));
    let reject = running.rejected("edge-c", hello("edge-c", "i4")).await;
    assert_eq!(reject.code(), RejectCode::Overloaded);
}

#[tokio::test]
async fn a_client_that_wants_http2_gets_it() {
    let running = start(|_| {}).await;
    let (mut link, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    let client = running.client(Domain::ControlPlane, "client");
    let conn = running.tls(running.ingress, &client, &[b"h2", b"http/1.1"]).await;
    assert_eq!(conn.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut send, connection) = h2::client::handshake(conn).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = http::Request::connect("edge-a:10250").body(()).unwrap();
    let (response, _body) = send.send_request(request, false).unwrap();
    let pending = pending(&mut link).await;
    assert_eq!(pending.open().caller, "kube-apiserver");
    let mut edge = pending.accept(String::new()).await.unwrap();
    let mut body = response.await.unwrap().into_body();
    edge.write_all(b"hello").await.unwrap();
    assert_eq!(body.data().await.unwrap().unwrap(), "hello");
    drop((body, send));
    // The whole connection goes away: its streams end as cut, not as complete.
    connection.abort();
    assert!(timeout(PATIENCE, edge.read(&mut [0; 1])).await.unwrap().is_err());
}

#[tokio::test]
async fn the_unix_door_needs_no_certificate() {
    let running = start(|_| {}).await;
    let (mut link, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    let mut conn = UnixStream::connect(running.folder.path().join("door.sock")).await.unwrap();
    conn.write_all(CONNECT).await.unwrap();
    let pending = pending(&mut link).await;
    assert!(pending.open().caller.starts_with("uid:"), "{}", pending.open().caller);
}

#[tokio::test]
async fn a_drain_lets_streams_finish_then_closes_the_links() {
    let running = start(|_| {}).await;
    let (mut link, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    let (mut client, mut edge) = running.connected(&mut link).await;
    running.shutdown.cancel();
    let told = async { while !matches!(link.next().await, LinkEvent::Draining(_)) {} };
    timeout(PATIENCE, told).await.unwrap();
    assert!(TcpStream::connect(running.ingress).await.is_err(), "the door is still open");

    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    edge.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "question");
    edge.write_all(b"answer").await.unwrap();
    edge.shutdown().await.unwrap();
    text.clear();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "answer");
    timeout(PATIENCE, running.task).await.unwrap().unwrap().unwrap();
    assert!(matches!(
        timeout(PATIENCE, link.next()).await.unwrap(),
        LinkEvent::Closed(LinkError::ClosedByPeer)
    ));
    assert!(!running.folder.path().join("door.sock").exists());
}

#[tokio::test]
async fn a_drain_does_not_wait_for_ever() {
    let running = start(|settings| settings.drain_timeout = Duration::from_millis(100)).await;
    let (mut link, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    let (mut client, mut edge) = running.connected(&mut link).await;
    running.shutdown.cancel();
    // A reset, not an end of file: the stream was cut.
    assert!(client.read(&mut [0; 1]).await.is_err());
    assert!(edge.read(&mut [0; 1]).await.is_err());
    timeout(PATIENCE, running.task).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn a_link_does_not_outlive_its_certificate() {
    let running = start(|_| {}).await;
    running.issue("brief", "edge-b", Validity::lasting(Duration::from_secs(4)));
    // Farther away than a timer can be set.
    running.issue("long", "edge-a", Validity::lasting(Duration::from_secs(200 * 365 * 86_400)));
    let (mut long, _) = running.link("long", hello("edge-a", "i1")).await.unwrap();
    let (mut brief, _) = running.link("brief", hello("edge-b", "i2")).await.unwrap();
    let mut told = String::new();
    let ended = async {
        loop {
            match brief.next().await {
                LinkEvent::Draining(drain) => told = drain.reason,
                LinkEvent::Closed(error) => return error,
                _ => {}
            }
        }
    };
    let error = timeout(PATIENCE, ended).await.unwrap();
    assert!(matches!(error, LinkError::ClosedByPeer), "{error}");
    assert!(told.starts_with("the certificate of node edge-b expired at 20"), "{told}");
    assert!(told.ends_with("Z; the agent must connect with a new one"), "{told}");
    let (_client, _edge) = running.connected(&mut long).await;
    let reject = running.link("brief", hello("edge-b", "i3")).await;
    assert!(reject.is_err(), "an expired certificate was let in");
}

#[tokio::test]
async fn a_link_may_outlive_its_certificate_while_its_node_has_a_newer_one() {
    let running = start(|settings| settings.heartbeat = Duration::from_millis(500)).await;
    running.issue("brief", "edge-a", Validity::lasting(Duration::from_secs(3)));
    running.issue("long", "edge-a", Validity::lasting(Duration::from_secs(3600)));
    let (mut brief, _) = running.link("brief", hello("edge-a", "i1")).await.unwrap();
    let (mut client, mut edge) = running.connected(&mut brief).await;
    let (long, _) = running.link("long", hello("edge-a", "i1")).await.unwrap();
    brief.handle().drain(Duration::from_secs(3600), "there is a newer link");
    let events = tokio::spawn(async move {
        loop {
            if let LinkEvent::Closed(error) = brief.next().await {
                return error;
            }
        }
    });
    tokio::time::sleep(Duration::from_secs(6)).await;
    client.write_all(b"still here").await.unwrap();
    let mut said = [0; 10];
    edge.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"still here");
    // Without it, nothing says any more that the node may be here.
    drop(long);
    let error = timeout(PATIENCE, events).await.unwrap().unwrap();
    assert!(matches!(error, LinkError::ClosedByPeer), "{error}");
    assert!(client.read(&mut [0; 1]).await.is_err());
}
