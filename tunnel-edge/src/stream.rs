//! One stream from its header to its end: what is wanted, whether local policy allows it, dial, answer, relay. Called
//! by `link`, which owns the task. The walk goes on in `dial`, and ends in [`tunnel_core::relay()`].

use std::{sync::Arc, time::Duration};

use tokio::time::Instant;
use tokio_util::sync::CancellationToken;
use tracing::{debug, info};
use tunnel_core::{
    Aborted, Host, Incoming, Leg, NodeId, PendingStream, RelayEnd, Relayed, Target, Timeouts,
    proto::{
        clean_text,
        messages::{AbortCode, Open, RefusalCode},
    },
    relay,
};

use crate::{
    config::Config,
    dial::{self, dial},
    metrics::{Metrics, refusal_label},
    network::Network,
    policy::Policy,
};

/// A stream's header must be whole within this time.
const HEADER_TIMEOUT: Duration = Duration::from_secs(10);

/// What every stream of every link needs to get to its target.
#[derive(Debug)]
pub(crate) struct Dialing<N: Network> {
    node: Option<NodeId>,
    /// What this edge calls itself in what callers read.
    edge: String,
    policy: Policy,
    network: N,
    timeout: Duration,
    timeouts: Timeouts,
    metrics: Metrics,
}

impl<N: Network> Dialing<N> {
    pub(crate) fn new(config: &Config, node: Option<NodeId>, network: N, metrics: Metrics) -> Self {
        let edge = node.as_ref().map_or_else(|| "the edge".to_owned(), ToString::to_string);
        Self {
            node,
            edge,
            policy: config.policy.clone(),
            network,
            timeout: config.dial_timeout,
            timeouts: config.timeouts,
            metrics,
        }
    }

    /// The names by which this node is asked for: its id, and the host names and addresses that a gateway has granted.
    /// Granted networks are no names.
    pub(crate) fn own_names(&self, granted: &[String]) -> Arc<[Host]> {
        let node = self.node.as_ref().map(NodeId::as_str);
        node.into_iter()
            .chain(granted.iter().map(String::as_str))
            .filter_map(|name| name.parse().ok())
            .collect()
    }

    pub(crate) fn network(&self) -> &N {
        &self.network
    }

    /// From the text of a target to a connection and its address.
    async fn reach(&self, open: &Wanted, own_names: &[Host]) -> Result<(N::Conn, String), Refusal> {
        let malformed = |error: &dyn std::fmt::Display| Refusal(RefusalCode::Malformed, error.to_string());
        let target: Target = open.target.parse().map_err(|error| malformed(&error))?;
        let permit = self
            .policy
            .permit(&target, own_names)
            .map_err(|denied| Refusal(RefusalCode::NotAllowed, format!("{}: {denied}", self.edge)))?;
        let limit = open.patience.map_or(self.timeout, |patience| patience.min(self.timeout));
        let connection = dial(&self.network, &permit, limit, &self.metrics).await.map_err(|error| {
            let (code, text) = dial::refusal(&self.edge, permit.destination(), &error);
            Refusal(code, text)
        })?;
        let address = self.network.peer_address(&connection);
        Ok((
            connection,
            address.map_or_else(|| permit.destination().to_string(), |address| address.to_string()),
        ))
    }
}

/// Why the opener gets no connection.
struct Refusal(RefusalCode, String);

/// What the opener wants, in texts that a log can take.
struct Wanted {
    target: String,
    request_id: String,
    caller: String,
    /// How long the opener will wait, if it says so.
    patience: Option<Duration>,
}

impl Wanted {
    fn new(open: &Open) -> Self {
        Self {
            target: clean_text(&open.target),
            request_id: clean_text(&open.request_id),
            caller: clean_text(&open.caller),
            patience: (open.timeout_ms != 0).then(|| Duration::from_millis(open.timeout_ms.into())),
        }
    }
}

