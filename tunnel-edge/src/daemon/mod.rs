//! What every daemon of the project needs: settings, logs, listeners, the admin endpoint, signals, the owners of tasks, and
//! the frame around it all.
//!
//! Both binaries use it, so that an operator who knows one knows the other. Nothing here knows about links, edges or
//! gateways, and credentials, which reload from disk, are not here either.

pub mod accept;
pub mod admin;
pub mod descriptors;
pub mod log;
mod notify;
pub mod process;
pub mod settings;
pub mod signal;
pub mod tasks;
pub mod waiting;

use std::time::Duration;

crate::settings_group! {
    /// Drain (the end of a process, in good order)
    pub struct DrainSettings in "drain" {
        /// How long running streams may go on after the first SIGTERM or SIGINT. No new work is taken in that time;
        /// what is left at its end is reset. A second signal ends it at once.
        timeout: Duration = "30s",
    }
}
