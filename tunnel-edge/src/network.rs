//! How bytes leave this process: [`Network`] is the only way that an edge reaches anything, its gateways, its proxy
//! and its targets alike, so that a simulation can put its own in place. [`SystemNetwork`] is the real one: it
//! resolves names and connects by happy eyeballs. Called by `uplink` and `dial`.

use std::{
    collections::VecDeque,
    future::Future,
    io,
    net::{IpAddr, SocketAddr},
    time::Duration,
};

use futures_util::{StreamExt, stream::FuturesUnordered};
use tokio::{net::TcpStream, time::sleep};
use tunnel_core::{Host, Leg, Socket};

/// How long one address may take before the next is tried beside it (RFC 8305, section 5).
const ATTEMPT_DELAY: Duration = Duration::from_millis(250);
/// Addresses of one name that are tried; more than these help nobody.
const MAX_ADDRESSES: usize = 16;

/// Makes outbound connections.
pub trait Network: Send + Sync + 'static {
    /// A connection.
    type Conn: Leg + 'static;

    /// Connects to a port of a host, whose name is resolved first if it is one.
    ///
    /// There is no time limit: the caller has one. Cancel-safe: dropping the future drops every attempt.
    fn connect(&self, host: &Host, port: u16) -> impl Future<Output = Result<Self::Conn, DialError>> + Send;

    /// The address at the far end of a connection, where there is such a thing. For logs.
    fn peer_address(&self, _conn: &Self::Conn) -> Option<SocketAddr> {
        None
    }
}

/// Why nothing was connected, by what it means for the one who asked.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum DialError {
    /// The host answered that nothing listens there.
    #[error("connection refused; is anything listening there?")]
    Refused,
    /// There is no way to the host.
    #[error("no route to it ({0}); is the network up?")]
    Unreachable(String),
    /// The name has no address.
    #[error("the name has no address ({0}); check the name and this node's DNS")]
    NameNotResolved(String),
    /// Nothing answered in time.
    #[error("no answer within {} ms; does a firewall drop it, or is the host down?", .0.as_millis())]
    TimedOut(Duration),
    /// Anything else that the system said.
    #[error("{0}")]
    Other(String),
}

impl DialError {
    /// A short name for metrics.
    pub fn label(&self) -> &'static str {
        match self {
            Self::Refused => "refused",
            Self::Unreachable(_) => "unreachable",
            Self::NameNotResolved(_) => "name_not_resolved",
            Self::TimedOut(_) => "dial_timeout",
            Self::Other(_) => "dial_failed",
        }
    }
}

impl From<io::Error> for DialError {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::ConnectionRefused => Self::Refused,
            io::ErrorKind::HostUnreachable
            | io::ErrorKind::NetworkUnreachable
            | io::ErrorKind::NetworkDown
            | io::ErrorKind::TimedOut
            | io::ErrorKind::AddrNotAvailable => Self::Unreachable(error.to_string()),
            _ => Self::Other(error.to_string()),
        }
    }
}

/// The network of the machine this runs on.
#[derive(Clone, Copy, Debug, Default)]
pub struct SystemNetwork;

impl Network for SystemNetwork {
    type Conn = Socket;

    async fn connect(&self, host: &Host, port: u16) -> Result<Socket, DialError> {
        let addresses = resolve(host, port).await?;
        Ok(Socket::new(connect_any(addresses, TcpStream::connect).await?))
    }

    fn peer_address(&self, conn: &Socket) -> Option<SocketAddr> {
        conn.peer_addr().ok()
    }
}

async fn resolve(host: &Host, port: u16) -> Result<Vec<SocketAddr>, DialError> {
    match host {
        Host::Ip(address) => Ok(vec![SocketAddr::new(*address, port)]),
        Host::Name(name) => {
            let found = tokio::net::lookup_host((name.as_str(), port)).await;
            let found = found.map_err(|error| DialError::NameNotResolved(error.to_string()))?;
            Ok(interleave(found).into_iter().take(MAX_ADDRESSES).collect())
        }
    }
}

/// The resolver's order, but with the two families taking turns, so that one broken family costs one delay.
fn interleave(addresses: impl IntoIterator<Item = SocketAddr>) -> Vec<SocketAddr> {
    let all: Vec<SocketAddr> = addresses.into_iter().collect();
    let Some(first) = all.first().copied() else { return all };
    let same_family = |address: &SocketAddr| matches!(address.ip(), IpAddr::V6(_)) == first.is_ipv6();
    let (mut preferred, mut other): (VecDeque<_>, VecDeque<_>) = all.into_iter().partition(same_family);
    let mut ordered = Vec::with_capacity(preferred.len() + other.len());
    while !preferred.is_empty() || !other.is_empty() {
        ordered.extend(preferred.pop_front());
        ordered.extend(other.pop_front());
    }
    ordered
}

