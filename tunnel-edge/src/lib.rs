//! The edge: holds a link from a Kubernetes node out to one of its gateways, and dials what its policy allows.
//!
//! The walk, in the order in which a reader should take it:
//!
//! 1. [`cli`] and [`config`] turn flags, environment and file into a [`config::Config`] in which everything has been
//!    checked; [`run`] reads the credentials, opens the admin endpoint and starts the agent.
//! 2. [`agent`] keeps the node linked, for ever, by one `keeper` for each link that it may hold: when to dial again after a
//!    failure (`backoff`), the renewal of the link when the certificate was rotated (which `credentials` notices), and the
//!    drain of this process. Losing every gateway never ends it; it only makes
//!    [`AgentStatus::ready`](status::AgentStatus::ready) say so. `cluster` says where each keeper goes: which gateways
//!    there are, which are held, where to when one drains or another one comes; `destinations` has the configured addresses.
//! 3. `uplink` is one attempt: connect, through an HTTP proxy where there is one, TLS, `Hello` and `Welcome`.
//! 4. `link` serves a link that is up: one task, which owns all streams of the link.
//! 5. `stream` takes one stream: its header, then [`policy`], which gives a [`policy::Permit`] or says why not; `dial`
//!    connects nothing without a permit; then the answer, and [`tunnel_core::relay()`] until the end.
//!
//! Everything that leaves the process goes through [`network::Network`], so that a simulation can put its own network
//! below; time is tokio's and all randomness comes from one seed. [`daemon`] has what is not about edges at all.

#![cfg_attr(not(test), warn(clippy::disallowed_methods, clippy::disallowed_types))]

pub mod agent;
mod backoff;
pub mod cli;
mod cluster;
pub mod config;
mod credentials;
pub mod daemon;
mod destinations;
mod dial;
mod generation;
mod keeper;
mod link;
pub mod metrics;
pub mod network;
pub mod policy;
mod process;
pub mod status;
mod stream;
mod uplink;

pub use agent::Agent;
pub use process::run;
