//! What an edge can be told, and what it runs with: [`Settings`] become a [`Config`], in which everything has been
//! checked, before any socket is opened.

use std::{
    fmt,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    time::Duration,
};

use rustls::pki_types::ServerName;
use tunnel_core::{
    LinkConfig, NodeId, Target, Timeouts,
    identity::node_from_certificate,
    tls::{ClientTls, Domain, Files},
};

use crate::{
    daemon::{
        DrainSettings, StreamSettings, admin,
        descriptors::Need,
        log::{LogConfig, LogSettings},
        settings::{List, OrNone, Parse, Place, Problems, Size, defaults},
    },
    policy::{Policy, Rule},
};

crate::settings_group! {
    /// Edge (who it is, and what it may dial)
    pub struct EdgeSettings in "" {
        /// This node's name in Kubernetes. Default: the one in the client certificate, which it must equal.
        node: Option<NodeId>,
        /// Where gateways are. One address of a load balancer before them is enough, or several of gateways.
        gateways: List<Target>,
        /// Gateways to hold links to at one time, each to another one. Which there are, the gateways say.
        redundancy: usize = "2",
        /// When there is another gateway, a link may be moved to it: one at a time, each at a random moment within this.
        rebalance: Duration = "5m",
        /// How gateways are reached: none (directly), an http:// proxy URL, or from-environment (`HTTPS_PROXY` and
        /// `NO_PROXY`).
        proxy: ProxyChoice = "from-environment",
        /// What this edge dials, and nothing else. Each is HOST:PORT; HOST is node (this node itself), a name, *.SUFFIX,
        /// an address or a CIDR, PORT is a number, a range such as 8000-8100, or *. If not set, the kubelet's port.
        allow: List<Rule> = "node:10250",
        /// How long getting a link may take, from looking up a gateway's name to its welcome.
        connect_timeout: Duration = "10s",
        /// How long dialing a target may take.
        dial_timeout: Duration = "5s",
    }
}

crate::settings_group! {
    /// TLS (how edge and gateway know each other)
    pub struct TlsSettings in "tls" {
        /// PEM file with the client certificate, which names the node: CN=system:node:NAME and O=system:nodes, as in a
        /// kubelet's own certificate, or a SPIFFE URI. Read again when it changes.
        cert: Option<PathBuf>,
        /// PEM file with the certificate's private key.
        key: Option<PathBuf>,
        /// PEM file with the CA certificates that gateways' certificates must come from.
        ca: Option<PathBuf>,
        /// Name that gateways' certificates must be for. Default: the host that is dialed.
        server_name: Option<ServerName<'static>>,
    }
}

crate::settings_group! {
    /// Kubelet (where this node itself is dialed)
    pub struct KubeletSettings in "kubelet" {
        /// Address that targets naming this node are dialed at.
        address: IpAddr = "127.0.0.1",
        /// The kubelet's port.
        port: u16 = "10250",
    }
}

crate::settings_group! {
    /// Links (limits of each link to a gateway)
    pub struct LinkSettings in "link" {
        /// Longest heartbeat period that is accepted from a gateway. A dead link is noticed after two of its periods.
        heartbeat_max: Duration = "60s",
        /// Streams at one time. More are refused, one by one.
        max_streams: usize = "1024",
        /// Memory by which all receive windows of a link together may grow beyond 256KiB a stream.
        receive_window: Size = "16MiB",
    }
}

crate::settings_group! {
    /// Backoff (how soon a lost link is dialed again)
    pub struct BackoffSettings in "backoff" {
        /// Shortest wait. Each wait is drawn at random between this and a limit, which doubles with each failure.
        min: Duration = "500ms",
        /// Longest wait while no gateway can be reached, or none takes new links. A gateway that is back has its edges
        /// within this time; a larger fleet may want it longer. Never longer than max.
        outage_max: Duration = "4s",
        /// Longest wait while something must be repaired, such as a certificate.
        max: Duration = "30s",
        /// A link that has held this long counts as a success: the next wait is the first again.
        reset_after: Duration = "30s",
    }
}

crate::settings_group! {
    /// Admin (health, readiness and metrics over plain HTTP)
    pub struct AdminSettings in "admin" {
        /// Address of /healthz, /readyz and /metrics, or none.
        listen: OrNone<SocketAddr> = "127.0.0.1:8133",
    }
}

crate::settings! {
    /// Everything that an edge can be told.
    pub struct Settings for Config, variables "TUNNEL_EDGE" {
        edge: EdgeSettings,
        tls: TlsSettings,
        kubelet: KubeletSettings,
        link: LinkSettings,
        streams: StreamSettings,
        backoff: BackoffSettings,
        drain: DrainSettings,
        admin: AdminSettings,
        log: LogSettings,
    }
}

