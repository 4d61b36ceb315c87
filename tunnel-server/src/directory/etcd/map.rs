//! What the keys in etcd say, without I/O: who the other gateways are, and which nodes they hold.
//!
//! ```text
//! PREFIX gateways/GATEWAY       {"instance": ..., "peer_address": ..., "server_name": ...}
//! PREFIX nodes/NODE/GATEWAY     the link's generation, in decimal
//! ```

use std::{
    collections::BTreeMap,
    sync::atomic::{AtomicBool, Ordering},
};

use parking_lot::Mutex;
use rustls::pki_types::ServerName;
use serde::{Deserialize, Serialize};
use tokio::sync::watch;
use tracing::warn;
use tunnel_core::{GatewayId, NodeId};

use super::client::wire::{Event, KeyValue, event};
use crate::{
    directory::{Generation, Holders},
    peers::Member,
};

/// Longest value that is looked at, in bytes.
const MAX_VALUE: usize = 4096;

/// What a gateway says of itself.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    /// Drawn at random by each process.
    pub(super) instance: String,
    pub(super) peer_address: String,
    pub(super) server_name: String,
}

impl Entry {
    pub(super) fn of(pair: &KeyValue) -> Option<Self> {
        serde_json::from_slice(pair.value.get(..).filter(|value| value.len() <= MAX_VALUE)?).ok()
    }

    fn member(self) -> Option<Member> {
        let server_name = ServerName::try_from(self.server_name).ok()?;
        Some(Member { address: self.peer_address.parse().ok()?, server_name })
    }
}

/// The full local map.
#[derive(Debug)]
pub(super) struct Map {
    prefix: String,
    own: GatewayId,
    pub(super) holders: Holders,
    gateways: Mutex<BTreeMap<GatewayId, Member>>,
    members: watch::Sender<Vec<Member>>,
    warned: AtomicBool,
}

/// All that is in etcd at one moment, as it is read.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    gateways: BTreeMap<GatewayId, Member>,
    held: BTreeMap<GatewayId, BTreeMap<NodeId, Generation>>,
    /// Nodes that this gateway holds or once held, each with the lease that its key ends with.
    pub(super) own: Vec<(NodeId, i64)>,
}

/// What has happened to this gateway's own entry.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum OwnEntry {
    Gone,
    Written(Option<Entry>),
}

enum Key {
    Gateway(GatewayId),
    Node(NodeId, GatewayId),
}

impl Map {
    pub(super) fn new(prefix: String, own: GatewayId) -> Self {
        Self {
            prefix,
            own,
            holders: Holders::default(),
            gateways: Mutex::default(),
            members: watch::Sender::default(),
            warned: AtomicBool::new(false),
        }
    }

    pub(super) fn own_key(&self) -> String {
        format!("{}gateways/{}", self.prefix, self.own)
    }

    pub(super) fn node_key(&self, node: &NodeId) -> String {
        format!("{}nodes/{node}/{}", self.prefix, self.own)
    }

    pub(super) fn members(&self) -> watch::Receiver<Vec<Member>> {
        self.members.subscribe()
    }

    /// Adds a key to a snapshot.
    pub(super) fn read(&self, pair: &KeyValue, snapshot: &mut Snapshot) {
        match self.key(pair) {
            Some(Key::Gateway(gateway)) if gateway != self.own => {
                if let Some(member) = self.member(pair) {
                    snapshot.gateways.insert(gateway, member);
                }
            }
            Some(Key::Node(node, gateway)) if gateway == self.own => snapshot.own.push((node, pair.lease)),
            Some(Key::Node(node, gateway)) => {
                if let Some(generation) = self.generation(pair) {
                    snapshot.held.entry(gateway).or_default().insert(node, generation);
                }
            }
            Some(Key::Gateway(_)) | None => {}
        }
    }

    /// What is in the snapshot is known, and what was known and is not in it is forgotten, unless it shall be kept.
    /// What is known before and after is known all the time.
    pub(super) fn replace(&self, snapshot: Snapshot, keep: bool) {
        let known = self.holders.gateways();
        for gateway in known.iter().filter(|gateway| !keep && !snapshot.held.contains_key(*gateway)) {
            self.holders.release_all(gateway);
        }
        for (gateway, held) in snapshot.held {
            if keep {
                for (node, generation) in held {
                    self.holders.hold(&gateway, node, generation);
                }
            } else {
                self.holders.replace(&gateway, held);
            }
        }
        let mut gateways = self.gateways.lock();
        if keep {
            gateways.extend(snapshot.gateways);
        } else {
            *gateways = snapshot.gateways;
        }
        self.tell(&gateways);
    }

