//! Builds all parts of a gateway and owns every task of it. Called by the binary ([`crate::run`]), by `dev`, and by the
//! simulation, which brings doors of its own: all of them run the very same gateway.
//!
//! How it ends ([`Gateway::run`]): readiness fails and the doors close; the edges are told to go elsewhere; streams go
//! on until the drain timeout; what is left is aborted; then the links are closed. Each step waits for its tasks.

use std::{collections::BTreeSet, pin::Pin, sync::Arc, time::Duration};

use prometheus_client::registry::Registry as MetricsRegistry;
use tokio::{
    sync::Semaphore,
    task::JoinSet,
    time::{Instant, MissedTickBehavior, interval, timeout},
};
use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};
use tunnel_core::{GatewayId, LinkConfig, tls::ServerTls};

use crate::{
    cluster::{Access, ClusterWatch},
    edges::{
        EdgeDoor, EdgeSettings,
        registry::{LinkLimits, Registry},
    },
    grants::{Grants, SharedGrants},
    ingress::{Ingress, IngressSettings},
    listener::{Accept, accept_loop, report_panic},
    metrics::Metrics,
    route::Router,
};

/// How often the credentials' files are looked at.
const RELOAD_PERIOD: Duration = Duration::from_secs(10);
/// How long after its start a gateway is not ready while it does not know the cluster's nodes. Not longer: were the API
/// server away, no gateway at all would be ready, although nodes are reached by their names without it.
const NODES_AWAITED: Duration = Duration::from_secs(10);
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
    /// Connections of the control plane at once, over all its doors.
    pub max_ingress_connections: usize,
    /// Streams at once, all together.
    pub max_streams: usize,
    /// Streams at once on one HTTP/2 connection.
    pub max_streams_per_connection: u32,
    /// Names of client certificates that may send requests; empty: every certificate of the control plane's CA.
    pub allowed_clients: BTreeSet<String>,
    /// How long running streams may go on after the gateway was told to leave.
    pub drain_timeout: Duration,
    /// Random: sets the ids of its requests apart from those of others.
    pub request_seed: u32,
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
            max_streams: 4096,
            max_streams_per_connection: 250,
            allowed_clients: BTreeSet::new(),
            drain_timeout: Duration::from_secs(30),
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
    ingress_places: Arc<Semaphore>,
    edge_places: Arc<Semaphore>,
    stages: Stages,
    ingress_doors: Vec<Task>,
    edge_doors: Vec<Task>,
    credentials: Vec<ServerTls>,
    cluster: Option<Task>,
    /// Until when the cluster's nodes are waited for.
    nodes_awaited: Option<Instant>,
}

impl std::fmt::Debug for Gateway {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Gateway").field("settings", &self.settings).finish_non_exhaustive()
    }
}

/// How far a gateway has come on its way out; each is a signal to all tasks that it concerns.
#[derive(Clone, Debug, Default)]
struct Stages {
    /// No new connections, links and requests.
    draining: CancellationToken,
    /// Streams that still run are aborted.
    aborting: CancellationToken,
    /// Links are closed.
    closing: CancellationToken,
}

/// Tells whether a gateway takes new work. Cheap to clone; outlives the gateway.
#[derive(Clone, Debug)]
pub struct Readiness {
    draining: CancellationToken,
    grants: SharedGrants,
    nodes_awaited: Option<Instant>,
}

