//! SIGTERM and SIGINT: the first means drain, the second means stop at once.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::info;

/// The two signals, caught from the moment this exists. Needs a Tokio runtime.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
}

impl Signals {
    /// Catches the signals. Install them before anything that a signal should not cut.
    pub fn install() -> io::Result<Self> {
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    /// Waits for the next signal, and gives its name.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
        }
    }

    /// Cancels `drain` at the first signal and `stop` at the second; then ends.
    pub async fn run(mut self, drain: CancellationToken, stop: CancellationToken) {
        let first = self.next().await;
        info!(signal = first, "draining; a second signal stops at once");
        drain.cancel();
        let second = self.next().await;
        info!(signal = second, "stopping at once");
        stop.cancel();
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;

    fn send_self(signal: &str) {
        let sent = Command::new("kill").args([signal, &std::process::id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    #[tokio::test]
    async fn the_first_signal_drains_and_the_second_stops() {
        let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
        let task = tokio::spawn(Signals::install().unwrap().run(drain.clone(), stop.clone()));
        send_self("-TERM");
        drain.cancelled().await;
        assert!(!stop.is_cancelled());
        send_self("-INT");
        stop.cancelled().await;
        task.await.unwrap();
    }
}
