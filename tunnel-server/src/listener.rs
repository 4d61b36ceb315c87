//! The one accept loop, for every door of the gateway. Used by `gateway`, which gives each door its listener and what
//! to do with a connection; a simulated network takes the place of sockets by its own [`Accept`].
//!
//! The loop never waits for a connection that it has taken: handshakes run in the connection's own task, under a
//! deadline that begins when it was accepted. When all [`places`] are taken by connections of which it is known who they
//! are, it does not accept, so that more wait in the kernel, not here.

mod places;

use std::{
    fmt, fs,
    future::poll_fn,
    io,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll, ready},
    time::Duration,
};

use rustls::server::Acceptor;
use tokio::{
    io::{AsyncWriteExt, ReadBuf},
    net::{TcpListener, UnixListener},
    sync::OwnedSemaphorePermit,
    time::{Instant, timeout, timeout_at},
};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, warn};
use tunnel_core::{
    Leg, ReadAhead, Socket, UnixSocket,
    proto::{ALPN_EDGE, ALPN_PEER},
    tls::{self, Domain, ServerTls},
};
use tunnel_edge::daemon::tasks::{TaskSet, Vital};

use tunnel_edge::daemon::accept::Pause;

pub(crate) use self::places::{Guest, Places};
use crate::metrics::Metrics;

/// Largest first message of a client that is waited for. With a post-quantum key and all extensions it is some 2 KiB.
const MAX_CLIENT_HELLO: usize = 16 * 1024;
/// How much a client may send until it has shown who it is: its first message, and its chain of certificates.
pub(crate) const MAX_HANDSHAKE: usize = 2 * MAX_CLIENT_HELLO;
/// How long, and for how many bytes, a refused connection is read on, so that a reset does not overtake the refusal.
pub(crate) const FAREWELL: Duration = Duration::from_secs(1);
pub(crate) const FAREWELL_BYTES: usize = 256 * 1024;

/// The part of an IPv6 address that is one customer's network.
const NETWORK: u128 = u128::MAX << 64;

/// Where connections come from.
pub trait Accept: Send + 'static {
    /// A connection.
    type Conn: Leg + 'static;

    /// The next connection. Must be cancel-safe.
    fn accept(&mut self) -> impl Future<Output = io::Result<(Self::Conn, PeerAddr)>> + Send;
}

/// Where a connection comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PeerAddr {
    /// An address on the network.
    Ip(SocketAddr),
    /// A process of this machine.
    Unix {
        /// Its user.
        uid: u32,
        /// Its process id, where the system tells.
        pid: Option<i32>,
    },
}

/// How the address of a process of this machine begins as text.
pub(crate) const UNIX_CALLER: &str = "uid:";

impl fmt::Display for PeerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix { uid, pid: Some(pid) } => write!(f, "{UNIX_CALLER}{uid}/pid:{pid}"),
            Self::Unix { uid, pid: None } => write!(f, "{UNIX_CALLER}{uid}"),
        }
    }
}

impl PeerAddr {
    /// Who this is as a source of lines in the log: without the port, and of IPv6 the network, whose addresses cost nothing.
    pub(crate) fn source(self) -> IpAddr {
        match self {
            Self::Ip(address) => match address.ip().to_canonical() {
                IpAddr::V6(address) => Ipv6Addr::from_bits(address.to_bits() & NETWORK).into(),
                address @ IpAddr::V4(_) => address,
            },
            // All that a Unix socket's file lets in.
            Self::Unix { .. } => Ipv4Addr::LOCALHOST.into(),
        }
    }
}

impl Accept for TcpListener {
    type Conn = Socket;

    async fn accept(&mut self) -> io::Result<(Socket, PeerAddr)> {
        let (stream, address) = Self::accept(self).await?;
        Ok((Socket::new(stream), PeerAddr::Ip(address)))
    }
}

/// A listening Unix socket; its file goes away with it.
#[derive(Debug)]
pub struct UnixDoor {
    listener: UnixListener,
    path: PathBuf,
    /// Device and inode, so that the file of a newer process is never removed.
    file: (u64, u64),
}

