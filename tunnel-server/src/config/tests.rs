//! Tests of what a gateway makes of its settings.

use std::{ffi::OsString, io::Write};

use clap::{Args, Command, FromArgMatches};
use tunnel_edge::daemon::settings::{Flags, Settings as _};

use super::*;

const NEEDED: &str = "
gateway_id: gw-1
edges: {cert: a.crt, key: a.key, client_ca: ca.crt}
ingress: {cert: b.crt, key: b.key, client_ca: ca.crt}
";

fn load(file: &str, flags: &[&str]) -> Result<Config, String> {
    let mut written = tempfile::NamedTempFile::new().unwrap();
    written.write_all(file.as_bytes()).unwrap();
    let path = written.path().to_str().unwrap();
    let command = Flags::<Settings>::augment_args(Command::new("tunnel-server"));
    let given = ["tunnel-server", "--config", path].into_iter().chain(flags.iter().copied());
    let matches = command.try_get_matches_from(given).unwrap();
    let flags = Flags::<Settings>::from_arg_matches(&matches).unwrap();
    flags.load(|_| None).map_err(|problems| problems.to_string().replace(path, "FILE"))
}

fn load_with(more: &str) -> Result<Config, String> {
    load(&format!("{NEEDED}{more}"), &[])
}

#[test]
fn the_defaults_are_those_of_the_documentation() {
    let config = load_with("").unwrap();
    assert_eq!(config.edges.listen.to_string(), "0.0.0.0:8443");
    assert_eq!((config.edges.max_links, config.edges.max_links_per_node), (10_000, 4));
    let tcp = config.ingress.tcp.as_ref().unwrap();
    assert_eq!((tcp.listen.to_string().as_str(), tcp.allowed_clients.len()), ("127.0.0.1:8131", 0));
    assert_eq!(config.ingress.unix, None);
    assert_eq!(config.ingress.max_header_size, 16 * 1024);
    assert_eq!(config.heartbeat, Duration::from_secs(10));
    assert_eq!((config.link.max_streams, config.link.window_budget), (1024, 16 << 20));
    assert_eq!(config.link.window_pool.unwrap().left(), 1 << 30);
    assert_eq!(config.admin.unwrap().port(), 8132);
    assert_eq!(config.timeouts, Timeouts::of("the gateway"));
}

#[test]
fn streams_at_rest_have_the_times_that_are_set() {
    let config = load_with("streams: {half_closed_timeout: none, idle_timeout: 2h}").unwrap();
    let times = (config.timeouts.half_closed, config.timeouts.idle, config.timeouts.whose);
    assert_eq!(times, (None, Some(2 * HOUR), "the gateway"));
    let problems = load_with("streams: {half_closed_timeout: 0s}").unwrap_err();
    assert!(
        problems.contains("streams.half_closed_timeout: 0s is out of range: use 1s to 7days"),
        "{problems}"
    );
}

#[test]
fn a_callers_streams_are_bounded_unless_that_is_turned_off() {
    let of = |said: &str| {
        let flags = ["--ingress-max-streams-per-caller", said];
        load(NEEDED, &flags).map(|config| config.ingress.max_streams_per_caller)
    };
    assert_eq!(load_with("").unwrap().ingress.max_streams_per_caller, NonZeroUsize::new(512));
    assert_eq!(of("1"), Ok(NonZeroUsize::new(1)));
    assert_eq!(of("none"), Ok(None));
    for said in ["0", "1.5", "off"] {
        let problem = of(said).unwrap_err();
        assert!(problem.contains("is not a number from 1 on, or none"), "{problem}");
    }
}

#[test]
fn the_host_names_the_gateway() {
    let file = NEEDED.replace("gateway_id: gw-1", "");
    match load(&file, &[]) {
        Ok(config) => {
            assert_eq!(Some(config.gateway_id.to_string()), host_name().map(|name| name.to_lowercase()));
        }
        Err(problems) => {
            assert!(problems.starts_with("gateway_id: is not set: the host name cannot serve"), "{problems}");
        }
    }
}

