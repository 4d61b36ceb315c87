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
    pin::{Pin, pin},
    task::{Context, Poll, ready},
    time::Duration,
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
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
/// How often a relay looks at what only time tells: whether anything has moved, and whether a far side has vanished.
pub const TICK: Duration = Duration::from_secs(5);
/// A relay in which nothing has moved for so long, and which does not read one of its legs, waits for news of that leg too.
/// Before that, the end of most streams has come, and what would tell is not set up for it.
const REST: Duration = Duration::from_millis(250);

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

/// How a far side is lost to a relay that does not read it.
#[derive(Debug)]
pub enum Lost {
    /// It has failed: nothing that it said before counts any more.
    Failed(io::Error),
    /// It has closed both directions in good order: what it said still counts, what is said to it is lost. Asked again,
    /// the leg says the same.
    Left,
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

    /// Both directions have ended: waits until all that was written has arrived at the far side, where that can be known.
    fn poll_confirmed(&mut self, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    /// Waits until the far side is lost. For a relay at rest that does not read this leg, since it has ended or since
    /// the other leg takes nothing: neither a read nor a write would tell. Takes nothing of what has arrived.
    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Lost>;

    /// Whether the far side has vanished without a word, as far as this machine can know: why it is taken for dead.
    /// Asked of each leg every [`TICK`], or sooner, for as long as the relay runs.
    fn vanished(&self) -> Option<io::Error>;

    /// Bytes that have come from the far side and may not have been given to the reader, since something in between waits
    /// for more of them: TLS, for a whole record. 0 where nothing does.
    fn received(&self) -> u64 {
        0
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

    fn received(&self) -> u64 {
        self.get_ref().0.received()
    }

    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Lost> {
        self.get_mut().0.poll_lost(cx)
    }

    fn vanished(&self) -> Option<io::Error> {
        self.get_ref().0.vanished()
    }
}

impl Leg for TunnelStream {
    fn abort(&mut self, reason: &Aborted) {
        Self::abort(self, reason.clone());
    }

    fn poll_confirmed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Self::poll_confirmed(self, cx)
    }

    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Lost> {
        self.poll_cut(cx).map(Lost::Failed)
    }

    /// The link's heartbeats tell.
    fn vanished(&self) -> Option<io::Error> {
        None
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

    fn poll_confirmed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        (**self).poll_confirmed(cx)
    }

    fn received(&self) -> u64 {
        (**self).received()
    }

    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Lost> {
        (**self).poll_lost(cx)
    }

    fn vanished(&self) -> Option<io::Error> {
        (**self).vanished()
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
    /// Nothing moved for too long; both were aborted.
    TimedOut(Aborted),
}

impl RelayEnd {
    /// Why it was not clean.
    pub fn reason(&self) -> Option<&Aborted> {
        match self {
            Self::Clean => None,
            Self::FirstFailed(reason)
            | Self::SecondFailed(reason)
            | Self::Stopped(reason)
            | Self::TimedOut(reason) => Some(reason),
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

/// How long a stream may last without moving a byte. Both times are exact to a [`TICK`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// Once one direction has ended. `None`: for ever.
    pub half_closed: Option<Duration>,
    /// While both directions are open. `None`: for ever.
    pub idle: Option<Duration>,
    /// Whose settings these are, for whoever reads why a stream was aborted.
    pub whose: &'static str,
}

impl Timeouts {
    /// The default settings of a program: 15 minutes for half-closed streams, and no limit for open ones.
    pub const fn of(whose: &'static str) -> Self {
        Self { half_closed: Some(Duration::from_secs(15 * 60)), idle: None, whose }
    }

    /// Why a stream that has rested for so long is given up, if it is.
    fn judge(&self, half_closed: bool, rested: Duration) -> Option<Aborted> {
        let whose = self.whose;
        let (timeout, since, setting) = if half_closed {
            (self.half_closed?, " since one direction ended", "streams.half_closed_timeout")
        } else {
            (self.idle?, "", "streams.idle_timeout")
        };
        let text = || format!("no byte has moved for {timeout:?}{since} ({setting} of {whose})");
        (rested >= timeout).then(|| Aborted::new(AbortCode::Timeout, text()))
    }

    /// How often to look.
    fn period(&self) -> Duration {
        [self.half_closed, self.idle].into_iter().flatten().fold(TICK, Duration::min)
    }
}

/// Carries bytes both ways until both directions have ended, one leg fails, nothing has moved for too long, or `stop`
/// gives a reason.
///
/// Dropping the future aborts both legs, even before it was first polled: the guard is made right here.
pub fn relay(
    first: impl Leg,
    second: impl Leg,
    timeouts: Timeouts,
    stop: impl Future<Output = Aborted>,
) -> impl Future<Output = Relayed> {
    let mut legs = Legs { first, second, finished: false };
    legs.first.arm();
    legs.second.arm();
    carry(legs, timeouts, stop)
}

async fn carry<A: Leg, B: Leg>(
    mut legs: Legs<A, B>,
    timeouts: Timeouts,
    stop: impl Future<Output = Aborted>,
) -> Relayed {
    let (mut forward, mut backward) = (Direction::default(), Direction::default());
    let mut stop = pin!(stop);
    let timer = pin!(sleep(timeouts.period()));
    let mut clock = Clock::new(timer, timeouts);
    let end = poll_fn(|cx| {
        if let Poll::Ready(reason) = stop.as_mut().poll(cx) {
            return Poll::Ready(RelayEnd::Stopped(reason));
        }
        let Legs { first, second, .. } = &mut legs;
        // Both are polled each time: a failure in one direction must be seen while the other waits.
        let ahead = forward.poll(cx, first, second);
        let back = backward.poll(cx, second, first);
        match (ahead, back) {
            (Poll::Ready(Err(Failure::Read(error))), _) | (_, Poll::Ready(Err(Failure::Write(error)))) => {
                Poll::Ready(RelayEnd::FirstFailed(reason(error)))
            }
            (Poll::Ready(Err(Failure::Write(error))), _) | (_, Poll::Ready(Err(Failure::Read(error)))) => {
                Poll::Ready(RelayEnd::SecondFailed(reason(error)))
            }
            (Poll::Ready(Ok(())), Poll::Ready(Ok(()))) => Poll::Ready(RelayEnd::Clean),
            _ => clock.poll(cx, (&forward, first), (&backward, second)),
        }
    })
    .await;
    let end = match end {
        // All of it has left; what was lost on its way, only the far side can tell.
        RelayEnd::Clean => poll_fn(|cx| legs.poll_confirmed(cx, stop.as_mut())).await,
        end => end,
    };
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

/// What no read and no write of a relay tells: the one timer, which goes off every few seconds and compares what has moved,
/// so that nothing is measured while bytes move; and, at rest, news of the legs that are not read.
struct Clock<'a> {
    timer: Pin<&'a mut Sleep>,
    timeouts: Timeouts,
    /// How far both directions were when it was looked at last.
    seen: [Progress; 2],
    /// When they were seen to have come further.
    moved: Instant,
    /// They had not, and a leg was not read: such legs are asked for news.
    resting: bool,
    /// The timer goes off after a [`REST`].
    hurries: bool,
}

impl<'a> Clock<'a> {
    fn new(timer: Pin<&'a mut Sleep>, timeouts: Timeouts) -> Self {
        let moved = Instant::now();
        Self { timer, timeouts, seen: Default::default(), moved, resting: false, hurries: false }
    }

    /// Each direction comes with the leg that it reads.
    fn poll(
        &mut self,
        cx: &mut Context<'_>,
        (forward, first): (&Direction, &mut impl Leg),
        (backward, second): (&Direction, &mut impl Leg),
    ) -> Poll<RelayEnd> {
        let progress = [forward.progress(), backward.progress()];
        let half_closed = forward.end != End::Open || backward.end != End::Open;
        let deaf = forward.is_deaf() || backward.is_deaf();
        loop {
            if let Poll::Ready(reason) = self.poll_news(cx, forward, first, progress) {
                return Poll::Ready(RelayEnd::FirstFailed(reason));
            }
            if let Poll::Ready(reason) = self.poll_news(cx, backward, second, progress) {
                return Poll::Ready(RelayEnd::SecondFailed(reason));
            }
            ready!(self.poll_tick(cx, progress, deaf));
            if let Some(error) = first.vanished() {
                return Poll::Ready(RelayEnd::FirstFailed(reason(error)));
            }
            if let Some(error) = second.vanished() {
                return Poll::Ready(RelayEnd::SecondFailed(reason(error)));
            }
            if let Some(reason) = self.timeouts.judge(half_closed, self.moved.elapsed()) {
                return Poll::Ready(RelayEnd::TimedOut(reason));
            }
        }
    }

    /// At rest, waits until the far side of a leg that is not read is lost. One that has left is only once all that it
    /// said has had its time to arrive.
    fn poll_news(
        &mut self,
        cx: &mut Context<'_>,
        direction: &Direction,
        from: &mut impl Leg,
        progress: [Progress; 2],
    ) -> Poll<Aborted> {
        if !self.resting || !direction.is_deaf() {
            return Poll::Pending;
        }
        match ready!(from.poll_lost(cx)) {
            Lost::Failed(error) => Poll::Ready(reason(error)),
            Lost::Left => {
                let now = Instant::now();
                self.note(progress, now);
                if now.duration_since(self.moved) < REST {
                    self.hurry(self.moved + REST);
                    return Poll::Pending;
                }
                let text = "the far side has closed its socket, and nobody takes what is still said to it";
                Poll::Ready(Aborted::new(AbortCode::Cancelled, text))
            }
        }
    }

    fn poll_tick(&mut self, cx: &mut Context<'_>, progress: [Progress; 2], deaf: bool) -> Poll<()> {
        if deaf && !self.resting && !self.hurries {
            self.hurry(Instant::now() + REST);
        }
        ready!(self.timer.as_mut().poll(cx));
        let now = Instant::now();
        let moved = self.note(progress, now);
        self.resting = deaf && !moved;
        if deaf && moved {
            self.hurry(now + REST);
        } else {
            self.hurries = false;
            self.timer.as_mut().reset(now + self.timeouts.period());
        }
        Poll::Ready(())
    }

    fn hurry(&mut self, until: Instant) {
        self.hurries = true;
        self.timer.as_mut().reset(until);
    }

    /// Whether anything has moved since the last look.
    fn note(&mut self, progress: [Progress; 2], now: Instant) -> bool {
        let moved = std::mem::replace(&mut self.seen, progress) != progress;
        if moved {
            self.moved = now;
        }
        moved
    }
}

/// Aborts both legs unless they have finished: also when the relay's future is dropped half-way.
struct Legs<A: Leg, B: Leg> {
    first: A,
    second: B,
    finished: bool,
}

impl<A: Leg, B: Leg> Legs<A, B> {
    fn poll_confirmed(
        &mut self,
        cx: &mut Context<'_>,
        stop: Pin<&mut impl Future<Output = Aborted>>,
    ) -> Poll<RelayEnd> {
        let first = self.first.poll_confirmed(cx);
        if let Poll::Ready(Err(error)) = first {
            return Poll::Ready(RelayEnd::FirstFailed(reason(error)));
        }
        let second = self.second.poll_confirmed(cx);
        if let Poll::Ready(Err(error)) = second {
            return Poll::Ready(RelayEnd::SecondFailed(reason(error)));
        }
        if first.is_ready() && second.is_ready() {
            return Poll::Ready(RelayEnd::Clean);
        }
        // Last: what has ended cannot be stopped.
        stop.poll(cx).map(RelayEnd::Stopped)
    }
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

/// How far a direction has come: bytes that were read, bytes of them that are kept, and its end.
type Progress = (u64, usize, End);

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
    fn progress(&self) -> Progress {
        (self.carried, self.kept.as_ref().map_or(0, Chunk::len), self.end)
    }

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

#[cfg(test)]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
    };

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex},
        task::JoinHandle,
        time::{advance, timeout},
    };

    use super::*;

    const MINUTE: Duration = Duration::from_secs(60);
    const ALMOST_A_MINUTE: Duration = Duration::from_secs(55);
    const DAY: Duration = Duration::from_secs(24 * 3600);

    /// What a test tells a leg, and learns of it.
    #[derive(Default)]
    struct Told {
        left: AtomicBool,
        vanished: AtomicBool,
        /// How often it was asked whether its far side is lost.
        asked: AtomicUsize,
    }

    /// A pipe in memory as a leg.
    struct Pipe(DuplexStream, Arc<Told>);

    impl Pipe {
        fn new() -> (DuplexStream, Arc<Told>, Self) {
            let ((far, near), told) = (duplex(64), Arc::new(Told::default()));
            (far, told.clone(), Self(near, told))
        }
    }

    impl AsyncRead for Pipe {
        fn poll_read(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_read(cx, buf)
        }
    }

    impl AsyncWrite for Pipe {
        fn poll_write(
            mut self: Pin<&mut Self>,
            cx: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            Pin::new(&mut self.0).poll_write(cx, bytes)
        }

        fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_flush(cx)
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
            Pin::new(&mut self.0).poll_shutdown(cx)
        }
    }

