//! The process: credentials, listeners and metrics around a [`Gateway`], within the frame that both programs have. Called
//! by `main` only.

use std::{
    io,
    net::SocketAddr,
    path::{Path, PathBuf},
    process::ExitCode,
};

use prometheus_client::{metrics::gauge::Gauge, registry::Registry as MetricsRegistry};
use tokio::{net::TcpListener, runtime};
use tracing::{info, warn};
use tunnel_core::{
    LinkConfig,
    tls::{ClientTls, Domain, Files, ServerTls, TlsError},
};
use tunnel_edge::daemon::{
    accept, descriptors,
    process::{self, AdminError, Frame, FrameError, Process},
    tasks::Failure,
};

use crate::{
    cluster::{Access, AccessError},
    config::{Config, Finding, PeersConfig},
    directory::etcd::{self, Etcd, EtcdConfig, EtcdError},
    edges::registry::LinkLimits,
    gateway::{Gateway, GatewaySettings, PeerSettings},
    listener::UnixDoor,
};

/// Of how many descriptors one is for a connection that has not shown yet who it is, if there are not enough.
const LEAST_FOR_STRANGERS: usize = 4;

/// Why a gateway does not start.
#[derive(Debug, thiserror::Error)]
enum StartError {
    /// The admin endpoint cannot listen.
    #[error(transparent)]
    Admin(#[from] AdminError),
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
struct Addresses {
    edges: SocketAddr,
    peers: Option<SocketAddr>,
    ingress: Option<SocketAddr>,
    unix: Option<PathBuf>,
    admin: Option<SocketAddr>,
}

/// What each side proves itself by.
struct Credentials {
    edges: ServerTls,
    ingress: Option<ServerTls>,
    peers: Option<(ServerTls, ClientTls)>,
}

/// Runs a gateway until SIGTERM or SIGINT, then drains; a second signal ends it at once, which is a failure.
///
/// Blocks. Once there is a log, what goes wrong is in the log, and the exit code says that something did.
pub fn run(config: &Config) -> Result<ExitCode, FrameError> {
    let drain = config.drain_delay.saturating_add(config.drain_timeout);
    let frame = Frame { metrics: "tunnel_server", log: config.log.clone(), drain };
    let mut runtime = runtime::Builder::new_multi_thread();
    process::run(&frame, &mut runtime, async |process| serve(config, process).await)
}

async fn serve(config: &Config, process: &mut Process<'_>) -> Result<Result<(), Failure>, StartError> {
    let mut metrics = MetricsRegistry::default();
    let settings = settings(config, rand::random());
    let mut gateway = match &config.peers {
        None => Gateway::new(settings, &mut metrics),
        Some(peers) => among_peers(config, peers, settings, &mut metrics),
    };
    if let Some(access) = &config.cluster {
        gateway.watch_cluster(access.clone());
    }
    let readiness = gateway.readiness();
    let panics = gateway.panics().clone();
    let admin = process.serve_admin(config.admin, metrics, panics, move || readiness.check())?;
    let loaded = process.credentials(&config.credential_files(), || Credentials::load(config)).await?;
    let Some(credentials) = loaded else { return Ok(Ok(())) };
    let addresses = Addresses { admin, ..open_doors(config, credentials, &mut gateway).await? };
    announce(config, &addresses);
    process.works();
    Ok(gateway.run(process.drain.clone()).await)
}

impl Credentials {
    /// Reads all that the configuration names, and makes sure that it can be used.
    fn load(config: &Config) -> Result<Self, StartError> {
        let load = |group, domain, files: &Files| {
            ServerTls::load(domain, files.clone()).map_err(|error| StartError::Tls { group, error })
        };
        let tcp = config.ingress.tcp.as_ref();
        let credentials = Self {
            edges: load("edges", Domain::Edge, &config.edges.tls)?,
            ingress: tcp.map(|tcp| load("ingress", Domain::ControlPlane, &tcp.tls)).transpose()?,
            peers: config.peers.as_ref().map(|peers| load_peers(&peers.tls)).transpose()?,
        };
        if let Some(Finding::Etcd(etcd, _)) = config.peers.as_ref().map(|peers| &peers.finding) {
            etcd.check_files()?;
        }
        if let Some(problem) = config.shared_ca() {
            return Err(StartError::SharedCa(problem));
        }
        config.cluster.as_ref().map_or(Ok(()), Access::check)?;
        Ok(credentials)
    }
}

/// Binds all ports but the admin endpoint's. Connections wait in the kernel until the gateway runs.
async fn open_doors(
    config: &Config,
    credentials: Credentials,
    gateway: &mut Gateway,
) -> Result<Addresses, StartError> {
    let Credentials { edges: edges_tls, ingress: ingress_tls, peers: peers_tls } = credentials;
    let (listener, edges) = listen("edges.listen", config.edges.listen).await?;
    gateway.serve_edges(listener, edges_tls);
    let mut peers = None;
    if let (Some(config), Some(tls)) = (&config.peers, peers_tls) {
        let (listener, address) = listen("peers.listen", config.listen).await?;
        gateway.serve_peers(listener, tls);
        peers = Some(address);
    }
    let mut ingress = None;
    if let (Some(tcp), Some(tls)) = (&config.ingress.tcp, ingress_tls) {
        let (listener, address) = listen("ingress.listen", tcp.listen).await?;
        gateway.serve_ingress(listener, tls);
        ingress = Some(address);
    }
    let unix = config.ingress.unix.as_ref();
    if let Some(unix) = unix {
        gateway.serve_ingress_plain(listen_unix(&unix.path, unix.mode)?);
    }
    let unix = unix.map(|unix| unix.path.clone());
    Ok(Addresses { edges, peers, ingress, unix, admin: None })
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
        max_streams_per_caller: ingress.max_streams_per_caller,
        max_streams_per_connection: ingress.max_streams_per_connection,
        allowed_clients,
        drain_delay: config.drain_delay,
        drain_timeout: config.drain_timeout,
        timeouts: config.timeouts,
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
) -> Gateway {
    let instance: u128 = rand::random();
    let peer_settings = PeerSettings {
        edge_address: config.edges.address.clone(),
        heartbeat: peers.heartbeat,
        link: LinkConfig { handshake_timeout: config.edges.handshake_timeout, ..peers.link.clone() },
        ..PeerSettings::new(instance)
    };
    match &peers.finding {
        Finding::List(list) => Gateway::among_peers(settings, peer_settings, list.clone(), metrics),
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
            let etcd = Etcd::new(EtcdConfig::clone(etcd), own, in_touch, rand::random());
            Gateway::by_etcd(settings, peer_settings, etcd, metrics)
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
