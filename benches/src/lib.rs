//! What the benches here and `benches/guard` measure on: one link in memory, without TLS, whose edge serves every stream.

#![allow(clippy::unwrap_used, reason = "a measurement that goes wrong shall fail")]
#![allow(clippy::missing_panics_doc, reason = "see above")]

use std::time::Duration;

use tokio::{
    io::{AsyncRead, AsyncWrite, AsyncWriteExt, BufReader, copy, duplex, split},
    task::JoinSet,
    time::Instant,
};
use tunnel_core::{
    Link, LinkConfig, LinkEvent, LinkHandle, OpenRequest, TunnelStream,
    proto::messages::{Hello, Welcome},
};

/// Bytes that a side takes from the connection at once.
const BUFFER: usize = 64 * 1024;
/// For whatever a measurement waits for.
pub const TIMEOUT: Duration = Duration::from_secs(600);

/// A link whose edge does this with every stream, and the tasks behind it.
pub async fn link_to<S, F>(serve: S) -> (LinkHandle, JoinSet<()>)
where
    S: Fn(TunnelStream) -> F + Send + 'static,
    F: Future<Output = ()> + Send + 'static,
{
    let (near, far) = duplex(4 * BUFFER);
    let config = LinkConfig::default();
    let hello = Hello { min_version: 1, max_version: 1, ..Hello::default() };
    let welcome = Welcome { version: 1, heartbeat_ms: 10_000, ..Welcome::default() };
    let (edge, gateway) =
        tokio::join!(Link::connect(BufReader::with_capacity(BUFFER, near), hello, config.clone()), async {
            Link::accept(BufReader::with_capacity(BUFFER, far), config)
                .await
                .unwrap()
                .welcome(welcome)
                .unwrap()
        });
    let (mut edge, mut gateway) = (edge.unwrap().0, gateway);
    let (handle, mut tasks) = (gateway.handle(), JoinSet::new());
    tasks.spawn(async move { while !matches!(gateway.next().await, LinkEvent::Closed(_)) {} });
    tasks.spawn(async move {
        let mut streams = JoinSet::new();
        while let LinkEvent::Stream(incoming) = edge.next().await {
            while streams.try_join_next().is_some() {}
            let pending = incoming.header(Instant::now() + TIMEOUT).await.unwrap();
            let stream = pending.accept(String::new()).await.unwrap();
            streams.spawn(serve(stream));
        }
    });
    (handle, tasks)
}

/// Opens a stream on it.
pub async fn open(link: &LinkHandle) -> TunnelStream {
    let request = OpenRequest { target: "edge-a:10250".to_owned(), ..OpenRequest::default() };
    link.open(request, TIMEOUT).await.unwrap().0
}

/// Sends back what comes, to its end.
pub async fn echo(stream: impl AsyncRead + AsyncWrite) {
    let (mut reader, mut writer) = split(stream);
    if copy(&mut reader, &mut writer).await.is_ok() {
        let _ = writer.shutdown().await;
    }
}
