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

use tunnel_core::Timeouts;

use self::settings::{OrNone, Problems};

crate::settings_group! {
    /// Drain (the end of a process, in good order)
    pub struct DrainSettings in "drain" {
        /// How long running streams may go on after the first SIGTERM or SIGINT. No new work is taken in that time;
        /// what is left at its end is reset. A second signal ends it at once.
        timeout: Duration = "30s",
    }
}

crate::settings_group! {
    /// Streams (how long they may last while nothing moves)
    pub struct StreamSettings in "streams" {
        /// A stream of which one direction has ended is aborted when no byte has moved for this long: its client has gone,
        /// or its target does not answer. With none, never.
        half_closed_timeout: OrNone<Duration> = "15m",
        /// The same for a stream of which both directions are open. It ends connections that are only quiet too, such as
        /// those of watches and logs. With none, never.
        idle_timeout: OrNone<Duration> = "none",
    }
}

/// Shorter than this, a stream would be given up for the network's own delays.
const SHORTEST_TIMEOUT: Duration = Duration::from_secs(1);
const LONGEST_TIMEOUT: Duration = Duration::from_secs(7 * 24 * 3600);

impl StreamSettings {
    /// Notes times that are out of range.
    pub fn check(&self, problems: &mut Problems) {
        let range = OrNone::Some(SHORTEST_TIMEOUT)..=OrNone::Some(LONGEST_TIMEOUT);
        let show = |time: &OrNone<Duration>| match time {
            OrNone::None => "none".to_owned(),
            OrNone::Some(time) => humantime::format_duration(*time).to_string(),
        };
        for setting in [&self.half_closed_timeout, &self.idle_timeout] {
            if setting.value != OrNone::None {
                problems.within(setting, &range, show);
            }
        }
    }

    /// As a relay takes them, in a program of this name.
    pub fn timeouts(self, whose: &'static str) -> Timeouts {
        Timeouts {
            half_closed: self.half_closed_timeout.value.into_option(),
            idle: self.idle_timeout.value.into_option(),
            whose,
        }
    }
}
