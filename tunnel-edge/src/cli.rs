//! The command line of `tunnel-edge`.

use std::{
    io::{self, Write},
    process::ExitCode,
};

use clap::{Parser, Subcommand};
use humantime::format_duration;
use tunnel_core::NodeId;

use crate::{
    config::{Config, Settings},
    daemon::settings::{Flags, Size, environment},
};

const RUN_EXAMPLES: &str = "\x1b[1;4mExamples:\x1b[0m
  With a file, and one value of it replaced:
      tunnel-edge run --config /etc/edge-tunnel/edge.yaml --log-level debug

  With a kubelet's own certificate, and nothing else:
      tunnel-edge run --gateways gateway.example:8443 --tls-ca /etc/edge-tunnel/ca.crt \\
          --tls-cert /var/lib/kubelet/pki/kubelet-client-current.pem \\
          --tls-key /var/lib/kubelet/pki/kubelet-client-current.pem

\x1b[1;4mFile:\x1b[0m
  node: edge-a
  gateways: [gateway.example:8443]
  tls: {cert: edge-a.crt, key: edge-a.key, ca: ca.crt}
  allow: [\"node:10250\", \"10.0.0.0/8:443\"]

Documentation: docs/configuration.md in the source tree.";

/// Carries the control plane's connections to this Kubernetes node, over a link that it dials out itself.
#[derive(Debug, Parser)]
#[command(name = "tunnel-edge", version, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// What to do.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Hold links to gateways, and dial what they ask for and the policy allows
    ///
    /// Every setting can be given as a flag, as an environment variable, or in a YAML file, and wins in that order.
    /// `--link-max-streams 64` is `TUNNEL_EDGE_LINK_MAX_STREAMS=64`, or `link: {max_streams: 64}` in the file. Durations are
    /// written with their unit, as in 500ms, 10s, 1m30s; sizes are bytes, or have a unit, as in 64KiB, 1MiB.
    /// A flag for a list may come several times, or once with commas.
    #[command(after_long_help = RUN_EXAMPLES)]
    Run(Flags<Settings>),
    /// Check settings and credentials, and say what an edge would do with them
    ///
    /// Takes what `run` takes. Names everything that is wrong, with its place, and then exits with 1.
    CheckConfig(Flags<Settings>),
}

/// What the binary goes on with, after the command line has been dealt with.
#[derive(Debug)]
pub enum Next {
    /// Run an edge.
    Run(Box<Config>),
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
                    let text = format!("{problems}\n{}; nothing was started\n", count(problems.count()));
                    io::stderr().write_all(text.as_bytes())?;
                    Ok(Next::Exit(ExitCode::FAILURE))
                }
            },
            Command::CheckConfig(flags) => check(&flags).map(Next::Exit),
        }
    }
}

/// `1 problem`, `2 problems`.
pub fn count(problems: usize) -> String {
    format!("{problems} problem{}", if problems == 1 { "" } else { "s" })
}

fn check(flags: &Flags<Settings>) -> io::Result<ExitCode> {
    let (problems, found) = match flags.load(environment) {
        Ok(config) => match config.check_files() {
            Ok(node) => {
                io::stdout().write_all(summary(&config, &node).as_bytes())?;
                return Ok(ExitCode::SUCCESS);
            }
            Err(problem) => (problem, 1),
        },
        Err(problems) => (problems.to_string(), problems.count()),
    };
    io::stderr().write_all(format!("{problems}\n{}\n", count(found)).as_bytes())?;
    Ok(ExitCode::FAILURE)
}

/// What an edge would do with this configuration.
fn summary(config: &Config, node: &NodeId) -> String {
    let list = |items: &mut dyn Iterator<Item = String>| items.collect::<Vec<_>>().join(", ");
    let rules = list(&mut config.policy.rules().iter().map(ToString::to_string));
    let rules = if rules.is_empty() { "nothing: every stream is refused".to_owned() } else { rules };
    let admin = config.admin.map_or_else(|| "off".to_owned(), |address| format!("http://{address}"));
    format!(
        "The configuration is good. This edge would
  be node     {node}
  dial        {} (one at a time; proxy: {})
  hold        links to {} gateways, or to all if there are fewer
  allow       {rules}
  drain for   {}
  answer at   {admin}
  use         at most {} for received data on each link ({} streams x 256KiB + {})
",
        list(&mut config.gateways.iter().map(ToString::to_string)),
        config.proxy,
        config.redundancy,
        format_duration(config.drain_timeout),
        Size(config.link.worst_case_memory()),
        config.link.max_streams,
        Size(config.link.window_budget),
    )
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
