//! The settings of a gateway that is one of several: how they find one another, and how they connect.

use std::{net::SocketAddr, path::PathBuf, sync::Arc, time::Duration};

use rustls::pki_types::ServerName;
use tunnel_core::{
    Host, LinkConfig, Target,
    proto::yamux::WindowPool,
    tls::{ClientTls, Domain, Files},
};
use tunnel_edge::{
    daemon::settings::{List, OrNone, Problems, Size},
    settings_group,
};

use crate::{
    directory::etcd::{EtcdConfig, settings::EtcdSettings},
    peers::Member,
};

settings_group! {
    /// Peers (the other gateways of the cluster, if there are any)
    pub struct PeersSettings in "peers" {
        /// Address to listen on for other gateways, or none.
        listen: OrNone<SocketAddr> = "none",
        /// PEM file with the certificate that other gateways see, when they connect here and when this one connects to
        /// them. Read again when it changes.
        cert: Option<PathBuf>,
        /// PEM file with the certificate's private key.
        key: Option<PathBuf>,
        /// PEM file with the CA certificates that the gateways' certificates come from. Whoever has a certificate of this
        /// CA is a gateway.
        ca: Option<PathBuf>,
        /// Where the cluster's gateways listen for one another, each HOST:PORT; this one may be among them. A name that
        /// has several addresses, such as that of a headless Service, stands for a gateway at each. Gateways found in this
        /// way tell one another which nodes they hold. Instead of this, etcd.endpoints may be set.
        gateways: List<Target>,
        /// Name that other gateways' certificates must be for. Default: the host that peers.gateways names.
        server_name: Option<ServerName<'static>>,
        /// Only with etcd: HOST:PORT where other gateways reach this one's peers.listen. Default: peers.listen itself.
        address: Option<Target>,
        /// Heartbeat period of the links between gateways. A gateway that is dead is noticed after two of them.
        heartbeat: Duration = "3s",
        /// Streams at one time on one link to another gateway.
        max_streams: usize = "4096",
        /// Memory by which all receive windows of such a link together may grow beyond 256KiB a stream.
        receive_window: Size = "64MiB",
    }
}

/// A gateway that is one of several.
#[derive(Clone, Debug)]
pub struct PeersConfig {
    /// Where to listen for others.
    pub listen: SocketAddr,
    /// Credentials, and the CA of gateways.
    pub tls: Files,
    /// How the others are found.
    pub finding: Finding,
    /// Heartbeat period that others are told.
    pub heartbeat: Duration,
    /// Limits of each link between gateways.
    pub link: LinkConfig,
}

impl PeersConfig {
    /// What else is wrong with the files that are named, beside what a listener needs.
    pub(super) fn check(&self) -> Vec<String> {
        let client =
            ClientTls::load(Domain::Peer, self.tls.clone()).err().map(|error| format!("peers: {error}"));
        let etcd = match &self.finding {
            Finding::List(_) => None,
            Finding::Etcd(etcd, _) => etcd.check_files().err().map(|error| format!("etcd: {error}")),
        };
        client.into_iter().chain(etcd).collect()
    }
}

/// How gateways find one another.
#[derive(Clone, Debug)]
pub enum Finding {
    /// By a list.
    List(Vec<Member>),
    /// Through etcd, where each says how it is reached itself.
    Etcd(Box<EtcdConfig>, Member),
}

impl PeersSettings {
    /// What was set; `None` if this is the only gateway, or if something is wrong, which is noted.
    pub(super) fn config(
        &self,
        etcd: &EtcdSettings,
        windows: &Arc<WindowPool>,
        problems: &mut Problems,
    ) -> Option<PeersConfig> {
        self.check_ranges(problems);
        let etcd_config = etcd.config(problems);
        if !self.gateways.is_empty() && !etcd.endpoints.is_empty() {
            problems.at(
                &self.gateways,
                "is set, and etcd.endpoints too: gateways find one another by one of them",
            );
            return None;
        }
        if self.gateways.is_empty() && etcd.endpoints.is_empty() {
            if let OrNone::Some(_) = self.listen.value {
                problems.missing(
                    &self.gateways,
                    "peers.listen is set, but no other gateway can be found without this",
                );
            }
            return None;
        }
        let OrNone::Some(listen) = self.listen.value else {
            problems.at(
                &self.listen,
                "is none, but gateways of one cluster must reach one another: set an address",
            );
            return None;
        };
        let cert = problems.require(&self.cert, "a gateway proves to others by a certificate that it is one");
        let key = problems.require(&self.key, "the private key that belongs to peers.cert");
        let ca = problems.require(&self.ca, "the CA that the gateways' certificates come from");
        let finding = match etcd_config {
            Some(etcd) => Finding::Etcd(etcd.into(), self.own(listen, problems)?),
            None if etcd.endpoints.is_empty() => Finding::List(self.list(problems)?),
            None => return None,
        };
        Some(PeersConfig {
            listen,
            tls: Files { cert: cert?, key: key?, ca: ca? },
            finding,
            heartbeat: self.heartbeat.value,
            link: LinkConfig {
                max_streams: self.max_streams.value,
                window_budget: self.receive_window.value.0,
                window_pool: Some(windows.clone()),
                ..LinkConfig::default()
            },
        })
    }

    fn check_ranges(&self, problems: &mut Problems) {
        let duration = |value: &Duration| humantime::format_duration(*value);
        let periods = Duration::from_millis(100)..=Duration::from_secs(60);
        problems.within(&self.heartbeat, &periods, duration);
        problems.within(&self.max_streams, &(1..=65_536), usize::to_string);
        problems.within(&self.receive_window, &(Size(0)..=Size(4 << 30)), |size| *size);
    }

    fn list(&self, problems: &mut Problems) -> Option<Vec<Member>> {
        let members: Option<Vec<Member>> = self
            .gateways
            .iter()
            .map(|(address, place)| {
                let member = self.member(address);
                if member.is_none() {
                    let text = format!("no certificate can be for {}: set peers.server_name", address.host);
                    problems.add(place.clone(), "peers.gateways", text);
                }
                member
            })
            .collect();
        members
    }

    /// How others reach this gateway.
    fn own(&self, listen: SocketAddr, problems: &mut Problems) -> Option<Member> {
        let address = match &self.address.value {
            Some(address) => address.clone(),
            None if !listen.ip().is_unspecified() && listen.port() != 0 => listen.into(),
            None => {
                problems.missing(&self.address, "peers.listen is every address, and others must be told one");
                return None;
            }
        };
        let own = self.member(&address);
        if own.is_none() {
            problems.at(&self.address, "no certificate can be for this host: set peers.server_name");
        }
        own
    }

    fn member(&self, address: &Target) -> Option<Member> {
        let named = || match &address.host {
            Host::Ip(ip) => Some(ServerName::from(*ip)),
            Host::Name(name) => ServerName::try_from(name.clone()).ok(),
        };
        let server_name = self.server_name.value.clone().or_else(named)?;
        Some(Member { address: address.clone(), server_name })
    }
}