#[test]
fn a_unix_socket_alone_needs_no_ingress_certificate() {
    let file = "
gateway_id: gw-1
edges: {cert: a.crt, key: a.key, client_ca: ca.crt}
ingress: {listen: none, unix: /run/tunnel.sock, unix_mode: 0600}
";
    let config = load(file, &[]).unwrap();
    assert!(config.ingress.tcp.is_none());
    assert_eq!(config.ingress.unix, Some(IngressUnix { path: "/run/tunnel.sock".into(), mode: 0o600 }));
}

#[test]
fn file_modes_are_octal() {
    for (text, mode) in
        [("0660", 0o660), ("660", 0o660), ("0o660", 0), ("888", 0), ("", 0), ("1777", 0), ("+7", 0)]
    {
        assert_eq!(FileMode::parse(text).map_or(0, |mode| mode.0), mode, "{text}");
    }
}

#[test]
fn somebody_must_be_able_to_connect() {
    let file = NEEDED.replace("ingress: {", "ingress: {listen: none, ");
    let problems = load(&file, &[]).unwrap_err();
    assert_eq!(
        problems,
        "FILE:4:19: ingress.listen: is none and ingress.unix is not set, so that no control plane could connect: \
         set one of them"
    );
}

#[test]
fn listeners_must_not_share_a_port() {
    let problems =
        load(NEEDED, &["--ingress-listen", "127.0.0.1:8443", "--admin-listen", "[::]:8443"]).unwrap_err();
    let lines: Vec<&str> = problems.lines().collect();
    assert_eq!(
        lines[0],
        "--ingress-listen: 0.0.0.0:8443 is where edges connect (edges.listen): use another port"
    );
    assert_eq!(lines[1], "--admin-listen: the port is that of edges.listen too: use another");
    assert_eq!(lines[2], "--admin-listen: the port is that of ingress.listen too: use another");
    let any =
        ["--edges-listen", "127.0.0.1:0", "--ingress-listen", "127.0.0.1:0", "--admin-listen", "127.0.0.1:0"];
    load(NEEDED, &any).unwrap();
}

#[test]
fn grants_may_be_mappings_or_short() {
    let expected = Grant {
        node: "edge-a".parse().unwrap(),
        addresses: vec!["10.1.2.3".parse().unwrap()],
        cidrs: vec!["10.9.0.0/16".parse().unwrap(), "fd00::/8".parse().unwrap()],
        hosts: vec![HostName::parse("db.local").unwrap()],
        default_route: true,
    };
    let short =
        "node=edge-a,address=::ffff:10.1.2.3,cidr=10.9.0.0/16,cidr=fd00::/8,host=DB.local.,default-route";
    assert_eq!(Grant::parse(short), Ok(expected));
    let config = load_with(
        "grants:\n- node: edge-a\n  addresses: 10.1.2.3\n  cidrs: [10.9.0.0/16, 'fd00::/8']\n  hosts: [db.local]\n  default_route: true\n",
    );
    config.unwrap();
    load(NEEDED, &["--grant", short, "--grant", "node=edge-b,address=10.1.2.3"]).unwrap();
    load(NEEDED, &["--grants", "node=edge-b,address=10.1.2.3;node=edge-c"]).unwrap();
}

