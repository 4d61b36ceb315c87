//! Links over ways that are slow: what takes long is neither dead nor lost.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{self, Cursor},
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::ServerName;
use tokio::{
    io::{
        AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, DuplexStream, ReadBuf, duplex, split,
    },
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, timeout},
};
use tunnel_core::{
    Aborted, Leg, Link, LinkConfig, LinkError, LinkEvent, Lost, OpenRequest, ReadAhead, RelayEnd, Timeouts,
    proto::messages::{AbortCode, Hello, Welcome},
    relay,
    tls::{ClientTls, Domain, Files, ServerTls},
};

const TIMEOUT: Duration = Duration::from_secs(60);
/// What moves at one time on a slow way: much less than a TLS record.
const PIECE: usize = 500;

/// Credentials that are good for both sides.
fn tls() -> (ServerTls, ClientTls) {
    let folder = tempfile::tempdir().unwrap();
    let file = |name: &str, text: String| {
        fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name)
    };
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let key = KeyPair::generate().unwrap();
    let ca = file("ca", params.self_signed(&key).unwrap().pem());
    let authority = Issuer::new(params, key);
    let params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
    let key = KeyPair::generate().unwrap();
    let cert = file("crt", params.signed_by(&key, &authority).unwrap().pem());
    let files = Files { cert, key: file("key", key.serialize_pem()), ca };
    (ServerTls::load(Domain::Edge, files.clone()).unwrap(), ClientTls::load(Domain::Edge, files).unwrap())
}

/// A way between two ends. What the first sends takes so long a piece; what the second sends takes no time.
fn way(each: Duration) -> (DuplexStream, DuplexStream, JoinHandle<()>) {
    let (near, from_near) = duplex(16 * 1024);
    let (to_far, far) = duplex(16 * 1024);
    let way = tokio::spawn(async move {
        let (mut near_read, mut near_write) = split(from_near);
        let (mut far_read, mut far_write) = split(to_far);
        let slowly = async {
            let mut piece = [0; PIECE];
            while let Ok(read @ 1..) = near_read.read(&mut piece).await {
                sleep(each).await;
                far_write.write_all(&piece[..read]).await.unwrap();
            }
            far_write.shutdown().await.unwrap();
        };
        tokio::join!(slowly, tokio::io::copy(&mut far_read, &mut near_write)).1.unwrap();
    });
    (near, far, way)
}

#[tokio::test(start_paused = true)]
async fn a_link_on_which_a_record_takes_longer_than_two_heartbeats_is_alive() {
    let (server, client) = tls();
    // 1000 bytes a second: 16 seconds for a record.
    let (near, far, _way) = way(Duration::from_millis(500));
    let accepting = tokio::spawn(async move {
        let tls = server.acceptor().accept(ReadAhead::new(far)).await.unwrap();
        let pending = Link::accept(tls, LinkConfig::default()).await.unwrap();
        pending.welcome(Welcome { version: 1, heartbeat_ms: 2000, ..Welcome::default() }).unwrap()
    });
    let name = ServerName::try_from("localhost").unwrap();
    let near = client.connector().connect(name, ReadAhead::new(near)).await.unwrap();
    let hello = Hello { min_version: 1, max_version: 1, ..Hello::default() };
    let (mut edge, _) = Link::connect(near, hello, LinkConfig::default()).await.unwrap();
    let mut gateway = accepting.await.unwrap();
    let handle = gateway.handle();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move { while !matches!(gateway.next().await, LinkEvent::Closed(_)) {} });
    tasks.spawn(async move {
        let LinkEvent::Stream(incoming) = edge.next().await else { panic!("no stream came") };
        let pending = incoming.header(Instant::now() + TIMEOUT).await.unwrap();
        let mut stream = pending.accept(String::new()).await.unwrap();
        stream.write_all(&vec![7; 50_000]).await.unwrap();
        stream.shutdown().await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.unwrap();
        while !matches!(edge.next().await, LinkEvent::Closed(_)) {}
    });
    let begun = Instant::now();
    let (mut stream, _) = handle.open(OpenRequest::default(), TIMEOUT).await.unwrap();
    let mut bytes = Vec::new();
    stream.read_to_end(&mut bytes).await.unwrap();
    assert_eq!(bytes, vec![7; 50_000]);
    assert!(begun.elapsed() >= Duration::from_secs(50), "it was not slow: {:?}", begun.elapsed());
    assert!(!handle.is_closed());
}

/// Ends at once, and takes all that is written.
struct Target(Cursor<Vec<u8>>);

impl AsyncRead for Target {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Target {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

impl Leg for Target {
    fn abort(&mut self, _: &Aborted) {}

    fn poll_lost(&mut self, _: &mut Context<'_>) -> Poll<Lost> {
        Poll::Pending
    }

