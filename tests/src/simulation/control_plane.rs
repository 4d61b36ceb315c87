//! The control plane of a run: makes the plan's requests by every door, watches idle streams, and judges how all of it
//! went.

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    task::JoinSet,
    time::{Instant, sleep, sleep_until, timeout},
};
use turmoil::net::TcpStream;

use super::{
    HEARTBEAT, World,
    leaks::{self, Rest},
    socket::{Family, Open, Rate, SimSocket, Socket},
};
use crate::{
    connect::{Refusal, connect},
    http2,
    meter::Metered,
    parties::{self, INGRESS_PORT, KUBELET_PORT, UNIX_PORT},
    plan::{BUSY, Door, LARGEST, Manner, NODES, Plan, Planned, Protocol, Weather},
    workload::{Kind, Outcome, Request},
};

/// By then all links are up.
const LINKED: Duration = Duration::from_secs(2);
/// When nothing is under way yet.
const AT_REST: Duration = Duration::from_millis(BUSY.start - 600);
/// Idle streams are opened from then on.
const WATCHING: Duration = Duration::from_millis(BUSY.start - 500);
/// After the last fault both nodes must be reachable within this time: the end of a drain, the backoff's cap, a dial that
/// fails first, and the slowest network of any run.
const RECOVERY: Duration = Duration::from_secs(100);
/// What a sender can put between itself and a target that reads nothing, for each link on the way and besides: windows and
/// buffers.
const MOST_UNREAD: u64 = 1 << 20;

/// A patient client gives up a request after this time, which counts as a loud failure.
fn patience(weather: Weather) -> Duration {
    match weather {
        Weather::Rough => Duration::from_secs(40),
        // Longer than the slowest link takes.
        Weather::Calm => Duration::from_secs(100),
    }
}

/// All requests of the plan, the watchers of silent links, and at last the check that everything is well again.
pub(super) async fn run(plan: Plan, world: World) -> turmoil::Result {
    let (start, gateways) = (Instant::now(), plan.gateways());
    sleep(LINKED).await;
    // Buffers that stay with a link have their size before anything is counted: that of the other gateway, too.
    for node in NODES {
        expect_answer(gateways[plan.gateways - 1 - plan.home(node)], node, LARGEST, &world).await;
    }
    sleep_until(start + AT_REST).await;
    let rest = Rest::look(gateways, &world);
    if !rest.is_linked() {
        world.ledger.broken(format!("not all links were up after {AT_REST:?}"));
    }
    let mut clients = JoinSet::new();
    for planned in &plan.requests {
        let client = Client {
            world: world.clone(),
            planned: planned.clone(),
            gateway: gateways[planned.gateway],
            links: if planned.gateway == plan.home(&planned.request.node) { 1 } else { 2 },
            weather: plan.weather,
            may_refuse: plan.may_refuse(),
        };
        clients.spawn(async move {
            sleep_until(start + client.planned.when).await;
            client.request().await;
        });
    }
    if plan.weather == Weather::Rough {
        for node in NODES {
            let home = gateways[plan.home(node)];
            clients.spawn(watch_idle_stream(home, node, start, world.clone()));
        }
    }
    while let Some(joined) = clients.join_next().await {
        joined?;
    }
    sleep_until(start + Duration::from_millis(BUSY.end)).await;
    for (gateway, node) in gateways.iter().flat_map(|gateway| NODES.map(|node| (*gateway, node))) {
        expect_answer(gateway, node, 70_000, &world).await;
    }
    rest.expect(&world).await;
    leaks::expect_free_places(gateways, &world).await;
    if plan.weather == Weather::Calm {
        expect_true_ends(&world);
    }
    Ok(())
}

/// Any connection to a target.
trait Connection: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Connection for T {}

/// The client's socket in whatever it does, for when it is gone in a way of its own.
type Switch = Arc<Mutex<Option<Socket>>>;

fn target(node: &str) -> String {
    format!("{node}:{KUBELET_PORT}")
}

