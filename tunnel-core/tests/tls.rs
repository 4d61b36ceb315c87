//! TLS on real sockets: three trust domains that never mix, credentials that reload, records that are full.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs,
    io::{self, Write},
    path::Path,
    sync::Arc,
    time::Duration,
};

use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose,
};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
};
use tunnel_core::tls::{self, ClientTls, Domain, Files, ServerTls};

const DOMAINS: [Domain; 3] = [Domain::Edge, Domain::ControlPlane, Domain::Peer];

struct Authority(Issuer<'static, KeyPair>, String);

fn authority(name: &str) -> Authority {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign];
    let key = KeyPair::generate().unwrap();
    let pem = params.self_signed(&key).unwrap().pem();
    Authority(Issuer::new(params, key), pem)
}

impl Authority {
    /// Writes a certificate for localhost, good for both roles, with its key and this CA, and names the files.
    fn issue(&self, dir: &Path, name: &str, shape: impl FnOnce(&mut CertificateParams)) -> Files {
        let mut params = CertificateParams::new(vec!["localhost".to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        params.extended_key_usages =
            vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        shape(&mut params);
        let key = KeyPair::generate().unwrap();
        let files = Files {
            cert: dir.join(format!("{name}.crt")),
            key: dir.join(format!("{name}.key")),
            ca: dir.join(format!("{name}.ca")),
        };
        fs::write(&files.cert, params.signed_by(&key, &self.0).unwrap().pem()).unwrap();
        fs::write(&files.key, key.serialize_pem()).unwrap();
        fs::write(&files.ca, &self.1).unwrap();
        files
    }
}

/// One handshake and one byte each way, as each side saw it. The byte matters: in TLS 1.3 a client learns only by
/// reading that its certificate was refused.
async fn handshake(server: &ServerTls, client: &ClientTls) -> (io::Result<()>, io::Result<()>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let acceptor = server.acceptor();
    let serve = async {
        let (socket, _) = listener.accept().await?;
        let mut stream = acceptor.accept(socket).await?;
        stream.write_all(b"s").await?;
        stream.read_exact(&mut [0; 1]).await.map(drop)
    };
    let connector = client.connector();
    let dial = async {
        let socket = TcpStream::connect(address).await?;
        let mut stream = connector.connect(ServerName::try_from("localhost").unwrap(), socket).await?;
        stream.write_all(b"c").await?;
        stream.read_exact(&mut [0; 1]).await.map(drop)
    };
    let both = async { tokio::join!(serve, dial) };
    tokio::time::timeout(Duration::from_secs(10), both).await.unwrap()
}

fn server(domain: Domain, files: &Files) -> ServerTls {
    ServerTls::load(domain, files.clone()).unwrap()
}

fn client(domain: Domain, files: &Files) -> ClientTls {
    ClientTls::load(domain, files.clone()).unwrap()
}

/// Each domain's certificate at each other domain's listener, refused by the listener; and a client of one domain
/// does not talk to a listener of another even if only the listener's certificate is wrong.
#[tokio::test]
async fn no_certificate_crosses_a_trust_domain() {
    let dir = tempfile::tempdir().unwrap();
    let authorities: Vec<_> = DOMAINS.iter().map(|domain| authority(&domain.to_string())).collect();
    let files: Vec<_> = DOMAINS
        .iter()
        .zip(&authorities)
        .map(|(domain, authority)| authority.issue(dir.path(), &domain.to_string(), |_| {}))
        .collect();
    let mut refused = 0;
    for (at, listener_domain) in DOMAINS.into_iter().enumerate() {
        for (from, _) in DOMAINS.iter().enumerate() {
            let listener = server(listener_domain, &files[at]);
            // The stranger knows the listener's CA and speaks its protocol: only its own certificate is foreign.
            let stranger = Files { ca: files[at].ca.clone(), ..files[from].clone() };
            let (served, dialled) = handshake(&listener, &client(listener_domain, &stranger)).await;
            if at == from {
                served.unwrap();
                dialled.unwrap();
                continue;
            }
            let served = served.unwrap_err();
            assert_eq!(tls::label(&served), "unknown_ca", "{from} at {at}: {served}");
            let told = tls::explain(&dialled.unwrap_err());
            assert!(told.contains("does not trust this side's certificate"), "{told}");
            // And the other way about: a listener with a foreign certificate.
            let (_, dialled) = handshake(&listener, &client(listener_domain, &files[from])).await;
            assert_eq!(tls::label(&dialled.unwrap_err()), "unknown_ca");
            refused += 1;
        }
    }
    assert_eq!(refused, 6);
}

#[tokio::test]
async fn an_expired_certificate_is_refused_and_both_sides_say_so() {
    let dir = tempfile::tempdir().unwrap();
    let ca = authority("edge");
    let good = ca.issue(dir.path(), "good", |_| {});
    let expired = ca.issue(dir.path(), "expired", |params| {
        params.not_before = rcgen::date_time_ymd(2020, 1, 1);
        params.not_after = rcgen::date_time_ymd(2020, 1, 2);
    });
    let (served, dialled) = handshake(&server(Domain::Edge, &good), &client(Domain::Edge, &expired)).await;
    let served = served.unwrap_err();
    assert_eq!(tls::label(&served), "expired");
    assert!(tls::explain(&served).contains("has expired"), "{served}");
    assert!(tls::explain(&dialled.unwrap_err()).contains("this side's certificate has expired"));
}

#[tokio::test]
async fn the_wrong_protocol_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let files = authority("edge").issue(dir.path(), "edge", |_| {});
    let (served, dialled) = handshake(&server(Domain::Edge, &files), &client(Domain::Peer, &files)).await;
    assert_eq!(tls::label(&served.unwrap_err()), "alpn");
    assert!(tls::explain(&dialled.unwrap_err()).contains("right port"));
}

#[tokio::test]
async fn credentials_reload_and_a_broken_file_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (old, new) = (authority("old"), authority("new"));
    let files = old.issue(dir.path(), "gateway", |_| {});
    let listener = server(Domain::Edge, &files);
    assert!(!listener.reload().unwrap());

