//! The relay between real TCP sockets, and from one to another over a link: a FIN stays a FIN, a reset stays a reset, and
//! bytes stay as they are.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{future::pending, os::fd::AsFd, time::Duration};

use socket2::SockRef;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader, duplex},
    net::{TcpListener, TcpStream},
    sync::oneshot,
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, timeout},
};
use tunnel_core::{
    Aborted, Link, LinkConfig, LinkEvent, OpenRequest, RelayEnd, Relayed, Socket, Timeouts, TunnelStream,
    proto::messages::{AbortCode, Hello, Welcome},
    relay,
};

const TIMEOUT: Duration = Duration::from_secs(10);
const TIMEOUTS: Timeouts = Timeouts::of("the test");

/// Two ends of one TCP connection on loopback.
async fn connection() -> (TcpStream, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), Socket::new(far.unwrap().0))
}

struct Rig {
    client: TcpStream,
    target: TcpStream,
    relay: JoinHandle<Relayed>,
    stop: oneshot::Sender<Aborted>,
}

async fn rig() -> Rig {
    let (client, client_leg) = connection().await;
    let (target, target_leg) = connection().await;
    let (stop, stopped) = oneshot::channel();
    let stopped = async move {
        match stopped.await {
            Ok(reason) => reason,
            Err(_) => pending().await,
        }
    };
    Rig { client, target, relay: tokio::spawn(relay(client_leg, target_leg, TIMEOUTS, stopped)), stop }
}

async fn is_reset(socket: &mut TcpStream) -> bool {
    let read = timeout(TIMEOUT, socket.read(&mut [0; 1])).await.expect("the socket never ended");
    matches!(read, Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset)
}

#[tokio::test]
async fn half_close_is_carried_both_ways_and_bytes_are_counted() {
    let Rig { mut client, mut target, relay, stop: _stop } = rig().await;
    let bytes: Vec<u8> = (0..3_000_000u32).map(|n| (n % 251) as u8).collect();
    let expected = bytes.clone();
    let sender = tokio::spawn(async move {
        client.write_all(&bytes).await.unwrap();
        client.shutdown().await.unwrap();
        client
    });
    let mut got = Vec::new();
    target.read_to_end(&mut got).await.unwrap();
    assert!(got == expected);
    target.write_all(b"reply after your end").await.unwrap();
    target.shutdown().await.unwrap();
    let mut client = sender.await.unwrap();
    let mut reply = String::new();
    client.read_to_string(&mut reply).await.unwrap();
    assert_eq!(reply, "reply after your end");
    assert_eq!(relay.await.unwrap(), Relayed { forward: 3_000_000, backward: 20, end: RelayEnd::Clean });
}

#[tokio::test]
async fn a_reset_on_one_side_is_a_reset_on_the_other() {
    for client_resets in [true, false] {
        let Rig { client, target, relay, stop: _stop } = rig().await;
        let (breaks, mut sees) = if client_resets { (client, target) } else { (target, client) };
        SockRef::from(&breaks).set_linger(Some(Duration::ZERO)).unwrap();
        drop(breaks);
        assert!(is_reset(&mut sees).await);
        let end = relay.await.unwrap().end;
        assert_eq!(matches!(end, RelayEnd::FirstFailed(_)), client_resets, "{end:?}");
    }
}

#[tokio::test]
async fn a_reset_behind_a_half_close_is_still_a_reset() {
    let Rig { mut client, target, relay, stop: _stop } = rig().await;
    client.shutdown().await.unwrap();
    let mut target = target;
    assert_eq!(target.read(&mut [0; 1]).await.unwrap(), 0);
    target.write_all(b"partial").await.unwrap();
    let mut partial = [0; 7];
    client.read_exact(&mut partial).await.unwrap();
    SockRef::from(&target).set_linger(Some(Duration::ZERO)).unwrap();
    drop(target);
    assert!(is_reset(&mut client).await);
    relay.await.unwrap();
}

#[tokio::test]
async fn stopping_resets_both_sides() {
    let Rig { mut client, mut target, relay, stop } = rig().await;
    let reason = Aborted::new(AbortCode::Drained, "the drain deadline passed");
    stop.send(reason.clone()).unwrap();
    assert!(is_reset(&mut client).await);
    assert!(is_reset(&mut target).await);
    assert_eq!(relay.await.unwrap().end, RelayEnd::Stopped(reason));
}

