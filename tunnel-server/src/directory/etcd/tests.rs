//! Gateways that find one another through a real etcd, which each test starts and ends. They need Debian's etcd-server,
//! so that a plain `cargo test` leaves them out; CI installs it and runs them, or by hand:
//!
//! ```text
//! cargo test -p tunnel-server directory::etcd -- --ignored
//! ```

use std::{
    collections::BTreeMap,
    fs,
    net::{Ipv4Addr, SocketAddr},
    path::Path,
    process::{Child, Command, Stdio},
    time::Duration,
};

use parking_lot::Mutex;
use prost::Message;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use tokio::{
    io::copy_bidirectional,
    net::{TcpListener, TcpStream},
    task::{JoinHandle, JoinSet},
    time::{Instant, sleep, timeout},
};
use tracing::Level;

use super::{client::Client, *};
use crate::{
    directory::Generation,
    edges::registry::{LinkLimits, Registration, Registry},
    testing::{Log, TestLink, metrics, node},
};

const LEASE: Duration = Duration::from_secs(2);
const SECOND: Duration = Duration::from_secs(1);
const PATIENCE: Duration = Duration::from_secs(20);

/// A member of etcd. Killed when dropped.
struct Member {
    name: String,
    client: u16,
    peer: u16,
    cluster: String,
    tls: Option<Authority>,
    data: tempfile::TempDir,
    process: Option<Child>,
}

impl Member {
    fn start() -> Self {
        Self::cluster(1, None).remove(0)
    }

    /// As many members as there should be, which make one etcd.
    fn cluster(size: usize, tls: Option<&Authority>) -> Vec<Self> {
        // All at once, so that none is given twice.
        let ports: Vec<_> =
            (0..2 * size).map(|_| std::net::TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap()).collect();
        let port = |index: usize| ports[index].local_addr().unwrap().port();
        let peers = (0..size).map(|index| format!("m{index}=http://127.0.0.1:{}", port(2 * index)));
        let cluster = peers.collect::<Vec<_>>().join(",");
        let member = |index| Self {
            name: format!("m{index}"),
            client: port(2 * index + 1),
            peer: port(2 * index),
            cluster: cluster.clone(),
            tls: tls.cloned(),
            data: tempfile::tempdir().unwrap(),
            process: None,
        };
        let mut members: Vec<Self> = (0..size).map(member).collect();
        drop(ports);
        members.iter_mut().for_each(Self::run);
        members
    }

