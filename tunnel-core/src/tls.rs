//! TLS for the three trust domains, which never mix: the public edge side, the private control-plane side, the peer
//! side. Each has its own CA, certificate and application protocols. Credentials reload from disk; connections that
//! run keep what they began with.

use std::{
    fmt, fs, io,
    path::{Path, PathBuf},
    sync::Arc,
};

use arc_swap::ArcSwap;
use rustls::{
    AlertDescription, CertificateError, CipherSuite, ClientConfig, ConnectionCommon, RootCertStore,
    ServerConfig,
    crypto::CryptoProvider,
    pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject},
    server::WebPkiClientVerifier,
    version::TLS13,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

use crate::{
    mux::{READ_AT_ONCE, WRITE_BATCH},
    proto::{ALPN_EDGE, ALPN_PEER, yamux::HEADERS_BEYOND},
};

/// One of the three sides that a gateway shows to the world.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Domain {
    /// Edges, from the public network.
    Edge,
    /// The control plane: kube-apiserver, Prometheus, people.
    ControlPlane,
    /// Other gateways.
    Peer,
}

impl Domain {
    fn alpn(self) -> Vec<Vec<u8>> {
        match self {
            Self::Edge => vec![ALPN_EDGE.to_vec()],
            Self::ControlPlane => vec![b"h2".to_vec(), b"http/1.1".to_vec()],
            Self::Peer => vec![ALPN_PEER.to_vec()],
        }
    }
}

impl fmt::Display for Domain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Edge => "edge",
            Self::ControlPlane => "control-plane",
            Self::Peer => "peer",
        })
    }
}

/// Where one side's credentials lie, all PEM.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Files {
    /// The certificate, followed by its intermediates.
    pub cert: PathBuf,
    /// The certificate's private key.
    pub key: PathBuf,
    /// The CA certificates that the far side's certificate must come from.
    pub ca: PathBuf,
}

/// Credentials that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read.
    #[error("cannot read {path}: {error}")]
    Read {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// A file holds no such thing.
    #[error("{path} holds no {what} in PEM form")]
    Empty {
        /// The file.
        path: PathBuf,
        /// What was looked for.
        what: &'static str,
    },
    /// A file's PEM is broken.
    #[error("{path} is not valid PEM: {text}")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Why.
        text: String,
    },
    /// The parts do not fit together.
    #[error("{cert} and {key} cannot be used: {text}")]
    Unusable {
        /// The certificate file.
        cert: PathBuf,
        /// The key file.
        key: PathBuf,
        /// Why.
        text: String,
    },
    /// The certificate is good, but not for this.
    #[error("{cert} is not taken: {text}")]
    Refused {
        /// The certificate file.
        cert: PathBuf,
        /// Why.
        text: String,
    },
}

/// What the files held when they were last read, byte for byte.
#[derive(Clone, PartialEq, Eq)]
struct Contents {
    cert: Vec<u8>,
    key: Vec<u8>,
    ca: Vec<u8>,
}

impl Contents {
    fn read(files: &Files) -> Result<Self, TlsError> {
        let read =
            |path: &Path| fs::read(path).map_err(|error| TlsError::Read { path: path.to_owned(), error });
        let cert = read(&files.cert)?;
        // Certificate and key in one file are read at once: it may be replaced between two reads.
        let key = if files.key == files.cert { cert.clone() } else { read(&files.key)? };
        Ok(Self { cert, key, ca: read(&files.ca)? })
    }

    fn parse(&self, files: &Files) -> Result<Parsed, TlsError> {
        let certs = certificates(&self.cert, &files.cert)?;
        let key = PrivateKeyDer::from_pem_slice(&self.key).map_err(|error| match error {
            rustls::pki_types::pem::Error::NoItemsFound => {
                TlsError::Empty { path: files.key.clone(), what: "private key" }
            }
            error => TlsError::Pem { path: files.key.clone(), text: error.to_string() },
        })?;
        let mut roots = RootCertStore::empty();
        for ca in certificates(&self.ca, &files.ca)? {
            let unusable =
                |error: rustls::Error| TlsError::Pem { path: files.ca.clone(), text: error.to_string() };
            roots.add(ca).map_err(unusable)?;
        }
        Ok(Parsed { certs, key, roots: Arc::new(roots) })
    }
}

