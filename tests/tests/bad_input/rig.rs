//! The world of one test: a gateway with all its doors, a good edge with an echoing target, and a bystander whose
//! stream runs from the first case to the last.

use std::{
    collections::BTreeMap,
    io,
    net::SocketAddr,
    path::PathBuf,
    sync::{Arc, Mutex, Once},
    thread::{self, ThreadId},
    time::Duration,
};

use tempfile::TempDir;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tokio_rustls::client::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing_subscriber::filter::LevelFilter;
use tunnel_core::tls::{Domain, ServerTls};
use tunnel_edge::{config::Config, network::SystemNetwork, policy::Policy};
use tunnel_server::{GatewaySettings, LinkLimits, UnixDoor};
use tunnel_tests::{
    connect::connect,
    parties::{self, GatewayProbe, edge_config, files, run_edge},
};

/// Nothing that is waited for may take longer.
pub(crate) const PATIENCE: Duration = Duration::from_secs(10);
/// Time limits of a gateway whose limits are tested.
pub(crate) const SHORT: Duration = Duration::from_millis(400);
/// Links of one node, and all together.
pub(crate) const LINKS: LinkLimits = LinkLimits { total: 4, per_node: 2 };
/// The node of the good edge.
const NODE: &str = "edge-a";
const POLL: Duration = Duration::from_millis(5);

/// `work`, which must end in time.
pub(crate) async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(PATIENCE, work).await.unwrap_or_else(|_| panic!("{what}: not within {PATIENCE:?}"))
}

/// Asks again and again until there is an answer.
pub(crate) async fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let asking = async {
        loop {
            if let Some(answer) = ask() {
                return answer;
            }
            sleep(POLL).await;
        }
    };
    soon(what, asking).await
}

/// The counter of lines that were left out of the log.
const LEFT_OUT: &str = "log_lines_left_out_total";

/// Metrics by name and labels.
type Counters = BTreeMap<String, i64>;

/// See the module's text.
pub(crate) struct Rig {
    pub(crate) edge_door: SocketAddr,
    pub(crate) ingress_door: SocketAddr,
    pub(crate) unix_door: PathBuf,
    /// Where the echoing target listens: the port that edges of this rig may dial on their node.
    pub(crate) echo: SocketAddr,
    pub(crate) probe: GatewayProbe,
    bystander: TlsStream<TcpStream>,
    said: u64,
    log: Log,
    /// What the counters must show.
    expected: Counters,
    shutdown: CancellationToken,
    tasks: JoinSet<()>,
    _folder: TempDir,
    _logging: tracing::subscriber::DefaultGuard,
}

/// Where a case begins.
pub(crate) struct Mark {
    case: String,
    logged: usize,
    /// Lines that were left out of the log until then.
    left_out: i64,
}

impl Rig {
    /// Its time limits are generous.
    pub(crate) async fn new() -> Self {
        Self::with_limits(PATIENCE).await
    }

    /// Its time limits for handshakes and heads are [`SHORT`].
    pub(crate) async fn impatient() -> Self {
        Self::with_limits(SHORT).await
    }

    async fn with_limits(limit: Duration) -> Self {
        let log = Log::default();
        let logging = log.capture();
        watch_panics();
        let folder = TempDir::with_prefix("bad-input-").unwrap();
        let unix_door = folder.path().join("ingress.sock");
        let (edges, ingress, target) = (listen().await, listen().await, listen().await);
        let [edge_door, ingress_door, echo] =
            [&edges, &ingress, &target].map(|listener| listener.local_addr().unwrap());
        let probe = GatewayProbe::default();
        let mut gateway = parties::gateway_with(settings(limit), &probe);
        gateway.serve_edges(edges, ServerTls::load(Domain::Edge, files(Domain::Edge, "gateway")).unwrap());
        let tls = ServerTls::load(Domain::ControlPlane, files(Domain::ControlPlane, "gateway")).unwrap();
        gateway.serve_ingress(ingress, tls);
        gateway.serve_ingress_plain(UnixDoor::bind(&unix_door, 0o600).unwrap());
        let (shutdown, mut tasks) = (CancellationToken::new(), JoinSet::new());
        let running = gateway.run(shutdown.clone());
        tasks.spawn(async { running.await.unwrap() });
        tasks.spawn(echo_all(target));
        let edge = good_edge(NODE, edge_door, echo);
        tasks.spawn(run_edge(edge, SystemNetwork, 1, shutdown.clone()));
        until("the good edge's link", || (probe.links() == 1).then_some(())).await;
        let bystander = bystander(ingress_door, echo).await;
        let expected = counters(&probe);
        Self {
            edge_door,
            ingress_door,
            unix_door,
            echo,
            probe,
            bystander,
            said: 0,
            log,
            expected,
            shutdown,
            tasks,
            _folder: folder,
            _logging: logging,
        }
    }