/// A CONNECT through one of a gateway's doors. The outer error is the connection's.
async fn dial(
    gateway: &str,
    node: &str,
    door: Door,
    switch: &Switch,
) -> std::io::Result<Result<Box<dyn Connection>, Refusal>> {
    let (port, family, protocol) = match door {
        Door::Tls(protocol) => (INGRESS_PORT, Family::Tcp, protocol),
        Door::Unix(protocol) => (UNIX_PORT, Family::Unix, protocol),
    };
    let tcp = TcpStream::connect((gateway, port)).await?;
    let mut socket = SimSocket::new(tcp, family, Rate::default(), &Open::default());
    *switch.lock().unwrap() = Some(socket.handle());
    match (door, protocol) {
        (Door::Tls(_), Protocol::Http1) => {
            let mut stream = parties::control_plane_tls(socket).await?;
            Ok(connect(&mut stream, &target(node)).await?.map(|()| boxed(stream)))
        }
        (Door::Tls(_), Protocol::Http2) => {
            let stream = parties::control_plane_tls_for(b"h2", socket).await?;
            let client = http2::Client::new(stream).await?;
            Ok(client.connect_once(&target(node)).await?.map(boxed))
        }
        (Door::Unix(_), Protocol::Http1) => {
            Ok(connect(&mut socket, &target(node)).await?.map(|()| boxed(socket)))
        }
        (Door::Unix(_), Protocol::Http2) => {
            let client = http2::Client::new(socket).await?;
            Ok(client.connect_once(&target(node)).await?.map(boxed))
        }
    }
}

fn boxed<'a>(connection: impl Connection + 'a) -> Box<dyn Connection + 'a> {
    Box::new(connection)
}

/// Opens so many streams to a node that all are open at once.
pub(super) async fn open_at_once(gateway: &str, node: &str, streams: usize) -> Result<(), String> {
    let opening = async {
        let tcp = TcpStream::connect((gateway, INGRESS_PORT)).await?;
        let socket = SimSocket::new(tcp, Family::Tcp, Rate::default(), &Open::default());
        let client = http2::Client::new(parties::control_plane_tls_for(b"h2", socket).await?).await?;
        let mut open = Vec::new();
        for _ in 0..streams {
            match client.connect(&target(node)).await? {
                Ok(stream) => open.push(stream),
                Err(refusal) => return Ok(Err(format!("after {}: {}", open.len(), refusal.reason))),
            }
        }
        std::io::Result::Ok(Ok(()))
    };
    match timeout(RECOVERY, opening).await {
        Ok(opened) => opened.unwrap_or_else(|error| Err(error.to_string())),
        Err(_) => Err(format!("they are not open after {RECOVERY:?}")),
    }
}

/// How a request ended.
enum Ended {
    Refused(Refusal),
    /// The connection to the gateway failed before there was an answer.
    NotBegun(String),
    Begun(Outcome),
}

/// One client of a run.
struct Client {
    world: World,
    planned: Planned,
    gateway: &'static str,
    /// On the way to the node.
    links: u64,
    weather: Weather,
    may_refuse: bool,
}

impl Client {
    async fn request(&self) {
        let Planned { request, manner, door, .. } = &self.planned;
        let patience = match *manner {
            Manner::Patient => patience(self.weather),
            Manner::Leaves(millis) | Manner::Resets(millis) | Manner::Vanishes(millis) => {
                Duration::from_millis(millis)
            }
        };
        if !door.has_resets() {
            self.world.ledger.without_resets(request.id);
        }
        let (sent, switch) = (Arc::new(AtomicU64::new(0)), Switch::default());
        let mut attempt = Box::pin(async {
            match dial(self.gateway, &request.node, *door, &switch).await {
                Ok(Ok(stream)) => {
                    let stream = Metered::new(stream, sent.clone());
                    Ended::Begun(request.run(stream, &self.world.ledger).await)
                }
                Ok(Err(refusal)) => Ended::Refused(refusal),
                Err(error) => Ended::NotBegun(error.to_string()),
            }
        });
        let ended = timeout(patience, &mut attempt).await.ok();
        if let Some(socket) = switch.lock().unwrap().take() {
            match manner {
                Manner::Vanishes(_) => socket.cut_power(),
                Manner::Resets(_) => socket.reset(),
                Manner::Patient | Manner::Leaves(_) => {}
            }
        }
        drop(attempt);
        let sent = sent.load(Relaxed);
        if matches!(request.kind, Kind::Stuck | Kind::Deaf) && sent > MOST_UNREAD * (1 + self.links) {
            self.broken(request, &format!("{sent} bytes were taken for a target that reads none"));
        }
        self.judge(ended);
    }

