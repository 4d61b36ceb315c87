//! The local map of who holds what, in full: `peers` and `etcd` each fill one, and answer from it.

use std::{
    cmp::Reverse,
    collections::{BTreeMap, BTreeSet},
};

use parking_lot::RwLock;
use tokio::time::Instant;
use tunnel_core::{GatewayId, NodeId};

use super::Generation;
use crate::gone::Gone;

/// A gateway that holds a link to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Holder {
    pub(crate) gateway: GatewayId,
    pub(crate) generation: Generation,
}

/// The last gateway that held a link to a node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct LastHeld {
    pub(crate) gateway: GatewayId,
    pub(crate) until: Instant,
}

/// Which gateways hold which nodes.
#[derive(Debug, Default)]
pub(crate) struct Holders(RwLock<State>);

#[derive(Debug, Default)]
struct State {
    by_node: BTreeMap<NodeId, BTreeMap<GatewayId, Generation>>,
    by_gateway: BTreeMap<GatewayId, BTreeSet<NodeId>>,
    /// Nodes that nobody holds any more, and who held each last.
    gone: Gone<GatewayId>,
}

impl Holders {
    /// Who holds `node`, the newest link first.
    pub(crate) fn of(&self, node: &NodeId) -> Vec<Holder> {
        let state = self.0.read();
        let holders = state.by_node.get(node).into_iter().flatten();
        let mut holders: Vec<Holder> = holders
            .map(|(gateway, generation)| Holder { gateway: gateway.clone(), generation: *generation })
            .collect();
        holders.sort_by_key(|holder| Reverse(holder.generation));
        holders
    }

    /// `gateway` holds a link of this generation to `node`.
    pub(crate) fn hold(&self, gateway: &GatewayId, node: NodeId, generation: Generation) {
        self.0.write().hold(gateway, node, generation);
    }

    /// `gateway` holds no link to `node`.
    pub(crate) fn release(&self, gateway: &GatewayId, node: &NodeId) {
        self.0.write().release(gateway, node);
    }

    /// `gateway` held a link of this generation to `node`, and does so no more; a newer one stays.
    pub(crate) fn disprove(&self, node: &NodeId, holder: &Holder) {
        let mut state = self.0.write();
        let known = state.by_node.get(node).and_then(|holders| holders.get(&holder.gateway));
        if known.is_some_and(|known| *known <= holder.generation) {
            state.release(&holder.gateway, node);
        }
    }

    /// `gateway` holds these and nothing else.
    pub(crate) fn replace(&self, gateway: &GatewayId, held: BTreeMap<NodeId, Generation>) {
        let mut state = self.0.write();
        state.release_all(gateway, |node| !held.contains_key(node));
        for (node, generation) in held {
            state.hold(gateway, node, generation);
        }
    }

    /// `gateway` holds nothing.
    pub(crate) fn release_all(&self, gateway: &GatewayId) {
        self.0.write().release_all(gateway, |_| true);
    }

    /// Who held `node` last, where nobody does any more.
    pub(crate) fn last(&self, node: &NodeId) -> Option<LastHeld> {
        let state = self.0.read();
        let (until, gateway) = state.gone.get(node)?;
        Some(LastHeld { gateway: gateway.clone(), until })
    }

    /// How many nodes `gateway` holds.
    pub(crate) fn count(&self, gateway: &GatewayId) -> usize {
        self.0.read().by_gateway.get(gateway).map_or(0, BTreeSet::len)
    }

    /// The gateways that hold anything.
    pub(crate) fn gateways(&self) -> Vec<GatewayId> {
        self.0.read().by_gateway.keys().cloned().collect()
    }

    /// How many nodes are known.
    #[cfg(test)]
    pub(crate) fn len(&self) -> usize {
        self.0.read().by_node.len()
    }
}

impl State {
    fn hold(&mut self, gateway: &GatewayId, node: NodeId, generation: Generation) {
        self.gone.forget(&node);
        self.by_gateway.entry(gateway.clone()).or_default().insert(node.clone());
        self.by_node.entry(node).or_default().insert(gateway.clone(), generation);
    }

    fn release(&mut self, gateway: &GatewayId, node: &NodeId) {
        if let Some(nodes) = self.by_gateway.get_mut(gateway) {
            nodes.remove(node);
            if nodes.is_empty() {
                self.by_gateway.remove(gateway);
            }
        }
        self.forget(gateway, node);
    }

