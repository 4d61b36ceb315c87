//! When an HTTP/2 connection is taken for dead, on ways that are slow.

use bytes::BytesMut;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, split},
    time::{Instant, sleep, timeout},
};
use tunnel_core::tls::{ClientTls, Domain, Files, ServerTls};

use super::{
    budgets::{PING, WINDOW_UPDATE, beginning, frame, request},
    *,
};
use crate::{
    listener::Guest,
    pki::{AltName, Authority, Profile, Validity},
};

/// Shorter than the time in which a connection must show a sign of life, and so seldom that a probe goes unanswered.
const SELDOM: Duration = Duration::from_secs(25);

/// Waits for the connection's end after the last sign of life.
async fn dies(since: Instant, task: JoinHandle<()>) {
    assert!(!task.is_finished(), "it was taken for dead while it lived");
    timeout(Duration::from_secs(100), task).await.expect("nobody noticed its death").unwrap();
    let after = since.elapsed().as_secs();
    assert!((30..=60).contains(&after), "{after} s");
}

#[tokio::test(start_paused = true)]
async fn a_client_from_which_any_byte_comes_is_alive() {
    let site = Site::up().await;
    let (mut io, task) = site.client();
    let mut out = beginning();
    frame(&mut out, PING, 0, 0, b"12345678");
    let (first, slow) = out.split_at(out.len() - 17);
    io.write_all(first).await.unwrap();
    for byte in &slow[..8] {
        sleep(SELDOM).await;
        io.write_all(&[*byte]).await.unwrap();
    }
    dies(Instant::now(), task).await;
}

/// Credentials of the control plane, in files.
fn tls(folder: &std::path::Path) -> (ServerTls, ClientTls) {
    let validity = Validity::lasting(Duration::from_secs(3600));
    let authority = Authority::new(Domain::ControlPlane, validity).unwrap();
    let write = |name: &str, pem: &str| {
        let path = folder.join(name);
        std::fs::write(&path, pem).unwrap();
        path
    };
    let ca = write("ca.crt", authority.cert_pem());
    let files = |name: &str, profile: Profile| {
        let issued = authority.issue(&profile, validity).unwrap();
        let cert = write(&format!("{name}.crt"), &issued.cert_pem);
        Files { cert, key: write(&format!("{name}.key"), &issued.key_pem), ca: ca.clone() }
    };
    let names = vec![AltName::Dns("gateway.example".to_owned())];
    let gateway = files("gateway", Profile::Gateway { name: "gw-1".parse().unwrap(), names });
    let client = files("client", Profile::Client { name: "kube-apiserver".to_owned() });
    let domain = Domain::ControlPlane;
    (ServerTls::load(domain, gateway).unwrap(), ClientTls::load(domain, client).unwrap())
}

/// Carries everything at once until it is told to carry a few bytes now and then.
async fn trickle(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    slow: CancellationToken,
) -> Instant {
    let mut bytes = vec![0; 64 * 1024];
    loop {
        let count = from.read(&mut bytes).await.unwrap();
        if slow.is_cancelled() {
            for piece in bytes[..count].chunks(100).take(8) {
                sleep(SELDOM).await;
                to.write_all(piece).await.unwrap();
            }
            return Instant::now();
        }
        to.write_all(&bytes[..count]).await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_part_of_a_tls_record_is_a_sign_of_life() {
    let folder = tempfile::tempdir().unwrap();
    let (server, client) = tls(folder.path());
    let site = Site::up().await;
    let (near, far) = TestLeg::pair();
    let peer = PeerAddr::Ip(SocketAddr::from(([10, 0, 0, 9], 40_000)));
    let task = tokio::spawn(site.ingress.clone().serve_tls(server, near, peer, Guest::at_an_open_door()));
    let (mine, theirs) = tokio::io::duplex(64 * 1024);
    let slow = CancellationToken::new();
    let ((from_client, mut to_client), (mut from_gateway, to_gateway)) = (split(theirs), split(far));
    let up = tokio::spawn(trickle(from_client, to_gateway, slow.clone()));
    tokio::spawn(async move { tokio::io::copy(&mut from_gateway, &mut to_client).await });
    let name = "gateway.example".try_into().unwrap();
    let mut conn = client.connector_offering(&[b"h2"]).connect(name, mine).await.unwrap();
    conn.write_all(&beginning()).await.unwrap();
    conn.flush().await.unwrap();
    sleep(Duration::from_secs(1)).await;
    slow.cancel();
    let mut out = BytesMut::new();
    for _ in 0..500 {
        frame(&mut out, PING, 1, 0, b"12345678");
    }
    conn.write_all(&out).await.unwrap();
    conn.flush().await.unwrap();
    let last = up.await.unwrap();
    dies(last, task).await;
    drop(conn);
}

/// Nothing comes from it, since its windows are large, and its answer to a probe waits for what stands before it.
#[tokio::test(start_paused = true)]
async fn a_client_that_reads_slowly_is_alive() {
    let mut site = Site::up().await;
    let (mut io, task): (DuplexStream, _) = site.client();
    let mut out = beginning();
    request(&mut out, 1);
    for stream in [0, 1] {
        frame(&mut out, WINDOW_UPDATE, 0, stream, &(1_u32 << 30).to_be_bytes());
    }
    io.write_all(&out).await.unwrap();
    let mut edge = site.edge.pending().await.accept(String::new()).await.unwrap();
    let download = tokio::spawn(async move { edge.write_all(&vec![7; 4 << 20]).await });
    for _ in 0..20 {
        sleep(SELDOM).await;
        io.read_exact(&mut [0; 1000]).await.unwrap();
    }
    let last = Instant::now();
    assert!(!download.is_finished());
    dies(last, task).await;
    assert!(download.await.unwrap().is_err());
}
