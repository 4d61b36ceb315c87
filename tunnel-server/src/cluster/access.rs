//! How the cluster's API server is reached: reads the kubeconfig, or what a pod has, and makes clients of it. Called by
//! the watch for each new client, and by `check-config` and at the start, to find what is wrong before it matters.

use std::{
    collections::HashMap,
    env,
    error::Error as _,
    ffi::OsString,
    fmt,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    sync::Arc,
    time::Duration,
};

use futures_util::FutureExt;
use kube::{
    Client, Config,
    client::ClientBuilder,
    config::{AuthInfo, ExecConfig, InClusterError, KubeConfigOptions, Kubeconfig, KubeconfigError},
};
use parking_lot::Mutex;
use tokio::{task::JoinHandle, time::timeout};
use tower::limit::RateLimitLayer;
use tunnel_core::proto::clean_text;

use super::WATCH_SECONDS;

/// Requests of one client in [`REQUEST_PERIOD`], list pages included. Without an error from the API server there is no
/// backoff, and a server that ends each watch at once would be asked again at once, for ever.
const MAX_REQUESTS: u64 = 50;
const REQUEST_PERIOD: Duration = Duration::from_secs(10);

/// How long reading the credentials may take. A credential plugin asks over the network, or even a person.
const LOAD_TIMEOUT: Duration = Duration::from_secs(30);
/// Longest cause of a failure, in characters: what stands before an API server may answer with a whole page.
const MAX_CAUSE: usize = 300;

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
    /// The current context names what is not there.
    #[error("{}: the context {context:?} names the {kind} {name:?}, which the file does not have", path.display())]
    Missing {
        /// The kubeconfig.
        path: PathBuf,
        /// The current context.
        context: String,
        /// `cluster` or `user`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// The user is to be proven in a way of old.
    #[error("{}: the user has an auth-provider, which is not supported: use exec or a token", path.display())]
    AuthProvider {
        /// The kubeconfig.
        path: PathBuf,
    },
    /// The credential plugin is not installed.
    #[error("{}: the credential plugin {command:?} (exec) is no program that can be found: install it, or give its path", path.display())]
    NoPlugin {
        /// The kubeconfig.
        path: PathBuf,
        /// What should be run.
        command: String,
    },
    /// The credentials are no good.
    #[error("{access}: the credentials cannot be used: {}", causes(error))]
    Credentials {
        /// Where they stand.
        access: Access,
        /// Why not.
        error: kube::Error,
    },
    /// They are still not there.
    #[error("{} not answered in {}s", Slow(plugin.as_deref()), LOAD_TIMEOUT.as_secs())]
    TimedOut {
        /// The credential plugin, if there is one.
        plugin: Option<String>,
    },
    /// An end of this process.
    #[error("the credentials were not read: {0}")]
    Interrupted(String),
}

/// Who takes so long.
struct Slow<'a>(Option<&'a str>);

impl fmt::Display for Slow<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(plugin) => write!(f, "the credential plugin {plugin:?} has"),
            None => f.write_str("the files of the credentials have"),
        }
    }
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

    /// All but the client's own task, which needs the runtime.
    fn ready(&self, config: Config) -> Result<Start, AccessError> {
        let bad = |error| AccessError::Credentials { access: self.clone(), error };
        let builder = ClientBuilder::try_from(config).map_err(bad)?;
        let limit = RateLimitLayer::new(MAX_REQUESTS, REQUEST_PERIOD);
        Ok(Box::new(move || builder.with_layer(&limit).build()))
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

/// Makes a client, in the runtime.
type Start = Box<dyn FnOnce() -> Client + Send>;

/// Clients for an API server, one after the other.
#[derive(Debug)]
pub(super) struct Clients {
    access: Access,
    /// What was found at last.
    found: Arc<Mutex<Found>>,
    /// Loads credentials, and may hang. As long as it does, no other is begun: they would pile up.
    loading: Option<JoinHandle<Result<Loaded, AccessError>>>,
}

/// What is worth telling a person.
#[derive(Clone, Debug, Default)]
struct Found {
    server: Option<String>,
    plugin: Option<String>,
}

/// Credentials that are ready for a client.
struct Loaded(Start);

impl Clients {
    pub(super) fn new(access: Access) -> Self {
        Self { access, found: Arc::default(), loading: None }
    }

    /// A client with the credentials that the files hold now: it keeps those of certificates for as long as it lives.
    ///
    /// Blocking work, such as a credential plugin's, is done aside. Cancel-safe: the next call waits on for the same.
    pub(super) async fn next(&mut self) -> Result<Client, AccessError> {
        let (access, found) = (&self.access, &self.found);
        let loading = self.loading.get_or_insert_with(|| {
            let (access, found) = (access.clone(), found.clone());
            tokio::task::spawn_blocking(move || load(&access, &found))
        });
        let Ok(loaded) = timeout(LOAD_TIMEOUT, loading).await else {
            return Err(AccessError::TimedOut { plugin: self.found.lock().plugin.clone() });
        };
        self.loading = None;
        let Loaded(start) = loaded.map_err(|error| AccessError::Interrupted(error.to_string()))??;
        Ok(start())
    }

    /// The API server's URL, as far as it is known.
    pub(super) fn server(&self) -> Option<String> {
        self.found.lock().server.clone()
    }

    pub(super) fn access(&self) -> &Access {
        &self.access
    }
}

impl fmt::Debug for Loaded {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Loaded")
    }
}

