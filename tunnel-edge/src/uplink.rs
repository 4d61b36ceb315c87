//! One attempt to get a link: connect to a gateway, through an HTTP proxy where the environment asks for one, then
//! TLS, then [`Link::connect`]. Called by `keeper`, which knows where to and how often.

use std::{future::Future, io, time::Duration};

use http::Uri;
use hyper_util::client::proxy::matcher::{Intercept, Matcher};
use rustls::pki_types::ServerName;
use tokio::{
    io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader},
    time::{Instant, timeout_at},
};
use tokio_rustls::TlsConnector;
use tunnel_core::{
    ConnectError, Host, Link, LinkConfig, LinkError, ReadAhead, Target,
    proto::{
        ALPN_EDGE, clean_text,
        messages::{Hello, RejectCode, Welcome},
    },
    tls::{self, ClientTls},
};

use crate::{
    config::{ProxyChoice, ProxyUrl},
    network::{DialError, Network},
};

/// Longest head of a proxy's answer, in bytes.
const MAX_PROXY_HEAD: u64 = 8 * 1024;
/// Most header lines of a proxy's answer.
const MAX_PROXY_HEADERS: usize = 64;
/// What a connection to a proxy buffers: the head is small, and nothing follows it before this side has spoken.
const PROXY_BUFFER: usize = 1024;

/// Which HTTP proxy, if any, stands between this node and a gateway.
#[derive(Debug)]
pub(crate) struct Proxies(Matcher);

impl Proxies {
    /// The environment, if the choice is to look at it, is read now: `HTTPS_PROXY`, `ALL_PROXY` and `NO_PROXY`, or
    /// their lower-case forms, as curl does.
    pub(crate) fn new(choice: &ProxyChoice) -> Self {
        Self(match choice {
            ProxyChoice::FromEnvironment => Matcher::from_env(),
            ProxyChoice::Direct => Matcher::builder().build(),
            ProxyChoice::Http(ProxyUrl { address, credentials }) => {
                let credentials = credentials.as_ref().map(|text| format!("{text}@")).unwrap_or_default();
                Matcher::builder().all(format!("http://{credentials}{address}")).build()
            }
        })
    }

    fn proxy_for(&self, gateway: &Target) -> Option<Intercept> {
        let uri: Uri = format!("https://{gateway}").parse().ok()?;
        self.0.intercept(&uri)
    }
}

