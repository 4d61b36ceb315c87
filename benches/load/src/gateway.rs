//! A gateway under load: the program `tunnel-server` as a process of its own, what the system says that it uses, and what
//! it says itself. Called by `cluster`.

use std::{
    ffi::OsString,
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddr, TcpListener},
    path::{Path, PathBuf},
    process::Stdio,
    time::Duration,
};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::TcpStream,
    process::{Child, Command},
    time::{sleep, timeout},
};
use tunnel_core::{
    GatewayId,
    tls::{Domain, Files},
};

use crate::certificates::Certificates;

/// Where the search for free ports begins and ends: below the ports that the system gives to outgoing connections, one of
/// which could otherwise take the gateway's while it is down.
const PORTS: std::ops::Range<u16> = 21_000..30_000;
/// How long the gateway may take until it listens.
const START_LIMIT: Duration = Duration::from_secs(20);
const START_POLL: Duration = Duration::from_millis(5);
/// How many lines of the log are shown when it does not.
const LOG_SHOWN: usize = 5;
/// How long it may take to tell its metrics, and how much that may be.
const METRICS_LIMIT: Duration = Duration::from_secs(10);
const MAX_METRICS: u64 = 1024 * 1024;

/// Why there is no gateway, or nothing is known of it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum GatewayError {
    #[error(
        "there is no gateway at {0}: build it with `cargo build --release -p tunnel-server`, or say where it is with \
         --server"
    )]
    NoProgram(PathBuf),
    #[error("the gateway could not be built; cargo's message above says why")]
    Build,
    #[error("there are not enough free ports from {} to {}: each gateway needs four", PORTS.start, PORTS.end - 1)]
    NoPorts,
    #[error("the gateway does not listen; its log ends with:\n{0}")]
    NotListening(String),
    #[error("{0}: {1}")]
    Io(&'static str, io::Error),
    #[error("the system does not tell what the gateway uses: {path}: {text}")]
    Unknown { path: PathBuf, text: String },
    #[error("the gateway does not tell its metrics at {address}: {error}")]
    Metrics { address: SocketAddr, error: io::Error },
    #[error(
        "after {} s, {gateway} has links to {found} of {all} other gateways; its log may say why", after.as_secs()
    )]
    Apart { after: Duration, gateway: GatewayId, found: u64, all: u64 },
}

fn io_error(what: &'static str) -> impl FnOnce(io::Error) -> GatewayError {
    move |error| GatewayError::Io(what, error)
}

/// The gateway's program.
#[derive(Clone, Debug)]
pub(crate) struct Program(PathBuf);

impl Program {
    /// The one that was named; else, under cargo, one that is built now, from the same tree and with the same profile;
    /// else the one beside this program.
    pub(crate) async fn find(named: Option<&Path>) -> Result<Self, GatewayError> {
        let own = std::env::current_exe().map_err(io_error("cannot tell where this program is"))?;
        if let (None, Some(cargo)) = (named, std::env::var_os("CARGO")) {
            build(cargo, own.parent().is_some_and(|folder| folder.ends_with("release"))).await?;
        }
        let path = named.map_or_else(|| own.with_file_name("tunnel-server"), Path::to_owned);
        if path.is_file() { Ok(Self(path)) } else { Err(GatewayError::NoProgram(path)) }
    }
}

async fn build(cargo: OsString, release: bool) -> Result<(), GatewayError> {
    let mut command = Command::new(cargo);
    // With this package, so that their dependencies are built once: with the features that both need.
    command.args([
        "build",
        "--quiet",
        "--package=tunnel-server",
        "--package=tunnel-load",
        "--bin=tunnel-server",
    ]);
    if release {
        command.arg("--release");
    }
    let built = command.status().await.map_err(io_error("cannot run cargo"))?;
    if built.success() { Ok(()) } else { Err(GatewayError::Build) }
}

/// What all gateways of a run have in common.
#[derive(Clone, Copy)]
pub(crate) struct Setup<'a> {
    pub(crate) program: &'a Program,
    pub(crate) certificates: &'a Certificates,
    /// Where logs go.
    pub(crate) folder: &'a Path,
    pub(crate) max_links: usize,
    pub(crate) heartbeat: Duration,
}

