//! How the cluster's API server is reached: reads the kubeconfig, or what a pod has, and makes clients of it. Called by
//! the watch for each new client, and by `check-config` and at the start, to find what is wrong before it matters.

use std::{error::Error as _, fmt, path::PathBuf, time::Duration};

use futures_util::FutureExt;
use kube::{
    Client, Config,
    client::ClientBuilder,
    config::{InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use tower::limit::RateLimitLayer;

use super::WATCH_SECONDS;

/// Requests of one client in [`REQUEST_PERIOD`], list pages included. Without an error from the API server there is no
/// backoff, and a server that ends each watch at once would be asked again at once, for ever.
const MAX_REQUESTS: u64 = 50;
const REQUEST_PERIOD: Duration = Duration::from_secs(10);

/// Where the way to the API server and the credentials for it are found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Access {
    /// A pod's service account.
    InCluster,
    /// A kubeconfig file, by its current context.
    Kubeconfig(PathBuf),
}

/// Why it cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum AccessError {
    /// This process is no pod's, or has no service account.
    #[error("in-cluster: this process does not run in a pod with a service account: {0}")]
    NotInCluster(#[from] InClusterError),
    /// The file, or one that it names, cannot be read or does not say what it should.
    #[error("{}: {error}", path.display())]
    Kubeconfig {
        /// The kubeconfig.
        path: PathBuf,
        /// Why not.
        error: KubeconfigError,
    },
    /// The API server's address is no URL.
    #[error("{access}: the cluster's server {url:?} is no URL such as https://10.0.0.1:6443")]
    Url {
        /// Where it stands.
        access: Access,
        /// What stands there.
        url: String,
    },
    /// There is a proxy.
    #[error(
        "{}: the cluster has a proxy-url, which is not supported: remove it, the API server is dialled directly",
        path.display()
    )]
    Proxy {
        /// The kubeconfig.
        path: PathBuf,
    },
    /// The credentials are no good.
    #[error("{access}: the credentials cannot be used: {}", causes(error))]
    Credentials {
        /// Where they stand.
        access: Access,
        /// Why not.
        error: kube::Error,
    },
    /// An end of this process.
    #[error("the credentials were not read: {0}")]
    Interrupted(String),
}

impl fmt::Display for Access {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::InCluster => f.write_str("in-cluster"),
            Self::Kubeconfig(path) => path.display().fmt(f),
        }
    }
}

impl Access {
    /// Reads all files that are named and makes sure that they can be used. Nothing is contacted, and no credential
    /// plugin is run.
    pub fn check(&self) -> Result<(), AccessError> {
        let mut config = self.load()?;
        config.auth_info.exec = None;
        config.auth_info.auth_provider = None;
        self.ready(config).map(drop)
    }

    /// A client with the credentials that the files hold now: it keeps those of certificates for as long as it lives.
    ///
    /// Blocking work, such as a credential plugin's, is done aside. Cancel-safe.
    pub(super) async fn client(&self) -> Result<Client, AccessError> {
        let access = self.clone();
        let loading = tokio::task::spawn_blocking(move || access.ready(access.load()?));
        let start = loading.await.map_err(|error| AccessError::Interrupted(error.to_string()))??;
        Ok(start())
    }

    /// All but the client's own task, which needs the runtime.
    fn ready(&self, config: Config) -> Result<impl FnOnce() -> Client + use<>, AccessError> {
        let bad = |error| AccessError::Credentials { access: self.clone(), error };
        let builder = ClientBuilder::try_from(config).map_err(bad)?;
        Ok(move || builder.with_layer(&RateLimitLayer::new(MAX_REQUESTS, REQUEST_PERIOD)).build())
    }

    fn load(&self) -> Result<Config, AccessError> {
        let mut config = match self {
            Self::InCluster => Config::incluster()?,
            Self::Kubeconfig(path) => load_file(path)?,
        };
        let url = &config.cluster_url;
        if !matches!(url.scheme_str(), Some("http" | "https")) || url.host().is_none_or(str::is_empty) {
            return Err(AccessError::Url { access: self.clone(), url: url.to_string() });
        }
        // The one backoff is the watch's: kube's own would heed any Retry-After, and be silent for as long.
        config.default_retry = false;
        // A list whose answer stays away would be waited for for ever. A watch is told to end sooner than this.
        config.read_timeout = Some(Duration::from_secs(u64::from(WATCH_SECONDS) + 10));
        Ok(config)
    }
}

fn load_file(path: &PathBuf) -> Result<Config, AccessError> {
    let bad = |error| AccessError::Kubeconfig { path: path.clone(), error };
    let file = Kubeconfig::read_from(path).map_err(bad)?;
    if has_proxy(&file) {
        return Err(AccessError::Proxy { path: path.clone() });
    }
    let options = KubeConfigOptions::default();
    // Asynchronous by its signature only.
    let loaded = Config::from_custom_kubeconfig(file, &options).now_or_never();
    let mut config = loaded
        .ok_or_else(|| AccessError::Interrupted("loading waits for something".to_owned()))?
        .map_err(bad)?;
    // Proxies for the web that the environment names are not for the way to the API server.
    config.proxy_url = None;
    Ok(config)
}

/// Whether the current context's cluster is to be reached through a proxy.
fn has_proxy(file: &Kubeconfig) -> bool {
    let context = file.contexts.iter().find(|context| Some(&context.name) == file.current_context.as_ref());
    let cluster = context.and_then(|context| context.context.as_ref()).map(|context| &context.cluster);
    let named = file.clusters.iter().find(|named| Some(&named.name) == cluster);
    let proxy = named.and_then(|named| named.cluster.as_ref()?.proxy_url.as_ref());
    proxy.is_some_and(|proxy| !proxy.is_empty())
}

/// What a person needs to know about an error of kube: its kinds are programmers' names, its causes say what happened.
pub(super) fn causes(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return format!("the API server answers {}: {}", status.code, status.message);
    }
    let mut texts: Vec<String> = Vec::new();
    let mut cause = match error {
        kube::Error::Service(inner) => {
            texts.push(inner.to_string());
            inner.source()
        }
        _ => error.source(),
    };
    while let Some(inner) = cause {
        let text = inner.to_string();
        // Many causes repeat those below.
        if texts.last().is_none_or(|last| !last.ends_with(&text)) {
            texts.push(text);
        }
        cause = inner.source();
    }
    if texts.is_empty() { error.to_string() } else { texts.join(": ") }
}
