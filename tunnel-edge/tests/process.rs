//! The real process: what it does while its log cannot be written, its credentials are not there or a lookup hangs, and
//! how it ends.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    fs::{self, File},
    io::{self, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    thread::sleep,
    time::{Duration, Instant},
};

use rcgen::{CertificateParams, DnType, KeyPair};
use tempfile::TempDir;

const PATIENCE: Duration = Duration::from_secs(20);
/// An end that waits for nothing.
const AT_ONCE: Duration = Duration::from_secs(5);

/// Certificate, key and CA of node edge-a, in one file.
fn write_credentials(folder: &Path) {
    let mut params = CertificateParams::default();
    params.distinguished_name.push(DnType::CommonName, "system:node:edge-a");
    params.distinguished_name.push(DnType::OrganizationName, "system:nodes");
    let key = KeyPair::generate().unwrap();
    let pem = params.self_signed(&key).unwrap().pem() + &key.serialize_pem();
    // At once, as a kubelet does it.
    fs::write(folder.join("new.pem"), pem).unwrap();
    fs::rename(folder.join("new.pem"), folder.join("edge.pem")).unwrap();
}

/// An edge in a process of its own.
struct Process {
    folder: TempDir,
    child: Child,
    admin: SocketAddr,
}

impl Process {
    /// Starts one for a gateway at this address, in a folder in which `prepare` has done something. `within` is a command
    /// that runs another.
    fn start(gateway: &str, stderr: impl Into<Stdio>, within: &[&str], prepare: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        prepare(folder.path());
        let admin = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
        let config = format!(
            "gateways: ['{gateway}']\nproxy: none\ntls: {{cert: edge.pem, key: edge.pem, ca: edge.pem}}\n\
             admin: {{listen: '{admin}'}}\n"
        );
        fs::write(folder.path().join("edge.yaml"), config).unwrap();
        let words = [within, &[env!("CARGO_BIN_EXE_tunnel-edge"), "run", "-c", "edge.yaml"]].concat();
        let mut command = Command::new(words[0]);
        command
            .args(&words[1..])
            .current_dir(folder.path())
            .env_clear()
            .env("PATH", "/usr/sbin:/usr/bin:/sbin:/bin");
        let child = command.stdout(Stdio::null()).stderr(stderr).spawn().unwrap();
        Self { folder, child, admin }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// The answer to one GET, if there is anybody to answer.
    fn get(&self, path: &str) -> io::Result<String> {
        let mut conn = TcpStream::connect(self.admin)?;
        conn.set_read_timeout(Some(PATIENCE))?;
        write!(conn, "GET {path} HTTP/1.1\r\nhost: edge\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        conn.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// Waits for an answer in which these words are.
    fn answers(&self, path: &str, words: &str) {
        let begun = Instant::now();
        loop {
            let answer = self.get(path);
            if answer.as_ref().is_ok_and(|answer| answer.contains(words)) {
                return;
            }
            assert!(begun.elapsed() < PATIENCE, "no {words:?} in {answer:?}");
            sleep(Duration::from_millis(20));
        }
    }

    fn send(&self, signal: &str) {
        assert!(
            Command::new("kill").args([signal, &self.child.id().to_string()]).status().unwrap().success()
        );
    }

    fn ended(&mut self, within: Duration) -> ExitStatus {
        let begun = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(begun.elapsed() < within, "still there after {:?}", begun.elapsed());
            sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Where nobody answers.
fn nobody() -> String {
    TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string()
}

#[test]
fn a_log_that_nobody_takes_stops_nothing_and_what_is_lost_is_counted() {
    let full = File::options().write(true).open("/dev/full").unwrap();
    let (_, closed) = io::pipe().unwrap();
    for stderr in [Stdio::from(closed), full.into()] {
        let mut process = Process::start(&nobody(), stderr, &[], write_credentials);
        process.answers("/readyz", "not connected to any gateway");
        process.answers("/metrics", "tunnel_edge_connect_failures_total{cause=\"refused\"} ");
        let metrics = process.get("/metrics").unwrap();
        assert!(!metrics.contains("tunnel_edge_log_lines_dropped_total 0"), "{metrics}");
        process.send("-TERM");
        assert!(process.ended(AT_ONCE).success());
    }
}

#[test]
fn it_waits_for_credentials_that_do_not_exist_yet_and_a_hangup_does_not_end_it() {
    let (mut log, writer) = io::pipe().unwrap();
    let mut process = Process::start(&nobody(), writer, &[], |_| ());
    process.answers("/readyz", "waiting for edge.pem, which does not exist yet");
    assert!(process.get("/healthz").unwrap().starts_with("HTTP/1.1 200 "));
    process.send("-HUP");
    write_credentials(process.folder.path());
    process.answers("/readyz", "not connected to any gateway");
    assert!(process.path("edge.pem").exists());
    process.send("-TERM");
    assert!(process.ended(AT_ONCE).success());
    let mut text = String::new();
    log.read_to_string(&mut text).unwrap();
    assert!(text.contains("SIGHUP is ignored") && text.contains("node=edge-a"), "{text}");
}

#[test]
fn the_wait_for_credentials_ends_at_once_when_told() {
    let mut process = Process::start(&nobody(), Stdio::null(), &[], |_| ());
    process.answers("/readyz", "waiting for edge.pem");
    process.send("-TERM");
    assert!(process.ended(AT_ONCE).success());
}

#[test]
fn a_lookup_that_hangs_does_not_keep_the_process() {
    // A host of its own, whose only name server is at the end of a wire that leads nowhere.
    let script = "ip link set lo up && ip link add nowhere type veth peer name away && ip addr add 192.0.2.2/24 dev nowhere \
                  && ip link set nowhere up && ip link set away up \
                  && ip neigh add 192.0.2.1 lladdr 02:00:00:00:00:01 dev nowhere \
                  && mount --bind resolv.conf /etc/resolv.conf && touch ready && exec \"$@\"";
    let within = ["unshare", "--user", "--map-root-user", "--mount", "--net", "sh", "-c", script, "sh"];
    let mut process = Process::start("gateway.example:8443", Stdio::null(), &within, |folder| {
        write_credentials(folder);
        fs::write(folder.join("resolv.conf"), "nameserver 192.0.2.1\noptions timeout:30 attempts:1\n")
            .unwrap();
    });
    let begun = Instant::now();
    while !process.path("ready").exists() {
        assert!(begun.elapsed() < PATIENCE, "no namespaces: {:?}", process.child.try_wait());
        sleep(Duration::from_millis(20));
    }
    // One thread runs the edge, one writes the log, and a third one waits for the name server.
    let threads = format!("/proc/{}/task", process.child.id());
    while fs::read_dir(&threads).unwrap().count() < 3 {
        assert!(begun.elapsed() < PATIENCE, "it looks nothing up");
        sleep(Duration::from_millis(20));
    }
    process.send("-TERM");
    assert!(process.ended(AT_ONCE).success());
}
