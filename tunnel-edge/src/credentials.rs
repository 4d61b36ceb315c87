//! The edge's credentials while it runs. A kubelet rotates its certificate by putting another file in the place of the
//! old one; this looks for it, takes what is good and this node's, and says in time that a certificate comes to its end.
//! Run by `agent` beside its links, which hears by a watch channel that there is something new.

use std::{
    path::PathBuf,
    time::{Duration, SystemTime},
};

use humantime::format_rfc3339_seconds;
use tokio::{sync::watch, time::interval};
use tracing::{error, warn};
use tunnel_core::{
    NodeId,
    identity::{Validity, node_from_certificate, validity_of_certificate},
    tls::ClientTls,
};

use crate::{config::Config, metrics::Metrics};

/// The part of its lifetime that a certificate has left when it is time to warn. A kubelet begins to renew at 30 to 10 %.
const LAST_PART: u32 = 10;

/// What new connections use, and where it comes from.
#[derive(Debug)]
pub(crate) struct Credentials {
    tls: ClientTls,
    /// Whose certificate it must be.
    node: Option<NodeId>,
    cert: PathBuf,
    period: Duration,
    in_use: watch::Sender<Option<Validity>>,
    metrics: Metrics,
}

/// What has been said in the log, so that it is said once.
#[derive(Debug, Default)]
struct Said {
    /// Why the files cannot be used; empty if they can.
    complaint: String,
    age: Age,
}

/// How far a certificate is in its life.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
enum Age {
    #[default]
    Good,
    Ending,
    Expired,
}

impl Age {
    fn of(validity: Validity, now: SystemTime) -> Self {
        let Validity { not_before, not_after } = validity;
        let lifetime = not_after.duration_since(not_before).unwrap_or_default();
        match not_after.duration_since(now) {
            Err(_) => Self::Expired,
            Ok(left) if left < lifetime / LAST_PART => Self::Ending,
            Ok(_) => Self::Good,
        }
    }
}

impl Credentials {
    /// Also gives how long the certificate in use holds, which is marked as changed whenever any of the files was taken
    /// anew; `None` if the certificate does not say.
    pub(crate) fn new(
        config: &Config,
        tls: ClientTls,
        node: Option<NodeId>,
        metrics: Metrics,
    ) -> (Self, watch::Receiver<Option<Validity>>) {
        let (in_use, receiver) = watch::channel(None);
        let cert = config.tls.cert.clone();
        let credentials = Self { tls, node, cert, period: config.reload_period, in_use, metrics };
        credentials.publish();
        (credentials, receiver)
    }

    /// Looks for new ones, for ever. New connections use them; those that are up keep what they have.
    pub(crate) async fn keep_fresh(&self) {
        let mut period = interval(self.period);
        let mut said = Said::default();
        loop {
            period.tick().await;
            self.look(&mut said);
            self.check_age(&mut said);
        }
    }

    fn look(&self, said: &mut Said) {
        match self.tls.reload_if(|certificate| self.check_node(certificate)) {
            Ok(changed) => {
                said.complaint.clear();
                if changed {
                    said.age = Age::Good;
                    self.publish();
                }
            }
            Err(failure) => {
                let text = failure.to_string();
                if text != said.complaint {
                    error!(
                        cause = text,
                        "the credentials' files cannot be used; going on with what they held before"
                    );
                    said.complaint = text;
                }
            }
        }
    }

    /// A process speaks for one node: its grants, its policy and what it calls itself are that node's.
    fn check_node(&self, certificate: &[u8]) -> Result<(), String> {
        let Some(node) = &self.node else { return Ok(()) };
        let named = node_from_certificate(certificate).map_err(|error| error.to_string())?;
        if named == *node {
            return Ok(());
        }
        Err(format!(
            "this edge is node {node}, but the new certificate is for {named}: give it one for {node}, or restart the edge \
             if the node has another name now"
        ))
    }

    fn publish(&self) {
        let validity = validity_of_certificate(&self.tls.certificate()).ok();
        let expiry =
            validity.and_then(|validity| validity.not_after.duration_since(SystemTime::UNIX_EPOCH).ok());
        let seconds = expiry.and_then(|since| i64::try_from(since.as_secs()).ok());
        self.metrics.certificate_expiry.set(seconds.unwrap_or_default());
        self.in_use.send_replace(validity);
    }

