//! The PKI as files: what `tunnel-server pki init` and `pki issue` write.
//!
//! ```text
//! DIR/edge/           ca.crt ca.key   gateway.crt gateway.key
//! DIR/control-plane/  ca.crt ca.key   gateway.crt gateway.key   client.crt client.key
//! DIR/peer/           ca.crt ca.key   gateway.crt gateway.key
//! ```
//!
//! Nothing is ever overwritten, and that is checked before the first file is written. A key's file is made with its mode,
//! so that there is no moment in which others can read it.

use std::{
    fs::{self, DirBuilder, OpenOptions},
    io::{self, Write},
    os::unix::fs::{DirBuilderExt, OpenOptionsExt},
    path::{Path, PathBuf},
};

use tunnel_core::{GatewayId, tls::Domain};

use super::{AltName, Authority, Issued, PkiError, Profile, Validity};

const DIRECTORY_MODE: u32 = 0o700;
const CERT_MODE: u32 = 0o644;
const KEY_MODE: u32 = 0o600;

/// Why files were not written, or not read.
#[derive(Debug, thiserror::Error)]
pub enum FilesError {
    /// They would have replaced others.
    #[error("nothing was written, because these are there already (move them away, or choose another directory):{}", list(.0))]
    Exists(Vec<PathBuf>),
    /// The file system refused.
    #[error("cannot {what} {path}: {error}")]
    Io {
        /// What failed.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// There is no CA.
    #[error("there is no CA in {side}: make one with `tunnel-server pki init {directory}`")]
    NoAuthority {
        /// Where it should be.
        side: PathBuf,
        /// The PKI's directory.
        directory: PathBuf,
    },
    /// The CA in a directory cannot be used.
    #[error("the CA in {path} cannot be used: {error}")]
    Authority {
        /// The directory.
        path: PathBuf,
        /// Why.
        error: PkiError,
    },
    /// No certificate was made.
    #[error(transparent)]
    Pki(#[from] PkiError),
}

fn list(paths: &[PathBuf]) -> String {
    paths.iter().fold(String::new(), |list, path| list + "\n  " + &path.to_string_lossy())
}

fn failed(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> FilesError {
    move |error| FilesError::Io { what, path: path.to_owned(), error }
}

/// What [`init`] makes.
#[derive(Clone, Debug)]
pub struct Init {
    /// The first gateway's name.
    pub gateway: GatewayId,
    /// What edges, control plane and peers may call it.
    pub names: Vec<AltName>,
    /// The first client's name.
    pub client: String,
    /// Of the certificates.
    pub validity: Validity,
    /// Of the CAs.
    pub ca_validity: Validity,
}

/// Makes three CAs and what a first gateway needs. Gives the files, in the order of writing.
pub fn init(directory: &Path, init: &Init) -> Result<Vec<PathBuf>, FilesError> {
    let gateway = Profile::Gateway { name: init.gateway.clone(), names: init.names.clone() };
    let peer = Profile::Peer { name: init.gateway.clone(), names: init.names.clone() };
    let client = Profile::Client { name: init.client.clone() };
    let sides: [(Domain, &[(&str, &Profile)]); 3] = [
        (Domain::Edge, &[("gateway", &gateway)]),
        (Domain::ControlPlane, &[("gateway", &gateway), ("client", &client)]),
        (Domain::Peer, &[("gateway", &peer)]),
    ];
    let mut plan = Plan::default();
    for (domain, profiles) in sides {
        let side = directory.join(domain.to_string());
        let authority = Authority::new(domain, init.ca_validity)?;
        plan.add(&side, "ca", authority.cert_pem().to_owned(), authority.key_pem());
        for (name, profile) in profiles {
            let Issued { cert_pem, key_pem } = authority.issue(profile, init.validity)?;
            plan.add(&side, name, cert_pem, key_pem);
        }
    }
    plan.write()
}

/// Issues one certificate with the CA that `directory` has for `domain`, as `NAME.crt` and `NAME.key` in `out`, or beside
/// the CA.
pub fn issue(
    directory: &Path,
    domain: Domain,
    profile: &Profile,
    name: &str,
    validity: Validity,
    out: Option<&Path>,
) -> Result<Vec<PathBuf>, FilesError> {
    let side = directory.join(domain.to_string());
    if !side.join("ca.crt").exists() {
        return Err(FilesError::NoAuthority { side, directory: directory.to_owned() });
    }
    let authority = load(domain, &side)?;
    let Issued { cert_pem, key_pem } = authority.issue(profile, validity)?;
    let mut plan = Plan::default();
    plan.add(out.unwrap_or(&side), name, cert_pem, key_pem);
    plan.write()
}

/// The CA that lies in a directory.
fn load(domain: Domain, side: &Path) -> Result<Authority, FilesError> {
    let read = |name: &str| {
        let path = side.join(name);
        fs::read_to_string(&path).map_err(failed("read", &path))
    };
    let (cert, key) = (read("ca.crt")?, read("ca.key")?);
    Authority::from_pem(domain, &cert, &key)
        .map_err(|error| FilesError::Authority { path: side.to_owned(), error })
}

/// Files that are to be written together or not at all.
#[derive(Default)]
struct Plan(Vec<(PathBuf, String, u32)>);

impl Plan {
    fn add(&mut self, directory: &Path, name: &str, cert_pem: String, key_pem: String) {
        self.0.push((directory.join(format!("{name}.crt")), cert_pem, CERT_MODE));
        self.0.push((directory.join(format!("{name}.key")), key_pem, KEY_MODE));
    }

    fn write(self) -> Result<Vec<PathBuf>, FilesError> {
        // A dangling link is in the way too, hence not `exists`.
        let in_the_way = |path: &PathBuf| fs::symlink_metadata(path).is_ok();
        let there: Vec<PathBuf> = self.0.iter().map(|(path, ..)| path.clone()).filter(in_the_way).collect();
        if !there.is_empty() {
            return Err(FilesError::Exists(there));
        }
        let mut written: Vec<PathBuf> = Vec::new();
        for (path, text, mode) in &self.0 {
            if let Err(error) = write_new(path, text, *mode) {
                // Half a PKI is of no use, and would be in the way of the next attempt.
                for path in &written {
                    let _ = fs::remove_file(path);
                }
                return Err(error);
            }
            written.push(path.clone());
        }
        Ok(written)
    }
}

fn write_new(path: &Path, text: &str, mode: u32) -> Result<(), FilesError> {
    if let Some(directory) = path.parent().filter(|directory| !directory.as_os_str().is_empty()) {
        let created = DirBuilder::new().recursive(true).mode(DIRECTORY_MODE).create(directory);
        created.map_err(failed("make the directory", directory))?;
    }
    let file = OpenOptions::new().write(true).create_new(true).mode(mode).open(path);
    let mut file = file.map_err(failed("create", path))?;
    file.write_all(text.as_bytes()).and_then(|()| file.sync_all()).map_err(failed("write", path))
}
