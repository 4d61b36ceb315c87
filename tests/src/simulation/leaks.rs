//! What every program of a run holds when nothing is under way, before the work and after it: it must be the same. So a
//! stream, a task, a socket, a window or memory that is left at any of them is found, whoever forgot it.

use std::time::Duration;

use tokio::time::{Instant, sleep};

use super::{
    Gateway, World, control_plane,
    hosts::{Holdings, MAX_STREAMS},
};
use crate::plan::NODES;

/// How long after the last client has gone something may still be under way: a client that vanished is noticed after 30
/// seconds, and a program that was told to stop may take a minute.
const SETTLING: Duration = Duration::from_secs(90);
/// By how much the memory of all programs together may differ for each link, in bytes: at both ends, buffers stay with it
/// that grow in steps.
const MEMORY_OF_A_LINK: usize = 256 * 1024;

/// What is held while nothing is under way.
pub(super) struct Rest {
    /// By each program, with its name.
    programs: Vec<(&'static str, Option<Holdings>)>,
    /// Of edges, and of other gateways, at each gateway.
    links: Vec<(&'static str, usize, usize)>,
    memory: i64,
}

/// What each program relays or serves, with the program's name and a word for it: nothing, at rest.
fn under_way(gateways: &[&'static str], world: &World) -> Vec<(&'static str, &'static str, usize)> {
    let at_gateway = |(name, gateway): (&&'static str, &Gateway)| {
        [
            (*name, "streams", gateway.probe.active_streams()),
            (*name, "streams of peers", gateway.probe.forwarded_streams()),
            (*name, "connections of the control plane", gateway.probe.ingress_connections()),
        ]
    };
    let at_gateways = gateways.iter().zip(&world.gateways).flat_map(at_gateway);
    at_gateways.chain(NODES.map(|node| (node, "streams", world.edge(node).probe.active_streams()))).collect()
}

impl Rest {
    /// Looks now.
    pub(super) fn look(gateways: &[&'static str], world: &World) -> Self {
        let hosts = gateways.iter().copied().chain(NODES);
        let links = |(name, gateway): (&&'static str, &Gateway)| {
            (*name, gateway.probe.links(), gateway.probe.peer_links())
        };
        Self {
            programs: hosts.map(|host| (host, world.program(host).holdings())).collect(),
            links: gateways.iter().zip(&world.gateways).map(links).collect(),
            memory: world.memory(),
        }
    }

    /// Whether all links are up.
    pub(super) fn is_linked(&self) -> bool {
        let of_edges: usize = self.links.iter().map(|(_, edges, _)| edges).sum();
        of_edges == NODES.len() && self.links.iter().all(|(.., peers)| peers + 1 == self.links.len())
    }

    /// What is left now that was not there before.
    fn left(&self, world: &World) -> Vec<String> {
        let gateways: Vec<_> = self.links.iter().map(|(name, ..)| *name).collect();
        let now = Self::look(&gateways, world);
        let mut left: Vec<String> = under_way(&gateways, world)
            .into_iter()
            .filter(|(.., count)| *count > 0)
            .map(|(name, what, count)| format!("{count} {what} at {name}"))
            .collect();
        if now.links != self.links {
            left.push(format!("links {:?}, instead of {:?}", now.links, self.links));
        }
        for ((name, before), (_, now)) in self.programs.iter().zip(&now.programs) {
            if before != now {
                left.push(format!("{name} holds {now:?}, instead of {before:?}"));
            }
        }
        let more = now.memory - self.memory;
        let links: usize = self.links.iter().map(|(_, edges, peers)| edges + peers).sum();
        if usize::try_from(more).is_ok_and(|more| more > MEMORY_OF_A_LINK * links) {
            left.push(format!("{more} bytes of memory at all programs together"));
        }
        left
    }

    /// Waits until everything is as it was.
    pub(super) async fn expect(&self, world: &World) {
        let deadline = Instant::now() + SETTLING;
        loop {
            let left = self.left(world);
            if left.is_empty() {
                return;
            }
            if Instant::now() > deadline {
                for what in left {
                    world.ledger.broken(format!("a leak: {what}"));
                }
                return;
            }
            sleep(Duration::from_millis(100)).await;
        }
    }
}

/// Every place of a link is free: all can be taken at once, by way of any gateway.
pub(super) async fn expect_free_places(gateways: &[&'static str], world: &World) {
    for (gateway, node) in gateways.iter().flat_map(|gateway| NODES.map(|node| (*gateway, node))) {
        if let Err(cause) = control_plane::open_at_once(gateway, node, MAX_STREAMS).await {
            let what = format!("not all places for streams to {node} by {gateway} are free: {cause}");
            world.ledger.broken(format!("a leak: {what}"));
        }
    }
}
