//! The load generator: holds N edges against real gateways, and measures what they cost them. One command, run by people;
//! its figures stand in `docs/performance.md`.
//!
//! A gateway is the program `tunnel-server` itself, as a process of its own on loopback, with its default settings
//! (`gateway`); there may be several, which find one another (`cluster`). The edges are real agents, all in this process: TLS, protocol, backoff, policy and dialing are those of
//! `tunnel-edge`, and each has a certificate of its own (`fleet`). Requests come through the ingress and end at an echo
//! server in this process, which the edges dial over loopback (`requests`). `report` has the list of all figures.

mod certificates;
mod cluster;
mod fleet;
mod gateway;
mod report;
mod requests;

use std::{
    fs, io,
    io::Write,
    path::PathBuf,
    process::ExitCode,
    time::{Duration, Instant},
};

use clap::Parser;
use tokio::time::sleep;
use tunnel_core::{GatewayId, NodeId};

use crate::{
    certificates::{CertificateError, Certificates},
    cluster::{Gateways, Way},
    fleet::{Fleet, FleetError},
    gateway::{GatewayError, Program, Setup},
    report::{Report, Run},
    requests::{Echo, Latency, RequestError, Requests},
};

/// Beside the edges' links, files that a process has open here: requests in flight, credentials, the runtime's own.
const OTHER_FILES: u64 = 1024;
/// Local ports that are left to everything else on the machine, and to connections that have ended lately.
const OTHER_PORTS: usize = 4000;
/// How long all edges may take to get their links.
const LINK_LIMIT: Duration = Duration::from_secs(300);
/// Links that a gateway takes beside one of each edge: those of the others may all come to it.
const SPARE_LINKS: usize = 100;
/// A gateway that listens still has things to do.
const BREATH: Duration = Duration::from_secs(1);
/// Heartbeat periods until all that belongs to the links' beginning is over.
const SETTLE: u32 = 2;

/// Measures what N idle edges cost a gateway, how soon all are back after it was killed, and how long requests take. Of
/// several gateways, one is killed and stays away: its edges go to the others.
///
/// Everything is on this machine, and shares its cores. Each figure is the median of all runs; each run has new gateways.
#[derive(Debug, Parser)]
#[command(name = "tunnel-load", version, max_term_width = 100)]
struct Args {
    /// Numbers of edges to measure with, one after the other.
    #[arg(long, value_name = "N", value_delimiter = ',', default_value = "1000,5000,10000")]
    edges: Vec<usize>,
    /// Gateways, which find one another. Of several, each has its part of the edges, and each edge one link.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=16))]
    gateways: u16,
    /// Runs with each number.
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..))]
    repeat: u32,
    /// How long the gateways' processor time is measured while nothing but heartbeats happens.
    #[arg(long, value_name = "DURATION", default_value = "30s", value_parser = humantime::parse_duration)]
    rest: Duration,
    /// The gateways' heartbeat period.
    #[arg(long, value_name = "DURATION", default_value = "10s", value_parser = humantime::parse_duration)]
    heartbeat: Duration,
    /// Requests in each run; with several gateways, as many again through one that does not have the edge's link.
    #[arg(long, value_name = "N", default_value_t = 3000, value_parser = clap::value_parser!(u32).range(1..))]
    requests: u32,
    /// Requests begun per second, whether or not the earlier ones have ended.
    #[arg(long, value_name = "N", default_value_t = 200, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    rate: u32,
    /// Seed of the edges' random waits, and of which edge each request goes to.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Also write all runs and their medians to this file.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// The gateway's program. Default: under cargo, it is built first; else the one beside this program.
    #[arg(long, value_name = "PATH")]
    server: Option<PathBuf>,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error(
        "{edges} edges need {need} open files in this process and as many in the gateway, but the limit is {limit}: \
         raise it (`ulimit -Hn`, or LimitNOFILE= of the service), or ask for fewer with --edges"
    )]
    Files { edges: usize, need: u64, limit: u64 },
    #[error(
        "{edges} edges and what else this machine does need {need} local ports, but it has {have}: widen \
         net.ipv4.ip_local_port_range, or ask for fewer with --edges"
    )]
    Ports { edges: usize, need: usize, have: usize },
    #[error("cannot write {path}: {error}")]
    Json { path: PathBuf, error: io::Error },
    #[error("the measurement cannot be set up: {0}")]
    Setup(#[from] io::Error),
    #[error("certificates cannot be made: {0}")]
    Certificates(#[from] CertificateError),
    #[error(
        "of {requests} requests that should have gone {} hop between gateways, {found} went over one", if *hop { "one" } else { "no" }
    )]
    Hops { requests: u32, hop: bool, found: u64 },
    #[error(transparent)]
    Gateway(#[from] GatewayError),
    #[error(transparent)]
    Fleet(#[from] FleetError),
    #[error(transparent)]
    Requests(#[from] RequestError),
}

fn main() -> ExitCode {
    match act(&Args::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            say(&format!("tunnel-load: {error}"));
            ExitCode::FAILURE
        }
    }
}

fn act(args: &Args) -> Result<(), LoadError> {
    for &edges in &args.edges {
        make_room(edges)?;
    }
    let runtime = tokio::runtime::Runtime::new()?;
    let program = runtime.block_on(Program::find(args.server.as_deref()))?;
    let mut runs = Vec::new();
    for &edges in &args.edges {
        for number in 1..=args.repeat {
            say(&format!("{edges} edges, run {number} of {}", args.repeat));
            let run = runtime.block_on(measure(args, &program, edges))?;
            say(&format!("  {run}"));
            runs.push(run);
        }
    }
    let report = Report {
        gateways: args.gateways.into(),
        heartbeat: args.heartbeat,
        requests: args.requests,
        rate: args.rate,
        runs,
    };
    let _ = write!(io::stdout(), "{report}");
    if let Some(path) = &args.json {
        let written = fs::write(path, format!("{:#}\n", report.json()));
        written.map_err(|error| LoadError::Json { path: path.clone(), error })?;
    }
    Ok(())
}

/// Progress and errors go to standard error, so that the table can be redirected.
fn say(text: &str) {
    let _ = writeln!(io::stderr(), "{text}");
}

/// Raises this process's limit of open files, which the gateway inherits, and sees whether the machine can hold so many.
fn make_room(edges: usize) -> Result<(), LoadError> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let need = edges as u64 + OTHER_FILES;
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    // Beyond the hard limit only the system's administrator may go.
    let wanted = Rlimit { current: Some(need.max(hard)), maximum: Some(need.max(hard)) };
    if limit.current.is_some_and(|soft| soft < need) && setrlimit(Resource::Nofile, wanted).is_err() {
        return Err(LoadError::Files { edges, need, limit: hard });
    }
    let range = fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range")?;
    let ends: Vec<usize> = range.split_whitespace().filter_map(|end| end.parse().ok()).collect();
    let have = ends.last().zip(ends.first()).map_or(0, |(last, first)| last + 1 - first);
    // Every edge's connection has a port of its own where all go to the same gateway.
    let need = edges + OTHER_PORTS;
    if have < need { Err(LoadError::Ports { edges, need, have }) } else { Ok(()) }
}

