//! The real gateway and the real edges, set up for tests, over whatever network the test has.

use std::{
    net::{IpAddr, Ipv4Addr},
    path::Path,
    sync::{Arc, LazyLock, Mutex},
    time::Duration,
};

use prometheus_client::{encoding::text::encode, registry::Registry};
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tunnel_core::{
    Host, NodeId, Target,
    tls::{ClientTls, Domain, Files},
};
use tunnel_edge::{
    Agent,
    config::{Backoff, Config},
    metrics::Metrics,
    network::Network,
};
use tunnel_server::{
    Gateway, GatewaySettings, Grants, Identifier, Member, PeerSettings,
    pki::{
        AltName, Profile, Validity,
        files::{Init, init, issue},
    },
};

use crate::plan::NODES;

/// Where gateways take edges.
pub const EDGE_PORT: u16 = 8443;
/// Where gateways take the control plane.
pub const INGRESS_PORT: u16 = 8131;
/// Where gateways take one another.
pub const PEER_PORT: u16 = 8134;
/// Where a simulated gateway takes it as on a Unix socket.
pub const UNIX_PORT: u16 = 8132;
/// The kubelet's port on every node.
pub const KUBELET_PORT: u16 = 10250;
/// A name that every gateway's certificates are for.
pub const GATEWAY: &str = "gateway";
/// An address that both nodes hold.
pub const SHARED_ADDRESS: &str = "10.0.0.5";

const VALID: Duration = Duration::from_secs(24 * 3600);

/// The folders of test processes are named by this, their process id and a random end.
const PREFIX: &str = "tunnel-tests-";

/// Removes what earlier test processes have left: a static is never dropped, so none can remove its own.
fn sweep() {
    for entry in std::fs::read_dir(std::env::temp_dir()).unwrap().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let owner = name.strip_prefix(PREFIX).and_then(|rest| rest.split_once('-')).map(|(id, _)| id);
        if owner.is_some_and(|id| id.parse::<u32>().is_ok() && !Path::new("/proc").join(id).exists()) {
            // Another test process may have been faster.
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Every certificate of the tests, as `pki init` and `pki issue` write them. Made once for a process.
pub fn pki() -> &'static Path {
    static FOLDER: LazyLock<TempDir> = LazyLock::new(|| {
        sweep();
        let folder = TempDir::with_prefix(format!("{PREFIX}{}-", std::process::id())).unwrap();
        let validity = Validity::lasting(VALID);
        let names = ["gateway", "localhost"].map(|name| AltName::Dns(name.to_owned()));
        let addresses = [AltName::Ip(IpAddr::V4(Ipv4Addr::LOCALHOST))];
        init(
            folder.path(),
            &Init {
                gateway: GATEWAY.parse().unwrap(),
                names: names.into_iter().chain(addresses).collect(),
                client: "control-plane".to_owned(),
                validity,
                ca_validity: validity,
            },
        )
        .unwrap();
        for node in NODES {
            let profile = Profile::Edge { node: node.parse().unwrap() };
            issue(folder.path(), Domain::Edge, &profile, node, validity, None).unwrap();
        }
        folder
    });
    FOLDER.path()
}

/// Credentials by side and name, as `pki` lays them out.
pub fn files(side: Domain, name: &str) -> Files {
    let folder = pki().join(side.to_string());
    Files {
        cert: folder.join(format!("{name}.crt")),
        key: folder.join(format!("{name}.key")),
        ca: folder.join("ca.crt"),
    }
}

/// Looks into the gateway that runs now, also after it was killed and started again.
#[derive(Clone, Default)]
pub struct GatewayProbe(Arc<Mutex<Registry>>);

impl GatewayProbe {
    /// All of `/metrics`.
    pub fn metrics(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.0.lock().unwrap()).unwrap();
        text
    }

    /// The sum of a metric over all its labels that contain `labels`; 0 if there is none.
    pub fn sum(&self, name: &str, labels: &str) -> f64 {
        sum(&self.metrics(), name, labels)
    }

    fn begin_life(&self, build: impl FnOnce(&mut Registry) -> Gateway) -> Gateway {
        let mut registry = Registry::default();
        let gateway = build(&mut registry);
        *self.0.lock().unwrap() = registry;
        gateway
    }

    /// Links to other gateways that are up.
    pub fn peer_links(&self) -> usize {
        self.sum("tunnel_server_peer_links", "") as usize
    }

    /// Streams of other gateways that are being relayed.
    pub fn forwarded_streams(&self) -> usize {
        self.sum("tunnel_server_forwarded_active", "") as usize
    }

    /// Connections of the control plane.
    pub fn ingress_connections(&self) -> usize {
        self.sum("tunnel_server_ingress_connections", "") as usize
    }

    /// Streams that are being relayed.
    pub fn active_streams(&self) -> usize {
        self.sum("tunnel_server_streams_active", "") as usize
    }

    /// Links that are up.
    pub fn links(&self) -> usize {
        self.sum("tunnel_server_links", "") as usize
    }
}