#[test]
fn what_one_node_has_no_other_can() {
    let problems = load_with(
        "grants:
- {node: edge-a, hosts: [db.local], cidrs: [10.0.0.0/8], addresses: [10.0.0.1], default_route: true}
- {node: edge-b, hosts: [DB.local], cidrs: [10.0.0.0/8], addresses: [10.0.0.1], default_route: true}
- {node: edge-a, hosts: [db.local]}
",
    )
    .unwrap_err();
    let expected = [
        "FILE:7:3: grants: the host name db.local is granted to edge-b, but edge-a has it already (line 6): only one node can",
        "FILE:7:3: grants: the network 10.0.0.0/8 is granted to edge-b, but edge-a has it already (line 6): only one node can",
        "FILE:7:3: grants: the default route is granted to edge-b, but edge-a has it already (line 6): only one node can",
    ];
    assert_eq!(problems.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn a_nodes_grants_must_fit_into_one_message() {
    let file = |hosts: usize| {
        let hosts: Vec<String> =
            (0..hosts).map(|number| format!("a{number:04}.{}", "x".repeat(58))).collect();
        let (some, others) = hosts.split_at(hosts.len() / 2);
        format!(
            "grants:\n- {{node: edge-a, hosts: [{}]}}\n- {{node: edge-a, hosts: [{}]}}\n- {{node: edge-b, hosts: [b]}}\n",
            some.join(", "),
            others.join(", ")
        )
    };
    load_with(&file(512)).unwrap();
    let problems = load_with(&file(513)).unwrap_err();
    assert_eq!(
        problems,
        "FILE:7:3: grants: the grants of edge-a are 32832 bytes long together, and its edge can be told 32768: grant \
         networks instead of single addresses, or the default route"
    );
}

#[test]
fn everything_wrong_with_grants_is_said_at_once() {
    let problems = load_with(
        "grants:
- {node: Edge A, cidr: 10.0.0.0/8}
- {cidrs: [10.0.0.1/8], hosts: [10.0.0.1], default_route: maybe}
- node=edge-c,adress=10.0.0.1
- [edge-d]
",
    )
    .unwrap_err();
    let says = [
        "FILE:6:10: grants.node: \"Edge A\" is not a valid node name",
        "FILE:6:18: grants.cidr: unknown key; did you mean cidrs?",
        "FILE:7:3: grants.node: is not set: say whom the grant is for",
        "FILE:7:12: grants.cidrs: \"10.0.0.1/8\" has bits set beyond its prefix: did you mean 10.0.0.0/8?",
        "FILE:7:33: grants.hosts: \"10.0.0.1\" is not a host name",
        "FILE:7:59: grants.default_route: \"maybe\" is not true or false",
        "FILE:8:3: grants: \"node=edge-c,adress=10.0.0.1\" is not a grant: node=NAME and any of",
        "FILE:9:3: grants: a list is not a grant: a mapping with the keys node, addresses,",
    ];
    for (line, says) in problems.lines().zip(says) {
        assert!(line.starts_with(says), "{line}\n{says}");
    }
    assert_eq!(problems.lines().count(), says.len(), "{problems}");
}

#[test]
fn missing_files_are_named_for_each_side() {
    let problems = load_with("").unwrap().check_files().unwrap_err();
    assert_eq!(problems.len(), 2);
    assert!(problems[0].starts_with("edges: cannot read a.crt: "), "{problems:?}");
    assert!(problems[1].starts_with("ingress: cannot read b.crt: "), "{problems:?}");
}

const KUBECONFIG: &str = "
apiVersion: v1
kind: Config
current-context: main
contexts: [{name: main, context: {cluster: c, user: u}}]
clusters: [{name: c, cluster: {server: 'https://192.0.2.1:6443'}}]
users: [{name: u, user: {exec: {apiVersion: client.authentication.k8s.io/v1, command: touch, args: [RAN]}}}]
";

/// What `check-config` says of a kubeconfig.
fn problem_of(kubeconfig: &str) -> Option<String> {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kubeconfig");
    fs::write(&path, kubeconfig.replace("RAN", folder.path().join("ran").to_str().unwrap())).unwrap();
    let config = load(NEEDED, &["--kubernetes-kubeconfig", path.to_str().unwrap()]).unwrap();
    let problems = config.check_files().unwrap_err();
    assert!(!folder.path().join("ran").exists(), "a credential plugin was run");
    let problem = problems.into_iter().find(|problem| problem.starts_with("kubernetes."));
    problem.map(|problem| problem.replace(folder.path().to_str().unwrap(), "DIR"))
}

#[test]
fn the_cluster_is_reached_as_the_setting_says() {
    assert_eq!(load_with("").unwrap().cluster, None);
    for (text, expected) in [
        ("none", None),
        ("in-cluster", Some(Access::InCluster)),
        ("/etc/kube.conf", Some(Access::Kubeconfig("/etc/kube.conf".into()))),
    ] {
        let config = load_with(&format!("kubernetes: {{kubeconfig: {text}}}")).unwrap();
        assert_eq!(config.cluster, expected);
    }
    let problems = load_with("kubernetes: {kubeconfig: ' '}").unwrap_err();
    assert!(problems.contains("\" \" is not none, in-cluster or the path of a kubeconfig"), "{problems}");
}

#[test]
fn a_kubeconfig_is_checked_without_contact() {
    assert_eq!(problem_of(KUBECONFIG), None);
    let change = |from: &str, to: &str| {
        assert!(KUBECONFIG.contains(from));
        problem_of(&KUBECONFIG.replace(from, to)).unwrap()
    };
    for (from, to, says) in [
        ("current-context: main", "", "failed to determine current context"),
        ("current-context: main", "current-context: other", "failed to load current context: other"),
        ("contexts: [", "contexts: {", "failed to parse kubeconfig YAML"),
        ("server: 'https://192.0.2.1:6443'", "insecure-skip-tls-verify: false", "cluster url is missing"),
        ("https://192.0.2.1:6443", "192.0.2.1:6443", "\"192.0.2.1:6443\" is no URL such as https://"),
        (
            "cluster: {server",
            "cluster: {proxy-url: 'http://proxy:1', server",
            "has a proxy-url, which is not supported",
        ),
        (
            "cluster: {server",
            "cluster: {certificate-authority: ca.crt, server",
            "failed to read file '\"DIR/ca.crt\"'",
        ),
        ("user: {exec", "user: {client-certificate: a.crt, client-key: a.key, exec", "\"DIR/a.crt\""),
        ("user: {exec", "user: {tokenFile: token, exec", "DIR/token"),
        ("user: u}", "user: v}", "the context \"main\" names the user \"v\", which the file does not have"),
        (
            "cluster: c,",
            "cluster: d,",
            "the context \"main\" names the cluster \"d\", which the file does not have",
        ),
        (
            "user: {exec",
            "user: {auth-provider: {name: gcp, config: {}}, exec",
            "auth-provider, which is not supported: use exec or a token",
        ),
        (
            "command: touch",
            "command: no-such-plugin",
            "the credential plugin \"no-such-plugin\" (exec) is no program that can be found",
        ),
        ("command: touch", "command: /nowhere/touch", "the credential plugin \"/nowhere/touch\" (exec)"),
        ("command: touch", "command: ./touch", "the credential plugin \"DIR/./touch\" (exec)"),
        // No program, but a file.
        ("command: touch", "command: ./kubeconfig", "the credential plugin \"DIR/./kubeconfig\" (exec)"),
        (
            "command: touch",
            "env: [{name: PATH, value: /nowhere}], command: touch",
            "the credential plugin \"touch\" (exec)",
        ),
    ] {
        let problem = change(from, to);
        assert!(problem.starts_with("kubernetes.kubeconfig: DIR/kubeconfig"), "{problem}");
        assert!(problem.contains(says), "{problem}\n{says}");
    }
    assert_eq!(problem_of(&KUBECONFIG.replace(", user: u}", "}")), None);
    let config = load(NEEDED, &["--kubernetes-kubeconfig", "/nowhere/kubeconfig"]).unwrap();
    let problems = config.check_files().unwrap_err();
    let problem = problems.last().unwrap();
    assert!(problem.contains("failed to read kubeconfig from '\"/nowhere/kubeconfig\"'"), "{problem}");
    // The tests run in no pod.
    let config = load(NEEDED, &["--kubernetes-kubeconfig", "in-cluster"]).unwrap();
    let problems = config.check_files().unwrap_err();
    let problem = problems.last().unwrap();
    assert!(
        problem.starts_with("kubernetes.kubeconfig: in-cluster: this process does not run in a pod"),
        "{problem}"
    );
}

/// Kubernetes sets such variables for every Service: one named like the binary must not configure it.
#[test]
fn no_variable_is_one_that_a_service_sets() {
    let specs = Settings::GROUPS.iter().flat_map(|group| group.settings);
    for name in specs.map(|spec| spec.variable(Settings::ENV_PREFIX)) {
        let rest = name.strip_prefix("TUNNEL_SERVER_").unwrap();
        assert!(rest != "PORT" && !rest.starts_with("SERVICE_") && !rest.starts_with("PORT_"), "{name}");
    }
}

#[test]
fn grants_can_come_from_the_environment() {
    let set = |name: &str| match name {
        "TUNNEL_SERVER_GRANTS" => Some(OsString::from("node=a,host=x; node=b,host=y")),
        "TUNNEL_SERVER_GATEWAY_ID" => Some("gw".into()),
        name if name.ends_with("_CERT") || name.ends_with("_KEY") || name.ends_with("_CA") => {
            Some("x".into())
        }
        _ => None,
    };
    Flags::<Settings>::default().load(set).unwrap();
}

const PEERS: &str = "
peers:
  listen: 10.0.0.1:8134
  cert: c.crt
  key: c.key
  ca: pca.crt
";

#[test]
fn a_gateway_is_alone_unless_it_is_told_of_others() {
    assert!(load_with("").unwrap().peers.is_none());
    let problems = load_with(PEERS).unwrap_err();
    assert!(
        problems
            .contains("peers.gateways: is not set: peers.listen is set, but no other gateway can be found"),
        "{problems}"
    );
    let problems = load_with("peers: {gateways: [\"gw:8134\"]}").unwrap_err();
    assert!(
        problems.contains("peers.listen: is none, but gateways of one cluster must reach one another"),
        "{problems}"
    );
    let problems = load_with("peers: {listen: \"0.0.0.0:8134\", gateways: [\"gw:8134\"]}").unwrap_err();
    for key in ["peers.cert", "peers.key", "peers.ca"] {
        assert!(problems.contains(&format!("{key}: is not set")), "{problems}");
    }
}

#[test]
fn gateways_find_one_another_by_a_list() {
    let more = format!("{PEERS}  gateways: [\"gateways.example:8134\", \"10.0.0.2:8134\"]\n");
    let peers = load_with(&more).unwrap().peers.unwrap();
    assert_eq!((peers.heartbeat, peers.link.max_streams), (Duration::from_secs(3), 4096));
    let Finding::List(list) = peers.finding else { panic!("not a list") };
    let shown: Vec<_> = list
        .iter()
        .map(|member| (member.address.to_string(), member.server_name.to_str().into_owned()))
        .collect();
    let named = |address: &str, name: &str| (address.to_owned(), name.to_owned());
    assert_eq!(
        shown,
        [named("gateways.example:8134", "gateways.example"), named("10.0.0.2:8134", "10.0.0.2")]
    );
    let Finding::List(list) =
        load_with(&format!("{more}  server_name: gw\n")).unwrap().peers.unwrap().finding
    else {
        panic!("not a list")
    };
    assert!(list.iter().all(|member| member.server_name.to_str() == "gw"));
    let problems = load_with(&more.replace("8134\n", "8443\n").replace("10.0.0.1", "0.0.0.0")).unwrap_err();
    assert!(
        problems.contains("peers.listen: the port is that of edges.listen too: use another"),
        "{problems}"
    );
}

#[test]
fn gateways_find_one_another_through_etcd() {
    let etcd = format!("{PEERS}etcd: {{endpoints: [\"http://etcd:2379\"]}}\n");
    let Finding::Etcd(config, own) = load_with(&etcd).unwrap().peers.unwrap().finding else {
        panic!("not etcd")
    };
    assert_eq!((config.endpoints.len(), config.prefix.as_str()), (1, "/edge-tunnel/"));
    assert_eq!(own.address.to_string(), "10.0.0.1:8134", "it is reached where it listens");
    let everywhere = etcd.replace("10.0.0.1", "0.0.0.0");
    let problems = load_with(&everywhere).unwrap_err();
    assert!(problems.contains("peers.address: is not set: peers.listen is every address"), "{problems}");
    let both = etcd.replace("  ca: pca.crt\n", "  ca: pca.crt\n  gateways: [\"gw:8134\"]\n");
    let problems = load_with(&both).unwrap_err();
    assert!(problems.contains("peers.gateways: is set, and etcd.endpoints too"), "{problems}");
    // Two mistakes of etcd's own, both said.
    let bad = etcd.replace("http://etcd:2379\"]", "etcd\"], lease: 1s, username: root");
    let problems = load_with(&bad).unwrap_err();
    assert!(problems.contains("etcd.endpoints") && problems.contains("etcd.lease"), "{problems}");
}
