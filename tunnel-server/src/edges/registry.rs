//! Which links there are to which node. Filled by the edges' door, asked by `route`; other gateways hear of it by
//! [`News`](super::held::News).
//!
//! Each registered link gets a number, rising, and leaves by that number when its [`Registration`] is dropped, so that
//! the late end of an old link never removes a newer one.

use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

use parking_lot::Mutex;
use tokio::{sync::watch, time::Instant};
use tracing::{info, warn};
use tunnel_core::{InstanceId, LinkHandle, NodeId};

use super::held::{Changes, Held};
use tunnel_edge::daemon::log::limit::Limits;

use crate::{directory::Generation, gone::Gone, metrics::Metrics};

/// Links of one node at one time, those that drain among them, by what it may have without these. An edge whose
/// certificate rotates drains its link and makes a new one, and long streams keep the old ones up.
const PER_NODE_WITH_DRAINING: usize = 4;

/// How many links there may be.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkLimits {
    /// All together. At this many, further edges are rejected, but for one more link of each node that has one: an edge
    /// makes its new link before it drains the old one.
    pub total: usize,
    /// To one node, without those whose edge drains them. The oldest is closed when there would be more. With those that
    /// drain there may be four times as many, and of these the oldest goes first.
    pub per_node: usize,
}

/// All links of a gateway.
#[derive(Debug)]
pub(crate) struct Registry {
    state: Mutex<State>,
    limits: LinkLimits,
    metrics: Metrics,
}

#[derive(Debug, Default)]
struct State {
    nodes: BTreeMap<NodeId, Vec<Entry>>,
    /// Nodes whose last link has ended.
    gone: Gone<()>,
    changes: Changes,
    next_number: u64,
    /// Links that hold a place, registered or superseded.
    places: usize,
    /// Nodes that hold one more than there are.
    beyond: BTreeSet<NodeId>,
}

/// A link, newest first among those of its node.
#[derive(Debug)]
struct Entry {
    number: u64,
    instance: InstanceId,
    generation: Generation,
    /// It takes no more streams.
    draining: bool,
    link: LinkHandle,
}

/// What the registry knows about a node.
#[derive(Debug)]
pub(crate) enum Lookup {
    /// These links take streams; the preferred one first. Never empty.
    Links(Vec<LinkHandle>),
    /// It has links, but all of them drain.
    Draining,
    /// It had a link, this long ago.
    Offline {
        /// Since its last link ended.
        last_seen: Duration,
    },
    /// It never had a link, as far as is remembered.
    Unknown,
}

/// The registry is full.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("this gateway holds as many links as it may ({max})")]
pub(crate) struct Full {
    pub(crate) max: usize,
}

impl Registry {
    pub(crate) fn new(limits: LinkLimits, metrics: Metrics) -> Arc<Self> {
        Arc::new(Self { state: Mutex::default(), limits, metrics })
    }

    /// A place for one more link of `node`, to be taken before it is welcomed.
    pub(crate) fn place(self: &Arc<Self>, node: &NodeId) -> Result<Place, Full> {
        let mut state = self.state.lock();
        if state.places >= self.limits.total {
            let may_go_beyond = state.nodes.contains_key(node) && !state.beyond.contains(node);
            if !may_go_beyond {
                return Err(Full { max: self.limits.total });
            }
            state.beyond.insert(node.clone());
        }
        state.places += 1;
        Ok(Place { registry: self.clone(), node: node.clone() })
    }

