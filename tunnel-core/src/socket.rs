//! A TCP socket that carries a link or the bytes of a stream, at whichever end: its options, and how it fails.

use std::{
    io::{self, IoSlice},
    net::SocketAddr,
    ops::RangeInclusive,
    os::fd::{AsFd, BorrowedFd},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    net::TcpStream,
    time::Instant,
};

use crate::{pace::Pace, proto::ends::Aborted, relay::Leg};

/// A silent connection is probed after this time, then at this interval, and is dead after that many probes.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(10), 3);
/// Bytes that the kernel takes beyond those under way, by the connection's pace. More would stand in line before what turns
/// out to be urgent later.
const NOT_SENT: RangeInclusive<usize> = 128 * 1024..=1024 * 1024;
/// Whoever writes less than this in all does not wait for the kernel anyway.
const LITTLE: usize = 64 * 1024;

/// A TCP connection with the options that links and streams need.
///
/// None of them is needed for the bytes to be right, so a socket that will not have them, which may be gone already, is
/// used all the same.
#[derive(Debug)]
pub struct Socket {
    stream: TcpStream,
    written: usize,
    pace: Pace,
    /// What the kernel was told last of [`NOT_SENT`].
    not_sent: usize,
}

impl Socket {
    /// Sets the options.
    pub fn new(stream: TcpStream) -> Self {
        let socket = SockRef::from(&stream);
        let (idle, interval, probes) = KEEPALIVE;
        let keepalive = TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(probes);
        let _ = socket.set_tcp_nodelay(true);
        let _ = socket.set_tcp_keepalive(&keepalive);
        Self { stream, written: 0, pace: Pace::new(Instant::now().into_std()), not_sent: 0 }
    }

    /// The address of the far end.
    ///
    /// # Errors
    /// If the connection is gone.
    pub fn peer_addr(&self) -> io::Result<SocketAddr> {
        self.stream.peer_addr()
    }

    fn wrote(&mut self, bytes: usize) {
        self.written = self.written.saturating_add(bytes);
        if self.written < LITTLE {
            return;
        }
        self.pace.note(bytes);
        let line = self.pace.line(NOT_SENT, Instant::now().into_std());
        // To a power of two: the kernel need not hear of every change.
        let line = 1 << line.ilog2();
        if line != self.not_sent {
            self.not_sent = line;
            #[cfg(target_os = "linux")]
            let _ =
                SockRef::from(&self.stream).set_tcp_notsent_lowat(u32::try_from(line).unwrap_or(u32::MAX));
        }
    }
}

impl AsFd for Socket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

impl AsyncRead for Socket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for Socket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write(cx, bytes))?;
        self.wrote(written);
        Poll::Ready(Ok(written))
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = ready!(Pin::new(&mut self.stream).poll_write_vectored(cx, pieces))?;
        self.wrote(written);
        Poll::Ready(Ok(written))
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Leg for Socket {
    /// With a linger time of zero, closing sends RST and drops what is queued. The kernel closes the sockets of a
    /// killed process too, and would make a clean FIN of it.
    fn arm(&mut self) {
        // Failure means that the connection is gone already.
        let _ = self.stream.set_zero_linger();
    }

    fn abort(&mut self, _: &Aborted) {
        self.arm();
    }

    fn finish(&mut self) {
        let _ = SockRef::from(&self.stream).set_linger(None);
    }

    fn failure(&self) -> Option<io::Error> {
        self.stream.take_error().ok().flatten()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncWriteExt, copy, sink},
        net::TcpListener,
        time::advance,
    };

    async fn pair() -> (Socket, TcpStream) {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
        (Socket::new(near.unwrap()), far.unwrap().0)
    }

    #[tokio::test]
    async fn a_far_end_that_vanishes_is_noticed_and_small_writes_leave_at_once() {
        let (near, _far) = pair().await;
        let socket = SockRef::from(&near);
        assert!(socket.tcp_nodelay().unwrap() && socket.keepalive().unwrap());
        assert_eq!(socket.tcp_keepalive_time().unwrap(), KEEPALIVE.0);
    }

    #[cfg(target_os = "linux")]
    #[tokio::test(start_paused = true)]
    async fn the_kernel_takes_more_beyond_what_is_under_way_of_a_fast_connection_than_of_a_slow_one() {
        let (mut near, mut far) = pair().await;
        let reader = tokio::spawn(async move { copy(&mut far, &mut sink()).await.unwrap() });
        let not_sent = |near: &Socket| SockRef::from(near).tcp_notsent_lowat().unwrap() as usize;
        let unlimited = not_sent(&near);
        near.write_all(&vec![0; LITTLE - 1]).await.unwrap();
        assert_eq!(not_sent(&near), unlimited);
        near.write_all(&[0]).await.unwrap();
        assert_eq!(not_sent(&near), *NOT_SENT.start());

        let mut bytes = LITTLE;
        for (milliseconds, mebibytes, kibibytes) in [(20, 4, 256), (20, 20, 1024), (1000, 4, 128)] {
            let all = vec![0; (mebibytes << 20) - 1];
            let mut left = &all[..];
            while !left.is_empty() {
                let written = near.write_vectored(&[IoSlice::new(left)]).await.unwrap();
                left = &left[written..];
            }
            advance(Duration::from_millis(milliseconds)).await;
            assert_eq!(near.write_vectored(&[IoSlice::new(&[0])]).await.unwrap(), 1);
            assert_eq!(not_sent(&near), kibibytes << 10, "{mebibytes} MiB in {milliseconds} ms");
            bytes += mebibytes << 20;
        }
        near.shutdown().await.unwrap();
        assert_eq!(reader.await.unwrap(), bytes as u64);
    }
}