    let old_edge = old.issue(dir.path(), "old-edge", |_| {});
    let new_edge = new.issue(dir.path(), "new-edge", |_| {});
    assert!(handshake(&listener, &client(Domain::Edge, &new_edge)).await.0.is_err());

    fs::write(&files.key, "-----BEGIN PRIVATE KEY-----\nAAAA\n").unwrap();
    let error = listener.reload().unwrap_err().to_string();
    assert!(error.contains("gateway.key"), "{error}");
    handshake(&listener, &client(Domain::Edge, &old_edge)).await.0.unwrap();

    new.issue(dir.path(), "gateway", |_| {});
    assert!(listener.reload().unwrap());
    let (served, dialled) = handshake(&listener, &client(Domain::Edge, &new_edge)).await;
    served.unwrap();
    dialled.unwrap();
}

#[test]
fn a_certificate_that_its_owner_does_not_accept_is_not_taken() {
    let dir = tempfile::tempdir().unwrap();
    let authority = authority("edge");
    let edge = client(Domain::Edge, &authority.issue(dir.path(), "edge", |_| {}));
    let before = edge.certificate();
    assert!(!edge.reload_if(|_| Err("asked though nothing has changed".to_owned())).unwrap());
    authority.issue(dir.path(), "edge", |_| {});
    for _ in 0..2 {
        let error = edge.reload_if(|new| if *new == before { Ok(()) } else { Err("another".to_owned()) });
        let error = error.unwrap_err().to_string();
        assert!(error.ends_with("edge.crt is not taken: another"), "{error}");
        assert_eq!(edge.certificate(), before);
    }
    assert!(edge.reload_if(|_| Ok(())).unwrap());
    assert_ne!(edge.certificate(), before);
}

