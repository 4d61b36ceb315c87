//! The protocol stack of edge-tunnel: everything between a byte stream and a proxied connection with exact ends.
//!
//! The story of one link, in the order of the files:
//!
//! 1. An edge dials a gateway and makes a TLS connection ([`tls`]); the gateway reads the node's name out of the
//!    edge's certificate ([`identity`]).
//! 2. Both sides put yamux on it (`mux`) and open the control stream, where [`proto::control`] shakes hands and
//!    then keeps the heartbeat. That makes a [`Link`].
//! 3. The gateway opens a stream for each proxied connection ([`LinkHandle::open`]); the edge gets it as
//!    [`Incoming`], decides, dials and accepts. Both then hold a [`TunnelStream`], whose ends are exact
//!    ([`proto::ends`]): a clean end of file is one that the far side has confirmed, byte for byte.
//! 4. Each side joins its stream with a socket of its own by [`relay()`], which carries half-close as half-close
//!    and everything else as a reset.
//!
//! Nothing here listens or reads a configuration file. Without the feature `io` only the sans-IO part is left.

#![cfg_attr(not(test), warn(clippy::disallowed_methods, clippy::disallowed_types))]

pub mod identity;
pub mod proto;
mod target;

#[cfg(feature = "io")]
mod link;
#[cfg(feature = "io")]
mod mux;
#[cfg(feature = "io")]
mod pace;
#[cfg(feature = "io")]
mod read_ahead;
#[cfg(feature = "io")]
mod relay;
#[cfg(feature = "io")]
mod socket;
#[cfg(feature = "io")]
mod stream;
#[cfg(feature = "io")]
pub mod tls;

pub use identity::{GatewayId, InstanceId, NodeId};
pub use proto::ends::Aborted;
pub use target::{Host, Target, TargetError};

#[cfg(feature = "io")]
pub use {
    link::{
        ConnectError, Link, LinkConfig, LinkError, LinkEvent, LinkHandle, OpenError, OpenRequest, PendingLink,
    },
    mux::{Carrier, LINK_BUFFERS, STREAM_WINDOW},
    read_ahead::ReadAhead,
    relay::{Arrived, Leg, Lost, RELAY_BUFFERS, RelayEnd, Relayed, TICK, Timeouts, relay},
    socket::{Socket, UnixSocket},
    stream::{HeaderError, Incoming, PendingStream, TunnelStream},
};
