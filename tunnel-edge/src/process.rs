//! The process: wires credentials, metrics, admin endpoint and signals to an [`Agent`]. Called by `main` only.

use std::{io, net::SocketAddr, process::ExitCode};

use prometheus_client::registry::Registry;
use tokio::net::TcpListener;
use tokio_util::{sync::CancellationToken, task::AbortOnDropHandle};
use tracing::{info, warn};
use tunnel_core::{
    NodeId,
    tls::{ClientTls, Domain, TlsError},
};

use crate::{
    agent::Agent,
    config::Config,
    daemon::{
        admin, descriptors,
        log::{self, LogError},
        signal::Signals,
    },
    metrics::Metrics,
    network::SystemNetwork,
};

/// Why an edge does not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Logs cannot be set up.
    #[error(transparent)]
    Log(#[from] LogError),
    /// The runtime or the signals are not to be had.
    #[error("the process cannot be set up: {0}")]
    Setup(io::Error),
    /// The credentials cannot be used.
    #[error("tls: {0}")]
    Tls(#[from] TlsError),
    /// The credentials are not for this node.
    #[error("{0}")]
    Identity(String),
    /// The admin endpoint cannot listen.
    #[error("admin.listen: cannot listen on {address}: {error}")]
    Admin {
        /// Where it should.
        address: SocketAddr,
        /// Why not.
        error: io::Error,
    },
}

/// Runs an edge until SIGTERM or SIGINT, then drains; a second signal ends it at once, which is a failure.
///
/// Blocks. Every error is one of starting: once it runs, nothing but a signal ends it.
pub fn run(config: Config) -> Result<ExitCode, RunError> {
    log::init(&config.log)?;
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(RunError::Setup)?;
    runtime.block_on(serve(config))
}

async fn serve(mut config: Config) -> Result<ExitCode, RunError> {
    let (drain, stop) = (CancellationToken::new(), CancellationToken::new());
    let signals = Signals::install().map_err(RunError::Setup)?;
    let node = config.check_files().map_err(RunError::Identity)?;
    let tls = ClientTls::load(Domain::Edge, config.tls.clone())?;
    let listener = match config.admin {
        Some(address) => {
            let listener = TcpListener::bind(address).await;
            Some(listener.map_err(|error| RunError::Admin { address, error })?)
        }
        None => None,
    };
    config.node = Some(node.clone());
    announce(&config, &node, listener.as_ref());
    if let Some(shortage) = descriptors::shortage(descriptors::raise(), &config.descriptors()) {
        warn!("{shortage}");
    }

    let mut registry = Registry::default();
    let metrics = Metrics::new(&mut registry);
    let agent = Agent::new(config, tls, SystemNetwork, rand::random(), metrics);
    let status = agent.status();
    let admin_stop = CancellationToken::new();
    let admin = listener.map(|listener| {
        let ready = move || status.ready();
        AbortOnDropHandle::new(tokio::spawn(admin::serve(listener, ready, registry, admin_stop.clone())))
    });
    let _signals = AbortOnDropHandle::new(tokio::spawn(signals.run(drain.clone(), stop.clone())));
    let code = tokio::select! {
        // A second signal means now, whatever else is done.
        biased;
        () = stop.cancelled() => {
            warn!("stopped before the drain was complete; streams that still ran were cut");
            ExitCode::FAILURE
        }
        () = agent.run(drain) => ExitCode::SUCCESS,
    };
    // Probes are answered until the drain has ended.
    admin_stop.cancel();
    if let Some(admin) = admin {
        let _ = admin.await;
    }
    Ok(code)
}

/// What a person wants to know first, in the first line of the log.
fn announce(config: &Config, node: &NodeId, admin: Option<&TcpListener>) {
    let list = |items: &mut dyn Iterator<Item = String>| items.collect::<Vec<_>>().join(", ");
    let version = env!("CARGO_PKG_VERSION");
    let gateways = list(&mut config.gateways.iter().map(ToString::to_string));
    let allow = list(&mut config.policy.rules().iter().map(ToString::to_string));
    let admin =
        admin.and_then(|listener| listener.local_addr().ok()).map(|address| format!("http://{address}"));
    info!(version, %node, gateways, allow, proxy = %config.proxy, admin, "tunnel-edge starts");
}
