//! Several gateways on real sockets that are peers of one another, their credentials, and what edges, clients and hostile
//! peers do.

use std::{
    collections::BTreeSet,
    fs,
    net::SocketAddr,
    sync::atomic::{AtomicU32, AtomicU64, Ordering::Relaxed},
    time::Duration,
};

use prometheus_client::{encoding::text::encode, registry::Registry};
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    net::{TcpListener, TcpSocket, TcpStream, UnixStream},
    task::JoinHandle,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tunnel_core::{
    ConnectError, Link, LinkConfig, LinkEvent, PendingStream, ReadAhead, TunnelStream,
    proto::messages::{Capability, Gateway as About, Hello, RefusalCode, Welcome},
    tls::{ClientTls, Domain, Files, ServerTls},
};
use tunnel_server::{
    Gateway, GatewaySettings, Member, PeerSettings, Readiness, UnixDoor,
    pki::{AltName, Authority, Profile, Validity},
};

pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
pub(crate) const TRACEPARENT: &str = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";

/// Gateways that know of one another, each at an address that is set aside for it, whether it runs or not.
pub(crate) struct Cluster {
    pub(crate) folder: TempDir,
    edge_ca: Authority,
    pub(crate) places: Vec<SocketAddr>,
    /// Hold the places' ports without listening.
    _reserved: Vec<TcpSocket>,
    generation: AtomicU64,
}

/// A gateway that runs.
pub(crate) struct Running {
    pub(crate) name: &'static str,
    pub(crate) edges: SocketAddr,
    pub(crate) ingress: SocketAddr,
    pub(crate) peers: SocketAddr,
    pub(crate) shutdown: CancellationToken,
    pub(crate) task: JoinHandle<()>,
    pub(crate) readiness: Readiness,
    folder: std::path::PathBuf,
    unix: std::path::PathBuf,
    metrics: Registry,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn hour() -> Validity {
    Validity::lasting(Duration::from_secs(3600))
}

fn write(folder: &std::path::Path, name: &str, authority: &Authority, profile: &Profile) {
    let issued = authority.issue(profile, hour()).unwrap();
    for (kind, text) in [("crt", &*issued.cert_pem), ("key", &*issued.key_pem), ("ca", authority.cert_pem())]
    {
        fs::write(folder.join(format!("{}-{name}.{kind}", authority.domain())), text).unwrap();
    }
}

pub(crate) fn files(folder: &std::path::Path, domain: Domain, name: &str) -> Files {
    let file = |kind: &str| folder.join(format!("{domain}-{name}.{kind}"));
    Files { cert: file("crt"), key: file("key"), ca: file("ca") }
}

async fn listener() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

impl Cluster {
    /// `gw-a` and so on, as many as there are places; none runs yet.
    pub(crate) fn with_places(count: usize) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let authority = |domain| Authority::new(domain, hour()).unwrap();
        let edge_ca = authority(Domain::Edge);
        let (client_ca, peer_ca) = (authority(Domain::ControlPlane), authority(Domain::Peer));
        let names = vec![AltName::Dns("localhost".to_owned())];
        let gateway = Profile::Gateway { name: "gateway".parse().unwrap(), names: names.clone() };
        write(folder.path(), "gateway", &edge_ca, &gateway);
        write(folder.path(), "gateway", &client_ca, &gateway);
        write(folder.path(), "client", &client_ca, &Profile::Client { name: "kube-apiserver".to_owned() });
        write(folder.path(), "gateway", &peer_ca, &Profile::Peer { name: "gateway".parse().unwrap(), names });
        let reserved: Vec<TcpSocket> = (0..count)
            .map(|_| {
                let socket = TcpSocket::new_v4().unwrap();
                socket.set_reuseaddr(true).unwrap();
                socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
                socket
            })
            .collect();
        let places = reserved.iter().map(|socket| socket.local_addr().unwrap()).collect();
        Self { folder, edge_ca, places, _reserved: reserved, generation: 1.into() }
    }

