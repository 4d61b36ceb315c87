//! The agent: keeps this node linked to its gateways, for ever, by one `keeper` for each link that it may hold. It owns
//! what they share, and drains when it is told to. Called by [`crate::run`] and by tests.

use std::{sync::Arc, time::SystemTime};

use futures_util::future::{join, join_all};
use rand::{Rng, SeedableRng, rngs::SmallRng};
use tokio::{sync::watch, time::Instant};
use tokio_util::sync::CancellationToken;
use tracing::info;
use tunnel_core::{
    InstanceId,
    identity::{Validity, node_from_certificate},
    tls::ClientTls,
};

use crate::{
    cluster::{Cluster, SharedCluster},
    config::Config,
    credentials::Credentials,
    daemon::tasks::Failure,
    destinations::Destinations,
    generation::Generations,
    keeper::{Edge, Keeper},
    metrics::Metrics,
    network::Network,
    status::AgentStatus,
    stream::Dialing,
    uplink::{Proxies, Uplink},
};

/// Keeps a node linked. See the module's text.
#[derive(Debug)]
pub struct Agent<N: Network> {
    edge: Edge<N>,
    credentials: Credentials,
    /// How long the certificate in use holds; marked as changed when there is another.
    in_use: watch::Receiver<Option<Validity>>,
    rng: SmallRng,
}

impl<N: Network> Agent<N> {
    /// An agent that does nothing until it is run. All its random choices follow from `seed`.
    pub fn new(config: Config, tls: ClientTls, network: N, seed: u64, metrics: Metrics) -> Self {
        let node = config.node.clone().or_else(|| node_from_certificate(&tls.certificate()).ok());
        let mut rng = SmallRng::seed_from_u64(seed);
        let (credentials, in_use) = Credentials::new(&config, tls.clone(), node.clone(), metrics.clone());
        let instance = InstanceId::from_random(rng.random());
        let first = rng.random_range(0..config.gateways.len().max(1));
        let name = node.as_ref().map_or_else(|| instance.as_str().to_owned(), ToString::to_string);
        let cluster =
            Cluster::new(name, config.redundancy.max(1), config.rebalance, rng.random(), Instant::now());
        let edge = Edge {
            instance,
            generations: Generations::new(SystemTime::now),
            uplink: Uplink { tls, proxies: Proxies::new(&config.proxy), link: config.link.clone() },
            dialing: Arc::new(Dialing::new(&config, node.clone(), network, metrics.clone())),
            destinations: Destinations::new(&config, first).into(),
            cluster: SharedCluster::new(cluster, metrics.clone()),
            status: AgentStatus::new(),
            metrics,
            node,
            config,
        };
        Self { edge, credentials, in_use, rng }
    }

    /// With another clock than the system's, for simulations. It numbers this node's links, whose order must not change
    /// from one process to the next.
    #[must_use]
    pub fn with_clock(mut self, clock: impl Fn() -> SystemTime + Send + Sync + 'static) -> Self {
        self.edge.generations = Generations::new(clock);
        self
    }

    /// With a status that somebody reads already, and that says so far that there is no link.
    pub(crate) fn with_status(mut self, status: AgentStatus) -> Self {
        self.edge.status = status;
        self
    }

    /// Whether it is connected; stays true to the agent while it runs.
    pub fn status(&self) -> AgentStatus {
        self.edge.status.clone()
    }

    /// Keeps the node linked until `shutdown`, then drains: tells the gateways, lets running streams finish until the
    /// drain timeout, closes the links and returns. It does the same by itself, and says why, if a part of it fails that
    /// it cannot do without.
    ///
    /// Dropping the future ends every link at once.
    pub async fn run(mut self, shutdown: CancellationToken) -> Result<(), Failure> {
        // Its own, since it may have to leave by itself.
        let shutdown = shutdown.child_token();
        let vital = &self.edge.status.vital().clone();
        let seats = 0..self.edge.config.redundancy.max(1);
        let seeds: Vec<u64> = seats.clone().map(|_| self.rng.random()).collect();
        let keepers = seats.zip(seeds).map(|(seat, seed)| {
            let keeper = Keeper::new(&self.edge, seat, seed, self.in_use.clone(), shutdown.clone());
            vital.watch("keeper", &shutdown, keeper.run())
        });
        let announce = async {
            tokio::select! {
                // Why it leaves is said where it is known.
                biased;
                () = vital.failed() => shutdown.cancel(),
                () = shutdown.cancelled() => {}
            }
            info!(links = self.edge.status.links(), "draining: no new streams are taken");
        };
        let never = CancellationToken::new();
        let metrics = &self.edge.metrics;
        let background = async {
            join(
                vital.watch("credentials", &never, self.credentials.keep_fresh()),
                vital.watch("log limits", &never, metrics.lines.renew()),
            )
            .await;
            // The links drain now.
            std::future::pending::<()>().await;
        };
        tokio::select! {
            // The end of all links first: nobody looks at the files after that.
            biased;
            _ = join(announce, join_all(keepers)) => info!("drained"),
            () = background => {}
        }
        metrics.lines.sum_up();
        vital.check()
    }
}
