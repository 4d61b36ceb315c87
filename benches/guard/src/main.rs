//! What the regression guard counts instructions of: fixed pieces of work on one thread, the same each time. Run by
//! `benches/guard/run` under callgrind, never for its own sake.
//!
//! `session` is the multiplexer without I/O; the others have the whole stack over a pipe in memory: link, streams, relay.
//! TLS and sockets are not in it, which are others' work.

#![allow(clippy::unwrap_used, reason = "a measurement that goes wrong shall fail")]

use std::{
    collections::VecDeque,
    future::pending,
    task::{Context, Poll, Waker},
    time::Instant,
};

use bytes::Buf;
use clap::{Parser, ValueEnum};
use tokio::{
    io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, copy, sink, split},
    net::UnixStream,
    runtime::Builder,
    task::JoinSet,
};
use tunnel_benches::{echo, link_to, open};
use tunnel_core::{
    Aborted, LinkHandle, Timeouts, TunnelStream, UnixSocket,
    proto::{
        Side,
        yamux::{Batch, Config, Session},
    },
    relay,
};

const MIB: usize = 1 << 20;
const TIMEOUTS: Timeouts = Timeouts::of("the guard");

#[derive(Debug, Parser)]
#[command(name = "tunnel-guard")]
struct Args {
    work: Work,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Work {
    /// Nothing but the start: what is taken off the others.
    Nothing,
    /// 64 MiB on eight streams, between two sessions without I/O.
    Session,
    /// 32 MiB on eight streams to the edge and back.
    Bulk,
    /// 4,000 times 64 bytes to the edge and back.
    Ping,
    /// 1,000 streams, opened, with one byte each way, and ended.
    Open,
    /// 32 MiB from one pipe to another by way of a stream, with a relay at both ends.
    Relay,
}

fn main() {
    let work = Args::parse().work;
    if matches!(work, Work::Session) {
        return session();
    }
    Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        let (link, _tasks) = link_to(echo_by_relay).await;
        match work {
            Work::Nothing | Work::Session => {}
            Work::Bulk => bulk(&link, 8, 32 * MIB).await,
            Work::Ping => ping(&link, 4000).await,
            Work::Open => opens(&link, 1000).await,
            Work::Relay => relayed(&link, 32 * MIB).await,
        }
    });
}

fn session() {
    let (now, config) = (Instant::now(), Config { max_streams: 64, window_budget: 0 });
    let (mut near, mut far) = (Session::new(Side::Dialer, config), Session::new(Side::Acceptor, config));
    let cx = &mut Context::from_waker(Waker::noop());
    let numbers: Vec<u32> = (0..8)
        .map(|_| match near.poll_open(&mut None, cx, now) {
            Poll::Ready(number) => number.unwrap(),
            Poll::Pending => panic!("no stream could be opened"),
        })
        .collect();
    let piece = vec![7; 64 * 1024];
    let (mut received, mut segments) = (0, VecDeque::new());
    while received < 64 * MIB {
        for number in &numbers {
            let _ = near.poll_write(*number, cx, &piece);
            carry(&mut near, &mut far, now);
            while far.poll_read(*number, cx, &mut segments, 64 * 1024, now).is_ready() && !segments.is_empty()
            {
                received += segments.drain(..).map(|segment| segment.len()).sum::<usize>();
            }
            carry(&mut far, &mut near, now);
        }
    }
}

fn carry(from: &mut Session, to: &mut Session, now: Instant) {
    let cx = &mut Context::from_waker(Waker::noop());
    let mut batch = Batch::default();
    from.transmit(&mut batch, 64 * 1024, cx, now);
    while batch.has_remaining() {
        let chunk = batch.chunk();
        to.receive(chunk, now).unwrap();
        let length = chunk.len();
        batch.advance(length);
    }
    drop((from.take_wakes(), to.take_wakes()));
}

/// Echoes what comes, on the other side of a relay and a socket.
async fn echo_by_relay(stream: TunnelStream) {
    let (near, target) = UnixStream::pair().unwrap();
    // A task of its own, as a target is: else each would be asked whenever the other is woken.
    let target = tokio::spawn(echo(target));
    relay(stream, UnixSocket::new(near), TIMEOUTS, pending_stop()).await;
    target.await.unwrap();
}

async fn bulk(link: &LinkHandle, streams: usize, bytes: usize) {
    let mut running = JoinSet::new();
    for _ in 0..streams {
        let stream = open(link).await;
        running.spawn(there_and_back(stream, bytes / streams));
    }
    running.join_all().await;
}

/// Sends so many bytes while as many are read.
async fn there_and_back(stream: impl AsyncRead + AsyncWrite + Send + 'static, bytes: usize) {
    let (mut reader, mut writer) = split(stream);
    let piece = vec![1; 64 * 1024];
    let send = async {
        for _ in 0..bytes / piece.len() {
            writer.write_all(&piece).await.unwrap();
        }
        writer.shutdown().await.unwrap();
    };
    let ((), received) = tokio::join!(send, async { copy(&mut reader, &mut sink()).await.unwrap() });
    assert_eq!(received, bytes as u64);
}

async fn ping(link: &LinkHandle, count: usize) {
    let mut stream = open(link).await;
    for _ in 0..count {
        stream.write_all(&[7; 64]).await.unwrap();
        stream.read_exact(&mut [0; 64]).await.unwrap();
    }
}

async fn opens(link: &LinkHandle, count: usize) {
    for _ in 0..count {
        let mut stream = open(link).await;
        stream.write_all(b"x").await.unwrap();
        stream.shutdown().await.unwrap();
        stream.read_to_end(&mut Vec::new()).await.unwrap();
    }
}

async fn relayed(link: &LinkHandle, bytes: usize) {
    let (client, near) = UnixStream::pair().unwrap();
    let stream = open(link).await;
    let relay =
        tokio::spawn(async move { relay(UnixSocket::new(near), stream, TIMEOUTS, pending_stop()).await });
    there_and_back(client, bytes).await;
    assert!(relay.await.unwrap().end.reason().is_none());
}

async fn pending_stop() -> Aborted {
    pending().await
}