    /// As many gateways, all linked to one another.
    pub(crate) async fn of<const N: usize>() -> (Self, [Running; N]) {
        let cluster = Self::with_places(N);
        let mut gateways = Vec::new();
        for place in 0..N {
            gateways.push(cluster.start(place, |_| {}).await);
        }
        for gateway in &gateways {
            gateway.measured(&format!("tunnel_server_peer_links {}", N - 1)).await;
        }
        (cluster, gateways.try_into().unwrap_or_else(|_| panic!("not {N}")))
    }

    /// Starts the gateway of a place.
    pub(crate) async fn start(&self, place: usize, change: impl FnOnce(&mut GatewaySettings)) -> Running {
        static STARTED: AtomicU32 = AtomicU32::new(1);
        let number = STARTED.fetch_add(1, Relaxed);
        let name = ["gw-a", "gw-b", "gw-c", "gw-d"][place];
        let mut settings = GatewaySettings::new(name.parse().unwrap());
        settings.heartbeat = Duration::from_secs(2);
        settings.request_seed = number;
        change(&mut settings);
        let (edges, ingress) = (listener().await, listener().await);
        let peers = TcpSocket::new_v4().unwrap();
        peers.set_reuseaddr(true).unwrap();
        peers.bind(self.places[place]).unwrap();
        let peers = peers.listen(64).unwrap();
        let (edges_at, ingress_at, peers_at) =
            (edges.local_addr().unwrap(), ingress.local_addr().unwrap(), peers.local_addr().unwrap());
        let peer_settings = PeerSettings {
            edge_address: Some(edges_at.into()),
            heartbeat: Duration::from_millis(500),
            ..PeerSettings::new(number.into())
        };
        let server_name = ServerName::try_from("localhost").unwrap();
        let member = |at: &SocketAddr| Member { address: (*at).into(), server_name: server_name.clone() };
        let list = self.places.iter().map(member).collect();
        let mut metrics = Registry::default();
        let mut gateway = Gateway::among_peers(settings, peer_settings, list, &mut metrics);
        let tls = |domain| ServerTls::load(domain, files(self.folder.path(), domain, "gateway")).unwrap();
        gateway.serve_edges(edges, tls(Domain::Edge));
        gateway.serve_ingress(ingress, tls(Domain::ControlPlane));
        let unix = self.folder.path().join(format!("{number}.sock"));
        gateway.serve_ingress_plain(UnixDoor::bind(&unix, 0o600).unwrap());
        gateway.serve_peers(peers, (tls(Domain::Peer), self.client(Domain::Peer, "gateway")));
        let (shutdown, readiness) = (CancellationToken::new(), gateway.readiness());
        let running = gateway.run(shutdown.clone());
        let task = tokio::spawn(async { running.await.unwrap() });
        let folder = self.folder.path().to_owned();
        Running {
            name,
            edges: edges_at,
            ingress: ingress_at,
            peers: peers_at,
            shutdown,
            task,
            readiness,
            folder,
            unix,
            metrics,
        }
    }

    pub(crate) fn client(&self, domain: Domain, name: &str) -> ClientTls {
        ClientTls::load(domain, files(self.folder.path(), domain, name)).unwrap()
    }

    pub(crate) fn issue_edge(&self, node: &str) {
        let profile = Profile::Edge { node: node.parse().unwrap() };
        write(self.folder.path(), node, &self.edge_ca, &profile);
    }

    /// A link of `node`, newer than all before.
    pub(crate) async fn link(&self, to: &Running, node: &str) -> Link {
        self.welcomed(to.edges, node).await.unwrap().0
    }

