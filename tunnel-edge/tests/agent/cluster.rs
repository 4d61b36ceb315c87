//! An agent whose gateway is one of several.

use std::{
    hash::{DefaultHasher, Hash, Hasher},
    time::{Duration, Instant},
};

use tokio::time::{sleep, timeout};
use tunnel_core::proto::messages::{Gateway as Hint, Reject, RejectCode, Update};

use crate::{
    finish, open, round_trip,
    support::{Gateway, GatewayLink, LIMIT, Log, Pki, Running, closed_port, config, echo, granted, until},
};

/// Long enough for an attempt, were one made.
const A_WHILE: Duration = Duration::from_millis(600);
/// Shorter than a person would notice.
const SOON: Duration = Duration::from_secs(2);

/// Gateways by these names that all know one another.
async fn gateways<const N: usize>(pki: &Pki, names: [&str; N]) -> [Gateway; N] {
    let mut gateways = Vec::new();
    for name in names {
        let mut gateway = Gateway::bind(pki.gateway()).await;
        name.clone_into(&mut gateway.id);
        gateways.push(gateway);
    }
    let hints: Vec<Hint> = gateways.iter().map(Gateway::hint).collect();
    for gateway in &mut gateways {
        gateway.hints.clone_from(&hints);
    }
    gateways.try_into().ok().unwrap()
}

/// A gateway known only by name: it is behind the load balancer.
fn far(id: &str) -> Hint {
    Hint { id: id.to_owned(), ..Hint::default() }
}

/// Says over a link which gateways there are now.
fn tell(link: &GatewayLink, gateways: Vec<Hint>) {
    link.handle.update(Update { granted: granted("edge-a"), gateways });
}

/// As the edge ranks gateways.
fn weight(gateway: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    ("edge-a", gateway).hash(&mut hasher);
    hasher.finish()
}

fn better_than_a() -> String {
    (0..100).map(|number| format!("b{number}")).find(|name| weight(name) > weight("a")).unwrap()
}

/// The gateway that the edge comes to.
async fn first<'a>(one: &'a Gateway, two: &'a Gateway) -> (GatewayLink, &'a Gateway, &'a Gateway) {
    tokio::select! {
        link = one.accept() => (link, one, two),
        link = two.accept() => (link, two, one),
    }
}

async fn nobody_comes(gateway: &Gateway, why: &str) {
    assert!(timeout(A_WHILE, gateway.pending()).await.is_err(), "{why}");
}

#[tokio::test]
async fn holds_links_to_as_many_gateways_as_it_should_by_their_own_addresses() {
    let log = Log::default();
    let _guard = log.capture();
    let pki = Pki::new();
    let [a, b, c] = gateways(&pki, ["a", "b", "c"]).await;
    let running = Running::start(config(pki.node("edge-a"), &[a.address()], &[]));
    let one = a.accept().await;
    let (two, second, other) = first(&b, &c).await;
    assert_eq!(one.hello.instance_id, two.hello.instance_id, "one process is one instance");
    assert!(one.hello.generation > 1_700_000_000_000 && two.hello.generation > one.hello.generation);
    until("both are held", || running.metric("tunnel_edge_gateways_linked") == 2).await;
    assert_eq!(
        ["links", "links_wanted", "gateways_known"]
            .map(|name| running.metric(&format!("tunnel_edge_{name}"))),
        [2, 2, 3]
    );
    assert_eq!(log.count(&["linked", "2 of 2 gateways", &second.id]), 1);
    nobody_comes(other, "two links are enough").await;
    nobody_comes(&a, "one link to each gateway").await;
}

#[tokio::test]
async fn holds_links_to_all_gateways_where_there_are_fewer() {
    let pki = Pki::new();
    let [a, b] = gateways(&pki, ["a", "b"]).await;
    let mut config = config(pki.node("edge-a"), &[a.address()], &[]);
    config.redundancy = 8;
    let running = Running::start(config);
    let (_one, _two) = (a.accept().await, b.accept().await);
    until("both are held", || running.metric("tunnel_edge_gateways_linked") == 2).await;
    assert_eq!(running.metric("tunnel_edge_links_wanted"), 2);
    nobody_comes(&a, "no third").await;
}

