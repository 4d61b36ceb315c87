//! A keeper: holds one link at a time, for ever. It waits between attempts, goes elsewhere when its gateway drains, makes
//! a newer link when the credentials change, and moves when another gateway suits this edge better. `cluster` says where
//! to; what happens on a link that is up is `link`'s. Run by `agent`, several beside one another.
//!
//! ```text
//!            +---------------- failed: backoff ----------------+
//!            v                                                 |
//!   dial where the cluster says --welcomed--> hold the link --lost--+   (backoff starts anew if the link was stable)
//!            ^                                     |
//!            +-------- gateway drains -------------+   (the old link serves on until the new one is welcomed)
//!                                                  |
//!                          credentials changed, the link wears out, or another gateway is better: connect beside it, as
//!                          above. Welcomed: that link is held, and the old one retires. Until then it is held as if
//!                          nothing had been.
//!
//!   shutdown, at any point: every link is told to drain, and run() returns when all have ended
//! ```

use std::{sync::Arc, time::Duration};

use parking_lot::Mutex;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{
    sync::watch,
    time::{Instant, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};
use tunnel_core::{
    InstanceId, Link, NodeId, Target,
    identity::Validity,
    proto::{
        VERSIONS, clean_text,
        messages::{Hello, Welcome},
    },
};

use crate::{
    backoff::Backoff,
    cluster::{Purpose, SharedCluster, Step, Tally, Turn},
    config::Config,
    daemon::tasks::TaskSet,
    destinations::Destinations,
    generation::Generations,
    link::{self, Phase, Place, Serving},
    metrics::Metrics,
    network::Network,
    status::AgentStatus,
    stream::Dialing,
    uplink::{Destination, Uplink, UplinkError},
};

/// An attempt at a gateway's own address takes no longer: a firewall that drops it must not hold up a keeper that could
/// be led elsewhere.
const DIRECT_TIMEOUT: Duration = Duration::from_secs(5);
/// Rejections because of a drain that are followed by another attempt soon: a load balancer needs some time to see that a
/// gateway leaves.
const MAX_SOON: u32 = 8;
/// How soon that is: a random time from this range, in milliseconds.
const SOON_MS: std::ops::RangeInclusive<u64> = 100..=400;
/// A link that its gateway has drained sooner than this was not worth being made.
const WORTHWHILE: Duration = Duration::from_secs(1);

/// What all keepers of an agent share.
#[derive(Debug)]
pub(crate) struct Edge<N: Network> {
    pub(crate) config: Config,
    /// Who this edge says it is; the gateway goes by the certificate.
    pub(crate) node: Option<NodeId>,
    pub(crate) instance: InstanceId,
    pub(crate) generations: Generations,
    pub(crate) uplink: Uplink,
    pub(crate) dialing: Arc<Dialing<N>>,
    pub(crate) destinations: Mutex<Destinations>,
    pub(crate) cluster: SharedCluster,
    pub(crate) status: AgentStatus,
    pub(crate) metrics: Metrics,
}

/// See the module's text.
pub(crate) struct Keeper<'a, N: Network> {
    edge: &'a Edge<N>,
    seat: usize,
    /// Marked as changed when there is another certificate.
    in_use: watch::Receiver<Option<Validity>>,
    /// Marked as changed when something in the cluster has.
    changes: watch::Receiver<()>,
    backoff: Backoff,
    /// Rejections in a row because of a drain.
    drained: u32,
    rng: SmallRng,
    /// Cancelled when this process shall drain.
    shutdown: CancellationToken,
    /// All its links that have not ended: the newest, and older ones that drain.
    links: TaskSet,
}

/// Whom an attempt is for.
enum Attempt {
    /// The place of a configured address.
    Configured(usize),
    /// The gateway's name.
    Direct(String),
}

/// A link that has just come up.
struct Fresh {
    link: Link,
    welcome: Welcome,
    address: Target,
    attempt: Attempt,
    /// Its number in the cluster.
    number: u64,
}

/// A link that streams come over now.
struct Held {
    phase: watch::Receiver<Phase>,
    retire: CancellationToken,
    since: Instant,
    /// The configured address that led to it.
    configured: Option<usize>,
}

impl<'a, N: Network> Keeper<'a, N> {
    pub(crate) fn new(
        edge: &'a Edge<N>,
        seat: usize,
        seed: u64,
        in_use: watch::Receiver<Option<Validity>>,
        shutdown: CancellationToken,
    ) -> Self {
        let changes = edge.cluster.changes();
        let backoff = Backoff::new(edge.config.backoff.min);
        let rng = SmallRng::seed_from_u64(seed);
        let links = TaskSet::new("a link", &edge.metrics.panics);
        Self { edge, seat, in_use, changes, backoff, drained: 0, rng, shutdown, links }
    }

