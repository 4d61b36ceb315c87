//! The multiplexer under a link: the session of [`crate::proto::yamux`], put between a connection and its users.
//!
//! One task owns the connection: it writes what the session gives and hands it what comes. Streams speak with the
//! session directly, under its lock, which nobody holds longer than it takes to copy a buffer; so bytes cross no channel.

use std::{
    collections::VecDeque,
    fmt,
    future::{Future, poll_fn},
    io::{self, IoSlice},
    ops::RangeInclusive,
    pin::Pin,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::Buf;
use parking_lot::Mutex;
use tokio::{
    io::{AsyncBufRead, AsyncRead, AsyncWrite, BufReader, ReadBuf},
    time::Instant,
};
use tokio_rustls::{client, server};
use tokio_util::{io::poll_write_buf, task::AbortOnDropHandle};

use crate::{
    pace::Pace,
    proto::{
        Side,
        yamux::{
            self, Batch, Chunk, Place, Session, WindowPool,
            frame::{GoAway, Header},
        },
    },
    read_ahead::{AHEAD, ReadAhead},
    relay::Arrived,
};

pub(crate) use crate::proto::yamux::OpenFailed;

/// Bytes handed to TLS at once, by the connection's pace: full records, which leave in one system call.
pub(crate) const WRITE_BATCH: RangeInclusive<usize> = 64 * 1024..=256 * 1024;
/// What a link has in memory beside its windows, in bytes: a batch, the next one in chunks that may be half full, as much as
/// a batch in TLS, and what was read ahead.
pub const LINK_BUFFERS: usize = 4 * *WRITE_BATCH.end() + AHEAD;
/// Bytes taken from TLS, which gives them record by record, before those are woken whom they are for.
const READ_BATCH: usize = 256 * 1024;
/// Bytes that a stream takes from the session at once, to hand them on in as few writes as it can.
pub(crate) const READ_AT_ONCE: usize = 128 * 1024;
/// Writes and reads in one turn of the task, before others have theirs.
const TURNS: usize = 8;
/// The receive window of a stream, in bytes, before it grows into the link's budget: what yamux gives each at least.
pub const STREAM_WINDOW: usize = yamux::INITIAL as usize;
// What is taken counts until the reader comes for more. If that were most of the window, the sender would wait each time.
const _: () = assert!(READ_AT_ONCE <= STREAM_WINDOW / 2);
/// Streams are refused with a reason beyond the configured maximum. Those that are just being refused, or whose last
/// bytes have not left yet, count too: up to as many as this for each of the maximum, and some more.
const STREAM_HEADROOM: (usize, usize) = (2, 64);

#[derive(Clone, Debug)]
pub(crate) struct MuxConfig {
    /// Streams at once, before this side's users refuse more.
    pub(crate) max_streams: usize,
    /// Receive windows of all streams together may grow by this much beyond [`STREAM_WINDOW`] each, in bytes.
    pub(crate) window_budget: usize,
    /// Shared with other connections: they may grow no further than that either.
    pub(crate) window_pool: Option<Arc<WindowPool>>,
    /// As if so many streams had been opened before.
    pub(crate) streams_before: u32,
}

impl MuxConfig {
    fn session(self, side: Side) -> Session {
        let (each, more) = STREAM_HEADROOM;
        let max_streams = self.max_streams * each + more;
        let config = yamux::Config { max_streams, window_budget: self.window_budget };
        let session = Session::new(side, config).having_opened(self.streams_before);
        match self.window_pool {
            Some(pool) => session.sharing(pool),
            None => session,
        }
    }
}

/// A connection that can carry a link.
pub trait Carrier: AsyncBufRead + AsyncWrite + Send + Unpin + 'static {
    /// Bytes that have come from the far side and that may not have been given to the reader, since something in between
    /// waits for more of them: TLS, for a whole record. 0 where nothing does.
    fn received(&self) -> u64;
}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Carrier for client::TlsStream<ReadAhead<T>> {
    fn received(&self) -> u64 {
        self.get_ref().0.received()
    }
}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Carrier for server::TlsStream<ReadAhead<T>> {
    fn received(&self) -> u64 {
        self.get_ref().0.received()
    }
}

