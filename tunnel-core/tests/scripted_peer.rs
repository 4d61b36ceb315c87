//! Links whose far side is scripted frame by frame on a bare yamux: what a faulty or hostile peer can say, and what
//! comes of it. Reads like the protocol's rules about ends.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
    time::Duration,
};

use bytes::BytesMut;
use futures_util::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, DuplexStream, ReadBuf, duplex},
    sync::{mpsc, oneshot},
    task::JoinHandle,
};
use tokio_util::compat::TokioAsyncReadCompatExt;
use tunnel_core::{
    Aborted, Leg, Link, LinkConfig, LinkEvent, LinkHandle, Lost, OpenRequest, RelayEnd, Timeouts,
    TunnelStream,
    proto::{
        frame,
        messages::{
            Abort, AbortCode, Control, Direction, End, Hello, Open, OpenReply, Opened, Pong, Welcome,
            control::Kind, open_reply,
        },
    },
    relay,
};

const TIMEOUT: Duration = Duration::from_secs(5);

/// The edge's side of a link, by hand.
struct Script {
    control: yamux::Stream,
    heard: BytesMut,
    inbound: mpsc::Receiver<yamux::Stream>,
    /// Closes the connection in order; dropped, it ends without a word.
    close: oneshot::Sender<()>,
}

/// A real gateway side whose edge is a script.
async fn scripted() -> (LinkHandle, Script) {
    scripted_with(Duration::from_millis(300)).await
}

/// The same, which waits for so long to learn how a stream has ended.
async fn scripted_with(end_timeout: Duration) -> (LinkHandle, Script) {
    let (near, far) = duplex(1 << 20);
    let mut connection = yamux::Connection::new(near.compat(), yamux::Config::default(), yamux::Mode::Client);
    let mut control = std::future::poll_fn(|cx| connection.poll_new_outbound(cx)).await.unwrap();
    let (accepted, inbound) = mpsc::channel(16);
    let (close, mut closing) = oneshot::channel();
    tokio::spawn(async move {
        loop {
            tokio::select! {
                biased;
                word = &mut closing => {
                    if word.is_ok() {
                        std::future::poll_fn(|cx| connection.poll_close(cx)).await.unwrap();
                    }
                    return;
                }
                Some(Ok(stream)) = std::future::poll_fn(|cx| connection.poll_next_inbound(cx)) => {
                    let _ = accepted.send(stream).await;
                }
                else => return,
            }
        }
    });
    let config = LinkConfig { end_timeout, ..LinkConfig::default() };
    let accept = tokio::spawn(async move {
        let pending = Link::accept(BufReader::new(far), config).await.unwrap();
        pending.welcome(Welcome { version: 1, heartbeat_ms: 10_000, ..Welcome::default() }).unwrap()
    });
    send(&mut control, Kind::Hello(Hello { min_version: 1, max_version: 1, ..Hello::default() })).await;
    let mut link = accept.await.unwrap();
    let handle = link.handle();
    tokio::spawn(async move { while !matches!(link.next().await, LinkEvent::Closed(_)) {} });
    (handle, Script { control, heard: BytesMut::new(), inbound, close })
}

async fn send(control: &mut yamux::Stream, kind: Kind) {
    let mut out = BytesMut::new();
    frame::encode(&Control { kind: Some(kind) }, &mut out).unwrap();
    control.write_all(&out).await.unwrap();
}

impl Script {
    async fn send(&mut self, kind: Kind) {
        send(&mut self.control, kind).await;
    }

    /// What the gateway says next on the control stream.
    async fn hear(&mut self) -> Kind {
        let hearing = async {
            loop {
                if let Some(message) = frame::decode::<Control>(&mut self.heard).unwrap() {
                    return message.kind.unwrap();
                }
                let mut piece = [0; 256];
                let read = self.control.read(&mut piece).await.unwrap();
                assert!(read > 0, "the control stream has ended");
                self.heard.extend_from_slice(&piece[..read]);
            }
        };
        tokio::time::timeout(TIMEOUT, hearing).await.unwrap()
    }

