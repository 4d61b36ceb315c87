//! A link that is up, from the gateway's welcome to its end: hands each new stream to `stream`, follows the gateway's
//! wishes, drains at shutdown and when there is a newer link. Started by `keeper`, one task per link; the task owns all
//! streams of its link.
//!
//! An end by drain goes in this order: no new streams; running ones finish; at the deadline the rest is stopped, which
//! tells the far side why; only then the link is closed.

use std::{pin::pin, sync::Arc, time::Duration};

use tokio::{
    sync::watch,
    time::{Instant, interval, sleep, sleep_until},
};
use tokio_util::sync::CancellationToken;
use tracing::{debug, info, warn};
use tunnel_core::{
    Host, Link, LinkError, LinkEvent, LinkHandle,
    proto::{
        clean_text,
        messages::{Drain, Update, Welcome},
    },
};

use crate::{
    cluster::SharedCluster,
    daemon::tasks::TaskSet,
    metrics::Metrics,
    network::Network,
    status::LinkUp,
    stream::{self, Dialing},
};

/// Streams that were stopped at a deadline have this long to tell the far side.
const STOP_GRACE: Duration = Duration::from_secs(1);
/// The gateways have this long to hear of a newer link before the older one is told to retire, and streams that were sent
/// before that have it again to arrive.
const RETIRE_GRACE: Duration = Duration::from_secs(1);
/// How long streams may run on over a link that a newer one has replaced.
const RETIREMENT: Duration = Duration::from_secs(30 * 24 * 3600);
/// How often the link's round-trip time goes into the metrics.
const RTT_PERIOD: Duration = Duration::from_secs(5);

/// Where a link is in its life, as its keeper sees it. Only ever moves down.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Streams come over it.
    Up,
    /// Streams still come over it, but before long there will be no numbers for more.
    WearsOut,
    /// The gateway will send no new streams, by its own wish or the edge's; old ones run on.
    Draining,
    /// It is gone.
    Ended,
}

/// What a link's task is given.
pub(crate) struct Serving<N: Network> {
    /// The gateway's address, for the log.
    pub(crate) gateway: String,
    pub(crate) dialing: Arc<Dialing<N>>,
    /// Its place in the cluster, where there is a use for it. Given back before the keeper hears of the end, which asks the
    /// cluster then; so it stands before `phase`.
    pub(crate) place: Option<Place>,
    pub(crate) phase: watch::Sender<Phase>,
    /// Cancelled when this process shall drain.
    pub(crate) shutdown: CancellationToken,
    /// Cancelled when there is a newer link.
    pub(crate) retire: CancellationToken,
    pub(crate) drain_timeout: Duration,
    pub(crate) up: LinkUp,
    pub(crate) metrics: Metrics,
}

/// What a link tells the cluster's keeper of seats. Given back when dropped.
pub(crate) struct Place {
    pub(crate) cluster: SharedCluster,
    /// The link's number there.
    pub(crate) link: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        self.cluster.lost(self.link);
    }
}

/// Serves a link until it has ended, and all its streams with it.
pub(crate) async fn serve<N: Network>(mut link: Link, welcome: Welcome, serving: Serving<N>) {
    let begun = Instant::now();
    let mut session = Session {
        handle: link.handle(),
        streams: TaskSet::new("a stream", &serving.metrics.panics),
        own_names: serving.dialing.own_names(&welcome.granted),
        granted: welcome.granted,
        stop: CancellationToken::new(),
        drain: DrainState::default(),
        serving,
    };
    let end = session.run(&mut link).await;
    let Session { serving, mut streams, drain, stop, .. } = session;
    let Serving { gateway, phase, up, metrics, shutdown, drain_timeout, place, .. } = serving;
    let lasted_s = begun.elapsed().as_secs();
    if place.is_none() {
        debug!(gateway, cause = %end, lasted_s, streams = streams.len(), "link that was not needed closed");
    } else if drain.leaving {
        info!(gateway, cause = %end, lasted_s, streams = streams.len(), "link closed");
    } else if streams.is_empty() {
        warn!(gateway, cause = %end, lasted_s, "link lost");
    } else {
        warn!(gateway, cause = %end, lasted_s, streams = streams.len(), "link lost, and its streams with it");
    }
    metrics.link_lost(end.label());
    up.lost(format!("{gateway}: link lost: {end}"));
    // Before the keeper hears of it, which asks the cluster then.
    drop(place);
    phase.send_replace(Phase::Ended);
    // The link's end has aborted the streams, each with its reason. One that had all its bytes may still hand them to its
    // target, for as long as this process has.
    let too_late = async {
        shutdown.cancelled().await;
        sleep(drain_timeout).await;
    };
    tokio::select! {
        // All streams gone goes first: then there is nothing to be late for.
        biased;
        () = streams.all_ended() => {}
        () = too_late => stop.cancel(),
    }
    streams.all_ended().await;
}

