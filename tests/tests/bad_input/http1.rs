//! HTTP/1.1 as it should not be, through both private doors: TCP with TLS, and the Unix socket.

use std::time::Duration;

use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt},
    net::{TcpStream, UnixStream},
    time::interval,
};
use tunnel_tests::{
    connect::{Refusal, reply},
    parties::control_plane_tls,
};

use crate::{
    client::rest,
    rig::{PATIENCE, Rig, answered, soon},
};

/// What the gateway writes into the head of a refusal, and nothing else ever.
const FIELDS: [&str; 6] =
    ["proxy-status", "content-type", "retry-after", "allow", "content-length", "connection"];
/// Longer than any head may be.
const MUCH: usize = 20_000;

/// A connection through one of the doors.
trait Conn: AsyncRead + AsyncWrite + Send + Unpin {}
impl<C: AsyncRead + AsyncWrite + Send + Unpin> Conn for C {}

#[derive(Clone, Copy, Debug)]
enum Door {
    Tls,
    Unix,
}

const DOORS: [Door; 2] = [Door::Tls, Door::Unix];

impl Door {
    async fn open(self, rig: &Rig) -> Box<dyn Conn> {
        match self {
            Self::Tls => {
                let socket = TcpStream::connect(rig.ingress_door).await.unwrap();
                Box::new(control_plane_tls(socket).await.unwrap())
            }
            Self::Unix => Box::new(UnixStream::connect(&rig.unix_door).await.unwrap()),
        }
    }
}

/// A request and what must come of it.
struct Bad {
    name: String,
    bytes: Vec<u8>,
    status: u16,
    /// As the metrics call it.
    cause: &'static str,
    /// In the reason phrase, and in the log.
    says: &'static str,
}

fn bad(name: &str, bytes: &[u8], status: u16, cause: &'static str, says: &'static str) -> Bad {
    Bad { name: name.to_owned(), bytes: bytes.to_vec(), status, cause, says }
}

async fn all_refused(cases: Vec<Bad>) {
    let mut rig = Rig::new().await;
    for (door, bad) in DOORS.iter().flat_map(|door| cases.iter().map(move |bad| (door, bad))) {
        let name = format!("{door:?}: {}", bad.name);
        let case = rig.case(&name);
        let mut conn = door.open(&rig).await;
        // The reply may come, and with it the end, before all of it is written.
        let _ = conn.write_all(&bad.bytes).await;
        let _ = conn.flush().await;
        let refusal = strict(&name, &rest(&mut conn).await).await;
        assert_eq!(refusal.status, bad.status, "{name}: {refusal:?}");
        assert!(refusal.reason.contains(bad.says), "{name}: {refusal:?}");
        let words = ["WARN", "request refused", bad.says];
        rig.expect(case, &[answered("h1", bad.status, bad.cause)], &words).await;
    }
    rig.finish().await;
}

/// Takes exactly one reply apart, of which the client may have written nothing.
async fn strict(name: &str, mut bytes: &[u8]) -> Refusal {
    let all = bytes;
    let refusal = match reply(&mut bytes).await {
        Ok(Err(refusal)) => refusal,
        other => panic!("{name}: {other:?}, {:?}", String::from_utf8_lossy(all)),
    };
    refusal.check().unwrap();
    assert_eq!(refusal.header("content-length"), refusal.body.len().to_string(), "{name}: {refusal:?}");
    assert_eq!(refusal.body, format!("{}\n", refusal.reason), "{name}");
    for (field, value) in &refusal.headers {
        assert!(FIELDS.contains(&field.as_str()), "{name}: a field {field} in {refusal:?}");
        assert!(value.bytes().all(|byte| matches!(byte, b' '..=b'~')), "{name}: {value:?}");
    }
    assert!(refusal.reason.len() <= 200, "{name}: {refusal:?}");
    let proxy_status = refusal.header("proxy-status");
    assert!(proxy_status.starts_with("tunnel-server-gateway; error="), "{name}: {proxy_status}");
    refusal
}

