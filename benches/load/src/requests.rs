//! Requests through the tunnel: CONNECT at the ingress, as kube-apiserver sends it, to an echo server behind an edge.
//! Called by the walk in `main`.

use std::{
    io,
    net::{Ipv4Addr, SocketAddr},
    time::{Duration, Instant},
};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    task::JoinSet,
    time::{interval, timeout},
};
use tokio_rustls::TlsConnector;
use tokio_util::task::AbortOnDropHandle;
use tunnel_core::{
    NodeId,
    tls::{ClientTls, Domain, TlsError},
};

use crate::{
    certificates::{Certificates, GATEWAY_NAME},
    report::Spread,
};

/// A request that takes longer has failed.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// Longest answer to a CONNECT.
const MAX_HEAD: usize = 16 * 1024;
/// What is sent and must come back.
const WORD: [u8; 1] = *b"x";

/// Why requests could not be measured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RequestError {
    #[error("the client's credentials cannot be used: {0}")]
    Tls(#[from] TlsError),
    #[error("a request to node {node} failed: {cause}")]
    Failed { node: NodeId, cause: String },
    #[error("a request's task failed: {0}")]
    Task(#[from] tokio::task::JoinError),
}

/// Which requests, and how many.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Requests {
    /// The port of the echo server that all edges dial.
    pub(crate) target: u16,
    pub(crate) count: u32,
    /// Begun per second.
    pub(crate) rate: u32,
    pub(crate) seed: u64,
}

/// What requests took.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Latency {
    /// From CONNECT to the first echoed byte: the tunnel's own part.
    pub(crate) routing: Spread,
    /// The same, with the connection to the ingress and its TLS handshake.
    pub(crate) whole: Spread,
}

impl Requests {
    /// Sends them to the nodes at random, to each through the ingress beside it, and each at its time whether or not earlier
    /// ones have been answered, so that a slow answer hides nothing. The first failure ends it.
    pub(crate) async fn run(
        self,
        nodes: &[(NodeId, SocketAddr)],
        certificates: &Certificates,
    ) -> Result<Latency, RequestError> {
        let tls = ClientTls::load(Domain::ControlPlane, certificates.client())?;
        let tls = tls.connector_offering(&[b"http/1.1"]);
        let mut rng = SmallRng::seed_from_u64(self.seed);
        let mut pace = interval(Duration::from_secs(1) / self.rate);
        // All that can be under way is bounded by rate and time limit.
        let mut under_way = JoinSet::new();
        let (mut routing, mut whole) = (Vec::new(), Vec::new());
        let mut begun = 0;
        while begun < self.count || !under_way.is_empty() {
            tokio::select! {
                // What has ended first, so that a failure is seen at once.
                biased;
                Some(ended) = under_way.join_next() => {
                    let (tunnel, all): (Duration, Duration) = ended??;
                    routing.push(tunnel);
                    whole.push(all);
                }
                _ = pace.tick(), if begun < self.count => {
                    begun += 1;
                    let (node, ingress) = nodes[rng.random_range(0..nodes.len())].clone();
                    let tls = tls.clone();
                    under_way.spawn(async move {
                        let asked = timeout(REQUEST_LIMIT, self.ask(&tls, &node, ingress)).await;
                        let answer = asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
                        answer.map_err(|error| RequestError::Failed { node, cause: error.to_string() })
                    });
                }
            }
        }
        Ok(Latency { routing: Spread::of(routing), whole: Spread::of(whole) })
    }

    /// One request: how long the tunnel took, and how long all of it.
    async fn ask(
        self,
        tls: &TlsConnector,
        node: &NodeId,
        ingress: SocketAddr,
    ) -> io::Result<(Duration, Duration)> {
        let begun = Instant::now();
        let connection = TcpStream::connect(ingress).await?;
        connection.set_nodelay(true)?;
        let name = ServerName::try_from(GATEWAY_NAME).map_err(io::Error::other)?;
        let mut connection = tls.connect(name, connection).await?;
        let connected = Instant::now();
        let target = self.target;
        let head = format!("CONNECT {node}:{target} HTTP/1.1\r\nHost: {node}:{target}\r\n\r\n");
        connection.write_all(head.as_bytes()).await?;
        let mut answer = Vec::new();
        while !answer.ends_with(b"\r\n\r\n") {
            // The far side sends nothing behind its answer before it has got something to echo.
            if answer.len() > MAX_HEAD || connection.read_buf(&mut answer).await? == 0 {
                return Err(io::Error::other("the gateway's answer to CONNECT does not end"));
            }
        }
        if !answer.starts_with(b"HTTP/1.1 200") {
            return Err(io::Error::other(String::from_utf8_lossy(&answer).into_owned()));
        }
        connection.write_all(&WORD).await?;
        let mut echoed = [0; WORD.len()];
        connection.read_exact(&mut echoed).await?;
        let times = (connected.elapsed(), begun.elapsed());
        if echoed != WORD {
            return Err(io::Error::other("what came back is not what was sent"));
        }
        connection.shutdown().await?;
        Ok(times)
    }
}

/// Sends back what it gets, on loopback, until it is dropped. It stands for the kubelets of all nodes.
pub(crate) struct Echo {
    port: u16,
    _task: AbortOnDropHandle<()>,
}

impl Echo {
    pub(crate) async fn start() -> io::Result<Self> {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await?;
        let port = listener.local_addr()?.port();
        let task = tokio::spawn(async move {
            let mut connections = JoinSet::new();
            while let Ok((connection, _)) = listener.accept().await {
                while connections.try_join_next().is_some() {}
                connections.spawn(echo(connection));
            }
        });
        Ok(Self { port, _task: AbortOnDropHandle::new(task) })
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }
}

async fn echo(mut connection: TcpStream) {
    let _ = connection.set_nodelay(true);
    let (mut from, mut to) = connection.split();
    // A connection that breaks concerns its caller, who notices.
    let _ = tokio::io::copy(&mut from, &mut to).await;
}