    /// Adds a link of the place's node, which from now on is that node's preferred one, unless the node has made a newer
    /// one, whose handshake was faster.
    pub(crate) fn register(
        &self,
        place: Place,
        instance: InstanceId,
        generation: Generation,
        link: LinkHandle,
    ) -> Registration {
        let node = &place.node;
        let mut state = self.state.lock();
        let held_before = state.generation(node);
        let number = state.next_number;
        state.next_number += 1;
        state.gone.forget(node);
        let entries = state.nodes.entry(node.clone()).or_default();
        let several_before = has_several_instances(entries);
        // Of one process, whatever came first; but a process that comes now is newer than those before it, although the
        // clock may have been set back since.
        let known =
            entries.iter().filter(|entry| entry.instance != instance).map(|entry| entry.generation).max();
        let generation = known.map_or(generation, |known| generation.max(known.saturating_add(1)));
        let newer = entries.partition_point(|entry| entry.generation > generation);
        entries.insert(newer, Entry { number, instance, generation, draining: false, link });
        supersede(entries, node, self.limits.per_node.max(1), &self.metrics.lines);
        let several = has_several_instances(entries);
        if several && !several_before && self.metrics.lines.admit_known("several_edges", node) {
            warn!(%node, links = entries.len(),
                  "two edge processes serve this node; the newest is preferred. Normal while an agent is being replaced");
        }
        state.note(node, held_before);
        self.count_several(several_before, several);
        self.metrics.links.inc();
        self.metrics.links_opened.inc();
        drop(state);
        Registration { place, number }
    }

    /// What there is for `node`.
    pub(crate) fn lookup(&self, node: &NodeId) -> Lookup {
        let state = self.state.lock();
        let entries = state.nodes.get(node).into_iter().flatten().filter(|entry| !entry.link.is_closed());
        let links: Vec<LinkHandle> = entries.map(|entry| entry.link.clone()).collect();
        if links.is_empty() {
            return state.last_seen(node);
        }
        let serving: Vec<LinkHandle> = links.into_iter().filter(|link| !link.peer_draining()).collect();
        if serving.is_empty() { Lookup::Draining } else { Lookup::Links(serving) }
    }

    /// Whether there is a link to `node`, or has been one.
    pub(crate) fn knows(&self, node: &NodeId) -> bool {
        let state = self.state.lock();
        state.nodes.contains_key(node) || state.gone.get(node).is_some()
    }

    /// Whether there is no link that takes streams.
    pub(super) fn holds_none(&self) -> bool {
        let state = self.state.lock();
        state.nodes.keys().all(|node| state.generation(node).is_none())
    }

    /// Marked as changed whenever what is held has changed.
    pub(super) fn changes(&self) -> watch::Receiver<u64> {
        self.state.lock().changes.subscribe()
    }

    /// What is held, for a reader that has heard of the first `seen` changes, which are all afterwards.
    pub(super) fn held_since(&self, seen: &mut Option<u64>) -> Held {
        let state = self.state.lock();
        let changed = seen.and_then(|seen| state.changes.since(seen));
        *seen = Some(state.changes.count());
        let held = |node: NodeId| {
            let generation = state.generation(&node);
            (node, generation)
        };
        if let Some(changed) = changed {
            return Held::Changed(changed.into_iter().map(held).collect());
        }
        let all = state.nodes.keys().cloned().map(held);
        Held::All(all.filter_map(|(node, generation)| Some((node, generation?))).collect())
    }

    fn drains(&self, node: &NodeId, number: u64) {
        let mut state = self.state.lock();
        let held_before = state.generation(node);
        let entries = state.nodes.get_mut(node).into_iter().flatten();
        for entry in entries.filter(|entry| entry.number == number) {
            entry.draining = true;
        }
        state.note(node, held_before);
    }

    fn remove(&self, node: &NodeId, number: u64) {
        let mut state = self.state.lock();
        self.metrics.links.dec();
        let held_before = state.generation(node);
        let Some(entries) = state.nodes.get_mut(node) else { return };
        let several_before = has_several_instances(entries);
        let ended = entries.iter().find(|entry| entry.number == number);
        let last_heard = ended.map_or_else(Instant::now, |entry| entry.link.last_heard());
        entries.retain(|entry| entry.number != number);
        let several = has_several_instances(entries);
        if entries.is_empty() {
            state.nodes.remove(node);
            state.gone.remember(node.clone(), last_heard, ());
        }
        state.note(node, held_before);
        self.count_several(several_before, several);
    }

    fn count_several(&self, before: bool, now: bool) {
        self.metrics.nodes_with_several_links.inc_by(i64::from(now) - i64::from(before));
    }
}

