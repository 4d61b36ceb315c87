//! Every workload, from end to end: straight to the target, and over the hops of two relays.

use std::{fs, net::SocketAddr, path::Path, time::Duration};

use rcgen::{BasicConstraints, CertificateParams, CertifiedIssuer, IsCa, KeyPair};
use serde_json::Value;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream, UnixListener},
    time::sleep,
};
use tokio_util::task::AbortOnDropHandle;

use crate::{
    blocks::{self, BLOCK, Direction, Item, Receiver},
    relay::{Hop, Relay},
    target,
    tls::{self, Cipher, Files},
    way::{Via, Way},
    workloads::{DriveError, Timing, Workload},
};

const TIMING: Timing = Timing {
    warm_up: Duration::from_millis(50),
    seconds: Duration::from_millis(200),
    limit: Duration::from_secs(10),
};

/// A program that listens, and ends with all its connections when it is dropped.
struct Program {
    address: SocketAddr,
    _task: AbortOnDropHandle<()>,
}

impl Program {
    async fn start<F>(serve: impl FnOnce(TcpListener) -> F) -> Self
    where
        F: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        Self { address, _task: AbortOnDropHandle::new(tokio::spawn(serve(listener))) }
    }

    async fn target() -> Self {
        Self::start(|listener| async move { target::serve(&listener).await.unwrap() }).await
    }

    async fn relay(relay: Relay) -> Self {
        Self::start(|listener| async move { relay.serve(&listener).await.unwrap() }).await
    }

    fn way(&self) -> Way {
        Way::new(Via::Tcp(self.address.to_string()), String::new(), None, String::new()).unwrap()
    }
}

