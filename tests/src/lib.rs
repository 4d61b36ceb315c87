//! What the cross-crate tests share: the real gateway and edges as parties of a test, what goes through them and how it
//! is judged, and a simulated network.

#![allow(clippy::unwrap_used, clippy::missing_panics_doc, reason = "a test fails by panicking")]
#![allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the numbers of tests are small")]
#![allow(clippy::large_futures, reason = "a test has few of them")]

pub mod connect;
pub mod http2;
mod meter;
pub mod parties;
pub mod plan;
pub mod simulation;
pub mod workload;
