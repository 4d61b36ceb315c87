//! One link in memory, without TLS: what the driver and the streams cost.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench fails by panicking; criterion's macros have no docs"
)]

use std::time::Duration;

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt, duplex},
    runtime::{Builder, Runtime},
    time::Instant,
};
use tunnel_core::{
    Link, LinkConfig, LinkEvent, LinkHandle, OpenRequest, TunnelStream,
    proto::messages::{Hello, Welcome},
};

const TIMEOUT: Duration = Duration::from_secs(30);
const BULK: usize = 4 << 20;

async fn echo(mut stream: TunnelStream) {
    let (mut reader, mut writer) = tokio::io::split(&mut stream);
    if tokio::io::copy(&mut reader, &mut writer).await.is_ok() {
        let _ = stream.shutdown().await;
    }
}

/// A link whose edge echoes every stream.
async fn echoing_link() -> LinkHandle {
    let (near, far) = duplex(256 * 1024);
    let config = LinkConfig::default();
    let hello = Hello { min_version: 1, max_version: 1, ..Hello::default() };
    let welcome = Welcome { version: 1, heartbeat_ms: 10_000, ..Welcome::default() };
    let (edge, gateway) = tokio::join!(Link::connect(near, hello, config), async {
        Link::accept(far, config).await.unwrap().welcome(welcome).unwrap()
    });
    let (mut edge, mut gateway) = (edge.unwrap().0, gateway);
    let handle = gateway.handle();
    tokio::spawn(async move { while !matches!(gateway.next().await, LinkEvent::Closed(_)) {} });
    tokio::spawn(async move {
        while let LinkEvent::Stream(incoming) = edge.next().await {
            tokio::spawn(async move {
                let pending = incoming.header(Instant::now() + TIMEOUT).await.unwrap();
                echo(pending.accept(String::new()).await.unwrap()).await;
            });
        }
    });
    handle
}

async fn open(link: &LinkHandle) -> TunnelStream {
    let request = OpenRequest { target: "edge-a:10250".to_owned(), ..OpenRequest::default() };
    link.open(request, TIMEOUT).await.unwrap().0
}

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn link(criterion: &mut Criterion) {
    let runtime = runtime();
    let handle = runtime.block_on(echoing_link());

    criterion.bench_function("stream/open, one byte each way, end", |bencher| {
        bencher.to_async(&runtime).iter(|| async {
            let mut stream = open(&handle).await;
            stream.write_all(b"x").await.unwrap();
            stream.shutdown().await.unwrap();
            stream.read_to_end(&mut Vec::new()).await.unwrap();
        });
    });

    let mut stream = runtime.block_on(open(&handle));
    criterion.bench_function("stream/64-byte ping-pong", |bencher| {
        bencher.iter(|| {
            runtime.block_on(async {
                stream.write_all(&[7; 64]).await.unwrap();
                stream.read_exact(&mut [0; 64]).await.unwrap();
            });
        });
    });

    let mut group = criterion.benchmark_group("bulk");
    group.throughput(Throughput::Bytes(BULK as u64 * 2)).sample_size(20);
    for streams in [1, 8] {
        group.bench_function(format!("{streams} streams there and back"), |bencher| {
            bencher.to_async(&runtime).iter(|| async {
                let transfers = (0..streams).map(|_| async {
                    let mut stream = open(&handle).await;
                    let (mut reader, mut writer) = tokio::io::split(&mut stream);
                    let bytes = vec![1; BULK / streams];
                    let send = async {
                        writer.write_all(&bytes).await.unwrap();
                        writer.shutdown().await.unwrap();
                    };
                    let mut sink = tokio::io::sink();
                    let ((), received) = tokio::join!(send, tokio::io::copy(&mut reader, &mut sink));
                    assert_eq!(received.unwrap(), bytes.len() as u64);
                });
                futures_util::future::join_all(transfers).await;
            });
        });
    }
}

criterion_group!(benches, link);
criterion_main!(benches);
