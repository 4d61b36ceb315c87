//! The admin listener: health, readiness and metrics over plain HTTP/1.1, for probes and Prometheus.
//!
//! It has no authentication and tells nothing secret; bind it to loopback, or where only probes get to. Whoever can connect
//! can keep all its connections busy, but not keep others out: the one that has been idle longest goes when another comes.

use std::{convert::Infallible, fmt::Write, sync::Arc, time::Duration};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::{
    encoding::text::encode,
    metrics::{counter::Counter, gauge::Gauge},
    registry::Registry,
};
use tokio::{
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};

use super::{
    accept::Pause,
    log,
    tasks::TaskSet,
    waiting::{Seat, WaitingRoom},
};

/// A request's head must come within this time; an idle connection is closed after it too.
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
/// No connection lives longer, so that a client that does not read its answer cannot keep its place.
const CONNECTION_LIFETIME: Duration = Duration::from_secs(60);
/// Connections at one time. For more, those go that have been idle longest.
pub const MAX_CONNECTIONS: usize = 64;

const TEXT: &str = "text/plain; charset=utf-8";
const OPEN_METRICS: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// All that there is, with a word on each: what a 404 says.
const PATHS: &str = "\
/healthz  200 while the process runs
/readyz   200 when it can do its work, 503 and the reason when not
/metrics  metrics for Prometheus (OpenMetrics text)
";

/// What the listener answers with.
struct Admin {
    ready: Box<dyn Fn() -> Result<(), String> + Send + Sync>,
    registry: Registry,
}

/// Serves until `stop` is cancelled; connections that still run are then dropped. `ready` says why not, in one line.
pub async fn serve(
    listener: TcpListener,
    ready: impl Fn() -> Result<(), String> + Send + Sync + 'static,
    registry: Registry,
    panics: &Counter,
    stop: CancellationToken,
) {
    let admin = Arc::new(Admin { ready: Box::new(ready), registry });
    let mut connections = TaskSet::new("a connection of the admin endpoint", panics);
    let room = WaitingRoom::new(MAX_CONNECTIONS, Gauge::default(), Counter::default());
    let mut pause = Pause::default();
    loop {
        let next = async {
            pause.over().await;
            listener.accept().await
        };
        tokio::select! {
            // The end comes first; then places are freed before new ones are taken.
            biased;
            () = stop.cancelled() => break,
            Some(()) = connections.next_ended() => pause.cut_short(),
            accepted = next => match accepted {
                Ok((stream, peer)) => {
                    pause.forget();
                    room.enter(peer.ip(), |seat| connections.spawn(connection(stream, admin.clone(), seat)));
                }
                Err(error) => {
                    let pause_ms = pause.begin().as_millis();
                    warn!(%error, pause_ms, "admin: cannot accept a connection; trying again");
                    room.displace();
                }
            },
        }
    }
    connections.shutdown().await;
}

async fn connection(stream: TcpStream, admin: Arc<Admin>, seat: Seat) {
    let service = service_fn(move |request: Request<Incoming>| {
        seat.renew();
        let response = admin.answer(request.method(), request.uri().path());
        async { Ok::<_, Infallible>(response) }
    });
    let serving = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEADER_TIMEOUT)
        .serve_connection(TokioIo::new(stream), service);
    match timeout(CONNECTION_LIFETIME, serving).await {
        Ok(Ok(())) => {}
        // What a scanner or an aborted probe does is no news.
        Ok(Err(error)) => debug!(%error, "admin: connection ended early"),
        Err(_) => debug!("admin: connection ended after its longest time"),
    }
}

impl Admin {
    fn answer(&self, method: &Method, path: &str) -> Response<Full<Bytes>> {
        let known = PATHS.lines().any(|line| line.split_whitespace().next() == Some(path));
        if !known {
            return reply(StatusCode::NOT_FOUND, TEXT, format!("nothing at this path; there are:\n{PATHS}"));
        }
        if method != Method::GET && method != Method::HEAD {
            let mut response = reply(StatusCode::METHOD_NOT_ALLOWED, TEXT, "use GET\n");
            response.headers_mut().insert(header::ALLOW, header::HeaderValue::from_static("GET, HEAD"));
            return response;
        }
        match path {
            "/readyz" => match (self.ready)() {
                Ok(()) => reply(StatusCode::OK, TEXT, "ok\n"),
                Err(reason) => reply(StatusCode::SERVICE_UNAVAILABLE, TEXT, one_line(&reason)),
            },
            "/metrics" => self.metrics(),
            _ => reply(StatusCode::OK, TEXT, "ok\n"),
        }
    }

    fn metrics(&self) -> Response<Full<Bytes>> {
        let mut text = String::new();
        match encode(&mut text, &self.registry) {
            Ok(()) => reply(StatusCode::OK, OPEN_METRICS, text),
            Err(error) => {
                warn!(%error, "admin: metrics cannot be written");
                reply(StatusCode::INTERNAL_SERVER_ERROR, TEXT, "metrics cannot be written\n")
            }
        }
    }
}