    pub(crate) async fn welcomed(&self, to: SocketAddr, node: &str) -> Result<(Link, Welcome), ConnectError> {
        if !self.folder.path().join(format!("edge-{node}.crt")).exists() {
            self.issue_edge(node);
        }
        let hello = Hello {
            min_version: 1,
            max_version: 1,
            node_claim: node.to_owned(),
            instance_id: node.to_owned(),
            generation: self.generation.fetch_add(1, Relaxed),
            ..Hello::default()
        };
        let conn = tls(to, &self.client(Domain::Edge, node), &[b"edge-tunnel/1"]).await;
        timeout(PATIENCE, Link::connect(BufReader::new(conn), hello, LinkConfig::default())).await.unwrap()
    }

    /// A link to the peers' door of a gateway, as its peer `name` would make it.
    pub(crate) async fn peer_link(&self, to: &Running, name: &str) -> Result<(Link, Welcome), ConnectError> {
        let hello = Hello {
            min_version: 1,
            max_version: 1,
            instance_id: "played".to_owned(),
            gateway_id: name.to_owned(),
            capabilities: vec![Capability::Holdings.into()],
            ..Hello::default()
        };
        let conn = tls(to.peers, &self.client(Domain::Peer, "gateway"), &[b"edge-tunnel-peer/1"]).await;
        timeout(PATIENCE, Link::connect(BufReader::new(conn), hello, LinkConfig::default())).await.unwrap()
    }

    /// A gateway that is the test's own, in the place of a real one.
    pub(crate) fn played(&self, place: usize) -> Played {
        let socket = TcpSocket::new_v4().unwrap();
        socket.set_reuseaddr(true).unwrap();
        socket.bind(self.places[place]).unwrap();
        let tls = ServerTls::load(Domain::Peer, files(self.folder.path(), Domain::Peer, "gateway")).unwrap();
        Played { door: socket.listen(64).unwrap(), tls }
    }
}

pub(crate) async fn tls(
    address: SocketAddr,
    client: &ClientTls,
    protocols: &[&[u8]],
) -> TlsStream<TcpStream> {
    let tcp = TcpStream::connect(address).await.unwrap();
    let connector = client.connector_offering(protocols);
    connector.connect(ServerName::try_from("localhost").unwrap(), tcp).await.unwrap()
}

/// The peers' door of a gateway that is the test's own.
pub(crate) struct Played {
    door: TcpListener,
    tls: ServerTls,
}

impl Played {
    /// The link that a gateway dials next.
    pub(crate) async fn linked(&self) -> Link {
        let (conn, _) = timeout(PATIENCE, self.door.accept()).await.expect("nobody dials").unwrap();
        let conn = self.tls.acceptor().accept(ReadAhead::new(conn)).await.unwrap();
        let welcome =
            Welcome { version: 1, gateway_id: "gw-x".to_owned(), heartbeat_ms: 500, ..Welcome::default() };
        Link::accept(conn, LinkConfig::default()).await.unwrap().welcome(welcome).unwrap()
    }
}

/// A connected client.
pub(crate) type Client = TlsStream<TcpStream>;

impl Running {
    /// As a process that is killed: nothing is said any more.
    pub(crate) async fn kill(mut self) {
        self.task.abort();
        let _ = (&mut self.task).await;
    }

    async fn ask(&self, node: &str) -> Client {
        let client =
            ClientTls::load(Domain::ControlPlane, files(&self.folder, Domain::ControlPlane, "client"))
                .unwrap();
        let mut conn = tls(self.ingress, &client, &[]).await;
        let request = format!(
            "CONNECT {node}:10250 HTTP/1.1\r\nHost: x\r\nX-Request-Id: call-7\r\ntraceparent: {TRACEPARENT}\r\n\r\n"
        );
        conn.write_all(request.as_bytes()).await.unwrap();
        conn
    }

