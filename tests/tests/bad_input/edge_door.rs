//! The public door: whoever is no edge of this gateway's CA, and edges that misbehave.

use rustls::AlertDescription;
use tokio::{
    io::{AsyncWriteExt, BufReader},
    net::TcpStream,
};
use tunnel_core::{
    Link, LinkConfig, LinkEvent,
    proto::messages::{Hello, Ping, RefusalCode, RejectCode, control::Kind},
    tls::Domain,
};
use tunnel_server::pki::Profile;
use tunnel_tests::{connect::connect, parties::control_plane_tls};

use crate::{
    client::{Credential, EDGE, alert, refusals, rest, tls},
    rig::{PATIENCE, Rig, answered, handshake_failed, link_closed, link_opened, rejected, soon, until},
    script::{Script, hello},
};

/// The first bytes of a TLS record that announces a `ClientHello` of 512 bytes.
const HALF_A_CLIENT_HELLO: &[u8] = &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3];

/// A script on a connection that TLS has nothing against.
async fn script(rig: &Rig, node: &str) -> Script {
    Script::edge(tls(rig.edge_door, Domain::Edge, Some(Credential::edge(node)), EDGE).await.unwrap()).await
}

/// A good link of a node, and what its gateway has granted.
async fn link(rig: &Rig, node: &str) -> Link {
    let socket = tls(rig.edge_door, Domain::Edge, Some(Credential::edge(node)), EDGE).await.unwrap();
    let socket = BufReader::new(socket);
    soon("a welcome", Link::connect(socket, hello(node), LinkConfig::default())).await.unwrap().0
}

async fn closed(link: &mut Link) -> String {
    let closing = async {
        loop {
            if let LinkEvent::Closed(error) = link.next().await {
                return error.to_string();
            }
        }
    };
    soon("the link's end", closing).await
}

#[tokio::test]
async fn bytes_that_are_not_tls() {
    let mut rig = Rig::new().await;
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 64], &[0xff; 64], b"SSH-2.0-OpenSSH_9.6\r\n"] {
        let case = rig.case(format!("{garbage:?}"));
        let mut socket = TcpStream::connect(rig.edge_door).await.unwrap();
        socket.write_all(garbage).await.unwrap();
        let answer = rest(&mut socket).await;
        // A TLS alert, fatal.
        assert_eq!(answer[..6], [0x15, 3, 3, 0, 2, 2], "{answer:?}");
        let peer = socket.local_addr().unwrap().to_string();
        let words = ["WARN", "TLS handshake failed", &peer, "what came is not TLS: is this the right port?"];
        rig.expect(case, &[handshake_failed("edge", "not_tls")], &words).await;
    }
    rig.finish().await;
}

#[tokio::test]
async fn half_a_client_hello_and_silence() {
    let mut rig = Rig::impatient().await;
    for begin in [HALF_A_CLIENT_HELLO, b""] {
        let case = rig.case(format!("{begin:?}"));
        let mut socket = TcpStream::connect(rig.edge_door).await.unwrap();
        socket.write_all(begin).await.unwrap();
        assert_eq!(rest(&mut socket).await, b"");
        let peer = socket.local_addr().unwrap().to_string();
        let words = ["WARN", &peer, "the TLS handshake was not finished within 400 ms"];
        rig.expect(case, &[handshake_failed("edge", "timeout")], &words).await;
    }
    rig.finish().await;
}

#[tokio::test]
async fn certificates_that_are_none_of_an_edge() {
    let mut rig = Rig::new().await;
    let node = Profile::Edge { node: "edge-b".parse().unwrap() };
    let other = ("the control plane's", Credential::client("control-plane"));
    for (name, credential, alerted, cause, text) in refusals(Domain::Edge, &node, other) {
        let case = rig.case(name);
        assert_eq!(alert(tls(rig.edge_door, Domain::Edge, credential, EDGE).await).await, alerted, "{name}");
        let words = ["WARN", "TLS handshake failed", text];
        rig.expect(case, &[handshake_failed("edge", cause)], &words).await;
    }
    rig.finish().await;
}

#[tokio::test]
async fn application_protocols_that_are_none_of_an_edge() {
    let mut rig = Rig::new().await;
    let protocols: [&[&[u8]]; 3] = [&[b"h2", b"http/1.1"], &[b"edge-tunnel-peer/1"], &[b"edge-tunnel/2"]];
    for wrong in protocols {
        let case = rig.case(format!("{wrong:?}"));
        let connected = tls(rig.edge_door, Domain::Edge, Some(Credential::edge("edge-b")), wrong).await;
        assert_eq!(alert(connected).await, AlertDescription::NoApplicationProtocol);
        let words = ["WARN", "no application protocol (ALPN) in common"];
        rig.expect(case, &[handshake_failed("edge", "alpn")], &words).await;
    }
    let case = rig.case("none at all");
    let mut stream = tls(rig.edge_door, Domain::Edge, Some(Credential::edge("edge-b")), &[]).await.unwrap();
    assert_eq!(rest(&mut stream).await, b"");
    let words = ["WARN", "does not ask for the application protocol (ALPN) of edges"];
    rig.expect(case, &[handshake_failed("edge", "alpn")], &words).await;
    rig.finish().await;
}

