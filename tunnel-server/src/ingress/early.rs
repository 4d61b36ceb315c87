//! Bytes that were read before it was known what for: looked at by `ingress` to tell HTTP/1.1 from HTTP/2, kept by
//! `http1` for the target, and read again from a [`Rewound`] leg.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    task::{Context, Poll},
};

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, ReadBuf};
use tunnel_core::{Aborted, Leg, Lost};

/// Reads into `early` until it is clear whether the connection begins with `wanted`. Cancel-safe: nothing is lost that
/// is not in `early`.
pub(super) async fn begins_with(
    conn: &mut (impl AsyncRead + Unpin),
    early: &mut BytesMut,
    wanted: &[u8],
) -> io::Result<bool> {
    loop {
        let looked_at = early.len().min(wanted.len());
        if early[..looked_at] != wanted[..looked_at] {
            return Ok(false);
        }
        if looked_at == wanted.len() {
            return Ok(true);
        }
        if conn.read_buf(early).await? == 0 {
            return if early.is_empty() { Err(io::ErrorKind::UnexpectedEof.into()) } else { Ok(false) };
        }
    }
}

/// A leg whose first bytes have been read already and are read again.
#[derive(Debug)]
pub(super) struct Rewound<C> {
    early: BytesMut,
    conn: C,
}

impl<C> Rewound<C> {
    pub(super) fn new(early: BytesMut, conn: C) -> Self {
        Self { early, conn }
    }
}

impl<C: AsyncRead + Unpin> AsyncRead for Rewound<C> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let this = &mut *self;
        if this.early.is_empty() {
            return Pin::new(&mut this.conn).poll_read(cx, buf);
        }
        let taken = this.early.len().min(buf.remaining());
        buf.put_slice(&this.early[..taken]);
        this.early.advance(taken);
        if this.early.is_empty() {
            // Gives the memory back: the connection may live for days.
            this.early = BytesMut::new();
        }
        Poll::Ready(Ok(()))
    }
}

impl<C: AsyncWrite + Unpin> AsyncWrite for Rewound<C> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.conn).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.conn).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.conn.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.conn).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.conn).poll_shutdown(cx)
    }
}

impl<C: Leg> Leg for Rewound<C> {
    fn arm(&mut self) {
        self.conn.arm();
    }

    fn abort(&mut self, reason: &Aborted) {
        self.conn.abort(reason);
    }

    fn finish(&mut self) {
        self.conn.finish();
    }

    fn received(&self) -> u64 {
        self.conn.received()
    }

    fn poll_lost(&mut self, cx: &mut Context<'_>) -> Poll<Lost> {
        self.conn.poll_lost(cx)
    }

    fn vanished(&self) -> Option<io::Error> {
        self.conn.vanished()
    }
}
