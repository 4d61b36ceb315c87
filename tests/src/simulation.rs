//! One run of the real gateway and two real edges on a simulated network, in simulated time, all from one seed.
//!
//! Five hosts: the gateway, two edges whose kubelets have the same address, a control plane that makes requests, and a
//! stranger who sends garbage. [`crate::plan`] says what happens when; this carries it out and judges:
//!
//! 1. bytes: every transfer is whole, or both its ends could tell that it was not ([`crate::workload`]);
//! 2. the answer comes from the node that was asked;
//! 3. a client whose target reads nothing can send only a bounded amount, and others do not notice;
//! 4. an idle stream over a link that falls silent is reset within two heartbeat periods;
//! 5. nothing panics, whatever comes from any side;
//! 6. every refusal says what was wrong.
//!
//! When all faults are over, both nodes must be reachable again and no stream may be left at the gateway.

use std::{
    cell::RefCell,
    net::Ipv4Addr,
    panic,
    rc::Rc,
    sync::{Arc, Mutex},
    time::Duration,
};

use rand::{RngCore, SeedableRng, rngs::SmallRng};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tunnel_core::Host;
use tunnel_edge::network::{DialError, Network};
use turmoil::net::{TcpListener, TcpStream};

use crate::{
    connect::{Refusal, connect},
    parties::{self, EDGE_PORT, INGRESS_PORT, KUBELET_PORT},
    plan::{Fault, Manner, NODES, Plan},
    socket::SimSocket,
    workload::{self, Kind, Ledger, Outcome, Request},
};

/// The heartbeat period of every run.
pub const HEARTBEAT: Duration = Duration::from_secs(2);
/// Simulated time advances in such steps; nothing is more exact than this.
const TICK: Duration = Duration::from_millis(2);
/// By then everything must be over, faults and all.
const LIMIT: Duration = Duration::from_secs(120);
/// After the last fault both nodes must be reachable within this time: the backoff's cap, a dial that fails first, and
/// the slowest network of any run.
const RECOVERY: Duration = Duration::from_secs(40);
/// A patient client gives up a request after this time, which counts as a loud failure.
const PATIENCE: Duration = Duration::from_secs(40);
/// What a sender can put between itself and a target that reads nothing: the windows and buffers of every hop.
const MOST_UNREAD: u64 = 2 << 20;
/// A link that is silent for so long is dead, and noticed to be.
const NOTICEABLE: Duration = Duration::from_secs(2 * HEARTBEAT.as_secs() + 1);
/// Segments, of at most 16 KiB, that fit one direction of one simulated connection.
const SEGMENTS: usize = 32;

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
    let incarnation = Rc::new(RefCell::new(seed));
    let gateways = world.gateway.clone();
    sim.host("gateway", {
        let incarnation = incarnation.clone();
        move || {
            let (gateway, seed) = (gateways.clone(), next(&incarnation));
            async move {
                let listen = |port| async move { TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await };
                let doors = (SimDoor(listen(EDGE_PORT).await?), SimDoor(listen(INGRESS_PORT).await?));
                parties::run_gateway(doors.0, doors.1, HEARTBEAT, seed, &gateway, never()).await;
                Ok(())
            }
        }
    });
    for node in NODES {
        let (ledger, incarnation) = (world.ledger.clone(), incarnation.clone());
        sim.host(node, move || {
            let (ledger, seed) = (ledger.clone(), next(&incarnation));
            async move {
                let kubelet = TcpListener::bind((Ipv4Addr::UNSPECIFIED, KUBELET_PORT)).await?;
                tokio::spawn(serve_targets(kubelet, node, ledger));
                let config = parties::edge_config(node, format!("gateway:{EDGE_PORT}").parse()?);
                parties::run_edge(config, SimNetwork, seed, never()).await;
                Ok(())
            }
        });
    }
    for (number, (when, to_edge_door, bytes)) in plan.garbage.iter().copied().enumerate() {
        let mut rng = SmallRng::seed_from_u64(seed ^ number as u64);
        sim.client(format!("stranger-{number}"), async move {
            sleep(when).await;
            let port = if to_edge_door { EDGE_PORT } else { INGRESS_PORT };
            let mut garbage = vec![0; bytes];
            rng.fill_bytes(&mut garbage);
            if let Ok(Ok(tcp)) = timeout(HEARTBEAT, TcpStream::connect(("gateway", port))).await {
                let mut socket = SimSocket::new(tcp);
                let _ = timeout(HEARTBEAT, socket.write_all(&garbage)).await;
                let _ = timeout(HEARTBEAT, socket.read(&mut [0; 64])).await;
            }
            Ok(())
        });
    }
    sim.client("control-plane", control_plane(plan.clone(), world.clone()));
    let panics = count_panics();
    let ran = drive(&mut sim, &plan, &world);
    let panicked = panics();
    let mut report = world.report.lock().unwrap().clone();
    report.breaches = world.ledger.breaches();
    report.breaches.extend(ran.err());
    report.breaches.extend(panicked);
    report
}

