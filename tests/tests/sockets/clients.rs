//! Clients that others wrote: curl through both doors of the control plane, and the `h2` crate. Behind each edge stands
//! a real HTTPS server.
//!
//! curl speaks HTTP/2 to a proxy only since 8.1 (`--proxy-http2`), which is newer than what many systems have, so HTTP/2
//! is driven by the `h2` crate. No curl connects to a proxy by a Unix socket; a relay in this file stands between.

use std::{
    convert::Infallible,
    fs,
    future::{poll_fn, ready},
    net::{Ipv4Addr, SocketAddr},
    path::{Path, PathBuf},
    process::{Output, Stdio},
    sync::Arc,
    time::Duration,
};

use bytes::Bytes;
use h2::{Reason, RecvStream, SendStream, client::SendRequest};
use http::{Method, Request, Response};
use http_body_util::Full;
use hyper::{body::Incoming, server::conn::http1, service::service_fn};
use hyper_util::rt::TokioIo;
use rcgen::{CertifiedKey, KeyPair, generate_simple_self_signed};
use rustls::{
    ClientConfig, RootCertStore, ServerConfig,
    pki_types::{CertificateDer, PrivateKeyDer, ServerName},
};
use tokio::{
    io::{
        AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, DuplexStream, Interest, copy_bidirectional,
        duplex,
    },
    net::{TcpListener, TcpStream, UnixStream},
    process::Command,
    task::JoinSet,
};
use tokio_rustls::{TlsAcceptor, TlsConnector};
use tokio_util::task::AbortOnDropHandle;
use tunnel_core::tls::{ClientTls, Domain};
use tunnel_tests::{parties, plan::NODES};

use crate::rig::{Rig, assert_reset, ping, within};

/// An HTTPS server on each node, of one certificate for both, that answers with its node's name and what was asked.
struct Https {
    certificate: CertificateDer<'static>,
    pem: String,
    key: KeyPair,
}

impl Https {
    fn new() -> Self {
        let CertifiedKey { cert, signing_key } =
            generate_simple_self_signed(NODES.map(str::to_owned).to_vec()).unwrap();
        Self { certificate: cert.der().clone(), pem: cert.pem(), key: signing_key }
    }

    fn acceptor(&self) -> TlsAcceptor {
        let key = PrivateKeyDer::try_from(self.key.serialize_der()).unwrap();
        let config = ServerConfig::builder()
            .with_no_client_auth()
            .with_single_cert(vec![self.certificate.clone()], key)
            .unwrap();
        TlsAcceptor::from(Arc::new(config))
    }

    fn connector(&self) -> TlsConnector {
        let mut roots = RootCertStore::empty();
        roots.add(self.certificate.clone()).unwrap();
        let config = ClientConfig::builder().with_root_certificates(roots).with_no_client_auth();
        TlsConnector::from(Arc::new(config))
    }

    fn serve_behind(&self, rig: &mut Rig) {
        let acceptor = self.acceptor();
        rig.serve(move |tcp, node| {
            let acceptor = acceptor.clone();
            async move {
                let tls = acceptor.accept(tcp).await.unwrap();
                let answer = service_fn(|request: Request<Incoming>| {
                    let text = format!("{} {} on {node}\n", request.method(), request.uri());
                    ready(Ok::<_, Infallible>(Response::new(Full::new(Bytes::from(text)))))
                });
                // Its error is a client that went away, and what the client saw is checked there.
                let _ = http1::Builder::new().serve_connection(TokioIo::new(tls), answer).await;
            }
        });
    }

    /// The certificate as a file, for `--cacert`.
    fn certificate_file(&self, folder: &Path) -> PathBuf {
        let path = folder.join("https.crt");
        fs::write(&path, &self.pem).unwrap();
        path
    }
}

/// curl by a proxy, which reads no configuration and is not kept from the proxy by the environment.
async fn curl(proxy: &[String], more: &[&str]) -> Output {
    let mut command = Command::new("curl");
    command.args(["-q", "-sSv", "--noproxy", "", "--max-time", "20", "--proxytunnel"]).args(proxy).args(more);
    command.stdin(Stdio::null()).kill_on_drop(true);
    within("curl", command.output()).await.unwrap()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// The door with mutual TLS, as curl's options.
fn tls_proxy(rig: &Rig) -> Vec<String> {
    let files = parties::files(Domain::ControlPlane, "client");
    let path = |path: PathBuf| path.display().to_string();
    let options = [
        ("--proxy", format!("https://{}", rig.ingress)),
        ("--proxy-cert", path(files.cert)),
        ("--proxy-key", path(files.key)),
        ("--proxy-cacert", path(files.ca)),
    ];
    options.into_iter().flat_map(|(option, value)| [option.to_owned(), value]).collect()
}

/// A TCP port that leads to the Unix socket, as curl's options.
async fn unix_proxy(rig: &Rig) -> (AbortOnDropHandle<()>, Vec<String>) {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address: SocketAddr = listener.local_addr().unwrap();
    let door = rig.unix.clone();
    let relay = AbortOnDropHandle::new(tokio::spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((mut tcp, _)) = listener.accept().await {
            let door = door.clone();
            connections.spawn(async move {
                let mut unix = UnixStream::connect(&door).await.unwrap();
                let _ = copy_bidirectional(&mut tcp, &mut unix).await;
            });
        }
    }));
    (relay, vec!["--proxy".to_owned(), format!("http://{address}")])
}

