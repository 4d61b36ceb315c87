//! One link in memory, without TLS: what the driver and the streams cost.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench fails by panicking; criterion's macros have no docs"
)]

use criterion::{Criterion, Throughput, criterion_group, criterion_main};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    runtime::{Builder, Runtime},
};
use tunnel_benches::{echo, link_to, open};

const BULK: usize = 4 << 20;

fn runtime() -> Runtime {
    Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

fn link(criterion: &mut Criterion) {
    let runtime = runtime();
    let (handle, _tasks) = runtime.block_on(link_to(echo));

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