fn load(access: &Access, found: &Mutex<Found>) -> Result<Loaded, AccessError> {
    let config = access.load()?;
    let plugin = config.auth_info.exec.as_ref().and_then(|exec| exec.command.clone());
    *found.lock() = Found { server: Some(config.cluster_url.to_string()), plugin };
    access.ready(config).map(Loaded)
}

fn load_file(path: &Path) -> Result<Config, AccessError> {
    let bad = |error| AccessError::Kubeconfig { path: path.to_owned(), error };
    let file = Kubeconfig::read_from(path).map_err(bad)?;
    check_context(&file, path)?;
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

/// Refuses what kube would not support, or would take for something else without a word. No context at all is left to
/// it.
fn check_context(file: &Kubeconfig, path: &Path) -> Result<(), AccessError> {
    let path = path.to_owned();
    let named = file.contexts.iter().find(|context| Some(&context.name) == file.current_context.as_ref());
    let Some((name, context)) = named.and_then(|named| Some((&named.name, named.context.as_ref()?))) else {
        return Ok(());
    };
    let missing = |kind, what: &str| {
        let (path, context, name) = (path.clone(), name.clone(), what.to_owned());
        AccessError::Missing { path, context, kind, name }
    };
    let Some(cluster) = file.clusters.iter().find(|named| named.name == context.cluster) else {
        return Err(missing("cluster", &context.cluster));
    };
    let proxy = cluster.cluster.as_ref().and_then(|cluster| cluster.proxy_url.as_ref());
    if proxy.is_some_and(|proxy| !proxy.is_empty()) {
        return Err(AccessError::Proxy { path });
    }
    // A context may well have no user.
    let Some(user) = context.user.as_ref().filter(|user| !user.is_empty()) else { return Ok(()) };
    let Some(user) = file.auth_infos.iter().find(|named| named.name == *user) else {
        return Err(missing("user", user));
    };
    user.auth_info.as_ref().map_or(Ok(()), |user| check_user(user, path))
}

fn check_user(user: &AuthInfo, path: PathBuf) -> Result<(), AccessError> {
    if user.auth_provider.is_some() {
        return Err(AccessError::AuthProvider { path });
    }
    match &user.exec {
        Some(exec) if !can_be_found(exec) => {
            let command = exec.command.clone().unwrap_or_default();
            Err(AccessError::NoPlugin { path, command })
        }
        _ => Ok(()),
    }
}

/// Whether there is such a program, by its path or on the `PATH` that it would be looked for on.
fn can_be_found(exec: &ExecConfig) -> bool {
    let is_program = |path: &Path| {
        path.metadata().is_ok_and(|file| file.is_file() && file.permissions().mode() & 0o111 != 0)
    };
    let command = exec.command.as_deref().unwrap_or_default();
    if command.is_empty() || command.contains('/') {
        return is_program(Path::new(command));
    }
    let is_path =
        |variable: &&HashMap<String, String>| variable.get("name").is_some_and(|name| name == "PATH");
    let own = exec.env.iter().flatten().rfind(is_path).and_then(|variable| variable.get("value"));
    let own = own.map(OsString::from);
    let folders = own.or_else(|| env::var_os("PATH")).unwrap_or_else(|| "/bin:/usr/bin".into());
    env::split_paths(&folders).any(|folder| is_program(&folder.join(command)))
}

/// What a person needs to know about an error of kube: its kinds are programmers' names, its causes say what happened.
pub(super) fn causes(error: &kube::Error) -> String {
    if let kube::Error::Api(status) = error {
        return shorten(&format!("the API server answers {}: {}", status.code, status.message));
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
    shorten(&if texts.is_empty() { error.to_string() } else { texts.join(": ") })
}

/// As much of a text of others as a line of the log should hold.
pub(super) fn shorten(text: &str) -> String {
    let text = clean_text(text);
    match text.char_indices().nth(MAX_CAUSE) {
        Some((end, _)) => format!("{}...", &text[..end]),
        None => text,
    }
}

#[cfg(test)]
mod tests;
