//! Every metric of a gateway, in one struct, so that one look shows what is measured. Fed by the doors, the registry
//! and the ingress; encoded by the admin endpoint. All label values come from fixed lists: no node name, no address
//! and nothing that a far side says becomes a label.

use std::{fmt, sync::Arc, time::Duration};

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeLabelSet, EncodeMetric},
    metrics::{
        MetricType,
        counter::Counter,
        family::Family,
        gauge::{ConstGauge, Gauge},
        histogram::Histogram,
    },
    registry::{Registry, Unit},
};
use tunnel_core::{RelayEnd, Relayed, proto::yamux::WindowPool, tls::Domain};
use tunnel_edge::daemon::log::limit::Limits;

/// Upper bounds of the connect histogram's buckets, in seconds: from a node next door to a dial time-out.
const CONNECT_BUCKETS: [f64; 10] = [0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0];
/// Upper bounds of the round-trip histogram's buckets, in seconds: from one site to a satellite and back.
const RTT_BUCKETS: [f64; 10] = [0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 0.8, 2.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cause {
    cause: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Handshake {
    domain: &'static str,
    cause: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Side {
    domain: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reply {
    protocol: &'static str,
    status: u16,
    cause: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Direction {
    direction: &'static str,
}

/// What is left for windows to grow, asked for when it is told.
#[derive(Debug)]
struct WindowsLeft(Arc<WindowPool>);

impl Collector for WindowsLeft {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let left = ConstGauge::new(i64::try_from(self.0.left()).unwrap_or(i64::MAX));
        let help = "Memory by which receive windows may still grow (link.receive_window_total)";
        let unit = Some(&Unit::Bytes);
        left.encode(encoder.encode_descriptor("receive_windows_left", help, unit, MetricType::Gauge)?)
    }
}

/// What a gateway counts. Cheap to clone; clones count together.
#[derive(Clone, Debug)]
pub(crate) struct Metrics {
    /// Links that are up.
    pub(crate) links: Gauge,
    /// Nodes with links of more than one edge process.
    pub(crate) nodes_with_several_links: Gauge,
    /// Links that came up since the start.
    pub(crate) links_opened: Counter,
    /// Streams that are being relayed.
    pub(crate) streams_active: Gauge,
    /// 1 while the cluster's nodes are watched.
    pub(crate) cluster_in_sync: Gauge,
    /// Nodes of the cluster.
    pub(crate) cluster_nodes: Gauge,
    /// Connections of the control plane.
    pub(crate) ingress_connections: Gauge,
    /// Links to other gateways.
    pub(crate) peer_links: Gauge,
    /// Tasks that panicked, each alone.
    pub(crate) panics: Counter,
    /// Which lines about strangers are logged.
    pub(crate) lines: Limits,
    /// Streams of peers that are being handed on.
    pub(crate) forwarded_active: Gauge,
    forwarded: Family<Cause, Counter>,
    handed_to_peers: Family<Cause, Counter>,
    links_closed: Family<Cause, Counter>,
    connections_waiting: Family<Side, Gauge>,
    handshakes_failed: Family<Handshake, Counter>,
    rejects: Family<Code, Counter>,
    requests: Family<Reply, Counter>,
    streams_ended: Family<Cause, Counter>,
    bytes: Family<Direction, Counter>,
    connect_seconds: Histogram,
    link_rtt: Histogram,
}

impl Metrics {
    /// Registers every metric in `registry`, under names that begin with `tunnel_server_`.
    pub(crate) fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            links: Gauge::default(),
            nodes_with_several_links: Gauge::default(),
            links_opened: Counter::default(),
            streams_active: Gauge::default(),
            cluster_in_sync: Gauge::default(),
            cluster_nodes: Gauge::default(),
            ingress_connections: Gauge::default(),
            peer_links: Gauge::default(),
            panics: Counter::default(),
            lines: Limits::default(),
            forwarded_active: Gauge::default(),
            forwarded: Family::default(),
            handed_to_peers: Family::default(),
            links_closed: Family::default(),
            connections_waiting: Family::default(),
            handshakes_failed: Family::default(),
            rejects: Family::default(),
            requests: Family::default(),
            streams_ended: Family::default(),
            bytes: Family::default(),
            connect_seconds: Histogram::new(CONNECT_BUCKETS),
            link_rtt: Histogram::new(RTT_BUCKETS),
        };
        metrics.lines.register(registry.sub_registry_with_prefix("tunnel_server"));
        metrics.register_links(registry.sub_registry_with_prefix("tunnel_server"));
        metrics.register_cluster(registry.sub_registry_with_prefix("tunnel_server"));
        metrics.register_peers(registry.sub_registry_with_prefix("tunnel_server"));
        metrics.register_requests(registry.sub_registry_with_prefix("tunnel_server"));
        metrics
    }

    /// Registers what is left of `pool`.
    pub(crate) fn watch_windows(pool: Arc<WindowPool>, registry: &mut Registry) {
        let server = registry.sub_registry_with_prefix("tunnel_server");
        server.register_collector(Box::new(WindowsLeft(pool)));
    }

    fn register_links(&self, server: &mut Registry) {
        server.register("links", "Links that are up", self.links.clone());
        server.register(
            "nodes_with_several_links",
            "Nodes with links of more than one edge process",
            self.nodes_with_several_links.clone(),
        );
        server.register(
            "panics",
            "Connections and streams that a panic has ended, which is a defect",
            self.panics.clone(),
        );
        server.register("links_opened", "Links that came up", self.links_opened.clone());
        server.register("links_closed", "Links that ended, by cause", self.links_closed.clone());
        server.register(
            "connections_waiting",
            "Connections that have not shown yet who they are, by trust domain",
            self.connections_waiting.clone(),
        );
        server.register(
            "handshakes_failed",
            "Connections that got no further than their handshake, by trust domain and cause",
            self.handshakes_failed.clone(),
        );
        server.register(
            "rejects",
            "Edges that were rejected after their hello, by code",
            self.rejects.clone(),
        );
        server.register_with_unit(
            "link_rtt",
            "Round-trip times of the links' heartbeats",
            Unit::Seconds,
            self.link_rtt.clone(),
        );
    }

    fn register_cluster(&self, server: &mut Registry) {
        server.register(
            "cluster_in_sync",
            "1 while the nodes are watched through the API server, 0 while they cannot be or need not be",
            self.cluster_in_sync.clone(),
        );
        server.register("cluster_nodes", "Nodes that were read from the cluster", self.cluster_nodes.clone());
    }

    fn register_peers(&self, server: &mut Registry) {
        server.register("peer_links", "Links to other gateways that are up", self.peer_links.clone());
        server.register(
            "handed_to_peers",
            "Requests for nodes linked to other gateways, by what came of them; stale: the gateway had no such link",
            self.handed_to_peers.clone(),
        );
        server.register(
            "forwarded",
            "Streams from other gateways for nodes linked here, by what came of them",
            self.forwarded.clone(),
        );
        server.register(
            "forwarded_active",
            "Streams from other gateways that are being relayed",
            self.forwarded_active.clone(),
        );
    }

    fn register_requests(&self, server: &mut Registry) {
        server.register(
            "ingress_connections",
            "Connections of the control plane",
            self.ingress_connections.clone(),
        );
        server.register(
            "requests",
            "Requests answered, by protocol, status and cause",
            self.requests.clone(),
        );
        server.register("streams_active", "Streams that are being relayed", self.streams_active.clone());
        server.register("streams_ended", "Streams that have ended, by how", self.streams_ended.clone());
        server.register_with_unit(
            "stream",
            "Bytes of ended streams, by direction",
            Unit::Bytes,
            self.bytes.clone(),
        );
        server.register_with_unit(
            "connect",
            "Time from a request to its connected target, failures included",
            Unit::Seconds,
            self.connect_seconds.clone(),
        );
    }

    pub(crate) fn handshake_failed(&self, domain: Domain, cause: &'static str) {
        self.handshakes_failed.get_or_create(&Handshake { domain: label(domain), cause }).inc();
    }

    /// How many connections of a domain have not shown yet who they are.
    pub(crate) fn waiting(&self, domain: Domain) -> Gauge {
        self.connections_waiting.get_or_create(&Side { domain: label(domain) }).clone()
    }

    /// How many of them had to go for others.
    pub(crate) fn displaced(&self, domain: Domain) -> Counter {
        let failure = Handshake { domain: label(domain), cause: "displaced" };
        self.handshakes_failed.get_or_create(&failure).clone()
    }

    pub(crate) fn forwarded(&self, cause: &'static str) {
        self.forwarded.get_or_create(&Cause { cause }).inc();
    }

    pub(crate) fn handed_to_peer(&self, cause: &'static str) {
        self.handed_to_peers.get_or_create(&Cause { cause }).inc();
    }

    pub(crate) fn rejected(&self, code: &'static str) {
        self.rejects.get_or_create(&Code { code }).inc();
    }

    pub(crate) fn link_closed(&self, cause: &'static str) {
        self.links_closed.get_or_create(&Cause { cause }).inc();
    }

    pub(crate) fn round_trip(&self, took: Duration) {
        self.link_rtt.observe(took.as_secs_f64());
    }

    pub(crate) fn connected(&self, took: Duration) {
        self.connect_seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn replied(&self, protocol: &'static str, status: u16, cause: &'static str) {
        self.requests.get_or_create(&Reply { protocol, status, cause }).inc();
    }

    pub(crate) fn stream_ended(&self, relayed: &Relayed) {
        let cause = match relayed.end {
            RelayEnd::Clean => "clean",
            RelayEnd::FirstFailed(_) => "client_failed",
            RelayEnd::SecondFailed(_) => "target_failed",
            RelayEnd::Stopped(_) => "stopped",
            RelayEnd::TimedOut(_) => "timed_out",
        };
        self.streams_ended.get_or_create(&Cause { cause }).inc();
        self.bytes.get_or_create(&Direction { direction: "to_target" }).inc_by(relayed.forward);
        self.bytes.get_or_create(&Direction { direction: "from_target" }).inc_by(relayed.backward);
    }
}

fn label(domain: Domain) -> &'static str {
    match domain {
        Domain::Edge => "edge",
        Domain::ControlPlane => "control_plane",
        Domain::Peer => "peer",
    }
}

/// Counts one thing for as long as it is held.
#[derive(Debug)]
pub(crate) struct Counted(Gauge);

impl Counted {
    pub(crate) fn new(gauge: &Gauge) -> Self {
        gauge.inc();
        Self(gauge.clone())
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        self.0.dec();
    }
}
