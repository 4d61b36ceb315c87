//! Mutual TLS 1.3 from PEM files, with one cipher suite, for both ends that are in this program: `way` and `relay`.

use std::{io, path::PathBuf, str::FromStr, sync::Arc};

use clap::ValueEnum;
use rustls::{
    ClientConfig, RootCertStore, ServerConfig, SupportedCipherSuite,
    client::Resumption,
    crypto::{
        CryptoProvider,
        ring::{
            cipher_suite::{
                TLS13_AES_128_GCM_SHA256, TLS13_AES_256_GCM_SHA384, TLS13_CHACHA20_POLY1305_SHA256,
            },
            default_provider,
        },
    },
    pki_types::{CertificateDer, PrivateKeyDer, ServerName, pem, pem::PemObject},
    server::{VerifierBuilderError, WebPkiClientVerifier},
};
use tokio_rustls::{TlsAcceptor, TlsConnector};

/// A cipher suite of TLS 1.3.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(crate) enum Cipher {
    #[value(name = "aes-128-gcm")]
    Aes128Gcm,
    #[value(name = "aes-256-gcm")]
    Aes256Gcm,
    #[value(name = "chacha20-poly1305")]
    ChaCha20Poly1305,
}

impl Cipher {
    fn suite(self) -> SupportedCipherSuite {
        match self {
            Self::Aes128Gcm => TLS13_AES_128_GCM_SHA256,
            Self::Aes256Gcm => TLS13_AES_256_GCM_SHA384,
            Self::ChaCha20Poly1305 => TLS13_CHACHA20_POLY1305_SHA256,
        }
    }
}

/// From now on this process knows no other suite, so that two systems cannot differ by what they negotiate with it.
pub(crate) fn use_cipher(cipher: Cipher) {
    let provider = CryptoProvider { cipher_suites: vec![cipher.suite()], ..default_provider() };
    // Fails only if there is one already, as in tests.
    let _ = provider.install_default();
}

/// Why there can be no TLS.
#[derive(Debug, thiserror::Error)]
pub(crate) enum TlsError {
    #[error("{via} needs --ca, --cert and --key")]
    Missing { via: String },
    #[error("cannot use {path}: {error}")]
    File { path: PathBuf, error: pem::Error },
    #[error("cannot read {path}: {error}")]
    Read { path: PathBuf, error: io::Error },
    #[error("{path} is no CA certificate: {error}")]
    Ca { path: PathBuf, error: rustls::Error },
    #[error("clients cannot be verified with {path}: {error}")]
    Verifier { path: PathBuf, error: VerifierBuilderError },
    #[error("certificate {path} and its key do not work: {error}")]
    Identity { path: PathBuf, error: rustls::Error },
    #[error("gRPC cannot be had at {address}: {error}")]
    Grpc { address: String, error: String },
    #[error("{name:?} is no name of a server")]
    Name { name: String },
}

/// PEM files: an own certificate, its key, and the CA of the other side's.
#[derive(Clone, Debug)]
pub(crate) struct Files {
    pub(crate) cert: PathBuf,
    pub(crate) key: PathBuf,
    pub(crate) ca: PathBuf,
}

/// The same, and the name that the other side's certificate must have.
#[derive(Clone, Debug)]
pub(crate) struct Named {
    pub(crate) files: Files,
    pub(crate) name: ServerName<'static>,
}

impl Files {
    /// Every handshake is a whole one, as kube-apiserver's are: it keeps no sessions.
    pub(crate) fn connector(&self) -> Result<TlsConnector, TlsError> {
        let (chain, key) = self.identity()?;
        let config = ClientConfig::builder().with_root_certificates(self.roots()?);
        let config = config.with_client_auth_cert(chain, key);
        let mut config = config.map_err(|error| TlsError::Identity { path: self.cert.clone(), error })?;
        config.resumption = Resumption::disabled();
        Ok(Arc::new(config).into())
    }

    pub(crate) fn acceptor(&self) -> Result<TlsAcceptor, TlsError> {
        let (chain, key) = self.identity()?;
        let verifier = WebPkiClientVerifier::builder(Arc::new(self.roots()?)).build();
        let verifier = verifier.map_err(|error| TlsError::Verifier { path: self.ca.clone(), error })?;
        let config = ServerConfig::builder().with_client_cert_verifier(verifier).with_single_cert(chain, key);
        let mut config = config.map_err(|error| TlsError::Identity { path: self.cert.clone(), error })?;
        // For sessions that no client resumes.
        config.send_tls13_tickets = 0;
        Ok(Arc::new(config).into())
    }

    fn identity(&self) -> Result<(Vec<CertificateDer<'static>>, PrivateKeyDer<'static>), TlsError> {
        let broken = |error| TlsError::File { path: self.key.clone(), error };
        Ok((certificates(&self.cert)?, PrivateKeyDer::from_pem_file(&self.key).map_err(broken)?))
    }

    fn roots(&self) -> Result<RootCertStore, TlsError> {
        let mut roots = RootCertStore::empty();
        for ca in certificates(&self.ca)? {
            roots.add(ca).map_err(|error| TlsError::Ca { path: self.ca.clone(), error })?;
        }
        Ok(roots)
    }
}

fn certificates(path: &PathBuf) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let broken = |error| TlsError::File { path: path.clone(), error };
    CertificateDer::pem_file_iter(path).map_err(broken)?.collect::<Result<_, _>>().map_err(broken)
}

pub(crate) fn server_name(name: &str) -> Result<ServerName<'static>, TlsError> {
    ServerName::try_from(name.to_owned()).map_err(|_| TlsError::Name { name: name.to_owned() })
}

impl FromStr for Files {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match *text.split(',').collect::<Vec<_>>() {
            [cert, key, ca] => Ok(Self { cert: cert.into(), key: key.into(), ca: ca.into() }),
            _ => Err("is not three files: CERT,KEY,CA".to_owned()),
        }
    }
}

impl FromStr for Named {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (files, name) = text.rsplit_once(',').ok_or("is not three files and a name: CERT,KEY,CA,NAME")?;
        Ok(Self { files: files.parse()?, name: server_name(name).map_err(|error| error.to_string())? })
    }
}
