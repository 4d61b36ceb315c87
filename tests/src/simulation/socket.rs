//! Sockets of the simulated network, each with its part of a kernel: a task of its host that sends and receives while the
//! program does something else, and goes on after the program has closed the socket. turmoil's TCP knows no RST and takes
//! no part of a second for a byte, and both are half of what is tested here. So what is sent is framed: a length and its
//! bytes, or a mark; and a connection may have a rate, at which its bytes trickle.
//!
//! As in Linux: whoever closes a socket that has unread bytes, or gets some later, sends a reset, which drops what was not
//! sent yet. A Unix socket has no reset of its own, but its far side can tell a close from a half-close.

use std::{
    io,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
    },
    task::{Context, Poll, Waker, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    time::{Instant, Sleep, sleep},
};
use tokio_util::io::poll_read_buf;
use tunnel_core::{Aborted, Leg, Lost};
use turmoil::net::TcpStream;

/// Marks in the place of a frame's length.
const FIN: u16 = 0;
const RST: u16 = u16::MAX;
/// A Unix socket was closed, both its halves.
const HANG_UP: u16 = u16::MAX - 1;
/// Nothing will ever come again, and nobody says so: the machine has lost its power.
const GONE: u16 = u16::MAX - 2;
/// The far kernel has nothing more to do with the connection. Not to be seen by a program.
const FORGOTTEN: u16 = u16::MAX - 3;
/// Bytes of one simulated segment.
const SEGMENT: usize = 16 * 1024;
/// Bytes that a kernel takes from its program before they are sent, and keeps for it before they are read.
const BUFFER: usize = 64 * 1024;
/// How long a connection goes on in the kernel after its last word, so that what the far side still sends finds it.
const LINGER: Duration = Duration::from_secs(20);
/// A far side that is gone is noticed after this time, as by the keepalive of real sockets.
const KEEPALIVE: Duration = Duration::from_secs(30);
/// A slow connection sends so many segments a second.
const SLOW_SEGMENTS: u64 = 10;

/// What a host's sockets have open, shared by all of them.
#[derive(Clone, Debug, Default)]
pub(super) struct Open {
    /// Sockets that a program holds.
    sockets: Arc<AtomicUsize>,
    /// Tasks of the kernel.
    kernels: Arc<AtomicUsize>,
}

impl Open {
    pub(super) fn sockets(&self) -> usize {
        self.sockets.load(Relaxed)
    }

    pub(super) fn kernels(&self) -> usize {
        self.kernels.load(Relaxed)
    }
}

/// Counts one more for as long as it is held.
pub(super) struct Counted(Arc<AtomicUsize>);

impl Counted {
    pub(super) fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Relaxed);
        Self(count.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Relaxed);
    }
}

/// Bytes a second that a connection sends; none is no limit. May change at any time.
#[derive(Clone, Debug, Default)]
pub(super) struct Rate(Arc<AtomicU64>);

impl Rate {
    pub(super) fn set(&self, bytes: Option<u64>) {
        self.0.store(bytes.unwrap_or(0), Relaxed);
    }

    fn get(&self) -> Option<u64> {
        Some(self.0.load(Relaxed)).filter(|rate| *rate > 0)
    }
}

/// What kind of socket it is to the programs on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Family {
    Tcp,
    Unix,
}

/// The program's end of a connection. Dropping it closes it.
pub(crate) struct SimSocket {
    state: Arc<Mutex<State>>,
    _open: Counted,
}

/// What a program and its kernel know of a connection.
struct State {
    family: Family,
    /// What has arrived, and whether more may.
    input: BytesMut,
    far: Far,
    failed: Option<io::ErrorKind>,
    /// What is to be sent.
    output: BytesMut,
    shut: bool,
    /// Closing now would be a reset, as with a linger time of zero.
    resets: bool,
    closed: Option<Close>,
    kernel: Option<Waker>,
    reader: Option<Waker>,
    writer: Option<Waker>,
    /// Whoever wants to hear of a failure without reading.
    watcher: Option<Waker>,
}

/// What is still to be expected of the far side.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Far {
    Speaks,
    /// It has ended its direction.
    Listens,
    /// It has closed its Unix socket.
    HungUp,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Close {
    /// What was written is still sent.
    Orderly,
    Reset,
    Gone,
}

