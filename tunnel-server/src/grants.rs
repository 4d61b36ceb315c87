//! Which node serves a host, beyond the nodes' own names: the identifiers that the gateway's policy grants. Built from
//! configuration and by `cluster`; asked by `route` for every request, and by `edges` for what to tell a link.

use std::{
    collections::{BTreeMap, BTreeSet},
    fmt,
    str::FromStr,
    sync::Arc,
};

use ipnet::IpNet;
use tokio::sync::watch;
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

/// Where a kubelet listens, unless its node says otherwise.
const KUBELET_PORT: u16 = 10250;
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
pub enum Holder {
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

/// The table in force, which can be replaced while it is used. Clones are the same table.
#[derive(Clone, Debug)]
pub(crate) struct SharedGrants(watch::Sender<Arc<Grants>>);

impl SharedGrants {
    pub(crate) fn new(table: Grants) -> Self {
        Self(watch::Sender::new(Arc::new(table)))
    }

    pub(crate) fn load(&self) -> Arc<Grants> {
        self.0.borrow().clone()
    }

    /// Puts a table in force and wakes whoever waits for one, unless it says what the last one said: whether it did.
    pub(crate) fn replace(&self, table: Grants) -> bool {
        self.0.send_if_modified(|in_force| {
            let differs = **in_force != table;
            if differs {
                *in_force = Arc::new(table);
            }
            differs
        })
    }

    /// To wait for the next table.
    pub(crate) fn subscribe(&self) -> watch::Receiver<Arc<Grants>> {
        self.0.subscribe()
    }
}

/// Every grant. A new table replaces the one in force as a whole.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Grants {
    by_node: BTreeMap<NodeId, BTreeSet<Identifier>>,
    holders: BTreeMap<Identifier, BTreeSet<NodeId>>,
    /// The prefix lengths that occur, the longest last.
    prefix_lengths: BTreeSet<u8>,
    /// Where kubelets listen, if not at [`KUBELET_PORT`].
    kubelet_ports: BTreeMap<NodeId, u16>,
    /// Why the cluster's nodes are not in the table, while they should be.
    unread: Option<String>,
}

impl FromIterator<(NodeId, Identifier)> for Grants {
    fn from_iter<I: IntoIterator<Item = (NodeId, Identifier)>>(grants: I) -> Self {
        let mut table = Self::default();
        for (node, identifier) in grants {
            table.grant(node, identifier);
        }
        table
    }
}

/// How a table is made.
impl Grants {
    pub(crate) fn grant(&mut self, node: NodeId, identifier: Identifier) {
        self.contest(node.clone(), identifier.clone());
        self.by_node.entry(node).or_default().insert(identifier);
    }

    /// A node that exists, whether anything is granted to it or not.
    pub(crate) fn add_node(&mut self, node: NodeId) {
        self.by_node.entry(node).or_default();
    }

    /// Where the node's kubelet listens. Only what the node gets beyond others depends on it, so its own word will do.
    pub(crate) fn set_kubelet_port(&mut self, node: NodeId, port: u16) {
        if port != KUBELET_PORT {
            self.kubelet_ports.insert(node, port);
        }
    }

    /// What a node may have a right to without being granted it: if another holds it, routing refuses and names both.
    pub(crate) fn contest(&mut self, node: NodeId, identifier: Identifier) {
        if let Identifier::Network(network) = &identifier {
            self.prefix_lengths.insert(network.prefix_len());
        }
        self.holders.entry(identifier).or_default().insert(node);
    }

    /// The same table, to which the cluster's nodes are still to come. `cause` says why they are not there.
    pub(crate) fn without_nodes_yet(self, cause: String) -> Self {
        Self { unread: Some(cause), ..self }
    }
}

impl Grants {
    /// Why the cluster's nodes are not in this table, while they should be.
    pub(crate) fn unread(&self) -> Option<&str> {
        self.unread.as_deref()
    }

    /// Every node that it speaks of.
    pub(crate) fn nodes(&self) -> impl Iterator<Item = &NodeId> {
        self.by_node.keys()
    }

    /// Whether the policy speaks of this node at all.
    pub fn knows(&self, node: &NodeId) -> bool {
        self.by_node.contains_key(node)
    }

    /// What a node serves beside its own name.
    pub(crate) fn of(&self, node: &NodeId) -> impl Iterator<Item = &Identifier> {
        self.by_node.get(node).into_iter().flatten()
    }

    /// Whether the node is granted exactly this host, and not a network around it or all that is left.
    pub(crate) fn has_exactly(&self, node: &NodeId, host: &Host) -> bool {
        self.by_node.get(node).is_some_and(|granted| granted.contains(&Identifier::Host(host.clone())))
    }

    /// Where the node's kubelet listens.
    pub(crate) fn kubelet_port(&self, node: &NodeId) -> u16 {
        self.kubelet_ports.get(node).copied().unwrap_or(KUBELET_PORT)
    }

    /// Who has a right to exactly this.
    pub(crate) fn holders(&self, identifier: &Identifier) -> impl Iterator<Item = &NodeId> {
        self.holders.get(identifier).into_iter().flatten()
    }

