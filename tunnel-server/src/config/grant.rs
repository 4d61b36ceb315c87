//! One entry of `grants`: what a node serves beside its own name, as a person writes it.

use std::{collections::BTreeMap, fmt::Display, net::IpAddr};

use ipnet::IpNet;
use tunnel_core::{Host, NodeId};
use tunnel_edge::daemon::settings::{
    Entry, Kind, List, Node, Parse, Place, Problems, Value, nearest, not_expected, parse_list,
};

use crate::grants::{Grants, Identifier};

/// A host name, and not an address.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostName(String);

impl Parse for HostName {
    const PLACEHOLDER: &'static str = "HOST";
    const EXPECTED: &'static str = "a host name (addresses have a key of their own)";

    fn parse(text: &str) -> Result<Self, String> {
        match text.parse() {
            Ok(Host::Name(name)) => Ok(Self(name)),
            _ => Err(not_expected::<Self>(text)),
        }
    }
}

/// What one node is granted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Grant {
    /// To whom.
    pub node: NodeId,
    /// Single addresses.
    pub addresses: Vec<IpAddr>,
    /// Networks.
    pub cidrs: Vec<IpNet>,
    /// Host names.
    pub hosts: Vec<HostName>,
    /// Whatever nobody else serves.
    pub default_route: bool,
}

/// Most bytes that the grants of one node may take as text: its edge is told of them in one message, which has to hold
/// what a cluster grants as well.
const MAX_OF_NODE: usize = 32 * 1024;

/// The keys of a grant in the file.
const KEYS: [&str; 5] = ["node", "addresses", "cidrs", "hosts", "default_route"];

impl Parse for Grant {
    const PLACEHOLDER: &'static str = "GRANT";
    const EXPECTED: &'static str = "a grant: node=NAME and any of address=ADDR, cidr=CIDR, host=NAME, default-route, with commas between";
    // Commas are within.
    const SEPARATOR: char = ';';

    fn parse(text: &str) -> Result<Self, String> {
        let (mut node, mut addresses, mut cidrs, mut hosts, mut default_route) =
            (None, vec![], vec![], vec![], false);
        for part in text.split(',') {
            match part.trim().split_once('=') {
                Some(("node", _)) if node.is_some() => {
                    return Err(format!("{text:?} names two nodes: use a grant for each"));
                }
                Some(("node", name)) => node = Some(NodeId::parse(name)?),
                Some(("address", address)) => addresses.push(IpAddr::parse(address)?.to_canonical()),
                Some(("cidr", cidr)) => cidrs.push(IpNet::parse(cidr)?),
                Some(("host", host)) => hosts.push(HostName::parse(host)?),
                None if part.trim() == "default-route" => default_route = true,
                _ => return Err(not_expected::<Self>(text)),
            }
        }
        let node = node.ok_or_else(|| not_expected::<Self>(text))?;
        Ok(Self { node, addresses, cidrs, hosts, default_route })
    }

    fn parse_node(node: &Node, key: &str, problems: &mut Problems) -> Option<Self> {
        match &node.kind {
            Kind::Text(text) => {
                Self::parse(text).map_err(|error| problems.add(node.place.clone(), key, error)).ok()
            }
            Kind::Map(entries) => from_mapping(entries, node, key, problems),
            other => {
                let text =
                    format!("{} is not a grant: a mapping with the keys {}", other.name(), KEYS.join(", "));
                problems.add(node.place.clone(), key, text);
                None
            }
        }
    }
}

