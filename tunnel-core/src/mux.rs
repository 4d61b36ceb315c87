//! The multiplexer under a link. The only file that knows yamux; an engine of our own can take its place.
//!
//! One task owns the yamux connection and polls it all the time, as the crate demands. Streams are opened through a
//! [`MuxHandle`]; inbound ones arrive on a channel. Between yamux and TLS stands [`Coalesce`], which joins the header
//! and the body of a frame into one write, and so into one TLS record, and notes when bytes were last heard.

use std::{
    collections::VecDeque,
    future::Future,
    io,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{mpsc, oneshot},
    time::Instant,
};
use tokio_util::{
    compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt},
    task::AbortOnDropHandle,
};

/// Most plaintext that fits one TLS record (RFC 8446, section 5.1).
const TLS_RECORD: usize = 16 * 1024;
/// Header of a yamux frame.
const FRAME_HEADER: usize = 12;
/// Largest body of a data frame: with its header it fills one TLS record.
const FRAME_BODY: usize = TLS_RECORD - FRAME_HEADER;
/// Room for joining frames before they are handed to TLS.
const COALESCE: usize = 4 * TLS_RECORD;
/// yamux gives every stream this much receive window at least.
pub(crate) const STREAM_WINDOW: usize = 256 * 1024;
/// yamux ends the whole connection when a peer has more streams than allowed, and counts a stream until its last
/// frame is written. Streams are refused one by one far below that, at the configured maximum.
const STREAM_HEADROOM: usize = 4;
/// Requests for new streams that may wait for the connection's task.
const OPENS_WAITING: usize = 64;

/// A multiplexed stream. Its end of file means only that no more bytes will come: see [`crate::proto::ends`].
///
/// Boxed, since a channel of them has room for 32 from its beginning, and every idle link has such a channel.
pub(crate) type MuxStream = Box<Compat<yamux::Stream>>;

/// Which side of the link this is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Side {
    /// Made the TLS connection.
    Dialer,
    /// Took it.
    Acceptor,
}

#[derive(Clone, Copy, Debug)]
pub(crate) struct MuxConfig {
    /// Streams at once, before this side's users refuse more.
    pub(crate) max_streams: usize,
    /// Receive windows of all streams together may grow by this much beyond [`STREAM_WINDOW`] each, in bytes.
    pub(crate) window_budget: usize,
}

/// Why the connection ended.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum MuxError {
    #[error("the far side closed the connection")]
    ClosedByPeer,
    #[error("{0}")]
    Io(Arc<io::Error>),
    #[error("not the multiplexer's protocol: {0}")]
    Protocol(String),
}

enum Command {
    Open(oneshot::Sender<Result<MuxStream, OpenFailed>>),
    Close,
}

/// Why a stream could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum OpenFailed {
    /// The connection has ended.
    Ended,
    /// It holds as many streams as it can.
    TooMany,
}

/// Opens streams. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct MuxHandle {
    commands: mpsc::Sender<Command>,
}

impl MuxHandle {
    /// Cancel-safe: an open that nobody waits for any more leaves nothing behind.
    pub(crate) async fn open(&self) -> Result<MuxStream, OpenFailed> {
        let (reply, opened) = oneshot::channel();
        self.commands.send(Command::Open(reply)).await.map_err(|_| OpenFailed::Ended)?;
        opened.await.map_err(|_| OpenFailed::Ended)?
    }

    /// Asks for an orderly end: what is queued is sent, then the connection is closed.
    pub(crate) async fn close(&self) {
        let _ = self.commands.send(Command::Close).await;
    }
}

/// A running multiplexer. Dropping `task` ends the connection at once.
pub(crate) struct Mux {
    pub(crate) handle: MuxHandle,
    pub(crate) inbound: mpsc::Receiver<MuxStream>,
    pub(crate) task: AbortOnDropHandle<Result<(), MuxError>>,
    pub(crate) heard: Arc<LastHeard>,
}