/// Why one attempt gave no link.
#[derive(Debug, thiserror::Error)]
pub(crate) enum UplinkError {
    /// The gateway's address cannot be reached.
    #[error("cannot connect: {0}")]
    Dial(#[from] DialError),
    /// The proxy cannot be used, or did not let this side through.
    #[error("the HTTP proxy {proxy} {text}")]
    Proxy { proxy: String, text: String, lasting: bool },
    /// No TLS connection came about.
    #[error("TLS failed: {text}")]
    Tls { label: &'static str, text: String },
    /// The address can be neither a DNS name nor an IP address in a certificate.
    #[error("{0} cannot be verified by a certificate: set the gateway's server name")]
    ServerName(String),
    /// Whatever answered speaks something else.
    #[error(
        "TLS works, but the far side did not agree to the protocol edge-tunnel/1: is this a gateway's edge port, and \
         does nothing on the way end the TLS connection?"
    )]
    Alpn,
    /// The gateway did not take the link.
    #[error(transparent)]
    Link(#[from] ConnectError),
    /// Too slow.
    #[error("no link within {} ms: gave up while waiting for {step}", after.as_millis())]
    TimedOut { after: Duration, step: &'static str },
}

impl UplinkError {
    /// A short name for metrics.
    pub(crate) fn label(&self) -> &'static str {
        match self {
            Self::Dial(error) => error.label(),
            Self::Proxy { .. } => "proxy",
            Self::Tls { label, .. } => label,
            Self::ServerName(_) => "server_name",
            Self::Alpn => "alpn",
            Self::Link(ConnectError::Link(error)) => error.label(),
            Self::Link(ConnectError::Rejected(reject)) => match reject.code() {
                RejectCode::Unspecified => "rejected",
                RejectCode::Version => "rejected_version",
                RejectCode::Identity => "rejected_identity",
                RejectCode::NotAllowed => "rejected_not_allowed",
                RejectCode::Overloaded => "rejected_overloaded",
                RejectCode::Draining => "rejected_draining",
                RejectCode::Malformed => "rejected_malformed",
                RejectCode::SameGateway => "rejected_same_gateway",
            },
            Self::TimedOut { .. } => "timeout",
        }
    }

    /// Whether it will fail again until somebody changes something: a certificate, a name, a version. Not so while a
    /// gateway is away, or a load balancer has none behind it.
    pub(crate) fn needs_a_person(&self) -> bool {
        match self {
            Self::Dial(_) | Self::TimedOut { .. } => false,
            Self::Proxy { lasting, .. } => *lasting,
            Self::Link(ConnectError::Link(error)) => matches!(error, LinkError::TlsRefused(_)),
            Self::Tls { label, .. } => !matches!(*label, "closed" | "io"),
            Self::Link(ConnectError::Rejected(reject)) => {
                !matches!(reject.code(), RejectCode::Draining | RejectCode::Overloaded)
            }
            Self::ServerName(_) | Self::Alpn => true,
        }
    }

    /// The gateway is about to leave: behind a load balancer, the next attempt may lead to another.
    pub(crate) fn is_drain(&self) -> bool {
        matches!(self, Self::Link(ConnectError::Rejected(reject)) if reject.code() == RejectCode::Draining)
    }

    /// How long the gateway asks this side to stay away.
    pub(crate) fn retry_after(&self) -> Duration {
        match self {
            Self::Link(ConnectError::Rejected(reject)) => Duration::from_millis(reject.retry_after_ms.into()),
            _ => Duration::ZERO,
        }
    }
}

/// Where a gateway is, and by which name its certificate must know it.
#[derive(Clone, Debug)]
pub(crate) struct Destination {
    pub(crate) address: Target,
    /// Instead of the address's host.
    pub(crate) server_name: Option<ServerName<'static>>,
}

/// All that attempts have in common.
#[derive(Debug)]
pub(crate) struct Uplink {
    pub(crate) tls: ClientTls,
    pub(crate) proxies: Proxies,
    pub(crate) link: LinkConfig,
}

impl Uplink {
    /// Makes one attempt, with the credentials as they are at its first poll; everything from the first lookup to the
    /// gateway's welcome takes no longer than `timeout`. Cancel-safe: dropping the future drops the
    /// connection.
    pub(crate) async fn connect(
        &self,
        network: &impl Network,
        gateway: &Destination,
        hello: Hello,
        timeout: Duration,
    ) -> Result<(Link, Welcome), UplinkError> {
        let limit = Limit { after: timeout, at: Instant::now() + timeout };
        let Destination { address, .. } = gateway;
        let tls = self.tls.connector();
        let Some(proxy) = self.proxies.proxy_for(address) else {
            let dial = network.connect(&address.host, address.port);
            let connection = limit.hold("a connection", dial).await??;
            return self.handshake(&tls, connection, gateway, hello, &limit).await;
        };
        let proxy = Proxy::new(&proxy)?;
        let dial = network.connect(&proxy.address.host, proxy.address.port);
        let failed = |error: DialError| proxy.outage(format!("cannot be reached: {error}"));
        let connection = limit.hold("a connection to the proxy", dial).await?.map_err(failed)?;
        let tunnel = limit.hold("the proxy's answer", proxy.open_tunnel(connection, address)).await??;
        self.handshake(&tls, tunnel, gateway, hello, &limit).await
    }