#[tokio::test]
async fn files_that_cannot_be_used_are_named() {
    let dir = tempfile::tempdir().unwrap();
    let files = authority("edge").issue(dir.path(), "edge", |_| {});
    let other = authority("other").issue(dir.path(), "other", |_| {});
    let missing = Files { cert: dir.path().join("missing.crt"), ..files.clone() };
    let swapped = Files { cert: files.key.clone(), ..files.clone() };
    let mismatched = Files { key: other.key.clone(), ..files.clone() };
    for (files, expected) in [
        (missing, "cannot read"),
        (swapped, "holds no certificate in PEM form"),
        (mismatched, "the key does not belong to the certificate"),
    ] {
        let error = ServerTls::load(Domain::Edge, files).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
}

/// Lengths of the TLS records in a capture of one direction.
fn records(mut wire: &[u8]) -> Vec<usize> {
    let mut lengths = Vec::new();
    while let [_, _, _, high, low, rest @ ..] = wire {
        let length = usize::from(u16::from_be_bytes([*high, *low]));
        lengths.push(length);
        wire = rest.get(length..).unwrap_or_default();
    }
    lengths
}

/// Header and body of a frame leave in one TLS record: bulk makes full records, and no small one between them.
#[tokio::test]
async fn bulk_leaves_in_full_records() {
    use tunnel_core::{
        Link, LinkConfig, LinkEvent, OpenRequest, ReadAhead,
        proto::messages::{Hello, Welcome},
    };
    let dir = tempfile::tempdir().unwrap();
    let files = authority("edge").issue(dir.path(), "edge", |_| {});
    let (near, mut tap_near) = tokio::io::duplex(1 << 20);
    let (mut tap_far, far) = tokio::io::duplex(1 << 20);
    let capture = Arc::new(std::sync::Mutex::new(Vec::new()));
    let recorded = capture.clone();
    let tap = tokio::spawn(async move {
        let (mut near_read, mut near_write) = tokio::io::split(&mut tap_near);
        let (mut far_read, mut far_write) = tokio::io::split(&mut tap_far);
        let back = async {
            let mut piece = vec![0; 1 << 16];
            while let Ok(read @ 1..) = far_read.read(&mut piece).await {
                recorded.lock().unwrap().extend_from_slice(&piece[..read]);
                near_write.write_all(&piece[..read]).await.unwrap();
            }
        };
        tokio::join!(tokio::io::copy(&mut near_read, &mut far_write), back).0.ok();
    });
    let config = LinkConfig::default();
    let acceptor = server(Domain::Edge, &files).acceptor();
    let gateway = tokio::spawn(async move {
        let tls = acceptor.accept(ReadAhead::new(far)).await.unwrap();
        let pending = Link::accept(tls, config).await.unwrap();
        pending.welcome(Welcome { version: 1, heartbeat_ms: 10_000, ..Welcome::default() }).unwrap()
    });
    let connector = client(Domain::Edge, &files).connector();
    let name = ServerName::try_from("localhost").unwrap();
    let tls = connector.connect(name, ReadAhead::new(near)).await.unwrap();
    let hello = Hello { min_version: 1, max_version: 1, ..Hello::default() };
    let (mut edge, _) = Link::connect(tls, hello, LinkConfig::default()).await.unwrap();
    let mut gateway = gateway.await.unwrap();
    let handle = gateway.handle();
    tokio::spawn(async move { while !matches!(gateway.next().await, LinkEvent::Closed(_)) {} });
    let reader = tokio::spawn(async move {
        let LinkEvent::Stream(incoming) = edge.next().await else { panic!("no stream came") };
        let deadline = tokio::time::Instant::now() + Duration::from_secs(5);
        let pending = incoming.header(deadline).await.unwrap();
        let mut stream = pending.accept(String::new()).await.unwrap();
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        (bytes.len(), edge)
    });
    let (mut stream, _) = handle.open(OpenRequest::default(), Duration::from_secs(5)).await.unwrap();
    capture.lock().unwrap().clear();
    let bulk = 4 << 20;
    stream.write_all(&vec![7; bulk]).await.unwrap();
    stream.shutdown().await.unwrap();
    let (read, _edge) = reader.await.unwrap();
    assert_eq!(read, bulk);
    let lengths = records(&capture.lock().unwrap());
    // 16,372 bytes of body and 12 of header make 16,384 of plaintext; TLS 1.3 adds 17.
    let full = lengths.iter().filter(|length| **length == 16_384 + 17).count();
    assert_eq!(full, bulk / 16_372, "{lengths:?}");
    assert!(lengths.len() <= full + 8, "{} records for {full} frames: {lengths:?}", lengths.len());
    tap.abort();
}

#[tokio::test]
async fn what_a_link_or_a_relay_writes_at_once_is_taken_at_once() {
    let dir = tempfile::tempdir().unwrap();
    let files = authority("edge").issue(dir.path(), "both", |_| {});
    let (near, far) = tokio::io::duplex(64 * 1024);
    let (acceptor, connector) =
        (server(Domain::Edge, &files).acceptor(), client(Domain::Edge, &files).connector());
    let name = ServerName::try_from("localhost").unwrap();
    let (near, far) = tokio::join!(connector.connect(name, near), acceptor.accept(far));
    let (mut near, mut far) = (near.unwrap(), far.unwrap());
    let (dialled, accepted) = (near.get_mut().1, far.get_mut().1);
    tls::widen_for_link(dialled);
    tls::widen_for_relay(accepted);
    let bytes = vec![0; 1 << 20];
    let taken = dialled.writer().write(&bytes).unwrap();
    assert!((256 << 10..300 << 10).contains(&taken), "{taken}");
    assert_eq!(accepted.writer().write(&bytes).unwrap(), 128 << 10);
}