/// Serves one stream until it has ended. `stop` aborts it, as drained. If `draining`, it is refused.
pub(crate) async fn serve<N: Network>(
    dialing: &Dialing<N>,
    own_names: &[Host],
    incoming: Incoming,
    stop: &CancellationToken,
    draining: bool,
) {
    let mut pending = match incoming.header(Instant::now() + HEADER_TIMEOUT).await {
        Ok(pending) => pending,
        Err(error) => {
            debug!(%error, "a stream began without a usable header");
            return dialing.metrics.stream_refused(RefusalCode::Malformed);
        }
    };
    let wanted = Wanted::new(pending.open());
    if draining {
        let text = format!("{} is shutting down and takes no new streams", dialing.edge);
        return refuse(dialing, &wanted, pending, Refusal(RefusalCode::Draining, text)).await;
    }
    // An opener that has gone is seen first: what has been connected for nobody is dropped, and so is the attempt.
    let reached = tokio::select! {
        biased;
        reason = pending.cancelled() => {
            return debug!(request_id = wanted.request_id, target = wanted.target, %reason, "given up before it was connected");
        }
        () = stop.cancelled() => {
            let text = format!("{} is shutting down and did not reach the target in time", dialing.edge);
            Err(Refusal(RefusalCode::Draining, text))
        }
        reached = dialing.reach(&wanted, own_names) => reached,
    };
    match reached {
        Ok((connection, address)) => join(dialing, &wanted, pending, connection, address, stop).await,
        Err(refusal) => refuse(dialing, &wanted, pending, refusal).await,
    }
}

async fn refuse<N: Network>(dialing: &Dialing<N>, wanted: &Wanted, pending: PendingStream, refusal: Refusal) {
    let Refusal(code, text) = refusal;
    dialing.metrics.stream_refused(code);
    if dialing.metrics.lines.admit(refusal_label(code), &wanted.caller) {
        info!(
            request_id = wanted.request_id,
            target = wanted.target,
            caller = wanted.caller,
            cause = text,
            "stream refused"
        );
    }
    if let Err(error) = pending.refuse(code, &text).await {
        debug!(request_id = wanted.request_id, %error, "the refusal did not reach the opener");
    }
}

/// Tells the opener that its target is connected, and relays until the end.
async fn join<N: Network>(
    dialing: &Dialing<N>,
    wanted: &Wanted,
    pending: PendingStream,
    mut connection: N::Conn,
    address: String,
    stop: &CancellationToken,
) {
    let Wanted { request_id, target, caller, .. } = wanted;
    let stream = match pending.accept(address.clone()).await {
        Ok(stream) => stream,
        Err(error) => {
            connection.abort(&Aborted::new(AbortCode::Cancelled, "the opener has gone"));
            return debug!(request_id, target, %error, "given up just when it was connected");
        }
    };
    debug!(request_id, target, address, caller, "stream opened");
    dialing.metrics.streams_opened.inc();
    let active = Active::new(&dialing.metrics);
    let begun = Instant::now();
    let stopped = async {
        stop.cancelled().await;
        Aborted::new(AbortCode::Drained, "the drain deadline of the edge has passed")
    };
    let relayed = relay(stream, connection, dialing.timeouts, stopped).await;
    drop(active);
    let (how, reason) = ending(&relayed);
    dialing.metrics.stream_ended(&relayed, how);
    let Relayed { forward, backward, .. } = relayed;
    let ms = begun.elapsed().as_millis();
    info!(
        request_id,
        target,
        address,
        caller,
        to_target = forward,
        from_target = backward,
        ms,
        end = how,
        reason,
        "stream ended"
    );
}

/// How a stream ended: a label for metrics, and the reason if it was not clean.
fn ending(relayed: &Relayed) -> (&'static str, Option<String>) {
    let how = match &relayed.end {
        RelayEnd::Clean => "clean",
        RelayEnd::FirstFailed(reason) if reason.code == AbortCode::LinkLost => "link_lost",
        RelayEnd::FirstFailed(_) => "aborted_by_gateway",
        RelayEnd::SecondFailed(_) => "aborted_by_target",
        RelayEnd::Stopped(_) => "drained",
        RelayEnd::TimedOut(_) => "timed_out",
    };
    (how, relayed.end.reason().map(ToString::to_string))
}

/// Counts an active stream; also when its task is dropped.
struct Active<'a>(&'a Metrics);

impl<'a> Active<'a> {
    fn new(metrics: &'a Metrics) -> Self {
        metrics.streams_active.inc();
        Self(metrics)
    }
}

impl Drop for Active<'_> {
    fn drop(&mut self) {
        self.0.streams_active.dec();
    }
}