    /// A connected stream to `node`, whose edge the test plays: the client's side, the edge's, and what the edge was asked.
    pub(crate) async fn connected(
        &self,
        node: &str,
        link: &mut Link,
    ) -> (Client, TunnelStream, tunnel_core::proto::messages::Open) {
        let mut conn = self.ask(node).await;
        let (edge, open, answer) = {
            let mut answer = std::pin::pin!(head(&mut conn));
            let pending = tokio::select! {
                biased;
                pending = pending(link) => pending,
                answer = &mut answer => panic!("through {}: {answer}", self.name),
            };
            let open = pending.open().clone();
            let edge = pending.accept("127.0.0.1:10250".to_owned()).await.unwrap();
            (edge, open, answer.await)
        };
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        (conn, edge, open)
    }

    /// What a CONNECT to `node` is answered, as its status line, by way of the Unix socket.
    pub(crate) async fn answer(&self, node: &str) -> String {
        let mut conn = UnixStream::connect(&self.unix).await.unwrap();
        let request = format!("CONNECT {node}:10250 HTTP/1.1\r\nHost: x\r\n\r\n");
        conn.write_all(request.as_bytes()).await.unwrap();
        let head = head(&mut conn).await;
        head.lines().next().unwrap_or_default().to_owned()
    }

    /// Waits until a CONNECT to `node` is answered like that.
    pub(crate) async fn answers(&self, node: &str, expected: &str) -> String {
        let begun = Instant::now();
        loop {
            let answer = self.answer(node).await;
            if answer.contains(expected) {
                return answer;
            }
            assert!(begun.elapsed() < PATIENCE, "{}: not {expected:?}, but {answer:?}", self.name);
            sleep(Duration::from_millis(5)).await;
        }
    }

    /// Sends a whole short request to an echoing edge.
    pub(crate) async fn echo(&self, node: &str, text: &str) -> Result<(), String> {
        let exchange = async {
            let mut conn = UnixStream::connect(&self.unix).await.map_err(|error| error.to_string())?;
            let request = format!("CONNECT {node}:10250 HTTP/1.1\r\nHost: x\r\n\r\n");
            conn.write_all(request.as_bytes()).await.map_err(|error| error.to_string())?;
            let head = head(&mut conn).await;
            if !head.starts_with("HTTP/1.1 200 ") {
                return Err(head.lines().next().unwrap_or("nothing").to_owned());
            }
            conn.write_all(text.as_bytes()).await.map_err(|error| error.to_string())?;
            conn.shutdown().await.map_err(|error| error.to_string())?;
            let mut back = String::new();
            conn.read_to_string(&mut back).await.map_err(|error| error.to_string())?;
            if back == text { Ok(()) } else { Err(format!("{back:?} came back")) }
        };
        timeout(PATIENCE, exchange).await.unwrap_or_else(|_| Err("it took too long".to_owned()))
    }

    pub(crate) fn metrics(&self) -> String {
        let mut text = String::new();
        encode(&mut text, &self.metrics).unwrap();
        text
    }

    /// Waits until a line of the metrics is there.
    pub(crate) async fn measured(&self, line: &str) {
        let looking = async {
            while !self.metrics().lines().any(|known| known == line) {
                sleep(Duration::from_millis(5)).await;
            }
        };
        let found = timeout(PATIENCE, looking).await;
        assert!(found.is_ok(), "{}: no {line:?} in\n{}", self.name, self.metrics());
    }
}

/// The head of an answer.
async fn head(conn: &mut (impl AsyncRead + AsyncWrite + Unpin)) -> String {
    let mut head = Vec::new();
    let reading = async {
        while !head.ends_with(b"\r\n\r\n") {
            match conn.read_u8().await {
                Ok(byte) => head.push(byte),
                Err(_) => break,
            }
        }
    };
    timeout(PATIENCE, reading).await.expect("no answer");
    String::from_utf8(head).unwrap()
}

pub(crate) async fn pending(link: &mut Link) -> PendingStream {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match timeout(PATIENCE, link.next()).await.expect("no stream") {
            LinkEvent::Stream(incoming) => return incoming.header(deadline).await.unwrap(),
            LinkEvent::Closed(error) => panic!("the link ended: {error}"),
            _ => {}
        }
    }
}

