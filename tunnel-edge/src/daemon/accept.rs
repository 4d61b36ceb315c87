//! How both programs' listeners begin, and how they go on after an accept that failed. Used by the admin listener here, and
//! by the gateway's own accept loop.

use std::{io, net::SocketAddr, time::Duration};

use tokio::{
    net::{TcpListener, TcpSocket},
    time::{Instant, sleep_until},
};

/// Pauses after an accept that failed, most often for want of file descriptors: trying again at once would spin.
const FIRST_PAUSE: Duration = Duration::from_millis(10);
const LONGEST_PAUSE: Duration = Duration::from_secs(1);
/// Connections that the kernel holds until they are accepted. As many as it will: it cuts this to `net.core.somaxconn`, and
/// whoever finds the queue full tries again only after a second.
const BACKLOG: u32 = 65_535;

/// Listens on an address.
///
/// # Errors
/// If it cannot be had.
pub fn listen(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = if address.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
    // So that a restart need not wait for the last connections of the process before.
    socket.set_reuseaddr(true)?;
    socket.bind(address)?;
    socket.listen(BACKLOG)
}

/// Says when to accept again.
///
/// It has a deadline, so that whoever waits for it may do something else in between.
#[derive(Debug, Default)]
pub struct Pause {
    length: Duration,
    until: Option<Instant>,
}

impl Pause {
    /// Accepting has failed: begins a pause, of which each is twice as long as the one before, and gives its length.
    pub fn begin(&mut self) -> Duration {
        self.length = (self.length * 2).clamp(FIRST_PAUSE, LONGEST_PAUSE);
        self.until = Some(Instant::now() + self.length);
        self.length
    }

    /// A connection has ended, and with it a descriptor is free: this pause is over.
    pub fn cut_short(&mut self) {
        self.until = None;
    }

    /// Accepting works again: the next pause is the first.
    pub fn forget(&mut self) {
        *self = Self::default();
    }

    /// Waits until the pause is over. Cancel-safe: it is over at the same moment whenever one begins to wait.
    pub async fn over(&self) {
        if let Some(until) = self.until {
            sleep_until(until).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::sleep;

    use super::*;

    #[tokio::test(start_paused = true)]
    async fn a_pause_is_over_at_its_time_however_often_its_wait_begins_anew() {
        let (mut pause, begun) = (Pause::default(), Instant::now());
        pause.over().await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert_eq!(pause.begin(), FIRST_PAUSE);
        for _ in 0..9 {
            tokio::select! {
                biased;
                () = pause.over() => panic!("over after {:?}", begun.elapsed()),
                () = sleep(Duration::from_millis(1)) => {}
            }
        }
        pause.over().await;
        assert_eq!(begun.elapsed(), FIRST_PAUSE);
    }

    #[tokio::test(start_paused = true)]
    async fn pauses_grow_to_a_second_and_are_forgotten_by_a_success() {
        let (mut pause, begun) = (Pause::default(), Instant::now());
        let lengths: Vec<u128> = (0..9).map(|_| pause.begin().as_millis()).collect();
        assert_eq!(lengths, [10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
        pause.cut_short();
        pause.over().await;
        assert_eq!(begun.elapsed(), Duration::ZERO);
        assert_eq!(pause.begin(), LONGEST_PAUSE, "a pause that was cut short is no success");
        pause.forget();
        pause.over().await;
        assert_eq!((begun.elapsed(), pause.begin()), (Duration::ZERO, FIRST_PAUSE));
    }

    #[tokio::test]
    async fn more_connections_wait_in_the_kernel_than_the_usual_thousand() {
        let listener = listen(([127, 0, 0, 1], 0).into()).unwrap();
        let address = listener.local_addr().unwrap();
        let most = std::fs::read_to_string("/proc/sys/net/core/somaxconn").unwrap();
        let many = most.trim().parse::<usize>().unwrap().min(1500);
        let mut waiting = Vec::new();
        for number in 0..many {
            let connecting =
                tokio::time::timeout(Duration::from_millis(900), tokio::net::TcpStream::connect(address));
            waiting.push(connecting.await.unwrap_or_else(|_| panic!("only {number} wait")).unwrap());
        }
    }
}
