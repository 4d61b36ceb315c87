//! How many streams each caller has to each node, so that none can take all that a node has. Asked by `route`, for what
//! comes by the ingress and for what other gateways hand on alike.
//!
//! The kubelet's port is served last of all: by it a person finds out what is wrong with the others. So of a node's
//! streams, some are kept for it, on each link ([`FOR_KUBELET`]) and for each caller.

use std::{collections::BTreeMap, num::NonZeroUsize, sync::Arc};

use parking_lot::Mutex;
use tunnel_core::NodeId;

use crate::ingress::Caller;

/// Streams of a link, and of a caller to a node, that only the kubelet's port gets.
pub(crate) const FOR_KUBELET: usize = 32;

/// Counts the streams that run.
#[derive(Debug)]
pub(crate) struct Callers {
    max: NonZeroUsize,
    nodes: Mutex<BTreeMap<NodeId, BTreeMap<String, Streams>>>,
}

/// Those of one caller to one node.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Streams {
    /// At most the maximum.
    shared: usize,
    /// To the kubelet's port: at most [`FOR_KUBELET`], beyond the maximum.
    for_kubelet: usize,
}

impl Callers {
    /// Each may have `max` streams to each node, and those to its kubelet that are kept for it.
    pub(crate) fn new(max: NonZeroUsize) -> Arc<Self> {
        Arc::new(Self { max, nodes: Mutex::default() })
    }

    /// A place for one more stream of `caller` to `node`, or the maximum that is reached.
    pub(crate) fn place(
        self: &Arc<Self>,
        node: &NodeId,
        caller: &Caller,
        to_kubelet: bool,
    ) -> Result<CallerPlace, NonZeroUsize> {
        let caller = caller.counted_as().to_owned();
        let mut nodes = self.nodes.lock();
        let streams = nodes.entry(node.clone()).or_default().entry(caller.clone()).or_default();
        let is_kept = to_kubelet && streams.for_kubelet < FOR_KUBELET;
        if is_kept {
            streams.for_kubelet += 1;
        } else if streams.shared < self.max.get() {
            streams.shared += 1;
        } else {
            return Err(self.max);
        }
        Ok(CallerPlace { callers: self.clone(), node: node.clone(), caller, is_kept })
    }
}

/// One stream of a caller, counted until this is dropped.
#[derive(Debug)]
pub(crate) struct CallerPlace {
    callers: Arc<Callers>,
    node: NodeId,
    caller: String,
    is_kept: bool,
}

impl Drop for CallerPlace {
    fn drop(&mut self) {
        let mut nodes = self.callers.nodes.lock();
        let Some(callers) = nodes.get_mut(&self.node) else { return };
        let Some(streams) = callers.get_mut(&self.caller) else { return };
        if self.is_kept {
            streams.for_kubelet -= 1;
        } else {
            streams.shared -= 1;
        }
        if *streams == Streams::default() {
            callers.remove(&self.caller);
        }
        if callers.is_empty() {
            nodes.remove(&self.node);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::node;

    fn callers(max: usize) -> Arc<Callers> {
        Callers::new(NonZeroUsize::new(max).unwrap())
    }

    fn caller(name: &str) -> Caller {
        Caller::told_by_peer(name)
    }

    #[test]
    fn each_caller_has_its_places_at_each_node() {
        let (callers, a, b) = (callers(2), node("edge-a"), node("edge-b"));
        let apiserver = caller("kube-apiserver");
        let mut places: Vec<_> = (0..2).map(|_| callers.place(&a, &apiserver, false).unwrap()).collect();
        assert_eq!(callers.place(&a, &apiserver, false).unwrap_err().get(), 2);
        let _others = [
            callers.place(&b, &apiserver, false).unwrap(),
            callers.place(&a, &caller("prometheus"), false).unwrap(),
        ];
        places.pop();
        assert!(callers.place(&a, &apiserver, false).is_ok());
    }

    #[test]
    fn the_kubelets_port_has_places_of_its_own() {
        let (callers, a) = (callers(2), node("edge-a"));
        let apiserver = caller("kube-apiserver");
        let mut kept: Vec<_> =
            (0..FOR_KUBELET).map(|_| callers.place(&a, &apiserver, true).unwrap()).collect();
        // Those to other ports have theirs still; then it is the kubelet's turn to share them.
        let other = callers.place(&a, &apiserver, false).unwrap();
        let shared = callers.place(&a, &apiserver, true).unwrap();
        assert!(callers.place(&a, &apiserver, true).is_err());
        assert!(callers.place(&a, &apiserver, false).is_err());
        kept.pop();
        assert!(callers.place(&a, &apiserver, false).is_err());
        kept.push(callers.place(&a, &apiserver, true).unwrap());
        drop(shared);
        assert!(callers.place(&a, &apiserver, false).is_ok());
        drop((kept, other));
        assert!(callers.nodes.lock().is_empty(), "nothing is kept of those who have none");
    }

    #[test]
    fn who_is_refused_leaves_nothing_behind() {
        let (callers, a) = (callers(1), node("edge-a"));
        let place = callers.place(&a, &caller("me"), false).unwrap();
        assert!(callers.place(&a, &caller("me"), false).is_err());
        drop(place);
        assert!(callers.nodes.lock().is_empty());
    }
}
