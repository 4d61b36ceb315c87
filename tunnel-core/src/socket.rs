//! The sockets that carry a link or the bytes of a stream, at whichever end: TCP with its options and a Unix socket, and
//! how each of them fails.
//!
//! A socket that nobody reads is watched by a second descriptor, since tokio tells each news of a descriptor only once: who
//! has read the end of file learns of nothing behind it. It is made when it is first needed, which is for few streams.

use std::{
    fmt,
    io::{self, IoSlice},
    net::SocketAddr,
    ops::RangeInclusive,
    os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd},
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use futures_util::future::BoxFuture;
use socket2::{SockRef, TcpKeepalive};
use tokio::{
    io::{AsyncRead, AsyncWrite, Interest, ReadBuf},
    net::{TcpStream, UnixStream},
    time::Instant,
};

use crate::{
    pace::Pace,
    proto::ends::Aborted,
    relay::{Leg, Lost},
};

/// A connection at rest is probed after this time, then at this interval, and is dead after that many probes: in 30 seconds.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(15), Duration::from_secs(5), 3);
/// A far side that owes an answer and has given none for so long is dead. A relay asks often enough to know it in 30 seconds.
const UNANSWERED: Duration = Duration::from_secs(25);
/// Probes of a closed window that have left. Of three, two had their time to be answered.
const PROBES: u8 = 3;
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
    watch: Watch,
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
        Self {
            stream,
            watch: Watch::default(),
            written: 0,
            pace: Pace::new(Instant::now().into_std()),
            not_sent: 0,
        }
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

    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Lost> {
        let stream = &self.stream;
        self.watch.poll(cx, || Ok(tcp_fails(TcpStream::from_std(second(stream)?)?)))
    }

    fn vanished(&self) -> Option<io::Error> {
        let answers = Answers::of(&self.stream)?;
        answers.are_missing().then(|| {
            let text = format!("the far side has acknowledged nothing for {} s", answers.last.as_secs());
            io::Error::new(io::ErrorKind::TimedOut, text)
        })
    }
}

/// What the kernel knows of a far side that has something to acknowledge.
///
/// The kernel by itself gives up after a quarter of an hour. `TCP_USER_TIMEOUT` is no help: it also ends a connection whose
/// far side is alive and does not read.
#[derive(Clone, Copy, Debug)]
struct Answers {
    /// Since the last one came.
    last: Duration,
    /// Segments that are under way, the end of the connection among them.
    unacknowledged: u32,
    /// How long the kernel waits for an answer to these before it sends them again. Doubles each time.
    again_after: Duration,
    /// Probes of a closed window that were sent since the last answer.
    probes: u8,
}

impl Answers {
    /// `None` where the system does not tell.
    #[cfg(target_os = "linux")]
    fn of(stream: &TcpStream) -> Option<Self> {
        // `struct tcp_info`, up to the age of the last acknowledgement. Longer since, but never changed.
        let mut info = [0_u32; 15];
        let (level, option) = (uapi::c::IPPROTO_TCP, uapi::c::TCP_INFO);
        let length = uapi::getsockopt(stream.as_raw_fd(), level, option, &mut info).ok()?;
        let [first, _, again_after, _, _, _, unacknowledged, .., last] = info;
        let [_state, _congestion, _retransmits, probes] = first.to_ne_bytes();
        (length >= size_of_val(&info)).then(|| Self {
            last: Duration::from_millis(last.into()),
            unacknowledged,
            again_after: Duration::from_micros(again_after.into()),
            probes,
        })
    }

    #[cfg(not(target_os = "linux"))]
    fn of(_: &TcpStream) -> Option<Self> {
        None
    }

    /// Whether the far side can be alive no more. One that does not read acknowledges all that fits, and each probe; what it
    /// had to drop is sent again, seldom after a while, and acknowledged as dropped.
    fn are_missing(&self) -> bool {
        let owes = self.probes >= PROBES || (self.unacknowledged > 0 && self.last > self.again_after);
        owes && self.last >= UNANSWERED
    }
}

/// A Unix socket as a leg of a relay.
///
/// It has no reset: after an abort its peer sees an end of file. Where that matters, use HTTP/2 on it, or TLS within.
#[derive(Debug)]
pub struct UnixSocket {
    stream: UnixStream,
    watch: Watch,
    /// This side has ended its direction.
    shut: bool,
}

impl UnixSocket {
    /// Takes a connection.
    pub fn new(stream: UnixStream) -> Self {
        Self { stream, watch: Watch::default(), shut: false }
    }
}

impl AsyncRead for UnixSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for UnixSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.shut = true;
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

impl Leg for UnixSocket {
    fn abort(&mut self, _: &Aborted) {}

    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Lost> {
        // Once both sides have ended their directions, the socket looks as if the far side had closed it.
        if self.shut {
            return Poll::Pending;
        }
        let stream = &self.stream;
        self.watch.poll(cx, || Ok(unix_closes(UnixStream::from_std(second(stream)?)?)))
    }

    /// The kernel tells at once.
    fn vanished(&self) -> Option<io::Error> {
        None
    }
}

