//! What this edge dials: only what its own rules allow, whatever a gateway asks for.
//!
//! The stream side asks [`Policy::permit`] and gets a [`Permit`], which dialing requires and nothing else can make.
//! Names are matched as names and addresses as addresses: a name is never resolved here, so that an address rule cannot
//! be met by whatever a resolver says.

use std::{fmt, net::IpAddr, ops::RangeInclusive, str::FromStr};

use ipnet::IpNet;
use tunnel_core::{Host, Target};

use crate::daemon::settings::Parse;

/// One thing that may be dialed, written `HOST:PORT`.
///
/// ```
/// # use tunnel_edge::policy::Rule;
/// for text in ["node:10250", "db.local:5432", "10.0.0.7:*", "10.0.0.0/8:8000-8100", "*.svc.local:443", "[fd00::/8]:22"] {
///     assert_eq!(text.parse::<Rule>()?.to_string(), text);
/// }
/// # Ok::<(), tunnel_edge::policy::RuleError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Rule {
    hosts: Hosts,
    ports: RangeInclusive<u16>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Hosts {
    /// This node, by any of its own names.
    Node,
    /// One name or address.
    One(Host),
    /// Every address of a network.
    Network(IpNet),
    /// Every name that ends so; kept with its leading dot.
    Suffix(String),
}

/// Why a text is not a [`Rule`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RuleError {
    /// The part after the last colon.
    #[error("the port of rule {0:?} must be a number from 1 to 65535, a range such as 8000-8100, or *")]
    Port(String),
    /// The part before it.
    #[error(
        "the host of rule {0:?} must be node (this node), a name, *.SUFFIX, an address or a CIDR; IPv6 in brackets"
    )]
    Host(String),
    /// A network whose address has bits beyond its prefix, which is most often a slip.
    #[error("the network of rule {rule:?} has bits set beyond its prefix: did you mean {network}?")]
    HostBits {
        /// The rule.
        rule: String,
        /// Its network.
        network: IpNet,
    },
    /// Every host at once is not offered.
    #[error(
        "rule {0:?} would allow every host: write 0.0.0.0/0 or [::/0] for all addresses, or *.SUFFIX for names"
    )]
    Everything(String),
}

const ALL_PORTS: RangeInclusive<u16> = 1..=u16::MAX;

impl FromStr for Rule {
    type Err = RuleError;

    fn from_str(text: &str) -> Result<Self, RuleError> {
        let (host, port) = text.rsplit_once(':').ok_or_else(|| RuleError::Port(text.to_owned()))?;
        let ports = parse_ports(port).ok_or_else(|| RuleError::Port(text.to_owned()))?;
        Ok(Self { hosts: parse_hosts(host, text)?, ports })
    }
}

fn parse_ports(text: &str) -> Option<RangeInclusive<u16>> {
    if text == "*" {
        return Some(ALL_PORTS);
    }
    let number = |text: &str| text.parse::<u16>().ok().filter(|port| *port != 0 && !text.starts_with('+'));
    let (first, last) = text.split_once('-').unwrap_or((text, text));
    let (first, last) = (number(first)?, number(last)?);
    (first <= last).then_some(first..=last)
}

