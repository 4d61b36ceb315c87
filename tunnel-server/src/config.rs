//! What a gateway can be told, and what it runs with: [`Settings`] become a [`Config`], in which everything has been
//! checked, before any port is bound.

mod grant;
mod kubeconfig;
mod peers;

use std::{
    fmt, fs,
    net::SocketAddr,
    num::NonZeroUsize,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use tunnel_core::{
    GatewayId, LinkConfig, Target, Timeouts,
    proto::yamux::WindowPool,
    tls::{Domain, Files, ServerTls},
};
use tunnel_edge::{
    daemon::{
        StreamSettings, admin,
        descriptors::Need,
        log::{LogConfig, LogSettings},
        settings::{List, OrNone, Parse, Problems, Size, not_expected},
    },
    settings, settings_group,
};

pub use grant::{Grant, HostName};
pub use kubeconfig::Kubeconfig;
pub use peers::{Finding, PeersConfig, PeersSettings};

use crate::{
    cluster::Access,
    directory::etcd::settings::EtcdSettings,
    gateway::{MAX_PEER_LINKS, WHOSE, edge_places},
    grants::Grants,
};

settings_group! {
    /// Gateway (who it is, and which nodes serve what)
    pub struct TopSettings in "" {
        /// Name of this gateway, unique in its cluster. Default: the host name.
        gateway_id: Option<GatewayId>,
        /// What nodes serve beside their own names. In the file, a list of mappings with the keys node, addresses, cidrs,
        /// hosts and default_route; as a flag, node=NAME,address=ADDR,cidr=CIDR,host=NAME,default-route, where all but the
        /// node may be left out or repeated.
        grants: List<Grant>,
    }
}

settings_group! {
    /// Kubernetes (the cluster whose nodes are granted what is theirs)
    pub struct KubernetesSettings in "kubernetes" {
        /// How to reach the API server: none, in-cluster (the pod's service account), or a kubeconfig file, whose current
        /// context is used. Each node is then granted the addresses of its status and its pod CIDRs, beside what grants
        /// say. Needs get, list and watch for nodes.
        kubeconfig: Kubeconfig = "none",
    }
}

settings_group! {
    /// Edges (the public side, where edges connect)
    pub struct EdgesSettings in "edges" {
        /// Address to listen on.
        listen: SocketAddr = "0.0.0.0:8443",
        /// PEM file with the certificate that edges see, followed by its intermediates. Read again when it changes.
        cert: Option<PathBuf>,
        /// PEM file with the certificate's private key.
        key: Option<PathBuf>,
        /// PEM file with the CA certificates that edges' client certificates must come from.
        client_ca: Option<PathBuf>,
        /// HOST:PORT where edges can reach this very gateway, if they can. Edges that come by a load balancer are told, and
        /// find the other gateways by it.
        address: Option<Target>,
        /// Links at one time, all nodes together. More are refused, but for one more of each node that has a link: an edge
        /// makes its new link before it drains the old one.
        max_links: usize = "10000",
        /// Links at one time of any one node, without those that its edge drains; with these, four times as many. The
        /// oldest is closed when there would be more.
        max_links_per_node: usize = "4",
        /// How long a new connection has to become a link: TLS, Hello and Welcome.
        handshake_timeout: Duration = "10s",
    }
}

settings_group! {
    /// Ingress (the private side, where the control plane connects)
    pub struct IngressSettings in "ingress" {
        /// Address to listen on for TLS with client certificates, or none.
        listen: OrNone<SocketAddr> = "127.0.0.1:8131",
        /// PEM file with the certificate that the control plane sees. Read again when it changes.
        cert: Option<PathBuf>,
        /// PEM file with the certificate's private key.
        key: Option<PathBuf>,
        /// PEM file with the CA certificates that the control plane's client certificates must come from.
        client_ca: Option<PathBuf>,
        /// Clients that may connect, by common name, DNS name or URI in their certificate. If not set, every certificate
        /// of the CA may.
        allowed_clients: List<ClientName>,
        /// Unix socket to listen on as well, without TLS. Its file mode says who may connect. A Unix socket has no reset:
        /// over HTTP/1.1 a cut stream looks complete there, unless what runs inside, such as TLS, tells.
        unix: Option<PathBuf>,
        /// Mode of the Unix socket's file, in octal.
        unix_mode: FileMode = "0660",
        /// Connections at one time, on each ingress listener. More wait in the kernel's queue. Whoever has to show a
        /// certificate there does not count before.
        max_connections: usize = "4096",
        /// Streams at one time, all nodes together. More are refused, one by one.
        max_streams: usize = "4096",
        /// Streams at one time of one caller to one node, or none for as many as there are. A caller is a certificate's name;
        /// all clients of Unix sockets are one. Beside these, 32 to the kubelet's port. More are refused, one by one.
        max_streams_per_caller: OrNone<NonZeroUsize> = "512",
        /// Requests at one time on one HTTP/2 connection.
        max_streams_per_connection: u32 = "250",
        /// How long a client has to send the head of its request.
        header_timeout: Duration = "5s",
        /// Largest head of a request.
        max_header_size: Size = "16KiB",
        /// How long reaching a target may take, from request to answer.
        dial_timeout: Duration = "10s",
    }
}

settings_group! {
    /// Links (limits of each link to an edge)
    pub struct LinkSettings in "link" {
        /// Heartbeat period. A dead link is noticed after two of them.
        heartbeat: Duration = "10s",
        /// Streams at one time on one link. More are refused, one by one.
        max_streams: usize = "1024",
        /// Memory by which all receive windows of a link together may grow beyond 256KiB a stream.
        receive_window: Size = "16MiB",
        /// The same for all links at once, those to other gateways too. Whoever comes when it is used up has 256KiB a
        /// stream, until others' streams end.
        receive_window_total: Size = "1GiB",
    }
}

settings_group! {
    /// Admin (health, readiness and metrics over plain HTTP)
    pub struct AdminSettings in "admin" {
        /// Address of /healthz, /readyz and /metrics, or none.
        listen: OrNone<SocketAddr> = "127.0.0.1:8132",
    }
}

settings_group! {
    /// Drain (the end of a gateway, in good order)
    pub struct DrainSettings in "drain" {
        /// How long requests are still taken after the first SIGTERM or SIGINT, while /readyz fails already and edges are
        /// told to connect elsewhere. As long as load balancers need to notice, if there are several gateways.
        delay: Duration = "0s",
        /// How long running streams may go on after that. No new work is taken in that time; what is left at its end is
        /// reset. A second signal ends it at once.
        timeout: Duration = "30s",
    }
}

settings! {
    /// Everything that a gateway can be told.
    pub struct Settings for Config, variables "TUNNEL_SERVER" {
        gateway: TopSettings,
        kubernetes: KubernetesSettings,
        edges: EdgesSettings,
        ingress: IngressSettings,
        peers: PeersSettings,
        etcd: EtcdSettings,
        link: LinkSettings,
        streams: StreamSettings,
        drain: DrainSettings,
        admin: AdminSettings,
        log: LogSettings,
    }
}

/// What a gateway runs with.
#[derive(Clone, Debug)]
pub struct Config {
    /// Its name.
    pub gateway_id: GatewayId,
    /// Which node serves what.
    pub grants: Grants,
    /// The cluster whose nodes are granted what is theirs, if any.
    pub cluster: Option<Access>,
    /// The public side.
    pub edges: Edges,
    /// The private side.
    pub ingress: Ingress,
    /// The other gateways, if it is one of several.
    pub peers: Option<PeersConfig>,
    /// Heartbeat period that edges are told.
    pub heartbeat: Duration,
    /// Limits of each link to an edge.
    pub link: LinkConfig,
    /// How long a stream may last without moving a byte.
    pub timeouts: Timeouts,
    /// How long requests are still taken after the first signal.
    pub drain_delay: Duration,
    /// How long streams may go on after that.
    pub drain_timeout: Duration,
    /// Where the admin listener is, if anywhere.
    pub admin: Option<SocketAddr>,
    /// Logs.
    pub log: LogConfig,
}

/// The public side.
#[derive(Clone, Debug)]
pub struct Edges {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Credentials, and the CA of edges.
    pub tls: Files,
    /// Where edges reach this very gateway, if they can.
    pub address: Option<Target>,
    /// Links at one time.
    pub max_links: usize,
    /// Links at one time of any one node.
    pub max_links_per_node: usize,
    /// How long a new connection has to become a link.
    pub handshake_timeout: Duration,
}

/// The private side. At least one of its listeners is there.
#[derive(Clone, Debug)]
pub struct Ingress {
    /// TCP with mutual TLS.
    pub tcp: Option<IngressTcp>,
    /// A Unix socket.
    pub unix: Option<IngressUnix>,
    /// Connections at one time, on each listener.
    pub max_connections: usize,
    /// Streams carried at one time.
    pub max_streams: usize,
    /// Streams of one caller to one node at one time, if that is bounded.
    pub max_streams_per_caller: Option<NonZeroUsize>,
    /// Requests at one time on one HTTP/2 connection.
    pub max_streams_per_connection: u32,
    /// How long a client has to send the head of its request.
    pub header_timeout: Duration,
    /// Largest head of a request, in bytes.
    pub max_header_size: usize,
    /// How long reaching a target may take.
    pub dial_timeout: Duration,
}

/// Ingress over TCP with mutual TLS.
#[derive(Clone, Debug)]
pub struct IngressTcp {
    /// Where to listen.
    pub listen: SocketAddr,
    /// Credentials, and the CA of clients.
    pub tls: Files,
    /// Who may connect, by a name in the certificate. Empty: every certificate of the CA.
    pub allowed_clients: Vec<String>,
}

/// Ingress over a Unix socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct IngressUnix {
    /// The socket's file.
    pub path: PathBuf,
    /// The file's mode.
    pub mode: u32,
}

