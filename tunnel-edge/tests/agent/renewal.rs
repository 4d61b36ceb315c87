//! An agent whose certificate is rotated while it is linked, as a kubelet's is.

use std::time::{Duration, Instant, SystemTime};

use rustls::pki_types::{CertificateDer, pem::PemObject};
use tokio::{io::AsyncReadExt, time::timeout};
use tunnel_core::{Aborted, TunnelStream, identity::validity_of_certificate, proto::messages::AbortCode};
use tunnel_edge::config::Config;

use crate::{
    finish, open, round_trip,
    support::{Gateway, GatewayLink, LIMIT, Log, Pki, Running, config, echo, until},
};

const HOUR: Duration = Duration::from_secs(3600);

fn edge(pki: &Pki, gateway: &Gateway, pem: &str) -> Config {
    config(pki.rotate(pem), &[gateway.address()], &["node:*".to_owned()])
}

fn der(pem: &str) -> Vec<u8> {
    CertificateDer::from_pem_slice(pem.as_bytes()).unwrap().to_vec()
}

fn expiry(pem: &str) -> SystemTime {
    validity_of_certificate(&der(pem)).unwrap().not_after
}

fn expiry_metric(running: &Running) -> SystemTime {
    let seconds = running.metric("tunnel_edge_certificate_expiry_timestamp_seconds");
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

/// The next link, after whatever is refused.
async fn next_link(gateway: &Gateway) -> GatewayLink {
    loop {
        if let Ok(link) = gateway.try_accept().await {
            return link;
        }
    }
}

async fn end_of(stream: &mut TunnelStream) -> AbortCode {
    let error = timeout(LIMIT, stream.read(&mut [0; 1])).await.unwrap().unwrap_err();
    error.get_ref().unwrap().downcast_ref::<Aborted>().unwrap().code
}

#[tokio::test]
async fn a_rotated_certificate_gets_a_new_link_while_streams_run_on_over_the_old_one() {
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let gateway = Gateway::bind(pki.gateway()).await;
    let (first, second) = (pki.kubelet_pem("edge-a", HOUR), pki.kubelet_pem("edge-a", HOUR * 2));
    let mut config = edge(&pki, &gateway, &first);
    // A stream that outlives this has not been ended by it.
    config.drain_timeout = Duration::from_millis(10);
    let running = Running::start(config);
    let old = gateway.accept().await;
    let target = format!("edge-a:{}", target.port());
    let (mut stream, _) = open(&old, &target).await.unwrap();
    assert_eq!((&old.certificate, expiry_metric(&running)), (&der(&first), expiry(&first)));
    until("ready", || running.status.ready().is_ok()).await;

    pki.rotate(&second);
    let new = gateway.accept().await;
    assert_eq!(new.certificate, der(&second));
    assert_eq!(new.hello.instance_id, old.hello.instance_id);
    until("the old link drains", || {
        running.status.ready().unwrap();
        old.handle.peer_draining()
    })
    .await;
    assert!(!new.handle.peer_draining());
    assert_eq!((running.metric("tunnel_edge_links"), expiry_metric(&running)), (2, expiry(&second)));

    let (mut fresh, _) = open(&new, &target).await.unwrap();
    round_trip(&mut fresh, b"over the new link").await;
    round_trip(&mut stream, b"over the old link").await;
    finish(stream).await;
    let end = timeout(LIMIT, old.ended).await.unwrap().unwrap();
    assert_eq!(end.label(), "closed_by_peer");
    until("one link", || running.metric("tunnel_edge_links") == 1).await;
    running.status.ready().unwrap();
    round_trip(&mut fresh, b"undisturbed").await;
}

#[tokio::test]
async fn a_certificate_of_another_node_and_half_a_file_are_never_shown_to_a_gateway() {
    let log = Log::default();
    let _guard = log.capture();
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let gateway = Gateway::bind(pki.gateway()).await;
    let first = pki.kubelet_pem("edge-a", HOUR);
    let mut config = edge(&pki, &gateway, &first);
    config.node = Some("edge-a".parse().unwrap());
    let running = Running::start(config);
    let old = gateway.accept().await;
    let (mut stream, _) = open(&old, &format!("edge-a:{}", target.port())).await.unwrap();
    let good = pki.kubelet_pem("edge-a", HOUR * 3);
    for (bad, says) in [
        (&good[..good.len() / 2], "kubelet-client-current.pem"),
        (&*pki.kubelet_pem("edge-b", HOUR * 2), "edge-b"),
    ] {
        pki.rotate(bad);
        until(says, || log.count(&["ERROR", "cannot be used", says]) == 1).await;
        assert_eq!((running.metric("tunnel_edge_links"), expiry_metric(&running)), (1, expiry(&first)));
        round_trip(&mut stream, b"as before").await;
    }
    pki.rotate(&good);
    // The first connection since the first link.
    assert_eq!(gateway.accept().await.certificate, der(&good));
}

#[tokio::test]
async fn a_link_that_runs_out_of_stream_numbers_is_replaced_and_its_streams_run_on() {
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let mut gateway = Gateway::bind(pki.gateway()).await;
    gateway.link.streams_before = (1 << 31) - 10;
    let running = Running::start(edge(&pki, &gateway, &pki.kubelet_pem("edge-a", HOUR)));
    let old = gateway.accept().await;
    gateway.link.streams_before = 0;
    let target = format!("edge-a:{}", target.port());
    let (mut stream, _) = open(&old, &target).await.unwrap();
    let new = gateway.accept().await;
    until("the old link drains", || {
        running.status.ready().unwrap();
        old.handle.peer_draining()
    })
    .await;
    let (mut fresh, _) = open(&new, &target).await.unwrap();
    round_trip(&mut fresh, b"over the new link").await;
    round_trip(&mut stream, b"over the old link").await;
    finish(stream).await;
    let end = timeout(LIMIT, old.ended).await.unwrap().unwrap();
    assert_eq!(end.label(), "closed_by_peer");
    // It is not replaced in turn.
    assert!(!new.handle.peer_draining() && !new.handle.wears_out());
    round_trip(&mut fresh, b"undisturbed").await;
}

#[tokio::test]
async fn a_renewal_that_fails_is_tried_again_and_the_old_link_serves_meanwhile() {
    for lost in [false, true] {
        let (pki, theirs, (target, _echo)) = (Pki::new(), Pki::new(), echo().await);
        let gateway = Gateway::bind(pki.gateway()).await;
        let running = Running::start(edge(&pki, &gateway, &pki.kubelet_pem("edge-a", HOUR)));
        let old = gateway.accept().await;
        let (mut stream, _) = open(&old, &format!("edge-a:{}", target.port())).await.unwrap();
        // The gateway does not trust the new one's CA.
        pki.rotate(&theirs.kubelet_pem("edge-a", HOUR));
        // For longer than a link that was told to retire would wait.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(2) {
            assert!(gateway.try_accept().await.is_err());
            running.status.ready().unwrap();
            assert!(!old.handle.peer_draining());
            round_trip(&mut stream, b"over the only link").await;
        }
        let old = if lost {
            drop(old);
            until("not ready", || running.why_not_ready().contains("link lost")).await;
            assert!(gateway.try_accept().await.is_err());
            None
        } else {
            Some(old)
        };
        let good = pki.kubelet_pem("edge-a", HOUR);
        pki.rotate(&good);
        let new = next_link(&gateway).await;
        assert_eq!(new.certificate, der(&good));
        until("ready", || running.status.ready().is_ok()).await;
        if let Some(old) = old {
            until("the old link drains", || old.handle.peer_draining()).await;
            round_trip(&mut stream, b"still here").await;
        }
    }
}