    /// Keeps its link until shutdown, then waits until all its links have drained. Dropping the future ends them at once.
    pub(crate) async fn run(mut self) {
        let shutdown = self.shutdown.clone();
        tokio::select! {
            // A shutdown that has come is obeyed before anything new is begun.
            biased;
            () = shutdown.cancelled() => {}
            () = self.keep_linked() => {}
        }
        // Each link drains by itself, and is bounded by the drain timeout.
        self.links.all_ended().await;
    }

    /// Cancel-safe: links are owned by their tasks.
    async fn keep_linked(&mut self) {
        let mut held: Option<Held> = None;
        loop {
            // Where its gateway drains, the old link serves until there is a new one, or no need for one.
            let fresh = self.establish(Purpose::Missing, &mut held).await;
            let mut newest = self.hold(fresh);
            retire(&mut held);
            self.stay_linked(&mut newest).await;
            let delay = self.delay_after(&newest);
            held = Some(newest);
            sleep(delay).await;
        }
    }

    /// Waits until the newest link will take no more streams. Meanwhile replaces it where that is good for something.
    async fn stay_linked(&mut self, held: &mut Held) {
        loop {
            let wearing = held.phase.clone();
            let fresh = tokio::select! {
                // A link that is gone needs another one soon, and not after a renewal's delay.
                biased;
                () = held.left() => break,
                fresh = self.replacement(wearing) => fresh,
            };
            let newest = self.hold(fresh);
            std::mem::replace(held, newest).retire.cancel();
        }
        self.edge.cluster.move_ended(self.seat);
    }

    /// Makes a link that shall take the place of the one that is up, when there is a reason to. Cancel-safe.
    async fn replacement(&mut self, mut phase: watch::Receiver<Phase>) -> Fresh {
        loop {
            // Seen before the cluster is asked: a change after that is another change.
            self.changes.mark_unchanged();
            let turn = self.edge.cluster.turn(self.seat);
            if turn == Turn::Now {
                let moved = self.relocate().await;
                self.edge.cluster.move_ended(self.seat);
                match moved {
                    Some(fresh) => return fresh,
                    None => continue,
                }
            }
            tokio::select! {
                // The certificate first: it may be about to end.
                biased;
                () = changed(&mut self.in_use) => return self.renew().await,
                () = wears_out(&mut phase) => return self.succeed().await,
                () = changed(&mut self.changes) => {}
                () = due(turn) => {}
            }
        }
    }

    /// Makes one more link after the credentials have changed. Cancel-safe: the next attempt uses what is new.
    async fn renew(&mut self) -> Fresh {
        // A new CA may come to all edges at the same moment.
        let delay = self.rng.random_range(Duration::ZERO..=self.edge.config.reload_period);
        info!(delay_ms = delay.as_millis(), "the credentials have changed; a new link will take over");
        sleep(delay).await;
        self.establish(Purpose::Renewal, &mut None).await
    }

    /// Makes one more link before the old one has no numbers for more streams. Cancel-safe.
    async fn succeed(&mut self) -> Fresh {
        info!("the link has used most of the numbers that its streams can have; a new link will take over");
        self.establish(Purpose::Renewal, &mut None).await
    }

    /// Tries to get a link to a gateway that suits this edge better.
    async fn relocate(&mut self) -> Option<Fresh> {
        loop {
            let (attempt, destination) = match self.edge.cluster.next(self.seat, Purpose::Move) {
                Step::Rest | Step::Unneeded => return None,
                Step::Wait(at) => {
                    sleep_until(at).await;
                    continue;
                }
                Step::Configured => self.configured(),
                Step::Direct { gateway, address } => self.direct(gateway, address),
            };
            let direct = matches!(attempt, Attempt::Direct(_));
            match self.attempt(attempt, &destination, Purpose::Move).await {
                Ok(fresh) => {
                    let to = &fresh.welcome.gateway_id;
                    info!(to, "another gateway suits this edge better; a link moves there");
                    self.edge.metrics.links_moved.inc();
                    return Some(fresh);
                }
                // Nothing forces the move: it is tried again another time.
                Err(Some(_)) if !direct => return None,
                Err(_) => {}
            }
        }
    }

