//! Looks at the frames that pass between `h2` and its connection, without touching them, for what `h2` does not tell:
//! which streams it has reset by itself. It bounds these per connection's life, which ends a connection that is old
//! enough, so that bound is off, and [`Allowance`] is charged for them instead.
//!
//! What such resets cost is bounded here too: while nothing can be written, they wait in memory, and only so many frames
//! are read. And here it is seen whether the client lives ([`Life`]), which does not depend on whole frames. Used by
//! `http2` alone.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker, ready},
};

use h2::Reason;
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Sleep, sleep},
};

use tunnel_core::Leg;

use super::{PREFACE, allowance::Allowance};
use crate::listener::{FAREWELL, poll_hear_out};

/// Frames that are read before the next write. Each may need an answer.
const READ_BEFORE_WRITE: usize = 4096;
/// Length, type, flags and stream (RFC 9113, section 4.1).
const HEAD: usize = 9;
/// The type of `RST_STREAM`, and the length of the error code that is all of it.
const RST_STREAM: u8 = 3;
const CODE: usize = 4;
/// Resets that are not the client's fault: this gateway's own, and `h2`'s answer to what comes late on a stream that was
/// reset so long ago that it is forgotten. By every other, `h2` says that the client did what it must not.
const NOT_THE_CLIENTS: [Reason; 5] =
    [Reason::NO_ERROR, Reason::CANCEL, Reason::INTERNAL_ERROR, Reason::CONNECT_ERROR, Reason::STREAM_CLOSED];

/// Counts signs of life of a client: bytes that have come, below TLS too, and room for more of ours where there was none,
/// which it makes by taking what was sent. On a slow way, its answer to a probe has to wait for both.
#[derive(Debug, Default)]
pub(super) struct Life(AtomicU64);

impl Life {
    pub(super) fn signs(&self) -> u64 {
        self.0.load(Relaxed)
    }

    /// For one task at a time.
    fn note(&self) {
        self.0.store(self.0.load(Relaxed).wrapping_add(1), Relaxed);
    }
}

/// A connection whose frames are looked at.
pub(super) struct Watched<C> {
    conn: C,
    life: Arc<Life>,
    /// What had come when that was last looked at, below TLS.
    below: u64,
    received: Frames,
    sent: Frames,
    allowance: Arc<Allowance>,
    /// Frames received since something was written last.
    unanswered: usize,
    /// The last write had to wait.
    blocked: bool,
    /// Who waits for it, to read on.
    reader: Option<Waker>,
    /// Runs once the client was told that no more bytes come: until then it is heard.
    farewell: Option<Pin<Box<Sleep>>>,
    /// Bytes that came since then.
    unread: usize,
}

impl<C> Watched<C> {
    pub(super) fn new(conn: C, allowance: Arc<Allowance>, life: Arc<Life>) -> Self {
        Self {
            conn,
            life,
            below: 0,
            received: Frames { skip: PREFACE.len(), ..Frames::default() },
            sent: Frames::default(),
            allowance,
            unanswered: 0,
            blocked: false,
            reader: None,
            farewell: None,
            unread: 0,
        }
    }

    fn wrote(&mut self, bytes: &[u8]) {
        let mut bytes = bytes;
        while let Some(frame) = self.sent.next(&mut bytes) {
            if frame.reset.is_some_and(|code| !NOT_THE_CLIENTS.contains(&code)) {
                self.allowance.charge();
            }
        }
    }

    /// What a write or a flush came to.
    fn settle<T>(&mut self, polled: Poll<T>) -> Poll<T> {
        let was_blocked = std::mem::replace(&mut self.blocked, polled.is_pending());
        if !self.blocked {
            if was_blocked {
                self.life.note();
            }
            self.unanswered = 0;
            if let Some(reader) = self.reader.take() {
                reader.wake();
            }
        }
        polled
    }
}

impl<C: Leg> AsyncRead for Watched<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.unanswered >= READ_BEFORE_WRITE {
            if this.blocked {
                this.reader = Some(cx.waker().clone());
            } else {
                // `h2` writes only when there is nothing more to read.
                this.unanswered = 0;
                cx.waker().wake_by_ref();
            }
            return Poll::Pending;
        }
        let before = buf.filled().len();
        let read = Pin::new(&mut this.conn).poll_read(cx, buf);
        let below = this.conn.received();
        if buf.filled().len() > before || below != this.below {
            this.below = below;
            this.life.note();
        }
        ready!(read)?;
        let mut bytes = &buf.filled()[before..];
        while this.received.next(&mut bytes).is_some() {
            this.unanswered += 1;
        }
        Poll::Ready(Ok(()))
    }
}

