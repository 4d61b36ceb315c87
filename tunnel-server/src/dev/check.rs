//! `dev --check`: makes the requests that a person would try, through the gateway's own door, and says how each went.

use std::{
    fmt::Display,
    net::{Ipv4Addr, SocketAddr},
    sync::Arc,
};

use bytes::Bytes;
use http::{Method, Request, Response, StatusCode};
use http_body_util::{BodyExt, Full};
use hyper::{body::Incoming, client::conn::http1, ext::ReasonPhrase, upgrade::Upgraded};
use hyper_util::rt::TokioIo;
use ring::digest::{Context, SHA256};
use rustls::{ClientConfig, pki_types::ServerName};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::TcpStream,
};
use tokio_rustls::TlsConnector;
use tunnel_core::tls::ClientTls;

use super::service;

/// How much goes each way with a checksum.
const BULK: u64 = 64 << 20;
/// Requests to each node in the check that none goes astray.
const ROUNDS: usize = 20;

/// What the checks need to know.
pub(super) struct Rig {
    pub(super) ingress: SocketAddr,
    /// The control plane's credentials.
    pub(super) control_plane: ClientTls,
    /// Trusts the services behind the edges.
    pub(super) service: Arc<ClientConfig>,
    pub(super) nodes: [&'static str; 2],
    pub(super) shared_address: Ipv4Addr,
    pub(super) https_port: u16,
    pub(super) echo_port: u16,
}

/// What a check says when it fails.
type Checked = Result<String, String>;

fn text(error: impl Display) -> String {
    error.to_string()
}

/// A reply other than 200, or an answer that is not what it must be.
fn differs(expected: impl Display, got: impl Display) -> String {
    format!("expected {expected}, got {got}")
}

impl Rig {
    /// Makes every check and hands each result to `tell`: its name, and what came of it.
    pub(super) async fn check_all(&self, mut tell: impl FnMut(&str, &Checked)) {
        tell("each request is answered by the node that it names", &self.right_node().await);
        tell("a node that nobody knows is refused with 404", &self.unknown_node().await);
        tell("an address that both nodes hold is refused, naming both", &self.shared_address().await);
        tell("a port that the edge does not allow is refused with 403", &self.forbidden_port().await);
        tell("a port where nothing listens is refused with 502", &self.closed_port().await);
        for node in self.nodes {
            tell(&format!("{node}: 64 MiB come down whole"), &self.download(node).await);
            tell(&format!("{node}: 64 MiB go up whole"), &self.upload(node).await);
            tell(&format!("{node}: a half-close is answered"), &self.half_close(node).await);
        }
    }

    async fn right_node(&self) -> Checked {
        for _ in 0..ROUNDS {
            for node in self.nodes {
                let response = self.request(node, Method::GET, "/", Bytes::new()).await?;
                let body = read_text(response).await?;
                if !body.starts_with(&format!("hello from {node},")) {
                    return Err(differs(node, body.trim_end()));
                }
            }
        }
        Ok(format!("{} of {0}", ROUNDS * self.nodes.len()))
    }

    async fn unknown_node(&self) -> Checked {
        self.refusal(&format!("edge-unknown:{}", self.https_port), StatusCode::NOT_FOUND, &["edge-unknown"])
            .await
    }

    async fn shared_address(&self) -> Checked {
        let target = format!("{}:{}", self.shared_address, self.https_port);
        self.refusal(&target, StatusCode::BAD_GATEWAY, &self.nodes).await
    }

    async fn forbidden_port(&self) -> Checked {
        self.refusal(&format!("{}:22", self.nodes[0]), StatusCode::FORBIDDEN, &["allow"]).await
    }

    async fn closed_port(&self) -> Checked {
        let target = format!("{}:{}", self.nodes[0], super::CLOSED_PORT);
        self.refusal(&target, StatusCode::BAD_GATEWAY, &["refused"]).await
    }

