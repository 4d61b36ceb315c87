//! HTTP/2 CONNECT as a client's library speaks it, and its stream as any other byte stream.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll, ready},
};

use bytes::{Buf, Bytes};
use h2::{
    RecvStream, SendStream,
    client::{Builder, SendRequest},
};
use http::{Method, Request};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio_util::task::AbortOnDropHandle;

use crate::connect::Refusal;

/// What this client lets the gateway send before it has read it, in bytes: for a stream, and for all together.
const WINDOWS: (u32, u32) = (256 * 1024, 1024 * 1024);

/// A connection on which streams can be opened. They end with it.
pub struct Client {
    requests: SendRequest<Bytes>,
    driver: AbortOnDropHandle<()>,
}

impl Client {
    /// Begins HTTP/2 on a connection.
    pub async fn new<S>(connection: S) -> io::Result<Self>
    where
        S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let (stream, all) = WINDOWS;
        let (requests, connection) = Builder::new()
            .initial_window_size(stream)
            .initial_connection_window_size(all)
            .handshake(connection)
            .await
            .map_err(failed)?;
        let driver = AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = connection.await;
        }));
        Ok(Self { requests, driver })
    }

    /// A CONNECT. `Ok(Err(_))` is a refusal.
    pub async fn connect(&self, target: &str) -> io::Result<Result<Stream, Refusal>> {
        let request =
            Request::builder().method(Method::CONNECT).uri(target).body(()).map_err(io::Error::other)?;
        let mut requests = self.requests.clone().ready().await.map_err(failed)?;
        let (response, send) = requests.send_request(request, false).map_err(failed)?;
        let (head, mut receive) = response.await.map_err(failed)?.into_parts();
        if head.status == 200 {
            return Ok(Ok(Stream { send, receive, arrived: Bytes::new(), _driver: None }));
        }
        let mut body = Vec::new();
        while let Some(piece) = receive.data().await {
            body.extend_from_slice(&piece.map_err(failed)?);
        }
        let body = String::from_utf8_lossy(&body).into_owned();
        let text = |value: &http::HeaderValue| String::from_utf8_lossy(value.as_bytes()).into_owned();
        let headers =
            head.headers.iter().map(|(name, value)| (name.as_str().to_owned(), text(value))).collect();
        // HTTP/2 has no reason phrase: a person reads the body.
        let reason = body.trim_end().to_owned();
        Ok(Err(Refusal { status: head.status.as_u16(), reason, headers, body }))
    }

    /// As [`Self::connect`], for a connection that is for one stream only.
    pub async fn connect_once(self, target: &str) -> io::Result<Result<Stream, Refusal>> {
        let connected = self.connect(target).await?;
        Ok(connected.map(|stream| Stream { _driver: Some(self.driver), ..stream }))
    }
}

fn failed(error: h2::Error) -> io::Error {
    io::Error::new(io::ErrorKind::ConnectionReset, error)
}

/// The bytes of a CONNECT.
pub struct Stream {
    send: SendStream<Bytes>,
    receive: RecvStream,
    arrived: Bytes,
    _driver: Option<AbortOnDropHandle<()>>,
}

impl AsyncRead for Stream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        while self.arrived.is_empty() {
            match ready!(self.receive.poll_data(cx)) {
                None => return Poll::Ready(Ok(())),
                Some(Err(error)) => return Poll::Ready(Err(failed(error))),
                Some(Ok(bytes)) => self.arrived = bytes,
            }
        }
        let taken = self.arrived.len().min(buf.remaining());
        buf.put_slice(&self.arrived[..taken]);
        self.arrived.advance(taken);
        Poll::Ready(self.receive.flow_control().release_capacity(taken).map_err(failed))
    }
}

impl AsyncWrite for Stream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.send.reserve_capacity(bytes.len());
        while self.send.capacity() == 0 {
            match ready!(self.send.poll_capacity(cx)) {
                None => return Poll::Ready(Err(io::ErrorKind::BrokenPipe.into())),
                Some(capacity) => capacity.map_err(failed)?,
            };
        }
        let taken = self.send.capacity().min(bytes.len());
        self.send.send_data(Bytes::copy_from_slice(&bytes[..taken]), false).map_err(failed)?;
        Poll::Ready(Ok(taken))
    }

    /// The connection's task sends without being asked.
    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(self.send.send_data(Bytes::new(), true).map_err(failed))
    }
}
