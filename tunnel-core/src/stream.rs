//! One proxied connection on a link: a yamux stream whose ends are exact.
//!
//! [`Streams`] is the table that a link and its streams share: entries by number, what waits for the control stream,
//! and the permits that bound both. [`TunnelStream`] is the user's end: it reads and writes raw bytes, ends a
//! direction by `shutdown`, and aborts when it is dropped with anything unfinished.

use std::{
    collections::{BTreeMap, VecDeque, btree_map},
    io::{self, IoSlice},
    pin::Pin,
    sync::{Arc, OnceLock},
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use futures_util::{FutureExt, task::AtomicWaker};
use parking_lot::Mutex;
use prost::Message;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, ReadBuf},
    sync::{Notify, OwnedSemaphorePermit, Semaphore},
    time::{Instant, Sleep},
};

use crate::{
    link::LinkConfig,
    mux::MuxStream,
    proto::{
        MAX_MESSAGE, Side, clean_text,
        ends::{Aborted, Ends, Verdict},
        frame::{self, FrameError},
        messages::{
            Abort, AbortCode, Direction, End, Open, OpenReply, Opened, RefusalCode, Refused, control,
            open_reply,
        },
        yamux::Chunk,
    },
    relay::Arrived,
};

/// First buffer for a stream's header: most headers fit.
const HEADER_BUFFER: usize = 512;
/// How long the reason for a reset is waited for. It leaves at the same time, on the control stream.
const REASON_TIMEOUT: Duration = Duration::from_millis(500);

/// What a link knows of all its streams.
#[derive(Debug)]
pub(crate) struct Streams {
    side: Side,
    /// Ordered, so that a simulation wakes them in the same order each time.
    entries: Mutex<BTreeMap<u64, Arc<Entry>>>,
    outbox: Mutex<VecDeque<Outgoing>>,
    outbox_filled: Notify,
    /// There are no entries, for the moment.
    emptied: Notify,
    permits: Arc<Semaphore>,
    /// For streams that must find a place while all others are taken.
    reserved: Arc<Semaphore>,
    max_reserved: usize,
    confirmations: Mutex<Confirmations>,
    ended: OnceLock<LinkEnd>,
    end_timeout: Duration,
}

/// Which streams wait to know that all of theirs has arrived at the far side. It does not say so of each: an answer to a
/// ping that was sent behind their ends says it of all.
#[derive(Debug, Default)]
struct Confirmations {
    /// How many streams have asked.
    asked: u64,
    /// How many of these have been answered. Answers come in the order of asking.
    confirmed: u64,
    /// By the stream's number: which in the order of asking it is.
    waiting: BTreeMap<u64, u64>,
}

/// How a link ended.
#[derive(Clone, Debug)]
pub(crate) struct LinkEnd {
    /// Why its streams were cut.
    pub(crate) reason: Aborted,
    /// The far side has closed it behind all that it had to say: what it did not abort has arrived there.
    pub(crate) in_order: bool,
}

/// A message for the control stream. The permit of a stream travels behind its last message, so that a peer that does
/// not read its control stream bounds its streams, and with them this queue.
#[derive(Debug)]
struct Outgoing {
    message: Option<control::Kind>,
    _permit: Option<OwnedSemaphorePermit>,
}

#[derive(Debug, Default)]
struct Entry {
    ends: Mutex<Ends>,
    reader: AtomicWaker,
    writer: AtomicWaker,
}

impl Entry {
    fn abort(&self, reason: Aborted) {
        self.ends.lock().abort(reason);
        self.wake();
    }

    fn wake(&self) {
        self.reader.wake();
        self.writer.wake();
    }
}

impl Streams {
    pub(crate) fn new(side: Side, config: &LinkConfig) -> Self {
        let LinkConfig { max_streams, reserved_streams, end_timeout, .. } = *config;
        let max_reserved = reserved_streams.min(max_streams / 4);
        Self {
            side,
            entries: Mutex::default(),
            outbox: Mutex::default(),
            outbox_filled: Notify::new(),
            emptied: Notify::new(),
            permits: Arc::new(Semaphore::new(max_streams - max_reserved)),
            reserved: Arc::new(Semaphore::new(max_reserved)),
            max_reserved,
            confirmations: Mutex::default(),
            ended: OnceLock::new(),
            end_timeout,
        }
    }

