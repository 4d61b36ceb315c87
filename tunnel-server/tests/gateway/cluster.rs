//! Grants from a cluster: a real Kubernetes client against an API server whose every answer a test writes itself.

use std::{fmt::Write, fs};

use tokio::{sync::mpsc, task::JoinHandle, time::Instant};
use tunnel_core::{Link, proto::messages::Welcome};
use tunnel_server::Access;

use super::*;
use crate::rig::{Running, listener, start_with};

/// After some failures the gateway takes its time.
const LONGEST_BACKOFF: Duration = Duration::from_secs(40);
/// How long is waited for something that must not happen.
const A_WHILE: Duration = Duration::from_millis(500);

/// An API server: each request comes out of `requests`, to be answered by the test.
struct Api {
    url: String,
    requests: mpsc::Receiver<Exchange>,
    accepting: JoinHandle<()>,
}

/// A request, and the connection to answer on.
struct Exchange {
    head: String,
    conn: TcpStream,
}

impl Api {
    async fn start() -> Self {
        let door = listener().await;
        let url = format!("http://{}", door.local_addr().unwrap());
        let (sender, requests) = mpsc::channel(16);
        let accepting = tokio::spawn(async move {
            while let Ok((mut conn, _)) = door.accept().await {
                let sender = sender.clone();
                tokio::spawn(async move {
                    let mut head = Vec::new();
                    while !head.ends_with(b"\r\n\r\n") {
                        match conn.read_u8().await {
                            Ok(byte) => head.push(byte),
                            Err(_) => return,
                        }
                    }
                    let head = String::from_utf8(head).unwrap();
                    let _ = sender.send(Exchange { head, conn }).await;
                });
            }
        });
        Self { url, requests, accepting }
    }

    fn kubeconfig(&self, token: &str) -> String {
        format!(
            "apiVersion: v1\nkind: Config\ncurrent-context: main\n\
             contexts: [{{name: main, context: {{cluster: c, user: u}}}}]\n\
             clusters: [{{name: c, cluster: {{server: {:?}}}}}]\n\
             users: [{{name: u, user: {{token: {token}}}}}]\n",
            self.url
        )
    }

    /// A gateway that watches the nodes here.
    async fn gateway(&self, grants: &[(&str, &str)]) -> Running {
        let grants: Grants =
            grants.iter().map(|(node, what)| (node.parse().unwrap(), what.parse().unwrap())).collect();
        let kubeconfig = self.kubeconfig("first");
        let watch = |gateway: &mut tunnel_server::Gateway, folder: &std::path::Path| {
            let path = folder.join("kubeconfig");
            fs::write(&path, kubeconfig).unwrap();
            gateway.watch_cluster(Access::Kubeconfig(path));
        };
        start_with(|settings| settings.grants = grants, watch).await
    }

    async fn request(&mut self) -> Exchange {
        timeout(LONGEST_BACKOFF, self.requests.recv()).await.expect("no request").unwrap()
    }

    /// Answers a list, and the watch that follows it; the watch stays open for more lines.
    async fn list(&mut self, nodes: &[&str]) -> Exchange {
        let list = self.request().await;
        assert!(list.head.starts_with("GET /api/v1/nodes?"), "{}", list.head);
        assert!(!list.head.contains("watch=true"), "{}", list.head);
        let items = nodes.join(",");
        list.answer(
            "200 OK",
            &format!(
                r#"{{"kind":"NodeList","apiVersion":"v1","metadata":{{"resourceVersion":"10"}},"items":[{items}]}}"#
            ),
        )
        .await;
        let mut watch = self.request().await;
        assert!(
            watch.head.contains("watch=true") && watch.head.contains("resourceVersion=10"),
            "{}",
            watch.head
        );
        watch.begin().await;
        watch
    }
}

