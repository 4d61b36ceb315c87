//! The one accept loop, for every door of the gateway. Used by `gateway`, which gives each door its listener and what
//! to do with a connection; a simulated network takes the place of sockets by its own [`Accept`].
//!
//! The loop never waits for a connection that it has taken: handshakes run in the connection's own task, under a
//! deadline. When all places are taken it does not accept, so that more connections wait in the kernel, not here.

use std::{
    fmt, fs, io,
    net::SocketAddr,
    os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt},
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, UnixListener},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinSet,
    time::{sleep, timeout},
};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, warn};
use tunnel_core::{
    Leg, ReadAhead, Socket, UnixSocket,
    proto::{ALPN_EDGE, ALPN_PEER},
    tls::{self, Domain, ServerTls},
};

use crate::metrics::Metrics;

/// Pauses after an accept that failed, most often for want of file descriptors: trying again at once would spin.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Handshakes of one door that are worked on at one time: enough to hide what each waits for its far side.
pub(crate) const TURNS: usize = 256;
/// After this, the next one's turn comes all the same.
const LONGEST_TURN: Duration = Duration::from_millis(500);
/// How long, and for how many bytes, a refused connection is read on, so that a reset does not overtake the refusal.
const FAREWELL: Duration = Duration::from_secs(1);
const FAREWELL_BYTES: usize = 256 * 1024;

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

impl fmt::Display for PeerAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(address) => address.fmt(f),
            Self::Unix { uid, pid: Some(pid) } => write!(f, "uid:{uid}/pid:{pid}"),
            Self::Unix { uid, pid: None } => write!(f, "uid:{uid}"),
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
/// At most as many are served at once as `places` has permits. Dropping the future drops every connection.
pub(crate) async fn accept_loop<A, F>(
    mut door: A,
    name: &'static str,
    places: Arc<Semaphore>,
    stop: CancellationToken,
    serve: impl Fn(A::Conn, PeerAddr) -> F,
) where
    A: Accept,
    F: Future<Output = ()> + Send + 'static,
{
    let mut connections = JoinSet::new();
    let mut pause = Duration::ZERO;
    loop {
        tokio::select! {
            // The end comes first; then places are freed before new ones are taken.
            biased;
            () = stop.cancelled() => break,
            Some(ended) = connections.join_next() => report_panic(name, ended),
            accepted = next_connection(&mut door, &places, pause) => match accepted {
                Ok((conn, peer, place)) => {
                    pause = Duration::ZERO;
                    connections.spawn(in_its_place(serve(conn, peer), place));
                }
                Err(error) if concerns_one_connection(&error) => debug!(door = name, %error, "a connection went away"),
                Err(error) => {
                    pause = (pause * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
                    warn!(door = name, %error, pause_ms = pause.as_millis(), "cannot accept; trying again");
                }
            },
        }
    }
    drop(door);
    while let Some(ended) = connections.join_next().await {
        report_panic(name, ended);
    }
}

async fn next_connection<A: Accept>(
    door: &mut A,
    places: &Arc<Semaphore>,
    pause: Duration,
) -> io::Result<(A::Conn, PeerAddr, OwnedSemaphorePermit)> {
    if !pause.is_zero() {
        sleep(pause).await;
    }
    let place = places.clone().acquire_owned().await.map_err(io::Error::other)?;
    let (conn, peer) = door.accept().await?;
    Ok((conn, peer, place))
}

/// Keeps the place until the connection is served. Not an `async fn`, which would have room for the future twice: there are
/// as many as links.
fn in_its_place<F: Future<Output = ()>>(serving: F, place: OwnedSemaphorePermit) -> impl Future<Output = ()> {
    serving.map(move |()| drop(place))
}

fn concerns_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(error.kind(), Kind::ConnectionAborted | Kind::ConnectionReset | Kind::Interrupted)
}

/// One connection's failure must not end the others; a panic is a defect all the same.
pub(crate) fn report_panic(what: &'static str, ended: Result<(), tokio::task::JoinError>) {
    if let Err(failure) = ended
        && failure.is_panic()
    {
        error!(what, %failure, "a task panicked: this is a defect, please report it");
    }
}

/// Lets `work` begin when its turn comes, in the order of asking. Where all edges of a gateway that is gone come at one
/// moment, handshakes that were worked on all at once would all be too late; so some are in time, and then the next. One
/// that takes long, since its far side does, is not waited for by the others.
pub(crate) async fn in_turn<T>(turns: &Semaphore, work: impl Future<Output = T>) -> T {
    let turn = turns.acquire().await;
    let mut work = Box::pin(work);
    tokio::select! {
        // What is done needs no more time.
        biased;
        done = &mut work => return done,
        () = sleep(LONGEST_TURN) => drop(turn),
    }
    work.await
}

