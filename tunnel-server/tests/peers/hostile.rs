//! Gateways that lie, flood or fall silent, and whoever is no gateway at all.

use tokio::{io::BufReader, net::TcpStream};
use tunnel_core::{
    ConnectError, Link, LinkConfig, OpenError, OpenRequest,
    proto::messages::{Gateway, Hello, Holding, Holdings, RefusalCode, RejectCode},
    tls::{ClientTls, Domain, Files},
};

use super::*;
use crate::rig::{Running, files, tls};

fn holdings(epoch: u64, part: u64, held: &[(&str, u64)]) -> Holdings {
    let holding =
        |(node, generation): &(&str, u64)| Holding { node: (*node).to_owned(), generation: *generation };
    Holdings { epoch, part, more: false, holdings: held.iter().map(holding).collect() }
}

/// What a link of a peer is asked, and says that there is no such node; until the link ends. How often it was asked.
async fn deny(mut link: Link) -> usize {
    let mut asked = 0;
    loop {
        match link.next().await {
            LinkEvent::Stream(incoming) => {
                asked += 1;
                let pending = incoming.header(Instant::now() + PATIENCE).await.unwrap();
                assert_eq!((&*pending.open().node, &*pending.open().target), ("edge-b", "edge-b:10250"));
                assert_eq!(pending.open().request_id.len(), pending.open().request_id.trim().len());
                pending.refuse(RefusalCode::NoSuchNode, "no such node here").await.unwrap();
            }
            LinkEvent::Closed(_) => return asked,
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_stale_entry_is_corrected_and_another_gateway_asked() {
    let cluster = Cluster::with_places(3);
    let played = cluster.played(2);
    let (a, b) = (cluster.start(0, |_| {}).await, cluster.start(1, |_| {}).await);
    // Both dial the played gateway; which link is whose does not matter here.
    let (one, other) = (played.linked().await, played.linked().await);
    for gateway in [&a, &b] {
        gateway.measured("tunnel_server_peer_links 2").await;
    }
    let mut link = cluster.link(&b, "edge-b").await;
    a.answers_when_known("edge-b", &mut link).await;
    for link in [&one, &other] {
        // Newer than the true one, so that it is asked first.
        link.handle().tell_holdings(holdings(1, 0, &[("edge-b", u64::MAX)])).await;
    }
    let (one, other) = (tokio::spawn(deny(one)), tokio::spawn(deny(other)));
    sleep(Duration::from_millis(300)).await;
    drop(a.connected("edge-b", &mut link).await);
    a.measured("tunnel_server_handed_to_peers_total{cause=\"stale\"} 1").await;
    // It is not asked again, and the gateway that has the node asked it never.
    drop(a.connected("edge-b", &mut link).await);
    drop(b.connected("edge-b", &mut link).await);
    drop((a, b));
    assert_eq!(one.await.unwrap() + other.await.unwrap(), 1);
}

#[tokio::test]
async fn a_stream_takes_one_hop_and_no_other() {
    let cluster = Cluster::with_places(2);
    let played = cluster.played(1);
    let a = cluster.start(0, |_| {}).await;
    let link = played.linked().await;
    link.handle().tell_holdings(holdings(1, 0, &[("edge-b", 5)])).await;
    let denying = tokio::spawn(deny(link));
    sleep(Duration::from_millis(200)).await;

    // As a gateway would whose directory points here, while the one here points there.
    let (mut peer, _) = cluster.peer_link(&a, "gw-x").await.unwrap();
    let handle = peer.handle();
    let listening = tokio::spawn(async move { while !matches!(peer.next().await, LinkEvent::Closed(_)) {} });
    let begun = Instant::now();
    let request = OpenRequest {
        target: "edge-b:10250".to_owned(),
        node: "edge-b".to_owned(),
        ..OpenRequest::default()
    };
    let refused = handle.open(request, PATIENCE).await;
    assert!(matches!(refused, Err(OpenError::Refused { code: RefusalCode::NoSuchNode, .. })), "{refused:?}");
    assert!(begun.elapsed() < Duration::from_millis(300), "{:?}", begun.elapsed());

    // And as its own client sees it: at once, and with words.
    let answer = a.answer("edge-b").await;
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(answer.contains(" 503 node edge-b has no link to any gateway"), "{answer}");
    assert!(answer.contains("gateway gw-x"), "{answer}");

    for (node, target) in [("NOT A NAME", "edge-b:1"), ("edge-b", "no target"), ("", "edge-b:1")] {
        let request =
            OpenRequest { target: target.to_owned(), node: node.to_owned(), ..OpenRequest::default() };
        let refused = handle.open(request, PATIENCE).await;
        assert!(
            matches!(refused, Err(OpenError::Refused { code: RefusalCode::Malformed, .. })),
            "{refused:?}"
        );
    }
    drop(a);
    listening.await.unwrap();
    assert_eq!(denying.await.unwrap(), 1, "only the client's request went there");
}

#[tokio::test]
async fn a_peer_that_lies_floods_and_falls_silent_hurts_nobody_else() {
    let cluster = Cluster::with_places(3);
    let played = cluster.played(2);
    let quick = |settings: &mut tunnel_server::GatewaySettings| {
        settings.handshake_timeout = Duration::from_secs(2);
    };
    let (a, b) = (cluster.start(0, quick).await, cluster.start(1, |_| {}).await);
    let mut edge = cluster.link(&b, "edge-b").await;
    let links = (played.linked().await, played.linked().await);
    a.answers_when_known("edge-b", &mut edge).await;
    let edge = tokio::spawn(refuse_all(edge));
    drop(links);

    // Names that nobody can use, in great numbers; a part that is missing; an update, which is for edges.
    let link = played.linked().await;
    let names: Vec<String> = (0..2000).map(|number| format!("NOT A NAME {number}")).collect();
    let mut bad: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 1)).collect();
    bad.push(("edge-x", 9));
    for part in 0..200 {
        link.handle().tell_holdings(holdings(7, part, &bad)).await;
        link.handle().introduce(Gateway {
            id: "gw-b".to_owned(),
            edge_address: "x".repeat(500),
            draining: true,
        });
    }
    let ended = timeout(PATIENCE, async {
        let mut link = link;
        link.handle().tell_holdings(holdings(7, 500, &[])).await;
        while !matches!(link.next().await, LinkEvent::Closed(_)) {}
    });
    ended.await.expect("a part is missing, and nobody minds");
    still_works(&a).await;

    // A message that is too long, and then silence, on links of its own making.
    let (mut long, _) = cluster.peer_link(&a, "gw-x").await.unwrap();
    let huge = "x".repeat(70_000);
    long.handle().introduce(Gateway { id: huge, ..Gateway::default() });
    for epoch in 1..100 {
        long.handle().tell_holdings(holdings(epoch, 0, &bad)).await;
        long.handle().introduce(Gateway { id: "gw-b".to_owned(), draining: true, ..Gateway::default() });
    }
    assert!(
        timeout(Duration::from_millis(100), async {
            while !matches!(long.next().await, LinkEvent::Closed(_)) {}
        })
        .await
        .is_err()
    );
    let silent = tls(a.peers, &cluster.client(Domain::Peer, "gateway"), &[b"edge-tunnel-peer/1"]).await;
    let stalled = TcpStream::connect(a.peers).await.unwrap();
    for conn in [closes(silent).await, closes(stalled).await] {
        assert!(conn, "whoever says nothing is kept");
    }
    still_works(&a).await;
    // Raw bytes behind a good handshake.
    let mut garbage = tls(a.peers, &cluster.client(Domain::Peer, "gateway"), &[b"edge-tunnel-peer/1"]).await;
    let _ = garbage.write_all(&vec![0xff; 100_000]).await;
    assert!(closes(garbage).await);
    still_works(&a).await;
    assert!(!edge.is_finished() && !a.task.is_finished());
}

async fn still_works(gateway: &Running) {
    let begun = Instant::now();
    let answer = gateway.answer("edge-b").await;
    assert!(answer.contains(" 403 "), "{answer}");
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
}

async fn closes(mut conn: impl tokio::io::AsyncRead + Unpin) -> bool {
    timeout(PATIENCE, conn.read_to_end(&mut Vec::new())).await.is_ok()
}

#[tokio::test]
async fn certificates_of_other_sides_open_no_door_of_the_peers_and_theirs_no_other() {
    let (cluster, [a]) = Cluster::of().await;
    cluster.issue_edge("edge-a");
    let folder = cluster.folder.path();
    // One that trusts the door, with a certificate of another side.
    let crossing = |own: Domain, name: &str, door: Domain, server: &str| {
        let Files { cert, key, .. } = files(folder, own, name);
        ClientTls::load(door, Files { cert, key, ca: files(folder, door, server).ca }).unwrap()
    };
    let cases = [
        (a.peers, crossing(Domain::Edge, "edge-a", Domain::Peer, "gateway"), &b"edge-tunnel-peer/1"[..]),
        (a.peers, crossing(Domain::ControlPlane, "client", Domain::Peer, "gateway"), b"edge-tunnel-peer/1"),
        (a.edges, crossing(Domain::Peer, "gateway", Domain::Edge, "gateway"), b"edge-tunnel/1"),
        (a.ingress, crossing(Domain::Peer, "gateway", Domain::ControlPlane, "gateway"), b"http/1.1"),
    ];
    for (address, client, protocol) in cases {
        let mut conn = tls(address, &client, &[protocol]).await;
        let end = timeout(PATIENCE, conn.read(&mut [0; 1])).await.unwrap();
        let error = end.expect_err("it was let in").to_string();
        assert!(error.contains("alert"), "{error}");
    }
    let failed = |domain: &str| {
        let known = format!("tunnel_server_handshakes_failed_total{{domain=\"{domain}\",cause=");
        let metrics = a.metrics();
        let lines = metrics.lines().filter(|line| line.starts_with(&known));
        lines.map(|line| line.rsplit(' ').next().unwrap().parse::<u32>().unwrap()).sum::<u32>()
    };
    assert_eq!((failed("peer"), failed("edge"), failed("control_plane")), (2, 1, 1));

    // The right certificate, but no word of what is spoken.
    let mut conn = tls(a.peers, &cluster.client(Domain::Peer, "gateway"), &[]).await;
    assert_eq!(timeout(PATIENCE, conn.read(&mut [0; 1])).await.unwrap().unwrap(), 0);
    a.measured("tunnel_server_handshakes_failed_total{domain=\"peer\",cause=\"alpn\"} 1").await;
}

#[tokio::test]
async fn two_gateways_of_one_name_are_told_so() {
    let (cluster, [a]) = Cluster::of().await;
    let reject = |rejected: Result<_, ConnectError>| match rejected {
        Err(ConnectError::Rejected(reject)) => reject,
        other => panic!("not rejected: {:?}", other.map(|(link, _): (Link, _)| link)),
    };
    let said = reject(cluster.peer_link(&a, "gw-a").await);
    assert_eq!(said.code(), RejectCode::Identity);
    assert_eq!(said.text, "two gateways are named gw-a: give each a gateway_id of its own");
    let said = reject(cluster.peer_link(&a, "Not A Name").await);
    assert_eq!(said.code(), RejectCode::Malformed);
    assert!(said.text.contains("Not A Name"), "{}", said.text);
    let hello = Hello { min_version: 9, max_version: 9, gateway_id: "gw-x".to_owned(), ..Hello::default() };
    let conn = tls(a.peers, &cluster.client(Domain::Peer, "gateway"), &[b"edge-tunnel-peer/1"]).await;
    let said = reject(Link::connect(BufReader::new(conn), hello, LinkConfig::default()).await);
    assert_eq!(said.code(), RejectCode::Version);
}
