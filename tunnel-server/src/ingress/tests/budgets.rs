//! What may end an HTTP/2 connection with all its streams, and what must not: no node, target or stall, but a client that
//! does too much in too short a time.

use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

use bytes::{BufMut, Bytes, BytesMut};
use h2::{
    Reason, RecvStream, SendStream,
    client::{ResponseFuture, SendRequest},
};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, duplex, split},
    sync::watch,
    time::{Instant, sleep, timeout},
};
use tracing::Level;
use tunnel_core::TunnelStream;

use super::{
    http2::{connect, connected, text},
    *,
};
use crate::{ingress::http2::PREFACE, testing::Log};

/// As many as there may be by default.
const STREAMS: u32 = 250;

async fn site() -> Site {
    Site::with(|settings| settings.max_streams = STREAMS, &[], LinkConfig::default()).await
}

/// A client whose connection can be held up, each way by itself.
struct Wire {
    client: SendRequest<Bytes>,
    hold_up: watch::Sender<bool>,
    hold_down: watch::Sender<bool>,
}

impl Wire {
    async fn up(site: &Site) -> Self {
        let (gateway, _task) = site.client();
        let (near, far) = duplex(16 << 20);
        let ((from_client, to_client), (from_gateway, to_gateway)) = (split(far), split(gateway));
        let (hold_up, hold_down) = (watch::Sender::new(false), watch::Sender::new(false));
        tokio::spawn(carry(from_client, to_gateway, hold_up.subscribe()));
        tokio::spawn(carry(from_gateway, to_client, hold_down.subscribe()));
        let (send, connection) = h2::client::handshake(near).await.unwrap();
        tokio::spawn(connection);
        Self { client: send.ready().await.unwrap(), hold_up, hold_down }
    }
}

async fn carry(
    mut from: impl AsyncRead + Unpin,
    mut to: impl AsyncWrite + Unpin,
    mut held: watch::Receiver<bool>,
) {
    let mut bytes = vec![0; 64 * 1024];
    while let Ok(count @ 1..) = from.read(&mut bytes).await {
        if held.wait_for(|held| !held).await.is_err() || to.write_all(&bytes[..count]).await.is_err() {
            return;
        }
    }
}

/// Others do what they can do now.
async fn all_others() {
    for _ in 0..1000 {
        tokio::task::yield_now().await;
    }
}

async fn soon<T>(what: &str, work: impl Future<Output = T>) -> T {
    timeout(Duration::from_secs(20), work).await.unwrap_or_else(|_| panic!("{what}: not in time"))
}

type Stream = (SendStream<Bytes>, RecvStream, TunnelStream);

/// Two hundred uploads fail while one connection carries them and a stream to another node, and their client sends on
/// until it hears of it.
async fn fail_uploads(fail: impl FnOnce(&Site, Vec<TunnelStream>)) {
    const UPLOADS: usize = 200;
    const LATE: usize = 8;
    let log = Log::start();
    let mut site = site().await;
    let mut other = TestLink::up().await;
    let _stays = site.register_as("edge-b", &other, 1);
    let mut wire = Wire::up(&site).await;
    let (response, mut send) = connect(&mut wire.client, "edge-b:10250");
    let mut edge = other.pending().await.accept(String::new()).await.unwrap();
    let receive = response.await.unwrap().into_body();
    let (mut uploads, mut edges) = (Vec::new(), Vec::new());
    for _ in 0..UPLOADS {
        wire.client = soon("a place", wire.client.ready()).await.unwrap();
        let (send, receive, edge): Stream = connected(&mut site, &mut wire.client).await;
        uploads.push((send, receive));
        edges.push(edge);
    }
    wire.hold_down.send_replace(true);
    fail(&site, edges);
    soon("the end of the uploads", async {
        while site.ingress.metrics.streams_active.get() > 1 {
            sleep(Duration::from_millis(1)).await;
        }
    })
    .await;
    for _ in 0..LATE {
        for (upload, _) in &mut uploads {
            upload.send_data("late".into(), false).unwrap();
        }
        // Each is answered before the next, if it is answered at all.
        all_others().await;
    }
    send.send_data("question".into(), true).unwrap();
    let mut question = String::new();
    soon("the question", edge.read_to_string(&mut question)).await.unwrap();
    assert_eq!(question, "question");
    wire.hold_down.send_replace(false);
    edge.write_all(b"answer").await.unwrap();
    edge.shutdown().await.unwrap();
    assert_eq!(soon("the answer", text(receive)).await.unwrap(), "answer");
    for (_, mut receive) in uploads {
        let error = soon("a reset", receive.data()).await.unwrap().unwrap_err();
        assert_eq!(error.reason(), Some(Reason::CONNECT_ERROR));
    }
    assert_eq!(log.lines(Level::WARN, "HTTP/2"), [""; 0]);
}