    /// A place for one more stream, if there is one; for some, a reserved one while there are any.
    pub(crate) fn permit(&self, may_be_reserved: bool) -> Option<OwnedSemaphorePermit> {
        let permit = |of: &Arc<Semaphore>| of.clone().try_acquire_owned().ok();
        let reserved = may_be_reserved.then(|| permit(&self.reserved)).flatten();
        reserved.or_else(|| permit(&self.permits))
    }

    /// How many places are reserved.
    pub(crate) fn reserved(&self) -> usize {
        self.max_reserved
    }

    /// Streams with an entry.
    pub(crate) fn active(&self) -> usize {
        self.entries.lock().len()
    }

    /// Waits until there are no streams. Cancel-safe.
    pub(crate) async fn idle(&self) {
        loop {
            let emptied = self.emptied.notified();
            if self.active() == 0 {
                return;
            }
            emptied.await;
        }
    }

    /// The peer's word that a direction of a stream ended. Streams that are gone already are nobody's concern.
    pub(crate) fn handle_end(&self, end: &End) {
        let Some(entry) = self.entry(end.stream) else { return };
        let opened_by_peer = self.side.opens(end.stream) == Some(false);
        let from_peer = if opened_by_peer { Direction::FromOpener } else { Direction::ToOpener };
        if end.direction() == from_peer {
            entry.ends.lock().handle_end(end.total_bytes);
        } else {
            let text = "the far side announced the end of a direction that is not its own";
            entry.ends.lock().abort(Aborted::new(AbortCode::Protocol, text));
        }
        entry.wake();
    }

    /// The peer's word that a stream was cut.
    pub(crate) fn handle_abort(&self, abort: &Abort) {
        if let Some(entry) = self.entry(abort.stream) {
            entry.abort(Aborted::new(abort.code(), clean_text(&abort.text)));
        }
    }

    /// The link is gone, and with it every stream. The first end stays.
    pub(crate) fn end_all(&self, end: LinkEnd) {
        self.end_each(end, |_, _| {});
    }

    /// This side gives the link up, and with it every stream: what the far side has to hear of them before.
    pub(crate) fn cut_all(&self, reason: Aborted, out: &mut BytesMut) {
        let mut cut = BytesMut::new();
        self.end_each(LinkEnd { reason, in_order: false }, |number, ends| {
            if let Some(reason) = ends.aborted() {
                encode(abort(number, reason), &mut cut);
            }
        });
        // Nothing joins what waits any more.
        self.drain_outbox(out, usize::MAX);
        out.unsplit(cut);
    }

    fn end_each(&self, end: LinkEnd, mut tell: impl FnMut(u64, &Ends)) {
        let reason = self.ended.get_or_init(|| end).reason.clone();
        let entries: Vec<_> =
            self.entries.lock().iter().map(|(number, entry)| (*number, entry.clone())).collect();
        for (number, entry) in entries {
            let mut ends = entry.ends.lock();
            ends.link_lost(reason.clone());
            tell(number, &ends);
            drop(ends);
            entry.wake();
        }
    }

    /// Why the link is gone, if it is.
    pub(crate) fn ended(&self) -> Option<&Aborted> {
        self.ended.get().map(|end| &end.reason)
    }

    /// How many streams have asked whether all of theirs has arrived, if there are some that have had no answer.
    pub(crate) fn unconfirmed(&self) -> Option<u64> {
        let confirmations = self.confirmations.lock();
        (confirmations.asked > confirmations.confirmed).then_some(confirmations.asked)
    }