impl State {
    fn wake_kernel(&mut self) {
        self.kernel.take().into_iter().for_each(Waker::wake);
    }

    /// Whatever the program waits for, it may look again.
    fn wake_program(&mut self) {
        let wakers = [self.reader.take(), self.writer.take(), self.watcher.take()];
        wakers.into_iter().flatten().for_each(Waker::wake);
    }

    fn fail(&mut self, kind: io::ErrorKind) {
        self.failed.get_or_insert(kind);
        self.output.clear();
        self.wake_program();
    }

    fn close(&mut self, how: Close) {
        self.closed.get_or_insert(how);
        self.wake_kernel();
    }

    fn failure(&self) -> Option<io::Error> {
        let hung_up = (self.far == Far::HungUp).then_some(io::ErrorKind::BrokenPipe);
        self.failed.or(hung_up).map(io::Error::from)
    }
}

/// Ends a socket in a way of its own, whoever holds it.
#[derive(Clone)]
pub(super) struct Socket(Arc<Mutex<State>>);

impl Socket {
    /// It vanishes, as by a power cut.
    pub(super) fn cut_power(&self) {
        self.0.lock().unwrap().close(Close::Gone);
    }

    /// Closing it is a reset, where there are any.
    pub(super) fn reset(&self) {
        self.0.lock().unwrap().resets = true;
    }
}

impl SimSocket {
    /// Wraps one end; the other must be wrapped too. To be called on the host that has the socket.
    pub(super) fn new(tcp: TcpStream, family: Family, rate: Rate, open: &Open) -> Self {
        let state = Arc::new(Mutex::new(State {
            family,
            input: BytesMut::new(),
            far: Far::Speaks,
            failed: None,
            output: BytesMut::new(),
            shut: false,
            resets: false,
            closed: None,
            kernel: None,
            reader: None,
            writer: None,
            watcher: None,
        }));
        tokio::spawn(Kernel {
            tcp,
            state: state.clone(),
            rate,
            raw: BytesMut::new(),
            frame: 0,
            bytes_after_close: false,
            wire: BytesMut::new(),
            said: Said::default(),
            free_at: Instant::now(),
            timer: Box::pin(sleep(Duration::ZERO)),
            ends_at: None,
            _counted: Counted::new(&open.kernels),
        });
        Self { state, _open: Counted::new(&open.sockets) }
    }

    pub(super) fn handle(&self) -> Socket {
        Socket(self.state.clone())
    }
}

/// An idle connection has no buffers: the memory of a run is counted.
fn give_back(buffer: &mut BytesMut) {
    if buffer.is_empty() {
        *buffer = BytesMut::new();
    }
}

impl AsyncRead for SimSocket {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let mut state = self.state.lock().unwrap();
        if !state.input.is_empty() {
            let was_full = state.input.len() >= BUFFER;
            let taken = state.input.len().min(buf.remaining());
            buf.put_slice(&state.input.split_to(taken));
            give_back(&mut state.input);
            if was_full {
                state.wake_kernel();
            }
            return Poll::Ready(Ok(()));
        }
        if state.far >= Far::Listens {
            return Poll::Ready(Ok(()));
        }
        if let Some(kind) = state.failed {
            return Poll::Ready(Err(kind.into()));
        }
        state.reader = Some(cx.waker().clone());
        Poll::Pending
    }
}

impl AsyncWrite for SimSocket {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let mut state = self.state.lock().unwrap();
        if let Some(failure) = state.failure() {
            return Poll::Ready(Err(failure));
        }
        if state.shut {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        let room = BUFFER.saturating_sub(state.output.len());
        if room == 0 {
            state.writer = Some(cx.waker().clone());
            return Poll::Pending;
        }
        let taken = bytes.len().min(room);
        state.output.extend_from_slice(&bytes[..taken]);
        state.wake_kernel();
        Poll::Ready(Ok(taken))
    }

    /// The kernel sends without being asked.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        let mut state = self.state.lock().unwrap();
        state.shut = true;
        state.wake_kernel();
        Poll::Ready(Ok(()))
    }
}

