//! Far sides that are lost to a relay which does not read them, since their direction has ended or since the other side
//! takes nothing: whatever happens to them, and wherever on the way, each relay ends within a second.
#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    future::pending,
    os::fd::AsFd,
    time::{Duration, Instant},
};

use socket2::SockRef;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, BufReader, DuplexStream, Interest, copy_bidirectional, duplex},
    net::{TcpListener, TcpStream, UnixStream},
    sync::oneshot,
    task::{JoinHandle, JoinSet},
    time::{sleep, timeout},
};
use tokio_util::task::AbortOnDropHandle;
use tunnel_core::{
    Aborted, Leg, Link, LinkConfig, LinkEvent, OpenRequest, RelayEnd, Relayed, Socket, Timeouts,
    TunnelStream, UnixSocket,
    proto::messages::{AbortCode, Hello, Welcome},
    relay,
};

const TIMEOUT: Duration = Duration::from_secs(10);
const TIMEOUTS: Timeouts = Timeouts::of("the test");
/// Within this, a relay must have ended.
const LIMIT: Duration = Duration::from_secs(1);
/// After this, a relay in which nothing moves is at rest.
const AT_REST: Duration = Duration::from_millis(700);

/// Two ends of one TCP connection on loopback, which takes little in.
async fn connection() -> (TcpStream, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    SockRef::from(&listener).set_recv_buffer_size(32 * 1024).unwrap();
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    let (near, far) = (near.unwrap(), far.unwrap().0);
    SockRef::from(&near).set_recv_buffer_size(32 * 1024).unwrap();
    (near, Socket::new(far))
}

/// One end of a link: who holds it is gone when this is dropped.
type Holder = AbortOnDropHandle<()>;

/// A stream of a link, as both ends see it. Without the wire, both lose the link.
struct LinkedStream {
    near: TunnelStream,
    far: TunnelStream,
    near_holder: Holder,
    far_holder: Holder,
    wire: Holder,
}

impl LinkedStream {
    async fn up() -> Self {
        let ((near_io, mut near_wire), (far_io, mut far_wire)) = (duplex(64 * 1024), duplex(64 * 1024));
        let wire = AbortOnDropHandle::new(tokio::spawn(async move {
            let _ = copy_bidirectional(&mut near_wire, &mut far_wire).await;
        }));
        let (mut near, mut far) = Self::link(near_io, far_io).await;
        let handle = near.handle();
        let near_holder = AbortOnDropHandle::new(tokio::spawn(async move {
            while !matches!(near.next().await, LinkEvent::Closed(_)) {}
        }));
        let (accepted, stream) = oneshot::channel();
        let far_holder = AbortOnDropHandle::new(tokio::spawn(async move {
            let LinkEvent::Stream(incoming) = far.next().await else { panic!("no stream") };
            let pending = incoming.header(tokio::time::Instant::now() + TIMEOUT).await.unwrap();
            accepted.send(pending.accept("there".to_owned()).await.unwrap()).unwrap();
            while !matches!(far.next().await, LinkEvent::Closed(_)) {}
        }));
        let open = OpenRequest { target: "edge-a:10250".to_owned(), ..OpenRequest::default() };
        let near = handle.open(open, TIMEOUT).await.unwrap().0;
        Self { near, far: stream.await.unwrap(), near_holder, far_holder, wire }
    }

    async fn link(near: DuplexStream, far: DuplexStream) -> (Link, Link) {
        let hello = Hello { min_version: 1, max_version: 1, ..Hello::default() };
        let welcome = Welcome { version: 1, heartbeat_ms: 10_000, ..Welcome::default() };
        let config = || LinkConfig { window_budget: 0, ..LinkConfig::default() };
        let (far, near) = tokio::join!(Link::connect(BufReader::new(far), hello, config()), async {
            Link::accept(BufReader::new(near), config()).await.unwrap().welcome(welcome).unwrap()
        });
        (near, far.unwrap().0)
    }
}