/// A gateway that can be started, killed, and started again in the same place.
pub(crate) struct Gateway {
    id: GatewayId,
    program: Program,
    arguments: Vec<OsString>,
    addresses: Addresses,
    log: PathBuf,
    process: Option<Child>,
}

/// Where a gateway listens.
#[derive(Clone, Copy)]
pub(crate) struct Addresses {
    edges: SocketAddr,
    ingress: SocketAddr,
    admin: SocketAddr,
    peers: SocketAddr,
}

/// Memory of one process, or of several together, in bytes.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Memory {
    /// What it holds now: its own pages, and its share of those that it has in common with others (PSS).
    pub(crate) now: u64,
    /// What it holds now, all of what it has in common with others included (RSS): of this, a difference tells what has
    /// come, even where other gateways have come or gone meanwhile.
    pub(crate) resident: u64,
    /// The most that it ever held (peak RSS).
    pub(crate) peak: u64,
}

impl Gateway {
    /// One that is not running yet, at the first of these addresses; the `others` are those of its peers. Its settings are
    /// the defaults, but for the limit of links.
    pub(crate) fn new(setup: Setup<'_>, id: &GatewayId, addresses: Addresses, others: &[Addresses]) -> Self {
        let Setup { program, certificates, folder, max_links, heartbeat } = setup;
        let mut arguments: Vec<OsString> = vec!["run".into()];
        let mut flag = |name: &str, value: OsString| arguments.extend([format!("--{name}").into(), value]);
        flag("gateway-id", id.to_string().into());
        flag("edges-listen", addresses.edges.to_string().into());
        flag("edges-max-links", max_links.to_string().into());
        flag("ingress-listen", addresses.ingress.to_string().into());
        flag("admin-listen", addresses.admin.to_string().into());
        flag("link-heartbeat", humantime::format_duration(heartbeat).to_string().into());
        for (side, domain) in [("edges", Domain::Edge), ("ingress", Domain::ControlPlane)] {
            let Files { cert, key, ca } = certificates.gateway(id, domain);
            flag(&format!("{side}-cert"), cert.into());
            flag(&format!("{side}-key"), key.into());
            flag(&format!("{side}-client-ca"), ca.into());
        }
        if !others.is_empty() {
            let Files { cert, key, ca } = certificates.gateway(id, Domain::Peer);
            flag("peers-cert", cert.into());
            flag("peers-key", key.into());
            flag("peers-ca", ca.into());
            flag("peers-listen", addresses.peers.to_string().into());
            flag("edges-address", addresses.edges.to_string().into());
        }
        for other in others {
            flag("peers-gateways", other.peers.to_string().into());
        }
        let log = folder.join(format!("{id}.log"));
        Self { id: id.clone(), program: program.clone(), arguments, addresses, log, process: None }
    }

    /// Its name.
    pub(crate) fn id(&self) -> &GatewayId {
        &self.id
    }

    /// Where edges connect.
    pub(crate) fn edges_address(&self) -> SocketAddr {
        self.addresses.edges
    }

    /// Where the control plane connects.
    pub(crate) fn ingress_address(&self) -> SocketAddr {
        self.addresses.ingress
    }

