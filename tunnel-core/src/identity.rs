//! Who is who: typed names, and the one place that reads a certificate: a node's or a caller's name, and how long it
//! holds.
//!
//! The names here come from a verified credential or from configuration, never from what a peer claims.

use std::{
    fmt,
    str::FromStr,
    time::{Duration, SystemTime},
};

use x509_parser::prelude::{ASN1Time, FromDer, GeneralName, X509Certificate};

/// A Kubernetes node name: the identity that traffic is routed by.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId(String);

/// The name of one gateway process, unique in its cluster.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct GatewayId(String);

/// Drawn at random by each edge process when it starts, so that a reconnect can be told from a second agent.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct InstanceId(String);

/// A text that may not be used as a name.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error(
    "{text:?} is not a valid {what}: use 1 to 253 lower-case letters, digits, '-' and '.', starting and ending with a letter or digit"
)]
pub struct NameError {
    what: &'static str,
    text: String,
}

/// Kubernetes' rule for node names (RFC 1123 subdomain).
fn check_name(what: &'static str, text: &str) -> Result<(), NameError> {
    let label_ok = |label: &str| {
        !label.is_empty()
            && label.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
            && !label.starts_with('-')
            && !label.ends_with('-')
    };
    if text.len() <= 253 && text.split('.').all(label_ok) {
        Ok(())
    } else {
        Err(NameError { what, text: text.chars().take(80).collect() })
    }
}

macro_rules! name_type {
    ($type:ident, $what:literal) => {
        impl FromStr for $type {
            type Err = NameError;
            fn from_str(text: &str) -> Result<Self, NameError> {
                check_name($what, text).map(|()| Self(text.to_owned()))
            }
        }
        impl $type {
            /// The name as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }
        impl fmt::Display for $type {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }
    };
}

name_type!(NodeId, "node name");
name_type!(GatewayId, "gateway id");
name_type!(InstanceId, "instance id");

impl InstanceId {
    /// An instance id from 128 random bits, which the caller draws.
    pub fn from_random(bits: u128) -> Self {
        Self(format!("{bits:032x}"))
    }
}

/// Why a certificate names no node.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// Not X.509 at all.
    #[error("the client certificate cannot be parsed")]
    Malformed,
    /// Neither of the two forms is there.
    #[error(
        "the client certificate (subject {subject:?}) names no node: it needs CN=system:node:NAME with \
         O=system:nodes, or a URI SAN spiffe://TRUST-DOMAIN/.../node/NAME"
    )]
    NoNode {
        /// The subject, for the log.
        subject: String,
    },
    /// More than one node is named.
    #[error("the client certificate names two nodes, {0} and {1}: issue one certificate per node")]
    Ambiguous(NodeId, NodeId),
    /// The node's name is there, but is not a name.
    #[error("the client certificate names a node, but {0}")]
    Name(#[from] NameError),
}

/// The node that a verified client certificate (DER) speaks for.
///
/// Accepts what a kubelet's own certificate holds, `CN=system:node:NAME` and `O=system:nodes`, and a SPIFFE
/// URI whose path ends in `/node/NAME`. Both may be there if they agree.
pub fn node_from_certificate(der: &[u8]) -> Result<NodeId, IdentityError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| IdentityError::Malformed)?;
    let by_subject = node_in_subject(&certificate)?;
    let mut found = by_subject;
    for uri in uri_names(&certificate) {
        let Some(node) = node_in_spiffe_uri(uri)? else { continue };
        match &found {
            Some(other) if *other != node => return Err(IdentityError::Ambiguous(other.clone(), node)),
            _ => found = Some(node),
        }
    }
    found.ok_or_else(|| IdentityError::NoNode { subject: certificate.subject().to_string() })
}

/// Every name by which a verified client certificate (DER) may be known: its common name first, then DNS and URI
/// subject alternative names. For allow-lists and audit; empty if the certificate cannot be parsed.
pub fn names_in_certificate(der: &[u8]) -> Vec<String> {
    let Ok((_, certificate)) = X509Certificate::from_der(der) else { return Vec::new() };
    let common_names = certificate.subject().iter_common_name().filter_map(|name| name.as_str().ok());
    let mut names: Vec<String> = common_names.map(str::to_owned).collect();
    if let Ok(Some(san)) = certificate.subject_alternative_name() {
        names.extend(san.value.general_names.iter().filter_map(|name| match name {
            GeneralName::DNSName(name) | GeneralName::URI(name) => Some((*name).to_owned()),
            _ => None,
        }));
    }
    names
}

/// From when until when a certificate holds. A time before 1970 counts as 1970.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Validity {
    /// Its first second.
    pub not_before: SystemTime,
    /// Its last second.
    pub not_after: SystemTime,
}