/// A relay that runs.
struct Running {
    task: JoinHandle<Relayed>,
    stop: oneshot::Sender<Aborted>,
}

impl Running {
    fn start(first: impl Leg + 'static, second: impl Leg + 'static) -> Self {
        Self::with(TIMEOUTS, first, second)
    }

    fn with(timeouts: Timeouts, first: impl Leg + 'static, second: impl Leg + 'static) -> Self {
        let (stop, stopped) = oneshot::channel();
        let stopped = async move {
            match stopped.await {
                Ok(reason) => reason,
                Err(_) => pending().await,
            }
        };
        Self { task: tokio::spawn(relay(first, second, timeouts, stopped)), stop }
    }
}

/// A client, the relays of a gateway, of a peer's door and of an edge, and a target.
struct Way {
    client: Option<TcpStream>,
    target: Option<TcpStream>,
    relays: [Option<Running>; 3],
    wires: [Option<Holder>; 2],
    /// The gateway's, both of the door, and the edge's.
    holders: [Option<Holder>; 4],
}

#[derive(Clone, Copy, Debug)]
enum State {
    ClientEnded,
    TargetEnded,
    /// The client has more to say than the target takes.
    TargetTakesNothing,
    /// The target has more to say than the client takes.
    ClientTakesNothing,
}

#[derive(Clone, Copy, Debug)]
enum Fault {
    ClientResets,
    TargetResets,
    /// The relay of this place is stopped.
    Aborts(usize),
    /// This link breaks.
    LinkLost(usize),
    /// The process of this place is killed.
    Killed(usize),
}

impl Way {
    async fn up() -> Self {
        let (client, client_leg) = connection().await;
        let (target, target_leg) = connection().await;
        let (to_door, to_edge) = (LinkedStream::up().await, LinkedStream::up().await);
        let relays = [
            Running::start(client_leg, to_door.near),
            Running::start(to_door.far, to_edge.near),
            Running::start(to_edge.far, target_leg),
        ];
        let holders = [to_door.near_holder, to_door.far_holder, to_edge.near_holder, to_edge.far_holder];
        Self {
            client: Some(client),
            target: Some(target),
            relays: relays.map(Some),
            wires: [to_door.wire, to_edge.wire].map(Some),
            holders: holders.map(Some),
        }
    }

    async fn enter(&mut self, state: State) {
        let (client, target) = (self.client.as_mut().unwrap(), self.target.as_mut().unwrap());
        let (ends, other) = match state {
            State::ClientEnded | State::TargetTakesNothing => (client, target),
            State::TargetEnded | State::ClientTakesNothing => (target, client),
        };
        if let State::ClientEnded | State::TargetEnded = state {
            ends.shutdown().await.unwrap();
            assert_eq!(timeout(TIMEOUT, other.read(&mut [0; 1])).await.unwrap().unwrap(), 0);
        } else {
            let piece = vec![7; 64 * 1024];
            while timeout(Duration::from_millis(200), ends.write_all(&piece)).await.is_ok() {}
        }
    }

    fn strike(&mut self, fault: Fault) {
        match fault {
            Fault::ClientResets => reset(self.client.take().unwrap()),
            Fault::TargetResets => reset(self.target.take().unwrap()),
            Fault::Aborts(place) => {
                let reason = Aborted::new(AbortCode::Drained, "the test aborts");
                let Running { task, stop } = self.relays[place].take().unwrap();
                stop.send(reason).unwrap();
                drop(task);
            }
            Fault::LinkLost(which) => drop(self.wires[which].take()),
            Fault::Killed(place) => {
                self.relays[place].take().unwrap().task.abort();
                let held = [0..1, 1..3, 3..4][place].clone();
                self.holders[held].fill_with(|| None);
            }
        }
    }

