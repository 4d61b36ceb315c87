//! One connection's state, and the rules for what the far side may do.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::Buf;

use super::{
    FRAME_BODY, HEADERS_BEYOND,
    batch::{Batch, Chunk},
    frame::{Flags, GoAway, HEADER, Header, HeaderError, Kind},
    stream::{Sending, Stream},
    window::{Budget, RoundTrip, UpdateDue, WindowPool},
};
use crate::proto::Side;

/// Streams of this side that the far side has not answered yet; more wait. hashicorp/yamux resets those beyond.
const UNACKNOWLEDGED: usize = 256;
/// Answers to pings that wait to be sent. Of more, the oldest are forgotten.
const PONGS: usize = 8;
/// Streams that were opened beyond the maximum and are still to be told. A peer that opens more without reading is cut.
const REFUSALS: usize = 1024;
/// Streams that were accepted and are left without an answer. Of more, the first are answered by a frame of their own.
const UNANSWERED: usize = UNACKNOWLEDGED / 4;
/// No stream is left so for much longer. hashicorp/yamux ends the connection after 75 seconds.
const LONG_UNANSWERED: Duration = Duration::from_secs(20);
/// Turns of streams that are forgotten, before it is worth going through all of them.
const MOST_FORGOTTEN: usize = 64;

/// Limits of one connection.
#[derive(Clone, Copy, Debug)]
pub struct Config {
    /// Streams at once. More are reset one by one.
    pub max_streams: usize,
    /// Bytes by which all receive windows together may grow beyond [`INITIAL`](super::INITIAL) each.
    pub window_budget: usize,
}

/// Why the connection is of no further use.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The far side has ended it in an orderly way.
    #[error("the far side closed the connection")]
    ClosedByPeer,
    /// The far side says that it will not go on.
    #[error("the far side ended the connection with code {0}")]
    EndedByPeer(u32),
    /// What came is no frame.
    #[error(transparent)]
    Header(#[from] HeaderError),
    /// A frame came that the rules forbid.
    #[error("stream {stream}: {what}")]
    Violation {
        /// The stream's number.
        stream: u32,
        /// What the far side did.
        what: &'static str,
    },
}

impl Error {
    fn violation(stream: u32, what: &'static str) -> Self {
        Self::Violation { stream, what }
    }
}

/// Why a stream could not be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum OpenFailed {
    /// The connection has ended.
    #[error("the connection has ended")]
    Ended,
    /// It holds as many streams as it can.
    #[error("the connection holds as many streams as it can")]
    TooMany,
    /// All numbers are used up: a new connection is needed.
    #[error("the connection has no numbers for more streams")]
    NoNumbers,
}

/// Nothing can be written to the stream any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the stream has ended")]
pub struct StreamEnded;

/// Who waits to open a stream, in the order in which they came.
#[derive(Debug, Default)]
struct Openers {
    waiting: BTreeMap<u64, Waker>,
    next: u64,
    /// There may be room for the first of them.
    due: bool,
}

/// A caller's place among those that wait to open a stream.
#[derive(Debug)]
pub struct Place(u64);

/// A yamux connection without I/O.
///
/// One owner feeds it: [`receive`](Self::receive) with whatever has come, [`transmit`](Self::transmit) until it gives
/// nothing, again and again; after [`end`](Self::end) every method still works, and says that it is over. Users of
/// streams call the others, with a number that [`poll_open`](Self::poll_open) or [`poll_accept`](Self::poll_accept)
/// gave, until [`discard`](Self::discard). Whoever has to be woken is collected, not called, since callers hold a lock:
/// after each call of any kind, take [`wakes`](Self::take_wakes).
#[derive(Debug)]
pub struct Session {
    side: Side,
    max_streams: usize,
    streams: BTreeMap<u32, Box<Stream>>,
    next_number: Option<u32>,
    /// Streams that nobody has taken yet, and when they came.
    accepted: VecDeque<(u32, Instant)>,
    acceptor: Option<Waker>,
    /// Streams that were accepted last, and may be without an answer.
    unanswered: VecDeque<(u32, Instant)>,
    openers: Openers,
    /// Streams that this side has opened and the far side has not answered.
    unacknowledged: usize,
    input: Input,
    round_trip: RoundTrip,
    window_budget: Budget,
    output: Output,
    state: State,
    /// Whoever calls `transmit`, while there was nothing to send.
    transmitter: Option<Waker>,
    wakes: Vec<Waker>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Open,
    /// No more streams; what is queued is sent, then a word of farewell.
    Closing,
    /// The farewell was given.
    Closed,
    Ended,
}