struct Session<N: Network> {
    handle: LinkHandle,
    streams: TaskSet,
    granted: Vec<String>,
    own_names: Arc<[Host]>,
    /// Ends every stream.
    stop: CancellationToken,
    drain: DrainState,
    serving: Serving<N>,
}

#[derive(Debug, Default)]
struct DrainState {
    /// This side ends the link as soon as no stream is left.
    leaving: bool,
    /// This process goes.
    shutting_down: bool,
    /// Streams that the gateway has sent may arrive until then.
    lingers_until: Option<Instant>,
    /// When streams that still run are stopped; after that, when the link is closed whatever they do.
    deadline: Option<Instant>,
    stopped: bool,
}

impl DrainState {
    /// Of several deadlines, the first counts.
    fn ends_by(&mut self, deadline: Instant) {
        self.deadline = Some(self.deadline.map_or(deadline, |known| known.min(deadline)));
    }
}

impl<N: Network> Session<N> {
    async fn run(&mut self, link: &mut Link) -> LinkError {
        let (shutdown, retire) = (self.serving.shutdown.clone(), self.serving.retire.clone());
        // A link that is not needed was never told of: the others need no time to hear of a newer one.
        let hearing = if self.serving.place.is_some() { RETIRE_GRACE } else { Duration::ZERO };
        let mut retired = pin!(async move {
            retire.cancelled().await;
            sleep(hearing).await;
        });
        let mut rtt = interval(RTT_PERIOD);
        loop {
            // A shutdown first, so that a stream behind it is refused. Then the link, which must never wait for the
            // edge's own work; finished streams before the deadline that would stop them. Retiring has time.
            tokio::select! {
                biased;
                () = shutdown.cancelled(), if !self.drain.shutting_down => self.leave(),
                event = link.next() => match event {
                    LinkEvent::Stream(incoming) => self.begin_stream(incoming),
                    LinkEvent::Draining(drain) => self.gateway_drains(&drain),
                    LinkEvent::WearsOut => self.moves_to(Phase::WearsOut),
                    LinkEvent::Updated(update) => self.updated(&update),
                    // Between gateways only.
                    LinkEvent::Holdings(_) | LinkEvent::Gateway(_) => {}
                    LinkEvent::Closed(error) => return error,
                },
                Some(()) = self.streams.next_ended() => self.close_if_idle(),
                () = sleep_until(self.drain.deadline.unwrap_or_else(Instant::now)), if self.drain.deadline.is_some() => {
                    self.deadline_passed();
                }
                () = sleep_until(self.drain.lingers_until.unwrap_or_else(Instant::now)), if self.drain.lingers_until.is_some() => {
                    self.drain.lingers_until = None;
                    self.close_if_idle();
                }
                () = &mut retired, if !self.drain.leaving => self.retire(),
                _ = rtt.tick() => self.measure(),
            }
        }
    }

    fn begin_stream(&mut self, incoming: tunnel_core::Incoming) {
        let (dialing, own_names) = (self.serving.dialing.clone(), self.own_names.clone());
        let (stop, draining) = (self.stop.clone(), self.drain.shutting_down || self.drain.stopped);
        self.streams
            .spawn(async move { stream::serve(&dialing, &own_names, incoming, &stop, draining).await });
    }