    /// Lets the gateway open a stream, and answers `Opened`, with `early` right behind it.
    async fn open(&mut self, gateway: &LinkHandle, early: &[u8]) -> (TunnelStream, yamux::Stream, u64) {
        let handle = gateway.clone();
        let request = OpenRequest { target: "edge-a:10250".to_owned(), ..OpenRequest::default() };
        let open = tokio::spawn(async move { handle.open(request, TIMEOUT).await });
        let mut stream = self.inbound.recv().await.unwrap();
        let mut input = BytesMut::new();
        let header: Open = loop {
            if let Some(header) = frame::decode(&mut input).unwrap() {
                break header;
            }
            let mut piece = [0; 256];
            let read = stream.read(&mut piece).await.unwrap();
            input.extend_from_slice(&piece[..read]);
        };
        let mut out = BytesMut::new();
        let opened = open_reply::Kind::Opened(Opened { address: "a".to_owned() });
        frame::encode(&OpenReply { kind: Some(opened) }, &mut out).unwrap();
        out.extend_from_slice(early);
        stream.write_all(&out).await.unwrap();
        (open.await.unwrap().unwrap().0, stream, header.stream)
    }
}

fn end(stream: u64, direction: Direction, total_bytes: u64) -> Kind {
    Kind::End(End { stream, direction: direction.into(), total_bytes })
}

fn code(error: &io::Error) -> AbortCode {
    error.get_ref().and_then(|inner| inner.downcast_ref::<Aborted>()).expect("says why").code
}

async fn read_all(stream: &mut TunnelStream) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    tokio::time::timeout(TIMEOUT, AsyncReadExt::read_to_end(stream, &mut bytes)).await.unwrap().map(|_| bytes)
}

#[tokio::test]
async fn bytes_behind_opened_belong_to_the_stream() {
    let (gateway, mut edge) = scripted().await;
    let (mut stream, mut wire, number) = edge.open(&gateway, b"early ").await;
    wire.write_all(b"and late").await.unwrap();
    wire.close().await.unwrap();
    edge.send(end(number, Direction::ToOpener, 14)).await;
    assert_eq!(read_all(&mut stream).await.unwrap(), b"early and late");
}

#[tokio::test]
async fn a_fin_that_is_never_confirmed_is_an_abort_after_a_bounded_wait() {
    let (gateway, mut edge) = scripted().await;
    let (mut stream, mut wire, _) = edge.open(&gateway, b"").await;
    wire.write_all(b"looks complete").await.unwrap();
    wire.close().await.unwrap();
    assert_eq!(code(&read_all(&mut stream).await.unwrap_err()), AbortCode::Reset);
}

/// What whoever uses a stream does when its far side resets it.
#[derive(Clone, Copy, Debug)]
enum Use {
    Read,
    Write,
    Neither,
}

/// How a stream ends for its user.
async fn failure(stream: &mut TunnelStream, used: Use) -> io::Error {
    let failing = async {
        match used {
            Use::Read => stream.read(&mut [0; 1]).await.unwrap_err(),
            Use::Write => loop {
                if let Err(error) = AsyncWriteExt::write_all(stream, &[7; 4096]).await {
                    break error;
                }
            },
            Use::Neither => match std::future::poll_fn(|cx| stream.poll_lost(cx)).await {
                Lost::Failed(error) => error,
                Lost::Left => panic!("a stream of a link is left by a FIN"),
            },
        }
    };
    tokio::time::timeout(TIMEOUT, failing).await.expect("nothing tells that the stream is reset")
}

