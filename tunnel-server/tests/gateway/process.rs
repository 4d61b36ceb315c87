//! The real process: what it does while its log cannot be written and while its credentials are not there, what it tells
//! the service manager, and how it ends.

use std::{
    fs::{self, File},
    io::{self, Read},
    net::SocketAddr,
    os::unix::net::UnixDatagram,
    path::{Path, PathBuf},
    process::{Command, ExitStatus, Stdio},
    time::Instant,
};

use rcgen::{CertificateParams, DnType, ExtendedKeyUsagePurpose, Issuer, KeyPair};
use rustls::pki_types::ServerName;
use tempfile::TempDir;
use tokio::{process::Child, time::sleep};
use tunnel_core::tls::{ClientTls, Files};

use super::*;

/// How long the plugin hangs. It ends in the end, since nobody else would end it.
const HANGING: Duration = Duration::from_secs(30);
/// An end that waits for nothing.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Without its ports.
const CONFIG: &str = "gateway_id: gw-1\n\
    edges: {listen: 'EDGES', cert: pki/edge/gateway.crt, key: pki/edge/gateway.key, client_ca: pki/edge/ca.crt}\n\
    ingress: {listen: 'INGRESS', unix: door.sock, cert: pki/control-plane/gateway.crt, \
    key: pki/control-plane/gateway.key, client_ca: pki/control-plane/ca.crt}\n\
    admin: {listen: 'ADMIN'}\n";

fn tunnel_server(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_tunnel-server"));
    command.current_dir(folder).env_clear().env("PATH", "/usr/bin:/bin").stdout(Stdio::null());
    command
}

fn make_pki(folder: &Path) {
    assert!(tunnel_server(folder).args(["pki", "init", "pki"]).status().unwrap().success());
}

