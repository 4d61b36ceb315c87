//! An agent whose way out is an HTTP proxy.

use std::net::SocketAddr;

use crate::support::{self, Gateway, LIMIT, Pki, Running, config, until};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, copy_bidirectional},
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tunnel_edge::config::{ProxyChoice, ProxyUrl};

async fn head(stream: &mut TcpStream) -> String {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(timeout(LIMIT, stream.read_u8()).await.unwrap().unwrap());
    }
    String::from_utf8(head).unwrap()
}

fn through(proxy: SocketAddr, credentials: Option<&str>) -> ProxyChoice {
    ProxyChoice::Http(ProxyUrl { address: proxy.into(), credentials: credentials.map(str::to_owned) })
}

#[tokio::test]
async fn a_link_goes_through_the_proxy_that_was_asked_politely() {
    let pki = Pki::new();
    let gateway = Gateway::bind(pki.gateway()).await;
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = config(pki.node("edge-a"), &[gateway.address()], &[]);
    config.proxy = through(proxy.local_addr().unwrap(), Some("user:pa%20ss"));
    let _running = Running::start(config);

    let (mut inside, _) = proxy.accept().await.unwrap();
    let request = head(&mut inside).await;
    let address = gateway.address();
    assert!(request.starts_with(&format!("CONNECT {address} HTTP/1.1\r\nHost: {address}\r\n")), "{request}");
    // base64 of "user:pa ss"
    assert!(request.contains("Proxy-Authorization: Basic dXNlcjpwYSBzcw==\r\n"), "{request}");
    let mut outside = TcpStream::connect(address).await.unwrap();
    inside.write_all(b"HTTP/1.1 200 Connection established\r\nVia: test\r\n\r\n").await.unwrap();
    tokio::select! {
        link = gateway.accept() => assert_eq!(link.hello.node_claim, "edge-a"),
        ended = copy_bidirectional(&mut inside, &mut outside) => panic!("the link ended early: {ended:?}"),
    }
}

#[tokio::test]
async fn gateways_own_addresses_are_reached_through_the_proxy_too() {
    let pki = Pki::new();
    let (mut first, mut second) = (Gateway::bind(pki.gateway()).await, Gateway::bind(pki.gateway()).await);
    (first.id, second.id) = ("gateway-a".to_owned(), "gateway-b".to_owned());
    first.hints = vec![first.hint(), second.hint()];
    let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut config = config(pki.node("edge-a"), &[first.address()], &[]);
    config.proxy = through(proxy.local_addr().unwrap(), None);
    let _running = Running::start(config);
    let forward = async {
        let mut tunnels = tokio::task::JoinSet::new();
        for gateway in [&first, &second] {
            let (mut inside, _) = timeout(LIMIT, proxy.accept()).await.unwrap().unwrap();
            let address = gateway.address();
            assert!(head(&mut inside).await.starts_with(&format!("CONNECT {address} HTTP/1.1\r\n")));
            inside.write_all(b"HTTP/1.1 200 Connection established\r\n\r\n").await.unwrap();
            let mut outside = TcpStream::connect(address).await.unwrap();
            tunnels.spawn(async move { copy_bidirectional(&mut inside, &mut outside).await });
        }
        tunnels.join_next().await;
        panic!("a link ended early");
    };
    let links = async {
        let one = first.accept().await;
        (one, second.accept().await)
    };
    tokio::select! {
        (one, two) = links => assert_eq!(one.hello.instance_id, two.hello.instance_id),
        () = forward => {}
    }
}

#[tokio::test]
async fn what_a_proxy_answers_instead_is_told_with_its_name() {
    let pki = Pki::new();
    let long = format!("HTTP/1.1 200 OK\r\nx: {}\r\n\r\n", "y".repeat(10_000));
    for (answer, says) in [
        ("HTTP/1.1 403 Blocked by policy\r\n\r\n", "\"403 Blocked by policy\""),
        (
            "HTTP/1.1 407 Proxy Authentication Required\r\nProxy-Authenticate: Basic\r\n\r\n",
            "http://USER:PASSWORD@",
        ),
        ("HTTP/1.0 502 Bad Gateway\r\n\r\nsorry", "\"502 Bad Gateway\""),
        ("SSH-2.0-OpenSSH_9.6\r\n\r\n", "not HTTP/1.1"),
        ("HTTP/1.1 200 OK\r\n", "hung up before it answered"),
        (&*long, "too long"),
    ] {
        let proxy = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = proxy.local_addr().unwrap();
        // Nothing listens at port 1: who goes there directly fails in another way.
        let mut config = config(pki.node("edge-a"), &[([127, 0, 0, 1], 1).into()], &[]);
        config.proxy = through(address, None);
        let running = Running::start(config);
        let (mut inside, _) = proxy.accept().await.unwrap();
        assert!(!head(&mut inside).await.contains("Proxy-Authorization"));
        inside.write_all(answer.as_bytes()).await.unwrap();
        inside.shutdown().await.unwrap();
        let proxy_is_named = format!("the HTTP proxy {address} ");
        until(says, || {
            let cause = running.why_not_ready();
            cause.contains(says) && cause.contains(&proxy_is_named)
        })
        .await;
    }
}

#[tokio::test]
async fn a_proxy_that_is_not_there_is_told_as_such() {
    let pki = Pki::new();
    let nobody = ([127, 0, 0, 1], support::closed_port().await).into();
    let mut config = config(pki.node("edge-a"), &[([127, 0, 0, 1], 1).into()], &[]);
    config.proxy = through(nobody, None);
    let running = Running::start(config);
    let says = format!("the HTTP proxy {nobody} cannot be reached: connection refused");
    until(&says, || running.why_not_ready().contains(&says)).await;
}