impl Mux {
    pub(crate) fn start<T>(io: T, side: Side, config: MuxConfig) -> Self
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let mode = match side {
            Side::Dialer => yamux::Mode::Client,
            Side::Acceptor => yamux::Mode::Server,
        };
        let heard = Arc::new(LastHeard::now());
        let io = Coalesce::new(io, heard.clone()).compat();
        let connection = yamux::Connection::new(io, yamux_config(config), mode);
        let (commands, received) = mpsc::channel(OPENS_WAITING);
        let (accepted, inbound) = mpsc::channel(config.max_streams + 1);
        let driver =
            Driver { connection, commands: received, opens: VecDeque::new(), accepted, closing: false };
        let task = AbortOnDropHandle::new(tokio::spawn(driver));
        Self { handle: MuxHandle { commands }, inbound, task, heard }
    }
}

fn yamux_config(config: MuxConfig) -> yamux::Config {
    let max_streams = config.max_streams * STREAM_HEADROOM + OPENS_WAITING;
    let mut yamux = yamux::Config::default();
    // In this order: the crate asserts at each step that every stream can have its window.
    yamux.set_max_connection_receive_window(None);
    yamux.set_max_num_streams(max_streams);
    yamux.set_max_connection_receive_window(Some(max_streams * STREAM_WINDOW + config.window_budget));
    yamux.set_split_send_size(FRAME_BODY);
    yamux
}

/// The task that owns the connection.
struct Driver<T> {
    connection: yamux::Connection<T>,
    commands: mpsc::Receiver<Command>,
    opens: VecDeque<oneshot::Sender<Result<MuxStream, OpenFailed>>>,
    accepted: mpsc::Sender<MuxStream>,
    closing: bool,
}

/// A future by hand: an `async fn` that takes `self` has room for it twice, and every link has one.
impl<T> Future for Driver<T>
where
    T: futures_util::AsyncRead + futures_util::AsyncWrite + Send + Unpin + 'static,
{
    type Output = Result<(), MuxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), MuxError>> {
        loop {
            self.poll_commands(cx);
            if self.closing {
                return self.connection.poll_close(cx).map_err(into_error);
            }
            self.poll_opens(cx);
            match ready!(self.connection.poll_next_inbound(cx)) {
                // A full channel means that the peer opens faster than this side refuses: dropping resets the stream.
                Some(Ok(stream)) => drop(self.accepted.try_send(Box::new(stream.compat()))),
                Some(Err(error)) => return Poll::Ready(Err(into_error(error))),
                None => return Poll::Ready(Err(MuxError::ClosedByPeer)),
            }
        }
    }
}

impl<T> Driver<T>
where
    T: futures_util::AsyncRead + futures_util::AsyncWrite + Send + Unpin + 'static,
{
    /// Takes commands while there is room, so that the channel's bound holds.
    fn poll_commands(&mut self, cx: &mut Context<'_>) {
        while self.opens.len() < OPENS_WAITING {
            match self.commands.poll_recv(cx) {
                Poll::Ready(Some(Command::Open(reply))) => self.opens.push_back(reply),
                Poll::Ready(Some(Command::Close)) => self.closing = true,
                Poll::Ready(None) | Poll::Pending => break,
            }
        }
    }

    fn poll_opens(&mut self, cx: &mut Context<'_>) {
        while let Some(reply) = self.opens.pop_front() {
            if reply.is_closed() {
                continue;
            }
            match self.connection.poll_new_outbound(cx) {
                Poll::Ready(Ok(stream)) => drop(reply.send(Ok(Box::new(stream.compat())))),
                Poll::Ready(Err(yamux::ConnectionError::TooManyStreams)) => {
                    drop(reply.send(Err(OpenFailed::TooMany)));
                }
                Poll::Ready(Err(_)) => drop(reply.send(Err(OpenFailed::Ended))),
                Poll::Pending => {
                    self.opens.push_front(reply);
                    return;
                }
            }
        }
    }
}

fn into_error(error: yamux::ConnectionError) -> MuxError {
    match error {
        yamux::ConnectionError::Closed => MuxError::ClosedByPeer,
        yamux::ConnectionError::Io(error)
        | yamux::ConnectionError::Decode(yamux::FrameDecodeError::Io(error)) => MuxError::Io(Arc::new(error)),
        other => MuxError::Protocol(other.to_string()),
    }
}

/// When bytes last came from the far side.
#[derive(Debug)]
pub(crate) struct LastHeard {
    start: Instant,
    micros: AtomicU64,
}

