//! What the cross-crate tests share: the real gateway and edges as parties of a test, what goes through them and how it
//! is judged, and a simulated network.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

pub mod connect;
mod meter;
pub mod parties;
pub mod plan;
pub mod simulation;
mod socket;
pub mod workload;