/// How long a certificate (DER) holds, whoever it is for.
pub fn validity_of_certificate(der: &[u8]) -> Result<Validity, IdentityError> {
    let (_, certificate) = X509Certificate::from_der(der).map_err(|_| IdentityError::Malformed)?;
    let time = |time: ASN1Time| {
        SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
    };
    let validity = certificate.validity();
    Ok(Validity { not_before: time(validity.not_before), not_after: time(validity.not_after) })
}

fn node_in_subject(certificate: &X509Certificate<'_>) -> Result<Option<NodeId>, IdentityError> {
    let subject = certificate.subject();
    let in_nodes_group = subject.iter_organization().any(|group| group.as_str() == Ok("system:nodes"));
    if !in_nodes_group {
        return Ok(None);
    }
    let mut common_names = subject.iter_common_name().filter_map(|name| name.as_str().ok());
    let node = match (common_names.next(), common_names.next()) {
        (Some(only), None) => only.strip_prefix("system:node:"),
        _ => None,
    };
    Ok(node.map(str::parse).transpose()?)
}

fn uri_names<'a>(certificate: &'a X509Certificate<'_>) -> impl Iterator<Item = &'a str> {
    let san = certificate.subject_alternative_name().ok().flatten();
    san.into_iter().flat_map(|san| &san.value.general_names).filter_map(|name| match name {
        GeneralName::URI(uri) => Some(*uri),
        _ => None,
    })
}

fn node_in_spiffe_uri(uri: &str) -> Result<Option<NodeId>, IdentityError> {
    let Some((_trust_domain, path)) = uri.strip_prefix("spiffe://").and_then(|rest| rest.split_once('/'))
    else {
        return Ok(None);
    };
    let mut segments = path.rsplit('/');
    match (segments.next(), segments.next()) {
        (Some(name), Some("node")) => Ok(Some(name.parse()?)),
        _ => Ok(None),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use rcgen::{CertificateParams, DnType, KeyPair, SanType};

    fn certificate(common_names: &[&str], organization: &str, uris: &[&str]) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.distinguished_name = rcgen::DistinguishedName::new();
        for name in common_names {
            params.distinguished_name.push(DnType::CommonName, *name);
        }
        params.distinguished_name.push(DnType::OrganizationName, organization);
        params.subject_alt_names = uris.iter().map(|uri| SanType::URI((*uri).try_into().unwrap())).collect();
        params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec()
    }

    #[test]
    fn a_kubelet_certificate_names_its_node() {
        let der = certificate(&["system:node:edge-a"], "system:nodes", &[]);
        assert_eq!(node_from_certificate(&der).unwrap().as_str(), "edge-a");
    }

    #[test]
    fn a_spiffe_uri_names_its_node() {
        let der = certificate(&["agent"], "acme", &["spiffe://acme.example/ns/kube-system/node/edge-a"]);
        assert_eq!(node_from_certificate(&der).unwrap().as_str(), "edge-a");
    }

    #[test]
    fn both_forms_must_agree() {
        let der = certificate(&["system:node:edge-a"], "system:nodes", &["spiffe://acme/node/edge-b"]);
        assert!(matches!(node_from_certificate(&der), Err(IdentityError::Ambiguous(..))));
    }

    #[test]
    fn a_name_without_the_group_is_no_node() {
        let der = certificate(&["system:node:edge-a"], "acme", &["https://acme/node/edge-a"]);
        assert!(matches!(node_from_certificate(&der), Err(IdentityError::NoNode { .. })));
    }

    #[test]
    fn a_bad_name_is_refused() {
        let der = certificate(&["system:node:Edge A"], "system:nodes", &[]);
        assert!(matches!(node_from_certificate(&der), Err(IdentityError::Name(_))));
    }

    #[test]
    fn a_validity_is_read_to_the_second_and_begins_with_1970() {
        let mut params = CertificateParams::default();
        params.not_before = rcgen::date_time_ymd(1955, 11, 5);
        params.not_after = rcgen::date_time_ymd(2001, 9, 9);
        let der = params.self_signed(&KeyPair::generate().unwrap()).unwrap().der().to_vec();
        let validity = validity_of_certificate(&der).unwrap();
        assert_eq!(validity.not_before, SystemTime::UNIX_EPOCH);
        // `date -u -d 2001-09-09 +%s`
        assert_eq!(validity.not_after, SystemTime::UNIX_EPOCH + Duration::from_secs(999_993_600));
        assert_eq!(validity_of_certificate(b"none"), Err(IdentityError::Malformed));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(der in proptest::collection::vec(any::<u8>(), 0..2048)) {
            let _ = node_from_certificate(&der);
            let _ = names_in_certificate(&der);
            let _ = validity_of_certificate(&der);
        }
    }
}