    /// Starts the process, and waits until it listens. Its log goes to a file, as it would under a service manager.
    pub(crate) async fn start(&mut self) -> Result<(), GatewayError> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.map_err(io_error("cannot write the gateway's log"))?;
        let copy = log.try_clone().map_err(io_error("cannot write the gateway's log"))?;
        let mut command = Command::new(&self.program.0);
        // The environment could hold settings.
        command.env_clear().args(&self.arguments).stdin(Stdio::null()).stdout(copy).stderr(log);
        let child = command.kill_on_drop(true).spawn().map_err(io_error("cannot start the gateway"))?;
        let child = self.process.insert(child);
        // The admin endpoint is the last that it opens.
        let listening = async {
            while TcpStream::connect(self.addresses.admin).await.is_err() {
                if matches!(child.try_wait(), Ok(Some(_))) {
                    return false;
                }
                sleep(START_POLL).await;
            }
            true
        };
        if timeout(START_LIMIT, listening).await == Ok(true) {
            return Ok(());
        }
        let log = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = log.lines().rev().take(LOG_SHOWN).collect();
        Err(GatewayError::NotListening(lines.into_iter().rev().collect::<Vec<_>>().join("\n")))
    }

    /// Kills the process, as `kill -9` does.
    pub(crate) async fn kill(&mut self) -> Result<(), GatewayError> {
        let Some(mut process) = self.process.take() else { return Ok(()) };
        process.kill().await.map_err(io_error("cannot kill the gateway"))
    }

    /// What it holds.
    pub(crate) fn memory(&self) -> Result<Memory, GatewayError> {
        let kibibytes = |file: &str, key: &str| {
            let (path, text) = self.proc_file(file)?;
            let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
            let value = line.and_then(|line| line.trim().trim_end_matches(" kB").parse::<u64>().ok());
            value.map(|value| value * 1024).ok_or_else(|| unknown(path, format!("no {key}")))
        };
        Ok(Memory {
            now: kibibytes("smaps_rollup", "Pss")?,
            resident: kibibytes("smaps_rollup", "Rss")?,
            peak: kibibytes("status", "VmHWM")?,
        })
    }

    /// Processor time that all its threads together have had.
    pub(crate) fn processor_time(&self) -> Result<Duration, GatewayError> {
        let path = self.proc_path("task");
        let tasks = fs::read_dir(&path).map_err(|error| unknown(path.clone(), error.to_string()))?;
        let mut nanoseconds = 0;
        for task in tasks.flatten() {
            // A thread may have ended since.
            let Ok(text) = fs::read_to_string(task.path().join("schedstat")) else { continue };
            let first = text.split_whitespace().next().and_then(|first| first.parse::<u64>().ok());
            nanoseconds += first.ok_or_else(|| unknown(path.clone(), "schedstat is empty".to_owned()))?;
        }
        Ok(Duration::from_nanos(nanoseconds))
    }

    /// What its metric of this name and these labels counts; one that it does not have has counted nothing yet.
    pub(crate) async fn metric(&self, name: &str) -> Result<u64, GatewayError> {
        let address = self.addresses.admin;
        let asked = timeout(METRICS_LIMIT, metrics(address)).await;
        let answer = asked.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()));
        let text = answer.map_err(|error| GatewayError::Metrics { address, error })?;
        let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
        Ok(value.and_then(|value| value.trim().parse().ok()).unwrap_or_default())
    }

    fn proc_file(&self, name: &str) -> Result<(PathBuf, String), GatewayError> {
        let path = self.proc_path(name);
        match fs::read_to_string(&path) {
            Ok(text) => Ok((path, text)),
            Err(error) => Err(unknown(path, error.to_string())),
        }
    }

    fn proc_path(&self, name: &str) -> PathBuf {
        let id = self.process.as_ref().and_then(Child::id).unwrap_or_default();
        PathBuf::from(format!("/proc/{id}/{name}"))
    }
}

fn unknown(path: PathBuf, text: String) -> GatewayError {
    GatewayError::Unknown { path, text }
}

async fn metrics(address: SocketAddr) -> io::Result<String> {
    let mut connection = TcpStream::connect(address).await?;
    let request = format!("GET /metrics HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n");
    connection.write_all(request.as_bytes()).await?;
    let mut answer = String::new();
    connection.take(MAX_METRICS).read_to_string(&mut answer).await?;
    if answer.starts_with("HTTP/1.1 200") { Ok(answer) } else { Err(io::Error::other(answer)) }
}

impl Memory {
    /// Both together.
    pub(crate) fn and(self, other: Self) -> Self {
        Self {
            now: self.now + other.now,
            resident: self.resident + other.resident,
            peak: self.peak + other.peak,
        }
    }
}

impl Addresses {
    /// Free ones for so many gateways.
    pub(crate) fn free(gateways: usize) -> Result<Vec<Self>, GatewayError> {
        let at = |port| SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        let mut free = PORTS.map(at).filter(|address| TcpListener::bind(address).is_ok());
        let mut next = || free.next().ok_or(GatewayError::NoPorts);
        let mut all = || Ok(Self { edges: next()?, ingress: next()?, admin: next()?, peers: next()? });
        (0..gateways).map(|_| all()).collect()
    }
}
