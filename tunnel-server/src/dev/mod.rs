//! `tunnel-server dev`: everything on one machine with nothing configured, to try and to check. Throwaway certificates,
//! one gateway, two edges whose sites use the same addresses, and a real HTTPS service behind each.
//!
//! All of it listens on loopback. The two sites are two loopback addresses, 127.0.0.2 and 127.0.0.3, which is where each
//! edge thinks that its kubelet is.

mod check;
mod service;

use std::{
    io::{self, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    path::Path,
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use prometheus_client::registry::Registry;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    version::TLS13,
};
use tokio::{
    net::TcpListener,
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;
use tunnel_core::{
    Host,
    identity::NameError,
    tls::{ClientTls, Domain, Files, ServerTls, TlsError},
};
use tunnel_edge::{
    Agent, config as edge,
    daemon::signal::Signals,
    metrics::Metrics,
    network::SystemNetwork,
    policy::{Policy, Rule},
    status::AgentStatus,
};

use self::check::Rig;
use crate::{
    gateway::{Gateway, GatewaySettings},
    grants::{Grants, Identifier},
    pki::{
        AltName, Authority, Issued, PkiError, Profile, Validity,
        files::{self, FilesError, Init},
    },
};

const GATEWAY: &str = "gateway-dev";
const NODES: [&str; 2] = ["edge-a", "edge-b"];
/// Where each edge finds its node.
const SITES: [Ipv4Addr; 2] = [Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 0, 0, 3)];
/// What both nodes say that their address is, as happens where sites are built alike.
const SHARED_ADDRESS: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 5);
/// The CA of the services, in the folder of the certificates.
const SERVICE_CA: &str = "service-ca.crt";
/// A port that the edges may dial and where nothing listens.
const CLOSED_PORT: u16 = 1;
/// How often a port is drawn until it is free at both sites.
const PORT_ATTEMPTS: usize = 16;
/// Both edges must be linked within this time.
const START_TIMEOUT: Duration = Duration::from_secs(20);
/// Certificates of a playground need not last.
const VALID: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why `dev` does not start.
#[derive(Debug, thiserror::Error)]
pub enum DevError {
    /// Files, sockets or the runtime.
    #[error("{what}: {error}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why it failed.
        error: io::Error,
    },
    /// Certificates could not be made.
    #[error(transparent)]
    Pki(#[from] PkiError),
    /// Certificates could not be written.
    #[error(transparent)]
    Files(#[from] FilesError),
    /// Certificates could not be used.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The service's certificate could not be used.
    #[error("the service's certificate cannot be used: {0}")]
    Service(String),
    /// A name is none.
    #[error(transparent)]
    Name(#[from] NameError),
    /// The edges found no way to the gateway.
    #[error("the edges were not linked within {} s: {reason}", START_TIMEOUT.as_secs())]
    NotLinked {
        /// What an edge says.
        reason: String,
    },
}

fn failed(what: &'static str) -> impl FnOnce(io::Error) -> DevError {
    move |error| DevError::Io { what, error }
}

/// Runs until Ctrl-C, or makes the checks and returns. The exit code is 1 if a check failed.
///
/// Blocks.
pub fn run(check: bool) -> Result<ExitCode, DevError> {
    let runtime = tokio::runtime::Runtime::new().map_err(failed("cannot start the runtime"))?;
    runtime.block_on(serve(check))
}

async fn serve(check: bool) -> Result<ExitCode, DevError> {
    // Caught before there is anything to clean up.
    let mut signals = Signals::install().map_err(failed("cannot wait for signals"))?;
    let folder = tempfile::Builder::new().prefix("edge-tunnel-dev-").tempdir();
    let folder = folder.map_err(failed("cannot make a temporary folder"))?;
    write_pki(folder.path())?;
    let shutdown = CancellationToken::new();
    // The services never end by themselves; dropping their set ends them. Gateway and edges drain.
    let (mut services, mut tunnel) = (JoinSet::new(), JoinSet::new());
    let service = Service::start(folder.path(), &mut services).await?;
    let edge_door =
        TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.map_err(failed("cannot listen for edges"))?;
    let ingress_door = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .map_err(failed("cannot listen for the control plane"))?;
    let edges_at = edge_door.local_addr().map_err(failed("cannot listen for edges"))?;
    let ingress = ingress_door.local_addr().map_err(failed("cannot listen for the control plane"))?;
    let gateway = gateway(folder.path(), edge_door, ingress_door)?;
    tunnel.spawn(gateway.run(shutdown.clone()));
    let mut statuses = Vec::new();
    for (node, site) in NODES.into_iter().zip(SITES) {
        let agent = edge(folder.path(), node, site, edges_at, &service)?;
        statuses.push(agent.status());
        tunnel.spawn(agent.run(shutdown.clone()));
    }
    wait_until_linked(&statuses).await?;
    let rig = Rig {
        ingress,
        control_plane: ClientTls::load(
            Domain::ControlPlane,
            files(folder.path(), "control-plane", "client"),
        )?,
        service: service.client.clone(),
        nodes: NODES,
        shared_address: SHARED_ADDRESS,
        https_port: service.https_port,
        echo_port: service.echo_port,
    };
    let code =
        if check { report(&rig).await } else { wait_for_signal(&rig, folder.path(), &mut signals).await };
    shutdown.cancel();
    let mut all_well = true;
    while let Some(ended) = tunnel.join_next().await {
        all_well &= matches!(ended, Ok(Ok(())));
    }
    if all_well { code } else { Ok(ExitCode::FAILURE) }
}

/// Makes every check, a line each, and the sum.
async fn report(rig: &Rig) -> Result<ExitCode, DevError> {
    let (mut passed, mut failed) = (0, 0);
    rig.check_all(|name, result| match result {
        Ok(what) => {
            passed += 1;
            say(&format!("ok      {name}: {what}"));
        }
        Err(problem) => {
            failed += 1;
            say(&format!("FAILED  {name}: {problem}"));
        }
    })
    .await;
    say(&format!("\n{passed} passed, {failed} failed"));
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

async fn wait_for_signal(rig: &Rig, folder: &Path, signals: &mut Signals) -> Result<ExitCode, DevError> {
    let Rig { ingress, https_port, .. } = rig;
    let side = folder.join("control-plane").display().to_string();
    let ca = folder.join(SERVICE_CA).display().to_string();
    say(&format!(
        "A gateway and two edges are up. Ask for {0} or {1}, whose sites use the same addresses:

  curl --proxy https://{ingress} --proxy-cacert {side}/ca.crt --proxy-cert {side}/client.crt --proxy-key {side}/client.key \\
       --cacert {ca} https://{0}:{https_port}/

Try also /download?bytes=1000000, https://{SHARED_ADDRESS}:{https_port}/ (both nodes have that address) or a node that does
not exist; curl shows the gateway's reason with -v. Ctrl-C ends it all and removes the certificates.",
        NODES[0], NODES[1]
    ));
    signals.next().await;
    Ok(ExitCode::SUCCESS)
}

/// To standard output, which is where the answer of a command belongs. A closed pipe is nobody's concern.
fn say(text: &str) {
    let _ = writeln!(io::stdout(), "{text}");
}

async fn wait_until_linked(statuses: &[AgentStatus]) -> Result<(), DevError> {
    let linked = async {
        while statuses.iter().any(|status| status.ready().is_err()) {
            sleep(Duration::from_millis(10)).await;
        }
    };
    if timeout(START_TIMEOUT, linked).await.is_ok() {
        return Ok(());
    }
    let reason = statuses.iter().find_map(|status| status.ready().err()).unwrap_or_default();
    Err(DevError::NotLinked { reason })
}

/// Writes what `pki init` and `pki issue edge` would.
fn write_pki(folder: &Path) -> Result<(), DevError> {
    let validity = Validity::lasting(VALID);
    let init = Init {
        gateway: GATEWAY.parse()?,
        names: vec![AltName::Ip(IpAddr::V4(Ipv4Addr::LOCALHOST)), AltName::Dns("localhost".to_owned())],
        client: "dev".to_owned(),
        validity,
        ca_validity: validity,
    };
    files::init(folder, &init)?;
    for node in NODES {
        files::issue(folder, Domain::Edge, &Profile::Edge { node: node.parse()? }, node, validity, None)?;
    }
    Ok(())
}

fn files(folder: &Path, side: &str, name: &str) -> Files {
    let side = folder.join(side);
    Files {
        cert: side.join(format!("{name}.crt")),
        key: side.join(format!("{name}.key")),
        ca: side.join("ca.crt"),
    }
}

fn gateway(folder: &Path, edges: TcpListener, ingress: TcpListener) -> Result<Gateway, DevError> {
    let shared: Host = Host::Ip(IpAddr::V4(SHARED_ADDRESS));
    let mut grants = Vec::new();
    for node in NODES {
        grants.push((node.parse()?, Identifier::Host(shared.clone())));
    }
    let settings = GatewaySettings {
        grants: Grants::from_iter(grants),
        heartbeat: Duration::from_secs(2),
        drain_timeout: Duration::from_secs(1),
        request_seed: rand::random(),
        ..GatewaySettings::new(GATEWAY.parse()?)
    };
    let mut gateway = Gateway::new(settings, &mut Registry::default());
    gateway.serve_edges(edges, ServerTls::load(Domain::Edge, files(folder, "edge", "gateway"))?);
    let tls = ServerTls::load(Domain::ControlPlane, files(folder, "control-plane", "gateway"))?;
    gateway.serve_ingress(ingress, tls);
    Ok(gateway)
}

fn edge(
    folder: &Path,
    node: &str,
    site: Ipv4Addr,
    gateway: SocketAddr,
    service: &Service,
) -> Result<Agent<SystemNetwork>, DevError> {
    let credentials = files(folder, "edge", node);
    let tls = ClientTls::load(Domain::Edge, credentials.clone())?;
    let ports = [service.https_port, service.echo_port, CLOSED_PORT];
    let config = edge::Config {
        policy: Policy::new(ports.map(Rule::node_port).into(), site.into()),
        drain_timeout: Duration::from_secs(1),
        ..edge::Config::new(node.parse()?, vec![gateway.into()], credentials)
    };
    Ok(Agent::new(config, tls, SystemNetwork, rand::random(), Metrics::new(&mut Registry::default())))
}

/// What stands behind each edge: the same ports at each site, as kubelets have.
struct Service {
    https_port: u16,
    echo_port: u16,
    /// Trusts it.
    client: Arc<ClientConfig>,
}

impl Service {
    async fn start(folder: &Path, tasks: &mut JoinSet<()>) -> Result<Self, DevError> {
        // Neither of the three sides: what runs inside the tunnel has a CA of its own, as a kubelet has.
        let authority = Authority::new(Domain::ControlPlane, Validity::lasting(VALID))?;
        std::fs::write(folder.join(SERVICE_CA), authority.cert_pem())
            .map_err(failed("cannot write a certificate"))?;
        let (https, https_port) = listen_at_both_sites().await?;
        let (echo, echo_port) = listen_at_both_sites().await?;
        for ((node, https), echo) in NODES.into_iter().zip(https).zip(echo) {
            let tls = service_tls(&authority, node)?;
            tasks.spawn(async move { drop(service::serve_https(https, tls, node.into()).await) });
            tasks.spawn(async move { drop(service::serve_echo(echo).await) });
        }
        Ok(Self { https_port, echo_port, client: trusting(&authority)? })
    }
}

/// One port that is free at both sites.
async fn listen_at_both_sites() -> Result<([TcpListener; 2], u16), DevError> {
    let wrong = failed("cannot listen at both 127.0.0.2 and 127.0.0.3");
    let mut last = io::Error::from(io::ErrorKind::AddrInUse);
    for _ in 0..PORT_ATTEMPTS {
        match listen_once().await {
            Ok(found) => return Ok(found),
            Err(error) => last = error,
        }
    }
    Err(wrong(last))
}

async fn listen_once() -> io::Result<([TcpListener; 2], u16)> {
    let first = TcpListener::bind((SITES[0], 0)).await?;
    let port = first.local_addr()?.port();
    Ok(([first, TcpListener::bind((SITES[1], port)).await?], port))
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(rustls::crypto::ring::default_provider())
}

#[allow(clippy::needless_pass_by_value, reason = "for map_err")]
fn unusable(error: impl ToString) -> DevError {
    DevError::Service(error.to_string())
}

/// A server certificate for the node's name and the address that it shares with the other one.
fn service_tls(authority: &Authority, node: &str) -> Result<TlsAcceptor, DevError> {
    let names = vec![AltName::Dns(node.to_owned()), AltName::Ip(IpAddr::V4(SHARED_ADDRESS))];
    let profile = Profile::Gateway { name: node.parse()?, names };
    let Issued { cert_pem, key_pem } = authority.issue(&profile, Validity::lasting(VALID))?;
    let cert = CertificateDer::from_pem_slice(cert_pem.as_bytes()).map_err(unusable)?;
    let key = PrivateKeyDer::from_pem_slice(key_pem.as_bytes()).map_err(unusable)?;
    let config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .with_no_client_auth()
        .with_single_cert(vec![cert], key)
        .map_err(unusable)?;
    Ok(TlsAcceptor::from(Arc::new(config)))
}

fn trusting(authority: &Authority) -> Result<Arc<ClientConfig>, DevError> {
    let mut roots = RootCertStore::empty();
    let ca = CertificateDer::from_pem_slice(authority.cert_pem().as_bytes()).map_err(unusable)?;
    roots.add(ca).map_err(unusable)?;
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(unusable)?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Arc::new(config))
}
