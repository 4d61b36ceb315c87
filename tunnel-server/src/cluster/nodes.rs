//! From the cluster's Node objects to grants, without I/O: what a node is granted, and what it is not although it says
//! so. Called by the watch next door.
//!
//! The addresses in a node's status are written by its own kubelet, so each is a claim, and a node that was taken over
//! claims what it likes; so is a pod network, where no controller assigns them. A claim must never draw a stream that is
//! meant for another node: where the configuration speaks against it, it is dropped; where the claims of two nodes meet,
//! or one is another's name, routing refuses and names both. So a bad node can make an address unusable, but never its
//! own. Names in a status count for nothing, since no claim of another would speak against that of a Service's name.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
};

use ipnet::IpNet;
use k8s_openapi::{ClusterResourceScope, apimachinery::pkg::apis::meta::v1::ObjectMeta};
use kube::{Resource, runtime::watcher::Event};
use serde::Deserialize;
use tunnel_core::{Host, NodeId};

use crate::grants::{Grants, Identifier};

/// Addresses and pod networks of one node that are heeded. A real node has a handful; the list must fit in one message
/// to its edge.
const MAX_OF_NODE: usize = 64;
/// What means something else at every machine is nobody's: this host, this link, all hosts.
const NOBODYS: [IpNet; 9] = [
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::UNSPECIFIED), 32),
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::LOCALHOST), 8),
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(169, 254, 0, 0)), 16),
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::new(224, 0, 0, 0)), 4),
    IpNet::new_assert(IpAddr::V4(Ipv4Addr::BROADCAST), 32),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::UNSPECIFIED), 128),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::LOCALHOST), 128),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 0)), 10),
    IpNet::new_assert(IpAddr::V6(Ipv6Addr::new(0xff00, 0, 0, 0, 0, 0, 0, 0)), 8),
];
/// A network with a shorter prefix is no node's pod network, but next to a default route.
const MIN_PREFIX: u8 = 8;

/// What is needed of a Kubernetes Node; its other fields are not even parsed.
#[derive(Clone, Debug, Default, Deserialize)]
pub(super) struct Node {
    #[serde(default)]
    metadata: ObjectMeta,
    #[serde(default)]
    spec: Spec,
    #[serde(default)]
    status: Status,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Spec {
    #[serde(rename = "podCIDR")]
    pod_cidr: Option<String>,
    #[serde(rename = "podCIDRs")]
    pod_cidrs: Option<Vec<String>>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Status {
    addresses: Option<Vec<Address>>,
    daemon_endpoints: Option<DaemonEndpoints>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct DaemonEndpoints {
    kubelet_endpoint: Option<DaemonEndpoint>,
}

#[derive(Clone, Debug, Default, Deserialize)]
struct DaemonEndpoint {
    /// Kubernetes writes this one with a capital. Any number may stand there.
    #[serde(rename = "Port", default)]
    port: i64,
}

/// An address or a host name. Its type is not looked at: a `Hostname` may well be an address.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(default)]
struct Address {
    address: String,
}

impl Resource for Node {
    type DynamicType = ();
    type Scope = ClusterResourceScope;

    fn kind((): &()) -> Cow<'_, str> {
        "Node".into()
    }

    fn group((): &()) -> Cow<'_, str> {
        "".into()
    }

    fn version((): &()) -> Cow<'_, str> {
        "v1".into()
    }

    fn plural((): &()) -> Cow<'_, str> {
        "nodes".into()
    }

    fn meta(&self) -> &ObjectMeta {
        &self.metadata
    }

    fn meta_mut(&mut self) -> &mut ObjectMeta {
        &mut self.metadata
    }
}

/// What was not granted, and why.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, thiserror::Error)]
pub(super) enum Dropped {
    #[error("a node is called {0:?}, which no edge can prove to be: it is left out")]
    Name(String),
    #[error("node {node} claims {claim:?}, which is nothing that a node can serve: not granted")]
    Unusable { node: String, claim: String },
    #[error("node {node} claims more than {MAX_OF_NODE} addresses or networks: the others are not granted")]
    TooMany { node: String },
    #[error("node {node} claims {claim}, but the configuration grants {granted} to {to}: not granted")]
    Configured { node: NodeId, claim: Identifier, granted: Identifier, to: NodeId },
    #[error(
        "node {node} claims {claim}, which is in the pod network {network} of {of}: requests to it are refused"
    )]
    PodNetwork { node: NodeId, claim: Identifier, network: IpNet, of: NodeId },
    #[error("node {node} claims {claim}, which is the name of another node: requests to it are refused")]
    OthersName { node: NodeId, claim: Identifier, of: NodeId },
    #[error(
        "the pod network {network} of node {node} lies in the pod network {around} of {of}: requests to it are refused"
    )]
    Nested { node: NodeId, network: IpNet, around: IpNet, of: NodeId },
}