/// The first of `addresses` that can be connected. Each attempt starts when the one before has failed or has taken
/// [`ATTEMPT_DELAY`]; when one connects, the others are dropped.
async fn connect_any<C, F>(
    addresses: Vec<SocketAddr>,
    connect: impl Fn(SocketAddr) -> F,
) -> Result<C, DialError>
where
    F: Future<Output = io::Result<C>>,
{
    let mut waiting = addresses.into_iter();
    let mut attempts = FuturesUnordered::new();
    // Of several failures the first is told: it is that of the preferred address.
    let mut failure = None;
    loop {
        attempts.extend(waiting.next().map(&connect));
        // Results first: a connection that is there must not wait for another attempt to begin.
        tokio::select! {
            biased;
            result = attempts.next() => match result {
                Some(Ok(connected)) => return Ok(connected),
                Some(Err(error)) => failure = failure.or(Some(DialError::from(error))),
                None => {
                    let nothing = || DialError::NameNotResolved("the resolver gave no addresses".to_owned());
                    return Err(failure.unwrap_or_else(nothing));
                }
            },
            () = sleep(ATTEMPT_DELAY), if waiting.len() > 0 => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::{cell::RefCell, future::pending};
    use tokio::{
        net::TcpListener,
        time::{Instant, timeout},
    };

    fn address(text: &str) -> SocketAddr {
        text.parse().unwrap()
    }

    #[test]
    fn families_take_turns_and_the_resolvers_first_stays_first() {
        let found = ["[::1]:1", "[::2]:1", "[::3]:1", "1.0.0.1:1", "1.0.0.2:1"].map(address);
        let expected = ["[::1]:1", "1.0.0.1:1", "[::2]:1", "1.0.0.2:1", "[::3]:1"].map(address);
        assert_eq!(interleave(found), expected);
        assert!(interleave([]).is_empty());
    }

    #[tokio::test(start_paused = true)]
    async fn a_silent_address_costs_one_delay_and_is_dropped_once_another_connects() {
        struct Attempt<'a>(&'a RefCell<u32>);
        impl Drop for Attempt<'_> {
            fn drop(&mut self) {
                *self.0.borrow_mut() += 1;
            }
        }
        let dropped = RefCell::new(0);
        let begun = Instant::now();
        let connect = async |target: SocketAddr| {
            let _attempt = Attempt(&dropped);
            if target.port() == 1 { pending().await } else { Ok(target) }
        };
        let connected = connect_any(vec![address("[::1]:1"), address("1.0.0.1:2")], connect).await;
        assert_eq!(connected, Ok(address("1.0.0.1:2")));
        assert_eq!(begun.elapsed(), ATTEMPT_DELAY);
        assert_eq!(*dropped.borrow(), 2, "the loser lives on");
    }

    #[tokio::test(start_paused = true)]
    async fn a_failed_attempt_makes_the_next_begin_at_once_and_the_first_failure_is_told() {
        let begun = Instant::now();
        let connect = async |target: SocketAddr| -> io::Result<()> {
            let kinds = [io::ErrorKind::ConnectionRefused, io::ErrorKind::HostUnreachable];
            Err(kinds[usize::from(target.port() - 1)].into())
        };
        let failed = connect_any(vec![address("[::1]:1"), address("1.0.0.1:2")], connect).await;
        assert_eq!(failed, Err(DialError::Refused));
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert!(matches!(connect_any(vec![], connect).await, Err(DialError::NameNotResolved(_))));
    }

    #[tokio::test]
    async fn a_closed_port_of_one_family_does_not_hide_the_other() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let open = listener.local_addr().unwrap();
        // Where there is no IPv6 at all, this attempt fails in another way, and the result is the same.
        let closed = SocketAddr::new("::1".parse().unwrap(), open.port());
        let connected = timeout(Duration::from_secs(5), connect_any(vec![closed, open], TcpStream::connect));
        assert_eq!(connected.await.unwrap().unwrap().peer_addr().unwrap(), open);
    }

    #[tokio::test]
    async fn a_refusal_and_an_unknown_name_are_told_apart() {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let loopback: Host = "127.0.0.1".parse().unwrap();
        SystemNetwork.connect(&loopback, port).await.unwrap();
        drop(listener);
        assert_eq!(SystemNetwork.connect(&loopback, port).await.unwrap_err(), DialError::Refused);
        let nowhere: Host = "no-such-host.invalid".parse().unwrap();
        let error = SystemNetwork.connect(&nowhere, port).await.unwrap_err();
        assert!(matches!(error, DialError::NameNotResolved(_)), "{error}");
    }
}
