//! Which ways are taken, in which order, and what happens when one turns out to be wrong.

use tokio::{task::JoinHandle, time::timeout};
use tokio_util::sync::CancellationToken;
use tunnel_core::{
    InstanceId, LinkConfig, PendingStream,
    proto::messages::{Gateway, Holding, Holdings},
};

use super::*;
use crate::{
    directory::{Memory, peers::Peers},
    edges::registry::{LinkLimits, Registration},
    grants::Grants,
    peers::mesh::Own,
    testing::{TestLink, metrics, node},
};

const DIAL_TIMEOUT: Duration = Duration::from_secs(9);
const LIMITS: StreamLimits = StreamLimits { total: 16, per_caller: NonZeroUsize::new(3) };

fn gateway(name: &str) -> GatewayId {
    name.parse().unwrap()
}

/// A router, and whom it can ask.
struct Site {
    registry: Arc<Registry>,
    peers: Arc<Peers>,
    mesh: Arc<Mesh>,
    router: Router,
}

impl Site {
    fn new() -> Self {
        let registry = Registry::new(LinkLimits { total: 9, per_node: 4 }, metrics());
        let peers = Arc::new(Peers::default());
        let own = Own {
            gateway: gateway("gw-a"),
            instance: InstanceId::from_random(1),
            edge_address: None,
            leaving: CancellationToken::new(),
        };
        let mesh = Mesh::new(own, peers.clone(), LinkConfig::default(), DIAL_TIMEOUT, metrics());
        let others = (peers.clone() as Arc<dyn Directory>, Some(mesh.clone()));
        let grants = SharedGrants::new(Grants::default());
        let router = Router::new(registry.clone(), grants, others, DIAL_TIMEOUT, LIMITS, metrics());
        Self { registry, peers, mesh, router }
    }

    fn local(&self, link: &TestLink) -> Registration {
        let place = self.registry.place(&node("edge-a")).unwrap();
        self.registry.register(place, InstanceId::from_random(1), 1, link.gateway.clone())
    }

    /// A peer that says that it holds a link of this generation to `edge-a`.
    async fn peer(&self, name: &str, generation: u64) -> TestLink {
        let link = TestLink::up().await;
        let number = self.mesh.enter(&gateway(name), &link.gateway).unwrap();
        self.mesh.introduced(&gateway(name), number, Gateway::default());
        self.told(name, 0, generation);
        link
    }

    fn told(&self, name: &str, part: u64, generation: u64) {
        let holdings = vec![Holding { node: "edge-a".to_owned(), generation }];
        self.peers.peer_told(&gateway(name), Holdings { epoch: 1, part, more: false, holdings }).unwrap();
    }

    fn ways(&self) -> Vec<Option<String>> {
        let ways = self.router.ways(&node("edge-a")).unwrap();
        ways.iter().map(|way| way.gateway().map(ToString::to_string)).collect()
    }

    fn open(&self) -> JoinHandle<Result<Routed, RouteError>> {
        let router = self.router.clone();
        tokio::spawn(async move { router.open(&request()).await })
    }
}

fn request() -> Request {
    Request {
        target: "edge-a:22".parse().unwrap(),
        caller: Caller::told_by_peer("me"),
        id: "call-7".to_owned(),
        traceparent: String::new(),
        ingress: Ingress::HttpConnect,
    }
}

async fn soon<T>(what: impl Future<Output = T>) -> T {
    timeout(DIAL_TIMEOUT, what).await.unwrap()
}

async fn deny(pending: PendingStream) {
    assert_eq!(pending.open().node, "edge-a");
    pending.refuse(RefusalCode::NoSuchNode, "no").await.unwrap();
}

/// What came of a request that the peer at this link is asked now.
async fn routed_by(link: &mut TestLink, opening: JoinHandle<Result<Routed, RouteError>>) -> Routed {
    let _far = soon(link.pending()).await.accept("there".to_owned()).await.unwrap();
    soon(opening).await.unwrap().unwrap()
}

