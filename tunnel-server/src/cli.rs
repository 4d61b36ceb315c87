//! The command line of `tunnel-server`.

mod pki;

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Args, Parser, Subcommand};
use humantime::format_duration;
use tunnel_core::{LINK_BUFFERS, RELAY_BUFFERS, STREAM_WINDOW};
use tunnel_edge::daemon::settings::{Flags, Size, environment};

pub use pki::PkiCommand;

use crate::{
    config::{Config, Finding, PeersConfig, Settings},
    gateway::MAX_PEER_LINKS,
    ingress::HTTP2_WINDOW,
};

/// What one stream has in memory at most, its windows not grown: those of the link and of HTTP/2, and what lies between.
const STREAM_BUFFERS: usize = STREAM_WINDOW + HTTP2_WINDOW as usize + RELAY_BUFFERS;

const RUN_EXAMPLES: &str = "\x1b[1;4mExamples:\x1b[0m
  A gateway with certificates of its own making, then a second look before it runs:
      tunnel-server pki init pki --dns gateway.example
      tunnel-server check-config --config gateway.yaml
      tunnel-server run --config gateway.yaml

  With the file, and two values of it replaced:
      TUNNEL_SERVER_LOG_FORMAT=json tunnel-server run --config gateway.yaml --drain-timeout 2m