impl UnixDoor {
    /// Listens at `path`, with the file's permissions set to `mode` before anyone can connect.
    ///
    /// A socket that nobody answers is replaced. Anything else at `path` is an error.
    pub fn bind(path: &Path, mode: u32) -> io::Result<Self> {
        check_replaceable(path)?;
        let mut fresh = path.as_os_str().to_owned();
        fresh.push(format!(".{}", std::process::id()));
        let fresh = PathBuf::from(fresh);
        let _ = fs::remove_file(&fresh);
        let listener = UnixListener::bind(&fresh)?;
        let publish = || {
            fs::set_permissions(&fresh, fs::Permissions::from_mode(mode))?;
            let metadata = fs::symlink_metadata(&fresh)?;
            fs::rename(&fresh, path)?;
            Ok((metadata.dev(), metadata.ino()))
        };
        let file = publish().inspect_err(|_: &io::Error| {
            let _ = fs::remove_file(&fresh);
        })?;
        Ok(Self { listener, path: path.to_owned(), file })
    }
}

fn check_replaceable(path: &Path) -> io::Result<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    if !metadata.file_type().is_socket() {
        return Err(io::Error::new(
            io::ErrorKind::AlreadyExists,
            "there is something there that is not a socket",
        ));
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => Err(io::Error::new(io::ErrorKind::AddrInUse, "another process answers there")),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(()),
        Err(error) => Err(error),
    }
}

impl Drop for UnixDoor {
    fn drop(&mut self) {
        let ours = |metadata: fs::Metadata| (metadata.dev(), metadata.ino()) == self.file;
        if fs::symlink_metadata(&self.path).is_ok_and(ours) {
            let _ = fs::remove_file(&self.path);
        }
    }
}

impl Accept for UnixDoor {
    type Conn = UnixSocket;

    async fn accept(&mut self) -> io::Result<(UnixSocket, PeerAddr)> {
        let (stream, _) = self.listener.accept().await?;
        let gone = |error| io::Error::new(io::ErrorKind::ConnectionAborted, error);
        let peer = stream.peer_cred().map_err(gone)?;
        Ok((UnixSocket::new(stream), PeerAddr::Unix { uid: peer.uid(), pid: peer.pid() }))
    }
}

/// Takes connections until `stop`, each served by a task of its own, then waits until all of them are served.
///
/// At most as many are served at once as there are `places`. If the door fails, that is a failure of what `vital` watches,
/// whose drain then ends the connections. Dropping the future drops every connection.
pub(crate) async fn accept_loop<A, F>(
    door: A,
    name: &'static str,
    places: Arc<Places>,
    stop: CancellationToken,
    (vital, mut connections): (Vital, TaskSet),
    serve: impl Fn(A::Conn, PeerAddr, Guest) -> F,
) where
    A: Accept,
    F: Future<Output = ()> + Send + 'static,
{
    vital.watch(name, &stop, accept(door, name, &places, &stop, &mut connections, serve)).await;
    connections.all_ended().await;
}

async fn accept<A, F>(
    mut door: A,
    name: &'static str,
    places: &Arc<Places>,
    stop: &CancellationToken,
    connections: &mut TaskSet,
    serve: impl Fn(A::Conn, PeerAddr, Guest) -> F,
) where
    A: Accept,
    F: Future<Output = ()> + Send + 'static,
{
    let mut pause = Pause::default();
    loop {
        tokio::select! {
            // The end comes first; then places are freed before new ones are taken.
            biased;
            () = stop.cancelled() => break,
            Some(()) = connections.next_ended() => pause.cut_short(),
            accepted = next_connection(&mut door, places, &pause) => match accepted {
                Ok((conn, peer, place)) => {
                    pause.forget();
                    places.enter(peer, place, |guest| connections.spawn(serve(conn, peer, guest)));
                }
                Err(error) if concerns_one_connection(&error) => debug!(door = name, %error, "a connection went away"),
                Err(error) => {
                    let pause_ms = pause.begin().as_millis();
                    warn!(door = name, %error, pause_ms, "cannot accept; trying again");
                    places.displace();
                }
            },
        }
    }
}

