//! What happens in one simulated run: requests and faults, all drawn from the seed before the run begins.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::SmallRng, seq::IndexedRandom};

use crate::workload::{Kind, Request};

/// The nodes of every run. Their kubelets have the same address.
pub const NODES: [&str; 2] = ["edge-a", "edge-b"];
/// Requests and faults begin within this time; links are up by its start.
pub const BUSY: std::ops::Range<u64> = 3_000..20_000;

/// Something that goes wrong. Times are in milliseconds of simulated time.
#[derive(Clone, Debug)]
pub enum Fault {
    /// Nothing goes between an edge and the gateway, and nobody is told: the half-open link.
    Partition { edge: &'static str, millis: u64 },
    /// As above in one direction only.
    OneWay { edge: &'static str, to_gateway: bool, millis: u64 },
    /// Segments are held back, then all delivered.
    Hold { edge: &'static str, millis: u64 },
    /// Every segment takes up to this long from now on.
    Latency { millis: u64 },
    /// The gateway is killed and started again.
    GatewayRestart,
    /// An edge is killed and started again.
    EdgeRestart { edge: &'static str },
}

/// How a client treats its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// It waits for the end, within a generous limit.
    Patient,
    /// It leaves after so many milliseconds, wherever the request is then: dialled, half-way, done.
    Leaves(u64),
}

/// A run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// When, what, and how the client behaves.
    pub requests: Vec<(Duration, Request, Manner)>,
    /// When and what.
    pub faults: Vec<(Duration, Fault)>,
    /// When somebody sends garbage, to which door, and how many bytes.
    pub garbage: Vec<(Duration, bool, usize)>,
    /// Longest time of a segment on its way at the beginning, in milliseconds.
    pub latency: u64,
}

impl Plan {
    /// The run of a seed.
    pub fn new(seed: u64) -> Self {
        let mut rng = SmallRng::seed_from_u64(seed);
        let at = |rng: &mut SmallRng| Duration::from_millis(rng.random_range(BUSY));
        let requests = (1..=rng.random_range(10..30u64)).map(|id| {
            let when = at(&mut rng);
            let (request, manner) = request(&mut rng, id);
            (when, request, manner)
        });
        let mut requests: Vec<_> = requests.collect();
        requests.sort_by_key(|(when, ..)| *when);
        let mut faults: Vec<_> =
            (0..rng.random_range(0..5)).map(|_| (at(&mut rng), fault(&mut rng))).collect();
        faults.sort_by_key(|(when, _)| *when);
        let garbage = (0..rng.random_range(0..4))
            .map(|_| (at(&mut rng), rng.random(), rng.random_range(1..20_000)))
            .collect();
        Self { requests, faults, garbage, latency: rng.random_range(1..60) }
    }
}

fn request(rng: &mut SmallRng, id: u64) -> (Request, Manner) {
    let node = match rng.random_range(0..10) {
        0 => "edge-unknown",
        _ => NODES.choose(rng).copied().unwrap_or(NODES[0]),
    };
    let kind = match rng.random_range(0..10) {
        0..3 => Kind::Download,
        3..6 => Kind::Upload,
        6..8 => Kind::Echo,
        8 => Kind::Cut,
        _ => Kind::Stuck,
    };
    // Mostly small, sometimes more than every window on the way.
    let bytes = match rng.random_range(0..4) {
        0 => 0,
        1 => rng.random_range(1..2_000),
        2 => rng.random_range(2_000..100_000),
        _ => rng.random_range(100_000..1_500_000),
    };
    let bytes = if kind == Kind::Stuck { 8 << 20 } else { bytes };
    let manner = match rng.random_range(0..4) {
        0 => Manner::Leaves(rng.random_range(0..3_000)),
        _ if kind == Kind::Stuck => Manner::Leaves(rng.random_range(1_000..8_000)),
        _ => Manner::Patient,
    };
    (Request { id, node: node.to_owned(), kind, bytes }, manner)
}

fn fault(rng: &mut SmallRng) -> Fault {
    let edge = NODES.choose(rng).copied().unwrap_or(NODES[0]);
    let millis = rng.random_range(50..12_000);
    match rng.random_range(0..6) {
        0 => Fault::Partition { edge, millis },
        1 => Fault::OneWay { edge, to_gateway: rng.random(), millis },
        2 => Fault::Hold { edge, millis },
        3 => Fault::Latency { millis: rng.random_range(1..400) },
        4 => Fault::GatewayRestart,
        _ => Fault::EdgeRestart { edge },
    }
}
