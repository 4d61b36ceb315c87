//! Processes come and go: two edges of one node, restarts, and drains.

use std::{io, time::Duration};

use tokio::{
    io::AsyncReadExt,
    net::TcpStream,
    time::{Instant, sleep},
};
use tunnel_tests::{
    connect::Refusal,
    plan::NODES,
    workload::{Kind, Outcome, Request},
};

use crate::rig::{LIMIT, Rig, assert_reset, finish, ping, raw, until, within};

async fn several(rig: &Rig, nodes: u32) {
    let line = format!("tunnel_server_nodes_with_several_links {nodes}\n");
    until(&line, || rig.probe.metrics().contains(&line)).await;
}

/// New streams to `edge-a` come out at this kubelet.
async fn assert_preferred(rig: &Rig, kubelet: usize) {
    for _ in 0..5 {
        let (mut client, mut target) = rig.pair("edge-a", kubelet).await;
        ping(&mut client, &mut target).await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_two_edges_of_one_node_the_newest_is_preferred_and_neither_disturbs_the_other() {
    let mut rig = Rig::start().await;
    several(&rig, 0).await;
    let (mut old_client, mut old_target) = rig.pair("edge-a", 0).await;

    // The newer edge stands before the other kubelet, which shows who serves.
    let newer = rig.start_edge(0, 1);
    rig.linked(3).await;
    several(&rig, 1).await;
    assert_preferred(&rig, 1).await;
    let (client, target) = rig.pair("edge-a", 1).await;
    ping(&mut old_client, &mut old_target).await;

    newer.kill().await;
    assert_reset("the newer edge is gone", [raw(client), target]).await;
    rig.linked(2).await;
    several(&rig, 0).await;
    ping(&mut old_client, &mut old_target).await;
    assert_preferred(&rig, 0).await;

    let newer = rig.start_edge(0, 1);
    rig.linked(3).await;
    several(&rig, 1).await;
    let (mut client, mut target) = rig.pair("edge-a", 1).await;
    rig.edges[0].replace(newer).unwrap().kill().await;
    assert_reset("the older edge is gone", [raw(old_client), old_target]).await;
    rig.linked(2).await;
    several(&rig, 0).await;
    ping(&mut client, &mut target).await;
    assert_preferred(&rig, 1).await;
    drop((client, target));
    rig.close().await;
}

/// Waits until nothing listens at the ingress.
async fn door_closes(rig: &Rig) {
    let deadline = Instant::now() + LIMIT;
    loop {
        match TcpStream::connect(rig.ingress).await {
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => return,
            _ => assert!(Instant::now() < deadline, "the ingress still accepts"),
        }
        sleep(Duration::from_millis(5)).await;
    }
}

/// A request that the workload's target answers.
async fn assert_whole(rig: &Rig, id: u64, node: &str) {
    let request = Request { id, node: node.to_owned(), kind: Kind::Echo, bytes: 100_000 };
    let client = rig.open(node).await;
    let outcome = within("an echo", request.run(client, &rig.ledger)).await;
    assert_eq!(outcome, Outcome::Whole, "{node}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn edges_come_back_by_themselves_after_a_restart_of_the_gateway() {
    let mut rig = Rig::start_alone().await;
    rig.serve_workload();
    for round in 0..2 {
        rig.gateway.take().unwrap().kill().await;
        door_closes(&rig).await;
        rig.start_gateway().await;
        rig.linked(2).await;
        for (which, node) in (0..).zip(NODES) {
            assert_whole(&rig, round * 2 + which, node).await;
        }
    }
    rig.close().await;
}

fn assert_unavailable(refusal: &Refusal, node: &str, why: &str) {
    assert_eq!(refusal.status, 503, "{refusal:?}");
    assert!(refusal.reason.starts_with(&format!("node {node} ")), "{refusal:?}");
    assert!(refusal.reason.contains(why), "{refusal:?}");
    assert!(refusal.header("retry-after").parse::<u32>().unwrap() > 0);
    assert!(refusal.header("proxy-status").contains("error=destination_unavailable"), "{refusal:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_that_is_away_is_told_by_its_name_until_it_is_back() {
    let mut rig = Rig::start().await;
    rig.serve_workload();
    rig.edges[0].take().unwrap().kill().await;
    rig.linked(1).await;
    assert_unavailable(&rig.refusal("edge-a").await, "edge-a", "last seen");
    assert_whole(&rig, 1, "edge-b").await;

    let unknown = rig.refusal("edge-nobody").await;
    assert_eq!((unknown.status, unknown.header("retry-after")), (404, ""), "{unknown:?}");
    assert!(unknown.reason.contains("no such node: edge-nobody"), "{unknown:?}");

    rig.edges[0] = Some(rig.start_edge(0, 0));
    rig.linked(2).await;
    assert_whole(&rig, 2, "edge-a").await;
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_drains_lets_streams_finish_and_takes_no_new_ones() {
    let mut rig = Rig::start_alone().await;
    let (mut client, mut target) = rig.pair("edge-a", 0).await;
    let mut idle = within("TLS", rig.tls()).await.unwrap();
    let gateway = rig.gateway.take().unwrap();
    gateway.drain();
    door_closes(&rig).await;
    until("the socket's file to go away", || !rig.unix.exists()).await;
    // A connection that had not asked for anything is let go.
    let left = within("the idle connection's end", idle.read_u8()).await;
    assert!(left.is_err(), "{left:?}");
    ping(&mut client, &mut target).await;
    assert_eq!(rig.probe.active_streams(), 1);
    finish(client, target).await;
    gateway.drained().await;
    assert_eq!((rig.probe.active_streams(), rig.probe.links()), (0, 0));

    rig.start_gateway().await;
    rig.linked(2).await;
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_drains_lets_streams_finish_and_takes_no_new_ones() {
    let mut rig = Rig::start().await;
    let (mut client, mut target) = rig.pair("edge-a", 0).await;
    let edge = rig.edges[0].take().unwrap();
    edge.drain();
    let deadline = Instant::now() + LIMIT;
    let refusal = loop {
        assert!(Instant::now() < deadline, "a draining edge still takes streams");
        match rig.dial("edge-a").await.unwrap() {
            // It had not heard of the drain yet.
            Ok(_) => drop(rig.accept(0).await),
            Err(refusal) => break refusal,
        }
    };
    assert_unavailable(&refusal, "edge-a", "is draining");
    ping(&mut client, &mut target).await;
    finish(client, target).await;
    edge.drained().await;
    rig.linked(1).await;
    assert_unavailable(&rig.refusal("edge-a").await, "edge-a", "last seen");
    rig.close().await;
}