impl Exchange {
    async fn answer(mut self, status: &str, body: &str) {
        let head = format!(
            "HTTP/1.1 {status}\r\ncontent-type: application/json\r\nconnection: close\r\ncontent-length: {}\r\n\r\n",
            body.len()
        );
        self.conn.write_all((head + body).as_bytes()).await.unwrap();
        self.conn.shutdown().await.unwrap();
    }

    async fn begin(&mut self) {
        let head = "HTTP/1.1 200 OK\r\ncontent-type: application/json\r\nconnection: close\r\ntransfer-encoding: chunked\r\n\r\n";
        self.conn.write_all(head.as_bytes()).await.unwrap();
    }

    /// A line of a watch.
    async fn event(&mut self, kind: &str, object: &str) {
        let line = format!("{{\"type\":{kind:?},\"object\":{object}}}\n");
        let chunk = format!("{:x}\r\n{line}\r\n", line.len());
        self.conn.write_all(chunk.as_bytes()).await.unwrap();
    }
}

fn node(name: &str, addresses: &[&str], cidr: &str) -> String {
    let mut list = String::new();
    for address in addresses {
        let comma = if list.is_empty() { "" } else { "," };
        write!(list, r#"{comma}{{"type":"InternalIP","address":{address:?}}}"#).unwrap();
    }
    format!(
        r#"{{"kind":"Node","apiVersion":"v1","metadata":{{"name":{name:?},"resourceVersion":"11"}},"spec":{{"podCIDRs":[{cidr:?}]}},"status":{{"addresses":[{list}]}}}}"#
    )
}

fn status(code: u16, message: &str) -> String {
    format!(
        r#"{{"kind":"Status","apiVersion":"v1","metadata":{{}},"status":"Failure","message":{message:?},"reason":"Unauthorized","code":{code}}}"#
    )
}

impl Running {
    /// What a CONNECT is answered that reaches no edge: the status line.
    async fn refusal(&self, host: &str) -> String {
        let mut conn = UnixStream::connect(self.folder.path().join("door.sock")).await.unwrap();
        conn.write_all(format!("CONNECT {host}:80 HTTP/1.1\r\nHost: x\r\n\r\n").as_bytes()).await.unwrap();
        let mut answer = String::new();
        timeout(PATIENCE, conn.read_to_string(&mut answer)).await.unwrap().unwrap();
        answer.lines().next().unwrap().to_owned()
    }

    /// Waits until a CONNECT to `host` is answered like that.
    async fn answers(&self, host: &str, expected: &str) {
        let mut last = String::new();
        let asking = async {
            loop {
                last = self.refusal(host).await;
                if last.contains(expected) {
                    return;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        };
        let found = timeout(PATIENCE, asking).await;
        assert!(found.is_ok(), "not {expected:?}, but {last:?}");
    }

    async fn edge_a(&self) -> (Link, Welcome) {
        self.link("edge-a", hello("edge-a", "i1")).await.unwrap()
    }
}

/// What the edge is told next.
async fn told(link: &mut Link) -> Vec<String> {
    loop {
        match timeout(PATIENCE, link.next()).await.expect("no update") {
            LinkEvent::Updated(update) => return update.granted,
            LinkEvent::Closed(error) => panic!("the link ended: {error}"),
            _ => {}
        }
    }
}

#[tokio::test]
async fn nodes_are_granted_what_the_cluster_says() {
    let mut api = Api::start().await;
    let running = api.gateway(&[("edge-a", "db.local"), ("edge-b", "10.0.0.0/8")]).await;
    // Before the first list an unknown host may be anyone's, even where a network of the configuration has it.
    for host in ["edge-c", "10.0.0.3"] {
        let answer = running.refusal(host).await;
        let words = format!("503 {host} is not known yet: the nodes have not been read from the cluster");
        assert!(answer.contains(&words), "{answer}");
    }
    let _watch = api
        .list(&[&node("edge-a", &["172.16.0.1", "edge-a"], "10.244.1.0/24"), &node("edge-c", &[], "")])
        .await;
    running.answers("edge-c", "503 node edge-c has no link to this gateway").await;
    assert!(running.refusal("edge-x").await.contains("404"));
    assert!(running.refusal("172.16.0.1").await.contains("503 node edge-a has no link"));
    // The pod network lies in what the configuration grants to another node.
    assert!(running.refusal("10.244.1.9").await.contains("503 node edge-b has no link"));
    let (_link, welcome) = running.edge_a().await;
    assert_eq!(welcome.granted, ["edge-a", "172.16.0.1", "db.local"]);
    running.measured("tunnel_server_cluster_in_sync 1").await;
    running.measured("tunnel_server_cluster_nodes 2").await;
}

#[tokio::test]
async fn an_edge_is_told_when_its_grants_change_and_only_then() {
    let mut api = Api::start().await;
    let running = api.gateway(&[]).await;
    let mut watch = api.list(&[&node("edge-a", &["10.0.0.1"], "10.244.1.0/24")]).await;
    running.answers("edge-a", "503 node edge-a has no link").await;
    let (mut link, welcome) = running.edge_a().await;
    assert_eq!(welcome.granted, ["edge-a", "10.0.0.1", "10.244.1.0/24"]);

    watch.event("BOOKMARK", r#"{"kind":"Node","apiVersion":"v1","metadata":{"resourceVersion":"12"}}"#).await;
    watch.event("MODIFIED", &node("edge-a", &["10.0.0.1"], "10.244.1.0/24")).await;
    watch.event("ADDED", &node("edge-b", &["10.0.0.2"], "10.244.2.0/24")).await;
    running.answers("10.0.0.2", "503 node edge-b has no link").await;
    let early = timeout(A_WHILE, told(&mut link)).await;
    assert!(early.is_err(), "told without a change: {early:?}");

    watch.event("MODIFIED", &node("edge-a", &["10.0.0.7"], "10.244.1.0/24")).await;
    assert_eq!(told(&mut link).await, ["edge-a", "10.0.0.7", "10.244.1.0/24"]);
    assert!(running.refusal("10.0.0.1").await.contains("404"));
    watch.event("DELETED", &node("edge-b", &["10.0.0.2"], "10.244.2.0/24")).await;
    running.answers("edge-b", "404").await;
    watch.event("DELETED", &node("edge-a", &[], "")).await;
    assert_eq!(told(&mut link).await, ["edge-a"]);
    // A node is its certificate's, whatever the cluster thinks of it.
    let (_client, _edge) = running.connected(&mut link).await;
}

#[tokio::test]
async fn a_burst_of_changes_becomes_few_updates() {
    let mut api = Api::start().await;
    let running = api.gateway(&[]).await;
    let mut watch = api.list(&[&node("edge-a", &["10.0.0.1"], "")]).await;
    running.answers("edge-a", "503 node edge-a has no link").await;
    let (mut link, _) = running.edge_a().await;
    let begun = Instant::now();
    let changes = async {
        for number in 0..60 {
            watch.event("MODIFIED", &node("edge-a", &[&format!("10.1.0.{number}")], "")).await;
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    };
    let updates = async {
        let mut count = 1;
        while told(&mut link).await != ["edge-a", "10.1.0.59"] {
            count += 1;
        }
        count
    };
    let ((), updates) = tokio::join!(changes, updates);
    let most = begun.elapsed().as_millis() / 100 + 2;
    assert!(updates <= most, "{updates} updates in the time of {most}");
}

#[tokio::test]
async fn what_is_known_stays_while_the_api_server_is_away_and_a_new_list_replaces_it() {
    let mut api = Api::start().await;
    let running = api.gateway(&[]).await;
    let first = node("edge-a", &["10.0.0.1"], "10.244.1.0/24");
    let mut watch = api.list(&[&first, &node("edge-b", &["10.0.0.2"], "")]).await;
    running.answers("edge-b", "503 node edge-b has no link").await;
    let (mut link, _) = running.edge_a().await;

    // The changes since the last are gone: everything is listed anew.
    watch.event("ERROR", &status(410, "too old resource version: 10 (99)")).await;
    drop(watch);
    let watch = api.list(&[&first, &node("edge-c", &["10.0.0.3"], "")]).await;
    running.answers("edge-b", "404").await;
    running.answers("10.0.0.3", "503 node edge-c has no link").await;

    // Cut in the middle: a watch can go on where it was, but the server has its troubles.
    drop(watch);
    let watch = api.request().await;
    assert!(watch.head.contains("watch=true"), "{}", watch.head);
    watch.answer("503 Service Unavailable", &status(503, "starting")).await;
    running.measured("tunnel_server_cluster_in_sync 0").await;
    let list = api.request().await;
    assert!(running.refusal("10.0.0.3").await.contains("503 node edge-c has no link"));
    assert!(running.refusal("edge-x").await.contains("404"));
    // Half an answer is no list.
    let mut list = list;
    list.begin().await;
    list.conn.write_all(b"5\r\n{\"kin\r\n").await.unwrap();
    drop(list);
    let _watch = api.list(&[&node("edge-a", &["10.0.0.9"], "10.244.1.0/24")]).await;
    assert_eq!(told(&mut link).await, ["edge-a", "10.0.0.9", "10.244.1.0/24"]);
    running.answers("10.0.0.3", "404").await;
    running.measured("tunnel_server_cluster_in_sync 1").await;
}

#[tokio::test]
async fn credentials_are_read_again_when_they_are_refused() {
    let mut api = Api::start().await;
    let running = api.gateway(&[]).await;
    let list = api.request().await;
    assert!(list.head.to_lowercase().contains("authorization: bearer first"), "{}", list.head);
    fs::write(running.folder.path().join("kubeconfig"), api.kubeconfig("second")).unwrap();
    list.answer("401 Unauthorized", &status(401, "Unauthorized")).await;
    running.answers("edge-a", "(the API server answers 401: Unauthorized)").await;

    let list = api.request().await;
    assert!(list.head.to_lowercase().contains("authorization: bearer second"), "{}", list.head);
    fs::write(running.folder.path().join("kubeconfig"), "no: {kubeconfig").unwrap();
    list.answer("401 Unauthorized", &status(401, "Unauthorized")).await;
    running.answers("edge-a", "failed to parse kubeconfig YAML").await;
    fs::write(running.folder.path().join("kubeconfig"), api.kubeconfig("third")).unwrap();
    let _watch = api.list(&[&node("edge-a", &[], "")]).await;
    running.answers("edge-a", "503 node edge-a has no link").await;
}

#[tokio::test]
async fn a_server_that_ends_each_watch_at_once_is_not_asked_without_end() {
    let mut api = Api::start().await;
    let running = api.gateway(&[]).await;
    let mut watch = api.list(&[&node("edge-a", &[], "")]).await;
    let mut count = 0;
    let asking = async {
        loop {
            watch.conn.write_all(b"0\r\n\r\n").await.unwrap();
            count += 1;
            watch = api.request().await;
            watch.begin().await;
        }
    };
    let _ = timeout(Duration::from_secs(2), asking).await;
    assert!((2..=50).contains(&count), "{count} watches in two seconds");
    assert!(running.refusal("edge-a").await.contains("503 node edge-a has no link"));
}

#[tokio::test]
async fn a_gateway_that_leaves_watches_no_more() {
    let mut api = Api::start().await;
    let running = api.gateway(&[]).await;
    let mut watch = api.list(&[&node("edge-a", &[], "")]).await;
    running.shutdown.cancel();
    timeout(PATIENCE, running.task).await.unwrap().unwrap().unwrap();
    let end = timeout(PATIENCE, watch.conn.read(&mut [0; 1])).await.unwrap();
    assert!(matches!(end, Ok(0) | Err(_)), "{end:?}");
    api.accepting.abort();
}
