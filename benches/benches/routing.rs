//! Which node serves a target, among many: what a gateway asks its grants for each request, before it looks for a link.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench fails by panicking; criterion's macros have no docs"
)]

use std::{
    hint::black_box,
    net::{IpAddr, Ipv4Addr},
};

use criterion::{BatchSize, Criterion, criterion_group, criterion_main};
use ipnet::IpNet;
use tunnel_core::{Host, NodeId};
use tunnel_server::{Grants, Holder, Identifier};

const NODES: u16 = 10_000;
/// From one node that is asked for to the next: all of them in turn, far apart.
const STEP: u16 = 7919;

fn name(number: u16) -> String {
    format!("edge-{number:05}.site-{}.example", number % 100)
}

/// The address that the node is granted.
fn address(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(192, 168, high, low).into()
}

/// The network of its pods. All of them lie in 10.0.0.0/8.
fn pods(number: u16) -> IpNet {
    let [high, low] = number.to_be_bytes();
    IpNet::new(Ipv4Addr::new(10, high, low, 0).into(), 24).unwrap()
}

/// The address of one of its pods.
fn pod(number: u16) -> IpAddr {
    let [high, low] = number.to_be_bytes();
    Ipv4Addr::new(10, high, low, 77).into()
}

fn grants() -> Grants {
    let of_one = |number| {
        let node: NodeId = name(number).parse().unwrap();
        let granted = [Identifier::Host(Host::Ip(address(number))), Identifier::Network(pods(number))];
        granted.map(|identifier| (node.clone(), identifier))
    };
    (0..NODES).flat_map(of_one).collect()
}

fn routing(criterion: &mut Criterion) {
    let grants = grants();
    let mut number = 0;
    let mut next = || {
        number = (number + STEP) % NODES;
        number
    };
    let mut group = criterion.benchmark_group("10,000 nodes");

    group.bench_function("node by name", |bencher| {
        let known = |host: &str| host.parse().is_ok_and(|node| grants.knows(&node));
        bencher.iter_batched_ref(
            || name(next()),
            |host| assert!(known(black_box(host))),
            BatchSize::SmallInput,
        );
    });
    for (what, address_of) in
        [("node by granted address", address as fn(u16) -> IpAddr), ("node by pod address", pod)]
    {
        group.bench_function(what, |bencher| {
            bencher.iter_batched_ref(
                || Host::Ip(address_of(next())),
                |host| assert!(matches!(grants.holder(black_box(host)), Holder::One(_))),
                BatchSize::SmallInput,
            );
        });
    }
}

criterion_group!(benches, routing);
criterion_main!(benches);
