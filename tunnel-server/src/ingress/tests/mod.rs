//! The ingress as its clients see it, with a real link behind it whose edge is the test.

mod budgets;
mod http1;
mod http2;
mod life;

use std::{collections::BTreeSet, net::SocketAddr, sync::Arc, time::Duration};

use tokio::{io::DuplexStream, task::JoinHandle};
use tokio_util::sync::CancellationToken;
use tunnel_core::{InstanceId, LinkConfig, Timeouts, proto::messages::RefusalCode};

use super::{Caller, Ingress, IngressSettings, is_sane_id, is_traceparent};
use crate::{
    directory::{Directory, Memory},
    edges::registry::{LinkLimits, Registration, Registry},
    grants::{Grants, SharedGrants},
    listener::PeerAddr,
    route::{Router, StreamLimits},
    testing::{TestLeg, TestLink, metrics, node},
};

const DIAL_TIMEOUT: Duration = Duration::from_secs(10);
const MAX_STREAMS: usize = 400;
const HEADER_TIMEOUT: Duration = Duration::from_secs(5);
const MAX_HEADER: usize = 4096;

/// An ingress, and a link to `edge-a` behind it.
struct Site {
    ingress: Arc<Ingress>,
    registry: Arc<Registry>,
    edge: TestLink,
    stays: Option<Registration>,
    draining: CancellationToken,
    stopping: CancellationToken,
}

impl Site {
    async fn up() -> Self {
        Self::with(|_| {}, &[], LinkConfig::default()).await
    }

    async fn with(
        change: impl FnOnce(&mut IngressSettings),
        grants: &[(&str, &str)],
        link: LinkConfig,
    ) -> Self {
        let mut settings = IngressSettings {
            gateway_id: "gw-1".parse().unwrap(),
            allowed_clients: BTreeSet::new(),
            handshake_timeout: HEADER_TIMEOUT,
            header_timeout: HEADER_TIMEOUT,
            max_header_size: MAX_HEADER,
            max_streams: 10,
            timeouts: Timeouts::of("the gateway"),
            request_seed: 7,
        };
        change(&mut settings);
        let grants: Grants = grants.iter().map(|(name, what)| (node(name), what.parse().unwrap())).collect();
        let limits = StreamLimits { total: MAX_STREAMS, per_caller: None };
        let registry = Registry::new(LinkLimits { total: 4, per_node: 4 }, metrics());
        let (grants, alone) = (SharedGrants::new(grants), (Arc::new(Memory) as Arc<dyn Directory>, None));
        let router = Router::new(registry.clone(), grants, alone, DIAL_TIMEOUT, limits, metrics());
        let (draining, stopping) = (CancellationToken::new(), CancellationToken::new());
        let ingress = Ingress::new(settings, router, metrics(), draining.clone(), stopping.clone());
        let edge = TestLink::with(link).await;
        let mut site = Self { ingress, registry, edge, stays: None, draining, stopping };
        site.stays = Some(site.register(&site.edge, 1));
        site
    }

    fn register(&self, link: &TestLink, instance: u128) -> Registration {
        self.register_as("edge-a", link, instance)
    }

    fn register_as(&self, name: &str, link: &TestLink, instance: u128) -> Registration {
        let place = self.registry.place(&node(name)).unwrap();
        // A higher number is a newer process here.
        let generation = u64::try_from(instance).unwrap();
        self.registry.register(place, InstanceId::from_random(instance), generation, link.gateway.clone())
    }

    /// A client's connection, and the task that serves it.
    fn client(&self) -> (DuplexStream, JoinHandle<()>) {
        let (near, far) = TestLeg::pair();
        let peer = PeerAddr::Ip(SocketAddr::from(([10, 0, 0, 9], 40_000)));
        (far, tokio::spawn(self.ingress.clone().serve_plain(near, peer)))
    }

    /// The edge refuses the next stream.
    async fn edge_refuses(&mut self, code: RefusalCode, text: &str) {
        self.edge.pending().await.refuse(code, text).await.unwrap();
    }
}

#[test]
fn callers_are_counted_by_name_or_address_and_unix_clients_as_one() {
    let process = |uid, pid| PeerAddr::Unix { uid, pid }.to_string();
    for (caller, counted) in [
        ("kube-apiserver", "kube-apiserver"),
        ("spiffe://example/prometheus:9", "spiffe://example/prometheus:9"),
        ("10.0.0.9:40000", "10.0.0.9"),
        ("[fd00::9]:40000", "[fd00::9]"),
        (&process(0, Some(7)), "unix"),
        (&process(1000, None), "unix"),
    ] {
        assert_eq!(Caller::told_by_peer(caller).counted_as(), counted);
    }
}

#[test]
fn only_harmless_request_ids_are_taken_over() {
    assert!(is_sane_id("4bf92f35-77b3:4da6_a3/c="));
    for id in ["", "with space", "new\nline", "ünicode", &"x".repeat(129)] {
        assert!(!is_sane_id(id), "{id:?}");
    }
}

#[test]
fn only_well_formed_trace_contexts_are_passed_on() {
    let (trace, parent) = ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7");
    assert!(is_traceparent(&format!("00-{trace}-{parent}-01")));
    assert!(is_traceparent(&format!("01-{trace}-{parent}-01-and-more")));
    for text in [
        String::new(),
        format!("ff-{trace}-{parent}-01"),
        format!("00-{trace}-{parent}-01-more"),
        format!("00-{trace}-{parent}"),
        format!("00-{}-{parent}-01", "0".repeat(32)),
        format!("00-{trace}-{}-01", "0".repeat(16)),
        format!("00-{}-{parent}-01", trace.to_uppercase()),
        format!("01-{trace}-{parent}-01-ü"),
    ] {
        assert!(!is_traceparent(&text), "{text:?}");
    }
}