    /// This process goes: the gateway is told, and streams have until the drain timeout.
    fn leave(&mut self) {
        self.drain.shutting_down = true;
        // Streams that still come are refused.
        self.drain.lingers_until = None;
        self.drain_within(self.serving.drain_timeout, "the edge is shutting down");
    }

    /// Grants or hints have changed; most often only one of them.
    fn updated(&mut self, update: &Update) {
        if update.granted != self.granted {
            info!(gateway = self.serving.gateway, granted = ?update.granted, "granted names have changed");
            self.own_names = self.serving.dialing.own_names(&update.granted);
            self.granted.clone_from(&update.granted);
        }
        if let Some(place) = &self.serving.place {
            place.cluster.updated(place.link, &update.gateways);
        }
    }

    /// There is a newer link. What runs over this one, such as the following of a log, is not to be cut because a
    /// certificate was rotated: it goes on to its own end. kube-apiserver's connections to a kubelet may well last for weeks.
    fn retire(&mut self) {
        let (gateway, streams) = (&self.serving.gateway, self.streams.len());
        if self.serving.place.is_some() {
            info!(gateway, streams, "a newer link takes over; this one ends with its last stream");
        }
        self.drain.lingers_until = Some(Instant::now() + RETIRE_GRACE);
        self.serving.up.retires();
        self.moves_to(Phase::Draining);
        self.drain_within(RETIREMENT, "the edge has a newer link");
    }

    fn drain_within(&mut self, timeout: Duration, reason: &str) {
        self.handle.drain(timeout, reason);
        self.drain.leaving = true;
        self.drain.ends_by(Instant::now() + timeout);
        self.close_if_idle();
    }

    /// The gateway goes: the keeper is told to look for another one, while streams have as long as the gateway says.
    fn gateway_drains(&mut self, drain: &Drain) {
        let time_left = Duration::from_millis(drain.deadline_ms.into());
        let (reason, gateway) = (clean_text(&drain.reason), &self.serving.gateway);
        if self.takes_streams() && self.serving.place.is_some() {
            let (streams, deadline_s) = (self.streams.len(), time_left.as_secs());
            info!(gateway, reason, streams, deadline_s, "the gateway drains; looking for another one");
        }
        self.drain.ends_by(Instant::now() + time_left);
        let cause = format!("{gateway}: the gateway drains: {reason}");
        self.serving.up.drains(cause);
        if let Some(place) = &self.serving.place {
            place.cluster.draining(place.link);
        }
        self.moves_to(Phase::Draining);
    }

    fn takes_streams(&self) -> bool {
        *self.serving.phase.borrow() < Phase::Draining
    }

    fn moves_to(&self, next: Phase) {
        self.serving.phase.send_if_modified(|phase| {
            let moves = *phase < next;
            *phase = next.max(*phase);
            moves
        });
    }

    fn close_if_idle(&mut self) {
        if self.drain.leaving && self.streams.is_empty() && self.drain.lingers_until.is_none() {
            match self.drain.deadline.take() {
                Some(deadline) => self.handle.close_by("drained", deadline),
                None => self.handle.close("drained"),
            }
        }
    }

    fn deadline_passed(&mut self) {
        if self.drain.stopped {
            self.handle.close("streams did not end at the drain deadline");
            self.drain.deadline = None;
            return;
        }
        debug!(gateway = self.serving.gateway, streams = self.streams.len(), "the drain deadline has passed");
        self.stop.cancel();
        self.drain.stopped = true;
        self.drain.leaving = true;
        self.drain.deadline = Some(Instant::now() + STOP_GRACE);
        self.close_if_idle();
    }

    fn measure(&self) {
        let is_newest = self.takes_streams();
        if let Some(rtt) = self.handle.rtt().filter(|_| is_newest) {
            self.serving.metrics.rtt.set(rtt.smoothed.as_secs_f64());
        }
    }
}
