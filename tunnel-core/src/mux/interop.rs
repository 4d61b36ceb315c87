//! The multiplexer against others of the same protocol, both ways: the crate `yamux`, and hashicorp/yamux in Go.
//!
//! The far side does what the first byte of each stream says (`tests/yamux/main.go` has the list) and reports in lines.
//! The Go one is built from `tests/yamux` when first needed: `cargo test -p tunnel-core mux::interop -- --include-ignored`.

use std::{
    env, io,
    path::Path,
    process::{self, Stdio},
    sync::{Arc, OnceLock},
    time::Duration,
};

use futures_util::future::try_join_all;
use ring::digest::{SHA256, digest};
use tokio::{
    io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, copy, sink},
    net::{TcpListener, TcpStream},
    process::{Child, Command},
    sync::{Notify, mpsc},
    task::JoinSet,
    time::timeout,
};
use tokio_util::compat::{Compat, FuturesAsyncReadCompatExt, TokioAsyncReadCompatExt};

use super::{Inbound, Mux, MuxConfig, MuxError, MuxHandle, MuxStream, Side};

const MIB: usize = 1 << 20;
const CONFIG: MuxConfig =
    MuxConfig { max_streams: 1000, window_budget: 64 * MIB, window_pool: None, streams_before: 0 };
/// For a whole test.
const LONGEST: Duration = Duration::from_secs(60);
/// Nothing has moved for so long: it waits.
const STALLED: Duration = Duration::from_millis(300);

/// The program at the far side.
#[derive(Clone, Copy, Debug)]
enum Peer {
    Crate,
    Go,
}

/// What the far side shall do by itself.
#[derive(Clone, Copy, Debug, Default)]
struct Orders {
    /// Streams that it opens at once.
    streams: usize,
    /// Bytes that it writes to each.
    bytes: usize,
    /// Its receive windows.
    window: Option<usize>,
}

/// What the far side reports, line by line.
struct Far {
    lines: mpsc::UnboundedReceiver<String>,
    _tasks: JoinSet<()>,
    _child: Option<Child>,
}

impl Far {
    async fn says(&mut self) -> String {
        self.lines.recv().await.unwrap_or_else(|| "nothing more".to_owned())
    }
}

/// A connection of which this side is `side`, and its far side.
async fn start(peer: Peer, side: Side, orders: Orders) -> (Mux, Far) {
    match peer {
        Peer::Crate => {
            let (near, far) = tokio::io::duplex(64 * 1024);
            (Mux::start(BufReader::new(near), side, CONFIG), start_crate(far, side, orders))
        }
        Peer::Go => start_go(side, orders).await,
    }
}

async fn start_go(side: Side, orders: Orders) -> (Mux, Far) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let mut command = Command::new(go_program());
    match side {
        Side::Dialer => command.arg("--listen"),
        Side::Acceptor => command.arg("--dial").arg(listener.local_addr().unwrap().to_string()),
    };
    command.arg("--streams").arg(orders.streams.to_string()).arg("--bytes").arg(orders.bytes.to_string());
    if let Some(window) = orders.window {
        command.arg("--window").arg(window.to_string());
    }
    command.arg("--close-timeout").arg("2s");
    let mut child = command.stdout(Stdio::piped()).kill_on_drop(true).spawn().unwrap();
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
    let io = match side {
        Side::Dialer => TcpStream::connect(lines.next_line().await.unwrap().unwrap()).await.unwrap(),
        Side::Acceptor => listener.accept().await.unwrap().0,
    };
    io.set_nodelay(true).unwrap();
    let (report, reported) = mpsc::unbounded_channel();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        while let Ok(Some(line)) = lines.next_line().await {
            let _ = report.send(line);
        }
    });
    (
        Mux::start(BufReader::new(io), side, CONFIG),
        Far { lines: reported, _tasks: tasks, _child: Some(child) },
    )
}

/// The Go program, built if it was changed since.
fn go_program() -> &'static Path {
    static PROGRAM: OnceLock<std::path::PathBuf> = OnceLock::new();
    PROGRAM.get_or_init(|| {
        let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/yamux");
        // Beside the test programs: target/debug/deps/../yamux-go.
        let program = env::current_exe().unwrap().with_file_name("yamux-go");
        let built = process::Command::new("go")
            .args(["build", "-mod=readonly", "-trimpath", "-buildvcs=false", "-o"])
            .arg(&program)
            .arg(".")
            .current_dir(&source)
            .status();
        match built {
            Ok(status) if status.success() => program,
            Ok(status) => panic!("`go build` in {} failed: {status}", source.display()),
            Err(error) => {
                panic!("cannot run `go` ({error}). These tests need Go 1.22 or later: https://go.dev/dl")
            }
        }
    })
}