    fn judge(&self, ended: Option<Ended>) {
        let Planned { request, door, manner, .. } = &self.planned;
        let mut report = self.world.report.lock().unwrap();
        let what = match ended {
            Some(Ended::Begun(Outcome::Whole)) => {
                report.whole += 1;
                "whole".to_owned()
            }
            Some(Ended::Begun(Outcome::FailedLoudly(error))) => {
                report.failed_loudly += 1;
                if self.weather == Weather::Calm {
                    self.broken(request, &format!("failed in calm weather: {error}"));
                }
                format!("failed loudly: {error}")
            }
            Some(Ended::NotBegun(error)) => {
                report.failed_loudly += 1;
                if !self.may_refuse {
                    self.broken(request, &format!("no connection while nothing was wrong: {error}"));
                }
                format!("no connection: {error}")
            }
            Some(Ended::Refused(refusal)) => {
                report.refused += 1;
                self.judge_refusal(request, &refusal);
                format!("refused: {} {}", refusal.status, refusal.reason)
            }
            None => {
                report.failed_loudly += 1;
                if self.weather == Weather::Calm {
                    self.broken(request, "was not over in time in calm weather");
                } else if *manner == Manner::Patient && request.kind.is_half_closed() {
                    self.broken(request, "was not given up, although it was half-closed and silent");
                }
                "left".to_owned()
            }
        };
        drop(report);
        self.world.note(&format!(
            "request {} to {} by {} {door:?}, {manner:?}: {:?} of {}: {what}",
            request.id, request.node, self.gateway, request.kind, request.bytes
        ));
    }

    fn judge_refusal(&self, request: &Request, refusal: &Refusal) {
        if let Err(problem) = refusal.check() {
            self.broken(request, &problem);
        }
        let known = NODES.contains(&&*request.node);
        let said = format!("{} {}", refusal.status, refusal.reason);
        // A gateway that has just started does not know a node that it has not seen, unless configuration names it.
        // While something is missing of what another gateway holds, no gateway can say that there is no such node.
        let may_exist = refusal.status == 503 && self.may_refuse;
        if !(known || refusal.status == 404 || may_exist) {
            self.broken(request, &format!("{said} instead of 404 for an unknown node"));
        }
        if known && !matches!(refusal.status, 502..=504) {
            self.broken(request, &format!("{said} for a known node"));
        }
        if known && !self.may_refuse {
            self.broken(request, &format!("{said} while nothing was wrong"));
        }
    }

    fn broken(&self, request: &Request, what: &str) {
        self.world.ledger.broken(format!("stream {}: {what}", request.id));
    }
}

/// Keeps an idle stream to a node open. When its link falls silent, the stream must be reset within two heartbeat
/// periods; a little more is allowed for the reset's own way and for the clock's ticks.
async fn watch_idle_stream(home: &'static str, node: &'static str, start: Instant, world: World) {
    let end = start + Duration::from_millis(BUSY.end) + Duration::from_secs(10);
    sleep_until(start + WATCHING).await;
    while Instant::now() < end {
        let opened = turmoil::sim_elapsed().unwrap_or_default();
        let switch = Switch::default();
        let dialling = dial(home, node, Door::Tls(Protocol::Http1), &switch);
        let Ok(Ok(Ok(mut stream))) = timeout(patience(Weather::Rough), dialling).await else {
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

/// While nothing goes wrong, or soon after all faults are over, a node must answer by way of each gateway.
async fn expect_answer(gateway: &'static str, node: &'static str, bytes: u64, world: &World) {
    let patience = patience(Weather::Rough);
    let deadline = Instant::now() + RECOVERY;
    let request = Request { id: 1_000_000, node: node.to_owned(), kind: Kind::Echo, bytes };
    loop {
        let switch = Switch::default();
        let dialling = dial(gateway, node, Door::Tls(Protocol::Http1), &switch);
        if let Ok(Ok(Ok(stream))) = timeout(patience, dialling).await
            && timeout(patience, request.run(stream, &world.ledger)).await == Ok(Outcome::Whole)
        {
            world.answers.fetch_add(1, Relaxed);
            return world.note(&format!("{node} is well by {gateway}"));
        }
        if Instant::now() > deadline {
            return world
                .ledger
                .broken(format!("{node} was not reachable by {gateway} {RECOVERY:?} after the last fault"));
        }
        sleep(Duration::from_millis(200)).await;
    }
}

/// What the edges call a clean end has arrived.
fn expect_true_ends(world: &World) {
    let clean: usize = world.edges.iter().map(|edge| edge.probe.ended_cleanly()).sum();
    let whole = world.report.lock().unwrap().whole + world.answers.load(Relaxed);
    if clean > whole {
        world
            .ledger
            .broken(format!("the edges say that {clean} streams ended cleanly, and {whole} came out whole"));
    }
}
