//! A gateway, two edges and two kubelets on loopback sockets, and a control plane that dials through them. Every test of
//! this binary starts a [`Rig`], does what it is about, and closes the rig, which checks that nothing is left.

use std::{
    io::{self, Read},
    net::{IpAddr, Ipv4Addr, SocketAddr},
    os::fd::AsFd,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use socket2::SockRef;
use tempfile::TempDir;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    sync::{RwLock, RwLockReadGuard, RwLockWriteGuard},
    task::{JoinSet, spawn_blocking},
    time::{Instant, sleep, timeout},
};
use tokio_rustls::client::TlsStream;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tunnel_core::{
    Host, LinkConfig, Socket, Target,
    tls::{Domain, Files, ServerTls},
};
use tunnel_edge::{
    config::Config,
    network::{DialError, Network, SystemNetwork},
    policy::{Policy, Rule},
};
use tunnel_server::{GatewaySettings, UnixDoor};
use tunnel_tests::{
    connect::{Refusal, connect},
    parties::{self, GatewayProbe},
    plan::NODES,
    workload::{self, Ledger},
};

/// No single step of a test takes longer, even on a busy machine.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);
/// Long enough that a busy machine does not lose a link.
const HEARTBEAT: Duration = Duration::from_secs(10);
/// Longer than [`LIMIT`]: what ends before has not been ended by it.
const DRAIN_TIMEOUT: Duration = Duration::from_secs(60);
/// The file of [`Rig::edge_ca`].
const EDGE_CA: &str = "edge-ca.crt";
/// How often a condition is looked at.
const POLL: Duration = Duration::from_millis(5);

/// A connection of the control plane.
pub(crate) type Client = TlsStream<TcpStream>;

/// Waits for a step of a test, which must not take longer than [`LIMIT`].
#[track_caller]
pub(crate) fn within<T>(what: &str, step: impl Future<Output = T>) -> impl Future<Output = T> {
    let (what, place) = (what.to_owned(), std::panic::Location::caller());
    async move { timeout(LIMIT, step).await.unwrap_or_else(|_| panic!("{what}: not within {LIMIT:?} ({place})")) }
}

/// Waits until something is so.
pub(crate) async fn until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + LIMIT;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: not within {LIMIT:?}");
        sleep(POLL).await;
    }
}

/// A gateway or an edge that runs.
pub(crate) struct Party {
    stop: CancellationToken,
    task: AbortOnDropHandle<()>,
}

impl Party {
    fn start<F>(run: impl FnOnce(CancellationToken) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let stop = CancellationToken::new();
        Self { task: AbortOnDropHandle::new(tokio::spawn(run(stop.clone()))), stop }
    }

    /// Tells it to drain.
    pub(crate) fn drain(&self) {
        self.stop.cancel();
    }

    /// Waits until it has drained.
    pub(crate) async fn drained(self) {
        within("the drain", self.task).await.unwrap();
    }

    /// Drops its future, wherever that is.
    pub(crate) async fn kill(self) {
        self.task.abort();
        assert!(within("the kill", self.task).await.unwrap_err().is_cancelled());
    }
}

/// Tests that need the machine for themselves take turns with all others.
static MACHINE: RwLock<()> = RwLock::const_new(());