    /// Begins a case.
    pub(crate) fn case(&self, case: impl Into<String>) -> Mark {
        let case = case.into();
        Mark { case, logged: self.log.text().len(), left_out: left_out(&self.probe) }
    }

    /// Ends a case: exactly these counters have moved, once for each time they stand here; one line of the log says all
    /// of `words`; the bystander has noticed nothing.
    pub(crate) async fn expect(&mut self, mark: Mark, moved: &[String], words: &[&str]) {
        for counter in moved {
            *self.expected.entry(counter.clone()).or_default() += 1;
        }
        self.settle(&mark, words).await;
        self.bystander_echoes(&mark.case).await;
    }

    /// As [`Rig::expect`], for a case in which it is chance how often which counter that begins with `prefix` moves.
    pub(crate) async fn expect_some(&mut self, mark: Mark, prefix: &str, words: &[&str]) {
        self.bystander_echoes(&mark.case).await;
        for (counter, value) in counters(&self.probe) {
            if counter.starts_with(prefix) {
                self.expected.insert(counter, value);
            }
        }
        self.settle(&mark, words).await;
    }

    async fn settle(&self, mark: &Mark, words: &[&str]) {
        let said = |line: &str| words.iter().all(|word| line.contains(word));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let log = self.log.text().split_off(mark.logged);
            // Of one cause and source there are only so many lines a minute; the others are counted.
            let counted = left_out(&self.probe) > mark.left_out;
            let (now, found) = (counters(&self.probe), words.is_empty() || log.lines().any(said) || counted);
            if found && now == self.expected {
                return;
            }
            if Instant::now() > deadline {
                let differs = difference(&self.expected, &now);
                panic!(
                    "{}: counters: {differs:?}\nno line with {words:?} (found: {found}) in\n{log}",
                    mark.case
                );
            }
            sleep(POLL).await;
        }
    }

    /// What the log says since the case began.
    pub(crate) fn logged(&self, mark: &Mark) -> String {
        self.log.text().split_off(mark.logged)
    }

    async fn bystander_echoes(&mut self, case: &str) {
        self.said += 1;
        let words = format!("still here, {}", self.said);
        let mut heard = vec![0; words.len()];
        let echoing = async {
            self.bystander.write_all(words.as_bytes()).await?;
            self.bystander.flush().await?;
            self.bystander.read_exact(&mut heard).await
        };
        let echoed = soon("the bystander's echo", echoing).await;
        assert!(
            echoed.is_ok() && heard == words.as_bytes(),
            "{case}: the bystander was disturbed: {echoed:?}"
        );
    }

    /// Ends the test: the gateway holds nothing but the bystander's stream and its edge's link, which end cleanly.
    pub(crate) async fn finish(mut self) {
        let mark = self.case("at the end");
        self.expect(mark, &[], &[]).await;
        until("that only the bystander is left", || {
            let connections = self.probe.sum("tunnel_server_ingress_connections", "");
            ((self.probe.links(), self.probe.active_streams(), connections as usize) == (1, 1, 1))
                .then_some(())
        })
        .await;
        self.bystander.shutdown().await.unwrap();
        let rest = soon("the bystander's end", self.bystander.read_to_end(&mut Vec::new())).await;
        assert!(matches!(rest, Ok(0)), "the bystander did not end cleanly: {rest:?}");
        self.shutdown.cancel();
        // The gateway and its edge; the target listens on.
        for _ in 0..2 {
            soon("the drain", self.tasks.join_next()).await.unwrap().unwrap();
        }
        let panics = panics_here();
        assert!(panics.is_empty(), "tasks panicked: {panics:?}");
    }
}

async fn listen() -> TcpListener {
    TcpListener::bind("127.0.0.1:0").await.unwrap()
}

fn settings(limit: Duration) -> GatewaySettings {
    GatewaySettings {
        handshake_timeout: limit,
        header_timeout: limit,
        links: LINKS,
        allowed_clients: ["control-plane".to_owned()].into(),
        ..parties::settings(Duration::from_secs(5), 1)
    }
}

/// An edge that may dial the echoing target as its node's.
pub(crate) fn good_edge(node: &str, gateway: SocketAddr, echo: SocketAddr) -> Config {
    let rule = format!("node:{}", echo.port()).parse().unwrap();
    Config {
        policy: Policy::new(vec![rule], echo.ip()),
        proxy: tunnel_edge::config::ProxyChoice::Direct,
        ..edge_config(node, gateway.into())
    }
}