/// How far the far side's bytes were understood.
#[derive(Debug)]
enum Input {
    Header { bytes: [u8; HEADER], filled: usize },
    Body { stream: u32, left: usize, ends: bool },
}

impl Input {
    const START: Self = Self::Header { bytes: [0; HEADER], filled: 0 };
}

/// What waits to be sent beside the streams' own frames, and in which order streams have their turn.
#[derive(Debug, Default)]
struct Output {
    pongs: VecDeque<u32>,
    refusals: VecDeque<u32>,
    /// Streams that had nothing to send a moment ago, and now little: they go first, so that a keystroke does not wait
    /// behind a copy.
    sparse: VecDeque<u32>,
    /// Streams that have had a turn and have more, or begin with much.
    busy: VecDeque<u32>,
    /// Of both, those that were forgotten: nothing is sent for them.
    forgotten: usize,
    /// The last turn was a sparse stream's: with many of them, the busy ones still have every other turn.
    sparse_had_turn: bool,
    /// The first of the busy ones had too much for this batch, and comes first in the next.
    postponed: bool,
    /// How large a batch may be, as `transmit` was told last.
    limit: usize,
    /// How many turns there were in the last batch that had any.
    turns: usize,
    /// Streams whose sender shall be told that it may send more, but may wait for it until anything is sent: a frame of its
    /// own for each would cost more than the bytes that it lets come.
    told_with_others: BTreeSet<u32>,
}

impl Session {
    /// A connection's beginning.
    pub fn new(side: Side, config: Config) -> Self {
        Self {
            side,
            max_streams: config.max_streams,
            streams: BTreeMap::new(),
            next_number: Some(side.first_number()),
            accepted: VecDeque::new(),
            acceptor: None,
            unanswered: VecDeque::new(),
            openers: Openers::default(),
            unacknowledged: 0,
            input: Input::START,
            round_trip: RoundTrip::default(),
            window_budget: Budget::new(config.window_budget),
            output: Output::default(),
            state: State::Open,
            transmitter: None,
            wakes: Vec::new(),
        }
    }

    /// The same, whose windows also grow no further than a pool allows that is shared with others.
    pub fn sharing(mut self, pool: Arc<WindowPool>) -> Self {
        self.window_budget.share(pool);
        self
    }

    /// The same, as if this side had opened so many streams before, of the 2^31 that it can open.
    pub fn having_opened(mut self, streams: u32) -> Self {
        self.next_number = streams.checked_mul(2).and_then(|used| self.side.first_number().checked_add(used));
        self
    }

    /// Whoever has to be woken for what was done last.
    pub fn take_wakes(&mut self) -> Vec<Waker> {
        if std::mem::take(&mut self.openers.due) {
            let room = UNACKNOWLEDGED.saturating_sub(self.unacknowledged);
            self.wakes.extend(self.openers.waiting.values().take(room).cloned());
        }
        std::mem::take(&mut self.wakes)
    }

    /// Opens a stream: its number. Nothing is sent before the first bytes are written. Waits while the far side has
    /// not answered too many others: then `place` is the caller's, until this is ready or it [leaves](Self::leave).
    pub fn poll_open(
        &mut self,
        place: &mut Option<Place>,
        cx: &mut Context<'_>,
        now: Instant,
    ) -> Poll<Result<u32, OpenFailed>> {
        let has_room = self.unacknowledged < UNACKNOWLEDGED;
        if self.state == State::Open && self.streams.len() < self.max_streams && !has_room {
            let Place(at) = place.get_or_insert_with(|| self.openers.come());
            self.openers.waiting.insert(*at, cx.waker().clone());
            return Poll::Pending;
        }
        if let Some(place) = place.take() {
            self.leave(place);
        }
        Poll::Ready(self.open(now))
    }