async fn next_connection<A: Accept>(
    door: &mut A,
    places: &Places,
    pause: &Pause,
) -> io::Result<(A::Conn, PeerAddr, Option<OwnedSemaphorePermit>)> {
    pause.over().await;
    let place = places.free().await;
    let (conn, peer) = door.accept().await?;
    Ok((conn, peer, place))
}

fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(error.kind(), Kind::ConnectionAborted | Kind::ConnectionReset | Kind::Interrupted)
}

/// The server side of a TLS handshake, within `limit` of when the connection was accepted; then `guest` has its place. A
/// failure is told to the client, logged and counted; so is a client that asks for no application protocol at all, where
/// links are made: it passes TLS, but is no edge and no peer.
///
/// Both the handshake and the connection are boxed: they are large, and would stand several times in the future of each
/// connection, which stays as large as its largest moment until its end.
pub(crate) async fn handshake<C: Leg + 'static>(
    tls: &ServerTls,
    domain: Domain,
    conn: C,
    peer: PeerAddr,
    guest: &mut Guest,
    limit: Duration,
    metrics: &Metrics,
) -> Option<Box<TlsStream<ReadAhead<C>>>> {
    let deadline = guest.deadline(limit);
    let shaken = match timeout_at(deadline, Box::pin(shake_hands(tls, conn, guest))).await {
        Ok(Ok(stream)) => Ok(stream),
        Ok(Err((error, conn))) => Err((error, Some(conn))),
        Err(_) => Err((io::Error::from(io::ErrorKind::TimedOut), None)),
    };
    let (error, conn) = match shaken {
        Ok(stream) => {
            let stream = of_its_protocol(stream, domain, peer, guest, metrics).await?;
            return admitted(stream, domain, peer, guest, deadline, metrics).await;
        }
        Err(failed) => failed,
    };
    let cause = if conn.is_some() { tls::label(&error) } else { "timeout" };
    let text = match &conn {
        Some(_) => tls::explain(&error),
        None => format!("the TLS handshake was not finished within {} ms", limit.as_millis()),
    };
    metrics.handshake_failed(domain, cause);
    if matches!(cause, "closed" | "reset") {
        // Load balancers and scanners probe ports in this way.
        debug!(%peer, %domain, cause, "gone before the end of the TLS handshake");
    } else if metrics.lines.admit(cause, peer.source()) {
        warn!(%peer, %domain, cause = text, "TLS handshake failed");
    }
    if let Some(conn) = conn {
        guest.falls_silent();
        // Boxed as well: those that get in need no room for it.
        Box::pin(say_farewell(conn)).await;
    }
    None
}

async fn shake_hands<C: Leg + 'static>(
    tls: &ServerTls,
    conn: C,
    guest: &Guest,
) -> Result<Box<TlsStream<ReadAhead<C>>>, (io::Error, ReadAhead<C>)> {
    let mut conn = ReadAhead::from_stranger(conn, MAX_HANDSHAKE as u64);
    match client_hello(&mut conn).await {
        Ok(()) => guest.in_turn(tls.acceptor().accept(conn).into_fallible()).await.map(Box::new),
        Err(error) => Err((error, conn)),
    }
}