/// Refuses every stream of a link, until that ends.
pub(crate) async fn refuse_all(mut link: Link) {
    loop {
        match link.next().await {
            LinkEvent::Stream(incoming) => {
                let pending = incoming.header(Instant::now() + PATIENCE).await.unwrap();
                let _ = pending.refuse(RefusalCode::NotAllowed, "not here").await;
            }
            LinkEvent::Closed(_) => return,
            _ => {}
        }
    }
}

/// An edge that echoes, and that connects elsewhere when its gateway is about to leave, as a good edge does: first the new
/// link, then the end of the old one.
pub(crate) async fn good_edge(cluster: std::sync::Arc<Cluster>, first: SocketAddr, node: String) {
    let mut links = tokio::task::JoinSet::new();
    let mut next = Some(first);
    loop {
        if let Some(address) = next.take() {
            let (link, welcome) = cluster.welcomed(address, &node).await.unwrap();
            links.spawn(serve(link, welcome.gateways));
        }
        let Some(moved) = links.join_next().await else { return };
        match moved.unwrap() {
            // The old link goes on until its streams have ended; the new one comes first.
            Serving::Leaving(link, elsewhere) => {
                let (new, welcome) = cluster.welcomed(elsewhere, &node).await.unwrap();
                link.handle().drain(PATIENCE, "there is a newer link");
                links.spawn(serve(new, welcome.gateways));
                links.spawn(see_off(link));
            }
            Serving::Ended => {}
        }
    }
}

enum Serving {
    Leaving(Link, SocketAddr),
    Ended,
}

async fn serve(mut link: Link, mut gateways: Vec<About>) -> Serving {
    let mut left = BTreeSet::new();
    loop {
        match link.next().await {
            LinkEvent::Stream(incoming) => drop(tokio::spawn(echo(incoming))),
            LinkEvent::Updated(update) => gateways = update.gateways,
            LinkEvent::Draining(drain) => {
                left.insert(drain.reason);
            }
            LinkEvent::Closed(_) => return Serving::Ended,
            _ => {}
        }
        let stays = gateways.iter().find(|gateway| !gateway.draining && !gateway.edge_address.is_empty());
        if let Some(stays) = stays.filter(|_| !left.is_empty()) {
            return Serving::Leaving(link, stays.edge_address.parse().unwrap());
        }
    }
}

async fn see_off(mut link: Link) -> Serving {
    let handle = link.handle();
    loop {
        tokio::select! {
            biased;
            event = link.next() => match event {
                LinkEvent::Stream(incoming) => drop(tokio::spawn(echo(incoming))),
                LinkEvent::Closed(_) => return Serving::Ended,
                _ => {}
            },
            () = sleep(Duration::from_millis(50)) => if handle.active_streams() == 0 {
                handle.close("nothing runs here any more");
            },
        }
    }
}

async fn echo(incoming: tunnel_core::Incoming) {
    let Ok(pending) = incoming.header(Instant::now() + PATIENCE).await else { return };
    let Ok(mut stream) = pending.accept("127.0.0.1:10250".to_owned()).await else { return };
    let mut buffer = vec![0; 4096];
    while let Ok(read @ 1..) = stream.read(&mut buffer).await {
        if stream.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
    let _ = stream.shutdown().await;
}

impl Running {
    /// Waits until this gateway knows of the node's link, whose edge refuses meanwhile.
    pub(crate) async fn answers_when_known(&self, node: &str, link: &mut Link) {
        let refusing = async {
            loop {
                let _ = pending(link).await.refuse(RefusalCode::NotAllowed, "not yet").await;
            }
        };
        tokio::select! {
            biased;
            _ = self.answers(node, " 403 ") => {}
            () = refusing => {}
        }
    }
}