#[tokio::test]
async fn a_node_that_is_lost_takes_only_its_own_streams() {
    fail_uploads(|site, _edges| site.edge.gateway.close("lost")).await;
}

#[tokio::test]
async fn targets_that_reset_take_only_their_own_streams() {
    fail_uploads(|_site, edges| drop(edges)).await;
}

/// As after a stall: the gateway sees at one time that they were asked for and that nobody waits for them any more.
#[tokio::test]
async fn requests_given_up_in_a_stall_take_nothing_with_them() {
    const GIVEN_UP: usize = 900;
    let log = Log::start();
    let mut site = site().await;
    let mut wire = Wire::up(&site).await;
    let (mut send, receive, mut edge) = connected(&mut site, &mut wire.client).await;
    wire.hold_up.send_replace(true);
    let mut given_up = 0;
    while given_up < GIVEN_UP {
        let mut waiting: Vec<(ResponseFuture, SendStream<Bytes>)> = Vec::new();
        for _ in 0..90 {
            wire.client = soon("a place", wire.client.ready()).await.unwrap();
            waiting.push(connect(&mut wire.client, "edge-a:10250"));
        }
        // So that they are asked for before they are given up.
        all_others().await;
        for (_, mut send) in waiting {
            send.send_reset(Reason::CANCEL);
            given_up += 1;
        }
        all_others().await;
    }
    wire.client = soon("a place", wire.client.ready()).await.unwrap();
    let (response, _send) = connect(&mut wire.client, "edge-a:22");
    all_others().await;
    wire.hold_up.send_replace(false);
    let wanted = async {
        loop {
            let pending = site.edge.pending().await;
            if pending.open().target == "edge-a:22" {
                return pending;
            }
        }
    };
    let _far = soon("the request that was not given up", wanted).await.accept(String::new()).await.unwrap();
    assert_eq!(soon("its answer", response).await.unwrap().status(), 200);
    send.send_data("question".into(), true).unwrap();
    let mut question = String::new();
    soon("the question", edge.read_to_string(&mut question)).await.unwrap();
    edge.write_all(b"answer").await.unwrap();
    edge.shutdown().await.unwrap();
    assert_eq!(soon("the answer", text(receive)).await.unwrap(), "answer");
    assert_eq!(log.lines(Level::WARN, "HTTP/2"), [""; 0]);
}

const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
pub(super) const PING: u8 = 6;
const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
const END_HEADERS: u8 = 4;

pub(super) fn frame(out: &mut BytesMut, kind: u8, flags: u8, stream: u32, body: &[u8]) {
    out.put_slice(&u32::try_from(body.len()).unwrap().to_be_bytes()[1..]);
    out.put_u8(kind);
    out.put_u8(flags);
    out.put_u32(stream);
    out.put_slice(body);
}

/// A connection's beginning.
pub(super) fn beginning() -> BytesMut {
    let mut out = BytesMut::from(PREFACE);
    frame(&mut out, SETTINGS, 0, 0, &[]);
    out
}

/// A request for the kubelet of `edge-a`, as HPACK literals without indexing (RFC 7541, section 6.2.2).
pub(super) fn request(out: &mut BytesMut, stream: u32) {
    let block = b"\0\x07:method\x07CONNECT\0\x0a:authority\x0cedge-a:10250";
    frame(out, HEADERS, END_HEADERS, stream, block);
}

/// A request without a method, which `h2` resets by itself.
fn spoiled(out: &mut BytesMut, stream: u32) {
    frame(out, HEADERS, END_HEADERS, stream, b"\0\x01x\x01y");
}

