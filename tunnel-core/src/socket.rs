//! How a TCP socket is set up that carries a link or the bytes of a stream, at whichever end.

use std::time::Duration;

use socket2::{SockRef, TcpKeepalive};
use tokio::net::TcpStream;

/// A silent connection is probed after this time, then at this interval, and is dead after that many probes.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(30), Duration::from_secs(10), 3);
/// Bytes that the kernel takes beyond those under way. More would stand in line before what turns out to be urgent
/// later: a keystroke behind a copy.
#[cfg(target_os = "linux")]
const NOT_SENT: u32 = 128 * 1024;

/// Sets the options. None of them is needed for the bytes to be right, so a socket that will not have them, which may
/// be gone already, is used all the same.
pub fn set_up(stream: &TcpStream) {
    let socket = SockRef::from(stream);
    let (idle, interval, probes) = KEEPALIVE;
    let keepalive = TcpKeepalive::new().with_time(idle).with_interval(interval).with_retries(probes);
    let _ = socket.set_tcp_nodelay(true);
    let _ = socket.set_tcp_keepalive(&keepalive);
    #[cfg(target_os = "linux")]
    let _ = socket.set_tcp_notsent_lowat(NOT_SENT);
}
