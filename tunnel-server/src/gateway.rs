//! Builds all parts of a gateway and owns every task of it. Called by the binary ([`crate::run`]), by `dev`, and by the
//! simulation, which brings doors of its own: all of them run the very same gateway.
//!
//! How it ends ([`Gateway::run`]): readiness fails, the edges' door closes, and the edges are told to connect elsewhere;
//! requests are still taken for the drain delay, until load balancers have noticed; then the control plane's doors close,
//! and streams go on until the drain timeout, or until the edges have left; what is left is aborted; then the links are
//! closed. Each step waits for its tasks.

use std::{collections::BTreeSet, num::NonZeroUsize, pin::Pin, sync::Arc, time::Duration};

use futures_util::FutureExt;
use prometheus_client::{metrics::counter::Counter, registry::Registry as MetricsRegistry};
use tokio::{
    sync::watch,
    time::{Instant, MissedTickBehavior, interval, sleep, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use tunnel_core::{
    GatewayId, InstanceId, LinkConfig, Target, Timeouts,
    tls::{ClientTls, Domain, ServerTls, TlsError},
};
use tunnel_edge::{
    daemon::tasks::{Failure, TaskSet, Vital},
    network::{Network, SystemNetwork},
};

use crate::{
    cluster::{Access, ClusterWatch},
    directory::{Directory, Memory, etcd::Etcd, peers::Peers},
    edges::{
        EdgeDoor, EdgeSettings,
        held::News,
        registry::{LinkLimits, Registry},
    },
    grants::{Grants, SharedGrants},
    ingress::{Ingress, IngressSettings},
    listener::{Accept, Places, accept_loop},
    metrics::Metrics,
    peers::{
        Member, discovery,
        door::PeerDoor,
        mesh::{Mesh, Own},
    },
    route::{Router, StreamLimits},
};

/// Links of peers at one time. A full mesh of more gateways is not what this is for.
pub(crate) const MAX_PEER_LINKS: usize = 256;
/// How often the credentials' files are looked at.
const RELOAD_PERIOD: Duration = Duration::from_secs(10);
/// How long after its start a gateway is not ready while it does not know the cluster's nodes. Not longer: were the API
/// server away, no gateway at all would be ready, although nodes are reached by their names without it.
const NODES_AWAITED: Duration = Duration::from_secs(10);
/// How long after its start a gateway is not ready while others have not told it which nodes they hold: before that it
/// would not know them.
const PEERS_AWAITED: Duration = Duration::from_secs(5);
/// Whose time-outs they are, in the texts of aborts.
pub(crate) const WHOSE: &str = "the gateway";
/// How long aborted streams and closed links may take to say their last words.
const LAST_WORDS: Duration = Duration::from_secs(5);

/// What a gateway can be told, apart from its doors and credentials.
#[derive(Clone, Debug)]
pub struct GatewaySettings {
    /// Its name, unique in its cluster.
    pub gateway_id: GatewayId,
    /// Heartbeat period of its links.
    pub heartbeat: Duration,
    /// For the TLS handshake of any connection, and again for an edge's hello.
    pub handshake_timeout: Duration,
    /// Limits of one link. Whether streams are accepted, and the time of its handshake, are the gateway's own.
    pub link: LinkConfig,
    /// How many links there may be.
    pub links: LinkLimits,
    /// What nodes serve beside their own names.
    pub grants: Grants,
    /// From a request to its connected target.
    pub dial_timeout: Duration,
    /// A request's head must be there within this time.
    pub header_timeout: Duration,
    /// Longest head of a request, in bytes.
    pub max_header_size: usize,
    /// Connections of the control plane at once, at each of its doors.
    pub max_ingress_connections: usize,
    /// Connections at once, at each door, that have not shown yet who they are. Never more than the others that there may
    /// be.
    pub max_waiting: usize,
    /// Streams at once, all together.
    pub max_streams: usize,
    /// Streams at once of one caller to one node.
    pub max_streams_per_caller: Option<NonZeroUsize>,
    /// Streams at once on one HTTP/2 connection.
    pub max_streams_per_connection: u32,
    /// Names of client certificates that may send requests; empty: every certificate of the control plane's CA.
    pub allowed_clients: BTreeSet<String>,
    /// How long requests are still taken after the gateway was told to leave.
    pub drain_delay: Duration,
    /// How long running streams may go on after that.
    pub drain_timeout: Duration,
    /// How long a stream may last without moving a byte.
    pub timeouts: Timeouts,
    /// Random: sets the ids of its requests apart from those of others.
    pub request_seed: u32,
}

/// What a gateway that is one of several can be told besides.
#[derive(Clone, Debug)]
pub struct PeerSettings {
    /// Random: tells this process from others of the same name.
    pub instance: u128,
    /// Where edges reach this very gateway, if they can.
    pub edge_address: Option<Target>,
    /// Heartbeat period of the links between gateways.
    pub heartbeat: Duration,
    /// Limits of one such link. Whether streams are accepted, and the time of its handshake, are the gateway's own.
    pub link: LinkConfig,
    /// Links of peers at one time.
    pub max_links: usize,
}

impl PeerSettings {
    /// Sensible limits, for edges that come by a load balancer only.
    pub fn new(instance: u128) -> Self {
        Self {
            instance,
            edge_address: None,
            heartbeat: Duration::from_secs(3),
            link: LinkConfig { max_streams: 4096, window_budget: 64 << 20, ..LinkConfig::default() },
            max_links: MAX_PEER_LINKS,
        }
    }
}

/// How gateways find one another, and tell which nodes they hold.
#[derive(Debug)]
pub(crate) enum Meeting {
    /// By a list; they tell one another over their links.
    List(Vec<Member>),
    /// Through etcd.
    Etcd(Arc<Etcd>),
}

impl GatewaySettings {
    /// Sensible limits for a gateway of this name, with no grants.
    pub fn new(gateway_id: GatewayId) -> Self {
        Self {
            gateway_id,
            heartbeat: Duration::from_secs(10),
            handshake_timeout: Duration::from_secs(10),
            link: LinkConfig::default(),
            links: LinkLimits { total: 10_000, per_node: 4 },
            grants: Grants::default(),
            dial_timeout: Duration::from_secs(10),
            header_timeout: Duration::from_secs(10),
            max_header_size: 16 * 1024,
            max_ingress_connections: 10_000,
            max_waiting: usize::MAX,
            max_streams: 4096,
            max_streams_per_caller: NonZeroUsize::new(512),
            max_streams_per_connection: 250,
            allowed_clients: BTreeSet::new(),
            drain_delay: Duration::ZERO,
            drain_timeout: Duration::from_secs(30),
            timeouts: Timeouts::of(WHOSE),
            request_seed: 0,
        }
    }
}

type Task = Pin<Box<dyn Future<Output = ()> + Send>>;

/// A gateway that does nothing until it is run. Give it its doors first.
pub struct Gateway {
    settings: GatewaySettings,
    registry: Arc<Registry>,
    grants: SharedGrants,
    metrics: Metrics,
    ingress: Arc<Ingress>,
    stages: Stages,
    vital: Vital,
    router: Router,
    peering: Option<Peering>,
    ingress_doors: Vec<Task>,
    edge_doors: Vec<Task>,
    peer_tasks: Vec<Task>,
    credentials: Vec<Credentials>,
    cluster: Option<Task>,
    /// Until when the cluster's nodes are waited for.
    nodes_awaited: Option<Instant>,
    /// Until when the other gateways' word is waited for.
    peers_awaited: Option<Instant>,
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gateway").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// A gateway's part among several.
struct Peering {
    settings: PeerSettings,
    own: Own,
    mesh: Arc<Mesh>,
    meeting: Meeting,
    /// How many streams of peers are being handed on.
    forwarding: watch::Sender<usize>,
}

/// Credentials that are read again when their files change.
enum Credentials {
    Server(ServerTls),
    Client(ClientTls),
}

/// How far a gateway has come on its way out; each is a signal to all tasks that it concerns.
#[derive(Clone, Debug, Default)]
struct Stages {
    /// Edges shall go elsewhere, and load balancers send nothing more here.
    leaving: CancellationToken,
    /// No new connections and requests.
    draining: CancellationToken,
    /// Streams that still run are aborted.
    aborting: CancellationToken,
    /// Links are closed.
    closing: CancellationToken,
}

/// Tells whether a gateway takes new work. Cheap to clone; outlives the gateway.
#[derive(Clone, Debug)]
pub struct Readiness {
    vital: Vital,
    leaving: CancellationToken,
    grants: SharedGrants,
    nodes_awaited: Option<Instant>,
    /// The other gateways, and until when they are waited for.
    peers_awaited: Option<(Arc<Mesh>, Instant)>,
}

impl Readiness {
    /// Why not, in one line.
    pub fn check(&self) -> Result<(), String> {
        self.vital.check().map_err(|failure| failure.to_string())?;
        if self.leaving.is_cancelled() {
            return Err("draining: this gateway is about to leave".to_owned());
        }
        let awaited = |(mesh, until): &(Arc<Mesh>, Instant)| !mesh.has_heard() && Instant::now() < *until;
        if self.peers_awaited.as_ref().is_some_and(awaited) {
            return Err("the other gateways have not told yet which nodes they hold".to_owned());
        }
        match self.grants.load().unread() {
            Some(cause) if self.nodes_awaited.is_some_and(|until| Instant::now() < until) => {
                Err(format!("the nodes have not been read from the cluster yet: {cause}"))
            }
            _ => Ok(()),
        }
    }
}

impl Gateway {
    /// A gateway without doors, and the only one. Its metrics are registered in `metrics`.
    pub fn new(settings: GatewaySettings, metrics: &mut MetricsRegistry) -> Self {
        Self::build(settings, None, metrics)
    }

    /// A gateway without doors, one of several, which find one another by a list of where each listens for the others.
    /// The list may name this one as well.
    pub fn among_peers(
        settings: GatewaySettings,
        peers: PeerSettings,
        list: Vec<Member>,
        metrics: &mut MetricsRegistry,
    ) -> Self {
        Self::build(settings, Some((peers, Meeting::List(list))), metrics)
    }

    /// As [`Self::among_peers`], for gateways that find one another through etcd.
    pub(crate) fn by_etcd(
        settings: GatewaySettings,
        peers: PeerSettings,
        etcd: Arc<Etcd>,
        metrics: &mut MetricsRegistry,
    ) -> Self {
        Self::build(settings, Some((peers, Meeting::Etcd(etcd))), metrics)
    }

    fn build(
        settings: GatewaySettings,
        peers: Option<(PeerSettings, Meeting)>,
        metrics: &mut MetricsRegistry,
    ) -> Self {
        if let Some(pool) = &settings.link.window_pool {
            Metrics::watch_windows(pool.clone(), metrics);
        }
        let metrics = Metrics::new(metrics);
        let stages = Stages::default();
        let grants = SharedGrants::new(settings.grants.clone());
        let registry = Registry::new(settings.links, metrics.clone());
        let directory: Arc<dyn Directory> = match &peers {
            None => Arc::new(Memory),
            Some((_, Meeting::List(_))) => Arc::new(Peers::default()),
            Some((_, Meeting::Etcd(etcd))) => etcd.clone(),
        };
        let peering = peers.map(|(peers, meeting)| {
            let own = Own {
                gateway: settings.gateway_id.clone(),
                instance: InstanceId::from_random(peers.instance),
                edge_address: peers.edge_address.clone(),
                leaving: stages.leaving.clone(),
            };
            let link = LinkConfig {
                handshake_timeout: settings.handshake_timeout,
                accept_streams: false,
                ..peers.link.clone()
            };
            let mesh =
                Mesh::new(own.clone(), directory.clone(), link, settings.handshake_timeout, metrics.clone());
            Peering { settings: peers, own, mesh, meeting, forwarding: watch::Sender::new(0) }
        });
        let router = Router::new(
            registry.clone(),
            grants.clone(),
            (directory, peering.as_ref().map(|peering| peering.mesh.clone())),
            settings.dial_timeout,
            StreamLimits { total: settings.max_streams, per_caller: settings.max_streams_per_caller },
            metrics.clone(),
        );
        let ingress = Ingress::new(
            ingress_settings(&settings),
            router.clone(),
            metrics.clone(),
            stages.draining.clone(),
            stages.aborting.clone(),
        );
        Self {
            registry,
            grants,
            ingress,
            settings,
            metrics,
            stages,
            vital: Vital::default(),
            router,
            peering,
            ingress_doors: Vec::new(),
            edge_doors: Vec::new(),
            peer_tasks: Vec::new(),
            credentials: Vec::new(),
            cluster: None,
            nodes_awaited: None,
            peers_awaited: None,
        }
    }

    /// Opens a door for edges.
    pub fn serve_edges(&mut self, door: impl Accept, tls: ServerTls) {
        let edges = EdgeDoor::new(
            tls.clone(),
            edge_settings(&self.settings),
            self.registry.clone(),
            self.grants.clone(),
            self.gateways(),
            self.metrics.clone(),
            self.stages.leaving.clone(),
            self.stages.closing.clone(),
        );
        let serve = move |conn, peer, guest| edges.clone().serve(conn, peer, guest);
        // Links are counted by the registry; a few more connections may be on their way to become some.
        let places = self.places(Domain::Edge, edge_places(self.settings.links.total));
        let (stop, owners) = (self.stages.leaving.clone(), self.owners("an edge's connection"));
        self.edge_doors.push(Box::pin(accept_loop(door, "edges", places, stop, owners, serve)));
        self.credentials.push(Credentials::Server(tls));
    }

    /// Opens a door for the control plane, by mutual TLS.
    pub fn serve_ingress(&mut self, door: impl Accept, tls: ServerTls) {
        let (ingress, credentials) = (self.ingress.clone(), tls.clone());
        let serve =
            move |conn, peer, guest| ingress.clone().serve_tls(credentials.clone(), conn, peer, guest);
        let places = self.places(Domain::ControlPlane, self.settings.max_ingress_connections);
        let (stop, owners) = (self.stages.draining.clone(), self.owners("a connection of the control plane"));
        self.ingress_doors.push(Box::pin(accept_loop(door, "ingress", places, stop, owners, serve)));
        self.credentials.push(Credentials::Server(tls));
    }

    /// Opens a door for peers, and dials them over the network of this machine. Only for a gateway that is one of several.
    pub fn serve_peers(&mut self, door: impl Accept, tls: (ServerTls, ClientTls)) {
        self.serve_peers_on(SystemNetwork, door, tls);
    }

    /// As [`Self::serve_peers`], over this network.
    pub fn serve_peers_on(&mut self, network: impl Network, door: impl Accept, tls: (ServerTls, ClientTls)) {
        let Some(peering) = &self.peering else { return };
        self.peers_awaited = Some(Instant::now() + PEERS_AWAITED);
        let (server_tls, client_tls) = tls;
        let stages = &self.stages;
        let peers = Arc::new(PeerDoor {
            tls: server_tls.clone(),
            own: peering.own.clone(),
            mesh: peering.mesh.clone(),
            heartbeat: peering.settings.heartbeat,
            handshake_timeout: self.settings.handshake_timeout,
            link: LinkConfig {
                handshake_timeout: self.settings.handshake_timeout,
                accept_streams: true,
                ..peering.settings.link.clone()
            },
            registry: self.registry.clone(),
            router: self.router.clone(),
            metrics: self.metrics.clone(),
            timeouts: self.settings.timeouts,
            aborting: stages.aborting.clone(),
            closing: stages.closing.clone(),
            sessions: 1.into(),
            epochs: 1.into(),
            running: peering.forwarding.clone(),
        });
        let serve = move |conn, peer, guest| peers.clone().serve(conn, peer, guest);
        let places = self.places(Domain::Peer, peering.settings.max_links);
        let (closing, owners) = (stages.closing.clone(), self.owners("a peer's connection"));
        let accepting: Task = Box::pin(accept_loop(door, "peers", places, closing.clone(), owners, serve));
        let (found, members) = match &peering.meeting {
            Meeting::List(list) => {
                let (found, members) = watch::channel(Vec::new());
                let (list, stop) = (list.clone(), stages.closing.clone());
                let looking = async move {
                    let looking = discovery::run(list, found, discovery::system);
                    stop.run_until_cancelled(looking).await.unwrap_or_default();
                };
                (self.vital_task("discovery", closing.clone(), looking), members)
            }
            Meeting::Etcd(etcd) => {
                let (etcd, news) = (etcd.clone(), News::of(&self.registry));
                let members = etcd.members();
                let running = etcd.run(news, closing.clone());
                (self.vital_task("directory", closing.clone(), running), members)
            }
        };
        let seed = u64::from(self.settings.request_seed);
        let meshing =
            peering.mesh.clone().run(network, members, client_tls.clone(), seed, stages.closing.clone());
        let meshing = self.vital_task("mesh", closing, meshing);
        self.peer_tasks.extend([accepting, found, meshing]);
        self.credentials.push(Credentials::Server(server_tls));
        self.credentials.push(Credentials::Client(client_tls));
    }

    /// The places of a door where each shows a certificate: so many, and seats for as many that have not yet, since all may
    /// come at one moment.
    fn places(&self, domain: Domain, count: usize) -> Arc<Places> {
        Places::guarded(count, count.min(self.settings.max_waiting), domain, &self.metrics)
    }

    /// The cluster's gateways, as edges are told: none, if this is the only one.
    fn gateways(&self) -> watch::Receiver<Arc<Vec<tunnel_core::proto::messages::Gateway>>> {
        match &self.peering {
            Some(peering) => peering.mesh.gateways(),
            None => watch::channel(Arc::default()).1,
        }
    }

    /// Opens a door for the control plane without TLS: a Unix socket, where the file's permissions decide who may ask.
    pub fn serve_ingress_plain(&mut self, door: impl Accept) {
        let ingress = self.ingress.clone();
        // Not an async block, which would have room for the future twice: there may be many.
        let serve = move |conn, peer, guest| ingress.clone().serve_plain(conn, peer).map(|()| drop(guest));
        let places = Places::open(self.settings.max_ingress_connections);
        let (stop, owners) = (self.stages.draining.clone(), self.owners("a connection of the control plane"));
        self.ingress_doors.push(Box::pin(accept_loop(door, "unix ingress", places, stop, owners, serve)));
    }

    /// Who answers for a door, and who for its connections.
    fn owners(&self, connection: &'static str) -> (Vital, TaskSet) {
        (self.vital.clone(), TaskSet::new(connection, &self.metrics.panics))
    }

    /// A task without which this gateway is of no use; it ends when `stop` is cancelled, and not before.
    fn vital_task(
        &self,
        what: &'static str,
        stop: CancellationToken,
        task: impl Future<Output = ()> + Send + 'static,
    ) -> Task {
        let vital = self.vital.clone();
        Box::pin(async move { vital.watch(what, &stop, task).await })
    }

    /// Grants the nodes of a cluster what is theirs, beside what the settings grant.
    pub fn watch_cluster(&mut self, access: Access) {
        let (configured, grants) = (self.settings.grants.clone(), self.grants.clone());
        let watch = ClusterWatch::new(access, configured, grants, self.metrics.clone());
        self.cluster = Some(self.vital_task("cluster", CancellationToken::new(), watch.run()));
        self.nodes_awaited = Some(Instant::now() + NODES_AWAITED);
    }

    /// Counts tasks that panicked, each alone.
    pub(crate) fn panics(&self) -> &Counter {
        &self.metrics.panics
    }

    /// Whether it takes new work, as long as it runs.
    pub fn readiness(&self) -> Readiness {
        Readiness {
            vital: self.vital.clone(),
            leaving: self.stages.leaving.clone(),
            grants: self.grants.clone(),
            nodes_awaited: self.nodes_awaited,
            peers_awaited: self
                .peers_awaited
                .zip(self.peering.as_ref())
                .map(|(until, peering)| (peering.mesh.clone(), until)),
        }
    }

    /// Serves until `shutdown`, then drains and returns; see the module's text. It does the same by itself, and says why,
    /// if a task fails that it cannot do without.
    ///
    /// Dropping the future ends everything at once: streams are reset, links are dropped.
    pub async fn run(self, shutdown: CancellationToken) -> Result<(), Failure> {
        let Self { settings, stages, ingress_doors, edge_doors, peer_tasks, credentials, .. } = self;
        let (registry, peering, vital) = (self.registry, self.peering, self.vital);
        let spawn_all = |tasks: Vec<Task>| {
            let mut set = TaskSet::new("a gateway's task", &self.metrics.panics);
            for task in tasks {
                set.spawn(task);
            }
            set
        };
        let mut cluster = spawn_all(self.cluster.into_iter().collect());
        let mut ingress = spawn_all(ingress_doors);
        let mut edges = spawn_all(edge_doors);
        let mut peers = spawn_all(peer_tasks);
        let never = CancellationToken::new();
        let background = async {
            tokio::join!(
                vital.watch("credentials", &never, reload_credentials(&credentials)),
                vital.watch("log limits", &never, self.metrics.lines.renew()),
            );
            // The gateway drains now.
            std::future::pending::<()>().await;
        };
        let serve = async {
            tokio::select! {
                // Why it leaves is said where it is known.
                biased;
                () = vital.failed() => {}
                () = shutdown.cancelled() => {}
            }
            stages.leaving.cancel();
            if !settings.drain_delay.is_zero() {
                info!(
                    delay_s = settings.drain_delay.as_secs(),
                    "leaving: edges are told to connect elsewhere"
                );
                sleep(settings.drain_delay).await;
            }
            info!(timeout_s = settings.drain_timeout.as_secs(), "draining: nothing new is taken");
            stages.draining.cancel();
            let idle = async {
                ingress.all_ended().await;
                if let Some(peering) = &peering {
                    peering.until_unneeded(&registry).await;
                }
            };
            if timeout(settings.drain_timeout, idle).await.is_err() {
                warn!("the drain timeout is over: aborting the streams that are left");
            }
            stages.aborting.cancel();
            wait_or_drop(&mut ingress, "connections of the control plane").await;
            stages.closing.cancel();
            wait_or_drop(&mut edges, "links").await;
            wait_or_drop(&mut peers, "links of peers").await;
            info!("drained");
        };
        tokio::select! {
            // The way out goes before new credentials, which nobody needs any more.
            biased;
            () = serve => {}
            () = background => {}
        }
        self.metrics.lines.sum_up();
        // It may be stuck in a credential plugin, which kube runs in the task itself to renew a token.
        if timeout(LAST_WORDS, cluster.shutdown()).await.is_err() {
            warn!("the watch of the nodes did not end in time, and is left behind");
        }
        vital.check()
    }
}

impl Peering {
    /// Waits until the edges have connected elsewhere, if there is anywhere else, and no peer's stream is left.
    async fn until_unneeded(&self, registry: &Arc<Registry>) {
        let mut gateways = self.mesh.gateways();
        let mut news = News::of(registry);
        let left = async {
            while !news.none_is_held() {
                news.next().await;
            }
        };
        let alone = gateways.wait_for(|gateways| gateways.iter().all(|gateway| gateway.draining));
        tokio::select! {
            biased;
            () = left => {}
            _ = alone => {}
        }
        // The sender is here: there is no error.
        let _ = self.forwarding.subscribe().wait_for(|running| *running == 0).await;
    }
}

impl Credentials {
    fn reload(&self) -> Result<bool, TlsError> {
        match self {
            Self::Server(tls) => tls.reload(),
            Self::Client(tls) => tls.reload(),
        }
    }
}

impl std::fmt::Debug for Credentials {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Server(tls) => tls.fmt(f),
            Self::Client(tls) => tls.fmt(f),
        }
    }
}

/// Connections of edges at one time, where there may be so many links.
pub(crate) fn edge_places(max_links: usize) -> usize {
    max_links.saturating_add(max_links / 4).saturating_add(64)
}

fn edge_settings(settings: &GatewaySettings) -> EdgeSettings {
    EdgeSettings {
        gateway_id: settings.gateway_id.clone(),
        heartbeat: settings.heartbeat,
        handshake_timeout: settings.handshake_timeout,
        // Edges are told at the very beginning, and streams have as long as this gateway gives them.
        drain_timeout: settings.drain_delay.saturating_add(settings.drain_timeout),
        link: settings.link.clone(),
    }
}

fn ingress_settings(settings: &GatewaySettings) -> IngressSettings {
    IngressSettings {
        gateway_id: settings.gateway_id.clone(),
        allowed_clients: settings.allowed_clients.clone(),
        handshake_timeout: settings.handshake_timeout,
        header_timeout: settings.header_timeout,
        max_header_size: settings.max_header_size,
        max_streams: settings.max_streams_per_connection,
        timeouts: settings.timeouts,
        request_seed: settings.request_seed,
    }
}

/// Waits for tasks that were told to end; those that do not are dropped, which ends what they own.
async fn wait_or_drop(tasks: &mut TaskSet, what: &'static str) {
    if timeout(LAST_WORDS, tasks.all_ended()).await.is_err() {
        warn!(what, "some did not end in time, and are dropped");
        tasks.shutdown().await;
    }
}

/// Looks for new credentials, for ever. New connections use them; running ones keep what they have.
async fn reload_credentials(credentials: &[Credentials]) {
    let mut period = interval(RELOAD_PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut complaints = vec![String::new(); credentials.len()];
    loop {
        period.tick().await;
        for (tls, complaint) in credentials.iter().zip(&mut complaints) {
            match tls.reload() {
                Ok(changed) => {
                    complaint.clear();
                    if changed {
                        info!(?tls, "the credentials have changed; new connections use them");
                    }
                }
                Err(failure) => {
                    let text = failure.to_string();
                    if text != *complaint {
                        error!(
                            cause = text,
                            "the credentials' files cannot be used; going on with what they held"
                        );
                        *complaint = text;
                    }
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_gateway_waits_for_the_nodes_but_not_for_ever() {
        let gateway =
            || Gateway::new(GatewaySettings::new("gw-1".parse().unwrap()), &mut MetricsRegistry::default());
        assert_eq!(gateway().readiness().check(), Ok(()));
        let mut gateway = gateway();
        gateway.watch_cluster(Access::Kubeconfig("/nowhere".into()));
        let readiness = gateway.readiness();
        let unread = |cause: &str| Err(format!("the nodes have not been read from the cluster yet: {cause}"));
        assert_eq!(readiness.check(), unread("the gateway has just started"));
        gateway.grants.replace(Grants::default().without_nodes_yet("it is away".to_owned()));
        assert_eq!(readiness.check(), unread("it is away"));
        gateway.grants.replace(Grants::default());
        assert_eq!(readiness.check(), Ok(()));
        gateway.grants.replace(Grants::default().without_nodes_yet("it is away".to_owned()));
        tokio::time::advance(Duration::from_secs(9)).await;
        assert_eq!(readiness.check(), unread("it is away"));
        tokio::time::advance(Duration::from_secs(1)).await;
        assert_eq!(readiness.check(), Ok(()));
        gateway.stages.leaving.cancel();
        assert!(readiness.check().unwrap_err().starts_with("draining"));
    }
}