/// A name in a client's certificate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClientName(String);

impl Parse for ClientName {
    const PLACEHOLDER: &'static str = "NAME";
    const EXPECTED: &'static str = "a common name, DNS name or URI";

    fn parse(text: &str) -> Result<Self, String> {
        if text.trim().is_empty() { Err(not_expected::<Self>(text)) } else { Ok(Self(text.to_owned())) }
    }
}

/// The mode of a file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileMode(u32);

impl Parse for FileMode {
    const PLACEHOLDER: &'static str = "MODE";
    const EXPECTED: &'static str = "a file mode in octal, such as 0660";

    fn parse(text: &str) -> Result<Self, String> {
        let mode = u32::from_str_radix(text, 8).ok().filter(|mode| *mode <= 0o777 && !text.starts_with('+'));
        mode.map(Self).ok_or_else(|| not_expected::<Self>(text))
    }
}

impl fmt::Display for FileMode {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04o}", self.0)
    }
}

const MILLISECOND: Duration = Duration::from_millis(1);
const HOUR: Duration = Duration::from_secs(3600);
/// The smallest head of a request that is worth reading.
const MIN_HEADER: usize = 1024;

impl Settings {
    /// Everything that no single value can show, all of it at once.
    fn validate(self, problems: &mut Problems) -> Option<Config> {
        self.check_ranges(problems);
        self.check_listeners(problems);
        grant::check(&self.gateway.grants, problems);
        grant::check_sizes(&self.gateway.grants, problems);
        let gateway_id = self.gateway_id(problems);
        let edges = self.edges(problems);
        let ingress = self.ingress(problems);
        let windows = Arc::new(WindowPool::new(self.link.receive_window_total.value.0));
        let peers = self.peers.config(&self.etcd, &windows, problems);
        Some(Config {
            gateway_id: gateway_id?,
            grants: grant::table(self.gateway.grants.value),
            cluster: self.kubernetes.kubeconfig.value.into_access(),
            edges: edges?,
            ingress: ingress?,
            peers,
            heartbeat: self.link.heartbeat.value,
            link: LinkConfig {
                handshake_timeout: self.edges.handshake_timeout.value,
                max_streams: self.link.max_streams.value,
                window_budget: self.link.receive_window.value.0,
                window_pool: Some(windows),
                // Streams go from the gateway to the edge only.
                accept_streams: false,
                ..LinkConfig::default()
            },
            timeouts: self.streams.timeouts(WHOSE),
            drain_delay: self.drain.delay.value,
            drain_timeout: self.drain.timeout.value,
            admin: self.admin.listen.value.into_option(),
            log: self.log.into(),
        })
    }