    /// Attempts until one gives a link that is of use. `old`, whose gateway drains, goes once it is of no use. Cancel-safe.
    async fn establish(&mut self, purpose: Purpose, old: &mut Option<Held>) -> Fresh {
        loop {
            self.changes.mark_unchanged();
            let step = self.edge.cluster.next(self.seat, purpose);
            if step == Step::Unneeded {
                retire(old);
            }
            let (attempt, destination) = match step {
                Step::Rest | Step::Unneeded => {
                    changed(&mut self.changes).await;
                    continue;
                }
                Step::Wait(at) => {
                    tokio::select! {
                        // What is known first: then there may be no need to wait any longer.
                        biased;
                        () = changed(&mut self.changes) => {}
                        () = sleep_until(at) => {}
                    }
                    continue;
                }
                Step::Configured => self.configured(),
                Step::Direct { gateway, address } => self.direct(gateway, address),
            };
            match self.attempt(attempt, &destination, purpose).await {
                Ok(fresh) => return fresh,
                // The cluster says when the next attempt is due.
                Err(None) => {}
                Err(Some(delay)) => {
                    debug!(delay_ms = delay.as_millis(), "waiting before the next attempt");
                    tokio::select! {
                        // Another certificate may be just what was missing.
                        biased;
                        () = changed(&mut self.in_use) => {}
                        () = sleep(delay) => {}
                    }
                }
            }
        }
    }

    fn configured(&self) -> (Attempt, Destination) {
        let (place, destination) = self.edge.destinations.lock().next();
        (Attempt::Configured(place), destination)
    }

    fn direct(&self, gateway: String, address: Target) -> (Attempt, Destination) {
        (Attempt::Direct(gateway), self.edge.destinations.lock().direct(address))
    }

    /// One attempt: a link, or how long to wait, if that is not the cluster's to say. Cancel-safe.
    async fn attempt(
        &mut self,
        attempt: Attempt,
        destination: &Destination,
        purpose: Purpose,
    ) -> Result<Fresh, Option<Duration>> {
        let edge = self.edge;
        let address = &destination.address;
        debug!(%address, ?purpose, "connecting");
        if purpose != Purpose::Move {
            // Seen before the attempt, which uses them as they are now: a change during it is another change. A move may
            // be given up, and must not take the place of a renewal.
            self.in_use.mark_unchanged();
        }
        let timeout = match attempt {
            Attempt::Configured(_) => edge.config.connect_timeout,
            Attempt::Direct(_) => edge.config.connect_timeout.min(DIRECT_TIMEOUT),
        };
        let connect = edge.uplink.connect(edge.dialing.network(), destination, self.hello(), timeout);
        match connect.await {
            Ok((link, welcome)) => self.take(attempt, address, link, welcome, purpose).ok_or(None),
            Err(failure) => Err(Some(self.failed(&attempt, address, &failure))),
        }
    }

    fn hello(&self) -> Hello {
        let Edge { config, node, instance, generations, .. } = self.edge;
        Hello {
            min_version: VERSIONS.0,
            max_version: VERSIONS.1,
            software: concat!("tunnel-edge/", env!("CARGO_PKG_VERSION")).to_owned(),
            instance_id: instance.as_str().to_owned(),
            node_claim: node.as_ref().map(ToString::to_string).unwrap_or_default(),
            max_streams: u32::try_from(config.link.max_streams).unwrap_or(u32::MAX),
            generation: generations.next(),
            ..Hello::default()
        }
    }

    /// A gateway has welcomed the link, which is of use unless that gateway is held already.
    fn take(
        &mut self,
        attempt: Attempt,
        address: &Target,
        link: Link,
        welcome: Welcome,
        purpose: Purpose,
    ) -> Option<Fresh> {
        let expected = match &attempt {
            Attempt::Direct(gateway) => Some(gateway.as_str()),
            Attempt::Configured(place) => {
                self.edge.destinations.lock().welcomed(*place);
                None
            }
        };
        self.drained = 0;
        let address = address.clone();
        let Some(number) = self.edge.cluster.claim(self.seat, purpose, expected, &welcome) else {
            debug!(%address, gateway_id = welcome.gateway_id, "not the gateway that was looked for");
            if let Attempt::Configured(place) = attempt {
                self.edge.destinations.lock().pass(place);
            }
            self.dismiss(link, welcome, &address);
            return None;
        };
        Some(Fresh { link, welcome, address, attempt, number })
    }

    /// An attempt has failed: how long to wait before the next.
    fn failed(&mut self, attempt: &Attempt, address: &Target, failure: &UplinkError) -> Duration {
        let edge = self.edge;
        edge.metrics.connect_failed(failure.label());
        let place = match attempt {
            Attempt::Configured(place) => *place,
            Attempt::Direct(gateway) => {
                if edge.cluster.unreachable(gateway) {
                    info!(gateway, %address, cause = %failure,
                          "the gateway cannot be had at its own address, which is left alone for a while");
                } else {
                    debug!(gateway, %address, cause = %failure, "the gateway can still not be had at its own address");
                }
                // There is another way, that leads to all.
                return self.soon();
            }
        };
        edge.status.failed(format!("{address}: {failure}"));
        edge.destinations.lock().pass(place);
        if failure.is_drain() && self.drained < MAX_SOON {
            self.drained += 1;
            debug!(%address, "led to a gateway that drains; another attempt soon");
            return self.soon();
        }
        edge.destinations.lock().complain(place, failure);
        self.delay_after_failure(failure)
    }

