//! A gateway on real sockets, its credentials, and what its edges and clients do.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use prometheus_client::{encoding::text::encode, registry::Registry};
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tunnel_core::{
    ConnectError, Link, LinkConfig, LinkEvent, PendingStream, ReadAhead, TunnelStream,
    proto::messages::{Hello, Reject, Welcome},
    tls::{ClientTls, Domain, Files, ServerTls},
};
use tunnel_edge::daemon::tasks::Failure;
use tunnel_server::{
    Gateway, GatewaySettings, Readiness, UnixDoor,
    pki::{AltName, Authority, Profile, Validity},
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
pub(crate) const CONNECT: &[u8] = b"CONNECT edge-a:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
pub(crate) const CONNECTED: &[u8] = b"HTTP/1.1 200 OK\r\n\r\n";

/// A gateway that runs, and the credentials of everyone who may want to get in.
pub(crate) struct Running {
    pub(crate) edges: SocketAddr,
    pub(crate) ingress: SocketAddr,
    pub(crate) folder: TempDir,
    pub(crate) shutdown: CancellationToken,
    pub(crate) readiness: Readiness,
    pub(crate) task: JoinHandle<Result<(), Failure>>,
    edge_ca: Authority,
    metrics: Registry,
}

fn hour() -> Validity {
    Validity::lasting(Duration::from_secs(3600))
}

fn edge(node: &str) -> Profile {
    Profile::Edge { node: node.parse().unwrap() }
}

fn write(folder: &Path, name: &str, authority: &Authority, profile: &Profile, validity: Validity) -> Files {
    let issued = authority.issue(profile, validity).unwrap();
    let file = |kind: &str, text: &str| {
        let path = folder.join(format!("{}-{name}.{kind}", authority.domain()));
        fs::write(&path, text).unwrap();
        path
    };
    Files {
        cert: file("crt", &issued.cert_pem),
        key: file("key", &issued.key_pem),
        ca: file("ca", authority.cert_pem()),
    }
}

pub(crate) fn files(folder: &Path, domain: Domain, name: &str) -> Files {
    let file = |kind: &str| folder.join(format!("{domain}-{name}.{kind}"));
    Files { cert: file("crt"), key: file("key"), ca: file("ca") }
}

pub(crate) async fn start(change: impl FnOnce(&mut GatewaySettings)) -> Running {
    start_with(change, |_, _| {}).await
}

/// `finish` is the last to touch the gateway before it runs.
pub(crate) async fn start_with(
    change: impl FnOnce(&mut GatewaySettings),
    finish: impl FnOnce(&mut Gateway, &Path),
) -> Running {
    let folder = tempfile::tempdir().unwrap();
    let authority = |domain| Authority::new(domain, hour()).unwrap();
    let (edge_ca, client_ca) = (authority(Domain::Edge), authority(Domain::ControlPlane));
    for authority in [&edge_ca, &client_ca] {
        let names = vec![AltName::Dns("localhost".to_owned())];
        let gateway = Profile::Gateway { name: "gw-1".parse().unwrap(), names };
        write(folder.path(), "gateway", authority, &gateway, hour());
        if authority.domain() == Domain::Edge {
            for node in ["edge-a", "edge-b"] {
                write(folder.path(), node, authority, &edge(node), hour());
            }
        } else {
            let client = Profile::Client { name: "kube-apiserver".to_owned() };
            write(folder.path(), "client", authority, &client, hour());
        }
    }
    let mut settings = GatewaySettings::new("gw-1".parse().unwrap());
    change(&mut settings);
    let mut metrics = Registry::default();
    let mut gateway = Gateway::new(settings, &mut metrics);
    let tls = |domain| ServerTls::load(domain, files(folder.path(), domain, "gateway")).unwrap();
    let (edges, ingress) = (listener().await, listener().await);
    let (edges_at, ingress_at) = (edges.local_addr().unwrap(), ingress.local_addr().unwrap());
    gateway.serve_edges(edges, tls(Domain::Edge));
    gateway.serve_ingress(ingress, tls(Domain::ControlPlane));
    gateway.serve_ingress_plain(UnixDoor::bind(&folder.path().join("door.sock"), 0o600).unwrap());
    finish(&mut gateway, folder.path());
    let shutdown = CancellationToken::new();
    let readiness = gateway.readiness();
    let task = tokio::spawn(gateway.run(shutdown.clone()));
    Running { edges: edges_at, ingress: ingress_at, folder, shutdown, readiness, task, edge_ca, metrics }
}

pub(crate) async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

pub(crate) fn hello(claim: &str, instance: &str) -> Hello {
    Hello {
        min_version: 1,
        max_version: 1,
        node_claim: claim.to_owned(),
        instance_id: instance.to_owned(),
        ..Hello::default()
    }
}

impl Running {
    /// Another certificate for a node, under a name of its own.
    pub(crate) fn issue(&self, name: &str, node: &str, validity: Validity) {
        write(self.folder.path(), name, &self.edge_ca, &edge(node), validity);
    }

    pub(crate) fn client(&self, domain: Domain, name: &str) -> ClientTls {
        ClientTls::load(domain, files(self.folder.path(), domain, name)).unwrap()
    }

    pub(crate) async fn tls(
        &self,
        address: SocketAddr,
        client: &ClientTls,
        protocols: &[&[u8]],
    ) -> TlsStream<ReadAhead<TcpStream>> {
        let tcp = TcpStream::connect(address).await.unwrap();
        let connector = client.connector_offering(protocols);
        connector.connect(ServerName::try_from("localhost").unwrap(), ReadAhead::new(tcp)).await.unwrap()
    }

    pub(crate) async fn link(&self, name: &str, hello: Hello) -> Result<(Link, Welcome), ConnectError> {
        let client = self.client(Domain::Edge, name);
        let conn = self.tls(self.edges, &client, &[b"edge-tunnel/1"]).await;
        timeout(PATIENCE, Link::connect(conn, hello, LinkConfig::default())).await.unwrap()
    }

    pub(crate) async fn rejected(&self, name: &str, hello: Hello) -> Reject {
        match self.link(name, hello).await {
            Err(ConnectError::Rejected(reject)) => reject,
            other => panic!("not rejected: {other:?}"),
        }
    }

    pub(crate) fn metrics(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.metrics).unwrap();
        text
    }

    /// Waits until a line of the metrics is there.
    pub(crate) async fn measured(&self, line: &str) {
        self.measured_any(&[line.to_owned()]).await;
    }

    /// Waits until one of these lines of the metrics is there.
    pub(crate) async fn measured_any(&self, lines: &[String]) {
        let looking = async {
            while !self.metrics().lines().any(|known| lines.iter().any(|line| line == known)) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let found = timeout(PATIENCE, looking).await;
        assert!(found.is_ok(), "none of {lines:?} in\n{}", self.metrics());
    }

    /// A connected stream: the client's side, and the edge's.
    pub(crate) async fn connected(&self, link: &mut Link) -> (TlsStream<ReadAhead<TcpStream>>, TunnelStream) {
        let client = self.client(Domain::ControlPlane, "client");
        let mut conn = self.tls(self.ingress, &client, &[]).await;
        conn.write_all(CONNECT).await.unwrap();
        let edge = pending(link).await.accept("127.0.0.1:10250".to_owned()).await.unwrap();
        let mut head = [0; CONNECTED.len()];
        conn.read_exact(&mut head).await.unwrap();
        assert_eq!(head, CONNECTED);
        (conn, edge)
    }
}

pub(crate) async fn pending(link: &mut Link) -> PendingStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match link.next().await {
            LinkEvent::Stream(incoming) => return incoming.header(deadline).await.unwrap(),
            LinkEvent::Closed(error) => panic!("the link ended: {error}"),
            _ => {}
        }
    }
}