#[tokio::test]
async fn a_reset_ends_a_stream_soon_and_with_its_reason_if_that_comes() {
    for used in [Use::Read, Use::Write, Use::Neither] {
        for explained in [true, false] {
            let (gateway, mut edge) = scripted_with(TIMEOUT * 2).await;
            let (mut stream, wire, number) = edge.open(&gateway, b"").await;
            let user = tokio::spawn(async move { failure(&mut stream, used).await });
            tokio::time::sleep(Duration::from_millis(50)).await;
            assert!(!user.is_finished(), "{used:?}");
            let begun = tokio::time::Instant::now();
            drop(wire);
            tokio::time::sleep(Duration::from_millis(50)).await;
            if explained {
                let text = "the drain is over".to_owned();
                edge.send(Kind::Abort(Abort { stream: number, code: AbortCode::Drained.into(), text })).await;
            }
            let error = user.await.unwrap();
            let expected = if explained { AbortCode::Drained } else { AbortCode::Reset };
            assert_eq!(code(&error), expected, "{used:?}: {error}");
            let took = begun.elapsed();
            assert!(took < Duration::from_secs(1), "{used:?}, {explained}: took {took:?}");
        }
    }
}

#[tokio::test]
async fn an_end_may_come_before_the_bytes() {
    let (gateway, mut edge) = scripted().await;
    let (mut stream, mut wire, number) = edge.open(&gateway, b"").await;
    edge.send(end(number, Direction::ToOpener, 4)).await;
    wire.write_all(b"late").await.unwrap();
    wire.close().await.unwrap();
    assert_eq!(read_all(&mut stream).await.unwrap(), b"late");
}

#[tokio::test]
async fn a_count_that_differs_is_a_truncation() {
    for total in [3, 5] {
        let (gateway, mut edge) = scripted().await;
        let (mut stream, mut wire, number) = edge.open(&gateway, b"").await;
        wire.write_all(b"four").await.unwrap();
        wire.close().await.unwrap();
        edge.send(end(number, Direction::ToOpener, total)).await;
        assert_eq!(
            code(&read_all(&mut stream).await.unwrap_err()),
            AbortCode::Truncated,
            "announced {total}"
        );
    }
}

#[tokio::test]
async fn the_end_of_somebody_elses_direction_is_an_abort() {
    let (gateway, mut edge) = scripted().await;
    let (mut stream, _wire, number) = edge.open(&gateway, b"").await;
    edge.send(end(number, Direction::FromOpener, 0)).await;
    assert_eq!(code(&read_all(&mut stream).await.unwrap_err()), AbortCode::Protocol);
}

#[tokio::test]
async fn an_abort_wakes_a_waiting_reader_and_hurts_nobody_else() {
    let (gateway, mut edge) = scripted().await;
    let (mut cut, _wire, number) = edge.open(&gateway, b"").await;
    let (mut other, mut other_wire, other_number) = edge.open(&gateway, b"").await;
    let reader = tokio::spawn(async move { read_all(&mut cut).await });
    let text = "reset by the kubelet\r\nX-Injected: 1".to_owned();
    edge.send(Kind::Abort(Abort { stream: number, code: AbortCode::Reset.into(), text })).await;
    let error = reader.await.unwrap().unwrap_err();
    assert_eq!(error.to_string(), "reset by the kubelet  X-Injected: 1");
    other_wire.write_all(b"fine").await.unwrap();
    other_wire.close().await.unwrap();
    edge.send(end(other_number, Direction::ToOpener, 4)).await;
    assert_eq!(read_all(&mut other).await.unwrap(), b"fine");
}

#[tokio::test]
async fn words_about_streams_that_do_not_exist_are_ignored() {
    let (gateway, mut edge) = scripted().await;
    for number in [0, 1, 1_000_000, u64::MAX] {
        edge.send(end(number, Direction::ToOpener, 9)).await;
        edge.send(Kind::Abort(Abort { stream: number, code: 99, text: String::new() })).await;
    }
    let (mut stream, mut wire, number) = edge.open(&gateway, b"").await;
    wire.close().await.unwrap();
    edge.send(end(number, Direction::ToOpener, 0)).await;
    assert_eq!(read_all(&mut stream).await.unwrap(), b"");
}

#[tokio::test]
async fn garbage_on_the_control_stream_ends_the_link_and_its_streams() {
    let (gateway, mut edge) = scripted().await;
    let (mut stream, _wire, _) = edge.open(&gateway, b"").await;
    edge.control.write_all(&[0xff; 64]).await.unwrap();
    assert_eq!(code(&read_all(&mut stream).await.unwrap_err()), AbortCode::LinkLost);
    assert!(gateway.is_closed());
}

