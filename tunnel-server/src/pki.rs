//! A small PKI: three CAs that never mix, one for each side of a gateway, and the certificates that they issue.
//!
//! In memory for `dev` and for tests ([`Authority`]); as files for `tunnel-server pki` ([`files`]). Enough to begin with,
//! and for clusters that have no PKI of their own; a kubelet's own certificates and cert-manager's work as well.

pub mod files;

use std::{
    net::IpAddr,
    time::{Duration, SystemTime},
};

use rand::Rng;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyPair, KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, SanType, SerialNumber, string::Ia5String,
};
use tunnel_core::{GatewayId, NodeId, tls::Domain};

/// Certificates are valid from this long before they were made, for clocks that lag behind.
const BACKDATED: Duration = Duration::from_secs(5 * 60);

/// What a certificate is for. Each belongs to one side, but for a gateway's, which two have.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Profile {
    /// An edge's client certificate, which names its node.
    Edge {
        /// The node.
        node: NodeId,
    },
    /// The certificate that a gateway shows to edges, or to the control plane.
    Gateway {
        /// Its common name.
        name: GatewayId,
        /// What those who connect may call it.
        names: Vec<AltName>,
    },
    /// A client of the control plane.
    Client {
        /// Its common name, which `ingress.allowed_clients` can name.
        name: String,
    },
    /// The certificate that a gateway shows to its peers, as server and as client.
    Peer {
        /// Its common name, and one of its DNS names.
        name: GatewayId,
        /// What peers may call it besides.
        names: Vec<AltName>,
    },
}

impl Profile {
    fn belongs_to(&self, domain: Domain) -> bool {
        match self {
            Self::Edge { .. } => domain == Domain::Edge,
            Self::Gateway { .. } => domain == Domain::Edge || domain == Domain::ControlPlane,
            Self::Client { .. } => domain == Domain::ControlPlane,
            Self::Peer { .. } => domain == Domain::Peer,
        }
    }

    fn what(&self) -> &'static str {
        match self {
            Self::Edge { .. } => "an edge",
            Self::Gateway { .. } => "a gateway",
            Self::Client { .. } => "a client",
            Self::Peer { .. } => "a peer",
        }
    }
}

/// A subject alternative name.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum AltName {
    /// A DNS name; the first label may be `*`.
    Dns(String),
    /// An address.
    Ip(IpAddr),
}

/// From when until when a certificate is valid.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    not_before: SystemTime,
    not_after: SystemTime,
}

impl Validity {
    /// From now, backdated a little, for this long.
    pub fn lasting(time: Duration) -> Self {
        let now = SystemTime::now();
        Self { not_before: now - BACKDATED, not_after: now + time }
    }

    /// Exactly this, which may lie in the past.
    pub fn between(not_before: SystemTime, not_after: SystemTime) -> Self {
        Self { not_before, not_after }
    }
}

/// A certificate and its private key, both PEM.
#[derive(Clone)]
pub struct Issued {
    /// The certificate.
    pub cert_pem: String,
    /// The key: a secret.
    pub key_pem: String,
}

/// Why there is no certificate.
#[derive(Debug, thiserror::Error)]
pub enum PkiError {
    /// The CA of one side was asked for a certificate of another.
    #[error(
        "the {domain} CA issues no certificate for {what}: each side of a gateway trusts its own CA only"
    )]
    WrongDomain {
        /// Whose CA.
        domain: Domain,
        /// For what.
        what: &'static str,
    },
    /// A name that no certificate can hold.
    #[error("{0:?} cannot stand in a certificate: a DNS name must be plain ASCII")]
    Name(String),
    /// What was read is no usable CA.
    #[error("not a CA to issue with: {0}")]
    NotAuthority(String),
    /// The library failed.
    #[error("the certificate cannot be made: {0}")]
    Make(#[from] rcgen::Error),
}

/// The CA of one side.
pub struct Authority {
    domain: Domain,
    cert_pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    /// A new CA with a new key.
    pub fn new(domain: Domain, validity: Validity) -> Result<Self, PkiError> {
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let mut params = params(&format!("edge-tunnel {domain} CA"), validity);
        // It issues certificates, and no further CAs.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let cert_pem = params.self_signed(&key)?.pem();
        Ok(Self { domain, cert_pem, issuer: Issuer::new(params, key) })
    }