    fn run(&mut self) {
        let (client, peer) = (self.endpoint().to_string(), format!("http://127.0.0.1:{}", self.peer));
        let mut command = Command::new("etcd");
        command
            .args([
                "--name",
                &self.name,
                "--initial-cluster",
                &self.cluster,
                "--initial-cluster-state",
                "new",
            ])
            .args(["--listen-client-urls", &client, "--advertise-client-urls", &client])
            .args(["--listen-peer-urls", &peer, "--initial-advertise-peer-urls", &peer])
            // Leases may then be as short as a second.
            .args(["--heartbeat-interval", "100", "--election-timeout", "500"])
            .args(["--logger", "zap", "--log-level", "fatal"])
            .arg("--data-dir")
            .arg(self.data.path().join("data"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        if let Some(authority) = &self.tls {
            let (cert, key) = authority.issue("127.0.0.1");
            command.arg("--cert-file").arg(cert).arg("--key-file").arg(key);
            command.arg("--trusted-ca-file").arg(authority.file("ca.pem")).arg("--client-cert-auth");
        }
        let process = command.spawn();
        self.process = Some(process.unwrap_or_else(|error| {
            panic!("cannot start etcd ({error}). These tests need it: apt-get install etcd-server")
        }));
    }

    fn kill(&mut self) {
        if let Some(mut process) = self.process.take() {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }

    fn endpoint(&self) -> Endpoint {
        let scheme = if self.tls.is_some() { "https" } else { "http" };
        format!("{scheme}://127.0.0.1:{}", self.client).parse().unwrap()
    }

    /// A client of it, once it answers.
    async fn client(&self, config: &EtcdConfig) -> Client {
        client(config, &self.endpoint()).await
    }
}

async fn client(config: &EtcdConfig, endpoint: &Endpoint) -> Client {
    let deadline = Instant::now() + PATIENCE;
    let one = || async {
        let client = Client::connect(config, endpoint).await?;
        client.get(&config.prefix).await.map(|_| client)
    };
    loop {
        match one().await {
            Ok(client) => return client,
            Err(error) => assert!(Instant::now() < deadline, "etcd does not answer: {error}"),
        }
        sleep(Duration::from_millis(50)).await;
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        self.kill();
    }
}

fn config(endpoints: impl IntoIterator<Item = Endpoint>) -> EtcdConfig {
    EtcdConfig {
        endpoints: endpoints.into_iter().collect(),
        tls: None,
        user: None,
        prefix: "/edge-tunnel/".to_owned(),
        lease: LEASE,
        timeout: 3 * SECOND,
    }
}

/// A gateway's part in the directory.
struct Gateway {
    etcd: Arc<Etcd>,
    in_touch: Gauge,
    registry: Arc<Registry>,
    link: TestLink,
    held: BTreeMap<String, Registration>,
    stop: CancellationToken,
    task: JoinHandle<()>,
}

impl Gateway {
    async fn start(name: &str, config: &EtcdConfig) -> Self {
        Self::holding(name, config, &[]).await
    }

    async fn holding(name: &str, config: &EtcdConfig, nodes: &[&str]) -> Self {
        let own = Own {
            gateway: name.parse().unwrap(),
            peer_address: format!("{name}.example:8444").parse().unwrap(),
            server_name: "gateways.example".try_into().unwrap(),
        };
        let (in_touch, stop) = (Gauge::default(), CancellationToken::new());
        let etcd = Etcd::new(config.clone(), own, in_touch.clone(), rand::random());
        let registry = Registry::new(LinkLimits { total: 100_000, per_node: 4 }, metrics());
        let task = tokio::spawn(etcd.clone().run(News::of(&registry), stop.clone()));
        let link = TestLink::up().await;
        let mut gateway = Self { etcd, in_touch, registry, link, held: BTreeMap::new(), stop, task };
        for node in nodes {
            gateway.hold(node, 1);
        }
        gateway
    }

    fn hold(&mut self, name: &str, generation: Generation) {
        let place = self.registry.place(&node(name)).unwrap();
        let instance = InstanceId::from_random(1);
        let registration = self.registry.register(place, instance, generation, self.link.gateway.clone());
        self.held.insert(name.to_owned(), registration);
    }

    fn release(&mut self, name: &str) {
        assert!(self.held.remove(name).is_some());
    }

    /// The generation of the newest link that another gateway holds.
    fn knows(&self, name: &str) -> Option<Generation> {
        self.etcd.holders(&node(name)).first().map(|holder| holder.generation)
    }

    fn members(&self) -> Vec<String> {
        self.etcd.members().borrow().iter().map(|member| member.address.to_string()).collect()
    }

    async fn in_touch(&self) {
        until("in touch", PATIENCE, || self.in_touch.get() == 1).await;
    }

    /// As kill -9 does: nothing is told to anyone.
    async fn kill(self) {
        self.task.abort();
        assert!(self.task.await.unwrap_err().is_cancelled());
    }

    async fn stop(self) {
        self.stop.cancel();
        timeout(3 * SECOND, self.task).await.unwrap().unwrap();
    }
}

/// Waits until something is so, and tells how long that took.
async fn until(what: &str, limit: Duration, holds: impl Fn() -> bool) -> Duration {
    let began = Instant::now();
    while !holds() {
        assert!(began.elapsed() < limit, "not so after {limit:?}: {what}");
        sleep(Duration::from_millis(1)).await;
    }
    began.elapsed()
}

/// Looks all the time whether a node is known, and fails when it once is not.
struct Always(JoinHandle<()>);

impl Always {
    fn known(gateway: &Gateway, name: &str) -> Self {
        let (etcd, node) = (gateway.etcd.clone(), node(name));
        Self(tokio::spawn(async move {
            while !etcd.holders(&node).is_empty() {
                sleep(Duration::from_millis(1)).await;
            }
        }))
    }

    async fn was(self) {
        assert!(!self.0.is_finished(), "what was known was forgotten for a moment");
        self.0.abort();
        _ = self.0.await;
    }
}

/// Two gateways in touch, `a` and `b`, of which `a` holds the node `stays` and `b` knows it.
async fn pair(config: &EtcdConfig) -> (Gateway, Gateway) {
    client(config, &config.endpoints[0]).await;
    let a = Gateway::holding("gw-a", config, &["stays"]).await;
    let b = Gateway::start("gw-b", config).await;
    tokio::join!(a.in_touch(), b.in_touch());
    until("b knows a's node", PATIENCE, || b.knows("stays") == Some(1) && b.members().len() == 1).await;
    until("a knows b", PATIENCE, || a.members().len() == 1).await;
    (a, b)
}

#[tokio::test]
#[ignore = "needs etcd: cargo test -- --include-ignored"]
async fn gateways_see_one_another_and_vanish() {
    let etcd = Member::start();
    let config = config([etcd.endpoint()]);
    let (mut a, mut b) = pair(&config).await;
    assert_eq!(
        (a.members(), b.members()),
        (vec!["gw-b.example:8444".to_owned()], vec!["gw-a.example:8444".to_owned()])
    );
    a.hold("hops", 5);
    until("b knows the link", SECOND, || b.knows("hops") == Some(5)).await;
    b.hold("hops", 6);
    until("a knows the newer link", SECOND, || a.knows("hops") == Some(6)).await;
    a.release("hops");
    until("the old one is gone", SECOND, || b.knows("hops").is_none()).await;
    assert_eq!(a.knows("hops"), Some(6));

    b.stop().await;
    until("b has vanished", SECOND, || a.knows("hops").is_none() && a.members().is_empty()).await;

    let c = Gateway::start("gw-c", &config).await;
    until("c knows", PATIENCE, || c.knows("stays") == Some(1)).await;
    a.kill().await;
    let took =
        until("a has vanished", LEASE + 2 * SECOND, || c.knows("stays").is_none() && c.members().is_empty())
            .await;
    assert!(took > LEASE / 2, "only the lease can have told: {took:?}");
    c.stop().await;
}

#[tokio::test]
#[ignore = "needs etcd: cargo test -- --include-ignored"]
async fn a_run_that_was_killed_leaves_nothing_to_the_next() {
    let log = Log::start();
    let etcd = Member::start();
    let config = EtcdConfig { lease: 5 * SECOND, ..config([etcd.endpoint()]) };
    let (mut a, b) = pair(&config).await;
    a.hold("old", 7);
    until("b knows", SECOND, || b.knows("old") == Some(7)).await;
    let always = Always::known(&b, "stays");
    a.kill().await;
    let again = Gateway::holding("gw-a", &config, &["stays", "new"]).await;
    until("what the new run holds", PATIENCE, || b.knows("new") == Some(1)).await;
    until("what only the old one held is gone", SECOND, || b.knows("old").is_none()).await;
    // The old run's lease ends and takes nothing with it; its id is nobody else's.
    sleep(config.lease + 5 * SECOND).await;
    always.was().await;
    assert_eq!((b.knows("new"), b.members().len()), (Some(1), 1));
    assert_eq!(log.lines(Level::ERROR, ""), [""; 0]);
    tokio::join!(again.stop(), b.stop());
}

#[tokio::test]
#[ignore = "needs etcd: cargo test -- --include-ignored"]
async fn two_gateways_with_one_id_are_found_out() {
    let log = Log::start();
    let etcd = Member::start();
    let config = config([etcd.endpoint()]);
    let (a, b) = pair(&config).await;
    let double = Gateway::start("gw-a", &config).await;
    until("both say it", PATIENCE, || log.lines(Level::ERROR, "has the same id").len() == 2).await;
    sleep(3 * SECOND).await;
    assert_eq!(log.lines(Level::ERROR, "has the same id").len(), 2, "once each");
    // Without the other, it is as it was.
    double.stop().await;
    until("a is back", PATIENCE, || b.knows("stays") == Some(1) && b.members().len() == 1).await;
    tokio::join!(a.stop(), b.stop());
}

#[tokio::test]
#[ignore = "needs etcd: cargo test -- --include-ignored"]
async fn without_etcd_what_is_known_stays() {
    let log = Log::start();
    let mut etcd = Member::start();
    let config = config([etcd.endpoint()]);
    let (mut a, b) = pair(&config).await;
    until("it holds", PATIENCE, || log.lines(Level::INFO, "kept in etcd").len() == 2).await;
    let always = Always::known(&b, "stays");
    etcd.kill();
    until("out of touch", PATIENCE, || a.in_touch.get() == 0 && b.in_touch.get() == 0).await;
    a.hold("new", 2);
    // The leases would be over twice.
    sleep(LEASE * 3).await;
    assert_eq!((b.knows("stays"), b.knows("new"), b.members().len()), (Some(1), None, 1));
    etcd.run();
    until("what is new is known", PATIENCE, || b.knows("new") == Some(2)).await;
    until("said", PATIENCE, || log.lines(Level::INFO, "can be used again").len() == 2).await;
    assert_eq!(log.lines(Level::WARN, "").len(), 2, "{:?}", log.lines(Level::WARN, ""));
    assert!(a.in_touch.get() == 1 && b.in_touch.get() == 1);
    always.was().await;
    tokio::join!(a.stop(), b.stop());
}

#[tokio::test]
#[ignore = "needs etcd: cargo test -- --include-ignored"]
async fn an_etcd_that_has_lost_everything_is_filled_again() {
    let mut etcd = Member::start();
    let config = config([etcd.endpoint()]);
    let (mut a, b) = pair(&config).await;
    let dies = Gateway::holding("gw-c", &config, &["lost"]).await;
    until("all are known", PATIENCE, || b.knows("lost") == Some(1) && b.members().len() == 2).await;
    let always = Always::known(&b, "stays");
    etcd.kill();
    dies.kill().await;
    fs::remove_dir_all(etcd.data.path().join("data")).unwrap();
    etcd.run();
    a.hold("new", 2);
    until("what is new is known", PATIENCE, || b.knows("new") == Some(2)).await;
    assert_eq!(b.knows("lost"), Some(1), "its gateway may yet come back");
    until("who died meanwhile is forgotten", PATIENCE, || {
        b.knows("lost").is_none() && b.members().len() == 1
    })
    .await;
    always.was().await;
    let c = Gateway::start("gw-c", &config).await;
    until("it is all in etcd again", PATIENCE, || c.knows("stays") == Some(1) && c.knows("new") == Some(2))
        .await;
    tokio::join!(a.stop(), b.stop(), c.stop());
}

#[tokio::test]
#[ignore = "needs etcd: cargo test -- --include-ignored"]
async fn a_lease_that_was_lost_is_replaced() {
    let etcd = Member::start();
    let config = config([etcd.endpoint()]);
    let (a, b) = pair(&config).await;
    let client = etcd.client(&config).await;
    let entry = client.get(&a.etcd.map.own_key()).await.unwrap().unwrap();
    client.revoke(entry.lease).await.unwrap();
    until("b has forgotten it", SECOND, || b.knows("stays").is_none() && b.members().is_empty()).await;
    until("a is back", 5 * SECOND, || b.knows("stays") == Some(1) && b.members().len() == 1).await;
    tokio::join!(a.stop(), b.stop());
}

#[derive(Clone, PartialEq, Message)]
struct CompactionRequest {
    #[prost(int64, tag = "1")]
    revision: i64,
}

#[derive(Clone, PartialEq, Message)]
struct Nothing {}

#[tokio::test]
#[ignore = "needs etcd: cargo test -- --include-ignored"]
async fn a_watch_that_missed_what_was_compacted_reads_all() {
    let log = Log::start();
    let etcd = Member::start();
    let direct = EtcdConfig { lease: 10 * SECOND, ..config([etcd.endpoint()]) };
    let way = Way::to(&etcd).await;
    let mut a = Gateway::holding("gw-a", &direct, &["stays"]).await;
    let b = Gateway::start("gw-b", &EtcdConfig { endpoints: vec![way.endpoint()], ..direct.clone() }).await;
    a.hold("goes", 1);
    until("b knows", PATIENCE, || b.knows("stays").is_some() && b.knows("goes").is_some()).await;
    let always = Always::known(&b, "stays");
    way.open(false);
    until("b is cut off", PATIENCE, || b.in_touch.get() == 0).await;
    a.release("goes");
    for number in 0..250 {
        a.hold(&format!("n{number}"), 9);
    }
    let client = etcd.client(&direct).await;
    let last = a.etcd.map.node_key(&node("n99"));
    let written = loop {
        match client.get(&last).await.unwrap() {
            Some(pair) => break pair.mod_revision,
            None => sleep(Duration::from_millis(10)).await,
        }
    };
    let compacted = client.call("/etcdserverpb.KV/Compact", CompactionRequest { revision: written });
    compacted.await.map(|_: Nothing| ()).unwrap();
    way.open(true);
    let all =
        || (0..250).all(|number| b.knows(&format!("n{number}")) == Some(9)) && b.knows("goes").is_none();
    until("b has caught up", PATIENCE, all).await;
    assert_eq!(log.lines(Level::DEBUG, "etcd has forgotten what happened").len(), 1);
    always.was().await;
    a.hold("after", 1);
    until("b follows", SECOND, || b.knows("after") == Some(1)).await;
    tokio::join!(a.stop(), b.stop());
}

#[tokio::test]
#[ignore = "needs etcd: cargo test -- --include-ignored"]
async fn a_watch_goes_on_where_it_was() {
    let log = Log::start();
    let etcd = Member::start();
    let direct = EtcdConfig { lease: 10 * SECOND, ..config([etcd.endpoint()]) };
    let way = Way::to(&etcd).await;
    let mut a = Gateway::holding("gw-a", &direct, &["stays", "goes"]).await;
    let b = Gateway::start("gw-b", &EtcdConfig { endpoints: vec![way.endpoint()], ..direct.clone() }).await;
    until("b knows", PATIENCE, || b.knows("stays").is_some() && b.knows("goes").is_some()).await;
    let holder = b.etcd.holders(&node("stays")).remove(0);
    b.etcd.disprove(&node("stays"), &holder);
    way.open(false);
    until("b is cut off", PATIENCE, || b.in_touch.get() == 0).await;
    a.release("goes");
    a.hold("new", 1);
    way.open(true);
    until("b has caught up", PATIENCE, || b.knows("new") == Some(1) && b.knows("goes").is_none()).await;
    assert_eq!(b.knows("stays"), None, "reading all would have brought it back");
    assert_eq!(log.lines(Level::ERROR, ""), [""; 0]);
    tokio::join!(a.stop(), b.stop());
}

#[tokio::test]
#[ignore = "needs etcd: cargo test -- --include-ignored"]
async fn any_member_of_three_may_die() {
    let log = Log::start();
    let mut etcd = Member::cluster(3, None);
    let config = EtcdConfig { lease: 4 * SECOND, ..config(etcd.iter().map(Member::endpoint)) };
    for member in &etcd {
        member.client(&config).await;
    }
    let (mut a, b) = pair(&config).await;
    let always = Always::known(&b, "stays");
    for (index, member) in etcd.iter_mut().enumerate() {
        member.kill();
        let name = format!("without-{index}");
        a.hold(&name, 1);
        let took = until("b knows it", 10 * SECOND, || b.knows(&name) == Some(1)).await;
        tracing::info!(?took, index, "known without one member");
        member.run();
        member.client(&config).await;
    }
    always.was().await;
    assert_eq!(log.lines(Level::ERROR, ""), [""; 0]);
    tokio::join!(a.stop(), b.stop());
}

#[tokio::test]
#[ignore = "needs etcd: cargo test -- --include-ignored"]
#[allow(clippy::print_stderr, reason = "the figures are what it is for")]
async fn changes_are_known_within_a_second() {
    const CHANGES: usize = 1000;
    let etcd = Member::start();
    let (mut a, b) = pair(&config([etcd.endpoint()])).await;
    let mut due: Vec<(String, Option<Generation>, Instant)> = Vec::new();
    let mut took = Vec::new();
    let (mut made, mut ticks) = (0, 0_u32);
    while took.len() < CHANGES {
        if made < CHANGES && ticks.is_multiple_of(4) {
            // Every third change is an end.
            let name = format!("n{}", made / 3 * 3 + usize::from(made % 3 == 1));
            if made % 3 == 2 {
                a.release(&name);
            } else {
                a.hold(&name, made as u64 + 1);
            }
            due.push((name, (made % 3 != 2).then_some(made as u64 + 1), Instant::now()));
            made += 1;
        }
        due.retain(|(name, generation, since)| {
            // The end of a link may overtake its beginning.
            let known = b.knows(name) == *generation || !a.held.contains_key(name) && b.knows(name).is_none();
            if known {
                took.push(since.elapsed());
            }
            assert!(since.elapsed() < PATIENCE, "{name} is not known");
            !known
        });
        ticks += 1;
        sleep(Duration::from_millis(1)).await;
    }
    took.sort();
    let (median, p99, longest) = (took[CHANGES / 2], took[CHANGES * 99 / 100], took[CHANGES - 1]);
    eprintln!(
        "{CHANGES} changes, known to the other gateway: p50 {median:?}, p99 {p99:?}, longest {longest:?}"
    );
    assert!(p99 < SECOND, "{p99:?}");
    tokio::join!(a.stop(), b.stop());
}

#[tokio::test]
#[ignore = "needs etcd: cargo test -- --include-ignored"]
async fn many_links_are_written_and_read_page_by_page() {
    let etcd = Member::start();
    let config = config([etcd.endpoint()]);
    let (mut a, b) = pair(&config).await;
    for number in 0..5000 {
        a.hold(&format!("n{number}"), 1);
    }
    until("b has followed", PATIENCE, || b.etcd.map.holders.len() == 5001).await;
    let c = Gateway::start("gw-c", &config).await;
    until("c has read all", PATIENCE, || c.etcd.map.holders.len() == 5001).await;
    a.stop().await;
    until("all are gone", 2 * SECOND, || b.etcd.map.holders.len() == 0 && c.etcd.map.holders.len() == 0)
        .await;
    tokio::join!(b.stop(), c.stop());
}

#[derive(Clone, PartialEq, Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
    /// A password, or a role.
    #[prost(string, tag = "2")]
    second: String,
}

#[derive(Clone, PartialEq, Message)]
struct RoleGrantPermissionRequest {
    #[prost(string, tag = "1")]
    name: String,
    #[prost(message, optional, tag = "2")]
    permission: Option<Permission>,
}

#[derive(Clone, PartialEq, Message)]
struct Permission {
    #[prost(int32, tag = "1")]
    kind: i32,
    #[prost(string, tag = "2")]
    key: String,
    #[prost(string, tag = "3")]
    range_end: String,
}

/// Makes etcd ask who one is: `tunnel` may do what a gateway must, and nothing else.
async fn demand_users(client: &Client) {
    async fn call<Q: Message + Clone + 'static>(client: &Client, method: &'static str, request: Q) {
        let answer: Result<Nothing, _> = client.call(method, request).await;
        if let Err(error) = answer {
            panic!("{method}: {error}");
        }
    }
    let named = |name: &str, second: &str| Named { name: name.to_owned(), second: second.to_owned() };
    call(client, "/etcdserverpb.Auth/RoleAdd", named("root", "")).await;
    call(client, "/etcdserverpb.Auth/RoleAdd", named("gateway", "")).await;
    let (key, range_end) = ("/edge-tunnel/".to_owned(), "/edge-tunnel0".to_owned());
    let permission = Some(Permission { kind: 2, key, range_end });
    let grant = RoleGrantPermissionRequest { name: "gateway".to_owned(), permission };
    call(client, "/etcdserverpb.Auth/RoleGrantPermission", grant).await;
    for (user, role) in [("root", "root"), ("tunnel", "gateway")] {
        call(client, "/etcdserverpb.Auth/UserAdd", named(user, "s3cret-Word")).await;
        call(client, "/etcdserverpb.Auth/UserGrantRole", named(user, role)).await;
    }
    call(client, "/etcdserverpb.Auth/AuthEnable", Nothing {}).await;
}

#[tokio::test]
#[ignore = "needs etcd: cargo test -- --include-ignored"]
async fn users_and_certificates_are_heeded() {
    let log = Log::start();
    let authority = Authority::new();
    let mut etcd = Member::cluster(1, Some(&authority)).remove(0);
    let password = authority.file("password");
    fs::write(&password, "s3cret-Word\n").unwrap();
    let tls = EtcdTls { ca: authority.file("ca.pem"), identity: Some(authority.issue("gateway")) };
    let open = EtcdConfig { tls: Some(tls), ..config([etcd.endpoint()]) };
    demand_users(&etcd.client(&open).await).await;
    let user = |name: &str, file| EtcdConfig { user: Some((name.to_owned(), file)), ..open.clone() };
    let good = user("tunnel", password);
    let (mut a, b) = pair(&good).await;
    let always = Always::known(&b, "stays");

    // A new password makes the user's tokens void, and a restart forgets them all.
    let root = etcd.client(&user("root", authority.file("password"))).await;
    let request = Named { name: "tunnel".to_owned(), second: "s3cret-Word".to_owned() };
    let changed: Result<Nothing, _> = root.call("/etcdserverpb.Auth/UserChangePassword", request).await;
    changed.unwrap();
    a.hold("two", 2);
    until("known after the token was void", 2 * SECOND, || b.knows("two") == Some(2)).await;
    assert_eq!(log.lines(Level::DEBUG, "lost a member"), [""; 0], "for that, no session needs to end");
    etcd.kill();
    etcd.run();
    a.hold("three", 3);
    until("known after a restart", PATIENCE, || b.knows("three") == Some(3)).await;
    always.was().await;

    let wrong = authority.file("wrong");
    fs::write(&wrong, "not-the-Word").unwrap();
    let stranger = TestWarning::of(&user("tunnel", wrong), &log).await;
    assert!(stranger.contains("cannot log in as") && !stranger.contains("Word"), "{stranger}");
    let other = Authority::new();
    let tls = EtcdTls { ca: other.file("ca.pem"), identity: Some(authority.issue("gateway")) };
    let stranger = TestWarning::of(&EtcdConfig { tls: Some(tls), ..good.clone() }, &log).await;
    assert!(stranger.contains("invalid peer certificate"), "{stranger}");
    assert!(!format!("{:?} {:?}", a.etcd, log.lines(Level::DEBUG, "")).contains("s3cret"));
    tokio::join!(a.stop(), b.stop());
}

/// What a gateway warns of that cannot use etcd.
struct TestWarning;

impl TestWarning {
    async fn of(config: &EtcdConfig, log: &Log) -> String {
        let before = log.lines(Level::WARN, "").len();
        let gateway = Gateway::start("gw-x", config).await;
        until("it warns", PATIENCE, || log.lines(Level::WARN, "").len() > before).await;
        sleep(SECOND).await;
        assert_eq!(
            (log.lines(Level::WARN, "").len(), gateway.in_touch.get()),
            (before + 1, 0),
            "it says so once"
        );
        gateway.stop().await;
        log.lines(Level::WARN, "").remove(before)
    }
}

#[test]
fn files_and_endpoints_are_checked_before() {
    let authority = Authority::new();
    let with = |url: &str| config([url.parse().unwrap()]);
    let error = |config: &EtcdConfig| config.check_files().unwrap_err().to_string();
    with("http://etcd.example:2379").check_files().unwrap();
    assert!(error(&with("https://etcd.example:2379")).contains("needs etcd.ca"));

    let (cert, key) = authority.issue("gateway");
    let tls = |ca: &Path, cert: &Path, key: &Path| EtcdConfig {
        tls: Some(EtcdTls { ca: ca.to_owned(), identity: Some((cert.to_owned(), key.to_owned())) }),
        ..with("https://etcd.example:2379")
    };
    let ca = authority.file("ca.pem");
    tls(&ca, &cert, &key).check_files().unwrap();
    assert!(error(&tls(&key, &cert, &key)).ends_with("holds no certificate"));
    assert!(error(&tls(&ca, &cert, &cert)).ends_with("holds no private key"));
    assert!(error(&tls(&authority.file("none"), &cert, &key)).contains("cannot read"));
    assert!(error(&tls(&ca, &cert, &authority.issue("other").1)).contains("cannot be used"));
    let plain = EtcdConfig { endpoints: with("http://etcd.example:2379").endpoints, ..tls(&ca, &cert, &key) };
    assert!(error(&plain).contains("without TLS"));
    let user = EtcdConfig { user: Some(("tunnel".to_owned(), authority.file("none"))), ..with("http://e:1") };
    assert!(error(&user).contains("cannot read"));

    for bad in [
        "etcd:2379",
        "http://etcd",
        "ftp://etcd:1",
        "http://u:secret@etcd:1",
        "http://etcd:1/v3",
        "http://etcd:0",
        "",
    ] {
        let error = bad.parse::<Endpoint>().unwrap_err();
        assert!(!error.contains("secret"), "{error}");
    }
}

/// A way to a member that can be closed.
struct Way {
    address: SocketAddr,
    open: watch::Sender<bool>,
    _task: JoinSet<()>,
}

impl Way {
    async fn to(member: &Member) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (address, open) = (listener.local_addr().unwrap(), watch::Sender::new(true));
        let (to, state) = (member.client, open.subscribe());
        let connections = Mutex::new(JoinSet::new());
        let mut task = JoinSet::new();
        task.spawn(async move {
            while let Ok((mut near, _)) = listener.accept().await {
                let mut closed = state.clone();
                connections.lock().spawn(async move {
                    let carry = async {
                        let mut far = TcpStream::connect((Ipv4Addr::LOCALHOST, to)).await?;
                        copy_bidirectional(&mut near, &mut far).await
                    };
                    tokio::select! {
                        biased;
                        _ = closed.wait_for(|open| !open) => {}
                        _ = carry => {}
                    }
                });
            }
        });
        Self { address, open, _task: task }
    }

