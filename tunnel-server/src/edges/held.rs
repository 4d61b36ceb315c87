//! Which nodes this gateway holds, as news for other gateways: first all of them, then what has changed since. The
//! registry notes each change; [`News`] is one reader's place in them.

use std::{
    collections::{BTreeMap, BTreeSet, VecDeque},
    sync::Arc,
};

use tokio::sync::watch;
use tunnel_core::NodeId;

use super::registry::Registry;
use crate::directory::Generation;

/// Changes that are remembered. A reader that is further behind gets everything anew.
const CHANGES: usize = 32 * 1024;

/// Which nodes have changed, in the order in which they did.
#[derive(Debug)]
pub(super) struct Changes {
    nodes: VecDeque<NodeId>,
    /// How many there have been.
    count: watch::Sender<u64>,
}

impl Default for Changes {
    fn default() -> Self {
        Self { nodes: VecDeque::new(), count: watch::Sender::new(0) }
    }
}

impl Changes {
    pub(super) fn note(&mut self, node: &NodeId) {
        self.nodes.push_back(node.clone());
        if self.nodes.len() > CHANGES {
            self.nodes.pop_front();
        }
        self.count.send_modify(|count| *count += 1);
    }

    /// The nodes that changed after the first `seen` changes, each once. `None` if that is not known any more.
    pub(super) fn since(&self, seen: u64) -> Option<BTreeSet<NodeId>> {
        let behind = usize::try_from(self.count() - seen).ok()?;
        let first = self.nodes.len().checked_sub(behind)?;
        Some(self.nodes.range(first..).cloned().collect())
    }

    pub(super) fn count(&self) -> u64 {
        *self.count.borrow()
    }

    pub(super) fn subscribe(&self) -> watch::Receiver<u64> {
        self.count.subscribe()
    }
}

/// What a reader has not heard yet.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Held {
    /// These nodes and no others are held.
    All(BTreeMap<NodeId, Generation>),
    /// These have changed; `None` are not held any more.
    Changed(BTreeMap<NodeId, Option<Generation>>),
}

/// One reader of what is held.
#[derive(Debug)]
pub(crate) struct News {
    registry: Arc<Registry>,
    count: watch::Receiver<u64>,
    /// How many changes it has heard of; `None` before the first news.
    seen: Option<u64>,
}

impl News {
    pub(crate) fn of(registry: &Arc<Registry>) -> Self {
        Self { registry: registry.clone(), count: registry.changes(), seen: None }
    }

    /// Whether no node is held now, whatever this reader has heard of.
    pub(crate) fn none_is_held(&self) -> bool {
        self.registry.holds_none()
    }

    /// Waits until there are news, and gives all there are, so that a slow reader gets fewer and larger ones. Cancel-safe.
    pub(crate) async fn next(&mut self) -> Held {
        if self.seen.is_some() {
            let seen = self.seen;
            if self.count.wait_for(|count| Some(*count) != seen).await.is_err() {
                // The registry is held here, and so is the sender.
                return std::future::pending().await;
            }
        }
        self.registry.held_since(&mut self.seen)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::time::timeout;
    use tunnel_core::InstanceId;

    use super::*;
    use crate::{
        edges::registry::LinkLimits,
        testing::{TestLink, metrics, node},
    };

    #[test]
    fn a_reader_that_is_too_far_behind_gets_everything() {
        let mut changes = Changes::default();
        for number in 0..CHANGES {
            changes.note(&node(&format!("n{number}")));
        }
        assert_eq!(changes.since(0).map(|nodes| nodes.len()), Some(CHANGES));
        changes.note(&node("n0"));
        assert_eq!(changes.since(0), None);
        assert_eq!(changes.since(1).map(|nodes| nodes.len()), Some(CHANGES));
        assert_eq!(changes.since(CHANGES as u64), Some(BTreeSet::from([node("n0")])));
        assert_eq!(changes.since(CHANGES as u64 + 1), Some(BTreeSet::new()));
    }

    fn changed(held: Held) -> Vec<(String, Option<Generation>)> {
        match held {
            Held::Changed(changed) => {
                changed.into_iter().map(|(node, held)| (node.to_string(), held)).collect()
            }
            Held::All(_) => panic!("everything anew: {held:?}"),
        }
    }

    #[tokio::test(start_paused = true)]
    async fn news_are_everything_first_and_then_what_has_changed_since() {
        let registry = Registry::new(LinkLimits { total: 9, per_node: 4 }, metrics());
        let link = TestLink::up().await;
        let register = |name: &str, generation| {
            let place = registry.place(&node(name)).unwrap();
            registry.register(place, InstanceId::from_random(1), generation, link.gateway.clone())
        };
        let mut news = News::of(&registry);
        assert_eq!(news.next().await, Held::All(BTreeMap::new()));
        let (a, b) = (register("edge-a", 3), register("edge-b", 4));
        assert_eq!(
            changed(news.next().await),
            [("edge-a".to_owned(), Some(3)), ("edge-b".to_owned(), Some(4))]
        );
        assert!(timeout(Duration::from_secs(1), news.next()).await.is_err(), "nothing has changed");
        // A slow reader hears each node once, as it is now.
        drop(a);
        let a = register("edge-a", 7);
        drop(b);
        let newer = register("edge-a", 9);
        assert_eq!(changed(news.next().await), [("edge-a".to_owned(), Some(9)), ("edge-b".to_owned(), None)]);
        // A link that drains counts as gone, and an older one that does not counts instead.
        newer.drains();
        assert_eq!(changed(news.next().await), [("edge-a".to_owned(), Some(7))]);
        drop(newer);
        assert!(timeout(Duration::from_secs(1), news.next()).await.is_err(), "it was gone already");
        assert!(!news.none_is_held());
        a.drains();
        assert_eq!(changed(news.next().await), [("edge-a".to_owned(), None)]);
        assert!(news.none_is_held());
        let _b = register("edge-b", 5);
        assert_eq!(News::of(&registry).next().await, Held::All(BTreeMap::from([(node("edge-b"), 5)])));
    }
}
