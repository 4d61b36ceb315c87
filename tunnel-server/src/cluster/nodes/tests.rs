//! Tests of what nodes are granted, and above all of what they are not.

use super::*;
use crate::{grants::Holder, testing::node};

/// A Node as the API server writes it.
fn object(name: &str, addresses: &[&str], cidrs: &[&str]) -> Node {
    let list = |items: &[&str]| items.iter().map(|item| format!("{item:?}")).collect::<Vec<_>>().join(",");
    let addresses: Vec<String> =
        addresses.iter().map(|address| format!(r#"{{"type":"InternalIP","address":{address:?}}}"#)).collect();
    parse(&format!(
        r#"{{"kind":"Node","apiVersion":"v1","metadata":{{"name":{name:?},"resourceVersion":"1","labels":{{"a":"b"}}}},
            "spec":{{"podCIDR":{:?},"podCIDRs":[{}],"taints":[]}},
            "status":{{"addresses":[{}],"capacity":{{"cpu":"2"}}}}}}"#,
        cidrs.first().unwrap_or(&""),
        list(cidrs),
        addresses.join(",")
    ))
}

fn parse(json: &str) -> Node {
    serde_json::from_str(json).unwrap()
}

fn configured(list: &[(&str, &str)]) -> Grants {
    list.iter().map(|(name, what)| (node(name), what.parse().unwrap())).collect()
}

/// The grants of these nodes, and the texts of what is dropped.
fn granted(nodes: &[(&str, &[&str], &[&str])], with: &[(&str, &str)]) -> (Grants, Vec<String>) {
    let mut state = Nodes::default();
    for (name, addresses, cidrs) in nodes {
        state.apply(Event::Apply(object(name, addresses, cidrs)));
    }
    let (table, dropped) = state.grants(&configured(with));
    (table, dropped.iter().map(ToString::to_string).collect())
}

fn of(table: &Grants, name: &str) -> Vec<String> {
    table.of(&node(name)).map(ToString::to_string).collect()
}

fn holder(table: &Grants, host: &str) -> Holder {
    table.holder(&host.parse().unwrap())
}

fn one(name: &str) -> Holder {
    Holder::One(node(name))
}

