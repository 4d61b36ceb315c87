//! How a stream to the target is opened through a system that is compared: for each kind of front, as its own clients do it.
//! Called by `workloads` and `bulk`.

use std::{fmt, io, str::FromStr, time::Duration};

use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::timeout,
};
use tokio_rustls::{TlsConnector, client::TlsStream};
use tonic::transport::Endpoint;

use crate::{
    konnectivity::{self, Connection},
    tls::{self, Files, TlsError},
};

/// A stream that takes longer cannot be opened.
const OPEN_LIMIT: Duration = Duration::from_secs(10);
/// Longest answer to a CONNECT.
const MAX_HEAD: usize = 16 * 1024;

/// A kind of front, and where it is.
#[derive(Clone, Debug)]
pub(crate) enum Via {
    /// A port that the system maps to the target.
    Tcp(String),
    /// The same, a Unix socket.
    Uds(String),
    /// A port, with TLS.
    Tls(String),
    /// HTTP/1.1 CONNECT over TLS.
    ConnectTls(String),
    /// HTTP/1.1 CONNECT over a Unix socket.
    ConnectUds(String),
    /// Konnectivity's gRPC over TLS.
    GrpcTls(String),
    /// Konnectivity's gRPC over a Unix socket.
    GrpcUds(String),
}

impl FromStr for Via {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (kind, place) = text.split_once(':').ok_or("is not KIND:ADDRESS")?;
        let place = place.to_owned();
        match kind {
            "tcp" => Ok(Self::Tcp(place)),
            "uds" => Ok(Self::Uds(place)),
            "tls" => Ok(Self::Tls(place)),
            "connect-tls" => Ok(Self::ConnectTls(place)),
            "connect-uds" => Ok(Self::ConnectUds(place)),
            "grpc-tls" => Ok(Self::GrpcTls(place)),
            "grpc-uds" => Ok(Self::GrpcUds(place)),
            _ => Err(format!(
                "has the kind {kind:?}, which is none of tcp, uds, tls, connect-tls, connect-uds, grpc-tls and grpc-uds"
            )),
        }
    }
}

impl fmt::Display for Via {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, place) = match self {
            Self::Tcp(place) => ("tcp", place),
            Self::Uds(place) => ("uds", place),
            Self::Tls(place) => ("tls", place),
            Self::ConnectTls(place) => ("connect-tls", place),
            Self::ConnectUds(place) => ("connect-uds", place),
            Self::GrpcTls(place) => ("grpc-tls", place),
            Self::GrpcUds(place) => ("grpc-uds", place),
        };
        write!(f, "{kind}:{place}")
    }
}

/// A stream could not be opened.
#[derive(Debug, thiserror::Error)]
#[error("no stream through {via}: {error}")]
pub(crate) struct WayError {
    via: String,
    error: io::Error,
}

/// An open stream to the target.
pub(crate) type Stream = Box<dyn Duplex>;

pub(crate) trait Duplex: AsyncRead + AsyncWrite + Send + Unpin {}
impl<T: AsyncRead + AsyncWrite + Send + Unpin> Duplex for T {}

/// A system's front, and what is needed to come to the target through it.
#[derive(Clone)]
pub(crate) struct Way {
    via: String,
    target: String,
    front: Front,
}

#[derive(Clone)]
enum Front {
    Tcp(String),
    Uds(String),
    Tls(String, TlsConnector, ServerName<'static>),
    ConnectTls(String, TlsConnector, ServerName<'static>),
    ConnectUds(String),
    Grpc(Box<Endpoint>),
}

impl Way {
    /// `files` and `name` are for the kinds with TLS, `target` for those that ask for one.
    pub(crate) fn new(
        via: Via,
        target: String,
        files: Option<&Files>,
        name: String,
    ) -> Result<Self, TlsError> {
        let text = via.to_string();
        let needed = || files.ok_or_else(|| TlsError::Missing { via: text.clone() });
        let front = match via {
            Via::Tcp(address) => Front::Tcp(address),
            Via::Uds(path) => Front::Uds(path),
            Via::Tls(address) => Front::Tls(address, needed()?.connector()?, tls::server_name(&name)?),
            Via::ConnectTls(address) => {
                Front::ConnectTls(address, needed()?.connector()?, tls::server_name(&name)?)
            }
            Via::ConnectUds(path) => Front::ConnectUds(path),
            Via::GrpcTls(address) => {
                Front::Grpc(Box::new(konnectivity::over_tls(&address, needed()?, name)?))
            }
            Via::GrpcUds(path) => Front::Grpc(Box::new(konnectivity::over_uds(&path))),
        };
        Ok(Self { via: text, target, front })
    }

    /// Opens a stream. It is open when the front says so, or if it says nothing, when it has been connected to.
    pub(crate) async fn open(&self) -> Result<Stream, WayError> {
        let opened = match timeout(OPEN_LIMIT, self.open_unbounded()).await {
            Ok(opened) => opened,
            Err(_) => Err(io::Error::other(format!("not open after {} s", OPEN_LIMIT.as_secs()))),
        };
        opened.map_err(|error| WayError { via: self.via.clone(), error })
    }

    async fn open_unbounded(&self) -> io::Result<Stream> {
        Ok(match &self.front {
            Front::Tcp(address) => Box::new(tcp(address).await?),
            Front::Uds(path) => Box::new(UnixStream::connect(path).await?),
            Front::Tls(address, connector, name) => Box::new(tls_to(address, connector, name).await?),
            Front::ConnectTls(address, connector, name) => {
                let mut front = tls_to(address, connector, name).await?;
                connect(&mut front, &self.target).await?;
                Box::new(front)
            }
            Front::ConnectUds(path) => {
                let mut front = UnixStream::connect(path).await?;
                connect(&mut front, &self.target).await?;
                Box::new(front)
            }
            Front::Grpc(endpoint) => Box::new(Connection::dial(endpoint, &self.target).await?),
        })
    }
}

async fn tcp(address: &str) -> io::Result<TcpStream> {
    let stream = TcpStream::connect(address).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}

async fn tls_to(
    address: &str,
    connector: &TlsConnector,
    name: &ServerName<'static>,
) -> io::Result<TlsStream<TcpStream>> {
    connector.connect(name.clone(), tcp(address).await?).await
}

/// As kube-apiserver does it, to the letter.
async fn connect(front: &mut (impl AsyncRead + AsyncWrite + Unpin), target: &str) -> io::Result<()> {
    let head = format!("CONNECT {target} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n");
    front.write_all(head.as_bytes()).await?;
    front.flush().await?;
    let mut answer = Vec::new();
    // Nothing comes behind the answer: the target speaks second.
    while !answer.ends_with(b"\r\n\r\n") {
        if answer.len() > MAX_HEAD || front.read_buf(&mut answer).await? == 0 {
            return Err(io::Error::other("the answer to CONNECT does not end"));
        }
    }
    let answer = String::from_utf8_lossy(&answer);
    let mut status = answer.lines().next().unwrap_or_default().split(' ');
    match (status.next(), status.next()) {
        (Some("HTTP/1.1" | "HTTP/1.0"), Some("200")) => Ok(()),
        _ => Err(io::Error::other(format!("CONNECT {target} was answered with {:?}", answer.trim_end()))),
    }
}