struct Parsed {
    certs: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
    roots: Arc<RootCertStore>,
}

fn certificates(pem: &[u8], path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let certificates: Result<Vec<_>, _> = CertificateDer::pem_slice_iter(pem).collect();
    match certificates {
        Ok(certificates) if certificates.is_empty() => {
            Err(TlsError::Empty { path: path.to_owned(), what: "certificate" })
        }
        Ok(certificates) => Ok(certificates),
        Err(error) => Err(TlsError::Pem { path: path.to_owned(), text: error.to_string() }),
    }
}

/// ring, which would offer AES-256-GCM first. AES-128-GCM is a quarter faster, and what others offer first too.
fn provider() -> Arc<CryptoProvider> {
    let mut provider = rustls::crypto::ring::default_provider();
    provider.cipher_suites.sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    Arc::new(provider)
}

/// Credentials that are read again when their files change.
struct Reloading<C> {
    files: Files,
    build: fn(Domain, &Files, Parsed) -> Result<C, TlsError>,
    domain: Domain,
    contents: parking_lot::Mutex<Contents>,
    current: ArcSwap<C>,
}

impl<C> Reloading<C> {
    fn load(
        domain: Domain,
        files: Files,
        build: fn(Domain, &Files, Parsed) -> Result<C, TlsError>,
    ) -> Result<Self, TlsError> {
        let contents = Contents::read(&files)?;
        let current = ArcSwap::from_pointee(build(domain, &files, contents.parse(&files)?)?);
        Ok(Self { files, build, domain, contents: contents.into(), current })
    }

    /// Swaps in what the files hold now, if that differs, is usable, and `accept` takes it. Whether it did.
    fn reload(&self, accept: impl FnOnce(&C) -> Result<(), TlsError>) -> Result<bool, TlsError> {
        let read = Contents::read(&self.files)?;
        let mut contents = self.contents.lock();
        if read == *contents {
            return Ok(false);
        }
        let built = (self.build)(self.domain, &self.files, read.parse(&self.files)?)?;
        accept(&built)?;
        self.current.store(Arc::new(built));
        *contents = read;
        Ok(true)
    }
}

/// The server side of one domain: demands a client certificate of that domain's CA.
#[derive(Clone)]
pub struct ServerTls(Arc<Reloading<ServerConfig>>);

impl ServerTls {
    /// Reads the files.
    pub fn load(domain: Domain, files: Files) -> Result<Self, TlsError> {
        Reloading::load(domain, files, server_config).map(Arc::new).map(Self)
    }

    /// For the next connection.
    pub fn acceptor(&self) -> TlsAcceptor {
        TlsAcceptor::from(self.0.current.load_full())
    }

    /// Reads the files again; new connections use what they hold, if it is usable. Whether anything changed.
    pub fn reload(&self) -> Result<bool, TlsError> {
        self.0.reload(|_| Ok(()))
    }
}

/// Lets TLS take at once what a [link](crate::Link) writes at once. For both sides of a connection that carries one.
pub fn widen_for_link<Side>(connection: &mut ConnectionCommon<Side>) {
    connection.set_buffer_limit(Some(*WRITE_BATCH.end() + HEADERS_BEYOND));
}

/// Lets TLS take at once what a [relay](crate::relay()) hands on at once.
pub fn widen_for_relay<Side>(connection: &mut ConnectionCommon<Side>) {
    connection.set_buffer_limit(Some(READ_AT_ONCE));
}

