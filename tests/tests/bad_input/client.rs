//! TLS as it should not be: any credential, any application protocol, at any door. And the alert that comes back.

use std::{
    fs, io,
    net::SocketAddr,
    sync::Arc,
    time::{Duration, SystemTime},
};

use rcgen::{CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use rustls::{
    AlertDescription, ClientConfig, RootCertStore, ServerConfig,
    crypto::{CryptoProvider, ring},
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem::PemObject},
    version::TLS13,
};
use tokio::{io::AsyncReadExt, net::TcpStream};
use tokio_rustls::{TlsAcceptor, TlsConnector, client::TlsStream};
use tunnel_core::{proto::ALPN_EDGE, tls::Domain};
use tunnel_server::pki::{AltName, Authority, Profile, Validity};
use tunnel_tests::parties::{GATEWAY, pki};

use crate::rig::soon;

/// What edges offer by ALPN.
pub(crate) const EDGE: &[&[u8]] = &[ALPN_EDGE];
const DAY: Duration = Duration::from_secs(24 * 3600);

/// A certificate and its key.
pub(crate) struct Credential {
    cert: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
}

impl Credential {
    fn from_pem(cert: &str, key: &str) -> Self {
        Self {
            cert: CertificateDer::from_pem_slice(cert.as_bytes()).unwrap(),
            key: PrivateKeyDer::from_pem_slice(key.as_bytes()).unwrap(),
        }
    }

    /// From the CA of a side.
    pub(crate) fn issue(domain: Domain, profile: &Profile, validity: Validity) -> Self {
        let authority = Authority::from_pem(domain, &ca(domain, "crt"), &ca(domain, "key")).unwrap();
        let issued = authority.issue(profile, validity).unwrap();
        Self::from_pem(&issued.cert_pem, &issued.key_pem)
    }

    /// An edge's.
    pub(crate) fn edge(node: &str) -> Self {
        Self::issue(Domain::Edge, &Profile::Edge { node: node.parse().unwrap() }, valid())
    }

    /// A control plane's client's.
    pub(crate) fn client(name: &str) -> Self {
        Self::issue(Domain::ControlPlane, &Profile::Client { name: name.to_owned() }, valid())
    }

    /// A gateway's, as its peers see it.
    pub(crate) fn peer() -> Self {
        let profile = Profile::Peer { name: "gateway-2".parse().unwrap(), names: Vec::new() };
        Self::issue(Domain::Peer, &profile, valid())
    }

    /// A gateway's, as edges or the control plane see it.
    pub(crate) fn gateway(domain: Domain, validity: Validity) -> Self {
        let names = vec![AltName::Dns(GATEWAY.to_owned())];
        Self::issue(domain, &Profile::Gateway { name: GATEWAY.parse().unwrap(), names }, validity)
    }

    /// From the edges' CA, for a client, but for no node.
    pub(crate) fn of_no_node() -> Self {
        let authority_key = KeyPair::from_pem(&ca(Domain::Edge, "key")).unwrap();
        let issuer = Issuer::from_ca_cert_pem(&ca(Domain::Edge, "crt"), authority_key).unwrap();
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        params.distinguished_name.push(DnType::CommonName, "somebody");
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ClientAuth];
        let key = KeyPair::generate().unwrap();
        Self::from_pem(&params.signed_by(&key, &issuer).unwrap().pem(), &key.serialize_pem())
    }
}

/// Now.
pub(crate) fn valid() -> Validity {
    Validity::lasting(DAY)
}

/// Until yesterday.
pub(crate) fn expired() -> Validity {
    let now = SystemTime::now();
    Validity::between(now - 2 * DAY, now - DAY)
}

/// What a client shows, the alert it gets for it, the failure's name in the metrics, and words of the log's line.
pub(crate) type Refusal = (&'static str, Option<Credential>, AlertDescription, &'static str, &'static str);

/// Certificates that a door of `domain` refuses; `profile` is what it would take, `other` of the other door.
pub(crate) fn refusals(domain: Domain, profile: &Profile, other: (&'static str, Credential)) -> [Refusal; 5] {
    let other_ca = "was not issued by the CA configured for this side";
    [
        (
            "none",
            None,
            AlertDescription::CertificateRequired,
            "no_certificate",
            "showed no client certificate",
        ),
        (other.0, Some(other.1), AlertDescription::UnknownCA, "unknown_ca", other_ca),
        ("a peer's", Some(Credential::peer()), AlertDescription::UnknownCA, "unknown_ca", other_ca),
        (
            "expired",
            Some(Credential::issue(domain, profile, expired())),
            AlertDescription::CertificateExpired,
            "expired",
            "certificate has expired: issue a new one",
        ),
        (
            "a gateway's",
            Some(Credential::gateway(domain, valid())),
            AlertDescription::UnsupportedCertificate,
            "bad_certificate",
            "client",
        ),
    ]
}

fn ca(domain: Domain, extension: &str) -> String {
    fs::read_to_string(pki().join(format!("{domain}/ca.{extension}"))).unwrap()
}

fn provider() -> Arc<CryptoProvider> {
    Arc::new(ring::default_provider())
}

/// Connects to the door of a side. The handshake is over for the client before the gateway has looked at its
/// certificate, so that success means little.
pub(crate) async fn tls(
    door: SocketAddr,
    domain: Domain,
    credential: Option<Credential>,
    protocols: &[&[u8]],
) -> io::Result<TlsStream<TcpStream>> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_slice(ca(domain, "crt").as_bytes()).unwrap()).unwrap();
    let config = ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match credential {
        Some(Credential { cert, key }) => config.with_client_auth_cert(vec![cert], key).unwrap(),
        None => config.with_no_client_auth(),
    };
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    let socket = TcpStream::connect(door).await?;
    let name = ServerName::try_from(GATEWAY).unwrap();
    soon("a TLS handshake", TlsConnector::from(Arc::new(config)).connect(name, socket)).await
}

/// The TLS side of a gateway that is not what it should be.
pub(crate) fn acceptor(Credential { cert, key }: Credential, protocols: &[&[u8]]) -> TlsAcceptor {
    let config = ServerConfig::builder_with_provider(provider()).with_protocol_versions(&[&TLS13]).unwrap();
    let mut config = config.with_no_client_auth().with_single_cert(vec![cert], key).unwrap();
    config.alpn_protocols = protocols.iter().map(|protocol| protocol.to_vec()).collect();
    TlsAcceptor::from(Arc::new(config))
}

/// The alert that a connection, or the attempt to make one, ends with.
pub(crate) async fn alert(connected: io::Result<TlsStream<TcpStream>>) -> AlertDescription {
    let error = match connected {
        Ok(mut stream) => soon("an alert", stream.read_to_end(&mut Vec::new())).await.unwrap_err(),
        Err(error) => error,
    };
    match error.get_ref().and_then(|inner| inner.downcast_ref()) {
        Some(rustls::Error::AlertReceived(alert)) => *alert,
        _ => panic!("not an alert: {error}"),
    }
}

/// Whatever comes until the end; a reset is an end too.
pub(crate) async fn rest(stream: &mut (impl tokio::io::AsyncRead + Unpin)) -> Vec<u8> {
    let mut bytes = Vec::new();
    let _ = soon("the end of the connection", stream.read_to_end(&mut bytes)).await;
    bytes
}