/// One run, with gateways of its own.
async fn measure(args: &Args, program: &Program, edges: usize) -> Result<Run, LoadError> {
    let folder = tempfile::tempdir()?;
    let (ids, nodes) = names(args.gateways, edges)?;
    let certificates = Certificates::make(folder.path(), &ids, &nodes)?;
    let (max_links, heartbeat) = (edges + SPARE_LINKS, args.heartbeat);
    let setup = Setup { program, certificates: &certificates, folder: folder.path(), max_links, heartbeat };
    let mut gateways = Gateways::new(setup, &ids)?;
    gateways.start().await?;
    let echo = Echo::start().await?;
    sleep(BREATH).await;
    let (empty, empty_left) = (gateways.memory()?, gateways.memory_left()?);

    let (begun, target) = (Instant::now(), echo.port());
    let fleet = Fleet::start(&nodes, &certificates, &gateways.edges_addresses(), target, args.seed)?;
    let linked = fleet.first_links(begun, LINK_LIMIT).await?;
    sleep(heartbeat * SETTLE).await;
    let idle = gateways.memory()?;
    let cpu_at_rest = cpu(&gateways, args.rest).await?;

    let requests = Requests { target, count: args.requests, rate: args.rate, seed: args.seed };
    let local = latency(requests, &gateways, &nodes, &certificates, Way::Local).await?;
    let forwarded = match ids.len() {
        1 => None,
        _ => Some(latency(requests, &gateways, &nodes, &certificates, Way::Forwarded).await?),
    };

    let killed = Instant::now();
    gateways.kill_one().await?;
    let again = fleet.links_again(Gateways::DOOMED, killed, LINK_LIMIT);
    let (back, recovered) = tokio::join!(again, gateways.recover());
    recovered?;
    let back = back?;
    sleep(heartbeat * SETTLE).await;
    fleet.check()?;
    let after = gateways.memory_left()?;
    // The gateways first, so that they need not follow the end of each link.
    gateways.kill().await?;
    fleet.end().await;
    let gateways = ids.len();
    Ok(Run { edges, gateways, empty, empty_left, idle, after, cpu_at_rest, linked, back, local, forwarded })
}

fn names(gateways: u16, edges: usize) -> Result<(Vec<GatewayId>, Vec<NodeId>), LoadError> {
    let ids: Result<Vec<GatewayId>, _> =
        (1..=gateways).map(|number| format!("gateway-{number}").parse()).collect();
    let nodes: Result<Vec<NodeId>, _> = (0..edges).map(|edge| format!("edge-{edge:05}").parse()).collect();
    Ok((ids.map_err(io::Error::other)?, nodes.map_err(io::Error::other)?))
}

/// How much of one core all gateways together take, over this time.
async fn cpu(gateways: &Gateways, time: Duration) -> Result<f64, LoadError> {
    let (begun, before) = (Instant::now(), gateways.processor_time()?);
    sleep(time).await;
    let busy = gateways.processor_time()?.saturating_sub(before);
    Ok(busy.as_secs_f64() / begun.elapsed().as_secs_f64())
}

/// How long requests take this way. The gateways must have counted that it was this one.
async fn latency(
    requests: Requests,
    gateways: &Gateways,
    nodes: &[NodeId],
    certificates: &Certificates,
    way: Way,
) -> Result<Latency, LoadError> {
    let before = gateways.handed_to_peers().await?;
    let latency = requests.run(&gateways.ways(nodes, way), certificates).await?;
    let found = gateways.handed_to_peers().await?.saturating_sub(before);
    let hop = way == Way::Forwarded;
    let expected = if hop { requests.count.into() } else { 0 };
    if found == expected {
        Ok(latency)
    } else {
        Err(LoadError::Hops { requests: requests.count, hop, found })
    }
}