#[tokio::test]
async fn finds_another_gateway_by_redials_where_its_address_leads_nowhere() {
    let log = Log::default();
    let _guard = log.capture();
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let mut door = Gateway::bind(pki.gateway()).await;
    let nowhere = format!("127.0.0.1:{}", closed_port().await);
    door.hints = vec![far("a"), Hint { edge_address: nowhere, ..far("b") }];
    let running = Running::start(config(pki.node("edge-a"), &[door.address()], &["node:*".to_owned()]));
    let one = door.welcome_as("a", door.pending().await.unwrap());
    let spare = door.welcome_as("a", door.pending().await.unwrap());
    // Its gateway knows no better than that this is the newest link.
    let (mut stream, _) = open(&spare, &format!("edge-a:{}", target.port())).await.unwrap();
    until("it is given up", || spare.handle.peer_draining()).await;
    round_trip(&mut stream, b"whole all the same").await;
    finish(stream).await;
    assert_eq!(timeout(LIMIT, spare.ended).await.unwrap().unwrap().label(), "closed_by_peer");
    let _two = door.welcome_as("b", door.pending().await.unwrap());
    until("both are held", || running.metric("tunnel_edge_gateways_linked") == 2).await;
    assert!(!one.handle.peer_draining());
    assert_eq!(log.count(&["cannot be had at its own address", "connection refused"]), 1);
    assert_eq!((log.count(&["linked"]), log.count(&["WARN"]), log.count(&["takes over"])), (2, 0, 0));
    nobody_comes(&door, "all are found").await;
}

#[tokio::test]
async fn two_keepers_that_meet_the_same_gateway_hold_it_once() {
    let pki = Pki::new();
    let mut door = Gateway::bind(pki.gateway()).await;
    door.hints = vec![far("a"), far("b"), far("c")];
    let mut config = config(pki.node("edge-a"), &[door.address()], &[]);
    config.redundancy = 3;
    let running = Running::start(config);
    let _one = door.welcome_as("a", door.pending().await.unwrap());
    let (second, third) = (door.pending().await.unwrap(), door.pending().await.unwrap());
    let both = [door.welcome_as("b", second), door.welcome_as("b", third)];
    until("one is given up", || both.iter().filter(|link| link.handle.peer_draining()).count() == 1).await;
    assert_eq!(running.metric("tunnel_edge_gateways_linked"), 2);
    let _three = door.welcome_as("c", door.pending().await.unwrap());
    until("all are held", || running.metric("tunnel_edge_gateways_linked") == 3).await;
    assert_eq!(both.iter().filter(|link| link.handle.peer_draining()).count(), 1);
}

#[tokio::test]
async fn when_a_gateway_dies_its_link_is_made_to_another() {
    let pki = Pki::new();
    let [a, b, c] = gateways(&pki, ["a", "b", "c"]).await;
    let running = Running::start(config(pki.node("edge-a"), &[a.address()], &[]));
    let _one = a.accept().await;
    let (two, _, other) = first(&b, &c).await;
    until("both are held", || running.metric("tunnel_edge_gateways_linked") == 2).await;
    let begun = Instant::now();
    drop(two);
    let _three = other.accept().await;
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    until("both are held", || running.metric("tunnel_edge_gateways_linked") == 2).await;
    running.status.ready().unwrap();
}

#[tokio::test]
async fn a_link_moves_to_a_better_gateway_which_welcomes_it_before_the_old_one_is_told() {
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let better = better_than_a();
    let [a, b] = gateways(&pki, ["a", &better]).await;
    let mut config = config(pki.node("edge-a"), &[a.address()], &["node:*".to_owned()]);
    (config.redundancy, config.rebalance) = (1, Duration::from_millis(300));
    let running = Running::start(config);
    let old = a.accept().await;
    let (mut stream, _) = open(&old, &format!("edge-a:{}", target.port())).await.unwrap();
    let pending = b.pending().await.unwrap();
    sleep(A_WHILE).await;
    assert!(!old.handle.peer_draining(), "the new link is not welcomed yet");
    let (fresh, _) = open(&old, &format!("edge-a:{}", target.port())).await.unwrap();
    finish(fresh).await;
    let new = b.welcome(pending);
    until("the old link retires", || old.handle.peer_draining()).await;
    assert_eq!(running.metric("tunnel_edge_links_moved_total"), 1);
    round_trip(&mut stream, b"over the old link").await;
    finish(stream).await;
    timeout(LIMIT, old.ended).await.unwrap().unwrap();
    assert!(!new.handle.peer_draining());
    nobody_comes(&a, "it is where it belongs").await;
}

#[tokio::test]
async fn a_gateway_that_comes_gets_its_edges_slowly() {
    let pki = Pki::new();
    let better = better_than_a();
    let [mut a, b] = gateways(&pki, ["a", &better]).await;
    let both = std::mem::take(&mut a.hints);
    let mut config = config(pki.node("edge-a"), &[a.address()], &[]);
    config.redundancy = 1;
    let running = Running::start(config);
    let link = a.accept().await;
    tell(&link, both);
    until("it is known", || running.metric("tunnel_edge_gateways_known") == 2).await;
    nobody_comes(&b, "within an hour").await;
    assert!(!link.handle.peer_draining());
}

