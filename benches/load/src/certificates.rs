//! Everyone's credentials, as files in a temporary folder: each gateway's, each edge's, and those of the ingress's client.
//! Made once for each run by `main`.

use std::{
    fs, io,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    time::Duration,
};

use tunnel_core::{
    GatewayId, NodeId,
    tls::{Domain, Files},
};
use tunnel_server::pki::{AltName, Authority, Issued, PkiError, Profile, Validity};

/// By this name edges and client verify every gateway.
pub(crate) const GATEWAY_NAME: &str = "localhost";
/// Far more than a measurement takes.
const LIFETIME: Duration = Duration::from_secs(7 * 24 * 3600);

/// Why there are none.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CertificateError {
    #[error(transparent)]
    Make(#[from] PkiError),
    #[error("cannot write {path}: {error}")]
    Write { path: PathBuf, error: io::Error },
}

/// Files of everyone's credentials.
pub(crate) struct Certificates {
    folder: PathBuf,
}

impl Certificates {
    /// Makes them all: three CAs, a certificate of each gateway from each, one of each node, and one client's.
    pub(crate) fn make(
        folder: &Path,
        gateways: &[GatewayId],
        nodes: &[NodeId],
    ) -> Result<Self, CertificateError> {
        let certificates = Self { folder: folder.to_owned() };
        let validity = Validity::lasting(LIFETIME);
        let names = vec![AltName::Dns(GATEWAY_NAME.to_owned()), AltName::Ip(Ipv4Addr::LOCALHOST.into())];
        let edges = Authority::new(Domain::Edge, validity)?;
        let control_plane = Authority::new(Domain::ControlPlane, validity)?;
        let peers = Authority::new(Domain::Peer, validity)?;
        for authority in [&edges, &control_plane, &peers] {
            write(&certificates.ca(authority.domain()), authority.cert_pem())?;
        }
        for gateway in gateways {
            let door = Profile::Gateway { name: gateway.clone(), names: names.clone() };
            let peer = Profile::Peer { name: gateway.clone(), names: names.clone() };
            for (authority, profile) in [(&edges, &door), (&control_plane, &door), (&peers, &peer)] {
                let files = certificates.gateway(gateway, authority.domain());
                save(&files, &authority.issue(profile, validity)?)?;
            }
        }
        for node in nodes {
            let profile = Profile::Edge { node: node.clone() };
            save(&certificates.edge(node), &edges.issue(&profile, validity)?)?;
        }
        let client = Profile::Client { name: "tunnel-load".to_owned() };
        save(&certificates.client(), &control_plane.issue(&client, validity)?)?;
        Ok(certificates)
    }

    /// What a gateway shows on one of its sides.
    pub(crate) fn gateway(&self, gateway: &GatewayId, domain: Domain) -> Files {
        self.files(&format!("{gateway}-{domain}"), domain)
    }

    /// What the edge of a node shows.
    pub(crate) fn edge(&self, node: &NodeId) -> Files {
        self.files(node.as_str(), Domain::Edge)
    }

    /// What the client of the ingress shows.
    pub(crate) fn client(&self) -> Files {
        self.files("client", Domain::ControlPlane)
    }

    fn files(&self, name: &str, domain: Domain) -> Files {
        let own = self.folder.join(format!("{name}.pem"));
        Files { cert: own.clone(), key: own, ca: self.ca(domain) }
    }

    fn ca(&self, domain: Domain) -> PathBuf {
        self.folder.join(format!("{domain}-ca.pem"))
    }
}

/// Certificate and key in one file.
fn save(files: &Files, issued: &Issued) -> Result<(), CertificateError> {
    write(&files.cert, &(issued.cert_pem.clone() + &issued.key_pem))
}

fn write(path: &Path, text: &str) -> Result<(), CertificateError> {
    fs::write(path, text).map_err(|error| CertificateError::Write { path: path.to_owned(), error })
}