fn sum(metrics: &str, name: &str, labels: &str) -> f64 {
    let values = metrics.lines().filter(|line| {
        line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' '])) && line.contains(labels)
    });
    values.filter_map(|line| line.rsplit_once(' ')?.1.parse::<f64>().ok()).sum()
}

/// Looks into an edge, over all its lives: it may be stopped or killed and started again.
#[derive(Clone, Default)]
pub struct EdgeProbe(Arc<Mutex<Vec<Registry>>>);

impl EdgeProbe {
    /// The sum of a metric over all its labels that contain `labels`, and over all lives.
    pub fn sum(&self, name: &str, labels: &str) -> f64 {
        let lives = self.0.lock().unwrap();
        let life = |registry| {
            let mut text = String::new();
            encode(&mut text, registry).unwrap();
            sum(&text, name, labels)
        };
        lives.iter().map(life).sum()
    }

    /// Streams that are being relayed.
    pub fn active_streams(&self) -> usize {
        self.sum("tunnel_edge_streams_active", "") as usize
    }

    /// Streams that have ended cleanly, as the edge says.
    pub fn ended_cleanly(&self) -> usize {
        self.sum("tunnel_edge_streams_ended_total", "\"clean\"") as usize
    }

    fn begin_life(&self) -> Metrics {
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        self.0.lock().unwrap().push(registry);
        metrics
    }
}

/// What a gateway of a test runs with. Both nodes are known to it and hold the same address.
pub fn settings(heartbeat: Duration, seed: u64) -> GatewaySettings {
    let grants = NODES.map(|node| {
        let shared: Host = SHARED_ADDRESS.parse().unwrap();
        (node.parse::<NodeId>().unwrap(), Identifier::Host(shared))
    });
    GatewaySettings {
        heartbeat,
        grants: Grants::from_iter(grants),
        handshake_timeout: Duration::from_secs(5),
        drain_timeout: Duration::from_secs(5),
        request_seed: seed as u32,
        ..GatewaySettings::new(GATEWAY.parse().unwrap())
    }
}

/// A gateway without doors that `probe` can look into.
pub fn gateway(heartbeat: Duration, seed: u64, probe: &GatewayProbe) -> Gateway {
    gateway_with(settings(heartbeat, seed), probe)
}

/// As [`gateway`], with other settings.
pub fn gateway_with(settings: GatewaySettings, probe: &GatewayProbe) -> Gateway {
    probe.begin_life(|registry| Gateway::new(settings, registry))
}

/// One of several gateways, without doors.
pub fn gateway_among(
    settings: GatewaySettings,
    peers: PeerSettings,
    members: Vec<Member>,
    probe: &GatewayProbe,
) -> Gateway {
    probe.begin_life(|registry| Gateway::among_peers(settings, peers, members, registry))
}

/// What an edge of a test runs with: it redials soon, since tests have no hours.
pub fn edge_config(node: &str, gateway: Target) -> Config {
    Config {
        backoff: Backoff {
            min: Duration::from_millis(200),
            outage_max: Duration::from_secs(3),
            max: Duration::from_secs(3),
            reset_after: Duration::from_secs(5),
        },
        connect_timeout: Duration::from_secs(5),
        drain_timeout: Duration::from_secs(5),
        ..Config::new(node.parse().unwrap(), vec![gateway], files(Domain::Edge, node))
    }
}

/// Runs an edge until `shutdown`.
pub async fn run_edge(config: Config, network: impl Network, seed: u64, shutdown: CancellationToken) {
    run_edge_with(config, network, seed, &EdgeProbe::default(), shutdown).await;
}

/// Runs an edge that `probe` can look into until `shutdown`.
pub async fn run_edge_with(
    config: Config,
    network: impl Network,
    seed: u64,
    probe: &EdgeProbe,
    shutdown: CancellationToken,
) {
    let tls = ClientTls::load(Domain::Edge, config.tls.clone()).unwrap();
    Agent::new(config, tls, network, seed, probe.begin_life()).run(shutdown).await.unwrap();
}

/// TLS as the control plane's client, to a gateway's ingress, for HTTP/1.1.
pub async fn control_plane_tls<C>(connection: C) -> std::io::Result<TlsStream<C>>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    control_plane_tls_for(b"http/1.1", connection).await
}

/// As above, for this application protocol.
pub async fn control_plane_tls_for<C>(protocol: &[u8], connection: C) -> std::io::Result<TlsStream<C>>
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    static TLS: LazyLock<ClientTls> = LazyLock::new(|| {
        ClientTls::load(Domain::ControlPlane, files(Domain::ControlPlane, "client")).unwrap()
    });
    let name = ServerName::try_from(GATEWAY).unwrap();
    TLS.connector_offering(&[protocol]).connect(name, connection).await
}
