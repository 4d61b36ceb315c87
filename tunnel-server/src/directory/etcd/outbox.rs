//! What is still to be written into etcd, without I/O: of several changes to a node only the newest, in batches.

use std::collections::{BTreeMap, BTreeSet};

use tunnel_core::NodeId;

use crate::{directory::Generation, edges::held::Held};

/// Nodes of one transaction. etcd takes 128 by default.
const BATCH: usize = 100;

/// A node, and the generation of its link; `None` if it is not held.
pub(super) type Change = (NodeId, Option<Generation>);

/// What this gateway holds, and of which nodes etcd may not know that.
#[derive(Debug, Default)]
pub(super) struct Outbox {
    held: BTreeMap<NodeId, Generation>,
    dirty: BTreeSet<NodeId>,
}

impl Outbox {
    /// Takes in news.
    pub(super) fn hear(&mut self, news: Held) {
        match news {
            Held::All(all) => {
                let gone = self.held.keys().filter(|node| !all.contains_key(*node));
                let new = all.iter().filter(|(node, generation)| self.held.get(*node) != Some(generation));
                self.dirty.extend(gone.chain(new.map(|(node, _)| node)).cloned());
                self.held = all;
            }
            Held::Changed(changed) => {
                for (node, generation) in changed {
                    match generation {
                        Some(generation) => self.held.insert(node.clone(), generation),
                        None => self.held.remove(&node),
                    };
                    self.dirty.insert(node);
                }
            }
        }
    }

    /// etcd may know nothing of what is held.
    pub(super) fn begin_again(&mut self) {
        self.dirty.extend(self.held.keys().cloned());
    }

    /// etcd may know something else of this node than what is held.
    pub(super) fn doubt(&mut self, node: NodeId) {
        self.dirty.insert(node);
    }

    /// What to write next; empty if there is nothing.
    pub(super) fn batch(&self) -> Vec<Change> {
        let dirty = self.dirty.iter().take(BATCH);
        dirty.map(|node| (node.clone(), self.held.get(node).copied())).collect()
    }

    /// A batch was written, before anything else was heard.
    pub(super) fn written(&mut self, batch: &[Change]) {
        for (node, _) in batch {
            self.dirty.remove(node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::node;

    fn changed(changes: &[(&str, Option<Generation>)]) -> Held {
        Held::Changed(changes.iter().map(|(name, generation)| (node(name), *generation)).collect())
    }

    #[test]
    fn the_newest_of_several_changes_is_written_once() {
        let mut outbox = Outbox::default();
        outbox.hear(changed(&[("a", Some(1)), ("b", Some(2))]));
        outbox.hear(changed(&[("a", Some(3)), ("b", None)]));
        let batch = outbox.batch();
        assert_eq!(batch, [(node("a"), Some(3)), (node("b"), None)]);
        assert_eq!(outbox.batch(), batch, "it stays until it was written");
        outbox.written(&batch);
        assert_eq!(outbox.batch(), []);
        outbox.begin_again();
        assert_eq!(outbox.batch(), [(node("a"), Some(3))]);
    }

    #[test]
    fn what_is_all_is_written_by_its_differences() {
        let mut outbox = Outbox::default();
        outbox.hear(Held::All(BTreeMap::from([(node("a"), 1), (node("b"), 1), (node("c"), 1)])));
        let batch = outbox.batch();
        outbox.written(&batch);
        outbox.hear(Held::All(BTreeMap::from([(node("b"), 1), (node("c"), 2), (node("d"), 1)])));
        assert_eq!(outbox.batch(), [(node("a"), None), (node("c"), Some(2)), (node("d"), Some(1))]);
    }

    #[test]
    fn no_batch_is_larger_than_etcd_takes() {
        let mut outbox = Outbox::default();
        outbox.hear(Held::All((0..250).map(|number| (node(&format!("n{number}")), 1)).collect()));
        let mut sizes = Vec::new();
        loop {
            let batch = outbox.batch();
            if batch.is_empty() {
                break;
            }
            sizes.push(batch.len());
            outbox.written(&batch);
        }
        assert_eq!(sizes, [100, 100, 50]);
    }
}