/// What a node claims, as far as it is sane by itself.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Claims {
    addresses: BTreeSet<IpAddr>,
    networks: BTreeSet<IpNet>,
    kubelet_port: Option<u16>,
    dropped: BTreeSet<Dropped>,
}

/// All nodes, kept up to date by the watch's events.
#[derive(Debug, Default)]
pub(super) struct Nodes {
    known: BTreeMap<String, Claims>,
    /// A list that is not complete. What was known before stays in force until it is.
    listing: BTreeMap<String, Claims>,
}

impl Nodes {
    /// Takes in an event: whether anything has changed that grants depend on.
    pub(super) fn apply(&mut self, event: Event<Node>) -> bool {
        match event {
            Event::Init => {
                self.listing.clear();
                false
            }
            Event::InitApply(node) => {
                let (name, claims) = read(node);
                self.listing.insert(name, claims);
                false
            }
            Event::InitDone => {
                let listed = std::mem::take(&mut self.listing);
                let changed = listed != self.known;
                self.known = listed;
                changed
            }
            Event::Apply(node) => {
                let (name, claims) = read(node);
                let changed = self.known.get(&name) != Some(&claims);
                self.known.insert(name, claims);
                changed
            }
            Event::Delete(node) => self.known.remove(&read(node).0).is_some(),
        }
    }

    /// How many there are.
    pub(super) fn count(&self) -> usize {
        self.known.len()
    }

    /// The table of what is configured and of what these nodes are granted, and what they are not.
    pub(super) fn grants(&self, configured: &Grants) -> (Grants, BTreeSet<Dropped>) {
        let mut dropped: BTreeSet<Dropped> =
            self.known.values().flat_map(|claims| claims.dropped.iter().cloned()).collect();
        let mut nodes = BTreeMap::new();
        for (name, claims) in &self.known {
            match name.parse::<NodeId>() {
                Ok(node) => _ = nodes.insert(node, claims),
                Err(_) => _ = dropped.insert(Dropped::Name(name.chars().take(80).collect())),
            }
        }
        let mut table = configured.clone();
        for (node, claims) in &nodes {
            table.add_node(node.clone());
            if let Some(port) = claims.kubelet_port {
                table.set_kubelet_port(node.clone(), port);
            }
            // A name that is an address is a right to it: routing must see it beside the claims of others.
            if let Ok(host @ Host::Ip(_)) = node.as_str().parse() {
                table.contest(node.clone(), Identifier::Host(host));
            }
        }
        let networks = pod_networks(&nodes, configured, &mut dropped);
        grant_networks(&mut table, &networks, &mut dropped);
        for (node, claims) in &nodes {
            for address in &claims.addresses {
                match objection(node, *address, configured, &networks, &table) {
                    Some(objection) => {
                        if let Dropped::PodNetwork { claim, of, .. } | Dropped::OthersName { claim, of, .. } =
                            &objection
                        {
                            table.contest(node.clone(), claim.clone());
                            table.contest(of.clone(), claim.clone());
                        }
                        dropped.insert(objection);
                    }
                    // Its own name is a node's without being granted.
                    None if address.to_string() == node.as_str() => {}
                    None => table.grant(node.clone(), Identifier::Host(Host::Ip(*address))),
                }
            }
        }
        (table, dropped)
    }
}

fn read(node: Node) -> (String, Claims) {
    let name = node.metadata.name.unwrap_or_default();
    let mut claims = Claims::default();
    let unusable = |claim: &str| {
        let (node, claim) = (name.chars().take(80).collect(), claim.chars().take(80).collect());
        Dropped::Unusable { node, claim }
    };
    let kubelet = node.status.daemon_endpoints.and_then(|endpoints| endpoints.kubelet_endpoint);
    let port = kubelet.and_then(|kubelet| u16::try_from(kubelet.port).ok());
    claims.kubelet_port = port.filter(|port| *port != 0);
    let addresses = node.status.addresses.unwrap_or_default();
    let networks = node.spec.pod_cidrs.filter(|cidrs| !cidrs.is_empty());
    let networks = networks.unwrap_or_else(|| node.spec.pod_cidr.into_iter().collect());
    if addresses.len() > MAX_OF_NODE || networks.len() > MAX_OF_NODE {
        claims.dropped.insert(Dropped::TooMany { node: name.chars().take(80).collect() });
    }
    for Address { address } in addresses.into_iter().take(MAX_OF_NODE) {
        match address.parse() {
            Ok(Host::Ip(address)) if is_ones_own(address.into()) => _ = claims.addresses.insert(address),
            Ok(Host::Ip(_)) => _ = claims.dropped.insert(unusable(&address)),
            // Every node has a host name beside its addresses: no reason to warn.
            Ok(Host::Name(_)) | Err(_) => {}
        }
    }
    for network in networks.into_iter().filter(|network| !network.is_empty()).take(MAX_OF_NODE) {
        match network.parse::<IpNet>().ok().map(|network| network.trunc()).filter(is_pod_network) {
            Some(network) => _ = claims.networks.insert(network),
            None => _ = claims.dropped.insert(unusable(&network)),
        }
    }
    (name, claims)
}