    fn check_age(&self, said: &mut Said) {
        let Some(validity) = *self.in_use.borrow() else { return };
        let age = Age::of(validity, SystemTime::now());
        if age <= said.age {
            return;
        }
        said.age = age;
        let (cert, at) = (self.cert.display(), format_rfc3339_seconds(validity.not_after));
        match age {
            Age::Good => {}
            Age::Ending => warn!(
                "the certificate {cert} expires at {at}, in less than a tenth of its lifetime, and there is no newer one: \
                 is the kubelet's rotation working?"
            ),
            Age::Expired => error!(
                "the certificate {cert} expired at {at}, and gateways refuse it: is the kubelet's rotation working?"
            ),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{
        fs, io,
        path::Path,
        sync::{Arc, Mutex},
    };

    use prometheus_client::registry::Registry;
    use rcgen::{CertificateParams, DnType, KeyPair};
    use tempfile::TempDir;
    use tokio::time::timeout;
    use tunnel_core::tls::{Domain, Files};

    use super::*;

    const HOUR: Duration = Duration::from_secs(3600);

    /// What this thread logs.
    #[derive(Clone, Default)]
    struct Log(Arc<Mutex<Vec<u8>>>);

    impl io::Write for Log {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    impl Log {
        fn capture(&self) -> tracing::subscriber::DefaultGuard {
            let log = self.clone();
            let subscriber =
                tracing_subscriber::fmt().with_ansi(false).with_writer(move || log.clone()).finish();
            tracing::subscriber::set_default(subscriber)
        }

        /// The lines since the last call.
        fn take(&self) -> Vec<String> {
            let bytes = std::mem::take(&mut *self.0.lock().unwrap());
            String::from_utf8(bytes).unwrap().lines().map(str::to_owned).collect()
        }
    }

    /// Certificate and key of a node, for a time that ends so long after now.
    fn pem(node: &str, before: Duration, left: i64) -> String {
        let mut params = CertificateParams::default();
        params.distinguished_name.push(DnType::CommonName, format!("system:node:{node}"));
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
        let (now, shift) = (SystemTime::now(), Duration::from_secs(left.unsigned_abs()));
        params.not_before = (now - before).into();
        params.not_after = if left < 0 { now - shift } else { now + shift }.into();
        let key = KeyPair::generate().unwrap();
        params.self_signed(&key).unwrap().pem() + &key.serialize_pem()
    }

    struct Edge {
        credentials: Credentials,
        in_use: watch::Receiver<Option<Validity>>,
        metrics: Metrics,
        folder: TempDir,
    }

    impl Edge {
        fn new(pem: &str) -> Self {
            let folder = tempfile::tempdir().unwrap();
            let current = folder.path().join("current.pem");
            fs::write(&current, pem).unwrap();
            let files = Files { cert: current.clone(), key: current.clone(), ca: current };
            let node: NodeId = "edge-a".parse().unwrap();
            let config = Config::new(node.clone(), Vec::new(), files.clone());
            let (tls, metrics) =
                (ClientTls::load(Domain::Edge, files).unwrap(), Metrics::new(&mut Registry::default()));
            let (credentials, mut in_use) = Credentials::new(&config, tls, Some(node), metrics.clone());
            in_use.mark_unchanged();
            Self { credentials, in_use, metrics, folder }
        }

        fn current(&self) -> &Path {
            &self.credentials.cert
        }

        async fn pass(&self, periods: u32) {
            let time = self.credentials.period * periods;
            assert!(timeout(time, self.credentials.keep_fresh()).await.is_err());
        }
    }

    #[tokio::test(start_paused = true)]
    async fn what_cannot_be_used_is_said_once_and_changes_nothing() {
        let log = Log::default();
        let _guard = log.capture();
        let good = pem("edge-a", HOUR, 7200);
        let edge = Edge::new(&good);
        let other = pem("edge-b", HOUR, 7200);
        let half = &other[..other.len() / 2];
        for (text, says) in [
            (half, "current.pem"),
            ("", "holds no certificate in PEM form"),
            (&*other, "this edge is node edge-a, but the new certificate is for edge-b"),
        ] {
            fs::write(edge.current(), text).unwrap();
            edge.pass(5).await;
            let lines = log.take();
            assert_eq!(lines.len(), 1, "{lines:?}");
            assert!(
                lines[0].contains("ERROR") && lines[0].contains("going on with what they held"),
                "{lines:?}"
            );
            assert!(lines[0].contains(says), "{lines:?}");
            assert!(!edge.in_use.has_changed().unwrap());
        }
        // All is as it was: there is nothing to say and nothing to renew.
        fs::write(edge.current(), good).unwrap();
        edge.pass(5).await;
        assert_eq!(log.take(), Vec::<String>::new());
        assert!(!edge.in_use.has_changed().unwrap());
        edge.folder.close().unwrap();
    }

    #[tokio::test(start_paused = true)]
    async fn a_certificate_that_ends_is_warned_of_once_until_it_is_rotated() {
        let log = Log::default();
        let _guard = log.capture();
        let edge = Edge::new(&pem("edge-a", HOUR, 300));
        edge.pass(5).await;
        let lines = log.take();
        assert_eq!(lines.len(), 1, "{lines:?}");
        assert!(lines[0].contains("WARN") && lines[0].contains("less than a tenth"), "{lines:?}");

        for (left, level) in [(7200, ""), (-60, "ERROR")] {
            fs::write(edge.current(), pem("edge-a", HOUR, left)).unwrap();
            edge.pass(5).await;
            let lines = log.take();
            assert_eq!(lines.len(), usize::from(!level.is_empty()), "{lines:?}");
            assert!(lines.iter().all(|line| line.contains(level) && line.contains("rotation")), "{lines:?}");
            let expiry = edge.in_use.borrow().unwrap().not_after;
            let since = expiry.duration_since(SystemTime::UNIX_EPOCH).unwrap();
            assert_eq!(edge.metrics.certificate_expiry.get(), i64::try_from(since.as_secs()).unwrap());
        }
        assert!(edge.in_use.has_changed().unwrap());
    }

    #[test]
    fn the_last_tenth_of_a_lifetime_is_its_end() {
        let begin = SystemTime::UNIX_EPOCH + HOUR;
        let validity = Validity { not_before: begin, not_after: begin + HOUR * 10 };
        let second = Duration::from_secs(1);
        assert_eq!(Age::of(validity, begin + HOUR * 9), Age::Good);
        assert_eq!(Age::of(validity, begin + HOUR * 9 + second), Age::Ending);
        assert_eq!(Age::of(validity, begin + HOUR * 10), Age::Ending);
        assert_eq!(Age::of(validity, begin + HOUR * 10 + second), Age::Expired);
    }
}