    /// The ends of so many of the streams that have asked have arrived, and all before them.
    pub(crate) fn confirm(&self, count: u64) {
        let mut confirmations = self.confirmations.lock();
        confirmations.confirmed = count;
        let mut due = Vec::new();
        confirmations.waiting.retain(|number, place| {
            let waits = *place > count;
            if !waits {
                due.push(*number);
            }
            waits
        });
        drop(confirmations);
        for entry in due.into_iter().filter_map(|number| self.entry(number)) {
            entry.reader.wake();
        }
    }

    /// Asks whether all that a stream has said has arrived: its place in the order of asking.
    fn ask(&self, number: u64) -> u64 {
        let mut confirmations = self.confirmations.lock();
        confirmations.asked += 1;
        let place = confirmations.asked;
        confirmations.waiting.insert(number, place);
        // Whoever finds others waiting is asked for together with them.
        if confirmations.waiting.len() == 1 {
            self.outbox_filled.notify_one();
        }
        place
    }

    /// Waits until there may be something in the outbox. Cancel-safe.
    pub(crate) async fn outbox_filled(&self) {
        self.outbox_filled.notified().await;
    }

    /// Encodes waiting messages until `out` holds `limit` bytes or more. Whether some still wait.
    pub(crate) fn drain_outbox(&self, out: &mut BytesMut, limit: usize) -> bool {
        let mut outbox = self.outbox.lock();
        while out.len() < limit {
            let Some(outgoing) = outbox.pop_front() else { return false };
            if let Some(kind) = outgoing.message {
                encode(kind, out);
            }
        }
        !outbox.is_empty()
    }

    fn push(&self, message: Option<control::Kind>, permit: Option<OwnedSemaphorePermit>) {
        let mut outbox = self.outbox.lock();
        // Nobody will send what comes after the link's end; a permit need not wait behind nothing.
        if self.ended().is_some() || (message.is_none() && outbox.is_empty()) {
            return;
        }
        outbox.push_back(Outgoing { message, _permit: permit });
        drop(outbox);
        self.outbox_filled.notify_one();
    }

    fn entry(&self, number: u64) -> Option<Arc<Entry>> {
        self.entries.lock().get(&number).cloned()
    }

    /// Enters a stream, once its number is known. `None` if the number is taken.
    fn enter(&self, number: u64) -> Option<Arc<Entry>> {
        let entry = Arc::new(Entry::default());
        match self.entries.lock().entry(number) {
            btree_map::Entry::Occupied(_) => return None,
            btree_map::Entry::Vacant(vacant) => vacant.insert(entry.clone()),
        };
        // The link may have ended between the caller's look and the entry.
        if let Some(reason) = self.ended() {
            entry.abort(reason.clone());
        }
        Some(entry)
    }
}

fn encode(kind: control::Kind, out: &mut BytesMut) {
    // Cannot be too long: the only text in it was cut.
    let _ = frame::encode(&crate::proto::messages::Control { kind: Some(kind) }, out);
}

fn abort(stream: u64, reason: &Aborted) -> control::Kind {
    control::Kind::Abort(Abort { stream, code: reason.code.into(), text: clean_text(&reason.text) })
}

/// A stream's place in its link's table; leaving it says how the stream ended.
#[derive(Debug)]
struct Seat {
    streams: Arc<Streams>,
    number: u64,
    entry: Arc<Entry>,
    permit: Option<OwnedSemaphorePermit>,
    /// Why this side gives up, if it said so.
    reason: Option<Aborted>,
    /// Its place among those that have asked whether all has arrived.
    asked: Option<u64>,
}

impl Drop for Seat {
    fn drop(&mut self) {
        let mut entries = self.streams.entries.lock();
        entries.remove(&self.number);
        let is_last = entries.is_empty();
        drop(entries);
        if is_last {
            self.streams.emptied.notify_waiters();
        }
        if self.asked.is_some() {
            self.streams.confirmations.lock().waiting.remove(&self.number);
        }
        let ends = self.entry.ends.lock();
        let abort = (!ends.finished()).then(|| {
            // What this side found wrong by itself, a truncation say, outranks "dropped".
            let found = ends.aborted().cloned();
            let dropped = || Aborted::new(AbortCode::Cancelled, "the stream was dropped before its end");
            abort(self.number, &self.reason.take().or(found).unwrap_or_else(dropped))
        });
        drop(ends);
        self.streams.push(abort, self.permit.take());
    }
}

