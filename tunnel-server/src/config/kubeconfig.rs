//! The setting that says how the cluster's API server is reached.

use std::path::PathBuf;

use tunnel_edge::daemon::settings::{Parse, not_expected};

use crate::cluster::Access;

/// How to reach the API server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kubeconfig {
    /// Not at all.
    None,
    /// As a pod does.
    InCluster,
    /// As this file says.
    File(PathBuf),
}

impl Kubeconfig {
    pub(super) fn into_access(self) -> Option<Access> {
        match self {
            Self::None => None,
            Self::InCluster => Some(Access::InCluster),
            Self::File(path) => Some(Access::Kubeconfig(path)),
        }
    }
}

impl Parse for Kubeconfig {
    const PLACEHOLDER: &'static str = "none|in-cluster|PATH";
    const EXPECTED: &'static str = "none, in-cluster or the path of a kubeconfig";

    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "none" => Ok(Self::None),
            "in-cluster" => Ok(Self::InCluster),
            _ if text.trim().is_empty() => Err(not_expected::<Self>(text)),
            path => Ok(Self::File(path.into())),
        }
    }
}