/// One certificate for everyone.
fn files(folder: &Path) -> Files {
    let mut ca = CertificateParams::new(Vec::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = CertifiedIssuer::self_signed(ca, KeyPair::generate().unwrap()).unwrap();
    let key = KeyPair::generate().unwrap();
    let certificate =
        CertificateParams::new(vec!["localhost".to_owned()]).unwrap().signed_by(&key, &ca).unwrap();
    let write = |name: &str, text: &str| {
        fs::write(folder.join(name), text).unwrap();
        folder.join(name)
    };
    Files {
        cert: write("cert.pem", &certificate.pem()),
        key: write("key.pem", &key.serialize_pem()),
        ca: write("ca.pem", &ca.pem()),
    }
}

/// Two hops with TLS: from the client to the near relay, and from that one to the far relay.
struct Hops {
    near: Program,
    _far: Program,
    files: Files,
    _folder: tempfile::TempDir,
}

impl Hops {
    async fn to(target: &Program) -> Self {
        tls::use_cipher(Cipher::Aes128Gcm);
        let folder = tempfile::tempdir().unwrap();
        let files = files(folder.path());
        let accept = Hop::Tls(files.acceptor().unwrap());
        let buffer = 64 * 1024;
        let far = Relay { to: target.address, accept: accept.clone(), dial: Hop::Plain, buffer };
        let far = Program::relay(far).await;
        let dial = Hop::Tls((files.connector().unwrap(), tls::server_name("localhost").unwrap()));
        let near = Program::relay(Relay { to: far.address, accept, dial, buffer }).await;
        Self { near, _far: far, files, _folder: folder }
    }

    fn way(&self) -> Way {
        let via = Via::Tls(self.near.address.to_string());
        Way::new(via, String::new(), Some(&self.files), "localhost".to_owned()).unwrap()
    }
}

async fn run(workload: Workload, way: &Way, streams: usize, direction: Direction) -> Value {
    workload.run(way, streams, direction, TIMING).await.unwrap()
}

fn positive(figures: &Value, names: &[&str]) {
    for name in names {
        assert!(figures[name].as_f64().is_some_and(|figure| figure > 0.0), "{name} in {figures}");
    }
}

async fn every_workload(way: &Way) {
    for direction in [Direction::Down, Direction::Up] {
        for streams in [1, 8] {
            let figures = run(Workload::Bulk, way, streams, direction).await;
            positive(&figures, &["bytes", "seconds", "gbit_per_s"]);
            let [bytes, seconds, rate] =
                ["bytes", "seconds", "gbit_per_s"].map(|name| figures[name].as_f64().unwrap());
            assert!((bytes * 8.0 / 1e9 / seconds - rate).abs() < 0.01 * rate + 1e-3, "{figures}");
            // Coming down, the time is this side's own, which does not sleep for less. Going up it is the target's.
            assert!(direction == Direction::Up || seconds >= TIMING.seconds.as_secs_f64(), "{figures}");
        }
        let figures = run(Workload::Interleaved, way, 4, direction).await;
        positive(&figures, &["count", "p50_us", "p99_us", "p999_us", "gbit_per_s"]);
    }
    positive(&run(Workload::Ping, way, 1, Direction::Down).await, &["count", "p50_us", "p99_us", "p999_us"]);
    positive(&run(Workload::FirstByte, way, 1, Direction::Down).await, &["count", "p50_us", "p99_us"]);
    let figures = run(Workload::Requests, way, 4, Direction::Down).await;
    positive(&figures, &["per_s", "p50_us", "p99_us"]);
    assert_eq!(figures["failed"], 0);
    assert_eq!(run(Workload::Idle, way, 50, Direction::Down).await["open"], 50);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn straight_to_the_target() {
    let target = Program::target().await;
    every_workload(&target.way()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn by_a_unix_socket_and_a_relay() {
    let target = Program::target().await;
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("relay.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let relay = Relay { to: target.address, accept: Hop::Plain, dial: Hop::Plain, buffer: 64 * 1024 };
    let serving = async move { relay.serve(&listener).await.unwrap() };
    let _relay = AbortOnDropHandle::new(tokio::spawn(serving));
    let via = format!("uds:{}", path.display()).parse().unwrap();
    every_workload(&Way::new(via, String::new(), None, String::new()).unwrap()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn over_two_relays_with_tls() {
    let target = Program::target().await;
    every_workload(&Hops::to(&target).await.way()).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_ends_meanwhile_is_no_figure() {
    use Workload::{Bulk, Interleaved, Ping, Requests};
    let up = [Bulk, Interleaved].map(|workload| (workload, Direction::Up));
    let down = [Bulk, Interleaved, Ping, Requests].map(|workload| (workload, Direction::Down));
    for (workload, direction) in down.into_iter().chain(up) {
        let target = Program::target().await;
        let hops = Hops::to(&target).await;
        let (plain, tls) = (target.way(), hops.way());
        // Nothing is measured before the target has ended.
        let timing = Timing { warm_up: Duration::from_millis(500), ..TIMING };
        let [straight, relayed] = [&plain, &tls].map(|way| workload.run(way, 2, direction, timing));
        let end = async {
            sleep(Duration::from_millis(100)).await;
            drop(target);
        };
        let (straight, relayed, ()) = tokio::join!(straight, relayed, end);
        for ended in [straight, relayed] {
            // Where it was found out does not matter.
            assert!(ended.is_err(), "{workload:?} {direction:?}: {ended:?}");
        }
    }
}

#[tokio::test]
async fn the_target_counts_what_comes_in_the_measured_time() {
    let target = Program::target().await;
    let (block, run) = (blocks::bulk(), 7_u64.to_be_bytes());
    let mut sent = [&[target::SINK], &run[..]].concat();
    for part in [&block[..], &[blocks::BEGIN], &block, &block, &[blocks::FINISH], &block] {
        sent.extend_from_slice(part);
    }
    sent.extend_from_slice(&blocks::end(4 * BLOCK as u64));
    let mut stream = TcpStream::connect(target.address).await.unwrap();
    stream.write_all(&sent).await.unwrap();
    assert_eq!(stream.read_u64().await.unwrap(), 4 * BLOCK as u64);
    assert_eq!(stream.read_u64().await.unwrap(), 2 * BLOCK as u64);
    assert!(stream.read_u64().await.unwrap() > 0);
    assert_eq!(stream.read(&mut [0]).await.unwrap(), 0);
}

/// As a tunnel does it that takes a reset for an end: no error is seen but by counting.
#[tokio::test]
async fn an_end_in_the_middle_is_an_error() {
    let [more, less] = [BLOCK + 1, BLOCK - 1].map(|count| blocks::end(count as u64).to_vec());
    for end in [Vec::new(), more, less] {
        let cut = Program::start(|listener| async move {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(&blocks::bulk()).await.unwrap();
            stream.write_all(&end).await.unwrap();
            stream.shutdown().await.unwrap();
            // The end is not a reset.
            std::future::pending::<()>().await;
        });
        let ended = Workload::Bulk.run(&cut.await.way(), 1, Direction::Down, TIMING).await;
        assert!(matches!(ended, Err(DriveError::Broken { .. })), "{ended:?}");
    }
}

#[tokio::test]
async fn blocks_are_read_wherever_they_are_cut() {
    let mut sent = vec![blocks::BEGIN];
    sent.extend_from_slice(&blocks::bulk());
    sent.push(blocks::FINISH);
    sent.extend_from_slice(&blocks::bulk());
    sent.extend_from_slice(&blocks::end(2 * BLOCK as u64));
    for cut in [1, 2, 3, BLOCK, BLOCK + 1, BLOCK + 2, BLOCK + 3, sent.len() - 1] {
        let (mut near, mut far) = tokio::io::duplex(sent.len());
        let mut receiver = Receiver::new();
        let mut items = Vec::new();
        let mut last = None;
        for part in [&sent[..cut], &sent[cut..]] {
            far.write_all(part).await.unwrap();
            assert!(last.is_none());
            last = receiver.step(&mut near, |item| items.push(item)).await.unwrap();
        }
        assert_eq!(last, Some(2 * BLOCK as u64), "cut at {cut}");
        let marks: Vec<_> = items.iter().filter(|item| !matches!(item, Item::Bulk(_))).collect();
        assert_eq!(marks, [&Item::Begin, &Item::Finish, &Item::End(2 * BLOCK as u64)], "cut at {cut}");
    }
}

#[tokio::test]
async fn a_refused_connect_says_what_was_answered() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("front");
    let listener = UnixListener::bind(&path).unwrap();
    let front = async {
        let (mut stream, _) = listener.accept().await.unwrap();
        let mut head = [0; 41];
        stream.read_exact(&mut head).await.unwrap();
        stream.write_all(b"HTTP/1.1 503 node a has no link\r\n\r\n").await.unwrap();
        head
    };
    let via = Via::ConnectUds(path.to_str().unwrap().to_owned());
    let way = Way::new(via, "a:1".to_owned(), None, String::new()).unwrap();
    let (head, ended) = tokio::join!(front, Workload::Ping.run(&way, 1, Direction::Down, TIMING));
    assert_eq!(head, *b"CONNECT a:1 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    let error = ended.unwrap_err().to_string();
    assert!(error.contains("CONNECT a:1") && error.contains("503 node a has no link"), "{error}");
}
