//! The sans-IO part: what one control message, one stream header and one parsed target cost.

#![allow(
    clippy::unwrap_used,
    missing_docs,
    reason = "a bench fails by panicking; criterion's macros have no docs"
)]

use std::hint::black_box;

use bytes::BytesMut;
use criterion::{Criterion, criterion_group, criterion_main};
use tunnel_core::{
    Target,
    proto::{
        frame,
        messages::{Control, End, Open, control::Kind},
    },
};

fn codec(criterion: &mut Criterion) {
    let open = Open {
        stream: 4242,
        target: "edge-a:10250".to_owned(),
        request_id: "6f2b8e0c-51".to_owned(),
        traceparent: "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01".to_owned(),
        caller: "kube-apiserver".to_owned(),
        ..Open::default()
    };
    criterion.bench_function("open/encode and decode", |bencher| {
        let mut wire = BytesMut::with_capacity(4096);
        bencher.iter(|| {
            frame::encode(black_box(&open), &mut wire).unwrap();
            frame::decode::<Open>(&mut wire).unwrap()
        });
    });
    let end = Control { kind: Some(Kind::End(End { stream: 4242, direction: 1, total_bytes: 1 << 40 })) };
    criterion.bench_function("end/encode and decode", |bencher| {
        let mut wire = BytesMut::with_capacity(4096);
        bencher.iter(|| {
            frame::encode(black_box(&end), &mut wire).unwrap();
            frame::decode::<Control>(&mut wire).unwrap()
        });
    });
    criterion.bench_function("target/parse", |bencher| {
        bencher.iter(|| black_box("edge-a.site-7.example:10250").parse::<Target>().unwrap());
    });
}

criterion_group!(benches, codec);
criterion_main!(benches);