impl Leg for SimSocket {
    fn arm(&mut self) {
        self.state.lock().unwrap().resets = true;
    }

    fn abort(&mut self, _: &Aborted) {
        self.arm();
    }

    fn finish(&mut self) {
        self.state.lock().unwrap().resets = false;
    }

    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Lost> {
        let mut state = self.state.lock().unwrap();
        if let Some(kind) = state.failed {
            return Poll::Ready(Lost::Failed(kind.into()));
        }
        if state.far == Far::HungUp && !state.shut {
            return Poll::Ready(Lost::Left);
        }
        state.watcher = Some(cx.waker().clone());
        Poll::Pending
    }

    /// The kernel tells, by what stands for keepalive.
    fn vanished(&self) -> Option<io::Error> {
        None
    }
}

impl Drop for SimSocket {
    fn drop(&mut self) {
        let mut state = self.state.lock().unwrap();
        let how = if state.resets && state.family == Family::Tcp { Close::Reset } else { Close::Orderly };
        state.close(how);
    }
}

/// The kernel's end of a connection: a task that ends when nothing more can come of it. One whose host is killed ends
/// without a mark, which is a reset to the far side.
struct Kernel {
    tcp: TcpStream,
    state: Arc<Mutex<State>>,
    rate: Rate,
    /// What has come and is not taken apart yet.
    raw: BytesMut,
    /// Bytes of the current frame still to come.
    frame: usize,
    /// Something came that no program will read.
    bytes_after_close: bool,
    /// The frame that is being sent.
    wire: BytesMut,
    said: Said,
    /// When the next segment may leave.
    free_at: Instant,
    timer: Pin<Box<Sleep>>,
    /// When a close, or a far side that is gone, has had all the time that there is.
    ends_at: Option<Pin<Box<Sleep>>>,
    _counted: Counted,
}

/// Marks that were sent.
#[derive(Clone, Copy, Debug, Default)]
struct Said {
    fin: bool,
    /// After this, nothing.
    last: bool,
}

impl Future for Kernel {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let this = &mut *self;
        let shared = this.state.clone();
        let mut state = shared.lock().unwrap();
        state.kernel = Some(cx.waker().clone());
        let tcp_ended = this.receive(cx, &mut state);
        let sent_all = this.poll_send(cx, &mut state);
        let over = state.failed.is_some() && state.closed.is_some();
        if tcp_ended || sent_all.is_ready() || over {
            return Poll::Ready(());
        }
        if this.said.last && this.ends_at.is_none() {
            // Longer than it takes until a far side that hears nothing has noticed.
            let more = if state.closed == Some(Close::Gone) { KEEPALIVE } else { Duration::ZERO };
            this.ends_at = Some(Box::pin(sleep(LINGER + more)));
        }
        match &mut this.ends_at {
            Some(end) => {
                ready!(end.as_mut().poll(cx));
                // For a program that waits on: its far side is gone.
                state.fail(io::ErrorKind::TimedOut);
                Poll::Ready(())
            }
            None => Poll::Pending,
        }
    }
}

impl Kernel {
    /// Takes what has come, as far as there is room. Whether the connection has ended.
    fn receive(&mut self, cx: &mut Context<'_>, state: &mut State) -> bool {
        // What a program with nothing left to read does not take stops the far side, as a window of zero would.
        while state.closed != Some(Close::Gone) && (state.input.len() < BUFFER || state.closed.is_some()) {
            self.raw.reserve(SEGMENT);
            match poll_read_buf(Pin::new(&mut self.tcp), cx, &mut self.raw) {
                Poll::Pending => {
                    give_back(&mut self.raw);
                    return false;
                }
                Poll::Ready(Ok(1..)) => {
                    if self.take_apart(state) {
                        return true;
                    }
                }
                Poll::Ready(_) if state.family == Family::Unix => {
                    state.far = Far::HungUp;
                    state.wake_program();
                    return true;
                }
                Poll::Ready(_) => {
                    state.fail(io::ErrorKind::ConnectionReset);
                    return true;
                }
            }
        }
        false
    }