mod crate_peer {
    //! The crate, made to do what the Go program does.

    use super::*;
    use futures_util::future::{Either, poll_fn, select};
    use std::{pin::pin, task::Poll};
    use tokio::io::DuplexStream;

    type Stream = Compat<yamux::Stream>;

    pub(super) fn start_crate(io: DuplexStream, near: Side, orders: Orders) -> Far {
        let mode = if near == Side::Dialer { yamux::Mode::Server } else { yamux::Mode::Client };
        let mut config = yamux::Config::default();
        config.set_max_connection_receive_window(None);
        config.set_max_num_streams(1000);
        let connection = yamux::Connection::new(io.compat(), config, mode);
        let (report, lines) = mpsc::unbounded_channel();
        let mut tasks = JoinSet::new();
        tasks.spawn(run(connection, orders, report));
        Far { lines, _tasks: tasks, _child: None }
    }

    async fn run(
        mut connection: yamux::Connection<Compat<DuplexStream>>,
        orders: Orders,
        report: mpsc::UnboundedSender<String>,
    ) {
        let release = Arc::new(Notify::new());
        let (close, mut closed) = mpsc::channel(1);
        let mut tasks = JoinSet::new();
        let mut running = JoinSet::new();
        let mut opened = 0;
        let mut done = 0;
        loop {
            let next = pin!(poll_fn(|cx| {
                while opened < orders.streams
                    && let Poll::Ready(stream) = connection.poll_new_outbound(cx)
                {
                    running.spawn(exchange(stream.unwrap().compat(), opened, orders.bytes));
                    opened += 1;
                }
                while let Poll::Ready(Some(result)) = running.poll_join_next(cx) {
                    done += 1;
                    match result.unwrap() {
                        Err(error) => drop(report.send(format!("failed: {error}"))),
                        Ok(()) if done == orders.streams => {
                            drop(report.send(format!("exchanged {done}")));
                        }
                        Ok(()) => {}
                    }
                }
                connection.poll_next_inbound(cx)
            }));
            match select(next, pin!(closed.recv())).await {
                Either::Left((Some(Ok(stream)), _)) => {
                    let task = serve(stream.compat(), report.clone(), release.clone(), close.clone());
                    tasks.spawn(task);
                }
                Either::Left(_) => break,
                Either::Right(_) => {
                    let _ = poll_fn(|cx| connection.poll_close(cx)).await;
                    break;
                }
            }
        }
        let _ = report.send("ended".to_owned());
    }

    async fn serve(
        mut stream: Stream,
        report: mpsc::UnboundedSender<String>,
        release: Arc<Notify>,
        close: mpsc::Sender<()>,
    ) {
        match stream.read_u8().await.unwrap_or(0) {
            b'e' => {
                let (mut read, mut write) = tokio::io::split(stream);
                let _ = copy(&mut read, &mut write).await;
                let _ = write.shutdown().await;
            }
            b'h' => {
                let mut body = Vec::new();
                stream.read_to_end(&mut body).await.unwrap();
                stream.write_u64(body.len() as u64).await.unwrap();
                stream.write_all(digest(&SHA256, &body).as_ref()).await.unwrap();
                let _ = stream.shutdown().await;
            }
            b'f' => {
                stream.shutdown().await.unwrap();
                let count = copy(&mut stream, &mut sink()).await.unwrap();
                let _ = report.send(format!("read {count}"));
            }
            b's' => {
                release.notified().await;
                let count = copy(&mut stream, &mut sink()).await.unwrap();
                let _ = report.send(format!("read {count}"));
                let _ = stream.shutdown().await;
            }
            b'r' => release.notify_one(),
            b'w' => {
                // It reads a reset as an end; only a write tells.
                let _ = copy(&mut stream, &mut sink()).await;
                let _ = report.send(format!("reset {}", stream.write_all(b"x").await.is_err()));
            }
            b'p' => {
                let _ = stream.write_all(b"true").await;
                let _ = stream.shutdown().await;
            }
            b'c' | b'g' => drop(close.send(()).await),
            _ => {}
        }
    }

    async fn exchange(stream: Stream, number: usize, bytes: usize) -> io::Result<()> {
        let pattern = pattern(number, bytes);
        let back = write_and_read(stream, &pattern).await?;
        if back == pattern {
            Ok(())
        } else {
            Err(io::Error::other(format!("{} bytes came back, or others", back.len())))
        }
    }
}

use crate_peer::start_crate;

