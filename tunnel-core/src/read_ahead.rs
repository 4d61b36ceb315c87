//! Reads more from a connection at once than its reader takes at a time. TLS takes no more than a record of 16 KiB, and on
//! a fast way most of what such a read costs is not the bytes.
//!
//! Before it is known who the far side is, it does the opposite: it bounds what may come, and shows it to whoever decides
//! whether TLS should look at it yet.

use std::{
    future::poll_fn,
    io::{self, Cursor, IoSlice},
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::Buf;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::io::poll_read_buf;

use crate::{
    proto::ends::Aborted,
    relay::{Leg, Lost},
};

/// Bytes that are read at once. Twice as many gained nothing, and half of them half as much.
pub(crate) const AHEAD: usize = 128 * 1024;
/// Whoever gets less than this, and all that was asked for, may have read a head: nothing says that there is plenty.
const PLENTY: usize = 4 * 1024;
/// Bytes that [`ReadAhead::read_more`] takes at a time: most first messages of a client fit.
const A_LITTLE: usize = 2 * 1024;

/// A connection under TLS, read ahead while there is more than TLS takes. At rest it has no buffer.
///
/// What was read ahead is given before the end of file, or the failure, that comes after it.
#[derive(Debug)]
pub struct ReadAhead<T> {
    connection: T,
    /// Read, and not taken yet.
    ahead: Cursor<Vec<u8>>,
    /// The connection had as much as it was asked for, and was not empty since.
    plenty: bool,
    /// Bytes that the connection gave, in all.
    received: u64,
    /// How many of them may come from a stranger; `None` for any number.
    allowed: Option<u64>,
}

impl<T> ReadAhead<T> {
    /// Nothing is read before it is asked for.
    pub fn new(connection: T) -> Self {
        Self { connection, ahead: Cursor::default(), plenty: false, received: 0, allowed: None }
    }

    /// As [`Self::new`], for a far side that has not shown yet who it is: of it no more than `bytes` are taken, until
    /// [`Self::trust`], and nothing is read ahead but by [`Self::read_more`]. Reading beyond that fails.
    pub fn from_stranger(connection: T, bytes: u64) -> Self {
        Self { allowed: Some(bytes), ..Self::new(connection) }
    }

    /// It is known now who the far side is.
    pub fn trust(&mut self) {
        self.allowed = None;
        if !self.ahead.has_remaining() {
            self.ahead = Cursor::default();
        }
    }

    /// What was read and not taken yet.
    pub fn ahead(&self) -> &[u8] {
        self.ahead.chunk()
    }

    /// Bytes that have come from the far side so far.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }
}

impl<T: AsyncRead + Unpin> ReadAhead<T> {
    /// Reads some more, and keeps it to be taken later. How much; 0 at the end of file. Holds no buffer while it waits.
    ///
    /// Cancel-safe.
    ///
    /// # Errors
    /// Those of the connection; and `InvalidData` when a stranger has sent all that it may.
    pub async fn read_more(&mut self) -> io::Result<usize> {
        poll_fn(|cx| {
            let mut bytes = [0; A_LITTLE];
            let mut buf = ReadBuf::new(&mut bytes);
            ready!(self.poll_read_past(cx, &mut buf))?;
            self.ahead.get_mut().extend_from_slice(buf.filled());
            Poll::Ready(Ok(buf.filled().len()))
        })
        .await
    }

    fn poll_read_past(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if let Some(allowed) = self.allowed {
            return self.poll_read_allowed(cx, buf, allowed);
        }
        let room = buf.remaining();
        ready!(Pin::new(&mut self.connection).poll_read(cx, buf))?;
        self.received += (room - buf.remaining()) as u64;
        self.plenty = room >= PLENTY && buf.remaining() == 0;
        Poll::Ready(Ok(()))
    }

    #[cold]
    fn poll_read_allowed(
        &mut self,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
        allowed: u64,
    ) -> Poll<io::Result<()>> {
        let left = usize::try_from(allowed.saturating_sub(self.received)).unwrap_or(usize::MAX);
        if left == 0 {
            let text = "more bytes came than a TLS handshake takes";
            return Poll::Ready(Err(io::Error::new(io::ErrorKind::InvalidData, text)));
        }
        let room = left.min(buf.remaining());
        let mut some = ReadBuf::new(buf.initialize_unfilled_to(room));
        ready!(Pin::new(&mut self.connection).poll_read(cx, &mut some))?;
        let read = some.filled().len();
        buf.advance(read);
        self.received += read as u64;
        Poll::Ready(Ok(()))
    }

    fn poll_read_ahead(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.ahead.set_position(0);
        let bytes = self.ahead.get_mut();
        bytes.clear();
        bytes.reserve_exact(AHEAD);
        let read = poll_read_buf(Pin::new(&mut self.connection), cx, bytes);
        if !matches!(read, Poll::Ready(Ok(1..))) {
            (self.ahead, self.plenty) = (Cursor::default(), false);
        }
        read.map_ok(|count| self.received += count as u64)
    }
}

impl<T: AsyncRead + Unpin> AsyncRead for ReadAhead<T> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if !this.ahead.has_remaining() {
            if !this.plenty || buf.remaining() >= AHEAD {
                return this.poll_read_past(cx, buf);
            }
            ready!(this.poll_read_ahead(cx))?;
        }
        let taken = this.ahead.remaining().min(buf.remaining());
        buf.put_slice(&this.ahead.chunk()[..taken]);
        this.ahead.advance(taken);
        Poll::Ready(Ok(()))
    }
}

