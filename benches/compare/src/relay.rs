//! The limit of what a tunnel can do: each connection is handed on as one of its own, over TLS on one side or both, and
//! nothing else is done. Two of them, one behind the other, do the TLS hops of a gateway and an edge.

use std::{io, net::SocketAddr, time::Duration};

use rustls::pki_types::ServerName;
use tokio::{
    io::copy_bidirectional_with_sizes,
    net::{TcpListener, TcpStream},
    time::timeout,
};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream as Dialled, server::TlsStream as Accepted};
use tokio_util::either::Either;

use crate::connections;

/// The fastest of 16, 64 and 256 over two hops, in medians.
pub(crate) const BUFFER_KIB: u16 = 64;
/// Until a connection is there on both sides.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// What is done with one side of a connection.
#[derive(Clone)]
pub(crate) enum Hop<T> {
    Plain,
    Tls(T),
}

/// Where connections are handed on to, and how.
#[derive(Clone)]
pub(crate) struct Relay {
    pub(crate) to: SocketAddr,
    pub(crate) accept: Hop<TlsAcceptor>,
    pub(crate) dial: Hop<(TlsConnector, ServerName<'static>)>,
    /// Bytes, of each direction of each connection.
    pub(crate) buffer: usize,
}

impl Relay {
    /// Serves connections until it is dropped, and they with it.
    pub(crate) async fn serve(self, listener: &TcpListener) -> io::Result<()> {
        connections::serve(listener, |connection| self.clone().hand_on(connection)).await
    }

    async fn hand_on(self, connection: TcpStream) -> io::Result<()> {
        let (mut near, mut far) = timeout(OPEN_LIMIT, self.open(connection)).await??;
        let copied = copy_bidirectional_with_sizes(&mut near, &mut far, self.buffer, self.buffer).await;
        if copied.is_err() {
            // An end would say that this was all. TLS says so by itself.
            reset(&near)?;
            reset(&far)?;
        }
        copied.map(drop)
    }

    async fn open(
        &self,
        near: TcpStream,
    ) -> io::Result<(Side<Accepted<TcpStream>>, Side<Dialled<TcpStream>>)> {
        near.set_nodelay(true)?;
        let near = match &self.accept {
            Hop::Plain => Either::Left(near),
            Hop::Tls(tls) => Either::Right(tls.accept(near).await?),
        };
        let far = TcpStream::connect(self.to).await?;
        far.set_nodelay(true)?;
        let far = match &self.dial {
            Hop::Plain => Either::Left(far),
            Hop::Tls((tls, name)) => Either::Right(tls.connect(name.clone(), far).await?),
        };
        Ok((near, far))
    }
}

type Side<T> = Either<TcpStream, T>;

fn reset<T>(side: &Side<T>) -> io::Result<()> {
    match side {
        Either::Left(plain) => plain.set_zero_linger(),
        Either::Right(_) => Ok(()),
    }
}
