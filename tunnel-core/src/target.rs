//! Targets: the `host:port` that a stream's far end dials. Parsed once, at the door.

use std::{
    fmt,
    net::{IpAddr, Ipv6Addr, SocketAddr},
    str::FromStr,
};

/// The host part of a [`Target`]: an IP address, or a name in lower case.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Host {
    /// An address literal. IPv4-mapped IPv6 addresses are kept as IPv4.
    Ip(IpAddr),
    /// A DNS name or a node id, lower case, without a trailing dot.
    Name(String),
}

/// What a stream's far end is asked to dial.
///
/// ```
/// # use tunnel_core::Target;
/// let target: Target = "edge-a:10250".parse()?;
/// assert_eq!(target.port, 10250);
/// assert_eq!("[::1]:22".parse::<Target>()?.to_string(), "[::1]:22");
/// # Ok::<(), tunnel_core::TargetError>(())
/// ```
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Target {
    /// Where to.
    pub host: Host,
    /// TCP port, never 0.
    pub port: u16,
}

/// Why a text is not a `host:port`.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TargetError {
    /// There is no `:port` at the end.
    #[error("{0:?} has no port: give host:port, not a URL")]
    NoPort(String),
    /// What is behind the last colon is not a number from 1 to 65535.
    #[error("{0:?} is not host:port: the port must be a number from 1 to 65535")]
    Port(String),
    /// The part before the port is neither a name nor an address.
    #[error("{0:?} is neither a host name, a node name, an IPv4 address nor an [IPv6 address]")]
    Host(String),
}

/// Longest text kept of a bad target in an error.
const QUOTED: usize = 80;

fn quote(text: &str) -> String {
    text.chars().take(QUOTED).collect()
}

impl FromStr for Host {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        if let Some(inner) = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            let address: Ipv6Addr = inner.parse().map_err(|_| TargetError::Host(quote(text)))?;
            return Ok(Self::Ip(IpAddr::V6(address).to_canonical()));
        }
        if let Ok(address) = text.parse::<IpAddr>() {
            return Ok(Self::Ip(address.to_canonical()));
        }
        let name = text.strip_suffix('.').unwrap_or(text).to_ascii_lowercase();
        if is_dns_name(&name) { Ok(Self::Name(name)) } else { Err(TargetError::Host(quote(text))) }
    }
}

/// A DNS name as Kubernetes and resolvers accept it: labels of letters, digits, `-` and `_`, at most 253 bytes.
/// A last label of digits only is refused, since resolvers would read such a name as an address.
fn is_dns_name(name: &str) -> bool {
    let label_ok = |label: &str| {
        (1..=63).contains(&label.len())
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-' || byte == b'_')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    let last_label_is_a_number = name.contains('.')
        && name.rsplit('.').next().is_some_and(|last| last.bytes().all(|b| b.is_ascii_digit()));
    name.len() <= 253 && name.split('.').all(label_ok) && !last_label_is_a_number
}

impl FromStr for Target {
    type Err = TargetError;

    fn from_str(text: &str) -> Result<Self, TargetError> {
        let (host, port) = text
            .rsplit_once(':')
            .filter(|_| !text.contains("//"))
            .ok_or_else(|| TargetError::NoPort(quote(text)))?;
        let all_digits = !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit());
        let port = match port.parse::<u16>() {
            Ok(port) if port != 0 && all_digits => port,
            _ => return Err(TargetError::Port(quote(text))),
        };
        if host.contains(':') && !host.starts_with('[') {
            return Err(TargetError::Host(quote(host)));
        }
        Ok(Self { host: host.parse()?, port })
    }
}

impl From<SocketAddr> for Target {
    fn from(address: SocketAddr) -> Self {
        Self { host: Host::Ip(address.ip().to_canonical()), port: address.port() }
    }
}

impl fmt::Display for Host {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Ip(IpAddr::V4(address)) => address.fmt(f),
            Self::Ip(IpAddr::V6(address)) => write!(f, "[{address}]"),
            Self::Name(name) => f.write_str(name),
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.host, self.port)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn accepts_names_and_addresses() {
        for (text, shown) in [
            ("edge-a:10250", "edge-a:10250"),
            ("EDGE-A.Example.:1", "edge-a.example:1"),
            ("10.0.0.1:443", "10.0.0.1:443"),
            ("[2001:DB8::1]:443", "[2001:db8::1]:443"),
            ("[::ffff:10.0.0.1]:443", "10.0.0.1:443"),
            ("node_1:65535", "node_1:65535"),
        ] {
            assert_eq!(text.parse::<Target>().unwrap().to_string(), shown);
        }
    }

    #[test]
    fn refuses_what_is_not_host_and_port() {
        for text in [
            "",
            ":",
            "a",
            "a:",
            ":1",
            "a:0",
            "a:65536",
            "a:+1",
            "a:1x",
            "::1:22",
            "[::1]",
            "[::1:22",
            "a b:1",
            "-a:1",
            "a-:1",
            "a..b:1",
            "1.2.3:4",
            "1.2.3.400:4",
            "[fe80::1%eth0]:1",
            "http://a:1",
            "a/b:1",
            "ü:1",
        ] {
            assert!(text.parse::<Target>().is_err(), "{text:?} was accepted");
        }
    }

    proptest! {
        #[test]
        fn never_panics(text in ".*") {
            let _ = text.parse::<Target>();
        }

        #[test]
        fn round_trips(text in "([a-z0-9.-]{1,20}|\\[[0-9a-f:]{2,20}\\]):[0-9]{1,5}") {
            if let Ok(target) = text.parse::<Target>() {
                prop_assert_eq!(target.to_string().parse::<Target>().unwrap(), target);
            }
        }
    }
}