impl<T: AsyncWrite + Unpin> AsyncWrite for ReadAhead<T> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.connection).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.connection.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.connection).poll_shutdown(cx)
    }
}

impl<T: Leg> Leg for ReadAhead<T> {
    fn arm(&mut self) {
        self.connection.arm();
    }

    fn abort(&mut self, reason: &Aborted) {
        self.connection.abort(reason);
    }

    fn finish(&mut self) {
        self.connection.finish();
    }

    fn received(&self) -> u64 {
        self.received
    }

    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Lost> {
        self.connection.poll_lost(cx)
    }

    fn vanished(&self) -> Option<io::Error> {
        self.connection.vanished()
    }
}

#[cfg(test)]
mod tests {
    use std::{future::poll_fn, io::ErrorKind};

    use futures_util::FutureExt;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    use super::*;
    use crate::proto::messages::AbortCode;

    /// What TLS takes at a time.
    const RECORD: usize = 16 * 1024;

    /// Has bytes, then nothing for the moment each time that it is empty, and fails or ends when `last` says so.
    #[derive(Default)]
    struct Source {
        bytes: Cursor<Vec<u8>>,
        last: Option<io::Result<()>>,
        /// How much was asked for, each time.
        asked: Vec<usize>,
    }

    impl Source {
        fn with(bytes: usize) -> Self {
            Self { bytes: Cursor::new(pattern(bytes)), ..Self::default() }
        }
    }

    impl AsyncRead for Source {
        fn poll_read(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            buf: &mut ReadBuf<'_>,
        ) -> Poll<io::Result<()>> {
            self.asked.push(buf.remaining());
            if !self.bytes.has_remaining() {
                return self.last.take().map_or(Poll::Pending, Poll::Ready);
            }
            let taken = self.bytes.remaining().min(buf.remaining());
            buf.put_slice(&self.bytes.chunk()[..taken]);
            self.bytes.advance(taken);
            Poll::Ready(Ok(()))
        }
    }

    fn pattern(bytes: usize) -> Vec<u8> {
        (0..bytes).map(|place| u8::try_from(place % 251).unwrap()).collect()
    }

    /// Reads as much at a time until there is nothing for the moment, or for good.
    fn drain(from: &mut ReadAhead<Source>, at_a_time: usize) -> (Vec<u8>, Option<io::Result<()>>) {
        let (mut all, mut some) = (Vec::new(), vec![0; at_a_time]);
        loop {
            match from.read(&mut some).now_or_never() {
                None => return (all, None),
                Some(Ok(0)) => return (all, Some(Ok(()))),
                Some(Ok(count)) => all.extend_from_slice(&some[..count]),
                Some(Err(error)) => return (all, Some(Err(error))),
            }
        }
    }

    #[test]
    fn a_connection_with_plenty_is_asked_seldom_and_one_at_rest_has_no_buffer() {
        let mut reader = ReadAhead::new(Source::with(1 << 20));
        assert_eq!(drain(&mut reader, RECORD).0, pattern(1 << 20));
        // A record, eight times all that is read ahead, and what told that it is empty.
        let asked = &reader.connection.asked;
        assert!(asked.len() <= 10 && asked[0] == RECORD && asked[1] >= AHEAD, "{asked:?}");
        assert_eq!(reader.ahead.get_ref().capacity(), 0);
        assert_eq!(reader.received(), 1 << 20);

        reader.connection = Source::with(100);
        assert_eq!(drain(&mut reader, RECORD).0, pattern(100));
        assert_eq!(reader.received(), (1 << 20) + 100);
        assert!(reader.connection.asked.iter().all(|asked| *asked == RECORD));
    }

    #[test]
    fn who_takes_much_or_very_little_at_a_time_gets_it_from_the_connection() {
        for at_a_time in [AHEAD, PLENTY - 1] {
            let mut reader = ReadAhead::new(Source::with(1 << 20));
            assert_eq!(drain(&mut reader, at_a_time).0, pattern(1 << 20));
            assert!(reader.connection.asked.iter().all(|asked| *asked == at_a_time), "{at_a_time}");
        }
    }

