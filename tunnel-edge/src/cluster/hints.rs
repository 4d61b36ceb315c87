//! What gateways say of one another, as far as it can be used, and how an edge ranks them. A hint is only an address to
//! dial: whoever answers there must prove by its certificate that it is a gateway.

use std::hash::{DefaultHasher, Hash, Hasher};

use tunnel_core::{Target, proto::messages::Gateway};

/// Gateways of one list that are looked at.
const MAX_GATEWAYS: usize = 256;
/// Longest name of a gateway, and host of an address, in bytes.
const MAX_NAME: usize = 253;
/// A host, a colon and five digits.
const MAX_ADDRESS: usize = MAX_NAME + 6;

/// One gateway, as another says, or it itself.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Hint {
    pub(super) gateway: String,
    pub(super) address: Option<Target>,
    pub(super) draining: bool,
}

/// The hints that can be used. One with an address that cannot counts as one without.
pub(super) fn read(gateways: &[Gateway]) -> Vec<Hint> {
    let usable = gateways.iter().filter_map(|gateway| {
        let text = &gateway.edge_address;
        let address = if text.len() <= MAX_ADDRESS { text.parse().ok() } else { None };
        Some(Hint { gateway: name(&gateway.id)?.to_owned(), address, draining: gateway.draining })
    });
    usable.take(MAX_GATEWAYS).collect()
}

/// A gateway's name, if it is fit for being kept and shown.
pub(super) fn name(text: &str) -> Option<&str> {
    let fit = !text.is_empty() && text.len() <= MAX_NAME && !text.chars().any(char::is_control);
    fit.then_some(text)
}

/// How well a gateway suits the edge of a node: as good as random, but always the same. No two edges need to agree on it.
pub(super) fn weight(node: &str, gateway: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    (node, gateway).hash(&mut hasher);
    hasher.finish()
}
