//! HTTP/1.1 byte by byte: what goes in, what comes out, and nothing else.

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    time::{Instant, sleep},
};
use tunnel_core::{Aborted, TunnelStream, proto::messages::AbortCode};

use super::*;

const CONNECT: &[u8] = b"CONNECT edge-a:10250 HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n";
const CONNECTED: &[u8] = b"HTTP/1.1 200 OK\r\n\r\n";

/// Everything that the gateway answers until it closes.
async fn ask(site: &Site, request: &[u8]) -> String {
    let (mut client, task) = site.client();
    client.write_all(request).await.unwrap();
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    drop(client);
    task.await.unwrap();
    answer
}

/// A connected stream: the client's side and the edge's.
async fn connected(site: &mut Site) -> (DuplexStream, TunnelStream) {
    let (mut client, _) = site.client();
    client.write_all(CONNECT).await.unwrap();
    let edge = site.edge.pending().await.accept("127.0.0.1:10250".to_owned()).await.unwrap();
    let mut head = [0; CONNECTED.len()];
    client.read_exact(&mut head).await.unwrap();
    assert_eq!(head, CONNECTED);
    (client, edge)
}

/// Bytes whose order shows.
fn pattern() -> impl Iterator<Item = u8> {
    (0..251).cycle()
}

fn reason(error: &std::io::Error) -> &Aborted {
    error.get_ref().and_then(|inner| inner.downcast_ref()).expect("a stream's error says why")
}

#[tokio::test(start_paused = true)]
async fn the_reply_comes_when_the_target_is_connected_and_nothing_follows_it() {
    let mut site = Site::up().await;
    let (mut client, _task) = site.client();
    client.write_all(&[CONNECT, b"early"].concat()).await.unwrap();
    let pending = site.edge.pending().await;
    assert_eq!(pending.open().target, "edge-a:10250");
    assert_eq!(pending.open().request_id, "00000007-1");
    let mut byte = [0; 1];
    tokio::select! {
        biased;
        read = client.read(&mut byte) => panic!("answered before the target was connected: {read:?}"),
        () = sleep(Duration::from_secs(1)) => {}
    }

    let mut edge = pending.accept("127.0.0.1:10250".to_owned()).await.unwrap();
    let mut early = [0; 5];
    edge.read_exact(&mut early).await.unwrap();
    assert_eq!(&early, b"early");
    let mut head = [0; CONNECTED.len()];
    client.read_exact(&mut head).await.unwrap();
    assert_eq!(head, CONNECTED);
    tokio::select! {
        biased;
        read = client.read(&mut byte) => panic!("a byte follows the head: {read:?}"),
        () = sleep(Duration::from_secs(1)) => {}
    }
    edge.write_all(b"hello").await.unwrap();
    let mut hello = [0; 5];
    client.read_exact(&mut hello).await.unwrap();
    assert_eq!(&hello, b"hello");
}

#[tokio::test]
async fn a_request_may_come_in_any_pieces() {
    let mut site = Site::up().await;
    let (mut client, _task) = site.client();
    tokio::spawn(async move {
        for byte in CONNECT.iter().chain(b"x") {
            client.write_all(&[*byte]).await.unwrap();
            tokio::task::yield_now().await;
        }
        let _ = client.read_to_end(&mut Vec::new()).await;
    });
    let mut edge = site.edge.pending().await.accept(String::new()).await.unwrap();
    let mut byte = [0; 1];
    edge.read_exact(&mut byte).await.unwrap();
    assert_eq!(&byte, b"x");
}

#[tokio::test]
async fn the_headers_that_matter_are_passed_on() {
    let mut site = Site::up().await;
    let (mut client, _task) = site.client();
    let trace = "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01";
    let request = format!("CONNECT edge-a:22 HTTP/1.0\r\nX-Request-Id: abc\r\nTraceParent: {trace}\r\n\r\n");
    client.write_all(request.as_bytes()).await.unwrap();
    let pending = site.edge.pending().await;
    let open = pending.open();
    assert_eq!((open.request_id.as_str(), open.traceparent.as_str()), ("abc", trace));
    assert_eq!(open.caller, "10.0.0.9:40000");
}

