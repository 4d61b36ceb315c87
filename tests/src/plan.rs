//! What happens in one simulated run: requests and faults, all drawn from the seed before the run begins.

use std::time::Duration;

use rand::{Rng, SeedableRng, rngs::SmallRng};

use crate::{
    parties::GATEWAY,
    workload::{Kind, Request},
};

/// The nodes of every run. Their kubelets have the same address.
pub const NODES: [&str; 2] = ["edge-a", "edge-b"];
/// The gateways of a run, or the first of them alone. Where there are two, each has a link to one of the nodes, and the
/// second is a near side of what may go wrong between them.
pub const GATEWAYS: [&str; 2] = [GATEWAY, "gateway-2"];
/// Requests and faults begin within this time; links are up by its start.
pub const BUSY: std::ops::Range<u64> = 6_000..23_000;
/// Bytes a second of the slowest link, a bad radio's, and how often that may be doubled.
const SLOWEST: u64 = 3_000;
const SLOW_DOUBLINGS: u32 = 8;
/// In calm weather a slow link stays so for this time, in milliseconds: longer than its requests.
const SLOW_FOR: u64 = 60_000;
/// What is asked of a slow link takes it no longer than this, in seconds: less than a drain may take.
const SLOW_SECONDS: u64 = 30;
/// Bytes of a request, mostly: more than every window on the way, before it has grown.
pub const LARGEST: u64 = 1_500_000;

/// What a run is about, and so what is promised in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Weather {
    /// Anything may break, and clients may do anything. What fails must fail loudly.
    Rough,
    /// Links may be slow, and processes are told to go, as in a rollout. Nothing that was begun may fail.
    Calm,
}

/// Something that goes wrong, or just happens, mostly between `near`, an edge or the second gateway, and the gateway that
/// it is linked to. Times are in milliseconds of simulated time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// Nothing goes either way, and nobody is told: the half-open link.
    Partition { near: &'static str, millis: u64 },
    /// As above in one direction only.
    OneWay { near: &'static str, to_gateway: bool, millis: u64 },
    /// Segments are held back, then all delivered.
    Hold { near: &'static str, millis: u64 },
    /// Every segment takes up to this long from now on.
    Latency { millis: u64 },
    /// Links carry so many bytes a second, each way.
    Slow { near: &'static str, rate: u64, millis: u64 },
    /// A program is killed and started again.
    Restart { host: &'static str },
    /// A program gets SIGTERM, and is started again when it has ended.
    Stop { host: &'static str },
}

/// How a client treats its request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Manner {
    /// It waits for the end, within a generous limit.
    Patient,
    /// It leaves after so many milliseconds, wherever the request is then: dialled, half-way, done.
    Leaves(u64),
    /// As above, but its connection is reset. A client that closes a half-closed one without that looks as if it stayed.
    Resets(u64),
    /// It loses its power after so many milliseconds: nobody says anything.
    Vanishes(u64),
}

/// By which door a client comes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Door {
    /// TCP with mutual TLS.
    Tls(Protocol),
    /// A Unix socket.
    Unix(Protocol),
}

/// Which HTTP a client speaks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Protocol {
    Http1,
    Http2,
}

impl Door {
    const ALL: [Self; 4] = [
        Self::Tls(Protocol::Http1),
        Self::Tls(Protocol::Http2),
        Self::Unix(Protocol::Http1),
        Self::Unix(Protocol::Http2),
    ];

    /// Whether the client can tell a reset from an end of file.
    pub fn has_resets(self) -> bool {
        self != Self::Unix(Protocol::Http1)
    }
}

/// One request of a run.
#[derive(Clone, Debug)]
pub struct Planned {
    /// When it begins.
    pub when: Duration,
    /// What is asked.
    pub request: Request,
    /// How the client behaves.
    pub manner: Manner,
    /// By which door it comes.
    pub door: Door,
    /// At which of the gateways.
    pub gateway: usize,
}

/// A run.
#[derive(Clone, Debug)]
pub struct Plan {
    /// What is promised.
    pub weather: Weather,
    /// How many of [`GATEWAYS`] there are.
    pub gateways: usize,
    /// Half-closed streams that are silent are given up soon. If not, whatever ends them must be something else.
    pub half_closed_timeout: bool,
    /// In the order of their beginning.
    pub requests: Vec<Planned>,
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
        let gateways = rng.random_range(1..=GATEWAYS.len());
        let half_closed_timeout = rng.random();
        let mut draw = Draw { rng, gateways, half_closed_timeout };
        let mut plan = if draw.rng.random_ratio(1, 3) { draw.calm() } else { draw.rough() };
        plan.requests.sort_by_key(|planned| planned.when);
        plan.faults.sort_by_key(|(when, _)| *when);
        plan
    }

    /// Whether a request that is about to begin may be refused although its node is known: while something is being
    /// replaced, or a link is so full that an answer takes longer than a client waits for it.
    pub fn may_refuse(&self) -> bool {
        let harmless = |fault: &Fault| matches!(fault, Fault::Latency { .. });
        self.weather == Weather::Rough || !self.faults.iter().all(|(_, fault)| harmless(fault))
    }

    /// The gateways that there are.
    pub fn gateways(&self) -> &'static [&'static str] {
        &GATEWAYS[..self.gateways]
    }

    /// The place of the gateway that an edge is linked to, or a second gateway by its own wish.
    pub fn home(&self, near: &str) -> usize {
        if near == NODES[1] { self.gateways - 1 } else { 0 }
    }
}

