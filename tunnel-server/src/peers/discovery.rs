//! Where the other gateways are, by a list: each entry is one gateway, or a name that stands for all of them, such as
//! that of a headless Service. Names are looked up again and again, since gateways come and go.

use std::{collections::BTreeSet, io, net::SocketAddr, time::Duration};

use tokio::{
    net::lookup_host,
    sync::watch,
    time::{MissedTickBehavior, interval, timeout},
};
use tracing::{info, warn};
use tunnel_core::Host;

use super::Member;

/// How often names are looked up.
const PERIOD: Duration = Duration::from_secs(2);
/// How long one lookup may take.
const LOOKUP_TIMEOUT: Duration = Duration::from_secs(5);
/// Addresses behind one name. More are left out: a full mesh of so many gateways is not what this is for.
const MAX_ADDRESSES: usize = 256;

/// What an entry of the list stands for, as far as is known.
struct Entry {
    listed: Member,
    found: Vec<Member>,
    /// That it could not be looked up has been logged.
    complained: bool,
}

/// Keeps `found` true to what the list stands for, for ever. A name that cannot be looked up goes on to stand for what it
/// stood for last.
pub(crate) async fn run(list: Vec<Member>, found: watch::Sender<Vec<Member>>) {
    let entry = |listed| Entry { listed, found: Vec::new(), complained: false };
    let mut entries: Vec<Entry> = list.into_iter().map(entry).collect();
    let mut period = interval(PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        for entry in &mut entries {
            entry.look_up().await;
        }
        let mut all: Vec<Member> = Vec::new();
        for member in entries.iter().flat_map(|entry| &entry.found) {
            if !all.contains(member) {
                all.push(member.clone());
            }
        }
        found.send_if_modified(|known| {
            let changed = *known != all;
            if changed {
                info!(addresses = ?all.iter().map(|member| member.address.to_string()).collect::<Vec<_>>(),
                      "the peers' addresses have changed");
                *known = all;
            }
            changed
        });
    }
}

impl Entry {
    async fn look_up(&mut self) {
        let Member { address, server_name } = self.listed.clone();
        let Host::Name(name) = &address.host else {
            self.found = vec![self.listed.clone()];
            return;
        };
        let looking = lookup_host((name.as_str(), address.port));
        let addresses = match timeout(LOOKUP_TIMEOUT, looking).await {
            Ok(Ok(addresses)) => addresses,
            Ok(Err(error)) => return self.complain(&error),
            Err(_) => return self.complain(&io::ErrorKind::TimedOut.into()),
        };
        self.complained = false;
        let addresses: BTreeSet<SocketAddr> = addresses.take(MAX_ADDRESSES).collect();
        let member =
            |address: SocketAddr| Member { address: address.into(), server_name: server_name.clone() };
        self.found = addresses.into_iter().map(member).collect();
    }

    fn complain(&mut self, error: &io::Error) {
        if !self.complained {
            self.complained = true;
            warn!(peers = %self.listed.address, cause = %error,
                  "the name of the peers cannot be looked up; going on with the addresses that are known");
        }
    }
}
