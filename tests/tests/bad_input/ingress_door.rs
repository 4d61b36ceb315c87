//! The private door's TLS, and who may ask.

use rustls::AlertDescription;
use tokio::{io::AsyncWriteExt, net::TcpStream};
use tunnel_core::tls::Domain;
use tunnel_server::pki::Profile;
use tunnel_tests::connect::connect;

use crate::{
    client::{Credential, alert, refusals, rest, tls},
    rig::{Rig, answered, handshake_failed, soon},
};

const HTTP: &[&[u8]] = &[b"http/1.1"];

#[tokio::test]
async fn certificates_that_are_none_of_the_control_plane() {
    let mut rig = Rig::new().await;
    let client = Profile::Client { name: "control-plane".to_owned() };
    let other = ("an edge's", Credential::edge("edge-a"));
    for (name, credential, alerted, cause, text) in refusals(Domain::ControlPlane, &client, other) {
        let case = rig.case(name);
        let connected = tls(rig.ingress_door, Domain::ControlPlane, credential, HTTP).await;
        assert_eq!(alert(connected).await, alerted, "{name}");
        let words = ["WARN", "TLS handshake failed", "domain=control-plane", text];
        rig.expect(case, &[handshake_failed("control_plane", cause)], &words).await;
    }
    rig.finish().await;
}

#[tokio::test]
async fn other_bytes_and_other_protocols() {
    let mut rig = Rig::new().await;
    let case = rig.case("HTTP without TLS");
    let mut socket = TcpStream::connect(rig.ingress_door).await.unwrap();
    socket.write_all(b"CONNECT edge-a:10250 HTTP/1.1\r\n\r\n").await.unwrap();
    assert_eq!(rest(&mut socket).await.first(), Some(&0x15), "not a TLS alert");
    let words = ["WARN", "domain=control-plane", "what came is not TLS"];
    rig.expect(case, &[handshake_failed("control_plane", "not_tls")], &words).await;

    let case = rig.case("an edge at the wrong port");
    let client = Some(Credential::client("control-plane"));
    let connected = tls(rig.ingress_door, Domain::ControlPlane, client, &[b"edge-tunnel/1"]).await;
    assert_eq!(alert(connected).await, AlertDescription::NoApplicationProtocol);
    let words = ["WARN", "no application protocol (ALPN) in common"];
    rig.expect(case, &[handshake_failed("control_plane", "alpn")], &words).await;
    rig.finish().await;
}

#[tokio::test]
async fn silence_before_tls() {
    let mut rig = Rig::impatient().await;
    let case = rig.case("silence");
    let mut socket = TcpStream::connect(rig.ingress_door).await.unwrap();
    assert_eq!(rest(&mut socket).await, b"");
    let words = ["WARN", "domain=control-plane", "not finished within 400 ms"];
    rig.expect(case, &[handshake_failed("control_plane", "timeout")], &words).await;
    rig.finish().await;
}

#[tokio::test]
async fn a_client_that_is_not_on_the_list() {
    let mut rig = Rig::new().await;
    let case = rig.case("a stranger");
    let stranger = Some(Credential::client("stranger"));
    let mut stream = tls(rig.ingress_door, Domain::ControlPlane, stranger, HTTP).await.unwrap();
    let target = format!("edge-a:{}", rig.echo.port());
    let refusal = soon("a refusal", connect(&mut stream, &target)).await.unwrap().unwrap_err();
    refusal.check().unwrap();
    assert_eq!(refusal.status, 403);
    assert!(refusal.reason.contains("client stranger may not use this gateway"), "{}", refusal.reason);
    assert!(refusal.header("proxy-status").contains("error=http_request_denied"));
    let words = ["WARN", "request refused", "client=\"stranger\"", "not among the allowed clients"];
    rig.expect(case, &[answered("h1", 403, "client_not_allowed")], &words).await;
    rig.finish().await;
}
