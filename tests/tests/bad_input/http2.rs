//! HTTP/2 as it should not be: written frame by frame where a client library would not go along.

use bytes::{BufMut, Bytes, BytesMut};
use http::{Method, Request, StatusCode};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpStream, UnixStream},
};
use tokio_rustls::client::TlsStream;
use tokio_util::task::AbortOnDropHandle;
use tunnel_core::tls::Domain;

use crate::{
    client::{Credential, rest, tls},
    rig::{Rig, answered, soon, until},
};

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Types of frames (RFC 9113, section 6).
const HEADERS: u8 = 1;
const RST_STREAM: u8 = 3;
const SETTINGS: u8 = 4;
const PING: u8 = 6;
const GOAWAY: u8 = 7;
/// HEADERS that are whole and leave their stream open.
const END_HEADERS: u8 = 4;

fn frame(out: &mut BytesMut, kind: u8, flags: u8, stream: u32, body: &[u8]) {
    out.put_slice(&(body.len() as u32).to_be_bytes()[1..]);
    out.put_u8(kind);
    out.put_u8(flags);
    out.put_u32(stream);
    out.put_slice(body);
}

/// Fields as HPACK literals without indexing (RFC 7541, section 6.2.2); none longer than 126 bytes.
fn fields(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut block = Vec::new();
    for (name, value) in fields {
        block.push(0);
        for text in [name, value] {
            block.push(text.len() as u8);
            block.extend_from_slice(text.as_bytes());
        }
    }
    block
}

/// A frame that came: type, stream, body.
type Frame = (u8, u32, Vec<u8>);

async fn read_frame(conn: &mut TlsStream<TcpStream>) -> Frame {
    let reading = async {
        let mut head = [0; 9];
        conn.read_exact(&mut head).await.unwrap();
        let length = u32::from_be_bytes([0, head[0], head[1], head[2]]);
        let mut body = vec![0; length as usize];
        conn.read_exact(&mut body).await.unwrap();
        (head[3], u32::from_be_bytes([head[5], head[6], head[7], head[8]]), body)
    };
    soon("a frame", reading).await
}

/// The next frame of one of these types.
async fn frame_of(conn: &mut TlsStream<TcpStream>, kinds: &[u8]) -> Frame {
    loop {
        let frame = read_frame(conn).await;
        if kinds.contains(&frame.0) {
            return frame;
        }
    }
}

/// A connection on which these frames, behind a good beginning, have been said.
async fn say(rig: &Rig, frames: &[u8]) -> TlsStream<TcpStream> {
    let client = Some(Credential::client("control-plane"));
    let mut conn = tls(rig.ingress_door, Domain::ControlPlane, client, &[b"h2"]).await.unwrap();
    let mut out = BytesMut::from(PREFACE);
    frame(&mut out, SETTINGS, 0, 0, &[]);
    out.extend_from_slice(frames);
    // The gateway may have had enough before the end.
    let _ = conn.write_all(&out).await;
    let _ = conn.flush().await;
    conn
}

/// A good client.
async fn client(rig: &Rig) -> (h2::client::SendRequest<Bytes>, AbortOnDropHandle<()>) {
    let client = Some(Credential::client("control-plane"));
    let conn = tls(rig.ingress_door, Domain::ControlPlane, client, &[b"h2"]).await.unwrap();
    let (requests, connection) = soon("an HTTP/2 handshake", h2::client::handshake(conn)).await.unwrap();
    let driver = AbortOnDropHandle::new(tokio::spawn(async move {
        let _ = connection.await;
    }));
    (requests.ready().await.unwrap(), driver)
}