/// Waits until all of a client's first message is there, or enough to say that it is none. Nothing is computed before, and
/// only what has come takes memory.
async fn client_hello<C: Leg>(conn: &mut ReadAhead<C>) -> io::Result<()> {
    while !is_worth_a_look(conn.ahead()) {
        if conn.ahead().len() >= MAX_CLIENT_HELLO {
            let text = format!("no whole ClientHello came in the first {} KiB", MAX_CLIENT_HELLO / 1024);
            return Err(io::Error::new(io::ErrorKind::InvalidData, text));
        }
        if conn.read_more().await? == 0 {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
    }
    Ok(())
}

/// Whether TLS would do more with these first bytes of a client than ask for more.
fn is_worth_a_look(mut bytes: &[u8]) -> bool {
    let mut acceptor = Acceptor::default();
    while !bytes.is_empty() {
        // An error is one of TLS, which says it better.
        if acceptor.read_tls(&mut bytes).is_err() {
            return true;
        }
        if !matches!(acceptor.accept(), Ok(None)) {
            return true;
        }
    }
    false
}

/// Who a connection is from is known: it gets its place.
async fn admitted<C: Leg>(
    mut stream: Box<TlsStream<ReadAhead<C>>>,
    domain: Domain,
    peer: PeerAddr,
    guest: &mut Guest,
    deadline: Instant,
    metrics: &Metrics,
) -> Option<Box<TlsStream<ReadAhead<C>>>> {
    stream.get_mut().0.trust();
    if guest.admit(deadline).await {
        return Some(stream);
    }
    metrics.handshake_failed(domain, "full");
    warn!(%peer, %domain, "refused: no other connection has ended in time, and there are as many as there may be");
    None
}

/// The connection, if it is one of its domain's application protocol, where there is only one.
async fn of_its_protocol<C: Leg + 'static>(
    mut stream: Box<TlsStream<C>>,
    domain: Domain,
    peer: PeerAddr,
    guest: &Guest,
    metrics: &Metrics,
) -> Option<Box<TlsStream<C>>> {
    let (wanted, of) = match domain {
        Domain::Edge => (ALPN_EDGE, "edges"),
        Domain::Peer => (ALPN_PEER, "peers"),
        Domain::ControlPlane => {
            tls::widen_for_relay(stream.get_mut().1);
            return Some(stream);
        }
    };
    if stream.get_ref().1.alpn_protocol() == Some(wanted) {
        tls::widen_for_link(stream.get_mut().1);
        return Some(stream);
    }
    metrics.handshake_failed(domain, "alpn");
    if metrics.lines.admit("alpn", peer.source()) {
        warn!(%peer, "refused: the client does not ask for the application protocol (ALPN) of {of}");
    }
    guest.falls_silent();
    say_farewell(stream).await;
    None
}

/// Closes a connection whose last words are written, so that they arrive: the end of file goes out, and what still
/// comes in is read for a while.
pub(crate) async fn say_farewell<C: Leg>(mut conn: C) {
    let farewell = async {
        if conn.shutdown().await.is_ok() {
            let mut read = 0;
            poll_fn(|cx| poll_hear_out(&mut conn, cx, &mut read)).await;
        }
    };
    let _ = timeout(FAREWELL, farewell).await;
}

