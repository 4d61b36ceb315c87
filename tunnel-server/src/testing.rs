//! What the tests of this crate share: links without sockets, legs that remember how they ended, the log.

use std::{
    fmt::{self, Write as _},
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll},
    time::Duration,
};

use parking_lot::Mutex;
use prometheus_client::registry::Registry as MetricsRegistry;
use tokio::{
    io::{AsyncRead, AsyncWrite, BufReader, DuplexStream, ReadBuf, duplex},
    sync::Notify,
    task::JoinHandle,
    time::Instant,
};
use tracing::{
    Dispatch, Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    span,
    subscriber::DefaultGuard,
};
use tunnel_core::{
    Aborted, Leg, Link, LinkConfig, LinkError, LinkEvent, LinkHandle, Lost, NodeId, PendingStream,
    proto::messages::{Hello, Welcome},
};

use crate::metrics::Metrics;

pub(crate) fn metrics() -> Metrics {
    Metrics::new(&mut MetricsRegistry::default())
}

pub(crate) fn node(name: &str) -> NodeId {
    name.parse().unwrap()
}

/// A link whose gateway's side is held by a task, and whose edge's side is the test's.
pub(crate) struct TestLink {
    pub(crate) gateway: LinkHandle,
    pub(crate) edge: Link,
    drained: Arc<Notify>,
    end: JoinHandle<LinkError>,
}

impl TestLink {
    pub(crate) async fn up() -> Self {
        Self::with(LinkConfig::default()).await
    }

    pub(crate) async fn with(config: LinkConfig) -> Self {
        let (near, far) = duplex(64 * 1024);
        let hello = Hello { min_version: 1, max_version: 1, ..Hello::default() };
        let welcome = Welcome { version: 1, heartbeat_ms: 10_000, ..Welcome::default() };
        let (edge, mut gateway) =
            tokio::join!(Link::connect(BufReader::new(near), hello, LinkConfig::default()), async {
                Link::accept(BufReader::new(far), config).await.unwrap().welcome(welcome).unwrap()
            });
        let (handle, drained) = (gateway.handle(), Arc::new(Notify::new()));
        let notify = drained.clone();
        let end = tokio::spawn(async move {
            loop {
                match gateway.next().await {
                    LinkEvent::Closed(error) => return error,
                    LinkEvent::Draining(_) => notify.notify_one(),
                    _ => {}
                }
            }
        });
        Self { gateway: handle, edge: edge.unwrap().0, drained, end }
    }

    /// The edge asks for no more streams, and the gateway has heard it.
    pub(crate) async fn edge_drains(&self) {
        self.edge.handle().drain(Duration::from_secs(30), "test");
        self.drained.notified().await;
    }

    /// How the link ended for the gateway.
    pub(crate) async fn closed(self) -> LinkError {
        self.end.await.unwrap()
    }

    /// The next stream that the gateway opens.
    pub(crate) async fn pending(&mut self) -> PendingStream {
        loop {
            if let LinkEvent::Stream(incoming) = self.edge.next().await {
                return incoming.header(Instant::now() + Duration::from_secs(5)).await.unwrap();
            }
        }
    }
}

/// A connection without a socket. `aborted` holds the reason once a relay has aborted it.
pub(crate) struct TestLeg {
    io: DuplexStream,
    pub(crate) aborted: Arc<Mutex<Option<Aborted>>>,
}

impl TestLeg {
    /// The gateway's side and the client's.
    pub(crate) fn pair() -> (Self, DuplexStream) {
        Self::pair_with(64 * 1024)
    }

    /// So many bytes may be on their way, each way.
    pub(crate) fn pair_with(room: usize) -> (Self, DuplexStream) {
        let (near, far) = duplex(room);
        (Self { io: near, aborted: Arc::default() }, far)
    }
}

impl AsyncRead for TestLeg {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_read(cx, buf)
    }
}

impl AsyncWrite for TestLeg {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl Leg for TestLeg {
    fn abort(&mut self, reason: &Aborted) {
        self.aborted.lock().get_or_insert_with(|| reason.clone());
    }

    /// Whatever happens to a pipe in memory, a read tells.
    fn poll_lost(&mut self, _: &mut Context<'_>) -> Poll<Lost> {
        Poll::Pending
    }

    fn vanished(&self) -> Option<io::Error> {
        None
    }
}

/// What this thread logs, until dropped.
pub(crate) struct Log {
    lines: Lines,
    _guard: DefaultGuard,
}

type Lines = Arc<Mutex<Vec<(Level, String)>>>;

impl Log {
    pub(crate) fn start() -> Self {
        // With only one subscriber around, whichever thread comes to a line of code first decides for all threads whether
        // it is logged. This one makes two.
        static SECOND: OnceLock<Dispatch> = OnceLock::new();
        SECOND.get_or_init(|| Dispatch::new(Recorder(Lines::default())));
        let lines = Lines::default();
        let guard = tracing::subscriber::set_default(Recorder(lines.clone()));
        Self { lines, _guard: guard }
    }

    /// The lines of this level in which these words are.
    pub(crate) fn lines(&self, level: Level, words: &str) -> Vec<String> {
        let lines = self.lines.lock();
        let wanted = lines.iter().filter(|(of, line)| *of == level && line.contains(words));
        wanted.map(|(_, line)| line.clone()).collect()
    }
}

struct Recorder(Lines);

impl Subscriber for Recorder {
    fn enabled(&self, _: &Metadata<'_>) -> bool {
        true
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn event(&self, event: &Event<'_>) {
        let mut line = Line(String::new());
        event.record(&mut line);
        self.0.lock().push((*event.metadata().level(), line.0));
    }

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        write!(self.0, "{}={value:?} ", field.name()).unwrap();
    }
}