    impl Leg for Pipe {
        fn abort(&mut self, _: &Aborted) {}

        fn poll_lost(&mut self, _: &mut Context<'_>) -> Poll<Lost> {
            self.1.asked.fetch_add(1, Relaxed);
            if self.1.left.load(Relaxed) { Poll::Ready(Lost::Left) } else { Poll::Pending }
        }

        fn vanished(&self) -> Option<io::Error> {
            self.1.vanished.load(Relaxed).then(|| io::ErrorKind::TimedOut.into())
        }
    }

    struct Rig {
        client: DuplexStream,
        target: DuplexStream,
        /// Of the client's leg and of the target's.
        told: [Arc<Told>; 2],
        relay: JoinHandle<(RelayEnd, Duration)>,
    }

    impl Rig {
        fn start(half_closed: Option<Duration>, idle: Option<Duration>) -> Self {
            let ((client, one, first), (target, two, second)) = (Pipe::new(), Pipe::new());
            let timeouts = Timeouts { half_closed, idle, whose: "the test" };
            let begun = Instant::now();
            let relay = relay(first, second, timeouts, std::future::pending());
            let relay = tokio::spawn(async move { (relay.await.end, begun.elapsed()) });
            Self { client, target, told: [one, two], relay }
        }

        /// How the relay ends, and when, unless it goes on for a day.
        async fn end(&mut self) -> Option<(RelayEnd, Duration)> {
            timeout(DAY, &mut self.relay).await.ok().map(Result::unwrap)
        }
    }