/// Waits for news of a socket by a second descriptor of it.
#[derive(Default)]
enum Watch {
    #[default]
    NotNeeded,
    Waits(BoxFuture<'static, Lost>),
    Left,
}

impl Watch {
    fn poll<F>(&mut self, cx: &mut Context<'_>, begin: impl FnOnce() -> io::Result<F>) -> Poll<Lost>
    where
        F: Future<Output = Lost> + Send + 'static,
    {
        if let Self::NotNeeded = self {
            // Without a free descriptor it is tried again when the relay asks again.
            let Ok(waiting) = begin() else { return Poll::Pending };
            *self = Self::Waits(Box::pin(waiting));
        }
        let Self::Waits(waiting) = self else { return Poll::Ready(Lost::Left) };
        let lost = ready!(waiting.as_mut().poll(cx));
        *self = Self::Left;
        Poll::Ready(lost)
    }
}

impl fmt::Debug for Watch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::NotNeeded => "NotNeeded",
            Self::Waits(_) => "Waits",
            Self::Left => "Left",
        })
    }
}

fn second<S: From<OwnedFd>>(socket: &impl AsFd) -> io::Result<S> {
    Ok(socket.as_fd().try_clone_to_owned()?.into())
}

/// Waits until a connection has failed.
async fn tcp_fails(stream: TcpStream) -> Lost {
    let error = || stream.take_error()?.ok_or_else(|| io::ErrorKind::WouldBlock.into());
    Lost::Failed(match stream.async_io(Interest::ERROR, error).await {
        // A reset behind an end of file has this name, which is meant for writers.
        Ok(error) if error.kind() == io::ErrorKind::BrokenPipe => io::ErrorKind::ConnectionReset.into(),
        Ok(error) | Err(error) => error,
    })
}

/// Waits until the far side has closed a connection, and not only its own direction. The kernel reports both directions
/// as closed then, which tokio tells as one kind of readiness to write.
async fn unix_closes(stream: UnixStream) -> Lost {
    loop {
        let ready = match stream.ready(Interest::WRITABLE | Interest::ERROR).await {
            Ok(ready) => ready,
            Err(error) => return Lost::Failed(error),
        };
        if let Ok(Some(error)) = stream.take_error() {
            return Lost::Failed(error);
        }
        if ready.is_write_closed() {
            return Lost::Left;
        }
        // Only for this descriptor it is forgotten that there is room to write. One interest at a time: of several in
        // one call, tokio forgets none.
        for told in [Interest::WRITABLE, Interest::ERROR] {
            let _ = stream.try_io(told, || Err::<(), _>(io::ErrorKind::WouldBlock.into()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use tokio::{
        io::{AsyncReadExt, AsyncWriteExt, copy, sink},
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

    #[test]
    fn only_who_owes_an_answer_for_long_has_vanished() {
        let second = Duration::from_secs(1);
        let answers = |last: u32, unacknowledged, again_after: u32, probes| Answers {
            last: second * last,
            unacknowledged,
            again_after: second * again_after,
            probes,
        };
        for dead in
            [answers(25, 1, 24, 0), answers(121, 1, 120, 0), answers(25, 0, 0, 3), answers(200, 1, 300, 4)]
        {
            assert!(dead.are_missing(), "{dead:?}");
        }
        for alive in [
            // At rest, the kernel's keepalive tells.
            answers(1000, 0, 1, 0),
            answers(24, 1, 1, 0),
            answers(24, 0, 1, 3),
            // One probe may have been lost, and the next is under way.
            answers(121, 0, 1, 2),
            // Its window is closed, and it has dropped what it is sent again every two minutes.
            answers(120, 1, 120, 0),
        ] {
            assert!(!alive.are_missing(), "{alive:?}");
        }
    }

    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn the_kernel_says_what_is_not_acknowledged_and_since_when() {
        let (mut near, far) = pair().await;
        near.write_all(b"x").await.unwrap();
        tokio::time::sleep(Duration::from_millis(200)).await;
        let answers = Answers::of(&near.stream).unwrap();
        assert_eq!((answers.unacknowledged, answers.probes), (0, 0));
        let age = Duration::from_millis(150)..Duration::from_secs(5);
        assert!(age.contains(&answers.last), "{answers:?}");
        let waits = Duration::from_millis(200)..Duration::from_secs(1);
        assert!(waits.contains(&answers.again_after), "{answers:?}");
        assert!(near.vanished().is_none());
        drop(far);
    }

    /// Stops reading for so long while as much as possible is sent to it, then reads all.
    async fn stopped_reader(pause: Duration) {
        const BYTES: usize = 64 << 20;
        let (mut near, mut far) = pair().await;
        let reading = tokio::spawn(async move {
            tokio::time::sleep(pause).await;
            let mut sum = 0_u64;
            let mut piece = vec![0; 1 << 16];
            loop {
                match far.read(&mut piece).await.unwrap() {
                    0 => return sum,
                    read => sum += piece[..read].iter().map(|byte| u64::from(*byte)).sum::<u64>(),
                }
            }
        });
        let bytes: Vec<u8> = (0..=u8::MAX).cycle().take(BYTES).collect();
        let mut left = &bytes[..];
        while !left.is_empty() {
            // As often as a relay asks, and between.
            match tokio::time::timeout(Duration::from_millis(700), near.write(left)).await {
                Ok(written) => left = &left[written.unwrap()..],
                Err(_) => assert!(near.vanished().is_none(), "{:?}", Answers::of(&near.stream)),
            }
        }
        near.shutdown().await.unwrap();
        assert_eq!(reading.await.unwrap(), BYTES as u64 / 256 * (255 * 256 / 2));
    }

    /// For ten minutes with `STOPPED_FOR=600`.
    #[cfg(target_os = "linux")]
    #[tokio::test]
    async fn a_far_side_that_does_not_read_has_not_vanished() {
        let pause = std::env::var("STOPPED_FOR").map(|seconds| Duration::from_secs(seconds.parse().unwrap()));
        stopped_reader(pause.unwrap_or(UNANSWERED + Duration::from_secs(15))).await;
    }
}