    async fn handshake<T>(
        &self,
        tls: &TlsConnector,
        connection: T,
        gateway: &Destination,
        hello: Hello,
        limit: &Limit,
    ) -> Result<(Link, Welcome), UplinkError>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin + 'static,
    {
        let name = match &gateway.server_name {
            Some(name) => name.clone(),
            None => server_name(&gateway.address.host)?,
        };
        let handshake = tls.connect(name, ReadAhead::new(connection));
        let failed =
            |error: io::Error| UplinkError::Tls { label: tls::label(&error), text: tls::explain(&error) };
        let mut connection = limit.hold("the TLS handshake", handshake).await?.map_err(failed)?;
        if connection.get_ref().1.alpn_protocol() != Some(ALPN_EDGE) {
            return Err(UplinkError::Alpn);
        }
        tls::widen_for_link(connection.get_mut().1);
        // A gateway that refuses this side's certificate says so only now: in TLS 1.3 the client's handshake is over
        // before the server has looked at it.
        Ok(limit.hold("the gateway's welcome", Link::connect(connection, hello, self.link.clone())).await??)
    }
}

/// The name that a gateway's certificate must be for, where only its host is known.
pub(crate) fn server_name(host: &Host) -> Result<ServerName<'static>, UplinkError> {
    match host {
        Host::Ip(address) => Ok((*address).into()),
        Host::Name(name) => {
            ServerName::try_from(name.clone()).map_err(|_| UplinkError::ServerName(name.clone()))
        }
    }
}

/// One deadline for all steps of an attempt.
struct Limit {
    after: Duration,
    at: Instant,
}

impl Limit {
    async fn hold<T>(&self, step: &'static str, work: impl Future<Output = T>) -> Result<T, UplinkError> {
        timeout_at(self.at, work).await.map_err(|_| UplinkError::TimedOut { after: self.after, step })
    }
}

/// An HTTP proxy and what it wants to hear.
struct Proxy<'a> {
    address: Target,
    intercept: &'a Intercept,
}

impl<'a> Proxy<'a> {
    fn new(intercept: &'a Intercept) -> Result<Self, UplinkError> {
        let uri = intercept.uri();
        let unusable =
            |text: &str| UplinkError::Proxy { proxy: uri.to_string(), text: text.to_owned(), lasting: true };
        if uri.scheme_str() != Some("http") {
            return Err(unusable("is of a kind that is not supported: use http://HOST:PORT"));
        }
        let host = uri.host().unwrap_or_default();
        let host = host.parse().map_err(|_| unusable("has no usable host: use http://HOST:PORT"))?;
        Ok(Self { address: Target { host, port: uri.port_u16().unwrap_or(80) }, intercept })
    }

    /// What may be over soon.
    fn outage(&self, text: String) -> UplinkError {
        UplinkError::Proxy { proxy: self.address.to_string(), text, lasting: false }
    }

    /// What stays so until somebody changes something.
    fn refusal(&self, text: String) -> UplinkError {
        UplinkError::Proxy { proxy: self.address.to_string(), text, lasting: true }
    }

    /// Asks the proxy for a connection to `gateway`. Bytes behind the head of its answer stay in the reader.
    async fn open_tunnel<T>(&self, connection: T, gateway: &Target) -> Result<BufReader<T>, UplinkError>
    where
        T: AsyncRead + AsyncWrite + Send + Unpin,
    {
        let broke = |error: io::Error| self.outage(format!("broke the connection: {error}"));
        let mut connection = BufReader::with_capacity(PROXY_BUFFER, connection);
        connection.write_all(&self.request(gateway)).await.map_err(broke)?;
        connection.flush().await.map_err(broke)?;
        let head = read_head(&mut connection).await.map_err(broke)?;
        let (status, line) = parse_head(&head).map_err(|text| self.refusal(text))?;
        if (200..300).contains(&status) {
            return Ok(connection);
        }
        Err(self.denial(gateway, status, &line))
    }

    fn denial(&self, gateway: &Target, status: u16, line: &str) -> UplinkError {
        let hint = match status {
            407 => ": put the user and password into its URL, http://USER:PASSWORD@HOST:PORT",
            403 | 405 => {
                ": it does not let this node connect there; allow it, or name the gateway in NO_PROXY"
            }
            _ => "",
        };
        let text = format!("answered CONNECT {gateway} with \"{line}\"{hint}");
        // A proxy says 502, 503 or 504 while the gateway is away.
        if status >= 500 { self.outage(text) } else { self.refusal(text) }
    }

