//! The limit of what a tunnel can do: each connection is handed on as one of its own, over TLS on one side or both, and
//! nothing else is done. Two of them, one behind the other, do the TLS hops of a gateway and an edge.

use std::{fmt, io, net::SocketAddr, path::PathBuf, str::FromStr, time::Duration};

use rustls::pki_types::ServerName;
use tokio::{io::copy_bidirectional_with_sizes, net::TcpStream, time::timeout};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream as Dialled, server::TlsStream as Accepted};
use tokio_util::either::Either;

use crate::connections::{self, Accept, Connection};

/// The fastest of 16, 64 and 256 over two hops, in medians.
pub(crate) const BUFFER_KIB: u16 = 64;
/// Until a connection is there on both sides.
const OPEN_LIMIT: Duration = Duration::from_secs(10);

/// Where it listens.
#[derive(Clone, Debug)]
pub(crate) enum Door {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

impl FromStr for Door {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text.strip_prefix("unix:") {
            Some(path) => Ok(Self::Unix(path.into())),
            None => text.parse().map(Self::Tcp).map_err(|_| "is neither IP:PORT nor unix:PATH".to_owned()),
        }
    }
}

impl fmt::Display for Door {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => address.fmt(f),
            Self::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

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
    pub(crate) async fn serve<L: Accept>(self, listener: &L) -> io::Result<()> {
        connections::serve(listener, |connection| self.clone().hand_on(connection)).await
    }

    async fn hand_on(self, connection: impl Connection) -> io::Result<()> {
        let (mut near, mut far) = timeout(OPEN_LIMIT, self.open(connection)).await??;
        let copied = copy_bidirectional_with_sizes(&mut near, &mut far, self.buffer, self.buffer).await;
        if copied.is_err() {
            // An end would say that this was all. TLS says so by itself.
            fail(&near)?;
            fail(&far)?;
        }
        copied.map(drop)
    }

    async fn open<N: Connection>(
        &self,
        near: N,
    ) -> io::Result<(Either<N, Accepted<N>>, Either<TcpStream, Dialled<TcpStream>>)> {
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

fn fail<C: Connection, T>(side: &Either<C, T>) -> io::Result<()> {
    match side {
        Either::Left(plain) => plain.fail(),
        Either::Right(_) => Ok(()),
    }
}
