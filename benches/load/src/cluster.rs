//! The gateways under load, as one: on loopback, found by one another by a list of their addresses. Called by the walk in
//! `main`.
//!
//! Which gateway has an edge's link is known: edges are dealt out in turn ([`home`]), each is told only that gateway's
//! address, and none moves while its gateway lives. So a request can be sent the short way or the long one ([`Way`]), and
//! [`Gateways::handed_to_peers`] proves which one it went.

use std::{
    net::SocketAddr,
    time::{Duration, Instant},
};

use tokio::time::sleep;
use tunnel_core::{GatewayId, NodeId};

use crate::gateway::{Addresses, Gateway, GatewayError, Memory, Setup};

/// How long the gateways may take to find one another.
const MEET_LIMIT: Duration = Duration::from_secs(20);
const MEET_POLL: Duration = Duration::from_millis(100);
const HANDED_TO_PEERS: &str = "tunnel_server_handed_to_peers_total{cause=\"connected\"}";
const PEER_LINKS: &str = "tunnel_server_peer_links";

/// The gateway that has an edge's link until one is killed.
pub(crate) fn home(edge: usize, gateways: usize) -> usize {
    edge % gateways
}

/// How a request comes to an edge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Way {
    /// Through the gateway that has the edge's link.
    Local,
    /// Through another one.
    Forwarded,
}

/// All gateways of a run.
pub(crate) struct Gateways(Vec<Gateway>);

impl Gateways {
    /// The place of the one that is killed.
    pub(crate) const DOOMED: usize = 0;

    /// A gateway of each name. None is running yet.
    pub(crate) fn new(setup: Setup<'_>, ids: &[GatewayId]) -> Result<Self, GatewayError> {
        let addresses = Addresses::free(ids.len())?;
        let gateway = |(place, id): (usize, &GatewayId)| {
            let mut others = addresses.clone();
            let own = others.remove(place);
            Gateway::new(setup, id, own, &others)
        };
        Ok(Self(ids.iter().enumerate().map(gateway).collect()))
    }

    /// Starts them, and waits until each has a link to each other one.
    pub(crate) async fn start(&mut self) -> Result<(), GatewayError> {
        for gateway in &mut self.0 {
            gateway.start().await?;
        }
        let (begun, all) = (Instant::now(), self.0.len() as u64 - 1);
        for gateway in &self.0 {
            loop {
                let found = gateway.metric(PEER_LINKS).await?;
                if found == all {
                    break;
                }
                let (after, gateway) = (begun.elapsed(), gateway.id().clone());
                if after > MEET_LIMIT {
                    return Err(GatewayError::Apart { after, gateway, found, all });
                }
                sleep(MEET_POLL).await;
            }
        }
        Ok(())
    }

    /// Where edges connect, at each.
    pub(crate) fn edges_addresses(&self) -> Vec<SocketAddr> {
        self.0.iter().map(Gateway::edges_address).collect()
    }

    /// Each node with an ingress through which requests come to it this way; there must be several gateways for the long
    /// one.
    pub(crate) fn ways(&self, nodes: &[NodeId], way: Way) -> Vec<(NodeId, SocketAddr)> {
        let all = self.0.len();
        let entry = |edge| match way {
            Way::Local => home(edge, all),
            // All the others of each gateway, in turn.
            Way::Forwarded => (home(edge, all) + 1 + edge / all % (all - 1)) % all,
        };
        let way = |(edge, node): (usize, &NodeId)| (node.clone(), self.0[entry(edge)].ingress_address());
        nodes.iter().enumerate().map(way).collect()
    }

    /// Requests that one gateway has handed to another, which then reached the edge.
    pub(crate) async fn handed_to_peers(&self) -> Result<u64, GatewayError> {
        let mut handed = 0;
        for gateway in &self.0 {
            handed += gateway.metric(HANDED_TO_PEERS).await?;
        }
        Ok(handed)
    }

    /// What all hold together.
    pub(crate) fn memory(&self) -> Result<Memory, GatewayError> {
        Self::sum(&self.0)
    }

    /// What those hold that are there after one was killed: without it, unless it is the only one, which comes back.
    pub(crate) fn memory_left(&self) -> Result<Memory, GatewayError> {
        Self::sum(if self.0.len() > 1 { &self.0[Self::DOOMED + 1..] } else { &self.0 })
    }

    fn sum(gateways: &[Gateway]) -> Result<Memory, GatewayError> {
        gateways.iter().try_fold(Memory::default(), |sum, gateway| Ok(sum.and(gateway.memory()?)))
    }

    /// Processor time that all together have had.
    pub(crate) fn processor_time(&self) -> Result<Duration, GatewayError> {
        self.0.iter().map(Gateway::processor_time).sum()
    }

    /// Kills one.
    pub(crate) async fn kill_one(&mut self) -> Result<(), GatewayError> {
        self.0[Self::DOOMED].kill().await
    }

    /// Starts the one that was killed again, if there is no other.
    pub(crate) async fn recover(&mut self) -> Result<(), GatewayError> {
        match self.0.as_mut_slice() {
            [only] => only.start().await,
            _ => Ok(()),
        }
    }

    /// Kills all that still run.
    pub(crate) async fn kill(&mut self) -> Result<(), GatewayError> {
        for gateway in &mut self.0 {
            gateway.kill().await?;
        }
        Ok(())
    }
}