#[test]
fn a_node_says_where_its_kubelet_listens() {
    let port_of = |said: &str| {
        let mut state = Nodes::default();
        let status = format!(r#"{{"daemonEndpoints":{said}}}"#);
        state.apply(Event::Apply(parse(&format!(r#"{{"metadata":{{"name":"edge-a"}},"status":{status}}}"#))));
        state.grants(&Grants::default()).0.kubelet_port(&node("edge-a"))
    };
    assert_eq!(port_of(r#"{"kubeletEndpoint":{"Port":11250}}"#), 11_250);
    for said in ["{}", "null", r#"{"kubeletEndpoint":{}}"#, r#"{"kubeletEndpoint":{"Port":10250}}"#] {
        assert_eq!(port_of(said), 10_250, "{said}");
    }
    for port in ["0", "65536", "-1", "4294967296"] {
        assert_eq!(port_of(&format!(r#"{{"kubeletEndpoint":{{"Port":{port}}}}}"#)), 10_250, "{port}");
    }
}

#[test]
fn a_node_is_granted_its_addresses_and_pod_networks_and_nothing_else() {
    let addresses = ["10.0.0.1", "2001:db8::1", "Edge-A.Internal.", "edge-a", "::ffff:10.0.0.9"];
    let (table, dropped) = granted(&[("edge-a", &addresses, &["10.244.1.0/24", "fd00:1::/64"])], &[]);
    let expected = ["10.0.0.1", "10.0.0.9", "[2001:db8::1]", "10.244.1.0/24", "fd00:1::/64"];
    assert_eq!(of(&table, "edge-a"), expected);
    assert!(dropped.is_empty(), "{dropped:?}");
    assert_eq!(holder(&table, "10.244.2.1"), Holder::None);
}

#[test]
fn a_node_without_either_is_known_all_the_same() {
    let (table, _) = granted(&[], &[]);
    assert!(!table.knows(&node("edge-a")));
    let mut state = Nodes::default();
    for json in [
        r#"{"metadata":{"name":"edge-a"}}"#,
        r#"{"metadata":{"name":"edge-b"},"spec":{"podCIDR":""},"status":{"addresses":null}}"#,
        r#"{"metadata":{"name":"edge-c"},"spec":{"podCIDR":"10.244.3.0/24","podCIDRs":[]}}"#,
    ] {
        state.apply(Event::Apply(parse(json)));
    }
    let (table, dropped) = state.grants(&Grants::default());
    assert!(["edge-a", "edge-b", "edge-c"].iter().all(|name| table.knows(&node(name))));
    assert_eq!(of(&table, "edge-b"), <[&str; 0]>::default());
    assert_eq!(of(&table, "edge-c"), ["10.244.3.0/24"]);
    assert!(dropped.is_empty());
}

#[test]
fn what_is_configured_and_what_the_cluster_says_is_united() {
    let nodes: &[(&str, &[&str], &[&str])] = &[("edge-a", &["10.0.0.1"], &["10.244.1.0/24"])];
    let (table, _) = granted(nodes, &[("edge-a", "db.local"), ("edge-z", "default-route")]);
    assert_eq!(of(&table, "edge-a"), ["10.0.0.1", "db.local", "10.244.1.0/24"]);
    assert_eq!(holder(&table, "10.0.0.1"), one("edge-a"));
    assert_eq!(holder(&table, "10.9.9.9"), one("edge-z"));
}

#[test]
fn an_address_in_anothers_pod_network_is_refused() {
    let nodes: &[(&str, &[&str], &[&str])] = &[
        ("edge-a", &["10.244.2.7", "10.244.1.7", "fd00:2::7"], &["10.244.1.0/24"]),
        ("edge-b", &["10.0.0.2"], &["10.244.2.0/24", "fd00:2::/64"]),
    ];
    let (table, dropped) = granted(nodes, &[]);
    // Whichever of both lies, neither gets what may be the other's.
    let both = Holder::Several(vec![node("edge-a"), node("edge-b")]);
    assert_eq!(holder(&table, "10.244.2.7"), both);
    assert_eq!(holder(&table, "fd00:2::7"), both);
    assert_eq!(holder(&table, "10.244.2.8"), one("edge-b"));
    assert_eq!(of(&table, "edge-a"), ["10.244.1.7", "10.244.1.0/24"]);
    assert_eq!(
        dropped,
        [
            "node edge-a claims 10.244.2.7, which is in the pod network 10.244.2.0/24 of edge-b: requests to it are refused",
            "node edge-a claims [fd00:2::7], which is in the pod network fd00:2::/64 of edge-b: requests to it are refused",
        ]
    );
}

#[test]
fn no_name_in_a_status_is_granted() {
    let names =
        ["webhook.default.svc", "edge-b", "EDGE-B.", "a.internal", "edge-a", "no host", "", "localhost"];
    let nodes: &[(&str, &[&str], &[&str])] = &[("edge-a", &names, &[]), ("edge-b", &[], &[])];
    let (table, dropped) = granted(nodes, &[]);
    assert_eq!(of(&table, "edge-a"), <[&str; 0]>::default());
    assert_eq!(holder(&table, "webhook.default.svc"), Holder::None);
    // Every node has names there: no reason to warn.
    assert!(dropped.is_empty(), "{dropped:?}");
}

#[test]
fn an_address_that_is_another_nodes_name_reaches_neither() {
    // Some clusters name nodes by their addresses.
    let nodes: &[(&str, &[&str], &[&str])] =
        &[("edge-a", &["10.0.0.5", "10.0.0.6"], &[]), ("10.0.0.5", &["10.0.0.5"], &[])];
    let (table, dropped) = granted(nodes, &[]);
    assert_eq!(of(&table, "edge-a"), ["10.0.0.6"]);
    assert_eq!(holder(&table, "10.0.0.5"), Holder::Several(vec![node("10.0.0.5"), node("edge-a")]));
    assert_eq!(
        dropped,
        ["node edge-a claims 10.0.0.5, which is the name of another node: requests to it are refused"]
    );
    // Nobody else's network takes a name either, whether its node claims the address or not.
    let nodes: &[(&str, &[&str], &[&str])] =
        &[("edge-a", &[], &["10.0.0.0/24"]), ("10.0.0.5", &[], &[]), ("10.0.0.7", &["10.0.0.7"], &[])];
    let (table, _) = granted(nodes, &[]);
    assert_eq!(holder(&table, "10.0.0.5"), one("10.0.0.5"));
    assert_eq!(holder(&table, "10.0.0.7"), Holder::Several(vec![node("10.0.0.7"), node("edge-a")]));
}

#[test]
fn what_two_nodes_hold_stays_with_both() {
    let nodes: &[(&str, &[&str], &[&str])] = &[
        ("edge-a", &["192.168.1.10"], &["10.244.0.0/24"]),
        ("edge-b", &["192.168.1.10"], &["10.244.0.0/24"]),
    ];
    let (table, dropped) = granted(nodes, &[]);
    let both = Holder::Several(vec![node("edge-a"), node("edge-b")]);
    for host in ["192.168.1.10", "10.244.0.9"] {
        assert_eq!(holder(&table, host), both, "{host}");
    }
    assert_eq!(of(&table, "edge-b"), ["192.168.1.10", "10.244.0.0/24"]);
    assert!(dropped.is_empty(), "{dropped:?}");
}

#[test]
fn an_address_in_a_pod_network_of_two_is_nobodys_alone() {
    let nodes: &[(&str, &[&str], &[&str])] =
        &[("edge-a", &["10.244.0.9"], &["10.244.0.0/24"]), ("edge-b", &[], &["10.244.0.0/24"])];
    let (table, _) = granted(nodes, &[]);
    assert_eq!(holder(&table, "10.244.0.9"), Holder::Several(vec![node("edge-a"), node("edge-b")]));
}

#[test]
fn of_nested_pod_networks_the_inner_one_is_refused() {
    let nodes: &[(&str, &[&str], &[&str])] = &[
        ("edge-a", &[], &["10.244.0.0/16"]),
        ("edge-b", &[], &["10.244.1.0/24"]),
        ("edge-c", &[], &["10.244.1.128/25"]),
    ];
    let (table, dropped) = granted(nodes, &[]);
    assert_eq!(holder(&table, "10.244.9.9"), one("edge-a"));
    assert_eq!(holder(&table, "10.244.1.1"), Holder::Several(vec![node("edge-a"), node("edge-b")]));
    let all = Holder::Several(vec![node("edge-a"), node("edge-b"), node("edge-c")]);
    assert_eq!(holder(&table, "10.244.1.200"), all);
    assert_eq!(of(&table, "edge-a"), ["10.244.0.0/16"]);
    assert_eq!(
        dropped[0],
        "the pod network 10.244.1.0/24 of node edge-b lies in the pod network 10.244.0.0/16 of edge-a: requests to it \
         are refused"
    );
    assert_eq!(dropped.len(), 3);
    // A node's own networks may be nested.
    let (table, dropped) = granted(&[("edge-a", &[], &["10.244.0.0/16", "10.244.1.0/24"])], &[]);
    assert_eq!((holder(&table, "10.244.1.1"), dropped.len()), (one("edge-a"), 0));
}

#[test]
fn no_claim_takes_what_the_configuration_grants_to_another() {
    let will = [("edge-z", "10.9.0.0/16"), ("edge-z", "10.0.0.1"), ("edge-z", "db.local")];
    let claims = ["10.9.1.1", "10.0.0.1", "10.8.0.1"];
    let nodes: &[(&str, &[&str], &[&str])] =
        &[("edge-a", &claims, &["10.9.3.0/24", "10.9.0.0/16", "10.8.0.0/16"])];
    let (table, dropped) = granted(nodes, &will);
    assert_eq!(of(&table, "edge-a"), ["10.8.0.1", "10.8.0.0/16"]);
    for host in ["10.9.1.1", "10.9.3.1", "10.0.0.1", "db.local"] {
        assert_eq!(holder(&table, host), one("edge-z"), "{host}");
    }
    assert_eq!(dropped.len(), 4, "{dropped:?}");
    assert_eq!(
        dropped[0],
        "node edge-a claims 10.0.0.1, but the configuration grants 10.0.0.1 to edge-z: not granted"
    );
    // What it is granted by the configuration it may claim as well.
    let (table, dropped) = granted(nodes, &[("edge-a", "10.9.0.0/16")]);
    assert_eq!((holder(&table, "10.9.1.1"), dropped.len()), (one("edge-a"), 0), "{dropped:?}");
}

#[test]
fn what_means_something_else_everywhere_is_never_granted() {
    let addresses = [
        "127.0.0.1",
        "127.9.9.9",
        "::1",
        "0.0.0.0",
        "::",
        "224.0.0.1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "169.254.0.1",
        "169.254.169.254",
        "255.255.255.255",
        "fe80::1",
        "febf::1",
        "::ffff:169.254.0.1",
    ];
    let networks = [
        "0.0.0.0/0",
        "::/0",
        "0.0.0.0/1",
        "128.0.0.0/1",
        "127.0.0.0/8",
        "127.0.0.0/24",
        "224.0.0.0/8",
        "169.254.0.0/16",
        "169.254.7.0/24",
        "169.0.0.0/8",
        "255.0.0.0/8",
        "255.255.255.255/32",
        "fe80::/10",
        "fe80:1::/64",
        "fe00::/8",
        "ff00::/8",
        "::/8",
        "::/64",
        "::ffff:10.0.0.0/104",
        "10.0.0.0",
        "10.0.0.0/33",
    ];
    let (table, dropped) = granted(&[("edge-a", &addresses, &networks)], &[]);
    assert_eq!(of(&table, "edge-a"), <[&str; 0]>::default());
    assert_eq!(dropped.len(), addresses.len() + networks.len(), "{dropped:#?}");
    assert!(dropped.contains(
        &"node edge-a claims \"127.0.0.1\", which is nothing that a node can serve: not granted".to_owned()
    ));
}

#[test]
fn nodes_that_no_edge_can_be_are_left_out() {
    let nodes: &[(&str, &[&str], &[&str])] =
        &[("Edge_A", &["10.0.0.1"], &["10.244.1.0/24"]), ("edge-b", &[], &[])];
    let (table, dropped) = granted(nodes, &[]);
    assert_eq!(table.nodes().collect::<Vec<_>>(), [&node("edge-b")]);
    assert_eq!(holder(&table, "10.0.0.1"), Holder::None);
    assert_eq!(dropped, ["a node is called \"Edge_A\", which no edge can prove to be: it is left out"]);
}

#[test]
fn one_node_cannot_claim_without_end() {
    let many: Vec<String> =
        (0..=MAX_OF_NODE).map(|number| format!("10.1.{}.{}", number / 256, number % 256)).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    let (table, dropped) = granted(&[("edge-a", &many, &[])], &[]);
    assert_eq!(table.of(&node("edge-a")).count(), MAX_OF_NODE);
    assert_eq!(
        dropped,
        ["node edge-a claims more than 64 addresses or networks: the others are not granted"]
    );
}

#[test]
fn a_list_replaces_what_was_known_once_it_is_complete() {
    let mut state = Nodes::default();
    let known = |state: &Nodes| state.known.keys().cloned().collect::<Vec<_>>();
    assert!(!state.apply(Event::Init));
    assert!(!state.apply(Event::InitApply(object("edge-a", &["10.0.0.1"], &[]))));
    assert!(!state.apply(Event::InitApply(object("edge-b", &[], &[]))));
    assert_eq!(state.count(), 0);
    assert!(state.apply(Event::InitDone));
    assert_eq!(known(&state), ["edge-a", "edge-b"]);

    // Only what grants depend on is a change.
    assert!(!state.apply(Event::Apply(object("edge-a", &["10.0.0.1"], &[]))));
    assert!(state.apply(Event::Apply(object("edge-a", &["10.0.0.2"], &[]))));
    assert!(state.apply(Event::Apply(object("edge-c", &[], &[]))));
    assert!(state.apply(Event::Delete(object("edge-b", &[], &[]))));
    assert!(!state.apply(Event::Delete(object("edge-b", &[], &[]))));
    assert_eq!(known(&state), ["edge-a", "edge-c"]);

    // A list that breaks off counts for nothing; the next one begins anew.
    state.apply(Event::Init);
    state.apply(Event::InitApply(object("edge-x", &[], &[])));
    assert_eq!(known(&state), ["edge-a", "edge-c"]);
    state.apply(Event::Init);
    state.apply(Event::InitApply(object("edge-c", &[], &[])));
    assert!(state.apply(Event::InitDone));
    assert_eq!(known(&state), ["edge-c"]);
}