    /// A caller no longer waits to open a stream.
    pub fn leave(&mut self, Place(at): Place) {
        self.openers.waiting.remove(&at);
        // It may have been woken for room that is another's now.
        self.openers.due = true;
    }

    fn open(&mut self, now: Instant) -> Result<u32, OpenFailed> {
        if self.state != State::Open {
            return Err(OpenFailed::Ended);
        }
        if self.streams.len() >= self.max_streams {
            return Err(OpenFailed::TooMany);
        }
        let number = self.next_number.ok_or(OpenFailed::NoNumbers)?;
        self.next_number = number.checked_add(2);
        self.unacknowledged += 1;
        self.streams.insert(number, Box::new(Stream::new(number, true, now)));
        Ok(number)
    }

    /// The number of the next stream that the far side has opened; `None` once the connection has ended.
    pub fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<Option<u32>> {
        match self.accepted.pop_front() {
            Some((number, came)) => {
                self.unanswered.push_back((number, came));
                self.answer_in_time(came);
                Poll::Ready(Some(number))
            }
            None if self.state == State::Ended => Poll::Ready(None),
            None => {
                self.acceptor = Some(cx.waker().clone());
                Poll::Pending
            }
        }
    }

    /// Moves what has arrived of a stream to `segments`, up to about `limit` bytes. Nothing is moved at the stream's
    /// end, which says nothing of how it ended.
    pub fn poll_read(
        &mut self,
        number: u32,
        cx: &mut Context<'_>,
        segments: &mut VecDeque<Vec<u8>>,
        limit: usize,
        now: Instant,
    ) -> Poll<()> {
        let is_over = self.state == State::Ended;
        let Some(stream) = self.streams.get_mut(&number) else { return Poll::Ready(()) };
        let receiving = &mut stream.receiving;
        let is_ready = receiving.take(segments, limit) || receiving.ended || is_over;
        if !is_ready {
            receiving.reader = Some(cx.waker().clone());
        }
        match receiving.update_due() {
            UpdateDue::No => {}
            UpdateDue::WithOthers => _ = self.output.told_with_others.insert(number),
            UpdateDue::Now => {
                receiving.make_room(now, self.round_trip.shortest(), &mut self.window_budget);
                self.schedule(number);
            }
        }
        if is_ready { Poll::Ready(()) } else { Poll::Pending }
    }

    /// A stream is answered by its first bytes. But while many wait for theirs, or one for long, the far side shall not
    /// think that nobody accepts.
    fn answer_in_time(&mut self, now: Instant) {
        while let Some((number, came)) = self.unanswered.front().copied()
            && (self.unanswered.len() > UNANSWERED || now.saturating_duration_since(came) >= LONG_UNANSWERED)
        {
            self.unanswered.pop_front();
            if let Some(stream) = self.streams.get_mut(&number) {
                stream.answer();
                self.schedule(number);
            }
        }
    }

