//! Several whole gateways on real sockets: that whoever asks any of them reaches every node, with ends as exact as over
//! one; and that gateways come, go and lie without anyone else being hurt. The edges are the tests' own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "what was measured is shown by --nocapture")]

mod drain;
mod hostile;
mod rig;

use std::{sync::Arc, time::Duration};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tunnel_core::{Aborted, LinkEvent, proto::messages::AbortCode};

use crate::rig::{Cluster, PATIENCE, TRACEPARENT, pending, refuse_all};

/// Within this time a new link is known to all gateways.
const KNOWN_WITHIN: Duration = Duration::from_secs(1);

#[tokio::test]
async fn a_node_is_reached_through_every_gateway_and_nothing_is_lost_on_the_way() {
    let (cluster, [a, b, c]) = Cluster::of().await;
    let mut link = cluster.link(&a, "edge-a").await;
    for gateway in [&a, &b, &c] {
        gateway.answers_when_known("edge-a", &mut link).await;
        let (mut client, mut edge, open) = gateway.connected("edge-a", &mut link).await;
        let asked = (&*open.request_id, &*open.traceparent, &*open.caller, &*open.target, &*open.node);
        assert_eq!(asked, ("call-7", TRACEPARENT, "kube-apiserver", "edge-a:10250", ""), "{}", gateway.name);

        // The end of one direction is the end of that direction only.
        client.write_all(b"question").await.unwrap();
        client.shutdown().await.unwrap();
        let mut text = String::new();
        edge.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "question");
        edge.write_all(&vec![7; 300_000]).await.unwrap();
        edge.shutdown().await.unwrap();
        let mut bytes = Vec::new();
        client.read_to_end(&mut bytes).await.unwrap();
        assert!(bytes.len() == 300_000 && bytes.iter().all(|byte| *byte == 7));
        gateway.measured("tunnel_server_streams_ended_total{cause=\"clean\"} 1").await;
        gateway.measured("tunnel_server_stream_bytes_total{direction=\"to_target\"} 8").await;
        gateway.measured("tunnel_server_stream_bytes_total{direction=\"from_target\"} 300000").await;
    }
    a.measured("tunnel_server_forwarded_total{cause=\"connected\"} 2").await;
    a.measured("tunnel_server_forwarded_active 0").await;
    b.measured("tunnel_server_handed_to_peers_total{cause=\"connected\"} 1").await;
}

fn code(error: &std::io::Error) -> AbortCode {
    error.get_ref().and_then(|inner| inner.downcast_ref::<Aborted>()).expect("no reason").code
}

#[tokio::test]
async fn what_is_cut_anywhere_on_the_way_is_cut_at_the_other_end() {
    let (cluster, [a, b, c]) = Cluster::of().await;
    let mut link = cluster.link(&a, "edge-a").await;
    b.answers_when_known("edge-a", &mut link).await;
    c.answers_when_known("edge-a", &mut link).await;

    let (client, mut edge, _) = b.connected("edge-a", &mut link).await;
    SockRef::from(client.get_ref().0).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let error = timeout(PATIENCE, edge.read(&mut [0; 1])).await.unwrap().unwrap_err();
    assert_eq!(code(&error), AbortCode::Reset);

    let (mut client, mut edge, _) = b.connected("edge-a", &mut link).await;
    // Behind a half-close, where the multiplexer alone would make a clean end of it.
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    edge.read_to_end(&mut Vec::new()).await.unwrap();
    edge.write_all(b"half an ans").await.unwrap();
    edge.abort(Aborted::new(AbortCode::Reset, "the kubelet went away"));
    drop(edge);
    let end = timeout(PATIENCE, client.read_to_end(&mut Vec::new())).await.unwrap();
    assert!(end.is_err(), "a cut stream looks whole");

    // The gateway where the client is.
    let (_client, mut edge, _) = b.connected("edge-a", &mut link).await;
    b.kill().await;
    let error = timeout(PATIENCE, edge.read(&mut [0; 1])).await.unwrap().unwrap_err();
    assert!(matches!(code(&error), AbortCode::LinkLost | AbortCode::Cancelled), "{error}");

    // The gateway where the node is.
    let (mut client, mut edge, _) = c.connected("edge-a", &mut link).await;
    edge.write_all(b"half").await.unwrap();
    client.read_exact(&mut [0; 4]).await.unwrap();
    a.kill().await;
    assert!(
        timeout(PATIENCE, client.read(&mut [0; 1])).await.unwrap().is_err(),
        "a lost gateway is no clean end"
    );
}

