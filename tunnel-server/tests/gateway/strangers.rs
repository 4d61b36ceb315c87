//! Connections that never show who they are, at the doors of a gateway that others want to use meanwhile.

use std::{net::SocketAddr, sync::Arc};

use rustls::{ClientConfig, ClientConnection, RootCertStore, crypto::ring::default_provider};
use tokio::{net::UnixStream, task::JoinSet, time::sleep};
use tokio_util::task::AbortOnDropHandle;
use tunnel_core::{Link, TunnelStream};
use tunnel_edge::daemon::descriptors;

use super::*;
use crate::rig::{CONNECTED, Running};

/// What a stranger does once it is connected.
#[derive(Clone, Copy, Debug)]
enum Stranger {
    Silent,
    /// Sends its first message one byte at a time.
    Trickling,
    /// Sends its first message, and nothing more.
    Greeting,
}

const KINDS: [Stranger; 3] = [Stranger::Silent, Stranger::Trickling, Stranger::Greeting];

/// A client's first message, as TLS has it.
fn first_message() -> Vec<u8> {
    let config = ClientConfig::builder_with_provider(default_provider().into())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(RootCertStore::empty())
        .with_no_client_auth();
    let mut client = ClientConnection::new(Arc::new(config), "localhost".try_into().unwrap()).unwrap();
    let mut bytes = Vec::new();
    client.write_tls(&mut bytes).unwrap();
    bytes
}

/// Connects as often as that, of each kind, and stays until dropped.
async fn strangers(address: SocketAddr, of_each_kind: usize) -> Vec<AbortOnDropHandle<()>> {
    let mut connecting = JoinSet::new();
    for kind in KINDS.into_iter().cycle().take(3 * of_each_kind) {
        connecting.spawn(async move { (kind, TcpStream::connect(address).await.unwrap()) });
    }
    let message = first_message();
    let stay = |(kind, stream)| AbortOnDropHandle::new(tokio::spawn(stranger(kind, stream, message.clone())));
    connecting.join_all().await.into_iter().map(stay).collect()
}

async fn stranger(kind: Stranger, mut stream: TcpStream, message: Vec<u8>) {
    let pieces = match kind {
        Stranger::Silent => &message[..0],
        Stranger::Trickling => &message[..message.len() - 1],
        Stranger::Greeting => &message[..],
    };
    let at_a_time = if matches!(kind, Stranger::Greeting) { message.len() } else { 1 };
    for piece in pieces.chunks(at_a_time) {
        // It may have had to go.
        if stream.write_all(piece).await.is_err() {
            return;
        }
        sleep(Duration::from_millis(200)).await;
    }
    std::future::pending::<()>().await;
}

/// A client on the Unix socket that has its stream to `edge-a`, and the edge's end.
async fn connected_by_unix(running: &Running, link: &mut Link) -> (UnixStream, TunnelStream) {
    let mut client = UnixStream::connect(running.folder.path().join("door.sock")).await.unwrap();
    client.write_all(CONNECT).await.unwrap();
    let edge = pending(link).await.accept("127.0.0.1:10250".to_owned()).await.unwrap();
    let mut head = [0; CONNECTED.len()];
    timeout(PATIENCE, client.read_exact(&mut head)).await.unwrap().unwrap();
    (client, edge)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn strangers_of_any_kind_do_not_keep_an_edge_out() {
    descriptors::raise();
    // More than the waiting room has seats.
    let running = start(|settings| {
        settings.links = LinkLimits { total: 800, per_node: 4 };
        settings.handshake_timeout = PATIENCE * 6;
    })
    .await;
    let _strangers = strangers(running.edges, 500).await;
    for number in 0..3 {
        let linking = running.link("edge-a", hello("edge-a", &format!("i{number}")));
        // A second where the machine has nothing else to do.
        let _link = timeout(PATIENCE / 3, linking).await.unwrap().unwrap();
        sleep(Duration::from_millis(300)).await;
    }
    // All its seats, but for that of an edge, which needs it no more, unless another stranger has come since.
    let waiting = |count: u32| format!("tunnel_server_connections_waiting{{domain=\"edge\"}} {count}");
    running.measured_any(&[waiting(1063), waiting(1064)]).await;
    running.shutdown.cancel();
    timeout(PATIENCE, running.task).await.unwrap().unwrap().unwrap();
}

#[tokio::test]
async fn strangers_at_the_ingress_keep_nobody_out_and_take_nobody_s_place() {
    let running = start(|settings| settings.max_ingress_connections = 1).await;
    let (mut link, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    let mut silent = TcpStream::connect(running.ingress).await.unwrap();
    running.measured("tunnel_server_connections_waiting{domain=\"control_plane\"} 1").await;
    // One connection at each ingress door: the stranger has neither place.
    let _by_unix = connected_by_unix(&running, &mut link).await;
    let (mut client, mut edge) = running.connected(&mut link).await;
    assert_eq!(silent.read(&mut [0; 1]).await.unwrap(), 0, "the oldest gives up the only seat");
    running.measured("tunnel_server_ingress_connections 2").await;
    let _more = strangers(running.ingress, 10).await;
    client.write_all(b"still here").await.unwrap();
    let mut said = [0; 10];
    edge.read_exact(&mut said).await.unwrap();
    assert_eq!(&said, b"still here");
}

#[tokio::test]
async fn an_endless_handshake_is_refused_and_counted() {
    let running = start(|_| {}).await;
    let mut stranger = TcpStream::connect(running.edges).await.unwrap();
    // Records of a handshake message that is 64,000 bytes long.
    let begin = [[22, 3, 1, 0x10, 0, 1, 0, 0xfa, 0, 3, 3].as_slice(), &[0; 0x0ffa]].concat();
    stranger.write_all(&begin).await.unwrap();
    for _ in 0..15 {
        let more = [[22, 3, 1, 0x10, 0].as_slice(), &[0; 0x1000]].concat();
        if stranger.write_all(&more).await.is_err() {
            break;
        }
    }
    running.measured("tunnel_server_handshakes_failed_total{domain=\"edge\",cause=\"too_long\"} 1").await;
}
