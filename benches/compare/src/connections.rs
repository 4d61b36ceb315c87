//! The one accept loop, of `relay` and `target`.

use std::io;

use tokio::{
    net::{TcpListener, TcpStream},
    task::JoinSet,
};

/// Connections at a time; more must wait.
const MAX_CONNECTIONS: usize = 10_000;

/// Does this with each connection until it is dropped, and they with it. What breaks is noticed by the far side.
pub(crate) async fn serve<F>(listener: &TcpListener, answer: impl Fn(TcpStream) -> F) -> io::Result<()>
where
    F: Future<Output = io::Result<()>> + Send + 'static,
{
    let mut connections = JoinSet::new();
    loop {
        let (connection, _) = listener.accept().await?;
        while connections.try_join_next().is_some() {}
        if connections.len() >= MAX_CONNECTIONS {
            connections.join_next().await;
        }
        let answer = answer(connection);
        connections.spawn(async move { drop(answer.await) });
    }
}