#[tokio::test]
async fn a_certificate_that_names_no_node() {
    let mut rig = Rig::new().await;
    let case = rig.case("CN=somebody");
    let stream = tls(rig.edge_door, Domain::Edge, Some(Credential::of_no_node()), EDGE).await.unwrap();
    let mut edge = Script::edge(stream).await;
    edge.send(Kind::Hello(hello("edge-a"))).await;
    let reject = edge.rejection().await;
    assert_eq!(reject.code(), RejectCode::Identity);
    for words in ["CN=somebody", "names no node", "CN=system:node:NAME with O=system:nodes"] {
        assert!(reject.text.contains(words), "{}", reject.text);
    }
    rig.expect(case, &[rejected("identity")], &["WARN", "edge rejected", "CN=somebody"]).await;
    rig.finish().await;
}

#[tokio::test]
async fn garbage_instead_of_the_link_protocol() {
    let mut rig = Rig::new().await;
    for garbage in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 64]] {
        let case = rig.case(format!("{:?}", &garbage[..16]));
        let edge = Some(Credential::edge("edge-b"));
        let mut stream = tls(rig.edge_door, Domain::Edge, edge, EDGE).await.unwrap();
        stream.write_all(garbage).await.unwrap();
        stream.flush().await.unwrap();
        rest(&mut stream).await;
        let words = ["WARN", "no link", "node=\"edge-b\"", "not the link protocol"];
        rig.expect(case, &[handshake_failed("edge", "protocol")], &words).await;
    }
    rig.finish().await;
}

#[tokio::test]
async fn garbage_instead_of_a_hello() {
    let mut rig = Rig::new().await;
    let too_long = "a message longer than 65536 bytes was announced";
    for (name, bytes, says) in [
        // 1 MiB, as a varint.
        ("1 MiB announced", &[0x80, 0x80, 0x40][..], too_long),
        ("no varint", &[0xff; 16], too_long),
        ("not a message", b"\x05GET /", "could not be decoded"),
        // A Ping with id 1.
        ("a ping first", &[4, 0x22, 2, 8, 1], "sent Ping before its Hello"),
    ] {
        let case = rig.case(name);
        let mut edge = script(&rig, "edge-b").await;
        edge.say(bytes).await;
        let reject = edge.rejection().await;
        assert_eq!(reject.code(), RejectCode::Malformed, "{name}");
        assert!(reject.text.contains(says), "{name}: {}", reject.text);
        let words = ["WARN", "no link", "node=\"edge-b\"", says];
        rig.expect(case, &[handshake_failed("edge", "protocol")], &words).await;
    }
    rig.finish().await;
}

#[tokio::test]
async fn a_hello_that_never_comes() {
    let mut rig = Rig::impatient().await;
    let words = ["WARN", "no link", "node=\"edge-b\"", "did not finish the handshake in time"];

    let case = rig.case("no control stream");
    let mut stream = tls(rig.edge_door, Domain::Edge, Some(Credential::edge("edge-b")), EDGE).await.unwrap();
    rest(&mut stream).await;
    rig.expect(case, &[handshake_failed("edge", "handshake_timeout")], &words).await;

    let case = rig.case("frames of the multiplexer that say nothing");
    let mut stream = tls(rig.edge_door, Domain::Edge, Some(Credential::edge("edge-b")), EDGE).await.unwrap();
    stream.write_all(&[0; 4096]).await.unwrap();
    stream.flush().await.unwrap();
    rest(&mut stream).await;
    rig.expect(case, &[handshake_failed("edge", "handshake_timeout")], &words).await;

    let case = rig.case("half a hello");
    let mut edge = script(&rig, "edge-b").await;
    edge.say(&[40, 1]).await;
    let reject = edge.rejection().await;
    assert!(reject.text.contains("did not finish the handshake in time"), "{}", reject.text);
    rig.expect(case, &[handshake_failed("edge", "handshake_timeout")], &words).await;
    rig.finish().await;
}

