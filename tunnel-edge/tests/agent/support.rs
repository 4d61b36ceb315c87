//! What the tests of an agent need around it: a throwaway PKI, a gateway that is one raw link, an echo target.

use std::{
    fs, io,
    net::SocketAddr,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::{Duration, SystemTime},
};

use prometheus_client::registry::Registry;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tempfile::TempDir;
use tokio::{net::TcpListener, task::JoinHandle, time::timeout};
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tunnel_core::{
    Link, LinkConfig, LinkError, LinkEvent, LinkHandle, OpenRequest, PendingLink, ReadAhead, Socket,
    Timeouts,
    proto::messages::{Gateway as Hint, Hello, Welcome},
    tls::{ClientTls, Domain, Files, ServerTls},
};
use tunnel_edge::{
    Agent,
    config::{Backoff, Config, ProxyChoice},
    daemon::tasks::Failure,
    daemon::{
        log::{LogConfig, LogFilter, LogFormat},
        settings::Parse,
    },
    metrics::Metrics,
    network::{Network, SystemNetwork},
    policy::Policy,
    status::AgentStatus,
};

/// Far longer than anything here takes.
pub(crate) const LIMIT: Duration = Duration::from_secs(20);

/// Waits until `condition` holds.
pub(crate) async fn until(what: &str, mut condition: impl FnMut() -> bool) {
    let poll = async {
        while !condition() {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    };
    timeout(LIMIT, poll).await.unwrap_or_else(|_| panic!("waited in vain for: {what}"));
}

/// What this thread logs, and so the agents of its test.
#[derive(Clone, Default)]
pub(crate) struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// The log of this thread goes here until the guard is dropped.
    pub(crate) fn capture(&self) -> tracing::subscriber::DefaultGuard {
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt().with_ansi(false).with_writer(move || log.clone()).finish();
        tracing::subscriber::set_default(subscriber)
    }

    /// Lines that hold all of these texts.
    pub(crate) fn count(&self, texts: &[&str]) -> usize {
        let log = String::from_utf8(self.0.lock().unwrap().clone()).unwrap();
        log.lines().filter(|line| texts.iter().all(|text| line.contains(text))).count()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().write(bytes)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A CA and the certificates that it has issued, in a directory that goes with it.
pub(crate) struct Pki {
    directory: TempDir,
    issuer: Issuer<'static, KeyPair>,
}

impl Pki {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::default();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "test CA");
        fs::write(directory.path().join("ca"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { directory, issuer: Issuer::new(params, key) }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn issue(
        &self,
        name: &str,
        mut params: CertificateParams,
        common_name: &str,
        organization: &str,
    ) -> Files {
        params.distinguished_name.push(DnType::CommonName, common_name);
        params.distinguished_name.push(DnType::OrganizationName, organization);
        let key = KeyPair::generate().unwrap();
        let cert = params.signed_by(&key, &self.issuer).unwrap();
        let (cert_path, key_path) = (self.path(&format!("{name}.crt")), self.path(&format!("{name}.key")));
        fs::write(&cert_path, cert.pem()).unwrap();
        fs::write(&key_path, key.serialize_pem()).unwrap();
        Files { cert: cert_path, key: key_path, ca: self.path("ca") }
    }

    pub(crate) fn node(&self, node: &str) -> Files {
        self.issue(node, CertificateParams::default(), &format!("system:node:{node}"), "system:nodes")
    }

    pub(crate) fn gateway(&self) -> Files {
        let params = CertificateParams::new(vec!["127.0.0.1".to_owned(), "localhost".to_owned()]).unwrap();
        self.issue("gateway", params, "gateway", "test")
    }

    /// A node's certificate, which expires after this time, and its key, as a kubelet has them in one file.
    pub(crate) fn kubelet_pem(&self, node: &str, expires_in: Duration) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("system:node:{node}"));
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
        let now = SystemTime::now();
        (params.not_before, params.not_after) =
            ((now - Duration::from_secs(3600)).into(), (now + expires_in).into());
        let key = KeyPair::generate().unwrap();
        params.signed_by(&key, &self.issuer).unwrap().pem() + &key.serialize_pem()
    }

    /// Puts another file in the place of the node's credentials, as a kubelet does: a link is turned to it at once.
    pub(crate) fn rotate(&self, pem: &str) -> Files {
        let files = fs::read_dir(self.directory.path()).unwrap().count();
        let (new, link) = (self.path(&format!("kubelet-client-{files}.pem")), self.path("new-link"));
        let current = self.path("kubelet-client-current.pem");
        fs::write(&new, pem).unwrap();
        symlink(&new, &link).unwrap();
        fs::rename(link, &current).unwrap();
        Files { cert: current.clone(), key: current, ca: self.path("ca") }
    }

    pub(crate) fn ca(&self) -> &Path {
        self.directory.path()
    }
}

/// A gateway's edge port. It takes one link at a time, when it is asked to.
pub(crate) struct Gateway {
    listener: TcpListener,
    tls: ServerTls,
    pub(crate) link: LinkConfig,
    /// What its welcomes say.
    pub(crate) id: String,
    pub(crate) hints: Vec<Hint>,
}

/// An edge that has said hello.
pub(crate) struct Pending {
    pub(crate) link: PendingLink,
    certificate: Vec<u8>,
}

impl Gateway {
    pub(crate) async fn bind(files: Files) -> Self {
        Self::on(TcpListener::bind("127.0.0.1:0").await.unwrap(), files)
    }

    pub(crate) fn on(listener: TcpListener, files: Files) -> Self {
        let tls = ServerTls::load(Domain::Edge, files).unwrap();
        Self { listener, tls, link: LinkConfig::default(), id: String::new(), hints: Vec::new() }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.listener.local_addr().unwrap()
    }

    /// How other gateways speak of it.
    pub(crate) fn hint(&self) -> Hint {
        Hint { id: self.id.clone(), edge_address: self.address().to_string(), draining: false }
    }

    /// The next link that comes up.
    pub(crate) async fn accept(&self) -> GatewayLink {
        self.try_accept().await.unwrap()
    }

    /// The next connection: a link, or why TLS failed.
    pub(crate) async fn try_accept(&self) -> io::Result<GatewayLink> {
        Ok(self.welcome(self.pending().await?))
    }

    /// The next connection, as far as its hello, or why TLS failed.
    pub(crate) async fn pending(&self) -> io::Result<Pending> {
        let accept = async {
            let (stream, _) = self.listener.accept().await.unwrap();
            let stream = self.tls.acceptor().accept(ReadAhead::new(stream)).await?;
            let certificate = stream.get_ref().1.peer_certificates().unwrap()[0].to_vec();
            Ok(Pending { link: Link::accept(stream, self.link.clone()).await.unwrap(), certificate })
        };
        timeout(LIMIT, accept).await.expect("no edge came")
    }

    pub(crate) fn welcome(&self, pending: Pending) -> GatewayLink {
        self.welcome_as(&self.id, pending)
    }

    /// As one of several gateways behind this address.
    pub(crate) fn welcome_as(&self, id: &str, pending: Pending) -> GatewayLink {
        let Pending { link, certificate } = pending;
        let hello = link.hello().clone();
        let welcome = Welcome {
            version: 1,
            heartbeat_ms: 1000,
            granted: granted(&hello.node_claim),
            gateway_id: id.to_owned(),
            gateways: self.hints.clone(),
            ..Welcome::default()
        };
        GatewayLink::new(link.welcome(welcome).unwrap(), hello, certificate)
    }

    /// One connection that gets as far as TLS, which may fail.
    pub(crate) async fn handshake_only(&self) -> io::Result<()> {
        let (stream, _) = self.listener.accept().await?;
        self.tls.acceptor().accept(ReadAhead::new(stream)).await.map(drop)
    }
}

pub(crate) fn granted(node: &str) -> Vec<String> {
    vec![node.to_owned(), "192.168.7.7".to_owned(), "10.0.0.0/8".to_owned()]
}

/// The gateway's end of a link. Dropping it cuts the link.
pub(crate) struct GatewayLink {
    pub(crate) handle: LinkHandle,
    pub(crate) hello: Hello,
    /// What the edge showed.
    pub(crate) certificate: Vec<u8>,
    pub(crate) ended: AbortOnDropHandle<LinkError>,
}

impl GatewayLink {
    fn new(mut link: Link, hello: Hello, certificate: Vec<u8>) -> Self {
        let handle = link.handle();
        let run = async move {
            loop {
                if let LinkEvent::Closed(error) = link.next().await {
                    return error;
                }
            }
        };
        Self { handle, hello, certificate, ended: AbortOnDropHandle::new(tokio::spawn(run)) }
    }
}

pub(crate) fn request(target: &str) -> OpenRequest {
    OpenRequest { target: target.to_string(), request_id: "test".to_owned(), ..OpenRequest::default() }
}

/// A target that sends back what it gets, and ends when its client does.
pub(crate) async fn echo() -> (SocketAddr, AbortOnDropHandle<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let serve = async move {
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((mut stream, _)) = listener.accept().await {
            connections.spawn(async move {
                let (mut reader, mut writer) = stream.split();
                let _ = tokio::io::copy(&mut reader, &mut writer).await;
            });
        }
    };
    (address, AbortOnDropHandle::new(tokio::spawn(serve)))
}

/// A port of loopback where nothing listens.
pub(crate) async fn closed_port() -> u16 {
    TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port()
}

pub(crate) fn config(tls: Files, gateways: &[SocketAddr], allow: &[String]) -> Config {
    Config {
        node: None,
        gateways: gateways.iter().map(|address| (*address).into()).collect(),
        redundancy: 2,
        rebalance: Duration::from_secs(3600),
        proxy: ProxyChoice::Direct,
        tls,
        server_name: None,
        policy: Policy::new(allow.iter().map(|rule| rule.parse().unwrap()).collect(), [127, 0, 0, 1].into()),
        connect_timeout: Duration::from_secs(10),
        dial_timeout: Duration::from_secs(5),
        link: LinkConfig::default(),
        timeouts: Timeouts::of("the edge"),
        backoff: Backoff {
            min: Duration::from_millis(5),
            outage_max: Duration::from_millis(50),
            max: Duration::from_millis(50),
            reset_after: Duration::from_secs(5),
        },
        drain_timeout: LIMIT,
        admin: None,
        log: LogConfig { format: LogFormat::Text, filter: LogFilter::parse("info").unwrap() },
        reload_period: Duration::from_millis(20),
    }
}

/// An agent that runs. Dropping it ends it at once.
pub(crate) struct Running {
    pub(crate) status: AgentStatus,
    pub(crate) shutdown: CancellationToken,
    pub(crate) task: JoinHandle<Result<(), Failure>>,
    registry: Registry,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Running {
    pub(crate) fn start(config: Config) -> Self {
        Self::start_on(config, SystemNetwork)
    }

    pub(crate) fn start_on(config: Config, network: impl Network<Conn = Socket>) -> Self {
        let tls = ClientTls::load(Domain::Edge, config.tls.clone()).unwrap();
        let mut registry = Registry::default();
        let metrics = Metrics::new(&mut registry);
        let agent = Agent::new(config, tls, network, 7, metrics);
        let (status, shutdown) = (agent.status(), CancellationToken::new());
        let task = tokio::spawn(agent.run(shutdown.clone()));
        Self { status, shutdown, task, registry }
    }

    /// The value of one metric, by its whole name with labels; 0 if it is not there.
    pub(crate) fn metric(&self, name: &str) -> u64 {
        let mut text = String::new();
        prometheus_client::encoding::text::encode(&mut text, &self.registry).unwrap();
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.parse().ok());
        value.unwrap_or(0)
    }

    pub(crate) fn why_not_ready(&self) -> String {
        self.status.ready().err().unwrap_or_default()
    }

    pub(crate) async fn returned(&mut self) {
        timeout(LIMIT, &mut self.task).await.expect("the agent did not return").unwrap().unwrap();
    }
}