    fn release_all(&mut self, gateway: &GatewayId, which: impl Fn(&NodeId) -> bool) {
        let Some(nodes) = self.by_gateway.remove(gateway) else { return };
        let (gone, left): (BTreeSet<NodeId>, BTreeSet<NodeId>) = nodes.into_iter().partition(which);
        for node in &gone {
            self.forget(gateway, node);
        }
        if !left.is_empty() {
            self.by_gateway.insert(gateway.clone(), left);
        }
    }

    fn forget(&mut self, gateway: &GatewayId, node: &NodeId) {
        if let Some(holders) = self.by_node.get_mut(node) {
            let held = holders.remove(gateway).is_some();
            if holders.is_empty() {
                self.by_node.remove(node);
                if held {
                    self.gone.remember(node.clone(), Instant::now(), gateway.clone());
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{gone::REMEMBERED, testing::node};

    fn gateway(name: &str) -> GatewayId {
        name.parse().unwrap()
    }

    fn names(holders: &Holders, name: &str) -> Vec<String> {
        holders.of(&node(name)).iter().map(|holder| holder.gateway.to_string()).collect()
    }

    #[test]
    fn the_newest_link_comes_first() {
        let (holders, a, b) = (Holders::default(), gateway("gw-a"), gateway("gw-b"));
        holders.hold(&a, node("edge"), 5);
        holders.hold(&b, node("edge"), 7);
        assert_eq!(names(&holders, "edge"), ["gw-b", "gw-a"]);
        holders.hold(&a, node("edge"), 9);
        assert_eq!(names(&holders, "edge"), ["gw-a", "gw-b"]);
        holders.release(&a, &node("edge"));
        assert_eq!(names(&holders, "edge"), ["gw-b"]);
        holders.release_all(&b);
        assert_eq!((holders.len(), holders.gateways()), (0, vec![]));
    }

    #[test]
    fn what_is_disproved_is_that_link_and_no_newer_one() {
        let (holders, a) = (Holders::default(), gateway("gw-a"));
        holders.hold(&a, node("edge"), 5);
        let stale = holders.of(&node("edge")).remove(0);
        holders.hold(&a, node("edge"), 6);
        holders.disprove(&node("edge"), &stale);
        assert_eq!(names(&holders, "edge"), ["gw-a"]);
        let stale = holders.of(&node("edge")).remove(0);
        holders.disprove(&node("edge"), &stale);
        assert_eq!(holders.len(), 0);
    }

    #[tokio::test(start_paused = true)]
    async fn who_held_a_node_last_is_remembered_until_somebody_does_and_of_so_many_only() {
        let (holders, a, b) = (Holders::default(), gateway("gw-a"), gateway("gw-b"));
        holders.hold(&a, node("edge"), 1);
        holders.hold(&b, node("edge"), 2);
        holders.release_all(&b);
        assert_eq!(holders.last(&node("edge")), None, "the other one holds it");
        // Not held by whom it is released of: nothing happens.
        holders.release(&b, &node("edge"));
        assert_eq!(names(&holders, "edge"), ["gw-a"]);
        holders.release(&a, &node("edge"));
        let last = holders.last(&node("edge")).unwrap();
        assert_eq!((last.gateway, last.until), (a.clone(), Instant::now()));
        holders.hold(&b, node("edge"), 3);
        assert_eq!(holders.last(&node("edge")), None);
        for number in 0..=REMEMBERED {
            tokio::time::advance(std::time::Duration::from_millis(1)).await;
            let node = node(&format!("n{number}"));
            holders.hold(&a, node.clone(), 1);
            holders.release(&a, &node);
        }
        assert_eq!((holders.last(&node("n0")), holders.last(&node("n1")).is_some()), (None, true));
    }

    #[test]
    fn a_snapshot_replaces_what_one_gateway_holds() {
        let (holders, a, b) = (Holders::default(), gateway("gw-a"), gateway("gw-b"));
        for name in ["one", "two"] {
            holders.hold(&a, node(name), 1);
            holders.hold(&b, node(name), 2);
        }
        holders.replace(&a, BTreeMap::from([(node("two"), 3), (node("three"), 3)]));
        assert_eq!(names(&holders, "one"), ["gw-b"]);
        assert_eq!(names(&holders, "two"), ["gw-a", "gw-b"]);
        assert_eq!(names(&holders, "three"), ["gw-a"]);
        holders.replace(&a, BTreeMap::new());
        assert_eq!(holders.gateways(), [b]);
    }
}