impl State {
    /// The generation of the node's newest link that takes streams.
    fn generation(&self, node: &NodeId) -> Option<Generation> {
        let entries = self.nodes.get(node)?;
        entries.iter().filter(|entry| !entry.draining).map(|entry| entry.generation).max()
    }

    /// Tells the readers that what is held of `node` has changed, if it has.
    fn note(&mut self, node: &NodeId, held_before: Option<Generation>) {
        if self.generation(node) != held_before {
            self.changes.note(node);
        }
    }

    fn last_seen(&self, node: &NodeId) -> Lookup {
        if self.nodes.contains_key(node) {
            // Its link has just ended, and its task is about to say so.
            return Lookup::Offline { last_seen: Duration::ZERO };
        }
        match self.gone.get(node) {
            Some((seen, ())) => Lookup::Offline { last_seen: seen.elapsed() },
            None => Lookup::Unknown,
        }
    }
}

/// Closes the oldest links of a node that has more than it may. Those that drain take no new streams and go by
/// themselves: they must not make an edge that does as it should lose its streams.
fn supersede(entries: &mut Vec<Entry>, node: &NodeId, per_node: usize, lines: &Limits) {
    const WHY: &str = "superseded by newer links of the same node";
    // Looked at once: an edge may begin to drain at any moment, but none takes it back.
    let serves = |(index, entry): (usize, &Entry)| (!entry.link.peer_draining()).then_some(index);
    let serving: Vec<usize> = entries.iter().enumerate().filter_map(serves).collect();
    for index in serving.into_iter().skip(per_node).rev() {
        let Entry { instance, link, .. } = entries.remove(index);
        if lines.admit_known("link_superseded", node) {
            info!(%node, %instance, streams = link.active_streams(), "closing the oldest link: the node has newer ones");
        }
        link.close(WHY);
    }
    let all = per_node.saturating_mul(PER_NODE_WITH_DRAINING);
    for _ in all..entries.len() {
        if let Some(oldest) = entries.iter().rposition(|entry| entry.link.peer_draining()) {
            let Entry { instance, link, .. } = entries.remove(oldest);
            if lines.admit_known("link_cut", node) {
                warn!(%node, %instance, streams = link.active_streams(), links = all,
                      "closing the oldest link that drains, which cuts its streams: the node has as many links as it may, \
                       those that drain among them");
            }
            link.close(WHY);
        }
    }
}

fn has_several_instances(entries: &[Entry]) -> bool {
    entries.windows(2).any(|pair| pair[0].instance != pair[1].instance)
}

/// The right of a node to one more link. Given back when dropped.
#[derive(Debug)]
pub(crate) struct Place {
    registry: Arc<Registry>,
    node: NodeId,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut state = self.registry.state.lock();
        state.places -= 1;
        // Whichever link it was: the node holds one less.
        state.beyond.remove(&self.node);
    }
}

/// A link's stay in the registry, which ends when this is dropped.
#[derive(Debug)]
pub(crate) struct Registration {
    place: Place,
    number: u64,
}

impl Registration {
    /// The edge takes no more streams on it.
    pub(crate) fn drains(&self) {
        self.place.registry.drains(&self.place.node, self.number);
    }

    /// Whether the node has a newer link, over which streams come now.
    pub(crate) fn has_successor(&self) -> bool {
        let state = self.place.registry.state.lock();
        let newer = |entry: &&Entry| entry.number > self.number;
        let mut entries = state.nodes.get(&self.place.node).into_iter().flatten().filter(newer);
        entries.any(|entry| !entry.link.is_closed() && !entry.link.peer_draining())
    }
}

impl Drop for Registration {
    fn drop(&mut self) {
        self.place.registry.remove(&self.place.node, self.number);
    }
}

#[cfg(test)]
mod tests {
    use tokio::time::{advance, sleep, timeout};
    use tracing::Level;
    use tunnel_core::OpenRequest;

    use super::*;
    use crate::testing::{Log, TestLink, metrics, node};

    const LIMITS: LinkLimits = LinkLimits { total: 3, per_node: 2 };