impl<T: AsyncRead + AsyncWrite + Send + Unpin + 'static> Carrier for BufReader<T> {
    fn received(&self) -> u64 {
        0
    }
}

impl<T: Carrier + ?Sized> Carrier for Box<T> {
    fn received(&self) -> u64 {
        (**self).received()
    }
}

/// Why the connection ended.
#[derive(Clone, Debug, thiserror::Error)]
pub(crate) enum MuxError {
    /// It said so behind all else that it had to say.
    #[error("the far side closed the connection")]
    ClosedByPeer,
    /// It did not say so.
    #[error("the far side hung up")]
    HungUp,
    #[error("{0}")]
    Io(Arc<io::Error>),
    #[error("not the multiplexer's protocol: {0}")]
    Protocol(yamux::Error),
}

impl From<yamux::Error> for MuxError {
    fn from(error: yamux::Error) -> Self {
        match error {
            yamux::Error::ClosedByPeer => Self::ClosedByPeer,
            other => Self::Protocol(other),
        }
    }
}

impl From<io::Error> for MuxError {
    fn from(error: io::Error) -> Self {
        Self::Io(Arc::new(error))
    }
}

/// The session, and the way to it.
#[derive(Debug)]
struct Shared {
    session: Mutex<Session>,
    /// Why the connection has ended, if that was not this side's wish.
    cause: OnceLock<MuxError>,
}

impl Shared {
    /// Does something with the session, then wakes whoever has to know, without the lock.
    fn with<R>(&self, act: impl FnOnce(&mut Session) -> R) -> R {
        let (result, wakes) = self.with_wakes(act);
        wakes.into_iter().for_each(Waker::wake);
        result
    }

    /// Does something with the session. Whoever has to know is the caller's to wake.
    fn with_wakes<R>(&self, act: impl FnOnce(&mut Session) -> R) -> (R, Vec<Waker>) {
        let mut session = self.session.lock();
        (act(&mut session), session.take_wakes())
    }
}

fn now() -> std::time::Instant {
    Instant::now().into_std()
}

/// Opens streams. Cheap to clone.
#[derive(Clone, Debug)]
pub(crate) struct MuxHandle {
    shared: Arc<Shared>,
}

impl MuxHandle {
    /// Cancel-safe: nothing is begun before it returns.
    pub(crate) async fn open(&self) -> Result<MuxStream, OpenFailed> {
        let mut opening = Opening { shared: &self.shared, place: None };
        let number = poll_fn(|cx| opening.poll(cx)).await?;
        Ok(MuxStream::new(self.shared.clone(), number))
    }

    /// Asks for an orderly end: what is queued is sent, then the connection is closed. The task ends when the far side has
    /// closed it as well, however long that takes.
    pub(crate) fn close(&self) {
        self.shared.with(Session::close);
    }

    /// Why the connection has ended, if it has and this side did not close it. Known before any stream hears of the end.
    pub(crate) fn cause(&self) -> Option<MuxError> {
        self.shared.cause.get().cloned()
    }
}

/// Waits to open a stream, and gives its place to the next if it is dropped.
struct Opening<'a> {
    shared: &'a Shared,
    place: Option<Place>,
}

impl Opening<'_> {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<u32, OpenFailed>> {
        let place = &mut self.place;
        self.shared.with(|session| session.poll_open(place, cx, now()))
    }
}

impl Drop for Opening<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.place.take() {
            self.shared.with(|session| session.leave(place));
        }
    }
}

/// Streams that the far side opens.
#[derive(Debug)]
pub(crate) struct Inbound {
    shared: Arc<Shared>,
}

impl Inbound {
    /// The next one; `None` once the connection has ended. Cancel-safe. For one caller at a time.
    pub(crate) async fn next(&mut self) -> Option<MuxStream> {
        let number = poll_fn(|cx| self.shared.with(|session| session.poll_accept(cx))).await?;
        Some(MuxStream::new(self.shared.clone(), number))
    }
}