#[tokio::test(start_paused = true)]
async fn what_is_not_a_good_request_is_told_so() {
    let grants = [("edge-a", "10.0.0.1"), ("edge-b", "10.0.0.1"), ("edge-c", "10.0.0.3")];
    let site = Site::with(|_| {}, &grants, LinkConfig::default()).await;
    let long = format!("CONNECT edge-a:1 HTTP/1.1\r\nx: {}\r\n\r\n", "y".repeat(MAX_HEADER));
    let many = format!("CONNECT edge-a:1 HTTP/1.1\r\n{}\r\n", "x: y\r\n".repeat(200));
    for (request, status_line) in [
        ("GET / HTTP/1.1\r\n\r\n", "405 GET is not served here: use CONNECT host:port"),
        ("\x16\x03\x01\x02garbage", "400 the request cannot be understood: "),
        ("CONNECT edge-a HTTP/1.1\r\n\r\n", "400 the request's target is not usable: \"edge-a\" has no port"),
        ("CONNECT edge-a:1 HTTP/9\r\n\r\n", "400 the request cannot be understood: "),
        (&long, "431 the request's head is longer than 4096 bytes"),
        (&many, "431 "),
        ("CONNECT nobody:1 HTTP/1.1\r\nHost: edge-a\r\n\r\n", "404 no such node: nobody is neither"),
        (
            "CONNECT 10.0.0.1:1 HTTP/1.1\r\n\r\n",
            "502 10.0.0.1 is granted to more than one node (edge-a, edge-b)",
        ),
        (
            "CONNECT 10.0.0.3:1 HTTP/1.1\r\n\r\n",
            "503 node edge-c has no link to this gateway; it was not seen",
        ),
        ("PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", "4"),
    ] {
        let answer = ask(&site, request.as_bytes()).await;
        assert!(answer.starts_with(&format!("HTTP/1.1 {status_line}")), "{answer}");
        let (head, body) = answer.split_once("\r\n\r\n").unwrap();
        let line = head.lines().next().unwrap();
        assert_eq!(body.trim_end(), line.splitn(3, ' ').nth(2).unwrap(), "{answer}");
        assert!(head.contains("proxy-status: tunnel-server-gw-1; error="), "{answer}");
        assert_eq!(head.contains("retry-after: "), line.contains(" 503 "), "{answer}");
        assert_eq!(head.contains("allow: CONNECT"), line.contains(" 405 "), "{answer}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_node_that_is_named_like_an_address_does_not_take_it_from_its_holder() {
    let grants = [("edge-a", "192.168.1.1"), ("edge-c", "10.0.0.0/8"), ("edge-c", "default-route")];
    let site = Site::with(|_| {}, &grants, LinkConfig::default()).await;
    let refused = [
        ("192.168.1.1", "192.168.1.1 is the name of one node and granted to another (192.168.1.1, edge-a): "),
        ("10.0.0.5", "10.0.0.5 is the name of one node and granted to another (10.0.0.5, edge-c): "),
    ];
    let named = ["192.168.1.1", "10.0.0.5", "172.16.0.1"];
    let link = TestLink::up().await;
    let stay: Vec<Registration> = named.iter().map(|name| site.register_as(name, &link, 2)).collect();
    let check = async |when: &str| {
        for (host, text) in refused {
            let answer = ask(&site, format!("CONNECT {host}:1 HTTP/1.1\r\n\r\n").as_bytes()).await;
            assert!(answer.starts_with(&format!("HTTP/1.1 502 {text}")), "{when}: {answer}");
        }
    };
    check("linked").await;
    drop(stay);
    check("offline").await;
    // The default route is no claim to an address: this node is meant, also while it is offline.
    let answer = ask(&site, b"CONNECT 172.16.0.1:1 HTTP/1.1\r\n\r\n").await;
    assert!(answer.starts_with("HTTP/1.1 503 node 172.16.0.1 has no link"), "{answer}");
}

#[tokio::test(start_paused = true)]
async fn a_slow_request_is_not_waited_for() {
    let site = Site::up().await;
    for begun in [&b""[..], b"PRI * HT", b"CONNECT edge-a:1 HTTP/1.1\r\nx:"] {
        let started = Instant::now();
        let answer = ask(&site, begun).await;
        assert!(
            answer.starts_with("HTTP/1.1 408 the request's head did not come within 5000 ms"),
            "{answer}"
        );
        assert_eq!(started.elapsed().as_secs(), HEADER_TIMEOUT.as_secs());
    }
}

#[tokio::test]
async fn the_edges_answer_is_the_status_line() {
    let mut site = Site::up().await;
    for (code, text, status_line) in [
        (
            RefusalCode::ConnectionRefused,
            "127.0.0.1:10250 refused",
            "502 node edge-a: 127.0.0.1:10250 refused",
        ),
        (RefusalCode::NotAllowed, "not on the list", "403 node edge-a: not on the list"),
        (RefusalCode::DialTimeout, "no answer", "504 node edge-a: no answer"),
    ] {
        let ingress = site.ingress.clone();
        let (near, mut client) = TestLeg::pair();
        let peer = PeerAddr::Ip(SocketAddr::from(([10, 0, 0, 9], 40_000)));
        let task = tokio::spawn(ingress.serve_plain(near, peer));
        client.write_all(CONNECT).await.unwrap();
        site.edge_refuses(code, text).await;
        let mut answer = String::new();
        client.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status_line}\r\n")), "{answer}");
        drop(client);
        task.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_target_that_is_not_connected_in_time_is_a_504() {
    let mut site = Site::up().await;
    let (mut client, _task) = site.client();
    client.write_all(CONNECT).await.unwrap();
    let mut pending = site.edge.pending().await;
    let mut answer = String::new();
    client.read_to_string(&mut answer).await.unwrap();
    assert!(
        answer.starts_with("HTTP/1.1 504 node edge-a did not connect edge-a:10250 within 10000 ms\r\n"),
        "{answer}"
    );
    pending.cancelled().await;
}

#[tokio::test(start_paused = true)]
async fn an_offline_node_was_last_seen_some_time_ago() {
    let mut site = Site::up().await;
    site.stays = None;
    sleep(Duration::from_secs(40)).await;
    let answer = ask(&site, CONNECT).await;
    assert!(
        answer.starts_with("HTTP/1.1 503 node edge-a has no link to this gateway; last seen 40s ago\r\n"),
        "{answer}"
    );
}

#[tokio::test]
async fn a_client_that_goes_away_cancels_the_dial() {
    let mut site = Site::up().await;
    let (mut client, task) = site.client();
    client.write_all(CONNECT).await.unwrap();
    let mut pending = site.edge.pending().await;
    drop(client);
    assert_eq!(pending.cancelled().await.code, AbortCode::Cancelled);
    task.await.unwrap();
}

#[tokio::test]
async fn a_client_that_says_all_at_once_and_ends_is_answered() {
    let mut site = Site::up().await;
    let (mut client, task) = site.client();
    client.write_all(CONNECT).await.unwrap();
    client.write_all(b"all at once").await.unwrap();
    client.shutdown().await.unwrap();
    let mut edge = site.edge.pending().await.accept("127.0.0.1:10250".to_owned()).await.unwrap();
    let mut said = String::new();
    edge.read_to_string(&mut said).await.unwrap();
    assert_eq!(said, "all at once");
    edge.write_all(b"answer").await.unwrap();
    edge.shutdown().await.unwrap();
    let mut answer = Vec::new();
    client.read_to_end(&mut answer).await.unwrap();
    assert_eq!(answer, [CONNECTED, b"answer"].concat());
    task.await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn early_bytes_are_bounded_and_none_is_lost() {
    const SENT: usize = 1 << 20;
    let mut site = Site::up().await;
    let (mut client, _task) = site.client();
    client.write_all(CONNECT).await.unwrap();
    let (mut answer, mut sender) = tokio::io::split(client);
    let sending = tokio::spawn(async move {
        let bytes: Vec<u8> = pattern().take(SENT).collect();
        sender.write_all(&bytes).await.unwrap();
        sender.shutdown().await.unwrap();
    });
    let pending = site.edge.pending().await;
    // Long enough for all of it, were it read.
    sleep(Duration::from_secs(5)).await;
    assert!(!sending.is_finished(), "a megabyte was taken before the target was connected");
    let mut edge = pending.accept(String::new()).await.unwrap();
    let reading = async {
        let mut received = Vec::new();
        edge.read_to_end(&mut received).await.unwrap();
        assert!(received.iter().copied().eq(pattern().take(received.len())));
        assert_eq!(received.len(), SENT);
    };
    let mut head = [0; CONNECTED.len()];
    let ((), read) = tokio::join!(reading, answer.read_exact(&mut head));
    read.unwrap();
    assert_eq!(head, CONNECTED);
}

#[tokio::test]
async fn half_close_goes_both_ways() {
    let mut site = Site::up().await;
    let (mut client, mut edge) = connected(&mut site).await;
    client.write_all(b"question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut text = String::new();
    edge.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "question");
    edge.write_all(b"answer").await.unwrap();
    edge.shutdown().await.unwrap();
    text.clear();
    client.read_to_string(&mut text).await.unwrap();
    assert_eq!(text, "answer");
}

#[tokio::test]
async fn a_stopping_gateway_says_so_to_the_edge() {
    let mut site = Site::up().await;
    let (_client, mut edge) = connected(&mut site).await;
    site.stopping.cancel();
    let error = edge.read(&mut [0; 1]).await.unwrap_err();
    assert_eq!(reason(&error).code, AbortCode::Drained);
}

#[tokio::test]
async fn a_draining_gateway_takes_no_request() {
    let site = Site::up().await;
    let (_idle, idle_task) = site.client();
    let (mut begun, _task) = site.client();
    begun.write_all(&CONNECT[..10]).await.unwrap();
    // Lets the ingress see the first bytes.
    for _ in 0..10 {
        tokio::task::yield_now().await;
    }
    site.draining.cancel();
    idle_task.await.unwrap();
    begun.write_all(&CONNECT[10..]).await.unwrap();
    let mut answer = String::new();
    begun.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 503 gateway gw-1 is about to leave"), "{answer}");
}

#[tokio::test]
async fn a_client_that_is_not_on_the_list_may_not_ask() {
    let only = |settings: &mut IngressSettings| {
        settings.allowed_clients.insert("kube-apiserver".to_owned());
    };
    let site = Site::with(only, &[], LinkConfig::default()).await;
    let answer = ask(&site, CONNECT).await;
    assert!(answer.starts_with("HTTP/1.1 403 client without a name may not use this gateway"), "{answer}");
    let named = |names: &[&str]| super::super::Client {
        peer: PeerAddr::Ip(SocketAddr::from(([10, 0, 0, 9], 1))),
        names: names.iter().map(ToString::to_string).collect(),
        node: None,
    };
    assert_eq!(site.ingress.admit(&named(&["x", "kube-apiserver"])).unwrap().to_string(), "kube-apiserver");
    assert!(site.ingress.admit(&named(&["x"])).is_err());
    // Whatever the list says: a node is no client.
    let node = super::super::Client { node: "edge-b".parse().ok(), ..named(&["kube-apiserver"]) };
    let refusal = site.ingress.admit(&node).unwrap_err().to_string();
    assert!(refusal.starts_with("the client's certificate is that of node edge-b"), "{refusal}");
    let unix =
        super::super::Client { peer: PeerAddr::Unix { uid: 0, pid: Some(1) }, names: Vec::new(), node: None };
    assert_eq!(site.ingress.admit(&unix).unwrap().to_string(), "uid:0/pid:1");
}

#[tokio::test]
async fn a_full_link_is_made_up_for_by_the_nodes_other_link() {
    let one = LinkConfig { max_streams: 1, ..LinkConfig::default() };
    let mut site = Site::with(|_| {}, &[], one.clone()).await;
    let mut newer = TestLink::with(one).await;
    let _stays = site.register(&newer, 2);
    let (mut first, _first) = site.client();
    first.write_all(CONNECT).await.unwrap();
    let held = newer.pending().await;
    let (mut second, _second) = site.client();
    second.write_all(CONNECT).await.unwrap();
    let also_held = site.edge.pending().await;
    let answer = ask(&site, CONNECT).await;
    assert!(answer.starts_with("HTTP/1.1 503 node edge-a is busy"), "{answer}");
    drop((held, also_held));
}

#[tokio::test]
async fn a_full_gateway_refuses_one_more_and_has_room_again_when_one_ends() {
    let mut site = Site::up().await;
    let mut streams = Vec::new();
    for _ in 0..MAX_STREAMS {
        streams.push(connected(&mut site).await);
    }
    let answer = ask(&site, b"CONNECT edge-a:10250 HTTP/1.1\r\n\r\n").await;
    let says = format!("HTTP/1.1 503 this gateway carries as many streams as it may ({MAX_STREAMS})");
    assert!(answer.starts_with(&says), "{answer}");
    assert!(answer.to_lowercase().contains("retry-after: "), "{answer}");
    drop(streams.pop());
    // The place is free once the relay has noticed.
    loop {
        let (mut client, served) = site.client();
        client.write_all(b"CONNECT edge-a:10250 HTTP/1.1\r\n\r\n").await.unwrap();
        let reply = async { client.read_u8().await };
        tokio::select! {
            biased;
            pending = site.edge.pending() => {
                pending.accept(String::new()).await.unwrap();
                break;
            }
            first = reply => assert_eq!(first.unwrap(), b'H'),
        }
        served.await.unwrap();
    }
}