#[tokio::test(start_paused = true)]
async fn local_links_come_first_then_the_newest_and_those_that_leave_last() {
    let site = Site::new();
    let (_b, c) = (site.peer("gw-b", 5).await, site.peer("gw-c", 9).await);
    let name = |name: &str| Some(name.to_owned());
    assert_eq!(site.ways(), [name("gw-c"), name("gw-b")]);
    let local = TestLink::up().await;
    let _stays = site.local(&local);
    assert_eq!(site.ways(), [None, name("gw-c"), name("gw-b")]);
    let number = {
        c.edge.handle().close("again");
        soon(c.closed()).await;
        let again = TestLink::up().await;
        let number = site.mesh.enter(&gateway("gw-c"), &again.gateway).unwrap();
        site.told("gw-c", 0, 9);
        site.mesh.introduced(&gateway("gw-c"), number, Gateway { draining: true, ..Gateway::default() });
        assert_eq!(site.ways(), [None, name("gw-b"), name("gw-c")]);
        number
    };
    // What an earlier link to it brings late is not believed.
    site.mesh.introduced(&gateway("gw-c"), number - 1, Gateway::default());
    assert!(site.mesh.is_leaving(&gateway("gw-c")));
}

#[tokio::test(start_paused = true)]
async fn a_stale_entry_is_forgotten_and_the_next_gateway_asked() {
    let site = Site::new();
    let (mut b, mut c) = (site.peer("gw-b", 5).await, site.peer("gw-c", 9).await);
    let opening = site.open();
    deny(soon(c.pending()).await).await;
    let routed = routed_by(&mut b, opening).await;
    assert_eq!((routed.via, &*routed.address), (Some(gateway("gw-b")), "there"));
    assert_eq!(site.ways(), [Some("gw-b".to_owned())]);
}

#[tokio::test(start_paused = true)]
async fn a_node_that_moves_is_waited_for_until_its_new_gateway_is_known() {
    let site = Site::new();
    let mut c = site.peer("gw-c", 9).await;
    let opening = site.open();
    deny(soon(c.pending()).await).await;
    sleep(SETTLING / 2).await;
    assert!(!opening.is_finished());
    let mut b = site.peer("gw-b", 10).await;
    assert_eq!(routed_by(&mut b, opening).await.via, Some(gateway("gw-b")));

    // The same gateway, with a newer link.
    site.peers.peer_silent(&gateway("gw-b"));
    site.told("gw-c", 1, 11);
    let opening = site.open();
    deny(soon(c.pending()).await).await;
    site.told("gw-c", 2, 12);
    assert_eq!(routed_by(&mut c, opening).await.via, Some(gateway("gw-c")));
}

