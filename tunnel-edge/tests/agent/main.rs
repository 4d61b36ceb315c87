//! An agent against a gateway that is a raw link, over real sockets of loopback.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on has failed")]

mod cluster;
mod proxy;
mod renewal;
mod support;

use std::{
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::SeqCst},
    },
    time::Duration,
};

use support::{Gateway, GatewayLink, LIMIT, Pki, Running, closed_port, config, echo, request, until};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpListener,
    time::timeout,
};
use tunnel_core::{
    Aborted, Host, OpenError, Socket, TunnelStream,
    proto::messages::{AbortCode, RefusalCode},
};
use tunnel_edge::network::{DialError, Network, SystemNetwork};

async fn open(link: &GatewayLink, target: &str) -> Result<(TunnelStream, String), OpenError> {
    link.handle.open(request(target), LIMIT).await
}

async fn round_trip(stream: &mut TunnelStream, text: &[u8]) {
    stream.write_all(text).await.unwrap();
    let mut back = vec![0; text.len()];
    timeout(LIMIT, stream.read_exact(&mut back)).await.unwrap().unwrap();
    assert_eq!(back, text);
}

async fn finish(mut stream: TunnelStream) {
    stream.shutdown().await.unwrap();
    let mut rest = Vec::new();
    timeout(LIMIT, stream.read_to_end(&mut rest)).await.unwrap().unwrap();
    assert!(rest.is_empty());
}

