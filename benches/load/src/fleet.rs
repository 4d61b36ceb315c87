//! The edges: real agents, all in this process, each with its own certificate, backoff and policy. Called by the walk in
//! `main`.
//!
//! What an agent tells others is whether it is linked. Nothing is asked of the gateway, and nothing is added to what an
//! edge does: the agents' states are looked at every [`LOOK`], which is also how exact the times are.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use prometheus_client::registry::Registry;
use rustls::pki_types::ServerName;
use tokio::{task::JoinSet, time::interval};
use tokio_util::sync::CancellationToken;
use tunnel_core::{
    Host, NodeId, Target,
    tls::{ClientTls, Domain, TlsError},
};
use tunnel_edge::{
    Agent,
    config::Config,
    daemon::tasks::Failure,
    metrics::Metrics,
    network::SystemNetwork,
    policy::{Policy, Rule},
    status::AgentStatus,
};

use crate::{
    certificates::{Certificates, GATEWAY_NAME},
    cluster::home,
    report::Spread,
};

const LOOK: Duration = Duration::from_millis(20);
/// How often an edge looks whether its files have changed. They never do here, and to read so many would be this
/// process's own load.
const RELOAD_PERIOD: Duration = Duration::from_secs(24 * 3600);
/// Within what time an edge may move to a gateway that suits it better. None shall while the measurement lasts: an edge
/// that moves costs something, and which gateway has its link must be known.
const REBALANCE: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// Why the edges are not there.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FleetError {
    #[error("an edge's credentials cannot be used: {0}")]
    Tls(#[from] TlsError),
    #[error("after {} s, {missing} of {all} edges are not linked; one of them says: {cause}", after.as_secs())]
    Missing { after: Duration, missing: usize, all: usize, cause: String },
}

/// All edges.
pub(crate) struct Fleet {
    edges: Vec<AgentStatus>,
    gateways: usize,
    /// Ends with the fleet.
    agents: JoinSet<Result<(), Failure>>,
}

impl Fleet {
    /// Starts an edge for each node, all at once. Each dials the gateway where it is at [`home`], and for requests the port
    /// `target` of this machine.
    pub(crate) fn start(
        nodes: &[NodeId],
        certificates: &Certificates,
        gateways: &[SocketAddr],
        target: u16,
        seed: u64,
    ) -> Result<Self, FleetError> {
        let metrics = Metrics::new(&mut Registry::default());
        let mut agents = Vec::with_capacity(nodes.len());
        for ((edge, node), seed) in nodes.iter().enumerate().zip(seed..) {
            let tls = ClientTls::load(Domain::Edge, certificates.edge(node))?;
            let config = config(node, certificates, gateways, home(edge, gateways.len()), target);
            agents.push(Agent::new(config, tls, SystemNetwork, seed, metrics.clone()));
        }
        let edges = agents.iter().map(Agent::status).collect();
        let agents = agents.into_iter().map(|agent| agent.run(CancellationToken::new())).collect();
        Ok(Self { edges, gateways: gateways.len(), agents })
    }

    /// How long after `since` the edges have their first links.
    pub(crate) async fn first_links(&self, since: Instant, limit: Duration) -> Result<Spread, FleetError> {
        self.links(self.edges.iter(), since, limit, true).await
    }

    /// How long after `since`, when this gateway was lost, the edges that it had have links again.
    pub(crate) async fn links_again(
        &self,
        gateway: usize,
        since: Instant,
        limit: Duration,
    ) -> Result<Spread, FleetError> {
        let lost = self.edges.iter().enumerate().filter(|(edge, _)| home(*edge, self.gateways) == gateway);
        self.links(lost.map(|(_, edge)| edge), since, limit, false).await
    }

    /// An edge counts from when it was seen with a link after it was seen without.
    async fn links<'a>(
        &self,
        edges: impl Iterator<Item = &'a AgentStatus>,
        since: Instant,
        limit: Duration,
        without: bool,
    ) -> Result<Spread, FleetError> {
        let mut waiting: Vec<(&AgentStatus, bool)> = edges.map(|edge| (edge, without)).collect();
        let mut times = Vec::with_capacity(waiting.len());
        let mut look = interval(LOOK);
        while !waiting.is_empty() {
            look.tick().await;
            let after = since.elapsed();
            if after > limit {
                return self.missing(after);
            }
            waiting.retain_mut(|(edge, without)| {
                let linked = edge.ready().is_ok();
                let done = linked && *without;
                *without |= !linked;
                if done {
                    times.push(after);
                }
                !done
            });
        }
        Ok(Spread::of(times))
    }

    /// Whether all have links now.
    pub(crate) fn check(&self) -> Result<(), FleetError> {
        if self.edges.iter().all(|edge| edge.ready().is_ok()) { Ok(()) } else { self.missing(Duration::ZERO) }
    }

    fn missing<T>(&self, after: Duration) -> Result<T, FleetError> {
        let mut causes: Vec<String> = self.edges.iter().filter_map(|edge| edge.ready().err()).collect();
        let missing = causes.len();
        let cause = causes.pop().unwrap_or_else(|| "the gateway was never seen to be lost".to_owned());
        Err(FleetError::Missing { after, missing, all: self.edges.len(), cause })
    }

    /// Ends them, at once.
    pub(crate) async fn end(mut self) {
        self.agents.shutdown().await;
    }
}

fn config(
    node: &NodeId,
    certificates: &Certificates,
    gateways: &[SocketAddr],
    home: usize,
    target: u16,
) -> Config {
    let gateway = gateways[home];
    let configured = vec![Target { host: Host::Ip(gateway.ip()), port: gateway.port() }];
    let defaults = Config::new(node.clone(), configured, certificates.edge(node));
    Config {
        server_name: ServerName::try_from(GATEWAY_NAME).ok(),
        policy: Policy::new(vec![Rule::node_port(target)], gateway.ip()),
        reload_period: RELOAD_PERIOD,
        rebalance: REBALANCE,
        // With several, only one shall have the link, so that a request at another takes the hop.
        redundancy: if gateways.len() > 1 { 1 } else { defaults.redundancy },
        ..defaults
    }
}