/// Most bytes of a node's next request, and of those after it.
#[derive(Clone, Copy)]
struct Share {
    first: u64,
    others: u64,
}

/// Draws a plan.
struct Draw {
    rng: SmallRng,
    gateways: usize,
    half_closed_timeout: bool,
}

impl Draw {
    fn rough(&mut self) -> Plan {
        let requests = (1..=self.rng.random_range(10..30u64)).map(|id| self.rough_request(id)).collect();
        let faults = (0..self.rng.random_range(0..5)).map(|_| (self.at(), self.fault())).collect();
        let garbage = (0..self.rng.random_range(0..4))
            .map(|_| (self.at(), self.rng.random(), self.rng.random_range(1..20_000)))
            .collect();
        let latency = self.rng.random_range(1..60);
        let Self { gateways, half_closed_timeout, .. } = *self;
        Plan { weather: Weather::Rough, gateways, half_closed_timeout, requests, faults, garbage, latency }
    }

    fn calm(&mut self) -> Plan {
        let count = self.rng.random_range(5..20u64);
        let mut faults = Vec::new();
        let mut shares = [Share { first: LARGEST, others: LARGEST }; NODES.len()];
        for (near, share) in NODES.into_iter().zip(&mut shares) {
            if self.rng.random() {
                let rate = self.slow_rate();
                let from = Duration::from_millis(self.rng.random_range(BUSY.start..BUSY.start + 3_000));
                faults.push((from, Fault::Slow { near, rate, millis: SLOW_FOR }));
                let half = rate * SLOW_SECONDS / 2;
                *share = Share { first: half.min(LARGEST), others: (half / count).min(LARGEST) };
            }
            if self.rng.random() {
                faults.push((self.at(), Fault::Stop { host: near }));
            }
        }
        if self.rng.random_ratio(1, 4) {
            faults.push((self.at(), Fault::Stop { host: self.some_gateway() }));
        }
        if self.rng.random() {
            faults.push((self.at(), Fault::Latency { millis: self.rng.random_range(1..200) }));
        }
        let requests = (1..=count).map(|id| self.calm_request(id, &mut shares)).collect();
        let (garbage, latency) = (Vec::new(), self.rng.random_range(1..60));
        // On a slow link, others may have all turns for longer than that.
        let half_closed_timeout = false;
        let gateways = self.gateways;
        Plan { weather: Weather::Calm, gateways, half_closed_timeout, requests, faults, garbage, latency }
    }

    fn at(&mut self) -> Duration {
        Duration::from_millis(self.rng.random_range(BUSY))
    }

    fn one_of<T: Copy>(&mut self, choices: &[T]) -> T {
        choices[self.rng.random_range(0..choices.len())]
    }

