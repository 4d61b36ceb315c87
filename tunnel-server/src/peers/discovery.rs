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
pub(crate) async fn run<R, F>(list: Vec<Member>, found: watch::Sender<Vec<Member>>, resolve: R)
where
    R: Fn(String, u16) -> F,
    F: Future<Output = io::Result<Vec<SocketAddr>>>,
{
    let entry = |listed| Entry { listed, found: Vec::new(), complained: false };
    let mut entries: Vec<Entry> = list.into_iter().map(entry).collect();
    let mut period = interval(PERIOD);
    period.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        period.tick().await;
        for entry in &mut entries {
            entry.look_up(&resolve).await;
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

/// By the system's resolver.
pub(crate) async fn system(name: String, port: u16) -> io::Result<Vec<SocketAddr>> {
    Ok(lookup_host((name, port)).await?.take(MAX_ADDRESSES).collect())
}

impl Entry {
    async fn look_up<F>(&mut self, resolve: &impl Fn(String, u16) -> F)
    where
        F: Future<Output = io::Result<Vec<SocketAddr>>>,
    {
        let Member { address, server_name } = self.listed.clone();
        let Host::Name(name) = &address.host else {
            self.found = vec![self.listed.clone()];
            return;
        };
        let addresses = match timeout(LOOKUP_TIMEOUT, resolve(name.clone(), address.port)).await {
            Ok(Ok(addresses)) => addresses,
            Ok(Err(error)) => return self.complain(&error),
            Err(_) => return self.complain(&io::ErrorKind::TimedOut.into()),
        };
        self.complained = false;
        let addresses: BTreeSet<SocketAddr> = addresses.into_iter().collect();
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

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use parking_lot::Mutex;
    use tokio::time::sleep;
    use tracing::Level;

    use super::*;
    use crate::testing::Log;

    #[tokio::test(start_paused = true)]
    async fn a_name_stands_for_what_was_last_found_behind_it() {
        let member = |address: &str| Member {
            address: address.parse().unwrap(),
            server_name: "gateways".try_into().unwrap(),
        };
        let answer: Arc<Mutex<Result<Vec<&str>, io::ErrorKind>>> =
            Arc::new(Mutex::new(Ok(vec!["10.0.0.1:8134"])));
        let answers = answer.clone();
        let resolve = move |name: String, port| {
            assert_eq!((name.as_str(), port), ("gateways.example", 8134));
            let found = answers.lock().clone();
            let parse = |texts: Vec<&str>| texts.iter().map(|text| text.parse().unwrap()).collect();
            async move { found.map(parse).map_err(io::Error::from) }
        };
        let (sender, mut found) = watch::channel(Vec::new());
        let list = vec![member("10.0.0.9:1"), member("gateways.example:8134")];
        let looking = tokio::spawn(run(list, sender, resolve));
        found.changed().await.unwrap();
        assert_eq!(*found.borrow_and_update(), [member("10.0.0.9:1"), member("10.0.0.1:8134")]);

        // One more, and one twice.
        *answer.lock() = Ok(vec!["10.0.0.2:8134", "10.0.0.1:8134", "10.0.0.2:8134"]);
        found.changed().await.unwrap();
        assert_eq!(found.borrow_and_update()[1..], [member("10.0.0.1:8134"), member("10.0.0.2:8134")]);

        let log = Log::start();
        *answer.lock() = Err(io::ErrorKind::NotFound);
        sleep(PERIOD * 5).await;
        assert!(!found.has_changed().unwrap(), "{:?}", found.borrow());
        assert_eq!(log.lines(Level::WARN, "cannot be looked up").len(), 1);

        *answer.lock() = Ok(vec!["10.0.0.2:8134"]);
        found.changed().await.unwrap();
        assert_eq!(found.borrow_and_update()[1..], [member("10.0.0.2:8134")]);
        looking.abort();
    }
}