#[tokio::test]
async fn garbage_and_other_versions() {
    let says = "the request cannot be understood";
    let malformed = |name, bytes: &[u8]| bad(name, bytes, 400, "malformed", says);
    all_refused(vec![
        malformed("zeros", &[0; 64]),
        malformed("high bytes", &[0xff; 64]),
        malformed("a TLS record inside", &[0x16, 3, 1, 2, 0, 1, 0, 1, 0xfc, 3, 3]),
        malformed("HTTP/0.9", b"GET /\r\n\r\n"),
        malformed("CONNECT without a version", b"CONNECT edge-a:10250\r\n\r\n"),
        malformed("HTTP/3", b"CONNECT edge-a:10250 HTTP/3\r\n\r\n"),
        malformed("HTTP/1.2", b"CONNECT edge-a:10250 HTTP/1.2\r\n\r\n"),
        malformed("HTTP/2.0, but not its preface", b"CONNECT edge-a:10250 HTTP/2.0\r\n\r\n"),
        malformed("half a preface of HTTP/2", b"PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n"),
        malformed("a field without a colon", b"CONNECT edge-a:10250 HTTP/1.1\r\nHost\r\n\r\n"),
        malformed("a space before a colon", b"CONNECT edge-a:10250 HTTP/1.1\r\nHost : a\r\n\r\n"),
        malformed("a folded field", b"CONNECT edge-a:10250 HTTP/1.1\r\nA: b\r\n c\r\n\r\n"),
        malformed("NUL in a field", b"CONNECT edge-a:10250 HTTP/1.1\r\nA: b\0c\r\n\r\n"),
        malformed("a bare CR", b"CONNECT edge-a:10250 HTTP/1.1\rA: b\r\n\r\n"),
    ])
    .await;
}

#[tokio::test]
async fn other_methods() {
    let not_connect = |bytes: &[u8], says| bad(says, bytes, 405, "not_connect", says);
    all_refused(vec![
        not_connect(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "GET is not served here: use CONNECT host:port"),
        not_connect(b"POST /x HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc", "POST is not served here"),
        not_connect(b"connect edge-a:10250 HTTP/1.1\r\n\r\n", "connect is not served here"),
        not_connect(b"OPTIONS * HTTP/1.0\r\n\r\n", "OPTIONS is not served here"),
    ])
    .await;
    let mut rig = Rig::new().await;
    let case = rig.case("what is allowed");
    let mut conn = Door::Tls.open(&rig).await;
    conn.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(strict("GET", &rest(&mut conn).await).await.header("allow"), "CONNECT");
    rig.expect(case, &[answered("h1", 405, "not_connect")], &[]).await;
    rig.finish().await;
}

#[tokio::test]
async fn targets_that_are_none() {
    let port = "is not host:port: the port must be a number from 1 to 65535";
    let none = "has no port: give host:port, not a URL";
    let host = "is neither a host name, a node name, an IPv4 address nor an [IPv6 address]";
    let long_name = format!("{}:1", "a".repeat(300));
    let targets = [
        ("edge-a", none),
        ("edge-a:", port),
        ("edge-a:0", port),
        ("edge-a:65536", port),
        ("edge-a:-1", port),
        ("edge-a:+1", port),
        ("edge-a:http", port),
        ("http://edge-a:1/", none),
        ("edge-a:10250/", port),
        ("/", none),
        ("*", none),
        (":10250", host),
        ("user@edge-a:10250", host),
        ("[::1:10250", host),
        ("::1:10250", host),
        ("[edge-a]:10250", host),
        ("[fe80::1%eth0]:10250", host),
        ("-edge:1", host),
        ("a..b:1", host),
        ("1.2.3:1", host),
        ("256.1.1.1:1", host),
        ("%65dge-a:1", host),
        (&long_name, host),
    ];
    let case = |(target, says): &(&str, &'static str)| {
        let request = format!("CONNECT {target} HTTP/1.1\r\nHost: edge-a:10250\r\n\r\n");
        bad(target, request.as_bytes(), 400, "bad_target", says)
    };
    all_refused(targets.iter().map(case).collect()).await;
}

#[tokio::test]
async fn heads_that_are_too_long() {
    let request = "CONNECT edge-a:10250 HTTP/1.1\r\n";
    let too_long = |name, head: String| {
        bad(name, head.as_bytes(), 431, "head_too_long", "longer than 16384 bytes or has too many fields")
    };
    all_refused(vec![
        too_long("one field", format!("{request}X: {}\r\n\r\n", "x".repeat(MUCH))),
        too_long("no end", format!("{request}X: {}", "x".repeat(MUCH))),
        too_long("many fields", format!("{request}{}\r\n", "X: y\r\n".repeat(101))),
        too_long("a target", format!("CONNECT {}:1 HTTP/1.1\r\n\r\n", "x".repeat(MUCH))),
        too_long("a method", "X".repeat(MUCH)),
    ])
    .await;
}