#[tokio::test]
async fn hellos_that_are_rejected() {
    let mut rig = Rig::new().await;
    let good = || hello("edge-b");
    for (name, hello, code, label, says) in [
        (
            "versions of the future",
            Hello { min_version: 7, max_version: 9, ..good() },
            RejectCode::Version,
            "version",
            &["speaks 1 to 1", "7 to 9", "update"][..],
        ),
        (
            "no version",
            Hello { min_version: 0, max_version: 0, ..good() },
            RejectCode::Version,
            "version",
            &["no common protocol version"],
        ),
        (
            "another's name",
            Hello { node_claim: "edge-a".to_owned(), ..good() },
            RejectCode::Identity,
            "identity",
            &["says it is node \"edge-a\"", "certificate is node \"edge-b\"'s"],
        ),
        (
            "a name with a new line",
            Hello { node_claim: "edge-a\r\nWARN forged".to_owned(), ..good() },
            RejectCode::Identity,
            "identity",
            &["\"edge-a\\r\\nWARN forged\""],
        ),
        (
            "no instance",
            Hello { instance_id: String::new(), ..good() },
            RejectCode::Malformed,
            "malformed",
            &["in the hello", "instance id"],
        ),
        (
            "a program with a new line in its name",
            Hello { software: "x\r\nWARN forged".to_owned(), instance_id: "/".repeat(60_000), ..good() },
            RejectCode::Malformed,
            "malformed",
            &["in the hello", "instance id"],
        ),
    ] {
        let case = rig.case(name);
        let mut edge = script(&rig, "edge-b").await;
        edge.send(Kind::Hello(hello)).await;
        let reject = edge.rejection().await;
        assert_eq!(reject.code(), code, "{name}: {}", reject.text);
        assert!(says.iter().all(|words| reject.text.contains(words)), "{name}: {}", reject.text);
        let logged = rig.logged(&case);
        assert!(!logged.lines().any(|line| line.starts_with("WARN forged")), "{name}: {logged}");
        assert!(logged.len() < 4096, "{name}: {} bytes of log", logged.len());
        rig.expect(case, &[rejected(label)], &["WARN", "edge rejected"]).await;
    }
    rig.finish().await;
}

#[tokio::test]
async fn garbage_on_a_link_that_is_up() {
    let mut rig = Rig::new().await;
    for (name, bytes, says) in [
        ("1 MiB announced", &[0x80, 0x80, 0x40][..], "longer than 65536 bytes"),
        ("not a message", b"\x05GET /", "could not be decoded"),
    ] {
        let case = rig.case(name);
        let mut edge = script(&rig, "edge-b").await;
        edge.send(Kind::Hello(hello("edge-b"))).await;
        assert!(matches!(edge.hear().await, Some(Kind::Welcome(_))));
        edge.say(bytes).await;
        while edge.hear().await.is_some() {}
        let words = ["link down", "edge-b", says];
        rig.expect(case, &[link_opened(), link_closed("protocol")], &words).await;
    }
    // Not wrong, only much.
    let case = rig.case("ten thousand pings");
    let mut edge = script(&rig, "edge-b").await;
    edge.send(Kind::Hello(hello("edge-b"))).await;
    for id in 0..10_000 {
        edge.send(Kind::Ping(Ping { id })).await;
    }
    while !matches!(edge.hear().await, Some(Kind::Pong(pong)) if pong.id == 9_999) {}
    drop(edge);
    rig.expect(case, &[link_opened(), link_closed("broken")], &["link down", "edge-b"]).await;
    rig.finish().await;
}

#[tokio::test]
async fn more_links_of_a_node_than_it_may_have() {
    let mut rig = Rig::new().await;
    let case = rig.case("three links of one node");
    let mut oldest = link(&rig, "edge-b").await;
    let older = link(&rig, "edge-b").await;
    let mut newest = link(&rig, "edge-b").await;
    let end = closed(&mut oldest).await;
    assert!(end.contains("the far side closed the link"), "{end}");

    let mut client = control_plane_tls(TcpStream::connect(rig.ingress_door).await.unwrap()).await.unwrap();
    let asking = async { connect(&mut client, "edge-b:10250").await.unwrap().unwrap_err() };
    let refusing = async {
        loop {
            if let LinkEvent::Stream(incoming) = newest.next().await {
                let stream = incoming.header(tokio::time::Instant::now() + PATIENCE).await.unwrap();
                return stream.refuse(RefusalCode::NotAllowed, "says the newest").await.unwrap();
            }
        }
    };
    let (refusal, ()) = soon("the newest link's answer", async { tokio::join!(asking, refusing) }).await;
    assert_eq!((refusal.status, refusal.reason.as_str()), (403, "node edge-b: says the newest"));
    drop((older, newest));
    let counted = [
        link_opened(),
        link_opened(),
        link_opened(),
        link_closed("closed_here"),
        link_closed("broken"),
        link_closed("broken"),
        answered("h1", 403, "target_not_allowed"),
    ];
    rig.expect(case, &counted, &["link down", "superseded by newer links of the same node"]).await;
    rig.finish().await;
}

#[tokio::test]
async fn more_links_than_there_may_be() {
    let mut rig = Rig::new().await;
    let case = rig.case("one link too many");
    let mut held = Vec::new();
    for node in ["edge-b", "edge-c", "edge-d"] {
        held.push(link(&rig, node).await);
    }
    let mut edge = script(&rig, "edge-e").await;
    edge.send(Kind::Hello(hello("edge-e"))).await;
    let reject = edge.rejection().await;
    assert_eq!(reject.code(), RejectCode::Overloaded);
    assert_eq!(reject.text, "this gateway holds as many links as it may (4)");
    assert!(reject.retry_after_ms > 0);
    drop(held);
    until("the links' end", || (rig.probe.links() == 1).then_some(())).await;
    // There is room again.
    drop(link(&rig, "edge-e").await);
    let counted: Vec<String> =
        (0..4).flat_map(|_| [link_opened(), link_closed("broken")]).chain([rejected("overloaded")]).collect();
    rig.expect(case, &counted, &["WARN", "edge rejected", "as many links as it may (4)"]).await;
    rig.finish().await;
}
