//! Two byte streams joined: half-close is carried as half-close, anything abnormal as a reset of the other side.
//!
//! What a leg has in memory already is handed on from where it is ([`Arrived`]). Anything else is read into a [`Chunk`]
//! of the thread's, which a link's stream takes as it is; and what the far side does not take at once is kept in it. So
//! bytes are not copied in between, and an idle relay holds no buffer at all. As much as there is leaves in one write, so
//! that it fills records and frames.

use std::{
    cell::Cell,
    future::poll_fn,
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::UnixStream,
    time::{Instant, Sleep, sleep},
};
use tokio_util::io::poll_read_buf;

use crate::{
    mux::READ_AT_ONCE,
    proto::{ends::Aborted, messages::AbortCode, yamux::Chunk},
    read_ahead::AHEAD,
    stream::TunnelStream,
};

/// What a relay between a link's stream and a connection under TLS has in memory beside windows, in bytes: 64 KiB that it
/// keeps, twice as much that wait for the link, in chunks that may be half full, what is in TLS, and what was read ahead. What
/// more of one stream waits, since it is alone, is counted by its link.
pub const RELAY_BUFFERS: usize = 3 * 64 * 1024 + READ_AT_ONCE + AHEAD;
/// From so many bytes on, a chunk is given away: the copy that this saves is worth more than a new chunk.
const WORTH_GIVING: usize = 32 * 1024;
/// Pieces in memory that are handed on at once.
const PIECES: usize = 16;
/// Reads of one direction before others get their turn.
const TURNS: usize = 2;
/// While a side is not read, because it has ended or because the other side takes nothing, how often it is asked whether
/// it has failed: no event would tell.
const ASK_PERIOD: Duration = Duration::from_secs(5);

thread_local! {
    /// An empty one, for whichever relay reads next.
    static CHUNK: Cell<Option<Chunk>> = const { Cell::new(None) };
}

/// Bytes that have arrived and lie in memory, to be handed on without a copy.
pub trait Arrived {
    /// Waits until there are some; gives as many pieces of them as there is room for. None at the end of file.
    fn poll_arrived<'a>(
        &'a mut self,
        cx: &mut Context<'_>,
        pieces: &mut [IoSlice<'a>],
    ) -> Poll<io::Result<usize>>;

    /// So many of the bytes were handed on.
    fn consume(&mut self, bytes: usize);

    /// Copies the first of them, as [`AsyncRead::poll_read`] has to.
    fn poll_copy(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if buf.remaining() == 0 {
            return Poll::Ready(Ok(()));
        }
        let mut piece = [IoSlice::new(&[])];
        ready!(self.poll_arrived(cx, &mut piece))?;
        let taken = piece[0].len().min(buf.remaining());
        buf.put_slice(&piece[0][..taken]);
        self.consume(taken);
        Poll::Ready(Ok(()))
    }
}

/// One side of a relay: a byte stream that can end in two ways.
pub trait Leg: AsyncRead + AsyncWrite + Send + Unpin {
    /// A relay begins. Where the operating system can be told, the far side must from now on see a failure even if
    /// this process is killed.
    fn arm(&mut self) {}

    /// From now on, dropping this leg must look like a failure to its far side: TCP RST, TLS without `close_notify`,
    /// HTTP/2 `RST_STREAM`, `Abort` on a link.
    fn abort(&mut self, reason: &Aborted);

    /// Both directions have ended cleanly: dropping this leg must not disturb what is still on its way.
    fn finish(&mut self) {}

    /// A failure that the operating system knows of, asked for while nobody reads: a reset of the far side.
    fn failure(&self) -> Option<io::Error> {
        None
    }

    /// What has arrived, if this leg has it in memory before it is read.
    fn arrived(&mut self) -> Option<&mut dyn Arrived> {
        None
    }

    /// Sends all bytes of a chunk, which may be taken as it is. Not ready, those that are left are still in it.
    fn poll_send(&mut self, cx: &mut Context<'_>, chunk: &mut Option<Chunk>) -> Poll<io::Result<()>> {
        poll_write_chunk(self, cx, chunk)
    }
}

