//! What is carried arrives whole: much of it, on many streams at once, beside streams that are stuck, and what comes
//! before the target is there.

use std::{
    io,
    net::SocketAddr,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering::Relaxed},
    },
    time::Duration,
};

use rand::{RngCore, SeedableRng, rngs::SmallRng};
use ring::digest;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    sync::{Barrier, Semaphore},
    task::JoinSet,
    time::{Instant, sleep, timeout},
};
use tunnel_core::{Host, Socket};
use tunnel_edge::network::{DialError, Network, SystemNetwork};
use tunnel_tests::{connect::reply, workload};

use crate::rig::{Client, LIMIT, Rig, ping, raw_end, shrink_buffers, until, within};

const GIB: u64 = 1 << 30;
const PIECE: usize = 64 * 1024;

/// A transfer as one end of it has seen it.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    bytes: u64,
    sha256: Vec<u8>,
}

/// Sends random bytes, then the end.
async fn send_random(writer: &mut (impl AsyncWrite + Unpin), bytes: u64, seed: u64) -> io::Result<Seen> {
    let (mut rng, mut hash) = (SmallRng::seed_from_u64(seed), digest::Context::new(&digest::SHA256));
    let mut piece = vec![0; PIECE];
    for _ in 0..bytes / PIECE as u64 {
        rng.fill_bytes(&mut piece);
        hash.update(&piece);
        writer.write_all(&piece).await?;
    }
    writer.shutdown().await?;
    Ok(Seen { bytes, sha256: hash.finish().as_ref().to_vec() })
}

/// Reads to the end.
async fn receive_all(reader: &mut (impl AsyncRead + Unpin)) -> io::Result<Seen> {
    let (mut bytes, mut hash) = (0, digest::Context::new(&digest::SHA256));
    let mut piece = vec![0; PIECE];
    loop {
        let read = reader.read(&mut piece).await?;
        if read == 0 {
            return Ok(Seen { bytes, sha256: hash.finish().as_ref().to_vec() });
        }
        hash.update(&piece[..read]);
        bytes += read as u64;
    }
}

/// A transfer of a GiB may take longer than other steps.
const PATIENCE: Duration = Duration::from_secs(120);

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gibibyte_each_way_arrives_whole() {
    let rig = Rig::start_alone().await;
    let (mut client, mut target) = rig.pair("edge-a", 0).await;
    let begun = Instant::now();
    let upload = async { tokio::join!(send_random(&mut client, GIB, 1), receive_all(&mut target)) };
    let (sent, received) = timeout(PATIENCE, upload).await.unwrap();
    assert_eq!(received.unwrap(), sent.unwrap());
    println!("1 GiB up in {:?}", begun.elapsed());
    target.shutdown().await.unwrap();
    assert_eq!(within("the end", receive_all(&mut client)).await.unwrap().bytes, 0);

    let (mut client, mut target) = rig.pair("edge-b", 1).await;
    let begun = Instant::now();
    let download = async { tokio::join!(send_random(&mut target, GIB, 2), receive_all(&mut client)) };
    let (sent, received) = timeout(PATIENCE, download).await.unwrap();
    assert_eq!(received.unwrap(), sent.unwrap());
    println!("1 GiB down in {:?}", begun.elapsed());
    client.shutdown().await.unwrap();
    assert_eq!(within("the end", receive_all(&mut target)).await.unwrap().bytes, 0);
    rig.close().await;
}

/// All of a link, but for those that it keeps for the kubelet's port.
const STREAMS: usize = 1024 - 32;
/// For each stream the client's socket, the gateway's, the edge's, and the target's; and some for all else.
const DESCRIPTORS: u64 = 4 * STREAMS as u64 + 500;

/// The soft limit may be less than the test needs, most often 1,024; the hard one seldom is.
fn raise_descriptor_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if limit.current.is_some_and(|soft| soft < DESCRIPTORS) {
        let raised = Rlimit { current: Some(DESCRIPTORS), maximum: limit.maximum };
        setrlimit(Resource::Nofile, raised).expect("the hard limit of open files must be at least 4,500");
    }
}

