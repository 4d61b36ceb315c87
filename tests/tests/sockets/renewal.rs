//! An edge with its kubelet's certificate, which is rotated while the edge is linked.

use std::{
    fs,
    os::unix::fs::symlink,
    path::{Path, PathBuf},
    time::Duration,
};

use tunnel_core::tls::{Domain, Files};
use tunnel_server::pki::{Authority, Profile, Validity};
use tunnel_tests::{parties, plan::NODES};

use crate::rig::{Party, Rig, finish, ping, until, within};

const VALID: Duration = Duration::from_secs(3600);

/// Where a kubelet keeps its client certificate: one file of certificate and key for each, and a link to the newest.
struct Kubelet {
    folder: PathBuf,
    rotations: usize,
}

impl Kubelet {
    fn new(rig: &Rig) -> Self {
        let folder = rig.folder().join("pki");
        fs::create_dir(&folder).unwrap();
        Self { folder, rotations: 0 }
    }

    fn current(&self) -> PathBuf {
        self.folder.join("kubelet-client-current.pem")
    }

    /// Writes a new file, then turns the link to it in one step.
    fn rotate(&mut self, cert_pem: &str, key_pem: &str) {
        self.rotations += 1;
        let file = self.folder.join(format!("kubelet-client-{}.pem", self.rotations));
        fs::write(&file, format!("{cert_pem}{key_pem}")).unwrap();
        let link = self.folder.join("kubelet-client-updated.pem");
        symlink(file, &link).unwrap();
        fs::rename(link, self.current()).unwrap();
    }

    fn rotate_to(&mut self, authority: &Authority, node: &str) {
        let profile = Profile::Edge { node: node.parse().unwrap() };
        let issued = authority.issue(&profile, Validity::lasting(VALID)).unwrap();
        self.rotate(&issued.cert_pem, &issued.key_pem);
    }
}

/// Replaces the edge of `edge-a` by one with its kubelet's certificate, of the CA of all edges.
async fn start_on_kubelet_certificate(rig: &mut Rig) -> Kubelet {
    let edge = rig.edges[0].take().unwrap();
    edge.drain();
    edge.drained().await;
    rig.linked(1).await;
    let mut kubelet = Kubelet::new(rig);
    let read = |path: &Path| fs::read_to_string(path).unwrap();
    let Files { cert, key, ca } = parties::files(Domain::Edge, NODES[0]);
    kubelet.rotate(&read(&cert), &read(&key));
    rig.edges[0] = Some(start_edge(rig, Files { cert: kubelet.current(), key: kubelet.current(), ca }));
    rig.linked(2).await;
    kubelet
}

fn start_edge(rig: &Rig, files: Files) -> Party {
    rig.start_edge_with(0, 0, |config| {
        config.tls = files;
        config.reload_period = Duration::from_millis(50);
        // What runs longer over the old link has not been ended by this.
        config.drain_timeout = Duration::from_millis(10);
    })
}

/// From now on the gateway takes edges of this CA only; links that are up stay.
fn trust(rig: &Rig, authority: &Authority) {
    fs::write(rig.edge_ca(), authority.cert_pem()).unwrap();
    assert!(rig.edge_tls.reload().unwrap());
}

#[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "the numbers of tests are small")]
fn opened(rig: &Rig) -> usize {
    rig.probe.sum("tunnel_server_links_opened_total", "") as usize
}

/// New streams to `edge-a`, one after another, each of which must work, until something is so.
async fn serves_until(what: &str, rig: &Rig, condition: impl Fn() -> bool) {
    let streams = async {
        while !condition() {
            let (mut client, mut target) = rig.pair("edge-a", 0).await;
            ping(&mut client, &mut target).await;
            assert!(rig.probe.links() >= 2, "a node is without a link");
        }
    };
    within(what, streams).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_rotated_certificate_takes_over_and_no_stream_notices() {
    let mut rig = Rig::start().await;
    let mut kubelet = start_on_kubelet_certificate(&mut rig).await;
    let (mut client, mut target) = rig.pair("edge-a", 0).await;
    ping(&mut client, &mut target).await;
    let before = opened(&rig);

    // Nothing but a certificate of the new CA gets a link any more.
    let authority = Authority::new(Domain::Edge, Validity::lasting(VALID)).unwrap();
    trust(&rig, &authority);
    kubelet.rotate_to(&authority, "edge-a");
    serves_until("the new link", &rig, || opened(&rig) == before + 1).await;
    assert_eq!(rig.probe.links(), 3);
    ping(&mut client, &mut target).await;

    // The old link goes with its last stream, though not before it has been told to.
    finish(client, target).await;
    serves_until("the end of the old link", &rig, || rig.probe.links() == 2).await;
    let (mut client, mut target) = rig.pair("edge-a", 0).await;
    ping(&mut client, &mut target).await;
    assert_eq!(opened(&rig), before + 1);
    finish(client, target).await;
    rig.close().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_certificate_that_the_gateway_refuses_costs_nothing_until_there_is_a_better_one() {
    let mut rig = Rig::start().await;
    let mut kubelet = start_on_kubelet_certificate(&mut rig).await;
    let (mut client, mut target) = rig.pair("edge-a", 0).await;
    let before = opened(&rig);
    let refused = || rig.probe.sum("tunnel_server_handshakes_failed_total", "unknown_ca");
    let [foreign, authority] =
        [(); 2].map(|()| Authority::new(Domain::Edge, Validity::lasting(VALID)).unwrap());
    kubelet.rotate_to(&foreign, "edge-a");
    serves_until("several attempts", &rig, || refused() >= 2.0).await;
    ping(&mut client, &mut target).await;
    assert_eq!((opened(&rig), rig.probe.links()), (before, 2));

    trust(&rig, &authority);
    kubelet.rotate_to(&authority, "edge-a");
    serves_until("the new link", &rig, || opened(&rig) == before + 1).await;
    ping(&mut client, &mut target).await;
    finish(client, target).await;
    until("the end of the old link", || rig.probe.links() == 2).await;
    rig.close().await;
}
