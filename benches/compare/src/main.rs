//! The program that `benches/compare/run` compares tunnels with: it drives the same workloads through each of them.
//!
//! `drive` is the client in front of a tunnel (`workloads`, `bulk`), `target` the server behind it, and `relay` the limit
//! of what any tunnel can do: one TLS hop and nothing else. How a stream is opened through a tunnel of each make is said in
//! `way` and `konnectivity`; what goes through it, between `drive` and `target`, in `target` and `blocks`.
//!
//! Nothing of edge-tunnel is in here, so that all tunnels, ours too, are other people's programs to it.

mod blocks;
mod bulk;
mod connections;
mod konnectivity;
mod relay;
mod report;
mod target;
#[cfg(test)]
mod tests;
mod threads;
mod tls;
mod way;
mod workloads;

use std::{
    io::{self, Read, Write},
    net::SocketAddr,
    path::PathBuf,
    process::ExitCode,
    time::Duration,
};

use clap::{Args, Parser, Subcommand};
use tokio::net::{TcpListener, UnixListener};

use crate::{
    blocks::Direction,
    relay::{Door, Hop, Relay},
    tls::{Cipher, Files, Named, TlsError},
    way::{Via, Way},
    workloads::{DriveError, Timing, Workload},
};

/// Drives workloads through a tunnel, and measures them.
#[derive(Debug, Parser)]
#[command(name = "tunnel-compare", version, max_term_width = 100)]
struct Cli {
    /// What TLS uses wherever this program begins or accepts it.
    #[arg(long, global = true, value_enum, default_value_t = Cipher::Aes128Gcm)]
    cipher: Cipher,
    #[command(subcommand)]
    role: Role,
}

#[derive(Debug, Subcommand)]
enum Role {
    /// The server behind the tunnel. Prints the address that it listens on.
    Target {
        /// Port 0: any that is free.
        #[arg(long, value_name = "ADDRESS", default_value = "127.0.0.1:0")]
        listen: SocketAddr,
    },
    /// The limit: hands on the bytes of each connection, and does TLS on one side or both. Prints the address that it
    /// listens on.
    Relay(RelayArgs),
    /// Drives one workload, and prints its figures as one line of JSON.
    Drive(DriveArgs),
}

#[derive(Debug, Args)]
struct RelayArgs {
    /// IP:PORT or unix:PATH.
    #[arg(long, value_name = "ADDRESS")]
    listen: Door,
    #[arg(long, value_name = "ADDRESS")]
    to: SocketAddr,
    /// Accept TLS only, with this certificate, from clients whose own is from this CA.
    #[arg(long, value_name = "CERT,KEY,CA")]
    accept_tls: Option<Files>,
    /// Dial with TLS, showing this certificate, to a server with this name and a certificate from this CA.
    #[arg(long, value_name = "CERT,KEY,CA,NAME")]
    dial_tls: Option<Named>,
    /// Buffer of each direction of each connection, in KiB.
    #[arg(long, value_name = "KIB", default_value_t = relay::BUFFER_KIB, value_parser = clap::value_parser!(u16).range(1..=4096))]
    buffer: u16,
}

#[derive(Debug, Args)]
struct DriveArgs {
    workload: Workload,
    /// tcp:ADDRESS, uds:PATH, tls:ADDRESS, connect-tls:ADDRESS, connect-uds:PATH, grpc-tls:ADDRESS or grpc-uds:PATH.
    #[arg(long)]
    via: Via,
    /// What CONNECT and Konnectivity's gRPC are asked for.
    #[arg(long, value_name = "HOST:PORT", default_value = "")]
    target: String,
    /// Streams of bulk bytes (default: 1, interleaved: 8), idle ones (1000), or workers that make requests (16).
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..))]
    streams: Option<u16>,
    /// How long it is measured.
    #[arg(long, value_name = "SECONDS", default_value = "5", value_parser = seconds)]
    seconds: Duration,
    /// How long it runs before it is measured.
    #[arg(long, value_name = "SECONDS", default_value = "0.5", value_parser = seconds)]
    warm_up: Duration,
    /// How much longer all of it may take: opening streams, and emptying what buffers hold at the end.
    #[arg(long, value_name = "SECONDS", default_value = "60", value_parser = seconds)]
    limit: Duration,
    /// Which way bulk bytes go, seen from here.
    #[arg(long, value_enum, default_value_t = Direction::Down)]
    direction: Direction,
    /// PEM file of the CA that the tunnel's certificate is from.
    #[arg(long, value_name = "FILE", requires_all = ["cert", "key"])]
    ca: Option<PathBuf>,
    /// PEM file of the certificate that is shown to the tunnel.
    #[arg(long, value_name = "FILE", requires = "ca")]
    cert: Option<PathBuf>,
    /// PEM file of its private key.
    #[arg(long, value_name = "FILE", requires = "ca")]
    key: Option<PathBuf>,
    /// The name in the tunnel's certificate.
    #[arg(long, value_name = "NAME", default_value = "localhost")]
    server_name: String,
}