fn one_line(reason: &str) -> String {
    let mut line = String::with_capacity(reason.len() + 1);
    for word in reason.split_whitespace() {
        let gap = if line.is_empty() { "" } else { " " };
        let _ = write!(line, "{gap}{}", log::one_line(word));
    }
    line + "\n"
}

fn reply(status: StatusCode, kind: &'static str, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(header::CONTENT_TYPE, header::HeaderValue::from_static(kind));
    response
}

#[cfg(test)]
mod tests {
    use std::{
        net::SocketAddr,
        sync::atomic::{AtomicBool, Ordering::Relaxed},
    };

    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;

    struct Running {
        address: SocketAddr,
        ready: Arc<AtomicBool>,
        stop: CancellationToken,
        task: tokio::task::JoinHandle<()>,
    }

    async fn start() -> Running {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let mut registry = Registry::with_prefix("tunnel");
        let counter: Counter = Counter::default();
        registry.register("cups", "Cups of tea", counter.clone());
        counter.inc();
        let (ready, stop) = (Arc::new(AtomicBool::new(true)), CancellationToken::new());
        let is_ready = ready.clone();
        let check = move || {
            if is_ready.load(Relaxed) { Ok(()) } else { Err("no link\nto any\x1b[2J gateway".to_owned()) }
        };
        let task = {
            let stop = stop.clone();
            tokio::spawn(async move { serve(listener, check, registry, &Counter::default(), stop).await })
        };
        Running { address, ready, stop, task }
    }

    async fn ask(address: SocketAddr, request: &str) -> String {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let head = format!("{request} HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n");
        stream.write_all(head.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    }

    #[tokio::test]
    async fn answers_what_it_has() {
        let running = start().await;
        let answer = ask(running.address, "GET /healthz").await;
        assert!(answer.starts_with("HTTP/1.1 200 ") && answer.ends_with("\r\n\r\nok\n"), "{answer}");
        assert!(ask(running.address, "GET /readyz").await.starts_with("HTTP/1.1 200 "));
        running.ready.store(false, Relaxed);
        let answer = ask(running.address, "GET /readyz").await;
        assert!(answer.starts_with("HTTP/1.1 503 "), "{answer}");
        assert!(answer.ends_with("\r\n\r\nno link to any\\u{1b}[2J gateway\n"), "{answer}");
        let answer = ask(running.address, "GET /metrics?x=1").await;
        assert!(answer.contains("application/openmetrics-text"), "{answer}");
        assert!(answer.contains("tunnel_cups_total 1") && answer.ends_with("# EOF\n"), "{answer}");
    }

    #[tokio::test]
    async fn says_what_there_is() {
        let running = start().await;
        let answer = ask(running.address, "GET /metric").await;
        assert!(
            answer.starts_with("HTTP/1.1 404 ") && answer.contains("/metrics  metrics for Prometheus"),
            "{answer}"
        );
        let answer = ask(running.address, "POST /metrics").await;
        assert!(answer.starts_with("HTTP/1.1 405 ") && answer.contains("allow: GET, HEAD"), "{answer}");
    }

    #[tokio::test]
    async fn stops_with_connections_open() {
        let running = start().await;
        let mut idle = TcpStream::connect(running.address).await.unwrap();
        assert!(ask(running.address, "GET /healthz").await.starts_with("HTTP/1.1 200 "));
        running.stop.cancel();
        timeout(Duration::from_secs(5), running.task).await.unwrap().unwrap();
        assert_eq!(idle.read(&mut [0]).await.unwrap_or(0), 0);
    }

    #[tokio::test]
    async fn silent_connections_keep_nobody_out_and_are_bounded() {
        let running = start().await;
        let mut silent = Vec::new();
        for _ in 0..200 {
            silent.push(TcpStream::connect(running.address).await.unwrap());
        }
        let asked = std::time::Instant::now();
        let answer = timeout(HEADER_TIMEOUT, ask(running.address, "GET /healthz")).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
        assert!(asked.elapsed() < HEADER_TIMEOUT / 5, "answered after {:?}", asked.elapsed());
        // The oldest had to go, for all that came and for the one that asked.
        for (place, stream) in silent.iter_mut().enumerate() {
            let ended = timeout(Duration::from_millis(1), stream.read(&mut [0])).await.is_ok();
            assert_eq!(ended, place <= 200 - MAX_CONNECTIONS, "connection {place}");
        }
    }

    #[tokio::test]
    async fn a_connection_that_asks_again_and_again_outlives_those_that_are_silent() {
        let running = start().await;
        let mut asking = TcpStream::connect(running.address).await.unwrap();
        for _ in 0..4 {
            asking.write_all(b"GET /healthz HTTP/1.1\r\nhost: a\r\n\r\n").await.unwrap();
            let read = asking.read(&mut [0; 1024]).await.unwrap();
            assert!(read > 0, "the connection was closed");
            for _ in 0..MAX_CONNECTIONS / 2 {
                let _silent = TcpStream::connect(running.address).await.unwrap();
            }
        }
    }
}
