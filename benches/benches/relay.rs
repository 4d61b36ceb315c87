//! The relay between a TCP socket and a stream of a link in memory, whose edge sends everything back: from connecting to
//! the end.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench fails by panicking; criterion's macros have no docs"
)]

use std::future::pending;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use futures_util::future::join_all;
use tokio::{
    io::{AsyncWriteExt, copy, sink},
    net::{TcpListener, TcpStream},
    runtime::Builder,
};
use tunnel_benches::{echo, link_to, open};
use tunnel_core::{LinkHandle, RelayEnd, Socket, Timeouts, relay};

const BULK: usize = 4 << 20;

/// Two ends of one TCP connection on loopback.
async fn connection(listener: &TcpListener) -> (TcpStream, TcpStream) {
    let (near, far) = tokio::join!(TcpStream::connect(listener.local_addr().unwrap()), listener.accept());
    (near.unwrap(), far.unwrap().0)
}

/// Sends bytes by a socket, a relay and a link, and has all of them back.
async fn there_and_back(client: TcpStream, leg: TcpStream, link: &LinkHandle, bytes: &[u8]) {
    let relayed =
        tokio::spawn(relay(Socket::new(leg), open(link).await, Timeouts::of("the bench"), pending()));
    let (mut reader, mut writer) = client.into_split();
    let send = async {
        writer.write_all(bytes).await.unwrap();
        writer.shutdown().await.unwrap();
    };
    let mut nowhere = sink();
    let ((), received) = tokio::join!(send, copy(&mut reader, &mut nowhere));
    assert_eq!(received.unwrap(), bytes.len() as u64);
    assert_eq!(relayed.await.unwrap().end, RelayEnd::Clean);
}

fn relays(criterion: &mut Criterion) {
    let runtime = Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let (link, _tasks) = runtime.block_on(link_to(echo));
    let listener = runtime.block_on(TcpListener::bind("127.0.0.1:0")).unwrap();
    let bytes = vec![1; BULK];

    let mut group = criterion.benchmark_group("relay");
    group.throughput(Throughput::Bytes(BULK as u64 * 2)).sample_size(20);
    for streams in [1, 8] {
        group.bench_function(format!("{streams} streams there and back"), |bencher| {
            bencher.to_async(&runtime).iter(|| async {
                let mut connections = Vec::new();
                for _ in 0..streams {
                    connections.push(connection(&listener).await);
                }
                let each = &bytes[..BULK / streams];
                join_all(
                    connections.into_iter().map(|(client, leg)| there_and_back(client, leg, &link, each)),
                )
                .await;
            });
        });
    }
}

criterion_group!(benches, relays);
criterion_main!(benches);
