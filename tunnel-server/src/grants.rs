//! Which node serves a host, beyond the nodes' own names: the identifiers that the gateway's policy grants. Built from
//! configuration; asked by `route` for every request, and by `edges` for what to tell a new link.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    net::IpAddr,
    str::FromStr,
    sync::Arc,
};

use arc_swap::ArcSwap;
use ipnet::IpNet;
use tunnel_core::{Host, NodeId};

/// Something a node may be granted to serve.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Identifier {
    /// Exactly this name or address.
    Host(Host),
    /// Every address of a network.
    Network(IpNet),
    /// Whatever nobody else serves.
    DefaultRoute,
}

/// How the default route is written.
const DEFAULT_ROUTE: &str = "default-route";

/// A text that is no identifier.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{0:?} is no identifier: use a host name, an address, a network such as 10.0.0.0/8, or {DEFAULT_ROUTE}"
)]
pub struct IdentifierError(String);

impl FromStr for Identifier {
    type Err = IdentifierError;

    fn from_str(text: &str) -> Result<Self, IdentifierError> {
        if text == DEFAULT_ROUTE {
            return Ok(Self::DefaultRoute);
        }
        let bad = || IdentifierError(text.chars().take(80).collect());
        if text.contains('/') {
            return text.parse::<IpNet>().map(|net| Self::Network(net.trunc())).map_err(|_| bad());
        }
        text.parse().map(Self::Host).map_err(|_| bad())
    }
}

impl fmt::Display for Identifier {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Host(host) => host.fmt(f),
            Self::Network(network) => network.fmt(f),
            Self::DefaultRoute => f.write_str(DEFAULT_ROUTE),
        }
    }
}

/// Who serves a host.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Holder {
    /// Nobody.
    None,
    /// This node alone.
    One(NodeId),
    /// All of these: no telling which one is meant.
    Several(Vec<NodeId>),
}

impl Holder {
    fn of(nodes: Option<&BTreeSet<NodeId>>) -> Self {
        let nodes: Vec<NodeId> = nodes.into_iter().flatten().cloned().collect();
        match <[NodeId; 1]>::try_from(nodes) {
            Ok([only]) => Self::One(only),
            Err(nodes) if nodes.is_empty() => Self::None,
            Err(nodes) => Self::Several(nodes),
        }
    }
}

/// The table in force, which can be replaced while it is used.
pub(crate) type SharedGrants = Arc<ArcSwap<Grants>>;

/// Every grant. Immutable: a new table replaces the old one as a whole.
#[derive(Clone, Debug, Default)]
pub struct Grants {
    by_node: BTreeMap<NodeId, BTreeSet<Identifier>>,
    holders: BTreeMap<Identifier, BTreeSet<NodeId>>,
    /// The prefix lengths that occur, the longest last.
    prefix_lengths: BTreeSet<u8>,
}

impl FromIterator<(NodeId, Identifier)> for Grants {
    fn from_iter<I: IntoIterator<Item = (NodeId, Identifier)>>(grants: I) -> Self {
        let mut table = Self::default();
        for (node, identifier) in grants {
            if let Identifier::Network(network) = &identifier {
                table.prefix_lengths.insert(network.prefix_len());
            }
            table.holders.entry(identifier.clone()).or_default().insert(node.clone());
            table.by_node.entry(node).or_default().insert(identifier);
        }
        table
    }
}

impl Grants {
    /// Whether the policy speaks of this node at all.
    pub(crate) fn knows(&self, node: &NodeId) -> bool {
        self.by_node.contains_key(node)
    }

    /// What a node serves beside its own name.
    pub(crate) fn of(&self, node: &NodeId) -> impl Iterator<Item = &Identifier> {
        self.by_node.get(node).into_iter().flatten()
    }

    /// Who serves `host`: by exact name or address, else by the longest network, else by default.
    ///
    /// Nodes count whether they are connected or not. Were they not, a stream for one site would reach another that
    /// uses the same addresses, whenever the first is offline.
    pub(crate) fn holder(&self, host: &Host) -> Holder {
        let exact = self.holders.get(&Identifier::Host(host.clone()));
        let network = || match host {
            Host::Ip(address) => self.network_of(*address),
            Host::Name(_) => None,
        };
        Holder::of(exact.or_else(network).or_else(|| self.holders.get(&Identifier::DefaultRoute)))
    }

    fn network_of(&self, address: IpAddr) -> Option<&BTreeSet<NodeId>> {
        self.prefix_lengths.iter().rev().find_map(|length| {
            let network = IpNet::new(address, *length).ok()?.trunc();
            self.holders.get(&Identifier::Network(network))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(name: &str) -> NodeId {
        name.parse().unwrap()
    }

    fn grants(list: &[(&str, &str)]) -> Grants {
        list.iter().map(|(name, identifier)| (node(name), identifier.parse().unwrap())).collect()
    }

    fn holder(grants: &Grants, host: &str) -> Holder {
        grants.holder(&host.parse().unwrap())
    }

    #[test]
    fn the_closest_match_wins() {
        let table = grants(&[
            ("any", "default-route"),
            ("wide", "10.0.0.0/8"),
            ("near", "10.1.0.0/16"),
            ("exact", "10.1.2.3"),
            ("six", "2001:db8::/32"),
            ("named", "Metrics.Example."),
        ]);
        for (host, expected) in [
            ("10.1.2.3", "exact"),
            ("::ffff:10.1.2.3", "exact"),
            ("10.1.2.4", "near"),
            ("10.2.0.1", "wide"),
            ("11.0.0.1", "any"),
            ("2001:db8::1", "six"),
            ("2001:db9::1", "any"),
            ("metrics.example", "named"),
            ("other.example", "any"),
        ] {
            assert_eq!(holder(&table, host), Holder::One(node(expected)), "{host}");
        }
    }

    #[test]
    fn nobody_serves_what_is_not_granted() {
        let table = grants(&[("near", "10.1.0.0/16")]);
        assert_eq!(holder(&table, "10.2.0.1"), Holder::None);
        assert_eq!(holder(&table, "name"), Holder::None);
        assert!(table.knows(&node("near")) && !table.knows(&node("far")));
    }

    #[test]
    fn what_two_nodes_hold_names_both() {
        let table = grants(&[
            ("b", "192.168.1.1"),
            ("a", "192.168.1.1"),
            ("b", "172.16.0.0/12"),
            ("a", "172.16.9.9/12"),
            ("c", "172.16.1.0/24"),
            ("a", "default-route"),
            ("b", "default-route"),
        ]);
        let both = Holder::Several(vec![node("a"), node("b")]);
        assert_eq!(holder(&table, "192.168.1.1"), both);
        assert_eq!(holder(&table, "172.16.9.1"), both);
        assert_eq!(holder(&table, "8.8.8.8"), both);
        assert_eq!(holder(&table, "172.16.1.1"), Holder::One(node("c")));
    }

    #[test]
    fn identifiers_round_trip_and_bad_ones_are_named() {
        for text in ["10.0.0.1", "[::1]", "10.0.0.0/8", "a.example", "default-route"] {
            assert_eq!(text.parse::<Identifier>().unwrap().to_string(), text);
        }
        let error = "10.0.0.0/99".parse::<Identifier>().unwrap_err().to_string();
        assert!(error.contains("10.0.0.0/99"), "{error}");
    }
}
