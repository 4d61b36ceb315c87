//! The multiplexer without I/O, against a model of what it promises, and frame by frame against its specification.
//!
//! Two sessions are joined in memory by wires that are cut anywhere. Frames are read and made here by code of its own, so
//! that a mistake in the engine's is not made twice.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::SeqCst},
    },
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};

use bytes::{Buf, BufMut};
use proptest::prelude::*;
use tunnel_core::proto::{
    Side,
    yamux::{
        Batch, Chunk, Config, Error, HEADERS_BEYOND, INITIAL, OpenFailed, Place, Session, StreamEnded,
        WindowPool,
    },
};

const DATA: u8 = 0;
const WINDOW: u8 = 1;
const PING: u8 = 2;
const GO_AWAY: u8 = 3;
const SYN: u16 = 1;
const ACK: u16 = 2;
const FIN: u16 = 4;
const RST: u16 = 8;

/// Streams at once in the model: few, so that the limit is met.
const MAX: usize = 6;
/// What a stream keeps that was not sent, if no more of it leaves at once.
const SEND_BUFFER: u64 = 4 * (16 * 1024 - 12);
/// Longest body that is put together from what is written.
const LONGEST: usize = 16 * 1024 - 12;
/// Longest body that is given, and so the longest that is sent.
const LONGEST_GIVEN: usize = 64 * 1024 - 8 * 12;
/// Batches as the connection's driver asks for them.
const BATCH: usize = 64 * 1024;
/// What a frame may take, so that one stream has its turn.
const ONE_TURN: usize = LONGEST + 12;
const A_LOT: usize = usize::MAX;

/// One frame, as the specification draws it.
#[derive(Clone, PartialEq, Eq)]
struct Frame {
    kind: u8,
    flags: u16,
    stream: u32,
    length: u32,
    body: Vec<u8>,
}

impl std::fmt::Debug for Frame {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { kind, flags, stream, length, body } = self;
        write!(f, "kind {kind} flags {flags:#b} stream {stream} length {length} body of {}", body.len())
    }
}

impl Frame {
    fn bytes(&self) -> Vec<u8> {
        let mut bytes = header(self.kind, self.flags, self.stream, self.length);
        bytes.extend(&self.body);
        bytes
    }
}