impl LastHeard {
    fn now() -> Self {
        Self { start: Instant::now(), micros: AtomicU64::new(0) }
    }

    fn note(&self) {
        let micros = self.start.elapsed().as_micros();
        self.micros.store(u64::try_from(micros).unwrap_or(u64::MAX), Relaxed);
    }

    pub(crate) fn at(&self) -> Instant {
        self.start + Duration::from_micros(self.micros.load(Relaxed))
    }
}

/// Joins small writes until they are flushed or fill the buffer. yamux flushes after each frame, so a frame's header
/// and body leave together and nothing waits for more to come.
struct Coalesce<T> {
    io: T,
    buffer: Vec<u8>,
    written: usize,
    heard: Arc<LastHeard>,
}

impl<T: AsyncWrite + Unpin> Coalesce<T> {
    fn new(io: T, heard: Arc<LastHeard>) -> Self {
        Self { io, buffer: Vec::new(), written: 0, heard }
    }

    fn poll_drain(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while self.written < self.buffer.len() {
            match ready!(Pin::new(&mut self.io).poll_write(cx, &self.buffer[self.written..]))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                n => self.written += n,
            }
        }
        // Freed rather than kept: most links are idle most of the time, and there are many.
        self.buffer = Vec::new();
        self.written = 0;
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for Coalesce<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.buffer.len() + bytes.len() > COALESCE {
            ready!(this.poll_drain(cx))?;
        }
        let taken = bytes.len().min(COALESCE);
        if this.buffer.capacity() == 0 {
            this.buffer.reserve_exact(TLS_RECORD);
        }
        this.buffer.extend_from_slice(&bytes[..taken]);
        Poll::Ready(Ok(taken))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        ready!(self.poll_drain(cx))?;
        Pin::new(&mut self.io).poll_shutdown(cx)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for Coalesce<T> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.io).poll_read(cx, buf))?;
        if buf.filled().len() > before {
            self.heard.note();
        }
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const CONFIG: MuxConfig = MuxConfig { max_streams: 4, window_budget: 0 };

    /// Records each write that reaches it.
    struct Writes(Vec<Vec<u8>>);

    impl AsyncWrite for Writes {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.0.push(bytes.to_vec());
            Poll::Ready(Ok(bytes.len()))
        }
        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test]
    async fn a_frame_fills_exactly_one_record() {
        let mut writer = Coalesce::new(Writes(Vec::new()), Arc::new(LastHeard::now()));
        for _ in 0..3 {
            writer.write_all(&[1; FRAME_HEADER]).await.unwrap();
            writer.write_all(&[2; FRAME_BODY]).await.unwrap();
            writer.flush().await.unwrap();
        }
        let lengths: Vec<usize> = writer.io.0.iter().map(Vec::len).collect();
        assert_eq!(lengths, [TLS_RECORD; 3]);
    }

    #[tokio::test]
    async fn more_streams_than_allowed_are_reset_one_by_one() {
        let (near, far) = tokio::io::duplex(1 << 20);
        let dialer = Mux::start(near, Side::Dialer, MuxConfig { max_streams: 64, ..CONFIG });
        let mut acceptor = Mux::start(far, Side::Acceptor, CONFIG);
        let mut streams = Vec::new();
        for _ in 0..12 {
            let mut stream = dialer.handle.open().await.unwrap();
            stream.write_all(b"x").await.unwrap();
            streams.push(stream);
        }
        // The channel holds five; the others are gone, and the connection is not.
        let mut last = streams.pop().unwrap();
        assert_eq!(last.read(&mut [0; 1]).await.unwrap(), 0);
        let mut first = acceptor.inbound.recv().await.unwrap();
        assert_eq!(first.read(&mut [0; 1]).await.unwrap(), 1);
        assert!(!acceptor.task.is_finished());
    }

    #[tokio::test]
    async fn bytes_that_are_not_yamux_end_the_connection_with_a_reason() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mux = Mux::start(near, Side::Acceptor, CONFIG);
        far.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let error = mux.task.await.unwrap().unwrap_err();
        assert!(matches!(error, MuxError::Protocol(_)), "{error}");
    }
}