fn is_ones_own(network: IpNet) -> bool {
    !NOBODYS.iter().any(|nobodys| nobodys.contains(&network) || network.contains(nobodys))
}

fn is_pod_network(network: &IpNet) -> bool {
    // IPv4 addresses in IPv6 clothes would be matched as IPv4, which this network then is not.
    let mapped = matches!(network, IpNet::V6(six) if six.addr().to_ipv4_mapped().is_some());
    network.prefix_len() >= MIN_PREFIX && is_ones_own(*network) && !mapped
}

/// The nodes' pod networks, but for those in a network that the configuration grants to another: that is the operator's
/// explicit will, and the longer prefix would win against it.
fn pod_networks(
    nodes: &BTreeMap<NodeId, &Claims>,
    configured: &Grants,
    dropped: &mut BTreeSet<Dropped>,
) -> Grants {
    let mut networks = Grants::default();
    for (node, claims) in nodes {
        for network in &claims.networks {
            let claim = Identifier::Network(*network);
            match configured_around(node, &claim, *network, configured) {
                Some(objection) => _ = dropped.insert(objection),
                None => networks.grant(node.clone(), claim),
            }
        }
    }
    networks
}

/// Grants the pod networks. Of two that overlap one lies in the other, and nothing tells which of both nodes is wrong:
/// the longer prefix must not win, or a node could take a part of another's pods. So both have a right to the inner
/// one, which makes routing refuse it and name both, as it does when they are the same. The rest of the outer one
/// stays with its node.
fn grant_networks(table: &mut Grants, networks: &Grants, dropped: &mut BTreeSet<Dropped>) {
    for node in networks.nodes() {
        for identifier in networks.of(node) {
            table.grant(node.clone(), identifier.clone());
            let Identifier::Network(network) = identifier else { continue };
            for (around, holders) in networks.networks_around(*network) {
                for of in holders.iter().filter(|holder| *holder != node) {
                    table.contest(of.clone(), identifier.clone());
                    if around != *network {
                        let (node, of) = (node.clone(), of.clone());
                        dropped.insert(Dropped::Nested { node, network: *network, around, of });
                    }
                }
            }
        }
    }
}

/// Why a node is not granted an address that it claims. `table` knows all nodes.
fn objection(
    node: &NodeId,
    address: IpAddr,
    configured: &Grants,
    networks: &Grants,
    table: &Grants,
) -> Option<Dropped> {
    let claim = Identifier::Host(Host::Ip(address));
    // Node names can look like addresses.
    if let Ok(of) = address.to_string().parse()
        && of != *node
        && table.knows(&of)
    {
        return Some(Dropped::OthersName { node: node.clone(), claim, of });
    }
    if let Some(to) = another(node, configured.holders(&claim)) {
        let (node, granted) = (node.clone(), claim.clone());
        return Some(Dropped::Configured { node, claim, granted, to });
    }
    let address = IpNet::from(address);
    if let Some(objection) = configured_around(node, &claim, address, configured) {
        return Some(objection);
    }
    // An exact address would win over the network, and take a pod of another node; the network alone would take the
    // address of this one, if it is the network that is a lie.
    networks.networks_around(address).find_map(|(network, holders)| {
        let of = holders.iter().find(|holder| *holder != node)?.clone();
        Some(Dropped::PodNetwork { node: node.clone(), claim: claim.clone(), network, of })
    })
}

/// The objection that `network` lies in one that the configuration grants to another node and not to this one.
fn configured_around(
    node: &NodeId,
    claim: &Identifier,
    network: IpNet,
    configured: &Grants,
) -> Option<Dropped> {
    configured.networks_around(network).find_map(|(around, holders)| {
        let to = another(node, holders)?;
        let (node, claim) = (node.clone(), claim.clone());
        Some(Dropped::Configured { node, claim, granted: Identifier::Network(around), to })
    })
}

/// A holder, if `node` is none of them.
fn another<'a>(node: &NodeId, holders: impl IntoIterator<Item = &'a NodeId>) -> Option<NodeId> {
    let mut holders = holders.into_iter().peekable();
    let first = holders.peek().copied();
    if holders.any(|holder| holder == node) { None } else { first.cloned() }
}

#[cfg(test)]
mod tests;
