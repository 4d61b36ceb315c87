//! The directory in etcd, for many gateways or several regions: each gateway writes what it holds, under one lease, and
//! keeps a full map of what the others have written, so that asking costs no round trip. Made by [`crate::Gateway`], which
//! runs it for as long as it serves.
//!
//! Without etcd, what was known stays. A gateway that ends says so; one that is killed is forgotten when its lease runs out.

mod client;
mod map;
mod outbox;
mod session;
pub(crate) mod settings;

use std::{
    io,
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering::Relaxed},
    },
    time::Duration,
};

use prometheus_client::metrics::gauge::Gauge;
use rand::{Rng, SeedableRng, rngs::SmallRng};
use rustls::pki_types::ServerName;
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tunnel_core::{GatewayId, InstanceId, NodeId, Target};

pub(crate) use self::client::{Endpoint, EtcdTls};
use self::{
    map::{Entry, Map},
    session::Session,
};
use super::{Directory, Holder, holders::LastHeld};
use crate::{edges::held::News, peers::Member};

/// How etcd is reached, and what is kept in it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdConfig {
    /// Its members, any of which will do. Never empty.
    pub endpoints: Vec<Endpoint>,
    /// For `https` endpoints.
    pub tls: Option<EtcdTls>,
    /// Who to log in as, and the file with the password.
    pub user: Option<(String, PathBuf)>,
    /// What all keys begin with. Ends with a slash.
    pub prefix: String,
    /// How long a gateway that was killed is still known.
    pub lease: Duration,
    /// How long a member may take to answer, before another is asked.
    pub timeout: Duration,
}

/// Why etcd cannot be used as it is configured.
#[derive(Debug, thiserror::Error)]
pub(crate) enum EtcdError {
    /// A file cannot be read.
    #[error("cannot read {}: {error}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file does not hold what it should.
    #[error("{} holds no {what}", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// The files do not fit together.
    #[error("the certificates for etcd cannot be used: {text}")]
    Tls {
        /// Why not.
        text: String,
    },
    /// A member that proves who it is to one who cannot tell.
    #[error("{endpoint} needs etcd.ca: the CA that etcd's certificates come from")]
    NoCa {
        /// The member.
        endpoint: Endpoint,
    },
    /// A member without TLS among others with it.
    #[error("{endpoint} is without TLS, but etcd.ca is set: write https, or leave etcd.ca out")]
    Plain {
        /// The member.
        endpoint: Endpoint,
    },
}

/// What a gateway tells the others about itself.
#[derive(Clone, Debug)]
pub(crate) struct Own {
    pub(crate) gateway: GatewayId,
    /// Where it listens for its peers.
    pub(crate) peer_address: Target,
    /// What its certificate for peers is for.
    pub(crate) server_name: ServerName<'static>,
}

/// The directory in etcd.
#[derive(Debug)]
pub(crate) struct Etcd {
    config: EtcdConfig,
    own: Entry,
    map: Map,
    /// 1 while what is known is kept up to date.
    in_touch: Gauge,
    is_in_touch: AtomicBool,
    seed: u64,
}

impl Etcd {
    /// Contacts nobody. `seed` must be another for each process.
    pub(crate) fn new(config: EtcdConfig, own: Own, in_touch: Gauge, seed: u64) -> Arc<Self> {
        let instance = InstanceId::from_random(SmallRng::seed_from_u64(seed).random());
        let entry = Entry {
            instance: instance.to_string(),
            peer_address: own.peer_address.to_string(),
            server_name: own.server_name.to_str().into_owned(),
        };
        let map = Map::new(config.prefix.clone(), own.gateway);
        Arc::new(Self { config, own: entry, map, in_touch, is_in_touch: false.into(), seed })
    }

    fn set_in_touch(&self, is_in_touch: bool) {
        self.is_in_touch.store(is_in_touch, Relaxed);
        self.in_touch.set(is_in_touch.into());
    }

    /// The other gateways. One that is killed leaves when its lease runs out.
    pub(crate) fn members(&self) -> watch::Receiver<Vec<Member>> {
        self.map.members()
    }

    /// Writes what is held and learns what others hold, until `stop`; then tells etcd that this gateway is gone, which
    /// takes no longer than two seconds.
    pub(crate) async fn run(self: Arc<Self>, news: News, stop: CancellationToken) {
        Session::new(&self, news).run(stop).await;
    }
}

impl Directory for Etcd {
    fn holders(&self, node: &NodeId) -> Vec<Holder> {
        self.map.holders.of(node)
    }

    fn gap(&self) -> Option<&'static str> {
        (!self.is_in_touch.load(Relaxed)).then_some("etcd, which would know, cannot be followed now")
    }

    fn last_held(&self, node: &NodeId) -> Option<LastHeld> {
        self.map.holders.last(node)
    }

    fn disprove(&self, node: &NodeId, holder: &Holder) {
        self.map.holders.disprove(node, holder);
    }
}

#[cfg(test)]
mod tests;