/// A client at the other end of a relay.
struct Client(DuplexStream);

impl AsyncRead for Client {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_read(cx, buf)
    }
}

impl AsyncWrite for Client {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.0).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.0).poll_shutdown(cx)
    }
}

impl Leg for Client {
    fn abort(&mut self, _: &Aborted) {}

    fn poll_lost(&mut self, _: &mut Context<'_>) -> Poll<Lost> {
        Poll::Pending
    }

    fn vanished(&self) -> Option<io::Error> {
        None
    }
}

/// A relay of which both directions have ended: its client, the edge's stream, its number, and the ping behind its end.
struct Ended {
    relay: JoinHandle<RelayEnd>,
    wire: yamux::Stream,
    number: u64,
    ping: u64,
    _client: DuplexStream,
}

impl Script {
    async fn ended(&mut self, gateway: &LinkHandle) -> Ended {
        let (stream, mut wire, number) = self.open(gateway, b"").await;
        let (mut client, near) = duplex(64);
        let relay = tokio::spawn(async move {
            relay(Client(near), stream, Timeouts::of("the gateway"), std::future::pending()).await.end
        });
        wire.close().await.unwrap();
        self.send(end(number, Direction::ToOpener, 0)).await;
        AsyncWriteExt::shutdown(&mut client).await.unwrap();
        let is_end = |kind: &Kind| matches!(kind, Kind::End(end) if end.stream == number);
        while !is_end(&self.hear().await) {}
        let ping = loop {
            if let Kind::Ping(ping) = self.hear().await {
                break ping.id;
            }
        };
        Ended { relay, wire, number, ping, _client: client }
    }
}

#[tokio::test]
async fn a_stream_has_ended_cleanly_once_the_far_side_has_answered_what_was_asked_behind_its_end() {
    let (gateway, mut edge) = scripted().await;
    let mut first = edge.ended(&gateway).await;
    // An answer to a ping before it says nothing.
    edge.send(Kind::Pong(Pong { id: first.ping - 1 })).await;
    tokio::time::sleep(Duration::from_millis(100)).await;
    assert!(!first.relay.is_finished() && gateway.active_streams() == 1);
    edge.send(Kind::Pong(Pong { id: first.ping })).await;
    assert_eq!((&mut first.relay).await.unwrap(), RelayEnd::Clean);
    assert_eq!(gateway.active_streams(), 0);
    // The next one has a ping of its own.
    let second = edge.ended(&gateway).await;
    assert!(second.ping > first.ping);
    edge.send(Kind::Pong(Pong { id: second.ping })).await;
    assert_eq!(second.relay.await.unwrap(), RelayEnd::Clean);
}

#[tokio::test]
async fn a_stream_that_the_far_side_aborts_behind_its_end_was_cut() {
    let (gateway, mut edge) = scripted().await;
    let ended = edge.ended(&gateway).await;
    let (stream, code) = (ended.number, AbortCode::Reset.into());
    edge.send(Kind::Abort(Abort { stream, code, text: "the kubelet went away".to_owned() })).await;
    let end = ended.relay.await.unwrap();
    assert_eq!(end, RelayEnd::SecondFailed(Aborted::new(AbortCode::Reset, "the kubelet went away")));
    drop(ended.wire);
}

#[tokio::test]
async fn a_link_that_ends_in_order_confirms_what_it_has_not_aborted_and_one_that_breaks_does_not() {
    for in_order in [true, false] {
        let (gateway, mut edge) = scripted().await;
        let ended = edge.ended(&gateway).await;
        if in_order {
            edge.close.send(()).unwrap();
        } else {
            drop(edge.close);
        }
        let end = ended.relay.await.unwrap();
        assert_eq!(matches!(end, RelayEnd::Clean), in_order, "{end:?}");
        assert!(in_order || end.reason().unwrap().code == AbortCode::LinkLost);
    }
}