fn pattern(number: usize, bytes: usize) -> Vec<u8> {
    (0..bytes).map(|i| ((i * 31) ^ (i >> 10) ^ (number * 7)).to_le_bytes()[0]).collect()
}

/// Writes all, half-closes, and reads to the end at the same time.
async fn write_and_read<S>(stream: S, bytes: &[u8]) -> io::Result<Vec<u8>>
where
    S: tokio::io::AsyncRead + tokio::io::AsyncWrite,
{
    let (mut read, mut write) = tokio::io::split(stream);
    let mut back = Vec::new();
    tokio::try_join!(
        async {
            write.write_all(bytes).await?;
            write.shutdown().await
        },
        read.read_to_end(&mut back),
    )?;
    Ok(back)
}

async fn open(handle: &MuxHandle, what: u8) -> MuxStream {
    let mut stream = handle.open().await.unwrap();
    stream.write_all(&[what]).await.unwrap();
    stream
}

/// All of `bytes` come back from a far side that echoes.
async fn echo(handle: &MuxHandle, number: usize, bytes: usize) -> io::Result<()> {
    let pattern = pattern(number, bytes);
    let back = write_and_read(open(handle, b'e').await, &pattern).await?;
    assert!(back == pattern, "{} bytes of {bytes} came back, or others", back.len());
    Ok(())
}

/// Echoes whatever the far side opens.
fn serve(mut inbound: Inbound) -> JoinSet<()> {
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut streams = JoinSet::new();
        while let Some(stream) = inbound.next().await {
            streams.spawn(async {
                let (mut read, mut write) = tokio::io::split(stream);
                copy(&mut read, &mut write).await.unwrap();
                write.shutdown().await.unwrap();
            });
        }
        streams.join_all().await;
    });
    tasks
}

async fn many_streams_carry_megabytes_both_ways(peer: Peer, side: Side) {
    let orders = Orders { streams: 24, bytes: MIB, window: None };
    let (mux, mut far) = start(peer, side, orders).await;
    let _serving = serve(mux.inbound);
    try_join_all((0..24).map(|number| echo(&mux.handle, number, MIB + number))).await.unwrap();
    assert_eq!(far.says().await, "exchanged 24");
}

async fn three_hundred_streams_open_at_once(peer: Peer, side: Side) {
    let orders = Orders { streams: 300, bytes: 1000, window: None };
    let (mux, mut far) = start(peer, side, orders).await;
    let _serving = serve(mux.inbound);
    try_join_all((0..300).map(|number| echo(&mux.handle, number, 1000))).await.unwrap();
    assert_eq!(far.says().await, "exchanged 300");
}

async fn large_windows_lose_nothing(peer: Peer, side: Side) {
    let orders = Orders { streams: 1, bytes: 24 * MIB, window: Some(16 * MIB) };
    let (mux, mut far) = start(peer, side, orders).await;
    let _serving = serve(mux.inbound);
    hashed(&mux.handle, 24 * MIB).await;
    assert_eq!(far.says().await, "exchanged 1");
}

/// The far side reads to the end and says what it was.
async fn hashed(handle: &MuxHandle, bytes: usize) {
    let pattern = pattern(1, bytes);
    let answer = write_and_read(open(handle, b'h').await, &pattern).await.unwrap();
    let expected = [&(bytes as u64).to_be_bytes(), digest(&SHA256, &pattern).as_ref()].concat();
    assert_eq!(answer, expected);
}

async fn either_side_may_close_its_half_first(peer: Peer, side: Side) {
    let (mux, mut far) = start(peer, side, Orders::default()).await;
    hashed(&mux.handle, 300_000).await;
    let mut stream = open(&mux.handle, b'f').await;
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    stream.write_all(&pattern(2, 300_000)).await.unwrap();
    stream.shutdown().await.unwrap();
    assert_eq!(far.says().await, "read 300000");
}

async fn a_reset_is_seen(peer: Peer, side: Side) {
    let (mux, mut far) = start(peer, side, Orders::default()).await;
    let mut stream = open(&mux.handle, b'w').await;
    stream.write_all(&pattern(3, 10_000)).await.unwrap();
    // Only what has left is seen at all.
    assert_eq!(write_and_read(open(&mux.handle, b'p').await, b"").await.unwrap(), b"true");
    drop(stream);
    assert_eq!(far.says().await, "reset true");
    let mut stream = open(&mux.handle, b'x').await;
    assert_eq!(stream.read(&mut [0; 1]).await.unwrap(), 0);
    while stream.write_all(b"x").await.is_ok() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(!mux.task.is_finished());
}

