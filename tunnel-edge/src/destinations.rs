//! The configured addresses of gateways, in turn, and what was last said about each in the log. Shared by the `keeper`s.

use std::time::Duration;

use rustls::pki_types::ServerName;
use tokio::time::Instant;
use tracing::{debug, warn};
use tunnel_core::Target;

use crate::{
    config::Config,
    uplink::{Destination, UplinkError, server_name},
};

/// A failure that goes on is logged again, loudly, this often.
const REMIND_PERIOD: Duration = Duration::from_secs(300);

/// Where gateways are, as configured: often one address, of a load balancer.
#[derive(Debug)]
pub(crate) struct Destinations {
    configured: Vec<Configured>,
    /// Which is tried next.
    next: usize,
    /// Which has led to a gateway last.
    proven: usize,
    server_name: Option<ServerName<'static>>,
}

#[derive(Debug)]
struct Configured {
    destination: Destination,
    complaint: Option<Complaint>,
}

/// A failure that has been logged, so that the same one is not logged at every attempt.
#[derive(Debug)]
struct Complaint {
    text: String,
    logged: Instant,
    attempts: u64,
}

impl Destinations {
    /// `first` says which is tried first.
    pub(crate) fn new(config: &Config, first: usize) -> Self {
        let destination = |address: &Target| Destination {
            address: address.clone(),
            server_name: config.server_name.clone(),
        };
        let configured = |address| Configured { destination: destination(address), complaint: None };
        Self {
            configured: config.gateways.iter().map(configured).collect(),
            next: first,
            proven: first,
            server_name: config.server_name.clone(),
        }
    }

    /// The one to try next, and its place.
    pub(crate) fn next(&self) -> (usize, Destination) {
        (self.next, self.configured[self.next].destination.clone())
    }

    /// A gateway's own address. Its certificate is for the same name as behind the configured address, since clients of a
    /// load balancer cannot know which gateway they will meet.
    pub(crate) fn direct(&self, address: Target) -> Destination {
        let shared = server_name(&self.configured[self.proven].destination.address.host).ok();
        Destination { address, server_name: self.server_name.clone().or(shared) }
    }

    /// It has led to a gateway.
    pub(crate) fn welcomed(&mut self, place: usize) {
        self.proven = place;
        self.configured[place].complaint = None;
    }

    /// Another one is tried next, unless that is so already.
    pub(crate) fn pass(&mut self, place: usize) {
        if self.next == place {
            self.next = (place + 1) % self.configured.len();
        }
    }

    /// Says in the log why an attempt failed: loudly when it is news, or has been going on for a while.
    pub(crate) fn complain(&mut self, place: usize, failure: &UplinkError) {
        let configured = &mut self.configured[place];
        let gateway = &configured.destination.address;
        let text = failure.to_string();
        let now = Instant::now();
        match &mut configured.complaint {
            Some(known) if known.text == text => {
                known.attempts += 1;
                if now.duration_since(known.logged) < REMIND_PERIOD {
                    debug!(%gateway, cause = text, attempts = known.attempts, "still no link");
                } else {
                    warn!(%gateway, cause = text, attempts = known.attempts, "attempts still give no link; trying on");
                    known.logged = now;
                }
            }
            _ => {
                warn!(%gateway, cause = text, "the attempt gave no link; trying on, this is logged again every {} s",
                      REMIND_PERIOD.as_secs());
                configured.complaint = Some(Complaint { text, logged: now, attempts: 1 });
            }
        }
    }
}
