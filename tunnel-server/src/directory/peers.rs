//! The directory that needs nothing but the gateways: each tells every other over its peer link which nodes it holds,
//! first all of them, then what changes. What a gateway told counts for as long as the link to it is up.

use std::collections::BTreeMap;

use parking_lot::Mutex;
use tracing::warn;
use tunnel_core::{
    GatewayId, NodeId,
    proto::messages::{Holding, Holdings},
};

use super::{Directory, Generation, Holder, Holders, LastHeld, Untold};

/// Nodes that one gateway can hold. Whoever says that it holds more is mistaken, and would fill the memory of all others.
const MAX_HELD: usize = 1 << 20;

/// What peers tell.
#[derive(Debug)]
pub(crate) struct Peers {
    holders: Holders,
    max_held: usize,
    telling: Mutex<BTreeMap<GatewayId, Telling>>,
}

/// How far one gateway has come in telling.
#[derive(Debug)]
struct Telling {
    epoch: u64,
    next_part: u64,
    /// The snapshot so far, while more of it is to come.
    snapshot: Option<BTreeMap<NodeId, Generation>>,
}

impl Default for Peers {
    fn default() -> Self {
        Self { holders: Holders::default(), max_held: MAX_HELD, telling: Mutex::default() }
    }
}

impl Directory for Peers {
    fn holders(&self, node: &NodeId) -> Vec<Holder> {
        self.holders.of(node)
    }

    fn disprove(&self, node: &NodeId, holder: &Holder) {
        self.holders.disprove(node, holder);
    }

    fn last_held(&self, node: &NodeId) -> Option<LastHeld> {
        self.holders.last(node)
    }

    fn wants_holdings(&self) -> bool {
        true
    }

    fn peer_told(&self, gateway: &GatewayId, told: Holdings) -> Result<(), Untold> {
        let mut telling = self.telling.lock();
        let known = telling.entry(gateway.clone()).or_insert_with(|| Telling::new(0));
        if told.epoch > known.epoch {
            *known = Telling::new(told.epoch);
        }
        // What belongs to an epoch before is as wrong as a part that is missing.
        if told.epoch != known.epoch || told.part != known.next_part {
            return Err(Untold::Missed { expected: known.next_part, got: told.part });
        }
        known.next_part += 1;
        let known_to_hold =
            known.snapshot.as_ref().map_or_else(|| self.holders.count(gateway), BTreeMap::len);
        if known_to_hold + told.holdings.len() > self.max_held {
            return Err(Untold::TooMany { max: self.max_held });
        }
        let holdings = parse(gateway, &told.holdings);
        match &mut known.snapshot {
            Some(snapshot) => {
                snapshot
                    .extend(holdings.into_iter().filter_map(|(node, generation)| Some((node, generation?))));
                if !told.more {
                    let whole = known.snapshot.take().unwrap_or_default();
                    self.holders.replace(gateway, whole);
                }
            }
            None => {
                for (node, generation) in holdings {
                    match generation {
                        Some(generation) => self.holders.hold(gateway, node, generation),
                        None => self.holders.release(gateway, &node),
                    }
                }
            }
        }
        Ok(())
    }

    fn peer_silent(&self, gateway: &GatewayId) {
        self.telling.lock().remove(gateway);
        self.holders.release_all(gateway);
    }
}

impl Telling {
    fn new(epoch: u64) -> Self {
        Self { epoch, next_part: 0, snapshot: Some(BTreeMap::new()) }
    }
}

/// Nodes, and the generations of their links, of those that have one.
fn parse(gateway: &GatewayId, told: &[Holding]) -> Vec<(NodeId, Option<Generation>)> {
    let mut unusable = None;
    let mut parsed = Vec::with_capacity(told.len());
    for holding in told {
        match holding.node.parse() {
            Ok(node) => parsed.push((node, (holding.generation != 0).then_some(holding.generation))),
            Err(error) => unusable = Some(error),
        }
    }
    if let Some(error) = unusable {
        let left_out = told.len() - parsed.len();
        warn!(%gateway, left_out, %error, "a peer says that it holds nodes of no usable name");
    }
    parsed
}

#[cfg(test)]
mod tests {
    use tracing::Level;

    use super::*;
    use crate::testing::{Log, node};

    fn gateway() -> GatewayId {
        "gw-a".parse().unwrap()
    }