    /// Takes as many bytes as there is room for.
    pub fn poll_write(
        &mut self,
        number: u32,
        cx: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<Result<usize, StreamEnded>> {
        let (sending, share) = self.sending(number)?;
        let taken = sending.room(share).min(bytes.len());
        if taken == 0 && !bytes.is_empty() {
            sending.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        sending.append(&bytes[..taken]);
        self.schedule(number);
        Poll::Ready(Ok(taken))
    }

    /// Takes all of a chunk, without copying it, once there is room: how many bytes. Until then it stays where it is.
    /// Room is counted in bytes, not in memory: a chunk that is nearly empty is better [written](Self::poll_write).
    pub fn poll_give(
        &mut self,
        number: u32,
        cx: &mut Context<'_>,
        chunk: &mut Option<Chunk>,
    ) -> Poll<Result<usize, StreamEnded>> {
        let (sending, share) = self.sending(number)?;
        let Some(given) = sending.give(chunk, share) else {
            sending.writer = Some(cx.waker().clone());
            return Poll::Pending;
        };
        self.schedule(number);
        Poll::Ready(Ok(given))
    }

    /// A stream that takes bytes, and its share of a batch.
    fn sending(&mut self, number: u32) -> Result<(&mut Sending, usize), StreamEnded> {
        if self.state == State::Ended {
            return Err(StreamEnded);
        }
        let stream =
            self.streams.get_mut(&number).filter(|stream| stream.sending.is_open()).ok_or(StreamEnded)?;
        let others = self.output.waiting().saturating_sub(usize::from(stream.queued));
        Ok((&mut stream.sending, self.output.share(others)))
    }

    /// Waits until the far side resets a stream, for a user that neither reads nor writes it now.
    pub fn poll_reset(&mut self, number: u32, cx: &mut Context<'_>) -> Poll<()> {
        if self.is_reset(number) {
            return Poll::Ready(());
        }
        if let Some(stream) = self.streams.get_mut(&number) {
            stream.watcher = Some(cx.waker().clone());
        }
        Poll::Pending
    }

    /// Whether the far side has reset a stream. The end of the connection is no reset.
    pub fn is_reset(&self, number: u32) -> bool {
        self.state != State::Ended
            && self.streams.get(&number).is_some_and(|stream| stream.sending.is_reset())
    }

    /// No more bytes will be written: the far side reads an end behind those that were.
    pub fn finish(&mut self, number: u32) {
        if let Some(stream) = self.streams.get_mut(&number) {
            stream.sending.finish();
            self.schedule(number);
        }
    }

    /// Waits until the end of a stream that was [finished](Self::finish) leaves, behind all its bytes: whether it has.
    /// It has not if the stream was reset, or the connection ended before.
    pub fn poll_finished(&mut self, number: u32, cx: &mut Context<'_>) -> Poll<bool> {
        let Some(stream) = self.streams.get_mut(&number) else { return Poll::Ready(false) };
        let outcome = stream.sending.outcome();
        if outcome.is_pending() {
            stream.sending.writer = Some(cx.waker().clone());
        }
        outcome
    }

    /// Nobody will use the stream any more. Unless it was finished, it is reset.
    pub fn discard(&mut self, number: u32) {
        if let Some(stream) = self.streams.get_mut(&number) {
            stream.let_go();
            self.schedule(number);
            self.forget_if_over(number);
        }
    }

    /// Ends the connection once all was sent that waits and that the far side takes. No more streams can be opened.
    pub fn close(&mut self) {
        if self.state == State::Open {
            self.state = State::Closing;
            self.wake_transmitter();
            self.openers.wake_all(&mut self.wakes);
        }
    }

    /// Whether the farewell was given: when that was sent, the connection may be closed.
    pub fn is_closed(&self) -> bool {
        self.state == State::Closed
    }

    /// The connection is gone. What has arrived can still be read.
    pub fn end(&mut self) {
        self.state = State::Ended;
        for stream in self.streams.values_mut() {
            self.wakes.extend(stream.take_wakers());
            stream.cut();
        }
        let dropped = self.streams.iter().filter(|(_, stream)| stream.dropped);
        for number in dropped.map(|(number, _)| *number).collect::<Vec<_>>() {
            self.remove(number);
        }
        self.wakes.extend(self.acceptor.take());
        self.openers.wake_all(&mut self.wakes);
    }

    /// Bytes that the far side has sent, cut anywhere.
    ///
    /// # Errors
    /// The connection is of no further use then; the caller has to end it.
    pub fn receive(&mut self, mut bytes: &[u8], now: Instant) -> Result<(), Error> {
        // Now and then something comes on any connection: a heartbeat, or a ping.
        self.answer_in_time(now);
        while !bytes.is_empty() {
            match &mut self.input {
                Input::Header { bytes: header, filled } => {
                    let (fits, rest) = bytes.split_at(bytes.len().min(HEADER - *filled));
                    header[*filled..*filled + fits.len()].copy_from_slice(fits);
                    *filled += fits.len();
                    bytes = rest;
                    if *filled == HEADER {
                        let header = Header::decode(header)?;
                        self.input = Input::START;
                        self.handle(header, now)?;
                    }
                }
                Input::Body { stream, left, ends } => {
                    let (fits, rest) = bytes.split_at(bytes.len().min(*left));
                    *left -= fits.len();
                    bytes = rest;
                    let (number, left, ends) = (*stream, *left, *ends && *left == 0);
                    if left == 0 {
                        self.input = Input::START;
                    }
                    self.arrived(number, fits, left, ends);
                }
            }
        }
        Ok(())
    }

    fn handle(&mut self, header: Header, now: Instant) -> Result<(), Error> {
        match header.kind {
            Kind::Ping if header.flags.has(Flags::ACK) => self.round_trip.pong(header.length, now),
            Kind::Ping => {
                if self.output.pongs.len() == PONGS {
                    self.output.pongs.pop_front();
                }
                self.output.pongs.push_back(header.length);
                self.wake_transmitter();
            }
            Kind::GoAway if header.length == GoAway::Normal as u32 => return Err(Error::ClosedByPeer),
            Kind::GoAway => return Err(Error::EndedByPeer(header.length)),
            Kind::Data | Kind::WindowUpdate => self.handle_stream(header, now)?,
        }
        Ok(())
    }

    fn handle_stream(&mut self, header: Header, now: Instant) -> Result<(), Error> {
        let Header { kind, flags, stream: number, length } = header;
        let body = if kind == Kind::Data { length } else { 0 };
        if flags.has(Flags::SYN) {
            self.opened(number, now)?;
        }
        let ends = flags.has(Flags::FIN);
        if body > 0 {
            // Nobody's, unless it turns out to be somebody's.
            self.input = Input::Body { stream: 0, left: body as usize, ends };
        }
        // Streams that were forgotten may still be spoken of: by frames that were under way, or by a far side that
        // has not yet been told.
        let Some(stream) = self.streams.get_mut(&number) else { return Ok(()) };
        if std::mem::take(&mut stream.unacknowledged) {
            self.unacknowledged -= 1;
            self.openers.due = true;
        }
        if flags.has(Flags::RST) {
            stream.reset_by_peer();
            self.wakes.extend(stream.take_wakers());
            self.forget_if_over(number);
            return Ok(());
        }
        if kind == Kind::WindowUpdate {
            if !stream.sending.open_window(length) {
                return Err(Error::violation(number, "its window was opened beyond all bounds"));
            }
            self.schedule(number);
        } else if body > 0 {
            if stream.receiving.ended {
                return Err(Error::violation(number, "bytes came behind its end"));
            }
            if !stream.receiving.announce(body) {
                return Err(Error::violation(number, "more bytes came than its window allows"));
            }
            self.input = Input::Body { stream: number, left: body as usize, ends };
        }
        if ends && body == 0 {
            self.arrived(number, &[], 0, true);
        }
        Ok(())
    }

    /// The far side opens a stream.
    fn opened(&mut self, number: u32, now: Instant) -> Result<(), Error> {
        if self.side.opens(number.into()) != Some(false) {
            return Err(Error::violation(number, "the number is not the opener's to use"));
        }
        if self.streams.contains_key(&number) {
            return Err(Error::violation(number, "it was opened twice"));
        }
        if self.streams.len() >= self.max_streams || self.state != State::Open {
            if self.output.refusals.len() >= REFUSALS {
                return Err(Error::violation(number, "too many streams were opened at once"));
            }
            self.output.refusals.push_back(number);
            self.wake_transmitter();
            return Ok(());
        }
        self.streams.insert(number, Box::new(Stream::new(number, false, now)));
        self.accepted.push_back((number, now));
        self.wakes.extend(self.acceptor.take());
        Ok(())
    }

    /// Bytes of a stream, how many more the same frame has, and whether they are its last.
    fn arrived(&mut self, number: u32, bytes: &[u8], more: usize, ends: bool) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        stream.receiving.ended |= ends;
        if stream.dropped {
            if !bytes.is_empty() {
                stream.bounce();
                self.schedule(number);
            }
            self.forget_if_over(number);
            return;
        }
        if !bytes.is_empty() {
            stream.receiving.append(bytes, more);
        }
        self.wakes.extend(stream.receiving.reader.take());
    }

    /// Adds frames to `batch` while it surely holds no more than `limit` bytes, which must be 16 KiB or more, and behind
    /// them up to [`HEADERS_BEYOND`] bytes of headers. If there are none, `cx` is woken once there are.
    pub fn transmit(&mut self, batch: &mut Batch, limit: usize, cx: &mut Context<'_>, now: Instant) {
        if matches!(self.state, State::Closed | State::Ended) {
            return;
        }
        self.output.limit = limit;
        let mut turns = 0;
        self.transmit_own(batch);
        while has_room(batch, limit) {
            let Some(number) = self.output.next_turn() else { break };
            self.transmit_stream(number, batch, limit);
            turns += 1;
            if self.output.postponed {
                break;
            }
        }
        if turns > 0 {
            self.output.turns = turns;
        }
        if batch.has_remaining() {
            self.transmit_with_others(batch, limit, now);
            if let Some(number) = self.round_trip.ping(now) {
                let flags = Flags::SYN;
                batch.push_header(&Header { kind: Kind::Ping, flags, stream: 0, length: number });
            }
        } else if self.state == State::Closing {
            self.state = State::Closed;
            batch.push_header(&Header::go_away(GoAway::Normal));
        } else {
            self.transmitter = Some(cx.waker().clone());
        }
    }

    fn transmit_own(&mut self, batch: &mut Batch) {
        for number in self.output.pongs.drain(..) {
            batch.push_header(&Header { kind: Kind::Ping, flags: Flags::ACK, stream: 0, length: number });
        }
        for stream in self.output.refusals.drain(..) {
            batch.push_header(&Header { kind: Kind::WindowUpdate, flags: Flags::RST, stream, length: 0 });
        }
    }

    /// What could wait for others, as far as it fits.
    fn transmit_with_others(&mut self, batch: &mut Batch, limit: usize, now: Instant) {
        // A ping may follow.
        while batch.remaining() + 2 * HEADER <= limit.saturating_add(HEADERS_BEYOND) {
            let Some(number) = self.output.told_with_others.pop_first() else { break };
            let Some(stream) = self.streams.get_mut(&number) else { continue };
            // It may have been told meanwhile.
            if stream.receiving.update_due() == UpdateDue::No {
                continue;
            }
            stream.receiving.make_room(now, self.round_trip.shortest(), &mut self.window_budget);
            // Otherwise it has its turn, and says it then.
            if !stream.queued
                && let Some(header) = stream.next_header()
            {
                batch.push_header(&header);
            }
        }
    }

    /// A stream's turn. As many bytes in a row as leave at once anyway, so that the far side's reader gets them at once
    /// too; but one frame while a sparse stream waits.
    fn transmit_stream(&mut self, number: u32, batch: &mut Batch, limit: usize) {
        let was_postponed = std::mem::take(&mut self.output.postponed);
        let Some(stream) = self.streams.get_mut(&number) else { return };
        if let Some(header) = stream.next_header() {
            batch.push_header(&header);
        }
        while has_room(batch, limit) {
            let room = limit - batch.remaining() - HEADER;
            let hurry = !self.output.sparse.is_empty();
            let is_short = batch.has_remaining() && stream.next_length() > room;
            if is_short && !hurry && !was_postponed {
                // Too long for what is left of this batch, but not for the next, where no sparse stream goes before it:
                // beside one that says a little each time it would never fit. If it still does not, it is cut.
                self.output.busy.push_front(number);
                self.output.sparse_had_turn = true;
                self.output.postponed = true;
                return;
            }
            let Some(frame) = stream.next_data(if hurry { FRAME_BODY } else { room }) else { break };
            batch.push(frame);
            if hurry {
                break;
            }
        }
        self.wakes.extend(stream.sending.take_writer(self.output.share(self.output.waiting())));
        if let Some(header) = stream.next_end() {
            batch.push_header(&header);
            self.wakes.extend(stream.sending.writer.take());
        }
        stream.queued = stream.has_output();
        if stream.queued {
            self.output.busy.push_back(number);
        }
        self.forget_if_over(number);
    }

    /// Gives a stream a turn if it has something to send.
    fn schedule(&mut self, number: u32) {
        let Some(stream) = self.streams.get_mut(&number) else { return };
        if !stream.queued && stream.has_output() {
            stream.queued = true;
            let queue = if stream.is_sparse() { &mut self.output.sparse } else { &mut self.output.busy };
            queue.push_back(number);
            self.wake_transmitter();
        }
    }

    fn forget_if_over(&mut self, number: u32) {
        if self.streams.get(&number).is_some_and(|stream| stream.is_over()) {
            self.remove(number);
        }
    }

    fn remove(&mut self, number: u32) {
        let Some(stream) = self.streams.remove(&number) else { return };
        self.window_budget.give_back(stream.receiving.window.grown());
        if stream.unacknowledged {
            self.unacknowledged -= 1;
            self.openers.due = true;
        }
        self.output.told_with_others.remove(&number);
        if stream.queued {
            self.output.forgotten += 1;
            self.sweep();
        }
    }

    /// Forgets turns of streams that are forgotten, once they are many: while the far side reads nothing, none comes up.
    fn sweep(&mut self) {
        if self.output.forgotten > MOST_FORGOTTEN + self.streams.len() {
            self.output.forgotten = 0;
            // A far side may use a number again, and again.
            let mut kept = BTreeSet::new();
            let mut keep = |number: &u32| self.streams.contains_key(number) && kept.insert(*number);
            self.output.sparse.retain(&mut keep);
            self.output.busy.retain(&mut keep);
        }
    }

    fn wake_transmitter(&mut self) {
        self.wakes.extend(self.transmitter.take());
    }
}

/// How many streams can be opened behind the one of this number, by the side that has opened it.
pub fn numbers_left(number: u32) -> u32 {
    (u32::MAX - number) / 2
}

impl Openers {
    fn come(&mut self) -> Place {
        self.next += 1;
        Place(self.next)
    }