    fn request(&self, gateway: &Target) -> Vec<u8> {
        let version = env!("CARGO_PKG_VERSION");
        let mut request =
            format!("CONNECT {gateway} HTTP/1.1\r\nHost: {gateway}\r\nUser-Agent: tunnel-edge/{version}\r\n")
                .into_bytes();
        if let Some(credentials) = self.intercept.basic_auth() {
            request.extend_from_slice(b"Proxy-Authorization: ");
            request.extend_from_slice(credentials.as_bytes());
            request.extend_from_slice(b"\r\n");
        }
        request.extend_from_slice(b"\r\n");
        request
    }
}

/// Reads up to and including the empty line, and not a byte more.
async fn read_head(connection: &mut (impl AsyncBufReadExt + Unpin)) -> io::Result<Vec<u8>> {
    let mut head = Vec::new();
    let mut limited = connection.take(MAX_PROXY_HEAD);
    loop {
        let line_begins = head.len();
        limited.read_until(b'\n', &mut head).await?;
        match &head[line_begins..] {
            b"\r\n" | b"\n" => return Ok(head),
            [.., b'\n'] => {}
            _ if limited.limit() == 0 => return Err(io::Error::other("the head of its answer is too long")),
            _ => return Err(io::Error::new(io::ErrorKind::UnexpectedEof, "it hung up before it answered")),
        }
    }
}

/// The status of an answer, and its status line to show to people.
fn parse_head(head: &[u8]) -> Result<(u16, String), String> {
    let mut headers = [httparse::EMPTY_HEADER; MAX_PROXY_HEADERS];
    let mut response = httparse::Response::new(&mut headers);
    let parsed =
        response.parse(head).map_err(|error| format!("gave an answer that is not HTTP/1.1: {error}"))?;
    let (httparse::Status::Complete(_), Some(status)) = (parsed, response.code) else {
        return Err("gave an answer that is not complete HTTP/1.1".to_owned());
    };
    let line = format!("{status} {}", response.reason.unwrap_or_default());
    Ok((status, clean_text(line.trim_end())))
}

#[cfg(test)]
mod tests {
    use tunnel_core::proto::messages::Reject;

    use super::*;

    fn rejected(code: RejectCode) -> UplinkError {
        ConnectError::Rejected(Reject { code: code.into(), ..Reject::default() }).into()
    }

    #[test]
    fn an_outage_is_told_from_what_a_person_must_repair() {
        let proxies = Proxies::new(&ProxyChoice::Http(ProxyUrl {
            address: "proxy.example:3128".parse().unwrap(),
            credentials: None,
        }));
        let gateway: Target = "gateway.example:8443".parse().unwrap();
        let intercept = proxies.proxy_for(&gateway).unwrap();
        let proxy = Proxy::new(&intercept).unwrap();
        let tls = |label| UplinkError::Tls { label, text: String::new() };
        for outage in [
            UplinkError::Dial(DialError::Refused),
            UplinkError::TimedOut { after: Duration::ZERO, step: "" },
            ConnectError::Link(LinkError::ClosedByPeer).into(),
            rejected(RejectCode::Draining),
            rejected(RejectCode::Overloaded),
            proxy.denial(&gateway, 503, "503 Service Unavailable"),
            tls("closed"),
            tls("io"),
        ] {
            assert!(!outage.needs_a_person(), "{outage:?}");
        }
        for fault in [
            ConnectError::Link(LinkError::TlsRefused(String::new())).into(),
            rejected(RejectCode::Identity),
            rejected(RejectCode::Version),
            proxy.denial(&gateway, 407, "407 Proxy Authentication Required"),
            tls("unknown_ca"),
            tls("expired"),
            UplinkError::Alpn,
        ] {
            assert!(fault.needs_a_person(), "{fault:?}");
        }
    }
}