    async fn download(&self, node: &str) -> Checked {
        let mut expected = Context::new(&SHA256);
        service::pieces(BULK).for_each(|piece| expected.update(&piece));
        let path = format!("/download?bytes={BULK}");
        let mut body = self.request(node, Method::GET, &path, Bytes::new()).await?.into_body();
        let (mut received, mut digest) = (0, Context::new(&SHA256));
        while let Some(frame) = body.frame().await {
            if let Some(bytes) = frame.map_err(text)?.data_ref() {
                received += bytes.len() as u64;
                digest.update(bytes);
            }
        }
        same(
            format!("{BULK} bytes, {}", service::hex(expected)),
            format!("{received} bytes, {}", service::hex(digest)),
        )
    }

    async fn upload(&self, node: &str) -> Checked {
        let bytes: Vec<u8> = service::pieces(BULK).flatten().collect();
        let mut expected = Context::new(&SHA256);
        expected.update(&bytes);
        let response = self.request(node, Method::POST, "/upload", bytes.into()).await?;
        same(service::hex(expected), read_text(response).await?.trim_end().to_owned())
    }

    async fn half_close(&self, node: &str) -> Checked {
        let mut stream = self.connect(&format!("{node}:{}", self.echo_port)).await??;
        stream.write_all(b"are you there?").await.map_err(text)?;
        stream.shutdown().await.map_err(text)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.map_err(text)?;
        same("are you there?".to_owned(), answer)
    }

    /// Expects a refusal with this status whose reason phrase has all these words.
    async fn refusal(&self, target: &str, status: StatusCode, words: &[&str]) -> Checked {
        match self.connect(target).await? {
            Ok(_) => Err(differs(status, "200")),
            Err(line)
                if line.starts_with(status.as_str()) && words.iter().all(|word| line.contains(word)) =>
            {
                Ok(line)
            }
            Err(line) => Err(differs(format!("{} with {words:?}", status.as_u16()), line)),
        }
    }

    /// A CONNECT through the gateway: the inner error is a refusal's status line.
    async fn connect(&self, target: &str) -> Result<Result<TokioIo<Upgraded>, String>, String> {
        let tcp = TcpStream::connect(self.ingress).await.map_err(text)?;
        let name = ServerName::from(self.ingress.ip());
        let tls =
            self.control_plane.connector_offering(&[b"http/1.1"]).connect(name, tcp).await.map_err(text)?;
        let request = Request::connect(target).body(Full::<Bytes>::default()).map_err(text)?;
        let response = send(tls, request).await?;
        if response.status() != StatusCode::OK {
            let reason = response.extensions().get::<ReasonPhrase>();
            let reason = reason.map(|reason| String::from_utf8_lossy(reason.as_bytes()).into_owned());
            return Ok(Err(format!("{} {}", response.status().as_u16(), reason.unwrap_or_default())));
        }
        Ok(Ok(TokioIo::new(hyper::upgrade::on(response).await.map_err(text)?)))
    }

    /// An HTTPS request to the service at a node.
    async fn request(
        &self,
        node: &str,
        method: Method,
        path: &str,
        body: Bytes,
    ) -> Result<Response<Incoming>, String> {
        let stream = self.connect(&format!("{node}:{}", self.https_port)).await??;
        let name = ServerName::try_from(node.to_owned()).map_err(text)?;
        let tls = TlsConnector::from(self.service.clone()).connect(name, stream).await.map_err(text)?;
        let request = Request::builder().method(method).uri(path).header("host", node).body(Full::new(body));
        send(tls, request.map_err(text)?).await
    }
}

/// Sends one request on a connection of its own. The connection's task ends with the response's body.
async fn send<S>(stream: S, request: Request<Full<Bytes>>) -> Result<Response<Incoming>, String>
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(text)?;
    tokio::spawn(connection.with_upgrades());
    sender.send_request(request).await.map_err(text)
}

async fn read_text(response: Response<Incoming>) -> Checked {
    let body = response.into_body().collect().await.map_err(text)?.to_bytes();
    Ok(String::from_utf8_lossy(&body).into_owned())
}

fn same(expected: String, got: String) -> Checked {
    if expected == got { Ok(got) } else { Err(differs(expected, got)) }
}
