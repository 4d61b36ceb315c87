//! The agent: keeps this node linked to a gateway, for ever. It chooses among the gateways, waits between attempts,
//! moves to another gateway when one drains, renews its link when the credentials change, and drains itself when it is
//! told to. Called by [`crate::run`] and by tests; what happens on a link that is up is `link`'s.
//!
//! ```text
//!            +--------- failed: next gateway, backoff ---------+
//!            v                                                 |
//!   connect to a gateway --welcomed--> hold the link --lost----+   (backoff starts anew if the link was stable)
//!            ^                              |
//!            +---- gateway drains ----------+   (the old link serves its streams on, beside the new one)
//!                                           |
//!                                    credentials changed: connect beside it, as above. Welcomed: that link is held,
//!                                    and the old one retires. Until then the old one is held as if nothing had been.
//!
//!   shutdown, at any point: every link is told to drain, and run() returns when all have ended
//! ```

use std::{sync::Arc, time::Duration};

use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{
    sync::watch,
    task::JoinSet,
    time::{Instant, sleep},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use tunnel_core::{
    InstanceId, Link, NodeId,
    identity::{Validity, node_from_certificate},
    proto::{
        VERSIONS,
        messages::{Hello, Welcome},
    },
    tls::ClientTls,
};

use crate::{
    backoff::Backoff,
    config::Config,
    credentials::Credentials,
    link::{self, Phase, Serving},
    metrics::Metrics,
    network::Network,
    status::AgentStatus,
    stream::Dialing,
    uplink::{Destination, Proxies, Uplink, UplinkError},
};

/// A failure that goes on is logged again, loudly, this often.
const REMIND_PERIOD: Duration = Duration::from_secs(300);

/// Keeps a node linked. See the module's text.
#[derive(Debug)]
pub struct Agent<N: Network> {
    config: Config,
    /// Who this edge says it is; the gateway goes by the certificate.
    node: Option<NodeId>,
    instance: InstanceId,
    uplink: Uplink,
    credentials: Arc<Credentials>,
    /// How long the certificate in use holds; marked as changed when there is another.
    in_use: watch::Receiver<Option<Validity>>,
    dialing: Arc<Dialing<N>>,
    gateways: Vec<Gateway>,
    /// Which of `gateways` is tried next.
    next: usize,
    backoff: Backoff,
    rng: SmallRng,
    status: AgentStatus,
    metrics: Metrics,
}

/// A gateway's address, and what was last said about it in the log.
#[derive(Debug)]
struct Gateway {
    destination: Destination,
    complaint: Option<Complaint>,
}

/// A failure that has been logged, so that the same one is not logged at every attempt.
#[derive(Debug)]
struct Complaint {
    text: String,
    logged: Instant,
    attempts: u64,
}

/// A link that has just come up.
struct Fresh {
    link: Link,
    welcome: Welcome,
}

/// A link that streams come over now.
struct Held {
    phase: watch::Receiver<Phase>,
    retire: CancellationToken,
    since: Instant,
}

impl<N: Network> Agent<N> {
    /// An agent that does nothing until it is run. All its random choices follow from `seed`.
    pub fn new(config: Config, tls: ClientTls, network: N, seed: u64, metrics: Metrics) -> Self {
        let node = config.node.clone().or_else(|| node_from_certificate(&tls.certificate()).ok());
        let mut rng = SmallRng::seed_from_u64(seed);
        let gateways: Vec<Gateway> = config
            .gateways
            .iter()
            .map(|gateway| Gateway {
                destination: Destination {
                    address: gateway.clone(),
                    server_name: config.server_name.clone(),
                },
                complaint: None,
            })
            .collect();
        let (credentials, in_use) = Credentials::new(&config, tls.clone(), node.clone(), metrics.clone());
        let uplink = Uplink {
            tls,
            proxies: Proxies::new(&config.proxy),
            timeout: config.connect_timeout,
            link: config.link,
        };
        Self {
            instance: InstanceId::from_random(rng.random()),
            uplink,
            credentials: Arc::new(credentials),
            in_use,
            dialing: Arc::new(Dialing::new(&config, node.clone(), network, metrics.clone())),
            next: rng.random_range(0..gateways.len().max(1)),
            gateways,
            backoff: Backoff::new(config.backoff.min),
            rng,
            status: AgentStatus::new(),
            metrics,
            node,
            config,
        }
    }

    /// Whether it is connected; stays true to the agent while it runs.
    pub fn status(&self) -> AgentStatus {
        self.status.clone()
    }

    /// Keeps the node linked until `shutdown`, then drains: tells the gateways, lets running streams finish until the
    /// drain timeout, closes the links and returns. Nothing else makes it return.
    ///
    /// Dropping the future ends every link at once.
    pub async fn run(mut self, shutdown: CancellationToken) {
        let credentials = self.credentials.clone();
        tokio::select! {
            biased;
            () = self.keep_linked(&shutdown) => {}
            () = credentials.keep_fresh() => {}
        }
    }

    async fn keep_linked(&mut self, shutdown: &CancellationToken) {
        // All links that have not ended: the newest, and older ones that drain.
        let mut links = JoinSet::new();
        while let Some(fresh) = until(shutdown, self.establish()).await {
            let held = self.hold(fresh, &mut links, shutdown);
            let staying = self.stay_linked(held, &mut links, shutdown);
            let Some(held) = until(shutdown, staying).await else { break };
            let delay = self.delay_after(&held);
            let Some(()) = until(shutdown, sleep(delay)).await else { break };
        }
        info!(links = links.len(), "draining: no new streams are taken");
        // Each link drains by itself, and is bounded by the drain timeout.
        while links.join_next().await.is_some() {}
        info!("drained");
    }

    /// Waits until the newest link takes no more streams, and gives that. Meanwhile renews it when the credentials change.
    /// Cancel-safe: links are owned by their tasks.
    async fn stay_linked(
        &mut self,
        mut held: Held,
        links: &mut JoinSet<()>,
        shutdown: &CancellationToken,
    ) -> Held {
        loop {
            let fresh = tokio::select! {
                // A link that is gone needs another one soon, and not after a renewal's delay.
                biased;
                () = held.left() => return held,
                fresh = self.renewal() => fresh,
            };
            let newest = self.hold(fresh, links, shutdown);
            std::mem::replace(&mut held, newest).retire.cancel();
        }
    }

    /// Makes one more link after the credentials have changed. Cancel-safe: the next attempt uses what is new.
    async fn renewal(&mut self) -> Fresh {
        if self.in_use.changed().await.is_err() {
            // Nobody looks at the files any more.
            return std::future::pending().await;
        }
        // A new CA may come to all edges at the same moment.
        let delay = self.rng.random_range(Duration::ZERO..=self.config.reload_period);
        info!(delay_ms = delay.as_millis(), "the credentials have changed; a new link will take over");
        sleep(delay).await;
        self.establish().await
    }

    /// Attempts until one gives a link. Cancel-safe.
    async fn establish(&mut self) -> Fresh {
        loop {
            // Seen before the attempt, which uses them as they are now: a change during it is another change.
            self.in_use.mark_unchanged();
            let hello = self.hello();
            let gateway = &mut self.gateways[self.next];
            debug!(gateway = %gateway.destination.address, "connecting");
            match self.uplink.connect(self.dialing.network(), &gateway.destination, hello).await {
                Ok((link, welcome)) => {
                    gateway.complaint = None;
                    return Fresh { link, welcome };
                }
                Err(failure) => {
                    gateway.complain(&failure);
                    self.status.failed(format!("{}: {failure}", gateway.destination.address));
                    self.metrics.connect_failed(failure.label());
                    self.rotate();
                    let delay = self.delay_after_failure(&failure);
                    debug!(delay_ms = delay.as_millis(), "waiting before the next attempt");
                    tokio::select! {
                        // Another certificate may be just what was missing.
                        biased;
                        Ok(()) = self.in_use.changed() => {}
                        () = sleep(delay) => {}
                    }
                }
            }
        }
    }

    /// An outage ends by itself, and the sooner the edge is back then the better; what a person must repair can wait.
    fn delay_after_failure(&mut self, failure: &UplinkError) -> Duration {
        let limits = &self.config.backoff;
        let cap = if failure.needs_a_person() { limits.max } else { limits.outage_max };
        self.backoff.after_failure(failure.retry_after(), cap, &mut self.rng)
    }

    fn hello(&self) -> Hello {
        Hello {
            min_version: VERSIONS.0,
            max_version: VERSIONS.1,
            software: concat!("tunnel-edge/", env!("CARGO_PKG_VERSION")).to_owned(),
            instance_id: self.instance.as_str().to_owned(),
            node_claim: self.node.as_ref().map(ToString::to_string).unwrap_or_default(),
            max_streams: u32::try_from(self.config.link.max_streams).unwrap_or(u32::MAX),
            ..Hello::default()
        }
    }

    fn rotate(&mut self) {
        self.next = (self.next + 1) % self.gateways.len();
    }

    /// Starts to serve a link.
    fn hold(&mut self, fresh: Fresh, links: &mut JoinSet<()>, shutdown: &CancellationToken) -> Held {
        let Fresh { link, welcome } = fresh;
        // Those that have ended by now are not kept.
        while links.try_join_next().is_some() {}
        let gateway = self.gateways[self.next].destination.address.to_string();
        info!(gateway, gateway_id = welcome.gateway_id, session = welcome.session_id,
              granted = ?welcome.granted, "linked");
        let (sender, phase) = watch::channel(Phase::Up);
        let retire = CancellationToken::new();
        let serving = Serving {
            gateway,
            dialing: self.dialing.clone(),
            phase: sender,
            shutdown: shutdown.clone(),
            retire: retire.clone(),
            drain_timeout: self.config.drain_timeout,
            up: self.status.link_up(&self.metrics),
            metrics: self.metrics.clone(),
        };
        links.spawn(link::serve(link, welcome, serving));
        Held { phase, retire, since: Instant::now() }
    }

    /// The link takes no more streams: how long to wait before the next attempt, and where it will go.
    fn delay_after(&mut self, held: &Held) -> Duration {
        if held.since.elapsed() >= self.config.backoff.reset_after {
            self.backoff.reset();
        }
        let draining = *held.phase.borrow() == Phase::Draining;
        self.rotate();
        if draining {
            // All of the gateway's edges were told at the same moment, but the old link still serves this one.
            self.backoff.spread(&mut self.rng)
        } else {
            self.backoff.after_failure(Duration::ZERO, self.config.backoff.outage_max, &mut self.rng)
        }
    }
}

impl Held {
    /// Waits until the link takes no more streams. Cancel-safe.
    async fn left(&mut self) {
        // An error means that the link's task is gone, and so the link.
        let _ = self.phase.wait_for(|phase| *phase != Phase::Up).await;
    }
}

impl Gateway {
    /// Says in the log why an attempt failed: loudly when it is news, or has been going on for a while.
    fn complain(&mut self, failure: &UplinkError) {
        let gateway = &self.destination.address;
        let text = failure.to_string();
        let now = Instant::now();
        match &mut self.complaint {
            Some(known) if known.text == text => {
                known.attempts += 1;
                if now.duration_since(known.logged) < REMIND_PERIOD {
                    debug!(%gateway, cause = text, attempts = known.attempts, "still no link");
                } else {
                    warn!(%gateway, cause = text, attempts = known.attempts, "attempts still give no link; trying on");
                    known.logged = now;
                }
            }
            _ => {
                warn!(%gateway, cause = text, "the attempt gave no link; trying on, this is logged again every {} s",
                      REMIND_PERIOD.as_secs());
                self.complaint = Some(Complaint { text, logged: now, attempts: 1 });
            }
        }
    }
}

/// `work`, or `None` if `shutdown` comes first.
async fn until<T>(shutdown: &CancellationToken, work: impl Future<Output = T>) -> Option<T> {
    tokio::select! {
        // A shutdown that has come is obeyed before anything new is begun.
        biased;
        () = shutdown.cancelled() => None,
        done = work => Some(done),
    }
}