impl fmt::Debug for ServerTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ServerTls").field("domain", &self.0.domain).field("files", &self.0.files).finish()
    }
}

/// The client side of one domain: shows a certificate, and verifies the server under that domain's CA.
#[derive(Clone)]
pub struct ClientTls(Arc<Reloading<ClientWithCertificate>>);

struct ClientWithCertificate {
    config: Arc<ClientConfig>,
    certificate: CertificateDer<'static>,
}

impl ClientTls {
    /// Reads the files.
    pub fn load(domain: Domain, files: Files) -> Result<Self, TlsError> {
        Reloading::load(domain, files, client_config).map(Arc::new).map(Self)
    }

    /// For the next connection.
    pub fn connector(&self) -> TlsConnector {
        TlsConnector::from(self.0.current.load().config.clone())
    }

    /// For a connection that offers these application protocols and not all of its domain's.
    pub fn connector_offering(&self, protocols: &[&[u8]]) -> TlsConnector {
        let mut config = ClientConfig::clone(&self.0.current.load().config);
        config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
        TlsConnector::from(Arc::new(config))
    }

    /// This side's own certificate, to read its names from.
    pub fn certificate(&self) -> CertificateDer<'static> {
        self.0.current.load().certificate.clone()
    }

    /// Reads the files again; new connections use what they hold, if it is usable. Whether anything changed.
    pub fn reload(&self) -> Result<bool, TlsError> {
        self.0.reload(|_| Ok(()))
    }

    /// As [`Self::reload`], but takes a new certificate only if `accept` does; otherwise all stays as it is, and the
    /// error gives `accept`'s reason.
    pub fn reload_if(
        &self,
        accept: impl FnOnce(&CertificateDer<'_>) -> Result<(), String>,
    ) -> Result<bool, TlsError> {
        let refused = |text| TlsError::Refused { cert: self.0.files.cert.clone(), text };
        self.0.reload(|built| accept(&built.certificate).map_err(refused))
    }
}

impl fmt::Debug for ClientTls {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("ClientTls").field("domain", &self.0.domain).field("files", &self.0.files).finish()
    }
}

fn mismatched(files: &Files, error: &rustls::Error) -> TlsError {
    match error {
        rustls::Error::InconsistentKeys(_) => unusable(files, &"the key does not belong to the certificate"),
        error => unusable(files, error),
    }
}

fn unusable(files: &Files, error: &impl ToString) -> TlsError {
    TlsError::Unusable { cert: files.cert.clone(), key: files.key.clone(), text: error.to_string() }
}

fn server_config(domain: Domain, files: &Files, parsed: Parsed) -> Result<ServerConfig, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(parsed.roots, provider())
        .build()
        .map_err(|error| unusable(files, &error))?;
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| unusable(files, &error))?
        .with_client_cert_verifier(verifier)
        .with_single_cert(parsed.certs, parsed.key)
        .map_err(|error| mismatched(files, &error))?;
    config.alpn_protocols = domain.alpn();
    // A resumed session would not verify the client's certificate again: none are offered.
    config.send_tls13_tickets = 0;
    Ok(config)
}

fn client_config(domain: Domain, files: &Files, parsed: Parsed) -> Result<ClientWithCertificate, TlsError> {
    let certificate = parsed.certs[0].clone();
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .map_err(|error| unusable(files, &error))?
        .with_root_certificates(parsed.roots)
        .with_client_auth_cert(parsed.certs, parsed.key)
        .map_err(|error| mismatched(files, &error))?;
    config.alpn_protocols = domain.alpn();
    Ok(ClientWithCertificate { config: Arc::new(config), certificate })
}

/// What a TLS failure means and what to do, for logs and error texts. Other errors are given as they are.
pub fn explain(error: &io::Error) -> String {
    match tls_error(error) {
        Some(error) => explain_tls(error),
        // The library's own text is about its API, not about what happened.
        None if error.kind() == io::ErrorKind::UnexpectedEof => {
            "the far side hung up without a word".to_owned()
        }
        None => error.to_string(),
    }
}

