//! Ends are exact: an end of file is an end of file at the other side, and anything else is a reset, which is checked on
//! the raw sockets, below TLS.

use std::{io, time::Duration};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, Interest},
    net::{TcpStream, UnixStream},
    task::JoinHandle,
};
use tunnel_tests::connect::connect;

use crate::rig::{Client, Rig, assert_reset, ping, raw, raw_end, within};

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_ends_first_still_gets_the_answer() {
    let rig = Rig::start().await;
    let (mut client, mut target) = rig.pair("edge-a", 0).await;
    client.write_all(b"the question").await.unwrap();
    client.shutdown().await.unwrap();
    let mut question = String::new();
    within("the question", target.read_to_string(&mut question)).await.unwrap();
    assert_eq!(question, "the question");

    target.write_all(b"the answer").await.unwrap();
    target.shutdown().await.unwrap();
    let mut answer = String::new();
    within("the answer", client.read_to_string(&mut answer)).await.unwrap();
    assert_eq!(answer, "the answer");
    // What a clean end is to the kernel, and that the resets below are none of these.
    assert_eq!((raw_end(raw(client)).await, raw_end(target).await), (Ok(()), Ok(())));
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_target_that_ends_first_still_gets_the_clients_bytes() {
    let rig = Rig::start().await;
    let (mut client, mut target) = rig.pair("edge-a", 0).await;
    target.write_all(b"goodbye").await.unwrap();
    target.shutdown().await.unwrap();
    let mut goodbye = String::new();
    within("the goodbye", client.read_to_string(&mut goodbye)).await.unwrap();
    assert_eq!(goodbye, "goodbye");

    client.write_all(b"the last words").await.unwrap();
    client.shutdown().await.unwrap();
    let mut words = String::new();
    within("the last words", target.read_to_string(&mut words)).await.unwrap();
    assert_eq!(words, "the last words");
    assert_eq!((raw_end(raw(client)).await, raw_end(target).await), (Ok(()), Ok(())));
    rig.close().await;
}

/// A stream that has carried bytes both ways.
async fn running(rig: &Rig, host: &str, kubelet: usize) -> (Client, TcpStream) {
    let (mut client, mut target) = rig.pair(host, kubelet).await;
    ping(&mut client, &mut target).await;
    (client, target)
}

#[allow(clippy::needless_pass_by_value, reason = "dropping it is what resets")]
fn reset_target(target: TcpStream) {
    target.set_zero_linger().unwrap();
}

#[allow(clippy::needless_pass_by_value, reason = "dropping it is what resets")]
fn reset_client(client: Client) {
    client.get_ref().0.set_zero_linger().unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_of_the_target_is_a_reset_at_the_client() {
    let rig = Rig::start().await;
    let (client, target) = running(&rig, "edge-a", 0).await;
    reset_target(target);
    assert_reset("the client", [raw(client)]).await;
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_of_the_client_is_a_reset_at_the_target() {
    let rig = Rig::start().await;
    let (client, target) = running(&rig, "edge-a", 0).await;
    reset_client(client);
    assert_reset("the target", [target]).await;
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_behind_the_other_sides_half_close_is_still_a_reset() {
    let rig = Rig::start().await;
    let (mut client, mut target) = running(&rig, "edge-a", 0).await;
    client.shutdown().await.unwrap();
    assert_eq!(within("the client's end", target.read(&mut [0; 8])).await.unwrap(), 0);
    target.write_all(b"half an answer").await.unwrap();
    within("half an answer", client.read_exact(&mut [0; 14])).await.unwrap();
    reset_target(target);
    assert_reset("the client that had ended", [raw(client)]).await;

    let (mut client, mut target) = running(&rig, "edge-a", 0).await;
    target.shutdown().await.unwrap();
    assert_eq!(within("the target's end", client.read(&mut [0; 8])).await.unwrap(), 0);
    client.write_all(b"half a file").await.unwrap();
    client.flush().await.unwrap();
    within("half a file", target.read_exact(&mut [0; 11])).await.unwrap();
    reset_client(client);
    assert_reset("the target that had ended", [target]).await;
    rig.close().await;
}

/// A client that goes away without `close_notify` has not ended its stream, even if its socket has.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_end_of_tcp_that_is_no_end_of_tls_is_a_reset_at_the_target() {
    let rig = Rig::start().await;
    let (client, target) = running(&rig, "edge-a", 0).await;
    let mut tcp = raw(client);
    tcp.shutdown().await.unwrap();
    assert_reset("the target", [target]).await;
    assert_reset("the client", [tcp]).await;
    rig.close().await;
}

/// A stream whose target sends all the time, and the error that ends it.
async fn flowing(rig: &Rig) -> (Client, JoinHandle<io::ErrorKind>) {
    let (mut client, mut target) = running(rig, "edge-a", 0).await;
    let sending = tokio::spawn(async move {
        let piece = vec![7; 64 * 1024];
        loop {
            if let Err(error) = target.write_all(&piece).await {
                return error.kind();
            }
        }
    });
    within("the first of many bytes", client.read_exact(&mut vec![0; 1 << 20])).await.unwrap();
    (client, sending)
}

/// What must be true when a process in the middle is gone.
async fn assert_all_reset(
    what: &str,
    (client, target): (Client, TcpStream),
    (reader, sending): (Client, JoinHandle<io::ErrorKind>),
) {
    assert_reset(what, [raw(client), target, raw(reader)]).await;
    let error = within("the sender's error", sending).await.unwrap();
    assert!(matches!(error, io::ErrorKind::ConnectionReset | io::ErrorKind::BrokenPipe), "{what}: {error}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_dropped_resets_both_ends_of_its_streams() {
    let mut rig = Rig::start().await;
    let (idle, busy) = (running(&rig, "edge-a", 0).await, flowing(&rig).await);
    rig.gateway.take().unwrap().kill().await;
    assert_all_reset("the gateway is gone", idle, busy).await;
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_edge_that_is_dropped_resets_both_ends_of_its_streams_and_no_other() {
    let mut rig = Rig::start().await;
    let (idle, busy) = (running(&rig, "edge-a", 0).await, flowing(&rig).await);
    let (mut client, mut target) = running(&rig, "edge-b", 1).await;
    rig.edges[0].take().unwrap().kill().await;
    assert_all_reset("the edge is gone", idle, busy).await;
    ping(&mut client, &mut target).await;
    drop((client, target));
    rig.close().await;
}

/// Nothing is sent behind a reset: the client must hear of it at once, not when it next speaks.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reset_is_heard_at_once() {
    let rig = Rig::start_alone().await;
    let (client, target) = running(&rig, "edge-a", 0).await;
    let begun = tokio::time::Instant::now();
    reset_target(target);
    assert_reset("the client", [raw(client)]).await;
    assert!(begun.elapsed() < Duration::from_secs(1), "took {:?}", begun.elapsed());
    rig.close().await;
}

/// The socket fails, whether or not its far side's direction has ended.
async fn fails(socket: TcpStream) {
    within("the failure", socket.ready(Interest::ERROR)).await.unwrap();
    assert!(socket.take_error().unwrap().is_some());
}

/// The target hangs, and only its edge can end the stream.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_gateway_that_is_dropped_ends_half_closed_streams_at_the_edge() {
    let mut rig = Rig::start_alone().await;
    let (mut client, mut target) = running(&rig, "edge-a", 0).await;
    client.shutdown().await.unwrap();
    assert_eq!(within("the client's end", target.read(&mut [0; 8])).await.unwrap(), 0);
    tokio::time::sleep(Duration::from_secs(1)).await;
    let begun = tokio::time::Instant::now();
    rig.gateway.take().unwrap().kill().await;
    fails(target).await;
    assert!(begun.elapsed() < Duration::from_secs(1), "took {:?}", begun.elapsed());
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_on_the_unix_socket_that_exits_is_noticed_while_its_target_is_silent() {
    let rig = Rig::start_alone().await;
    for ends_before in [false, true] {
        let mut client = UnixStream::connect(&rig.unix).await.unwrap();
        let wanted = rig.target("edge-a");
        let (connected, mut target) = tokio::join!(connect(&mut client, &wanted), rig.accept(0));
        connected.unwrap().unwrap();
        ping(&mut client, &mut target).await;
        if ends_before {
            client.shutdown().await.unwrap();
            tokio::time::sleep(Duration::from_secs(1)).await;
            assert_eq!(rig.probe.active_streams(), 1, "the client only ended its direction");
        }
        let begun = tokio::time::Instant::now();
        drop(client);
        // At the edge, and at the gateway.
        assert_eq!(within("the client's end", target.read(&mut [0; 8])).await.unwrap(), 0);
        fails(target).await;
        rig.relaying(0).await;
        assert!(begun.elapsed() < Duration::from_secs(1), "took {:?}", begun.elapsed());
    }
    rig.close().await;
}