    /// Takes in a change; tells if it was to this gateway's own entry.
    pub(super) fn apply(&self, event: &Event) -> Option<OwnEntry> {
        let pair = event.kv.as_ref()?;
        let written = event.r#type() == event::Type::Put;
        match self.key(pair)? {
            Key::Gateway(gateway) if gateway == self.own => {
                return Some(if written { OwnEntry::Written(Entry::of(pair)) } else { OwnEntry::Gone });
            }
            Key::Gateway(gateway) => {
                let mut gateways = self.gateways.lock();
                match if written { self.member(pair) } else { None } {
                    Some(member) => gateways.insert(gateway, member),
                    None => gateways.remove(&gateway),
                };
                self.tell(&gateways);
            }
            Key::Node(_, gateway) if gateway == self.own => {}
            Key::Node(node, gateway) => match if written { self.generation(pair) } else { None } {
                Some(generation) => self.holders.hold(&gateway, node, generation),
                None => self.holders.release(&gateway, &node),
            },
        }
        None
    }

    fn tell(&self, gateways: &BTreeMap<GatewayId, Member>) {
        self.members.send_if_modified(|members| {
            let changed = !members.iter().eq(gateways.values());
            if changed {
                *members = gateways.values().cloned().collect();
            }
            changed
        });
    }

    fn key(&self, pair: &KeyValue) -> Option<Key> {
        let parse = || {
            let key = std::str::from_utf8(&pair.key).ok()?.strip_prefix(&self.prefix)?;
            if let Some(gateway) = key.strip_prefix("gateways/") {
                return Some(Key::Gateway(gateway.parse().ok()?));
            }
            let (node, gateway) = key.strip_prefix("nodes/")?.split_once('/')?;
            Some(Key::Node(node.parse().ok()?, gateway.parse().ok()?))
        };
        self.understood(pair, parse())
    }

    fn member(&self, pair: &KeyValue) -> Option<Member> {
        self.understood(pair, Entry::of(pair).and_then(Entry::member))
    }

    fn generation(&self, pair: &KeyValue) -> Option<Generation> {
        let text = std::str::from_utf8(&pair.value).ok();
        let generation = text.and_then(|text| text.parse().ok()).filter(|generation| *generation != 0);
        self.understood(pair, generation)
    }

    /// Says once if something was not.
    fn understood<T>(&self, pair: &KeyValue, what: Option<T>) -> Option<T> {
        if what.is_none() && !self.warned.swap(true, Ordering::Relaxed) {
            let key: String = String::from_utf8_lossy(&pair.key).chars().take(80).collect();
            warn!(
                key,
                prefix = self.prefix,
                "etcd has a key below the prefix that no gateway of this version writes: it is passed over, as are others \
                   like it. Give each cluster of gateways a prefix of its own"
            );
        }
        what
    }
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;
    use tracing::Level;

    use super::*;
    use crate::testing::{Log, node};

    fn gateway(name: &str) -> GatewayId {
        name.parse().unwrap()
    }

    fn map() -> Map {
        Map::new("/t/".to_owned(), gateway("gw-a"))
    }

    fn pair(key: &str, value: &str) -> KeyValue {
        let (key, value) = (Bytes::from(format!("/t/{key}")), Bytes::from(value.to_owned()));
        KeyValue { key, value, lease: 7, ..KeyValue::default() }
    }