/// The server side of a TLS handshake, within `deadline`. A failure is told to the client, logged and counted; so is a
/// client that asks for no application protocol at all, where links are made: it passes TLS, but is no edge and no peer.
///
/// Both the handshake and the connection are boxed: they are large, and would stand several times in the future of each
/// connection, which stays as large as its largest moment until its end.
pub(crate) async fn handshake<C: Leg + 'static>(
    tls: &ServerTls,
    domain: Domain,
    conn: C,
    peer: PeerAddr,
    deadline: Duration,
    metrics: &Metrics,
) -> Option<Box<TlsStream<ReadAhead<C>>>> {
    let accepting = Box::pin(tls.acceptor().accept(ReadAhead::new(conn)).into_fallible());
    let shaken = match timeout(deadline, accepting).await {
        Ok(Ok(stream)) => Ok(Box::new(stream)),
        Ok(Err((error, conn))) => Err((error, Some(conn))),
        Err(_) => Err((io::Error::from(io::ErrorKind::TimedOut), None)),
    };
    let (error, conn) = match shaken {
        Ok(stream) => return of_its_protocol(stream, domain, peer, metrics).await,
        Err(failed) => failed,
    };
    let cause = if conn.is_some() { tls::label(&error) } else { "timeout" };
    let text = match &conn {
        Some(_) => tls::explain(&error),
        None => format!("the TLS handshake was not finished within {} ms", deadline.as_millis()),
    };
    metrics.handshake_failed(domain, cause);
    if cause == "closed" {
        // Load balancers probe ports in this way.
        debug!(%peer, %domain, "closed before the end of the TLS handshake");
    } else {
        warn!(%peer, %domain, cause = text, "TLS handshake failed");
    }
    if let Some(conn) = conn {
        say_farewell(conn).await;
    }
    None
}

/// The connection, if it is one of its domain's application protocol, where there is only one.
async fn of_its_protocol<C: Leg + 'static>(
    mut stream: Box<TlsStream<C>>,
    domain: Domain,
    peer: PeerAddr,
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
    warn!(%peer, "refused: the client does not ask for the application protocol (ALPN) of {of}");
    say_farewell(stream).await;
    None
}

/// Closes a connection whose last words are written, so that they arrive: the end of file goes out, and what still
/// comes in is read for a while. Closing with unread bytes would send a reset, which overtakes what was written.
pub(crate) async fn say_farewell<C: Leg>(mut conn: C) {
    let farewell = async {
        if conn.shutdown().await.is_err() {
            return;
        }
        let mut scratch = vec![0; 4096];
        let mut read = 0;
        while read < FAREWELL_BYTES {
            match conn.read(&mut scratch).await {
                Ok(0) | Err(_) => break,
                Ok(some) => read += some,
            }
        }
    };
    let _ = timeout(FAREWELL, farewell).await;
}

#[cfg(test)]
mod tests {
    use std::{
        collections::VecDeque,
        sync::atomic::{AtomicUsize, Ordering::Relaxed},
    };

    use tokio::net::UnixStream;

    use super::*;

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

    fn connection() -> io::Result<UnixSocket> {
        UnixStream::pair().map(|(near, _)| UnixSocket::new(near))
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_accept_is_not_tried_again_at_once() {
        let tries = Arc::new(AtomicUsize::new(0));
        let failures = (0..1000).map(|_| Err(io::Error::other("too many open files"))).collect();
        let door = Scripted(failures, tries.clone());
        let stop = CancellationToken::new();
        let looping = accept_loop(door, "test", Arc::new(Semaphore::new(1)), stop, |_, _| async {});
        let _ = timeout(Duration::from_secs(10), looping).await;
        let tries = tries.load(Relaxed);
        assert!((10..20).contains(&tries), "{tries} tries in ten seconds");
    }

    #[tokio::test(start_paused = true)]
    async fn no_more_are_accepted_than_there_are_places() {
        let taken = Arc::new(AtomicUsize::new(0));
        let door = Scripted((0..5).map(|_| connection()).collect(), taken.clone());
        let stop = CancellationToken::new();
        let serve = |_, _| sleep(Duration::from_secs(10));
        let looping =
            tokio::spawn(accept_loop(door, "test", Arc::new(Semaphore::new(2)), stop.clone(), serve));
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
        type Arguments = (&'static ServerTls, UnixSocket, &'static Metrics);
        let peer = PeerAddr::Unix { uid: 0, pid: None };
        let shaking = size_of_future(|(tls, conn, metrics): Arguments| {
            handshake(tls, Domain::Edge, conn, peer, FAREWELL, metrics)
        });
        assert!(shaking <= 1024, "{shaking}");
        let leaving = size_of_future(say_farewell::<UnixSocket>);
        assert!(leaving <= 512, "{leaving}");
        let serving = |()| async {
            let held = [0_u8; 4096];
            sleep(FAREWELL).await;
            std::hint::black_box(&held);
        };
        let served = size_of_future(|place| in_its_place(serving(()), place));
        assert!(served <= size_of_future(serving) + 64, "{served}");
    }

    #[tokio::test(start_paused = true)]
    async fn turns_are_taken_in_order_and_a_slow_one_is_not_waited_for() {
        let (turns, done) = (Semaphore::new(2), parking_lot::Mutex::new(Vec::new()));
        let work = |number: u32, millis: u64| {
            let done = &done;
            in_turn(&turns, async move {
                sleep(Duration::from_millis(millis)).await;
                done.lock().push(number);
            })
        };
        let begun = tokio::time::Instant::now();
        // The first two take their turns; the slow one's ends after half a second, and the third takes 100 ms then.
        tokio::join!(work(1, 100_000), work(2, 100), work(3, 600), work(4, 100), work(5, 100));
        assert_eq!(*done.lock(), [2, 4, 3, 5, 1]);
        assert_eq!(begun.elapsed(), Duration::from_secs(100));
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
