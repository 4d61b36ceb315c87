//! Notices to the service manager (systemd's `sd_notify` protocol): that the process is up, what it waits for, that it
//! leaves. Without a manager that wants them, nothing is sent. Used by [`super::process`].

use std::{
    env,
    ffi::OsStr,
    io,
    os::{
        linux::net::SocketAddrExt,
        unix::{
            ffi::OsStrExt,
            net::{SocketAddr, UnixDatagram},
        },
    },
    time::Duration,
};

use tracing::{debug, warn};

use super::log::one_line;

/// Longest status: a line of `systemctl status`.
const MAX_STATUS: usize = 300;

/// Where notices go.
#[derive(Debug)]
pub(super) struct Notifier(Option<UnixDatagram>);

impl Notifier {
    /// The socket that the environment names, if any.
    pub(super) fn from_environment() -> Self {
        let Some(name) = env::var_os("NOTIFY_SOCKET").filter(|name| !name.is_empty()) else {
            return Self(None);
        };
        Self(connect(&name).map_or_else(
            |error| {
                warn!(socket = ?name, %error, "the service manager cannot be notified (NOTIFY_SOCKET)");
                None
            },
            Some,
        ))
    }

    /// Whether anybody listens.
    pub(super) fn is_wanted(&self) -> bool {
        self.0.is_some()
    }

    /// The process has started, and does or waits for this.
    pub(super) fn ready(&self, status: &str) {
        self.send(&format!("READY=1\nSTATUS={}", shown(status)));
    }

    /// What it does or waits for now.
    pub(super) fn status(&self, status: &str) {
        self.send(&format!("STATUS={}", shown(status)));
    }

    /// It leaves, and needs at most so long.
    pub(super) fn stopping(&self, status: &str, within: Duration) {
        let within = within.as_micros();
        self.send(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={within}\nSTATUS={}", shown(status)));
    }

    fn send(&self, notice: &str) {
        let sent = self.0.as_ref().map_or(Ok(0), |socket| socket.send(notice.as_bytes()));
        if let Err(error) = sent {
            debug!(%error, notice, "the service manager did not take a notice");
        }
    }
}

/// Never waits for the manager: a notice that it has no room for is lost.
fn connect(name: &OsStr) -> io::Result<UnixDatagram> {
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    match name.as_bytes() {
        [b'/', ..] => socket.connect(name)?,
        [b'@', rest @ ..] => socket.connect_addr(&SocketAddr::from_abstract_name(rest)?)?,
        _ => return Err(io::Error::new(io::ErrorKind::Unsupported, "it is no Unix socket")),
    }
    Ok(socket)
}

/// A status must not hold a line of the protocol's own.
fn shown(status: &str) -> String {
    one_line(status).chars().take(MAX_STATUS).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn received(socket: &UnixDatagram) -> String {
        let mut notice = [0; 2048];
        let length = socket.recv(&mut notice).unwrap();
        String::from_utf8(notice[..length].to_vec()).unwrap()
    }

    #[test]
    fn notices_are_what_a_manager_reads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let by_path = UnixDatagram::bind(&path).unwrap();
        let name = format!("edge-tunnel-test-{}", std::process::id());
        let abstract_name = SocketAddr::from_abstract_name(&name).unwrap();
        let by_name = UnixDatagram::bind_addr(&abstract_name).unwrap();
        for (name, manager) in [(path.as_os_str(), by_path), (OsStr::new(&format!("@{name}")), by_name)] {
            let notifier = Notifier(Some(connect(name).unwrap()));
            assert!(notifier.is_wanted());
            notifier.ready("waiting for a\nMAINPID=1");
            assert_eq!(
                received(&manager),
                r"READY=1
STATUS=waiting for a\nMAINPID=1"
            );
            notifier.status(&"x".repeat(1000));
            assert_eq!(received(&manager), format!("STATUS={}", "x".repeat(MAX_STATUS)));
            notifier.stopping("draining", Duration::from_millis(1500));
            assert_eq!(received(&manager), "STOPPING=1\nEXTEND_TIMEOUT_USEC=1500000\nSTATUS=draining");
        }
    }

    #[test]
    fn a_manager_that_does_not_read_is_not_waited_for() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("notify");
        let _manager = UnixDatagram::bind(&path).unwrap();
        let notifier = Notifier(Some(connect(path.as_os_str()).unwrap()));
        for _ in 0..10_000 {
            notifier.status("on and on");
        }
        assert!(connect(OsStr::new("vsock:2:1234")).is_err());
        assert!(connect(folder.path().join("nobody").as_os_str()).is_err());
    }
}
