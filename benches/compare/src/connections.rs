//! The one accept loop, of `relay` and `target`.

use std::io;

use tokio::{
    io::{AsyncRead, AsyncWrite},
    net::{TcpListener, TcpStream, UnixListener, UnixStream},
    task::JoinSet,
};

/// Connections at a time; more must wait.
const MAX_CONNECTIONS: usize = 10_000;

/// Where connections come from.
pub(crate) trait Accept: Sync {
    type Connection: Connection;

    fn accept(&self) -> impl Future<Output = io::Result<Self::Connection>> + Send;
}

impl Accept for TcpListener {
    type Connection = TcpStream;

    async fn accept(&self) -> io::Result<TcpStream> {
        let (connection, _) = self.accept().await?;
        connection.set_nodelay(true)?;
        Ok(connection)
    }
}

impl Accept for UnixListener {
    type Connection = UnixStream;

    async fn accept(&self) -> io::Result<UnixStream> {
        Ok(self.accept().await?.0)
    }
}

/// What can be handed on.
pub(crate) trait Connection: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// From now on, its end is one that says that something is missing.
    fn fail(&self) -> io::Result<()>;
}

impl Connection for TcpStream {
    fn fail(&self) -> io::Result<()> {
        self.set_zero_linger()
    }
}

impl Connection for UnixStream {
    /// There is no other end than the one.
    fn fail(&self) -> io::Result<()> {
        Ok(())
    }
}

/// Does this with each connection until it is dropped, and they with it. What breaks is noticed by the far side.
pub(crate) async fn serve<L: Accept, F>(listener: &L, answer: impl Fn(L::Connection) -> F) -> io::Result<()>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        let connection = listener.accept().await?;
        while connections.try_join_next().is_some() {}
        if connections.len() >= MAX_CONNECTIONS {
            connections.join_next().await;
        }
        let answer = answer(connection);
        connections.spawn(async move { drop(answer.await) });
    }
}
