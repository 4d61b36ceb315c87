//! A thin client of etcd's v3 API: one connection to one member, the calls that the directory makes, each bounded in
//! time, and what it needs to log in. Used by the session in `etcd`, which takes another connection when one fails.

use std::{
    error::Error as _,
    fmt, fs, io,
    path::{Path, PathBuf},
    time::Duration,
};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::uri::PathAndQuery;
use parking_lot::Mutex;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, pem::PemObject};
use tokio::time::timeout;
use tonic::{
    Code, Request, Status, Streaming,
    client::Grpc,
    metadata::{Ascii, MetadataValue},
    transport::{Certificate, Channel, ClientTlsConfig, Endpoint as Transport, Identity},
};
use tonic_prost::ProstCodec;
use tunnel_core::proto::clean_text;

use super::{EtcdConfig, EtcdError};

/// etcd's messages, as far as they are needed.
pub(super) mod wire {
    #![allow(missing_docs, unreachable_pub, clippy::all, clippy::pedantic)]
    include!(concat!(env!("OUT_DIR"), "/etcdserverpb.rs"));
}

use wire::{
    AuthenticateRequest, AuthenticateResponse, KeyValue, LeaseGrantRequest, LeaseGrantResponse,
    LeaseKeepAliveRequest, LeaseKeepAliveResponse, LeaseRevokeRequest, LeaseRevokeResponse,
    LeaseTimeToLiveRequest, LeaseTimeToLiveResponse, RangeRequest, RangeResponse, RequestOp, TxnRequest,
    TxnResponse, WatchCreateRequest, WatchRequest, WatchResponse, watch_request,
};

/// Largest answer that is read. A watch that was away for long may get a thousand transactions in one.
const MAX_ANSWER: usize = 64 * 1024 * 1024;
/// Keys that one answer should hold.
const PAGE: i64 = 2000;
/// Longest cause of a failure, in characters.
const MAX_CAUSE: usize = 300;

/// A call that failed: what a person needs to know.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub(super) struct Failure(String);

impl Failure {
    pub(super) fn new(text: &str) -> Self {
        Self(clean_text(text).chars().take(MAX_CAUSE).collect())
    }

    /// The causes of an error, since tonic's own text says no more than that there is one.
    fn causes(error: &dyn std::error::Error) -> Self {
        let mut texts: Vec<String> = Vec::new();
        let mut cause = Some(error);
        while let Some(error) = cause {
            let text = error.to_string();
            // Many causes repeat those below.
            if texts.last().is_none_or(|last| !last.ends_with(&text)) {
                texts.push(text);
            }
            cause = error.source();
        }
        Self::new(&texts.join(": "))
    }

    pub(super) fn answered(status: &Status) -> Self {
        match status.source() {
            Some(cause) => Self::causes(cause),
            None => Self::new(&format!("etcd answers: {}", status.message())),
        }
    }
}

/// A connection to one member of etcd.
pub(super) struct Client {
    grpc: Grpc<Channel>,
    timeout: Duration,
    user: Option<(String, PathBuf)>,
    /// Proves who logged in.
    token: Mutex<Option<MetadataValue<Ascii>>>,
}

impl Client {
    /// Connects to the endpoint and logs in. Certificates and the password are read from their files each time.
    pub(super) async fn connect(config: &EtcdConfig, endpoint: &Endpoint) -> Result<Self, Failure> {
        let transport = config.transport(endpoint).map_err(|error| Failure::new(&error.to_string()))?;
        let connect = timeout(config.timeout, transport.connect());
        let channel = match connect.await {
            Ok(connected) => connected.map_err(|error| Failure::causes(&error))?,
            Err(_) => return Err(late(config.timeout)),
        };
        let grpc = Grpc::new(channel).max_decoding_message_size(MAX_ANSWER);
        let client =
            Self { grpc, timeout: config.timeout, user: config.user.clone(), token: Mutex::default() };
        client.log_in().await?;
        Ok(client)
    }