    fn wake_all(&mut self, wakes: &mut Vec<Waker>) {
        wakes.extend(std::mem::take(&mut self.waiting).into_values());
    }
}

/// Whether a whole frame fits: what exceeds the limit would leave alone, in a small record.
fn has_room(batch: &Batch, limit: usize) -> bool {
    batch.remaining() + HEADER + FRAME_BODY <= limit
}

impl Output {
    /// How many streams wait for their turn, and some that are forgotten.
    fn waiting(&self) -> usize {
        self.sparse.len() + self.busy.len()
    }

    /// What one stream has in a batch beside others that wait, in bytes of whole frames. Those that shared the last one may
    /// be about to have more: whoever comes first shall not take it all.
    fn share(&self, others: usize) -> usize {
        self.limit / (others + 1).max(self.turns) / (HEADER + FRAME_BODY) * FRAME_BODY
    }

    /// The stream whose turn it is.
    fn next_turn(&mut self) -> Option<u32> {
        let sparse_next = self.busy.is_empty() || !self.sparse_had_turn;
        self.sparse_had_turn = sparse_next && !self.sparse.is_empty();
        let next = if self.sparse_had_turn { self.sparse.pop_front() } else { self.busy.pop_front() };
        next.or_else(|| self.sparse.pop_front())
    }
}

#[cfg(test)]
mod tests {
    use super::{super::INITIAL, *};

    #[test]
    fn nothing_is_kept_of_streams_that_are_gone() {
        let (now, cx) = (Instant::now(), &mut Context::from_waker(Waker::noop()));
        let mut far = Session::new(Side::Acceptor, Config { max_streams: 4, window_budget: 0 });
        let header = |kind, flags, stream, length| Header { kind, flags, stream, length }.encode();
        for number in (1..1000).step_by(2) {
            let quarter = INITIAL / 4;
            far.receive(&header(Kind::Data, Flags::SYN, number, quarter), now).unwrap();
            far.receive(&vec![7; quarter as usize], now).unwrap();
            while far.poll_read(number, cx, &mut VecDeque::new(), 1, now).is_ready() {}
            assert_eq!(far.output.told_with_others.len(), 1);
            far.receive(&header(Kind::WindowUpdate, Flags::RST, number, 0), now).unwrap();
            far.discard(number);
            assert!(far.streams.is_empty() && far.output.told_with_others.is_empty());
        }
    }
}
