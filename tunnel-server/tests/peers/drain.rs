//! How one of several gateways leaves: nobody notices, but for streams that run longer than it may stay.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
};

use tokio_util::sync::CancellationToken;

use super::*;
use crate::rig::good_edge;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_leaves_under_load_and_no_request_fails() {
    let cluster = Arc::new(Cluster::with_places(3));
    let change = |settings: &mut tunnel_server::GatewaySettings| {
        settings.drain_delay = Duration::from_millis(700);
        settings.drain_timeout = Duration::from_millis(1500);
    };
    let (a, b, c) =
        (cluster.start(0, change).await, cluster.start(1, change).await, cluster.start(2, change).await);
    let gateways = Arc::new([a, b, c]);
    for gateway in &*gateways {
        gateway.measured("tunnel_server_peer_links 2").await;
    }
    let nodes: Vec<String> = (0..9).map(|number| format!("edge-{number}")).collect();
    let mut edges = JoinSet::new();
    for (index, node) in nodes.iter().enumerate() {
        edges.spawn(good_edge(cluster.clone(), gateways[index % 3].edges, node.clone()));
    }
    for gateway in &*gateways {
        for node in &nodes {
            while gateway.echo(node, "known?").await.is_err() {
                sleep(Duration::from_millis(5)).await;
            }
        }
    }

    // A stream that does not end by itself, to a node of the gateway that leaves, through another one.
    let mut long_link = cluster.link(&gateways[1], "edge-long").await;
    gateways[0].answers_when_known("edge-long", &mut long_link).await;
    let (mut client, mut edge, _) = gateways[0].connected("edge-long", &mut long_link).await;

    let (stop, may_use_b) = (CancellationToken::new(), Arc::new(AtomicBool::new(true)));
    let sent = Arc::new(AtomicUsize::new(0));
    let mut load = JoinSet::new();
    for worker in 0..6 {
        let (gateways, nodes, stop) = (gateways.clone(), nodes.clone(), stop.clone());
        let (may_use_b, sent) = (may_use_b.clone(), sent.clone());
        load.spawn(async move {
            let mut failures = Vec::new();
            for round in worker.. {
                if stop.is_cancelled() {
                    return failures;
                }
                let gateway = &gateways[if may_use_b.load(Relaxed) { round % 3 } else { round % 2 * 2 }];
                let node = &nodes[round % nodes.len()];
                sent.fetch_add(1, Relaxed);
                if let Err(cause) = gateway.echo(node, &format!("request {round}")).await {
                    failures.push(format!("{node} through {}: {cause}", gateway.name));
                }
            }
            failures
        });
    }
    sleep(Duration::from_millis(300)).await;
    assert_eq!(gateways[1].readiness.check(), Ok(()));
    let (told, before) = (Instant::now(), sent.load(Relaxed));
    gateways[1].shutdown.cancel();
    while gateways[1].readiness.check().is_ok() {
        assert!(told.elapsed() < Duration::from_millis(200), "still ready");
        tokio::task::yield_now().await;
    }
    // Load balancers notice, within the drain delay.
    sleep(Duration::from_millis(400)).await;
    may_use_b.store(false, Relaxed);

    edge.write_all(b"still here").await.unwrap();
    client.read_exact(&mut [0; 10]).await.unwrap();
    let end = timeout(PATIENCE, client.read(&mut [0; 1])).await.unwrap();
    let lasted = told.elapsed();
    assert!(end.is_err(), "a stream that was cut looks whole");
    assert!(lasted >= Duration::from_millis(2150), "the long stream was cut after {lasted:?}");
    let error = timeout(PATIENCE, edge.read(&mut [0; 1])).await.unwrap().unwrap_err();
    assert!(matches!(code(&error), AbortCode::Drained | AbortCode::LinkLost), "{error}");
    sleep(Duration::from_millis(300)).await;
    assert!(gateways[1].task.is_finished(), "it has not left");
    stop.cancel();
    let failures: Vec<String> = load.join_all().await.into_iter().flatten().collect();
    let (sent, meanwhile) = (sent.load(Relaxed), sent.load(Relaxed) - before);
    println!("{sent} requests, {meanwhile} of them while a gateway left: {} failed", failures.len());
    assert!(failures.is_empty(), "{} of {sent}: {:?}", failures.len(), &failures[..failures.len().min(5)]);
    assert!(meanwhile > 100, "{meanwhile} requests prove little");
}

#[tokio::test]
async fn a_gateway_leaves_when_its_edges_have_and_not_before() {
    let cluster = Cluster::with_places(2);
    let (a, mut b) = (cluster.start(0, |_| {}).await, cluster.start(1, |_| {}).await);
    for gateway in [&a, &b] {
        gateway.measured("tunnel_server_peer_links 1").await;
    }
    let mut old = cluster.link(&b, "edge-b").await;
    a.answers_when_known("edge-b", &mut old).await;
    b.shutdown.cancel();
    while !matches!(timeout(PATIENCE, old.next()).await.unwrap(), LinkEvent::Draining(_)) {}
    // Through the others it is reached as long as it has not gone elsewhere.
    sleep(Duration::from_millis(300)).await;
    let (mut client, mut edge, _) = a.connected("edge-b", &mut old).await;
    assert!(!b.task.is_finished());
    let mut new = cluster.link(&a, "edge-b").await;
    old.handle().drain(PATIENCE, "there is a newer link");
    a.measured("tunnel_server_links 1").await;
    drop(a.connected("edge-b", &mut new).await);
    // A stream of a peer holds it still.
    sleep(Duration::from_millis(300)).await;
    assert!(!b.task.is_finished());
    edge.write_all(b"answer").await.unwrap();
    edge.shutdown().await.unwrap();
    client.shutdown().await.unwrap();
    edge.read_to_end(&mut Vec::new()).await.unwrap();
    let mut text = String::new();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "answer");
    timeout(Duration::from_secs(3), &mut b.task).await.expect("it waits for nothing").unwrap();
}

#[tokio::test]
async fn the_last_gateway_does_not_wait_for_edges_that_can_go_nowhere() {
    let cluster = Cluster::with_places(2);
    let mut a = cluster.start(0, |_| {}).await;
    let _link = cluster.link(&a, "edge-a").await;
    a.measured("tunnel_server_links 1").await;
    a.shutdown.cancel();
    timeout(Duration::from_secs(3), &mut a.task).await.expect("it waits").unwrap();
}