/// The next frame of one of these types: its type and body.
async fn frame_of(io: &mut (impl AsyncRead + Unpin), kinds: &[u8]) -> (u8, Vec<u8>) {
    let reading = async {
        loop {
            let mut head = [0; 9];
            io.read_exact(&mut head).await.unwrap();
            let mut body = vec![0; u32::from_be_bytes([0, head[0], head[1], head[2]]).try_into().unwrap()];
            io.read_exact(&mut body).await.unwrap();
            if kinds.contains(&head[3]) {
                return (head[3], body);
            }
        }
    };
    soon("a frame", reading).await
}

#[tokio::test(start_paused = true)]
async fn as_many_faults_as_one_likes_are_forgiven_in_time_but_not_at_once() {
    let log = Log::start();
    let site = Site::up().await;
    let (mut io, task) = site.client();
    io.write_all(&beginning()).await.unwrap();
    let mut numbers = (0..).map(|number| 2 * number + 1);
    for _second in 0..10 {
        let mut out = BytesMut::new();
        for number in numbers.by_ref().take(200) {
            spoiled(&mut out, number);
        }
        io.write_all(&out).await.unwrap();
        for _ in 0..200 {
            // Some come before those before them have left, and are too many at once.
            assert_eq!(frame_of(&mut io, &[RST_STREAM, GOAWAY]).await.0, RST_STREAM);
        }
        sleep(Duration::from_secs(1)).await;
    }
    assert_eq!(log.lines(Level::WARN, "HTTP/2"), [""; 0]);

    let started = Instant::now();
    let (mut reader, mut writer) = split(io);
    let talking = tokio::spawn(async move {
        for number in numbers.take(1100) {
            let mut out = BytesMut::new();
            spoiled(&mut out, number);
            if writer.write_all(&out).await.is_err() {
                break;
            }
        }
        writer
    });
    let (_, goaway) = frame_of(&mut reader, &[GOAWAY]).await;
    assert_eq!(goaway[4..8], u32::from(Reason::ENHANCE_YOUR_CALM).to_be_bytes());
    assert!(started.elapsed() < Duration::from_secs(1));
    // It is heard out until it ends as well.
    drop((reader, talking.await));
    soon("the connection's end", task).await.unwrap();
    let lines = log.lines(Level::WARN, "HTTP/2");
    assert_eq!(lines.len(), 1, "{lines:?}");
    assert!(lines[0].contains("the client asked too much of it"), "{lines:?}");
}

#[tokio::test]
async fn a_client_that_does_not_read_its_resets_is_not_read_either() {
    const FAULTS: u32 = 50_000;
    let site = Site::with(|settings| settings.max_streams = 10_000, &[], LinkConfig::default()).await;
    let (io, task) = site.client();
    let (mut reader, mut writer) = split(io);
    let sent = Arc::new(AtomicU32::new(0));
    let counted = sent.clone();
    let talking = tokio::spawn(async move {
        writer.write_all(&beginning()).await.unwrap();
        for fault in 0..FAULTS {
            let mut out = BytesMut::new();
            spoiled(&mut out, 2 * fault + 1);
            writer.write_all(&out).await.unwrap();
            counted.store(fault, Relaxed);
        }
        writer
    });
    all_others().await;
    let stopped_at = sent.load(Relaxed);
    // Some 5,000 resets fit in the pipe, 4,096 faults are read before more are written, and 5,000 fit in the other pipe.
    assert!((5_000..20_000).contains(&stopped_at), "{stopped_at}");
    all_others().await;
    assert_eq!(sent.load(Relaxed), stopped_at);
    // Once it reads, it is read.
    for _ in 0..FAULTS {
        assert_eq!(frame_of(&mut reader, &[RST_STREAM, GOAWAY]).await.0, RST_STREAM);
    }
    let mut writer = talking.await.unwrap();
    let mut out = BytesMut::new();
    frame(&mut out, PING, 0, 0, b"living??");
    writer.write_all(&out).await.unwrap();
    assert_eq!(frame_of(&mut reader, &[PING, GOAWAY]).await, (PING, b"living??".to_vec()));
    drop((reader, writer));
    soon("the connection's end", task).await.unwrap();
}
