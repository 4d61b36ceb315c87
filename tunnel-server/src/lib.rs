//! The gateway: carries a control plane's connections to Kubernetes nodes, over the links that their edges hold.
//!
//! The walk, in the order in which a reader should take it:
//!
//! 1. [`cli`] and [`config`] turn flags, environment and file into a [`config::Config`] in which everything has been
//!    checked; [`run`] reads the credentials, binds the ports and starts a [`Gateway`] (`process`, `gateway`).
//! 2. `listener` is the one accept loop, for every door: the public one for edges, the private ones for the control
//!    plane. TLS is shaken hands in the connection's own task.
//! 3. `edges` makes a link of each connection that an edge dials: the node's identity comes from the certificate, the
//!    hello's claims must agree. `edges::registry` knows which links there are to which node, the newest first.
//! 4. `ingress` takes the control plane's connections and finds out who calls; `ingress::http1` and `ingress::http2`
//!    speak CONNECT. A refusal of any kind becomes a reply in one place, `ingress::reply`.
//! 5. `route` finds the node that serves a target (by name, else by `grants`), takes a link of it from the registry and
//!    opens a stream; [`tunnel_core::relay()`] then carries the bytes until both directions have ended.
//! 6. Where the node's link is at another gateway, `directory` knows so, and the stream takes one hop: `peers::mesh` here
//!    opens it on the link to that gateway, whose `peers::door` hands it on to the node's link.
//! 7. `cluster` watches the nodes through the API server, if there is one, and puts new `grants` in force.
//!
//! Dependencies go one way: doors, route, registry and directory, core. Every task has an owner that waits for it, up to
//! [`Gateway::run`]. Time is tokio's, randomness comes from outside, and doors are [`Accept`], so that a simulation runs
//! the very same gateway on a network of its own.

#![cfg_attr(not(test), warn(clippy::disallowed_methods, clippy::disallowed_types))]

mod callers;
pub mod cli;
mod cluster;
pub mod config;
#[allow(
    clippy::disallowed_types,
    clippy::disallowed_methods,
    reason = "a playground, which ends with its tasks"
)]
pub mod dev;
mod directory;
mod edges;
mod gateway;
mod gone;
mod grants;
mod ingress;
mod listener;
mod metrics;
mod peers;
pub mod pki;
mod process;
mod route;
#[cfg(test)]
mod testing;

/// What a gateway calls itself on its links.
const SOFTWARE: &str = concat!("tunnel-server/", env!("CARGO_PKG_VERSION"));

pub use {
    cluster::{Access, AccessError},
    edges::registry::LinkLimits,
    gateway::{Gateway, GatewaySettings, PeerSettings, Readiness},
    grants::{Grants, Holder, Identifier, IdentifierError},
    listener::{Accept, PeerAddr, UnixDoor},
    peers::Member,
    process::run,
};