/// Different from one another; nobody else takes them meanwhile, since the system gives each only once for a while.
fn free_addresses() -> [SocketAddr; 3] {
    let bound = [(); 3].map(|()| std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    bound.map(|listener| listener.local_addr().unwrap())
}

/// A gateway in a process of its own.
struct Process {
    folder: TempDir,
    child: Child,
    edges: SocketAddr,
    ingress: SocketAddr,
    admin: SocketAddr,
}

impl Process {
    /// Starts one in a folder in which `prepare` has done something.
    fn start(stderr: impl Into<Stdio>, settings: &str, prepare: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        prepare(folder.path());
        let [edges, ingress, admin] = free_addresses();
        let config = CONFIG.replace("EDGES", &edges.to_string()).replace("INGRESS", &ingress.to_string());
        let config = config.replace("ADMIN", &admin.to_string()) + settings;
        fs::write(folder.path().join("gateway.yaml"), config).unwrap();
        let mut command = tunnel_server(folder.path());
        command.args(["run", "-c", "gateway.yaml"]).stderr(stderr);
        if let Some(socket) = Some(folder.path().join("notify")).filter(|socket| socket.exists()) {
            command.env("NOTIFY_SOCKET", socket);
        }
        let child = tokio::process::Command::from(command).kill_on_drop(true).spawn().unwrap();
        Self { folder, child, edges, ingress, admin }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The answer to one GET, or `None` if there is nobody to answer.
    async fn get(&self, path: &str) -> Option<String> {
        let asking = async {
            let mut conn = TcpStream::connect(self.admin).await?;
            let head = format!("GET {path} HTTP/1.1\r\nhost: gateway\r\nconnection: close\r\n\r\n");
            conn.write_all(head.as_bytes()).await?;
            let mut answer = String::new();
            conn.read_to_string(&mut answer).await?;
            io::Result::Ok(answer)
        };
        timeout(PATIENCE, asking).await.expect("the admin endpoint hangs").ok()
    }

    /// Waits for an answer in which these words are.
    async fn answers(&self, path: &str, words: &str) {
        let mut last = None;
        let asking = async {
            while !last.as_ref().is_some_and(|answer: &String| answer.contains(words)) {
                sleep(Duration::from_millis(20)).await;
                last = self.get(path).await;
            }
        };
        let answered = timeout(PATIENCE, asking).await;
        assert!(answered.is_ok(), "no {words:?} in {last:?}");
    }

    /// Waits until more lines than so many were dropped, and gives how many.
    async fn dropped_more_than(&self, lines: u64) -> u64 {
        let name = "tunnel_server_log_lines_dropped_total ";
        let looking = async {
            loop {
                let metrics = self.get("/metrics").await.unwrap();
                let value = metrics.lines().find_map(|line| line.strip_prefix(name)).unwrap();
                match value.parse().unwrap() {
                    more if more > lines => return more,
                    _ => sleep(Duration::from_millis(10)).await,
                }
            }
        };
        timeout(PATIENCE, looking).await.expect("no line is counted")
    }

    fn send(&self, signal: &str) {
        let id = self.child.id().unwrap().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    async fn ended(mut self, within: Duration) -> ExitStatus {
        let since = Instant::now();
        let ended = timeout(within, self.child.wait()).await;
        ended.unwrap_or_else(|_| panic!("still there after {:?}", since.elapsed())).unwrap()
    }
}

/// A pipe whose writing end is a log.
fn pipe() -> (io::PipeReader, io::PipeWriter) {
    io::pipe().unwrap()
}

/// A pipe that nobody reads any more.
fn closed_pipe() -> io::PipeWriter {
    let (_, writer) = pipe();
    writer
}

#[tokio::test]
async fn a_log_that_nobody_takes_stops_nothing_and_what_is_lost_is_counted() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    for stderr in [closed_pipe().into(), Stdio::from(full)] {
        let process = Process::start(stderr, "log: {level: debug}\n", make_pki);
        process.answers("/readyz", "\r\n\r\nok\n").await;
        let before = process.dropped_more_than(0).await;
        // It takes connections, which have something to log.
        let mut conn = UnixStream::connect(process.path("door.sock")).await.unwrap();
        conn.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        conn.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 405 "), "{answer}");
        process.dropped_more_than(before).await;
        process.send("-TERM");
        assert!(process.ended(AT_ONCE).await.success());
    }
}

#[tokio::test]
async fn a_reader_of_the_log_that_stalls_stops_nothing_and_the_log_goes_on_after_it() {
    let (mut reader, writer) = pipe();
    let process = Process::start(writer, "log: {level: debug, format: json}\n", make_pki);
    process.answers("/readyz", "\r\n\r\nok\n").await;
    // Several times what the pipe takes: each is a line at this level.
    for _ in 0..2000 {
        drop(TcpStream::connect(process.edges).await.unwrap());
    }
    process.answers("/metrics", "handshakes_failed_total{domain=\"edge\",cause=\"closed\"} 2000\n").await;
    process.send("-TERM");
    let reading = tokio::task::spawn_blocking(move || {
        let mut text = String::new();
        reader.read_to_string(&mut text).unwrap();
        text
    });
    assert!(process.ended(AT_ONCE).await.success());
    let text = reading.await.unwrap();
    assert!(text.len() > 4 * 64 * 1024, "{}", text.len());
    for line in text.lines() {
        let line: serde_json::Value = serde_json::from_str(line).unwrap();
        assert!(line["timestamp"].is_string() && line["message"].is_string(), "{line}");
    }
    assert!(text.contains("\"drained\""), "its last words are missing");
}

#[tokio::test]
async fn a_stalled_reader_does_not_keep_the_process() {
    let (reader, writer) = pipe();
    // Full from the start.
    let mut filler = writer.try_clone().unwrap();
    let size = 64 * 1024;
    tokio::task::spawn_blocking(move || io::Write::write_all(&mut filler, &vec![b'\n'; size]).unwrap())
        .await
        .unwrap();
    let process = Process::start(writer, "", make_pki);
    process.answers("/readyz", "\r\n\r\nok\n").await;
    process.send("-TERM");
    assert!(process.ended(AT_ONCE).await.success());
    drop(reader);
}

#[tokio::test]
async fn it_waits_for_credentials_that_do_not_exist_yet_and_says_so() {
    let manager = |folder: &Path| {
        let socket = UnixDatagram::bind(folder.join("notify")).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        socket
    };
    let mut socket = None;
    let (mut log, writer) = pipe();
    let process = Process::start(writer, "", |folder| socket = Some(manager(folder)));
    let socket = socket.unwrap();
    let notice = || {
        let mut notice = [0; 4096];
        let length = socket.recv(&mut notice).unwrap();
        String::from_utf8(notice[..length].to_vec()).unwrap()
    };
    let waiting = "waiting for pki/edge/gateway.crt, which does not exist yet";
    process.answers("/healthz", "200 OK").await;
    process.answers("/readyz", waiting).await;
    assert!(process.get("/readyz").await.unwrap().starts_with("HTTP/1.1 503 "));
    process.answers("/metrics", "tunnel_server_links 0").await;
    let until_told = |words: &str| {
        let mut notices = Vec::new();
        while !notices.last().is_some_and(|notice: &String| notice.contains(words)) {
            notices.push(notice());
        }
        notices
    };
    assert!(until_told(waiting).last().unwrap().starts_with("READY=1\n"));

    // One file after the other, and the first of them in two parts.
    make_pki(process.folder.path());
    let cert = fs::read(process.path("pki/edge/gateway.crt")).unwrap();
    let half_written = Process::start(Stdio::null(), "", |folder| {
        make_pki(folder);
        fs::remove_file(folder.join("pki/edge/gateway.crt")).unwrap();
    });
    half_written.answers("/readyz", waiting).await;
    fs::write(half_written.path("pki/edge/gateway.crt"), &cert[..cert.len() / 2]).unwrap();
    half_written.answers("/readyz", "waiting for credentials that can be used: edges: ").await;
    // Another authority's, which does not belong to the key.
    fs::write(half_written.path("pki/edge/gateway.crt"), &cert).unwrap();
    half_written.answers("/readyz", "the key does not belong to the certificate").await;
    half_written.send("-TERM");
    assert!(half_written.ended(AT_ONCE).await.success());

    process.answers("/readyz", "\r\n\r\nok\n").await;
    until_told("STATUS=working");
    process.send("-TERM");
    let last = until_told("STOPPING=1\n");
    assert!(last.last().unwrap().contains("\nEXTEND_TIMEOUT_USEC=45000000\nSTATUS=draining"), "{last:?}");
    assert!(process.ended(AT_ONCE).await.success());
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    assert_eq!(text.matches(waiting).count(), 1, "{text}");
    assert!(text.contains("tunnel-server starts"), "{text}");
}

#[tokio::test]
async fn credentials_that_are_no_good_are_an_error_at_once() {
    let (mut log, writer) = pipe();
    let process = Process::start(writer, "", |folder| {
        make_pki(folder);
        fs::write(folder.join("pki/edge/gateway.key"), "").unwrap();
    });
    assert_eq!(process.ended(PATIENCE).await.code(), Some(1));
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    assert!(
        text.contains("ERROR") && text.contains("edges: pki/edge/gateway.key holds no private key"),
        "{text}"
    );
}

#[tokio::test]
async fn a_hangup_is_ignored_and_said() {
    let (mut log, writer) = pipe();
    let process = Process::start(writer, "", make_pki);
    process.answers("/readyz", "\r\n\r\nok\n").await;
    process.send("-HUP");
    // Two of them, as one that does not end it may only be slow to.
    process.send("-HUP");
    sleep(Duration::from_millis(100)).await;
    process.answers("/readyz", "\r\n\r\nok\n").await;
    process.send("-TERM");
    assert!(process.ended(AT_ONCE).await.success());
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    assert!(text.contains("WARN") && text.contains("SIGHUP is ignored"), "{text}");
}

#[tokio::test]
async fn a_credential_plugin_that_hangs_does_not_keep_the_process() {
    let hang = format!("echo run > runs; exec sleep {}", HANGING.as_secs());
    let kubeconfig = format!(
        "current-context: main\n\
         contexts: [{{name: main, context: {{cluster: c, user: u}}}}]\n\
         clusters: [{{name: c, cluster: {{server: 'http://192.0.2.1'}}}}]\n\
         users: [{{name: u, user: {{exec: {{apiVersion: client.authentication.k8s.io/v1, command: sh, \
         args: [-c, {hang:?}]}}}}}}]\n"
    );
    let process = Process::start(Stdio::null(), "kubernetes: {kubeconfig: kubeconfig}\n", |folder| {
        make_pki(folder);
        fs::write(folder.join("kubeconfig"), kubeconfig).unwrap();
    });
    let runs = process.path("runs");
    let looking = async {
        while !runs.exists() {
            sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(PATIENCE, looking).await.unwrap();
    process.send("-TERM");
    assert!(process.ended(HANGING / 2).await.success());
}

/// A gateway that needs nothing but its own files, and answers probes.
fn write_small(folder: &Path) {
    make_pki(folder);
    let config = "gateway_id: gw-1\n\
         edges: {listen: '127.0.0.1:0', cert: pki/edge/gateway.crt, key: pki/edge/gateway.key, \
         client_ca: pki/edge/ca.crt, max_links: 1000}\n\
         ingress: {listen: none, unix: door.sock}\n\
         admin: {listen: '127.0.0.1:0'}\n";
    fs::write(folder.join("gateway.yaml"), config).unwrap();
}

#[tokio::test]
async fn the_limit_of_open_files_is_raised_and_its_shortage_is_named() {
    for (limits, raised, short) in [("-Sn 100; ulimit -Hn 9000", "9000", false), ("-n 600", "600", true)] {
        let folder = tempfile::tempdir().unwrap();
        write_small(folder.path());
        let program = env!("CARGO_BIN_EXE_tunnel-server");
        let mut gateway = tokio::process::Command::new("sh");
        gateway.current_dir(folder.path()).kill_on_drop(true);
        gateway.args(["-c", &format!("ulimit {limits}; exec {program} run -c gateway.yaml 2> log")]);
        let gateway = gateway.spawn().unwrap();
        let log = || fs::read_to_string(folder.path().join("log")).unwrap_or_default();
        let starting = async {
            while !log().contains("tunnel-server starts") {
                sleep(Duration::from_millis(10)).await;
            }
        };
        timeout(PATIENCE, starting).await.unwrap();
        let all = fs::read_to_string(format!("/proc/{}/limits", gateway.id().unwrap())).unwrap();
        let files = all.lines().find(|line| line.starts_with("Max open files")).unwrap();
        assert_eq!(files.split_whitespace().nth(3).unwrap(), raised);
        let log = log();
        let words = "(RLIMIT_NOFILE) is 600, but the settings allow for 5539: raise it to that";
        assert_eq!(log.contains(words), short, "{log}");
        assert_eq!(
            log.contains("1314 for edges.max_links, 4096 for ingress.max_connections"),
            short,
            "{log}"
        );
    }
}

/// A client's certificate of this gateway's control plane, with this name.
fn client_named(folder: &Path, name: &str) -> ClientTls {
    let pki = folder.join("pki/control-plane");
    let read = |name: &str| fs::read_to_string(pki.join(name)).unwrap();
    let ca_key = KeyPair::from_pem(&read("ca.key")).unwrap();
    let issuer = Issuer::from_ca_cert_pem(&read("ca.crt"), ca_key).unwrap();
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, name);
    params.extended_key_usages.push(ExtendedKeyUsagePurpose::ClientAuth);
    let key = KeyPair::generate().unwrap();
    let files = Files { cert: folder.join("crt"), key: folder.join("key"), ca: pki.join("ca.crt") };
    fs::write(&files.cert, params.signed_by(&key, &issuer).unwrap().pem()).unwrap();
    fs::write(&files.key, key.serialize_pem()).unwrap();
    ClientTls::load(Domain::ControlPlane, files).unwrap()
}

#[tokio::test]
async fn no_client_forges_a_line_of_the_log() {
    const FORGED: &str = "\n2026-01-01T00:00:00Z  INFO all is well\r\u{1b}[2J\u{9b}1m\u{202e}";
    for format in ["text", "json"] {
        let (mut log, writer) = pipe();
        let process = Process::start(writer, &format!("log: {{format: {format}}}\n"), make_pki);
        process.answers("/readyz", "\r\n\r\nok\n").await;
        let client = client_named(process.folder.path(), &format!("kube{FORGED}"));
        let tcp = TcpStream::connect(process.ingress).await.unwrap();
        let name = ServerName::try_from("localhost").unwrap();
        let mut conn = client.connector_offering(&[b"http/1.1"]).connect(name, tcp).await.unwrap();
        conn.write_all(b"CONNECT nobody:1 HTTP/1.1\r\n\r\n").await.unwrap();
        let mut answer = String::new();
        let _ = conn.read_to_string(&mut answer).await;
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
        for head in [
            format!("CONNECT x{FORGED}:1 HTTP/1.1\r\n\r\n"),
            format!("CONNECT nobody:1 HTTP/1.1\r\nx-request-id: {FORGED}\r\n\r\n"),
            format!("GE{FORGED}T / HTTP/1.1\r\n\r\n"),
        ] {
            let mut conn = UnixStream::connect(process.path("door.sock")).await.unwrap();
            conn.write_all(head.as_bytes()).await.unwrap();
            let mut answer = Vec::new();
            conn.read_to_end(&mut answer).await.unwrap();
            assert!(answer.is_ascii() && !answer.contains(&0x1b), "{answer:?}");
        }
        process.send("-TERM");
        assert!(process.ended(AT_ONCE).await.success());
        let mut text = String::new();
        log.read_to_string(&mut text).unwrap();
        assert!(!text.contains(['\r', '\u{1b}', '\u{9b}', '\u{202e}']), "{text:?}");
        assert!(text.contains(r"kube\\n2026") || text.contains(r"kube\n2026"), "{text}");
        let begins = if format == "json" { "{\"timestamp\":\"20" } else { "20" };
        for line in text.lines() {
            assert!(line.starts_with(begins) && !line.starts_with("2026-01-01T00:00:00Z"), "{line:?}");
        }
    }
}

#[tokio::test]
async fn strangers_do_not_fill_the_log_and_port_scans_are_only_counted() {
    let (mut log, writer) = pipe();
    let process = Process::start(writer, "", make_pki);
    process.answers("/readyz", "\r\n\r\nok\n").await;
    for _ in 0..50 {
        drop(TcpStream::connect(process.edges).await.unwrap());
    }
    for _ in 0..120 {
        let mut conn = TcpStream::connect(process.edges).await.unwrap();
        conn.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        let _ = conn.read_to_end(&mut Vec::new()).await;
        let mut conn = UnixStream::connect(process.path("door.sock")).await.unwrap();
        conn.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
        conn.read_to_end(&mut Vec::new()).await.unwrap();
    }
    let failed = |cause: &str, times: u32| {
        format!("tunnel_server_handshakes_failed_total{{domain=\"edge\",cause=\"{cause}\"}} {times}\n")
    };
    process.answers("/metrics", &failed("closed", 50)).await;
    process.answers("/metrics", &failed("not_tls", 120)).await;
    process.answers("/metrics", "tunnel_server_log_lines_left_out_total{cause=\"not_tls\"} 100\n").await;
    process.send("-TERM");
    assert!(process.ended(AT_ONCE).await.success());
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    let lines = |words: &str| text.lines().filter(|line| line.contains(words)).count();
    assert_eq!((lines("TLS handshake failed"), lines("request refused")), (20, 20), "{text}");
    assert_eq!(lines("left out of the log"), 2, "{text}");
    assert_eq!(lines("cause=\"not_tls\" lines=100 last=\"127.0.0.1\""), 1, "{text}");
    assert!(text.lines().count() < 60, "{text}");
}
