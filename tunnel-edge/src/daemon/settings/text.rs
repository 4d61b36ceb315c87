//! The types that a setting may have, each read from the text that a person writes.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    num::NonZeroUsize,
    path::PathBuf,
    time::Duration,
};

use ipnet::IpNet;
use rustls::pki_types::ServerName;
use tunnel_core::{GatewayId, Host, NodeId, Target};

use super::{Kind, List, Node, Problems};

/// A type that can be read from what a person wrote.
pub trait Parse: Sized {
    /// What stands for it in `--help`, in capitals.
    const PLACEHOLDER: &'static str;
    /// What was expected, for errors: goes on where "is not " ends.
    const EXPECTED: &'static str;
    /// What separates several of them in one text.
    const SEPARATOR: char = ',';

    /// Reads a text. The error is a full sentence without the place.
    fn parse(text: &str) -> Result<Self, String>;

    /// Reads a node; `None` if that fails, with a problem noted. Types that may also be a mapping do their own.
    fn parse_node(node: &Node, key: &str, problems: &mut Problems) -> Option<Self> {
        let parsed = match &node.kind {
            Kind::Text(text) => Self::parse(text),
            other => Err(format!("{} is not {}", other.name(), Self::EXPECTED)),
        };
        parsed.map_err(|text| problems.add(node.place.clone(), key, text)).ok()
    }
}

/// Reads a list; a list of one may be written without the brackets. All items that cannot be read are noted.
pub fn parse_list<T: Parse>(node: &Node, key: &str, problems: &mut Problems) -> Option<List<T>> {
    let items = match &node.kind {
        Kind::List(items) => items.as_slice(),
        _ => std::slice::from_ref(node),
    };
    let read = |item: &Node| Some((T::parse_node(item, key, problems)?, item.place.clone()));
    // Every item is read before the first failure ends it.
    items.iter().map(read).collect::<Vec<_>>().into_iter().collect()
}

/// The error for a text that is not what was expected.
pub fn not_expected<T: Parse>(text: &str) -> String {
    format!("{text:?} is not {}", T::EXPECTED)
}

macro_rules! parse_by_from_str {
    ($($type:ty: $placeholder:literal, $expected:literal;)*) => { $(
        impl Parse for $type {
            const PLACEHOLDER: &'static str = $placeholder;
            const EXPECTED: &'static str = $expected;

            fn parse(text: &str) -> Result<Self, String> {
                text.parse().map_err(|_| not_expected::<Self>(text))
            }
        }
    )* };
}

parse_by_from_str! {
    SocketAddr: "ADDR:PORT", "an IP address and port, such as 0.0.0.0:8443 or [::]:8443";
    IpAddr: "ADDR", "an IP address, such as 127.0.0.1 or ::1";
    u16: "N", "a number from 0 to 65535";
    u32: "N", "a whole number from 0 to 4294967295";
    usize: "N", "a whole number";
    bool: "BOOL", "true or false";
}

macro_rules! parse_by_own_error {
    ($($type:ty: $placeholder:literal, $expected:literal;)*) => { $(
        impl Parse for $type {
            const PLACEHOLDER: &'static str = $placeholder;
            const EXPECTED: &'static str = $expected;

            fn parse(text: &str) -> Result<Self, String> {
                text.parse::<Self>().map_err(|error| error.to_string())
            }
        }
    )* };
}

parse_by_own_error! {
    NodeId: "NODE", "a node name";
    GatewayId: "NAME", "a gateway id";
    Target: "HOST:PORT", "a host and port, such as gateway.example:8443";
    Host: "HOST", "a host name or an IP address";
}

impl Parse for IpNet {
    const PLACEHOLDER: &'static str = "CIDR";
    const EXPECTED: &'static str = "a network, such as 10.0.0.0/8 or fd00::/8";

    fn parse(text: &str) -> Result<Self, String> {
        let network: Self = text.parse().map_err(|_| not_expected::<Self>(text))?;
        // Bits beyond the prefix are most often a slip in one or the other.
        match network.trunc() {
            whole if whole == network => Ok(network),
            whole => Err(format!("{text:?} has bits set beyond its prefix: did you mean {whole}?")),
        }
    }
}

impl Parse for ServerName<'static> {
    const PLACEHOLDER: &'static str = "NAME";
    const EXPECTED: &'static str = "a DNS name or an IP address";

    fn parse(text: &str) -> Result<Self, String> {
        Self::try_from(text.to_owned()).map_err(|_| not_expected::<Self>(text))
    }
}

impl Parse for PathBuf {
    const PLACEHOLDER: &'static str = "PATH";
    const EXPECTED: &'static str = "a path";

    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Err("is empty: give a path".to_owned()) } else { Ok(text.into()) }
    }
}

impl Parse for Duration {
    const PLACEHOLDER: &'static str = "DURATION";
    const EXPECTED: &'static str = "a duration with its unit, such as 500ms, 10s or 1m30s";

    fn parse(text: &str) -> Result<Self, String> {
        humantime::parse_duration(text).map_err(|_| not_expected::<Self>(text))
    }
}

/// A number of bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Size(pub usize);

const UNITS: [(&str, usize); 6] =
    [("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10), ("Gi", 1 << 30), ("Mi", 1 << 20), ("Ki", 1 << 10)];

impl Parse for Size {
    const PLACEHOLDER: &'static str = "SIZE";
    const EXPECTED: &'static str = "a size, such as 65536, 64KiB, 1MiB or 1GiB";

    fn parse(text: &str) -> Result<Self, String> {
        let (number, unit) = UNITS
            .iter()
            .find_map(|(unit, bytes)| Some((text.strip_suffix(unit)?.trim_end(), *bytes)))
            .unwrap_or((text, 1));
        let number: Option<usize> = number.parse().ok();
        number.and_then(|number| number.checked_mul(unit)).map(Self).ok_or_else(|| not_expected::<Self>(text))
    }
}

impl fmt::Display for Size {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let exact = UNITS[..3].iter().find(|(_, bytes)| self.0 >= *bytes && self.0.is_multiple_of(*bytes));
        match exact {
            Some((unit, bytes)) => write!(f, "{}{unit}", self.0 / bytes),
            None => write!(f, "{}", self.0),
        }
    }
}

/// A value that the word `none` turns off.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd)]
pub enum OrNone<T> {
    /// Turned off.
    None,
    /// The value.
    Some(T),
}

impl<T> OrNone<T> {
    /// As an option.
    pub fn into_option(self) -> Option<T> {
        match self {
            Self::None => None,
            Self::Some(value) => Some(value),
        }
    }
}

impl Parse for OrNone<SocketAddr> {
    const PLACEHOLDER: &'static str = "ADDR:PORT";
    const EXPECTED: &'static str = "an IP address and port, such as 127.0.0.1:8131, or none";

    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            _ => text.parse().map(Self::Some).map_err(|_| not_expected::<Self>(text)),
        }
    }
}

impl Parse for OrNone<Duration> {
    const PLACEHOLDER: &'static str = "DURATION";
    const EXPECTED: &'static str = "a duration with its unit, such as 10s, 15m or 1h30m, or none";

    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            _ => humantime::parse_duration(text).map(Self::Some).map_err(|_| not_expected::<Self>(text)),
        }
    }
}

impl Parse for OrNone<NonZeroUsize> {
    const PLACEHOLDER: &'static str = "N";
    const EXPECTED: &'static str = "a number from 1 on, or none";

    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            _ => text.parse().map(Self::Some).map_err(|_| not_expected::<Self>(text)),
        }
    }
}
