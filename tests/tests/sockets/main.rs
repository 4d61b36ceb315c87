//! The real gateway and real edges in this process, over real sockets of the loopback interface: what a simulated
//! network cannot show. Each test is named after the promise that it keeps.
//!
//! [`rig`] sets everything up; [`bytes`] is about what is carried, [`ends`] about how it ends, [`clients`] about clients
//! that others wrote, [`lives`] about processes that come and go, [`renewal`] about certificates that are rotated meanwhile.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]
#![allow(clippy::print_stdout, reason = "how long things took, shown by --nocapture")]

mod bytes;
mod clients;
mod ends;
mod lives;
mod renewal;
mod rig;