fn from_mapping(entries: &[Entry], whole: &Node, key: &str, problems: &mut Problems) -> Option<Grant> {
    for entry in entries.iter().filter(|entry| !KEYS.contains(&entry.key.as_str())) {
        let hint = match nearest(&entry.key, &KEYS) {
            Some(near) => format!("unknown key; did you mean {near}?"),
            None => format!("unknown key; a grant has {}", KEYS.join(", ")),
        };
        problems.add(entry.place.clone(), format!("{key}.{}", entry.key), hint);
    }
    let get = |name: &str| {
        let entry = entries.iter().find(|entry| entry.key == name)?;
        (!matches!(entry.value.kind, Kind::Empty)).then_some(&entry.value)
    };
    let node = get("node").and_then(|node| NodeId::parse_node(node, &format!("{key}.node"), problems));
    if get("node").is_none() {
        problems.add(whole.place.clone(), format!("{key}.node"), "is not set: say whom the grant is for");
    }
    let addresses = list::<IpAddr>(get("addresses"), &format!("{key}.addresses"), problems);
    let cidrs = list::<IpNet>(get("cidrs"), &format!("{key}.cidrs"), problems);
    let hosts = list::<HostName>(get("hosts"), &format!("{key}.hosts"), problems);
    let default_route = match get("default_route") {
        Some(node) => bool::parse_node(node, &format!("{key}.default_route"), problems),
        None => Some(false),
    };
    let addresses = addresses?.into_iter().map(|address| address.to_canonical()).collect();
    Some(Grant { node: node?, addresses, cidrs: cidrs?, hosts: hosts?, default_route: default_route? })
}

fn list<T: Parse>(node: Option<&Node>, key: &str, problems: &mut Problems) -> Option<Vec<T>> {
    let Some(node) = node else { return Some(Vec::new()) };
    Some(parse_list(node, key, problems)?.into_iter().map(|(item, _)| item).collect())
}

/// Notes what two nodes cannot both have. The same address is no such thing: sites overlap, and the route of a stream
/// to it is refused by naming both.
pub(super) fn check(grants: &Value<List<Grant>>, problems: &mut Problems) {
    let key = grants.spec.key();
    let mut held: BTreeMap<String, (&NodeId, &Place)> = BTreeMap::new();
    for (grant, place) in &grants.value {
        let hosts = grant.hosts.iter().map(|host| format!("the host name {}", host.0));
        let cidrs = grant.cidrs.iter().map(|cidr| format!("the network {cidr}"));
        let default = grant.default_route.then(|| "the default route".to_owned());
        for what in hosts.chain(cidrs).chain(default) {
            match held.get(&what) {
                Some((other, there)) if **other != grant.node => {
                    problems.add(place.clone(), key.clone(), taken(&what, &grant.node, other, there));
                }
                Some(_) => {}
                None => {
                    held.insert(what, (&grant.node, place));
                }
            }
        }
    }
}

/// Notes nodes that are granted more than their edges can be told.
pub(super) fn check_sizes(grants: &Value<List<Grant>>, problems: &mut Problems) {
    let table = table(grants.value.clone());
    for node in table.nodes() {
        let size: usize = table.of(node).map(|identifier| identifier.to_string().len()).sum();
        let last = grants.value.iter().rfind(|(grant, _)| grant.node == *node);
        if let Some((_, place)) = last.filter(|_| size > MAX_OF_NODE) {
            problems.add(place.clone(), grants.spec.key(), too_much(node, size));
        }
    }
}

fn too_much(node: &NodeId, size: usize) -> String {
    format!(
        "the grants of {node} are {size} bytes long together, and its edge can be told {MAX_OF_NODE}: grant networks \
         instead of single addresses, or the default route"
    )
}

fn taken(what: &str, node: &NodeId, other: &NodeId, there: &impl Display) -> String {
    format!("{what} is granted to {node}, but {other} has it already ({there}): only one node can")
}

/// All grants as the table that routing asks.
pub(super) fn table(grants: List<Grant>) -> Grants {
    grants.into_iter().flat_map(|(grant, _)| identifiers(grant)).collect()
}

fn identifiers(grant: Grant) -> impl Iterator<Item = (NodeId, Identifier)> {
    let addresses = grant.addresses.into_iter().map(|address| Identifier::Host(Host::Ip(address)));
    let cidrs = grant.cidrs.into_iter().map(Identifier::Network);
    let hosts = grant.hosts.into_iter().map(|host| Identifier::Host(Host::Name(host.0)));
    let default = grant.default_route.then_some(Identifier::DefaultRoute);
    addresses.chain(cidrs).chain(hosts).chain(default).map(move |identifier| (grant.node.clone(), identifier))
}