/// A proxied connection over a link.
///
/// Reading gives an end of file only once the far side has confirmed it, byte for byte; everything else is an error
/// of kind [`io::ErrorKind::ConnectionReset`] that carries an [`Aborted`]. `shutdown` ends the writing direction.
/// Dropping the stream before both directions have ended aborts it at the far side.
#[derive(Debug)]
pub struct TunnelStream {
    mux: MuxStream,
    /// Bytes that came right behind the stream header.
    early: BytesMut,
    seat: Seat,
    /// Runs while the multiplexer has ended the stream and the control stream has not yet said how.
    verdict_due: Option<Pin<Box<Sleep>>>,
}

impl TunnelStream {
    fn new(mux: MuxStream, early: BytesMut, seat: Seat) -> Self {
        Self { mux, early, seat, verdict_due: None }
    }

    /// The stream's number, unique on its link.
    pub fn number(&self) -> u64 {
        self.seat.number
    }

    /// Says why, should the stream be dropped before its end.
    pub fn abort(&mut self, reason: Aborted) {
        self.seat.reason.get_or_insert(reason);
    }

    fn aborted(&self) -> Option<io::Error> {
        self.seat.entry.ends.lock().aborted().map(|reason| into_io_error(reason.clone()))
    }

    /// Sends all of a chunk as it is, without copying it. While there is no room for it, it stays where it is.
    pub(crate) fn poll_give(
        &mut self,
        cx: &mut Context<'_>,
        chunk: &mut Option<Chunk>,
    ) -> Poll<io::Result<()>> {
        self.poll_sending(cx, |mux, cx| mux.poll_give(cx, chunk)).map_ok(drop)
    }