    /// All keys that begin with `prefix`, at one revision, which is given too. `each` gets them page by page.
    pub(super) async fn range(&self, prefix: &str, mut each: impl FnMut(KeyValue)) -> Result<i64, Failure> {
        let mut request = RangeRequest {
            key: Bytes::copy_from_slice(prefix.as_bytes()),
            range_end: end_of(prefix),
            limit: PAGE,
            revision: 0,
        };
        loop {
            let page: RangeResponse = self.call("/etcdserverpb.KV/Range", request.clone()).await?;
            if request.revision == 0 {
                request.revision = page.header.map_or(0, |header| header.revision);
            }
            let last = page.kvs.last().map(|pair| pair.key.clone());
            page.kvs.into_iter().for_each(&mut each);
            match last.filter(|_| page.more) {
                // The key that comes next in order.
                Some(last) => request.key = [&last[..], &[0]].concat().into(),
                None => return Ok(request.revision),
            }
        }
    }

    /// The value of one key.
    pub(super) async fn get(&self, key: &str) -> Result<Option<KeyValue>, Failure> {
        let key = Bytes::copy_from_slice(key.as_bytes());
        let request = RangeRequest { key, limit: 1, ..RangeRequest::default() };
        let answer: RangeResponse = self.call("/etcdserverpb.KV/Range", request).await?;
        Ok(answer.kvs.into_iter().next())
    }

    /// Does all of these at once, or nothing. The revision that they made.
    pub(super) async fn write(&self, all: Vec<RequestOp>) -> Result<i64, Failure> {
        let answer: TxnResponse = self.call("/etcdserverpb.KV/Txn", TxnRequest { success: all }).await?;
        Ok(answer.header.map_or(0, |header| header.revision))
    }

    /// What happens to keys that begin with `prefix`, from this revision on.
    pub(super) async fn watch(&self, prefix: &str, from: i64) -> Result<Streaming<WatchResponse>, Failure> {
        let create = WatchCreateRequest {
            key: Bytes::copy_from_slice(prefix.as_bytes()),
            range_end: end_of(prefix),
            start_revision: from,
            progress_notify: true,
        };
        let request = WatchRequest { request: Some(watch_request::Request::Create(create)) };
        // It goes on for as long as this side's stream does.
        self.streaming("/etcdserverpb.Watch/Watch", stream::iter([request]).chain(stream::pending())).await
    }

    /// A new lease of at least this long: its id, and how long it is.
    pub(super) async fn grant(&self, lease: Duration) -> Result<(i64, Duration), Failure> {
        let ttl = i64::try_from(lease.as_secs().max(1)).unwrap_or(i64::MAX);
        let answer: LeaseGrantResponse =
            self.call("/etcdserverpb.Lease/LeaseGrant", LeaseGrantRequest { ttl }).await?;
        Ok((answer.id, seconds(answer.ttl)))
    }

    /// Renews a lease. How long it is from now on; zero if it is over.
    pub(super) async fn renew(&self, id: i64) -> Result<Duration, Failure> {
        let request = stream::iter([LeaseKeepAliveRequest { id }]);
        let answers = self.streaming("/etcdserverpb.Lease/LeaseKeepAlive", request);
        let mut answers: Streaming<LeaseKeepAliveResponse> = answers.await?;
        match timeout(self.timeout, answers.message()).await {
            Ok(Ok(Some(answer))) => Ok(seconds(answer.ttl)),
            Ok(Ok(None)) => Err(Failure::new("etcd does not answer when asked to renew the lease")),
            Ok(Err(status)) => Err(Failure::answered(&status)),
            Err(_) => Err(late(self.timeout)),
        }
    }

    /// How long a lease has still to run; zero if it is over.
    pub(super) async fn time_to_live(&self, id: i64) -> Result<Duration, Failure> {
        let answer: LeaseTimeToLiveResponse =
            self.call("/etcdserverpb.Lease/LeaseTimeToLive", LeaseTimeToLiveRequest { id }).await?;
        Ok(seconds(answer.ttl))
    }

    /// Ends a lease, and with it all its keys.
    pub(super) async fn revoke(&self, id: i64) -> Result<(), Failure> {
        let revoked = self.call("/etcdserverpb.Lease/LeaseRevoke", LeaseRevokeRequest { id });
        revoked.await.map(|_: LeaseRevokeResponse| ())
    }