impl<C: Leg> AsyncWrite for Watched<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = Pin::new(&mut this.conn).poll_write(cx, bytes);
        let written = ready!(this.settle(written))?;
        this.wrote(&bytes[..written]);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        let written = Pin::new(&mut this.conn).poll_write_vectored(cx, pieces);
        let written = ready!(this.settle(written))?;
        let mut left = written;
        for piece in pieces {
            let of_piece = left.min(piece.len());
            this.wrote(&piece[..of_piece]);
            left -= of_piece;
        }
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.conn.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.conn).poll_flush(cx);
        self.settle(flushed)
    }

    /// Tells the client that no more bytes come, and hears it out for a bounded time: `h2` has no other end than this.
    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.farewell.is_none() {
            ready!(Pin::new(&mut this.conn).poll_shutdown(cx))?;
        }
        let due = this.farewell.get_or_insert_with(|| Box::pin(sleep(FAREWELL)));
        if due.as_mut().poll(cx).is_pending() {
            ready!(poll_hear_out(&mut this.conn, cx, &mut this.unread));
        }
        Poll::Ready(Ok(()))
    }
}

/// Finds where frames begin in the bytes of one direction, in whatever pieces these come.
#[derive(Debug, Default)]
struct Frames {
    /// The first bytes of a frame that has begun.
    begun: [u8; HEAD + CODE],
    have: usize,
    /// Bytes until the next one begins.
    skip: usize,
}

/// A frame, as far as it matters.
#[derive(Debug, PartialEq, Eq)]
struct Frame {
    /// The error code, if it is a reset.
    reset: Option<Reason>,
}

impl Frames {
    /// The next frame of which enough is known, taken off `bytes`; `None` once they are used up.
    fn next(&mut self, bytes: &mut &[u8]) -> Option<Frame> {
        let skipped = self.skip.min(bytes.len());
        self.skip -= skipped;
        *bytes = &bytes[skipped..];
        loop {
            let missing = self.wanted() - self.have;
            if missing == 0 {
                return Some(self.complete());
            }
            let taken = missing.min(bytes.len());
            if taken == 0 {
                return None;
            }
            self.begun[self.have..self.have + taken].copy_from_slice(&bytes[..taken]);
            self.have += taken;
            *bytes = &bytes[taken..];
        }
    }

    /// How many of its first bytes must be known.
    fn wanted(&self) -> usize {
        let is_reset = self.have >= HEAD && self.begun[3] == RST_STREAM && self.length() == CODE;
        if is_reset { HEAD + CODE } else { HEAD }
    }

    fn length(&self) -> usize {
        let [a, b, c, ..] = self.begun;
        usize::from(a) << 16 | usize::from(b) << 8 | usize::from(c)
    }

