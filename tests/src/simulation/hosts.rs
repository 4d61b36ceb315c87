//! The hosts of a simulated network and the programs on them: the real gateway and the real edges, each behind what stands
//! for an operating system here, and the kubelets. A program that was told to stop is started again when it has ended, as
//! by an orchestrator; one that is killed is started again at once.

use std::{
    cell::RefCell,
    future::pending,
    net::{IpAddr, Ipv4Addr},
    rc::Rc,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering::Relaxed},
    },
    time::Duration,
};

use rand::{RngCore, SeedableRng, rngs::SmallRng};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::Handle,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tunnel_core::{
    Host, LinkConfig, Target, Timeouts,
    proto::yamux::WindowPool,
    tls::{ClientTls, Domain, ServerTls},
};
use tunnel_edge::network::{DialError, Network};
use tunnel_server::{Accept, GatewaySettings, Member, PeerAddr, PeerSettings};
use turmoil::net::{TcpListener, TcpStream};

use super::{
    Gateway, HEARTBEAT, World,
    socket::{Counted, Family, Open, Rate, SimSocket},
};
use crate::{
    parties::{self, EDGE_PORT, GATEWAY, INGRESS_PORT, KUBELET_PORT, PEER_PORT, UNIX_PORT, files},
    plan::{GATEWAYS, NODES, Plan, Weather},
    workload,
};

/// Streams of a link at once: more than any run has, and few enough to be opened all at its end.
pub(super) const MAX_STREAMS: usize = 48;
/// By how much the windows of a program may grow, all together.
pub(super) const WINDOWS: usize = 16 << 20;
/// How long a half-closed stream may be silent, where that is limited: longer than a target that will go on.
const HALF_CLOSED: Duration = Duration::from_secs(12);
/// How long a stopped program stays away.
const AWAY: Duration = Duration::from_secs(1);
/// A program that has returned needs this long until its aborted tasks are dropped.
const DROPPING: Duration = Duration::from_millis(20);

/// A program on a host, over all its lives.
#[derive(Clone, Default)]
pub(super) struct Program {
    /// What its sockets have open.
    pub(super) open: Open,
    /// Its links' rate.
    pub(super) rate: Rate,
    /// What the kubelet beside it has open.
    kubelet: Open,
    kubelet_tasks: Arc<AtomicUsize>,
    life: Arc<Mutex<Option<Life>>>,
}

/// One life of a program.
struct Life {
    runtime: Handle,
    stop: CancellationToken,
    windows: Arc<WindowPool>,
}

/// What a program holds that can be counted.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Holdings {
    pub(super) tasks: usize,
    pub(super) sockets: usize,
    /// Bytes by which windows have grown.
    pub(super) windows: usize,
}

impl Program {
    fn begin_life(&self) -> (CancellationToken, Arc<WindowPool>) {
        let (stop, windows) = (CancellationToken::new(), Arc::new(WindowPool::new(WINDOWS)));
        let life = Life { runtime: Handle::current(), stop: stop.clone(), windows: windows.clone() };
        *self.life.lock().unwrap() = Some(life);
        (stop, windows)
    }

    fn is(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.life, &other.life)
    }

    /// SIGTERM.
    pub(super) fn stop(&self) {
        if let Some(life) = &*self.life.lock().unwrap() {
            life.stop.cancel();
        }
    }

    /// What it holds now, without what belongs to its kernel and to the kubelet beside it.
    pub(super) fn holdings(&self) -> Option<Holdings> {
        let life = self.life.lock().unwrap();
        let life = life.as_ref()?;
        let others = self.open.kernels() + self.kubelet.kernels() + self.kubelet_tasks.load(Relaxed);
        Some(Holdings {
            tasks: life.runtime.metrics().num_alive_tasks() - others,
            sockets: self.open.sockets(),
            windows: WINDOWS - life.windows.left(),
        })
    }

    /// It has returned: nothing of it may be left.
    async fn ended(&self, name: &str, world: &World) {
        sleep(DROPPING).await;
        let nothing = Holdings { tasks: 0, sockets: 0, windows: 0 };
        if let Some(left) = self.holdings().filter(|left| *left != nothing) {
            world.ledger.broken(format!("{name} has stopped and left {left:?}"));
        }
        world.note(&format!("{name} has stopped"));
        sleep(AWAY).await;
    }
}