fn parse_hosts(text: &str, rule: &str) -> Result<Hosts, RuleError> {
    let bad_host = || RuleError::Host(rule.to_owned());
    if text == "node" {
        return Ok(Hosts::Node);
    }
    if text == "*" {
        return Err(RuleError::Everything(rule.to_owned()));
    }
    if let Some(suffix) = text.strip_prefix("*.") {
        return match suffix.parse() {
            Ok(Host::Name(name)) => Ok(Hosts::Suffix(format!(".{name}"))),
            _ => Err(bad_host()),
        };
    }
    if text.contains('/') {
        let inner = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']'));
        let network: IpNet = inner.unwrap_or(text).parse().map_err(|_| bad_host())?;
        if inner.is_some() != matches!(network, IpNet::V6(_)) {
            return Err(bad_host());
        }
        if network.trunc() != network {
            return Err(RuleError::HostBits { rule: rule.to_owned(), network: network.trunc() });
        }
        return Ok(Hosts::Network(network));
    }
    if text.contains(':') && !text.starts_with('[') {
        return Err(bad_host());
    }
    text.parse().map(Hosts::One).map_err(|_| bad_host())
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.hosts {
            Hosts::Node => f.write_str("node")?,
            Hosts::One(host) => host.fmt(f)?,
            Hosts::Network(IpNet::V4(network)) => network.fmt(f)?,
            Hosts::Network(IpNet::V6(network)) => write!(f, "[{network}]")?,
            Hosts::Suffix(suffix) => write!(f, "*{suffix}")?,
        }
        let (first, last) = (self.ports.start(), self.ports.end());
        match () {
            () if self.ports == ALL_PORTS => f.write_str(":*"),
            () if first == last => write!(f, ":{first}"),
            () => write!(f, ":{first}-{last}"),
        }
    }
}

impl Parse for Rule {
    const PLACEHOLDER: &'static str = "HOST:PORT";
    const EXPECTED: &'static str = "a rule such as node:10250, 10.0.0.0/8:443 or *.svc.local:8000-8100";

    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|error: RuleError| error.to_string())
    }
}

impl Rule {
    /// The port of the kubelet on this node.
    pub fn node_port(port: u16) -> Self {
        Self { hosts: Hosts::Node, ports: port..=port }
    }

    fn allows(&self, target: &Target, is_node: bool) -> bool {
        let host = match (&self.hosts, &target.host) {
            (Hosts::Node, _) => is_node,
            (Hosts::One(one), host) => one == host,
            (Hosts::Network(network), Host::Ip(address)) => network.contains(address),
            (Hosts::Suffix(suffix), Host::Name(name)) => {
                name.len() > suffix.len() && name.ends_with(suffix.as_str())
            }
            (Hosts::Network(_), Host::Name(_)) | (Hosts::Suffix(_), Host::Ip(_)) => false,
        };
        host && self.ports.contains(&target.port)
    }
}

/// All rules of this edge. What no rule allows is denied.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Policy {
    rules: Vec<Rule>,
    /// Where this node itself is dialed.
    node_address: IpAddr,
}

/// A target that the policy has allowed, with where to dial it. Only [`Policy::permit`] makes one.
#[derive(Clone, Debug, PartialEq, Eq)]
#[must_use = "a permit is there to dial with"]
pub struct Permit {
    destination: Target,
    rule: Rule,
}

impl Permit {
    /// Where to dial: the target, or the node's own address if the target names this node.
    pub fn destination(&self) -> &Target {
        &self.destination
    }

    /// The rule that allowed it, for the log.
    pub fn rule(&self) -> &Rule {
        &self.rule
    }
}

/// A target that no rule allows.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "this edge's policy does not allow {target}: if it should, add a rule such as \"{suggestion}\" to `allow` in the edge's settings"
)]
pub struct Denied {
    target: Target,
    suggestion: String,
}

impl Policy {
    /// A policy of these rules. A target that names this node is dialed at `node_address`.
    pub fn new(rules: Vec<Rule>, node_address: IpAddr) -> Self {
        Self { rules, node_address }
    }

    /// The rules in their order.
    pub fn rules(&self) -> &[Rule] {
        &self.rules
    }