/// What an edge runs with.
#[derive(Clone, Debug)]
pub struct Config {
    /// The node, if it was said; otherwise it is read from the certificate.
    pub node: Option<NodeId>,
    /// Gateways, at least one.
    pub gateways: Vec<Target>,
    /// To how many different gateways links are held.
    pub redundancy: usize,
    /// Within what time a link is moved to a gateway that suits this edge better.
    pub rebalance: Duration,
    /// How gateways are reached.
    pub proxy: ProxyChoice,
    /// Credentials.
    pub tls: Files,
    /// The name that gateways' certificates must be for, if not the host that is dialed.
    pub server_name: Option<ServerName<'static>>,
    /// What may be dialed.
    pub policy: Policy,
    /// How long getting a link may take, from lookup to welcome.
    pub connect_timeout: Duration,
    /// How long dialing a target may take.
    pub dial_timeout: Duration,
    /// Limits of each link.
    pub link: LinkConfig,
    /// How long a stream may last without moving a byte.
    pub timeouts: Timeouts,
    /// How soon a lost link is dialed again.
    pub backoff: Backoff,
    /// How long streams may go on after the first signal.
    pub drain_timeout: Duration,
    /// Where the admin listener is, if anywhere.
    pub admin: Option<SocketAddr>,
    /// Logs.
    pub log: LogConfig,
    /// How often the credentials' files are looked at. No setting: nothing is won by another value.
    pub reload_period: Duration,
}

/// How soon a lost link is dialed again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Backoff {
    /// First wait.
    pub min: Duration,
    /// Longest wait while no gateway can be reached, or none takes new links.
    pub outage_max: Duration,
    /// Longest wait while something must be repaired.
    pub max: Duration,
    /// A link that has held this long counts as a success.
    pub reset_after: Duration,
}

/// How gateways are reached.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ProxyChoice {
    /// As `HTTPS_PROXY` and `NO_PROXY` say.
    FromEnvironment,
    /// Directly.
    Direct,
    /// Through this HTTP proxy.
    Http(ProxyUrl),
}

/// An HTTP proxy.
#[derive(Clone, PartialEq, Eq)]
pub struct ProxyUrl {
    /// Where it listens.
    pub address: Target,
    /// `user:password`, as written in the URL. A secret: never shown.
    pub credentials: Option<String>,
}

impl fmt::Display for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "http://{}", self.address)
    }
}

impl fmt::Debug for ProxyUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Display for ProxyChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::FromEnvironment => f.write_str("from-environment"),
            Self::Direct => f.write_str("none"),
            Self::Http(url) => url.fmt(f),
        }
    }
}

/// The port of a proxy URL without one.
const PROXY_PORT: u16 = 80;

impl Parse for ProxyChoice {
    const PLACEHOLDER: &'static str = "URL";
    const EXPECTED: &'static str = "none, from-environment, or a proxy such as http://proxy.example:3128";

    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "none" => return Ok(Self::Direct),
            "from-environment" => return Ok(Self::FromEnvironment),
            _ => {}
        }
        // The text may hold a password, so no error repeats it.
        let wrong = || format!("is not {}", Self::EXPECTED);
        let rest = text.strip_prefix("http://").ok_or_else(wrong)?;
        let authority = rest.strip_suffix('/').unwrap_or(rest);
        let (credentials, address) = match authority.rsplit_once('@') {
            Some((credentials, address)) => (Some(credentials.to_owned()), address),
            None => (None, authority),
        };
        let without_port = || Some(Target { host: address.parse().ok()?, port: PROXY_PORT });
        let address = address.parse().ok().or_else(without_port).ok_or_else(wrong)?;
        Ok(Self::Http(ProxyUrl { address, credentials }))
    }
}

const RELOAD_PERIOD: Duration = Duration::from_secs(10);
const MILLISECOND: Duration = Duration::from_millis(1);
const SECOND: Duration = Duration::from_secs(1);
const HOUR: Duration = Duration::from_secs(3600);

impl Settings {
    /// Everything that no single value can show, all of it at once.
    fn validate(self, problems: &mut Problems) -> Option<Config> {
        self.check_ranges(problems);
        if self.edge.gateways.is_empty() {
            problems.missing(&self.edge.gateways, "say where the gateways are");
        }
        for (index, (gateway, place)) in self.edge.gateways.iter().enumerate() {
            if self.edge.gateways[..index].iter().any(|(earlier, _)| earlier == gateway) {
                problems.add(place.clone(), "gateways", format!("{gateway} is there twice"));
            }
        }
        if self.backoff.min.value > self.backoff.max.value {
            problems.at(&self.backoff.min, "must not be longer than backoff.max");
        }
        let cert =
            problems.require(&self.tls.cert, "an edge proves by a client certificate which node it is");
        let key = problems.require(&self.tls.key, "the private key that belongs to tls.cert");
        let ca = problems.require(&self.tls.ca, "the CA that the gateways' certificates come from");
        let tls = Files { cert: cert?, key: key?, ca: ca? };
        Some(self.into_config(tls))
    }