#[tokio::test(start_paused = true)]
async fn an_edge_that_leaves_this_gateway_is_waited_for_too() {
    let site = Site::new();
    let local = TestLink::up().await;
    let stays = site.local(&local);
    local.edge_drains().await;
    let opening = site.open();
    sleep(SETTLING / 4).await;
    drop(stays);
    sleep(SETTLING / 4).await;
    let mut b = site.peer("gw-b", 2).await;
    assert_eq!(routed_by(&mut b, opening).await.via, Some(gateway("gw-b")));
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_nowhere_is_not_waited_for_longer() {
    let site = Site::new();
    let mut c = site.peer("gw-c", 9).await;
    let (opening, begun) = (site.open(), Instant::now());
    deny(soon(c.pending()).await).await;
    let text = soon(opening).await.unwrap().unwrap_err().to_string();
    assert!(begun.elapsed() >= SETTLING && begun.elapsed() < SETTLING * 2, "{:?}", begun.elapsed());
    assert!(text.starts_with("node edge-a has no link to any gateway that is known here"), "{text}");
    assert!(text.contains("gateway gw-c, until 0s ago; look at the log of its edge"), "{text}");
    // Later it is not waited for at all, and still known.
    sleep(Duration::from_secs(40)).await;
    let begun = Instant::now();
    let text = site.router.open(&request()).await.unwrap_err().to_string();
    assert!(begun.elapsed().is_zero() && text.contains("gateway gw-c, until 40s ago"), "{text}");
    let unknown = Request { target: "edge-x:1".parse().unwrap(), ..request() };
    // Nobody has been heard yet, so it may be anywhere.
    let unsure = site.router.open(&unknown).await.unwrap_err().to_string();
    assert!(unsure.contains("have not told yet which nodes they hold"), "{unsure}");
    assert!(begun.elapsed().is_zero());
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_cannot_be_reached_is_named() {
    let site = Site::new();
    site.told("gw-d", 0, 3);
    let begun = Instant::now();
    let text = site.router.open(&request()).await.unwrap_err().to_string();
    assert!(
        text.starts_with("node edge-a is linked to gateway gw-d, which this gateway has no link to"),
        "{text}"
    );
    assert!(begun.elapsed().is_zero());
    // It can be, now, and is lost while it is asked; another one is found.
    let (mut b, c) = (site.peer("gw-b", 1).await, site.peer("gw-c", 2).await);
    let opening = site.open();
    sleep(Duration::from_millis(1)).await;
    c.edge.handle().close("lost");
    assert_eq!(routed_by(&mut b, opening).await.via, Some(gateway("gw-b")));
}

#[tokio::test(start_paused = true)]
async fn what_came_from_a_peer_goes_to_no_other() {
    let site = Site::new();
    let mut b = site.peer("gw-b", 5).await;
    let opened = site.router.open_here(&node("edge-a"), &request(), DIAL_TIMEOUT).await;
    assert!(matches!(opened, Err(RouteError::Offline { .. })), "{opened:?}");
    assert!(timeout(Duration::from_secs(1), b.pending()).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn a_stream_of_a_peer_waits_as_long_as_the_peer_does() {
    let site = Site::new();
    let link = TestLink::up().await;
    let _stays = site.local(&link);
    for (patience, waited) in
        [(Duration::from_secs(2), Duration::from_secs(2)), (DIAL_TIMEOUT * 9, DIAL_TIMEOUT)]
    {
        let begun = Instant::now();
        let opened = site.router.open_here(&node("edge-a"), &request(), patience).await;
        assert!(matches!(opened, Err(RouteError::TimedOut { .. })), "{opened:?}");
        assert_eq!(begun.elapsed(), waited);
    }
}

#[tokio::test(start_paused = true)]
async fn a_gateway_that_is_out_of_reach_is_not_said_to_be_without_the_node() {
    let site = Site::new();
    let b = site.peer("gw-b", 2).await;
    b.edge.handle().close("test");
    b.closed().await;
    site.peers.peer_silent(&gateway("gw-b"));
    let text = site.router.open(&request()).await.unwrap_err().to_string();
    assert!(
        text.starts_with("node edge-a was linked to gateway gw-b, to which this gateway lost its link"),
        "{text}"
    );
}

/// A stream to the local edge, and its far end.
async fn opened(
    site: &Site,
    link: &mut TestLink,
    request: Request,
) -> Result<(Routed, TunnelStream), RouteError> {
    let mut opening = std::pin::pin!(site.router.open(&request));
    let far = tokio::select! {
        biased;
        // What is refused does not come to the edge.
        opened = &mut opening => return Err(opened.unwrap_err()),
        pending = link.pending() => pending.accept("there".to_owned()).await.unwrap(),
    };
    Ok((opening.await?, far))
}

#[tokio::test(start_paused = true)]
async fn a_caller_that_has_all_it_may_leaves_the_node_to_others_and_to_its_kubelet() {
    let site = Site::new();
    let mut link = TestLink::up().await;
    let _stays = site.local(&link);
    let to = |target: &str| Request { target: target.parse().unwrap(), ..request() };
    let mut held = Vec::new();
    for _ in 0..3 {
        held.push(opened(&site, &mut link, to("edge-a:22")).await.unwrap());
    }
    let refused = opened(&site, &mut link, to("edge-a:22")).await.unwrap_err();
    assert_eq!(
        refused.to_string(),
        "me has as many streams to node edge-a as one caller may (3): close some, or raise \
         ingress.max_streams_per_caller"
    );
    // Whichever way its requests come.
    let here = site.router.open_here(&node("edge-a"), &to("edge-a:22"), DIAL_TIMEOUT).await;
    assert!(matches!(here, Err(RouteError::CallerFull { .. })), "{here:?}");
    held.push(opened(&site, &mut link, to("edge-a:10250")).await.unwrap());
    let other = Request { caller: Caller::told_by_peer("another"), ..to("edge-a:22") };
    held.push(opened(&site, &mut link, other).await.unwrap());
    // What was refused holds no place of the gateway either.
    assert_eq!(site.router.places.available_permits(), LIMITS.total - held.len());
    held.remove(0);
    held.push(opened(&site, &mut link, to("edge-a:22")).await.unwrap());
    assert!(opened(&site, &mut link, to("edge-a:22")).await.is_err());
}

#[tokio::test(start_paused = true)]
async fn places_of_a_link_are_kept_for_the_kubelet() {
    let site = Site::new();
    let link = LinkConfig { max_streams: 4, reserved_streams: 1, ..LinkConfig::default() };
    let mut link = TestLink::with(link).await;
    let _stays = site.local(&link);
    let mut held = Vec::new();
    for name in ["one", "two", "three"] {
        let request = Request { caller: Caller::told_by_peer(name), ..request() };
        held.push(opened(&site, &mut link, request).await.unwrap());
    }
    let text = opened(&site, &mut link, request()).await.unwrap_err().to_string();
    assert_eq!(
        text,
        "node edge-a is busy: the link carries as many streams as it may (4, 1 of them reserved)"
    );
    let kubelet = Request { target: "edge-a:10250".parse().unwrap(), ..request() };
    held.push(opened(&site, &mut link, kubelet).await.unwrap());
}

#[test]
fn the_kubelet_is_known_by_its_node_and_port() {
    let granted = [("edge-a", "10.0.0.1"), ("edge-a", "10.244.0.0/24"), ("edge-a", "default-route")];
    let mut grants: Grants = granted.iter().map(|(name, what)| (node(name), what.parse().unwrap())).collect();
    let is_kubelet = |grants: &Grants, name: &str, target: &str| {
        let alone = (Arc::new(Memory) as Arc<dyn Directory>, None);
        let registry = Registry::new(LinkLimits { total: 1, per_node: 1 }, metrics());
        let grants = SharedGrants::new(grants.clone());
        let router = Router::new(registry, grants, alone, DIAL_TIMEOUT, LIMITS, metrics());
        router.is_kubelet(&node(name), &target.parse().unwrap())
    };
    for target in ["edge-a:10250", "10.0.0.1:10250"] {
        assert!(is_kubelet(&grants, "edge-a", target), "{target}");
    }
    for target in ["edge-a:10251", "10.0.0.1:22", "10.244.0.7:10250", "elsewhere:10250"] {
        assert!(!is_kubelet(&grants, "edge-a", target), "{target}");
    }
    assert!(!is_kubelet(&grants, "edge-b", "10.0.0.1:10250"));
    grants.set_kubelet_port(node("edge-a"), 11_250);
    assert!(is_kubelet(&grants, "edge-a", "edge-a:11250"));
    assert!(!is_kubelet(&grants, "edge-a", "edge-a:10250"));
    assert!(is_kubelet(&grants, "edge-b", "edge-b:10250"));
}