/// Reads a connection to which the end of file has gone out until its far side has ended as well, or has sent enough.
/// Closing with unread bytes would send a reset, which overtakes what was written. Its caller has a time limit.
pub(crate) fn poll_hear_out(conn: &mut impl Leg, cx: &mut Context<'_>, read: &mut usize) -> Poll<()> {
    let mut bytes = [0; 4096];
    while *read < FAREWELL_BYTES {
        let mut some = ReadBuf::new(&mut bytes);
        let result = ready!(Pin::new(&mut *conn).poll_read(cx, &mut some));
        if result.is_err() || some.filled().is_empty() {
            break;
        }
        *read += some.filled().len();
    }
    Poll::Ready(())
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::atomic::{AtomicUsize, Ordering::Relaxed},
    };

    use prometheus_client::metrics::counter::Counter;
    use tokio::{net::UnixStream, time::sleep};

    use super::*;
    use crate::testing::metrics;

    /// Gives what it is told to, then waits for ever.
    struct Scripted(VecDeque<io::Result<UnixSocket>>, Arc<AtomicUsize>);

    impl Accept for Scripted {
        type Conn = UnixSocket;

        async fn accept(&mut self) -> io::Result<(UnixSocket, PeerAddr)> {
            let Some(next) = self.0.pop_front() else { return std::future::pending().await };
            self.1.fetch_add(1, Relaxed);
            next.map(|stream| (stream, PeerAddr::Unix { uid: 0, pid: None }))
        }
    }

    fn owners() -> (Vital, TaskSet) {
        (Vital::default(), TaskSet::new("a connection", &Counter::default()))
    }

    fn connection() -> io::Result<UnixSocket> {
        UnixStream::pair().map(|(near, _)| UnixSocket::new(near))
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_accept_is_not_tried_again_at_once() {
        let tries = Arc::new(AtomicUsize::new(0));
        let failures = (0..1000).map(|_| Err(io::Error::other("too many open files"))).collect();
        let door = Scripted(failures, tries.clone());
        let stop = CancellationToken::new();
        let looping = accept_loop(door, "test", Places::open(1), stop, owners(), |_, _, _| async {});
        let _ = timeout(Duration::from_secs(10), looping).await;
        let tries = tries.load(Relaxed);
        assert!((10..20).contains(&tries), "{tries} tries in ten seconds");
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_are_accepted_than_there_are_places() {
        let taken = Arc::new(AtomicUsize::new(0));
        let door = Scripted((0..5).map(|_| connection()).collect(), taken.clone());
        let stop = CancellationToken::new();
        let serve = |_, _, guest| async {
            sleep(Duration::from_secs(10)).await;
            drop(guest);
        };
        let looping = tokio::spawn(accept_loop(door, "test", Places::open(2), stop.clone(), owners(), serve));
        for (seconds, expected) in [(5, 2), (10, 4), (10, 5)] {
            sleep(Duration::from_secs(seconds)).await;
            assert_eq!(taken.load(Relaxed), expected);
        }
        stop.cancel();
        looping.await.unwrap();
    }

    /// The size of the future that a function gives, in bytes.
    fn size_of_future<A, F: Future>(_: impl FnOnce(A) -> F) -> usize {
        size_of::<F>()
    }

    #[test]
    fn a_connections_future_is_small() {
        type Arguments = (&'static ServerTls, UnixSocket, &'static mut Guest, &'static Metrics);
        let peer = PeerAddr::Unix { uid: 0, pid: None };
        let shaking = size_of_future(|(tls, conn, guest, metrics): Arguments| {
            handshake(tls, Domain::Edge, conn, peer, guest, FAREWELL, metrics)
        });
        assert!(shaking <= 1024, "{shaking}");
        let leaving = size_of_future(say_farewell::<UnixSocket>);
        assert!(leaving <= 512, "{leaving}");
    }

    /// A real client's first bytes.
    fn first_message() -> Vec<u8> {
        let config =
            rustls::ClientConfig::builder_with_provider(rustls::crypto::ring::default_provider().into())
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(rustls::RootCertStore::empty())
                .with_no_client_auth();
        let mut client = rustls::ClientConnection::new(Arc::new(config), "gw".try_into().unwrap()).unwrap();
        let mut bytes = Vec::new();
        client.write_tls(&mut bytes).unwrap();
        bytes
    }

    /// The same message in records of so many bytes.
    fn in_records(message: &[u8], of: usize) -> Vec<u8> {
        let record = |piece: &[u8]| [&[22, 3, 1, 0, u8::try_from(piece.len()).unwrap()], piece].concat();
        message[5..].chunks(of).flat_map(record).collect()
    }

    #[test]
    fn only_a_whole_first_message_is_worth_a_look_or_one_that_is_none() {
        let message = first_message();
        for whole in [message.clone(), in_records(&message, 1), in_records(&message, 100)] {
            assert!(is_worth_a_look(&whole));
            let early = (0..whole.len()).find(|length| is_worth_a_look(&whole[..*length]));
            assert_eq!(early, None, "of {}", whole.len());
            assert!(is_worth_a_look(&[&whole[..], b"and more"].concat()));
        }
        assert!(is_worth_a_look(b"GET / HTTP/1.1"));
    }

    #[tokio::test]
    async fn a_first_message_is_waited_for_up_to_its_longest() {
        let message = first_message();
        let hear = |bytes: Vec<u8>| async move {
            let (near, mut far) = UnixStream::pair().unwrap();
            let mut conn = ReadAhead::from_stranger(UnixSocket::new(near), u64::MAX);
            far.write_all(&bytes).await.unwrap();
            far.shutdown().await.unwrap();
            client_hello(&mut conn).await.map(|()| conn.ahead().len())
        };
        assert_eq!(hear(message.clone()).await.unwrap(), message.len());
        assert_eq!(hear(message[..99].to_vec()).await.unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
        // A handshake message of 60,000 bytes that is never whole.
        let endless = in_records(&[&[0; 5][..], &[1, 0, 0xea, 0x60], &vec![0; 50_000]].concat(), 250);
        let error = hear(endless).await.unwrap_err();
        assert_eq!(error.to_string(), "no whole ClientHello came in the first 16 KiB");
    }

    #[tokio::test(start_paused = true)]
    async fn connections_that_end_do_not_put_off_the_next_accept_but_bring_it_nearer() {
        let taken = Arc::new(AtomicUsize::new(0));
        // A hundred connections, of which one ends every 7 ms; then nine failures, whose pauses would take 2.3 s.
        let failures = (0..9).map(|_| Err(io::Error::other("too many open files")));
        let script = (0..100).map(|_| connection()).chain(failures).chain([connection()]);
        let door = Scripted(script.collect(), taken.clone());
        let number = AtomicUsize::new(0);
        let serve = move |_, _, guest: Guest| {
            let number = number.fetch_add(1, Relaxed) as u64;
            async move {
                sleep(Duration::from_millis(7 * (number + 1))).await;
                drop(guest);
            }
        };
        let stop = CancellationToken::new();
        let looping = accept_loop(door, "test", Places::open(200), stop, owners(), serve);
        let _ = timeout(Duration::from_millis(7 * 9 + 3), looping).await;
        assert_eq!(taken.load(Relaxed), 110);
    }

    #[tokio::test(start_paused = true)]
    async fn a_stranger_has_to_go_when_there_are_no_descriptors() {
        let taken = Arc::new(AtomicUsize::new(0));
        let script = [connection(), connection(), Err(io::Error::other("too many open files")), connection()];
        let door = Scripted(script.into(), taken.clone());
        let served = Arc::new(AtomicUsize::new(0));
        let counted = served.clone();
        let serve = move |_, _, guest: Guest| {
            let (served, number) = (counted.clone(), counted.fetch_add(1, Relaxed));
            async move {
                sleep(Duration::from_secs(3600)).await;
                served.fetch_add(100 * number, Relaxed);
                drop(guest);
            }
        };
        let places = Places::guarded(9, 9, Domain::Edge, &metrics());
        let looping = accept_loop(door, "test", places, CancellationToken::new(), owners(), serve);
        let _ = timeout(Duration::from_secs(3601), looping).await;
        // The first one did not get to its end; the others did.
        assert_eq!((taken.load(Relaxed), served.load(Relaxed)), (4, 3 + 100 + 200));
    }

    #[tokio::test]
    async fn a_stale_socket_is_replaced_and_a_live_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("door.sock");
        drop(std::os::unix::net::UnixListener::bind(&path).unwrap());
        let door = UnixDoor::bind(&path, 0o600).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
        assert_eq!(UnixDoor::bind(&path, 0o600).unwrap_err().kind(), io::ErrorKind::AddrInUse);
        drop(door);
        assert!(!path.exists());
        fs::write(&path, "precious").unwrap();
        assert_eq!(UnixDoor::bind(&path, 0o600).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        assert_eq!(fs::read_to_string(&path).unwrap(), "precious");
    }

    #[tokio::test]
    async fn a_late_end_leaves_the_newer_socket_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("door.sock");
        let old = UnixDoor::bind(&path, 0o600).unwrap();
        fs::remove_file(&path).unwrap();
        let _new = UnixDoor::bind(&path, 0o600).unwrap();
        drop(old);
        assert!(path.exists());
    }
}