#[expect(dead_code, reason = "held, not read")]
enum Turn {
    Shared(RwLockReadGuard<'static, ()>),
    Alone(RwLockWriteGuard<'static, ()>),
}

/// See the module's text.
pub(crate) struct Rig {
    /// Nobody, while it is away.
    pub(crate) gateway: Option<Party>,
    /// One for each of [`NODES`].
    pub(crate) edges: [Option<Party>; 2],
    /// Looks into the gateway.
    pub(crate) probe: GatewayProbe,
    /// What the gateway shows to edges and expects of them; its CA lies in [`Rig::edge_ca`].
    pub(crate) edge_tls: ServerTls,
    /// Where the control plane connects by TCP.
    pub(crate) ingress: SocketAddr,
    /// Where it connects on this machine.
    pub(crate) unix: PathBuf,
    /// The port of both kubelets.
    pub(crate) port: u16,
    /// What targets and clients of the workload know.
    pub(crate) ledger: Ledger,
    edge_door: SocketAddr,
    kubelets: [Arc<TcpListener>; 2],
    targets: JoinSet<()>,
    folder: TempDir,
    turn: Turn,
}

impl Rig {
    /// Starts everything, beside other tests; both edges are linked.
    pub(crate) async fn start() -> Self {
        Self::start_in(Turn::Shared(MACHINE.read().await), None).await
    }

    /// Starts everything while no other test runs.
    pub(crate) async fn start_alone() -> Self {
        Self::start_in(Turn::Alone(MACHINE.write().await), None).await
    }

    /// As above; the kernel keeps little in each socket of the ingress and of the edges, so that what is taken
    /// in for one that does not read shows what they keep themselves.
    pub(crate) async fn start_alone_with_small_buffers() -> Self {
        Self::start_in(Turn::Alone(MACHINE.write().await), Some(SmallBuffers)).await
    }

    async fn start_in(turn: Turn, small: Option<SmallBuffers>) -> Self {
        let folder = TempDir::with_prefix("tunnel-sockets-").unwrap();
        let kubelets = bind_kubelets().await;
        let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
        let (edges, ingress) = (TcpListener::bind(any).await.unwrap(), TcpListener::bind(any).await.unwrap());
        let edge_ca = folder.path().join(EDGE_CA);
        std::fs::copy(parties::files(Domain::Edge, "gateway").ca, &edge_ca).unwrap();
        let edge_files = Files { ca: edge_ca, ..parties::files(Domain::Edge, "gateway") };
        if small.is_some() {
            // Accepted sockets inherit it.
            shrink_buffers(&ingress);
        }
        let mut rig = Self {
            gateway: None,
            edges: [None, None],
            probe: GatewayProbe::default(),
            edge_tls: ServerTls::load(Domain::Edge, edge_files).unwrap(),
            ingress: ingress.local_addr().unwrap(),
            unix: folder.path().join("ingress.sock"),
            port: kubelets[0].local_addr().unwrap().port(),
            ledger: Ledger::default(),
            edge_door: edges.local_addr().unwrap(),
            kubelets: kubelets.map(Arc::new),
            targets: JoinSet::new(),
            folder,
            turn,
        };
        rig.gateway = Some(rig.run_gateway(edges, ingress));
        for which in 0..2 {
            rig.edges[which] = Some(match small {
                Some(network) => rig.start_edge_on(network, which, which),
                None => rig.start_edge(which, which),
            });
        }
        rig.linked(2).await;
        rig
    }

    fn run_gateway(&self, edges: TcpListener, ingress: TcpListener) -> Party {
        let settings = GatewaySettings {
            link: LinkConfig::default(),
            // All streams of a link are one client's here.
            max_streams_per_caller: None,
            // A thousand handshakes at once take their time.
            handshake_timeout: LIMIT,
            drain_timeout: DRAIN_TIMEOUT,
            ..parties::settings(HEARTBEAT, 1)
        };
        let mut gateway = parties::gateway_with(settings, &self.probe);
        gateway.serve_edges(edges, self.edge_tls.clone());
        let tls = ServerTls::load(Domain::ControlPlane, parties::files(Domain::ControlPlane, "gateway"));
        gateway.serve_ingress(ingress, tls.unwrap());
        gateway.serve_ingress_plain(UnixDoor::bind(&self.unix, 0o600).unwrap());
        Party::start(|stop| async { gateway.run(stop).await.unwrap() })
    }

    /// Starts a gateway at the addresses of the one that is away.
    pub(crate) async fn start_gateway(&mut self) {
        let (edges, ingress) = (bind_again(self.edge_door).await, bind_again(self.ingress).await);
        self.gateway = Some(self.run_gateway(edges, ingress));
    }

    /// Starts an edge for a node, before one of the kubelets.
    pub(crate) fn start_edge(&self, node: usize, kubelet: usize) -> Party {
        self.start_edge_on(SystemNetwork, node, kubelet)
    }

    /// As above, with other settings.
    pub(crate) fn start_edge_with(
        &self,
        node: usize,
        kubelet: usize,
        change: impl FnOnce(&mut Config),
    ) -> Party {
        let mut config = self.edge_config(node, kubelet);
        change(&mut config);
        run_edge(SystemNetwork, config)
    }

    /// As above, with a network of the test's own.
    pub(crate) fn start_edge_on(&self, network: impl Network, node: usize, kubelet: usize) -> Party {
        run_edge(network, self.edge_config(node, kubelet))
    }

    fn edge_config(&self, node: usize, kubelet: usize) -> Config {
        let gateway = Target { host: Host::Ip(self.edge_door.ip()), port: self.edge_door.port() };
        Config {
            link: LinkConfig::default(),
            policy: Policy::new(vec![Rule::node_port(self.port)], kubelet_address(kubelet)),
            drain_timeout: DRAIN_TIMEOUT,
            ..parties::edge_config(NODES[node], gateway)
        }
    }

    /// The file with the CA that the gateway trusts edges by.
    pub(crate) fn edge_ca(&self) -> PathBuf {
        self.folder().join(EDGE_CA)
    }

    /// A folder for the test's files.
    pub(crate) fn folder(&self) -> &Path {
        self.folder.path()
    }

    /// Waits until the gateway has so many links.
    pub(crate) async fn linked(&self, links: usize) {
        until(&format!("{links} links"), || self.probe.links() == links).await;
    }

    /// Waits until the gateway relays so many streams.
    pub(crate) async fn relaying(&self, streams: usize) {
        until(&format!("{streams} active streams"), || self.probe.active_streams() == streams).await;
    }

    /// A target of the kubelets' port.
    pub(crate) fn target(&self, host: &str) -> String {
        format!("{host}:{}", self.port)
    }

    /// A connection to the ingress, by mutual TLS.
    pub(crate) async fn tls(&self) -> io::Result<Client> {
        let tcp = TcpStream::connect(self.ingress).await?;
        tcp.set_nodelay(true)?;
        parties::control_plane_tls(tcp).await
    }

    /// A CONNECT to a host. The outer error is the connection's.
    pub(crate) async fn dial(&self, host: &str) -> io::Result<Result<Client, Refusal>> {
        let dialling = async {
            let mut client = self.tls().await?;
            Ok(connect(&mut client, &self.target(host)).await?.map(|()| client))
        };
        within("the CONNECT", dialling).await
    }

    /// A CONNECT that must be answered with 200.
    pub(crate) async fn open(&self, host: &str) -> Client {
        self.dial(host).await.unwrap().unwrap()
    }

    /// A CONNECT that must be refused, and with its cause.
    pub(crate) async fn refusal(&self, host: &str) -> Refusal {
        let refusal = self.dial(host).await.unwrap().map(|_| "connected").unwrap_err();
        refusal.check().unwrap();
        refusal
    }

    /// The next connection of one of the kubelets.
    pub(crate) async fn accept(&self, kubelet: usize) -> TcpStream {
        let (tcp, _) = within("a connection at the target", self.kubelets[kubelet].accept()).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        tcp
    }

    /// Both ends of a stream to a host, which must come out at that kubelet.
    pub(crate) async fn pair(&self, host: &str, kubelet: usize) -> (Client, TcpStream) {
        tokio::join!(self.open(host), self.accept(kubelet))
    }

    /// Lets both kubelets do as the first line of each connection says.
    pub(crate) fn serve_workload(&mut self) {
        let ledger = self.ledger.clone();
        self.serve(move |tcp, node| {
            let ledger = ledger.clone();
            // Its error is the connection's, and what that must be is checked at the other end.
            async move { drop(workload::serve(Socket::new(tcp), node, &ledger).await) }
        });
    }

    /// Lets both kubelets give each connection to `serve`, with the node's name.
    pub(crate) fn serve<F>(&mut self, serve: impl Fn(TcpStream, &'static str) -> F + Clone + Send + 'static)
    where
        F: Future<Output = ()> + Send + 'static,
    {
        for (kubelet, node) in self.kubelets.iter().cloned().zip(NODES) {
            let serve = serve.clone();
            self.targets.spawn(async move {
                let mut connections = JoinSet::new();
                while let Ok((tcp, _)) = kubelet.accept().await {
                    connections.spawn(serve(tcp, node));
                    while connections.try_join_next().is_some() {}
                }
            });
        }
    }

    /// Checks that no stream is left, and ends everything in an orderly way.
    pub(crate) async fn close(mut self) {
        if self.gateway.is_some() {
            self.relaying(0).await;
        }
        assert_eq!(self.ledger.breaches(), Vec::<String>::new());
        for party in self.edges.into_iter().flatten() {
            party.drain();
            party.drained().await;
        }
        if let Some(gateway) = self.gateway {
            gateway.drain();
            gateway.drained().await;
            assert_eq!(self.probe.links(), 0, "links that the gateway still counts");
        }
        self.targets.shutdown().await;
        self.folder.close().unwrap();
        drop(self.turn);
    }
}

fn run_edge(network: impl Network, config: Config) -> Party {
    let seed = rand::random();
    Party::start(|stop| parties::run_edge(config, network, seed, stop))
}

/// A socket whose buffers no longer grow by themselves.
pub(crate) fn shrink_buffers(socket: &impl AsFd) {
    const SMALL: usize = 64 * 1024;
    let socket = SockRef::from(socket);
    socket.set_send_buffer_size(SMALL).unwrap();
    socket.set_recv_buffer_size(SMALL).unwrap();
}

/// The network of the machine, with small buffers in every socket that an edge dials.
#[derive(Clone, Copy)]
struct SmallBuffers;

impl Network for SmallBuffers {
    type Conn = Socket;

    async fn connect(&self, host: &Host, port: u16) -> Result<Socket, DialError> {
        SystemNetwork.connect(host, port).await.inspect(shrink_buffers)
    }
}

fn kubelet_address(which: usize) -> IpAddr {
    [Ipv4Addr::new(127, 0, 0, 2), Ipv4Addr::new(127, 0, 0, 3)][which].into()
}

/// One port on both addresses.
async fn bind_kubelets() -> [TcpListener; 2] {
    loop {
        let first = TcpListener::bind((kubelet_address(0), 0)).await.unwrap();
        let port = first.local_addr().unwrap().port();
        match TcpListener::bind((kubelet_address(1), port)).await {
            Ok(second) => return [first, second],
            // Somebody has just that port.
            Err(error) => assert_eq!(error.kind(), io::ErrorKind::AddrInUse),
        }
    }
}

/// A port that was ours until now.
async fn bind_again(address: SocketAddr) -> TcpListener {
    let binding = async {
        loop {
            match TcpListener::bind(address).await {
                Ok(listener) => return listener,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::AddrInUse),
            }
            sleep(POLL).await;
        }
    };
    within("binding the same port again", binding).await
}

/// Sends some bytes one way and the same back, to see that both directions work.
pub(crate) async fn ping(
    client: &mut (impl AsyncRead + AsyncWrite + Unpin),
    target: &mut (impl AsyncRead + AsyncWrite + Unpin),
) {
    let exchange = async {
        let (sent, mut received) = (*b"from one end to the other", [0; 25]);
        client.write_all(&sent).await.unwrap();
        client.flush().await.unwrap();
        target.read_exact(&mut received).await.unwrap();
        target.write_all(&received).await.unwrap();
        client.read_exact(&mut received).await.unwrap();
        assert_eq!(received, sent);
    };
    within("a ping", exchange).await;
}

/// Carries more through a stream, and ends it.
pub(crate) async fn finish(mut client: Client, mut target: TcpStream) {
    ping(&mut client, &mut target).await;
    client.write_all(b"the end").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    within("the client's end", target.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "the end");
    target.write_all(b"and its answer").await.unwrap();
    target.shutdown().await.unwrap();
    text.clear();
    within("the target's end", client.read_to_string(&mut text)).await.unwrap();
    assert_eq!(text, "and its answer");
}

/// How the kernel ended a connection: reads the raw socket, below any TLS, to its end.
pub(crate) async fn raw_end(tcp: TcpStream) -> Result<(), io::ErrorKind> {
    let mut tcp = tcp.into_std().unwrap();
    tcp.set_nonblocking(false).unwrap();
    // A read that times out is told as `WouldBlock`.
    tcp.set_read_timeout(Some(LIMIT)).unwrap();
    let reading = spawn_blocking(move || {
        let mut piece = [0; 16 * 1024];
        while tcp.read(&mut piece).map_err(|error| error.kind())? > 0 {}
        Ok(())
    });
    reading.await.unwrap()
}

/// Both ends, or whichever there is, must have been reset by the kernel: ECONNRESET, no end of file.
pub(crate) async fn assert_reset(what: &str, ends: impl IntoIterator<Item = TcpStream>) {
    for tcp in ends {
        assert_eq!(raw_end(tcp).await, Err(io::ErrorKind::ConnectionReset), "{what}");
    }
}

/// The connection below a client's TLS.
pub(crate) fn raw(client: Client) -> TcpStream {
    client.into_inner().0
}