    /// Lets the multiplexer take bytes, and counts them: how many.
    fn poll_sending(
        &mut self,
        cx: &mut Context<'_>,
        send: impl FnOnce(&mut MuxStream, &mut Context<'_>) -> Poll<io::Result<usize>>,
    ) -> Poll<io::Result<usize>> {
        self.seat.entry.writer.register(cx.waker());
        if let Some(error) = self.aborted() {
            return Poll::Ready(Err(error));
        }
        match ready!(send(&mut self.mux, cx)) {
            Ok(bytes) => {
                self.seat.entry.ends.lock().sent(bytes);
                Poll::Ready(Ok(bytes))
            }
            // Reset by the far side, or the link is gone.
            Err(_) => self.poll_reason(cx).map(Err),
        }
    }

    /// Waits until the stream is cut, by whichever side or with its link. For whoever neither reads nor writes.
    pub(crate) fn poll_cut(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        // Before the look, so that an abort right behind it wakes.
        self.seat.entry.reader.register(cx.waker());
        if let Some(error) = self.aborted() {
            return Poll::Ready(error);
        }
        ready!(self.mux.poll_reset(cx));
        self.poll_reason(cx)
    }

    /// The multiplexer says that the stream is cut: waits, for a short time, for the reason, which is on its way.
    fn poll_reason(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        match self.aborted() {
            Some(error) => Poll::Ready(error),
            None => self.poll_unexplained(cx, REASON_TIMEOUT),
        }
    }

    /// The multiplexer has ended the stream: waits, for a bounded time, until it is known how.
    fn poll_verdict(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        match self.seat.entry.ends.lock().verdict() {
            Verdict::Clean => return Poll::Ready(Ok(())),
            Verdict::Aborted(reason) => return Poll::Ready(Err(into_io_error(reason))),
            Verdict::Wait => {}
        }
        // Behind a reset comes an abort or nothing; behind a FIN, an end that may wait for much else.
        let limit = if self.mux.is_reset() { REASON_TIMEOUT } else { Duration::MAX };
        self.poll_unexplained(cx, limit).map(Err)
    }

    /// Gives up to know how the stream ended, after the limit or the link's time-out.
    fn poll_unexplained(&mut self, cx: &mut Context<'_>, limit: Duration) -> Poll<io::Error> {
        let timeout = self.seat.streams.end_timeout.min(limit);
        let due = self.verdict_due.get_or_insert_with(|| Box::pin(tokio::time::sleep(timeout)));
        ready!(due.as_mut().poll(cx));
        let reason = Aborted::new(AbortCode::Reset, "the stream was reset, and the far side did not say why");
        self.seat.entry.ends.lock().abort(reason.clone());
        Poll::Ready(into_io_error(reason))
    }

    /// When both directions have ended here: waits until all that this side has said has arrived at the far side.
    pub(crate) fn poll_confirmed(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.seat.entry.reader.register(cx.waker());
        if let Some(error) = self.aborted() {
            return Poll::Ready(Err(error));
        }
        let asked = match self.seat.asked {
            Some(asked) => asked,
            None if ready!(self.mux.poll_finished(cx)) => {
                let asked = self.seat.streams.ask(self.seat.number);
                *self.seat.asked.insert(asked)
            }
            // Reset by the far side, or the link is gone: the reason is on its way.
            None => {
                return match self.seat.streams.ended() {
                    Some(lost) => Poll::Ready(Err(into_io_error(lost.clone()))),
                    None => self.poll_reason(cx).map(Err),
                };
            }
        };
        if self.seat.streams.confirmations.lock().confirmed >= asked {
            return Poll::Ready(Ok(()));
        }
        match self.seat.streams.ended.get() {
            None => Poll::Pending,
            Some(LinkEnd { in_order: true, .. }) => Poll::Ready(Ok(())),
            Some(LinkEnd { reason, .. }) => Poll::Ready(Err(into_io_error(reason.clone()))),
        }
    }
}

impl Arrived for TunnelStream {
    fn poll_arrived<'a>(
        &'a mut self,
        cx: &mut Context<'_>,
        pieces: &mut [IoSlice<'a>],
    ) -> Poll<io::Result<usize>> {
        // Before the look, so that an abort right behind it wakes.
        self.seat.entry.reader.register(cx.waker());
        if let Some(error) = self.aborted() {
            return Poll::Ready(Err(error));
        }
        if let ([first, ..], false) = (&mut *pieces, self.early.is_empty()) {
            *first = IoSlice::new(&self.early);
            return Poll::Ready(Ok(1));
        }
        // The borrow checker does not see that the pieces live on only if there are some.
        if ready!(self.mux.poll_ready(cx)) {
            return Poll::Ready(Ok(self.mux.arrived(pieces)));
        }
        self.seat.entry.ends.lock().eof();
        self.poll_verdict(cx).map_ok(|()| 0)
    }

    fn consume(&mut self, bytes: usize) {
        if self.early.is_empty() {
            self.mux.consume(bytes);
        } else {
            self.early.advance(bytes);
        }
        self.seat.entry.ends.lock().received(bytes);
    }
}

impl AsyncRead for TunnelStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        self.poll_copy(cx, buf)
    }
}

impl AsyncWrite for TunnelStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        self.poll_sending(cx, |mux, cx| Pin::new(mux).poll_write_vectored(cx, pieces))
    }

    fn is_write_vectored(&self) -> bool {
        true
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        // The multiplexer's task flushes by itself; this only keeps to the trait's contract.
        Pin::new(&mut self.mux).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        this.seat.entry.writer.register(cx.waker());
        if let Some(error) = this.aborted() {
            return Poll::Ready(Err(error));
        }
        ready!(Pin::new(&mut this.mux).poll_shutdown(cx))?;
        let finished = this.seat.entry.ends.lock().finish_sending();
        if let Some(total_bytes) = finished {
            let opened_here = this.seat.streams.side.opens(this.seat.number) == Some(true);
            let direction = if opened_here { Direction::FromOpener } else { Direction::ToOpener };
            let end = End { stream: this.seat.number, direction: direction.into(), total_bytes };
            this.seat.streams.push(Some(control::Kind::End(end)), None);
        }
        Poll::Ready(Ok(()))
    }
}