    #[track_caller]
    fn assert_given_up(end: Option<(RelayEnd, Duration)>, after: Duration, text: &str) {
        let (end, took) = end.expect("it goes on");
        assert_eq!(end, RelayEnd::TimedOut(Aborted::new(AbortCode::Timeout, text)));
        assert!((after..=after + TICK).contains(&took), "{took:?} instead of {after:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn a_half_closed_stream_that_moves_no_byte_is_given_up() {
        let text =
            "no byte has moved for 60s since one direction ended (streams.half_closed_timeout of the test)";
        for client_ends in [true, false] {
            let mut rig = Rig::start(Some(MINUTE), None);
            let (ends, other) = if client_ends {
                (&mut rig.client, &mut rig.target)
            } else {
                (&mut rig.target, &mut rig.client)
            };
            // While both directions are open, nothing ends it.
            advance(2 * MINUTE).await;
            ends.shutdown().await.unwrap();
            for _ in 0..3 {
                sleep(ALMOST_A_MINUTE).await;
                other.write_all(b"x").await.unwrap();
                ends.read_exact(&mut [0]).await.unwrap();
            }
            assert_given_up(rig.end().await, 3 * MINUTE + 3 * ALMOST_A_MINUTE, text);
        }
        let mut rig = Rig::start(None, None);
        rig.client.shutdown().await.unwrap();
        assert!(rig.end().await.is_none());
    }

    #[tokio::test(start_paused = true)]
    async fn a_time_shorter_than_a_tick_is_kept() {
        let second = Duration::from_secs(1);
        let mut rig = Rig::start(Some(second), None);
        rig.client.shutdown().await.unwrap();
        let (end, took) = rig.end().await.unwrap();
        assert!(matches!(end, RelayEnd::TimedOut(_)), "{end:?}");
        assert!((second..=3 * second).contains(&took), "{took:?}");
    }

    #[tokio::test(start_paused = true)]
    async fn an_open_stream_that_moves_no_byte_is_given_up_only_if_that_is_set() {
        let mut rig = Rig::start(Some(MINUTE), Some(10 * MINUTE));
        sleep(9 * MINUTE).await;
        rig.client.write_all(b"x").await.unwrap();
        let text = "no byte has moved for 600s (streams.idle_timeout of the test)";
        assert_given_up(rig.end().await, 19 * MINUTE, text);
        // A half-closed stream has a time of its own.
        let mut rig = Rig::start(None, Some(10 * MINUTE));
        rig.client.shutdown().await.unwrap();
        assert!(rig.end().await.is_none());
        assert!(Rig::start(Some(MINUTE), None).end().await.is_none());
    }

    /// Of a chunk that was read as a whole, each byte that is taken counts.
    #[tokio::test(start_paused = true)]
    async fn a_trickle_is_no_rest() {
        let mut rig = Rig::start(Some(MINUTE), None);
        rig.target.shutdown().await.unwrap();
        // In both pipes, and in between. The last pipe's bytes have left the relay.
        rig.client.write_all(&[7; 3 * 64]).await.unwrap();
        for _ in 0..2 * 64 / 8 {
            sleep(ALMOST_A_MINUTE).await;
            rig.target.read_exact(&mut [0; 8]).await.unwrap();
        }
        assert!(!rig.relay.is_finished());
    }

    #[tokio::test(start_paused = true)]
    async fn a_far_side_that_has_vanished_is_found_by_the_next_tick_even_while_bytes_move() {
        for which in [0, 1] {
            let mut rig = Rig::start(None, None);
            let told = rig.told[which].clone();
            let bytes = async {
                loop {
                    sleep(Duration::from_millis(100)).await;
                    rig.target.write_all(b"x").await.unwrap();
                    rig.client.read_exact(&mut [0]).await.unwrap();
                }
            };
            let _ = timeout(2 * TICK + TICK / 2, bytes).await;
            assert!(!rig.relay.is_finished());
            told.vanished.store(true, Relaxed);
            let (end, took) = rig.end().await.unwrap();
            let (RelayEnd::FirstFailed(reason) | RelayEnd::SecondFailed(reason)) = &end else {
                panic!("{end:?}")
            };
            assert_eq!(matches!(end, RelayEnd::FirstFailed(_)), which == 0);
            assert_eq!((reason.code, took), (AbortCode::Reset, 3 * TICK), "{}", reason.text);
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_far_side_that_has_left_is_lost_once_nothing_moves() {
        let mut rig = Rig::start(None, None);
        rig.told[0].left.store(true, Relaxed);
        rig.client.shutdown().await.unwrap();
        for _ in 0..20 {
            sleep(REST * 4 / 5).await;
            rig.target.write_all(b"x").await.unwrap();
            rig.client.read_exact(&mut [0]).await.unwrap();
        }
        assert!(!rig.relay.is_finished());
        let (end, took) = rig.end().await.unwrap();
        let rested = took.saturating_sub(REST * 4 / 5 * 20);
        assert!(
            matches!(&end, RelayEnd::FirstFailed(reason) if reason.code == AbortCode::Cancelled),
            "{end:?}"
        );
        assert!((REST..=2 * REST).contains(&rested), "{rested:?}");
    }

    /// What moves just before it is found that the far side has left, and was not seen to move, has its time too.
    #[tokio::test(start_paused = true)]
    async fn what_moves_just_before_the_far_side_leaves_has_its_time() {
        let mut rig = Rig::start(None, None);
        rig.client.shutdown().await.unwrap();
        sleep(TICK * 9 / 5).await;
        rig.told[0].left.store(true, Relaxed);
        let begun = Instant::now();
        rig.target.write_all(b"x").await.unwrap();
        rig.end().await.unwrap();
        assert_eq!(begun.elapsed(), REST);
    }

    #[tokio::test(start_paused = true)]
    async fn a_leg_is_asked_for_news_only_while_it_is_not_read_and_nothing_moves() {
        let mut rig = Rig::start(None, None);
        let asked = |rig: &Rig| [0, 1].map(|which| rig.told[which].asked.load(Relaxed) > 0);
        sleep(MINUTE).await;
        assert_eq!(asked(&rig), [false, false]);
        rig.client.shutdown().await.unwrap();
        for _ in 0..100 {
            sleep(REST / 2).await;
            rig.target.write_all(b"x").await.unwrap();
            rig.client.read_exact(&mut [0]).await.unwrap();
        }
        assert_eq!(asked(&rig), [false, false]);
        sleep(2 * REST).await;
        assert_eq!(asked(&rig), [true, false]);
    }
}