#[tokio::test]
async fn of_a_node_at_several_gateways_the_newest_link_is_used_and_late_ends_change_nothing() {
    let (cluster, [a, b, c]) = Cluster::of().await;
    let mut old = cluster.link(&a, "edge-a").await;
    c.answers_when_known("edge-a", &mut old).await;
    let mut new = cluster.link(&b, "edge-a").await;
    // Once the word has come, it stays so.
    let begun = Instant::now();
    loop {
        assert!(begun.elapsed() < KNOWN_WITHIN, "the new link is not known");
        let asked = tokio::select! {
            biased;
            asked = async { pending(&mut new).await.refuse(tunnel_core::proto::messages::RefusalCode::NotAllowed, "new").await } => asked.map(|()| true),
            asked = async { pending(&mut old).await.refuse(tunnel_core::proto::messages::RefusalCode::NotAllowed, "old").await } => asked.map(|()| false),
            () = async { let _ = c.answer("edge-a").await; std::future::pending::<()>().await } => unreachable!(),
        };
        if asked.unwrap() {
            break;
        }
    }
    drop(c.connected("edge-a", &mut new).await);
    // The old one's end comes after the new one.
    drop(old);
    a.measured("tunnel_server_links 0").await;
    drop(a.connected("edge-a", &mut new).await);
    drop(c.connected("edge-a", &mut new).await);
    // Back again, and the link in between ends late.
    let mut newest = cluster.link(&a, "edge-a").await;
    a.measured("tunnel_server_links 1").await;
    drop(new);
    b.measured("tunnel_server_links 0").await;
    drop(b.connected("edge-a", &mut newest).await);
    drop(c.connected("edge-a", &mut newest).await);
    drop(newest);
    for gateway in [&a, &b, &c] {
        let answer = gateway.answers("edge-a", "node edge-a has no link to").await;
        assert!(answer.contains(" 503 "), "{answer}");
    }
}

#[tokio::test]
async fn a_gateway_that_is_killed_is_not_used_any_more_and_found_again() {
    let (cluster, [a, b, c]) = Cluster::of().await;
    let link = cluster.link(&b, "edge-b").await;
    let edge = tokio::spawn(refuse_all(link));
    for gateway in [&a, &c] {
        gateway.answers("edge-b", " 403 ").await;
    }
    let killed = Instant::now();
    b.kill().await;
    edge.await.unwrap();
    for gateway in [&a, &c] {
        let answer = gateway.answer("edge-b").await;
        assert!(answer.contains(" 503 "), "{answer}");
        let words = "node edge-b was linked to gateway gw-b, to which this gateway lost its link";
        assert!(answer.contains(words), "{answer}");
    }
    assert!(killed.elapsed() < Duration::from_secs(2), "{:?}", killed.elapsed());
    sleep(Duration::from_millis(300)).await;

    let back = Instant::now();
    let b = cluster.start(1, |_| {}).await;
    let _edge = tokio::spawn(refuse_all(cluster.link(&b, "edge-b").await));
    for gateway in [&a, &c] {
        gateway.answers("edge-b", " 403 ").await;
    }
    assert!(back.elapsed() < Duration::from_millis(2500), "{:?}", back.elapsed());
}

