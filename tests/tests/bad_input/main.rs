//! Bad input at every door, over real sockets. Each case shows four things: what the one who did it was told, the log
//! line, the one counter that moved, and a bystander whose stream through the same gateway went on. No task panics.
//!
//! Every test runs on one thread and has a gateway of its own ([`rig`]), so that logs, counters and panics are its own.
//! The crossings of the trust domains that have no door yet (peer) are tested with TLS alone, in `tunnel-core`.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "all numbers here are small")]

mod client;
mod edge_door;
mod hostile_gateway;
mod http1;
mod http2;
mod ingress_door;
mod rig;
mod script;