#[tokio::test]
async fn garbage_behind_the_preface() {
    let mut rig = Rig::new().await;
    let mut settings_of_a_stream = BytesMut::new();
    frame(&mut settings_of_a_stream, SETTINGS, 0, 1, &[]);
    let mut too_long = BytesMut::new();
    too_long.put_slice(&[0xff, 0xff, 0xff, HEADERS, 0, 0, 0, 0, 1]);
    let mut bad_block = BytesMut::new();
    frame(&mut bad_block, HEADERS, END_HEADERS, 1, &[0x80]);
    let connect = |field| {
        let mut frames = BytesMut::new();
        let block = fields(&[(":method", "CONNECT"), (":authority", "edge-a:1"), field]);
        frame(&mut frames, HEADERS, END_HEADERS, 1, &block);
        frames
    };
    for (name, frames) in [
        ("a field in capitals", &connect(("X-Evil", "1"))[..]),
        ("a new line in a field", &connect(("x", "a\r\nb"))),
        ("text", b"GET / HTTP/1.1\r\nHost: edge-a\r\n\r\n"),
        ("high bytes", &[0xff; 64]),
        ("settings of a stream", &settings_of_a_stream),
        ("a frame of 16 MiB", &too_long),
        ("fields that do not decode", &bad_block),
    ] {
        let case = rig.case(name);
        let mut conn = say(&rig, frames).await;
        let (_, _, goaway) = frame_of(&mut conn, &[GOAWAY]).await;
        assert_ne!(goaway[4..8], [0; 4], "{name}: no error in {goaway:?}");
        rest(&mut conn).await;
        let words = ["WARN", "the HTTP/2 connection was ended: the client broke the protocol"];
        rig.expect(case, &[answered("h2", 400, "malformed")], &words).await;
    }
    rig.finish().await;
}

