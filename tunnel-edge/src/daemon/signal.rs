//! Signals: the first SIGTERM or SIGINT means drain, the second means stop at once. SIGHUP means nothing yet.

use std::io;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

/// The signals, caught from the moment this exists. Needs a Tokio runtime.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    hangup: Signal,
}

impl Signals {
    /// Catches the signals. Install them before anything that a signal should not cut.
    pub fn install() -> io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hangup: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for the next signal, and gives its name.
    pub async fn next(&mut self) -> &'static str {
        tokio::select! {
            // Of several at once, those that end a process matter more.
            biased;
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.hangup.recv() => "SIGHUP",
        }
    }

    /// Cancels `drain` at the first signal and `stop` at the second; then ends.
    pub async fn run(mut self, drain: CancellationToken, stop: CancellationToken) {
        let first = self.next_end().await;
        info!(signal = first, "draining; a second signal stops at once");
        drain.cancel();
        let second = self.next_end().await;
        info!(signal = second, "stopping at once");
        stop.cancel();
    }

    /// Waits for the next signal that ends a process. One that asks for a reload must not.
    async fn next_end(&mut self) -> &'static str {
        loop {
            match self.next().await {
                "SIGHUP" => warn!(
                    "SIGHUP is ignored: settings are read at the start only, so restart for new ones; certificates and \
                     keys are read again by themselves when their files change"
                ),
                name => return name,
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{process::Command, time::Duration};

    use tokio::time::timeout;

    use super::*;

    fn send_self(signal: &str) {
        let sent = Command::new("kill").args([signal, &std::process::id().to_string()]).status().unwrap();
        assert!(sent.success());
    }

    #[tokio::test]
    async fn the_first_signal_drains_and_the_second_stops_and_a_hangup_does_neither() {
        let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
        let mut witness = Signals::install().unwrap();
        let task = tokio::spawn(Signals::install().unwrap().run(drain.clone(), stop.clone()));
        send_self("-HUP");
        assert_eq!(witness.next().await, "SIGHUP");
        assert!(timeout(Duration::from_millis(50), drain.cancelled()).await.is_err());
        send_self("-TERM");
        drain.cancelled().await;
        send_self("-HUP");
        assert!(timeout(Duration::from_millis(50), stop.cancelled()).await.is_err());
        send_self("-INT");
        stop.cancelled().await;
        task.await.unwrap();
    }
}