/// By HTTP/1.1, so that each stream has connections of its own on both sides and only the link is shared.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_thousand_streams_at_once_on_one_link_carry_each_its_own_bytes() {
    const BYTES: u64 = 20_000;
    raise_descriptor_limit();
    let mut rig = Rig::start_alone().await;
    rig.serve_workload();
    let (rig, all_open) = (Arc::new(rig), Arc::new(Barrier::new(STREAMS + 1)));
    let begun = Instant::now();
    let mut streams = JoinSet::new();
    for id in 0..STREAMS as u64 {
        let (rig, all_open) = (rig.clone(), all_open.clone());
        streams.spawn(async move {
            let mut client = rig.open("edge-a").await;
            client.write_all(format!("{id} echo {BYTES}\n").as_bytes()).await.unwrap();
            let mut node = [0; 7];
            client.read_exact(&mut node).await.unwrap();
            assert_eq!(&node, b"edge-a\n");
            // Once to say that it is open, once to learn that all were counted.
            all_open.wait().await;
            all_open.wait().await;
            let (mut reader, mut writer) = tokio::io::split(client);
            let sending = async {
                workload::send(&mut writer, id, 0..BYTES).await?;
                writer.shutdown().await
            };
            let (sent, received) = tokio::join!(sending, workload::receive(&mut reader, id));
            sent.unwrap();
            assert_eq!(received.unwrap(), (BYTES, None), "stream {id}");
        });
    }
    // A stream that fails never comes to the barrier: its own complaint is the better one.
    tokio::select! {
        biased;
        Some(Err(failed)) = streams.join_next() => panic!("{failed}"),
        _ = within("all to be open", all_open.wait()) => {}
    }
    println!("{STREAMS} open after {:?}", begun.elapsed());
    rig.relaying(STREAMS).await;
    assert_eq!(rig.probe.links(), 2);
    all_open.wait().await;
    within("all echoes", async {
        while let Some(done) = streams.join_next().await {
            done.unwrap();
        }
    })
    .await;
    println!("{STREAMS} done after {:?}", begun.elapsed());
    Arc::into_inner(rig).unwrap().close().await;
}

/// What windows and buffers on the way may hold of one stream that nobody reads.
const MOST_UNREAD: u64 = 2 << 20;
/// A sender that was taken nothing from for so long is stuck.
const STUCK: Duration = Duration::from_secs(1);

/// Sends for ever, and counts what was taken.
fn send_for_ever(
    tasks: &mut JoinSet<io::Error>,
    mut writer: impl AsyncWrite + Send + Unpin + 'static,
) -> Arc<AtomicU64> {
    let count = Arc::new(AtomicU64::new(0));
    let taken = count.clone();
    tasks.spawn(async move {
        let piece = vec![1; PIECE];
        loop {
            match writer.write(&piece).await {
                Ok(written) => taken.fetch_add(written as u64, Relaxed),
                Err(error) => return error,
            };
        }
    });
    count
}