    fn registry() -> Arc<Registry> {
        Registry::new(LIMITS, metrics())
    }

    fn instance(number: u128) -> InstanceId {
        InstanceId::from_random(number)
    }

    fn register(registry: &Arc<Registry>, name: &str, number: u128, link: &TestLink) -> Registration {
        let place = registry.place(&node(name)).unwrap();
        let generation = registry.state.lock().next_number + 1;
        registry.register(place, instance(number), generation, link.gateway.clone())
    }

    /// How many links serve the node, and the number of streams on the preferred one, which tells links apart.
    fn links(registry: &Registry, name: &str) -> Vec<LinkHandle> {
        match registry.lookup(&node(name)) {
            Lookup::Links(links) => links,
            _ => Vec::new(),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn the_newest_link_is_preferred_and_a_late_end_leaves_it() {
        let registry = registry();
        let (old, new) = (TestLink::up().await, TestLink::up().await);
        let old_stays = register(&registry, "edge-a", 1, &old);
        assert_eq!(registry.metrics.nodes_with_several_links.get(), 0);
        let new_stays = register(&registry, "edge-a", 2, &new);
        assert_eq!(registry.metrics.nodes_with_several_links.get(), 1);
        let both = links(&registry, "edge-a");
        assert_eq!(both.len(), 2);
        // Only the new link's edge is drained: the preferred one must be gone from the choice.
        new.edge_drains().await;
        assert_eq!(links(&registry, "edge-a").len(), 1);
        assert!(both[0].peer_draining() && !both[1].peer_draining());

        drop(old_stays);
        assert!(matches!(registry.lookup(&node("edge-a")), Lookup::Draining));
        assert_eq!(registry.metrics.nodes_with_several_links.get(), 0);
        drop(new_stays);
        advance(Duration::from_secs(40)).await;
        let Lookup::Offline { last_seen } = registry.lookup(&node("edge-a")) else { panic!("not offline") };
        assert_eq!(last_seen.as_secs(), 40);
        assert!(matches!(registry.lookup(&node("edge-b")), Lookup::Unknown));
    }

    #[tokio::test]
    async fn the_oldest_of_too_many_is_closed() {
        let registry = registry();
        let (first, second, third) = (TestLink::up().await, TestLink::up().await, TestLink::up().await);
        let first_stays = register(&registry, "edge-a", 1, &first);
        let _second = register(&registry, "edge-a", 1, &second);
        let _third = register(&registry, "edge-a", 1, &third);
        assert_eq!(links(&registry, "edge-a").len(), 2);
        let why = first.closed().await.to_string();
        assert!(why.contains("superseded"), "{why}");
        assert_eq!(registry.metrics.nodes_with_several_links.get(), 0);
        drop(first_stays);
        assert_eq!(links(&registry, "edge-a").len(), 2);
    }

    #[tokio::test]
    async fn a_process_whose_clock_lags_is_newer_all_the_same_but_a_late_handshake_is_not() {
        let registry = registry();
        let links = [TestLink::up().await, TestLink::up().await, TestLink::up().await];
        let register = |number: u128, generation: Generation, link: &TestLink| {
            let place = registry.place(&node("edge-a")).unwrap();
            registry.register(place, instance(number), generation, link.gateway.clone())
        };
        let order = || {
            let state = registry.state.lock();
            let entries = &state.nodes[&node("edge-a")];
            entries.iter().map(|entry| (entry.instance.clone(), entry.generation)).collect::<Vec<_>>()
        };
        let old = register(1, 600, &links[0]);
        let _new = register(2, 5, &links[1]);
        assert_eq!(order(), [(instance(2), 601), (instance(1), 600)]);
        drop(old);
        let _late = register(2, 4, &links[2]);
        assert_eq!(order(), [(instance(2), 601), (instance(2), 4)]);
    }

    async fn soon<T>(what: impl Future<Output = T>) -> T {
        timeout(Duration::from_secs(60), what).await.unwrap()
    }

    fn request() -> OpenRequest {
        OpenRequest { target: "edge-a:22".to_owned(), ..OpenRequest::default() }
    }

    #[tokio::test(start_paused = true)]
    async fn links_that_drain_do_not_push_out_others_until_there_are_too_many() {
        let registry = Registry::new(LinkLimits { total: 100, per_node: 2 }, metrics());
        let mut oldest = TestLink::up().await;
        let mut stay = vec![register(&registry, "edge-a", 1, &oldest)];
        let gateway = oldest.gateway.clone();
        let opened = tokio::spawn(async move { gateway.open(request(), Duration::from_secs(5)).await });
        let _far = oldest.pending().await.accept(String::new()).await.unwrap();
        let _stream = opened.await.unwrap().unwrap();
        oldest.edge_drains().await;
        let mut drained = Vec::new();
        for _ in 0..5 {
            let link = TestLink::up().await;
            stay.push(register(&registry, "edge-a", 1, &link));
            link.edge_drains().await;
            drained.push(link);
        }
        let (first, second, third) = (TestLink::up().await, TestLink::up().await, TestLink::up().await);
        stay.push(register(&registry, "edge-a", 1, &first));
        stay.push(register(&registry, "edge-a", 1, &second));
        // Eight: as many as there may be, and two of them serve.
        sleep(Duration::from_secs(1)).await;
        assert!(!first.gateway.is_closed() && !oldest.gateway.is_closed());
        // Of those that serve, the oldest makes room; those that drain stay.
        stay.push(register(&registry, "edge-a", 1, &third));
        let why = soon(first.closed()).await.to_string();
        assert!(why.contains("superseded"), "{why}");
        assert!(!oldest.gateway.is_closed() && drained.iter().all(|link| !link.gateway.is_closed()));
        assert_eq!(links(&registry, "edge-a").len(), 2);

        // Now one of them drains as well, and yet another link would be the ninth.
        second.edge_drains().await;
        let (log, fourth) = (Log::start(), TestLink::up().await);
        stay.push(register(&registry, "edge-a", 1, &fourth));
        let why = soon(oldest.closed()).await.to_string();
        assert!(why.contains("superseded"), "{why}");
        let warnings = log.lines(Level::WARN, "closing the oldest link that drains");
        assert!(warnings.len() == 1 && warnings[0].contains("streams=1 "), "{warnings:?}");
        assert!(warnings[0].contains("node=edge-a "), "{warnings:?}");
        sleep(Duration::from_secs(1)).await;
        assert!(drained.iter().chain([&second, &third, &fourth]).all(|link| !link.gateway.is_closed()));
    }

    #[tokio::test]
    async fn places_are_counted_and_given_back() {
        let (registry, a) = (registry(), node("edge-a"));
        let places: Vec<Place> = (0..3).map(|_| registry.place(&a).unwrap()).collect();
        assert_eq!(registry.place(&a).unwrap_err(), Full { max: 3 });
        drop(places);
        assert!(registry.place(&a).is_ok());
    }

    #[tokio::test]
    async fn a_full_gateway_has_one_more_place_for_each_node_with_a_link() {
        let registry = registry();
        let link = TestLink::up().await;
        let (a, b) = (node("edge-a"), node("edge-b"));
        let old = register(&registry, "edge-a", 1, &link);
        let others = [registry.place(&b).unwrap(), registry.place(&b).unwrap()];
        // It was welcomed nowhere yet.
        assert!(registry.place(&b).is_err());
        let new = register(&registry, "edge-a", 1, &link);
        assert!(registry.place(&a).is_err(), "a second one beyond");
        // The old link ends: so does what the node had too much, and it can renew again.
        drop(old);
        let newest = register(&registry, "edge-a", 1, &link);
        assert!(registry.place(&a).is_err());
        drop(new);
        assert!(registry.place(&node("edge-c")).is_err(), "the gateway is still full");
        drop((newest, others));
        assert!(registry.state.lock().beyond.is_empty());
        let _all = [&a, &a, &b].map(|node| registry.place(node).unwrap());
        assert!(registry.place(&a).is_err(), "the node has no link any more");
    }
}