/// Why there are no figures.
#[derive(Debug, thiserror::Error)]
enum Failure {
    #[error("cannot listen on {door}: {error}")]
    Listen { door: Door, error: io::Error },
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error(transparent)]
    Tls(#[from] TlsError),
    #[error(transparent)]
    Drive(#[from] DriveError),
}

impl Failure {
    fn listen(door: &Door) -> impl FnOnce(io::Error) -> Self {
        move |error| Self::Listen { door: door.clone(), error }
    }
}

fn main() -> ExitCode {
    match act(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            let _ = writeln!(io::stderr(), "tunnel-compare: {failure}");
            ExitCode::FAILURE
        }
    }
}

fn act(cli: Cli) -> Result<(), Failure> {
    more_files();
    tls::use_cipher(cli.cipher);
    let runtime = threads::runtime()?;
    let done = runtime.block_on(async {
        match cli.role {
            Role::Target { listen } => Ok(target::serve(&bind(listen).await?).await?),
            Role::Relay(args) => relay(args).await,
            Role::Drive(args) => drive(args).await,
        }
    });
    // A thread may still wait for the end of standard input, which concerns nobody any more.
    runtime.shutdown_background();
    done
}

/// As many open files as the system lets this process have: two for each connection of a relay.
fn more_files() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    // Too few are noticed where one is missing.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
}

async fn bind(address: SocketAddr) -> Result<TcpListener, Failure> {
    let listener = TcpListener::bind(address).await.map_err(Failure::listen(&Door::Tcp(address)))?;
    print(&format!("listening {}", listener.local_addr()?))?;
    Ok(listener)
}

async fn relay(args: RelayArgs) -> Result<(), Failure> {
    let accept = match &args.accept_tls {
        Some(files) => Hop::Tls(files.acceptor()?),
        None => Hop::Plain,
    };
    let dial = match args.dial_tls {
        Some(named) => Hop::Tls((named.files.connector()?, named.name)),
        None => Hop::Plain,
    };
    let buffer = usize::from(args.buffer) * 1024;
    let relay = Relay { to: args.to, accept, dial, buffer };
    match &args.listen {
        Door::Tcp(address) => relay.serve(&bind(*address).await?).await?,
        Door::Unix(path) => {
            let listener = UnixListener::bind(path).map_err(Failure::listen(&args.listen))?;
            print(&format!("listening {}", args.listen))?;
            relay.serve(&listener).await?;
        }
    }
    Ok(())
}

async fn drive(args: DriveArgs) -> Result<(), Failure> {
    let files = match (args.cert, args.key, args.ca) {
        (Some(cert), Some(key), Some(ca)) => Some(Files { cert, key, ca }),
        _ => None,
    };
    let way = Way::new(args.via, args.target, files.as_ref(), args.server_name)?;
    let timing = Timing { warm_up: args.warm_up, seconds: args.seconds, limit: args.limit };
    let streams = args.streams.map_or(args.workload.usual_streams(), usize::from);
    let figures = match args.workload {
        Workload::Idle => {
            let held = workloads::open_idle(&way, streams, timing).await?;
            print(&report::open(streams).to_string())?;
            end_of_input().await?;
            return Ok(held.check(timing).await?);
        }
        measured => measured.run(&way, streams, args.direction, timing).await?,
    };
    Ok(print(&figures.to_string())?)
}

async fn end_of_input() -> io::Result<()> {
    let read = || io::stdin().read_to_end(&mut Vec::new());
    tokio::task::spawn_blocking(read).await.map_err(io::Error::other)?.map(drop)
}

fn print(line: &str) -> io::Result<()> {
    let mut out = io::stdout().lock();
    writeln!(out, "{line}")?;
    out.flush()
}

fn seconds(text: &str) -> Result<Duration, String> {
    let parsed = text.parse().ok().and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
    parsed
        .filter(|time| time.as_secs() <= 3600)
        .ok_or_else(|| "is no number of seconds up to 3600".to_owned())
}