#[tokio::test]
async fn nothing_of_the_clients_gets_into_the_replys_head() {
    let request = |target: &[u8]| [b"CONNECT ", target, b" HTTP/1.1\r\n\r\n"].concat();
    let (malformed, target) = ("the request cannot be understood", "the request's target is not usable");
    let much = format!("{}:1", "e".repeat(8_000));
    all_refused(vec![
        bad("CR LF", &request(b"edge-a:1\r\nX-Evil: 1"), 400, "malformed", malformed),
        bad("LF", &request(b"edge-a:1\nX-Evil: 1"), 400, "malformed", malformed),
        bad("CR", &request(b"edge-a:1\rX-Evil: 1"), 400, "malformed", malformed),
        bad("NUL", &request(b"edge-a\0:1"), 400, "malformed", malformed),
        bad("TAB", &request(b"edge-a\t:1"), 400, "malformed", malformed),
        bad("ESC", &request(b"\x1b[31medge-a:1"), 400, "malformed", malformed),
        bad("CR LF, encoded", &request(b"edge-a%0d%0aX-Evil:1:1"), 400, "bad_target", target),
        bad("quotes", &request(b"edge-a\";evil=\"1:1"), 400, "bad_target", target),
        bad("a backslash", &request(b"edge-a\\:1"), 400, "bad_target", target),
        bad("UTF-8", &request("edge-\u{e9}:1".as_bytes()), 400, "bad_target", target),
        bad("a line separator", &request("edge-a\u{2028}X-Evil:1".as_bytes()), 400, "bad_target", target),
        bad("half a character", &request(b"edge-\xc3:1"), 400, "malformed", malformed),
        bad("much", &request(much.as_bytes()), 400, "bad_target", target),
        bad("a method", b"X-EVIL: CONNECT edge-a:1 HTTP/1.1\r\n\r\n", 400, "malformed", malformed),
        bad(
            "a request id",
            b"CONNECT edge-a HTTP/1.1\r\nX-Request-Id: \x80<script>\r\nTraceparent: \"\\\r\n\r\n",
            400,
            "bad_target",
            target,
        ),
    ])
    .await;
}

#[tokio::test]
async fn heads_that_do_not_come() {
    let mut rig = Rig::impatient().await;
    let says = "the request's head did not come within 400 ms";
    for door in DOORS {
        for (name, head) in [
            ("byte by byte", format!("CONNECT edge-a:10250 HTTP/1.1\r\nX: {}", "x".repeat(MUCH))),
            ("half a head", "CONNECT edge-a:10250 HTTP/1.1\r\nX:".to_owned()),
            ("half a preface of HTTP/2", "PRI * HTTP/2.0\r\n".to_owned()),
            ("nothing", String::new()),
        ] {
            let name = format!("{door:?}: {name}");
            let case = rig.case(&name);
            let mut conn = door.open(&rig).await;
            let answer = soon(&name, drip(&mut conn, head.as_bytes())).await;
            let refusal = strict(&name, &answer).await;
            assert_eq!(refusal.status, 408, "{name}");
            assert!(refusal.reason.contains(says), "{name}: {refusal:?}");
            rig.expect(case, &[answered("h1", 408, "head_timed_out")], &["WARN", says]).await;
        }
    }
    rig.finish().await;
}

/// Sends byte after byte, or only waits when there are none left, until there is an answer; gives all of it.
async fn drip(conn: &mut Box<dyn Conn>, head: &[u8]) -> Vec<u8> {
    let mut ticks = interval(Duration::from_millis(10));
    let mut left = head.iter();
    let mut answer = vec![0; 4096];
    loop {
        tokio::select! {
            biased;
            read = conn.read(&mut answer) => {
                answer.truncate(read.unwrap());
                answer.extend(rest(conn).await);
                return answer;
            }
            _ = ticks.tick() => if let Some(byte) = left.next() {
                conn.write_all(&[*byte]).await.unwrap();
                conn.flush().await.unwrap();
            }
        }
    }
}

#[tokio::test]
async fn a_head_that_ends_half_way() {
    let mut rig = Rig::new().await;
    for door in DOORS {
        let case = rig.case(format!("{door:?}"));
        let mut conn = door.open(&rig).await;
        conn.write_all(b"CONNECT edge-a:10250 HTTP/1.1\r\nX:").await.unwrap();
        conn.shutdown().await.unwrap();
        let refusal = strict("an end", &rest(&mut conn).await).await;
        assert_eq!(refusal.status, 400);
        let says = "the connection ended in the middle of its head";
        assert!(refusal.reason.contains(says), "{refusal:?}");
        rig.expect(case, &[answered("h1", 400, "malformed")], &["WARN", says]).await;
    }
    rig.finish().await;
}

#[tokio::test]
async fn a_client_that_does_not_hang_up_behind_its_refusal_is_let_go() {
    let mut rig = Rig::new().await;
    let case = rig.case("deaf");
    let mut conn = Door::Unix.open(&rig).await;
    conn.write_all(b"GET / HTTP/1.1\r\n\r\n").await.unwrap();
    let connections = || rig.probe.sum("tunnel_server_ingress_connections", "") as usize;
    tokio::time::timeout(PATIENCE, async {
        while connections() > 1 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await
    .unwrap();
    drop(conn);
    rig.expect(case, &[answered("h1", 405, "not_connect")], &["WARN", "request refused"]).await;
    rig.finish().await;
}