    #[test]
    fn of_a_stranger_so_much_is_taken_and_no_more_until_it_is_trusted() {
        let mut reader = ReadAhead::from_stranger(Source::with(100_000), 40_000);
        assert_eq!(reader.read_more().now_or_never().unwrap().unwrap(), A_LITTLE);
        assert_eq!(reader.read_more().now_or_never().unwrap().unwrap(), A_LITTLE);
        assert_eq!(reader.ahead(), &pattern(2 * A_LITTLE));
        // However much there is, nothing more than was asked for is read.
        let (bytes, end) = drain(&mut reader, RECORD);
        assert_eq!(bytes, pattern(40_000));
        assert_eq!(end.unwrap().unwrap_err().kind(), ErrorKind::InvalidData);
        assert_eq!(reader.connection.bytes.position(), 40_000);
        let again = reader.read_more().now_or_never().unwrap();
        assert_eq!(again.unwrap_err().kind(), ErrorKind::InvalidData);
        reader.trust();
        assert_eq!(reader.ahead.get_ref().capacity(), 0);
        assert_eq!(drain(&mut reader, RECORD).0, pattern(100_000)[40_000..]);
    }

    #[test]
    fn what_a_stranger_sent_is_not_lost_when_it_is_trusted() {
        let mut reader = ReadAhead::from_stranger(Source::with(100), 1000);
        reader.connection.last = Some(Ok(()));
        assert_eq!(reader.read_more().now_or_never().unwrap().unwrap(), 100);
        assert_eq!(reader.read_more().now_or_never().unwrap().unwrap(), 0);
        reader.trust();
        assert_eq!(drain(&mut reader, RECORD).0, pattern(100));
    }

    /// Notes what it was told.
    #[derive(Default)]
    struct Notes(Vec<&'static str>);

    impl AsyncRead for Notes {
        fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
            Poll::Pending
        }
    }

    impl AsyncWrite for Notes {
        fn poll_write(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            bytes: &[u8],
        ) -> Poll<io::Result<usize>> {
            self.0.push("write");
            Poll::Ready(Ok(bytes.len()))
        }

        fn poll_write_vectored(
            mut self: Pin<&mut Self>,
            _: &mut Context<'_>,
            pieces: &[IoSlice<'_>],
        ) -> Poll<io::Result<usize>> {
            self.0.push("write vectored");
            Poll::Ready(Ok(pieces.iter().map(|piece| piece.len()).sum()))
        }

        fn is_write_vectored(&self) -> bool {
            true
        }

        fn poll_flush(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.0.push("flush");
            Poll::Ready(Ok(()))
        }

        fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
            self.0.push("shutdown");
            Poll::Ready(Ok(()))
        }
    }

    impl Leg for Notes {
        fn arm(&mut self) {
            self.0.push("arm");
        }

        fn abort(&mut self, _: &Aborted) {
            self.0.push("abort");
        }

        fn finish(&mut self) {
            self.0.push("finish");
        }

        fn poll_lost(&mut self, _: &mut Context<'_>) -> Poll<Lost> {
            Poll::Ready(Lost::Left)
        }

        fn vanished(&self) -> Option<io::Error> {
            Some(ErrorKind::TimedOut.into())
        }
    }

    #[test]
    fn all_but_reading_is_the_connection_s() {
        let mut leg = ReadAhead::new(Notes::default());
        leg.arm();
        leg.write(b"x").now_or_never().unwrap().unwrap();
        assert!(leg.is_write_vectored());
        leg.write_vectored(&[IoSlice::new(b"x")]).now_or_never().unwrap().unwrap();
        leg.flush().now_or_never().unwrap().unwrap();
        leg.shutdown().now_or_never().unwrap().unwrap();
        assert!(matches!(poll_fn(|cx| leg.poll_lost(cx)).now_or_never(), Some(Lost::Left)));
        assert_eq!(leg.vanished().unwrap().kind(), ErrorKind::TimedOut);
        leg.finish();
        leg.abort(&Aborted::new(AbortCode::Reset, "gone"));
        let told = ["arm", "write", "write vectored", "flush", "shutdown", "finish", "abort"];
        assert_eq!(leg.connection.0, told);
    }

    #[test]
    fn what_was_read_ahead_comes_before_the_end_and_before_a_failure() {
        let reset = || Err(io::Error::from(ErrorKind::ConnectionReset));
        for (last, fails) in [(Ok(()), false), (reset(), true)] {
            let mut reader = ReadAhead::new(Source::with(5 * RECORD + 7));
            reader.connection.last = Some(last);
            let (bytes, end) = drain(&mut reader, RECORD);
            assert_eq!(bytes, pattern(5 * RECORD + 7));
            assert_eq!(end.unwrap().is_err(), fails);
            assert_eq!(reader.ahead.get_ref().capacity(), 0);
        }
    }
}