    fn some_gateway(&mut self) -> &'static str {
        self.one_of(&GATEWAYS[..self.gateways])
    }

    /// Whoever has dialled a link, so that something may happen to it.
    fn some_near(&mut self) -> &'static str {
        self.one_of(&[NODES[0], NODES[1], GATEWAYS[1]][..NODES.len() + self.gateways - 1])
    }

    fn slow_rate(&mut self) -> u64 {
        SLOWEST << self.rng.random_range(0..SLOW_DOUBLINGS)
    }

    /// Mostly small, sometimes more than every window on the way.
    fn some_bytes(&mut self) -> u64 {
        match self.rng.random_range(0..4) {
            0 => 0,
            1 => self.rng.random_range(1..2_000),
            2 => self.rng.random_range(2_000..100_000),
            _ => self.rng.random_range(100_000..LARGEST),
        }
    }

    fn rough_request(&mut self, id: u64) -> Planned {
        let node = match self.rng.random_range(0..10) {
            0 => "edge-unknown",
            _ => self.one_of(&NODES),
        };
        let kind = match self.rng.random_range(0..14) {
            0..3 => Kind::Download,
            3..6 => Kind::Upload,
            6..8 => Kind::Echo,
            8 => Kind::Idle,
            9 => Kind::Late,
            10 => Kind::Cut,
            11 => Kind::Stuck,
            12 => Kind::Deaf,
            _ => Kind::Mute,
        };
        let bytes = match kind {
            Kind::Stuck => 8 << 20,
            // The client's end must get through.
            Kind::Deaf | Kind::Mute => self.rng.random_range(0..50_000),
            _ => self.some_bytes(),
        };
        let left_after = self.rng.random_range(1_000..8_000);
        let leaves: fn(u64) -> Manner =
            if self.half_closed_timeout { Manner::Leaves } else { Manner::Resets };
        let manner = match self.rng.random_range(0..8) {
            0 | 1 => leaves(self.rng.random_range(0..3_000)),
            2 => Manner::Vanishes(left_after),
            _ if kind == Kind::Stuck || kind.is_half_closed() && !self.half_closed_timeout => {
                leaves(left_after)
            }
            _ => Manner::Patient,
        };
        self.planned(Request { id, node: node.to_owned(), kind, bytes }, manner)
    }

    fn calm_request(&mut self, id: u64, shares: &mut [Share; NODES.len()]) -> Planned {
        let which = self.rng.random_range(0..NODES.len());
        let (node, share) = (NODES[which], &mut shares[which]);
        let largest = std::mem::replace(&mut share.first, share.others);
        let kind = match self.rng.random_range(0..10) {
            0..5 => Kind::Download,
            5 | 6 => Kind::Upload,
            7 => Kind::Echo,
            8 => Kind::Idle,
            _ => Kind::Late,
        };
        let bytes = if self.rng.random() { largest } else { self.some_bytes().min(largest) };
        self.planned(Request { id, node: node.to_owned(), kind, bytes }, Manner::Patient)
    }

    fn planned(&mut self, request: Request, manner: Manner) -> Planned {
        let gateway = self.rng.random_range(0..self.gateways);
        Planned { when: self.at(), request, manner, door: self.one_of(&Door::ALL), gateway }
    }

    fn fault(&mut self) -> Fault {
        let (near, millis) = (self.some_near(), self.rng.random_range(50..12_000));
        match self.rng.random_range(0..9) {
            0 => Fault::Partition { near, millis },
            1 => Fault::OneWay { near, to_gateway: self.rng.random(), millis },
            2 => Fault::Hold { near, millis },
            3 => Fault::Latency { millis: self.rng.random_range(1..400) },
            4 => Fault::Slow { near, rate: self.slow_rate(), millis },
            5 => Fault::Restart { host: self.some_gateway() },
            6 => Fault::Restart { host: self.one_of(&NODES) },
            7 => Fault::Stop { host: self.some_gateway() },
            _ => Fault::Stop { host: self.one_of(&NODES) },
        }
    }
}