/// A seed for one life of one process.
fn next(incarnation: &RefCell<u64>) -> u64 {
    let mut seed = incarnation.borrow_mut();
    *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
    *seed
}

/// What all hosts of a run share, to be judged.
#[derive(Clone, Default)]
struct World {
    ledger: Ledger,
    report: Arc<Mutex<Report>>,
    gateway: parties::GatewayProbe,
    /// For each silent link: its edge, and when it fell silent.
    silenced: Arc<Mutex<Vec<(&'static str, Duration)>>>,
}

impl World {
    fn note(&self, what: &str) {
        let at = turmoil::sim_elapsed().unwrap_or_default().as_millis();
        self.report.lock().unwrap().trace.push(format!("{at:>6} ms  {what}"));
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

/// Steps the simulation, and does the plan's faults at their times.
fn drive(sim: &mut turmoil::Sim<'_>, plan: &Plan, world: &World) -> Result<(), String> {
    let mut faults: Vec<(Duration, Fault)> = plan.faults.clone();
    let mut repairs: Vec<(Duration, Fault)> = Vec::new();
    loop {
        let now = sim.elapsed();
        while faults.first().is_some_and(|(when, _)| *when <= now) {
            let (_, fault) = faults.remove(0);
            repairs.extend(begin(sim, &fault, now, world));
        }
        for (_, fault) in repairs.extract_if(.., |(when, _)| *when <= now) {
            end(sim, &fault, world);
        }
        match sim.step() {
            Ok(true) => return Ok(()),
            Ok(false) => {}
            Err(error) => return Err(format!("the run did not end: {error}")),
        }
    }
}

/// Begins a fault; when it must be repaired, if ever.
fn begin(
    sim: &mut turmoil::Sim<'_>,
    fault: &Fault,
    now: Duration,
    world: &World,
) -> Option<(Duration, Fault)> {
    world.report.lock().unwrap().trace.push(format!("{:>6} ms  {fault:?}", now.as_millis()));
    let lasts = match fault {
        Fault::Partition { edge, millis } => {
            sim.partition(*edge, "gateway");
            world.silenced.lock().unwrap().push((*edge, now));
            *millis
        }
        Fault::OneWay { edge, to_gateway, millis } => {
            if *to_gateway {
                sim.partition_oneway(*edge, "gateway");
                world.silenced.lock().unwrap().push((*edge, now));
            } else {
                sim.partition_oneway("gateway", *edge);
            }
            *millis
        }
        Fault::Hold { edge, millis } => {
            sim.hold(*edge, "gateway");
            *millis
        }
        Fault::Latency { millis } => {
            sim.set_max_message_latency(Duration::from_millis(*millis));
            return None;
        }
        Fault::GatewayRestart => {
            sim.bounce("gateway");
            return None;
        }
        Fault::EdgeRestart { edge } => {
            sim.bounce(*edge);
            return None;
        }
    };
    Some((now + Duration::from_millis(lasts), fault.clone()))
}

fn end(sim: &turmoil::Sim<'_>, fault: &Fault, world: &World) {
    let now = sim.elapsed();
    let at = now.as_millis();
    if let Fault::Partition { edge, .. } | Fault::OneWay { edge, .. } = fault {
        // A silence that was too short to be noticed is none: perhaps nothing was lost by it.
        let noticeable =
            |(silent, since): &(&str, Duration)| silent != edge || now.saturating_sub(*since) >= NOTICEABLE;
        world.silenced.lock().unwrap().retain(noticeable);
    }
    match fault {
        Fault::Partition { edge, .. } | Fault::OneWay { edge, .. } => sim.repair(*edge, "gateway"),
        Fault::Hold { edge, .. } => sim.release(*edge, "gateway"),
        _ => return,
    }
    world.report.lock().unwrap().trace.push(format!("{at:>6} ms  over: {fault:?}"));
}

struct SimDoor(TcpListener);

impl tunnel_server::Accept for SimDoor {
    type Conn = SimSocket;

    async fn accept(&mut self) -> std::io::Result<(SimSocket, tunnel_server::PeerAddr)> {
        let (tcp, address) = self.0.accept().await?;
        Ok((SimSocket::new(tcp), tunnel_server::PeerAddr::Ip(address)))
    }
}

/// How simulated edges reach their gateway and their kubelet.
struct SimNetwork;

impl Network for SimNetwork {
    type Conn = SimSocket;

    async fn connect(&self, host: &Host, port: u16) -> Result<SimSocket, DialError> {
        let address = match host {
            Host::Ip(address) => *address,
            Host::Name(name) => turmoil::lookup(name.as_str()),
        };
        TcpStream::connect((address, port)).await.map(SimSocket::new).map_err(DialError::from)
    }
}

async fn serve_targets(listener: TcpListener, node: &'static str, ledger: Ledger) {
    let mut connections = JoinSet::new();
    while let Ok((tcp, _)) = listener.accept().await {
        let ledger = ledger.clone();
        connections.spawn(async move { workload::serve(SimSocket::new(tcp), node, &ledger).await });
        while connections.try_join_next().is_some() {}
    }
}

/// All requests of the plan, the watchers of silent links, and at last the check that everything is well again.
async fn control_plane(plan: Plan, world: World) -> turmoil::Result {
    let start = Instant::now();
    let mut clients = JoinSet::new();
    for (when, request, manner) in plan.requests {
        let world = world.clone();
        clients.spawn(async move {
            sleep_until(start + when).await;
            one_request(&request, manner, &world).await;
        });
    }
    for node in NODES {
        clients.spawn(watch_idle_stream(node, start, world.clone()));
    }
    while let Some(joined) = clients.join_next().await {
        joined?;
    }
    for node in NODES {
        expect_recovery(node, &world).await;
    }
    expect_no_leak(&world).await;
    Ok(())
}

type Connection = TlsStream<SimSocket>;

/// A CONNECT through the gateway's ingress. The outer error is the connection's.
async fn dial(node: &str) -> std::io::Result<Result<Connection, Refusal>> {
    let tcp = TcpStream::connect(("gateway", INGRESS_PORT)).await?;
    let mut stream = parties::control_plane_tls(SimSocket::new(tcp)).await?;
    Ok(connect(&mut stream, &format!("{node}:{KUBELET_PORT}")).await?.map(|()| stream))
}

async fn one_request(request: &Request, manner: Manner, world: &World) {
    let patience = match manner {
        Manner::Patient => PATIENCE,
        Manner::Leaves(millis) => Duration::from_millis(millis),
    };
    let sent = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let attempt = async {
        match dial(&request.node).await {
            Ok(Ok(stream)) if request.kind == Kind::Stuck => {
                Ok(request.run(crate::meter::Metered::new(stream, sent.clone()), &world.ledger).await)
            }
            Ok(Ok(stream)) => Ok(request.run(stream, &world.ledger).await),
            Ok(Err(refusal)) => Err(refusal),
            Err(error) => Ok(Outcome::FailedLoudly(error.to_string())),
        }
    };
    let outcome = timeout(patience, attempt).await;
    let sent = sent.load(std::sync::atomic::Ordering::Relaxed);
    if sent > MOST_UNREAD {
        world
            .ledger
            .broken(format!("stream {}: {sent} bytes were taken for a target that reads none", request.id));
    }
    let mut report = world.report.lock().unwrap();
    let what = match outcome {
        Ok(Ok(Outcome::Whole)) => {
            report.whole += 1;
            "whole".to_owned()
        }
        Ok(Ok(Outcome::FailedLoudly(error))) => {
            report.failed_loudly += 1;
            format!("failed loudly: {error}")
        }
        Ok(Err(refusal)) => {
            report.refused += 1;
            judge_refusal(request, &refusal, &world.ledger);
            format!("refused: {} {}", refusal.status, refusal.reason)
        }
        Err(_) => {
            report.failed_loudly += 1;
            "left".to_owned()
        }
    };
    drop(report);
    world.note(&format!(
        "request {} to {}: {:?} of {}: {what}",
        request.id, request.node, request.kind, request.bytes
    ));
}

fn judge_refusal(request: &Request, refusal: &Refusal, ledger: &Ledger) {
    if let Err(problem) = refusal.check() {
        ledger.broken(format!("request {}: {problem}", request.id));
    }
    let known = NODES.contains(&&*request.node);
    // A gateway that has just started does not know a node that it has not seen, unless configuration names it.
    if !known && refusal.status != 404 {
        ledger
            .broken(format!("request {}: {} instead of 404 for an unknown node", request.id, refusal.status));
    }
    if known && !matches!(refusal.status, 502..=504) {
        ledger.broken(format!(
            "request {}: {} {} for a known node",
            request.id, refusal.status, refusal.reason
        ));
    }
}

/// Keeps an idle stream to a node open. When its link falls silent, the stream must be reset within two heartbeat
/// periods; a little more is allowed for the reset's own way and for the clock's ticks.
async fn watch_idle_stream(node: &'static str, start: Instant, world: World) {
    let end = start + Duration::from_millis(crate::plan::BUSY.end) + Duration::from_secs(10);
    sleep(Duration::from_millis(crate::plan::BUSY.start - 500)).await;
    while Instant::now() < end {
        let opened = turmoil::sim_elapsed().unwrap_or_default();
        let Ok(Ok(Ok(mut stream))) = timeout(PATIENCE, dial(node)).await else {
            sleep(Duration::from_millis(200)).await;
            continue;
        };
        let hello = stream.write_all(b"0 echo 0\n").await;
        let mut byte = [0; 64];
        let answered =
            hello.is_ok() && matches!(timeout(HEARTBEAT, stream.read(&mut byte)).await, Ok(Ok(1..)));
        let idle_from = turmoil::sim_elapsed().unwrap_or_default();
        let died = tokio::select! {
            biased;
            _ = stream.read(&mut byte) => turmoil::sim_elapsed().unwrap_or_default(),
            () = sleep_until(end) => break,
        };
        let silenced = world.silenced.lock().unwrap().clone();
        // The last one: an earlier silence may have been over before anything was lost by it.
        let cause = silenced.iter().rfind(|(edge, at)| *edge == node && *at >= opened && *at <= died);
        let Some((_, silent_since)) = cause.filter(|_| answered && idle_from <= died) else { continue };
        let noticed_after = died.saturating_sub(*silent_since);
        let allowed = HEARTBEAT * 2 + Duration::from_millis(900);
        world.note(&format!(
            "idle stream to {node} reset {} ms after its link fell silent",
            noticed_after.as_millis()
        ));
        if noticed_after > allowed {
            world.ledger.broken(format!("a silent link of {node} was noticed only after {noticed_after:?}"));
        }
    }
}

/// When all faults are over, the node must answer again.
async fn expect_recovery(node: &'static str, world: &World) {
    let deadline = Instant::now() + RECOVERY;
    let request = Request { id: 1_000_000, node: node.to_owned(), kind: Kind::Echo, bytes: 70_000 };
    loop {
        if let Ok(Ok(Ok(stream))) = timeout(PATIENCE, dial(node)).await
            && timeout(PATIENCE, request.run(stream, &world.ledger)).await == Ok(Outcome::Whole)
        {
            return world.note(&format!("{node} is well"));
        }
        if Instant::now() > deadline {
            return world
                .ledger
                .broken(format!("{node} was not reachable {RECOVERY:?} after the last fault"));
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// When all clients and all targets have gone, no stream may be left at the gateway.
async fn expect_no_leak(world: &World) {
    let deadline = Instant::now() + Duration::from_secs(20);
    while world.gateway.active_streams() != 0 {
        if Instant::now() > deadline {
            let left = world.gateway.active_streams();
            return world
                .ledger
                .broken(format!("{left} streams are left at the gateway after every client has gone"));
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// A token that is never cancelled, for parties that run until they are killed.
fn never() -> CancellationToken {
    CancellationToken::new()
}
