//! Tests of what an edge makes of its settings.

use std::ffi::OsString;

use clap::{Args, Command, FromArgMatches};

use super::*;
use crate::daemon::settings::{Flags, Settings as _};

const NEEDED: [&str; 10] = [
    "--node",
    "edge-a",
    "--gateways",
    "gateway.example:8443",
    "--tls-cert",
    "a.crt",
    "--tls-key",
    "a.key",
    "--tls-ca",
    "ca.crt",
];

fn load(flags: &[&str]) -> Result<Config, String> {
    let command = Flags::<Settings>::augment_args(Command::new("tunnel-edge"));
    let matches = command.try_get_matches_from(["tunnel-edge"].iter().chain(flags)).unwrap();
    let flags = Flags::<Settings>::from_arg_matches(&matches).unwrap();
    flags.load(|_| None).map_err(|problems| problems.to_string())
}

fn load_with(flags: &[&str]) -> Result<Config, String> {
    load(&NEEDED.iter().chain(flags).copied().collect::<Vec<_>>())
}

#[test]
fn the_default_allows_the_kubelet_and_nothing_else() {
    let rules = |flags: &[&str]| {
        load_with(flags).unwrap().policy.rules().iter().map(ToString::to_string).collect::<Vec<_>>()
    };
    assert_eq!(rules(&[]), ["node:10250"]);
    assert_eq!(rules(&["--kubelet-port", "10350"]), ["node:10350"]);
    assert_eq!(rules(&["--allow", "10.0.0.0/8:*,node:22"]), ["10.0.0.0/8:*", "node:22"]);
    assert!(rules(&["--allow", ""]).is_empty());
}

#[test]
fn what_is_missing_is_said_all_at_once_with_how_to_give_it() {
    let problems = load(&["--backoff-min", "1m", "--link-max-streams", "0"]).unwrap_err();
    let says = [
        "--link-max-streams: 0 is out of range: use 1 to 65536",
        "gateways: is not set: say where the gateways are (--gateways HOST:PORT, TUNNEL_EDGE_GATEWAYS, or gateways in",
        "--backoff-min: must not be longer than backoff.max",
        "tls.cert: is not set: an edge proves by a client certificate which node it is (--tls-cert PATH, TUNNEL_EDGE_",
        "tls.key: is not set: ",
        "tls.ca: is not set: ",
    ];
    for (line, says) in problems.lines().zip(says) {
        assert!(line.starts_with(says), "{line}\n{says}");
    }
    assert_eq!(problems.lines().count(), says.len(), "{problems}");
}

#[test]
fn a_gateway_named_twice_is_a_slip() {
    let problems = load_with(&["--gateway", "GATEWAY.example:8443"]).unwrap_err();
    assert_eq!(problems, "--gateways: gateway.example:8443 is there twice");
}

#[test]
fn proxies_are_parsed_and_their_passwords_never_shown() {
    let proxy = |text: &str| ProxyChoice::parse(text);
    assert_eq!(proxy("none"), Ok(ProxyChoice::Direct));
    for (text, shown) in [
        ("http://proxy:3128", "http://proxy:3128"),
        ("http://user:secret@proxy.example/", "http://proxy.example:80"),
        ("http://[fd00::1]:3128", "http://[fd00::1]:3128"),
        ("http://[fd00::1]", "http://[fd00::1]:80"),
    ] {
        let proxy = proxy(text).unwrap();
        assert_eq!(proxy.to_string(), shown);
        assert!(!format!("{proxy:?}").contains("secret"));
    }
    for text in ["", "proxy:3128", "https://user:secret@proxy", "http://user:secret@", "http://a/secret"] {
        let error = proxy(text).unwrap_err();
        assert!(error.starts_with("is not none, ") && !error.contains("secret"), "{error}");
    }
}

#[test]
fn missing_files_are_named() {
    let error = load_with(&[]).unwrap().check_files().unwrap_err();
    assert!(error.starts_with("tls: cannot read a.crt: "), "{error}");
}

/// Kubernetes sets such variables for every Service: one named like the binary must not configure it.
#[test]
fn no_variable_is_one_that_a_service_sets() {
    let names = Settings::GROUPS
        .iter()
        .flat_map(|group| group.settings)
        .map(|spec| spec.variable(Settings::ENV_PREFIX));
    for name in names {
        let rest = name.strip_prefix("TUNNEL_EDGE_").unwrap();
        assert!(rest != "PORT" && !rest.starts_with("SERVICE_") && !rest.starts_with("PORT_"), "{name}");
    }
}

#[test]
fn every_value_can_come_from_the_environment() {
    let set = |name: &str| match name {
        "TUNNEL_EDGE_GATEWAYS" => Some(OsString::from("a:1,b:2")),
        "TUNNEL_EDGE_TLS_CERT" | "TUNNEL_EDGE_TLS_KEY" | "TUNNEL_EDGE_TLS_CA" => Some("x".into()),
        "TUNNEL_EDGE_NODE" => Some("edge-a".into()),
        "TUNNEL_EDGE_ADMIN_LISTEN" => Some("none".into()),
        _ => None,
    };
    let config = Flags::<Settings>::default().load(set).unwrap();
    assert_eq!(config.gateways.len(), 2);
    assert_eq!(config.admin, None);
}

#[test]
fn streams_at_rest_have_times_and_none_turns_them_off() {
    let times =
        |flags: &[&str]| load_with(flags).map(|config| (config.timeouts.half_closed, config.timeouts.idle));
    let minutes = |minutes: u64| Some(Duration::from_secs(60 * minutes));
    assert_eq!(times(&[]), Ok((minutes(15), None)));
    assert_eq!(load_with(&[]).unwrap().timeouts, Timeouts::of("the edge"));
    let both = ["--streams-half-closed-timeout", "none", "--streams-idle-timeout", "1h"];
    assert_eq!(times(&both), Ok((None, minutes(60))));
    for (flag, given, says) in [
        ("--streams-idle-timeout", "999ms", "999ms is out of range: use 1s to 7days"),
        ("--streams-half-closed-timeout", "8days", "8days is out of range: use 1s to 7days"),
        (
            "--streams-idle-timeout",
            "off",
            "\"off\" is not a duration with its unit, such as 10s, 15m or 1h30m, or none",
        ),
    ] {
        let problem = load_with(&[flag, given]).unwrap_err();
        assert_eq!(problem.trim_end(), format!("{flag}: {says}"));
    }
    assert!(times(&["--streams-idle-timeout", "1s", "--streams-half-closed-timeout", "7days"]).is_ok());
}
