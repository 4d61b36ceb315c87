//! The directory: which other gateways hold a link to which node. Asked by `route` when there is no local link; filled
//! by whoever implements [`Directory`]:
//!
//! - [`Memory`]: there are no other gateways.
//! - [`peers`]: the gateways tell one another over their peer links.
//! - [`etcd`]: each writes what it holds into etcd, and watches what the others have written.
//!
//! All of it is soft state and a hint: an entry may be stale, and whoever follows it finds out ([`Directory::disprove`]).
//! Asking costs no round trip, so that an outage of whatever is behind leaves the known ways open.

pub(crate) mod etcd;
pub(crate) mod holders;
pub(crate) mod peers;

use std::fmt;

use tunnel_core::{GatewayId, NodeId, proto::messages::Holdings};

pub(crate) use self::holders::{Holder, Holders, LastHeld};

/// Of two links of a node, the one with the higher generation is the newer. Never zero.
pub(crate) type Generation = u64;

/// Where other gateways' links are looked up. See the module's text.
pub(crate) trait Directory: fmt::Debug + Send + Sync + 'static {
    /// The other gateways that hold a link to `node`, the one with the newest link first.
    fn holders(&self, node: &NodeId) -> Vec<Holder>;

    /// `holder` was asked, and has no such link: it is forgotten, unless a newer one is known by now.
    fn disprove(&self, node: &NodeId, holder: &Holder);

    /// Who was the last to hold a link to `node`, where nobody does any more.
    fn last_held(&self, _node: &NodeId) -> Option<LastHeld> {
        None
    }

    /// Why it may not know all that there is, if so.
    fn gap(&self) -> Option<&'static str> {
        None
    }

    /// Whether peers shall tell what they hold.
    fn wants_holdings(&self) -> bool {
        false
    }

    /// A peer tells what it holds. An error means that its word is not whole, and the link to it is to be made anew.
    fn peer_told(&self, _gateway: &GatewayId, _holdings: Holdings) -> Result<(), Untold> {
        Ok(())
    }

    /// The link to a peer has come up, or has ended: what it told before does not count any more.
    fn peer_silent(&self, _gateway: &GatewayId) {}
}

/// Holdings that cannot be taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Untold {
    /// They do not follow upon those before them.
    #[error("part {got} of what it holds came where part {expected} was expected")]
    Missed { expected: u64, got: u64 },
    /// There are more of them than any gateway has.
    #[error("it says that it holds more than {max} nodes")]
    TooMany { max: usize },
}

/// The directory of a gateway that is the only one.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Memory;

impl Directory for Memory {
    fn holders(&self, _: &NodeId) -> Vec<Holder> {
        Vec::new()
    }

    fn disprove(&self, _: &NodeId, _: &Holder) {}
}
