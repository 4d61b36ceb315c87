//! What the fuzz targets do with their input. Each function takes any bytes and panics only if a promise is broken.
//! `cargo fuzz run --features libfuzzer NAME` searches; `cargo test` replays the committed corpus.

#![allow(clippy::missing_panics_doc, reason = "panicking is how a fuzz target says that a promise is broken")]

use std::{
    collections::{BTreeMap, VecDeque},
    str,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

use bytes::{Buf, BufMut, BytesMut};
use tunnel_core::{
    Target, identity,
    proto::{
        MAX_MESSAGE, Side,
        control::{Control, Event},
        ends::{Aborted, Ends, Verdict},
        frame,
        messages::{self, AbortCode, Hello, Open, OpenReply, Welcome},
        yamux::{
            Batch, Chunk, Config, INITIAL, Session,
            frame::{Flags, HEADER, Header, Kind},
        },
    },
};

/// A fuzz target: any bytes are good.
pub type FuzzTarget = fn(&[u8]);

/// Every target by name, for the replay of the corpus.
pub const TARGETS: [(&str, FuzzTarget); 5] = [
    ("messages", messages),
    ("target", target),
    ("certificate", certificate),
    ("control", control),
    ("yamux", yamux),
];

/// Length-delimited messages: whatever decodes encodes to something that decodes to the same, and the decoder never
/// asks for more than the longest message.
pub fn messages(input: &[u8]) {
    fn each<M: prost::Message + Default + PartialEq + std::fmt::Debug>(input: &[u8]) {
        let mut buffer = BytesMut::from(input);
        while let Ok(Some(message)) = frame::decode::<M>(&mut buffer) {
            let mut again = BytesMut::new();
            if frame::encode(&message, &mut again).is_ok() {
                assert_eq!(frame::decode::<M>(&mut again), Ok(Some(message)));
            }
        }
        if let Ok(None) = frame::decode::<M>(&mut buffer) {
            assert!(buffer.len() < MAX_MESSAGE + 3, "a whole message was not recognized");
        }
    }
    each::<messages::Control>(input);
    each::<Open>(input);
    each::<OpenReply>(input);
}

/// Targets: whatever parses prints as something that parses to the same.
pub fn target(input: &[u8]) {
    let Ok(text) = str::from_utf8(input) else { return };
    if let Ok(target) = text.parse::<Target>() {
        assert_eq!(target.to_string().parse(), Ok(target));
    }
}

/// Certificates: no bytes panic, and a node's name is always a valid one.
pub fn certificate(input: &[u8]) {
    if let Ok(node) = identity::node_from_certificate(input) {
        assert_eq!(node.as_str().parse(), Ok(node));
    }
    let _ = identity::names_in_certificate(input);
}

/// Operations: the control stream's state machine and a stream's ledger under any order of calls.
pub fn control(input: &[u8]) {
    let [side, operations @ ..] = input else { return };
    let start = Instant::now();
    let mut now = start;
    let hello = || Hello { min_version: 1, max_version: 1, ..Hello::default() };
    let mut control = if side % 2 == 0 {
        Control::dialer(hello(), now, Duration::from_secs(5), Duration::from_secs(60))
    } else {
        Control::acceptor(now, Duration::from_secs(5))
    };
    let mut ends = Ends::default();
    let mut aborted = false;
    for chunk in operations.chunks(4) {
        let [operation, rest @ ..] = chunk else { continue };
        let mut buffer = BytesMut::from(rest);
        let value = rest.iter().fold(0u64, |sum, byte| sum * 256 + u64::from(*byte));
        let outcome = match operation % 6 {
            0 => frame::decode::<messages::Control>(&mut buffer)
                .ok()
                .flatten()
                .map_or(Ok(()), |message| control.handle_message(now, message)),
            1 => {
                now += Duration::from_millis(value);
                control.handle_timeout(now)
            }
            2 => control.welcome(now, Welcome { version: 1, heartbeat_ms: 1000, ..Welcome::default() }),
            3 => {
                ends.handle_end(value);
                Ok(())
            }
            4 => {
                ends.received(usize::from(*operation));
                Ok(())
            }
            _ => {
                ends.abort(Aborted::new(AbortCode::Reset, "fuzz"));
                aborted = true;
                Ok(())
            }
        };
        while let Some(event) = control.poll_event() {
            if let Event::End(end) = event {
                ends.handle_end(end.total_bytes);
            }
        }
        let sent =
            std::iter::from_fn(|| control.poll_transmit().or_else(|| control.poll_heartbeat())).count();
        assert!(sent <= 4, "{sent} messages came of one step");
        if outcome.is_err() {
            break;
        }
    }
    let verdict = ends.eof();
    assert!(!aborted || matches!(verdict, Verdict::Aborted(_)), "an abort was forgotten");
}

/// Frames and calls: the multiplexer's session under any of both. What is sent is always whole frames within the far
/// side's windows; what is kept for readers is never more than a window.
pub fn yamux(input: &[u8]) {
    let [settings, steps @ ..] = input else { return };
    let side = if settings % 2 == 1 { Side::Dialer } else { Side::Acceptor };
    let mut mux = Mux::new(side, usize::from(settings >> 1) * 10_000);
    for step in steps.chunks(6) {
        let mut bytes = [0; 6];
        bytes[..step.len()].copy_from_slice(step);
        mux.step(bytes);
    }
    mux.session.end();
    mux.held.clone().into_iter().for_each(|number| mux.read(number));
}

/// A session, its users, and what they have seen of it.
struct Mux {
    session: Session,
    now: Instant,
    budget: usize,
    held: Vec<u32>,
    streams: BTreeMap<u32, Seen>,
    is_over: bool,
}

/// What was seen of one stream.
#[derive(Default)]
struct Seen {
    written: u64,
    sent: u64,
    /// What the far side takes, as it has said.
    window: u64,
}

const STREAMS: usize = 8;
/// As the driver of a fast connection asks for them.
const BATCH: usize = 256 * 1024;
/// Bytes of one stream that wait to be sent, if no more of it leaves at once, or is taken by the far side: a chunk may be
/// given when half of what may be written waits.
const MOST_WAITING: u64 = 64 * 1024 / 2 + 64 * 1024;

impl Mux {
    fn new(side: Side, budget: usize) -> Self {
        let session = Session::new(side, Config { max_streams: STREAMS, window_budget: budget });
        let (now, held, streams) = (Instant::now(), Vec::new(), BTreeMap::new());
        Self { session, now, budget, held, streams, is_over: false }
    }

    fn step(&mut self, [operation, which, a, b, c, d]: [u8; 6]) {
        let cx = &mut Context::from_waker(Waker::noop());
        let value = u16::from_be_bytes([a, b]);
        let held = self.held.get(usize::from(which) % self.held.len().max(1)).copied();
        match (operation % 12, held) {
            (0..=2, _) => self.hear_frame(which, a, u32::from(c) << (d % 32), usize::from(b)),
            (3, _) => self.hear(&[which, a, b, c, d]),
            (4, _) => {
                if let Poll::Ready(Ok(number)) = self.session.poll_open(&mut None, cx, self.now) {
                    self.hold(number);
                }
            }
            (5, _) => {
                if let Poll::Ready(Some(number)) = self.session.poll_accept(cx) {
                    self.hold(number);
                }
            }
            (6, Some(number)) => self.read(number),
            (7, Some(number)) if c % 2 == 1 => self.give(number, usize::from(value)),
            (7, Some(number)) => {
                if let Poll::Ready(Ok(taken)) =
                    self.session.poll_write(number, cx, &vec![0; usize::from(value)])
                    && taken > 0
                {
                    self.taken(number, taken);
                }
            }
            (8, Some(number)) => self.session.finish(number),
            (9, Some(number)) => {
                self.session.discard(number);
                self.held.retain(|held| *held != number);
            }
            (10, _) => self.transmit(),
            (11, _) if value == 0 => self.session.close(),
            _ => self.now += Duration::from_millis(u64::from(value)),
        }
        let _ = self.session.take_wakes();
    }

    /// Offers a chunk, which is taken whole or not at all.
    fn give(&mut self, number: u32, bytes: usize) {
        let cx = &mut Context::from_waker(Waker::noop());
        let mut chunk = Chunk::new();
        let bytes = bytes.min(chunk.room());
        chunk.spare().put_bytes(0, bytes);
        let mut chunk = Some(chunk);
        let polled = self.session.poll_give(number, cx, &mut chunk);
        match polled {
            Poll::Ready(Ok(taken)) => {
                assert!(chunk.is_none() && taken == bytes, "{taken} of {bytes} were taken");
                self.taken(number, taken);
            }
            Poll::Ready(Err(_)) | Poll::Pending => {
                assert!(chunk.is_some_and(|kept| kept.len() == bytes), "what was not taken is lost");
            }
        }
    }

    fn taken(&mut self, number: u32, bytes: usize) {
        let seen = self.streams.entry(number).or_default();
        seen.written += bytes as u64;
        let allowed = (u64::from(INITIAL) + seen.window).saturating_sub(seen.sent).min(BATCH as u64);
        assert!(seen.written - seen.sent <= allowed.max(MOST_WAITING), "more is kept than is bounded");
    }

    fn hold(&mut self, number: u32) {
        // A far side may use a number again, once both sides have forgotten it.
        assert!(!self.held.contains(&number), "stream {number} was given twice");
        self.held.push(number);
        assert!(self.held.len() <= STREAMS, "there are more streams than the maximum");
        self.streams.insert(number, Seen { window: self.window_before(number), ..Seen::default() });
    }

    /// A frame opens a window before its stream is accepted.
    fn window_before(&self, number: u32) -> u64 {
        self.streams.get(&number).map_or(0, |seen| seen.window)
    }

    /// A frame that is likely to mean something, with `delivered` 1/255ths of its body.
    fn hear_frame(&mut self, what: u8, stream: u8, length: u32, delivered: usize) {
        let kind = what % 4;
        let flags = u16::from(what >> 4);
        let mut bytes = vec![0, kind];
        bytes.extend(flags.to_be_bytes());
        bytes.extend(u32::from(stream).to_be_bytes());
        bytes.extend(length.to_be_bytes());
        if kind == 0 {
            let body = (length as usize).min(3 * INITIAL as usize);
            bytes.resize(HEADER + body * delivered / 255, 7);
        }
        self.hear(&bytes);
    }

    fn hear(&mut self, bytes: &[u8]) {
        if self.is_over {
            return;
        }
        // Whatever it means, it opens no window by more than its own length says: an upper bound is enough.
        if let Some(Ok(header)) = bytes.first_chunk::<HEADER>().map(Header::decode)
            && header.kind == Kind::WindowUpdate
        {
            self.streams.entry(header.stream).or_default().window += u64::from(header.length);
        }
        if self.session.receive(bytes, self.now).is_err() {
            self.session.end();
            self.is_over = true;
        }
    }

    fn read(&mut self, number: u32) {
        let cx = &mut Context::from_waker(Waker::noop());
        let mut segments = VecDeque::new();
        let _ = self.session.poll_read(number, cx, &mut segments, usize::MAX, self.now);
        let unread: usize = segments.iter().map(Vec::len).sum();
        assert!(unread <= INITIAL as usize + self.budget, "{unread} bytes of {number} were kept");
    }

    fn transmit(&mut self) {
        let cx = &mut Context::from_waker(Waker::noop());
        let mut batch = Batch::default();
        self.session.transmit(&mut batch, BATCH, cx, self.now);
        assert!(batch.remaining() <= BATCH + 2048 * HEADER, "{} bytes at once", batch.remaining());
        let sent = batch.copy_to_bytes(batch.remaining());
        let mut rest = &sent[..];
        while let Some((header, more)) = rest.split_first_chunk() {
            let Ok(header) = Header::decode(header) else { panic!("something was sent that is no frame") };
            rest = self.sent(&header, more);
        }
        assert!(rest.is_empty(), "a part of a header was sent");
        if self.session.is_closed() {
            self.session.end();
        }
    }

    /// Looks at a frame that was sent; returns what is behind it.
    fn sent<'a>(&mut self, header: &Header, rest: &'a [u8]) -> &'a [u8] {
        let seen = self.streams.entry(header.stream).or_default();
        match header.kind {
            Kind::Data => {
                seen.sent += u64::from(header.length);
                assert!(seen.sent <= u64::from(INITIAL) + seen.window, "a window was exceeded");
                rest.split_at(header.length as usize).1
            }
            Kind::WindowUpdate => {
                assert!(!header.flags.has(Flags::RST) || header.length == 0);
                rest
            }
            Kind::Ping | Kind::GoAway => rest,
        }
    }
}