    fn check_ranges(&self, problems: &mut Problems) {
        let duration = |value: &Duration| humantime::format_duration(*value);
        problems.within(&self.edge.redundancy, &(1..=8), usize::to_string);
        problems.within(&self.edge.rebalance, &(Duration::ZERO..=HOUR * 24), duration);
        problems.within(&self.edge.connect_timeout, &(MILLISECOND..=HOUR), duration);
        problems.within(&self.edge.dial_timeout, &(MILLISECOND..=HOUR), duration);
        problems.within(&self.kubelet.port, &(1..=u16::MAX), u16::to_string);
        problems.within(&self.link.heartbeat_max, &(SECOND..=HOUR), duration);
        problems.within(&self.link.max_streams, &(1..=65_536), usize::to_string);
        problems.within(&self.link.receive_window, &(Size(0)..=Size(4 << 30)), |size| *size);
        problems.within(&self.backoff.min, &(MILLISECOND..=HOUR), duration);
        problems.within(&self.backoff.outage_max, &(MILLISECOND..=HOUR), duration);
        problems.within(&self.backoff.max, &(MILLISECOND..=HOUR), duration);
        problems.within(&self.backoff.reset_after, &(Duration::ZERO..=HOUR), duration);
        self.streams.check(problems);
        problems.within(&self.drain.timeout, &(Duration::ZERO..=HOUR), duration);
    }

    fn into_config(self, tls: Files) -> Config {
        // The default means the kubelet's port, wherever that is.
        let rules = match self.edge.allow.place {
            Place::Default => vec![Rule::node_port(self.kubelet.port.value)],
            _ => self.edge.allow.value.into_iter().map(|(rule, _)| rule).collect(),
        };
        Config {
            node: self.edge.node.value,
            gateways: self.edge.gateways.value.into_iter().map(|(gateway, _)| gateway).collect(),
            redundancy: self.edge.redundancy.value,
            rebalance: self.edge.rebalance.value,
            proxy: self.edge.proxy.value,
            tls,
            server_name: self.tls.server_name.value,
            policy: Policy::new(rules, self.kubelet.address.value),
            connect_timeout: self.edge.connect_timeout.value,
            dial_timeout: self.edge.dial_timeout.value,
            link: LinkConfig {
                handshake_timeout: self.edge.connect_timeout.value,
                max_heartbeat: self.link.heartbeat_max.value,
                max_streams: self.link.max_streams.value,
                window_budget: self.link.receive_window.value.0,
                ..LinkConfig::default()
            },
            timeouts: self.streams.timeouts("the edge"),
            backoff: Backoff {
                min: self.backoff.min.value,
                outage_max: self.backoff.outage_max.value.min(self.backoff.max.value),
                max: self.backoff.max.value,
                reset_after: self.backoff.reset_after.value,
            },
            drain_timeout: self.drain.timeout.value,
            admin: self.admin.listen.value.into_option(),
            log: self.log.into(),
            reload_period: RELOAD_PERIOD,
        }
    }
}

impl Config {
    /// How many descriptors it may have open.
    pub fn descriptors(&self) -> [Need; 3] {
        let links = 2 * self.redundancy;
        [
            // A link that is moved is there twice.
            Need { setting: "redundancy", count: links },
            Need { setting: "link.max_streams", count: links.saturating_mul(self.link.max_streams) },
            Need { setting: "admin.listen", count: self.admin.map_or(0, |_| 1 + admin::MAX_CONNECTIONS) },
        ]
    }

    /// What an edge runs with if it is told no more than it must be: no proxy and no admin listener, and else the
    /// defaults.
    pub fn new(node: NodeId, gateways: Vec<Target>, tls: Files) -> Self {
        let defaults = defaults::<Settings>().into_config(tls);
        Self { node: Some(node), gateways, proxy: ProxyChoice::Direct, admin: None, ..defaults }
    }

    /// Reads the credentials, checks that they fit together and are this node's, and gives the node.
    pub fn check_files(&self) -> Result<NodeId, String> {
        self.load_credentials().map(|(_, node)| node)
    }

    /// The credentials, and the node that they are for.
    pub(crate) fn load_credentials(&self) -> Result<(ClientTls, NodeId), String> {
        let tls = ClientTls::load(Domain::Edge, self.tls.clone()).map_err(|error| format!("tls: {error}"))?;
        let cert = self.tls.cert.display();
        let named = node_from_certificate(&tls.certificate())
            .map_err(|error| format!("tls.cert: {cert}: {error}"))?;
        match &self.node {
            Some(node) if *node != named => Err(format!(
                "node: is {node}, but the certificate {cert} is for {named}: they must be the same"
            )),
            _ => Ok((tls, named)),
        }
    }
}

#[cfg(test)]
mod tests;
