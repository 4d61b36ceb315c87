//! Reads more from a connection at once than its reader takes at a time. TLS takes no more than a record of 16 KiB, and on
//! a fast way most of what such a read costs is not the bytes.

use std::{
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
}

impl<T> ReadAhead<T> {
    /// Nothing is read before it is asked for.
    pub fn new(connection: T) -> Self {
        Self { connection, ahead: Cursor::default(), plenty: false, received: 0 }
    }

    /// Bytes that have come from the far side so far.
    pub(crate) fn received(&self) -> u64 {
        self.received
    }
}

impl<T: AsyncRead + Unpin> ReadAhead<T> {
    fn poll_read_past(&mut self, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let room = buf.remaining();
        ready!(Pin::new(&mut self.connection).poll_read(cx, buf))?;
        self.received += (room - buf.remaining()) as u64;
        self.plenty = room >= PLENTY && buf.remaining() == 0;
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