#[tokio::test]
async fn streams_of_the_old_link_outlive_its_certificate() {
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let gateway = Gateway::bind(pki.gateway()).await;
    let short = pki.kubelet_pem("edge-a", Duration::from_secs(3));
    let mut config = edge(&pki, &gateway, &short);
    config.drain_timeout = Duration::from_millis(10);
    let running = Running::start(config);
    let old = gateway.accept().await;
    let (mut stream, _) = open(&old, &format!("edge-a:{}", target.port())).await.unwrap();
    pki.rotate(&pki.kubelet_pem("edge-a", HOUR));
    let _new = gateway.accept().await;
    until("the old certificate has expired", || SystemTime::now() > expiry(&short) + Duration::from_secs(1))
        .await;
    round_trip(&mut stream, b"over the old link").await;
    finish(stream).await;
    timeout(LIMIT, old.ended).await.unwrap().unwrap();
    running.status.ready().unwrap();
}

#[tokio::test]
async fn a_shutdown_bounds_what_runs_on_over_the_old_link() {
    let (pki, (target, _echo)) = (Pki::new(), echo().await);
    let gateway = Gateway::bind(pki.gateway()).await;
    let mut config = edge(&pki, &gateway, &pki.kubelet_pem("edge-a", HOUR));
    config.drain_timeout = Duration::from_millis(200);
    let mut running = Running::start(config);
    let old = gateway.accept().await;
    let (mut stream, _) = open(&old, &format!("edge-a:{}", target.port())).await.unwrap();
    pki.rotate(&pki.kubelet_pem("edge-a", HOUR));
    let new = gateway.accept().await;
    until("the old link drains", || old.handle.peer_draining()).await;
    round_trip(&mut stream, b"still here").await;
    running.shutdown.cancel();
    assert_eq!(end_of(&mut stream).await, AbortCode::Drained);
    running.returned().await;
    assert!(new.handle.peer_draining());
}
