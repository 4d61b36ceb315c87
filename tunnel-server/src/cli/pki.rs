//! `tunnel-server pki`: CAs and certificates as files.

use std::{
    io::{self, Write},
    net::IpAddr,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Subcommand, ValueEnum};
use tunnel_core::{GatewayId, NodeId, tls::Domain};

use crate::pki::{
    AltName, Profile, Validity,
    files::{self, FilesError, Init},
};

const INIT_EXAMPLES: &str = "\x1b[1;4mExamples:\x1b[0m
  tunnel-server pki init pki --dns gateway.example --ip 192.0.2.7
  tunnel-server pki issue edge edge-a --dir pki

\x1b[1;4mFiles:\x1b[0m
  DIR/edge/           what edges and the gateway's public side need
  DIR/control-plane/  what kube-apiserver and the gateway's private side need
  DIR/peer/           what gateways of one cluster need for each other
  Each has ca.crt, ca.key, gateway.crt and gateway.key; control-plane also has client.crt and client.key.
  Keep the ca.key files off the gateways: only `pki issue` needs them.";

const ISSUE_EXAMPLES: &str = "\x1b[1;4mExamples:\x1b[0m
  tunnel-server pki issue edge edge-a --dir pki --out edge-a
  tunnel-server pki issue gateway gw-2 --dir pki --domain edge --dns gateway.example
  tunnel-server pki issue client prometheus --dir pki --days 90
  tunnel-server pki issue peer gw-2 --dir pki";

/// Make CAs and certificates.
#[derive(Debug, Subcommand)]
pub enum PkiCommand {
    /// Make three separate CAs, and the certificates of a first gateway and a first client
    ///
    /// Overwrites nothing. Keys are ECDSA P-256, and only their owner can read them.
    #[command(after_long_help = INIT_EXAMPLES)]
    Init(InitArgs),
    /// Issue one certificate with a CA that `pki init` made
    ///
    /// Writes NAME.crt and NAME.key beside the CA, or where --out says. Overwrites nothing.
    #[command(after_long_help = ISSUE_EXAMPLES)]
    Issue(IssueArgs),
}

/// Of `pki init`.
#[derive(Debug, Args)]
pub struct InitArgs {
    /// Directory to make the PKI in
    #[arg(value_name = "DIR")]
    directory: PathBuf,
    #[command(flatten)]
    names: NamesArgs,
    /// Name of the first gateway
    #[arg(long, value_name = "NAME", default_value = "gateway")]
    gateway_id: GatewayId,
    /// Name of the first client
    #[arg(long, value_name = "NAME", default_value = "kube-apiserver")]
    client: FileName,
    #[command(flatten)]
    days: DaysArgs,
    /// Days that the CAs are valid
    #[arg(long, value_name = "N", default_value_t = 3650, value_parser = clap::value_parser!(u32).range(1..=36500))]
    ca_days: u32,
}

/// What a server may be called.
#[derive(Debug, Args)]
struct NamesArgs {
    /// DNS name that the gateway is reached by; may be repeated. Without any --dns and --ip: localhost
    #[arg(long, value_name = "NAME")]
    dns: Vec<String>,
    /// Address that the gateway is reached by; may be repeated. Without any --dns and --ip: loopback
    #[arg(long, value_name = "ADDR")]
    ip: Vec<IpAddr>,
}

impl NamesArgs {
    fn names(&self) -> Vec<AltName> {
        let dns = self.dns.iter().cloned().map(AltName::Dns);
        let names: Vec<AltName> = dns.chain(self.ip.iter().copied().map(AltName::Ip)).collect();
        if !names.is_empty() {
            return names;
        }
        let loopback: [IpAddr; 2] = [[127, 0, 0, 1].into(), std::net::Ipv6Addr::LOCALHOST.into()];
        [AltName::Dns("localhost".to_owned())].into_iter().chain(loopback.map(AltName::Ip)).collect()
    }
}

#[derive(Debug, Args)]
struct DaysArgs {
    /// Days that certificates are valid
    #[arg(long, value_name = "N", default_value_t = 365, value_parser = clap::value_parser!(u32).range(1..=36500))]
    days: u32,
}

fn days(days: u32) -> Validity {
    Validity::lasting(Duration::from_secs(u64::from(days) * 24 * 3600))
}

/// Of `pki issue`.
#[derive(Debug, Args)]
pub struct IssueArgs {
    #[command(subcommand)]
    what: Issue,
}

#[derive(Debug, Subcommand)]
enum Issue {
    /// An edge's client certificate: CN=system:node:NODE, O=system:nodes
    Edge {
        /// The node's name in Kubernetes
        #[arg(value_name = "NODE")]
        node: NodeId,
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// A gateway's server certificate, for one of its two sides
    Gateway {
        /// The gateway's name
        #[arg(value_name = "NAME")]
        name: GatewayId,
        /// Who will see it
        #[arg(long)]
        domain: ServerSide,
        #[command(flatten)]
        names: NamesArgs,
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// A client certificate for the control plane
    Client {
        /// The client's name, as the gateway's list of allowed clients may have it
        #[arg(value_name = "NAME")]
        name: FileName,
        #[command(flatten)]
        place: PlaceArgs,
    },
    /// A gateway's certificate for its peers
    Peer {
        /// The gateway's name
        #[arg(value_name = "NAME")]
        name: GatewayId,
        #[command(flatten)]
        names: NamesArgs,
        #[command(flatten)]
        place: PlaceArgs,
    },
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum ServerSide {
    /// Edges
    Edge,
    /// The control plane
    ControlPlane,
}

#[derive(Debug, Args)]
struct PlaceArgs {
    /// Directory that `pki init` has made
    #[arg(long = "dir", value_name = "DIR")]
    directory: PathBuf,
    /// Directory for the two files [default: beside the CA]
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    days: DaysArgs,
}

/// A name that can also be a file's.
#[derive(Clone, Debug)]
struct FileName(String);

impl std::str::FromStr for FileName {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let plain = |c: char| c.is_ascii_alphanumeric() || "-_.:@".contains(c);
        if (1..=64).contains(&text.len()) && !text.starts_with('.') && text.chars().all(plain) {
            return Ok(Self(text.to_owned()));
        }
        Err("use 1 to 64 letters, digits and any of - _ . : @, not beginning with a dot".to_owned())
    }
}

impl PkiCommand {
    /// Does it, and says which files there are now.
    pub fn execute(&self) -> io::Result<ExitCode> {
        let written = match self {
            Self::Init(args) => args.init(),
            Self::Issue(args) => args.what.issue(),
        };
        match written {
            Ok(paths) => {
                let mut out = io::stdout().lock();
                for path in paths {
                    writeln!(out, "{}", path.display())?;
                }
                Ok(ExitCode::SUCCESS)
            }
            Err(error) => {
                writeln!(io::stderr(), "{error}")?;
                Ok(ExitCode::FAILURE)
            }
        }
    }
}

impl InitArgs {
    fn init(&self) -> Result<Vec<PathBuf>, FilesError> {
        let init = Init {
            gateway: self.gateway_id.clone(),
            names: self.names.names(),
            client: self.client.0.clone(),
            // A certificate that outlives its CA would only seem to be valid.
            validity: days(self.days.days.min(self.ca_days)),
            ca_validity: days(self.ca_days),
        };
        files::init(&self.directory, &init)
    }
}

impl Issue {
    fn issue(&self) -> Result<Vec<PathBuf>, FilesError> {
        match self {
            Self::Edge { node, place } => {
                place.issue(Domain::Edge, &Profile::Edge { node: node.clone() }, node.as_str())
            }
            Self::Gateway { name, domain, names, place } => {
                let domain = match domain {
                    ServerSide::Edge => Domain::Edge,
                    ServerSide::ControlPlane => Domain::ControlPlane,
                };
                let profile = Profile::Gateway { name: name.clone(), names: names.names() };
                place.issue(domain, &profile, name.as_str())
            }
            Self::Client { name, place } => {
                place.issue(Domain::ControlPlane, &Profile::Client { name: name.0.clone() }, &name.0)
            }
            Self::Peer { name, names, place } => {
                let profile = Profile::Peer { name: name.clone(), names: names.names() };
                place.issue(Domain::Peer, &profile, name.as_str())
            }
        }
    }
}

impl PlaceArgs {
    fn issue(&self, domain: Domain, profile: &Profile, name: &str) -> Result<Vec<PathBuf>, FilesError> {
        let out = self.out.as_deref().map(Path::new);
        files::issue(&self.directory, domain, profile, name, days(self.days.days), out)
    }
}