    async fn log_in(&self) -> Result<(), Failure> {
        let Some((name, file)) = &self.user else { return Ok(()) };
        let password = password(file).map_err(|error| Failure::new(&error.to_string()))?;
        *self.token.lock() = None;
        let request = AuthenticateRequest { name: name.clone(), password };
        let answer: AuthenticateResponse =
            self.once("/etcdserverpb.Auth/Authenticate", request).await.map_err(|status| {
                Failure::new(&format!("cannot log in as {name:?}: {}", Failure::answered(&status)))
            })?;
        let token = MetadataValue::try_from(answer.token);
        let mut token = token.map_err(|_| Failure::new("etcd's answer to logging in makes no sense"))?;
        token.set_sensitive(true);
        *self.token.lock() = Some(token);
        Ok(())
    }

    /// Calls; logs in again if the token does not count any more, as it does after a time, after a change to users, and
    /// after a member's restart.
    pub(super) async fn call<Q, A>(&self, method: &'static str, request: Q) -> Result<A, Failure>
    where
        Q: prost::Message + Clone + 'static,
        A: prost::Message + Default + 'static,
    {
        let answer = match self.once(method, request.clone()).await {
            Err(status) if self.user.is_some() && is_old_token(&status) => {
                self.log_in().await?;
                self.once(method, request).await
            }
            answer => answer,
        };
        answer.map_err(|status| Failure::answered(&status))
    }

    async fn once<Q, A>(&self, method: &'static str, request: Q) -> Result<A, Status>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut grpc = self.grpc.clone();
        let call = async {
            ready(&mut grpc).await?;
            let path = PathAndQuery::from_static(method);
            grpc.unary(self.request(request), path, ProstCodec::<Q, A>::default()).await
        };
        match timeout(self.timeout, call).await {
            Ok(answer) => answer.map(tonic::Response::into_inner),
            Err(_) => Err(Status::deadline_exceeded(late(self.timeout).to_string())),
        }
    }

    async fn streaming<Q, A>(
        &self,
        method: &'static str,
        requests: impl stream::Stream<Item = Q> + Send + 'static,
    ) -> Result<Streaming<A>, Failure>
    where
        Q: prost::Message + 'static,
        A: prost::Message + Default + 'static,
    {
        let mut grpc = self.grpc.clone();
        let mut request = self.request(requests);
        // A member that is cut off from the others ends it, rather than being silent.
        request.metadata_mut().insert("hasleader", MetadataValue::from_static("true"));
        let call = async {
            ready(&mut grpc).await?;
            let path = PathAndQuery::from_static(method);
            grpc.streaming(request, path, ProstCodec::<Q, A>::default()).await
        };
        match timeout(self.timeout, call).await {
            Ok(answer) => {
                answer.map(tonic::Response::into_inner).map_err(|status| Failure::answered(&status))
            }
            Err(_) => Err(late(self.timeout)),
        }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        if let Some(token) = &*self.token.lock() {
            request.metadata_mut().insert("token", token.clone());
        }
        request
    }
}

impl fmt::Debug for Client {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Client")
    }
}

async fn ready(grpc: &mut Grpc<Channel>) -> Result<(), Status> {
    grpc.ready().await.map_err(|error| Status::from_error(Box::new(error)))
}

fn late(after: Duration) -> Failure {
    Failure::new(&format!("no answer in {}", humantime::format_duration(after)))
}

fn seconds(ttl: i64) -> Duration {
    Duration::from_secs(u64::try_from(ttl).unwrap_or(0))
}

/// etcd has no code of its own for the second of these.
fn is_old_token(status: &Status) -> bool {
    status.code() == Code::Unauthenticated || status.message().contains("auth: revision in header is old")
}

/// The first key behind all those that begin with `prefix`.
fn end_of(prefix: &str) -> Bytes {
    let mut end = prefix.as_bytes().to_vec();
    // No byte of UTF-8 is 255, so that there is always a next one.
    if let Some(last) = end.last_mut() {
        *last += 1;
    }
    end.into()
}

/// Where a member of etcd listens for clients: `http://` or `https://`, host and port.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Endpoint(http::Uri);