fn header(kind: u8, flags: u16, stream: u32, length: u32) -> Vec<u8> {
    let mut bytes = vec![0, kind];
    bytes.extend(flags.to_be_bytes());
    bytes.extend(stream.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

fn data(flags: u16, stream: u32, body: &[u8]) -> Frame {
    Frame { kind: DATA, flags, stream, length: u32::try_from(body.len()).unwrap(), body: body.to_vec() }
}

fn window(flags: u16, stream: u32, length: u32) -> Frame {
    Frame { kind: WINDOW, flags, stream, length, body: Vec::new() }
}

fn ping(flags: u16, number: u32) -> Frame {
    Frame { kind: PING, flags, stream: 0, length: number, body: Vec::new() }
}

fn go_away(code: u32) -> Frame {
    Frame { kind: GO_AWAY, flags: 0, stream: 0, length: code, body: Vec::new() }
}

/// Reads frames from bytes that are cut anywhere.
#[derive(Default)]
struct Parser(Vec<u8>);

impl Parser {
    fn feed(&mut self, bytes: &[u8]) -> Vec<Frame> {
        self.0.extend(bytes);
        let mut frames = Vec::new();
        while let Some(head) = self.0.first_chunk::<12>() {
            let word = |at: usize| u32::from_be_bytes(*head[at..].first_chunk().unwrap());
            let (kind, stream, length) = (head[1], word(4), word(8));
            let flags = u16::from_be_bytes([head[2], head[3]]);
            assert_eq!(head[0], 0, "version");
            let end = 12 + if kind == DATA { length as usize } else { 0 };
            if self.0.len() < end {
                break;
            }
            frames.push(Frame { kind, flags, stream, length, body: self.0[12..end].to_vec() });
            self.0.drain(..end);
        }
        frames
    }
}

/// Whether its waker was called.
struct Flag(AtomicBool);

impl Wake for Flag {
    fn wake(self: Arc<Self>) {
        self.0.store(true, SeqCst);
    }
}

impl Flag {
    fn new(woken: bool) -> Arc<Self> {
        Arc::new(Self(AtomicBool::new(woken)))
    }

    fn is_set(&self) -> bool {
        self.0.load(SeqCst)
    }
}

fn poll<R>(
    session: &mut Session,
    flag: &Arc<Flag>,
    act: impl FnOnce(&mut Session, &mut Context<'_>) -> R,
) -> R {
    let waker = Waker::from(flag.clone());
    let result = act(session, &mut Context::from_waker(&waker));
    session.take_wakes().into_iter().for_each(Waker::wake);
    result
}

fn ignore<R>(session: &mut Session, act: impl FnOnce(&mut Session, &mut Context<'_>) -> R) -> R {
    poll(session, &Flag::new(false), act)
}

/// What has arrived first on a stream; empty at its end.
fn read_segment(session: &mut Session, number: u32, cx: &mut Context<'_>, now: Instant) -> Poll<Vec<u8>> {
    let mut segments = VecDeque::new();
    let polled = session.poll_read(number, cx, &mut segments, 1, now);
    assert!(segments.len() <= 1 && (polled.is_ready() || segments.is_empty()), "more than was asked for");
    polled.map(|()| segments.pop_front().unwrap_or_default())
}

/// A chunk of these bytes.
fn chunk(bytes: &[u8]) -> Chunk {
    let mut chunk = Chunk::new();
    assert!(bytes.len() <= chunk.room());
    chunk.spare().put_slice(bytes);
    chunk
}

fn drain(batch: &mut Batch) -> Vec<u8> {
    let mut bytes = Vec::new();
    while batch.has_remaining() {
        let chunk = batch.chunk().to_vec();
        assert!(!chunk.is_empty());
        batch.advance(chunk.len());
        bytes.extend(chunk);
    }
    bytes
}

mod model {
    //! Any order of calls and any cut of the wires, against what is promised.

    use super::*;

    /// What one side has done with a stream, and what of it was on the wire.
    #[derive(Debug, Default)]
    #[allow(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
    struct Half {
        written: u64,
        /// Some of it as a chunk.
        given: bool,
        finished: bool,
        discarded: bool,
        /// Bytes that the user has read.
        read: u64,
        /// Bytes in frames that have left.
        sent: u64,
        /// Window that was given in frames that have left, beyond the first.
        granted: u64,
        fin_sent: bool,
        rst_sent: bool,
        /// What of the far side's frames has arrived.
        window: u64,
        fin_heard: bool,
        rst_heard: bool,
    }

    impl Half {
        /// What may wait to be sent: the far side takes it, and it leaves in a batch of this size.
        fn most_waiting(&self, batch: u64) -> u64 {
            (u64::from(INITIAL) + self.window - self.sent).min(batch).max(SEND_BUFFER)
        }
    }

    /// The byte at a place: others for each side, stream and kilobyte.
    fn byte(side: usize, number: u32, at: u64) -> u8 {
        let sum = at.wrapping_mul(31) ^ (at >> 10) ^ (u64::from(number) * 7) ^ (side as u64 * 101);
        sum.to_le_bytes()[0]
    }

    struct Side {
        session: Session,
        /// Bytes that have left and have not arrived.
        wire: VecDeque<u8>,
        sending: Parser,
        hearing: Parser,
        /// The largest batch that it was asked for last.
        batch: u64,
        halves: BTreeMap<u32, Half>,
        /// Numbers that the user holds.
        held: Vec<u32>,
        transmitter: Arc<Flag>,
        readers: BTreeMap<u32, Arc<Flag>>,
        closing: bool,
        ended: bool,
    }

    impl Side {
        fn new(side: super::Side, budget: usize) -> Self {
            Self {
                session: Session::new(side, Config { max_streams: MAX, window_budget: budget }),
                wire: VecDeque::new(),
                sending: Parser::default(),
                hearing: Parser::default(),
                batch: 0,
                halves: BTreeMap::new(),
                held: Vec::new(),
                transmitter: Flag::new(true),
                readers: BTreeMap::new(),
                closing: false,
                ended: false,
            }
        }

        fn half(&mut self, number: u32) -> &mut Half {
            self.halves.get_mut(&number).unwrap()
        }
    }

    pub(super) struct Pair {
        sides: [Side; 2],
        pub(super) now: Instant,
        budget: u64,
    }

    impl Pair {
        pub(super) fn new(budget: usize) -> Self {
            let sides = [Side::new(super::Side::Dialer, budget), Side::new(super::Side::Acceptor, budget)];
            Self { sides, now: Instant::now(), budget: budget as u64 }
        }

        pub(super) fn open(&mut self, side: usize) -> bool {
            let now = self.now;
            let opener = &mut self.sides[side];
            match ignore(&mut opener.session, |session, cx| session.poll_open(&mut None, cx, now)) {
                Poll::Ready(Ok(number)) => {
                    assert_eq!(number % 2 == 1, side == 0, "a number that is not the side's");
                    assert!(
                        opener.halves.insert(number, Half::default()).is_none(),
                        "{number} was given twice"
                    );
                    opener.held.push(number);
                    self.sides[1 - side].halves.insert(number, Half::default());
                    return true;
                }
                Poll::Ready(Err(OpenFailed::Ended)) => assert!(opener.closing || opener.ended),
                Poll::Ready(Err(OpenFailed::TooMany)) => {}
                other => panic!("{other:?}"),
            }
            false
        }

        fn accept(&mut self, side: usize, flag: &Arc<Flag>) -> Poll<Option<u32>> {
            let acceptor = &mut self.sides[side];
            let accepted = poll(&mut acceptor.session, flag, Session::poll_accept);
            match accepted {
                Poll::Ready(Some(number)) => {
                    assert_eq!(number % 2 == 1, side == 1);
                    acceptor.held.push(number);
                }
                Poll::Ready(None) => {
                    assert!(acceptor.ended, "a living connection has nothing more to accept");
                }
                Poll::Pending => assert!(!acceptor.ended),
            }
            accepted
        }

        /// How many bytes were taken; `None` if none will be.
        fn write(&mut self, side: usize, number: u32, bytes: usize, flag: &Arc<Flag>) -> Poll<Option<usize>> {
            let user = &mut self.sides[side];
            let is_ended = user.ended;
            let half = user.halves.get_mut(&number).unwrap();
            let body: Vec<u8> = (0..bytes as u64).map(|i| byte(side, number, half.written + i)).collect();
            match poll(&mut user.session, flag, |session, cx| session.poll_write(number, cx, &body)) {
                Poll::Ready(Ok(taken)) => {
                    assert!(taken <= bytes && (taken > 0 || bytes == 0) && !half.finished && !is_ended);
                    half.written += taken as u64;
                    let is_bounded = taken == 0 || half.written - half.sent <= half.most_waiting(user.batch);
                    assert!(is_bounded, "more was taken than is bounded");
                    Poll::Ready(Some(taken))
                }
                Poll::Ready(Err(_)) => {
                    assert!(
                        half.finished || half.rst_heard || is_ended,
                        "{number} cannot be written: {half:?}"
                    );
                    Poll::Ready(None)
                }
                Poll::Pending => {
                    assert!(half.written - half.sent > SEND_BUFFER / 2, "it waits although there is room");
                    Poll::Pending
                }
            }
        }

        /// As [`write`](Self::write), of a chunk, which is taken whole or not at all.
        fn give(&mut self, side: usize, number: u32, bytes: usize, flag: &Arc<Flag>) -> Poll<Option<usize>> {
            let user = &mut self.sides[side];
            let is_ended = user.ended;
            let half = user.halves.get_mut(&number).unwrap();
            let body: Vec<u8> = (0..bytes as u64).map(|i| byte(side, number, half.written + i)).collect();
            let mut given = Some(chunk(&body));
            let polled =
                poll(&mut user.session, flag, |session, cx| session.poll_give(number, cx, &mut given));
            let waited = half.written - half.sent;
            assert_eq!(given.is_none(), matches!(polled, Poll::Ready(Ok(_))), "a chunk is lost or doubled");
            assert!(given.is_none_or(|kept| kept.filled() == body), "what was not taken is not as it was");
            match polled {
                Poll::Ready(Ok(taken)) => {
                    assert!(taken == bytes && !half.finished && !is_ended);
                    let is_bounded = waited <= SEND_BUFFER / 2
                        || half.written + bytes as u64 - half.sent <= half.most_waiting(user.batch);
                    assert!(is_bounded, "more was taken than is bounded");
                    half.written += taken as u64;
                    half.given = true;
                    Poll::Ready(Some(taken))
                }
                Poll::Ready(Err(StreamEnded)) => {
                    assert!(half.finished || half.rst_heard || is_ended, "{number} takes nothing: {half:?}");
                    Poll::Ready(None)
                }
                Poll::Pending => {
                    assert!(waited > SEND_BUFFER / 2, "it waits although there is room");
                    Poll::Pending
                }
            }
        }

        /// How many bytes were read; none at the end.
        fn read(&mut self, side: usize, number: u32, flag: &Arc<Flag>) -> Poll<usize> {
            let now = self.now;
            let [user, far] = self.sides.get_disjoint_mut([side, 1 - side]).unwrap();
            let Poll::Ready(bytes) =
                poll(&mut user.session, flag, |session, cx| read_segment(session, number, cx, now))
            else {
                user.readers.insert(number, flag.clone());
                return Poll::Pending;
            };
            if let Some(flag) = user.readers.remove(&number) {
                assert!(flag.is_set(), "whoever reads {number} was not woken");
            }
            let is_ended = user.ended;
            let (half, other) = (user.half(number), far.half(number));
            for &got in &bytes {
                assert_eq!(got, byte(1 - side, number, half.read), "{number} at {}", half.read);
                half.read += 1;
            }
            assert!(half.read <= other.sent);
            if bytes.is_empty() {
                let is_whole = half.fin_heard && half.read == other.written;
                assert!(is_whole || half.rst_heard || is_ended, "{number} ends without a reason: {half:?}");
                assert!(!half.discarded);
            }
            Poll::Ready(bytes.len())
        }

        fn finish(&mut self, side: usize, number: u32) {
            let user = &mut self.sides[side];
            ignore(&mut user.session, |session, _| session.finish(number));
            user.half(number).finished = true;
        }

        pub(super) fn discard(&mut self, side: usize, number: u32) {
            let user = &mut self.sides[side];
            ignore(&mut user.session, |session, _| session.discard(number));
            user.half(number).discarded = true;
            user.held.retain(|held| *held != number);
            user.readers.remove(&number);
        }

        fn close(&mut self, side: usize) {
            let user = &mut self.sides[side];
            user.closing = true;
            ignore(&mut user.session, |session, _| session.close());
        }

        fn end(&mut self, side: usize) {
            let user = &mut self.sides[side];
            user.ended = true;
            ignore(&mut user.session, |session, _| session.end());
        }

        /// Has a side say what it has, up to about `limit` bytes. Whether it was anything.
        fn transmit(&mut self, side: usize, limit: usize) -> bool {
            let (now, mut batch, flag) = (self.now, Batch::default(), Flag::new(false));
            let sender = &mut self.sides[side];
            sender.batch = limit as u64;
            poll(&mut sender.session, &flag, |session, cx| session.transmit(&mut batch, limit, cx, now));
            let bytes = drain(&mut batch);
            if bytes.is_empty() {
                sender.transmitter = flag;
                return false;
            }
            let woken = std::mem::replace(&mut sender.transmitter, Flag::new(true));
            assert!(woken.is_set(), "whoever sends was not woken");
            assert!(!sender.ended, "something is said behind the end");
            assert!(bytes.len() < limit.saturating_add(1000), "{} for {limit}", bytes.len());
            sender.wire.extend(&bytes);
            for frame in sender.sending.feed(&bytes) {
                self.said(side, &frame);
            }
            assert!(self.sides[side].sending.0.is_empty(), "a part of a frame");
            if self.sides[side].session.is_closed() {
                self.end(side);
            }
            true
        }

        /// Whether a frame may be said.
        fn said(&mut self, side: usize, frame: &Frame) {
            let [user, far] = self.sides.get_disjoint_mut([side, 1 - side]).unwrap();
            match frame.kind {
                GO_AWAY => return assert!(user.closing),
                PING => return,
                _ => {}
            }
            let others = far.half(frame.stream).written;
            let is_held = user.held.contains(&frame.stream);
            let half = user.half(frame.stream);
            assert!(!half.rst_sent, "{frame:?} behind a reset");
            let is_first = half.sent == 0 && half.granted == 0 && !half.fin_sent;
            let is_opener = (frame.stream % 2 == 1) == (side == 0);
            let expected = match (is_first, is_opener) {
                (true, true) => SYN,
                (true, false) => ACK,
                (false, _) => 0,
            };
            if frame.kind == DATA {
                assert!(!half.fin_sent, "{frame:?} behind an end");
                assert!(frame.length > 0 || frame.flags & FIN != 0);
                assert_eq!(frame.flags & !FIN, expected, "{frame:?}");
                assert!(frame.body.len() <= if half.given { LONGEST_GIVEN } else { LONGEST });
                half.sent += u64::from(frame.length);
                assert!(half.sent <= u64::from(INITIAL) + half.window, "a window was exceeded: {half:?}");
                half.fin_sent = frame.flags & FIN != 0;
                assert!(!half.fin_sent || (half.finished && half.sent == half.written), "{half:?}");
            } else if frame.flags & RST != 0 {
                half.rst_sent = true;
                assert!(!is_held, "{frame:?} of a stream that is used");
                // A stream that was finished is reset only if bytes were lost by it. One that was never held was one
                // too many.
                assert!(!(half.discarded && half.finished) || others > half.read, "{frame:?} without need");
            } else {
                assert!(frame.length > 0);
                assert_eq!(frame.flags, expected, "{frame:?}");
                half.granted += u64::from(frame.length);
            }
            // No more than the first window of each, and the budget for all, may be under way or unread.
            let held = user.halves.values().filter(|half| !half.discarded);
            let grown: u64 = held.map(|half| half.granted.saturating_sub(half.read)).sum();
            assert!(grown <= self.budget, "windows grew by {grown}");
        }

        /// Delivers up to `count` bytes of what the side has said. Whether there were any.
        fn deliver(&mut self, side: usize, count: usize) -> bool {
            let now = self.now;
            let count = self.sides[side].wire.len().min(count);
            let bytes: Vec<u8> = self.sides[side].wire.drain(..count).collect();
            let hearer = &mut self.sides[1 - side];
            if hearer.ended {
                return count > 0;
            }
            let mut is_last = false;
            for frame in hearer.hearing.feed(&bytes) {
                is_last |= frame.kind == GO_AWAY;
                let Some(half) = hearer.halves.get_mut(&frame.stream) else { continue };
                half.fin_heard |= frame.flags & FIN != 0;
                half.rst_heard |= frame.flags & RST != 0;
                half.window += if frame.kind == WINDOW { u64::from(frame.length) } else { 0 };
            }
            let result = ignore(&mut hearer.session, |session, _| session.receive(&bytes, now));
            assert_eq!(result, if is_last { Err(Error::ClosedByPeer) } else { Ok(()) });
            if is_last {
                self.end(1 - side);
            }
            count > 0
        }

        pub(super) fn act(&mut self, step: &Step) {
            let flag = Flag::new(false);
            let side = usize::from(step.side);
            let held = &self.sides[side].held;
            let number = (!held.is_empty()).then(|| held[usize::from(step.which) % held.len()]);
            match (step.act, number) {
                (Act::Open, _) => drop(self.open(side)),
                (Act::Accept, _) => drop(self.accept(side, &flag)),
                (Act::Write(bytes), Some(number)) => {
                    let _ = self.write(side, number, usize::from(bytes), &flag);
                }
                (Act::Give(bytes), Some(number)) => {
                    let _ = self.give(side, number, LONGEST_GIVEN.min(bytes.into()), &flag);
                }
                (Act::Flood, Some(number)) => {
                    while matches!(self.write(side, number, 100_000, &flag), Poll::Ready(Some(_)))
                        && self.transmit(side, A_LOT)
                    {}
                }
                (Act::Read, Some(number)) => drop(self.read(side, number, &flag)),
                (Act::ReadAll, Some(number)) => {
                    while matches!(self.read(side, number, &flag), Poll::Ready(1..)) {}
                }
                (Act::Finish, Some(number)) => self.finish(side, number),
                (Act::Discard, Some(number)) => self.discard(side, number),
                (Act::Transmit(turns), _) => drop(self.transmit(side, ONE_TURN * usize::from(turns))),
                (Act::Deliver(bytes), _) => drop(self.deliver(side, bytes)),
                (Act::Wait(ms), _) => self.now += Duration::from_millis(u64::from(ms)),
                (Act::Close, _) => self.close(side),
                (Act::End, _) => {
                    // Neither side can say anything to the other any more.
                    self.end(0);
                    self.end(1);
                }
                (_, None) => {}
            }
        }

        /// From here on everybody does only what they are woken for: accepts what comes, writes `more` to each stream,
        /// or gives it, and finishes it, reads to the end. All of it must come to an end.
        pub(super) fn settle(&mut self, more: usize, chunk: usize) {
            let mut acceptors = [Flag::new(true), Flag::new(true)];
            let mut writers: BTreeMap<(usize, u32), (Arc<Flag>, usize)> = BTreeMap::new();
            let mut readers: BTreeMap<(usize, u32), Arc<Flag>> = BTreeMap::new();
            let mut done = BTreeSet::new();
            loop {
                let mut progress = false;
                for side in [0, 1] {
                    for number in self.sides[side].held.clone() {
                        if done.insert((side, number)) {
                            writers.insert((side, number), (Flag::new(true), more));
                            readers.insert((side, number), Flag::new(true));
                        }
                    }
                    if acceptors[side].is_set() {
                        progress = true;
                        acceptors[side] = Flag::new(false);
                        let flag = acceptors[side].clone();
                        if let Poll::Ready(Some(_)) = self.accept(side, &flag) {
                            acceptors[side] = Flag::new(true);
                        }
                    }
                    if self.sides[side].transmitter.is_set() {
                        progress |= self.transmit(side, chunk.max(ONE_TURN));
                    }
                    progress |= self.deliver(side, chunk);
                }
                writers.retain(|&(side, number), (flag, left)| {
                    if !flag.is_set() {
                        return true;
                    }
                    *flag = Flag::new(false);
                    progress = true;
                    // Now this, now that, as it comes.
                    let sent = match *left / 10_000 % 2 {
                        0 => self.write(side, number, *left, flag),
                        _ => self.give(side, number, LONGEST_GIVEN.min(*left), flag),
                    };
                    match sent {
                        Poll::Pending => return true,
                        Poll::Ready(Some(taken)) if taken < *left => {
                            *left -= taken;
                            *flag = Flag::new(true);
                            return true;
                        }
                        Poll::Ready(_) => {}
                    }
                    self.finish(side, number);
                    false
                });
                readers.retain(|&(side, number), flag| {
                    if !flag.is_set() {
                        return true;
                    }
                    *flag = Flag::new(false);
                    progress = true;
                    match self.read(side, number, flag) {
                        Poll::Pending => true,
                        Poll::Ready(0) => false,
                        Poll::Ready(_) => {
                            *flag = Flag::new(true);
                            true
                        }
                    }
                });
                if !progress {
                    break;
                }
            }
            let writers: Vec<_> = writers.keys().collect();
            let readers: Vec<_> = readers.keys().collect();
            assert!(
                writers.is_empty() && readers.is_empty(),
                "waiting for ever: to write {writers:?}, to read {readers:?}"
            );
        }

        /// Everybody lets everything go, and all is said: nothing may be left.
        pub(super) fn check_nothing_left(&mut self) {
            let held = |pair: &Self| [pair.sides[0].held.clone(), pair.sides[1].held.clone()];
            for (side, numbers) in held(self).into_iter().enumerate() {
                for number in numbers {
                    self.discard(side, number);
                }
            }
            while (0..2).any(|side| self.transmit(side, A_LOT) | self.deliver(side, A_LOT)) {}
            if self.sides.iter().any(|side| side.closing || side.ended) {
                return;
            }
            for side in [0, 1] {
                let opened = (0..=MAX).take_while(|_| self.open(side)).count();
                assert_eq!(opened, MAX, "streams are left on side {side}");
                for number in held(self)[side].clone() {
                    self.discard(side, number);
                }
            }
            assert!(!self.transmit(0, A_LOT) && !self.transmit(1, A_LOT));
        }
    }

    #[derive(Clone, Copy, Debug)]
    pub(super) enum Act {
        Open,
        Accept,
        Write(u16),
        /// Offers a chunk, of no more than it can hold.
        Give(u16),
        /// Writes and sends until no more is taken.
        Flood,
        Read,
        ReadAll,
        Finish,
        Discard,
        Transmit(u8),
        Deliver(usize),
        Wait(u8),
        Close,
        End,
    }

    #[derive(Clone, Debug)]
    pub(super) struct Step {
        side: u8,
        which: u8,
        act: Act,
    }

    pub(super) fn steps(ends: bool) -> impl Strategy<Value = Vec<Step>> {
        let act = prop_oneof![
            6 => Just(Act::Open),
            8 => Just(Act::Accept),
            6 => (0..200u16).prop_map(Act::Write),
            6 => any::<u16>().prop_map(Act::Write),
            3 => (0..200u16).prop_map(Act::Give),
            6 => any::<u16>().prop_map(Act::Give),
            4 => Just(Act::Flood),
            6 => Just(Act::Read),
            4 => Just(Act::ReadAll),
            4 => Just(Act::Finish),
            4 => Just(Act::Discard),
            12 => (1..9u8).prop_map(Act::Transmit),
            8 => (1..40usize).prop_map(Act::Deliver),
            8 => (1..30_000usize).prop_map(Act::Deliver),
            8 => Just(Act::Deliver(A_LOT)),
            3 => any::<u8>().prop_map(Act::Wait),
            1 => Just(if ends { Act::Close } else { Act::Accept }),
            1 => Just(if ends { Act::End } else { Act::Open }),
        ];
        let step = (0..2u8, any::<u8>(), act).prop_map(|(side, which, act)| Step { side, which, act });
        proptest::collection::vec(step, 0..200)
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 200, max_shrink_iters: 20_000, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_order_of_calls_keeps_every_promise(
        steps in model::steps(false),
        budget in prop_oneof![Just(0), Just(100_000), Just(10_000_000)],
        more in prop_oneof![Just(0), Just(1), Just(700_000)],
        chunk in prop_oneof![Just(17usize), Just(5000), Just(A_LOT)],
    ) {
        let mut pair = model::Pair::new(budget);
        for step in &steps {
            pair.act(step);
        }
        // In small chunks a megabyte takes long.
        pair.settle(if chunk == 17 { more.min(1) } else { more }, chunk);
        pair.check_nothing_left();
    }

    #[test]
    fn a_connection_that_ends_keeps_nobody_waiting(
        steps in model::steps(true),
        more in prop_oneof![Just(0), Just(100_000)],
    ) {
        let mut pair = model::Pair::new(100_000);
        for step in &steps {
            pair.act(step);
        }
        pair.settle(more, 5000);
        pair.check_nothing_left();
    }
}

mod script {
    //! What is said to one session, frame by frame and byte by byte, and what it answers.

    use super::*;

    pub(super) struct Script {
        pub(super) session: Session,
        pub(super) now: Instant,
    }

    impl Script {
        pub(super) fn new(side: Side, max_streams: usize) -> Self {
            let config = Config { max_streams, window_budget: 0 };
            Self { session: Session::new(side, config), now: Instant::now() }
        }

        /// The far side says a frame, one byte at a time.
        pub(super) fn hears(&mut self, frame: &Frame) -> Result<(), Error> {
            self.hears_bytes(&frame.bytes())
        }

        pub(super) fn hears_bytes(&mut self, bytes: &[u8]) -> Result<(), Error> {
            bytes.iter().try_for_each(|byte| self.session.receive(&[*byte], self.now))
        }

        /// The far side says frames that the session has no objection to.
        pub(super) fn takes(&mut self, frames: &[Frame]) {
            for frame in frames {
                assert_eq!(self.hears(frame), Ok(()), "{frame:?}");
            }
        }

        /// Everything the session has to say but questions of its own for the round trip.
        pub(super) fn says(&mut self) -> Vec<Frame> {
            let mut frames = self.says_all();
            frames.retain(|frame| (frame.kind, frame.flags) != (PING, SYN));
            frames
        }

        pub(super) fn says_all(&mut self) -> Vec<Frame> {
            let (mut batch, mut parser, mut frames) = (Batch::default(), Parser::default(), Vec::new());
            loop {
                ignore(&mut self.session, |session, cx| session.transmit(&mut batch, ONE_TURN, cx, self.now));
                let bytes = drain(&mut batch);
                if bytes.is_empty() {
                    return frames;
                }
                frames.extend(parser.feed(&bytes));
            }
        }

        /// A second, so that windows grow.
        pub(super) fn learns_round_trip(&mut self) {
            self.takes(&[ping(SYN, 1)]);
            let asked = self.says_all().into_iter().find(|frame| frame.flags == SYN).unwrap();
            self.now += Duration::from_secs(1);
            self.takes(&[ping(ACK, asked.length)]);
        }

        pub(super) fn opens(&mut self) -> u32 {
            match ignore(&mut self.session, |session, cx| session.poll_open(&mut None, cx, self.now)) {
                Poll::Ready(Ok(number)) => number,
                other => panic!("{other:?}"),
            }
        }

        pub(super) fn accepts(&mut self) -> Option<u32> {
            match ignore(&mut self.session, Session::poll_accept) {
                Poll::Ready(accepted) => accepted,
                Poll::Pending => None,
            }
        }

        /// What is there to read; `None` if there is nothing yet, and empty at the end.
        pub(super) fn reads(&mut self, number: u32) -> Option<Vec<u8>> {
            match ignore(&mut self.session, |session, cx| read_segment(session, number, cx, self.now)) {
                Poll::Ready(bytes) => Some(bytes),
                Poll::Pending => None,
            }
        }

        /// How many bytes are taken; `None` if it has to wait.
        pub(super) fn writes(&mut self, number: u32, bytes: &[u8]) -> Option<usize> {
            match ignore(&mut self.session, |session, cx| session.poll_write(number, cx, bytes)) {
                Poll::Ready(taken) => Some(taken.unwrap()),
                Poll::Pending => None,
            }
        }

        /// Whether a chunk of these bytes is taken; if not, it must be as it was.
        pub(super) fn gives(&mut self, number: u32, bytes: &[u8]) -> bool {
            let mut given = Some(chunk(bytes));
            match ignore(&mut self.session, |session, cx| session.poll_give(number, cx, &mut given)) {
                Poll::Ready(taken) => assert_eq!((taken, given.is_none()), (Ok(bytes.len()), true)),
                Poll::Pending => assert_eq!(given.as_ref().map(Chunk::filled), Some(bytes)),
            }
            given.is_none()
        }

        /// One batch, as it leaves in one write, without questions for the round trip.
        pub(super) fn says_at_once(&mut self, limit: usize) -> Vec<Frame> {
            let mut batch = Batch::default();
            ignore(&mut self.session, |session, cx| session.transmit(&mut batch, limit, cx, self.now));
            let bytes = drain(&mut batch);
            assert!(bytes.len() <= limit.saturating_add(HEADERS_BEYOND), "{} bytes for {limit}", bytes.len());
            let mut parser = Parser::default();
            let mut frames = parser.feed(&bytes);
            assert!(parser.0.is_empty(), "a part of a frame");
            frames.retain(|frame| (frame.kind, frame.flags) != (PING, SYN));
            frames
        }

        pub(super) fn cannot_write(&mut self, number: u32) -> bool {
            matches!(
                ignore(&mut self.session, |session, cx| session.poll_write(number, cx, b"x")),
                Poll::Ready(Err(_))
            )
        }

        /// What the far side did to stream `number` for which the connection ends.
        pub(super) fn objects(&mut self, frame: &Frame) -> (u32, &'static str) {
            match self.hears(frame) {
                Err(Error::Violation { stream, what }) => (stream, what),
                other => panic!("{other:?}"),
            }
        }
    }

    fn acceptor() -> Script {
        Script::new(Side::Acceptor, 8)
    }

    fn dialer() -> Script {
        Script::new(Side::Dialer, 8)
    }

    #[test]
    fn a_frame_is_twelve_bytes_in_network_order_and_its_body() {
        let mut far = acceptor();
        far.hears_bytes(b"\x00\x00\x00\x01\x00\x00\x01\x03\x00\x00\x00\x02hi").unwrap();
        assert_eq!(far.accepts(), Some(0x103));
        assert_eq!(far.reads(0x103), Some(b"hi".to_vec()));
        far.writes(0x103, b"ho!");
        let mut batch = Batch::default();
        ignore(&mut far.session, |session, cx| session.transmit(&mut batch, ONE_TURN, cx, far.now));
        let expected = b"\x00\x00\x00\x02\x00\x00\x01\x03\x00\x00\x00\x03ho!\x00\x02\x00\x01\x00\x00\x00\x00\x00\x00\x00\x00";
        assert_eq!(drain(&mut batch), expected);
    }

    #[test]
    fn a_stream_is_opened_by_its_first_bytes_and_answered_by_the_first_that_come_back() {
        let mut near = dialer();
        assert_eq!((near.opens(), near.opens()), (1, 3));
        assert_eq!(near.says(), [], "a stream without bytes is nobody's business");
        near.writes(3, b"a");
        assert_eq!(near.says(), [data(SYN, 3, b"a")]);
        near.writes(3, b"b");
        assert_eq!(near.says(), [data(0, 3, b"b")]);
        let mut far = Script::new(Side::Acceptor, 8);
        assert_eq!((far.opens(), far.opens()), (2, 4));
        far.takes(&[data(SYN, 3, b"a"), data(0, 3, b"b")]);
        assert_eq!((far.accepts(), far.accepts()), (Some(3), None));
        assert_eq!(far.reads(3), Some(b"ab".to_vec()));
        assert_eq!(far.reads(3), None);
        far.writes(3, b"c");
        assert_eq!(far.says(), [data(ACK, 3, b"c")]);
        far.writes(3, b"d");
        assert_eq!(far.says(), [data(0, 3, b"d")]);
        near.takes(&[data(ACK, 3, b"c"), data(0, 3, b"d")]);
        assert_eq!(near.reads(3), Some(b"cd".to_vec()));
    }

    #[test]
    fn a_stream_may_be_opened_and_answered_by_a_window_update() {
        let mut far = acceptor();
        far.takes(&[window(SYN, 1, 5)]);
        assert_eq!(far.accepts(), Some(1));
        assert_eq!(far.reads(1), None);
        let sent = floods(&mut far, 1);
        assert_eq!(sent, u64::from(INITIAL) + 5, "the first frame's window counts");
        let mut near = dialer();
        let number = near.opens();
        near.writes(number, b"x");
        near.says();
        near.takes(&[window(ACK, number, 7)]);
        assert_eq!(floods(&mut near, number), u64::from(INITIAL) + 7 - 1);
    }

    #[test]
    fn the_first_window_to_be_opened_answers_a_stream() {
        let mut far = acceptor();
        far.takes(&[data(SYN, 1, &vec![7; INITIAL as usize / 2])]);
        far.reads(1).unwrap();
        while far.reads(1).is_some() {}
        assert_eq!(far.says(), [window(ACK, 1, INITIAL / 2)]);
    }

    #[test]
    fn a_window_is_opened_when_half_of_it_was_used_or_with_whatever_is_sent_once_a_quarter_was() {
        let (mut far, quarter) = (acceptor(), INITIAL / 4);
        let uses = |far: &mut Script, number, bytes: u32| {
            far.takes(&[data(0, number, &vec![7; bytes as usize])]);
            while far.reads(number).is_some() {}
        };
        far.takes(&[window(SYN, 1, 0), window(SYN, 3, 0), window(SYN, 5, 0)]);
        uses(&mut far, 1, quarter);
        uses(&mut far, 3, quarter - 1);
        assert_eq!(far.says(), []);
        far.writes(5, b"x");
        assert_eq!(far.says(), [data(ACK, 5, b"x"), window(ACK, 1, quarter)]);
        far.writes(5, b"x");
        assert_eq!(far.says(), [data(0, 5, b"x")]);

        uses(&mut far, 1, 2 * quarter - 1);
        assert_eq!(far.says(), []);
        uses(&mut far, 1, 1);
        assert_eq!(far.says(), [window(0, 1, 2 * quarter)]);

        // In its own turn, behind what it says itself.
        uses(&mut far, 1, quarter);
        far.writes(1, b"y");
        assert_eq!(far.says(), [data(0, 1, b"y"), window(0, 1, quarter)]);
    }

    #[test]
    fn what_a_reader_took_is_its_senders_again_only_when_the_reader_comes_for_more() {
        let mut far = acceptor();
        far.takes(&[data(SYN, 1, &vec![7; INITIAL as usize])]);
        let (mut consumed, mut held) = (0, 0);
        while consumed < INITIAL / 2 {
            assert_eq!(far.says(), []);
            consumed += held;
            held = u32::try_from(far.reads(1).unwrap().len()).unwrap();
        }
        assert!(held > 0);
        assert_eq!(far.says(), [window(ACK, 1, consumed)]);
        while far.reads(1).is_some() {}
        far.writes(1, b"x");
        assert_eq!(far.says(), [data(0, 1, b"x"), window(0, 1, INITIAL - consumed)]);
    }

    #[test]
    fn windows_are_opened_with_a_full_batch_too_but_no_more_than_fit_behind_it() {
        let (mut far, limit) = (Script::new(Side::Acceptor, 50), 64 * 1024);
        far.takes(&[window(SYN, 1, 0)]);
        let others = (0..40).map(|other| 3 + 2 * other);
        for number in others.clone() {
            far.takes(&[data(SYN, number, &vec![7; INITIAL as usize / 4])]);
            while far.reads(number).is_some() {}
        }
        let mut told = Vec::new();
        for _ in 0..3 {
            while far.writes(1, &[1; 16 * 1024]).is_some() {}
            let frames = far.says_at_once(limit);
            assert!(frames.iter().map(|frame| frame.body.len()).sum::<usize>() > limit - 100);
            told.extend(frames.iter().filter(|frame| frame.length == INITIAL / 4).map(|frame| frame.stream));
        }
        assert_eq!(told, others.collect::<Vec<_>>());
    }

    #[test]
    fn a_window_is_not_opened_for_a_sender_that_has_ended() {
        let mut far = acceptor();
        far.takes(&[data(SYN, 1, &vec![7; 3 * INITIAL as usize / 4]), data(FIN, 1, b"")]);
        for _ in 0..6 {
            far.reads(1).unwrap();
        }
        far.writes(1, b"x");
        assert_eq!(far.says(), [data(ACK, 1, b"x")]);
    }

    /// Writes until no more is sent: how many bytes were.
    fn floods(script: &mut Script, number: u32) -> u64 {
        let mut sent = 0;
        while script.writes(number, &vec![1; 100_000]).is_some() {
            sent += script.says().iter().map(|frame| frame.body.len() as u64).sum::<u64>();
        }
        sent
    }

    #[test]
    fn a_window_is_used_to_its_last_byte_and_no_further() {
        let mut near = dialer();
        let number = near.opens();
        assert_eq!(floods(&mut near, number), u64::from(INITIAL));
        near.takes(&[window(0, number, 1)]);
        assert_eq!(near.says(), [data(0, number, &[1])]);
        near.takes(&[window(0, number, 20_000)]);
        let lengths: Vec<usize> = near.says().iter().map(|frame| frame.body.len()).collect();
        assert_eq!(lengths.iter().sum::<usize>(), 20_000);
        assert!(lengths.iter().all(|length| *length <= LONGEST), "{lengths:?}");
        near.takes(&[window(0, number, 0)]);
        assert_eq!(near.says(), []);
    }

    #[test]
    fn an_end_comes_behind_the_last_byte_and_needs_no_window() {
        let mut near = dialer();
        let number = near.opens();
        floods(&mut near, number);
        near.session.finish(number);
        assert_eq!(near.says(), [], "it overtook bytes");
        near.takes(&[window(0, number, 64 * 1024)]);
        let frames = near.says();
        let (last, others) = frames.split_last().unwrap();
        assert_eq!(last.flags, FIN);
        assert!(others.iter().all(|frame| frame.flags == 0));
        // One whose last byte has left already.
        let number = near.opens();
        floods(&mut near, number);
        near.takes(&[window(0, number, 64 * 1024)]);
        near.says();
        near.takes(&[window(0, number, 64 * 1024)]);
        near.says();
        near.session.finish(number);
        assert_eq!(near.says(), [data(FIN, number, b"")]);
        near.session.finish(number);
        assert_eq!(near.says(), [], "it ends once");
        assert!(near.cannot_write(number));
        // One without any bytes.
        let number = near.opens();
        near.session.finish(number);
        assert_eq!(near.says(), [data(SYN | FIN, number, b"")]);
    }

    #[test]
    fn an_end_may_come_with_bytes_with_a_window_or_alone() {
        for (frames, body) in [
            (vec![data(FIN, 1, b"end")], b"end".as_slice()),
            (vec![data(FIN, 1, b"")], b""),
            (vec![window(FIN, 1, 9)], b""),
        ] {
            let mut far = acceptor();
            far.takes(&[window(SYN, 1, 0)]);
            far.takes(&frames);
            if !body.is_empty() {
                assert_eq!(far.reads(1), Some(body.to_vec()));
            }
            assert_eq!(far.reads(1), Some(Vec::new()));
            assert_eq!(far.writes(1, b"x"), Some(1), "the other direction is still open");
        }
        let mut far = acceptor();
        far.takes(&[data(SYN | FIN, 1, b"all")]);
        assert_eq!(far.accepts(), Some(1));
        assert_eq!((far.reads(1), far.reads(1)), (Some(b"all".to_vec()), Some(Vec::new())));
    }

    #[test]
    fn an_end_is_not_read_before_the_body_it_came_with() {
        let mut far = acceptor();
        let frame = data(SYN | FIN, 1, b"xy").bytes();
        far.hears_bytes(&frame[..12]).unwrap();
        assert_eq!(far.reads(1), None);
        far.hears_bytes(&frame[12..13]).unwrap();
        assert_eq!(far.reads(1), Some(b"x".to_vec()));
        assert_eq!(far.reads(1), None);
        far.hears_bytes(&frame[13..]).unwrap();
        assert_eq!((far.reads(1), far.reads(1)), (Some(b"y".to_vec()), Some(Vec::new())));
    }

    #[test]
    fn a_reset_ends_both_directions_behind_what_has_arrived() {
        for reset in [window(RST, 1, 0), data(RST, 1, b""), window(RST | FIN, 1, 3)] {
            let mut far = acceptor();
            far.takes(&[data(SYN, 1, b"abc")]);
            far.writes(1, b"never sent");
            far.takes(&[reset]);
            assert_eq!((far.reads(1), far.reads(1)), (Some(b"abc".to_vec()), Some(Vec::new())));
            assert!(far.cannot_write(1));
            far.session.finish(1);
            far.session.discard(1);
            assert_eq!(far.says(), [], "there is nobody to tell");
        }
    }

    /// Even if the stream is neither read nor written, as both of its directions rest.
    #[test]
    fn whoever_waits_for_a_reset_is_woken_by_it_and_by_nothing_that_comes_before() {
        let mut far = acceptor();
        far.takes(&[data(SYN, 1, b"abc")]);
        let watch = |far: &mut Script, flag: &Arc<Flag>| {
            poll(&mut far.session, flag, |session, cx| session.poll_reset(1, cx)).is_ready()
        };
        let say = |far: &mut Script, frame: &Frame| {
            poll(&mut far.session, &Flag::new(false), |session, _| {
                session.receive(&frame.bytes(), Instant::now())
            })
        };
        let flag = Flag::new(false);
        assert!(!watch(&mut far, &flag) && !far.session.is_reset(1));
        for frame in [data(0, 1, b"d"), window(0, 1, 1), data(FIN, 1, b"")] {
            say(&mut far, &frame).unwrap();
            assert!(!flag.is_set() && !watch(&mut far, &flag), "{frame:?}");
        }
        ignore(&mut far.session, |session, _| session.finish(1));
        assert!(!far.says().is_empty() && !watch(&mut far, &flag));
        say(&mut far, &window(RST, 1, 0)).unwrap();
        assert!(flag.is_set() && watch(&mut far, &flag) && far.session.is_reset(1));

        // The end of the connection wakes too, but is no reset: whoever ends it says what it means.
        far.takes(&[data(SYN, 3, b"abc")]);
        let flag = Flag::new(false);
        assert!(poll(&mut far.session, &flag, |session, cx| session.poll_reset(3, cx)).is_pending());
        poll(&mut far.session, &Flag::new(false), |session, _| session.end());
        assert!(flag.is_set() && !far.session.is_reset(3));
        assert!(poll(&mut far.session, &flag, |session, cx| session.poll_reset(3, cx)).is_pending());
    }

    #[test]
    fn bytes_in_a_reset_are_nobodys() {
        let mut far = acceptor();
        far.takes(&[data(SYN, 1, b"abc"), data(RST, 1, &vec![9; 1 << 20]), data(SYN, 3, b"next")]);
        assert_eq!((far.reads(1), far.reads(1)), (Some(b"abc".to_vec()), Some(Vec::new())));
        assert_eq!(far.reads(3), Some(b"next".to_vec()));
    }

    #[test]
    fn bytes_of_an_unknown_stream_are_nobodys() {
        let mut near = dialer();
        let body = vec![9; 1 << 20];
        near.takes(&[data(0, 8, &body), data(FIN, 0, &body), window(0, 8, u32::MAX), window(RST, 5, 0)]);
        // Not even of one that is opened while they come.
        let frame = data(0, 1, &body).bytes();
        near.hears_bytes(&frame[..20]).unwrap();
        assert_eq!(near.opens(), 1);
        near.writes(1, b"x");
        near.hears_bytes(&frame[20..]).unwrap();
        assert_eq!(near.reads(1), None);
        assert_eq!(near.says(), [data(SYN, 1, b"x")]);
        near.takes(&[data(ACK, 1, b"y")]);
        assert_eq!(near.reads(1), Some(b"y".to_vec()));
    }

    #[test]
    fn what_is_let_go_is_reset_unless_it_was_finished() {
        let mut far = acceptor();
        far.takes(&[window(SYN, 1, 0), window(SYN, 3, 0), window(SYN, 5, 0), window(SYN, 7, 0)]);
        far.session.discard(1);
        assert_eq!(far.says(), [window(RST, 1, 0)]);
        far.writes(3, b"lost");
        far.session.discard(3);
        assert_eq!(far.says(), [window(RST, 3, 0)]);
        far.writes(5, b"kept");
        far.session.finish(5);
        far.session.discard(5);
        // Bytes and end in frames of their own: hashicorp/yamux could read the end first.
        assert_eq!(far.says(), [data(ACK, 5, b"kept"), data(FIN, 5, b"")]);
        // Nobody reads what comes now, and its sender is told so, once.
        far.takes(&[data(0, 5, b"x")]);
        assert_eq!(far.says(), [window(RST, 5, 0)]);
        far.takes(&[data(0, 5, b"x"), data(0, 1, b"x"), data(FIN, 3, b"x"), window(0, 1, 1)]);
        assert_eq!(far.says(), []);
        // Unread bytes are as lost as those that come later.
        far.takes(&[data(0, 7, b"unread")]);
        far.session.finish(7);
        assert_eq!(far.says(), [data(ACK | FIN, 7, b"")]);
        far.session.discard(7);
        assert_eq!(far.says(), [window(RST, 7, 0)]);
    }

    #[test]
    fn a_sender_that_has_used_its_window_up_learns_that_its_reader_is_gone() {
        for reads in [false, true] {
            let mut far = acceptor();
            far.takes(&[data(SYN, 1, &vec![1; INITIAL as usize])]);
            while reads && far.reads(1).is_some() {}
            far.session.finish(1);
            far.session.discard(1);
            let frames = far.says();
            let reset = frames.iter().any(|frame| frame.flags & RST != 0);
            let opened: u32 =
                frames.iter().filter(|frame| frame.kind == WINDOW).map(|frame| frame.length).sum();
            assert!(reset || opened > 0, "{frames:?}");
        }
    }

    #[test]
    fn two_sides_that_let_go_with_full_windows_do_not_wait_for_each_other() {
        let (mut near, mut far) = (Script::new(Side::Dialer, 1), Script::new(Side::Acceptor, 1));
        let number = near.opens();
        near.writes(number, b"x");
        far.takes(&near.says());
        assert_eq!(far.accepts(), Some(number));
        // Each writes until the other's window is used up, finishes with more in hand, and lets go.
        while near.writes(number, &vec![1; 100_000]).is_some() {
            far.takes(&near.says());
        }
        while far.writes(number, &vec![1; 100_000]).is_some() {
            near.takes(&far.says());
        }
        for side in [&mut near, &mut far] {
            side.session.finish(number);
            side.session.discard(number);
        }
        let (from_near, from_far) = (near.says(), far.says());
        far.takes(&from_near);
        near.takes(&from_far);
        // Neither has it any more: there is room for another.
        near.opens();
        far.opens();
    }

    #[test]
    fn what_was_finished_is_said_before_the_reset_of_a_stream_with_unread_bytes() {
        let mut far = acceptor();
        far.takes(&[data(SYN, 1, b"unread")]);
        far.writes(1, b"no");
        far.session.finish(1);
        far.session.discard(1);
        assert_eq!(far.says(), [data(ACK, 1, b"no"), data(FIN, 1, b""), window(RST, 1, 0)]);
    }

    #[test]
    fn a_stream_that_was_never_sent_is_forgotten_without_a_word() {
        let mut near = Script::new(Side::Dialer, 1);
        for _ in 0..10 {
            let number = near.opens();
            near.writes(number, b"x");
            near.session.discard(number);
            assert_eq!(near.says(), []);
        }
    }

    #[test]
    fn pings_come_back_and_only_the_last_eight_are_kept() {
        let mut far = acceptor();
        far.takes(&[ping(SYN, 0xdead_beef)]);
        assert_eq!(far.says(), [ping(ACK, 0xdead_beef)]);
        assert_eq!(far.says(), []);
        far.takes(&(0..20).map(|number| ping(SYN, number)).collect::<Vec<_>>());
        assert_eq!(far.says(), (12..20).map(|number| ping(ACK, number)).collect::<Vec<_>>());
        // Answers to what was never asked mean nothing.
        far.takes(&[ping(ACK, 1), ping(ACK, u32::MAX)]);
        assert_eq!(far.says(), []);
    }

    #[test]
    fn the_round_trip_is_measured_every_ten_seconds_while_there_is_traffic() {
        let mut near = dialer();
        let number = near.opens();
        let mut asked = Vec::new();
        for _ in 0..25 {
            assert_eq!(near.says_all(), [], "an idle connection is not kept awake");
            near.writes(number, b"x");
            asked.push(near.says_all().iter().any(|frame| frame.kind == PING && frame.flags == SYN));
            near.now += Duration::from_secs(1);
        }
        let times: Vec<usize> = (0..25).filter(|at| asked[*at]).collect();
        assert_eq!(times, [0, 10, 20]);
    }

    #[test]
    fn a_far_side_that_goes_away_says_why() {
        for (code, error) in [
            (0, Error::ClosedByPeer),
            (1, Error::EndedByPeer(1)),
            (2, Error::EndedByPeer(2)),
            (77, Error::EndedByPeer(77)),
        ] {
            assert_eq!(acceptor().hears(&go_away(code)), Err(error));
        }
    }

    #[test]
    fn a_farewell_comes_behind_all_that_waits() {
        let mut near = dialer();
        let (one, two) = (near.opens(), near.opens());
        near.writes(one, &vec![1; 40_000]);
        near.writes(two, b"x");
        near.session.finish(two);
        near.session.close();
        assert!(!near.session.is_closed());
        let frames = near.says();
        assert!(near.session.is_closed());
        let (last, others) = frames.split_last().unwrap();
        assert_eq!(last, &go_away(0));
        assert_eq!(others.iter().map(|frame| frame.body.len()).sum::<usize>(), 40_001);
        assert_eq!(near.says(), []);
    }

    #[test]
    fn a_connection_that_closes_takes_no_more_streams() {
        let mut far = acceptor();
        far.takes(&[window(SYN, 1, 0)]);
        far.session.close();
        far.takes(&[data(SYN, 3, b"late")]);
        assert_eq!((far.accepts(), far.accepts()), (Some(1), None));
        assert_eq!(far.says(), [window(RST, 3, 0), go_away(0)]);
        let opened = ignore(&mut far.session, |session, cx| session.poll_open(&mut None, cx, far.now));
        assert_eq!(opened, Poll::Ready(Err(OpenFailed::Ended)));
    }

    #[test]
    fn what_has_arrived_can_be_read_after_the_end() {
        let mut far = acceptor();
        far.takes(&[data(SYN, 1, b"abc"), data(SYN, 3, b"")]);
        far.session.end();
        assert_eq!(far.accepts(), Some(1), "what was opened is known");
        assert_eq!(far.accepts(), Some(3));
        assert_eq!(ignore(&mut far.session, Session::poll_accept), Poll::Ready(None));
        assert_eq!((far.reads(1), far.reads(1)), (Some(b"abc".to_vec()), Some(Vec::new())));
        assert_eq!(far.reads(3), Some(Vec::new()));
        assert!(far.cannot_write(1));
        far.session.discard(1);
        assert_eq!(far.says(), []);
    }

    #[test]
    fn bytes_beyond_the_window_end_the_connection() {
        let mut far = acceptor();
        far.takes(&[data(SYN, 1, &vec![1; INITIAL as usize - 1]), data(0, 1, b"x")]);
        assert_eq!(far.objects(&data(0, 1, b"x")), (1, "more bytes came than its window allows"));
        let mut far = acceptor();
        assert_eq!(far.objects(&data(SYN, 1, &vec![1; INITIAL as usize + 1])).0, 1);
    }

    #[test]
    fn a_body_opens_no_window_before_it_has_arrived() {
        let mut far = acceptor();
        far.takes(&[data(SYN, 1, b"x")]);
        let frame = data(0, 1, &vec![1; INITIAL as usize - 1]).bytes();
        far.hears_bytes(&frame[..12]).unwrap();
        far.reads(1).unwrap();
        assert_eq!(far.says(), []);
    }

    #[test]
    fn a_window_opened_beyond_all_bounds_ends_the_connection() {
        let mut near = dialer();
        let number = near.opens();
        near.takes(&[window(0, number, u32::MAX - INITIAL)]);
        assert_eq!(near.objects(&window(0, number, 1)), (number, "its window was opened beyond all bounds"));
    }

    #[test]
    fn bytes_behind_an_end_end_the_connection() {
        let mut far = acceptor();
        far.takes(&[data(SYN | FIN, 1, b"x"), data(0, 1, b""), data(FIN, 1, b""), window(0, 1, 1)]);
        assert_eq!(far.objects(&data(0, 1, b"x")), (1, "bytes came behind its end"));
        let mut far = acceptor();
        far.takes(&[window(SYN, 1, 0), window(RST, 1, 0)]);
        assert_eq!(far.objects(&data(0, 1, b"x")).0, 1);
    }

    #[test]
    fn a_side_may_open_only_its_own_numbers_and_each_once() {
        let wrong = "the number is not the opener's to use";
        for number in [0, 2, 4] {
            assert_eq!(acceptor().objects(&window(SYN, number, 0)), (number, wrong));
        }
        for number in [0, 1, 3] {
            assert_eq!(dialer().objects(&data(SYN, number, b"x")), (number, wrong));
        }
        let mut far = acceptor();
        far.takes(&[window(SYN, 1, 0)]);
        assert_eq!(far.objects(&data(SYN, 1, b"x")), (1, "it was opened twice"));
    }

    #[test]
    fn streams_beyond_the_maximum_are_reset_one_by_one() {
        let mut far = Script::new(Side::Acceptor, 2);
        far.takes(&[
            data(SYN, 1, b"a"),
            data(SYN, 3, b"b"),
            data(SYN, 5, b"c"),
            data(0, 5, b"c"),
            data(SYN | FIN, 7, b"d"),
        ]);
        assert_eq!((far.accepts(), far.accepts(), far.accepts()), (Some(1), Some(3), None));
        assert_eq!(far.says(), [window(RST, 5, 0), window(RST, 7, 0)]);
        let opened = ignore(&mut far.session, |session, cx| session.poll_open(&mut None, cx, far.now));
        assert_eq!(opened, Poll::Ready(Err(OpenFailed::TooMany)));
        far.session.discard(1);
        far.says();
        far.takes(&[data(SYN, 9, b"e")]);
        assert_eq!((far.accepts(), far.reads(9)), (Some(9), Some(b"e".to_vec())));
    }

    #[test]
    fn a_far_side_that_opens_without_reading_is_cut() {
        let mut far = Script::new(Side::Acceptor, 1);
        far.takes(&[window(SYN, 1, 0)]);
        for number in 0..1024 {
            far.takes(&[window(SYN, 3 + 2 * number, 0)]);
        }
        assert_eq!(far.objects(&window(SYN, 5001, 0)), (5001, "too many streams were opened at once"));
        // One that reads may go on for ever.
        let mut far = Script::new(Side::Acceptor, 1);
        far.takes(&[window(SYN, 1, 0)]);
        for round in 0..3 {
            let numbers: Vec<u32> = (0..1024).map(|i| 3 + 2 * (round * 1024 + i)).collect();
            for number in &numbers {
                far.takes(&[window(SYN, *number, 0)]);
            }
            let refused: Vec<Frame> = numbers.iter().map(|number| window(RST, *number, 0)).collect();
            assert_eq!(far.says(), refused);
        }
    }

    #[test]
    fn another_version_or_type_ends_the_connection() {
        let told = |bytes: [u8; 2]| {
            let error = acceptor().hears_bytes(&[bytes.as_slice(), &[0; 10]].concat()).unwrap_err();
            error.to_string()
        };
        assert_eq!(told([1, 0]), "yamux version 1 instead of 0");
        assert_eq!(told([b'G', b'E']), "yamux version 71 instead of 0");
        assert_eq!(told([0, 4]), "yamux frame of unknown type 4");
        assert_eq!(told([0, 255]), "yamux frame of unknown type 255");
    }

    #[test]
    fn flags_that_nobody_knows_mean_nothing() {
        let mut far = acceptor();
        far.takes(&[data(SYN | 0xfff0, 1, b"x"), ping(SYN | 0x8000, 3)]);
        assert_eq!((far.accepts(), far.reads(1)), (Some(1), Some(b"x".to_vec())));
        assert_eq!(far.says(), [ping(ACK, 3)]);
    }

    #[test]
    fn only_so_many_streams_wait_for_the_far_sides_first_word() {
        let mut near = Script::new(Side::Dialer, 1000);
        let numbers: Vec<u32> = (0..256).map(|_| near.opens()).collect();
        for number in &numbers {
            near.writes(*number, b"x");
        }
        near.says();
        let now = near.now;
        let mut waiting: Vec<(Option<Place>, Arc<Flag>)> = (0..4).map(|_| (None, Flag::new(false))).collect();
        for (place, flag) in &mut waiting {
            let polled = poll(&mut near.session, flag, |session, cx| session.poll_open(place, cx, now));
            assert_eq!(polled, Poll::Pending);
        }
        let woken = |waiting: &[(Option<Place>, Arc<Flag>)]| -> Vec<bool> {
            waiting.iter().map(|(_, flag)| flag.is_set()).collect()
        };
        for answer in [data(ACK, numbers[0], b"y"), window(ACK, numbers[1], 1)] {
            ignore(&mut near.session, |session, _| session.receive(&answer.bytes(), now)).unwrap();
        }
        assert_eq!(woken(&waiting), [true, true, false, false], "as many as there is room for");
        // One that was woken does not want to any more: the next one has its turn.
        let (first, _) = waiting.remove(0);
        ignore(&mut near.session, |session, _| session.leave(first.unwrap()));
        assert_eq!(woken(&waiting), [true, true, false]);
        for (place, flag) in &mut waiting {
            let polled = poll(&mut near.session, flag, |session, cx| session.poll_open(place, cx, now));
            assert_eq!(polled.is_ready(), place.is_none());
        }
        assert_eq!(waiting.iter().filter(|(place, _)| place.is_some()).count(), 1);
        let (last, _) = waiting.pop().unwrap();
        ignore(&mut near.session, |session, _| session.leave(last.unwrap()));
        // A stream that is given up or refused makes room as well.
        for (number, refused) in [(numbers[2], false), (numbers[3], true)] {
            let flag = Flag::new(false);
            let mut place = None;
            let mut open =
                |session: &mut Session, cx: &mut Context<'_>| session.poll_open(&mut place, cx, now);
            assert_eq!(poll(&mut near.session, &flag, &mut open), Poll::Pending);
            if refused {
                let bytes = window(RST, number, 0).bytes();
                ignore(&mut near.session, |session, _| session.receive(&bytes, now)).unwrap();
                ignore(&mut near.session, |session, _| session.discard(number));
            } else {
                near.session.discard(number);
                near.says();
            }
            assert!(flag.is_set());
            assert!(matches!(poll(&mut near.session, &flag, &mut open), Poll::Ready(Ok(_))));
        }
    }

    #[test]
    fn whoever_waits_to_open_a_stream_is_told_of_the_end() {
        for close in [Session::close, Session::end] {
            let mut near = Script::new(Side::Dialer, 1000);
            for _ in 0..256 {
                near.opens();
            }
            let (flag, mut place, now) = (Flag::new(false), None, near.now);
            let mut open =
                |session: &mut Session, cx: &mut Context<'_>| session.poll_open(&mut place, cx, now);
            assert_eq!(poll(&mut near.session, &flag, &mut open), Poll::Pending);
            ignore(&mut near.session, |session, _| close(session));
            assert!(flag.is_set());
            assert_eq!(poll(&mut near.session, &flag, &mut open), Poll::Ready(Err(OpenFailed::Ended)));
        }
    }

    #[test]
    fn streams_that_were_accepted_and_say_nothing_do_not_keep_others_from_being_opened() {
        let (mut near, mut far) = (Script::new(Side::Dialer, 1000), Script::new(Side::Acceptor, 1000));
        for _ in 0..600 {
            let number = near.opens();
            near.writes(number, b"x");
            far.takes(&near.says());
            assert_eq!(far.accepts(), Some(number));
            let answers = far.says();
            let is_answer = |frame: &Frame| (frame.kind, frame.flags, frame.length) == (WINDOW, ACK, 0);
            assert!(answers.iter().all(is_answer), "{answers:?}");
            near.takes(&answers);
        }
        // One that was answered is not answered again.
        far.writes(1, b"y");
        assert_eq!(far.says(), [data(0, 1, b"y")]);
        // One whose bytes are faster needs no frame of its own.
        let mut far = Script::new(Side::Acceptor, 1000);
        for number in (1..400).step_by(2) {
            far.takes(&[data(SYN, number, b"x")]);
            assert_eq!(far.accepts(), Some(number));
            far.writes(number, b"y");
            assert_eq!(far.says(), [data(ACK, number, b"y")]);
        }
    }

    #[test]
    fn what_is_let_go_after_the_end_is_gone() {
        let mut far = acceptor();
        far.takes(&[window(SYN, 1, 0)]);
        assert_eq!(far.accepts(), Some(1));
        let empty = format!("{:?}", far.session).len();
        far.takes(&[window(SYN, 3, 0), window(SYN, 5, 0)]);
        far.writes(3, b"x");
        far.session.finish(3);
        far.session.end();
        for number in [1, 3, 5] {
            far.session.discard(number);
        }
        let text = format!("{:?}", far.session);
        assert!(text.len() < empty, "{text}");
    }
}

mod turns {
    //! Who may send next.

    use super::{script::Script, *};

    const BULK: usize = 8;

    /// A session with streams that always have more, and a far side that takes everything.
    fn busy() -> (Script, Vec<u32>) {
        let mut near = Script::new(Side::Dialer, 100);
        let numbers: Vec<u32> = (0..BULK).map(|_| near.opens()).collect();
        refill(&mut near, &numbers);
        (near, numbers)
    }

    fn refill(near: &mut Script, numbers: &[u32]) {
        for number in numbers {
            while near.writes(*number, &vec![1; 16 * 1024]).is_some() {}
        }
    }

    /// The next frame of a stream: of which, and how many bytes.
    fn next(near: &mut Script) -> (u32, usize) {
        let mut batch = Batch::default();
        ignore(&mut near.session, |session, cx| session.transmit(&mut batch, ONE_TURN, cx, near.now));
        let frames = Parser::default().feed(&drain(&mut batch));
        let mut own = frames.into_iter().filter(|frame| frame.kind != PING);
        let frame = own.next().unwrap();
        assert_eq!(own.next(), None, "a turn is one frame");
        near.takes(&[window(0, frame.stream, frame.length)]);
        (frame.stream, frame.body.len())
    }

    #[test]
    fn a_keystroke_waits_for_one_frame_of_a_copy_at_most() {
        let (mut near, bulk) = busy();
        let keys = near.opens();
        for round in 0..100 {
            for _ in 0..round % 11 {
                next(&mut near);
                refill(&mut near, &bulk);
            }
            near.writes(keys, b"k");
            let turns = [next(&mut near), next(&mut near)];
            assert!(turns.contains(&(keys, 1)), "{turns:?}");
            refill(&mut near, &bulk);
        }
    }

    #[test]
    fn streams_that_always_have_more_take_turns() {
        let (mut near, bulk) = busy();
        let mut sent = BTreeMap::new();
        for _ in 0..BULK * 50 {
            let (number, length) = next(&mut near);
            *sent.entry(number).or_insert(0) += length;
            refill(&mut near, &bulk);
        }
        let (least, most) = (*sent.values().min().unwrap(), *sent.values().max().unwrap());
        assert_eq!(sent.len(), BULK);
        assert!(most - least <= 2 * LONGEST, "{sent:?}");
    }

    #[test]
    fn many_keystrokes_leave_a_copy_every_other_turn() {
        let (mut near, bulk) = busy();
        let keys: Vec<u32> = (0..50).map(|_| near.opens()).collect();
        let mut copied = 0;
        for _ in 0..200 {
            for number in &keys {
                near.writes(*number, b"k");
            }
            copied += usize::from(bulk.contains(&next(&mut near).0));
            refill(&mut near, &bulk);
        }
        assert!((95..=105).contains(&copied), "{copied} of 200");
    }

    #[test]
    fn what_a_window_grew_by_is_given_back_with_its_stream() {
        const BUDGET: u32 = 3 * INITIAL;
        let config = Config { max_streams: 4, window_budget: BUDGET as usize };
        let mut far = Script { session: Session::new(Side::Acceptor, config), now: Instant::now() };
        far.learns_round_trip();
        for round in 0..3 {
            let number = 1 + 2 * round;
            let mut open = INITIAL;
            far.takes(&[window(SYN, number, 0)]);
            for _ in 0..20 {
                let body = vec![1; open as usize / 2];
                far.session.receive(&data(0, number, &body).bytes(), far.now).unwrap();
                open -= u32::try_from(body.len()).unwrap();
                while far.reads(number).is_some() {}
                open += far.says().iter().map(|frame| frame.length).sum::<u32>();
            }
            assert_eq!(open, INITIAL + BUDGET, "round {round}");
            match round {
                0 => far.session.discard(number),
                1 => {
                    far.takes(&[window(RST, number, 0)]);
                    far.session.discard(number);
                }
                _ => {
                    far.session.finish(number);
                    far.session.discard(number);
                    far.takes(&[data(FIN, number, b"")]);
                }
            }
            far.says();
        }
    }

    #[test]
    fn a_pool_has_back_what_a_stream_took_that_outlives_its_connection() {
        let pool = Arc::new(WindowPool::new(1 << 20));
        let session = Session::new(Side::Acceptor, Config { max_streams: 4, window_budget: 1 << 20 });
        let mut far = Script { session: session.sharing(pool.clone()), now: Instant::now() };
        far.learns_round_trip();
        for number in [1, 3] {
            far.takes(&[window(SYN, number, 0)]);
            far.session.receive(&data(0, number, &vec![1; 140_000]).bytes(), far.now).unwrap();
            while far.reads(number).is_some() {}
        }
        let left = pool.left();
        assert!(left < 1 << 20);
        // One was let go of before the end, with bytes that nobody will send; the other is read for a while yet.
        far.writes(1, b"never sent");
        far.session.finish(1);
        far.session.discard(1);
        far.session.end();
        assert_eq!(pool.left(), left + usize::try_from(INITIAL).unwrap());
        far.session.discard(3);
        assert_eq!(pool.left(), 1 << 20);
    }

    #[test]
    fn a_stream_without_an_answer_is_answered_in_time() {
        let mut far = Script::new(Side::Acceptor, 4);
        far.takes(&[window(SYN, 1, 0)]);
        assert_eq!(far.accepts(), Some(1));
        far.now += Duration::from_secs(19);
        far.takes(&[ping(ACK, 7)]);
        assert_eq!(far.says(), []);
        far.now += Duration::from_secs(1);
        far.takes(&[ping(ACK, 7)]);
        assert_eq!(far.says(), [window(ACK, 1, 0)]);
    }

    #[test]
    fn a_far_side_that_goes_on_unasked_overflows_nothing() {
        // It is never told that it may send, and does: what it would be told adds up to more than a number holds.
        let mut far = Script::new(Side::Acceptor, 4);
        far.takes(&[window(SYN, 1, 0)]);
        let frame = data(0, 1, &vec![1; INITIAL as usize]).bytes();
        for _ in 0..(1_u64 << 32) / u64::from(INITIAL) + 2 {
            far.session.receive(&frame, far.now).unwrap();
            while far.reads(1).is_some() {}
        }
    }

    #[test]
    fn what_is_forgotten_leaves_nothing_in_the_queues() {
        // The far side reads nothing, so nothing is sent; streams come and go.
        let size = |script: &Script| format!("{:?}", script.session).len();
        let mut near = Script::new(Side::Dialer, 2);
        let before = size(&near);
        for _ in 0..10_000 {
            let number = near.opens();
            near.writes(number, b"x");
            near.session.discard(number);
        }
        assert!(size(&near) < before + 5_000, "from {before} to {}", size(&near));
        // The far side opens, and resets what is written to, and uses the number again.
        let mut far = Script::new(Side::Acceptor, 2);
        for _ in 0..10_000 {
            far.takes(&[window(SYN, 1, 0)]);
            assert_eq!(far.accepts(), Some(1));
            far.writes(1, &vec![1; 30_000]);
            far.takes(&[window(RST, 1, 0)]);
            far.session.discard(1);
        }
        assert!(size(&far) < before + 5_000, "from {before} to {}", size(&far));
    }

    #[test]
    fn whoever_gives_up_waiting_for_a_stream_leaves_nothing() {
        let mut near = Script::new(Side::Dialer, 1000);
        for _ in 0..256 {
            near.opens();
        }
        let (flag, now) = (Flag::new(false), near.now);
        for _ in 0..1000 {
            let mut place = None;
            for _ in 0..3 {
                let polled =
                    poll(&mut near.session, &flag, |session, cx| session.poll_open(&mut place, cx, now));
                assert_eq!(polled, Poll::Pending);
            }
            ignore(&mut near.session, |session, _| session.leave(place.unwrap()));
        }
        assert_eq!(Arc::strong_count(&flag), 1, "wakers were kept");
    }
}

mod chunks {
    //! What is given as a whole leaves as a whole, if that does others no harm.

    use super::{script::Script, *};

    /// Other bytes for each place in a stream.
    fn bytes(from: usize, count: usize) -> Vec<u8> {
        (from..from + count).map(|at| ((at * 31) ^ (at >> 10)).to_le_bytes()[0]).collect()
    }

    fn dialer() -> (Script, u32) {
        let mut near = Script::new(Side::Dialer, 100);
        let number = near.opens();
        (near, number)
    }

    fn lengths(frames: &[Frame]) -> Vec<(u32, usize)> {
        frames.iter().map(|frame| (frame.stream, frame.body.len())).collect()
    }

    fn bodies(frames: &[Frame]) -> Vec<u8> {
        frames.iter().flat_map(|frame| frame.body.clone()).collect()
    }

    /// Everything that can be sent now, in batches.
    fn says(near: &mut Script) -> Vec<Frame> {
        let mut frames = Vec::new();
        loop {
            match near.says_at_once(BATCH) {
                batch if batch.is_empty() => return frames,
                batch => frames.extend(batch),
            }
        }
    }

    /// Gives and sends until the window is used up and no more is taken: what was given, and what was sent of it.
    fn fills(near: &mut Script, number: u32) -> (usize, usize) {
        let (mut given, mut sent) = (0, 0);
        while near.gives(number, &bytes(given, LONGEST_GIVEN)) {
            given += LONGEST_GIVEN;
            assert!(given < 2 * INITIAL as usize, "there is no bound");
            let said = bodies(&says(near));
            assert!(said == bytes(sent, said.len()));
            sent += said.len();
        }
        (given, sent)
    }

    /// How many bytes of a stream are taken until it has to wait.
    fn takes_in_all(near: &mut Script, number: u32) -> usize {
        std::iter::from_fn(|| near.writes(number, &[7; LONGEST])).sum()
    }

    #[test]
    fn as_much_of_a_stream_waits_as_leaves_at_once_beside_the_others_and_is_allowed() {
        const TURNS: usize = 16;
        let shared = |streams: usize| (TURNS / streams).max(4) * LONGEST;
        let (mut near, first) = dialer();
        // A batch that large is asked for, and nothing is left of it.
        assert!(near.says_at_once(TURNS * ONE_TURN).is_empty());
        for streams in 1..=6 {
            let number = if streams == 1 { first } else { near.opens() };
            // Those that begin with little count too.
            let little = near.writes(number, b"x").unwrap();
            assert_eq!(little + takes_in_all(&mut near, number), shared(streams), "beside {}", streams - 1);
        }
        // Then the far side takes nearly nothing more of the first.
        while !near.says_at_once(TURNS * ONE_TURN).is_empty() {}
        assert_eq!(takes_in_all(&mut near, first), shared(6));
    }

    #[test]
    fn streams_that_always_have_more_send_as_much_whoever_comes_first() {
        // Four share a batch; of more, those whose bytes have left come first, since they are woken then.
        for count in 2..=8 {
            let (mut near, first) = dialer();
            let mut order: Vec<u32> =
                std::iter::once(first).chain((1..count).map(|_| near.opens())).collect();
            let mut sent = BTreeMap::new();
            for _ in 0..200 {
                for number in &order {
                    takes_in_all(&mut near, *number);
                }
                for frame in near.says_at_once(16 * ONE_TURN) {
                    *sent.entry(frame.stream).or_insert(0) += frame.body.len();
                    near.takes(&[window(0, frame.stream, frame.length)]);
                    if count > 4 {
                        order.retain(|number| *number != frame.stream);
                        order.push(frame.stream);
                    }
                }
            }
            let (least, most) = (sent.values().min().unwrap(), sent.values().max().unwrap());
            assert!(sent.len() == count && most - least < most / 10, "{sent:?}");
        }
    }

    #[test]
    fn whoever_waits_is_woken_once_half_of_what_may_wait_has_left() {
        for (turns, woken) in [(9, false), (12, true)] {
            let (mut near, number) = dialer();
            near.takes(&[window(0, number, 1 << 20)]);
            near.says_at_once(16 * ONE_TURN);
            assert_eq!(takes_in_all(&mut near, number), 16 * LONGEST);
            let flag = Flag::new(false);
            let waits = poll(&mut near.session, &flag, |session, cx| session.poll_write(number, cx, b"more"));
            assert_eq!(waits, Poll::Pending);
            near.says_at_once(turns * ONE_TURN);
            assert_eq!(flag.is_set(), woken, "{turns} of 16 frames have left");
        }
    }

    #[test]
    fn chunks_of_one_stream_fill_a_batch() {
        for turns in [4, 8, 12, 16] {
            let (mut near, number) = dialer();
            near.says_at_once(turns * ONE_TURN);
            while near.gives(number, &bytes(0, LONGEST_GIVEN)) {}
            let said = bodies(&near.says_at_once(turns * ONE_TURN)).len();
            assert!(said > turns * ONE_TURN * 99 / 100, "{said} for {turns} turns");
        }
    }

    #[test]
    fn a_chunk_arrives_whole_and_as_one_frame() {
        let ((mut near, number), mut far) = (dialer(), Script::new(Side::Acceptor, 8));
        let mut at = 0;
        for length in [1, 100, LONGEST - 1, LONGEST, LONGEST + 1, 40_000, LONGEST_GIVEN] {
            let body = bytes(at, length);
            assert!(near.gives(number, &body));
            let frames = near.says_at_once(BATCH);
            assert_eq!(frames, [data(if at == 0 { SYN } else { 0 }, number, &body)]);
            at += length;
            far.takes(&frames);
            let read: Vec<u8> = std::iter::from_fn(|| far.reads(number)).flatten().collect();
            assert!(read == body, "{length} bytes are not what was given");
        }
    }

    #[test]
    fn a_chunk_leaves_though_there_are_refusals_before_each_batch() {
        let mut near = Script::new(Side::Acceptor, 1);
        near.takes(&[window(SYN, 1, 0)]);
        assert_eq!(near.accepts(), Some(1));
        assert!(near.gives(1, &bytes(0, LONGEST_GIVEN)));
        let mut sent = Vec::new();
        for round in 0..10 {
            let beyond: Vec<_> = (0..8).map(|at| window(SYN, 3 + 2 * (8 * round + at), 0)).collect();
            near.takes(&beyond);
            let batch = near.says_at_once(BATCH);
            sent.extend(bodies(&batch));
        }
        assert!(sent == bytes(0, LONGEST_GIVEN), "{} bytes left", sent.len());
    }

    #[test]
    fn a_chunk_leaves_from_where_it_was_collected() {
        let (mut near, number) = dialer();
        let mut given = Some(chunk(&bytes(0, LONGEST_GIVEN)));
        let place = given.as_ref().unwrap().filled().as_ptr();
        let taken = ignore(&mut near.session, |session, cx| session.poll_give(number, cx, &mut given));
        assert_eq!(taken, Poll::Ready(Ok(LONGEST_GIVEN)));
        let mut batch = Batch::default();
        ignore(&mut near.session, |session, cx| session.transmit(&mut batch, BATCH, cx, near.now));
        assert_eq!(batch.chunk()[12..].as_ptr(), place, "it was copied");
    }

    #[test]
    fn what_was_used_of_a_chunk_is_not_sent() {
        let (mut near, number) = dialer();
        let mut given = chunk(&bytes(0, 30_000));
        given.advance(10_000);
        let taken = ignore(&mut near.session, |session, cx| session.poll_give(number, cx, &mut Some(given)));
        assert_eq!(taken, Poll::Ready(Ok(20_000)));
        assert_eq!(near.says_at_once(BATCH), [data(SYN, number, &bytes(10_000, 20_000))]);
        // One that was used up and filled again.
        let mut given = chunk(&bytes(0, 30_000));
        given.advance(30_000);
        given.clear();
        assert!(given.is_empty() && given.room() == LONGEST_GIVEN);
        given.spare().put_slice(b"again");
        let taken = ignore(&mut near.session, |session, cx| session.poll_give(number, cx, &mut Some(given)));
        assert_eq!(taken, Poll::Ready(Ok(5)));
        assert_eq!(near.says_at_once(BATCH), [data(0, number, b"again")]);
    }

    #[test]
    fn a_chunk_of_nothing_is_taken_and_says_nothing() {
        let (mut near, number) = dialer();
        assert!(near.gives(number, b""));
        assert_eq!(near.says(), []);
        assert!(near.gives(number, b"x") && near.gives(number, b""));
        assert_eq!(near.says(), [data(SYN, number, b"x")]);
        assert!(near.gives(number, b""));
        near.session.finish(number);
        assert_eq!(near.says(), [data(FIN, number, b"")]);
    }

    #[test]
    fn a_chunk_that_is_not_taken_stays_and_its_owner_is_woken_once_it_is() {
        for waiting in [2 * LONGEST, 2 * LONGEST + 1, LONGEST_GIVEN] {
            let (mut near, number) = dialer();
            assert!(near.gives(number, &bytes(0, waiting)));
            let body = bytes(waiting, LONGEST_GIVEN);
            let (flag, mut given) = (Flag::new(false), Some(chunk(&body)));
            let mut give = |near: &mut Script| {
                poll(&mut near.session, &flag, |session, cx| session.poll_give(number, cx, &mut given))
            };
            let mut sent = Vec::new();
            if waiting > 2 * LONGEST {
                assert_eq!((give(&mut near), give(&mut near)), (Poll::Pending, Poll::Pending));
                assert!(!flag.is_set(), "there is no room yet");
                sent = near.says_at_once(BATCH);
                assert_eq!(lengths(&sent), [(number, waiting)]);
                assert!(flag.is_set(), "there is room, and nobody is told");
            }
            assert_eq!(give(&mut near), Poll::Ready(Ok(LONGEST_GIVEN)));
            assert!(given.is_none());
            sent.extend(says(&mut near));
            assert!(bodies(&sent) == bytes(0, waiting + LONGEST_GIVEN));
        }
    }

    #[test]
    fn a_chunk_is_cut_where_the_window_ends() {
        let (mut near, number) = dialer();
        let (given, mut at) = fills(&mut near, number);
        assert_eq!(at, INITIAL as usize, "the window is used to its last byte, and no further");
        // Then as it opens. What is cut is put together like what is written: in frames of one record at most.
        let left = given - at;
        let rest = left - 1 - 300 - LONGEST - 500;
        for (opened, expected) in
            [(1, vec![1]), (300, vec![300]), (LONGEST + 500, vec![LONGEST, 500]), (left, vec![rest])]
        {
            near.takes(&[window(0, number, u32::try_from(opened).unwrap())]);
            let frames = says(&mut near);
            assert_eq!(frames.iter().map(|frame| frame.body.len()).collect::<Vec<_>>(), expected);
            let sent = bodies(&frames);
            assert!(sent == bytes(at, sent.len()));
            at += sent.len();
        }
        assert_eq!(at, given);
    }

    #[test]
    fn whoever_waits_with_a_chunk_is_woken_when_the_window_opens() {
        let (mut near, number) = dialer();
        fills(&mut near, number);
        let (flag, mut given) = (Flag::new(false), Some(chunk(&bytes(0, LONGEST_GIVEN))));
        let mut give = |near: &mut Script| {
            poll(&mut near.session, &flag, |session, cx| session.poll_give(number, cx, &mut given))
        };
        assert_eq!(give(&mut near), Poll::Pending);
        near.takes(&[window(0, number, INITIAL)]);
        says(&mut near);
        assert!(flag.is_set());
        assert_eq!(give(&mut near), Poll::Ready(Ok(LONGEST_GIVEN)));
    }

    #[test]
    fn a_keystroke_goes_before_the_rest_of_a_chunk() {
        let (mut near, copy) = dialer();
        let keys = [near.opens(), near.opens(), near.opens()];
        assert!(near.gives(copy, &bytes(0, LONGEST_GIVEN)));
        for number in keys {
            near.writes(number, b"k");
        }
        let frames = near.says_at_once(BATCH);
        let rest = LONGEST_GIVEN - 2 * LONGEST;
        let expected =
            [(keys[0], 1), (copy, LONGEST), (keys[1], 1), (copy, LONGEST), (keys[2], 1), (copy, rest)];
        assert_eq!(lengths(&frames), expected);
        let copied: Vec<Frame> = frames.into_iter().filter(|frame| frame.stream == copy).collect();
        assert!(bodies(&copied) == bytes(0, LONGEST_GIVEN));
    }

    #[test]
    fn a_chunk_that_does_not_fit_beside_others_comes_first_in_the_next_batch() {
        let (mut near, one) = dialer();
        let (two, three) = (near.opens(), near.opens());
        for (number, length) in [(one, 30_000), (two, LONGEST_GIVEN), (three, 20_000)] {
            assert!(near.gives(number, &bytes(0, length)));
        }
        assert_eq!(lengths(&near.says_at_once(BATCH)), [(one, 30_000)]);
        assert_eq!(lengths(&near.says_at_once(BATCH)), [(two, LONGEST_GIVEN)]);
        assert_eq!(lengths(&near.says_at_once(BATCH)), [(three, 20_000)]);
        assert_eq!(near.says_at_once(BATCH), []);
    }

    #[test]
    fn a_window_that_is_used_up_does_not_end_the_batch() {
        let (mut near, full) = dialer();
        let (keys, other) = (near.opens(), near.opens());
        fills(&mut near, full);
        // It has something to say, but no bytes that it may.
        near.takes(&[data(ACK, full, &vec![1; INITIAL as usize / 2])]);
        while near.reads(full).is_some() {}
        near.writes(keys, &bytes(0, 1000));
        near.writes(other, &bytes(0, LONGEST));
        let said: Vec<(u8, u32)> =
            near.says_at_once(BATCH).iter().map(|frame| (frame.kind, frame.stream)).collect();
        assert_eq!(said, [(DATA, keys), (WINDOW, full), (DATA, other)]);
    }

    #[test]
    fn chunks_and_small_writes_all_have_their_turns_in_batches_of_any_size() {
        for limit in [16 * 1024, 20_000, 32 * 1024, BATCH, 100_000, 256 * 1024] {
            let (mut near, first) = dialer();
            let numbers: Vec<u32> = std::iter::once(first).chain((1..6).map(|_| near.opens())).collect();
            let mut given = BTreeMap::new();
            let mut sent: BTreeMap<u32, Vec<u8>> = BTreeMap::new();
            for round in 0..400 {
                for (index, number) in numbers.iter().enumerate() {
                    let at = given.entry(*number).or_insert(0);
                    // Each in another order, and of other lengths.
                    *at += match (round + index) % 5 {
                        0 => near.writes(*number, &bytes(*at, 200)).unwrap_or(0),
                        1 => near.writes(*number, &bytes(*at, 20_000)).unwrap_or(0),
                        kind => {
                            let length = [LONGEST_GIVEN, 30_011, 16 * 1024][kind - 2];
                            if near.gives(*number, &bytes(*at, length)) { length } else { 0 }
                        }
                    };
                }
                for frame in near.says_at_once(limit) {
                    near.takes(&[window(0, frame.stream, frame.length)]);
                    sent.entry(frame.stream).or_default().extend(frame.body);
                }
            }
            let (least, most) =
                (sent.values().map(Vec::len).min().unwrap(), sent.values().map(Vec::len).max().unwrap());
            assert_eq!(sent.len(), numbers.len(), "{limit}");
            assert!(least * 2 > most, "for {limit} between {least} and {most}");
            for (number, sent) in sent {
                assert!(sent == bytes(0, sent.len()), "{number} is out of order for {limit}");
            }
        }
    }

    #[test]
    fn a_stream_that_always_has_a_little_leaves_a_chunk_every_other_turn() {
        // Little enough to go first, and enough that the longest chunk does not fit beside it.
        for little in [1, 84, 85, 200, 4000] {
            let (mut near, copy) = dialer();
            let keys = near.opens();
            let (mut copied, mut typed) = (0, 0);
            for _ in 0..100 {
                near.writes(keys, &bytes(0, little));
                near.gives(copy, &bytes(0, LONGEST_GIVEN));
                for frame in near.says_at_once(BATCH) {
                    near.takes(&[window(0, frame.stream, frame.length)]);
                    *if frame.stream == copy { &mut copied } else { &mut typed } += frame.body.len();
                }
            }
            assert!(copied > 25 * LONGEST_GIVEN, "of {little}: {copied} bytes in 100 batches");
            assert!(typed > 98 * little, "of {little}: {typed} bytes in 100 batches");
        }
    }

    #[test]
    fn nothing_is_taken_behind_the_end() {
        let kept = |near: &mut Script, number: u32| {
            let mut given = Some(chunk(b"left"));
            let polled = ignore(&mut near.session, |session, cx| session.poll_give(number, cx, &mut given));
            assert_eq!(polled, Poll::Ready(Err(StreamEnded)));
            assert_eq!(given.unwrap().filled(), b"left");
        };
        let (mut near, finished) = dialer();
        near.session.finish(finished);
        kept(&mut near, finished);
        let reset = near.opens();
        near.writes(reset, b"x");
        near.says();
        near.takes(&[window(RST, reset, 0)]);
        kept(&mut near, reset);
        let gone = near.opens();
        near.session.discard(gone);
        kept(&mut near, gone);
        let open = near.opens();
        assert!(near.gives(open, b"x"));
        near.session.end();
        kept(&mut near, open);
    }

    #[test]
    fn whoever_waits_with_a_chunk_is_told_of_the_end() {
        let ends: [fn(&mut Session, u32); 2] = [
            |session, number| session.receive(&window(RST, number, 0).bytes(), Instant::now()).unwrap(),
            |session, _| session.end(),
        ];
        for end in ends {
            let (mut near, number) = dialer();
            assert!(near.gives(number, &bytes(0, LONGEST_GIVEN)));
            let (flag, mut given) = (Flag::new(false), Some(chunk(&[7; 100])));
            let mut give = |near: &mut Script| {
                poll(&mut near.session, &flag, |session, cx| session.poll_give(number, cx, &mut given))
            };
            assert_eq!(give(&mut near), Poll::Pending);
            ignore(&mut near.session, |session, _| end(session, number));
            assert!(flag.is_set());
            assert_eq!(give(&mut near), Poll::Ready(Err(StreamEnded)));
            assert_eq!(given.unwrap().filled(), [7; 100]);
        }
    }

    #[test]
    fn what_is_written_and_what_is_given_keep_their_order_before_the_end() {
        let steps: [(bool, usize); 9] = [
            (false, 1),
            (true, 100),
            (false, 2),
            (true, 20_000),
            (false, 3),
            (false, 12_000),
            (true, 0),
            (true, 5),
            (false, LONGEST + 700),
        ];
        let (mut near, number) = dialer();
        let mut at = 0;
        for (gives, length) in steps {
            let body = bytes(at, length);
            if gives {
                assert!(near.gives(number, &body));
            } else {
                assert_eq!(near.writes(number, &body), Some(length));
            }
            at += length;
        }
        near.session.finish(number);
        let frames = says(&mut near);
        let (last, others) = frames.split_last().unwrap();
        assert_eq!(last, &data(FIN, number, b""));
        assert!(others.iter().all(|frame| frame.flags & FIN == 0 && frame.length > 0), "{others:?}");
        assert!(bodies(others) == bytes(0, at));
    }
}