    /// A CA that was made before.
    pub fn from_pem(domain: Domain, cert_pem: &str, key_pem: &str) -> Result<Self, PkiError> {
        let not_authority = |text: &dyn ToString| PkiError::NotAuthority(text.to_string());
        let key = KeyPair::from_pem(key_pem).map_err(|error| not_authority(&error))?;
        let (_, pem) =
            x509_parser::pem::parse_x509_pem(cert_pem.as_bytes()).map_err(|error| not_authority(&error))?;
        let parsed = pem.parse_x509().map_err(|error| not_authority(&error))?;
        if !parsed.is_ca() {
            return Err(not_authority(&"the certificate is no CA's"));
        }
        if parsed.public_key().subject_public_key.data.as_ref() != key.public_key_raw() {
            return Err(not_authority(&"the private key belongs to another certificate"));
        }
        let issuer = Issuer::from_ca_cert_pem(cert_pem, key)?;
        Ok(Self { domain, cert_pem: cert_pem.to_owned(), issuer })
    }

    /// The side that it is for.
    pub fn domain(&self) -> Domain {
        self.domain
    }

    /// Its certificate: what the other end of that side needs.
    pub fn cert_pem(&self) -> &str {
        &self.cert_pem
    }

    /// Its private key: a secret.
    pub fn key_pem(&self) -> String {
        self.issuer.key().serialize_pem()
    }

    /// A certificate with a new key.
    pub fn issue(&self, profile: &Profile, validity: Validity) -> Result<Issued, PkiError> {
        if !profile.belongs_to(self.domain) {
            return Err(PkiError::WrongDomain { domain: self.domain, what: profile.what() });
        }
        let key = KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256)?;
        let cert_pem = leaf(profile, validity)?.signed_by(&key, &self.issuer)?.pem();
        Ok(Issued { cert_pem, key_pem: key.serialize_pem() })
    }
}

fn leaf(profile: &Profile, validity: Validity) -> Result<CertificateParams, PkiError> {
    use ExtendedKeyUsagePurpose::{ClientAuth, ServerAuth};
    let (common_name, usages, names) = match profile {
        Profile::Edge { node } => (format!("system:node:{node}"), vec![ClientAuth], Vec::new()),
        Profile::Gateway { name, names } => (name.to_string(), vec![ServerAuth], names.clone()),
        Profile::Client { name } => (name.clone(), vec![ClientAuth], Vec::new()),
        Profile::Peer { name, names } => {
            let own = AltName::Dns(name.to_string());
            let others = names.iter().filter(|other| **other != own).cloned();
            (
                name.to_string(),
                vec![ServerAuth, ClientAuth],
                [own.clone()].into_iter().chain(others).collect(),
            )
        }
    };
    let mut params = params(&common_name, validity);
    if let Profile::Edge { .. } = profile {
        params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    }
    // Explicit, so that the certificate has a subject key identifier too.
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = usages;
    params.use_authority_key_identifier_extension = true;
    params.subject_alt_names = names.into_iter().map(san).collect::<Result<_, _>>()?;
    Ok(params)
}

fn params(common_name: &str, validity: Validity) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.serial_number = Some(serial());
    params.not_before = validity.not_before.into();
    params.not_after = validity.not_after.into();
    params
}

/// 128 random bits, but for the first two: a serial number is positive, and keeps its length if it begins with a one.
fn serial() -> SerialNumber {
    let bits = rand::rng().random::<u128>();
    SerialNumber::from_slice(&(bits >> 2 | 1 << 126).to_be_bytes())
}

fn san(name: AltName) -> Result<SanType, PkiError> {
    match name {
        AltName::Ip(address) => Ok(SanType::IpAddress(address)),
        AltName::Dns(name) => match Ia5String::try_from(name.as_str()) {
            Ok(text) => Ok(SanType::DnsName(text)),
            Err(_) => Err(PkiError::Name(name)),
        },
    }
}

#[cfg(test)]
mod tests;