/// Random numbers for the lives of all programs.
#[derive(Clone)]
pub(super) struct Seeds(Rc<RefCell<u64>>);

impl Seeds {
    pub(super) fn new(seed: u64) -> Self {
        Self(Rc::new(RefCell::new(seed)))
    }

    fn next(&self) -> u64 {
        let mut seed = self.0.borrow_mut();
        *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        *seed
    }
}

/// How long running streams may go on after a SIGTERM.
fn drain_timeout(weather: Weather) -> Duration {
    match weather {
        Weather::Rough => Duration::from_secs(5),
        Weather::Calm => Duration::from_secs(60),
    }
}

fn link(windows: Arc<WindowPool>) -> LinkConfig {
    LinkConfig { max_streams: MAX_STREAMS, window_pool: Some(windows), ..LinkConfig::default() }
}

/// How long a half-closed stream may be silent.
fn timeouts(plan: &Plan) -> Timeouts {
    let timeouts = Timeouts::of("the simulation");
    if plan.half_closed_timeout { Timeouts { half_closed: Some(HALF_CLOSED), ..timeouts } } else { timeouts }
}

pub(super) fn add_gateway(
    sim: &mut turmoil::Sim<'_>,
    (which, name): (usize, &'static str),
    plan: &Plan,
    world: &World,
    seeds: &Seeds,
) {
    let (world, seeds) = (world.clone(), seeds.clone());
    let (drain_timeout, timeouts) = (drain_timeout(plan.weather), timeouts(plan));
    let others: Vec<&str> = plan.gateways().iter().copied().filter(|other| *other != name).collect();
    sim.host(name, move || {
        let (world, seeds, others) = (world.clone(), seeds.clone(), others.clone());
        async move {
            let Gateway { program, probe } = world.gateways[which].clone();
            loop {
                let ((stop, windows), seed) = (program.begin_life(), seeds.next());
                let settings = GatewaySettings {
                    gateway_id: name.parse()?,
                    link: link(windows.clone()),
                    drain_timeout,
                    timeouts,
                    ..parties::settings(HEARTBEAT, seed)
                };
                let tls = |domain| ServerTls::load(domain, files(domain, GATEWAY)).unwrap();
                let open = |port, family| Door::open(port, family, &program, &world);
                let mut gateway = if others.is_empty() {
                    parties::gateway_with(settings, &probe)
                } else {
                    let peers = PeerSettings {
                        heartbeat: HEARTBEAT,
                        link: link(windows),
                        ..PeerSettings::new(seed.into())
                    };
                    let members = others.iter().map(|other| member(other)).collect();
                    let mut gateway = parties::gateway_among(settings, peers, members, &probe);
                    let client = ClientTls::load(Domain::Peer, files(Domain::Peer, GATEWAY)).unwrap();
                    let network = SimNetwork { program: program.clone(), world: world.clone() };
                    let door = open(PEER_PORT, Family::Tcp).await?;
                    gateway.serve_peers_on(network, door, (tls(Domain::Peer), client));
                    gateway
                };
                gateway.serve_edges(open(EDGE_PORT, Family::Tcp).await?, tls(Domain::Edge));
                gateway.serve_ingress(open(INGRESS_PORT, Family::Tcp).await?, tls(Domain::ControlPlane));
                gateway.serve_ingress_plain(open(UNIX_PORT, Family::Unix).await?);
                gateway.run(stop).await.unwrap();
                program.ended(name, &world).await;
            }
        }
    });
}

fn member(gateway: &str) -> Member {
    let host = Host::Ip(turmoil::lookup(gateway));
    Member { address: Target { host, port: PEER_PORT }, server_name: GATEWAY.try_into().unwrap() }
}

pub(super) fn add_edge(
    sim: &mut turmoil::Sim<'_>,
    node: &'static str,
    plan: &Plan,
    world: &World,
    seeds: &Seeds,
) {
    let (world, seeds) = (world.clone(), seeds.clone());
    let (drain_timeout, timeouts) = (drain_timeout(plan.weather), timeouts(plan));
    let home = plan.gateways()[plan.home(node)];
    sim.host(node, move || {
        let (world, seeds) = (world.clone(), seeds.clone());
        async move {
            let edge = world.edge(node).clone();
            let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, KUBELET_PORT)).await?;
            tokio::spawn(run_kubelet(listener, node, edge.program.clone(), world.clone()));
            loop {
                let (stop, windows) = edge.program.begin_life();
                let mut config = parties::edge_config(node, format!("{home}:{EDGE_PORT}").parse()?);
                config.redundancy = 1;
                config.server_name = Some(GATEWAY.try_into()?);
                config.link = link(windows);
                config.drain_timeout = drain_timeout;
                config.timeouts = timeouts;
                let network = SimNetwork { program: edge.program.clone(), world: world.clone() };
                parties::run_edge_with(config, network, seeds.next(), &edge.probe, stop).await;
                edge.program.ended(node, &world).await;
            }
        }
    });
}