    /// Gives the program what has come. Whether the far kernel has forgotten the connection.
    fn take_apart(&mut self, state: &mut State) -> bool {
        loop {
            if self.frame == 0 {
                if self.raw.len() < 2 {
                    give_back(&mut self.raw);
                    return false;
                }
                match self.raw.get_u16() {
                    FIN => state.far = state.far.max(Far::Listens),
                    HANG_UP => state.far = Far::HungUp,
                    RST => state.fail(io::ErrorKind::ConnectionReset),
                    GONE => self.ends_at = Some(Box::pin(sleep(KEEPALIVE))),
                    FORGOTTEN => return true,
                    length => self.frame = usize::from(length),
                }
                state.wake_program();
                continue;
            }
            let taken = self.frame.min(self.raw.len());
            if taken == 0 {
                give_back(&mut self.raw);
                return false;
            }
            let bytes = self.raw.split_to(taken);
            self.frame -= taken;
            if state.closed.is_some() {
                self.bytes_after_close = true;
            } else {
                state.input.extend_from_slice(&bytes);
                state.reader.take().into_iter().for_each(Waker::wake);
            }
        }
    }

    /// Sends what there is. Ready when nothing will ever be sent again, and nothing has to come.
    fn poll_send(&mut self, cx: &mut Context<'_>, state: &mut State) -> Poll<()> {
        loop {
            let is_reset = self.is_reset(state);
            if is_reset && !self.wire.is_empty() && !self.said.last {
                // A reset jumps the queue. Behind half a frame no mark can stand; the connection then ends unmarked,
                // which is a reset too.
                return Poll::Ready(());
            }
            while !self.wire.is_empty() {
                let Ok(written) = ready!(Pin::new(&mut self.tcp).poll_write(cx, &self.wire)) else {
                    state.fail(io::ErrorKind::ConnectionReset);
                    return Poll::Ready(());
                };
                self.wire.advance(written);
            }
            give_back(&mut self.wire);
            if self.said.last {
                let forgotten = self.said.fin && state.far >= Far::Listens && state.family == Family::Tcp;
                return if forgotten { Poll::Ready(()) } else { Poll::Pending };
            }
            if !is_reset && state.closed != Some(Close::Gone) && !state.output.is_empty() {
                ready!(self.poll_turn(cx));
                self.next_segment(state);
                continue;
            }
            let Some(mark) = self.next_mark(state, is_reset) else { return Poll::Pending };
            self.wire.extend_from_slice(&mark.to_be_bytes());
        }
    }

    fn is_reset(&self, state: &State) -> bool {
        let unread = self.bytes_after_close || !state.input.is_empty();
        match state.closed {
            Some(Close::Reset) => true,
            Some(Close::Orderly) => unread,
            Some(Close::Gone) | None => false,
        }
    }

    /// Ready when the next segment may leave.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.rate.get().is_some() && self.free_at > Instant::now() {
            self.timer.as_mut().reset(self.free_at);
            return self.timer.as_mut().poll(cx);
        }
        Poll::Ready(())
    }

    fn next_segment(&mut self, state: &mut State) {
        let mut length = state.output.len().min(SEGMENT);
        if let Some(rate) = self.rate.get() {
            length = length.min((rate / SLOW_SEGMENTS).max(1) as usize);
            self.free_at =
                self.free_at.max(Instant::now()) + Duration::from_micros(length as u64 * 1_000_000 / rate);
        }
        self.wire.extend_from_slice(&(length as u16).to_be_bytes());
        self.wire.extend_from_slice(&state.output.split_to(length));
        give_back(&mut state.output);
        state.writer.take().into_iter().for_each(Waker::wake);
    }

    /// The mark that is due when all bytes have left.
    fn next_mark(&mut self, state: &State, is_reset: bool) -> Option<u16> {
        if is_reset || state.closed == Some(Close::Gone) {
            self.said.last = true;
            return Some(if is_reset { RST } else { GONE });
        }
        if !self.said.fin && (state.shut || state.closed.is_some()) {
            self.said.fin = true;
            return Some(FIN);
        }
        state.closed?;
        if state.family == Family::Unix {
            self.said.last = true;
            return Some(HANG_UP);
        }
        // Both sides have said all.
        (state.far >= Far::Listens).then(|| {
            self.said.last = true;
            FORGOTTEN
        })
    }
}