    fn check_ranges(&self, problems: &mut Problems) {
        let duration = |value: &Duration| humantime::format_duration(*value);
        let wait = MILLISECOND..=HOUR;
        problems.within(&self.edges.max_links, &(1..=1_000_000), usize::to_string);
        problems.within(&self.edges.max_links_per_node, &(1..=1024), usize::to_string);
        problems.within(&self.edges.handshake_timeout, &wait, duration);
        problems.within(&self.ingress.max_connections, &(1..=1_000_000), usize::to_string);
        problems.within(&self.ingress.max_streams, &(1..=1_000_000), usize::to_string);
        problems.within(&self.ingress.max_streams_per_connection, &(1..=10_000), u32::to_string);
        problems.within(&self.ingress.header_timeout, &wait, duration);
        problems.within(&self.ingress.max_header_size, &(Size(MIN_HEADER)..=Size(1 << 20)), |size| *size);
        problems.within(&self.ingress.dial_timeout, &wait, duration);
        problems.within(&self.link.heartbeat, &(Duration::from_millis(100)..=HOUR), duration);
        problems.within(&self.link.max_streams, &(1..=65_536), usize::to_string);
        problems.within(&self.link.receive_window, &(Size(0)..=Size(4 << 30)), |size| *size);
        problems.within(&self.link.receive_window_total, &(Size(0)..=Size(512 << 30)), |size| *size);
        self.streams.check(problems);
        problems.within(&self.drain.delay, &(Duration::ZERO..=HOUR), duration);
        problems.within(&self.drain.timeout, &(Duration::ZERO..=HOUR), duration);
    }