#[tokio::test]
async fn alpn_without_its_protocol() {
    let mut rig = Rig::new().await;
    let case = rig.case("HTTP/1.1 where h2 was agreed on");
    let client = Some(Credential::client("control-plane"));
    let mut conn = tls(rig.ingress_door, Domain::ControlPlane, client, &[b"h2"]).await.unwrap();
    conn.write_all(b"CONNECT edge-a:10250 HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    rest(&mut conn).await;
    let words = ["WARN", "the client broke the protocol"];
    rig.expect(case, &[answered("h2", 400, "malformed")], &words).await;
    rig.finish().await;
}

#[tokio::test]
async fn a_preface_that_does_not_come() {
    let mut rig = Rig::impatient().await;
    let case = rig.case("silence behind the handshake");
    let client = Some(Credential::client("control-plane"));
    let mut conn = tls(rig.ingress_door, Domain::ControlPlane, client, &[b"h2"]).await.unwrap();
    rest(&mut conn).await;
    let words = ["WARN", "the HTTP/2 connection did not begin in time"];
    rig.expect(case, &[answered("h2", 408, "head_timed_out")], &words).await;

    let case = rig.case("a preface and silence, on the Unix door");
    let mut conn = UnixStream::connect(&rig.unix_door).await.unwrap();
    conn.write_all(&PREFACE[..20]).await.unwrap();
    let answer = rest(&mut conn).await;
    assert!(answer.starts_with(b"HTTP/1.1 408 "), "{:?}", String::from_utf8_lossy(&answer));
    rig.expect(case, &[answered("h1", 408, "head_timed_out")], &["WARN", "did not come within"]).await;
    rig.finish().await;
}

#[tokio::test]
async fn requests_that_are_refused() {
    let mut rig = Rig::new().await;
    let (mut requests, driver) = client(&rig).await;
    for (method, uri, status, cause, says) in [
        (Method::GET, "https://edge-a/", 405, "not_connect", "GET is not served here: use CONNECT host:port"),
        (Method::POST, "https://edge-a/x", 405, "not_connect", "POST is not served here"),
        (Method::CONNECT, "edge-a", 400, "bad_target", "has no port: give host:port, not a URL"),
        (Method::CONNECT, "edge-a:0", 400, "bad_target", "the port must be a number from 1 to 65535"),
        (Method::CONNECT, "user@edge-a:1", 400, "bad_target", "is neither a host name"),
        (Method::CONNECT, "nobody:10250", 404, "no_such_node", "no such node: nobody"),
    ] {
        let case = rig.case(format!("{method} {uri}"));
        let connects = method == Method::CONNECT;
        let request = Request::builder().method(method).uri(uri).header("x-request-id", "\"evil\"");
        let (response, _body) = requests.send_request(request.body(()).unwrap(), !connects).unwrap();
        let response = soon("a response", response).await.unwrap();
        assert_eq!(response.status(), StatusCode::from_u16(status).unwrap(), "{uri}");
        let header =
            |name| response.headers().get(name).map(|value| value.to_str().unwrap()).unwrap_or_default();
        assert!(header("proxy-status").contains(says), "{uri}: {:?}", response.headers());
        assert_eq!(header("allow"), if status == 405 { "CONNECT" } else { "" });
        let body = soon("the body", response.into_body().data()).await.unwrap().unwrap();
        assert!(body.ends_with(b"\n") && String::from_utf8_lossy(&body).contains(says), "{uri}: {body:?}");
        rig.expect(case, &[answered("h2", status, cause)], &["WARN", "request refused", says]).await;
        requests = requests.ready().await.unwrap();
    }
    drop((requests, driver));
    rig.finish().await;
}

#[tokio::test]
async fn streams_that_break_the_protocol_leave_their_connection_alone() {
    let mut rig = Rig::new().await;
    let connect = (":method", "CONNECT");
    let authority = (":authority", "edge-a:10250");
    let extended = [connect, authority, (":protocol", "websocket"), (":scheme", "https"), (":path", "/")];
    for (name, head) in [
        ("no method", &[authority][..]),
        ("an authority with a space", &[connect, (":authority", "edge a:1")]),
        ("extended CONNECT", &extended),
    ] {
        let case = rig.case(name);
        let mut frames = BytesMut::new();
        frame(&mut frames, HEADERS, END_HEADERS, 1, &fields(head));
        frame(&mut frames, PING, 0, 0, b"living??");
        let mut conn = say(&rig, &frames).await;
        // Which of them comes first is nobody's business.
        let mut answers =
            [frame_of(&mut conn, &[RST_STREAM, PING]).await, frame_of(&mut conn, &[RST_STREAM, PING]).await];
        answers.sort();
        let protocol_error = (RST_STREAM, 1, vec![0, 0, 0, 1]);
        assert_eq!(answers, [protocol_error, (PING, 0, b"living??".to_vec())], "{name}");
        drop(conn);
        // The HTTP/2 library answers these by itself, and tells nobody: there is no line and no counter.
        rig.expect(case, &[], &[]).await;
    }

    let case = rig.case("CONNECT without an authority");
    let mut frames = BytesMut::new();
    frame(&mut frames, HEADERS, END_HEADERS, 1, &fields(&[connect]));
    let mut conn = say(&rig, &frames).await;
    assert_eq!(frame_of(&mut conn, &[HEADERS]).await.1, 1);
    let says = "has no port";
    rig.expect(case, &[answered("h2", 400, "bad_target")], &["WARN", "request refused", says]).await;
    drop(conn);
    rig.finish().await;
}

#[tokio::test]
async fn fields_that_are_too_long() {
    let mut rig = Rig::new().await;
    let (mut requests, driver) = client(&rig).await;
    let case = rig.case("20,000 bytes");
    let request =
        Request::builder().method(Method::CONNECT).uri("edge-a:10250").header("x", "x".repeat(20_000));
    let (response, _body) = requests.send_request(request.body(()).unwrap(), false).unwrap();
    let response = soon("a response", response).await.unwrap();
    assert_eq!(response.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    let says = "the request's head is longer than 16384 bytes";
    rig.expect(case, &[answered("h2", 431, "head_too_long")], &["WARN", "request refused", says]).await;

    // The HTTP/2 library answers this by itself, and tells nobody: there is no line and no counter.
    let case = rig.case("80,000 bytes");
    requests = requests.ready().await.unwrap();
    let request =
        Request::builder().method(Method::CONNECT).uri("edge-a:10250").header("x", "x".repeat(80_000));
    let (response, _body) = requests.send_request(request.body(()).unwrap(), false).unwrap();
    let response = soon("a response", response).await.unwrap();
    assert_eq!(response.status(), StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE);
    rig.expect(case, &[], &[]).await;
    drop((requests, driver));
    rig.finish().await;
}

#[tokio::test]
async fn thousands_of_streams_reset_as_soon_as_they_are_opened() {
    let mut rig = Rig::new().await;
    let case = rig.case("rapid reset");
    let authority = format!("edge-a:{}", rig.echo.port());
    let block = fields(&[(":method", "CONNECT"), (":authority", &authority)]);
    let mut frames = BytesMut::new();
    for number in 0..10_000 {
        frame(&mut frames, HEADERS, END_HEADERS, 2 * number + 1, &block);
        // CANCEL
        frame(&mut frames, RST_STREAM, 0, 2 * number + 1, &[0, 0, 0, 8]);
    }
    let mut conn = say(&rig, &frames).await;
    let (_, _, goaway) = frame_of(&mut conn, &[GOAWAY]).await;
    // ENHANCE_YOUR_CALM
    assert_eq!(goaway[4..8], [0, 0, 0, 11]);
    rest(&mut conn).await;
    until("that nothing is left of them", || (rig.probe.active_streams() == 1).then_some(())).await;
    let words = ["WARN", "the client asked too much of it", "it gave up, or spoiled, too many requests"];
    rig.expect_some(case, "tunnel_server_", &words).await;
    rig.finish().await;
}