impl std::str::FromStr for Endpoint {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let uri = text.parse::<http::Uri>().ok().filter(|uri| {
            matches!(uri.scheme_str(), Some("http" | "https"))
                && uri.port_u16().is_some_and(|port| port != 0)
                && uri.path_and_query().is_none_or(|path| path == "/")
                // A password does not belong here.
                && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
        });
        // What it is instead may hold a password.
        uri.map(Self).ok_or_else(|| "is no address of etcd such as https://etcd-0.example:2379".to_owned())
    }
}

impl fmt::Display for Endpoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{}://{}",
            self.0.scheme_str().unwrap_or_default(),
            self.0.authority().map_or("", |host| host.as_str())
        )
    }
}

impl EtcdConfig {
    /// Reads all files that are named. Nothing is contacted.
    pub(crate) fn check_files(&self) -> Result<(), EtcdError> {
        if let Some((_, file)) = &self.user {
            password(file)?;
        }
        self.endpoints.iter().try_for_each(|endpoint| self.transport(endpoint).map(drop))
    }

    /// All files that are named.
    pub(crate) fn files(&self) -> impl Iterator<Item = &PathBuf> {
        let identity =
            self.tls.iter().filter_map(|tls| tls.identity.as_ref()).flat_map(|(cert, key)| [cert, key]);
        self.tls.iter().map(|tls| &tls.ca).chain(identity).chain(self.user.iter().map(|(_, file)| file))
    }

    fn transport(&self, endpoint: &Endpoint) -> Result<Transport, EtcdError> {
        let transport = Transport::from(endpoint.0.clone()).connect_timeout(self.timeout).tcp_nodelay(true);
        match (&self.tls, endpoint.0.scheme_str() == Some("https")) {
            (None, false) => Ok(transport),
            (Some(tls), true) => {
                let unusable = |error| EtcdError::Tls { text: Failure::causes(&error).to_string() };
                transport.tls_config(tls.load()?).map_err(unusable)
            }
            (None, true) => Err(EtcdError::NoCa { endpoint: endpoint.clone() }),
            (Some(_), false) => Err(EtcdError::Plain { endpoint: endpoint.clone() }),
        }
    }
}

/// TLS to etcd: which CA its members' certificates come from, and this gateway's own certificate, if etcd wants one.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EtcdTls {
    /// PEM file.
    pub ca: PathBuf,
    /// PEM files of the certificate and of its private key.
    pub identity: Option<(PathBuf, PathBuf)>,
}

impl EtcdTls {
    fn load(&self) -> Result<ClientTlsConfig, EtcdError> {
        let ca = read(&self.ca)?;
        // tonic passes over what it cannot read.
        holds(&self.ca, CertificateDer::from_pem_slice(&ca).is_ok(), "certificate")?;
        let config = ClientTlsConfig::new().ca_certificate(Certificate::from_pem(ca));
        let Some((cert, key)) = &self.identity else { return Ok(config) };
        let (cert_pem, key_pem) = (read(cert)?, read(key)?);
        holds(cert, CertificateDer::from_pem_slice(&cert_pem).is_ok(), "certificate")?;
        holds(key, PrivateKeyDer::from_pem_slice(&key_pem).is_ok(), "private key")?;
        Ok(config.identity(Identity::from_pem(cert_pem, key_pem)))
    }
}

fn holds(path: &Path, good: bool, what: &'static str) -> Result<(), EtcdError> {
    if good { Ok(()) } else { Err(EtcdError::Empty { path: path.to_owned(), what }) }
}

fn read(path: &Path) -> Result<Vec<u8>, EtcdError> {
    fs::read(path).map_err(|error| EtcdError::Read { path: path.to_owned(), error })
}

/// The file's text, without the line's end.
fn password(path: &Path) -> Result<String, EtcdError> {
    let not_text = |_| io::Error::new(io::ErrorKind::InvalidData, "it is not UTF-8");
    let text = String::from_utf8(read(path)?).map_err(not_text);
    let text = text.map_err(|error| EtcdError::Read { path: path.to_owned(), error })?;
    let password = text.trim_end_matches(['\r', '\n']);
    holds(path, !password.is_empty(), "password")?;
    Ok(password.to_owned())
}
