//! The other side: gateways that are not what an edge may trust, or that misbehave. The edge says why it has no link,
//! and has one as soon as the same address is a good gateway's.

use std::{net::SocketAddr, time::Duration};

use prometheus_client::{encoding::text::encode, registry::Registry};
use tokio::{
    io::{AsyncWriteExt, BufReader, copy_bidirectional},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::JoinSet,
};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tunnel_core::{
    Link, LinkConfig, LinkEvent, LinkHandle, OpenError, OpenRequest,
    proto::messages::{RefusalCode, Reject, RejectCode, Update, Welcome, control::Kind},
    tls::{ClientTls, Domain},
};
use tunnel_edge::{
    Agent,
    config::{Backoff, Config},
    metrics::Metrics,
    network::SystemNetwork,
    status::AgentStatus,
};
use tunnel_tests::{connect::connect, parties::GATEWAY};

use crate::{
    client::{Credential, EDGE, acceptor, expired, rest, valid},
    rig::{PATIENCE, Rig, good_edge, link_closed, link_opened, soon, until},
    script::{Script, welcome},
};

/// The node of the edge that is lied to.
const NODE: &str = "edge-b";
/// How long the edge waits for a link.
const WAITS: Duration = Duration::from_millis(500);

/// An edge, and a look into it.
struct Edge {
    registry: Registry,
    status: AgentStatus,
    shutdown: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Edge {
    fn start(gateway: SocketAddr, echo: SocketAddr) -> Self {
        let config = Config {
            server_name: Some(GATEWAY.try_into().unwrap()),
            connect_timeout: WAITS,
            backoff: Backoff {
                min: Duration::from_millis(20),
                outage_max: Duration::from_millis(100),
                max: Duration::from_millis(100),
                reset_after: PATIENCE,
            },
            ..good_edge(NODE, gateway, echo)
        };
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        let tls = ClientTls::load(Domain::Edge, config.tls.clone()).unwrap();
        let agent = Agent::new(config, tls, SystemNetwork, 1, metrics);
        let (status, shutdown) = (agent.status(), CancellationToken::new());
        let running = agent.run(shutdown.clone());
        let task = AbortOnDropHandle::new(tokio::spawn(async { running.await.unwrap() }));
        Self { registry, status, shutdown, task }
    }

    fn counted(&self, sample: &str) -> bool {
        let mut text = String::new();
        encode(&mut text, &self.registry).unwrap();
        text.lines().any(|line| line == sample)
    }

    async fn stop(self) {
        self.shutdown.cancel();
        soon("the edge's end", self.task).await.unwrap();
    }
}

/// Treats the first connection as `hostile` says, and hands every later one to a good gateway.
async fn turncoat<H>(
    good: SocketAddr,
    hostile: impl FnOnce(TcpStream) -> H + Send + 'static,
) -> (SocketAddr, AbortOnDropHandle<()>)
where
    H: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serving = async move {
        let (victim, _) = listener.accept().await.unwrap();
        hostile(victim).await;
        let mut connections = JoinSet::new();
        while let Ok((mut edge, _)) = listener.accept().await {
            connections.spawn(async move {
                let mut gateway = TcpStream::connect(good).await.unwrap();
                let _ = copy_bidirectional(&mut edge, &mut gateway).await;
            });
        }
    };
    (address, AbortOnDropHandle::new(tokio::spawn(serving)))
}

/// One case: the edge meets `hostile`, counts `cause`, says `words` in its log and as the reason why it is not ready,
/// and is linked by the good gateway then, over which it serves a request.
async fn meets<H>(
    rig: &mut Rig,
    name: &str,
    cause: &str,
    words: &str,
    hostile: impl FnOnce(TcpStream) -> H + Send + 'static,
) where
    H: Future<Output = ()> + Send + 'static,
{
    let begin = rig.case(name);
    // Good only from when the edge's word was heard.
    let (turn, turned) = oneshot::channel();
    let waiting = async move |victim| {
        hostile(victim).await;
        let _ = turned.await;
    };
    let (address, _gateway) = turncoat(rig.edge_door, waiting).await;
    let edge = Edge::start(address, rig.echo);
    let why = until(name, || edge.status.ready().err().filter(|why| why.contains(words))).await;
    assert!(why.starts_with("not connected to any gateway for "), "{name}: {why}");
    let sample = format!("tunnel_edge_connect_failures_total{{cause=\"{cause}\"}} 1");
    assert!(edge.counted(&sample), "{name}: not counted as {cause}");
    let gateway = address.to_string();
    turn.send(()).unwrap();
    serves(rig, &edge, name).await;
    edge.stop().await;
    let counted = [link_opened(), answered_through(), stream_ended(), link_closed("closed_by_peer")];
    rig.expect(begin, &counted, &["WARN", "no link; trying on", &gateway, words]).await;
}

fn answered_through() -> String {
    crate::rig::answered("h1", 200, "connected")
}