fn into_io_error(reason: Aborted) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, reason)
}

/// The opener's half of a stream's beginning.
pub(crate) async fn open(
    mut mux: MuxStream,
    streams: Arc<Streams>,
    permit: OwnedSemaphorePermit,
    open: &Open,
) -> Result<(TunnelStream, Opened), OpenStreamError> {
    let entry = streams.enter(open.stream).ok_or(OpenStreamError::Header(HeaderError::NumberTaken))?;
    let seat = Seat { streams, number: open.stream, entry, permit: Some(permit), reason: None, asked: None };
    let mut buffer = BytesMut::with_capacity(HEADER_BUFFER);
    frame::encode(open, &mut buffer).map_err(HeaderError::Frame)?;
    mux.write_all_buf(&mut buffer).await.map_err(HeaderError::Io)?;
    let reply: OpenReply = read_message(&mut mux, &mut buffer).await?;
    match reply.kind {
        Some(open_reply::Kind::Opened(opened)) => Ok((TunnelStream::new(mux, buffer, seat), opened)),
        Some(open_reply::Kind::Refused(refused)) => {
            // Nothing was begun, so there is no end to announce.
            seat.forget();
            Err(OpenStreamError::Refused(refused))
        }
        None => Err(HeaderError::EmptyReply.into()),
    }
}

impl Seat {
    /// Leaves without an `Abort`: the far side has no entry for this stream, or has left it already.
    fn forget(&self) {
        let mut ends = self.entry.ends.lock();
        ends.finish_sending();
        ends.handle_end(0);
        ends.eof();
    }
}

/// Why a stream's header exchange failed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum OpenStreamError {
    #[error("refused: {}", .0.text)]
    Refused(Refused),
    #[error(transparent)]
    Header(#[from] HeaderError),
}

/// A stream header that could not be exchanged.
#[derive(Debug, thiserror::Error)]
pub enum HeaderError {
    /// Not a header.
    #[error(transparent)]
    Frame(#[from] FrameError),
    /// The stream broke before the header was whole.
    #[error("the stream ended before its header was complete")]
    Truncated,
    /// The multiplexer failed.
    #[error("the stream broke: {0}")]
    Io(io::Error),
    /// Nothing this version knows.
    #[error("the reply is of an unknown kind")]
    EmptyReply,
    /// The opener used a number twice, or one that is not its own.
    #[error("the stream's number is in use, or not the opener's to use")]
    NumberTaken,
    /// The header took too long.
    #[error("the stream's header did not arrive in time")]
    TimedOut,
}

/// Reads one message, and no more than one plus what came in the same pieces, which stays in `buffer`.
async fn read_message<M: Message + Default>(
    mux: &mut MuxStream,
    buffer: &mut BytesMut,
) -> Result<M, HeaderError> {
    loop {
        if let Some(message) = frame::decode(buffer)? {
            return Ok(message);
        }
        if buffer.len() > MAX_MESSAGE + HEADER_BUFFER {
            return Err(FrameError::TooLong.into());
        }
        if mux.read_buf(buffer).await.map_err(HeaderError::Io)? == 0 {
            return Err(HeaderError::Truncated);
        }
    }
}

/// A stream that the far side has begun to open. Dropping it resets the stream.
#[derive(Debug)]
pub struct Incoming {
    mux: MuxStream,
    streams: Arc<Streams>,
    permit: OwnedSemaphorePermit,
}

impl Incoming {
    pub(crate) fn new(mux: MuxStream, streams: Arc<Streams>, permit: OwnedSemaphorePermit) -> Self {
        Self { mux, streams, permit }
    }