    fn vanished(&self) -> Option<io::Error> {
        None
    }
}

/// A link over real sockets, of which the way from the edge is the test's: both ends, and the socket that the edge's bytes
/// come out of, to be passed on to the other one.
async fn link_by_hand() -> (Link, Link, TcpStream, TcpStream) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connected = async || {
        let (near, far) = tokio::join!(TcpStream::connect(address), listener.accept());
        (near.unwrap(), far.unwrap().0)
    };
    let ((near, mut from_near), (mut to_far, far)) = (connected().await, connected().await);
    let hello = Hello { min_version: 1, max_version: 1, ..Hello::default() };
    let linking = async {
        tokio::join!(Link::connect(BufReader::new(near), hello, LinkConfig::default()), async {
            let pending = Link::accept(BufReader::new(far), LinkConfig::default()).await.unwrap();
            pending.welcome(Welcome { version: 1, heartbeat_ms: 5000, ..Welcome::default() }).unwrap()
        })
    };
    let (edge, gateway) = tokio::select! {
        linked = linking => linked,
        _ = tokio::io::copy_bidirectional(&mut from_near, &mut to_far) => panic!("the way has ended"),
    };
    (edge.unwrap().0, gateway, from_near, to_far)
}

async fn until_closed(mut link: Link) -> LinkError {
    loop {
        if let LinkEvent::Closed(error) = link.next().await {
            return error;
        }
    }
}

/// What an edge does that stops as soon as its only stream, a download that the client has half-closed, has ended.
async fn download_and_leave(mut edge: Link, bytes: usize) -> (RelayEnd, LinkError) {
    let LinkEvent::Stream(incoming) = edge.next().await else { panic!("no stream came") };
    let pending = incoming.header(Instant::now() + TIMEOUT).await.unwrap();
    let stream = pending.accept(String::new()).await.unwrap();
    let (handle, closed) = (edge.handle(), tokio::spawn(until_closed(edge)));
    let target = Target(Cursor::new(vec![7; bytes]));
    let relayed = relay(stream, target, Timeouts::of("the edge"), std::future::pending()).await;
    handle.close_by("drained", Instant::now() + TIMEOUT);
    (relayed.end, closed.await.unwrap())
}

#[tokio::test]
async fn the_tail_of_a_half_closed_download_arrives_before_the_link_is_closed() {
    let (edge, gateway, from_edge, to_gateway) = link_by_hand().await;
    let (handle, closed) = (gateway.handle(), tokio::spawn(until_closed(gateway)));
    let bytes = 1_000_000;
    let leaving = tokio::spawn(download_and_leave(edge, bytes));
    // Four megabytes a second one way. The other way something comes in all the time: room in windows, answers, pings.
    let (mut edge_read, mut edge_write) = from_edge.into_split();
    let (mut gateway_read, mut gateway_write) = to_gateway.into_split();
    tokio::spawn(async move { tokio::io::copy(&mut gateway_read, &mut edge_write).await });
    tokio::spawn(async move {
        let mut piece = vec![0; 20_000];
        while let Ok(read @ 1..) = edge_read.read(&mut piece).await {
            sleep(Duration::from_millis(5)).await;
            gateway_write.write_all(&piece[..read]).await.unwrap();
        }
    });
    let (mut stream, _) = handle.open(OpenRequest::default(), TIMEOUT).await.unwrap();
    stream.shutdown().await.unwrap();
    let mut got = Vec::new();
    timeout(TIMEOUT, stream.read_to_end(&mut got)).await.unwrap().unwrap();
    assert_eq!(got.len(), bytes);
    let (end, edge_closed) = timeout(TIMEOUT, leaving).await.unwrap().unwrap();
    assert_eq!(end, RelayEnd::Clean);
    assert!(matches!(edge_closed, LinkError::ClosedHere(_)), "{edge_closed}");
    let gateway_closed = timeout(TIMEOUT, closed).await.unwrap().unwrap();
    assert!(matches!(gateway_closed, LinkError::ClosedByPeer), "{gateway_closed}");
}

#[tokio::test]
async fn a_stream_whose_tail_is_under_way_when_its_link_breaks_was_cut() {
    let (edge, gateway, mut from_edge, mut to_gateway) = link_by_hand().await;
    let (handle, _closed) = (gateway.handle(), tokio::spawn(until_closed(gateway)));
    let leaving = tokio::spawn(download_and_leave(edge, 10_000));
    let opening = handle.open(OpenRequest::default(), TIMEOUT);
    let mut stream = tokio::select! {
        opened = opening => opened.unwrap().0,
        _ = tokio::io::copy_bidirectional(&mut from_edge, &mut to_gateway) => panic!("the way has ended"),
    };
    stream.shutdown().await.unwrap();
    // The client's end arrives, and then the target's is on its way.
    let _ = timeout(Duration::from_millis(300), tokio::io::copy(&mut to_gateway, &mut from_edge)).await;
    assert!(!leaving.is_finished(), "nobody has confirmed it");
    drop((from_edge, to_gateway));
    let (end, _) = timeout(TIMEOUT, leaving).await.unwrap().unwrap();
    assert!(matches!(&end, RelayEnd::FirstFailed(reason) if reason.code == AbortCode::LinkLost), "{end:?}");
}