fn stream_ended() -> String {
    "tunnel_server_streams_ended_total{cause=\"clean\"}".to_owned()
}

/// The edge has a link and serves a request over it.
async fn serves(rig: &Rig, edge: &Edge, name: &str) {
    until(name, || edge.status.ready().ok()).await;
    until(name, || (rig.probe.links() == 2).then_some(())).await;
    let mut client = tokio::net::UnixStream::connect(&rig.unix_door).await.unwrap();
    let target = format!("{NODE}:{}", rig.echo.port());
    soon(name, connect(&mut client, &target)).await.unwrap().unwrap();
    client.write_all(b"good").await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(rest(&mut client).await, b"good", "{name}");
}

#[tokio::test]
async fn gateways_that_tls_does_not_trust() {
    let mut rig = Rig::new().await;
    let other_ca = "was not issued by the CA configured for this side";
    let shake = |credential, protocols: &'static [&'static [u8]]| {
        move |victim| async move {
            if let Ok(mut stream) = acceptor(credential, protocols).accept(victim).await {
                rest(&mut stream).await;
            }
        }
    };
    let control_plane = Credential::gateway(Domain::ControlPlane, valid());
    meets(&mut rig, "the control plane's CA", "unknown_ca", other_ca, shake(control_plane, EDGE)).await;
    meets(&mut rig, "the peers' CA", "unknown_ca", other_ca, shake(Credential::peer(), EDGE)).await;
    let old = Credential::gateway(Domain::Edge, expired());
    meets(&mut rig, "expired", "expired", "certificate has expired", shake(old, EDGE)).await;
    let edge = Credential::edge("edge-a");
    meets(&mut rig, "an edge's", "bad_certificate", "certificate", shake(edge, EDGE)).await;
    let good = || Credential::gateway(Domain::Edge, valid());
    meets(&mut rig, "no ALPN", "alpn", "did not agree to the protocol edge-tunnel/1", shake(good(), &[]))
        .await;
    let common = "no application protocol (ALPN) in common";
    meets(&mut rig, "another ALPN", "refused_by_peer", common, shake(good(), &[b"h2"])).await;
    rig.finish().await;
}

#[tokio::test]
async fn gateways_that_speak_something_else() {
    let mut rig = Rig::new().await;
    let text = async |mut victim: TcpStream| {
        victim.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        rest(&mut victim).await;
    };
    meets(&mut rig, "not TLS", "not_tls", "what came is not TLS", text).await;
    let silent = async |mut victim: TcpStream| drop(rest(&mut victim).await);
    let no_handshake = "no link within 500 ms: gave up while waiting for the TLS handshake";
    meets(&mut rig, "silence", "timeout", no_handshake, silent).await;
    let gone = async |victim: TcpStream| drop(victim);
    meets(&mut rig, "gone at once", "closed", "hung up without a word", gone).await;
    let garbage = async |victim| {
        let mut stream = good_tls(victim).await;
        stream.write_all(b"HTTP/1.1 400 Bad Request\r\n\r\n").await.unwrap();
        stream.flush().await.unwrap();
        rest(&mut stream).await;
    };
    meets(&mut rig, "not the link protocol", "protocol", "not the link protocol", garbage).await;
    let no_answer = async |victim| drop(rest(&mut good_tls(victim).await).await);
    let no_welcome = "no link within 500 ms: gave up while waiting for the gateway's welcome";
    meets(&mut rig, "no answer to the hello", "timeout", no_welcome, no_answer).await;
    rig.finish().await;
}

async fn good_tls(victim: TcpStream) -> tokio_rustls::server::TlsStream<TcpStream> {
    let credential = Credential::gateway(Domain::Edge, valid());
    acceptor(credential, EDGE).accept(victim).await.unwrap()
}

#[tokio::test]
async fn gateways_whose_answer_is_unusable() {
    let mut rig = Rig::new().await;
    let say = |answer: Vec<u8>| {
        async move |victim| {
            let mut gateway = Script::gateway(good_tls(victim).await).await;
            assert!(matches!(gateway.hear().await, Some(Kind::Hello(_))));
            gateway.say(&answer).await;
            while gateway.hear().await.is_some() {}
        }
    };
    let answer = |kind: Kind| {
        let mut out = bytes::BytesMut::new();
        let message = tunnel_core::proto::messages::Control { kind: Some(kind) };
        tunnel_core::proto::frame::encode(&message, &mut out).unwrap();
        say(out.to_vec())
    };
    let welcomes = |welcome| answer(Kind::Welcome(welcome));
    meets(&mut rig, "garbage", "protocol", "could not be decoded", say(b"\x05GET /".to_vec())).await;
    let long = say(vec![0x80, 0x80, 0x40]);
    meets(&mut rig, "1 MiB announced", "protocol", "longer than 65536 bytes", long).await;
    for heartbeat_ms in [0, u32::MAX] {
        let absurd = welcomes(Welcome { heartbeat_ms, ..welcome() });
        meets(
            &mut rig,
            "an absurd heartbeat",
            "protocol",
            "the gateway's welcome is unusable: a heartbeat of",
            absurd,
        )
        .await;
    }
    let future = welcomes(Welcome { version: 9, ..welcome() });
    meets(&mut rig, "a version of the future", "protocol", "it chose protocol version 9", future).await;
    let update = answer(Kind::Update(Update::default()));
    meets(&mut rig, "out of turn", "protocol", "sent Update before its Welcome", update).await;
    let rejects = answer(Kind::Reject(Reject {
        code: RejectCode::NotAllowed.into(),
        text: "go\r\naway\u{1b}[31m".to_owned(),
        retry_after_ms: 0,
    }));
    let cleaned = "the gateway rejected the link: go  away [31m";
    meets(&mut rig, "a rejection", "rejected_not_allowed", cleaned, rejects).await;
    rig.finish().await;
}