#[tokio::test]
async fn a_relay_that_is_dropped_resets_both_sides() {
    let Rig { mut client, mut target, relay, stop: _stop } = rig().await;
    relay.abort();
    assert!(is_reset(&mut client).await);
    assert!(is_reset(&mut target).await);
}

/// Where a killed process leaves its sockets, the kernel sends RST, not FIN: the relay has told it so beforehand.
#[tokio::test]
async fn a_relay_that_never_runs_again_resets_both_sides() {
    let (mut client, client_leg) = connection().await;
    let (mut target, target_leg) = connection().await;
    let client_fd = client_leg.as_fd().try_clone_to_owned().unwrap();
    let target_fd = target_leg.as_fd().try_clone_to_owned().unwrap();
    let relay = tokio::spawn(relay(client_leg, target_leg, TIMEOUTS, pending()));
    client.write_all(b"x").await.unwrap();
    target.read_exact(&mut [0; 1]).await.unwrap();
    // What the relay's own code does at its end must not count: ask the kernel as it stands now.
    assert_eq!(SockRef::from(&client_fd).linger().unwrap(), Some(Duration::ZERO));
    assert_eq!(SockRef::from(&target_fd).linger().unwrap(), Some(Duration::ZERO));
    drop((client_fd, target_fd));
    relay.abort();
    assert!(is_reset(&mut client).await);
    assert!(is_reset(&mut target).await);
}

