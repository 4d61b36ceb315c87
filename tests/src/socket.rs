//! Sockets of the simulated network. turmoil's TCP cannot send RST, and an abort is half of what is tested here, so
//! each write is framed: a length and its bytes, a mark for FIN, a mark for RST. A connection that ends without a mark
//! was lost, and reads as a reset.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
    time::Duration,
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, ReadBuf};
use tunnel_core::{Aborted, Leg, Lost};
use turmoil::net::TcpStream;

const FIN: u16 = 0;
const RST: u16 = u16::MAX;
/// Bytes of one simulated segment.
const SEGMENT: usize = 16 * 1024;
/// Bytes that arrive although nobody reads them.
const RECEIVE_BUFFER: usize = 64 * 1024;
/// How long a closed connection goes on in what would be the kernel.
const LINGER: Duration = Duration::from_secs(20);

/// A connection on the simulated network that tells FIN from RST.
pub(crate) struct SimSocket {
    /// Only the drop takes it.
    tcp: Option<TcpStream>,
    /// Arrived, and not sorted yet: less than a frame's length, except behind an end.
    input: BytesMut,
    /// Bytes of the current frame still to come.
    frame: usize,
    /// Arrived, and not read yet.
    unread: BytesMut,
    ended: End,
    out: BytesMut,
    shut: bool,
    /// Whether closing now would be a reset, as with a linger time of zero.
    resets: bool,
}

impl SimSocket {
    /// Wraps one end; the other must be wrapped too.
    pub(crate) fn new(tcp: TcpStream) -> Self {
        let (input, unread, out) = Default::default();
        Self { tcp: Some(tcp), input, frame: 0, unread, ended: End::Open, out, shut: false, resets: false }
    }

    fn poll_out(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let Some(tcp) = &mut self.tcp else { return Poll::Ready(Err(reset())) };
        while !self.out.is_empty() {
            let written = ready!(Pin::new(&mut *tcp).poll_write(cx, &self.out))?;
            self.out.advance(written);
        }
        Poll::Ready(Ok(()))
    }

    /// Takes what comes next from the connection: frames, or its end.
    fn poll_in(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let mut piece = [0; 4096];
        let mut read = ReadBuf::new(&mut piece);
        let Some(tcp) = &mut self.tcp else { return Poll::Pending };
        let result = ready!(Pin::new(tcp).poll_read(cx, &mut read));
        self.input.extend_from_slice(read.filled());
        self.sort();
        if result.is_err() || read.filled().is_empty() {
            // Behind a FIN, the far side may close in silence.
            let silent = result.is_ok() && self.ended == End::Fin;
            self.ended = if silent { End::Closed } else { End::Reset };
        }
        Poll::Ready(())
    }

    /// Tells bytes from marks.
    fn sort(&mut self) {
        loop {
            let some = self.frame.min(self.input.len());
            self.unread.extend_from_slice(&self.input.split_to(some));
            self.frame -= some;
            if self.frame > 0 || self.input.len() < 2 {
                return;
            }
            match self.input.get_u16() {
                FIN => self.ended = End::Fin,
                RST => self.ended = End::Reset,
                length => self.frame = usize::from(length),
            }
        }
    }
}

/// What the far side has said of its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum End {
    Open,
    Fin,
    /// A FIN, and nothing will follow.
    Closed,
    Reset,
}

fn reset() -> io::Error {
    io::ErrorKind::ConnectionReset.into()
}

impl AsyncRead for SimSocket {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        while this.unread.is_empty() {
            match this.ended {
                End::Open => ready!(this.poll_in(cx)),
                End::Fin | End::Closed => return Poll::Ready(Ok(())),
                End::Reset => return Poll::Ready(Err(reset())),
            }
        }
        let taken = this.unread.len().min(buf.remaining());
        buf.put_slice(&this.unread.split_to(taken));
        Poll::Ready(Ok(()))
    }
}

impl AsyncWrite for SimSocket {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = &mut *self;
        if this.shut {
            return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into()));
        }
        ready!(this.poll_out(cx))?;
        let taken = &bytes[..bytes.len().min(SEGMENT)];
        if !taken.is_empty() {
            this.out.extend_from_slice(&(taken.len() as u16).to_be_bytes());
            this.out.extend_from_slice(taken);
            let _ = this.poll_out(cx)?;
        }
        Poll::Ready(Ok(taken.len()))
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.poll_out(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if !self.shut {
            self.shut = true;
            self.out.extend_from_slice(&FIN.to_be_bytes());
        }
        self.poll_out(cx)
    }
}

impl Leg for SimSocket {
    fn arm(&mut self) {
        self.resets = true;
    }

    fn abort(&mut self, _: &Aborted) {
        self.resets = true;
    }

    fn finish(&mut self) {
        self.resets = false;
    }

    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Lost> {
        while self.ended != End::Reset {
            if self.ended == End::Closed || self.unread.len() >= RECEIVE_BUFFER {
                return Poll::Pending;
            }
            ready!(self.poll_in(cx));
        }
        Poll::Ready(Lost::Failed(reset()))
    }

    fn vanished(&self) -> Option<io::Error> {
        None
    }
}

impl Drop for SimSocket {
    /// Closing is a FIN or a reset, as the kernel would do it. What was written before a FIN is still delivered, and the
    /// port lingers for a while, as behind a real close: turmoil alone would answer late segments with a reset, which
    /// destroys what the far side has not read yet.
    fn drop(&mut self) {
        // When the whole world ends there is nobody to tell, and a killed host has no kernel left.
        if !turmoil::in_simulation() || tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let Some(mut tcp) = self.tcp.take() else { return };
        let mut out = std::mem::take(&mut self.out);
        if self.resets {
            // A reset jumps the queue, as in TCP: what was not sent is lost. Behind half a frame no mark can stand; the
            // connection then ends unmarked, which reads as a reset too.
            if !out.is_empty() {
                return;
            }
            out.extend_from_slice(&RST.to_be_bytes());
        } else if !self.shut {
            out.extend_from_slice(&FIN.to_be_bytes());
        }
        let resets = self.resets;
        tokio::spawn(async move {
            let farewell = async {
                tcp.write_all_buf(&mut out).await?;
                tcp.shutdown().await?;
                // Behind a reset nothing more is taken; behind a FIN, what comes is read and forgotten.
                if resets {
                    std::future::pending().await
                } else {
                    tokio::io::copy(&mut tcp, &mut tokio::io::sink()).await
                }
            };
            let _ = tokio::time::timeout(LINGER, farewell).await;
        });
    }
}