    fn put(key: &str, value: &str) -> Event {
        Event { r#type: event::Type::Put.into(), kv: Some(pair(key, value)) }
    }

    fn delete(key: &str) -> Event {
        Event { r#type: event::Type::Delete.into(), kv: Some(pair(key, "")) }
    }

    fn entry(port: u16) -> String {
        format!(r#"{{"instance":"i","peer_address":"10.0.0.1:{port}","server_name":"gateways.example"}}"#)
    }

    fn ports(map: &Map) -> Vec<u16> {
        map.members().borrow().iter().map(|member| member.address.port).collect()
    }

    fn generations(map: &Map, name: &str) -> Vec<Generation> {
        map.holders.of(&node(name)).iter().map(|holder| holder.generation).collect()
    }

    fn snapshot(map: &Map, pairs: &[KeyValue]) -> Snapshot {
        let mut snapshot = Snapshot::default();
        for pair in pairs {
            map.read(pair, &mut snapshot);
        }
        snapshot
    }

    #[test]
    fn changes_are_followed() {
        let map = map();
        for event in [put("gateways/gw-b", &entry(1)), put("nodes/n/gw-b", "5"), put("nodes/n/gw-c", "6")] {
            assert_eq!(map.apply(&event), None);
        }
        assert_eq!((ports(&map), generations(&map, "n")), (vec![1], vec![6, 5]));
        map.apply(&put("nodes/n/gw-b", "9"));
        map.apply(&delete("nodes/n/gw-c"));
        assert_eq!(generations(&map, "n"), [9]);
        map.apply(&delete("nodes/n/gw-b"));
        map.apply(&delete("gateways/gw-b"));
        assert_eq!((ports(&map), generations(&map, "n")), (vec![], vec![]));
    }

    #[test]
    fn ones_own_keys_are_no_news() {
        let map = map();
        map.apply(&put("nodes/n/gw-a", "5"));
        assert_eq!(map.apply(&delete("gateways/gw-a")), Some(OwnEntry::Gone));
        let own = map.apply(&put("gateways/gw-a", &entry(1)));
        assert!(matches!(own, Some(OwnEntry::Written(Some(entry))) if entry.instance == "i"));
        let snapshot = snapshot(&map, &[pair("gateways/gw-a", &entry(1)), pair("nodes/n/gw-a", "5")]);
        assert_eq!(snapshot.own, [(node("n"), 7)]);
        map.replace(snapshot, false);
        assert_eq!((ports(&map), generations(&map, "n")), (vec![], vec![]));
    }

    #[test]
    fn a_snapshot_replaces_what_was_known_or_adds_to_it() {
        let map = map();
        for event in [put("gateways/gw-b", &entry(1)), put("nodes/n/gw-b", "5"), put("nodes/m/gw-c", "5")] {
            map.apply(&event);
        }
        let pairs = [pair("gateways/gw-c", &entry(2)), pair("nodes/n/gw-c", "6"), pair("nodes/l/gw-c", "6")];
        map.replace(snapshot(&map, &pairs), true);
        assert_eq!((ports(&map), generations(&map, "n")), (vec![1, 2], vec![6, 5]));
        assert_eq!(generations(&map, "m"), [5]);
        map.replace(snapshot(&map, &pairs), false);
        assert_eq!((ports(&map), generations(&map, "n")), (vec![2], vec![6]));
        assert_eq!((generations(&map, "m"), generations(&map, "l")), (vec![], vec![6]));
    }

    #[test]
    fn what_makes_no_sense_is_passed_over_with_one_warning() {
        let (log, map) = (Log::start(), map());
        let huge = "9".repeat(100_000);
        for (key, value) in [
            ("nodes/n/gw-b", "0"),
            ("nodes/n/gw-b", "-1"),
            ("nodes/n/gw-b", &huge),
            ("nodes/BAD NAME/gw-b", "1"),
            ("nodes/n", "1"),
            ("nodes/n/gw-b/more", "1"),
            ("gateways/gw-b", &huge),
            ("gateways/gw-b", "{}"),
            ("gateways/gw-b", r#"{"instance":"i","peer_address":"no port","server_name":"a"}"#),
            ("gateways/gw-b", r#"{"instance":"i","peer_address":"a:1","server_name":"no name!"}"#),
            ("elsewhere", "1"),
        ] {
            map.apply(&put(key, value));
            map.replace(snapshot(&map, &[pair(key, value)]), false);
        }
        map.apply(&Event::default());
        map.apply(&Event {
            r#type: 7,
            kv: Some(KeyValue { key: Bytes::from_static(b"\xff"), ..KeyValue::default() }),
        });
        assert_eq!((ports(&map), map.holders.len()), (vec![], 0));
        assert_eq!(log.lines(Level::WARN, "no gateway of this version").len(), 1);
    }
}