    /// Whether `target` may be dialed. `own_names` are the names and addresses that mean this node: its node id, and
    /// what gateways have granted to it.
    pub fn permit(&self, target: &Target, own_names: &[Host]) -> Result<Permit, Denied> {
        let is_node = own_names.contains(&target.host);
        let Some(rule) = self.rules.iter().find(|rule| rule.allows(target, is_node)) else {
            let suggestion =
                if is_node { Rule::node_port(target.port).to_string() } else { target.to_string() };
            return Err(Denied { target: target.clone(), suggestion });
        };
        let host = if is_node { Host::Ip(self.node_address) } else { target.host.clone() };
        Ok(Permit { destination: Target { host, port: target.port }, rule: rule.clone() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn policy(rules: &[&str]) -> Policy {
        Policy::new(rules.iter().map(|rule| rule.parse().unwrap()).collect(), [127, 0, 0, 1].into())
    }

    fn permit(rules: &[&str], target: &str) -> Result<String, Denied> {
        let own_names = ["edge-a", "192.168.1.5"].map(|name| name.parse().unwrap());
        policy(rules)
            .permit(&target.parse().unwrap(), &own_names)
            .map(|permit| permit.destination().to_string())
    }

    #[test]
    fn the_node_is_dialed_at_its_local_address_by_any_of_its_names() {
        for target in ["edge-a:10250", "EDGE-A.:10250", "192.168.1.5:10250"] {
            assert_eq!(permit(&["node:10250"], target).unwrap(), "127.0.0.1:10250", "{target}");
        }
    }

    #[test]
    fn the_node_rule_allows_nothing_else() {
        for target in
            ["edge-a:22", "edge-b:10250", "127.0.0.1:10250", "localhost:10250", "node:10250", "[::1]:10250"]
        {
            assert!(permit(&["node:10250"], target).is_err(), "{target}");
        }
    }

    #[test]
    fn no_rules_allow_nothing() {
        assert!(permit(&[], "edge-a:10250").is_err());
    }

    #[test]
    fn each_form_allows_what_it_says() {
        for (rule, allowed, denied) in [
            ("db.local:5432", "DB.local.:5432", "xdb.local:5432"),
            ("10.0.0.7:*", "10.0.0.7:1", "10.0.0.8:1"),
            ("10.0.0.7:22", "[::ffff:10.0.0.7]:22", "10.0.0.7:23"),
            ("10.0.0.0/8:443", "10.255.0.1:443", "11.0.0.1:443"),
            ("0.0.0.0/0:443", "8.8.8.8:443", "dns.google:443"),
            ("[fd00::/8]:22", "[fd00::1]:22", "[fe80::1]:22"),
            ("[::1]:22", "[::1]:22", "127.0.0.1:22"),
            ("*.svc.local:443", "a.b.svc.local:443", "svc.local:443"),
            ("*.svc.local:443", "a.svc.local:443", "evilsvc.local:443"),
            ("db.local:8000-8100", "db.local:8100", "db.local:8101"),
            ("db.local:8000-8100", "db.local:8000", "db.local:7999"),
        ] {
            assert!(permit(&[rule], allowed).is_ok(), "{rule} should allow {allowed}");
            assert!(permit(&[rule], denied).is_err(), "{rule} should deny {denied}");
        }
    }

    #[test]
    fn a_rule_for_the_nodes_own_name_dials_the_node_and_no_resolver() {
        assert_eq!(permit(&["edge-a:22"], "edge-a:22").unwrap(), "127.0.0.1:22");
    }

    #[test]
    fn bad_rules_say_what_to_write() {
        for (rule, says) in [
            ("node", "must be a number from 1 to 65535"),
            ("node:0", "must be a number"),
            ("node:70000", "must be a number"),
            ("node:9-8", "must be a number"),
            ("node:+1", "must be a number"),
            ("*:443", "would allow every host"),
            ("10.0.0.1/8:443", "did you mean 10.0.0.0/8?"),
            ("fd00::/8:443", "IPv6 in brackets"),
            ("::1:443", "IPv6 in brackets"),
            ("*.10.0.0.1:443", "must be node"),
            ("a_b c:443", "must be node"),
            (":443", "must be node"),
        ] {
            let error = rule.parse::<Rule>().unwrap_err().to_string();
            assert!(error.contains(says), "{rule}: {error}");
        }
    }

    #[test]
    fn a_denial_says_what_to_add() {
        let denied = permit(&["node:10250"], "edge-a:22").unwrap_err().to_string();
        assert!(denied.contains("does not allow edge-a:22") && denied.contains("\"node:22\""), "{denied}");
    }
}