    fn soon(&mut self) -> Duration {
        Duration::from_millis(self.rng.random_range(SOON_MS))
    }

    /// An outage ends by itself, and the sooner the edge is back then the better; what a person must repair can wait.
    fn delay_after_failure(&mut self, failure: &UplinkError) -> Duration {
        let limits = &self.edge.config.backoff;
        let cap = if failure.needs_a_person() { limits.max } else { limits.outage_max };
        self.backoff.after_failure(failure.retry_after(), cap, &mut self.rng)
    }

    /// Starts to serve a link, which is this keeper's now.
    fn hold(&mut self, fresh: Fresh) -> Held {
        let Fresh { link, welcome, address, attempt, number } = fresh;
        let Tally { held, wanted, .. } = self.edge.cluster.tally();
        let links = format!("{held} of {wanted} gateways");
        info!(gateway = %address, gateway_id = welcome.gateway_id, session = welcome.session_id,
              granted = ?welcome.granted, links, "linked");
        let place = Place { cluster: self.edge.cluster.clone(), link: number };
        let (phase, retire) = self.serve(link, welcome, &address, Some(place));
        let configured = match attempt {
            Attempt::Configured(place) => Some(place),
            Attempt::Direct(_) => None,
        };
        Held { phase, retire, since: Instant::now(), configured }
    }

    /// Ends a link that is of no use. Streams may come over it already, since its gateway prefers the newest link of a node:
    /// so it is served as any other until that gateway has been told.
    fn dismiss(&mut self, link: Link, welcome: Welcome, address: &Target) {
        let (_, retire) = self.serve(link, welcome, address, None);
        retire.cancel();
    }

    fn serve(
        &mut self,
        link: Link,
        welcome: Welcome,
        address: &Target,
        place: Option<Place>,
    ) -> (watch::Receiver<Phase>, CancellationToken) {
        // Those that have ended by now are not kept.
        self.links.reap();
        let (sender, phase) = watch::channel(Phase::Up);
        let retire = CancellationToken::new();
        let edge = self.edge;
        let serving = Serving {
            gateway: shown(&welcome.gateway_id, address),
            dialing: edge.dialing.clone(),
            phase: sender,
            shutdown: self.shutdown.clone(),
            retire: retire.clone(),
            place,
            drain_timeout: edge.config.drain_timeout,
            up: edge.status.link_up(&edge.metrics),
            metrics: edge.metrics.clone(),
        };
        self.links.spawn(link::serve(link, welcome, serving));
        (phase, retire)
    }

    /// The link will take no more streams: how long to wait before the next attempt.
    fn delay_after(&mut self, held: &Held) -> Duration {
        let lasted = held.since.elapsed();
        if lasted >= self.edge.config.backoff.reset_after {
            self.backoff.reset();
        }
        if let Some(place) = held.configured {
            self.edge.destinations.lock().pass(place);
        }
        if *held.phase.borrow() == Phase::Draining && lasted >= WORTHWHILE {
            // All of the gateway's edges were told at the same moment, but the old link still serves this one.
            self.backoff.spread(&mut self.rng)
        } else {
            self.backoff.after_failure(Duration::ZERO, self.edge.config.backoff.outage_max, &mut self.rng)
        }
    }
}

impl Held {
    /// Waits until the link will take no more streams. Cancel-safe.
    async fn left(&mut self) {
        // An error means that the link's task is gone, and so the link.
        let _ = self.phase.wait_for(|phase| *phase >= Phase::Draining).await;
    }
}

/// Lets a link go that was held until now.
fn retire(held: &mut Option<Held>) {
    if let Some(held) = held.take() {
        held.retire.cancel();
    }
}

/// A gateway, for the log: behind a load balancer, the address alone does not tell.
fn shown(gateway: &str, address: &Target) -> String {
    if gateway.is_empty() { address.to_string() } else { format!("{} at {address}", clean_text(gateway)) }
}

/// Waits for a change; for ever, if there can be none. Cancel-safe.
async fn changed<T>(receiver: &mut watch::Receiver<T>) {
    if receiver.changed().await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits until a link that still takes streams wears out; for ever, if it does not. Cancel-safe.
async fn wears_out(phase: &mut watch::Receiver<Phase>) {
    if phase.wait_for(|phase| *phase == Phase::WearsOut).await.is_err() {
        std::future::pending::<()>().await;
    }
}

/// Waits until it may be a keeper's turn, for all that is known now.
async fn due(turn: Turn) {
    match turn {
        Turn::Now => {}
        Turn::At(at) => sleep_until(at).await,
        Turn::Never => std::future::pending().await,
    }
}