async fn a_slow_reader_stops_only_its_own_stream(peer: Peer, side: Side) {
    let (mux, mut far) = start(peer, side, Orders::default()).await;
    let mut slow = open(&mux.handle, b's').await;
    let mut sent = 0;
    while let Ok(written) = timeout(STALLED, slow.write(&[7; 16 * 1024])).await {
        sent += written.unwrap();
    }
    // Its window, and what waits for it to open.
    assert!((256 * 1024..=256 * 1024 + 64 * 1024).contains(&sent), "{sent}");
    // This side reads none of what it wrote to an echo: the far side is stopped as well.
    let mut unread = open(&mux.handle, b'e').await;
    let mut echoed = 0;
    while let Ok(written) = timeout(STALLED, unread.write(&[8; 16 * 1024])).await {
        echoed += written.unwrap();
    }
    assert!(echoed < 2 * MIB, "{echoed}");
    echo(&mux.handle, 4, 2 * MIB).await.unwrap();
    drop(open(&mux.handle, b'r').await.shutdown().await);
    slow.write_all(&vec![7; MIB]).await.unwrap();
    slow.shutdown().await.unwrap();
    assert_eq!(far.says().await, format!("read {}", sent + MIB));
    unread.shutdown().await.unwrap();
    let mut back = Vec::new();
    unread.read_to_end(&mut back).await.unwrap();
    assert!(back == vec![8; echoed], "{} of {echoed}", back.len());
}

async fn pings_are_answered(peer: Peer, side: Side) {
    let (mux, _far) = start(peer, side, Orders::default()).await;
    for _ in 0..20 {
        assert_eq!(write_and_read(open(&mux.handle, b'p').await, b"").await.unwrap(), b"true");
    }
}

async fn either_side_may_close_the_connection(peer: Peer, side: Side) {
    let (mux, mut far) = start(peer, side, Orders::default()).await;
    echo(&mux.handle, 5, 100_000).await.unwrap();
    mux.handle.close();
    mux.task.await.unwrap().unwrap();
    assert_eq!(far.says().await, "ended");
    for how in [b'c', b'g'] {
        let (mut mux, _far) = start(peer, side, Orders::default()).await;
        let mut waiting = open(&mux.handle, b's').await;
        let _asked = open(&mux.handle, how).await;
        let error = mux.task.await.unwrap().unwrap_err();
        assert!(matches!(error, MuxError::ClosedByPeer | MuxError::HungUp), "{error}");
        assert_eq!(waiting.read(&mut [0; 1]).await.unwrap(), 0);
        assert!(waiting.write_all(b"x").await.is_err());
        assert!(mux.inbound.next().await.is_none() && mux.handle.open().await.is_err());
    }
}

/// Both ways against one peer, in bounded time.
macro_rules! against {
    ($module:ident, $peer:expr, $($(#[$attribute:meta])* $scenario:ident),+) => {
        mod $module {
            use super::*;
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                $(#[$attribute])*
                async fn $scenario() {
                    for side in [Side::Dialer, Side::Acceptor] {
                        let done = timeout(LONGEST, super::$scenario($peer, side)).await;
                        assert!(done.is_ok(), "as {side:?} it takes longer than {LONGEST:?}");
                    }
                }
            )+
        }
    };
}

against!(
    the_crate,
    Peer::Crate,
    many_streams_carry_megabytes_both_ways,
    three_hundred_streams_open_at_once,
    large_windows_lose_nothing,
    either_side_may_close_its_half_first,
    a_reset_is_seen,
    a_slow_reader_stops_only_its_own_stream,
    pings_are_answered,
    either_side_may_close_the_connection
);

against!(
    hashicorp,
    Peer::Go,
    #[ignore = "needs Go: cargo test -- --include-ignored"]
    many_streams_carry_megabytes_both_ways,
    #[ignore = "needs Go: cargo test -- --include-ignored"]
    three_hundred_streams_open_at_once,
    #[ignore = "needs Go: cargo test -- --include-ignored"]
    large_windows_lose_nothing,
    #[ignore = "needs Go: cargo test -- --include-ignored"]
    either_side_may_close_its_half_first,
    #[ignore = "needs Go: cargo test -- --include-ignored"]
    a_reset_is_seen,
    #[ignore = "needs Go: cargo test -- --include-ignored"]
    a_slow_reader_stops_only_its_own_stream,
    #[ignore = "needs Go: cargo test -- --include-ignored"]
    pings_are_answered,
    #[ignore = "needs Go: cargo test -- --include-ignored"]
    either_side_may_close_the_connection
);
