//! The other gateways of the cluster. Each gateway dials every other one and keeps that link up; over it, the side that
//! dialled opens streams ([`mesh`], used by `route`), and the side that was dialled tells what it holds and hands each
//! stream on to a local edge link ([`door`]), never to another gateway. So there are two links between any two gateways,
//! one for either's use, and nothing to agree upon.
//!
//! Where the others are comes from [`discovery`], or from the directory in etcd.

pub(crate) mod discovery;
pub(crate) mod door;
pub(crate) mod mesh;

use rustls::pki_types::ServerName;
use tunnel_core::Target;

/// Where a gateway listens for its peers. May be this very gateway.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Member {
    /// Its address; of a list's entry, a name may stand for many.
    pub address: Target,
    /// The name that its certificate must be for.
    pub server_name: ServerName<'static>,
}
