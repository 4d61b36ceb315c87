//! The process: wires credentials and metrics to an [`Agent`], within the frame that both programs have. Called by `main`
//! only.

use std::{net::SocketAddr, process::ExitCode};

use prometheus_client::registry::Registry;
use tokio::runtime;
use tracing::{info, warn};
use tunnel_core::NodeId;

use crate::{
    agent::Agent,
    config::Config,
    daemon::{
        descriptors,
        process::{self, AdminError, Frame, FrameError, Process},
        tasks::Failure,
    },
    metrics::Metrics,
    network::SystemNetwork,
    status::AgentStatus,
};

/// Why an edge cannot run.
#[derive(Debug, thiserror::Error)]
enum RunError {
    #[error("{0}")]
    Credentials(String),
    #[error(transparent)]
    Admin(#[from] AdminError),
}

/// Runs an edge until SIGTERM or SIGINT, then drains; a second signal ends it at once, which is a failure.
///
/// Blocks. Once there is a log, what goes wrong is in the log, and the exit code says that something did.
pub fn run(config: Config) -> Result<ExitCode, FrameError> {
    let frame = Frame { metrics: "tunnel_edge", log: config.log.clone(), drain: config.drain_timeout };
    let mut runtime = runtime::Builder::new_current_thread();
    process::run(&frame, &mut runtime, async |process| serve(config, process).await)
}

async fn serve(mut config: Config, process: &mut Process<'_>) -> Result<Result<(), Failure>, RunError> {
    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let status = AgentStatus::new();
    let (ready, panics) = (status.clone(), metrics.panics.clone());
    let admin = process.serve_admin(config.admin, registry, panics, move || ready.ready())?;
    let files = [&config.tls.cert, &config.tls.key, &config.tls.ca].map(Clone::clone);
    let load = || config.load_credentials().map_err(RunError::Credentials);
    let Some((tls, node)) = process.credentials(&files, load).await? else { return Ok(Ok(())) };
    config.node = Some(node.clone());
    announce(&config, &node, admin);
    if let Some(shortage) = descriptors::shortage(descriptors::raise(), &config.descriptors()) {
        warn!("{shortage}");
    }
    let agent = Agent::new(config, tls, SystemNetwork, rand::random(), metrics).with_status(status);
    process.works();
    Ok(agent.run(process.drain.clone()).await)
}

/// What a person wants to know first, in the first line of the log.
fn announce(config: &Config, node: &NodeId, admin: Option<SocketAddr>) {
    let list = |items: &mut dyn Iterator<Item = String>| items.collect::<Vec<_>>().join(", ");
    let version = env!("CARGO_PKG_VERSION");
    let gateways = list(&mut config.gateways.iter().map(ToString::to_string));
    let allow = list(&mut config.policy.rules().iter().map(ToString::to_string));
    let admin = admin.map(|address| format!("http://{address}"));
    info!(version, %node, gateways, allow, proxy = %config.proxy, admin, "tunnel-edge starts");
}
