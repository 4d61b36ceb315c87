//! Every metric of an edge, in one struct, so that one look shows what is measured. Fed by `agent`, `cluster`, `credentials` and
//! `stream`, encoded by the admin endpoint. All label values come from fixed lists: nothing a far side says becomes a label.

use std::{sync::atomic::AtomicU64, time::Duration};

use prometheus_client::{
    encoding::EncodeLabelSet,
    metrics::{counter::Counter, family::Family, gauge::Gauge, histogram::Histogram},
    registry::{Registry, Unit},
};
use tunnel_core::{Relayed, proto::messages::RefusalCode};

use crate::daemon::log::limit::Limits;

/// Upper bounds of the dial histogram's buckets, in seconds: a kubelet on loopback to a dial time-out.
const DIAL_BUCKETS: [f64; 10] = [0.000_5, 0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 5.0, 10.0];

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Cause {
    cause: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Code {
    code: &'static str,
}

#[derive(Clone, Debug, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Direction {
    direction: &'static str,
}

/// What an edge counts. Cheap to clone; clones count together.
#[derive(Clone, Debug)]
pub struct Metrics {
    /// Links that are up, those that drain among them.
    pub(crate) links: Gauge,
    /// Links that this edge should hold: to as many gateways as `redundancy` says, or to all.
    pub(crate) links_wanted: Gauge,
    /// Gateways that a link is up to and that do not drain.
    pub(crate) gateways_linked: Gauge,
    /// Gateways that this edge knows of.
    pub(crate) gateways_known: Gauge,
    /// Links that were moved to a gateway that suits this edge better.
    pub(crate) links_moved: Counter,
    /// Smoothed round-trip time of the newest link's heartbeats.
    pub(crate) rtt: Gauge<f64, AtomicU64>,
    /// Streams that are being relayed.
    pub(crate) streams_active: Gauge,
    /// Streams whose target was connected.
    pub(crate) streams_opened: Counter,
    /// When the certificate that is in use expires, as Unix time.
    pub(crate) certificate_expiry: Gauge,
    /// Tasks that panicked, each alone.
    pub(crate) panics: Counter,
    /// Which lines about refused streams are logged.
    pub(crate) lines: Limits,
    connect_failures: Family<Cause, Counter>,
    links_lost: Family<Cause, Counter>,
    streams_refused: Family<Code, Counter>,
    streams_ended: Family<Cause, Counter>,
    bytes: Family<Direction, Counter>,
    dial_seconds: Histogram,
}

impl Metrics {
    /// Registers every metric in `registry`, under names that begin with `tunnel_edge_`.
    pub fn new(registry: &mut Registry) -> Self {
        let metrics = Self {
            links: Gauge::default(),
            links_wanted: Gauge::default(),
            gateways_linked: Gauge::default(),
            gateways_known: Gauge::default(),
            links_moved: Counter::default(),
            rtt: Gauge::default(),
            streams_active: Gauge::default(),
            streams_opened: Counter::default(),
            certificate_expiry: Gauge::default(),
            panics: Counter::default(),
            lines: Limits::default(),
            connect_failures: Family::default(),
            links_lost: Family::default(),
            streams_refused: Family::default(),
            streams_ended: Family::default(),
            bytes: Family::default(),
            dial_seconds: Histogram::new(DIAL_BUCKETS),
        };
        let edge = registry.sub_registry_with_prefix("tunnel_edge");
        edge.register("links", "Links that are up, draining ones included", metrics.links.clone());
        edge.register("links_wanted", "Links that this edge should hold", metrics.links_wanted.clone());
        edge.register(
            "gateways_linked",
            "Gateways that a link is up to and that do not drain",
            metrics.gateways_linked.clone(),
        );
        edge.register(
            "gateways_known",
            "Gateways of the cluster, as the gateways say",
            metrics.gateways_known.clone(),
        );
        edge.register(
            "links_moved",
            "Links that were moved to a gateway that suits this edge better",
            metrics.links_moved.clone(),
        );
        edge.register_with_unit(
            "rtt",
            "Smoothed round-trip time to the gateway of the newest link",
            Unit::Seconds,
            metrics.rtt.clone(),
        );
        edge.register_with_unit(
            "certificate_expiry_timestamp",
            "When the client certificate that is loaded expires, as Unix time",
            Unit::Seconds,
            metrics.certificate_expiry.clone(),
        );
        edge.register(
            "connect_failures",
            "Attempts to get a link that failed, by cause",
            metrics.connect_failures.clone(),
        );
        metrics.lines.register(edge);
        edge.register(
            "panics",
            "Links and streams that a panic has ended, which is a defect",
            metrics.panics.clone(),
        );
        edge.register("links_lost", "Links that were up and ended, by cause", metrics.links_lost.clone());
        edge.register("streams_active", "Streams that are being relayed", metrics.streams_active.clone());
        edge.register("streams_opened", "Streams whose target was connected", metrics.streams_opened.clone());
        edge.register(
            "streams_refused",
            "Streams that were refused, by code",
            metrics.streams_refused.clone(),
        );
        edge.register(
            "streams_ended",
            "Opened streams that have ended, by how",
            metrics.streams_ended.clone(),
        );
        edge.register_with_unit(
            "stream",
            "Bytes of ended streams, by direction",
            Unit::Bytes,
            metrics.bytes.clone(),
        );
        edge.register_with_unit(
            "dial",
            "Time to connect a target, failures included",
            Unit::Seconds,
            metrics.dial_seconds.clone(),
        );
        metrics
    }

    pub(crate) fn connect_failed(&self, cause: &'static str) {
        self.connect_failures.get_or_create(&Cause { cause }).inc();
    }

    pub(crate) fn link_lost(&self, cause: &'static str) {
        self.links_lost.get_or_create(&Cause { cause }).inc();
    }

    pub(crate) fn dialled(&self, took: Duration) {
        self.dial_seconds.observe(took.as_secs_f64());
    }

    pub(crate) fn stream_refused(&self, code: RefusalCode) {
        self.streams_refused.get_or_create(&Code { code: refusal_label(code) }).inc();
    }

    pub(crate) fn stream_ended(&self, relayed: &Relayed, how: &'static str) {
        self.streams_ended.get_or_create(&Cause { cause: how }).inc();
        self.bytes.get_or_create(&Direction { direction: "to_target" }).inc_by(relayed.forward);
        self.bytes.get_or_create(&Direction { direction: "from_target" }).inc_by(relayed.backward);
    }
}

pub(crate) fn refusal_label(code: RefusalCode) -> &'static str {
    match code {
        RefusalCode::Unspecified => "unspecified",
        RefusalCode::Malformed => "malformed",
        RefusalCode::NotAllowed => "not_allowed",
        RefusalCode::ConnectionRefused => "connection_refused",
        RefusalCode::Unreachable => "unreachable",
        RefusalCode::NameNotResolved => "name_not_resolved",
        RefusalCode::DialTimeout => "dial_timeout",
        RefusalCode::Overloaded => "overloaded",
        RefusalCode::Draining => "draining",
        RefusalCode::Unsupported => "unsupported",
        RefusalCode::Internal => "internal",
        RefusalCode::NoSuchNode => "no_such_node",
        RefusalCode::LinkLost => "link_lost",
    }
}
