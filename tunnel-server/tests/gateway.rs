//! A whole gateway on real sockets: whom its doors let in, and how it leaves. The links' other ends are the tests' own.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use prometheus_client::{encoding::text::encode, registry::Registry};
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixStream},
    task::JoinHandle,
    time::{Instant, timeout},
};
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tunnel_core::{
    ConnectError, Link, LinkConfig, LinkError, LinkEvent, PendingStream, TunnelStream,
    proto::messages::{Hello, Reject, RejectCode, Welcome},
    tls::{ClientTls, Domain, Files, ServerTls},
};
use tunnel_server::{
    Gateway, GatewaySettings, Grants, LinkLimits, UnixDoor,
    pki::{AltName, Authority, Profile, Validity},
};

const PATIENCE: Duration = Duration::from_secs(10);
const CONNECT: &[u8] = b"CONNECT edge-a:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
const CONNECTED: &[u8] = b"HTTP/1.1 200 OK\r\n\r\n";

/// A gateway that runs, and the credentials of everyone who may want to get in.
struct Running {
    edges: SocketAddr,
    ingress: SocketAddr,
    folder: TempDir,
    metrics: Registry,
    shutdown: CancellationToken,
    task: JoinHandle<()>,
}

fn write(folder: &Path, name: &str, authority: &Authority, profile: &Profile) -> Files {
    let issued = authority.issue(profile, Validity::lasting(Duration::from_secs(3600))).unwrap();
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

fn files(folder: &Path, domain: Domain, name: &str) -> Files {
    let file = |kind: &str| folder.join(format!("{domain}-{name}.{kind}"));
    Files { cert: file("crt"), key: file("key"), ca: file("ca") }
}

async fn start(change: impl FnOnce(&mut GatewaySettings)) -> Running {
    let folder = tempfile::tempdir().unwrap();
    for domain in [Domain::Edge, Domain::ControlPlane] {
        let authority = Authority::new(domain, Validity::lasting(Duration::from_secs(3600))).unwrap();
        let names = vec![AltName::Dns("localhost".to_owned())];
        let gateway = Profile::Gateway { name: "gw-1".parse().unwrap(), names };
        write(folder.path(), "gateway", &authority, &gateway);
        if domain == Domain::Edge {
            for node in ["edge-a", "edge-b"] {
                write(folder.path(), node, &authority, &Profile::Edge { node: node.parse().unwrap() });
            }
        } else {
            let client = Profile::Client { name: "kube-apiserver".to_owned() };
            write(folder.path(), "client", &authority, &client);
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
    let shutdown = CancellationToken::new();
    let task = tokio::spawn(gateway.run(shutdown.clone()));
    Running { edges: edges_at, ingress: ingress_at, folder, metrics, shutdown, task }
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

fn hello(claim: &str, instance: &str) -> Hello {
    Hello {
        min_version: 1,
        max_version: 1,
        node_claim: claim.to_owned(),
        instance_id: instance.to_owned(),
        ..Hello::default()
    }
}

impl Running {
    fn client(&self, domain: Domain, name: &str) -> ClientTls {
        ClientTls::load(domain, files(self.folder.path(), domain, name)).unwrap()
    }

    async fn tls(
        &self,
        address: SocketAddr,
        client: &ClientTls,
        protocols: &[&[u8]],
    ) -> TlsStream<TcpStream> {
        let tcp = TcpStream::connect(address).await.unwrap();
        let connector = client.connector_offering(protocols);
        connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap()
    }

    async fn link(&self, name: &str, hello: Hello) -> Result<(Link, Welcome), ConnectError> {
        let client = self.client(Domain::Edge, name);
        let conn = self.tls(self.edges, &client, &[b"edge-tunnel/1"]).await;
        timeout(PATIENCE, Link::connect(conn, hello, LinkConfig::default())).await.unwrap()
    }

    async fn rejected(&self, name: &str, hello: Hello) -> Reject {
        match self.link(name, hello).await {
            Err(ConnectError::Rejected(reject)) => reject,
            other => panic!("not rejected: {other:?}"),
        }
    }

    fn metrics(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.metrics).unwrap();
        text
    }

    /// Waits until a line of the metrics is there.
    async fn measured(&self, line: &str) {
        let looking = async {
            while !self.metrics().lines().any(|known| known == line) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let found = timeout(PATIENCE, looking).await;
        assert!(found.is_ok(), "no {line:?} in\n{}", self.metrics());
    }

    /// A connected stream: the client's side, and the edge's.
    async fn connected(&self, link: &mut Link) -> (TlsStream<TcpStream>, TunnelStream) {
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

async fn pending(link: &mut Link) -> PendingStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match link.next().await {
            LinkEvent::Stream(incoming) => return incoming.header(deadline).await.unwrap(),
            LinkEvent::Closed(error) => panic!("the link ended: {error}"),
            _ => {}
        }
    }
}

#[tokio::test]
async fn a_node_is_who_its_certificate_says() {
    let grants = Grants::from_iter([("edge-a".parse().unwrap(), "10.0.0.0/8".parse().unwrap())]);
    let running = start(|settings| settings.grants = grants).await;
    let (mut link, welcome) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    assert_eq!(welcome.gateway_id, "gw-1");
    assert_eq!(welcome.granted, ["edge-a", "10.0.0.0/8"]);
    running.measured("tunnel_server_links 1").await;
    let (_client, _edge) = running.connected(&mut link).await;

    // A claim to be another node is told with both names, and takes nothing from that node.
    let reject = running.rejected("edge-b", hello("edge-a", "i2")).await;
    assert_eq!(reject.code(), RejectCode::Identity);
    assert!(reject.text.contains("\"edge-a\"") && reject.text.contains("\"edge-b\""), "{}", reject.text);
    running.measured("tunnel_server_rejects_total{code=\"identity\"} 1").await;
    let (_client, _edge) = running.connected(&mut link).await;

    // A certificate of the right CA, but for a server.
    assert!(matches!(running.link("gateway", hello("", "i3")).await, Err(ConnectError::Link(_))));
    running
        .measured("tunnel_server_handshakes_failed_total{domain=\"edge\",cause=\"bad_certificate\"} 1")
        .await;
    let reject = running.rejected("edge-a", hello("", "Not A Name")).await;
    assert_eq!(reject.code(), RejectCode::Malformed);
    let reject =
        running.rejected("edge-a", Hello { min_version: 9, max_version: 9, ..hello("", "i1") }).await;
    assert_eq!(reject.code(), RejectCode::Version);
}

#[tokio::test]
async fn what_is_no_edge_is_refused_and_counted() {
    let running = start(|settings| settings.handshake_timeout = Duration::from_millis(200)).await;
    let client = running.client(Domain::Edge, "edge-a");

    let mut no_protocol = running.tls(running.edges, &client, &[]).await;
    assert_eq!(no_protocol.read(&mut [0; 1]).await.unwrap(), 0);
    running.measured("tunnel_server_handshakes_failed_total{domain=\"edge\",cause=\"alpn\"} 1").await;

    let mut silent = running.tls(running.edges, &client, &[b"edge-tunnel/1"]).await;
    let _ = silent.read(&mut [0; 1]).await;
    running
        .measured("tunnel_server_handshakes_failed_total{domain=\"edge\",cause=\"handshake_timeout\"} 1")
        .await;

    let mut garbage = TcpStream::connect(running.edges).await.unwrap();
    garbage.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    garbage.read_to_end(&mut Vec::new()).await.unwrap();
    running.measured("tunnel_server_handshakes_failed_total{domain=\"edge\",cause=\"not_tls\"} 1").await;

    let _stalled = TcpStream::connect(running.edges).await.unwrap();
    running.measured("tunnel_server_handshakes_failed_total{domain=\"edge\",cause=\"timeout\"} 1").await;
    running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
}

#[tokio::test]
async fn links_beyond_the_limit_are_rejected_and_the_oldest_of_a_node_is_superseded() {
    let running = start(|settings| settings.links = LinkLimits { total: 2, per_node: 1 }).await;
    let (mut old, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    let (mut new, _) = running.link("edge-a", hello("edge-a", "i2")).await.unwrap();
    let end = async {
        loop {
            if let LinkEvent::Closed(error) = old.next().await {
                return error;
            }
        }
    };
    let end = timeout(PATIENCE, end).await.unwrap();
    assert!(matches!(end, LinkError::ClosedByPeer), "{end}");
    running.measured("tunnel_server_links_closed_total{cause=\"closed_here\"} 1").await;
    let (_client, _edge) = running.connected(&mut new).await;

    let _other = running.link("edge-b", hello("edge-b", "i3")).await.unwrap();
    running.measured("tunnel_server_links 2").await;
    let reject = running.rejected("edge-b", hello("edge-b", "i4")).await;
    assert_eq!(reject.code(), RejectCode::Overloaded);
}

#[tokio::test]
async fn a_client_that_wants_http2_gets_it() {
    let running = start(|_| {}).await;
    let (mut link, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    let client = running.client(Domain::ControlPlane, "client");
    let conn = running.tls(running.ingress, &client, &[b"h2", b"http/1.1"]).await;
    assert_eq!(conn.get_ref().1.alpn_protocol(), Some(&b"h2"[..]));
    let (mut send, connection) = h2::client::handshake(conn).await.unwrap();
    let connection = tokio::spawn(connection);
    let request = http::Request::connect("edge-a:10250").body(()).unwrap();
    let (response, _body) = send.send_request(request, false).unwrap();
    let pending = pending(&mut link).await;
    assert_eq!(pending.open().caller, "kube-apiserver");
    let mut edge = pending.accept(String::new()).await.unwrap();
    let mut body = response.await.unwrap().into_body();
    edge.write_all(b"hello").await.unwrap();
    assert_eq!(body.data().await.unwrap().unwrap(), "hello");
    drop((body, send));
    // The whole connection goes away: its streams end as cut, not as complete.
    connection.abort();
    assert!(timeout(PATIENCE, edge.read(&mut [0; 1])).await.unwrap().is_err());
}

#[tokio::test]
async fn the_unix_door_needs_no_certificate() {
    let running = start(|_| {}).await;
    let (mut link, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    let mut conn = UnixStream::connect(running.folder.path().join("door.sock")).await.unwrap();
    conn.write_all(CONNECT).await.unwrap();
    let pending = pending(&mut link).await;
    assert!(pending.open().caller.starts_with("uid:"), "{}", pending.open().caller);
}

#[tokio::test]
async fn a_drain_lets_streams_finish_then_closes_the_links() {
    let running = start(|_| {}).await;
    let (mut link, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    let (mut client, mut edge) = running.connected(&mut link).await;
    running.shutdown.cancel();
    let told = async { while !matches!(link.next().await, LinkEvent::Draining(_)) {} };
    timeout(PATIENCE, told).await.unwrap();
    assert!(TcpStream::connect(running.ingress).await.is_err(), "the door is still open");

    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    edge.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "question");
    edge.write_all(b"answer").await.unwrap();
    edge.shutdown().await.unwrap();
    text.clear();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "answer");
    timeout(PATIENCE, running.task).await.unwrap().unwrap();
    assert!(matches!(
        timeout(PATIENCE, link.next()).await.unwrap(),
        LinkEvent::Closed(LinkError::ClosedByPeer)
    ));
    assert!(!running.folder.path().join("door.sock").exists());
}

#[tokio::test]
async fn a_drain_does_not_wait_for_ever() {
    let running = start(|settings| settings.drain_timeout = Duration::from_millis(100)).await;
    let (mut link, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    let (mut client, mut edge) = running.connected(&mut link).await;
    running.shutdown.cancel();
    // A reset, not an end of file: the stream was cut.
    assert!(client.read(&mut [0; 1]).await.is_err());
    assert!(edge.read(&mut [0; 1]).await.is_err());
    timeout(PATIENCE, running.task).await.unwrap().unwrap();
}