#[tokio::test]
async fn a_gateway_is_ready_once_it_knows_what_the_others_hold() {
    let (cluster, [a, b]) = Cluster::of().await;
    let _edge = tokio::spawn(refuse_all(cluster.link(&b, "edge-b").await));
    a.answers("edge-b", " 403 ").await;
    a.kill().await;
    let a = cluster.start(0, |_| {}).await;
    let begun = Instant::now();
    while let Err(cause) = a.readiness.check() {
        assert!(cause.contains("the other gateways have not told yet"), "{cause}");
        assert!(begun.elapsed() < Duration::from_secs(3), "it never gets ready");
        tokio::task::yield_now().await;
    }
    // The very first request.
    let answer = a.answer("edge-b").await;
    assert!(answer.contains(" 403 "), "{answer}");

    // One that is not there is not waited for.
    b.kill().await;
    a.kill().await;
    let a = cluster.start(0, |_| {}).await;
    let begun = Instant::now();
    while a.readiness.check().is_err() {
        assert!(begun.elapsed() < Duration::from_secs(2), "it waits for one that is not there");
        sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_new_link_is_known_to_all_gateways_within_a_second_under_churn() {
    const LINKS: usize = 300;
    const AT_ONCE: usize = 6;
    let (cluster, gateways) = Cluster::of::<3>().await;
    let (cluster, gateways) = (Arc::new(cluster), Arc::new(gateways));
    let mut linking = JoinSet::new();
    for worker in 0..AT_ONCE {
        let (cluster, gateways) = (cluster.clone(), gateways.clone());
        linking.spawn(async move {
            let (mut took, mut edges) = (Vec::new(), JoinSet::new());
            for number in 0..LINKS / AT_ONCE {
                let node = format!("edge-{worker}-{number}");
                let at = (worker + number) % 3;
                let link = cluster.link(&gateways[at], &node).await;
                edges.spawn(refuse_all(link));
                let linked = Instant::now();
                for other in [1, 2] {
                    gateways[(at + other) % 3].answers(&node, " 403 ").await;
                }
                took.push(linked.elapsed());
                // Links end as well: every other one.
                if number % 2 == 1 {
                    edges.shutdown().await;
                }
            }
            took
        });
    }
    let mut took: Vec<Duration> = linking.join_all().await.into_iter().flatten().collect();
    took.sort();
    let (p50, p99) = (took[took.len() / 2], took[took.len() * 99 / 100]);
    println!("known to all of 3 gateways, {} links under churn: p50 {p50:?}, p99 {p99:?}", took.len());
    assert!(p99 < KNOWN_WITHIN, "{p99:?}");
}

#[tokio::test]
async fn edges_are_told_which_gateways_there_are() {
    let cluster = Cluster::with_places(3);
    let (a, b) = (
        cluster.start(0, |_| {}).await,
        cluster
            .start(1, |settings| {
                settings.drain_delay = Duration::from_secs(1);
            })
            .await,
    );
    for gateway in [&a, &b] {
        gateway.measured("tunnel_server_peer_links 1").await;
    }
    let hints = |gateways: &[tunnel_core::proto::messages::Gateway]| -> Vec<(String, String, bool)> {
        let said = |about: &tunnel_core::proto::messages::Gateway| {
            (about.id.clone(), about.edge_address.clone(), about.draining)
        };
        gateways.iter().map(said).collect()
    };
    let expected = |gateways: &[(&rig::Running, bool)]| -> Vec<(String, String, bool)> {
        gateways.iter().map(|(one, leaves)| (one.name.to_owned(), one.edges.to_string(), *leaves)).collect()
    };
    let begun = Instant::now();
    let mut link = loop {
        let (link, welcome) = cluster.welcomed(a.edges, "edge-a").await.unwrap();
        if hints(&welcome.gateways) == expected(&[(&a, false), (&b, false)]) {
            break link;
        }
        assert!(begun.elapsed() < PATIENCE, "{:?}", welcome.gateways);
    };
    let mut told = async || loop {
        match timeout(PATIENCE, link.next()).await.expect("no update") {
            LinkEvent::Updated(update) => {
                assert_eq!(update.granted, ["edge-a"]);
                return hints(&update.gateways);
            }
            LinkEvent::Closed(error) => panic!("{error}"),
            _ => {}
        }
    };
    let c = cluster.start(2, |_| {}).await;
    // At once with its address: without one it is no place to go.
    assert_eq!(told().await, expected(&[(&a, false), (&b, false), (&c, false)]));
    b.shutdown.cancel();
    assert_eq!(told().await, expected(&[(&a, false), (&b, true), (&c, false)]));
    assert_eq!(told().await, expected(&[(&a, false), (&c, false)]));
    c.kill().await;
    assert_eq!(told().await, expected(&[(&a, false)]));
    a.shutdown.cancel();
    assert_eq!(told().await, expected(&[(&a, true)]));
}