async fn bystander(ingress: SocketAddr, echo: SocketAddr) -> TlsStream<TcpStream> {
    let socket = TcpStream::connect(ingress).await.unwrap();
    let mut stream = parties::control_plane_tls(socket).await.unwrap();
    soon("200", connect(&mut stream, &format!("{NODE}:{}", echo.port()))).await.unwrap().unwrap();
    stream
}

async fn echo_all(listener: TcpListener) {
    let mut connections = JoinSet::new();
    while let Ok((mut socket, _)) = listener.accept().await {
        connections.spawn(async move {
            let (mut read, mut write) = socket.split();
            let _ = tokio::io::copy(&mut read, &mut write).await;
            let _ = write.shutdown().await;
        });
        while connections.try_join_next().is_some() {}
    }
}

/// All counters of the gateway, but for those of bytes.
fn counters(probe: &GatewayProbe) -> Counters {
    all_counters(probe).into_iter().filter(|(name, _)| !name.contains(LEFT_OUT)).collect()
}

/// Lines that the gateway has left out of its log.
fn left_out(probe: &GatewayProbe) -> i64 {
    all_counters(probe).into_iter().filter(|(name, _)| name.contains(LEFT_OUT)).map(|(_, value)| value).sum()
}

fn all_counters(probe: &GatewayProbe) -> Counters {
    let metrics = probe.metrics();
    let samples = metrics.lines().filter_map(|line| line.rsplit_once(' '));
    let counters = samples.filter(|(name, _)| !name.contains("_bytes_") && name.contains("_total"));
    counters.map(|(name, value)| (name.to_owned(), value.parse::<f64>().unwrap() as i64)).collect()
}

fn difference(expected: &Counters, now: &Counters) -> Vec<String> {
    let names: std::collections::BTreeSet<_> = expected.keys().chain(now.keys()).collect();
    let value = |counters: &Counters, name: &String| counters.get(name).copied().unwrap_or_default();
    let differing = names.into_iter().filter(|name| value(expected, name) != value(now, name));
    differing.map(|name| format!("{name} is {}, not {}", value(now, name), value(expected, name))).collect()
}

/// The counter of handshakes that failed.
pub(crate) fn handshake_failed(domain: &str, cause: &str) -> String {
    format!("tunnel_server_handshakes_failed_total{{domain=\"{domain}\",cause=\"{cause}\"}}")
}

/// The counter of edges that were rejected.
pub(crate) fn rejected(code: &str) -> String {
    format!("tunnel_server_rejects_total{{code=\"{code}\"}}")
}

/// The counter of requests that were answered.
pub(crate) fn answered(protocol: &str, status: u16, cause: &str) -> String {
    format!("tunnel_server_requests_total{{protocol=\"{protocol}\",status=\"{status}\",cause=\"{cause}\"}}")
}

/// The counter of links that came up.
pub(crate) fn link_opened() -> String {
    "tunnel_server_links_opened_total".to_owned()
}

/// The counter of links that ended.
pub(crate) fn link_closed(cause: &str) -> String {
    format!("tunnel_server_links_closed_total{{cause=\"{cause}\"}}")
}

/// What this thread logs, as the binaries write it at their default level.
#[derive(Clone, Default)]
struct Log(Arc<Mutex<Vec<u8>>>);

impl Log {
    /// The log of this thread goes here until the guard is dropped.
    fn capture(&self) -> tracing::subscriber::DefaultGuard {
        let log = self.clone();
        let subscriber = tracing_subscriber::fmt()
            .with_max_level(LevelFilter::INFO)
            .with_ansi(false)
            .with_writer(move || log.clone())
            .finish();
        tracing::subscriber::set_default(subscriber)
    }

    fn text(&self) -> String {
        String::from_utf8(self.0.lock().unwrap().clone()).unwrap()
    }
}

impl io::Write for Log {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.lock().unwrap().extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

static PANICS: Mutex<Vec<(ThreadId, String)>> = Mutex::new(Vec::new());

/// Remembers every panic of the process, by thread: a test and all its tasks share one.
fn watch_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let usual = std::panic::take_hook();
        std::panic::set_hook(Box::new(move |panic| {
            PANICS.lock().unwrap().push((thread::current().id(), panic.to_string()));
            usual(panic);
        }));
    });
}

fn panics_here() -> Vec<String> {
    let here = thread::current().id();
    let panics = PANICS.lock().unwrap();
    panics.iter().filter(|(thread, _)| *thread == here).map(|(_, text)| text.clone()).collect()
}
