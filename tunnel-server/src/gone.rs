//! Nodes that are gone, as many as are remembered, with what is remembered of each. The registry keeps those whose last
//! link here has ended, the directory those that no other gateway holds any more.

use std::collections::{BTreeMap, BTreeSet};

use tokio::time::Instant;
use tunnel_core::NodeId;

/// Nodes that are remembered; the one that is gone longest is forgotten first.
pub(crate) const REMEMBERED: usize = 16 * 1024;

/// See the module's text.
#[derive(Debug)]
pub(crate) struct Gone<T> {
    since: BTreeMap<NodeId, (Instant, T)>,
    by_age: BTreeSet<(Instant, NodeId)>,
}

impl<T> Default for Gone<T> {
    fn default() -> Self {
        Self { since: BTreeMap::new(), by_age: BTreeSet::new() }
    }
}

impl<T> Gone<T> {
    /// `node` is gone since then.
    pub(crate) fn remember(&mut self, node: NodeId, since: Instant, what: T) {
        self.forget(&node);
        self.since.insert(node.clone(), (since, what));
        self.by_age.insert((since, node));
        if self.since.len() > REMEMBERED
            && let Some((_, oldest)) = self.by_age.pop_first()
        {
            self.since.remove(&oldest);
        }
    }

    /// `node` is back.
    pub(crate) fn forget(&mut self, node: &NodeId) {
        if let Some((since, _)) = self.since.remove(node) {
            self.by_age.remove(&(since, node.clone()));
        }
    }

    /// Since when `node` is gone, and what is remembered of it.
    pub(crate) fn get(&self, node: &NodeId) -> Option<(Instant, &T)> {
        self.since.get(node).map(|(since, what)| (*since, what))
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::testing::node;

    #[test]
    fn the_node_gone_longest_is_forgotten_first() {
        let mut gone = Gone::default();
        let start = Instant::now();
        for number in 0..=REMEMBERED as u64 {
            gone.remember(node(&format!("n{number}")), start + Duration::from_secs(number), number);
        }
        assert_eq!((gone.since.len(), gone.by_age.len()), (REMEMBERED, REMEMBERED));
        assert_eq!(gone.get(&node("n0")), None);
        assert_eq!(gone.get(&node("n1")), Some((start + Duration::from_secs(1), &1)));
        gone.forget(&node("n1"));
        gone.remember(node("n2"), start, 2);
        assert_eq!((gone.since.len(), gone.by_age.len()), (REMEMBERED - 1, REMEMBERED - 1));
    }
}