/// Asks both nodes in turn.
async fn assert_right_nodes(rig: &Rig, proxy: &[String], certificate: &str) {
    for round in 0..3 {
        for node in NODES {
            let url = format!("https://{}/round/{round}", rig.target(node));
            let output =
                curl(proxy, &["--cacert", certificate, "-w", "%{http_connect} %{http_code}", &url]).await;
            let said = text(&output.stderr);
            assert!(output.status.success(), "{said}");
            assert_eq!(text(&output.stdout), format!("GET /round/{round} on {node}\n200 200"), "{said}");
        }
    }
}

/// What curl shows of a reply: its head, line by line.
fn reply_lines(stderr: &str) -> Vec<&str> {
    stderr.lines().filter_map(|line| line.strip_prefix("< ")).map(str::trim_end).collect()
}

async fn assert_refusal(rig: &Rig, proxy: &[String]) {
    let url = format!("https://{}/", rig.target("edge-nobody"));
    let output = curl(proxy, &["-w", "%{http_connect}", &url]).await;
    let said = text(&output.stderr);
    let reason = "no such node: edge-nobody is neither a node known to this gateway nor granted to one";
    let expected = [
        format!("HTTP/1.1 404 {reason}"),
        format!("proxy-status: tunnel-server-gateway; error=destination_not_found; details=\"{reason}\""),
        "content-type: text/plain; charset=utf-8".to_owned(),
        format!("content-length: {}", reason.len() + 1),
        "connection: close".to_owned(),
        String::new(),
    ];
    assert_eq!(reply_lines(&said), expected, "{said}");
    assert_eq!((text(&output.stdout).as_str(), output.status.code()), ("404", Some(56)), "{said}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_reaches_https_on_the_right_node_by_tcp_with_a_client_certificate() {
    let (mut rig, https) = (Rig::start().await, Https::new());
    https.serve_behind(&mut rig);
    let certificate = https.certificate_file(rig.folder());
    let proxy = tls_proxy(&rig);
    assert_right_nodes(&rig, &proxy, certificate.to_str().unwrap()).await;
    assert_refusal(&rig, &proxy).await;
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_without_a_client_certificate_gets_nowhere() {
    let rig = Rig::start().await;
    let proxy: Vec<String> = tls_proxy(&rig)
        .chunks(2)
        .filter(|option| !matches!(option[0].as_str(), "--proxy-cert" | "--proxy-key"))
        .flatten()
        .cloned()
        .collect();
    let output =
        curl(&proxy, &["-w", "%{http_connect}", &format!("https://{}/", rig.target("edge-a"))]).await;
    assert_eq!(text(&output.stdout), "000", "{}", text(&output.stderr));
    assert!(!output.status.success());
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn curl_reaches_https_on_the_right_node_by_the_unix_socket() {
    let (mut rig, https) = (Rig::start().await, Https::new());
    https.serve_behind(&mut rig);
    let certificate = https.certificate_file(rig.folder());
    let (_relay, proxy) = unix_proxy(&rig).await;
    assert_right_nodes(&rig, &proxy, certificate.to_str().unwrap()).await;
    assert_refusal(&rig, &proxy).await;
    rig.close().await;
}

/// A connection of the control plane that speaks HTTP/2.
struct H2 {
    requests: SendRequest<Bytes>,
    _connection: AbortOnDropHandle<()>,
}

impl H2 {
    async fn by_tls(rig: &Rig) -> Self {
        let files = parties::files(Domain::ControlPlane, "client");
        let connector = ClientTls::load(Domain::ControlPlane, files).unwrap().connector_offering(&[b"h2"]);
        let tcp = TcpStream::connect(rig.ingress).await.unwrap();
        let name = ServerName::try_from(parties::GATEWAY).unwrap();
        Self::over(within("TLS", connector.connect(name, tcp)).await.unwrap()).await
    }

    async fn by_unix(rig: &Rig) -> Self {
        Self::over(UnixStream::connect(&rig.unix).await.unwrap()).await
    }

    async fn over(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> Self {
        let (requests, connection) = within("HTTP/2", h2::client::handshake(io)).await.unwrap();
        let driver = tokio::spawn(async move { drop(connection.await) });
        Self { requests, _connection: AbortOnDropHandle::new(driver) }
    }

    async fn connect(&self, target: &str) -> (Response<RecvStream>, SendStream<Bytes>) {
        let request = Request::builder().method(Method::CONNECT).uri(target).body(()).unwrap();
        let mut requests = within("a place", self.requests.clone().ready()).await.unwrap();
        let (response, send) = requests.send_request(request, false).unwrap();
        (within("the response", response).await.unwrap(), send)
    }
}

/// A stream as something to speak TLS over. Both halves end as the stream does, or with an error of the pipe.
fn pipe(mut receive: RecvStream, mut send: SendStream<Bytes>, tasks: &mut JoinSet<()>) -> DuplexStream {
    let (ours, theirs) = duplex(64 * 1024);
    let (mut reader, mut writer) = tokio::io::split(theirs);
    tasks.spawn(async move {
        while let Some(Ok(bytes)) = receive.data().await {
            receive.flow_control().release_capacity(bytes.len()).unwrap();
            if writer.write_all(&bytes).await.is_err() {
                return;
            }
        }
        assert!(receive.is_end_stream(), "the stream did not end cleanly");
        let _ = writer.shutdown().await;
    });
    tasks.spawn(async move {
        let mut piece = vec![0; 16 * 1024];
        while let Ok(read @ 1..) = reader.read(&mut piece).await {
            send.send_data(Bytes::copy_from_slice(&piece[..read]), false).unwrap();
        }
        send.send_data(Bytes::new(), true).unwrap();
    });
    ours
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_streams_of_one_http2_connection_reach_https_on_the_right_nodes() {
    let (mut rig, https) = (Rig::start().await, Https::new());
    https.serve_behind(&mut rig);
    for connection in [H2::by_tls(&rig).await, H2::by_unix(&rig).await] {
        let mut streams = Vec::new();
        for number in 0..20 {
            let node = NODES[number % 2];
            let (response, send) = connection.connect(&rig.target(node)).await;
            assert_eq!(response.status(), 200);
            streams.push((number, node, response.into_body(), send));
        }
        rig.relaying(20).await;
        let mut tasks = JoinSet::new();
        for (number, node, receive, send) in streams {
            let name = ServerName::try_from(node).unwrap();
            let stream = pipe(receive, send, &mut tasks);
            let mut tls = within("TLS", https.connector().connect(name, stream)).await.unwrap();
            let ask = format!("GET /{number} HTTP/1.1\r\nHost: {node}\r\nConnection: close\r\n\r\n");
            tls.write_all(ask.as_bytes()).await.unwrap();
            let mut answer = String::new();
            within("the answer", tls.read_to_string(&mut answer)).await.unwrap();
            assert!(answer.ends_with(&format!("\r\n\r\nGET /{number} on {node}\n")), "{answer}");
            tls.shutdown().await.unwrap();
        }
        while let Some(done) = within("the ends", tasks.join_next()).await {
            done.unwrap();
        }
        rig.relaying(0).await;
    }
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_http2_stream_is_reset_and_refused_alone() {
    let rig = Rig::start().await;
    let connection = H2::by_tls(&rig).await;
    let open = async |kubelet: usize| {
        let target = rig.target(NODES[kubelet]);
        let ((response, send), tcp) = tokio::join!(connection.connect(&target), rig.accept(kubelet));
        (response.into_body(), send, tcp)
    };
    let mut tasks = JoinSet::new();
    let (receive, send, mut other_target) = open(1).await;
    let mut other = pipe(receive, send, &mut tasks);
    ping(&mut other, &mut other_target).await;

    let (mut receive, _send, target) = open(0).await;
    target.set_zero_linger().unwrap();
    drop(target);
    let end = within("the reset", receive.data()).await.unwrap().unwrap_err();
    assert_eq!(end.reason(), Some(Reason::CONNECT_ERROR), "{end}");

    let (_receive, mut send, target) = open(0).await;
    send.send_reset(Reason::CANCEL);
    assert_reset("the target of a stream that its client has reset", [target]).await;
    let gone = within("the reset", poll_fn(|cx| send.poll_reset(cx))).await;
    assert!(gone.is_ok_and(|reason| reason == Reason::CANCEL));

    let (refusal, _send) = connection.connect(&rig.target("edge-nobody")).await;
    assert_eq!(refusal.status(), 404);
    let proxy_status = refusal.headers()["proxy-status"].to_str().unwrap();
    assert!(proxy_status.contains("error=destination_not_found"), "{proxy_status}");

    ping(&mut other, &mut other_target).await;
    drop(other);
    drop(other_target);
    while tasks.join_next().await.is_some() {}
    rig.close().await;
}

/// Its target is silent, and neither direction of the stream moves: only the reset itself tells.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_http2_client_that_resets_a_half_closed_stream_ends_it_at_the_target() {
    let rig = Rig::start_alone().await;
    for connection in [H2::by_tls(&rig).await, H2::by_unix(&rig).await] {
        let target = rig.target(NODES[0]);
        let ((_response, mut send), mut target) = tokio::join!(connection.connect(&target), rig.accept(0));
        send.send_data(Bytes::new(), true).unwrap();
        assert_eq!(within("the client's end", target.read(&mut [0; 8])).await.unwrap(), 0);
        tokio::time::sleep(Duration::from_secs(1)).await;
        let begun = tokio::time::Instant::now();
        send.send_reset(Reason::CANCEL);
        within("the failure", target.ready(Interest::ERROR)).await.unwrap();
        assert!(target.take_error().unwrap().is_some());
        rig.relaying(0).await;
        assert!(begun.elapsed() < Duration::from_secs(1), "took {:?}", begun.elapsed());
    }
    rig.close().await;
}