    /// All relays that are left end, and both sockets break.
    async fn assert_ends(&mut self) {
        for running in self.relays.iter_mut().filter_map(Option::as_mut) {
            let end = (&mut running.task).await.unwrap().end;
            assert!(end.reason().is_some(), "{end:?}");
        }
        for socket in [&self.client, &self.target].into_iter().flatten() {
            socket.ready(Interest::ERROR).await.unwrap();
            assert!(socket.take_error().unwrap().is_some());
        }
    }
}

fn reset(socket: TcpStream) {
    socket.set_zero_linger().unwrap();
    drop(socket);
}

async fn check(state: State, fault: Fault, rests: bool) {
    let mut way = Way::up().await;
    way.enter(state).await;
    if rests {
        sleep(AT_REST).await;
    }
    let begun = Instant::now();
    way.strike(fault);
    let ends = timeout(TIMEOUT, way.assert_ends()).await;
    let took = begun.elapsed();
    assert!(ends.is_ok(), "{state:?}, {fault:?}, at rest: {rests}: a relay goes on, or a socket");
    assert!(took < LIMIT, "{state:?}, {fault:?}, at rest: {rests}: took {took:?}");
}

#[tokio::test]
async fn whatever_is_lost_every_relay_ends_within_a_second() {
    let places = || 0..3;
    let states =
        [State::ClientEnded, State::TargetEnded, State::TargetTakesNothing, State::ClientTakesNothing];
    let faults: Vec<Fault> = [Fault::ClientResets, Fault::TargetResets]
        .into_iter()
        .chain(places().map(Fault::Aborts))
        .chain((0..2).map(Fault::LinkLost))
        .chain(places().map(Fault::Killed))
        .collect();
    for state in states {
        for rests in [true, false] {
            let cases: JoinSet<()> = faults.iter().map(|fault| check(state, *fault, rests)).collect();
            cases.join_all().await;
        }
    }
}

/// By whichever end finds it first; the other learns whose setting it was.
#[tokio::test]
async fn a_stream_that_one_end_gives_up_is_aborted_at_the_other() {
    for at_gateway in [true, false] {
        let ((mut client, client_leg), (mut target, target_leg)) = (connection().await, connection().await);
        let LinkedStream { near, far, near_holder, far_holder, wire } = LinkedStream::up().await;
        let short = Timeouts { half_closed: Some(Duration::from_secs(1)), idle: None, whose: "one end" };
        let (one, other) = if at_gateway { (short, TIMEOUTS) } else { (TIMEOUTS, short) };
        let (gateway, edge) = (Running::with(one, client_leg, near), Running::with(other, far, target_leg));
        client.shutdown().await.unwrap();
        assert_eq!(target.read(&mut [0; 1]).await.unwrap(), 0);
        let ends =
            timeout(TIMEOUT, async { (gateway.task.await.unwrap().end, edge.task.await.unwrap().end) });
        let (at_gateway_it, at_edge_it) = ends.await.expect("a relay goes on");
        let (gives_up, learns) =
            if at_gateway { (at_gateway_it, at_edge_it) } else { (at_edge_it, at_gateway_it) };
        let RelayEnd::TimedOut(reason) = gives_up else { panic!("{gives_up:?}") };
        assert!(reason.text.ends_with("(streams.half_closed_timeout of one end)"), "{}", reason.text);
        assert_eq!(learns.reason(), Some(&reason));
        for socket in [client, target] {
            timeout(LIMIT, socket.ready(Interest::ERROR)).await.unwrap().unwrap();
        }
        drop((near_holder, far_holder, wire));
    }
}

/// A client on a Unix socket, and the target behind a relay.
async fn by_unix() -> (UnixStream, TcpStream, JoinHandle<Relayed>) {
    let (client, leg) = UnixStream::pair().unwrap();
    let (target, target_leg) = connection().await;
    (client, target, Running::start(UnixSocket::new(leg), target_leg).task)
}

/// How the relay ended within the limit.
async fn end_in_time(relay: JoinHandle<Relayed>) -> RelayEnd {
    timeout(LIMIT, relay).await.expect("the relay goes on").unwrap().end
}