async fn until_stuck(count: &AtomicU64) -> u64 {
    let deadline = Instant::now() + LIMIT;
    let (mut last, mut since) = (0, Instant::now());
    while last == 0 || since.elapsed() < STUCK {
        assert!(Instant::now() < deadline, "the sender is still not stuck after {last} bytes");
        let now = count.load(Relaxed);
        if now != last {
            (last, since) = (now, Instant::now());
        }
        sleep(Duration::from_millis(10)).await;
    }
    last
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn those_that_never_read_stop_their_own_streams_only() {
    let rig = Rig::start_alone_with_small_buffers().await;
    let mut senders = JoinSet::new();
    let (client, deaf_target) = rig.pair("edge-a", 0).await;
    let (deaf_client, target) = rig.pair("edge-a", 0).await;
    for tcp in [client.get_ref().0, deaf_client.get_ref().0, &target, &deaf_target] {
        shrink_buffers(tcp);
    }
    let up = send_for_ever(&mut senders, client);
    let down = send_for_ever(&mut senders, target);
    let (taken_up, taken_down) = (until_stuck(&up).await, until_stuck(&down).await);
    println!("stuck after {taken_up} bytes up, {taken_down} bytes down");
    assert!(taken_up < MOST_UNREAD && taken_down < MOST_UNREAD, "{taken_up} and {taken_down} bytes");

    let (mut client, mut target) = rig.pair("edge-a", 0).await;
    let mut slowest = Duration::ZERO;
    for _ in 0..200 {
        let begun = Instant::now();
        let mut bytes = [b'p'; 64];
        within("a ping", async {
            client.write_all(&bytes).await.unwrap();
            client.flush().await.unwrap();
            target.read_exact(&mut bytes).await.unwrap();
            target.write_all(&bytes).await.unwrap();
            client.read_exact(&mut bytes).await.unwrap();
        })
        .await;
        slowest = slowest.max(begun.elapsed());
    }
    println!("the slowest of 200 pings took {slowest:?}");
    assert!(slowest < Duration::from_millis(500), "{slowest:?}");
    assert_eq!((up.load(Relaxed), down.load(Relaxed)), (taken_up, taken_down), "they were not stuck");

    // Those that did not read leave: their senders must learn of it.
    deaf_target.set_zero_linger().unwrap();
    deaf_client.get_ref().0.set_zero_linger().unwrap();
    drop((deaf_target, deaf_client, client, target));
    while let Some(error) = within("the senders' errors", senders.join_next()).await {
        let error = error.unwrap();
        assert!(
            matches!(error.kind(), io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe),
            "{error}"
        );
    }
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bytes_behind_the_request_reach_the_target_first_and_none_follow_the_reply() {
    let rig = Rig::start().await;
    let mut client = within("TLS", rig.tls()).await.unwrap();
    let early = "early ".repeat(1000);
    let head = format!("CONNECT {} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n", rig.target("edge-b"));
    client.write_all(format!("{head}{early}").as_bytes()).await.unwrap();
    client.flush().await.unwrap();
    let mut target = rig.accept(1).await;
    let mut received = vec![0; early.len()];
    within("the early bytes", target.read_exact(&mut received)).await.unwrap();
    assert_eq!(received, early.as_bytes());

    // `reply` fails if anything came with the head.
    within("the reply", reply(&mut client)).await.unwrap().unwrap();
    let silence = timeout(Duration::from_millis(300), client.read_u8()).await;
    assert!(silence.is_err(), "before the target spoke, there came {silence:?}");
    ping(&mut client, &mut target).await;
    client.shutdown().await.unwrap();
    target.shutdown().await.unwrap();
    assert_eq!(raw_end(target).await, Ok(()));
    rig.close().await;
}

/// kube-apiserver compares the reply with nothing, but its parser takes `OK` and no field for what they are.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_whole_reply_is_a_status_line() {
    let rig = Rig::start().await;
    let mut client = within("TLS", rig.tls()).await.unwrap();
    client.write_all(format!("CONNECT {} HTTP/1.1\r\n\r\n", rig.target("edge-a")).as_bytes()).await.unwrap();
    let mut target = rig.accept(0).await;
    target.write_all(b"first words of the target").await.unwrap();
    target.shutdown().await.unwrap();
    let mut all = String::new();
    within("all of it", client.read_to_string(&mut all)).await.unwrap();
    client.shutdown().await.unwrap();
    assert_eq!(all, "HTTP/1.1 200 OK\r\n\r\nfirst words of the target");
    rig.close().await;
}

/// Kubelets are dialled only when the test says so.
#[derive(Clone)]
struct SlowNetwork {
    slow_port: u16,
    dialling: Arc<AtomicU64>,
    may_dial: Arc<Semaphore>,
}

impl Network for SlowNetwork {
    type Conn = Socket;

    async fn connect(&self, host: &Host, port: u16) -> Result<Socket, DialError> {
        if port == self.slow_port {
            self.dialling.fetch_add(1, Relaxed);
            self.may_dial.acquire().await.unwrap().forget();
        }
        SystemNetwork.connect(host, port).await
    }

    fn peer_address(&self, conn: &Socket) -> Option<SocketAddr> {
        conn.peer_addr().ok()
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_early_bytes_wait_for_a_target_that_is_slow_to_dial() {
    const EARLY: u64 = 600_000;
    let mut rig = Rig::start().await;
    rig.edges[0].take().unwrap().kill().await;
    rig.linked(1).await;
    let network =
        SlowNetwork { slow_port: rig.port, dialling: Arc::default(), may_dial: Arc::new(Semaphore::new(0)) };
    rig.edges[0] = Some(rig.start_edge_on(network.clone(), 0, 0));
    rig.linked(2).await;

    let mut client: Client = within("TLS", rig.tls()).await.unwrap();
    client.write_all(format!("CONNECT {} HTTP/1.1\r\n\r\n", rig.target("edge-a")).as_bytes()).await.unwrap();
    let (mut reader, mut writer) = tokio::io::split(client);
    let sending = tokio::spawn(async move {
        workload::send(&mut writer, 8, 0..EARLY).await?;
        writer.shutdown().await?;
        io::Result::Ok(writer)
    });
    until("the dial", || network.dialling.load(Relaxed) == 1).await;
    let too_early = timeout(Duration::from_millis(300), reader.read_u8()).await;
    assert!(too_early.is_err(), "a reply before the target was connected: {too_early:?}");
    network.may_dial.add_permits(1);

    let mut target = rig.accept(0).await;
    let received = within("the early bytes", workload::receive(&mut target, 8)).await.unwrap();
    assert_eq!(received, (EARLY, None));
    within("the reply", reply(&mut reader)).await.unwrap().unwrap();
    target.write_all(b"thanks").await.unwrap();
    target.shutdown().await.unwrap();
    let mut thanks = String::new();
    within("the answer", reader.read_to_string(&mut thanks)).await.unwrap();
    assert_eq!(thanks, "thanks");
    within("the sender", sending).await.unwrap().unwrap();
    rig.close().await;
}
