//! From a permit to a connection, and from a failure to the words that the caller will read. Called by `stream`.

use std::time::Duration;

use tokio::time::{Instant, timeout};
use tunnel_core::{Target, proto::messages::RefusalCode};

use crate::{
    metrics::Metrics,
    network::{DialError, Network},
    policy::Permit,
};

/// Connects what the permit allows, within `limit`. Without a permit there is no way here.
///
/// Cancel-safe: dropping the future drops the attempts.
pub(crate) async fn dial<N: Network>(
    network: &N,
    permit: &Permit,
    limit: Duration,
    metrics: &Metrics,
) -> Result<N::Conn, DialError> {
    let Target { host, port } = permit.destination();
    let begun = Instant::now();
    let connected =
        timeout(limit, network.connect(host, *port)).await.unwrap_or(Err(DialError::TimedOut(limit)));
    metrics.dialled(begun.elapsed());
    connected
}

/// What the gateway, and through it the caller, is told about a target that could not be connected.
pub(crate) fn refusal(edge: &str, target: &Target, error: &DialError) -> (RefusalCode, String) {
    let code = match error {
        DialError::Refused => RefusalCode::ConnectionRefused,
        DialError::Unreachable(_) | DialError::Other(_) => RefusalCode::Unreachable,
        DialError::NameNotResolved(_) => RefusalCode::NameNotResolved,
        DialError::TimedOut(_) => RefusalCode::DialTimeout,
    };
    (code, format!("{edge} could not reach {target}: {error}"))
}