    /// Notes listeners that would be in each other's way.
    fn check_listeners(&self, problems: &mut Problems) {
        let edges = *self.edges.listen;
        let ingress = self.ingress.listen.value.into_option();
        let admin = self.admin.listen.value.into_option();
        if ingress.is_some_and(|ingress| clash(ingress, edges)) {
            problems.at(
                &self.ingress.listen,
                format!("{edges} is where edges connect (edges.listen): use another port"),
            );
        }
        let peers = self.peers.listen.value.into_option();
        for (other, key) in [(Some(edges), "edges.listen"), (ingress, "ingress.listen")] {
            if peers.zip(other).is_some_and(|(peers, other)| clash(peers, other)) {
                problems.at(&self.peers.listen, format!("the port is that of {key} too: use another"));
            }
        }
        let others = [(Some(edges), "edges.listen"), (ingress, "ingress.listen"), (peers, "peers.listen")];
        for (other, key) in others {
            if admin.zip(other).is_some_and(|(admin, other)| clash(admin, other)) {
                problems.at(&self.admin.listen, format!("the port is that of {key} too: use another"));
            }
        }
        if ingress.is_none() && self.ingress.unix.is_none() {
            let text = "is none and ingress.unix is not set, so that no control plane could connect: set one of them";
            problems.at(&self.ingress.listen, text);
        }
    }

    fn gateway_id(&self, problems: &mut Problems) -> Option<GatewayId> {
        if let Some(id) = &self.gateway.gateway_id.value {
            return Some(id.clone());
        }
        match host_name().unwrap_or_default().to_lowercase().parse() {
            Ok(id) => Some(id),
            Err(error) => {
                problems
                    .missing(&self.gateway.gateway_id, &format!("the host name cannot serve, since {error}"));
                None
            }
        }
    }

    fn edges(&self, problems: &mut Problems) -> Option<Edges> {
        let EdgesSettings { cert, key, client_ca, .. } = &self.edges;
        let cert = problems.require(cert, "a gateway proves by a certificate who it is");
        let key = problems.require(key, "the private key that belongs to edges.cert");
        let ca = problems.require(client_ca, "the CA that the edges' certificates come from");
        Some(Edges {
            listen: *self.edges.listen,
            tls: Files { cert: cert?, key: key?, ca: ca? },
            address: self.edges.address.value.clone(),
            max_links: *self.edges.max_links,
            max_links_per_node: *self.edges.max_links_per_node,
            handshake_timeout: *self.edges.handshake_timeout,
        })
    }

    fn ingress(&self, problems: &mut Problems) -> Option<Ingress> {
        let tcp = match self.ingress.listen.value {
            OrNone::None => None,
            OrNone::Some(listen) => Some(self.ingress_tcp(listen, problems)?),
        };
        let mode = self.ingress.unix_mode.value.0;
        Some(Ingress {
            tcp,
            unix: self.ingress.unix.value.clone().map(|path| IngressUnix { path, mode }),
            max_connections: *self.ingress.max_connections,
            max_streams: *self.ingress.max_streams,
            max_streams_per_caller: self.ingress.max_streams_per_caller.value.into_option(),
            max_streams_per_connection: *self.ingress.max_streams_per_connection,
            header_timeout: *self.ingress.header_timeout,
            max_header_size: self.ingress.max_header_size.value.0,
            dial_timeout: *self.ingress.dial_timeout,
        })
    }

    fn ingress_tcp(&self, listen: SocketAddr, problems: &mut Problems) -> Option<IngressTcp> {
        let IngressSettings { cert, key, client_ca, allowed_clients, .. } = &self.ingress;
        let or_unix = "or set ingress.listen to none and use ingress.unix alone";
        let cert = problems.require(cert, &format!("the certificate that the control plane sees, {or_unix}"));
        let key = problems.require(key, "the private key that belongs to ingress.cert");
        let ca = problems.require(client_ca, "the CA that the control plane's certificates come from");
        Some(IngressTcp {
            listen,
            tls: Files { cert: cert?, key: key?, ca: ca? },
            allowed_clients: allowed_clients.iter().map(|(name, _)| name.0.clone()).collect(),
        })
    }
}