/// A running multiplexer. Dropping `task` ends the connection at once.
pub(crate) struct Mux {
    pub(crate) handle: MuxHandle,
    pub(crate) inbound: Inbound,
    pub(crate) task: AbortOnDropHandle<Result<(), MuxError>>,
    pub(crate) heard: Arc<LastHeard>,
}

impl Mux {
    pub(crate) fn start<T: Carrier>(io: T, side: Side, config: MuxConfig) -> Self {
        let heard = Arc::new(LastHeard::now());
        let session = Mutex::new(config.session(side));
        let shared = Arc::new(Shared { session, cause: OnceLock::new() });
        let driver = Driver {
            io,
            shared: shared.clone(),
            batch: Batch::default(),
            pace: Pace::new(now()),
            closing: false,
            parting: None,
            heard: heard.clone(),
            received: 0,
        };
        #[allow(clippy::disallowed_methods, reason = "the link owns it, waits for it, and ends with it")]
        let task = AbortOnDropHandle::new(tokio::spawn(driver));
        Self { handle: MuxHandle { shared: shared.clone() }, inbound: Inbound { shared }, task, heard }
    }
}

/// The task that owns the connection.
struct Driver<T> {
    io: T,
    shared: Arc<Shared>,
    /// What is being written.
    batch: Batch,
    pace: Pace,
    /// The last frame is in the batch, or has left.
    closing: bool,
    parting: Option<Parting>,
    heard: Arc<LastHeard>,
    /// What the connection had received when that was last looked at.
    received: u64,
}

/// One side has said its last word, and the connection is to be closed so that it arrives. Closing a socket with unread
/// bytes would send a reset, which overtakes what was written.
#[derive(Debug)]
struct Parting {
    result: Result<(), MuxError>,
    /// The far side was told that no more bytes come, or cannot be told.
    shut: bool,
    /// The far side has said the same, or cannot be heard.
    heard_out: bool,
}

impl<T> Drop for Driver<T> {
    fn drop(&mut self) {
        self.shared.with(Session::end);
    }
}

/// A future by hand: an `async fn` that takes `self` has room for it twice, and every link has one.
impl<T: Carrier> Future for Driver<T> {
    type Output = Result<(), MuxError>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Result<(), MuxError>> {
        let this = &mut *self;
        if this.parting.is_none() {
            let result = ready!(this.poll_serve(cx));
            if let Err(error) = &result {
                // Cannot be set already: this is the only place.
                let _ = this.shared.cause.set(error.clone());
            }
            this.shared.with(Session::end);
            if let Err(MuxError::Io(_) | MuxError::HungUp) = result {
                return Poll::Ready(result);
            }
            this.parting = Some(Parting { result, shut: false, heard_out: false });
        }
        this.poll_part(cx)
    }
}

impl<T: Carrier> Driver<T> {
    /// Serves the session until its last frame has left, or the connection is of no more use.
    fn poll_serve(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), MuxError>> {
        for _ in 0..TURNS {
            let write = match self.poll_write_out(cx) {
                Poll::Ready(Err(error)) => return Poll::Ready(Err(self.last_words(cx).unwrap_or(error))),
                Poll::Ready(Ok(())) if self.closing => return Poll::Ready(Ok(())),
                Poll::Ready(Ok(())) => Poll::Ready(()),
                Poll::Pending => Poll::Pending,
            };
            // Read even if the far side takes nothing: what comes may be the window that it is waiting for us to see.
            let read = self.poll_read_in(cx)?;
            if write.is_pending() && read.is_pending() {
                return Poll::Pending;
            }
        }
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Tells the far side that no more bytes come, and reads on until it has said the same. Its owner has a time limit.
    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), MuxError>> {
        let Some(parting) = &mut self.parting else { return Poll::Ready(Ok(())) };
        // Whatever fails now, there is nothing more to be said or heard.
        parting.shut = parting.shut || Pin::new(&mut self.io).poll_shutdown(cx).is_ready();
        for _ in 0..TURNS {
            if parting.heard_out {
                break;
            }
            match Pin::new(&mut self.io).poll_fill_buf(cx) {
                Poll::Ready(Ok([]) | Err(_)) => parting.heard_out = true,
                Poll::Ready(Ok(bytes)) => {
                    let count = bytes.len();
                    Pin::new(&mut self.io).consume(count);
                    self.heard.note(Instant::now());
                }
                Poll::Pending => return Poll::Pending,
            }
        }
        if parting.shut && parting.heard_out {
            return Poll::Ready(parting.result.clone());
        }
        if !parting.heard_out {
            cx.waker().wake_by_ref();
        }
        Poll::Pending
    }

