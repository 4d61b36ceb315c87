//! One run of one or two real gateways and two real edges on a simulated network, in simulated time, all from one seed.
//!
//! The hosts: the gateways, two edges whose kubelets have the same address, a control plane that makes requests, and
//! strangers who send garbage. [`crate::plan`] says what happens when; `faults` and `control_plane` carry it out, and
//! the latter judges:
//!
//! 1. bytes: every transfer is whole, or both its ends could tell that it was not ([`crate::workload`]);
//! 2. the answer comes from the node that was asked;
//! 3. a client whose target reads nothing can send only a bounded amount, and others do not notice;
//! 4. an idle stream over a link that falls silent is reset within two heartbeat periods;
//! 5. nothing panics, whatever comes from any side;
//! 6. every refusal says what was wrong.
//!
//! In calm weather, where links are slow at worst and processes are only told to stop, more is promised: whatever has
//! begun comes out whole, and what an edge calls a clean end is one. When all is over, both nodes must be reachable again,
//! and no program may hold more than before it began (`leaks`).

mod control_plane;
mod faults;
mod hosts;
mod leaks;
mod socket;

use std::{
    cell::RefCell,
    panic,
    sync::{
        Arc, Mutex,
        atomic::{AtomicI64, AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use self::hosts::{Program, Seeds};
use crate::{
    parties::{EdgeProbe, GatewayProbe},
    plan::{GATEWAYS, NODES, Plan},
    workload::Ledger,
};

/// The heartbeat period of every run.
pub const HEARTBEAT: Duration = Duration::from_secs(2);
/// Simulated time advances in such steps; nothing is more exact than this.
const TICK: Duration = Duration::from_millis(2);
/// By then everything must be over, faults and all.
const LIMIT: Duration = Duration::from_secs(300);
/// Segments, of at most 16 KiB, that fit one direction of one simulated connection.
const SEGMENTS: usize = 16;

/// What a run did, for people and for comparing two runs of one seed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    /// Requests that came out whole.
    pub whole: usize,
    /// Requests that failed, and the client could tell.
    pub failed_loudly: usize,
    /// Requests that were refused with a cause.
    pub refused: usize,
    /// What happened, in order, with simulated times.
    pub trace: Vec<String>,
    /// Promises that were broken. Empty, or the run has failed.
    pub breaches: Vec<String>,
}

/// Runs one seed.
pub fn run(seed: u64) -> Report {
    let plan = Plan::new(seed);
    let world = World::default();
    let mut sim = turmoil::Builder::new()
        .simulation_duration(LIMIT)
        .tick_duration(TICK)
        .min_message_latency(Duration::from_millis(1))
        .max_message_latency(Duration::from_millis(plan.latency))
        .tcp_capacity(SEGMENTS)
        .rng_seed(seed)
        .build();
    let seeds = Seeds::new(seed);
    for (which, name) in plan.gateways().iter().enumerate() {
        hosts::add_gateway(&mut sim, (which, *name), &plan, &world, &seeds);
    }
    for node in NODES {
        hosts::add_edge(&mut sim, node, &plan, &world, &seeds);
    }
    hosts::add_strangers(&mut sim, &plan, seed);
    sim.client("control-plane", control_plane::run(plan.clone(), world.clone()));
    let panics = count_panics();
    let ran = faults::drive(&mut sim, &plan, &world);
    let panicked = panics();
    let mut report = world.report.lock().unwrap().clone();
    report.breaches = world.ledger.breaches();
    report.breaches.extend(ran.err());
    report.breaches.extend(panicked);
    report
}

/// What all hosts of a run share, to be judged.
#[derive(Clone, Default)]
struct World {
    ledger: Ledger,
    report: Arc<Mutex<Report>>,
    /// One for each of [`GATEWAYS`].
    gateways: [Gateway; GATEWAYS.len()],
    /// One for each of [`NODES`].
    edges: [Edge; NODES.len()],
    /// For each silent link: its edge, and when it fell silent.
    silenced: Arc<Mutex<Vec<(&'static str, Duration)>>>,
    /// Times that a node had to answer, and did.
    answers: Arc<AtomicUsize>,
    /// Bytes that all programs of this run have allocated and not given back, as of the last step.
    memory: Arc<AtomicI64>,
}

#[derive(Clone, Default)]
struct Gateway {
    program: Program,
    probe: GatewayProbe,
}

#[derive(Clone, Default)]
struct Edge {
    program: Program,
    probe: EdgeProbe,
}

impl World {
    fn note(&self, what: &str) {
        let at = turmoil::sim_elapsed().unwrap_or_default();
        self.note_at(at, what);
    }

    fn note_at(&self, at: Duration, what: &str) {
        // The report is no program's memory.
        allocation_counter::opt_out(|| {
            self.report.lock().unwrap().trace.push(format!("{:>6} ms  {what}", at.as_millis()));
        });
    }

    fn edge(&self, node: &str) -> &Edge {
        let which = NODES.iter().position(|known| *known == node).unwrap();
        &self.edges[which]
    }

    /// The program on a host.
    fn program(&self, host: &str) -> &Program {
        match GATEWAYS.iter().position(|known| *known == host) {
            Some(which) => &self.gateways[which].program,
            None => &self.edge(host).program,
        }
    }

    fn memory(&self) -> i64 {
        self.memory.load(Relaxed)
    }
}

/// Panics of this thread from here on, told when the result is called.
fn count_panics() -> impl FnOnce() -> Vec<String> {
    thread_local!(static PANICS: RefCell<Option<Vec<String>>> = const { RefCell::new(None) });
    static HOOK: std::sync::Once = std::sync::Once::new();
    HOOK.call_once(|| {
        let earlier = panic::take_hook();
        panic::set_hook(Box::new(move |info| {
            let noted =
                PANICS.with_borrow_mut(|panics| panics.as_mut().map(|list| list.push(info.to_string())));
            if noted.is_none() {
                earlier(info);
            }
        }));
    });
    PANICS.set(Some(Vec::new()));
    || PANICS.take().unwrap_or_default().into_iter().map(|text| format!("panic: {text}")).collect()
}