    /// Who serves `host`: by exact name or address, else by the longest network, else by default.
    ///
    /// Nodes count whether they are connected or not. Were they not, a stream for one site would reach another that
    /// uses the same addresses, whenever the first is offline. For the same reason only exact grants count while nodes
    /// are still to come: one of those may hold the address that a network or the default route would catch.
    pub fn holder(&self, host: &Host) -> Holder {
        let by_default = || self.holders.get(&Identifier::DefaultRoute).filter(|_| self.unread.is_none());
        Holder::of(self.granted_to(host).or_else(by_default))
    }

    /// Who serves `host` if there is a node of that very name: this node, unless another is granted it other than by
    /// default. Nobody while nodes are still to come, one of which may hold it, unless an exact grant tells.
    pub(crate) fn holder_beside(&self, host: &Host, namesake: NodeId) -> Holder {
        let granted = self.granted_to(host);
        if granted.is_none() && self.unread.is_some() {
            return Holder::None;
        }
        let mut nodes = granted.cloned().unwrap_or_default();
        nodes.insert(namesake);
        Holder::of(Some(&nodes))
    }

    /// Those to whom `host` or a network around it is granted.
    fn granted_to(&self, host: &Host) -> Option<&BTreeSet<NodeId>> {
        let exact = self.holders.get(&Identifier::Host(host.clone()));
        let network = || match host {
            Host::Ip(address) if self.unread.is_none() => {
                self.networks_around((*address).into()).next().map(|(_, nodes)| nodes)
            }
            _ => None,
        };
        exact.or_else(network)
    }

    /// The networks that `network` is or lies in, the longest first, with those who have a right to each.
    pub(crate) fn networks_around(&self, network: IpNet) -> impl Iterator<Item = (IpNet, &BTreeSet<NodeId>)> {
        self.prefix_lengths.range(..=network.prefix_len()).rev().filter_map(move |length| {
            let around = IpNet::new(network.addr(), *length).ok()?.trunc();
            Some((around, self.holders.get(&Identifier::Network(around))?))
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
    fn what_is_contested_reaches_neither() {
        let mut table = grants(&[("wide", "10.1.0.0/16"), ("near", "10.1.2.0/24")]);
        table.contest(node("wide"), "10.1.2.0/24".parse().unwrap());
        assert_eq!(holder(&table, "10.1.2.3"), Holder::Several(vec![node("near"), node("wide")]));
        assert_eq!(holder(&table, "10.1.3.3"), Holder::One(node("wide")));
        assert_eq!(table.of(&node("wide")).count(), 1);
    }

    #[test]
    fn only_exact_grants_count_while_nodes_are_to_come() {
        let all = grants(&[("any", "default-route"), ("wide", "10.0.0.0/8"), ("exact", "10.1.2.3")]);
        let early = all.without_nodes_yet("why".to_owned());
        assert_eq!(holder(&early, "10.1.2.3"), Holder::One(node("exact")));
        assert_eq!(holder(&early, "10.1.2.4"), Holder::None);
        assert_eq!(holder(&early, "name"), Holder::None);
        assert!(early.knows(&node("wide")));
    }

    #[test]
    fn a_node_that_is_named_like_an_address_serves_it_if_nobody_else_may() {
        let all = grants(&[
            ("a", "10.0.0.1"),
            ("10.0.0.2", "10.0.0.2"),
            ("10.0.0.3", "10.0.0.3"),
            ("b", "10.0.0.3"),
            ("c", "10.9.0.0/16"),
            ("10.9.0.2", "10.9.0.2"),
            ("any", "default-route"),
        ]);
        let early = all.clone().without_nodes_yet("why".to_owned());
        let beside = |table: &Grants, name: &str| table.holder_beside(&name.parse().unwrap(), node(name));
        let both = |other: &str, name: &str| Holder::Several(vec![node(name), node(other)]);
        for (name, expected) in [
            ("10.0.0.1", both("a", "10.0.0.1")),
            ("10.0.0.2", Holder::One(node("10.0.0.2"))),
            ("10.0.0.3", both("b", "10.0.0.3")),
        ] {
            assert_eq!((beside(&all, name), beside(&early, name)), (expected.clone(), expected), "{name}");
        }
        assert_eq!(beside(&all, "10.9.0.1"), both("c", "10.9.0.1"));
        assert_eq!(beside(&all, "10.9.0.2"), Holder::One(node("10.9.0.2")));
        assert_eq!(beside(&all, "10.0.0.4"), Holder::One(node("10.0.0.4")));
        // A node that is still to come may hold it.
        assert_eq!(beside(&early, "10.0.0.4"), Holder::None);
    }

    #[test]
    fn a_table_that_says_the_same_wakes_nobody() {
        let shared = SharedGrants::new(grants(&[("a", "10.0.0.1")]));
        let waiting = shared.subscribe();
        assert!(!shared.replace(grants(&[("a", "10.0.0.1")])) && !waiting.has_changed().unwrap());
        assert!(shared.replace(grants(&[("b", "10.0.0.1")])) && waiting.has_changed().unwrap());
        assert_eq!(holder(&shared.load(), "10.0.0.1"), Holder::One(node("b")));
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