/// Writes what is in a chunk, which stays the caller's.
fn poll_write_chunk(
    to: &mut (impl AsyncWrite + Unpin + ?Sized),
    cx: &mut Context<'_>,
    chunk: &mut Option<Chunk>,
) -> Poll<io::Result<()>> {
    while let Some(bytes) = chunk.as_mut().filter(|chunk| !chunk.is_empty()) {
        match ready!(Pin::new(&mut *to).poll_write(cx, bytes.filled()))? {
            0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
            written => bytes.advance(written),
        }
    }
    Poll::Ready(Ok(()))
}

impl Leg for UnixStream {
    /// A Unix socket has no reset: its peer sees an end of file. Where that matters, use HTTP/2 on it, or TLS within.
    fn abort(&mut self, _: &Aborted) {}
}

impl<T: Leg> Leg for tokio_rustls::server::TlsStream<T> {
    fn arm(&mut self) {
        self.get_mut().0.arm();
    }

    /// Without `shutdown` no `close_notify` is sent, and the socket below is reset.
    fn abort(&mut self, reason: &Aborted) {
        self.get_mut().0.abort(reason);
    }

    fn finish(&mut self) {
        self.get_mut().0.finish();
    }

    fn failure(&self) -> Option<io::Error> {
        self.get_ref().0.failure()
    }
}

impl Leg for TunnelStream {
    fn abort(&mut self, reason: &Aborted) {
        Self::abort(self, reason.clone());
    }

    fn arrived(&mut self) -> Option<&mut dyn Arrived> {
        Some(self)
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, chunk: &mut Option<Chunk>) -> Poll<io::Result<()>> {
        if chunk.as_ref().is_some_and(|chunk| chunk.len() >= WORTH_GIVING) {
            return self.poll_give(cx, chunk);
        }
        poll_write_chunk(self, cx, chunk)
    }
}

impl<T: Leg + ?Sized> Leg for Box<T> {
    fn arm(&mut self) {
        (**self).arm();
    }

    fn abort(&mut self, reason: &Aborted) {
        (**self).abort(reason);
    }

    fn finish(&mut self) {
        (**self).finish();
    }

    fn failure(&self) -> Option<io::Error> {
        (**self).failure()
    }

    fn arrived(&mut self) -> Option<&mut dyn Arrived> {
        (**self).arrived()
    }

    fn poll_send(&mut self, cx: &mut Context<'_>, chunk: &mut Option<Chunk>) -> Poll<io::Result<()>> {
        (**self).poll_send(cx, chunk)
    }
}

/// How a relay ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum RelayEnd {
    /// Both directions ended cleanly.
    Clean,
    /// The first leg failed; the second was aborted.
    FirstFailed(Aborted),
    /// The second leg failed; the first was aborted.
    SecondFailed(Aborted),
    /// The caller stopped it; both were aborted.
    Stopped(Aborted),
}

impl RelayEnd {
    /// Why it was not clean.
    pub fn reason(&self) -> Option<&Aborted> {
        match self {
            Self::Clean => None,
            Self::FirstFailed(reason) | Self::SecondFailed(reason) | Self::Stopped(reason) => Some(reason),
        }
    }
}

/// What a relay carried, in bytes, and how it ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Relayed {
    /// Bytes from the first leg to the second.
    pub forward: u64,
    /// Bytes from the second leg to the first.
    pub backward: u64,
    /// How it ended.
    pub end: RelayEnd,
}

/// Carries bytes both ways until both directions have ended, one leg fails, or `stop` gives a reason.
///
/// Dropping the future aborts both legs, even before it was first polled: the guard is made right here.
pub fn relay(
    first: impl Leg,
    second: impl Leg,
    stop: impl Future<Output = Aborted>,
) -> impl Future<Output = Relayed> {
    let mut legs = Legs { first, second, finished: false };
    legs.first.arm();
    legs.second.arm();
    carry(legs, stop)
}