\x1b[1;4mFile:\x1b[0m
  edges:
    cert: pki/edge/gateway.crt
    key: pki/edge/gateway.key
    client_ca: pki/edge/ca.crt
  ingress:
    cert: pki/control-plane/gateway.crt
    key: pki/control-plane/gateway.key
    client_ca: pki/control-plane/ca.crt
    allowed_clients: [kube-apiserver]
  grants:
    - node: edge-a
      cidrs: [10.9.0.0/16]
      hosts: [db.edge-a.example]

Documentation: docs/configuration.md in the source tree.";

/// Carries a control plane's connections to Kubernetes nodes, over the links that their edges dial out.
#[derive(Debug, Parser)]
#[command(name = "tunnel-server", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a gateway
    ///
    /// Every setting can be given as a flag, as an environment variable, or in a YAML file, and wins in that order.
    /// `--link-max-streams 64` is `TUNNEL_SERVER_LINK_MAX_STREAMS=64`, or `link: {max_streams: 64}` in the file. Durations are
    /// written with their unit, as in 500ms, 10s, 1m30s; sizes are bytes, or have a unit, as in 64KiB, 1MiB. A flag for a
    /// list may come several times, or once with commas (grants: with semicolons).
    #[command(after_long_help = RUN_EXAMPLES)]
    Run(Flags<Settings>),
    /// Check settings and credentials, and say what a gateway would do with them
    ///
    /// Takes what `run` takes. Names everything that is wrong, with its place, and then exits with 1.
    CheckConfig(Flags<Settings>),
    /// Make CAs and certificates, for a start without a PKI
    #[command(subcommand)]
    Pki(PkiCommand),
    /// Run a gateway and edges in this process, with throwaway certificates, to try things out
    Dev(DevArgs),
}

/// How `dev` goes about it.
#[derive(Clone, Debug, Args)]
pub struct DevArgs {
    /// Send traffic through the tunnel, say how it went, and end
    #[arg(long)]
    pub check: bool,
}

/// What the binary goes on with, after the command line has been dealt with.
#[derive(Debug)]
pub enum Next {
    /// Run a gateway.
    Run(Box<Config>),
    /// Run everything in this process.
    Dev(DevArgs),
    /// Nothing more: all was said.
    Exit(ExitCode),
}

impl Cli {
    /// Does what needs no runtime.
    pub fn prepare(self) -> io::Result<Next> {
        match self.command {
            Command::Run(flags) => match flags.load(environment) {
                Ok(config) => Ok(Next::Run(config.into())),
                Err(problems) => {
                    let count = tunnel_edge::cli::count(problems.count());
                    writeln!(io::stderr(), "{problems}\n{count}; nothing was started")?;
                    Ok(Next::Exit(ExitCode::FAILURE))
                }
            },
            Command::CheckConfig(flags) => check(&flags).map(Next::Exit),
            Command::Pki(command) => command.execute().map(Next::Exit),
            Command::Dev(args) => Ok(Next::Dev(args)),
        }
    }
}

fn check(flags: &Flags<Settings>) -> io::Result<ExitCode> {
    let (problems, count) = match flags.load(environment) {
        Ok(config) => match config.check_files() {
            Ok(()) => {
                io::stdout().write_all(summary(&config).as_bytes())?;
                return Ok(ExitCode::SUCCESS);
            }
            Err(problems) => (problems.join("\n"), problems.len()),
        },
        Err(problems) => (problems.to_string(), problems.count()),
    };
    writeln!(io::stderr(), "{problems}\n{}", tunnel_edge::cli::count(count))?;
    Ok(ExitCode::FAILURE)
}

/// What a gateway would do with this configuration.
fn summary(config: &Config) -> String {
    let ingress = &config.ingress;
    let tcp = ingress.tcp.as_ref().map(|tcp| {
        let clients = match tcp.allowed_clients.as_slice() {
            [] => "from any client of its CA".to_owned(),
            names => format!("from {}", names.join(", ")),
        };
        format!("{} over TLS {clients}", tcp.listen)
    });
    let unix = ingress.unix.as_ref().map(|unix| format!("{} (mode {:04o})", unix.path.display(), unix.mode));
    let listeners = [tcp, unix].into_iter().flatten().collect::<Vec<_>>().join(", ");
    let admin = config.admin.map_or_else(|| "off".to_owned(), |address| format!("http://{address}"));
    let peers = config.peers.as_ref().map_or_else(|| "nowhere: it is the only gateway".to_owned(), meeting);
    let of_one_caller = match ingress.max_streams_per_caller {
        Some(max) => format!(", and {max} of one caller to one node"),
        None => String::new(),
    };
    let cluster = config.cluster.as_ref();
    let cluster = cluster.map(|access| format!(" and the cluster's nodes ({access})")).unwrap_or_default();
    format!(
        "The configuration is good. This gateway would
  be gateway       {}
  take edges at    {} ({} links, {} a node)
  take clients at  {listeners}
  meet gateways    {peers}
  carry            {} streams over {} connections, at most {} over one{of_one_caller}
  route            by node name, then by its grants{cluster}
  beat             every {}
  drain for        {} after a delay of {}
  answer at        {admin}
{}",
        config.gateway_id,
        config.edges.listen,
        config.edges.max_links,
        config.edges.max_links_per_node,
        ingress.max_streams,
        ingress.max_connections,
        ingress.max_streams_per_connection,
        format_duration(config.heartbeat),
        format_duration(config.drain_timeout),
        format_duration(config.drain_delay),
        memory(config),
    )
}

/// Where a gateway and the others of its cluster meet.
fn meeting(peers: &PeersConfig) -> String {
    let how = match &peers.finding {
        Finding::List(list) => {
            list.iter().map(|member| member.address.to_string()).collect::<Vec<_>>().join(", ")
        }
        Finding::Etcd(etcd, own) => {
            let endpoints: Vec<String> = etcd.endpoints.iter().map(ToString::to_string).collect();
            format!("etcd at {}, as {}", endpoints.join(", "), own.address)
        }
    };
    format!("at {}, and find them by {how}", peers.listen)
}

/// The worst case: everything that the limits allow is there at once, and nobody reads.
fn memory(config: &Config) -> String {
    let (ingress, link) = (&config.ingress, &config.link);
    let streams = ingress.max_streams.min(config.edges.max_links.saturating_mul(link.max_streams));
    let of_streams = streams.saturating_mul(STREAM_BUFFERS);
    // Only a link that carries a stream can have grown its windows.
    let busy_links = streams.min(config.edges.max_links);
    let (peer_links, peer_window) =
        config.peers.as_ref().map_or((0, 0), |peers| (2 * MAX_PEER_LINKS, peers.link.window_budget));
    let of_windows = link.window_pool.as_ref().map_or(0, |pool| pool.left()).min(
        busy_links.saturating_mul(link.window_budget).saturating_add(peer_links.saturating_mul(peer_window)),
    );
    let busy_links = busy_links.saturating_add(peer_links);
    let of_buffers = busy_links.saturating_mul(LINK_BUFFERS);
    let of_heads = ingress.max_connections.saturating_mul(ingress.max_header_size);
    // What is handed on has a second window, on the link of the peer.
    let of_hops = config.peers.as_ref().map_or(0, |_| streams.saturating_mul(STREAM_WINDOW));
    let all = [of_streams, of_windows, of_buffers, of_heads, of_hops];
    let total = all.into_iter().fold(0, usize::saturating_add);
    let peers = if of_hops > 0 {
        let (of_hops, window) = (rounded(of_hops), Size(STREAM_WINDOW));
        format!("      {of_hops:>10}  {streams} streams x {window} on links between gateways\n")
    } else {
        String::new()
    };
    format!(
        "  buffer at most   {}, if every limit is reached at once and nobody reads:
      {:>10}  {streams} streams x {}
      {:>10}  windows that have grown (link.receive_window, link.receive_window_total)
      {:>10}  {busy_links} links x {} that are being sent or read
      {:>10}  {} connections x {} (ingress.max_header_size)
{peers}",
        rounded(total),
        rounded(of_streams),
        Size(STREAM_BUFFERS),
        rounded(of_windows),
        rounded(of_buffers),
        Size(LINK_BUFFERS),
        rounded(of_heads),
        ingress.max_connections,
        Size(ingress.max_header_size),
    )
}

/// A size to take in at a glance.
fn rounded(bytes: usize) -> String {
    let units = [("TiB", 1 << 40), ("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)];
    match units.into_iter().find(|(_, unit)| bytes >= *unit) {
        Some((name, unit)) => format!("{}.{} {name}", bytes / unit, bytes % unit * 10 / unit),
        None => format!("{bytes} B"),
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn sizes_are_rounded_down_to_a_glance() {
        let shown = [0, 1023, 1536, 5 << 20, (3 << 30) + (1 << 29)].map(rounded);
        assert_eq!(shown, ["0 B", "1023 B", "1.5 KiB", "5.0 MiB", "3.5 GiB"]);
    }
}