    /// Writes what the session has to send. Pending when there is nothing, or the connection takes no more.
    fn poll_write_out(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), MuxError>> {
        // What TLS still holds goes first: whatever joined it would fill no record. And the later the session is
        // asked, the better it knows what is urgent.
        ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        if !self.batch.has_remaining() && !self.closing {
            let (batch, now) = (&mut self.batch, now());
            let limit = self.pace.line(WRITE_BATCH, now);
            self.closing = self.shared.with(|session| {
                session.transmit(batch, limit, cx, now);
                session.is_closed()
            });
            self.pace.note(self.batch.remaining());
            if !self.batch.has_remaining() {
                return Poll::Pending;
            }
        }
        while self.batch.has_remaining() {
            if ready!(poll_write_buf(Pin::new(&mut self.io), cx, &mut self.batch))? == 0 {
                return Poll::Ready(Err(io::Error::from(io::ErrorKind::WriteZero).into()));
            }
        }
        if self.closing {
            ready!(Pin::new(&mut self.io).poll_flush(cx))?;
        }
        Poll::Ready(Ok(()))
    }

    /// Reads a batch, or as much of it as there is. Readers wake when all of it is there: most of it is one stream's,
    /// whose reader shall not run for each record.
    fn poll_read_in(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), MuxError>> {
        let mut wakes = Vec::new();
        let mut taken = 0;
        let ended = loop {
            match self.poll_read_record(cx, &mut wakes) {
                Poll::Ready(Ok(bytes)) => taken += bytes,
                Poll::Ready(Err(error)) => break Some(error),
                Poll::Pending => break None,
            }
            if taken >= READ_BATCH {
                break None;
            }
        };
        wakes.into_iter().for_each(Waker::wake);
        self.note_received();
        match ended {
            Some(error) => Poll::Ready(Err(error)),
            None if taken == 0 => Poll::Pending,
            None => Poll::Ready(Ok(())),
        }
    }

    /// On a slow way a record takes longer than a heartbeat: what has come of it is life, too.
    fn note_received(&mut self) {
        let received = self.io.received();
        if received != self.received {
            self.received = received;
            self.heard.note(Instant::now());
        }
    }

    /// Why the far side takes no more, if it said so before: its farewell, or TLS's alert, tells more than a write that fails.
    fn last_words(&mut self, cx: &mut Context<'_>) -> Option<MuxError> {
        for _ in 0..TURNS {
            match self.poll_read_in(cx) {
                Poll::Ready(Ok(())) => {}
                Poll::Ready(Err(error)) => return Some(error),
                Poll::Pending => break,
            }
        }
        None
    }

    /// Hands what TLS has to the session, from where it lies: how many bytes.
    fn poll_read_record(
        &mut self,
        cx: &mut Context<'_>,
        wakes: &mut Vec<Waker>,
    ) -> Poll<Result<usize, MuxError>> {
        let bytes = ready!(Pin::new(&mut self.io).poll_fill_buf(cx))?;
        if bytes.is_empty() {
            return Poll::Ready(Err(MuxError::HungUp));
        }
        let (count, now) = (bytes.len(), Instant::now());
        self.heard.note(now);
        let (received, due) = self.shared.with_wakes(|session| session.receive(bytes, now.into_std()));
        wakes.extend(due);
        Pin::new(&mut self.io).consume(count);
        if let Err(error @ (yamux::Error::Header(_) | yamux::Error::Violation { .. })) = &received {
            self.complain(cx, error);
        }
        Poll::Ready(received.map(|()| count).map_err(MuxError::from))
    }