/// A short name for a failed handshake, for metrics.
pub fn label(error: &io::Error) -> &'static str {
    use rustls::Error as E;
    match tls_error(error) {
        Some(E::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. })) => {
            "expired"
        }
        Some(E::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature)) => {
            "unknown_ca"
        }
        Some(E::InvalidCertificate(_)) => "bad_certificate",
        Some(E::NoCertificatesPresented) => "no_certificate",
        Some(E::NoApplicationProtocol) => "alpn",
        Some(E::AlertReceived(_)) => "refused_by_peer",
        Some(E::InvalidMessage(_)) => "not_tls",
        Some(_) => "tls",
        None if error.kind() == io::ErrorKind::UnexpectedEof => "closed",
        // Of the bytes that come before anything is known of who sends them.
        None if error.kind() == io::ErrorKind::InvalidData => "too_long",
        None if error.kind() == io::ErrorKind::ConnectionReset => "reset",
        None => "io",
    }
}

/// Whether the far side has refused this side with an alert.
pub(crate) fn is_refusal(error: &io::Error) -> bool {
    matches!(tls_error(error), Some(rustls::Error::AlertReceived(_)))
}

fn tls_error(error: &io::Error) -> Option<&rustls::Error> {
    error.get_ref().and_then(|inner| inner.downcast_ref())
}

fn explain_tls(error: &rustls::Error) -> String {
    use rustls::Error as E;
    match error {
        E::InvalidCertificate(CertificateError::Expired | CertificateError::ExpiredContext { .. }) => {
            "the far side's certificate has expired: issue a new one (and check both clocks)".to_owned()
        }
        E::InvalidCertificate(CertificateError::NotValidYet | CertificateError::NotValidYetContext { .. }) => {
            "the far side's certificate is not valid yet: check both clocks".to_owned()
        }
        // A bad signature: another CA of the same name, as when a PKI was made anew.
        E::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "the far side's certificate was not issued by the CA configured for this side: \
             check that both use the same CA, and that the certificate is of the right trust domain"
                .to_owned()
        }
        E::InvalidCertificate(CertificateError::NotValidForName | CertificateError::NotValidForNameContext { .. }) => {
            format!("the far side's certificate is not for the name that was dialled: {error}")
        }
        E::NoCertificatesPresented => "the far side showed no client certificate".to_owned(),
        E::NoApplicationProtocol | E::AlertReceived(AlertDescription::NoApplicationProtocol) => {
            "the two sides have no application protocol (ALPN) in common: is this the right port?".to_owned()
        }
        E::AlertReceived(AlertDescription::CertificateExpired) => {
            "the far side says that this side's certificate has expired: issue a new one".to_owned()
        }
        E::AlertReceived(AlertDescription::UnsupportedCertificate) => {
            "the far side does not accept this side's certificate, since it is not for this use: a gateway's certificate for \
             its peers must be good for servers and for clients"
                .to_owned()
        }
        E::AlertReceived(AlertDescription::BadCertificate) => {
            "the far side does not accept this side's certificate, most often because it is not for the name that was \
             dialled: the far side's log says why"
                .to_owned()
        }
        E::AlertReceived(AlertDescription::UnknownCA | AlertDescription::DecryptError) => "the far side does not trust this side's certificate: it was issued by another CA than the far side expects"
            .to_owned(),
        E::AlertReceived(AlertDescription::CertificateRequired) => {
            "the far side demands a client certificate".to_owned()
        }
        E::AlertReceived(AlertDescription::ProtocolVersion) | E::PeerIncompatible(_) => {
            format!("no common TLS version (TLS 1.3 is required): {error}")
        }
        E::InvalidMessage(_) => "what came is not TLS: is this the right port?".to_owned(),
        other => other.to_string(),
    }
}