async fn carry<A: Leg, B: Leg>(mut legs: Legs<A, B>, stop: impl Future<Output = Aborted>) -> Relayed {
    let (mut forward, mut backward) = (Direction::default(), Direction::default());
    let mut stop = std::pin::pin!(stop);
    let mut ask = None;
    let end = poll_fn(|cx| {
        if let Poll::Ready(reason) = stop.as_mut().poll(cx) {
            return Poll::Ready(RelayEnd::Stopped(reason));
        }
        let Legs { first, second, .. } = &mut legs;
        // Both are polled each time: a failure in one direction must be seen while the other waits.
        let ahead = forward.poll(cx, first, second);
        let back = backward.poll(cx, second, first);
        let failed = |failure: Failure, read_from_first: bool| {
            let (reader_is_first, error) = match failure {
                Failure::Read(error) => (read_from_first, error),
                Failure::Write(error) => (!read_from_first, error),
            };
            let reason = reason(error);
            if reader_is_first { RelayEnd::FirstFailed(reason) } else { RelayEnd::SecondFailed(reason) }
        };
        match (ahead, back) {
            (Poll::Ready(Err(failure)), _) => Poll::Ready(failed(failure, true)),
            (_, Poll::Ready(Err(failure))) => Poll::Ready(failed(failure, false)),
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(RelayEnd::Clean),
            _ if forward.is_deaf() || backward.is_deaf() => {
                while poll_ask(&mut ask, cx).is_ready() {
                    if let Some(error) = first.failure() {
                        return Poll::Ready(RelayEnd::FirstFailed(reason(error)));
                    }
                    if let Some(error) = second.failure() {
                        return Poll::Ready(RelayEnd::SecondFailed(reason(error)));
                    }
                }
                Poll::Pending
            }
            _ => Poll::Pending,
        }
    })
    .await;
    match end.reason() {
        None => {
            legs.finished = true;
            legs.first.finish();
            legs.second.finish();
        }
        Some(reason) => {
            legs.first.abort(reason);
            legs.second.abort(reason);
        }
    }
    Relayed { forward: forward.carried, backward: backward.carried, end }
}

/// Ready once every [`ASK_PERIOD`]. The timer is made when it is first needed, which is seldom.
fn poll_ask(ask: &mut Option<Pin<Box<Sleep>>>, cx: &mut Context<'_>) -> Poll<()> {
    let timer = ask.get_or_insert_with(|| Box::pin(sleep(ASK_PERIOD)));
    ready!(timer.as_mut().poll(cx));
    timer.as_mut().reset(Instant::now() + ASK_PERIOD);
    Poll::Ready(())
}

/// Aborts both legs unless they have finished: also when the relay's future is dropped half-way.
struct Legs<A: Leg, B: Leg> {
    first: A,
    second: B,
    finished: bool,
}

impl<A: Leg, B: Leg> Drop for Legs<A, B> {
    fn drop(&mut self) {
        if !self.finished {
            let reason = Aborted::new(AbortCode::Cancelled, "the relay was stopped");
            self.first.abort(&reason);
            self.second.abort(&reason);
        }
    }
}

enum Failure {
    Read(io::Error),
    Write(io::Error),
}

/// The reason that a leg's error carries, or one that says what the socket said.
fn reason(error: io::Error) -> Aborted {
    let text = error.to_string();
    let carried = error.into_inner().and_then(|inner| inner.downcast::<Aborted>().ok());
    carried.map_or_else(|| Aborted::new(AbortCode::Reset, text), |carried| *carried)
}

/// One direction of a relay.
#[derive(Default)]
struct Direction {
    /// What the receiver has not taken yet.
    kept: Option<Chunk>,
    /// The receiver takes nothing now of what lies in the sender's memory.
    blocked: bool,
    unflushed: bool,
    end: End,
    carried: u64,
}

/// How far a direction has ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum End {
    #[default]
    Open,
    /// The sender has said all.
    Eof,
    /// The receiver knows.
    Done,
}

