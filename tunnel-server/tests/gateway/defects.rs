//! What a defect of the gateway's own does: a panic, which no client can bring about, comes from a door of the test's.

use std::{
    io,
    pin::Pin,
    task::{Context, Poll},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::{mpsc, oneshot},
};
use tunnel_core::{Aborted, Leg, Lost};
use tunnel_server::{Accept, PeerAddr};

use super::*;
use crate::rig::start_with;

const UNIX: PeerAddr = PeerAddr::Unix { uid: 0, pid: None };

/// Panics when it is told to.
struct Trapdoor(oneshot::Receiver<()>);

impl Accept for Trapdoor {
    type Conn = Cursed;

    async fn accept(&mut self) -> io::Result<(Cursed, PeerAddr)> {
        let _ = (&mut self.0).await;
        panic!("the door fell in")
    }
}

/// Gives connections that panic.
struct Haunted(mpsc::Receiver<()>);

impl Accept for Haunted {
    type Conn = Cursed;

    async fn accept(&mut self) -> io::Result<(Cursed, PeerAddr)> {
        match self.0.recv().await {
            Some(()) => Ok((Cursed, UNIX)),
            None => std::future::pending().await,
        }
    }
}

struct Cursed;

impl AsyncRead for Cursed {
    fn poll_read(self: Pin<&mut Self>, _: &mut Context<'_>, _: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        panic!("read a cursed connection")
    }
}

impl AsyncWrite for Cursed {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, _: &[u8]) -> Poll<io::Result<usize>> {
        Poll::Pending
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Pending
    }
}

impl Leg for Cursed {
    fn abort(&mut self, _: &Aborted) {}

    fn poll_lost(&mut self, _: &mut Context<'_>) -> Poll<Lost> {
        Poll::Pending
    }

    fn vanished(&self) -> Option<io::Error> {
        None
    }
}

#[tokio::test]
async fn a_door_that_panics_makes_the_gateway_drain_and_fail() {
    let (spring, trapdoor) = oneshot::channel();
    let running = start_with(|_| {}, |gateway, _| gateway.serve_ingress_plain(Trapdoor(trapdoor))).await;
    let (mut link, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    let (mut client, mut edge) = running.connected(&mut link).await;
    assert_eq!(running.readiness.check(), Ok(()));

    spring.send(()).unwrap();
    let told = async { while !matches!(link.next().await, LinkEvent::Draining(_)) {} };
    timeout(PATIENCE, told).await.unwrap();
    let reason = running.readiness.check().unwrap_err();
    assert!(reason.contains("\"unix ingress\" panicked: the door fell in"), "{reason}");
    // What runs has its time.
    client.write_all(b"question").await.unwrap();
    let mut text = [0; 8];
    edge.read_exact(&mut text).await.unwrap();
    client.shutdown().await.unwrap();
    edge.shutdown().await.unwrap();
    assert_eq!(client.read(&mut text).await.unwrap(), 0);
    let failure = timeout(PATIENCE, running.task).await.unwrap().unwrap().unwrap_err();
    assert_eq!(failure.to_string(), reason);
}

#[tokio::test]
async fn a_connection_that_panics_ends_alone_and_is_counted() {
    let (curse, haunted) = mpsc::channel(8);
    let running = start_with(|_| {}, |gateway, _| gateway.serve_ingress_plain(Haunted(haunted))).await;
    let (mut link, _) = running.link("edge-a", hello("edge-a", "i1")).await.unwrap();
    running.measured("tunnel_server_links 1").await;
    running.measured("tunnel_server_panics_total 0").await;
    for _ in 0..2 {
        curse.send(()).await.unwrap();
    }
    running.measured("tunnel_server_panics_total 2").await;
    running.measured("tunnel_server_ingress_connections 0").await;
    assert_eq!(running.readiness.check(), Ok(()));
    drop(running.connected(&mut link).await);
    running.shutdown.cancel();
    timeout(PATIENCE, running.task).await.unwrap().unwrap().unwrap();
}