    /// Tells the far side that it broke the protocol, if that can be said at once.
    fn complain(&mut self, cx: &mut Context<'_>, error: &yamux::Error) {
        tracing::debug!(%error, "the far side broke the multiplexer's protocol");
        if !self.batch.has_remaining() {
            let _ = Pin::new(&mut self.io).poll_write(cx, &Header::go_away(GoAway::ProtocolError).encode());
            let _ = Pin::new(&mut self.io).poll_flush(cx);
        }
    }
}

/// A multiplexed stream. Its end of file means only that no more bytes will come: see [`crate::proto::ends`].
/// Dropping it resets the stream, unless it was shut down.
pub(crate) struct MuxStream {
    shared: Arc<Shared>,
    number: u32,
    /// What has arrived.
    segments: VecDeque<Vec<u8>>,
    /// How much of the first segment was read.
    read: usize,
}

impl MuxStream {
    fn new(shared: Arc<Shared>, number: u32) -> Self {
        Self { shared, number, segments: VecDeque::new(), read: 0 }
    }

    /// Waits until the end of a stream that was shut down has left, behind all its bytes: whether it has. It has not if the
    /// stream was reset, or the connection ended before.
    pub(crate) fn poll_finished(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        self.shared.with(|session| session.poll_finished(self.number, cx))
    }

    /// How many more streams the side that has opened this one can open behind it.
    pub(crate) fn numbers_left(&self) -> u32 {
        yamux::numbers_left(self.number)
    }

    /// Waits until bytes have arrived: whether some have. `false` at the end of file.
    pub(crate) fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<bool> {
        if self.segments.is_empty() {
            let (segments, number) = (&mut self.segments, self.number);
            ready!(self.shared.with(|session| session.poll_read(number, cx, segments, READ_AT_ONCE, now())));
        }
        Poll::Ready(!self.segments.is_empty())
    }

    /// The bytes that have arrived, in as many pieces as there is room for: how many those are.
    pub(crate) fn arrived<'a>(&'a self, pieces: &mut [IoSlice<'a>]) -> usize {
        let mut count = 0;
        for (piece, segment) in pieces.iter_mut().zip(&self.segments) {
            *piece = IoSlice::new(if count == 0 { &segment[self.read..] } else { segment });
            count += 1;
        }
        count
    }

    /// Sends all of a chunk, which is taken as it is: how many bytes. While there is no room for it, it stays.
    pub(crate) fn poll_give(
        &mut self,
        cx: &mut Context<'_>,
        chunk: &mut Option<Chunk>,
    ) -> Poll<io::Result<usize>> {
        let given = self.shared.with(|session| session.poll_give(self.number, cx, chunk));
        given.map_err(broken_pipe)
    }

    /// Waits until the far side resets the stream, for whoever neither reads nor writes.
    pub(crate) fn poll_reset(&self, cx: &mut Context<'_>) -> Poll<()> {
        self.shared.with(|session| session.poll_reset(self.number, cx))
    }

    /// Whether the far side has reset the stream.
    pub(crate) fn is_reset(&self) -> bool {
        self.shared.with(|session| session.is_reset(self.number))
    }
}

fn broken_pipe(ended: yamux::StreamEnded) -> io::Error {
    io::Error::new(io::ErrorKind::BrokenPipe, ended)
}

impl Arrived for MuxStream {
    fn poll_arrived<'a>(
        &'a mut self,
        cx: &mut Context<'_>,
        pieces: &mut [IoSlice<'a>],
    ) -> Poll<io::Result<usize>> {
        let some = ready!(self.poll_ready(cx));
        Poll::Ready(Ok(if some { self.arrived(pieces) } else { 0 }))
    }