    fn told(epoch: u64, part: u64, more: bool, holdings: &[(&str, u64)]) -> Holdings {
        let holding =
            |(node, generation): &(&str, u64)| Holding { node: (*node).to_owned(), generation: *generation };
        Holdings { epoch, part, more, holdings: holdings.iter().map(holding).collect() }
    }

    fn held(peers: &Peers, name: &str) -> Option<Generation> {
        peers.holders(&node(name)).first().map(|holder| holder.generation)
    }

    #[test]
    fn a_snapshot_counts_when_it_is_whole_and_changes_at_once() {
        let peers = Peers::default();
        peers.peer_told(&gateway(), told(7, 0, true, &[("one", 1)])).unwrap();
        assert_eq!(held(&peers, "one"), None);
        peers.peer_told(&gateway(), told(7, 1, false, &[("two", 2), ("NOT A NAME", 2)])).unwrap();
        assert_eq!((held(&peers, "one"), held(&peers, "two")), (Some(1), Some(2)));
        peers.peer_told(&gateway(), told(7, 2, false, &[("one", 0), ("two", 5)])).unwrap();
        assert_eq!((held(&peers, "one"), held(&peers, "two")), (None, Some(5)));
        // A new snapshot on the same link: what is not in it goes, but only once it is whole.
        peers.peer_told(&gateway(), told(8, 0, true, &[("three", 3)])).unwrap();
        assert_eq!((held(&peers, "two"), held(&peers, "three")), (Some(5), None));
        peers.peer_told(&gateway(), told(8, 1, false, &[])).unwrap();
        assert_eq!((held(&peers, "two"), held(&peers, "three")), (None, Some(3)));
    }

    #[test]
    fn a_part_that_is_missing_is_noticed() {
        let peers = Peers::default();
        peers.peer_told(&gateway(), told(7, 0, false, &[("one", 1)])).unwrap();
        let missed = peers.peer_told(&gateway(), told(7, 2, false, &[])).unwrap_err();
        assert_eq!(missed, Untold::Missed { expected: 1, got: 2 });
        assert!(peers.peer_told(&gateway(), told(6, 0, false, &[])).is_err(), "an older epoch");
        assert!(peers.peer_told(&gateway(), told(9, 1, false, &[])).is_err(), "its first part is missing");
    }

    #[test]
    fn more_than_any_gateway_holds_is_not_taken() {
        let peers = Peers { max_held: 3, ..Peers::default() };
        let too_many = Err(Untold::TooMany { max: 3 });
        peers.peer_told(&gateway(), told(1, 0, true, &[("one", 1), ("two", 1)])).unwrap();
        assert_eq!(peers.peer_told(&gateway(), told(1, 1, true, &[("three", 1), ("four", 1)])), too_many);
        peers.peer_told(&gateway(), told(2, 0, false, &[("one", 1), ("two", 1)])).unwrap();
        peers.peer_told(&gateway(), told(2, 1, false, &[("three", 1)])).unwrap();
        assert_eq!(peers.peer_told(&gateway(), told(2, 2, false, &[("four", 1)])), too_many);
        assert_eq!((held(&peers, "three"), held(&peers, "four")), (Some(1), None));
    }

    #[test]
    fn names_that_nobody_can_use_are_logged_once_a_part() {
        let (log, peers) = (Log::start(), Peers::default());
        let names: Vec<String> = (0..500).map(|number| format!("NOT {number}")).collect();
        let mut holdings: Vec<(&str, u64)> = names.iter().map(|name| (name.as_str(), 1)).collect();
        holdings.push(("good", 4));
        peers.peer_told(&gateway(), told(1, 0, false, &holdings)).unwrap();
        assert_eq!(held(&peers, "good"), Some(4));
        let lines = log.lines(Level::WARN, "no usable name");
        assert!(lines.len() == 1 && lines[0].contains("left_out=500 "), "{lines:?}");
    }

    #[test]
    fn a_lost_link_drops_what_was_told_over_it() {
        let peers = Peers::default();
        let other: GatewayId = "gw-b".parse().unwrap();
        peers.peer_told(&gateway(), told(7, 0, false, &[("one", 1)])).unwrap();
        peers.peer_told(&other, told(3, 0, false, &[("one", 2), ("two", 2)])).unwrap();
        peers.peer_silent(&other);
        assert_eq!((held(&peers, "one"), held(&peers, "two")), (Some(1), None));
        // The next link may begin with any epoch.
        peers.peer_told(&other, told(1, 0, false, &[("two", 9)])).unwrap();
        assert_eq!(held(&peers, "two"), Some(9));
    }
}