impl Direction {
    /// Whether its sender is not read now, so that its failure would go unseen.
    fn is_deaf(&self) -> bool {
        self.end != End::Open || self.blocked || self.has_kept()
    }

    fn has_kept(&self) -> bool {
        self.kept.as_ref().is_some_and(|chunk| !chunk.is_empty())
    }

    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut impl Leg,
        to: &mut impl Leg,
    ) -> Poll<Result<(), Failure>> {
        if self.end == End::Done {
            return Poll::Ready(Ok(()));
        }
        for _ in 0..TURNS {
            while self.has_kept() {
                ready!(to.poll_send(cx, &mut self.kept)).map_err(Failure::Write)?;
            }
            self.put_back();
            if self.end == End::Eof {
                ready!(Pin::new(&mut *to).poll_shutdown(cx)).map_err(Failure::Write)?;
                self.end = End::Done;
                return Poll::Ready(Ok(()));
            }
            let passed = match from.arrived() {
                Some(arrived) => self.poll_hand_on(cx, arrived, to)?,
                None => self.poll_copy(cx, from, to)?,
            };
            if passed.is_pending() {
                // Nothing more to read for now: what is buffered in the receiver must not wait for it.
                if std::mem::take(&mut self.unflushed) {
                    self.unflushed = Pin::new(&mut *to).poll_flush(cx).map_err(Failure::Write)?.is_pending();
                }
                return Poll::Pending;
            }
        }
        // Others get their turn.
        cx.waker().wake_by_ref();
        Poll::Pending
    }

    /// Hands on what lies in the sender's memory, as much as is taken.
    fn poll_hand_on(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut dyn Arrived,
        to: &mut impl Leg,
    ) -> Result<Poll<()>, Failure> {
        let mut pieces = [IoSlice::new(&[]); PIECES];
        let count = match from.poll_arrived(cx, &mut pieces) {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(count) => count.map_err(Failure::Read)?,
        };
        if count == 0 {
            self.end = End::Eof;
            return Ok(Poll::Ready(()));
        }
        self.unflushed = true;
        let written = Pin::new(&mut *to).poll_write_vectored(cx, &pieces[..count]).map_err(Failure::Write)?;
        self.blocked = written.is_pending();
        match written {
            Poll::Pending => return Ok(Poll::Pending),
            Poll::Ready(0) => return Err(Failure::Write(io::ErrorKind::WriteZero.into())),
            Poll::Ready(written) => {
                self.carried += written as u64;
                from.consume(written);
            }
        }
        Ok(Poll::Ready(()))
    }

    /// Reads what there is, as far as a chunk goes, and hands on what is taken at once; the rest is kept.
    fn poll_copy(
        &mut self,
        cx: &mut Context<'_>,
        from: &mut impl Leg,
        to: &mut impl Leg,
    ) -> Result<Poll<()>, Failure> {
        let chunk = self.kept.insert(CHUNK.take().unwrap_or_default());
        while chunk.room() > 0 && self.end == End::Open {
            match poll_read_buf(Pin::new(&mut *from), cx, &mut chunk.spare()).map_err(Failure::Read)? {
                Poll::Pending if chunk.is_empty() => {
                    self.put_back();
                    return Ok(Poll::Pending);
                }
                Poll::Pending => break,
                Poll::Ready(0) => self.end = End::Eof,
                Poll::Ready(_) => {}
            }
        }
        self.carried += chunk.len() as u64;
        self.unflushed |= !chunk.is_empty();
        // What is left of it is sent first at the next turn, which begins at once unless the receiver waits.
        let _ = to.poll_send(cx, &mut self.kept).map_err(Failure::Write)?;
        Ok(Poll::Ready(()))
    }

    /// Leaves the chunk, if it was not given away, to the next that reads.
    fn put_back(&mut self) {
        if let Some(mut chunk) = self.kept.take() {
            chunk.clear();
            CHUNK.set(Some(chunk));
        }
    }
}