    fn consume(&mut self, bytes: usize) {
        self.read += bytes;
        while let Some(first) = self.segments.front()
            && self.read >= first.len()
        {
            self.read -= first.len();
            self.segments.pop_front();
        }
        if self.segments.is_empty() {
            self.segments = VecDeque::new();
        }
    }
}

impl fmt::Debug for MuxStream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MuxStream").field("number", &self.number).finish_non_exhaustive()
    }
}

impl Drop for MuxStream {
    fn drop(&mut self) {
        self.shared.with(|session| session.discard(self.number));
    }
}

impl AsyncRead for MuxStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_copy(cx, buf)
    }
}

impl AsyncWrite for MuxStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let mut written = 0;
        let write = |session: &mut Session| {
            for piece in pieces.iter().filter(|piece| !piece.is_empty()) {
                match session.poll_write(self.number, cx, piece) {
                    Poll::Ready(Ok(taken)) => written += taken,
                    // Told at the next call: what was taken so far counts.
                    _ if written > 0 => break,
                    other => return other,
                }
            }
            Poll::Ready(Ok(written))
        };
        let written = self.shared.with(write);
        written.map_err(broken_pipe)
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    /// The multiplexer's task sends what there is without being asked.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shared.with(|session| session.finish(self.number));
        Poll::Ready(Ok(()))
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

    fn note(&self, now: Instant) {
        let micros = now.saturating_duration_since(self.start).as_micros();
        self.micros.store(u64::try_from(micros).unwrap_or(u64::MAX), Relaxed);
    }

    pub(crate) fn at(&self) -> Instant {
        self.start + Duration::from_micros(self.micros.load(Relaxed))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    const CONFIG: MuxConfig =
        MuxConfig { max_streams: 4, window_budget: 0, window_pool: None, streams_before: 0 };

    #[tokio::test]
    async fn more_streams_than_allowed_are_reset_one_by_one() {
        let (near, far) = tokio::io::duplex(1 << 20);
        let (near, far) = (BufReader::new(near), BufReader::new(far));
        let dialer = Mux::start(near, Side::Dialer, MuxConfig { max_streams: 64, ..CONFIG });
        let mut acceptor = Mux::start(far, Side::Acceptor, CONFIG);
        let mut streams = Vec::new();
        for _ in 0..80 {
            let mut stream = dialer.handle.open().await.unwrap();
            stream.write_all(b"x").await.unwrap();
            streams.push(stream);
        }
        // Of 80, 72 have room; the others are gone, and the connection is not.
        let mut last = streams.pop().unwrap();
        assert_eq!(last.read(&mut [0; 1]).await.unwrap(), 0);
        let mut first = acceptor.inbound.next().await.unwrap();
        assert_eq!(first.read(&mut [0; 1]).await.unwrap(), 1);
        assert!(!acceptor.task.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn both_sides_may_close_at_once_while_much_is_under_way() {
        // Whether both are stopped in the middle of their last words depends on what is under way to the byte.
        for (one, other) in (0..32).flat_map(|one| (0..32).map(move |other| (one, other))) {
            let (near, far) = tokio::io::duplex(32);
            let (near, far) = (BufReader::new(near), BufReader::new(far));
            let sides = [Mux::start(near, Side::Dialer, CONFIG), Mux::start(far, Side::Acceptor, CONFIG)];
            let mut streams = Vec::new();
            for (mux, more) in sides.iter().zip([one, other]) {
                let mut stream = mux.handle.open().await.unwrap();
                stream.write_all(&vec![7; 100 + more]).await.unwrap();
                streams.push(stream);
                mux.handle.close();
            }
            for mux in sides {
                let ended = tokio::time::timeout(Duration::from_secs(5), mux.task).await;
                let ended = ended.unwrap_or_else(|_| panic!("each waits for the other: {one}, {other}"));
                // The side that is later may be in the middle of a write.
                let ended = ended.unwrap();
                assert!(matches!(ended, Ok(()) | Err(MuxError::ClosedByPeer | MuxError::Io(_))), "{ended:?}");
            }
        }
    }

    /// Takes everything at once, and notes how much that was.
    struct Scale(Arc<Mutex<Vec<usize>>>);

    impl AsyncRead for Scale {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Scale {
        fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
            self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
        }

        fn poll_write_vectored(
            self: Pin<&mut Self>,
            _: &mut Context<'_>,
            pieces: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            let bytes = pieces.iter().map(|piece| piece.len()).sum();
            self.0.lock().push(bytes);
            Poll::Ready(Ok(bytes))
        }

        fn is_write_vectored(&self) -> bool {
            true
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    /// Reads on, but no write succeeds.
    struct Failing<T>(T);

    impl<T: AsyncRead + Unpin> AsyncRead for Failing<T> {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl<T: Unpin> AsyncWrite for Failing<T> {
        fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
            Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()))
        }

        fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            Poll::Ready(Ok(()))
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_batch_is_as_large_as_the_connection_is_fast() {
        let sizes = Arc::new(Mutex::new(Vec::new()));
        let io = BufReader::new(Scale(sizes.clone()));
        let mux = Mux::start(io, Side::Dialer, MuxConfig { max_streams: 64, ..CONFIG });
        let (small, large) = (*WRITE_BATCH.start(), *WRITE_BATCH.end());
        // How long it rested before, how many streams send all that they may at once, the largest batch then in whole frames,
        // and what it may be.
        for (rest, count, largest, limit) in [
            (0, 32, small, small),
            (20, 8, large, large),
            (3_600_000, 8, small, small),
            (20, 8, 3 * small, 8 * STREAM_WINDOW / 10),
        ] {
            tokio::time::advance(Duration::from_millis(rest)).await;
            let mut streams = Vec::new();
            for _ in 0..count {
                streams.push(mux.handle.open().await.unwrap());
            }
            let bytes = vec![7; STREAM_WINDOW];
            futures_util::future::join_all(streams.iter_mut().map(|stream| stream.write_all(&bytes))).await;
            tokio::task::yield_now().await;
            let most = sizes.lock().drain(..).max().unwrap();
            let expected = largest - 1000..=limit + yamux::HEADERS_BEYOND;
            assert!(expected.contains(&most), "{most} after {rest} ms");
        }
    }

    #[tokio::test]
    async fn what_the_far_side_said_last_is_heard_although_it_takes_no_more() {
        for (word, is_farewell) in [(Some(GoAway::Normal), true), (None, false)] {
            let (near, mut far) = tokio::io::duplex(1 << 20);
            let mux = Mux::start(BufReader::new(Failing(near)), Side::Dialer, CONFIG);
            let mut stream = mux.handle.open().await.unwrap();
            stream.write_all(b"x").await.unwrap();
            if let Some(word) = word {
                far.write_all(&Header::go_away(word).encode()).await.unwrap();
                far.shutdown().await.unwrap();
            }
            let error = mux.task.await.unwrap().unwrap_err();
            assert_eq!(matches!(error, MuxError::ClosedByPeer), is_farewell, "{error}");
            assert_eq!(matches!(error, MuxError::Io(_)), !is_farewell, "{error}");
        }
    }

    #[tokio::test]
    async fn bytes_that_are_not_yamux_end_the_connection_with_a_reason() {
        let (near, mut far) = tokio::io::duplex(1 << 20);
        let mux = Mux::start(BufReader::new(near), Side::Acceptor, CONFIG);
        far.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        let mut told = Vec::new();
        far.read_to_end(&mut told).await.unwrap();
        assert_eq!(told, Header::go_away(GoAway::ProtocolError).encode());
        assert!(matches!(mux.handle.cause(), Some(MuxError::Protocol(_))));
        // What it says now is read, and means nothing.
        far.write_all(&[0xff; 1000]).await.unwrap();
        assert!(!mux.task.is_finished());
        drop(far);
        let error = mux.task.await.unwrap().unwrap_err();
        assert!(matches!(error, MuxError::Protocol(_)), "{error}");
    }
}

#[cfg(test)]
mod interop;