impl Readiness {
    /// Why not, in one line.
    pub fn check(&self) -> Result<(), String> {
        if self.draining.is_cancelled() {
            return Err("draining: this gateway is about to leave".to_owned());
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
    /// A gateway without doors. Its metrics are registered in `metrics`.
    pub fn new(settings: GatewaySettings, metrics: &mut MetricsRegistry) -> Self {
        let metrics = Metrics::new(metrics);
        let stages = Stages::default();
        let grants = SharedGrants::new(settings.grants.clone());
        let registry = Registry::new(settings.links, metrics.clone());
        let router =
            Router::new(registry.clone(), grants.clone(), settings.dial_timeout, settings.max_streams);
        let ingress = Ingress::new(
            ingress_settings(&settings),
            router,
            metrics.clone(),
            stages.draining.clone(),
            stages.aborting.clone(),
        );
        // Links are counted by the registry; a few more connections may be in their handshakes.
        let edge_places = settings.links.total.saturating_add(settings.links.total / 4).saturating_add(64);
        Self {
            registry,
            grants,
            ingress,
            ingress_places: places(settings.max_ingress_connections),
            edge_places: places(edge_places),
            settings,
            metrics,
            stages,
            ingress_doors: Vec::new(),
            edge_doors: Vec::new(),
            credentials: Vec::new(),
            cluster: None,
            nodes_awaited: None,
        }
    }

    /// Opens a door for edges.
    pub fn serve_edges(&mut self, door: impl Accept, tls: ServerTls) {
        let edges = EdgeDoor::new(
            tls.clone(),
            edge_settings(&self.settings),
            self.registry.clone(),
            self.grants.clone(),
            self.metrics.clone(),
            self.stages.draining.clone(),
            self.stages.closing.clone(),
        );
        let serve = move |conn, peer| edges.clone().serve(conn, peer);
        let (places, stop) = (self.edge_places.clone(), self.stages.draining.clone());
        self.edge_doors.push(Box::pin(accept_loop(door, "edges", places, stop, serve)));
        self.credentials.push(tls);
    }

    /// Opens a door for the control plane, by mutual TLS.
    pub fn serve_ingress(&mut self, door: impl Accept, tls: ServerTls) {
        let (ingress, credentials) = (self.ingress.clone(), tls.clone());
        let serve = move |conn, peer| ingress.clone().serve_tls(credentials.clone(), conn, peer);
        let (places, stop) = (self.ingress_places.clone(), self.stages.draining.clone());
        self.ingress_doors.push(Box::pin(accept_loop(door, "ingress", places, stop, serve)));
        self.credentials.push(tls);
    }

    /// Opens a door for the control plane without TLS: a Unix socket, where the file's permissions decide who may ask.
    pub fn serve_ingress_plain(&mut self, door: impl Accept) {
        let ingress = self.ingress.clone();
        let serve = move |conn, peer| ingress.clone().serve_plain(conn, peer);
        let (places, stop) = (self.ingress_places.clone(), self.stages.draining.clone());
        self.ingress_doors.push(Box::pin(accept_loop(door, "unix ingress", places, stop, serve)));
    }

    /// Grants the nodes of a cluster what is theirs, beside what the settings grant.
    pub fn watch_cluster(&mut self, access: Access) {
        let (configured, grants) = (self.settings.grants.clone(), self.grants.clone());
        let watch = ClusterWatch::new(access, configured, grants, self.metrics.clone());
        self.cluster = Some(Box::pin(watch.run()));
        self.nodes_awaited = Some(Instant::now() + NODES_AWAITED);
    }

    /// Whether it takes new work, as long as it runs.
    pub fn readiness(&self) -> Readiness {
        Readiness {
            draining: self.stages.draining.clone(),
            grants: self.grants.clone(),
            nodes_awaited: self.nodes_awaited,
        }
    }

    /// Serves until `shutdown`, then drains and returns; see the module's text.
    ///
    /// Dropping the future ends everything at once: streams are reset, links are dropped.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { settings, stages, ingress_doors, edge_doors, credentials, cluster, .. } = self;
        // A task of its own: should it fail, what it knew stays in force.
        let mut cluster = spawn_all(cluster.into_iter().collect());
        let mut ingress = spawn_all(ingress_doors);
        let mut edges = spawn_all(edge_doors);
        let reload = reload_credentials(&credentials);
        let watched = async {
            all_ended(&mut cluster).await;
            std::future::pending::<()>().await;
        };
        let serve = async {
            shutdown.cancelled().await;
            info!(timeout_s = settings.drain_timeout.as_secs(), "draining: nothing new is taken");
            stages.draining.cancel();
            if timeout(settings.drain_timeout, all_ended(&mut ingress)).await.is_err() {
                warn!("the drain timeout is over: aborting the streams that are left");
            }
            stages.aborting.cancel();
            wait_or_drop(&mut ingress, "connections of the control plane").await;
            stages.closing.cancel();
            wait_or_drop(&mut edges, "links").await;
            info!("drained");
        };
        tokio::select! {
            // The way out goes before new credentials and new nodes, which nobody needs any more.
            biased;
            () = serve => {}
            () = reload => {}
            () = watched => {}
        }
        // It may be stuck in a credential plugin, which kube runs in the task itself to renew a token.
        if timeout(LAST_WORDS, cluster.shutdown()).await.is_err() {
            warn!("the watch of the nodes did not end in time, and is left behind");
        }
    }
}

fn places(count: usize) -> Arc<Semaphore> {
    Arc::new(Semaphore::new(count.clamp(1, Semaphore::MAX_PERMITS)))
}

fn edge_settings(settings: &GatewaySettings) -> EdgeSettings {
    EdgeSettings {
        gateway_id: settings.gateway_id.clone(),
        heartbeat: settings.heartbeat,
        handshake_timeout: settings.handshake_timeout,
        drain_timeout: settings.drain_timeout,
        link: settings.link,
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
        request_seed: settings.request_seed,
    }
}

fn spawn_all(tasks: Vec<Task>) -> JoinSet<()> {
    let mut set = JoinSet::new();
    for task in tasks {
        set.spawn(task);
    }
    set
}

async fn all_ended(tasks: &mut JoinSet<()>) {
    while let Some(ended) = tasks.join_next().await {
        report_panic("a gateway's task", ended);
    }
}

/// Waits for tasks that were told to end; those that do not are dropped, which ends what they own.
async fn wait_or_drop(tasks: &mut JoinSet<()>, what: &'static str) {
    if timeout(LAST_WORDS, all_ended(tasks)).await.is_err() {
        warn!(what, "some did not end in time, and are dropped");
        tasks.shutdown().await;
    }
}

/// Looks for new credentials, for ever. New connections use them; running ones keep what they have.
async fn reload_credentials(credentials: &[ServerTls]) {
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
        gateway.stages.draining.cancel();
        assert!(readiness.check().unwrap_err().starts_with("draining"));
    }
}