    fn open(&self, open: bool) {
        self.open.send_replace(open);
    }

    fn endpoint(&self) -> Endpoint {
        format!("http://{}", self.address).parse().unwrap()
    }
}

/// A CA and what it has issued, as files.
#[derive(Clone)]
struct Authority {
    folder: Arc<tempfile::TempDir>,
    issuer: Arc<Issuer<'static, KeyPair>>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(Vec::new()).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "etcd's CA");
        let (key, folder) = (KeyPair::generate().unwrap(), tempfile::tempdir().unwrap());
        fs::write(folder.path().join("ca.pem"), params.self_signed(&key).unwrap().pem()).unwrap();
        Self { folder: Arc::new(folder), issuer: Arc::new(Issuer::new(params, key)) }
    }

    fn file(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn issue(&self, name: &str) -> (PathBuf, PathBuf) {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.distinguished_name.push(DnType::CommonName, name);
        let key = KeyPair::generate().unwrap();
        let (cert_file, key_file) = (self.file(&format!("{name}.pem")), self.file(&format!("{name}.key")));
        fs::write(&cert_file, params.signed_by(&key, &self.issuer).unwrap().pem()).unwrap();
        fs::write(&key_file, key.serialize_pem()).unwrap();
        (cert_file, key_file)
    }
}