/// A client that resets while its bytes wait for a target that takes none: nothing is read from it, so no event tells.
#[tokio::test]
async fn a_reset_is_noticed_while_the_other_side_takes_nothing() {
    let Rig { mut client, mut target, relay, stop: _stop } = rig().await;
    let chunk = vec![0; 1 << 20];
    while timeout(Duration::from_millis(200), client.write_all(&chunk)).await.is_ok() {}
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let end = timeout(TIMEOUT, relay).await.expect("the reset was not noticed").unwrap().end;
    assert!(matches!(end, RelayEnd::FirstFailed(_)), "{end:?}");
    // The target gets what had arrived, and then the reset: never a clean end.
    let mut piece = vec![0; 1 << 20];
    let error = loop {
        match target.read(&mut piece).await {
            Ok(0) => panic!("a cut stream looks complete"),
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert_eq!(error.kind(), std::io::ErrorKind::ConnectionReset);
}

#[tokio::test]
async fn a_reset_behind_a_fin_is_noticed_while_nothing_is_written() {
    let Rig { mut client, mut target, relay, stop: _stop } = rig().await;
    client.shutdown().await.unwrap();
    assert_eq!(target.read(&mut [0; 1]).await.unwrap(), 0);
    SockRef::from(&client).set_linger(Some(Duration::ZERO)).unwrap();
    drop(client);
    let end = timeout(TIMEOUT, relay).await.expect("the reset was not noticed").unwrap().end;
    // Not that a pipe is broken, as the kernel calls it then.
    let reason = Aborted::new(AbortCode::Reset, "connection reset");
    assert_eq!(end, RelayEnd::FirstFailed(reason));
    // Behind its end of file a socket tells of the reset only to who writes.
    assert!(target.write_all(b"anyone?").await.is_err() || target.write_all(b"anyone?").await.is_err());
}

/// Lengths around those at which bytes are written, given as a chunk, cut into frames or kept for the next read.
const PIECES: [usize; 13] =
    [1, 100, 4093, 16_371, 16_383, 16_384, 16_385, 32_745, 65_439, 65_440, 65_441, 65_536, 200_003];
/// How often each is sent.
const ROUNDS: usize = 12;

/// The byte at a place of what one end sends: another for each place in a window, and for each end.
fn byte(end: u8, at: usize) -> u8 {
    ((at * 31) ^ (at >> 10) ^ (usize::from(end) * 101)).to_le_bytes()[0]
}

/// Sends all pieces, now and then with a rest, so that some are read one by one and others together.
async fn send_pieces(end: u8, mut socket: impl AsyncWrite + Unpin) -> usize {
    let mut at = 0;
    for round in 0..ROUNDS {
        for (index, length) in PIECES.into_iter().enumerate() {
            let piece: Vec<u8> = (at..at + length).map(|at| byte(end, at)).collect();
            socket.write_all(&piece).await.unwrap();
            at += length;
            if (round + index) % 5 == 0 {
                sleep(Duration::from_millis(1)).await;
            }
        }
    }
    socket.shutdown().await.unwrap();
    at
}

/// Reads what the end sends, in small pieces and with rests in which all windows and buffers fill up.
async fn read_slowly(end: u8, mut socket: impl AsyncRead + Unpin) -> usize {
    let (mut piece, mut at, mut rested) = (vec![0; 30_011], 0, 0);
    loop {
        let count = socket.read(&mut piece).await.unwrap();
        if count == 0 {
            return at;
        }
        let wrong = piece[..count].iter().zip(at..).find(|(got, at)| **got != byte(end, *at));
        assert_eq!(wrong, None, "what {end} sent is not what arrives");
        at += count;
        if at - rested > 1 << 20 {
            sleep(Duration::from_millis(50)).await;
            rested = at;
        }
    }
}

/// A stream of a link in memory whose windows do not grow, as both sides see it, and the tasks that hold the link.
async fn stream() -> (TunnelStream, TunnelStream, JoinSet<()>) {
    let (near, far) = duplex(64 * 1024);
    let hello = Hello { min_version: 1, max_version: 1, ..Hello::default() };
    let welcome = Welcome { version: 1, heartbeat_ms: 10_000, ..Welcome::default() };
    let config = || LinkConfig { window_budget: 0, ..LinkConfig::default() };
    let (edge, mut gateway) = tokio::join!(Link::connect(BufReader::new(near), hello, config()), async {
        Link::accept(BufReader::new(far), config()).await.unwrap().welcome(welcome).unwrap()
    });
    let (mut edge, handle, mut tasks) = (edge.unwrap().0, gateway.handle(), JoinSet::new());
    tasks.spawn(async move { while !matches!(gateway.next().await, LinkEvent::Closed(_)) {} });
    let open = OpenRequest { target: "edge-a:10250".to_owned(), ..OpenRequest::default() };
    let (opened, accepted) = tokio::join!(handle.open(open, TIMEOUT), async {
        loop {
            if let LinkEvent::Stream(incoming) = edge.next().await {
                let pending = incoming.header(Instant::now() + TIMEOUT).await.unwrap();
                return pending.accept("there".to_owned()).await.unwrap();
            }
        }
    });
    tasks.spawn(async move { while !matches!(edge.next().await, LinkEvent::Closed(_)) {} });
    (opened.unwrap().0, accepted, tasks)
}

#[tokio::test]
async fn pieces_of_any_length_cross_a_link_unharmed_both_ways_at_once() {
    let (client, client_leg) = connection().await;
    let (target, target_leg) = connection().await;
    // Little may be on its way, so that slow readers are felt.
    for socket in [client.as_fd(), client_leg.as_fd(), target.as_fd(), target_leg.as_fd()] {
        SockRef::from(&socket).set_recv_buffer_size(64 * 1024).unwrap();
        SockRef::from(&socket).set_send_buffer_size(64 * 1024).unwrap();
    }
    let (gateway, edge, _link) = stream().await;
    let at_gateway = tokio::spawn(relay(client_leg, gateway, TIMEOUTS, pending()));
    let at_edge = tokio::spawn(relay(edge, target_leg, TIMEOUTS, pending()));
    let ((from_client, to_client), (from_target, to_target)) = (client.into_split(), target.into_split());
    let (from_client, from_target) = (read_slowly(1, from_client), read_slowly(0, from_target));
    let (to_client, to_target) = (send_pieces(0, to_client), send_pieces(1, to_target));
    let all = async { tokio::join!(to_client, to_target, from_client, from_target) };
    let counts = timeout(TIMEOUT, all).await.expect("bytes wait for ever");
    let total = ROUNDS * PIECES.iter().sum::<usize>();
    assert_eq!(counts, (total, total, total, total));
    let total = total as u64;
    let clean = Relayed { forward: total, backward: total, end: RelayEnd::Clean };
    assert_eq!((at_gateway.await.unwrap(), at_edge.await.unwrap()), (clean.clone(), clean));
}