#[tokio::test]
async fn carries_a_stream_to_its_target_by_any_name_of_the_node() {
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let gateway = Gateway::bind(pki.gateway()).await;
    let allow = [format!("node:{}", target.port())];
    let running = Running::start(config(pki.node("edge-a"), &[gateway.address()], &allow));
    let link = gateway.accept().await;
    assert_eq!(link.hello.node_claim, "edge-a");
    assert!(link.hello.software.starts_with("tunnel-edge/"));
    assert_eq!(link.hello.max_streams, 1024);
    until("ready", || running.status.ready().is_ok()).await;

    for host in ["edge-a", "192.168.7.7"] {
        let (mut stream, address) = open(&link, &format!("{host}:{}", target.port())).await.unwrap();
        assert_eq!(address, target.to_string());
        round_trip(&mut stream, b"hello").await;
        finish(stream).await;
    }
    let clean = r#"tunnel_edge_streams_ended_total{cause="clean"}"#;
    until("both streams are counted", || running.metric(clean) == 2).await;
    assert_eq!(running.metric(r#"tunnel_edge_stream_bytes_total{direction="to_target"}"#), 10);
    assert_eq!(running.metric("tunnel_edge_streams_active"), 0);
}

#[tokio::test]
async fn refuses_with_the_cause_what_it_may_not_or_cannot_dial() {
    let (pki, closed) = (Pki::new(), closed_port().await);
    let gateway = Gateway::bind(pki.gateway()).await;
    let allow = [format!("node:{closed}"), "no-such-host.invalid:1".to_owned()];
    let running = Running::start(config(pki.node("edge-a"), &[gateway.address()], &allow));
    let link = gateway.accept().await;
    let closed = format!("edge-a:{closed}");
    for (target, expected, says) in [
        ("edge-a:22", RefusalCode::NotAllowed, "\"node:22\""),
        ("127.0.0.1:22", RefusalCode::NotAllowed, "\"127.0.0.1:22\""),
        (&*closed, RefusalCode::ConnectionRefused, "edge-a could not reach 127.0.0.1:"),
        ("no-such-host.invalid:1", RefusalCode::NameNotResolved, "has no address"),
        ("edge-a", RefusalCode::Malformed, "has no port: give host:port"),
        ("edge-a:0", RefusalCode::Malformed, "not host:port"),
    ] {
        let Err(OpenError::Refused { code, text }) = open(&link, target).await else {
            panic!("{target} was opened")
        };
        assert_eq!(code, expected, "{target}: {text}");
        assert!(text.contains(says), "{target}: {text}");
    }
    assert_eq!(running.metric(r#"tunnel_edge_streams_refused_total{code="not_allowed"}"#), 2);
}

#[tokio::test]
async fn links_again_after_its_link_is_cut_and_says_so_meanwhile() {
    let pki = Pki::new();
    let gateway = Gateway::bind(pki.gateway()).await;
    let running = Running::start(config(pki.node("edge-a"), &[gateway.address()], &[]));
    let first = gateway.accept().await;
    until("ready", || running.status.ready().is_ok()).await;
    let instance = first.hello.instance_id.clone();
    drop(first);
    until("not ready", || running.why_not_ready().contains("link lost")).await;
    let second = gateway.accept().await;
    assert_eq!(second.hello.instance_id, instance, "one process is one instance");
    until("ready again", || running.status.ready().is_ok()).await;
    assert!(!running.task.is_finished());
}

#[tokio::test]
async fn outlives_an_absent_gateway_and_finds_it_when_it_comes() {
    let pki = Pki::new();
    let port = closed_port().await;
    let absent = ([127, 0, 0, 1], port).into();
    let running = Running::start(config(pki.node("edge-a"), &[absent], &[]));
    let failures = r#"tunnel_edge_connect_failures_total{cause="refused"}"#;
    until("several attempts", || running.metric(failures) >= 4).await;
    assert!(running.why_not_ready().contains("connection refused"), "{}", running.why_not_ready());
    let gateway = Gateway::on(TcpListener::bind(absent).await.unwrap(), pki.gateway());
    let _link = gateway.accept().await;
}

#[tokio::test]
async fn goes_on_to_the_next_gateway_when_one_does_not_answer() {
    let pki = Pki::new();
    let gateway = Gateway::bind(pki.gateway()).await;
    let absent = ([127, 0, 0, 1], closed_port().await).into();
    for order in [[absent, gateway.address()], [gateway.address(), absent]] {
        let _running = Running::start(config(pki.node("edge-a"), &order, &[]));
        gateway.accept().await;
    }
}

#[tokio::test]
async fn a_gateway_that_does_not_trust_the_certificate_is_named_as_the_cause() {
    let (ours, theirs) = (Pki::new(), Pki::new());
    // The gateway's certificate is of our CA, but the clients it wants are of another.
    let mut files = ours.gateway();
    files.ca = theirs.ca().join("ca");
    let gateway = Gateway::bind(files).await;
    let running = Running::start(config(ours.node("edge-a"), &[gateway.address()], &[]));
    let refuse = async {
        loop {
            assert!(gateway.handshake_only().await.is_err());
            tokio::task::yield_now().await;
        }
    };
    let told =
        until("the cause", || running.why_not_ready().contains("does not trust this side's certificate"));
    tokio::select! {
        () = refuse => {}
        () = told => {}
    }
    // Not as a connection that broke: this does not pass by itself, and is not tried as often.
    let refused = "tunnel_edge_connect_failures_total{cause=\"refused_by_peer\"}";
    assert!(running.metric(refused) > 0);
}

#[tokio::test]
async fn an_impostor_gateway_is_not_believed() {
    let (ours, theirs) = (Pki::new(), Pki::new());
    let gateway = Gateway::bind(theirs.gateway()).await;
    let running = Running::start(config(ours.node("edge-a"), &[gateway.address()], &[]));
    assert!(gateway.handshake_only().await.is_err());
    until("the cause", || running.why_not_ready().contains("was not issued by the CA")).await;
}

/// A network where one host never answers, and attempts to reach it are counted while they last.
struct Swamp(Arc<AtomicUsize>);

struct Wading(Arc<AtomicUsize>);

impl Drop for Wading {
    fn drop(&mut self) {
        self.0.fetch_sub(1, SeqCst);
    }
}

impl Network for Swamp {
    type Conn = Socket;

    async fn connect(&self, host: &Host, port: u16) -> Result<Socket, DialError> {
        if *host != Host::Name("swamp".to_owned()) {
            return SystemNetwork.connect(host, port).await;
        }
        self.0.fetch_add(1, SeqCst);
        let _wading = Wading(self.0.clone());
        std::future::pending().await
    }
}

#[tokio::test]
async fn a_dial_ends_when_its_opener_gives_up_or_the_time_is_over() {
    let pki = Pki::new();
    let gateway = Gateway::bind(pki.gateway()).await;
    let wading = Arc::new(AtomicUsize::new(0));
    let mut config = config(pki.node("edge-a"), &[gateway.address()], &["swamp:1".to_owned()]);
    config.dial_timeout = Duration::from_millis(300);
    let _running = Running::start_on(config.clone(), Swamp(wading.clone()));
    let link = gateway.accept().await;
    let Err(OpenError::Refused { code, text }) = open(&link, "swamp:1").await else { panic!("opened") };
    assert_eq!(code, RefusalCode::DialTimeout, "{text}");
    assert_eq!(wading.load(SeqCst), 0);

    config.dial_timeout = LIMIT * 10;
    let _running = Running::start_on(config, Swamp(wading.clone()));
    let link = gateway.accept().await;
    let handle = link.handle.clone();
    let opening = tokio::spawn(async move { handle.open(request("swamp:1"), LIMIT).await.map(drop) });
    until("the dial has begun", || wading.load(SeqCst) == 1).await;
    opening.abort();
    until("the dial has ended", || wading.load(SeqCst) == 0).await;
}

#[tokio::test]
async fn a_shutdown_lets_streams_finish_and_takes_no_new_ones() {
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let gateway = Gateway::bind(pki.gateway()).await;
    let mut running =
        Running::start(config(pki.node("edge-a"), &[gateway.address()], &["node:*".to_owned()]));
    let link = gateway.accept().await;
    let (mut stream, _) = open(&link, &format!("edge-a:{}", target.port())).await.unwrap();
    running.shutdown.cancel();
    until("the drain reaches the gateway", || link.handle.peer_draining()).await;
    assert!(matches!(open(&link, "edge-a:1").await, Err(OpenError::Draining)));
    round_trip(&mut stream, b"still here").await;
    assert!(!running.task.is_finished());
    finish(stream).await;
    running.returned().await;
    assert_eq!(timeout(LIMIT, link.ended).await.unwrap().unwrap().label(), "closed_by_peer");
}

#[tokio::test]
async fn a_shutdown_stops_at_its_deadline_what_does_not_finish() {
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let gateway = Gateway::bind(pki.gateway()).await;
    let mut config = config(pki.node("edge-a"), &[gateway.address()], &["node:*".to_owned()]);
    config.drain_timeout = Duration::from_millis(200);
    let mut running = Running::start(config);
    let link = gateway.accept().await;
    let (mut stream, _) = open(&link, &format!("edge-a:{}", target.port())).await.unwrap();
    running.shutdown.cancel();
    let error = timeout(LIMIT, stream.read(&mut [0; 1])).await.unwrap().unwrap_err();
    let reason: &Aborted = error.get_ref().unwrap().downcast_ref().unwrap();
    assert_eq!(reason.code, AbortCode::Drained, "{reason}");
    running.returned().await;
}

#[tokio::test]
async fn a_shutdown_without_a_link_returns_at_once() {
    let pki = Pki::new();
    let absent = ([127, 0, 0, 1], closed_port().await).into();
    let mut running = Running::start(config(pki.node("edge-a"), &[absent], &[]));
    until("an attempt has failed", || running.why_not_ready().contains("connection refused")).await;
    running.shutdown.cancel();
    running.returned().await;
}

#[tokio::test]
async fn a_gateway_that_drains_is_left_for_another_while_its_streams_run_on() {
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let (one, two) = (Gateway::bind(pki.gateway()).await, Gateway::bind(pki.gateway()).await);
    let gateways = [one.address(), two.address()];
    let running = Running::start(config(pki.node("edge-a"), &gateways, &["node:*".to_owned()]));
    let (old, other) = tokio::select! {
        link = one.accept() => (link, &two),
        link = two.accept() => (link, &one),
    };
    let (mut stream, _) = open(&old, &format!("edge-a:{}", target.port())).await.unwrap();
    old.handle.drain(LIMIT, "rolling update");
    let new = other.accept().await;
    until("two links", || running.metric("tunnel_edge_links") == 2).await;
    round_trip(&mut stream, b"over the old link").await;
    let (mut fresh, _) = open(&new, &format!("edge-a:{}", target.port())).await.unwrap();
    round_trip(&mut fresh, b"over the new link").await;
    drop(old);
    until("one link", || running.metric("tunnel_edge_links") == 1).await;
    round_trip(&mut fresh, b"undisturbed").await;
    assert!(running.status.ready().is_ok());
}

/// Panics for one port of a target, and for any gateway once it is told to.
struct Cursed {
    gateway: SocketAddr,
    is_cursed: Arc<AtomicBool>,
}

impl Network for Cursed {
    type Conn = Socket;

    async fn connect(&self, host: &Host, port: u16) -> Result<Socket, DialError> {
        assert!(port != 13, "dialled a cursed target");
        assert!(port != self.gateway.port() || !self.is_cursed.load(SeqCst), "dialled a cursed gateway");
        SystemNetwork.connect(host, port).await
    }
}

#[tokio::test]
async fn a_stream_that_panics_ends_alone_and_a_keeper_that_panics_takes_the_edge_along() {
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let gateway = Gateway::bind(pki.gateway()).await;
    let allow = [format!("127.0.0.1:{}", target.port()), "127.0.0.1:13".to_owned()];
    let mut config = config(pki.node("edge-a"), &[gateway.address()], &allow);
    config.redundancy = 1;
    let is_cursed = Arc::new(AtomicBool::new(false));
    let network = Cursed { gateway: gateway.address(), is_cursed: is_cursed.clone() };
    let mut running = Running::start_on(config, network);
    let link = gateway.accept().await;
    until("ready", || running.status.ready().is_ok()).await;
    let (mut stream, _) = open(&link, &target.to_string()).await.unwrap();
    assert!(open(&link, "127.0.0.1:13").await.is_err());
    until("counted", || running.metric("tunnel_edge_panics_total") == 1).await;
    round_trip(&mut stream, b"still here").await;
    finish(stream).await;
    assert_eq!(running.why_not_ready(), "");

    is_cursed.store(true, SeqCst);
    drop(link);
    let failure = timeout(LIMIT, &mut running.task).await.unwrap().unwrap().unwrap_err().to_string();
    assert!(failure.contains("\"keeper\" panicked: dialled a cursed gateway"), "{failure}");
    assert_eq!(running.why_not_ready(), failure);
}