    fn complete(&mut self) -> Frame {
        let [.., a, b, c, d] = self.begun;
        let reset = (self.have > HEAD).then(|| Reason::from(u32::from_be_bytes([a, b, c, d])));
        self.skip = self.length() - (self.have - HEAD);
        self.have = 0;
        Frame { reset }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, DuplexStream},
        task::JoinHandle,
        time::Instant,
    };

    use super::*;
    use crate::{listener::FAREWELL_BYTES, testing::TestLeg};

    fn frame(kind: u8, body: &[u8]) -> Vec<u8> {
        let mut frame = u32::try_from(body.len()).unwrap().to_be_bytes()[1..].to_vec();
        frame.extend([kind, 0, 0, 0, 0, 1]);
        frame.extend_from_slice(body);
        frame
    }

    fn reset(reason: Reason) -> Vec<u8> {
        frame(RST_STREAM, &u32::from(reason).to_be_bytes())
    }

    #[test]
    fn frames_are_found_in_pieces_of_any_length() {
        let frames = [
            frame(0, &[RST_STREAM; 300]),
            reset(Reason::CANCEL),
            frame(6, b"12345678"),
            frame(0, b""),
            frame(RST_STREAM, b"of a length that it must not have"),
            reset(Reason::PROTOCOL_ERROR),
            frame(0, &vec![0; 70_000]),
            reset(Reason::STREAM_CLOSED),
        ];
        let none = Frame { reset: None };
        let of = |reason| Frame { reset: Some(reason) };
        let expected = [
            &none,
            &of(Reason::CANCEL),
            &none,
            &none,
            &none,
            &of(Reason::PROTOCOL_ERROR),
            &none,
            &of(Reason::STREAM_CLOSED),
        ];
        let all = frames.concat();
        for length in [1, 2, 8, 9, 10, 12, 13, 14, 309, 4096, all.len()] {
            let (mut reader, mut found) = (Frames::default(), Vec::new());
            for mut piece in all.chunks(length) {
                while let Some(frame) = reader.next(&mut piece) {
                    found.push(frame);
                }
                assert!(piece.is_empty());
            }
            assert_eq!(found.iter().collect::<Vec<_>>(), expected, "in pieces of {length}");
        }
    }

    #[tokio::test(start_paused = true)]
    async fn only_resets_that_are_the_clients_fault_are_charged() {
        let allowance = Arc::new(Allowance::new(1));
        let (near, mut far) = TestLeg::pair_with(1 << 20);
        let mut conn = Watched::new(near, allowance.clone(), Arc::default());
        let burst = Allowance::burst(1);
        let exceeded = async |allowance: &Allowance| {
            tokio::time::timeout(Duration::from_millis(1), allowance.exceeded()).await.is_ok()
        };
        for reason in NOT_THE_CLIENTS {
            conn.write_all(&reset(reason).repeat(burst + 1)).await.unwrap();
        }
        assert!(!exceeded(&allowance).await);
        let faults = [Reason::PROTOCOL_ERROR, Reason::FLOW_CONTROL_ERROR, Reason::REFUSED_STREAM];
        let faults: Vec<u8> = faults.into_iter().flat_map(reset).collect();
        conn.write_all(&faults.repeat(burst / 3)).await.unwrap();
        assert!(!exceeded(&allowance).await);
        // Written as pieces, which may lie across frames.
        let more = faults.repeat(4);
        let pieces = [IoSlice::new(&more[..20]), IoSlice::new(&more[20..21]), IoSlice::new(&more[21..])];
        assert_eq!(conn.write_vectored(&pieces).await.unwrap(), more.len());
        assert!(exceeded(&allowance).await);
        drop(conn);
        let mut all = Vec::new();
        far.read_to_end(&mut all).await.unwrap();
        assert_eq!(all.len(), (NOT_THE_CLIENTS.len() * (burst + 1) + burst / 3 * 3 + 12) * (HEAD + CODE));
    }

    #[tokio::test]
    async fn a_client_that_does_not_read_is_not_read_for_ever() {
        let (near, mut far) = TestLeg::pair_with(HEAD + CODE);
        let mut conn = Watched::new(near, Arc::new(Allowance::new(1)), Arc::default());
        // What is written first is no frame.
        far.write_all(&PREFACE[..4]).await.unwrap();
        let talking = tokio::spawn(async move {
            far.write_all(&PREFACE[4..]).await.unwrap();
            for _ in 0..READ_BEFORE_WRITE + 100 {
                far.write_all(&frame(0, b"")).await.unwrap();
            }
            far
        });
        // It is read on while nothing has to be written, and while it can be.
        let (mut read, mut buf) = (0, [0; HEAD]);
        while read < PREFACE.len() {
            read += conn.read(&mut buf[..1]).await.unwrap();
        }
        for _ in 0..50 {
            conn.read_exact(&mut buf).await.unwrap();
        }
        conn.write_all(&reset(Reason::CANCEL)).await.unwrap();
        let blocked = |conn: &mut Watched<_>| {
            let mut cx = Context::from_waker(Waker::noop());
            Pin::new(conn).poll_write(&mut cx, &reset(Reason::CANCEL)).is_pending()
        };
        assert!(blocked(&mut conn));
        for _ in 0..READ_BEFORE_WRITE {
            conn.read_exact(&mut buf).await.unwrap();
        }
        let reading = tokio::spawn(async move {
            conn.read_exact(&mut buf).await.unwrap();
            conn
        });
        for _ in 0..100 {
            tokio::task::yield_now().await;
        }
        assert!(!reading.is_finished() && !talking.is_finished());
        talking.abort();
        reading.abort();
    }

    /// A connection that is being closed, and its client.
    fn closing() -> (JoinHandle<io::Result<()>>, DuplexStream) {
        let (near, far) = TestLeg::pair();
        let mut conn = Watched::new(near, Arc::new(Allowance::new(1)), Arc::default());
        (tokio::spawn(async move { conn.shutdown().await }), far)
    }

    #[tokio::test(start_paused = true)]
    async fn a_connection_that_is_closed_is_read_until_its_client_ends() {
        let (closed, mut client) = closing();
        assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
        for _ in 0..9 {
            client.write_all(&frame(6, b"12345678")).await.unwrap();
            sleep(FAREWELL / 10).await;
            assert!(!closed.is_finished());
        }
        client.shutdown().await.unwrap();
        let ended = Instant::now();
        closed.await.unwrap().unwrap();
        assert_eq!(ended.elapsed(), Duration::ZERO);
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_that_does_not_end_is_heard_for_a_bounded_time_and_a_bounded_number_of_bytes() {
        let (closed, client) = closing();
        let begun = Instant::now();
        closed.await.unwrap().unwrap();
        assert!((FAREWELL..FAREWELL * 2).contains(&begun.elapsed()), "{:?}", begun.elapsed());
        drop(client);

        let (closed, mut client) = closing();
        let (begun, mut sent) = (Instant::now(), 0);
        while !closed.is_finished() {
            client.write_all(&[0; 1024]).await.unwrap();
            sent += 1024;
            tokio::task::yield_now().await;
        }
        assert!((FAREWELL_BYTES..=FAREWELL_BYTES + 128 * 1024).contains(&sent), "{sent}");
        assert!(begun.elapsed() < FAREWELL);
    }
}