#[tokio::test]
async fn a_unix_client_that_exits_is_noticed_while_the_target_is_silent() {
    for ended_before in [false, true] {
        let (mut client, mut target, relay) = by_unix().await;
        client.write_all(b"the question").await.unwrap();
        if ended_before {
            client.shutdown().await.unwrap();
            sleep(AT_REST).await;
        }
        drop(client);
        let end = end_in_time(relay).await;
        assert!(
            matches!(&end, RelayEnd::FirstFailed(reason) if reason.code == AbortCode::Cancelled),
            "{end:?}"
        );
        let mut question = [0; 12];
        target.read_exact(&mut question).await.unwrap();
        assert_eq!(&question, b"the question");
    }
}

#[tokio::test]
async fn a_unix_client_that_only_ends_its_direction_still_gets_the_answer() {
    let (mut client, mut target, relay) = by_unix().await;
    client.write_all(b"the question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = String::new();
    target.read_to_string(&mut question).await.unwrap();
    assert_eq!(question, "the question");
    // The watch sees room to write, no room, and room again, and none of these is an end.
    sleep(AT_REST).await;
    let sent = vec![7; 4 << 20];
    let sending = async {
        target.write_all(&sent).await.unwrap();
        target.shutdown().await.unwrap();
    };
    let mut answer = Vec::new();
    let reading = async {
        sleep(AT_REST).await;
        client.read_to_end(&mut answer).await.unwrap();
    };
    tokio::join!(sending, reading);
    assert_eq!(answer.len(), sent.len());
    assert_eq!(end_in_time(relay).await, RelayEnd::Clean);
}

/// Sends until the relay takes no more: how much.
async fn fill(client: &mut UnixStream) -> usize {
    SockRef::from(&client.as_fd()).set_send_buffer_size(1 << 20).unwrap();
    let (piece, mut sent) = (vec![7; 16 * 1024], 0);
    while let Ok(written) = timeout(Duration::from_millis(200), client.write(&piece)).await {
        sent += written.unwrap();
    }
    assert!(sent > 256 * 1024, "{sent}");
    sent
}

/// Both directions of its socket are closed then, as if it had gone: but it waits for what it said to arrive.
#[tokio::test]
async fn a_unix_client_that_has_ended_behind_the_target_is_heard_to_its_end() {
    let (mut client, mut target, relay) = by_unix().await;
    target.shutdown().await.unwrap();
    assert_eq!(client.read(&mut [0; 1]).await.unwrap(), 0);
    let sent = fill(&mut client).await;
    client.shutdown().await.unwrap();
    sleep(AT_REST * 2).await;
    let mut received = Vec::new();
    target.read_to_end(&mut received).await.unwrap();
    assert_eq!(received.len(), sent);
    assert_eq!(end_in_time(relay).await, RelayEnd::Clean);
}

/// What a client said before it went has all its time, as long as any of it moves.
#[tokio::test]
async fn what_a_unix_client_said_before_it_exited_arrives() {
    let (mut client, mut target, relay) = by_unix().await;
    let sent = fill(&mut client).await;
    drop(client);
    let (mut received, mut some) = (0, vec![0; 64 * 1024]);
    loop {
        match target.read(&mut some).await.unwrap() {
            0 => break,
            count => received += count,
        }
        sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(received, sent);
    let end = end_in_time(relay).await;
    assert!(matches!(&end, RelayEnd::FirstFailed(reason) if reason.code == AbortCode::Cancelled), "{end:?}");
}

#[tokio::test]
async fn a_unix_client_that_exits_with_bytes_unread_has_failed() {
    let (mut client, mut target, relay) = by_unix().await;
    client.shutdown().await.unwrap();
    target.write_all(b"the answer").await.unwrap();
    client.readable().await.unwrap();
    sleep(AT_REST).await;
    drop(client);
    let end = end_in_time(relay).await;
    assert!(matches!(&end, RelayEnd::FirstFailed(reason) if reason.code == AbortCode::Reset), "{end:?}");
}