/// A gateway that has welcomed its edge, by the real protocol: its link is served here, and ends by `close`.
async fn welcomed(victim: TcpStream, handles: oneshot::Sender<LinkHandle>) {
    let victim = BufReader::new(good_tls(victim).await);
    let pending = Link::accept(victim, LinkConfig::default()).await.unwrap();
    let mut link = pending.welcome(Welcome { gateway_id: "x\nWARN forged".to_owned(), ..welcome() }).unwrap();
    let _ = handles.send(link.handle());
    while !matches!(link.next().await, LinkEvent::Closed(_)) {}
}

#[tokio::test]
async fn targets_that_no_gateway_may_ask_for() {
    let mut rig = Rig::new().await;
    let case = rig.case("a gateway that asks for too much");
    let (sender, handle) = oneshot::channel();
    let (address, _gateway) = turncoat(rig.edge_door, |victim| welcomed(victim, sender)).await;
    let edge = Edge::start(address, rig.echo);
    let handle = soon("the edge's hello", handle).await.unwrap();
    let port = rig.echo.port();
    let denied = |target: &str| {
        format!("edge-b: this edge's policy does not allow {target}: if it should, add a rule")
    };
    let bad_port = "the port must be a number from 1 to 65535";
    let no_port = "has no port: give host:port, not a URL";
    let bad_host = "is neither a host name";
    for (target, code, says) in [
        ("edge-b:22".to_owned(), RefusalCode::NotAllowed, denied("edge-b:22")),
        (format!("127.0.0.1:{port}"), RefusalCode::NotAllowed, denied(&format!("127.0.0.1:{port}"))),
        (format!("localhost:{port}"), RefusalCode::NotAllowed, denied(&format!("localhost:{port}"))),
        (format!("edge-a:{port}"), RefusalCode::NotAllowed, denied(&format!("edge-a:{port}"))),
        ("169.254.169.254:80".to_owned(), RefusalCode::NotAllowed, denied("169.254.169.254:80")),
        (String::new(), RefusalCode::Malformed, no_port.to_owned()),
        ("edge-b".to_owned(), RefusalCode::Malformed, no_port.to_owned()),
        ("edge-b:0".to_owned(), RefusalCode::Malformed, bad_port.to_owned()),
        ("e\r\nWARN forged:1".to_owned(), RefusalCode::Malformed, bad_host.to_owned()),
        (format!("{}:1", "x".repeat(60_000)), RefusalCode::Malformed, no_port.to_owned()),
    ] {
        let request = OpenRequest {
            target: target.clone(),
            request_id: "id\nWARN forged".to_owned(),
            ..OpenRequest::default()
        };
        let opened = soon("an answer", handle.open(request, PATIENCE)).await;
        let shown: String = target.chars().take(40).collect();
        let Err(OpenError::Refused { code: refused, text }) = opened else { panic!("{shown:?}: {opened:?}") };
        assert_eq!(refused, code, "{shown:?}: {text}");
        assert!(text.contains(&says) && !text.contains('\n'), "{shown:?}: {text}");
        let logged = rig.logged(&case);
        assert!(!logged.lines().any(|line| line.starts_with("WARN forged")), "{logged}");
    }
    assert!(edge.counted("tunnel_edge_streams_refused_total{code=\"not_allowed\"} 5"));
    assert!(edge.counted("tunnel_edge_streams_refused_total{code=\"malformed\"} 5"));
    assert!(edge.status.ready().is_ok(), "the link was lost over it");
    handle.close("enough");
    until("the link's loss", || {
        edge.counted("tunnel_edge_links_lost_total{cause=\"closed_by_peer\"} 1").then_some(())
    })
    .await;
    serves(&rig, &edge, "after too much").await;
    edge.stop().await;
    let counted = [link_opened(), answered_through(), stream_ended(), link_closed("closed_by_peer")];
    rig.expect(case, &counted, &["stream refused", "policy does not allow 169.254.169.254:80"]).await;
    rig.finish().await;
}