/// Somebody who sends garbage to one of the gateway's ports.
pub(super) fn add_strangers(sim: &mut turmoil::Sim<'_>, plan: &Plan, seed: u64) {
    for (number, (when, to_edge_door, bytes)) in plan.garbage.iter().copied().enumerate() {
        let mut rng = SmallRng::seed_from_u64(seed ^ number as u64);
        sim.client(format!("stranger-{number}"), async move {
            sleep(when).await;
            let port = if to_edge_door { EDGE_PORT } else { INGRESS_PORT };
            let mut garbage = vec![0; bytes];
            rng.fill_bytes(&mut garbage);
            if let Ok(Ok(tcp)) = timeout(HEARTBEAT, TcpStream::connect((GATEWAY, port))).await {
                let mut socket = SimSocket::new(tcp, Family::Tcp, Rate::default(), &Open::default());
                let _ = timeout(HEARTBEAT, socket.write_all(&garbage)).await;
                let _ = timeout(HEARTBEAT, socket.read(&mut [0; 64])).await;
            }
            Ok(())
        });
    }
}

/// A listener of the gateway's.
struct Door {
    listener: TcpListener,
    family: Family,
    program: Program,
    world: World,
}

impl Door {
    async fn open(port: u16, family: Family, program: &Program, world: &World) -> std::io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).await?;
        Ok(Self { listener, family, program: program.clone(), world: world.clone() })
    }
}

impl Accept for Door {
    type Conn = SimSocket;

    async fn accept(&mut self) -> std::io::Result<(SimSocket, PeerAddr)> {
        let (tcp, address) = self.listener.accept().await?;
        let rate = rate_between(address.ip(), &self.program, &self.world);
        let socket = SimSocket::new(tcp, self.family, rate, &self.program.open);
        let peer = match self.family {
            Family::Tcp => PeerAddr::Ip(address),
            Family::Unix => PeerAddr::Unix { uid: 0, pid: None },
        };
        Ok((socket, peer))
    }
}

/// How simulated programs reach gateways and kubelets.
struct SimNetwork {
    program: Program,
    world: World,
}

impl Network for SimNetwork {
    type Conn = SimSocket;

    async fn connect(&self, host: &Host, port: u16) -> Result<SimSocket, DialError> {
        let address = match host {
            Host::Ip(address) => *address,
            Host::Name(name) => turmoil::lookup(name.as_str()),
        };
        let tcp = TcpStream::connect((address, port)).await?;
        let rate = rate_between(address, &self.program, &self.world);
        Ok(SimSocket::new(tcp, Family::Tcp, rate, &self.program.open))
    }
}

/// The rate of what may be a link: the near side's, whoever dials. Nothing else is ever slow.
fn rate_between(far: IpAddr, own: &Program, world: &World) -> Rate {
    let Some(host) = turmoil::reverse_lookup(far) else { return Rate::default() };
    let is_gateway = GATEWAYS.contains(&&*host);
    if NODES.contains(&&*host) || host == GATEWAYS[1] && own.is(&world.gateways[0].program) {
        world.program(&host).rate.clone()
    } else if is_gateway {
        own.rate.clone()
    } else {
        Rate::default()
    }
}

async fn run_kubelet(listener: TcpListener, node: &'static str, beside: Program, world: World) {
    let _counted = Counted::new(&beside.kubelet_tasks);
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            // Tasks that have ended make room first.
            biased;
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => {
                let Ok((tcp, _)) = accepted else { return pending().await };
                let socket = SimSocket::new(tcp, Family::Tcp, Rate::default(), &beside.kubelet);
                let (ledger, counted) = (world.ledger.clone(), Counted::new(&beside.kubelet_tasks));
                connections.spawn(async move {
                    let _counted = counted;
                    workload::serve(socket, node, &ledger).await
                });
            }
        }
    }
}
