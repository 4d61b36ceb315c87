//! The process: credentials, listeners, metrics, admin endpoint and signals around a [`Gateway`]. Called by `main` only,
//! and by tests that want real ports.

use std::{
    fmt, io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use prometheus_client::{metrics::gauge::Gauge, registry::Registry as MetricsRegistry};
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{info, warn};
use tunnel_core::{
    LinkConfig, Timeouts,
    tls::{ClientTls, Domain, Files, ServerTls, TlsError},
};
use tunnel_edge::daemon::{
    accept, admin, descriptors,
    log::{self, LogError},
    signal::Signals,
};

use crate::{
    cluster::{Access, AccessError},
    config::{Config, Finding, PeersConfig},
    directory::etcd::{self, Etcd, EtcdConfig, EtcdError},
    edges::registry::LinkLimits,
    gateway::{Gateway, GatewaySettings, PeerSettings, WHOSE},
    listener::UnixDoor,
};

/// How long blocking work may take to end when nobody waits for it any more: a credential plugin may hang for ever.
const LAST_WORK: Duration = Duration::from_secs(1);
/// Of how many descriptors one is for a connection that has not shown yet who it is, if there are not enough.
const LEAST_FOR_STRANGERS: usize = 4;

/// Why a gateway does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// Logs cannot be set up.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The runtime or the signals are not to be had.
    #[error("the process cannot be set up: {0}")]
    Setup(io::Error),
    /// A side's credentials cannot be used.
    #[error("{group}: {error}")]
    Tls {
        /// Where they are configured.
        group: &'static str,
        /// Why not.
        error: TlsError,
    },
    /// The two sides are not kept apart.
    #[error("{0}")]
    SharedCa(String),
    /// The directory cannot be reached by what the configuration says.
    #[error("etcd: {0}")]
    Etcd(#[from] EtcdError),
    /// The cluster cannot be reached by what the configuration says.
    #[error("kubernetes.kubeconfig: {0}")]
    Cluster(#[from] AccessError),
    /// An address cannot be listened on.
    #[error("{key}: cannot listen on {address}: {error}")]
    Listen {
        /// Where it is configured.
        key: &'static str,
        /// Where it should.
        address: SocketAddr,
        /// Why not.
        error: io::Error,
    },
    /// A Unix socket cannot be listened on.
    #[error("ingress.unix: cannot listen on {}: {error}", path.display())]
    Unix {
        /// Where it should.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
}

/// Where a gateway listens, with the ports that the system chose where 0 was asked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Addresses {
    /// For edges.
    pub edges: SocketAddr,
    /// For other gateways.
    pub peers: Option<SocketAddr>,
    /// For the control plane, over TLS.
    pub ingress: Option<SocketAddr>,
    /// For the control plane, on this machine.
    pub unix: Option<PathBuf>,
    /// Health, readiness, metrics.
    pub admin: Option<SocketAddr>,
}

/// A gateway whose ports are bound. Connections wait in the kernel until it runs.
pub struct BoundGateway {
    gateway: Gateway,
    addresses: Addresses,
    admin: Option<TcpListener>,
    metrics: MetricsRegistry,
}

impl fmt::Debug for BoundGateway {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BoundGateway").field("addresses", &self.addresses).finish_non_exhaustive()
    }
}

/// Runs a gateway until SIGTERM or SIGINT, then drains; a second signal ends it at once, which is a failure.
///
/// Blocks. Every error is one of starting: once it runs, nothing but a signal ends it.
pub fn run(config: &Config) -> Result<ExitCode, StartError> {
    log::init(&config.log)?;
    let runtime = tokio::runtime::Runtime::new().map_err(StartError::Setup)?;
    let ended = runtime.block_on(serve(config));
    runtime.shutdown_timeout(LAST_WORK);
    ended
}

async fn serve(config: &Config) -> Result<ExitCode, StartError> {
    let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
    let signals = Signals::install().map_err(StartError::Setup)?;
    let bound = BoundGateway::bind(config, rand::random()).await?;
    let _signals = AbortOnDropHandle::new(tokio::spawn(signals.run(drain.clone(), stop.clone())));
    tokio::select! {
        // A second signal means now, whatever else is done.
        biased;
        () = stop.cancelled() => {
            warn!("stopped before the drain was complete; streams that still ran were cut");
            Ok(ExitCode::FAILURE)
        }
        () = bound.run(drain) => Ok(ExitCode::SUCCESS),
    }
}

impl BoundGateway {
    /// Reads all credentials, then binds all ports. `request_seed` is random, and sets the ids of the gateway's
    /// requests apart from those of others.
    pub async fn bind(config: &Config, request_seed: u32) -> Result<Self, StartError> {
        let load = |group, domain, files: &Files| {
            ServerTls::load(domain, files.clone()).map_err(|error| StartError::Tls { group, error })
        };
        let edges_tls = load("edges", Domain::Edge, &config.edges.tls)?;
        let tcp = config.ingress.tcp.as_ref();
        let ingress_tls = tcp.map(|tcp| load("ingress", Domain::ControlPlane, &tcp.tls)).transpose()?;
        let peers_tls = config.peers.as_ref().map(|peers| load_peers(&peers.tls)).transpose()?;

        if let Some(problem) = config.shared_ca() {
            return Err(StartError::SharedCa(problem));
        }
        config.cluster.as_ref().map_or(Ok(()), Access::check)?;
        let mut metrics = MetricsRegistry::default();
        let settings = settings(config, request_seed);
        let mut gateway = match &config.peers {
            None => Gateway::new(settings, &mut metrics),
            Some(peers) => among_peers(config, peers, settings, &mut metrics)?,
        };
        if let Some(access) = &config.cluster {
            gateway.watch_cluster(access.clone());
        }
        let (listener, edges) = listen("edges.listen", config.edges.listen).await?;
        gateway.serve_edges(listener, edges_tls);
        let mut peers = None;
        if let (Some(config), Some(tls)) = (&config.peers, peers_tls) {
            let (listener, address) = listen("peers.listen", config.listen).await?;
            gateway.serve_peers(listener, tls);
            peers = Some(address);
        }
        let mut ingress = None;
        if let (Some(tcp), Some(tls)) = (tcp, ingress_tls) {
            let (listener, address) = listen("ingress.listen", tcp.listen).await?;
            gateway.serve_ingress(listener, tls);
            ingress = Some(address);
        }
        let unix = config.ingress.unix.as_ref().map(|unix| (unix.path.as_path(), unix.mode));
        if let Some((path, mode)) = unix {
            gateway.serve_ingress_plain(listen_unix(path, mode)?);
        }
        let (admin, admin_address) = match config.admin {
            Some(address) => {
                listen("admin.listen", address).await.map(|(door, at)| (Some(door), Some(at)))?
            }
            None => (None, None),
        };
        let unix = unix.map(|(path, _)| path.to_owned());
        let addresses = Addresses { edges, peers, ingress, unix, admin: admin_address };
        announce(config, &addresses);
        Ok(Self { gateway, addresses, admin, metrics })
    }

    /// Where it listens.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// Serves until `shutdown`, then drains and returns. Probes are answered until the end.
    ///
    /// Dropping the future ends everything at once.
    pub async fn run(self, shutdown: CancellationToken) {
        let Self { gateway, admin, metrics, .. } = self;
        let readiness = gateway.readiness();
        let admin_stop = CancellationToken::new();
        let admin = admin.map(|listener| {
            let ready = move || readiness.check();
            AbortOnDropHandle::new(tokio::spawn(admin::serve(listener, ready, metrics, admin_stop.clone())))
        });
        gateway.run(shutdown).await;
        admin_stop.cancel();
        if let Some(admin) = admin {
            let _ = admin.await;
        }
    }
}

fn settings(config: &Config, request_seed: u32) -> GatewaySettings {
    let (edges, ingress) = (&config.edges, &config.ingress);
    let allowed_clients = ingress.tcp.iter().flat_map(|tcp| tcp.allowed_clients.iter().cloned()).collect();
    GatewaySettings {
        gateway_id: config.gateway_id.clone(),
        heartbeat: config.heartbeat,
        handshake_timeout: edges.handshake_timeout,
        link: config.link.clone(),
        links: LinkLimits { total: edges.max_links, per_node: edges.max_links_per_node },
        grants: config.grants.clone(),
        dial_timeout: ingress.dial_timeout,
        header_timeout: ingress.header_timeout,
        max_header_size: ingress.max_header_size,
        max_ingress_connections: ingress.max_connections,
        max_waiting: max_waiting(config),
        max_streams: ingress.max_streams,
        max_streams_per_connection: ingress.max_streams_per_connection,
        allowed_clients,
        drain_delay: config.drain_delay,
        drain_timeout: config.drain_timeout,
        timeouts: Timeouts::of(WHOSE),
        request_seed,
    }
}

/// How many connections may wait at each door to show who they are, so that there are descriptors for all others. Says what
/// is wrong with the limit, if it is too low for these.
fn max_waiting(config: &Config) -> usize {
    let (limit, needs) = (descriptors::raise(), config.descriptors());
    if let Some(shortage) = descriptors::shortage(limit, &needs) {
        warn!("{shortage}");
    }
    let left = descriptors::left(limit, &needs).max(limit / LEAST_FOR_STRANGERS);
    left / config.guarded_doors()
}

/// A gateway that is one of several.
fn among_peers(
    config: &Config,
    peers: &PeersConfig,
    settings: GatewaySettings,
    metrics: &mut MetricsRegistry,
) -> Result<Gateway, StartError> {
    let instance: u128 = rand::random();
    let peer_settings = PeerSettings {
        edge_address: config.edges.address.clone(),
        heartbeat: peers.heartbeat,
        link: LinkConfig { handshake_timeout: config.edges.handshake_timeout, ..peers.link.clone() },
        ..PeerSettings::new(instance)
    };
    match &peers.finding {
        Finding::List(list) => Ok(Gateway::among_peers(settings, peer_settings, list.clone(), metrics)),
        Finding::Etcd(etcd, own) => {
            let own = etcd::Own {
                gateway: config.gateway_id.clone(),
                peer_address: own.address.clone(),
                server_name: own.server_name.clone(),
            };
            let in_touch = Gauge::default();
            metrics.register(
                "tunnel_server_etcd_in_touch",
                "1 while the directory in etcd is followed, 0 while it cannot be",
                in_touch.clone(),
            );
            let etcd = Etcd::new(EtcdConfig::clone(etcd), own, in_touch, rand::random())?;
            Ok(Gateway::by_etcd(settings, peer_settings, etcd, metrics))
        }
    }
}

/// A gateway is a server to its peers, and a client of them.
fn load_peers(files: &Files) -> Result<(ServerTls, ClientTls), StartError> {
    let failed = |error| StartError::Tls { group: "peers", error };
    let server = ServerTls::load(Domain::Peer, files.clone()).map_err(failed)?;
    Ok((server, ClientTls::load(Domain::Peer, files.clone()).map_err(failed)?))
}

async fn listen(key: &'static str, address: SocketAddr) -> Result<(TcpListener, SocketAddr), StartError> {
    let bound = async {
        let listener = accept::listen(address)?;
        let bound = listener.local_addr()?;
        Ok((listener, bound))
    };
    bound.await.map_err(|error| StartError::Listen { key, address, error })
}

fn listen_unix(path: &Path, mode: u32) -> Result<UnixDoor, StartError> {
    UnixDoor::bind(path, mode).map_err(|error| StartError::Unix { path: path.to_owned(), error })
}

/// What a person wants to know first, in the first line of the log.
fn announce(config: &Config, addresses: &Addresses) {
    let version = env!("CARGO_PKG_VERSION");
    let Addresses { edges, peers, ingress, unix, admin } = addresses;
    let peers = peers.map(|at| at.to_string());
    let (ingress, admin) = (ingress.map(|at| at.to_string()), admin.map(|at| format!("http://{at}")));
    let unix = unix.as_ref().map(|path| path.display().to_string());
    info!(version, gateway = %config.gateway_id, %edges, ingress, unix, peers, admin, "tunnel-server starts");
}