#[tokio::test]
async fn a_gateway_that_drains_serves_on_until_another_has_welcomed_the_edge() {
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let [a, b, c] = gateways(&pki, ["a", "b", "c"]).await;
    let running = Running::start(config(pki.node("edge-a"), &[a.address()], &["node:*".to_owned()]));
    let old = a.accept().await;
    let (two, _, other) = first(&b, &c).await;
    until("both are held", || running.metric("tunnel_edge_gateways_linked") == 2).await;
    // So long that the drain is not of a link that has only just come up.
    sleep(Duration::from_secs(1)).await;
    let begun = Instant::now();
    old.handle.drain(LIMIT, "rolling update");
    let pending = other.pending().await.unwrap();
    assert!(begun.elapsed() < SOON, "{:?}", begun.elapsed());
    sleep(A_WHILE).await;
    assert!(!old.handle.peer_draining(), "the new link is not welcomed yet");
    let target = format!("edge-a:{}", target.port());
    let (mut stream, _) = open(&old, &target).await.unwrap();
    let new = other.welcome(pending);
    until("the old link retires", || old.handle.peer_draining()).await;
    round_trip(&mut stream, b"over the old link").await;
    let (fresh, _) = open(&new, &target).await.unwrap();
    finish(fresh).await;
    assert!(!two.handle.peer_draining() && running.status.ready().is_ok());
    nobody_comes(&a, "it drains").await;
    finish(stream).await;
    timeout(LIMIT, old.ended).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_load_balancer_that_still_leads_to_the_gateway_that_drains_is_tried_again_soon() {
    let log = Log::default();
    let _guard = log.capture();
    let pki = Pki::new();
    let door = Gateway::bind(pki.gateway()).await;
    let running = Running::start(config(pki.node("edge-a"), &[door.address()], &[]));
    let old = door.welcome_as("a", door.pending().await.unwrap());
    let begun = Instant::now();
    old.handle.drain(LIMIT, "rolling update");
    for _ in 0..4 {
        let reject = Reject {
            code: RejectCode::Draining.into(),
            text: "about to leave".to_owned(),
            retry_after_ms: 60_000,
        };
        door.pending().await.unwrap().link.reject(reject).await;
        running.status.ready().unwrap();
        assert!(!old.handle.peer_draining());
    }
    let _new = door.welcome_as("b", door.pending().await.unwrap());
    assert!(begun.elapsed() < 2 * SOON, "{:?}", begun.elapsed());
    until("the old link retires", || old.handle.peer_draining()).await;
    assert_eq!(log.count(&["WARN"]), 0);
}

#[tokio::test]
async fn where_there_is_no_other_gateway_the_one_that_drains_is_used_to_its_end() {
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let [a, b] = gateways(&pki, ["a", "b"]).await;
    let running = Running::start(config(pki.node("edge-a"), &[a.address()], &["node:*".to_owned()]));
    let (one, two) = (a.accept().await, b.accept().await);
    until("both are held", || running.metric("tunnel_edge_gateways_linked") == 2).await;
    two.handle.drain(LIMIT, "rolling update");
    until("one remains", || running.metric("tunnel_edge_gateways_linked") == 1).await;
    nobody_comes(&a, "it is held").await;
    let (stream, _) = open(&two, &format!("edge-a:{}", target.port())).await.unwrap();
    finish(stream).await;
    assert!(!two.handle.peer_draining() && !one.handle.peer_draining());
    assert_eq!(running.metric("tunnel_edge_links_wanted"), 1);
}

#[tokio::test]
async fn hints_that_are_gone_cut_no_link_and_ask_for_none() {
    let pki = Pki::new();
    let [a, b] = gateways(&pki, ["a", "b"]).await;
    let running = Running::start(config(pki.node("edge-a"), &[a.address()], &[]));
    let (one, two) = (a.accept().await, b.accept().await);
    until("both are held", || running.metric("tunnel_edge_gateways_linked") == 2).await;
    tell(&one, Vec::new());
    tell(&two, Vec::new());
    nobody_comes(&b, "both are held").await;
    assert!(!one.handle.peer_draining() && !two.handle.peer_draining());
    drop(two);
    until("one remains", || running.metric("tunnel_edge_links_wanted") == 1).await;
    nobody_comes(&b, "as far as is known, there is only one").await;
    running.status.ready().unwrap();
}
