//! Links over ways that are slow: what takes long is neither dead nor lost.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{fs, time::Duration};

use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, DuplexStream, duplex, split},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep},
};
use tunnel_core::{
    Link, LinkConfig, LinkEvent, OpenRequest, ReadAhead,
    proto::messages::{Hello, Welcome},
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