    /// Reads what the opener wants, until `deadline`.
    ///
    /// A header that is not one is answered with a refusal before the error is returned.
    pub async fn header(mut self, deadline: Instant) -> Result<PendingStream, HeaderError> {
        let mut buffer = BytesMut::with_capacity(HEADER_BUFFER);
        let read = tokio::time::timeout_at(deadline, read_message::<Open>(&mut self.mux, &mut buffer)).await;
        let open = match read.unwrap_or(Err(HeaderError::TimedOut)) {
            Ok(open) => open,
            Err(error) => {
                refuse_unread(&mut self.mux, RefusalCode::Malformed, &error.to_string());
                return Err(error);
            }
        };
        let by_peer = self.streams.side.opens(open.stream) == Some(false);
        let Some(entry) = by_peer.then(|| self.streams.enter(open.stream)).flatten() else {
            refuse_unread(&mut self.mux, RefusalCode::Malformed, &HeaderError::NumberTaken.to_string());
            return Err(HeaderError::NumberTaken);
        };
        let seat = Seat {
            streams: self.streams,
            number: open.stream,
            entry,
            permit: Some(self.permit),
            reason: None,
            asked: None,
        };
        Ok(PendingStream { mux: self.mux, early: buffer, seat, open })
    }
}

/// Refuses a stream of which nothing needs to be known. Best effort, without waiting: a fresh stream has room for it.
pub(crate) fn refuse_unread(mux: &mut MuxStream, code: RefusalCode, text: &str) {
    let refused = Refused { code: code.into(), text: clean_text(text) };
    let mut out = BytesMut::new();
    if frame::encode(&OpenReply { kind: Some(open_reply::Kind::Refused(refused)) }, &mut out).is_ok() {
        let _ = mux.write_all_buf(&mut out).now_or_never();
        let _ = mux.shutdown().now_or_never();
    }
}

/// A stream whose opener waits for an answer. Dropping it resets the stream.
#[derive(Debug)]
pub struct PendingStream {
    mux: MuxStream,
    early: BytesMut,
    seat: Seat,
    open: Open,
}

impl PendingStream {
    /// What the opener wants.
    pub fn open(&self) -> &Open {
        &self.open
    }

    /// Completes when the opener no longer waits, or the link is gone. Cancel-safe.
    pub async fn cancelled(&mut self) -> Aborted {
        std::future::poll_fn(|cx| {
            self.seat.entry.reader.register(cx.waker());
            if let Some(reason) = self.seat.entry.ends.lock().aborted() {
                return Poll::Ready(reason.clone());
            }
            // An opener may not send before it is answered, so whatever ends this read ends the stream.
            let mut byte = [0; 1];
            let mut buffer = ReadBuf::new(&mut byte);
            let read = ready!(Pin::new(&mut self.mux).poll_read(cx, &mut buffer));
            let reason = if read.is_ok() && !buffer.filled().is_empty() {
                Aborted::new(AbortCode::Protocol, "the opener sent bytes before it was answered")
            } else {
                Aborted::new(AbortCode::Cancelled, "the opener gave up before the target was connected")
            };
            self.seat.entry.abort(reason.clone());
            Poll::Ready(reason)
        })
        .await
    }

    /// Tells the opener that the target is connected at `address`.
    pub async fn accept(mut self, address: String) -> io::Result<TunnelStream> {
        self.reply(open_reply::Kind::Opened(Opened { address })).await?;
        Ok(TunnelStream::new(self.mux, self.early, self.seat))
    }

    /// Tells the opener why not.
    pub async fn refuse(mut self, code: RefusalCode, text: &str) -> io::Result<()> {
        let refused = Refused { code: code.into(), text: clean_text(text) };
        self.reply(open_reply::Kind::Refused(refused)).await?;
        self.seat.forget();
        self.mux.shutdown().await
    }

    async fn reply(&mut self, kind: open_reply::Kind) -> io::Result<()> {
        let mut out = BytesMut::new();
        frame::encode(&OpenReply { kind: Some(kind) }, &mut out).map_err(io::Error::other)?;
        self.mux.write_all_buf(&mut out).await
    }
}