/// Whether two listeners would want the same port. Port 0 is any free one.
fn clash(one: SocketAddr, other: SocketAddr) -> bool {
    let overlap = one.ip() == other.ip() || one.ip().is_unspecified() || other.ip().is_unspecified();
    one.port() == other.port() && one.port() != 0 && overlap
}

/// The host's name, as the kernel has it.
fn host_name() -> Option<String> {
    fs::read_to_string("/proc/sys/kernel/hostname").ok().map(|name| name.trim().to_owned())
}

impl Config {
    /// How many descriptors it may have open, without connections that have not shown yet who they are.
    pub fn descriptors(&self) -> [Need; 4] {
        let ingress_doors =
            usize::from(self.ingress.tcp.is_some()) + usize::from(self.ingress.unix.is_some());
        [
            Need { setting: "edges.max_links", count: edge_places(self.edges.max_links) },
            Need { setting: "ingress.max_connections", count: ingress_doors * self.ingress.max_connections },
            Need { setting: "peers.listen", count: self.peers.as_ref().map_or(0, |_| 2 * MAX_PEER_LINKS) },
            Need { setting: "admin.listen", count: self.admin.map_or(0, |_| 1 + admin::MAX_CONNECTIONS) },
        ]
    }

    /// How many doors there are where each has to show who it is.
    pub(crate) fn guarded_doors(&self) -> usize {
        1 + usize::from(self.ingress.tcp.is_some()) + usize::from(self.peers.is_some())
    }

    /// Reads the credentials of each side and for the cluster, and checks that they fit together. All that is wrong, one
    /// line each. Nothing is contacted.
    pub fn check_files(&self) -> Result<(), Vec<String>> {
        let sides = [
            ("edges", Domain::Edge, Some(&self.edges.tls)),
            ("ingress", Domain::ControlPlane, self.ingress.tcp.as_ref().map(|tcp| &tcp.tls)),
            ("peers", Domain::Peer, self.peers.as_ref().map(|peers| &peers.tls)),
        ];
        let check = |(group, domain, files): (&str, Domain, Option<&Files>)| {
            let error = ServerTls::load(domain, files?.clone()).err()?;
            Some(format!("{group}: {error}"))
        };
        let mut problems: Vec<String> = sides.into_iter().filter_map(check).collect();
        problems.extend(self.shared_ca());
        // A listener's problem is the client's too, and need not be said twice.
        if problems.is_empty() {
            problems.extend(self.peers.iter().flat_map(PeersConfig::check));
        }
        let cluster = self.cluster.as_ref().and_then(|access| access.check().err());
        problems.extend(cluster.map(|error| format!("kubernetes.kubeconfig: {error}")));
        if problems.is_empty() { Ok(()) } else { Err(problems) }
    }

    /// All files with credentials that it names, whose own names are known from the start.
    pub(crate) fn credential_files(&self) -> Vec<PathBuf> {
        let mut files = Vec::new();
        let mut add = |path: &PathBuf| files.push(path.clone());
        let tcp = self.ingress.tcp.as_ref().map(|tcp| &tcp.tls);
        let peers = self.peers.as_ref().map(|peers| &peers.tls);
        for Files { cert, key, ca } in [Some(&self.edges.tls), tcp, peers].into_iter().flatten() {
            [cert, key, ca].into_iter().for_each(&mut add);
        }
        if let Some(Finding::Etcd(etcd, _)) = self.peers.as_ref().map(|peers| &peers.finding) {
            etcd.files().for_each(&mut add);
        }
        if let Some(Access::Kubeconfig(path)) = &self.cluster {
            add(path);
        }
        files
    }

    /// Where one CA serves both sides, its certificates alone do not tell a client from an edge.
    pub(crate) fn shared_ca(&self) -> Option<String> {
        let tcp = self.ingress.tcp.as_ref()?;
        if !tcp.allowed_clients.is_empty() {
            return None;
        }
        let read = |path: &Path| fs::read(path).ok().map(|pem| pem.trim_ascii().to_vec());
        let (edges, clients) = (read(&self.edges.tls.ca)?, read(&tcp.tls.ca)?);
        (edges == clients).then(|| {
            "ingress.allowed_clients: is not set, but ingress.client_ca and edges.client_ca are the same CA, so that \
             whoever it gave a certificate could use this gateway: name the clients, such as kube-apiserver, or use \
             another CA"
                .to_owned()
        })
    }
}

#[cfg(test)]
mod tests;
